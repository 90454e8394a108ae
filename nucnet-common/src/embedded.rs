//! ICMP and ICMPv6 errors about packets of a flow: translated together with the headers that
//! they quote (RFC 5508 section 4, RFC 4787 REQ-12, RFC 5382 REQ-9).
//!
//! An error belongs to the flow of the packet that it quotes, whoever sent it. It makes no flow,
//! ends none and keeps none alive.

use core::mem::offset_of;

use network_types::{
    icmp::Icmpv4Hdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    abi::{Endpoint, Flow, FlowKey, MAPPED, NO_ADDRESS, OutsideKey, PeerKind, Reason},
    env::{Env, Scratch},
    flow::is_dead,
    guard, loopback,
    packet::{
        Balance, Covered, Delta, Family, Fragment, Frame, ICMP, ICMPV6, Kind, Packet, Rewrite,
        SUMMED, TCP, UDP, mapped, ports, quarter, same,
    },
    path::{Noted, Way, address_frame, allowed_still, delivery, is_routed, sibling},
};

/// Length of the header of an ICMP error, after which the quote begins.
const HEADER: u32 = Icmpv4Hdr::LEN as u32;

/// What an error quotes at least of the header after IP's (RFC 792).
const LEAST: u32 = 8;

/// An error that an endpoint sends, about a packet that it received.
///
/// # Errors
/// It is about no flow, or not what it claims to be.
#[inline(never)]
pub fn sent<E: Env>(env: &E, endpoint: &Endpoint, scratch: &mut Scratch) -> Result<Noted, Reason> {
    let now = env.now();
    read(env, scratch)?;
    let quoted = &scratch.quoted;
    scratch.key = FlowKey {
        endpoint: endpoint.number,
        protocol: u32::from(quoted.protocol),
        inside: quoted.destination,
        peer: quoted.source,
        inside_port: quoted.destination_port,
        peer_port: if quoted.is_echo() {
            0
        } else {
            quoted.source_port
        },
    };
    if let Some(mut flow) = env.flow(&scratch.key)
        && !is_dead(&flow, now)
    {
        allowed_still(env, endpoint, scratch, &mut flow)?;
        return send(env, scratch, &flow);
    }
    scratch.outside = quoting_key(&scratch.quoted);
    if env.outside(&scratch.outside, &mut scratch.key)
        && let Some(flow) = env.flow(&scratch.key)
        && !is_dead(&flow, now)
        && flow.peer_kind == PeerKind::Endpoint as u32
    {
        return receive(env, scratch, &flow);
    }
    Err(Reason::NoFlow)
}

/// An error from outside, about a packet that an endpoint sent; [`Way::Pass`] if it is about
/// another.
///
/// # Errors
/// It comes from where no error can come from, or is not what it claims to be.
#[inline(never)]
pub fn arrived<E: Env>(env: &E, scratch: &mut Scratch, account: &mut u32) -> Result<Noted, Reason> {
    if read(env, scratch).is_err() {
        return Ok(scratch.way.set(Way::Pass));
    }
    scratch.outside = quoting_key(&scratch.quoted);
    if !env.outside(&scratch.outside, &mut scratch.key) {
        return Ok(scratch.way.set(Way::Pass));
    }
    let Some(flow) = env.flow(&scratch.key) else {
        return Ok(scratch.way.set(Way::Pass));
    };
    if is_dead(&flow, env.now()) || flow.peer_kind != PeerKind::Uplink as u32 {
        return Ok(scratch.way.set(Way::Pass));
    }
    *account = scratch.key.endpoint;
    let Scratch {
        packet,
        quoted,
        key,
        route,
        ..
    } = scratch;
    let (view, is_from_inside) = if key.endpoint == MAPPED {
        let settings = env.settings().ok_or(Reason::Helper)?;
        let to_inside = same(&quoted.destination, &key.inside) && same(&quoted.source, &key.peer);
        (settings.mapping_link, to_inside)
    } else {
        let endpoint = env.endpoint(flow.link).ok_or(Reason::NoEndpoint)?;
        (endpoint.bridge, false)
    };
    guard::reporter_outside(env, view, packet, route)?;
    if is_from_inside {
        return send(env, scratch, &flow);
    }
    receive(env, scratch, &flow)
}

/// The external view of the flow whose endpoint sent a packet.
#[inline(always)]
fn quoting_key(quoted: &Packet) -> OutsideKey {
    OutsideKey {
        protocol: u32::from(quoted.protocol),
        external: quoted.source,
        peer: quoted.destination,
        external_port: quoted.source_port,
        peer_port: if quoted.is_echo() {
            0
        } else {
            quoted.destination_port
        },
    }
}

/// Reads the quote of an error into `scratch.quoted`.
///
/// # Errors
/// [`Reason::NoFlow`] if it can be about no flow: an error is sent to the sender of what it
/// quotes, which has ports and was no error itself. [`Reason::Malformed`].
#[inline(never)]
pub(crate) fn read<E: Env>(env: &E, scratch: &mut Scratch) -> Result<(), Reason> {
    let Scratch { packet, quoted, .. } = scratch;
    quoted.l3 = packet.l4 + HEADER;
    quoted.family = packet.family;
    quoted.fragment = Fragment::Whole;
    quoted.kind = Kind::Other;
    let end = packet.l3 + packet.length;
    quoted.length = end - quoted.l3;
    match packet.family {
        Family::V4 => read_v4(env, quoted)?,
        Family::V6 => read_v6(env, quoted)?,
    }
    if quoted.l4 + LEAST > end {
        return Err(Reason::Malformed);
    }
    if !same(&quoted.source, &packet.destination) {
        return Err(Reason::NoFlow);
    }
    let start: [u8; LEAST as usize] = env.load(quoted.l4).ok_or(Reason::Malformed)?;
    quoted.flags = start[0];
    quoted.source_port = u16::from_be_bytes([start[0], start[1]]);
    quoted.destination_port = u16::from_be_bytes([start[2], start[3]]);
    quoted.kind = match (quoted.protocol, quoted.family, start[0]) {
        (TCP, ..) => Kind::Tcp,
        (UDP, ..) => Kind::Udp,
        (ICMP, Family::V4, 8) | (ICMPV6, Family::V6, 128) => Kind::EchoRequest,
        (ICMP, Family::V4, 0) | (ICMPV6, Family::V6, 129) => Kind::EchoReply,
        _ => return Err(Reason::NoFlow),
    };
    if quoted.is_echo() {
        quoted.source_port = u16::from_be_bytes([start[4], start[5]]);
        quoted.destination_port = quoted.source_port;
    }
    Ok(())
}

#[inline(always)]
fn read_v4<F: Frame>(frame: &F, quoted: &mut Packet) -> Result<(), Reason> {
    let header: [u8; Ipv4Hdr::LEN] = frame.load(quoted.l3).ok_or(Reason::Malformed)?;
    let words = u32::from(header[0] & 0x0f);
    if header[0] >> 4 != 4 || words < 5 {
        return Err(Reason::Malformed);
    }
    let mut sum = Delta::NONE;
    let mut word = 0;
    while word < 15 {
        if word < words {
            sum = sum.plus(frame.load(quoted.l3 + 4 * word).ok_or(Reason::Malformed)?);
        }
        word += 1;
    }
    // RFC 5508 REQ-3a.
    if sum.folded16() != 0xffff {
        return Err(Reason::Malformed);
    }
    const FRAGMENT: usize = offset_of!(Ipv4Hdr, frags);
    if u16::from_be_bytes([header[FRAGMENT], header[FRAGMENT + 1]]) & 0x1fff != 0 {
        // Its ports are elsewhere.
        return Err(Reason::NoFlow);
    }
    const SOURCE: usize = offset_of!(Ipv4Hdr, src_addr);
    quoted.source = mapped([
        header[SOURCE],
        header[SOURCE + 1],
        header[SOURCE + 2],
        header[SOURCE + 3],
    ]);
    quoted.destination = mapped([
        header[SOURCE + 4],
        header[SOURCE + 5],
        header[SOURCE + 6],
        header[SOURCE + 7],
    ]);
    quoted.protocol = header[offset_of!(Ipv4Hdr, proto)];
    quoted.ttl = header[offset_of!(Ipv4Hdr, ttl)];
    quoted.l4 = quoted.l3 + 4 * words;
    Ok(())
}

#[inline(always)]
fn read_v6<F: Frame>(frame: &F, quoted: &mut Packet) -> Result<(), Reason> {
    let header: [u8; Ipv6Hdr::LEN] = frame.load(quoted.l3).ok_or(Reason::Malformed)?;
    if header[0] >> 4 != 6 {
        return Err(Reason::Malformed);
    }
    const SOURCE: usize = offset_of!(Ipv6Hdr, src_addr);
    quoted.source.copy_from_slice(&header[SOURCE..SOURCE + 16]);
    quoted
        .destination
        .copy_from_slice(&header[SOURCE + 16..SOURCE + 32]);
    quoted.protocol = header[offset_of!(Ipv6Hdr, next_hdr)];
    quoted.ttl = header[offset_of!(Ipv6Hdr, hop_limit)];
    quoted.l4 = quoted.l3 + Ipv6Hdr::LEN as u32;
    quoted.walk(frame)?;
    if quoted.kind != Kind::Other {
        return Err(Reason::NoFlow);
    }
    Ok(())
}

/// Sends an error on to the peer of a flow, whose packet it quotes.
#[inline(never)]
fn send<E: Env>(env: &E, scratch: &mut Scratch, flow: &Flow) -> Result<Noted, Reason> {
    let Scratch {
        packet,
        quoted,
        rewrite,
        key,
        way,
        ..
    } = scratch;
    let hop = is_routed(key, flow);
    if hop && packet.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    check(env, packet)?;
    let link = flow.peer_link;
    let noted = if flow.peer_kind == PeerKind::Uplink as u32 {
        if same(&flow.next_hop, &NO_ADDRESS) {
            env.store(0, &flow.macs, Balance::Balanced)?;
            way.set(Way::Link { link })
        } else {
            way.set(Way::Uplink {
                link,
                next_hop: flow.next_hop,
            })
        }
    } else if flow.peer_kind == PeerKind::Endpoint as u32 {
        let sibling = sibling(env, flow, packet.family)?;
        address_frame(env, sibling)?;
        way.set(delivery(sibling, link))
    } else if flow.peer_kind == PeerKind::Loopback as u32 {
        loopback::way_back(env, flow, packet.family, way)?
    } else {
        way.set(Way::Host { link })
    };
    *rewrite = Rewrite {
        source: flow.peer,
        destination: flow.external,
        source_port: if quoted.is_echo() {
            flow.external_port
        } else {
            flow.peer_port
        },
        destination_port: flow.external_port,
        hop: false,
    };
    env.rewrite_quote(packet, quoted, rewrite)?;
    rewrite.source = flow.external;
    rewrite.destination = flow.peer;
    rewrite.hop = hop;
    env.rewrite(packet, rewrite)?;
    if let Way::Loopback { .. } = way {
        loopback::hide_destination(env, packet.l3, &flow.peer)?;
    }
    Ok(noted)
}

/// Delivers an error to the endpoint of a flow, whose packet it quotes.
#[inline(never)]
fn receive<E: Env>(env: &E, scratch: &mut Scratch, flow: &Flow) -> Result<Noted, Reason> {
    let Scratch {
        packet,
        quoted,
        rewrite,
        key,
        way,
        ..
    } = scratch;
    let hop = is_routed(key, flow);
    if hop && packet.ttl <= 1 {
        return Err(Reason::TtlExceeded);
    }
    let link = flow.link;
    if key.endpoint != MAPPED
        && env
            .endpoint(link)
            .is_none_or(|endpoint| endpoint.number != key.endpoint)
    {
        return Err(Reason::NoEndpoint);
    }
    check(env, packet)?;
    *rewrite = Rewrite {
        source: key.inside,
        destination: key.peer,
        source_port: key.inside_port,
        destination_port: if quoted.is_echo() {
            key.inside_port
        } else {
            key.peer_port
        },
        hop: false,
    };
    env.rewrite_quote(packet, quoted, rewrite)?;
    // The peer, or a router on the way to it.
    rewrite.source = if same(&packet.source, &flow.peer) {
        key.peer
    } else {
        packet.source
    };
    rewrite.destination = key.inside;
    rewrite.hop = hop;
    env.rewrite(packet, rewrite)?;
    if key.endpoint == MAPPED {
        return Ok(way.set(Way::Uplink {
            link,
            next_hop: flow.inside_hop,
        }));
    }
    let endpoint = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
    if packet.l3 != 0 {
        address_frame(env, endpoint)?;
    }
    Ok(way.set(delivery(endpoint, link)))
}

/// Whether the checksum of an error is right (RFC 5508 REQ-3). That of a longer message than an
/// error should be is for its receiver to judge.
#[inline(never)]
fn check<E: Env>(env: &E, error: &Packet) -> Result<(), Reason> {
    let length = error.length - (error.l4 - error.l3);
    if length > SUMMED {
        return Ok(());
    }
    let mut total = Delta::NONE;
    if error.family == Family::V6 {
        total = total.pseudo_header(&error.source, &error.destination, length, ICMPV6);
    }
    total = total.and(env.sum(error.l4, length).ok_or(Reason::Malformed)?);
    if total.folded16() != 0xffff {
        return Err(Reason::Malformed);
    }
    Ok(())
}

/// Writes the addresses and ports that the quoted packet had before, or has after, translation,
/// and mends its checksums and that of the error.
///
/// The checksum of the header after IP's is changed along, if it is quoted: whether it is right
/// cannot be known (RFC 5508 REQ-3c).
#[inline(always)]
pub fn rewrite_quote<F: Frame>(
    frame: &F,
    error: &Packet,
    quoted: &Packet,
    to: &Rewrite,
) -> Result<(), Reason> {
    let family = quoted.family;
    let addresses = Delta::NONE
        .address(family, &quoted.source, &to.source)
        .address(family, &quoted.destination, &to.destination);
    // What changes besides IPv4 addresses, which the checksum of their header balances.
    let mut change = Delta::NONE;
    if !same(&quoted.source, &to.source) || !same(&quoted.destination, &to.destination) {
        match family {
            Family::V4 => {
                let (source, destination) = (quarter(&to.source, 12), quarter(&to.destination, 12));
                const SOURCE: u32 = offset_of!(Ipv4Hdr, src_addr) as u32;
                const CHECK: u32 = offset_of!(Ipv4Hdr, check) as u32;
                frame.store(quoted.l3 + SOURCE, &source, Balance::Balanced)?;
                frame.store(quoted.l3 + SOURCE + 4, &destination, Balance::Balanced)?;
                frame.fix_header_checksum(quoted.l3 + CHECK, addresses)?;
            }
            Family::V6 => {
                const SOURCE: u32 = offset_of!(Ipv6Hdr, src_addr) as u32;
                frame.store(quoted.l3 + SOURCE, &to.source, Balance::Balanced)?;
                frame.store(quoted.l3 + SOURCE + 16, &to.destination, Balance::Balanced)?;
                change = addresses;
            }
        }
    }

    let mut numbers = Delta::NONE;
    if quoted.is_echo() {
        let (old, new) = (
            quoted.source_port.to_be_bytes(),
            to.source_port.to_be_bytes(),
        );
        numbers = numbers.word([old[0], old[1], 0, 0], [new[0], new[1], 0, 0]);
        frame.store(quoted.l4 + 4, &new, Balance::Balanced)?;
    } else {
        let new = ports(to.source_port, to.destination_port);
        numbers = numbers.word(ports(quoted.source_port, quoted.destination_port), new);
        frame.store(quoted.l4, &new, Balance::Balanced)?;
    }
    change = change.and(numbers);

    let at = quoted.checksum();
    // The quote of a TCP header may end before it.
    if quoted.kind != Kind::Tcp || at + size_of::<u16>() as u32 <= quoted.l3 + quoted.length {
        let old: [u8; 2] = frame.load(at).ok_or(Reason::Helper)?;
        if quoted.kind != Kind::Udp || old != [0, 0] {
            let covered = if quoted.covers_addresses() {
                addresses.and(numbers)
            } else {
                numbers
            };
            let mut new = covered.applied(old);
            if quoted.kind == Kind::Udp && new == [0, 0] {
                new = [0xff, 0xff];
            }
            frame.store(at, &new, Balance::Balanced)?;
            change = change.word([old[0], old[1], 0, 0], [new[0], new[1], 0, 0]);
        }
    }
    let covered = Covered {
        pseudo_header: false,
        may_be_absent: false,
    };
    frame.fix_checksum(error.checksum(), change, covered)
}
