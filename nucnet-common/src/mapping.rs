//! Static mappings: dnat, snat and hairpin, and the flows of hosts that are no endpoints.
//!
//! Such a host is beyond one interface of this host and its peer beyond another, or the same.
//! Both sides' packets come in by `from_uplink`, so its flow has an external view for each:
//! the one that every flow has, and the inside view, under which the mapped host's own packets
//! find it. Neither can be anybody else's, and a host without mappings looks nothing up for
//! their sake.

use crate::{
    abi::{
        Address, EventKind, Flow, FlowKey, MAPPED, MappingCount, MappingKind, NO_ADDRESS,
        OutsideKey, Owner, PeerKind, Publish, PublishKey, PublishUse, Reason, Settings, SnatKey,
        StaticMapping, flow_flag,
    },
    env::{Env, Route, RouteKind, Scratch, Tables},
    event,
    flow::{SECOND, Side, advance, binding_key},
    fragment, guard,
    mtu::{self, fits},
    nat::{self, begin, is_bound, open, open_bound, open_unbound},
    packet::{Balance, Family, ICMP, ICMPV6, Kind, Packet, Rewrite, half, same},
    path::{Noted, Way, find_peer_port, find_way_back, learn_macs, opens},
    ports::dynamic_port,
    publish::published_port,
};

/// How many ports are tried for a client that is to be seen as the host.
const HAIRPIN_DRAWS: u32 = 16;

/// Whether there are any mappings.
#[inline(always)]
pub fn any<T: Tables>(tables: &T) -> bool {
    tables
        .settings()
        .is_some_and(|settings| settings.mapping_link != 0)
}

/// Whether a prefix of so many bits covers an address.
#[inline(always)]
fn covers(prefix: &Address, bits: u32, address: &Address) -> bool {
    let differs = |at: usize| half(prefix, at) ^ half(address, at);
    // Of a half whose bits all count, or none, nothing is shifted by 64.
    match bits {
        0 => true,
        1..=64 => differs(0) >> (64 - bits) == 0,
        65..=128 => differs(0) == 0 && differs(8) >> (128 - bits) == 0,
        _ => false,
    }
}

/// The view that a mapped host's packets have of their flow: it is looked for as if they were
/// somebody's replies.
#[inline(always)]
pub fn inside_view(key: &FlowKey) -> OutsideKey {
    let is_echo = key.protocol == u32::from(ICMP) || key.protocol == u32::from(ICMPV6);
    OutsideKey {
        protocol: key.protocol,
        external: key.peer,
        peer: key.inside,
        external_port: if is_echo {
            key.inside_port
        } else {
            key.peer_port
        },
        peer_port: if is_echo { 0 } else { key.inside_port },
    }
}

/// Removes the inside view of a flow that is gone.
#[inline(never)]
pub fn forget_inside_view<T: Tables>(tables: &T, key: &FlowKey, view: &mut OutsideKey) {
    *view = inside_view(key);
    tables.remove_outside(view);
}

/// Whether a packet of a mapped host's flow comes from that host. Its peer never sends what
/// looks the same: each view belongs to one flow only, and the two of a flow differ.
#[inline(always)]
fn is_from_inside(packet: &Packet, key: &FlowKey) -> bool {
    same(&packet.source, &key.inside)
        && same(&packet.destination, &key.peer)
        && packet.source_port == key.inside_port
        && match packet.kind {
            Kind::EchoRequest => true,
            Kind::EchoReply => false,
            _ => packet.destination_port == key.peer_port,
        }
}

/// Carries a packet of a mapped host's flow, `scratch.key`, to the other side.
///
/// # Errors
/// The packet is to be dropped.
#[inline(never)]
pub fn carry<E: Env>(env: &E, link: u32, scratch: &mut Scratch, now: u64) -> Result<Noted, Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let mut flow = env.flow(&scratch.key).ok_or(Reason::FlowTableFull)?;
    fragment::note(env, Side::Peer, scratch);
    let Scratch {
        packet,
        rewrite,
        key,
        route,
        mtu,
        way,
        ..
    } = scratch;
    let is_inside = is_from_inside(packet, key);
    if is_inside {
        // Anybody can write the mapped host's address into a packet, elsewhere.
        if link != flow.link {
            return Err(Reason::MartianSource);
        }
    } else if packet.kind == Kind::EchoRequest {
        // For the host itself, though its identifier is that of a flow.
        return Ok(way.set(Way::Pass));
    }
    if packet.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    if now.saturating_sub(flow.checked) >= SECOND {
        let view = settings.mapping_link;
        revalidate(env, view, is_inside, key, &mut flow, route, now);
    }
    let unit = match is_inside {
        true => flow.mtu,
        false => env.uplink(flow.link).map_or(0, |uplink| uplink.mtu),
    };
    fits(env, packet, unit, mtu)?;
    *rewrite = if is_inside {
        Rewrite::to_peer(&flow, packet, true)
    } else {
        Rewrite::to_inside(key, packet, true)
    };
    let is_answered_back = same(&flow.next_hop, &NO_ADDRESS);
    if is_inside && is_answered_back {
        if packet.l3 == 0 {
            // Without an Ethernet header there is no room for the client's address.
            return Err(Reason::NoRoute);
        }
        env.store(0, &flow.macs, Balance::Balanced)?;
    }
    let side = if is_inside { Side::Inside } else { Side::Peer };
    if flow.packets_in == 0 && flow.packets_out == 0 {
        event::flow(env, EventKind::FlowNew, key, &flow);
    }
    advance(env, key, &mut flow, packet, side, now);
    if !is_inside && is_answered_back {
        learn_macs(env, packet, &mut flow);
    }
    count(env, &flow, packet);
    env.rewrite(packet, rewrite)?;
    Ok(way.set(match (is_inside, is_answered_back) {
        (false, _) => Way::Uplink {
            link: flow.link,
            next_hop: flow.inside_hop,
        },
        (true, true) => Way::Link {
            link: flow.peer_link,
        },
        (true, false) => Way::Uplink {
            link: flow.peer_link,
            next_hop: flow.next_hop,
        },
    }))
}

/// Looks once a second whether the ways to both sides of a flow are still what the kernel would
/// choose, and keeps its binding alive.
#[inline(always)]
fn revalidate<E: Env>(
    env: &E,
    view: u32,
    is_inside: bool,
    key: &FlowKey,
    flow: &mut Flow,
    route: &mut Route,
    now: u64,
) {
    flow.checked = now;
    if flow.flags & flow_flag::BOUND != 0
        && is_inside
        && let Some(mut binding) = env.binding(&binding_key(key, &flow.external))
    {
        binding.last_seen = now;
    }
    env.route(view, &flow.peer, &key.inside, route);
    if route.kind == RouteKind::Link && env.uplink(route.link).is_some() {
        flow.link = route.link;
        flow.inside_hop = route.next_hop;
    }
    env.route(view, &key.inside, &flow.peer, route);
    // Replies leave by the interface that the flow came in on, for as long as there is one.
    if route.kind == RouteKind::Link
        && env.uplink(route.link).is_some()
        && (route.link == flow.peer_link || env.uplink(flow.peer_link).is_none())
    {
        flow.peer_link = route.link;
        flow.next_hop = route.next_hop;
        flow.mtu = mtu::of_route(env, route);
    }
}

/// Counts a packet of a flow, which has counted it already, for the mapping that the flow came
/// by, if it did.
#[inline(always)]
pub fn count<T: Tables>(tables: &T, flow: &Flow, packet: &Packet) {
    if flow.mapping != 0 {
        let is_first = flow.packets_in.wrapping_add(flow.packets_out) == 1;
        add(tables, flow.mapping, packet.length, is_first.into());
    }
}

#[inline(never)]
fn add<T: Tables>(tables: &T, mapping: u32, bytes: u32, flows: u64) {
    let more = MappingCount {
        flows,
        packets: 1,
        bytes: bytes.into(),
    };
    tables.count_mapped(mapping, &more);
}

/// Opens the flow of a packet that arrives for a port of a mapping; false: it is for none, from
/// where the mapping does not hold, or for a socket of the host.
///
/// # Errors
/// The packet is to be dropped.
#[inline(never)]
pub fn open_inbound<E: Env>(env: &E, link: u32, scratch: &mut Scratch) -> Result<bool, Reason> {
    let mut ports = Publish::default();
    let is_found = find_hairpin(env, &scratch.packet, &mut ports)
        || find_dnat(env, link, &scratch.packet, &mut ports);
    if !is_found || !admit(env, scratch)? {
        return Ok(false);
    }
    let now = env.now();
    prepare(env, link, scratch, &ports, now)?;
    if scratch.key.endpoint != MAPPED {
        draw_peer_port(env, scratch, now)?;
        open(env, scratch, now)?;
    } else {
        if same(&scratch.key.peer, &scratch.flow.peer) {
            draw_peer_port(env, scratch, now)?;
        } else {
            draw_host_port(env, scratch)?;
        }
        take_inside_view(env, scratch, now)?;
        if let Err(reason) = open(env, scratch, now) {
            give_back(env, scratch);
            return Err(reason);
        }
    }
    Ok(true)
}

/// The key of what a packet is addressed to.
#[inline(always)]
fn asked(packet: &Packet) -> PublishKey {
    PublishKey {
        address: packet.destination,
        protocol: packet.protocol,
        kind: PublishUse::Packets as u8,
        port: packet.destination_port.to_be_bytes(),
    }
}

/// Looks for a hairpin for a packet and its source.
#[inline(never)]
fn find_hairpin<T: Tables>(tables: &T, packet: &Packet, ports: &mut Publish) -> bool {
    let key = asked(packet);
    let Some(hairpin) = tables.hairpin(&key) else {
        return false;
    };
    let Some(mapping) = tables.mapping(hairpin.mapping) else {
        return false;
    };
    if !covers(&mapping.sources, mapping.sources_bits, &packet.source) {
        return false;
    }
    *ports = *hairpin;
    // What the same port is to others, it is to the neighbours.
    if let Some(publish) = tables.publish(&key)
        && let Some(dnat) = tables.mapping(publish.mapping)
        && same(&dnat.internal, &mapping.internal)
    {
        ports.host_port = publish.host_port;
        ports.port = publish.port;
    }
    true
}

/// Looks for a dnat for a packet and the interface by which it comes.
#[inline(never)]
fn find_dnat<T: Tables>(tables: &T, link: u32, packet: &Packet, ports: &mut Publish) -> bool {
    let Some(publish) = tables.publish(&asked(packet)) else {
        return false;
    };
    // The number of no mapping is 0.
    let Some(mapping) = tables.mapping(publish.mapping) else {
        return false;
    };
    *ports = *publish;
    mapping.link == 0 || mapping.link == link
}

/// Whether a packet is for an address that the host has now, and for no socket of its own; the
/// way back to its source is then in `scratch.route`.
#[inline(never)]
fn admit<E: Env>(env: &E, scratch: &mut Scratch) -> Result<bool, Reason> {
    let view = env.settings().ok_or(Reason::Helper)?.mapping_link;
    let Scratch {
        packet,
        route,
        outside,
        ..
    } = scratch;
    env.route(view, &packet.source, &packet.destination, route);
    if route.kind != RouteKind::Local || env.has_socket(outside) {
        return Ok(false);
    }
    guard::peer_outside(env, view, packet, route)?;
    Ok(true)
}

/// Fills key and flow of a packet that a mapping lets in.
#[inline(never)]
fn prepare<E: Env>(
    env: &E,
    link: u32,
    scratch: &mut Scratch,
    ports: &Publish,
    now: u64,
) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let mapping = env.mapping(ports.mapping).ok_or(Reason::NotPublished)?;
    let target = env.owner(&mapping.internal);
    let Scratch { packet, key, .. } = scratch;
    key.endpoint = target.map_or(MAPPED, |owner| owner.endpoint);
    key.protocol = u32::from(packet.protocol);
    key.inside = mapping.internal;
    key.peer = packet.source;
    key.inside_port = published_port(ports, packet.destination_port);
    key.peer_port = packet.source_port;
    let number = match target {
        Some(owner) => env.endpoint(owner.link).ok_or(Reason::NoEndpoint)?.network,
        None => MAPPED,
    };
    let network = env.network(number).ok_or(Reason::NoEndpoint)?;
    begin(scratch, network, flow_flag::INBOUND, now);
    let Scratch { packet, flow, .. } = &mut *scratch;
    flow.external = packet.destination;
    flow.external_port = packet.destination_port;
    flow.mapping = ports.mapping;
    flow.peer_kind = PeerKind::Uplink as u32;
    flow.peer_link = link;
    find_way_back(env, scratch);
    let Scratch {
        packet,
        flow,
        route,
        key,
        ..
    } = scratch;
    if let Some(owner) = target {
        let endpoint = env.endpoint(owner.link).ok_or(Reason::NoEndpoint)?;
        flow.link = owner.link;
        flow.policy = endpoint.policy;
        return Ok(());
    }
    let view = settings.mapping_link;
    env.route(view, &packet.source, &mapping.internal, route);
    if route.kind != RouteKind::Link {
        return Err(Reason::NoRoute);
    }
    let uplink = env.uplink(route.link).ok_or(Reason::NoSuchAddress)?;
    flow.link = route.link;
    flow.inside_hop = route.next_hop;
    if mapping.kind == MappingKind::Hairpin as u32 {
        key.peer = route.source_by(uplink, packet.family);
        if same(&key.peer, &NO_ADDRESS) {
            return Err(Reason::NoRoute);
        }
    }
    Ok(())
}

/// [`find_peer_port`], for the stack's sake not a part of its caller.
#[inline(never)]
fn draw_peer_port<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    find_peer_port(env, scratch, now)
}

/// Chooses the port under which the target sees a client as the host.
#[inline(never)]
fn draw_host_port<E: Env>(env: &E, scratch: &mut Scratch) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let Scratch {
        key,
        outside,
        found,
        ..
    } = scratch;
    *outside = inside_view(key);
    let mut draw = 0;
    while draw < HAIRPIN_DRAWS {
        draw += 1;
        outside.external_port = dynamic_port(settings, env.random());
        if !env.outside(outside, found) && env.is_free(outside) {
            key.peer_port = outside.external_port;
            return Ok(());
        }
    }
    Err(Reason::PortsExhausted)
}

/// Takes the inside view of the flow that is being made.
#[inline(never)]
fn take_inside_view<E: Env>(env: &E, scratch: &mut Scratch, now: u64) -> Result<(), Reason> {
    let Scratch {
        key,
        outside,
        found,
        dead,
        ..
    } = scratch;
    *outside = inside_view(key);
    nat::reserve(env, outside, key, found, dead, now)
}

#[inline(never)]
fn give_back<E: Env>(env: &E, scratch: &mut Scratch) {
    scratch.outside = inside_view(&scratch.key);
    env.remove_outside(&scratch.outside);
}

/// Number of the mapping that translates what a source sends out of an interface; 0: none.
#[inline(never)]
fn find_snat<T: Tables>(tables: &T, source: &Address, link: u32) -> u32 {
    let mut key = SnatKey {
        link: link.to_be_bytes(),
        source: *source,
    };
    let mut snat = tables.snat(&key);
    if snat.is_none() {
        key.link = [0; 4];
        snat = tables.snat(&key);
    }
    snat.map_or(0, |snat| snat.mapping)
}

/// Whether a mapping translates the source of packets to a destination.
#[inline(always)]
fn translates(mapping: &StaticMapping, destination: &Address) -> bool {
    // Every IPv4 address is within the mapped form of an IPv6 prefix of no bits; and neighbours
    // of the source's need no translation among each other.
    Family::of(&mapping.external) == Family::of(destination)
        && !covers(&mapping.sources, mapping.sources_bits, destination)
}

/// Opens the flow of a packet that arrives from a source of a snat mapping and leaves by another
/// of the host's interfaces; false: it is for the host, for an endpoint, or not to be
/// translated.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn open_outbound<E: Env>(env: &E, link: u32, scratch: &mut Scratch) -> Result<bool, Reason> {
    if !prepare_outbound(env, link, scratch)? {
        return Ok(false);
    }
    let protocol = scratch.key.protocol;
    let has_binding = env
        .network(MAPPED)
        .is_some_and(|network| is_bound(network, protocol));
    let opened = match has_binding {
        true => translate_bound(env, scratch),
        false => translate(env, scratch),
    };
    if opened.is_err() {
        give_back(env, scratch);
    }
    opened.map(|()| true)
}

/// Opens the flow that is being made, with the external port of a binding.
#[inline(always)]
fn translate_bound<E: Env>(env: &E, scratch: &mut Scratch) -> Result<(), Reason> {
    let network = env.network(MAPPED).ok_or(Reason::Helper)?;
    let now = scratch.flow.created;
    open_bound(env, network, scratch, now)
}

/// Opens the flow that is being made, with an external port of its own.
#[inline(always)]
fn translate<E: Env>(env: &E, scratch: &mut Scratch) -> Result<(), Reason> {
    let network = env.network(MAPPED).ok_or(Reason::Helper)?;
    let now = scratch.flow.created;
    open_unbound(env, network, scratch, now)
}

/// Fills key and flow of a packet that a mapping translates on its way out, and takes the inside
/// view.
#[inline(never)]
fn prepare_outbound<E: Env>(env: &E, link: u32, scratch: &mut Scratch) -> Result<bool, Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let view = settings.mapping_link;
    let (packet, route) = (&scratch.packet, &mut scratch.route);
    let family = packet.family;
    let any = SnatKey {
        link: SnatKey::SOURCES.to_be_bytes(),
        source: packet.source,
    };
    if env.snat(&any).is_none()
        || guard::is_martian(&packet.source, family)
        || guard::is_martian(&packet.destination, family)
        || guard::is_multicast(&packet.destination, family)
        || guard::is_link_local(&packet.destination, family)
        || env.owner(&packet.source).is_some()
    {
        return Ok(false);
    }
    env.route(view, &packet.source, &packet.destination, route);
    if route.kind != RouteKind::Link || env.uplink(route.link).is_none() {
        return Ok(false);
    }
    let number = find_snat(env, &packet.source, route.link);
    let Some(mapping) = env.mapping(number) else {
        return Ok(false);
    };
    if !translates(mapping, &packet.destination) {
        return Ok(false);
    }
    scratch.key = packet.sent_key(MAPPED);
    let network = env.network(MAPPED).ok_or(Reason::Helper)?;
    let now = env.now();
    begin(scratch, network, 0, now);
    let Scratch {
        packet,
        flow,
        route,
        ..
    } = scratch;
    flow.mapping = number;
    flow.external = mapping.external;
    flow.peer_kind = PeerKind::Uplink as u32;
    flow.peer_link = route.link;
    flow.next_hop = route.next_hop;
    flow.mtu = mtu::of_route(env, route);
    flow.link = link;
    // The host must have the address now, and the source be where its packets come from.
    env.route(view, &packet.source, &mapping.external, route);
    if route.kind != RouteKind::Local {
        return Ok(false);
    }
    env.route(view, &packet.destination, &packet.source, route);
    if route.kind != RouteKind::Link || route.link != link {
        return Ok(false);
    }
    flow.inside_hop = route.next_hop;
    // What belongs to no flow must not leave with its own address.
    if !opens(packet) {
        return Err(Reason::NoFlow);
    }
    take_inside_view(env, scratch, now)?;
    Ok(true)
}

/// Gives the flow that is being made, of an endpoint to beyond `scratch.flow.peer_link`, the
/// address of the snat mapping for it, if there is one and the host has the address now.
#[inline(never)]
pub fn translate_source<E: Env>(env: &E, settings: &Settings, scratch: &mut Scratch) {
    let Scratch {
        key, flow, route, ..
    } = scratch;
    let number = find_snat(env, &key.inside, flow.peer_link);
    let Some(mapping) = env.mapping(number) else {
        return;
    };
    if !translates(mapping, &flow.peer) {
        return;
    }
    env.route(settings.mapping_link, &key.inside, &mapping.external, route);
    if route.kind == RouteKind::Local {
        flow.external = mapping.external;
        if flow.mapping == 0 {
            flow.mapping = number;
        }
    }
}

/// The endpoint that a port of a mapping leads to, for somebody whose packets come in by no
/// interface of the host's.
#[inline(always)]
pub fn endpoint_of<T: Tables>(tables: &T, publish: &Publish) -> Option<Owner> {
    let mapping = tables.mapping(publish.mapping)?;
    if mapping.link != 0 {
        return None;
    }
    tables.owner(&mapping.internal).copied()
}

/// Points a flow of an endpoint, to a port of a mapping, at the mapping's target. False: the
/// mapping holds for one interface only, by which the endpoint's packets do not come in.
#[inline(always)]
pub fn aim<T: Tables>(tables: &T, publish: &Publish, port: u16, flow: &mut Flow) -> bool {
    let Some(mapping) = tables.mapping(publish.mapping) else {
        return false;
    };
    if mapping.link != 0 {
        return false;
    }
    flow.peer = mapping.internal;
    flow.peer_port = published_port(publish, port);
    flow.mapping = publish.mapping;
    true
}
