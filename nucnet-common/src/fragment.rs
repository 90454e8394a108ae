//! Fragments: the first one has the ports and is judged and translated like any packet; what it
//! came to is noted, and the later ones, which have none, go the same way.
//!
//! A later fragment that comes before the first, or long after it, has no note: there is no place
//! to keep it until then (RFC 4787 REQ-14, in part). It is dropped, or from outside, left to the
//! host, for whom it may be.

use crate::{
    abi::{Address, Endpoint, Flow, FlowKey, MAPPED, Reason},
    env::{Env, Scratch},
    flow::{SECOND, Side, is_dead},
    mapping,
    packet::{Family, Fragment, Kind, Packet, same},
    path::{Noted, Way, allowed_still, receive, send},
};

/// How long later fragments may follow the first one. Identifications are 16 bits of IPv4: the
/// longer, the likelier it is that one comes again for another datagram.
const LIFETIME: u64 = 5 * SECOND;

/// Set in [`Key::from`] of what comes in by an uplink.
const UPLINK: u32 = 1 << 31;

/// What fragments of one packet have in common (RFC 791, RFC 8200 section 4.5).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// The number of the endpoint that sends them, or the uplink that they come in by.
    pub from: u32,
    /// Identification.
    pub identification: u32,
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// IP protocol number; 0 for IPv6.
    pub protocol: u32,
}

/// Where the first fragment went.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note {
    /// When.
    pub seen: u64,
    /// Its flow.
    pub flow: FlowKey,
    /// Its source port.
    pub source_port: u16,
    /// Its destination port.
    pub destination_port: u16,
    /// 1: the flow's endpoint sent it; 0: the peer did.
    pub is_inside: u32,
    /// Zero.
    pub pad: u32,
}

/// Who sends what an endpoint sends.
#[inline(always)]
pub fn from_endpoint(endpoint: &Endpoint) -> u32 {
    endpoint.number
}

/// Who sends what comes in by an uplink.
#[inline(always)]
pub fn from_uplink(link: u32) -> u32 {
    link | UPLINK
}

/// Notes where a packet goes if it is a first fragment: as one of the flow `scratch.key`.
#[inline(always)]
pub fn note<E: Env>(env: &E, side: Side, scratch: &mut Scratch) {
    if scratch.packet.fragment == Fragment::First {
        write(env, side, scratch);
    }
}

#[inline(never)]
fn write<E: Env>(env: &E, side: Side, scratch: &mut Scratch) {
    let Scratch {
        packet,
        key,
        from,
        fragments,
        note,
        ..
    } = scratch;
    fill(fragments, *from, packet);
    note.seen = env.now();
    note.flow = *key;
    note.source_port = packet.source_port;
    // As the key of a flow has it: an echo request has no port at the far end.
    note.destination_port = match packet.kind {
        Kind::EchoRequest => 0,
        _ => packet.destination_port,
    };
    note.is_inside = u32::from(side == Side::Inside);
    note.pad = 0;
    env.set_note(fragments, note);
}

#[inline(always)]
fn fill(key: &mut Key, from: u32, packet: &Packet) {
    key.from = from;
    key.identification = packet.identification;
    key.source = packet.source;
    key.destination = packet.destination;
    key.protocol = match packet.family {
        Family::V4 => packet.protocol.into(),
        Family::V6 => 0,
    };
}

/// Finds the flow of a later fragment: `scratch.key`. The packet gets the ports of the first.
#[inline(never)]
fn find<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<Side, Reason> {
    let Scratch {
        packet,
        key,
        from,
        fragments,
        note,
        ..
    } = scratch;
    fill(fragments, *from, packet);
    if !env.note(fragments, note) || now.saturating_sub(note.seen) >= LIFETIME {
        return Err(Reason::Fragment);
    }
    *key = note.flow;
    packet.source_port = note.source_port;
    packet.destination_port = note.destination_port;
    Ok(if note.is_inside != 0 {
        Side::Inside
    } else {
        Side::Peer
    })
}

/// Whether a packet is of a flow by its addresses. A note may become another packet's while it is
/// read, and what was read may be of either, or of both.
#[inline(always)]
fn is_of(packet: &Packet, key: &FlowKey, flow: &Flow, side: Side) -> bool {
    let (source, destination) = match side {
        Side::Inside => (&key.inside, &key.peer),
        Side::Peer => (&flow.peer, &flow.external),
    };
    same(&packet.source, source) && same(&packet.destination, destination)
}

/// A later fragment that an endpoint sends.
///
/// # Errors
/// The packet is to be dropped: [`Reason::Fragment`] if the first one is not known.
#[inline(never)]
pub fn sent<E: Env>(env: &E, endpoint: &Endpoint, scratch: &mut Scratch) -> Result<Noted, Reason> {
    let now = env.now();
    let side = find(env, scratch, now)?;
    let mut flow = env.flow(&scratch.key).ok_or(Reason::Fragment)?;
    if is_dead(&flow, now) || !is_of(&scratch.packet, &scratch.key, &flow, side) {
        return Err(Reason::Fragment);
    }
    if side == Side::Peer {
        return receive(env, scratch, &mut flow, now);
    }
    allowed_still(env, endpoint, scratch, &mut flow)?;
    send(env, scratch, &mut flow, now)
}

/// A later fragment that comes in by an uplink; [`Way::Pass`] if the first one is not known.
///
/// # Errors
/// The packet is to be dropped.
#[inline(never)]
pub fn arrived<E: Env>(
    env: &E,
    link: u32,
    scratch: &mut Scratch,
    account: &mut u32,
) -> Result<Noted, Reason> {
    let now = env.now();
    let Ok(side) = find(env, scratch, now) else {
        return Ok(scratch.way.set(Way::Pass));
    };
    *account = scratch.key.endpoint;
    let mut flow = env.flow(&scratch.key).ok_or(Reason::Fragment)?;
    if is_dead(&flow, now) || !is_of(&scratch.packet, &scratch.key, &flow, side) {
        return Err(Reason::Fragment);
    }
    if scratch.key.endpoint == MAPPED {
        drop(flow);
        return mapping::carry(env, link, scratch, now);
    }
    receive(env, scratch, &mut flow, now)
}
