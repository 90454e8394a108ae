//! Flows, their external views, and bindings.

use super::Address;

/// A conversation as its endpoint sees it. Map [`super::map::FLOWS`]; with the external address as
/// `peer` and 0 as `peer_port`, an endpoint-independent binding of [`super::map::BINDINGS`]: one
/// for each address of the host that the endpoint is seen by.
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

/// A conversation as the outside sees it. Map [`super::map::OUTSIDE`]; with `peer` and `peer_port`
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
    /// The external port belongs to a binding of [`super::super::map::BINDINGS`].
    pub const BOUND: u32 = 8;
    /// TCP: the last word was a RST.
    pub const RESET: u32 = 16;
    /// TCP: whoever did not open it has answered.
    pub const ANSWERED: u32 = 32;
    /// TCP: the handshake is over.
    pub const CONNECTED: u32 = 64;
}

/// One tracked conversation and its translation. Map [`super::map::FLOWS`].
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
    /// Next hop towards the inside, of flows of [`super::MAPPED`] hosts.
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
    /// Index of the owner's host side interface; of a [`super::MAPPED`] host, of the one towards
    /// it.
    pub link: u32,
    /// Where packets to the peer leave: uplink, bridge, or the other endpoint's interface.
    pub peer_link: u32,
    /// Its place in [`super::map::SLOTS`].
    pub slot: u32,
    /// [`super::Slot::version`] since it took that place.
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

/// External side of an endpoint-independent binding. Map [`super::map::BINDINGS`].
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
    /// Its place in [`super::map::SLOTS`].
    pub slot: u32,
    /// [`super::Slot::version`] since it took that place.
    pub slot_version: u32,
    /// Zero.
    pub reserved: [u8; 8],
}
