//! Opening flows: external addresses and ports, and the entries that make a flow.
//!
//! The external view is reserved first, with an insert that fails if anybody has it, so two
//! live flows never share one; a flow exists once its own entry does; its place comes last.
//! Whatever fails undoes what came before it: there is no half flow.

use crate::{
    abi::{
        Address, Binding, Flow, FlowKey, FlowState, Mapping, Network, OutsideKey, Publish,
        PublishKey, PublishUse, Reason, Settings, SlotUse, flow_flag,
    },
    env::{Dead, Env, Scratch, Tables},
    filter::permit,
    flow::{
        GONE, Standing, binding_key, binding_merit, bound_key, flow_merit, is_enough, is_question,
        is_unbound, outside_key, timeout,
    },
    packet::{Family, TCP, UDP},
    place::{Place, retire_binding, retire_flow},
};

/// How many external ports are tried before a packet is dropped.
const PORT_DRAWS: u32 = 16;

/// How often a port is looked for before a packet is dropped because another processor was faster
/// each time, which is rarer than with places: there are more.
const PORT_TRIES: u32 = 2;

/// How many other ports are tried where two flows to a sibling would look alike to it.
const VIEW_DRAWS: u32 = 4;

/// The publish that takes packets for a local address and port of the host.
#[inline(never)]
pub fn find_publish<'t, T: Tables>(
    tables: &'t T,
    protocol: u8,
    address: &Address,
    port: u16,
) -> Option<&'t Publish> {
    let mut key = PublishKey {
        address: *address,
        protocol,
        kind: PublishUse::Packets as u8,
        port: port.to_be_bytes(),
    };
    if let Some(publish) = tables.publish(&key) {
        return Some(publish);
    }
    key.address = Family::of(address).any();
    tables.publish(&key)
}

/// The endpoint's port behind a host port of a publish.
#[inline(always)]
pub fn published_port(publish: &Publish, host_port: u16) -> u16 {
    host_port
        .wrapping_sub(publish.host_port)
        .wrapping_add(publish.port)
}

/// Whether masquerade may use an external port: neither a publish nor a socket of the host
/// has it.
#[inline(always)]
pub fn is_free<E: Env>(env: &E, key: &OutsideKey) -> bool {
    find_publish(env, key.protocol as u8, &key.external, key.external_port).is_none()
        && !env.has_socket(key)
}

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

/// Removes a flow that holds an external view and can be spared. False: it is alive.
#[inline(never)]
fn evict<E: Env>(
    env: &E,
    outside: &OutsideKey,
    found: &mut FlowKey,
    dead: &mut Dead,
    now: u64,
) -> bool {
    if !env.outside(outside, found) {
        return true;
    }
    match env.flow(found) {
        Some(flow) if Standing::of(found.protocol, &flow, now) == Standing::Live => return false,
        Some(_) => retire_flow(env, found, dead),
        None => env.remove_outside(outside),
    }
    true
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

/// Chooses by which port another endpoint of this host sees the flow that is being made: its own,
/// unless another flow is already: the same source port may go to one server directly and by way
/// of a publish.
#[inline(never)]
pub fn choose_view<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let Scratch {
        key,
        flow,
        outside,
        found,
        ..
    } = scratch;
    *outside = outside_key(key.protocol, flow);
    let mut draw = 0;
    while draw < VIEW_DRAWS {
        draw += 1;
        if !env.outside(outside, found) {
            break;
        }
        match env.flow(found) {
            Some(other) if Standing::of(found.protocol, &other, now) == Standing::Live => {}
            _ => break,
        }
        let port = dynamic_port(settings, env.random());
        flow.external_port = port;
        outside.external_port = port;
    }
    Ok(())
}

/// A port of the dynamic range.
#[inline(always)]
pub(crate) fn dynamic_port(settings: &Settings, random: u32) -> u16 {
    settings
        .dynamic_port_first
        .wrapping_add(random as u16 & settings.dynamic_port_mask)
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
pub fn open_masquerade<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let endpoint = env.endpoint(scratch.flow.link).ok_or(Reason::NoEndpoint)?;
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    if is_bound(network, scratch.key.protocol) {
        return open_bound(env, network, scratch, now);
    }
    open_unbound(env, settings, network, scratch, now)
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
    settings: &Settings,
    network: &Network,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    if !choose_own_port(env, settings, network, scratch, now) {
        return Err(Reason::PortsExhausted);
    }
    open_reserved(env, scratch, now)
}

/// Reserves an external port for the flow that is being made, which has no binding: one that
/// nobody uses towards its peer, else that of the flow that can be spared best.
#[inline(never)]
fn choose_own_port<E: Env>(
    env: &E,
    settings: &Settings,
    network: &Network,
    scratch: &mut Scratch,
    now: u64,
) -> bool {
    let Scratch {
        key,
        outside,
        found,
        flow,
        dead,
        ..
    } = scratch;
    dead.place = Place::NONE;
    *outside = outside_key(key.protocol, flow);
    let mut tries = 0;
    while tries < PORT_TRIES {
        tries += 1;
        let mut ports = PortDraw::new(settings, network, key.inside_port);
        dead.best = 0;
        while let Some(port) = ports.next(env.random()) {
            outside.external_port = port;
            let merit = env.weigh_view(outside, found, dead.best, now);
            if merit > dead.best {
                dead.best = merit;
                flow.external_port = port;
            }
            if is_enough(dead.best, ports.draws()) {
                break;
            }
        }
        if dead.best == 0 {
            return false;
        }
        outside.external_port = flow.external_port;
        if env.insert_outside(outside, key) {
            return true;
        }
        // One that can be spared, or another processor was faster.
        let is_spared = env.outside(outside, found)
            && env
                .peek_flow(found)
                .is_some_and(|other| flow_merit(found.protocol, &other, now) != 0);
        if is_spared {
            retire_flow(env, found, dead);
            if env.insert_outside(outside, key) {
                return true;
            }
        }
    }
    false
}

/// How gladly a newcomer is given an external view; 0: not at all, or no better than `best`.
#[inline(always)]
pub fn weigh_view<E: Env>(
    env: &E,
    outside: &OutsideKey,
    found: &mut FlowKey,
    best: u64,
    now: u64,
) -> u64 {
    let merit = if !env.outside(outside, found) {
        GONE
    } else if let Some(other) = env.peek_flow(found) {
        flow_merit(found.protocol, &other, now)
    } else {
        0
    };
    if merit > best && env.is_free(outside) {
        merit
    } else {
        0
    }
}

/// The same for the external side of a binding, of which `outside` is the first view.
#[inline(always)]
pub fn weigh_bound<E: Env>(
    env: &E,
    bound: &OutsideKey,
    outside: &OutsideKey,
    found: &mut FlowKey,
    best: u64,
    now: u64,
) -> u64 {
    let merit = if !env.outside(bound, found) {
        GONE
    } else if let Some(other) = env.peek_binding(found) {
        binding_merit(&other, now)
    } else {
        0
    };
    // A connected UDP socket of the host is found by its peer only.
    if merit > best && env.is_free(bound) && !env.has_socket(outside) {
        merit
    } else {
        0
    }
}

/// External ports to try: the inside port where the network keeps it and it cannot clash with the
/// host's own, then unpredictable ones (RFC 6056) of the dynamic range.
struct PortDraw<'s> {
    settings: &'s Settings,
    kept: Option<u16>,
    left: u32,
}

impl<'s> PortDraw<'s> {
    #[inline(always)]
    fn new(settings: &'s Settings, network: &Network, inside_port: u16) -> Self {
        let clashes =
            inside_port >= settings.host_port_first && inside_port <= settings.host_port_last;
        Self {
            settings,
            // Privileged ports are the host's own, whatever it serves now.
            kept: (network.keeps_ports != 0 && inside_port >= 1024 && !clashes)
                .then_some(inside_port),
            left: PORT_DRAWS,
        }
    }

    #[inline(always)]
    fn next(&mut self, random: u32) -> Option<u16> {
        if let Some(port) = self.kept.take() {
            return Some(port);
        }
        if self.left == 0 {
            return None;
        }
        self.left -= 1;
        Some(dynamic_port(self.settings, random))
    }

    /// How many unpredictable ones have been tried.
    #[inline(always)]
    fn draws(&self) -> u32 {
        PORT_DRAWS - self.left
    }
}

/// Finds or makes the endpoint-independent binding for the flow that is being made:
/// `scratch.binding`.
#[inline(never)]
fn bind<E: Env>(env: &E, network: &Network, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
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
        retire_binding(env, inside, dead);
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
    if !choose_port(env, settings, network, scratch, now) {
        return Err(Reason::PortsExhausted);
    }
    env.settle(scratch, SlotUse::Binding, now)
        .inspect_err(|_| env.remove_outside(&scratch.bound))
}

/// Reserves an external port for the binding that is being made: `scratch.bound`. Where none of
/// those drawn is free, it is taken from the binding that can be spared best.
#[inline(never)]
fn choose_port<E: Env>(
    env: &E,
    settings: &Settings,
    network: &Network,
    scratch: &mut Scratch,
    now: u64,
) -> bool {
    let Scratch {
        key,
        found,
        flow,
        binding,
        inside,
        outside,
        bound,
        dead,
        ..
    } = scratch;
    dead.place = Place::NONE;
    *bound = bound_key(key.protocol, &flow.external, 0);
    *outside = outside_key(key.protocol, flow);
    let mut tries = 0;
    while tries < PORT_TRIES {
        tries += 1;
        let mut ports = PortDraw::new(settings, network, key.inside_port);
        dead.best = 0;
        while let Some(port) = ports.next(env.random()) {
            bound.external_port = port;
            outside.external_port = port;
            let merit = env.weigh_bound(bound, outside, found, dead.best, now);
            if merit > dead.best {
                dead.best = merit;
                binding.external_port = port;
            }
            if dead.best == GONE {
                break;
            }
        }
        if dead.best == 0 {
            return false;
        }
        bound.external_port = binding.external_port;
        if env.insert_outside(bound, inside) {
            return true;
        }
        // One that can be spared, or another processor was faster.
        let is_spared = env.outside(bound, found)
            && env
                .peek_binding(found)
                .is_some_and(|other| binding_merit(&other, now) != 0);
        if is_spared {
            retire_binding(env, found, dead);
            if env.insert_outside(bound, inside) {
                return true;
            }
        }
    }
    false
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
