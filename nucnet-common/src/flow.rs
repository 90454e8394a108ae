//! Flows: their life, their idle times, and who of them can be spared.

use crate::{
    abi::{
        Address, Binding, Flow, FlowKey, FlowState, MAPPED, NO_ADDRESS, Network, OutsideKey,
        flow_flag,
    },
    env::{Env, Tables},
    event,
    packet::{Kind, Packet, TCP, UDP, same, tcp_flag},
};

/// Nanoseconds of a second.
pub const SECOND: u64 = 1_000_000_000;

/// After how many draws, of places or ports, a newcomer is content with what has served its
/// purpose: where a busy endpoint has filled all there are with closed connections, there is
/// nothing better to be found.
const FEW_DRAWS: u32 = 4;

/// The same for what has served its purpose for a while: each draw reads entries that no cache has.
const FEWER_DRAWS: u32 = 2;

/// How long a while that is, in nanoseconds: longer than who closes a connection usually has to
/// repeat its last word.
const WHILE: u64 = 4 * SECOND;

/// For how long what nobody has answered is left alone even under pressure, in nanoseconds.
const PATIENCE: u64 = SECOND;

/// The port of the domain name system, whose bindings are short-lived (RFC 4787 REQ-5a).
const DNS: u16 = 53;

/// Which side of a flow sent a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The endpoint that the flow belongs to.
    Inside,
    /// The other one.
    Peer,
}

#[inline(always)]
fn is_idle(last_seen: u64, timeout_s: u32, now: u64) -> bool {
    // Another processor's clock may be ahead of ours by a little.
    now.saturating_sub(last_seen) >= u64::from(timeout_s) * SECOND
}

/// Whether a flow is dead: idle for longer than its state allows.
#[inline(always)]
pub fn is_dead(flow: &Flow, now: u64) -> bool {
    is_idle(flow.last_seen, flow.timeout_s, now)
}

/// Whether a binding is dead: never before its flows, whose latest packet may be a second later
/// than what it noted.
#[inline(always)]
pub fn is_unbound(binding: &Binding, now: u64) -> bool {
    is_idle(binding.last_seen, binding.timeout_s.saturating_add(1), now)
}

/// What a flow or binding has to say to a newcomer that wants its place or port. The greater
/// goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u32)]
pub enum Standing {
    /// It stays.
    Live,
    /// It waits for an answer, and has done so for longer than most answers take: a question to
    /// the domain name system, or what came in from outside and nobody completed. A flood of
    /// these must not keep anybody out.
    Unanswered,
    /// It has served its purpose: a closed connection, an answered question to the domain name
    /// system, what came in by a binding and the endpoint never took up.
    Done,
    /// It was idle for too long.
    Dead,
}

impl Standing {
    /// That of a flow.
    #[inline(always)]
    pub fn of(protocol: u32, flow: &Flow, now: u64) -> Self {
        if is_dead(flow, now) {
            return Self::Dead;
        }
        let is_opening = flow.state == FlowState::Opening as u32;
        let is_inbound = flow.flags & flow_flag::INBOUND != 0;
        let is_question = is_question(protocol, flow);
        if flow.state == FlowState::Closed as u32
            || is_question && !is_opening && flow.packets_in >= flow.packets_out
            || protocol == u32::from(UDP) && !is_inbound && !is_opening && flow.packets_out == 0
        {
            return Self::Done;
        }
        if (is_question || is_inbound && is_opening)
            && now.saturating_sub(flow.last_seen) >= PATIENCE
        {
            return Self::Unanswered;
        }
        Self::Live
    }

    /// That of a binding.
    #[inline(always)]
    pub fn of_binding(binding: &Binding, now: u64) -> Self {
        if is_unbound(binding, now) {
            Self::Dead
        } else if binding.is_for_questions != 0 && now.saturating_sub(binding.last_seen) >= PATIENCE
        {
            Self::Unanswered
        } else {
            Self::Live
        }
    }
}

/// Whether two flows of endpoints are one.
#[inline(always)]
pub fn same_flow(one: &FlowKey, other: &FlowKey) -> bool {
    same_binding(one, other) && one.peer_port == other.peer_port && same(&one.peer, &other.peer)
}

/// Whether two flows of endpoints have the same inside address and port.
#[inline(always)]
pub fn same_binding(one: &FlowKey, other: &FlowKey) -> bool {
    one.endpoint == other.endpoint
        && one.protocol == other.protocol
        && one.inside_port == other.inside_port
        && same(&one.inside, &other.inside)
}

/// Idle time of a flow in its state, in seconds.
#[inline(always)]
pub fn timeout(network: &Network, protocol: u32, flow: &Flow) -> u32 {
    if protocol == u32::from(TCP) {
        if flow.state == FlowState::Established as u32 {
            network.tcp_established_s
        } else {
            network.tcp_transitory_s
        }
    } else if protocol == u32::from(UDP) {
        if is_question(protocol, flow) {
            network.udp_dns_s
        } else {
            network.udp_s
        }
    } else {
        network.icmp_s
    }
}

/// Whether a flow asks a server of the domain name system.
#[inline(always)]
pub fn is_question(protocol: u32, flow: &Flow) -> bool {
    protocol == u32::from(UDP) && flow.peer_port == DNS && flow.flags & flow_flag::INBOUND == 0
}

/// Counts a packet of the flow `key` and moves the flow's state on.
///
/// TCP follows RFC 6146 section 3.5.2.2 and RFC 7857 section 2, reduced to what idle times need:
/// who opened, whether the handshake is over, who has sent FIN, whether the last word was a RST.
#[inline(always)]
pub fn advance<E: Env>(
    env: &E,
    key: &FlowKey,
    flow: &mut Flow,
    packet: &Packet,
    side: Side,
    now: u64,
) {
    match side {
        Side::Inside => {
            flow.packets_out += 1;
            flow.bytes_out += u64::from(packet.length);
        }
        Side::Peer => {
            flow.packets_in += 1;
            flow.bytes_in += u64::from(packet.length);
        }
    }
    // A binding must outlive its flows, and only outbound packets refresh it (RFC 4787 REQ-6):
    // inbound ones then must not keep a flow alive either.
    if side == Side::Inside || flow.flags & flow_flag::BOUND == 0 {
        flow.last_seen = now;
    }
    // The first fragment has said all there is to say.
    if packet.kind == Kind::Fragment
        || flow.state == FlowState::Established as u32
            && (packet.kind != Kind::Tcp || packet.flags & (tcp_flag::FIN | tcp_flag::RST) == 0)
    {
        return;
    }
    let state = next_state(flow, packet, side);
    if state != flow.state {
        let before = flow.state;
        flow.state = state;
        let established = FlowState::Established as u32;
        // Nothing else that changes with the state has another idle time.
        if key.protocol == u32::from(TCP) && (state == established || before == established) {
            set_timeout(env, key, flow);
        }
        event::changed(env, key, flow, before);
    }
}

/// Gives a flow the idle time of its state, and its binding at least that.
#[inline(never)]
pub fn set_timeout<E: Tables>(env: &E, key: &FlowKey, flow: &mut Flow) {
    let number = match key.endpoint {
        MAPPED => MAPPED,
        _ => env
            .endpoint(flow.link)
            .map_or(0, |endpoint| endpoint.network),
    };
    let Some(network) = env.network(number) else {
        return;
    };
    flow.timeout_s = timeout(network, key.protocol, flow);
    if flow.flags & flow_flag::BOUND == 0 {
        return;
    }
    if let Some(mut binding) = env.binding(&binding_key(key, &flow.external)) {
        // The external port of a connection that is over need not be kept for hours; one that
        // goes on says so within a second.
        let is_over =
            flow.state == FlowState::Closing as u32 || flow.state == FlowState::Closed as u32;
        if flow.timeout_s > binding.timeout_s || is_over {
            binding.timeout_s = flow.timeout_s;
        }
    }
}

#[inline(always)]
fn next_state(flow: &mut Flow, packet: &Packet, side: Side) -> u32 {
    let opener = if flow.flags & flow_flag::INBOUND == 0 {
        Side::Inside
    } else {
        Side::Peer
    };
    if packet.kind != Kind::Tcp {
        return if side == opener {
            flow.state
        } else {
            FlowState::Established as u32
        };
    }
    let (mut flags, is) = (flow.flags, packet.flags);
    let is_over = flow.state == FlowState::Closing as u32 || flow.state == FlowState::Closed as u32;
    if is & tcp_flag::RST != 0 {
        flags |= flow_flag::RESET;
    } else if is_over && side == opener && is & (tcp_flag::SYN | tcp_flag::ACK) == tcp_flag::SYN {
        // The same ports again (RFC 9293 section 3.6.1): the flow is opened anew in place.
        flags &= !TCP_FLAGS;
    } else {
        // A RST that the other side did not believe is no end (RFC 7857 section 2.2): one of a
        // stranger's, outside the window, is followed by more packets. A new connection is not.
        if is & tcp_flag::SYN == 0 || flags & flow_flag::CONNECTED == 0 {
            flags &= !flow_flag::RESET;
        }
        if is & tcp_flag::FIN != 0 {
            flags |= match side {
                Side::Inside => flow_flag::FIN_INSIDE,
                Side::Peer => flow_flag::FIN_PEER,
            };
        }
        if side != opener {
            flags |= flow_flag::ANSWERED;
        } else if flags & flow_flag::ANSWERED != 0 && is & tcp_flag::ACK != 0 {
            // Its last segment of a handshake, or of a simultaneous open (RFC 9293 section 3.5).
            flags |= flow_flag::CONNECTED;
        }
    }
    flow.flags = flags;
    let both = flow_flag::FIN_INSIDE | flow_flag::FIN_PEER;
    let state = if flags & flow_flag::RESET != 0 || flags & both == both {
        FlowState::Closed
    } else if flags & both != 0 {
        FlowState::Closing
    } else if flags & flow_flag::CONNECTED != 0 {
        FlowState::Established
    } else {
        FlowState::Opening
    };
    state as u32
}

/// What a connection that is opened anew forgets.
const TCP_FLAGS: u32 = flow_flag::FIN_INSIDE
    | flow_flag::FIN_PEER
    | flow_flag::RESET
    | flow_flag::ANSWERED
    | flow_flag::CONNECTED;

/// The external view of a flow.
#[inline(always)]
pub fn outside_key(protocol: u32, flow: &Flow) -> OutsideKey {
    OutsideKey {
        protocol,
        external: flow.external,
        peer: flow.peer,
        external_port: flow.external_port,
        peer_port: flow.peer_port,
    }
}

/// The key of the binding that a flow of an endpoint uses where it is seen as `external`.
#[inline(always)]
pub fn binding_key(key: &FlowKey, external: &Address) -> FlowKey {
    FlowKey {
        endpoint: key.endpoint,
        protocol: key.protocol,
        inside: key.inside,
        peer: *external,
        inside_port: key.inside_port,
        peer_port: 0,
    }
}

/// The external side of a binding.
#[inline(always)]
pub fn bound_key(protocol: u32, external: &Address, external_port: u16) -> OutsideKey {
    OutsideKey {
        protocol,
        external: *external,
        peer: NO_ADDRESS,
        external_port,
        peer_port: 0,
    }
}

/// Whom nobody misses.
pub const GONE: u64 = u64::MAX;

/// What the newcomer's own host has done with for a while: it looks no further.
pub const OWN: u64 = GONE - 1;

/// The least merit of what has served its purpose.
const DONE: u64 = (Standing::Done as u64) << 61;

/// How gladly something is spared, by its standing and then by its age. 0: not at all.
///
/// The best so far is kept among the notes of a journey, not in a variable: the verifier then
/// does not walk through every order in which better ones may come.
#[inline(always)]
pub fn merit(standing: Standing, last_seen: u64, now: u64) -> u64 {
    match standing {
        Standing::Live => 0,
        Standing::Dead => GONE,
        // 2^61 nanoseconds are 73 years.
        _ => (standing as u64) << 61 | now.saturating_sub(last_seen),
    }
}

/// That of a flow.
#[inline(always)]
pub fn flow_merit(protocol: u32, flow: &Flow, now: u64) -> u64 {
    merit(Standing::of(protocol, flow, now), flow.last_seen, now)
}

/// That of a binding.
#[inline(always)]
pub fn binding_merit(binding: &Binding, now: u64) -> u64 {
    merit(Standing::of_binding(binding, now), binding.last_seen, now)
}

/// Whether a newcomer looks no further, after so many draws.
#[inline(always)]
pub fn is_enough(best: u64, draws: u32) -> bool {
    best >= OWN || draws >= FEW_DRAWS && best >= DONE || draws >= FEWER_DRAWS && is_long_done(best)
}

/// Whether it is the merit of what has served its purpose for a while.
#[inline(always)]
pub fn is_long_done(merit: u64) -> bool {
    merit >= DONE + WHILE
}
