//! The ABI between the BPF programs and the control plane: map names, keys, values, sizes.
//!
//! Conventions, for every type here:
//! * An [`Address`] is 16 bytes in network order; an IPv4 address is held in its mapped form
//!   (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2), so that one table serves both families and
//!   `bpftool` prints the bytes of an address in the order in which people write them.
//! * Ports are in host byte order (a 53 prints as 53), except inside keys of
//!   longest-prefix-match tries, whose bits are compared from the first byte on.
//! * Times are nanoseconds of `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`), unless a name ends in
//!   `_s`: seconds.
//! * No type has implicit padding: the kernel compares keys byte by byte.
//! * Names of maps are cut at 15 characters by the kernel; none is longer.

/// Rises with every change of a map's layout or meaning. Programs and control plane of
/// different versions never share maps.
pub const VERSION: u32 = 4;

/// An IPv6 address, or an IPv4 address in its mapped form; network byte order.
pub type Address = [u8; 16];

/// A link-layer address.
pub type Mac = [u8; 6];

/// The first twelve bytes of every mapped IPv4 address.
pub const V4_MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// "Any address" of IPv4, as a publish without a host address has it.
pub const ANY_V4: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];

/// "Any address" of IPv6.
pub const ANY_V6: Address = [0; 16];

/// No address at all.
pub const NO_ADDRESS: Address = [0; 16];

/// Names of maps as pinned under `BPFFS/maps/`, equal to the names in the object.
pub mod map {
    /// `Settings`, one entry.
    pub const SETTINGS: &str = "settings";
    /// Network number (`u32`) to [`super::Network`].
    pub const NETWORKS: &str = "networks";
    /// Interface index (`u32`) to [`super::Endpoint`].
    pub const ENDPOINTS: &str = "endpoints";
    /// Interface index (`u32`) to [`super::Guest`].
    pub const GUESTS: &str = "guests";
    /// [`super::Address`] to [`super::Owner`].
    pub const ADDRESSES: &str = "addresses";
    /// [`super::PublishKey`] (trie) to [`super::Publish`].
    pub const PUBLISHES: &str = "publishes";
    /// The same for hairpins, whose sources are limited.
    pub const HAIRPINS: &str = "hairpins";
    /// Number of a mapping (`u32`) to [`super::StaticMapping`].
    pub const MAPPINGS: &str = "mappings";
    /// [`super::SnatKey`] (trie) to [`super::Snat`].
    pub const SNATS: &str = "snats";
    /// Number of a mapping (`u32`) to [`super::MappingCount`], per CPU.
    pub const MAPPING_COUNTS: &str = "mapping_counts";
    /// [`super::FlowKey`] to [`super::Flow`].
    pub const FLOWS: &str = "flows";
    /// [`super::OutsideKey`] to [`super::FlowKey`].
    pub const OUTSIDE: &str = "outside";
    /// [`super::FlowKey`] without a peer to [`super::Binding`].
    pub const BINDINGS: &str = "bindings";
    /// [`super::Slot`] array: who takes which place in the table of flows.
    pub const SLOTS: &str = "slots";
    /// Endpoint number (`u32`) to [`super::Usage`].
    pub const USAGE: &str = "usage";
    /// Interface index (`u32`) to [`super::Uplink`].
    pub const UPLINKS: &str = "uplinks";
    /// [`super::DropKey`] to [`super::DropCount`], per CPU.
    pub const DROPS: &str = "drops";
    /// [`super::PolicyCidrKey`] (trie) to [`super::PolicyClass`].
    pub const POLICY_CIDRS: &str = "policy_cidrs";
    /// [`super::PolicyPortKey`] (trie) to [`super::PolicyRule`].
    pub const POLICY_PORTS: &str = "policy_ports";
    /// Ring buffer of lines that aya-log makes, for the monitor that debugs.
    pub const LOG: &str = "AYA_LOGS";
    /// Ring buffers of [`super::Event`], one for each monitor.
    pub const EVENTS: [&str; super::size::MONITORS] = ["events0", "events1", "events2", "events3"];
    /// [`super::Monitor`] array: which of them somebody reads.
    pub const MONITORS: &str = "monitors";
    /// [`super::Lost`] array: what did not fit into which.
    pub const EVENTS_LOST: &str = "events_lost";
    /// Endpoint number (`u32`) to [`super::EventLimit`].
    pub const EVENT_LIMITS: &str = "event_limits";

    /// Every map, in the order of the object.
    pub const ALL: [&str; 27] = [
        SETTINGS,
        NETWORKS,
        ENDPOINTS,
        GUESTS,
        ADDRESSES,
        PUBLISHES,
        HAIRPINS,
        MAPPINGS,
        SNATS,
        MAPPING_COUNTS,
        FLOWS,
        OUTSIDE,
        BINDINGS,
        SLOTS,
        USAGE,
        UPLINKS,
        DROPS,
        POLICY_CIDRS,
        POLICY_PORTS,
        EVENTS[0],
        EVENTS[1],
        EVENTS[2],
        EVENTS[3],
        MONITORS,
        EVENTS_LOST,
        EVENT_LIMITS,
        LOG,
    ];
}

/// Names of programs as pinned under `BPFFS/progs/`, equal to the names in the object.
pub mod program {
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
}

/// Capacities of the maps.
pub mod size {
    /// Endpoints of one host (a bridge takes at most 1023 ports; there may be many bridges).
    pub const ENDPOINTS: usize = 65_536;
    /// Interfaces of microVM slots: two a piece.
    pub const GUESTS: usize = 2 * ENDPOINTS;
    /// Addresses of endpoints: two a piece.
    pub const ADDRESSES: usize = 2 * ENDPOINTS;
    /// Prefixes of published ports; a range of ports takes at most 30 (IPv4 and IPv6: 60).
    pub const PUBLISHES: usize = 262_144;
    /// Networks of one host.
    pub const NETWORKS: usize = 4_096;
    /// Static mappings of one host.
    pub const MAPPINGS: usize = 16_384;
    /// Prefixes of snat mappings: two a piece.
    pub const SNATS: usize = 2 * MAPPINGS;
    /// Places: flows and bindings of all endpoints together; a power of two ([`super::Slot`]).
    pub const SLOTS: usize = 524_288;
    /// No more than places, so that whoever has a place finds room.
    pub const FLOWS: usize = SLOTS;
    /// Likewise.
    pub const BINDINGS: usize = SLOTS;
    /// A flow has two entries at most, a binding one.
    pub const OUTSIDE: usize = 2 * SLOTS;
    /// Places among which the flows of one endpoint are, at most; a power of two.
    pub const SLOT_WINDOW: usize = 65_536;
    /// Interfaces of the host that are not nucnet's own.
    pub const UPLINKS: usize = 4_096;
    /// Endpoint and reason.
    pub const DROPS: usize = 262_144;
    /// Prefixes of all policies together.
    pub const POLICY_CIDRS: usize = 1_048_576;
    /// Port prefixes of all classes together.
    pub const POLICY_PORTS: usize = 1_048_576;
    /// Monitors that may run at once: a ring buffer has one reader.
    pub const MONITORS: usize = 4;
    /// Those who read something: monitors, and who of them reads [`super::map::LOG`], last.
    pub const READERS: usize = MONITORS + 1;
    /// Bytes of [`super::map::LOG`]: some 500 lines; a power of two, in whole pages.
    pub const LOG: usize = 131_072;
    /// Bytes of a monitor's ring buffer: some 700 events; a power of two, in whole pages.
    pub const EVENTS: usize = 131_072;
    /// Refusals that an endpoint has in mind so as to tell them once ([`super::EventLimit`]); a
    /// power of two.
    pub const RECENT: usize = 8;
}

/// What the control plane tells every program. Map [`map::SETTINGS`], key 0.
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

/// What a network chose. Map [`map::NETWORKS`], key: the network's number; [`MAPPED`] for hosts
/// that are in none.
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

/// How packets reach an endpoint.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Through the peer of a veth pair (`bpf_redirect_peer`).
    Peer = 1,
    /// Out of the interface itself (`bpf_redirect`): a TAP.
    Link = 2,
}

/// Flags of an endpoint's policy, [`Endpoint::policy_flags`].
pub mod policy_flag {
    /// Denials are counted, and told to nobody.
    pub const QUIET: u32 = 1;
    /// What is denied is answered, so that whoever sent it need not wait.
    pub const REJECT: u32 = 2;
}

/// A container or microVM. Map [`map::ENDPOINTS`], key: the index of its host side interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Identity and generation in one: never given twice while the maps live.
    pub number: u32,
    /// Number of its network.
    pub network: u32,
    /// Interface index of its network's bridge: the point of view for route lookups, for which
    /// forwarding must be on there.
    pub bridge: u32,
    /// [`Delivery`].
    pub delivery: u32,
    /// Policy in force; 0: none, everything may leave. Never given twice.
    pub policy: u32,
    /// What the policy says where no rule does: [`PolicyAction`].
    pub policy_default: u32,
    /// Flows that were judged under this policy, or a later one, are not judged again.
    pub policy_since: u32,
    /// Class of the policy's rules about the host's own addresses; 0: there is none.
    pub policy_host: u32,
    /// [`policy_flag`] bits.
    pub policy_flags: u32,
    /// IPv4 address, or zero bytes: none.
    pub address4: Address,
    /// IPv6 address, or zero bytes: none.
    pub address6: Address,
    /// The network's own IPv4 address, or zero bytes.
    pub gateway4: Address,
    /// The network's own IPv6 address, or zero bytes.
    pub gateway6: Address,
    /// Its link-layer address.
    pub mac: Mac,
    /// The link-layer address of its network's bridge.
    pub gateway_mac: Mac,
    /// 1: no direct traffic to or from other networks.
    pub isolated: u32,
    /// Largest IP packet that it takes, in bytes.
    pub mtu: u32,
    /// Zero; for later versions.
    pub reserved: [u8; 16],
}

/// A microVM's guest, at either end of its slot. Map [`map::GUESTS`].
///
/// The two interfaces of a slot have indexes that no other slot's have, although each slot is a
/// network namespace of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// The endpoint's number.
    pub endpoint: u32,
    /// The interface at the other end: the slot's side of its veth pair from the TAP, and the TAP
    /// from there.
    pub across: u32,
    /// The address that the guest has itself.
    pub address: Address,
    /// Its gateway, as it has it.
    pub gateway: Address,
    /// The address that everybody else knows the guest by: the endpoint's.
    pub outer_address: Address,
    /// The host's address on the link to the slot, which the guest knows as its gateway: the
    /// endpoint's gateway.
    pub outer_gateway: Address,
    /// Zero; for later versions.
    pub reserved: [u8; 8],
}

/// Whose address it is. Map [`map::ADDRESSES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Index of the endpoint's host side interface: the key of [`map::ENDPOINTS`].
    pub link: u32,
    /// The endpoint's number.
    pub endpoint: u32,
}

/// Which packets a publish takes: the data of a key of the trie [`map::PUBLISHES`].
/// A range of ports is a handful of prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublishKey {
    /// Host address, or [`ANY_V4`] or [`ANY_V6`].
    pub address: Address,
    /// IP protocol number.
    pub protocol: u8,
    /// [`PublishUse`].
    pub kind: u8,
    /// Host port, network byte order: last, because a prefix may end in it.
    pub port: [u8; 2],
}

/// What an entry of [`map::PUBLISHES`] is for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishUse {
    /// It takes packets.
    Packets = 0,
    /// It only says, under "any address", that the port is published, or that of a dnat, on some
    /// address of the family: no socket of the host's may bind it for all of them.
    Held = 1,
}

impl PublishKey {
    /// Length in bits of a key with a whole port. A block of `2^n` ports is `n` shorter.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
}

/// Where a published port leads. Map [`map::PUBLISHES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Publish {
    /// Index of the endpoint's host side interface.
    pub link: u32,
    /// The endpoint's number.
    pub endpoint: u32,
    /// First host port of the range; the range maps port by port.
    pub host_port: u16,
    /// The endpoint's port for that first one.
    pub port: u16,
    /// The mapping whose target it leads to, in place of an endpoint; 0: an endpoint.
    pub mapping: u32,
}

/// Stands for the number of an endpoint, and of its network, in the flows of hosts that are none:
/// those beyond the interfaces of the host that static mappings lead to, or translate.
pub const MAPPED: u32 = u32::MAX;

/// What a static mapping translates.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// The destination: ports of an external address lead to an internal one.
    Dnat = 1,
    /// The source: internal addresses leave as an external one.
    Snat = 2,
    /// Both: clients in the network of the internal address reach it by the external one.
    Hairpin = 3,
}

/// A static mapping. Map [`map::MAPPINGS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StaticMapping {
    /// [`MappingKind`].
    pub kind: u32,
    /// Only what comes in by this interface (dnat) or leaves by it (snat); 0: any.
    pub link: u32,
    /// External address.
    pub external: Address,
    /// Target of dnat and hairpin.
    pub internal: Address,
    /// Whose packets are translated: the prefix's address.
    pub sources: Address,
    /// Length of that prefix in bits of the mapped form; 0: everybody's.
    pub sources_bits: u32,
    /// Zero.
    pub pad: u32,
}

/// The data of a key of the trie [`map::SNATS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnatKey {
    /// Interface by which packets leave, network byte order; 0: any;
    /// [`SnatKey::SOURCES`]: whether there is any mapping for the source.
    pub link: [u8; 4],
    /// Source.
    pub source: Address,
}

impl SnatKey {
    /// In place of an interface.
    pub const SOURCES: u32 = u32::MAX;
    /// Length in bits of a key with a whole address.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
}

/// Which mapping translates a source. Map [`map::SNATS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snat {
    /// Its number.
    pub mapping: u32,
}

/// What came by a mapping. Map [`map::MAPPING_COUNTS`], per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingCount {
    /// Flows that were opened.
    pub flows: u64,
    /// Packets of them, both directions.
    pub packets: u64,
    /// Bytes of those (layer 3 and up).
    pub bytes: u64,
}

/// A conversation as its endpoint sees it. Map [`map::FLOWS`]; with the external address as
/// `peer` and 0 as `peer_port`, an endpoint-independent binding of [`map::BINDINGS`]: one for each
/// address of the host that the endpoint is seen by.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct FlowKey {
    /// The endpoint's number.
    pub endpoint: u32,
    /// IP protocol number; ICMP and ICMPv6 as they are.
    pub protocol: u32,
    /// The endpoint's address.
    pub inside: Address,
    /// The other side, as the endpoint addresses it.
    pub peer: Address,
    /// The endpoint's port, or its ICMP query identifier.
    pub inside_port: u16,
    /// The peer's port; 0 for ICMP.
    pub peer_port: u16,
}

/// In the protocol of an [`OutsideKey`]: it stands for every port of the peer.
pub const PERMISSION: u32 = 0x100;

/// Policy of a flow that no policy has judged yet. No policy has this number.
pub const UNJUDGED: u32 = u32::MAX;

/// A conversation as the outside sees it. Map [`map::OUTSIDE`]; with `peer` and `peer_port`
/// zero, the external side of a binding; with [`PERMISSION`] in `protocol` and `peer_port` zero,
/// the permission of a peer's address to use a binding, which names a flow to that address.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct OutsideKey {
    /// IP protocol number, and perhaps [`PERMISSION`].
    pub protocol: u32,
    /// The address that stands for the endpoint.
    pub external: Address,
    /// The other side's real address.
    pub peer: Address,
    /// The port that stands for the endpoint's, or the ICMP query identifier.
    pub external_port: u16,
    /// The other side's real port; 0 for ICMP.
    pub peer_port: u16,
}

/// The life of a flow. RFC 6146 section 3.5.2.2 for TCP, simplified by what idle times need.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FlowState {
    /// Nothing came back yet.
    Opening = 1,
    /// Both sides spoke; TCP: the handshake is over.
    Established = 2,
    /// TCP: one side sent FIN.
    Closing = 3,
    /// TCP: both sides sent FIN, or the last word was a RST. First to be reclaimed under pressure.
    Closed = 4,
}

/// Where the peer of a flow is, and so where its packets go.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerKind {
    /// Beyond an uplink.
    Uplink = 1,
    /// The host itself.
    Host = 2,
    /// Another endpoint, or the endpoint itself by way of a publish.
    Endpoint = 3,
    /// A socket of the host's that asked for a publish: packets go over the loopback interface.
    Loopback = 4,
}

/// Flow flags, [`Flow::flags`].
pub mod flow_flag {
    /// The peer sent the first packet: replies pass every policy.
    pub const INBOUND: u32 = 1;
    /// TCP: the endpoint sent FIN.
    pub const FIN_INSIDE: u32 = 2;
    /// TCP: the peer sent FIN.
    pub const FIN_PEER: u32 = 4;
    /// The external port belongs to a binding of [`super::map::BINDINGS`].
    pub const BOUND: u32 = 8;
    /// TCP: the last word was a RST.
    pub const RESET: u32 = 16;
    /// TCP: whoever did not open it has answered.
    pub const ANSWERED: u32 = 32;
    /// TCP: the handshake is over.
    pub const CONNECTED: u32 = 64;
}

/// One tracked conversation and its translation. Map [`map::FLOWS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Flow {
    /// First packet.
    pub created: u64,
    /// Latest packet.
    pub last_seen: u64,
    /// Latest look at routes and binding; at most once a second.
    pub checked: u64,
    /// Packets and bytes (layer 3 and up) that the endpoint sent.
    pub packets_out: u64,
    /// Bytes of them.
    pub bytes_out: u64,
    /// Packets that it received.
    pub packets_in: u64,
    /// Bytes of them.
    pub bytes_in: u64,
    /// What the outside sees in place of the endpoint's address.
    pub external: Address,
    /// The peer's real address.
    pub peer: Address,
    /// Next hop towards the peer; zero bytes: back to whoever delivers the peer's packets, since
    /// the kernel's own route leaves by another uplink.
    pub next_hop: Address,
    /// Next hop towards the inside, of flows of [`MAPPED`] hosts.
    pub inside_hop: Address,
    /// What the outside sees in place of the endpoint's port.
    pub external_port: u16,
    /// The peer's real port.
    pub peer_port: u16,
    /// [`FlowState`].
    pub state: u32,
    /// [`flow_flag`] bits.
    pub flags: u32,
    /// [`PeerKind`].
    pub peer_kind: u32,
    /// Idle time after which it is dead, in seconds.
    pub timeout_s: u32,
    /// The endpoint's policy when the flow was last judged.
    pub policy: u32,
    /// Index of the owner's host side interface; of a [`MAPPED`] host, of the one towards it.
    pub link: u32,
    /// Where packets to the peer leave: uplink, bridge, or the other endpoint's interface.
    pub peer_link: u32,
    /// Its place in [`map::SLOTS`].
    pub slot: u32,
    /// [`Slot::version`] since it took that place.
    pub slot_version: u32,
    /// Destination and source of frames to the peer, looked up at most a second ago; zero bytes:
    /// the kernel is to find them. Where `next_hop` is zero bytes, those of the peer's latest
    /// frame, exchanged.
    pub macs: [u8; 12],
    /// The static mapping that it came by; 0: none.
    pub mapping: u32,
    /// Largest IP packet that the way to a peer beyond an uplink takes, in bytes, looked up at
    /// most a second ago; 0: unknown.
    pub mtu: u32,
    /// Zero; for later versions without migration.
    pub reserved: [u8; 8],
}

/// External side of an endpoint-independent binding. Map [`map::BINDINGS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Binding {
    /// Latest outbound packet, to within a second.
    pub last_seen: u64,
    /// External address.
    pub external: Address,
    /// External port or query identifier.
    pub external_port: u16,
    /// 1: nothing but questions to the domain name system use it.
    pub is_for_questions: u16,
    /// Idle time after which it is dead, in seconds.
    pub timeout_s: u32,
    /// Its place in [`map::SLOTS`].
    pub slot: u32,
    /// [`Slot::version`] since it took that place.
    pub slot_version: u32,
    /// Zero.
    pub reserved: [u8; 8],
}

/// The kernel's `struct bpf_spin_lock`, which it finds in a map value by this name.
#[repr(C)]
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct bpf_spin_lock {
    /// The kernel's.
    pub val: u32,
}

/// What takes a place.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotUse {
    /// Nothing.
    Free = 0,
    /// A flow.
    Flow = 1,
    /// A binding.
    Binding = 2,
}

/// A place that a flow or binding must take before it exists. A newcomer looks at a few places
/// drawn at random and takes one that is free or whose holder is dead, so that dead entries
/// are reclaimed in the packet path and live ones never. Map [`map::SLOTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Guards the rest.
    pub lock: bpf_spin_lock,
    /// Rises each time that the place changes hands.
    pub version: u32,
    /// [`SlotUse`].
    pub holds: u32,
    /// The holder.
    pub key: FlowKey,
}

/// What an endpoint uses. Map [`map::USAGE`], key: the endpoint's number. Exact: changed by
/// whoever's map operation succeeded, never guessed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Flows in the table, live and not yet reclaimed.
    pub flows: u64,
    /// Bindings in the table.
    pub bindings: u64,
}

/// A host interface on which a program of nucnet's sits. Map [`map::UPLINKS`].
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

/// What a policy does with a packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// Goes on.
    Allow = 1,
    /// Is dropped and counted; answered, if the policy says so ([`policy_flag::REJECT`]).
    Deny = 2,
}

/// The data of a key of the trie [`map::POLICY_CIDRS`]. An IPv4 prefix of length `n` has
/// `32 + 96 + n` bits, an IPv6 prefix `32 + n`. Whoever compiles a policy must give the whole
/// of mapped IPv4 (`::ffff:0:0/96`) an entry of its own, lest `::/0` speak for IPv4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCidrKey {
    /// The policy's number, network byte order.
    pub policy: [u8; 4],
    /// Prefix of the destination.
    pub address: Address,
}

/// All the rules that cover a prefix, overlapping shorter prefixes included (union). Map
/// [`map::POLICY_CIDRS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyClass {
    /// Number of the set of rules; unique among all policies; 0: no rule, the default decides.
    pub class: u32,
}

/// Which ports of a class a verdict is for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyProtocol {
    /// Neither of the others; the port is 0.
    Other = 0,
    /// TCP.
    Tcp = 1,
    /// UDP.
    Udp = 2,
    /// ICMP and ICMPv6; the port is 0.
    Icmp = 3,
}

/// The data of a key of the trie [`map::POLICY_PORTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyPortKey {
    /// [`PolicyClass::class`], network byte order.
    pub class: [u8; 4],
    /// [`PolicyProtocol`].
    pub protocol: u8,
    /// Zero: keeps the port, which a prefix may end in, at the end.
    pub pad: u8,
    /// Destination port, network byte order.
    pub port: [u8; 2],
}

/// The verdict for some ports of a class. Map [`map::POLICY_PORTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyRule {
    /// [`PolicyAction`].
    pub action: u32,
    /// Which rule of the policy decides: 1 is the first of the policy as shown.
    pub rule: u32,
}

/// Key of [`map::DROPS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DropKey {
    /// The endpoint's number; 0: none is known.
    pub endpoint: u32,
    /// [`Reason`].
    pub reason: u32,
}

/// Value of [`map::DROPS`], per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropCount {
    /// Packets.
    pub packets: u64,
    /// Bytes, link-layer header included.
    pub bytes: u64,
}

/// What an [`Event`] is about.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A packet was dropped because the endpoint's policy denies it.
    Denied = 1,
    /// A packet was dropped for another reason.
    Dropped = 2,
    /// A flow was opened.
    FlowNew = 3,
    /// A TCP connection was closed, or an entry removed that was idle for too long.
    FlowClosed = 4,
}

/// Something worth telling. Rings [`map::EVENTS`].
///
/// Of a packet, source and destination are those that it had when it was dropped; of a flow,
/// those that its first packet had for the endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: u64,
    /// Events of the same endpoint, of the same sort (refusals or flows), that were not told
    /// since the one before, for there were too many.
    pub suppressed: u64,
    /// Of a flow: packets in both directions.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Source; zero bytes: the packet could not be read.
    pub source: Address,
    /// Destination.
    pub destination: Address,
    /// Of a flow: its source as the other side sees it.
    pub nat_source: Address,
    /// Of a flow: its destination as the other side has it.
    pub nat_destination: Address,
    /// Source port; of an echo message, its identifier.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// The port of `nat_source`.
    pub nat_source_port: u16,
    /// The port of `nat_destination`.
    pub nat_destination_port: u16,
    /// [`EventKind`].
    pub kind: u32,
    /// The endpoint's number; 0: none is known.
    pub endpoint: u32,
    /// [`Reason`]; 0: none, it is about a flow.
    pub reason: u32,
    /// IP protocol number; 0: the packet could not be read.
    pub protocol: u32,
    /// The policy that denied it; 0: none did.
    pub policy: u32,
    /// Which rule of that policy; 0: its default.
    pub rule: u32,
}

/// Where a packet would go, [`Explained::way`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayKind {
    /// On its way: it is none of nucnet's business.
    Pass = 0,
    /// Into an endpoint.
    Endpoint = 2,
    /// Out of an interface.
    Link = 3,
    /// To the host.
    Host = 4,
    /// Nowhere.
    Dropped = 5,
}

/// What would become of a packet. A dry run of the programs leaves it in their map `explained`,
/// which is pinned nowhere.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Explained {
    /// [`WayKind`].
    pub way: u32,
    /// The interface that it would go to.
    pub link: u32,
    /// [`Reason`] of a drop.
    pub reason: u32,
    /// The endpoint on whose account it would be dropped, or whose flow it is.
    pub endpoint: u32,
    /// The rule of the endpoint's policy that decided; 0: its default, or none had to.
    pub rule: u32,
    /// 1: `key` and `flow` are those of its flow.
    pub has_flow: u32,
    /// 1: that flow would be made.
    pub is_new: u32,
    /// 1: the sender would be told that the policy denies it.
    pub is_rejected: u32,
    /// The flow as its endpoint sees it.
    pub key: FlowKey,
    /// The flow as the packet would leave it.
    pub flow: Flow,
}

/// Whether anybody reads a ring of [`map::EVENTS`]. Map [`map::MONITORS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Monitor {
    /// Events are written until then. The reader puts it off while it runs, so that nobody
    /// writes for one that was killed.
    pub until: u64,
    /// The reader's process id.
    pub process: u32,
    /// Chosen at random by the reader: tells its claims from others of the same process.
    pub token: u32,
}

/// What found no room. Map [`map::EVENTS_LOST`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Events.
    pub events: u64,
}

/// How many events of one sort an endpoint has caused within a second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventBudget {
    /// When the second began.
    pub since: u64,
    /// Events told since then.
    pub told: u64,
    /// Events that were not, since the latest that was. Two processors that count at the same
    /// moment may count as one.
    pub suppressed: u64,
}

/// A refusal that was told, [`EventLimit::recent`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// A hash over packet and reason.
    pub hash: u64,
    /// The latest packet of that kind.
    pub seen: u64,
}

/// Keeps the events of one endpoint within bounds. Map [`map::EVENT_LIMITS`], key: the
/// endpoint's number; 0: of no endpoint. Only used while somebody monitors.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventLimit {
    /// Of denied and dropped packets.
    pub refusals: EventBudget,
    /// Of flows.
    pub flows: EventBudget,
    /// What was told lately, each at a place that its hash chooses: a retransmission is no news.
    pub recent: [Recent; size::RECENT],
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal;)+) => {
        /// Why a packet was dropped: verdict, counter and display text in one.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The name that people and programs read; stable.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The reason with that number.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// The frame came from an interface without an endpoint.
    NoEndpoint = 1, "no-endpoint";
    /// The source link-layer address is not the endpoint's.
    SpoofedMac = 2, "spoofed-mac";
    /// The source IP address, or an address inside ARP or neighbour discovery, is not the endpoint's.
    SpoofedAddress = 3, "spoofed-address";
    /// Neither IPv4, IPv6 nor ARP: VLAN tags, for instance.
    NotIp = 4, "not-ip";
    /// Cut short or malformed.
    Malformed = 5, "malformed";
    /// A fragment other than the first, and the first one has not been seen, or too long ago.
    Fragment = 6, "fragment";
    /// An IP protocol that is not translated.
    Protocol = 7, "protocol";
    /// IPv6 extension headers that hide what follows.
    ExtensionHeader = 8, "extension-header";
    /// Multicast or broadcast; nucnet carries neither.
    Multicast = 9, "multicast";
    /// Link-local source or destination, neighbour discovery aside.
    LinkLocal = 10, "link-local";
    /// A loopback, unspecified or otherwise impossible address.
    Martian = 11, "martian";
    /// Only routers and servers send this: router advertisement, redirect, DHCP reply.
    Infrastructure = 12, "infrastructure";
    /// The time to live or hop limit is used up.
    TtlExceeded = 13, "ttl-exceeded";
    /// An egress rule, or the default of the policy, denies it.
    Policy = 14, "policy";
    /// Not the first packet of a connection, and no flow is known.
    NoFlow = 15, "no-flow";
    /// The endpoint has as many flows as one may have.
    FlowQuota = 16, "flow-quota";
    /// The table of flows has no place that is free or dead.
    FlowTableFull = 17, "flow-table-full";
    /// No external port is free.
    PortsExhausted = 18, "ports-exhausted";
    /// No route to the destination.
    NoRoute = 19, "no-route";
    /// The route leads out of an interface on which nucnet has no program yet.
    UplinkUnmanaged = 20, "uplink-unmanaged";
    /// The destination is in a managed network, and nobody has the address.
    NoSuchAddress = 21, "no-such-address";
    /// One of the two networks is isolated.
    Isolated = 22, "isolated";
    /// From outside, to what is not published.
    NotPublished = 23, "not-published";
    /// From outside, with a source that only the host or an endpoint has.
    MartianSource = 24, "martian-source";
    /// From outside, to a dynamic port, by a peer that the endpoint never spoke to.
    Filtered = 25, "filtered";
    /// An address in the packet has no owner who could answer for it (ARP, neighbour solicitation).
    NoNeighbour = 26, "no-neighbour";
    /// A helper of the kernel refused what should always work.
    Helper = 27, "helper";
    /// Router solicitations, duplicate address detection and listener reports of an endpoint:
    /// every start sends some, and nobody has to hear them; monitors are not told.
    Discovery = 28, "discovery";
    /// Longer than the link takes that it is to leave by, or the endpoint that it is for.
    TooBig = 29, "too-big";
    /// IPv4 options, from an endpoint with a policy: they may lead a packet elsewhere.
    IpOptions = 30, "ip-options";
}

#[cfg(feature = "user")]
#[allow(unsafe_code)]
mod pod {
    use super::*;

    macro_rules! pod {
        ($($name:ty),+) => {
            // SAFETY: `repr(C)`, `Copy`, `'static`, made of integers and arrays of integers
            // only, so every bit pattern is valid; no implicit padding (tested below).
            $(unsafe impl aya::Pod for $name {})+
        };
    }

    pod!(
        Settings,
        Network,
        Endpoint,
        Guest,
        Owner,
        PublishKey,
        Publish,
        StaticMapping,
        SnatKey,
        Snat,
        MappingCount,
        FlowKey,
        OutsideKey,
        Flow,
        Binding,
        Slot,
        Usage,
        Uplink,
        PolicyCidrKey,
        PolicyClass,
        PolicyPortKey,
        PolicyRule,
        DropKey,
        DropCount,
        Event,
        Monitor,
        Lost,
        EventLimit,
        Explained
    );
}
