//! The journeys of a packet: from an endpoint, from an uplink, from the host.
//!
//! Each decides first and writes last, and notes where the packet goes next; whoever called moves
//! it there.

mod endpoint;
mod host;
mod uplink;

pub use endpoint::from_endpoint;
pub(crate) use endpoint::{send, sibling};
pub use host::from_host;
pub use uplink::from_uplink;
pub(crate) use uplink::receive;

use crate::{
    abi::{
        Address, Delivery, Endpoint, Flow, FlowKey, PeerKind, Reason, SlotUse, UNJUDGED, flow_flag,
        policy_flag,
    },
    env::{Env, Scratch},
    flow::is_dead,
    mtu,
    packet::{Balance, ETHERNET, Frame, Kind, Packet, same, tcp_flag},
    place::retire,
    policy,
};

/// How many other client ports are tried where two ways to a published port collide.
const PEER_PORT_DRAWS: u32 = 4;

/// Where a packet goes next.
///
/// It has its place among the notes, [`Scratch::way`], and is not passed around: a copy on the stack
/// has bytes that no one has set, where a way is shorter than others, and Linux 5.10 loads no program
/// that reads such bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// On its way: it is none of nucnet's business.
    Pass,
    /// Into the peer of a veth pair.
    Peer {
        /// The host side interface.
        link: u32,
    },
    /// Out of an interface, as it is.
    Link {
        /// The interface.
        link: u32,
    },
    /// To the host, as if received by a bridge.
    Host {
        /// The bridge.
        link: u32,
    },
    /// To the host by way of its loopback interface, with a local route at hand.
    Loopback {
        /// The loopback interface.
        link: u32,
        /// The mark that it has on the way: [`from_loopback`](crate::loopback::from_loopback) reads it.
        mark: u32,
    },
    /// Out of an uplink, to a neighbour.
    Uplink {
        /// The uplink.
        link: u32,
        /// The neighbour.
        next_hop: Address,
    },
}

/// That the way of a packet is noted: nobody ends a journey and forgets to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Noted(());

impl Way {
    /// Notes a way in its place.
    #[inline(always)]
    pub fn set(&mut self, way: Self) -> Noted {
        *self = way;
        Noted(())
    }
}

/// A packet that is dropped, and on whose account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drop {
    /// The endpoint's number; 0: none is known.
    pub endpoint: u32,
    /// Why.
    pub reason: Reason,
}

/// The end of a journey.
pub type Verdict<'s> = Result<&'s Way, Drop>;

/// The end of a journey on an endpoint's account.
#[inline(always)]
fn end(outcome: Result<Noted, Reason>, scratch: &Scratch, endpoint: u32) -> Verdict<'_> {
    match outcome {
        Ok(Noted(())) => Ok(&scratch.way),
        Err(reason) => Err(Drop { endpoint, reason }),
    }
}

/// Why a packet is neither translated nor judged.
#[inline(always)]
fn untranslatable(packet: &Packet) -> Reason {
    match packet.kind {
        Kind::Extended => Reason::ExtensionHeader,
        _ => Reason::Protocol,
    }
}

/// A flow that the endpoint opened is judged again when its policy has changed, whoever sends
/// the packet; a flow that is denied ends.
#[inline(always)]
pub(crate) fn allowed_still<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
    flow: &mut Flow,
) -> Result<(), Reason> {
    if flow.policy == endpoint.policy || flow.flags & flow_flag::INBOUND != 0 {
        return Ok(());
    }
    // A flow may be older than the policy and stay; a connection that begins anew on its ports
    // is another one.
    let packet = &scratch.packet;
    if flow.policy != UNJUDGED
        && flow.policy >= endpoint.policy_since
        && !(packet.kind == Kind::Tcp && opens(packet))
    {
        return Ok(());
    }
    judge_again(env, endpoint, scratch, flow)
}

#[inline(never)]
fn judge_again<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
    flow: &mut Flow,
) -> Result<(), Reason> {
    let Scratch { key, route, .. } = scratch;
    let protocol = key.protocol as u8;
    let mut asked = policy::judge(env, endpoint, key, route);
    if asked.allowed {
        asked.rule = policy::denied_by(env, endpoint, &flow.peer, protocol, flow.peer_port);
    }
    if !asked.allowed || asked.rule != 0 {
        retire(env, SlotUse::Flow, key, &mut scratch.dead);
        return Err(deny(scratch, endpoint, asked.rule));
    }
    flow.policy = endpoint.policy;
    Ok(())
}

/// Notes which rule denies a packet, and whether its sender is told.
#[inline(always)]
fn deny(scratch: &mut Scratch, endpoint: &Endpoint, rule: u32) -> Reason {
    scratch.policy = if endpoint.policy_flags & policy_flag::QUIET == 0 {
        endpoint.policy
    } else {
        0
    };
    scratch.rule = rule;
    scratch.rejects = endpoint.policy_flags & policy_flag::REJECT != 0;
    Reason::Policy
}

/// Whether a packet may open a flow: the first one of a TCP connection, a datagram, an echo
/// request.
#[inline(always)]
pub(crate) fn opens(packet: &Packet) -> bool {
    match packet.kind {
        Kind::Tcp => {
            packet.flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST) == tcp_flag::SYN
        }
        Kind::Udp | Kind::EchoRequest => true,
        _ => false,
    }
}

/// Whether the peer is another than the one that the endpoint addresses.
#[inline(always)]
fn is_translated(key: &FlowKey, flow: &Flow) -> bool {
    !same(&flow.peer, &key.peer)
}

/// Whether packets of a flow cross a router, which takes one off their time to live. The
/// bridge between siblings, and the host itself, do not.
#[inline(always)]
pub(crate) fn is_routed(key: &FlowKey, flow: &Flow) -> bool {
    flow.peer_kind == PeerKind::Uplink as u32
        || flow.peer_kind == PeerKind::Endpoint as u32 && is_translated(key, flow)
}

/// The way to the peer that opens a flow, by the uplink that it came in on.
#[inline(never)]
pub(crate) fn find_way_back<E: Env>(env: &E, scratch: &mut Scratch) {
    let Scratch {
        packet,
        flow,
        route,
        ..
    } = scratch;
    if route.link == flow.peer_link {
        flow.next_hop = route.next_hop;
        flow.macs = route.macs;
        flow.mtu = mtu::of_route(env, route);
    } else {
        learn_macs(env, packet, flow);
        flow.mtu = env.uplink(flow.peer_link).map_or(0, |uplink| uplink.mtu);
    }
}

/// Finds a peer port under which `scratch.key` is nobody's: the same client port may come by two
/// published ports that lead to one port inside. The endpoint then sees another client port.
#[inline(always)]
pub(crate) fn find_peer_port<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    let mut draw = 0;
    while let Some(flow) = env.flow(&scratch.key) {
        if is_dead(&flow, now) {
            retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
            break;
        }
        draw += 1;
        if draw > PEER_PORT_DRAWS {
            return Err(Reason::PortsExhausted);
        }
        scratch.key.peer_port = env.random() as u16 | 0x8000;
    }
    Ok(())
}

/// Notes whom a frame came from, so that the reply goes back there.
#[inline(always)]
pub(crate) fn learn_macs<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow) {
    // Without an Ethernet header there is nothing to note, and nothing to address.
    if packet.l3 != ETHERNET {
        return;
    }
    if let Some(header) = frame.load::<12>(0) {
        flow.macs[..6].copy_from_slice(&header[6..]);
        flow.macs[6..].copy_from_slice(&header[..6]);
    }
}

/// Addresses a frame to an endpoint, from its gateway.
#[inline(always)]
pub(crate) fn address_frame<F: Frame>(frame: &F, endpoint: &Endpoint) -> Result<(), Reason> {
    let (to, from) = (&endpoint.mac, &endpoint.gateway_mac);
    let macs = [
        to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4],
        from[5],
    ];
    frame.store(0, &macs, Balance::Balanced)
}

/// Writes the Ethernet header of a packet that came without one and now has room for it. `link` is
/// the host side interface of the endpoint that it goes to.
///
/// # Errors
/// [`Reason::NoEndpoint`] if there is no such endpoint.
#[inline(always)]
pub fn add_header<E: Env>(env: &E, link: u32, ethertype: u16) -> Result<(), Reason> {
    let endpoint = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
    address_frame(env, endpoint)?;
    env.store(12, &ethertype.to_be_bytes(), Balance::Balanced)
}

/// How an endpoint takes packets.
#[inline(always)]
pub(crate) fn delivery(endpoint: &Endpoint, link: u32) -> Way {
    if endpoint.delivery == Delivery::Peer as u32 {
        Way::Peer { link }
    } else {
        Way::Link { link }
    }
}
