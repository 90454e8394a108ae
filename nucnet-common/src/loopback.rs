//! From the host to itself: its own sockets that ask for a publish, by whatever address.
//!
//! Whatever goes over the loopback interface is meant for an address of the host's, which
//! settles the question whether it is. A packet to a publish goes to the endpoint from there; the
//! socket knows nothing of it, and speaks with the address that it asked for.
//!
//! The way back ends at the loopback interface too. The host's stack drops an IPv4 packet between
//! two of its own addresses, unless it comes with the route that it would have had on its way
//! out. So it is sent out to 127.0.0.1, for which the kernel finds such a route, and its real
//! destination, which the mark has carried, is written once it has that route.

use core::mem::offset_of;

use network_types::ip::Ipv4Hdr;

use crate::{
    abi::{Address, EventKind, Flow, FlowKey, Owner, PeerKind, Reason, SlotUse, flow_flag},
    env::{Env, Scratch},
    event,
    flow::is_dead,
    guard, mapping,
    nat::{begin, open},
    packet::{Balance, Delta, ETHERNET, Family, Fragment, Frame, Packet},
    path::{self, Drop, Noted, Way},
    place::retire,
    ports::is_its_own,
    publish::{find_publish, published_port},
};

const LOOPBACK4: [u8; 4] = [127, 0, 0, 1];

/// From the host to itself: `link` is the loopback interface. The interface that the packet is
/// to leave by instead; `None`: it goes on.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_loopback<E: Env>(env: &E, link: u32, ethertype: u16) -> Result<Option<u32>, Drop> {
    let mut account = 0;
    sent(env, link, ethertype, &mut account).map_err(|reason| Drop {
        endpoint: account,
        reason,
    })
}

#[inline(always)]
fn sent<E: Env>(
    env: &E,
    link: u32,
    ethertype: u16,
    account: &mut u32,
) -> Result<Option<u32>, Reason> {
    let mut scratch = env.scratch().ok_or(Reason::Helper)?;
    let scratch = &mut *scratch;
    if env.parse(&mut scratch.packet, ETHERNET, ethertype).is_err() {
        return Ok(None);
    }
    if env.is_forwarded() {
        arrive(env, &scratch.packet)?;
        return Ok(None);
    }
    // Whatever is as long as a datagram can be fits the loopback interface: there are no
    // fragments but those that somebody made by hand.
    if !scratch.packet.is_trackable()
        || scratch.packet.is_echo()
        || scratch.packet.fragment != Fragment::Whole
    {
        return Ok(None);
    }
    let now = env.now();
    scratch.outside = scratch.packet.received_key();
    if env.outside(&scratch.outside, &mut scratch.key)
        && let Some(mut flow) = env.flow(&scratch.key)
    {
        if is_dead(&flow, now) {
            retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
        } else if flow.peer_kind == PeerKind::Loopback as u32 {
            *account = scratch.key.endpoint;
            return deliver(env, scratch, &mut flow, now);
        }
    }
    if !path::opens(&scratch.packet) || !open_published(env, link, scratch, now)? {
        return Ok(None);
    }
    *account = scratch.key.endpoint;
    let mut flow = env.flow(&scratch.key).ok_or(Reason::FlowTableFull)?;
    event::flow(env, EventKind::FlowNew, &scratch.key, &flow);
    deliver(env, scratch, &mut flow, now)
}

/// Hands a packet to the endpoint. Only on its way in could it go to the peer of a veth pair
/// directly; it is on its way out.
#[inline(always)]
fn deliver<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    flow: &mut Flow,
    now: u64,
) -> Result<Option<u32>, Reason> {
    path::receive(env, scratch, flow, now)?;
    Ok(Some(flow.link))
}

/// Opens the flow of a packet to a publish. False: it is to none.
#[inline(never)]
fn open_published<E: Env>(
    env: &E,
    link: u32,
    scratch: &mut Scratch,
    now: u64,
) -> Result<bool, Reason> {
    let packet = &scratch.packet;
    let (family, port) = (packet.family, packet.destination_port);
    // No publish covers these.
    if guard::is_multicast(&packet.destination, family)
        || guard::is_link_local(&packet.destination, family)
    {
        return Ok(false);
    }
    let Some(publish) = find_publish(env, packet.protocol, &packet.destination, port) else {
        return Ok(false);
    };
    // A range may cover ports on which the host itself has asked somebody.
    if env.has_socket(&scratch.outside) {
        return Ok(false);
    }
    let mut owner = Owner {
        link: publish.link,
        endpoint: publish.endpoint,
    };
    if publish.mapping != 0 {
        // The way back from a host that is no endpoint does not lead past here.
        match mapping::endpoint_of(env, publish) {
            Some(target) => owner = target,
            None => return Ok(false),
        }
    }
    let endpoint = env.endpoint(owner.link).ok_or(Reason::NoEndpoint)?;
    if endpoint.number != owner.endpoint {
        return Err(Reason::NoEndpoint);
    }
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    // Beyond the host nobody can answer to a loopback address: the endpoint sees its gateway.
    let peer = if guard::is_martian(&packet.source, family) {
        *guard::gateway(endpoint, family)
    } else {
        packet.source
    };
    scratch.key = FlowKey {
        endpoint: endpoint.number,
        protocol: u32::from(packet.protocol),
        inside: *guard::own_address(endpoint, family),
        peer,
        inside_port: published_port(publish, port),
        peer_port: packet.source_port,
    };
    path::find_peer_port(env, scratch, now)?;
    if is_its_own(env, scratch, now) {
        scratch.key.peer_port = env.random() as u16 | 0x8000;
        path::find_peer_port(env, scratch, now)?;
    }
    begin(scratch, network, flow_flag::INBOUND, now);
    let Scratch { packet, flow, .. } = &mut *scratch;
    flow.external = packet.destination;
    flow.external_port = packet.destination_port;
    flow.peer = packet.source;
    flow.peer_port = packet.source_port;
    flow.policy = endpoint.policy;
    flow.peer_kind = PeerKind::Loopback as u32;
    flow.peer_link = link;
    flow.link = owner.link;
    flow.mapping = publish.mapping;
    open(env, scratch, now)?;
    Ok(true)
}

/// The way of an endpoint's packet to a socket of the host's.
#[inline(always)]
pub(crate) fn way_back<E: Env>(
    env: &E,
    flow: &Flow,
    family: Family,
    way: &mut Way,
) -> Result<Noted, Reason> {
    let link = flow.peer_link;
    match family {
        Family::V4 => Ok(way.set(Way::Loopback {
            link,
            mark: u32::from_ne_bytes(v4(&flow.peer)),
        })),
        Family::V6 => {
            // The loopback interface's own address, or the frame would be "for others".
            env.store(0, &[0; 12], Balance::Balanced)?;
            Ok(way.set(Way::Host { link }))
        }
    }
}

/// Writes 127.0.0.1 over the destination of an IPv4 packet on its way back. Nobody looks at the
/// checksum of what it carries meanwhile, which stays that of the real one.
#[inline(always)]
pub(crate) fn hide_destination<F: Frame>(
    frame: &F,
    l3: u32,
    destination: &Address,
) -> Result<(), Reason> {
    write_destination(frame, l3, v4(destination), LOOPBACK4)
}

/// Writes the real destination of what comes from an endpoint.
#[inline(always)]
fn arrive<E: Env>(env: &E, packet: &Packet) -> Result<(), Reason> {
    let mark = env.mark();
    if packet.family == Family::V4
        && v4(&packet.destination) == LOOPBACK4
        && mark != 0
        && env.endpoint(env.ingress()).is_some()
    {
        write_destination(env, packet.l3, LOOPBACK4, mark.to_ne_bytes())?;
        env.set_mark(0);
    }
    Ok(())
}

#[inline(always)]
fn write_destination<F: Frame>(
    frame: &F,
    l3: u32,
    old: [u8; 4],
    new: [u8; 4],
) -> Result<(), Reason> {
    const DESTINATION: u32 = offset_of!(Ipv4Hdr, dst_addr) as u32;
    const CHECK: u32 = offset_of!(Ipv4Hdr, check) as u32;
    frame.store(l3 + DESTINATION, &new, Balance::Balanced)?;
    frame.fix_header_checksum(l3 + CHECK, Delta::NONE.word(old, new))
}

#[inline(always)]
fn v4(address: &Address) -> [u8; 4] {
    [address[12], address[13], address[14], address[15]]
}
