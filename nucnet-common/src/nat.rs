//! Opening flows: external addresses and ports, and the entries that make a flow.
//!
//! The external view is reserved first, with an insert that fails if anybody has it, so two
//! live flows never share one; a flow exists once its own entry does; its place comes last.
//! Whatever fails undoes what came before it: there is no half flow.

use crate::{
    abi::{
        Binding, Endpoint, Flow, FlowKey, FlowState, Mapping, Network, OutsideKey, Reason, SlotUse,
        flow_flag,
    },
    env::{Dead, Env, Scratch},
    filter::permit,
    flow::{binding_key, is_question, is_unbound, outside_key, timeout},
    packet::{TCP, UDP},
    place::{Place, retire},
    ports::choose_port,
};

/// Takes an external view for the flow `key`: one that nobody has, or whose holder can be spared.
///
/// # Errors
/// [`Reason::PortsExhausted`] if its holder is alive.
#[inline(always)]
pub fn reserve<E: Env>(
    env: &E,
    outside: &OutsideKey,
    key: &FlowKey,
    found: &mut FlowKey,
    dead: &mut Dead,
    now: u64,
) -> Result<(), Reason> {
    if env.insert_outside(outside, key)
        || evict(env, outside, found, dead, now) && env.insert_outside(outside, key)
    {
        Ok(())
    } else {
        Err(Reason::PortsExhausted)
    }
}

/// Takes an external view from the flow that holds it. False: that is alive.
#[inline(never)]
fn evict<E: Env>(
    env: &E,
    outside: &OutsideKey,
    found: &mut FlowKey,
    dead: &mut Dead,
    now: u64,
) -> bool {
    if !env.outside(outside, found) || env.spare(SlotUse::Flow, found, dead, now) {
        return true;
    }
    // Of a flow that is in no table another processor may be about to put it there; not so if its
    // endpoint is gone, whose detach was interrupted.
    let is_left_over = env.usage(found.endpoint).is_none();
    if is_left_over {
        env.remove_outside(outside);
    }
    is_left_over
}

/// Makes the flow `scratch.flow` with the key `scratch.key`.
///
/// # Errors
/// [`Reason::PortsExhausted`] if a live flow has that external view; [`Reason::FlowQuota`],
/// [`Reason::FlowTableFull`].
#[inline(never)]
pub fn open<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let Scratch {
        key,
        outside,
        found,
        flow,
        dead,
        ..
    } = scratch;
    *outside = outside_key(key.protocol, flow);
    dead.place = Place::NONE;
    reserve(env, outside, key, found, dead, now)?;
    open_reserved(env, scratch, now)
}

/// The half of [`open`] after its external view, `scratch.outside`, is reserved.
///
/// # Errors
/// As there.
#[inline(always)]
fn open_reserved<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    if let Err(reason) = env.settle(scratch, SlotUse::Flow, now) {
        env.remove_outside(&scratch.outside);
        return Err(reason);
    }
    let Scratch {
        key, flow, dead, ..
    } = scratch;
    permit(env, key, flow, dead, now);
    Ok(())
}

/// Makes a flow that masquerades: chooses its external port and opens it.
///
/// With endpoint-independent mapping, which UDP has by default and ICMP identifiers always, the
/// port comes from a binding that all flows of the same inside port share (RFC 4787 REQ-1). Else
/// it is chosen for each flow and may serve several peers (RFC 7857 section 3).
///
/// # Errors
/// [`Reason::PortsExhausted`] and those of [`open`].
#[inline(always)]
pub fn open_masquerade<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    if is_bound(network, scratch.key.protocol) {
        return open_bound(env, network, scratch, now);
    }
    open_unbound(env, network, scratch, now)
}

/// Whether flows of a protocol have their external port from a binding.
#[inline(always)]
pub fn is_bound(network: &Network, protocol: u32) -> bool {
    let mapping = if protocol == u32::from(TCP) {
        network.tcp_mapping
    } else if protocol == u32::from(UDP) {
        network.udp_mapping
    } else {
        Mapping::EndpointIndependent as u32
    };
    mapping == Mapping::EndpointIndependent as u32
}

/// The half of [`open_masquerade`] with a binding.
///
/// # Errors
/// As there.
#[inline(always)]
pub fn open_bound<E: Env>(
    env: &E,
    network: &Network,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    bind(env, network, scratch, now)?;
    scratch.flow.external_port = scratch.binding.external_port;
    scratch.flow.flags |= flow_flag::BOUND;
    open(env, scratch, now)
}

/// The half of [`open_masquerade`] without.
///
/// # Errors
/// As there.
#[inline(always)]
pub fn open_unbound<E: Env>(
    env: &E,
    network: &Network,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    if !choose_port(env, network, scratch, SlotUse::Flow, now) {
        return Err(Reason::PortsExhausted);
    }
    open_reserved(env, scratch, now)
}

/// Finds or makes the endpoint-independent binding for the flow that is being made:
/// `scratch.binding`.
#[inline(never)]
fn bind<E: Env>(env: &E, network: &Network, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let Scratch {
        key,
        flow,
        binding,
        outside,
        inside,
        dead,
        ..
    } = scratch;
    *inside = binding_key(key, &flow.external);
    if let Some(mut found) = env.binding_to_use(inside) {
        if !is_unbound(&found, now) {
            // Connected since, and found by its peer only: its answers are not the endpoint's.
            *outside = outside_key(key.protocol, flow);
            outside.external_port = found.external_port;
            if env.has_socket(outside) {
                return Err(Reason::PortsExhausted);
            }
            found.last_seen = now;
            if !is_question(key.protocol, flow) {
                found.is_for_questions = 0;
            }
            if flow.timeout_s > found.timeout_s {
                found.timeout_s = flow.timeout_s;
            }
            *binding = *found;
            return Ok(());
        }
        retire(env, SlotUse::Binding, inside, dead);
    }
    *binding = Binding {
        last_seen: now,
        external: flow.external,
        external_port: 0,
        is_for_questions: is_question(key.protocol, flow).into(),
        timeout_s: flow.timeout_s,
        slot: 0,
        slot_version: 0,
        reserved: [0; 8],
    };
    if !choose_port(env, network, scratch, SlotUse::Binding, now) {
        return Err(Reason::PortsExhausted);
    }
    scratch.binding.external_port = scratch.flow.external_port;
    env.settle(scratch, SlotUse::Binding, now)
        .inspect_err(|_| env.remove_outside(&scratch.bound))
}

/// Begins the flow of `scratch.key` in `scratch.flow`: untranslated; its way is still to be
/// filled in.
#[inline(always)]
pub fn begin(scratch: &mut Scratch, network: &Network, flags: u32, now: u64) {
    let Scratch { key, flow, .. } = scratch;
    *flow = Flow {
        created: now,
        last_seen: now,
        checked: now,
        external: key.inside,
        peer: key.peer,
        external_port: key.inside_port,
        peer_port: key.peer_port,
        state: FlowState::Opening as u32,
        flags,
        ..Flow::default()
    };
    flow.timeout_s = timeout(network, key.protocol, flow);
}
