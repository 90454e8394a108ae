//! From an endpoint: to the outside, to a sibling, to the host.

use super::{
    Drop, Noted, Verdict, Way, address_frame, allowed_still, delivery, deny, end, is_routed,
    is_translated, opens, receive, untranslatable,
};
use crate::{
    abi::{
        Endpoint, EventKind, Flow, FlowState, NO_ADDRESS, PeerKind, Reason, SlotUse, flow_flag,
        policy_flag,
    },
    embedded,
    env::{Env, RouteKind, Scratch, Tables},
    event,
    filter::permit,
    flow::{SECOND, Side, advance, binding_key, is_dead, set_timeout},
    fragment, guard, loopback, mapping,
    mtu::{self, fits},
    nat::{begin, open, open_masquerade},
    neighbour,
    packet::{Balance, ETHERNET, ETHERTYPE_ARP, Family, Kind, Packet, Rewrite, same},
    place::retire,
    policy,
    ports::choose_view,
    publish::{find_publish, published_port},
    renewal,
};

/// From an endpoint: `link` is its host side interface.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_endpoint<'s, E: Env>(env: &E, link: u32, scratch: &'s mut Scratch) -> Verdict<'s> {
    let Some(endpoint) = env.endpoint(link) else {
        return Err(Drop {
            endpoint: 0,
            reason: Reason::NoEndpoint,
        });
    };
    let outcome = sent(env, link, endpoint, scratch);
    end(outcome, scratch, endpoint.number)
}

#[inline(always)]
fn sent<E: Env>(
    env: &E,
    link: u32,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
) -> Result<Noted, Reason> {
    // The tag would leave with the frame, into whatever VLAN the endpoint chose.
    if env.is_tagged() {
        return Err(Reason::NotIp);
    }
    let ethertype = guard::source_mac(env, endpoint)?;
    if ethertype == ETHERTYPE_ARP {
        neighbour::answer_arp(env, endpoint)?;
        return Ok(scratch.way.set(Way::Link { link }));
    }
    scratch.from = fragment::from_endpoint(endpoint);
    env.parse(&mut scratch.packet, ETHERNET, ethertype)?;
    if neighbour::is_solicitation(&scratch.packet) {
        neighbour::answer_solicitation(env, endpoint, &scratch.packet)?;
        return Ok(scratch.way.set(Way::Link { link }));
    }
    guard::sent_by_endpoint(&scratch.packet, endpoint)?;
    if !scratch.packet.is_trackable() {
        return sent_besides(env, endpoint, scratch);
    }

    let now = env.now();
    scratch.key = scratch.packet.sent_key(endpoint.number);
    if let Some(mut flow) = env.flow(&scratch.key) {
        let is_over = is_dead(&flow, now)
            || renewal::is_due(&flow, &scratch.packet, now)
                && renewal::is_lost(env, scratch, &flow);
        if !is_over {
            allowed_still(env, endpoint, scratch, &mut flow)?;
            return send(env, scratch, &mut flow, now);
        }
        retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
    }
    // An echo request is never a reply, even if its identifier is one that a sibling uses.
    if scratch.packet.kind != Kind::EchoRequest && may_be_siblings(env, endpoint, &scratch.packet) {
        scratch.outside = scratch.packet.received_key();
        if env.outside(&scratch.outside, &mut scratch.found)
            && let Some(mut flow) = env.flow(&scratch.found)
            && !is_dead(&flow, now)
            && flow.peer_kind == PeerKind::Endpoint as u32
        {
            scratch.key = scratch.found;
            return receive(env, scratch, &mut flow, now);
        }
    }
    open_sent(env, link, scratch, now)?;
    if scratch.flow.peer_kind == PeerKind::Uplink as u32 {
        open_masquerade(env, endpoint, scratch, now)?;
    }
    let mut flow = env.flow(&scratch.key).ok_or(Reason::FlowTableFull)?;
    event::flow(env, EventKind::FlowNew, &scratch.key, &flow);
    send(env, scratch, &mut flow, now)
}

/// Whether a packet of an endpoint may belong to a flow that another one opened, which it then
/// knows by that one's address, or by the gateway's if it is that one itself.
#[inline(always)]
fn may_be_siblings<T: Tables>(tables: &T, endpoint: &Endpoint, packet: &Packet) -> bool {
    tables.owner(&packet.destination).is_some()
        || same(&packet.destination, guard::gateway(endpoint, packet.family))
}

/// What opens no flow by itself: belongs to one of another packet, or is dropped.
#[inline(never)]
fn sent_besides<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
) -> Result<Noted, Reason> {
    match scratch.packet.kind {
        Kind::Error => embedded::sent(env, endpoint, scratch),
        Kind::Fragment => fragment::sent(env, endpoint, scratch),
        _ => Err(untranslatable(&scratch.packet)),
    }
}

/// Begins the flow of a packet that an endpoint sends, and opens it where it leads to the host or
/// to a sibling. To masquerade is not for this function to do: it takes more stack.
#[inline(never)]
fn open_sent<E: Env>(env: &E, link: u32, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let endpoint = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
    let family = scratch.packet.family;
    let Scratch { key, route, .. } = scratch;
    let asked = policy::judge(env, endpoint, key, route);
    if !opens(&scratch.packet) {
        // Perhaps of a connection that the policy has ended, in a packet of the peer's.
        scratch.rejects = !asked.allowed
            && scratch.packet.kind == Kind::Tcp
            && endpoint.policy_flags & policy_flag::REJECT != 0;
        return Err(Reason::NoFlow);
    }
    scratch.rule = asked.rule;
    if !asked.allowed {
        return Err(deny(scratch, endpoint, asked.rule));
    }
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    begin(scratch, network, 0, now);
    scratch.flow.policy = endpoint.policy;
    scratch.flow.link = link;

    let key = &scratch.key;
    if let Some(owner) = env.owner(&key.peer) {
        return open_to_sibling(env, endpoint, owner.link, scratch, now);
    }
    let Scratch { key, route, .. } = scratch;
    env.route(endpoint.bridge, &key.inside, &key.peer, route);
    if route.kind == RouteKind::Local && matches!(scratch.packet.kind, Kind::Tcp | Kind::Udp) {
        let sibling = aim(env, endpoint, scratch)?;
        if sibling != 0 {
            return open_to_sibling(env, endpoint, sibling, scratch, now);
        }
    }
    let route = &scratch.route;
    match route.kind {
        RouteKind::None => Err(Reason::NoRoute),
        RouteKind::Local => {
            scratch.flow.peer_kind = PeerKind::Host as u32;
            scratch.flow.peer_link = endpoint.bridge;
            open(env, scratch, now)
        }
        RouteKind::Link if route.link == endpoint.bridge => Err(Reason::NoSuchAddress),
        RouteKind::Link => {
            let uplink = env.uplink(route.link).ok_or(Reason::UplinkUnmanaged)?;
            let Scratch { flow, route, .. } = &mut *scratch;
            flow.external = route.source_by(uplink, family);
            flow.peer_kind = PeerKind::Uplink as u32;
            flow.peer_link = route.link;
            flow.next_hop = route.next_hop;
            flow.macs = route.macs;
            flow.mtu = mtu::of_route(env, route);
            if settings.mapping_link != 0 {
                mapping::translate_source(env, settings, scratch);
            }
            if same(&scratch.flow.external, &NO_ADDRESS) {
                return Err(Reason::NoRoute);
            }
            Ok(())
        }
    }
}

/// Points the flow that is being made, to an address of the host, at what is published there:
/// the interface of the endpoint that it is, or 0: it is the host, or beyond `scratch.route`.
#[inline(never)]
fn aim<E: Env>(env: &E, endpoint: &Endpoint, scratch: &mut Scratch) -> Result<u32, Reason> {
    let Scratch {
        packet,
        key,
        flow,
        route,
        ..
    } = scratch;
    let Some(publish) = find_publish(env, packet.protocol, &key.peer, key.peer_port) else {
        return Ok(0);
    };
    if publish.mapping == 0 {
        let target = env.endpoint(publish.link).ok_or(Reason::NoEndpoint)?;
        flow.peer = *guard::own_address(target, packet.family);
        flow.peer_port = published_port(publish, key.peer_port);
        return Ok(publish.link);
    }
    if !mapping::aim(env, publish, key.peer_port, flow) {
        return Ok(0);
    }
    if let Some(owner) = env.owner(&flow.peer) {
        return Ok(owner.link);
    }
    let rule = policy::denied_by(env, endpoint, &flow.peer, packet.protocol, flow.peer_port);
    if rule != 0 {
        return Err(deny(scratch, endpoint, rule));
    }
    env.route(endpoint.bridge, &key.inside, &flow.peer, route);
    match route.kind {
        RouteKind::Link => Ok(0),
        RouteKind::Local | RouteKind::None => Err(Reason::NoRoute),
    }
}

/// Opens a flow to an endpoint of this host, the one behind `link`; `scratch.flow.peer` is its
/// address, by way of a publish or not.
#[inline(always)]
fn open_to_sibling<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    link: u32,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    let sibling = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
    let (key, flow) = (&scratch.key, &mut scratch.flow);
    if is_translated(key, flow) {
        let protocol = key.protocol as u8;
        let rule = policy::denied_by(env, endpoint, &flow.peer, protocol, flow.peer_port);
        if rule != 0 {
            return Err(deny(scratch, endpoint, rule));
        }
    } else if sibling.network != endpoint.network
        && (sibling.isolated != 0 || endpoint.isolated != 0)
    {
        return Err(Reason::Isolated);
    }
    if sibling.number == endpoint.number {
        // It talks to itself: it would not take its own address as a source (RFC 1122
        // section 3.2.1.3), so it is seen as the gateway.
        flow.external = *guard::gateway(endpoint, Family::of(&key.inside));
    }
    flow.peer_kind = PeerKind::Endpoint as u32;
    flow.peer_link = link;
    choose_view(env, scratch, sibling.number, now)?;
    open(env, scratch, now)
}

/// Sends a packet of a flow's endpoint on to the peer.
#[inline(never)]
pub(crate) fn send<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    flow: &mut Flow,
    now: u64,
) -> Result<Noted, Reason> {
    let hop = is_routed(&scratch.key, flow);
    if hop && scratch.packet.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    fragment::note(env, Side::Inside, scratch);
    let link = flow.peer_link;
    let noted = if flow.peer_kind == PeerKind::Uplink as u32 {
        let stale = now.saturating_sub(flow.checked) >= SECOND;
        if stale {
            revalidate(env, scratch, flow, now);
        }
        fits(env, &scratch.packet, flow.mtu, &mut scratch.mtu)?;
        let link = flow.peer_link;
        // What is not answered yet, and one packet a second, goes by way of the kernel's neighbour,
        // so that it probes it while we use it.
        let is_unanswered =
            flow.state == FlowState::Opening as u32 && flow.flags & flow_flag::ANSWERED == 0;
        let by_neighbour = stale || is_unanswered || !has_macs(flow);
        if by_neighbour && !same(&flow.next_hop, &NO_ADDRESS) {
            scratch.way.set(Way::Uplink {
                link,
                next_hop: flow.next_hop,
            })
        } else {
            env.store(0, &flow.macs, Balance::Balanced)?;
            scratch.way.set(Way::Link { link })
        }
    } else if flow.peer_kind == PeerKind::Endpoint as u32 {
        let sibling = sibling(env, flow, scratch.packet.family)?;
        fits(env, &scratch.packet, sibling.mtu, &mut scratch.mtu)?;
        address_frame(env, sibling)?;
        scratch.way.set(delivery(sibling, link))
    } else if flow.peer_kind == PeerKind::Loopback as u32 {
        loopback::way_back(env, flow, scratch.packet.family, &mut scratch.way)?
    } else {
        scratch.way.set(Way::Host { link })
    };
    let Scratch {
        packet,
        key,
        rewrite,
        way,
        ..
    } = scratch;
    *rewrite = Rewrite::to_peer(flow, packet, hop);
    advance(env, key, flow, packet, Side::Inside, now);
    mapping::count(env, flow, packet);
    env.rewrite(packet, rewrite)?;
    if let Way::Loopback { .. } = way {
        loopback::hide_destination(env, packet.l3, &flow.peer)?;
    }
    Ok(noted)
}

/// The endpoint of this host that a flow leads to.
///
/// # Errors
/// [`Reason::NoEndpoint`] if its interface index has come to another one since.
#[inline(always)]
pub(crate) fn sibling<'e, E: Env>(
    env: &'e E,
    flow: &Flow,
    family: Family,
) -> Result<&'e Endpoint, Reason> {
    let sibling = env.endpoint(flow.peer_link).ok_or(Reason::NoEndpoint)?;
    if !same(guard::own_address(sibling, family), &flow.peer) {
        return Err(Reason::NoEndpoint);
    }
    Ok(sibling)
}

/// Looks once a second whether the way of a flow is still what the kernel would choose, and
/// keeps its binding and its peer's permission alive.
///
/// Replies leave by the uplink that the flow came in on, and a masqueraded flow cannot change
/// its address, so another uplink is taken only when the old one is gone.
#[inline(never)]
fn revalidate<E: Env>(env: &E, scratch: &mut Scratch, flow: &mut Flow, now: u64) {
    let Scratch {
        key, route, dead, ..
    } = scratch;
    flow.checked = now;
    if flow.flags & flow_flag::BOUND != 0 {
        flow.last_seen = now;
        set_timeout(env, key, flow);
        permit(env, key, flow, dead, now);
        if let Some(mut binding) = env.binding(&binding_key(key, &flow.external)) {
            binding.last_seen = now;
        }
    }
    let Some(endpoint) = env.endpoint(flow.link) else {
        return;
    };
    env.route(endpoint.bridge, &key.inside, &flow.peer, route);
    let is_uplink = route.kind == RouteKind::Link && env.uplink(route.link).is_some();
    if is_uplink && (route.link == flow.peer_link || env.uplink(flow.peer_link).is_none()) {
        flow.peer_link = route.link;
        flow.next_hop = route.next_hop;
        flow.macs = route.macs;
        flow.mtu = mtu::of_route(env, route);
    } else if !same(&flow.next_hop, &NO_ADDRESS) {
        flow.macs = [0; 12];
    }
}

/// Whether the link-layer addresses towards the peer are known.
#[inline(always)]
fn has_macs(flow: &Flow) -> bool {
    flow.macs[..4] != [0; 4] || flow.macs[4..8] != [0; 4]
}
