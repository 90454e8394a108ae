//! Whose packets come in by a binding (RFC 4787 section 5).
//!
//! A peer that the endpoint has sent something to has a flow, which is found by its address and
//! port. With address-dependent filtering the same address may answer from other ports: a
//! permission in the table of external views says so, for as long as the flow lives that it
//! names. It opens no way out: what the endpoint sends on such a flow is judged by its policy.

use crate::{
    abi::{
        Filtering, Flow, FlowKey, FlowState, MAPPED, Network, OutsideKey, PERMISSION, PeerKind,
        Reason, SlotUse, UNJUDGED, flow_flag,
    },
    env::{Dead, Env, Scratch, Tables},
    flow::{SECOND, bound_key, is_dead, outside_key, same_binding, same_flow, timeout},
    guard,
    nat::open,
    packet::{Kind, TCP, UDP},
    path::find_way_back,
    place::retire,
};

/// The permission of a flow's peer to use the flow's binding.
#[inline(always)]
pub fn permission_key(protocol: u32, flow: &Flow) -> OutsideKey {
    let mut key = outside_key(protocol, flow);
    allow_every_port(&mut key);
    key
}

/// Makes the external view of a flow the permission of its peer.
#[inline(always)]
pub fn allow_every_port(view: &mut OutsideKey) {
    view.protocol |= PERMISSION;
    view.peer_port = 0;
}

/// Whether a flow's peer has a permission at all: queries of ICMP have no ports to choose from,
/// and hosts that are no endpoints have bindings that are filtered by port, too.
#[inline(always)]
pub fn is_permitting(key: &FlowKey, flow: &Flow) -> bool {
    flow.flags & flow_flag::BOUND != 0
        && key.endpoint != MAPPED
        && (key.protocol == u32::from(UDP) || key.protocol == u32::from(TCP))
}

/// Lets the peer of a flow use its binding, unless another flow to the same address says so for
/// longer. Where the table is full, the peer has to answer from the port that was asked.
#[inline(never)]
pub fn permit<E: Tables>(env: &E, key: &FlowKey, flow: &Flow, dead: &mut Dead, now: u64) {
    if !is_permitting(key, flow) {
        return;
    }
    let Dead { outside, named, .. } = dead;
    *outside = permission_key(key.protocol, flow);
    if env.outside(outside, named) {
        if same_flow(named, key) {
            return;
        }
        if same_binding(named, key)
            && let Some(other) = env.peek_flow(named)
            && !is_dead(&other, now)
            && end(&other) >= end(flow)
        {
            return;
        }
        env.remove_outside(outside);
    }
    env.insert_permission(outside, key);
}

/// When a flow dies if nothing more is sent.
#[inline(always)]
fn end(flow: &Flow) -> u64 {
    flow.last_seen + u64::from(flow.timeout_s) * SECOND
}

/// Whether a packet from outside is for a binding: that of `scratch.inside`.
#[inline(always)]
pub fn is_for_binding<T: Tables>(tables: &T, scratch: &mut Scratch) -> bool {
    let Scratch {
        packet,
        bound,
        inside,
        ..
    } = scratch;
    *bound = bound_key(
        u32::from(packet.protocol),
        &packet.destination,
        packet.destination_port,
    );
    tables.outside(bound, inside)
}

/// Whether a packet from outside is for a socket of the host, which may have bound the port of a
/// binding since.
#[inline(never)]
pub fn is_for_host<E: Env>(env: &E, scratch: &mut Scratch) -> bool {
    scratch.outside = scratch.packet.received_key();
    env.has_socket(&scratch.outside)
}

/// Opens the flow of a packet that arrives for the binding of `scratch.inside`, as the network's
/// filtering allows.
///
/// # Errors
/// [`Reason::Filtered`], and those of [`open`].
#[inline(never)]
pub fn admit<E: Env>(env: &E, link: u32, scratch: &mut Scratch) -> Result<(), Reason> {
    let Scratch { packet, inside, .. } = scratch;
    if packet.kind != Kind::Udp && packet.kind != Kind::Tcp {
        return Err(Reason::Filtered);
    }
    let owner = env.owner(&inside.inside).ok_or(Reason::Filtered)?;
    let endpoint = env.endpoint(owner.link).ok_or(Reason::NoEndpoint)?;
    if endpoint.number != inside.endpoint {
        return Err(Reason::NoEndpoint);
    }
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    if network.filtering == Filtering::AddressAndPortDependent as u32 {
        return Err(Reason::Filtered);
    }
    let now = env.now();
    begin(env, network, scratch, now)?;
    if !is_permitted(env, scratch, now)
        && (network.filtering != Filtering::EndpointIndependent as u32 || endpoint.policy != 0)
    {
        return Err(Reason::Filtered);
    }
    let Scratch {
        packet,
        flow,
        route,
        ..
    } = scratch;
    guard::peer_outside(env, endpoint.bridge, packet, route)?;
    flow.link = owner.link;
    flow.peer_link = link;
    find_way_back(env, scratch);
    if let Some(flow) = env.flow(&scratch.key) {
        // The same socket by another external address.
        if !is_dead(&flow, now) {
            return Err(Reason::Filtered);
        }
        retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
    }
    open(env, scratch, now)
}

/// Begins the flow of a packet from outside in `scratch.flow`, under the binding of the key
/// `scratch.inside`.
#[inline(never)]
fn begin<E: Env>(
    env: &E,
    network: &Network,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    let Scratch {
        packet,
        inside,
        key,
        flow,
        ..
    } = scratch;
    let binding = env.peek_binding(inside).ok_or(Reason::Filtered)?;
    *key = FlowKey {
        endpoint: inside.endpoint,
        protocol: inside.protocol,
        inside: inside.inside,
        peer: packet.source,
        inside_port: inside.inside_port,
        peer_port: packet.source_port,
    };
    *flow = Flow {
        created: now,
        // What comes in keeps nothing alive (RFC 4787 REQ-6): it ends with the binding, unless
        // the endpoint answers.
        last_seen: binding.last_seen,
        external: packet.destination,
        peer: packet.source,
        external_port: packet.destination_port,
        peer_port: packet.source_port,
        state: FlowState::Established as u32,
        flags: flow_flag::BOUND,
        timeout_s: binding.timeout_s,
        policy: UNJUDGED,
        peer_kind: PeerKind::Uplink as u32,
        ..Flow::default()
    };
    if packet.kind == Kind::Tcp {
        flow.state = FlowState::Opening as u32;
        flow.last_seen = now;
        flow.timeout_s = timeout(network, key.protocol, flow);
    } else if is_dead(flow, now) {
        return Err(Reason::Filtered);
    }
    Ok(())
}

/// Whether a live flow permits the one that is being made.
#[inline(never)]
fn is_permitted<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> bool {
    let Scratch {
        key,
        flow,
        outside,
        found,
        ..
    } = scratch;
    *outside = permission_key(key.protocol, flow);
    env.outside(outside, found)
        && same_binding(found, key)
        && env.flow(found).is_some_and(|other| !is_dead(&other, now))
}
