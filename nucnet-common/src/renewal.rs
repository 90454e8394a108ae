//! Flows that lost what the outside knows them by, and so must begin anew: the uplink has
//! another address by now (a lease that was renewed, a provider that reconnected), or the binding
//! was given up.

use crate::{
    abi::{Flow, PeerKind, flow_flag},
    env::{Env, RouteKind, Scratch},
    flow::{SECOND, binding_key},
    packet::{Kind, Packet, tcp_flag},
};

/// Whether a packet of a flow's endpoint is an occasion to look: one a second, and for TCP the
/// first of a connection. In the middle of one there is no use: no peer takes it from another
/// address.
#[inline(always)]
pub fn is_due(flow: &Flow, packet: &Packet, now: u64) -> bool {
    if flow.peer_kind != PeerKind::Uplink as u32 || flow.flags & flow_flag::INBOUND != 0 {
        return false;
    }
    if packet.kind == Kind::Tcp {
        return packet.flags & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN;
    }
    now.saturating_sub(flow.checked) >= SECOND
}

/// Whether a flow `scratch.key` lost its external address, or its binding.
#[inline(never)]
pub fn is_lost<E: Env>(env: &E, scratch: &mut Scratch, flow: &Flow) -> bool {
    let Scratch {
        packet, key, route, ..
    } = scratch;
    // A connection is known by its peer, too, and does without.
    if flow.flags & flow_flag::BOUND != 0 && packet.kind != Kind::Tcp {
        match env.peek_binding(&binding_key(key, &flow.external)) {
            Some(binding) if binding.external_port == flow.external_port => {}
            _ => return true,
        }
    }
    let Some(endpoint) = env.endpoint(flow.link) else {
        return false;
    };
    env.route(endpoint.bridge, &key.inside, &flow.external, route);
    route.kind != RouteKind::Local
}
