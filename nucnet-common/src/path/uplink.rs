//! From an uplink, to endpoints.

use super::{
    Noted, Verdict, Way, address_frame, allowed_still, delivery, end, find_peer_port,
    find_way_back, is_routed, learn_macs, opens,
};
use crate::{
    abi::{
        EventKind, Flow, FlowKey, MAPPED, NO_ADDRESS, Network, PeerKind, Reason, SlotUse, flow_flag,
    },
    embedded,
    env::{Env, RouteKind, Scratch},
    event,
    filter::{admit, is_for_binding, is_for_host},
    flow::{Side, advance, is_dead},
    fragment, guard, mapping,
    mtu::fits,
    nat::{begin, open},
    packet::{Kind, Rewrite, same},
    place::retire,
    publish::{find_publish, published_port},
};

/// From an uplink: `header` bytes of link-layer header come before the IP packet.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_uplink<'s, E: Env>(
    env: &E,
    link: u32,
    header: u32,
    ethertype: u16,
    scratch: &'s mut Scratch,
) -> Verdict<'s> {
    let mut account = 0;
    let outcome = arrived(env, link, header, ethertype, scratch, &mut account);
    end(outcome, scratch, account)
}

#[inline(always)]
fn arrived<E: Env>(
    env: &E,
    link: u32,
    header: u32,
    ethertype: u16,
    scratch: &mut Scratch,
    account: &mut u32,
) -> Result<Noted, Reason> {
    // The interface of that VLAN is an uplink of its own.
    if env.is_tagged() {
        return Ok(scratch.way.set(Way::Pass));
    }
    scratch.from = fragment::from_uplink(link);
    // What cannot be read cannot be addressed to an endpoint: the host's stack drops it.
    if env.parse(&mut scratch.packet, header, ethertype).is_err() {
        return Ok(scratch.way.set(Way::Pass));
    }
    if !scratch.packet.is_trackable() {
        return arrived_besides(env, link, scratch, account);
    }
    if scratch.packet.kind == Kind::EchoRequest && !mapping::any(env) {
        return Ok(scratch.way.set(Way::Pass));
    }
    scratch.outside = scratch.packet.received_key();
    // An echo request is nobody's reply, unless a mapped host sends it.
    if env.outside(&scratch.outside, &mut scratch.key)
        && (scratch.packet.kind != Kind::EchoRequest || scratch.key.endpoint == MAPPED)
    {
        *account = scratch.key.endpoint;
        let now = env.now();
        if let Some(mut flow) = env.flow(&scratch.key) {
            if is_dead(&flow, now) {
                retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
            } else if scratch.key.endpoint == MAPPED {
                drop(flow);
                return mapping::carry(env, link, scratch, now);
            } else if flow.peer_kind == PeerKind::Uplink as u32 {
                return receive(env, scratch, &mut flow, now);
            }
        }
    }
    let may_open = opens(&scratch.packet) && scratch.packet.kind != Kind::EchoRequest;
    let mut is_opened = may_open
        && (mapping::any(env) && mapping::open_inbound(env, link, scratch)?
            || open_published(env, link, scratch).inspect_err(|reason| {
                // Its resources are used up, nobody else's.
                if matches!(
                    reason,
                    Reason::FlowQuota | Reason::FlowTableFull | Reason::PortsExhausted
                ) {
                    *account = scratch.key.endpoint;
                }
            })?);
    if !is_opened {
        if mapping::any(env) && mapping::open_outbound(env, link, scratch)? {
            *account = MAPPED;
            return mapping::carry(env, link, scratch, env.now());
        }
        if (may_open || scratch.packet.kind == Kind::EchoReply) && is_for_binding(env, scratch) {
            if is_for_host(env, scratch) {
                return Ok(scratch.way.set(Way::Pass));
            }
            *account = scratch.inside.endpoint;
            admit(env, link, scratch)?;
            is_opened = true;
        }
    }
    if is_opened {
        *account = scratch.key.endpoint;
        let now = env.now();
        if scratch.key.endpoint == MAPPED {
            return mapping::carry(env, link, scratch, now);
        }
        let mut flow = env.flow(&scratch.key).ok_or(Reason::FlowTableFull)?;
        event::flow(env, EventKind::FlowNew, &scratch.key, &flow);
        return receive(env, scratch, &mut flow, now);
    }
    Ok(scratch.way.set(Way::Pass))
}

/// What comes in and opens no flow by itself: belongs to one of another packet, or is the host's.
#[inline(always)]
fn arrived_besides<E: Env>(
    env: &E,
    link: u32,
    scratch: &mut Scratch,
    account: &mut u32,
) -> Result<Noted, Reason> {
    match scratch.packet.kind {
        Kind::Error => embedded::arrived(env, scratch, account),
        Kind::Fragment => fragment::arrived(env, link, scratch, account),
        _ => Ok(scratch.way.set(Way::Pass)),
    }
}

/// Opens the flow of a packet that arrives for a published port; false if it is for no such
/// port, or for a socket of the host.
#[inline(never)]
fn open_published<E: Env>(env: &E, link: u32, scratch: &mut Scratch) -> Result<bool, Reason> {
    let packet = &scratch.packet;
    let (family, port) = (packet.family, packet.destination_port);
    // A loopback address from outside is no business of ours, and a martian of the kernel's.
    if guard::is_martian(&packet.destination, family)
        || guard::is_multicast(&packet.destination, family)
        || guard::is_link_local(&packet.destination, family)
    {
        return Ok(false);
    }
    let Some(publish) = find_publish(env, packet.protocol, &packet.destination, port) else {
        return Ok(false);
    };
    if publish.mapping != 0 {
        return Ok(false);
    }
    let endpoint = env.endpoint(publish.link).ok_or(Reason::NoEndpoint)?;
    if endpoint.number != publish.endpoint {
        return Err(Reason::NoEndpoint);
    }
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    if env.uplink(link).is_none() || !serves(network, link) {
        return Ok(false);
    }
    // Only the host's own addresses are published, and a range may cover ports on which the
    // host itself has asked somebody.
    let (packet, route) = (&scratch.packet, &mut scratch.route);
    env.route(endpoint.bridge, &packet.source, &packet.destination, route);
    if route.kind != RouteKind::Local || env.has_socket(&scratch.outside) {
        return Ok(false);
    }
    guard::peer_outside(env, endpoint.bridge, packet, route)?;
    let now = env.now();

    scratch.key = FlowKey {
        endpoint: endpoint.number,
        protocol: u32::from(packet.protocol),
        inside: *guard::own_address(endpoint, family),
        peer: packet.source,
        inside_port: published_port(publish, port),
        peer_port: packet.source_port,
    };
    find_peer_port(env, scratch, now)?;
    begin(scratch, network, flow_flag::INBOUND, now);
    let (packet, flow) = (&scratch.packet, &mut scratch.flow);
    flow.external = packet.destination;
    flow.external_port = packet.destination_port;
    flow.peer_port = packet.source_port;
    flow.policy = endpoint.policy;
    flow.peer_kind = PeerKind::Uplink as u32;
    flow.peer_link = link;
    flow.link = publish.link;
    find_way_back(env, scratch);
    open(env, scratch, now)?;
    Ok(true)
}

/// Whether a network's publishes are served at an uplink.
#[inline(always)]
fn serves(network: &Network, uplink: u32) -> bool {
    network.is_restricted == 0 || network.uplinks.contains(&uplink)
}

/// Delivers a packet of a flow's peer to the endpoint.
#[inline(never)]
pub(crate) fn receive<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    flow: &mut Flow,
    now: u64,
) -> Result<Noted, Reason> {
    let Scratch { packet, key, .. } = &*scratch;
    let hop = is_routed(key, flow);
    if hop && packet.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    let link = flow.link;
    let endpoint = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
    if endpoint.number != key.endpoint {
        return Err(Reason::NoEndpoint);
    }
    allowed_still(env, endpoint, scratch, flow)?;
    fragment::note(env, Side::Peer, scratch);
    let Scratch {
        packet,
        key,
        rewrite,
        mtu,
        way,
        ..
    } = scratch;
    fits(env, packet, endpoint.mtu, mtu)?;
    *rewrite = Rewrite::to_inside(key, packet, hop);
    advance(env, key, flow, packet, Side::Peer, now);
    mapping::count(env, flow, packet);
    if flow.peer_kind == PeerKind::Uplink as u32 && same(&flow.next_hop, &NO_ADDRESS) {
        learn_macs(env, packet, flow);
    }
    env.rewrite(packet, rewrite)?;
    if packet.l3 != 0 {
        address_frame(env, endpoint)?;
    }
    Ok(way.set(delivery(endpoint, link)))
}
