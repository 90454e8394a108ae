//! External ports: which are drawn, who may have them, and from whom one is taken.

use crate::{
    abi::{FlowKey, Network, OutsideKey, Reason, Settings, SlotUse},
    env::{Env, Scratch},
    flow::{
        GONE, OWN, Standing, binding_merit, bound_key, flow_merit, is_dead, is_enough,
        is_long_done, outside_key,
    },
    packet::same,
    place::Place,
    publish::find_publish,
};

/// How many external ports are tried before a packet is dropped.
const PORT_DRAWS: u32 = 16;

/// How often a port is looked for before a packet is dropped because another processor was faster
/// each time, which is rarer than with places: there are more.
const PORT_TRIES: u32 = 2;

/// How many other ports are tried where two flows to a sibling would look alike to it.
const VIEW_DRAWS: u32 = 4;

/// Whether masquerade may use an external port: neither a publish nor a socket of the host
/// has it.
#[inline(always)]
pub fn is_free<E: Env>(env: &E, key: &OutsideKey) -> bool {
    find_publish(env, key.protocol as u8, &key.external, key.external_port).is_none()
        && !env.has_socket(key)
}

/// A port of the dynamic range.
#[inline(always)]
pub fn dynamic_port(settings: &Settings, random: u32) -> u16 {
    settings
        .dynamic_port_first
        .wrapping_add(random as u16 & settings.dynamic_port_mask)
}

/// Chooses by which port another endpoint of this host sees the flow that is being made: its own,
/// unless another flow is already: the same source port may go to one server directly and by way
/// of a publish. Nor may its answers, to a flow by way of a publish, be those of a flow of its own:
/// the host may have asked it by the name that it knows itself by. `peer` is its number.
#[inline(never)]
pub fn choose_view<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    peer: u32,
    now: u64,
) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let Scratch {
        key,
        flow,
        outside,
        found,
        inside: answer,
        ..
    } = scratch;
    *outside = outside_key(key.protocol, flow);
    *answer = FlowKey {
        endpoint: peer,
        protocol: key.protocol,
        inside: flow.peer,
        peer: flow.external,
        inside_port: flow.peer_port,
        peer_port: flow.external_port,
    };
    // Without a publish between them, both flows are one conversation.
    let is_published = !same(&flow.peer, &key.peer);
    let mut draw = 0;
    while draw < VIEW_DRAWS {
        draw += 1;
        let is_seen = env.outside(outside, found)
            && env
                .flow(found)
                .is_some_and(|other| Standing::of(found.protocol, &other, now) == Standing::Live);
        let is_answered = is_published && is_known(env, answer, now);
        if !is_seen && !is_answered {
            break;
        }
        let port = dynamic_port(settings, env.random());
        flow.external_port = port;
        outside.external_port = port;
        answer.peer_port = port;
    }
    Ok(())
}

/// Whether there is a flow that packets are taken for, closed or not.
#[inline(always)]
fn is_known<E: Env>(env: &E, key: &FlowKey, now: u64) -> bool {
    env.flow(key).is_some_and(|flow| !is_dead(&flow, now))
}

/// Whether answers to the flow that is being made, by which the host asks an endpoint, would be
/// taken for answers to one that the endpoint has to itself: both are seen as the gateway.
#[inline(never)]
pub fn is_its_own<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> bool {
    let Scratch {
        key, bound, found, ..
    } = scratch;
    *bound = OutsideKey {
        protocol: key.protocol,
        external: key.peer,
        peer: key.inside,
        external_port: key.peer_port,
        peer_port: key.inside_port,
    };
    env.outside(bound, found) && is_known(env, found, now)
}

/// Reserves an external port for what is being made, a binding or a flow that has none: one that
/// nobody uses, towards its peer if it is a flow's, else that of the holder that can be spared
/// best. It is then `scratch.flow.external_port`.
#[inline(never)]
pub fn choose_port<E: Env>(
    env: &E,
    network: &Network,
    scratch: &mut Scratch,
    holds: SlotUse,
    now: u64,
) -> bool {
    let Some(settings) = env.settings() else {
        return false;
    };
    let Scratch {
        key,
        outside,
        bound,
        flow,
        dead,
        ..
    } = &mut *scratch;
    dead.place = Place::NONE;
    *outside = outside_key(key.protocol, flow);
    *bound = bound_key(key.protocol, &flow.external, 0);
    let mut tries = 0;
    while tries < PORT_TRIES {
        tries += 1;
        let ports = PortDraw::new(settings, network, scratch.key.inside_port);
        draw(env, ports, scratch, holds, now);
        if scratch.dead.best == 0 {
            return false;
        }
        if take(env, scratch, holds, now) {
            return true;
        }
    }
    false
}

/// Draws ports until one is good enough: the best of them is then `scratch.flow.external_port`,
/// and its merit `scratch.dead.best`.
#[inline(always)]
fn draw<E: Env>(env: &E, mut ports: PortDraw<'_>, scratch: &mut Scratch, holds: SlotUse, now: u64) {
    let Scratch {
        key,
        outside,
        bound,
        found,
        flow,
        dead,
        ..
    } = scratch;
    dead.best = 0;
    while let Some(port) = ports.next(env.random()) {
        outside.external_port = port;
        bound.external_port = port;
        let merit = match holds {
            SlotUse::Binding => env.weigh_bound(bound, outside, found, dead.best, now),
            _ => env.weigh_view(key, outside, found, dead.best, now),
        };
        if merit > dead.best {
            dead.best = merit;
            flow.external_port = port;
        }
        if is_enough(dead.best, ports.draws()) {
            break;
        }
    }
    outside.external_port = flow.external_port;
    bound.external_port = flow.external_port;
}

/// Takes the external view that was chosen. False: another processor was faster.
#[inline(always)]
fn take<E: Env>(env: &E, scratch: &mut Scratch, holds: SlotUse, now: u64) -> bool {
    let Scratch {
        key,
        inside,
        outside,
        bound,
        found,
        dead,
        ..
    } = scratch;
    let (view, taker) = match holds {
        SlotUse::Binding => (bound, inside),
        _ => (outside, key),
    };
    (!env.outside(view, found) || env.spare(holds, found, dead, now))
        && env.insert_outside(view, taker)
}

/// How gladly the newcomer `key` is given an external view; 0: not at all, or no better than
/// `best`.
#[inline(always)]
pub fn weigh_view<E: Env>(
    env: &E,
    key: &FlowKey,
    outside: &OutsideKey,
    found: &mut FlowKey,
    best: u64,
    now: u64,
) -> u64 {
    let mut merit = if !env.outside(outside, found) {
        GONE
    } else if let Some(other) = env.peek_flow(found) {
        flow_merit(found.protocol, &other, now)
    } else {
        0
    };
    if is_long_done(merit) && merit != GONE && is_of_one_host(found, key) {
        merit = OWN;
    }
    if merit > best && env.is_free(outside) {
        merit
    } else {
        0
    }
}

/// Whether two flows are of one host. What that has done with for a while it may have back at once:
/// its peer may remember the closed connection (TIME-WAIT), but takes a later one of the same host,
/// whose timestamps and sequence numbers go on (RFC 6191). Those of two hosts do not.
#[inline(always)]
fn is_of_one_host(one: &FlowKey, other: &FlowKey) -> bool {
    one.endpoint == other.endpoint && same(&one.inside, &other.inside)
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
