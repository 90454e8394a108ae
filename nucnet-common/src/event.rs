//! Events for whoever monitors: refused packets, flows that come and go.
//!
//! While nobody monitors, a packet that is dropped and a flow that is opened or closed cost a
//! few reads more, every other packet nothing. Nobody waits for a reader: what finds no room is
//! counted and forgotten, and an endpoint that is refused all the time, or opens flow after
//! flow, is told about a limited number of times a second. The counters of drops know no limit.

use crate::{
    abi::{
        Address, Event, EventBudget, EventKind, EventLimit, Flow, FlowKey, FlowState, NO_ADDRESS,
        Reason, flow_flag, size,
    },
    env::{Env, Monitors},
    flow::SECOND,
    packet::{TCP, half},
    path::Drop,
};

/// Refusals of one endpoint that are told within a second.
pub const REFUSALS: u64 = 20;

/// Flows of one endpoint that are told about within a second, opened and closed.
pub const FLOWS: u64 = 200;

/// A refused packet is no news if one like it was refused at most that long ago: longer than a
/// TCP client waits between two attempts of a connect (net.ipv4.tcp_syn_retries).
pub const NEWS_AGAIN: u64 = 70 * SECOND;

/// Whether anybody monitors.
#[inline(always)]
pub fn is_watched<M: Monitors>(monitors: &M) -> bool {
    let mut latest = 0;
    let mut monitor = 0;
    while monitor < size::MONITORS as u32 {
        latest |= monitors.reads_until(monitor);
        monitor += 1;
    }
    latest != 0
}

/// Whether one of those who monitor wants to know what the programs think, too.
#[inline(always)]
fn is_debugged<M: Monitors>(monitors: &M, event: &Event) -> bool {
    monitors.reads_until(size::MONITORS as u32) > event.time
}

/// Tells about a packet that is dropped. It is unchanged, and read again: what the journey noted
/// may be of another packet, if it got no further than the Ethernet header.
#[inline(never)]
pub fn refused<E: Env>(env: &E, drop: &Drop, l3: u32, ethertype: u16) {
    // What every start of a container sends is no news.
    if drop.reason == Reason::Discovery || !is_watched(env) {
        return;
    }
    let (Some(mut scratch), Some(mut event)) = (env.scratch(), env.draft()) else {
        return;
    };
    let scratch = &mut *scratch;
    let packet = &mut scratch.packet;
    packet.source = NO_ADDRESS;
    packet.destination = NO_ADDRESS;
    packet.protocol = 0;
    // As far as it can be read.
    let _ = env.parse(packet, l3, ethertype);
    let event = &mut *event;
    let is_denied = drop.reason == Reason::Policy;
    if is_denied && scratch.policy == 0 {
        return;
    }
    *event = Event {
        time: env.now(),
        source: packet.source,
        destination: packet.destination,
        nat_source: packet.source,
        nat_destination: packet.destination,
        source_port: packet.source_port,
        destination_port: if packet.is_echo() {
            0
        } else {
            packet.destination_port
        },
        nat_source_port: packet.source_port,
        kind: if is_denied {
            EventKind::Denied as u32
        } else {
            EventKind::Dropped as u32
        },
        endpoint: drop.endpoint,
        reason: drop.reason as u32,
        protocol: packet.protocol.into(),
        policy: if is_denied { scratch.policy } else { 0 },
        rule: if is_denied { scratch.rule } else { 0 },
        ..Event::default()
    };
    event.nat_destination_port = event.destination_port;
    let Some(mut limit) = env.limit(event.endpoint) else {
        return;
    };
    if tells_refusal(&mut limit, event) {
        tell(env, event);
        if is_debugged(env, event) {
            env.log(drop);
        }
    }
}

/// Tells that a flow was opened, or that it is over.
#[inline(always)]
pub fn flow<E: Env>(env: &E, kind: EventKind, key: &FlowKey, flow: &Flow) {
    if is_watched(env) {
        flow_watched(env, kind, key, flow);
    }
}

#[inline(never)]
fn flow_watched<E: Env>(env: &E, kind: EventKind, key: &FlowKey, flow: &Flow) {
    let Some(mut event) = env.draft() else { return };
    let event = &mut *event;
    *event = Event {
        time: env.now(),
        packets: flow.packets_out + flow.packets_in,
        bytes: flow.bytes_out + flow.bytes_in,
        kind: kind as u32,
        endpoint: key.endpoint,
        protocol: key.protocol,
        ..Event::default()
    };
    if flow.flags & flow_flag::INBOUND == 0 {
        event.source = key.inside;
        event.source_port = key.inside_port;
        event.destination = key.peer;
        event.destination_port = key.peer_port;
        event.nat_source = flow.external;
        event.nat_source_port = flow.external_port;
        event.nat_destination = flow.peer;
        event.nat_destination_port = flow.peer_port;
    } else {
        event.source = flow.peer;
        event.source_port = flow.peer_port;
        event.destination = flow.external;
        event.destination_port = flow.external_port;
        event.nat_source = key.peer;
        event.nat_source_port = key.peer_port;
        event.nat_destination = key.inside;
        event.nat_destination_port = key.inside_port;
    }
    let Some(mut limit) = env.limit(event.endpoint) else {
        return;
    };
    if tells_flow(&mut limit, event) {
        tell(env, event);
    }
}

/// Tells that a flow in another state than before is over, or that it begins anew in its place.
#[inline(always)]
pub fn changed<E: Env>(env: &E, key: &FlowKey, entry: &Flow, before: u32) {
    let closed = FlowState::Closed as u32;
    if entry.state == closed {
        flow(env, EventKind::FlowClosed, key, entry);
    } else if before == closed || entry.state == FlowState::Opening as u32 {
        flow(env, EventKind::FlowNew, key, entry);
    }
}

/// Tells that an entry goes whose flow was idle; that a TCP connection was closed was told then.
#[inline(always)]
pub fn removed<E: Env>(env: &E, key: &FlowKey, entry: &Flow) {
    if entry.state != FlowState::Closed as u32 || key.protocol != u32::from(TCP) {
        flow(env, EventKind::FlowClosed, key, entry);
    }
}

#[inline(always)]
fn tell<E: Env>(env: &E, event: &Event) {
    let mut monitor = 0;
    while monitor < size::MONITORS as u32 {
        if env.reads_until(monitor) > event.time {
            env.tell(monitor, event);
        }
        monitor += 1;
    }
}

/// Whether a refused packet is news that its endpoint's budget allows; if so, the event says how
/// many before it were not told.
#[inline(always)]
pub fn tells_refusal(limit: &mut EventLimit, event: &mut Event) -> bool {
    is_news(limit, event) && is_within(&mut limit.refusals, REFUSALS, event)
}

/// The same of a flow that is opened or over.
#[inline(always)]
pub fn tells_flow(limit: &mut EventLimit, event: &mut Event) -> bool {
    is_within(&mut limit.flows, FLOWS, event)
}

/// Whether no packet like this was refused a short while ago.
#[inline(always)]
fn is_news(limit: &mut EventLimit, event: &Event) -> bool {
    let mut hash = mix(0, u64::from(event.reason) << 32 | u64::from(event.protocol));
    hash = mix_address(hash, &event.source);
    hash = mix_address(hash, &event.destination);
    let ports = u64::from(event.source_port) << 16 | u64::from(event.destination_port);
    // Zero means that the place is empty.
    let hash = mix(hash, ports) | 1;
    let recent = &mut limit.recent[(hash >> 32) as usize & (size::RECENT - 1)];
    let is_known = recent.hash == hash && event.time.saturating_sub(recent.seen) < NEWS_AGAIN;
    recent.hash = hash;
    recent.seen = event.time;
    !is_known
}

#[inline(always)]
fn mix_address(hash: u64, address: &Address) -> u64 {
    mix(mix(hash, half(address, 0)), half(address, 8))
}

/// A step of a multiplicative hash; whoever finds two packets with one hash hides one event.
#[inline(always)]
fn mix(hash: u64, word: u64) -> u64 {
    let mixed = (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    mixed ^ mixed >> 29
}

/// Whether an event is within its budget; if so, it says how many before it were not.
#[inline(always)]
fn is_within(budget: &mut EventBudget, most: u64, event: &mut Event) -> bool {
    if event.time.saturating_sub(budget.since) >= SECOND {
        budget.since = event.time;
        budget.told = 0;
    }
    if budget.told >= most {
        budget.suppressed += 1;
        return false;
    }
    budget.told += 1;
    event.suppressed = budget.suppressed;
    budget.suppressed = 0;
    true
}
