//! What every program knows of the host, its networks and its uplinks.

use super::Address;

/// What the control plane tells every program. Map [`super::map::SETTINGS`], key 0.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Cookie of the host's network namespace (`SO_NETNS_COOKIE`): socket hooks act in it only.
    pub netns_cookie: u64,
    /// First port of the dynamic range of masquerade.
    pub dynamic_port_first: u16,
    /// Size of that range less one; the size is a power of two.
    pub dynamic_port_mask: u16,
    /// First of the host's own ephemeral ports (`net.ipv4.ip_local_port_range`).
    pub host_port_first: u16,
    /// Last of them.
    pub host_port_last: u16,
    /// Flows and bindings that one endpoint may have at once.
    pub flows_per_endpoint: u32,
    /// Interface from whose point of view routes are looked up for static mappings; 0: there are
    /// no mappings.
    pub mapping_link: u32,
}

/// Whose datagrams reach an endpoint by a binding (RFC 4787 section 5): what also holds for TCP
/// where its mapping is endpoint-independent.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Filtering {
    /// Those of a peer to whose address the endpoint has sent something.
    AddressDependent = 0,
    /// Those of a peer to whose address and port the endpoint has sent something.
    AddressAndPortDependent = 1,
    /// Anybody's. For an endpoint with a policy it means [`Filtering::AddressDependent`].
    EndpointIndependent = 2,
}

/// How external ports are chosen (RFC 4787 section 4.1).
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// One for all peers of an inside port: a binding.
    EndpointIndependent = 0,
    /// One for each flow; different peers may share it.
    PerFlow = 1,
}

/// Interfaces that a network can be restricted to.
pub const NETWORK_UPLINKS: usize = 8;

/// What a network chose. Map [`super::map::NETWORKS`], key: the network's number;
/// [`super::MAPPED`] for hosts that are in none.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Network {
    /// Idle time of an established TCP connection (RFC 5382 REQ-5: at least 7,440 s).
    pub tcp_established_s: u32,
    /// Idle time of a half-open or closing TCP connection (RFC 5382 REQ-5: at least 240 s).
    pub tcp_transitory_s: u32,
    /// Idle time of a UDP flow and binding (RFC 4787 REQ-5: at least 120 s, default 300 s).
    pub udp_s: u32,
    /// The same towards port 53 (RFC 4787 REQ-5a).
    pub udp_dns_s: u32,
    /// Idle time of an ICMP query (RFC 5508 REQ-2: at least 60 s).
    pub icmp_s: u32,
    /// [`Filtering`].
    pub filtering: u32,
    /// [`Mapping`] of UDP.
    pub udp_mapping: u32,
    /// [`Mapping`] of TCP.
    pub tcp_mapping: u32,
    /// 1: masquerade keeps a source port that the host's own connections never have.
    pub keeps_ports: u32,
    /// 1: its publishes are served at `uplinks` only.
    pub is_restricted: u32,
    /// Interface indexes; 0: none.
    pub uplinks: [u32; NETWORK_UPLINKS],
    /// Zero; for later versions.
    pub reserved: [u8; 8],
}

/// A host interface on which a program of nucnet's sits. Map [`super::map::UPLINKS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Uplink {
    /// Bytes of link-layer header: 14 or 0.
    pub header: u32,
    /// Largest IP packet that it takes, in bytes, where the kernel's route lookup does not say
    /// (before Linux 5.12); 0: unknown.
    pub mtu: u32,
    /// Masquerade address where the kernel's route lookup gives none (before Linux 6.7).
    pub address4: Address,
    /// The same for IPv6.
    pub address6: Address,
}
