//! The journeys of a packet, in reading order: from an endpoint, from an uplink, from the host.
//!
//! Each decides first and writes last. Its result says where the packet goes next; whoever
//! called moves it there.

use crate::{
    abi::{
        Address, Delivery, Endpoint, EventKind, Flow, FlowKey, FlowState, MAPPED, Network,
        PeerKind, Reason, UNJUDGED, flow_flag, policy_flag,
    },
    embedded,
    env::{Env, RouteKind, Scratch},
    event,
    filter::{admit, is_for_binding, is_for_host, permit},
    flow::{SECOND, Side, advance, binding_key, is_dead, retire_flow, set_timeout},
    fragment, guard, loopback, mapping,
    mtu::{self, fits},
    nat::{begin, choose_view, find_publish, open, open_masquerade, published_port},
    neighbour,
    packet::{
        Balance, ETHERNET, ETHERTYPE_ARP, Family, Frame, Kind, Packet, Rewrite, same, tcp_flag,
    },
    policy, renewal,
};

/// How many other client ports are tried where two ways to a published port collide.
pub(crate) const PEER_PORT_DRAWS: u32 = 4;

/// Where a packet goes next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// On its way: it is none of nucnet's business.
    Pass,
    /// Into the peer of a veth pair.
    Peer {
        /// The host side interface.
        link: u32,
    },
    /// Out of an interface, as it is.
    Link {
        /// The interface.
        link: u32,
    },
    /// To the host, as if received by a bridge.
    Host {
        /// The bridge.
        link: u32,
    },
    /// To the host by way of its loopback interface, with a local route at hand.
    Loopback {
        /// The loopback interface.
        link: u32,
        /// The mark that it has on the way: [`loopback::from_loopback`] reads it.
        mark: u32,
    },
    /// Out of an uplink, to a neighbour.
    Uplink {
        /// The uplink.
        link: u32,
        /// The neighbour.
        next_hop: Address,
    },
}

/// A packet that is dropped, and on whose account.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Drop {
    /// The endpoint's number; 0: none is known.
    pub endpoint: u32,
    /// Why.
    pub reason: Reason,
}

/// The end of a journey.
pub type Verdict = Result<Way, Drop>;

/// From an endpoint: `link` is its host side interface.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_endpoint<E: Env>(env: &E, link: u32) -> Verdict {
    let Some(endpoint) = env.endpoint(link) else {
        return Err(Drop {
            endpoint: 0,
            reason: Reason::NoEndpoint,
        });
    };
    sent(env, link, endpoint).map_err(|reason| Drop {
        endpoint: endpoint.number,
        reason,
    })
}

#[inline(always)]
fn sent<E: Env>(env: &E, link: u32, endpoint: &Endpoint) -> Result<Way, Reason> {
    // The tag would leave with the frame, into whatever VLAN the endpoint chose.
    if env.is_tagged() {
        return Err(Reason::NotIp);
    }
    let ethertype = guard::source_mac(env, endpoint)?;
    if ethertype == ETHERTYPE_ARP {
        neighbour::answer_arp(env, endpoint)?;
        return Ok(Way::Link { link });
    }
    let mut scratch = env.scratch().ok_or(Reason::Helper)?;
    let scratch = &mut *scratch;
    scratch.from = fragment::from_endpoint(endpoint);
    env.parse(&mut scratch.packet, ETHERNET, ethertype)?;
    if neighbour::is_solicitation(&scratch.packet) {
        neighbour::answer_solicitation(env, endpoint, &scratch.packet)?;
        return Ok(Way::Link { link });
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
        retire_flow(env, &scratch.key, &mut scratch.dead);
    }
    // An echo request is never a reply, even if its identifier is one that a sibling uses.
    if scratch.packet.kind != Kind::EchoRequest {
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
        open_masquerade(env, scratch, now)?;
    }
    let mut flow = env.flow(&scratch.key).ok_or(Reason::FlowTableFull)?;
    event::flow(env, EventKind::FlowNew, &scratch.key, &flow);
    send(env, scratch, &mut flow, now)
}

/// What opens no flow by itself: belongs to one of another packet, or is dropped.
#[inline(never)]
fn sent_besides<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
) -> Result<Way, Reason> {
    match scratch.packet.kind {
        Kind::Error => embedded::sent(env, endpoint, scratch),
        Kind::Fragment => fragment::sent(env, endpoint, scratch),
        _ => Err(untranslatable(&scratch.packet)),
    }
}

/// Why a packet is neither translated nor judged.
#[inline(always)]
fn untranslatable(packet: &Packet) -> Reason {
    match packet.kind {
        Kind::Extended => Reason::ExtensionHeader,
        _ => Reason::Protocol,
    }
}

/// A flow that the endpoint opened is judged again when its policy has changed, whoever sends
/// the packet; a flow that is denied ends.
#[inline(always)]
pub(crate) fn allowed_still<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
    flow: &mut Flow,
) -> Result<(), Reason> {
    if flow.policy == endpoint.policy || flow.flags & flow_flag::INBOUND != 0 {
        return Ok(());
    }
    // A flow may be older than the policy and stay; a connection that begins anew on its ports
    // is another one.
    let packet = &scratch.packet;
    if flow.policy != UNJUDGED
        && flow.policy >= endpoint.policy_since
        && !(packet.kind == Kind::Tcp && opens(packet))
    {
        return Ok(());
    }
    judge_again(env, endpoint, scratch, flow)
}

#[inline(never)]
fn judge_again<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    scratch: &mut Scratch,
    flow: &mut Flow,
) -> Result<(), Reason> {
    let Scratch { key, route, .. } = scratch;
    let protocol = key.protocol as u8;
    let mut asked = policy::judge(env, endpoint, key, route);
    if asked.allowed {
        asked.rule = policy::denied_by(env, endpoint, &flow.peer, protocol, flow.peer_port);
    }
    if !asked.allowed || asked.rule != 0 {
        retire_flow(env, key, &mut scratch.dead);
        return Err(deny(scratch, endpoint, asked.rule));
    }
    flow.policy = endpoint.policy;
    Ok(())
}

/// Notes which rule denies a packet, and whether its sender is told.
#[inline(always)]
fn deny(scratch: &mut Scratch, endpoint: &Endpoint, rule: u32) -> Reason {
    scratch.policy = if endpoint.policy_flags & policy_flag::QUIET == 0 {
        endpoint.policy
    } else {
        0
    };
    scratch.rule = rule;
    scratch.rejects = endpoint.policy_flags & policy_flag::REJECT != 0;
    Reason::Policy
}

/// Whether a packet may open a flow: the first one of a TCP connection, a datagram, an echo
/// request.
#[inline(always)]
pub(crate) fn opens(packet: &Packet) -> bool {
    match packet.kind {
        Kind::Tcp => {
            packet.flags & (tcp_flag::SYN | tcp_flag::ACK | tcp_flag::RST) == tcp_flag::SYN
        }
        Kind::Udp | Kind::EchoRequest => true,
        _ => false,
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
            let none = [0; 16];
            let Scratch { flow, route, .. } = &mut *scratch;
            flow.external = if !same(&route.source, &none) {
                route.source
            } else if family == Family::V4 {
                uplink.address4
            } else {
                uplink.address6
            };
            flow.peer_kind = PeerKind::Uplink as u32;
            flow.peer_link = route.link;
            flow.next_hop = route.next_hop;
            flow.macs = route.macs;
            flow.mtu = mtu::of_route(env, route);
            if settings.mapping_link != 0 {
                mapping::translate_source(env, settings, scratch);
            }
            if same(&scratch.flow.external, &none) {
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
    choose_view(env, scratch, now)?;
    open(env, scratch, now)
}

/// Whether the peer is another than the one that the endpoint addresses.
#[inline(always)]
fn is_translated(key: &FlowKey, flow: &Flow) -> bool {
    !same(&flow.peer, &key.peer)
}

/// Whether packets of a flow cross a router, which takes one off their time to live. The
/// bridge between siblings, and the host itself, do not.
#[inline(always)]
pub(crate) fn is_routed(key: &FlowKey, flow: &Flow) -> bool {
    flow.peer_kind == PeerKind::Uplink as u32
        || flow.peer_kind == PeerKind::Endpoint as u32 && is_translated(key, flow)
}

/// Sends a packet of a flow's endpoint on to the peer.
#[inline(never)]
pub(crate) fn send<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    flow: &mut Flow,
    now: u64,
) -> Result<Way, Reason> {
    let hop = is_routed(&scratch.key, flow);
    if hop && scratch.packet.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    fragment::note(env, Side::Inside, scratch);
    let link = flow.peer_link;
    let way = if flow.peer_kind == PeerKind::Uplink as u32 {
        let stale = now.saturating_sub(flow.checked) >= SECOND;
        if stale {
            revalidate(env, scratch, flow, now);
        }
        fits(env, &scratch.packet, flow.mtu, &mut scratch.mtu)?;
        let link = flow.peer_link;
        // The first packet of a flow, and one a second, go by way of the kernel's neighbour, so
        // that it probes it while we use it.
        let by_neighbour = stale || flow.state == FlowState::Opening as u32 || !has_macs(flow);
        if by_neighbour && !same(&flow.next_hop, &[0; 16]) {
            Way::Uplink {
                link,
                next_hop: flow.next_hop,
            }
        } else {
            env.store(0, &flow.macs, Balance::Balanced)?;
            Way::Link { link }
        }
    } else if flow.peer_kind == PeerKind::Endpoint as u32 {
        let sibling = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
        // The interface index may have come to another endpoint since.
        if !same(
            guard::own_address(sibling, scratch.packet.family),
            &flow.peer,
        ) {
            return Err(Reason::NoEndpoint);
        }
        fits(env, &scratch.packet, sibling.mtu, &mut scratch.mtu)?;
        address_frame(env, sibling)?;
        delivery(sibling, link)
    } else if flow.peer_kind == PeerKind::Loopback as u32 {
        loopback::way_back(env, flow, scratch.packet.family)?
    } else {
        Way::Host { link }
    };
    let Scratch {
        packet,
        key,
        rewrite,
        ..
    } = scratch;
    *rewrite = Rewrite {
        source: flow.external,
        destination: flow.peer,
        source_port: flow.external_port,
        destination_port: if packet.is_echo() {
            flow.external_port
        } else {
            flow.peer_port
        },
        hop,
    };
    advance(env, key, flow, packet, Side::Inside, now);
    mapping::count(env, flow, packet);
    env.rewrite(packet, rewrite)?;
    if let Way::Loopback { .. } = way {
        loopback::hide_destination(env, packet.l3, &flow.peer)?;
    }
    Ok(way)
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
    } else if !same(&flow.next_hop, &[0; 16]) {
        flow.macs = [0; 12];
    }
}

/// Whether the link-layer addresses towards the peer are known.
#[inline(always)]
fn has_macs(flow: &Flow) -> bool {
    flow.macs[..4] != [0; 4] || flow.macs[4..8] != [0; 4]
}

/// From an uplink: `header` bytes of link-layer header come before the IP packet.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_uplink<E: Env>(env: &E, link: u32, header: u32, ethertype: u16) -> Verdict {
    let mut account = 0;
    arrived(env, link, header, ethertype, &mut account).map_err(|reason| Drop {
        endpoint: account,
        reason,
    })
}

#[inline(always)]
fn arrived<E: Env>(
    env: &E,
    link: u32,
    header: u32,
    ethertype: u16,
    account: &mut u32,
) -> Result<Way, Reason> {
    // The interface of that VLAN is an uplink of its own.
    if env.is_tagged() {
        return Ok(Way::Pass);
    }
    let mut scratch = env.scratch().ok_or(Reason::Helper)?;
    let scratch = &mut *scratch;
    scratch.from = fragment::from_uplink(link);
    // What cannot be read cannot be addressed to an endpoint: the host's stack drops it.
    if env.parse(&mut scratch.packet, header, ethertype).is_err() {
        return Ok(Way::Pass);
    }
    if !scratch.packet.is_trackable() {
        return arrived_besides(env, link, scratch, account);
    }
    if scratch.packet.kind == Kind::EchoRequest && !mapping::any(env) {
        return Ok(Way::Pass);
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
                retire_flow(env, &scratch.key, &mut scratch.dead);
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
                return Ok(Way::Pass);
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
    Ok(Way::Pass)
}

/// What comes in and opens no flow by itself: belongs to one of another packet, or is the host's.
#[inline(always)]
fn arrived_besides<E: Env>(
    env: &E,
    link: u32,
    scratch: &mut Scratch,
    account: &mut u32,
) -> Result<Way, Reason> {
    match scratch.packet.kind {
        Kind::Error => embedded::arrived(env, scratch, account),
        Kind::Fragment => fragment::arrived(env, link, scratch, account),
        _ => Ok(Way::Pass),
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

/// The way to the peer that opens a flow, by the uplink that it came in on.
#[inline(never)]
pub(crate) fn find_way_back<E: Env>(env: &E, scratch: &mut Scratch) {
    let Scratch {
        packet,
        flow,
        route,
        ..
    } = scratch;
    if route.link == flow.peer_link {
        flow.next_hop = route.next_hop;
        flow.macs = route.macs;
        flow.mtu = mtu::of_route(env, route);
    } else {
        learn_macs(env, packet, flow);
        flow.mtu = env.uplink(flow.peer_link).map_or(0, |uplink| uplink.mtu);
    }
}

/// Whether a network's publishes are served at an uplink.
#[inline(always)]
fn serves(network: &Network, uplink: u32) -> bool {
    network.is_restricted == 0 || network.uplinks.contains(&uplink)
}

/// Finds a peer port under which `scratch.key` is nobody's: the same client port may come by two
/// published ports that lead to one port inside. The endpoint then sees another client port.
#[inline(always)]
pub(crate) fn find_peer_port<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    now: u64,
) -> Result<(), Reason> {
    let mut draw = 0;
    while let Some(flow) = env.flow(&scratch.key) {
        if is_dead(&flow, now) {
            retire_flow(env, &scratch.key, &mut scratch.dead);
            break;
        }
        draw += 1;
        if draw > PEER_PORT_DRAWS {
            return Err(Reason::PortsExhausted);
        }
        scratch.key.peer_port = env.random() as u16 | 0x8000;
    }
    Ok(())
}

/// Notes whom a frame came from, so that the reply goes back there.
#[inline(always)]
pub(crate) fn learn_macs<F: Frame>(frame: &F, packet: &Packet, flow: &mut Flow) {
    // Without an Ethernet header there is nothing to note, and nothing to address.
    if packet.l3 != ETHERNET {
        return;
    }
    if let Some(header) = frame.load::<12>(0) {
        flow.macs[..6].copy_from_slice(&header[6..]);
        flow.macs[6..].copy_from_slice(&header[..6]);
    }
}

/// Delivers a packet of a flow's peer to the endpoint.
#[inline(never)]
pub(crate) fn receive<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    flow: &mut Flow,
    now: u64,
) -> Result<Way, Reason> {
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
        ..
    } = scratch;
    fits(env, packet, endpoint.mtu, mtu)?;
    *rewrite = Rewrite {
        source: key.peer,
        destination: key.inside,
        source_port: if packet.is_echo() {
            key.inside_port
        } else {
            key.peer_port
        },
        destination_port: key.inside_port,
        hop,
    };
    advance(env, key, flow, packet, Side::Peer, now);
    mapping::count(env, flow, packet);
    if flow.peer_kind == PeerKind::Uplink as u32 && same(&flow.next_hop, &[0; 16]) {
        learn_macs(env, packet, flow);
    }
    env.rewrite(packet, rewrite)?;
    if packet.l3 != 0 {
        address_frame(env, endpoint)?;
    }
    Ok(delivery(endpoint, link))
}

/// From the host, by way of a network's bridge.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_host<E: Env>(env: &E, ethertype: u16) -> Verdict {
    let mut account = 0;
    from_host_for(env, ethertype, &mut account).map_err(|reason| Drop {
        endpoint: account,
        reason,
    })
}

#[inline(always)]
fn from_host_for<E: Env>(env: &E, ethertype: u16, account: &mut u32) -> Result<Way, Reason> {
    if env.is_tagged() {
        return Err(Reason::NotIp);
    }
    if ethertype == ETHERTYPE_ARP {
        // The host has a permanent neighbour for every endpoint; it asks for nobody.
        return Err(Reason::NoNeighbour);
    }
    let mut scratch = env.scratch().ok_or(Reason::Helper)?;
    let scratch = &mut *scratch;
    env.parse(&mut scratch.packet, ETHERNET, ethertype)?;
    let packet = &scratch.packet;
    if guard::is_multicast(&packet.destination, packet.family) {
        return Err(Reason::Multicast);
    }
    let owner = env
        .owner(&packet.destination)
        .ok_or(Reason::NoSuchAddress)?;
    *account = owner.endpoint;
    let endpoint = env.endpoint(owner.link).ok_or(Reason::NoEndpoint)?;
    if packet.is_trackable() {
        fits(env, packet, endpoint.mtu, &mut scratch.mtu)?;
        track_from_host(env, endpoint, owner.link, scratch)?;
    } else if !matches!(packet.kind, Kind::Error | Kind::Icmp | Kind::Fragment) {
        return Err(untranslatable(packet));
    } else if env.is_forwarded() {
        return Err(Reason::NotPublished);
    }
    address_frame(env, endpoint)?;
    Ok(Way::Link { link: owner.link })
}

/// Notes what the host sends, so that the endpoint's replies pass any policy. The host itself
/// is trusted: what belongs to no flow goes through all the same.
#[inline(always)]
fn track_from_host<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    link: u32,
    scratch: &mut Scratch,
) -> Result<(), Reason> {
    let now = env.now();
    scratch.outside = scratch.packet.received_key();
    if env.outside(&scratch.outside, &mut scratch.key)
        && let Some(mut flow) = env.flow(&scratch.key)
    {
        if is_dead(&flow, now) {
            retire_flow(env, &scratch.key, &mut scratch.dead);
        } else if (!env.is_forwarded() || flow.peer_kind == PeerKind::Host as u32)
            && allowed_still(env, endpoint, scratch, &mut flow).is_ok()
        {
            advance(
                env,
                &scratch.key,
                &mut flow,
                &scratch.packet,
                Side::Peer,
                now,
            );
            return Ok(());
        }
    }
    // What the host forwards is its own only as the answer to something sent to the host: by
    // way of a port forward of somebody else's, for instance.
    if env.is_forwarded() {
        return Err(Reason::NotPublished);
    }
    if !opens(&scratch.packet) {
        return Ok(());
    }
    let outside = &scratch.outside;
    scratch.key = FlowKey {
        endpoint: endpoint.number,
        protocol: outside.protocol,
        inside: outside.external,
        peer: outside.peer,
        inside_port: outside.external_port,
        peer_port: outside.peer_port,
    };
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    begin(scratch, network, flow_flag::INBOUND, now);
    scratch.flow.policy = endpoint.policy;
    scratch.flow.peer_kind = PeerKind::Host as u32;
    scratch.flow.peer_link = endpoint.bridge;
    scratch.flow.link = link;
    open(env, scratch, now)?;
    if let Some(mut flow) = env.flow(&scratch.key) {
        event::flow(env, EventKind::FlowNew, &scratch.key, &flow);
        advance(
            env,
            &scratch.key,
            &mut flow,
            &scratch.packet,
            Side::Peer,
            now,
        );
    }
    Ok(())
}

/// Addresses a frame to an endpoint, from its gateway.
#[inline(always)]
pub(crate) fn address_frame<F: Frame>(frame: &F, endpoint: &Endpoint) -> Result<(), Reason> {
    let (to, from) = (&endpoint.mac, &endpoint.gateway_mac);
    let macs = [
        to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4],
        from[5],
    ];
    frame.store(0, &macs, Balance::Balanced)
}

/// Writes the Ethernet header of a packet that came without one and now has room for it.
///
/// # Errors
/// [`Reason::NoEndpoint`] if the way leads to no endpoint.
#[inline(always)]
pub fn add_header<E: Env>(env: &E, verdict: Verdict, ethertype: u16) -> Result<(), Reason> {
    let Ok(Way::Peer { link } | Way::Link { link }) = verdict else {
        return Err(Reason::NoEndpoint);
    };
    let endpoint = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
    address_frame(env, endpoint)?;
    env.store(12, &ethertype.to_be_bytes(), Balance::Balanced)
}

/// How an endpoint takes packets.
#[inline(always)]
pub(crate) fn delivery(endpoint: &Endpoint, link: u32) -> Way {
    if endpoint.delivery == Delivery::Peer as u32 {
        Way::Peer { link }
    } else {
        Way::Link { link }
    }
}
