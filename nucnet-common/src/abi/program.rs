//! Names of programs as pinned under `BPFFS/progs/`, equal to the names in the object.

/// TC ingress of an endpoint's host side: everything that an endpoint sends.
pub const FROM_ENDPOINT: &str = "from_endpoint";
/// TC ingress of a microVM's TAP, in the network namespace of its slot: everything that the
/// guest sends.
pub const FROM_GUEST: &str = "from_guest";
/// TC ingress of the slot's side of its veth pair: everything that the guest receives.
pub const TO_GUEST: &str = "to_guest";
/// TC ingress of an uplink with Ethernet headers.
pub const FROM_UPLINK: &str = "from_uplink";
/// TC ingress of an uplink without link-layer header (tun, wireguard, ppp).
pub const FROM_UPLINK_L3: &str = "from_uplink_l3";
/// TC egress of a network's bridge: everything that the host sends to endpoints.
pub const FROM_HOST: &str = "from_host";
/// TC egress of the loopback interface: everything that the host sends to itself.
pub const FROM_LOOPBACK: &str = "from_loopback";
/// `cgroup/bind4`: host sockets that want a port.
pub const BIND4: &str = "host_bind4";
/// `cgroup/bind6`.
pub const BIND6: &str = "host_bind6";
