//! What may never leave an endpoint, and what may never come in from outside, policy or not.
//!
//! Judged before any state is made.

use network_types::ip::Ipv4Hdr;

use crate::{
    abi::{Address, Endpoint, Reason},
    env::{Host, Route, RouteKind, Tables},
    packet::{Family, Frame, Kind, Packet, same},
};

/// Type of an ICMPv4 redirect (RFC 792).
const ICMP_REDIRECT: u8 = 5;
/// Type of an ICMPv6 router advertisement (RFC 4861).
const ROUTER_ADVERTISEMENT: u8 = 134;
/// Type of an ICMPv6 redirect (RFC 4861).
const ICMPV6_REDIRECT: u8 = 137;

/// The source link-layer address must be the endpoint's.
#[inline(always)]
pub fn source_mac<F: Frame>(frame: &F, endpoint: &Endpoint) -> Result<u16, Reason> {
    let header: [u8; 14] = frame.header(0).ok_or(Reason::Malformed)?;
    let mac = &endpoint.mac;
    if header[6] != mac[0]
        || header[7] != mac[1]
        || header[8] != mac[2]
        || header[9] != mac[3]
        || header[10] != mac[4]
        || header[11] != mac[5]
    {
        return Err(Reason::SpoofedMac);
    }
    Ok(u16::from_be_bytes([header[12], header[13]]))
}

/// The endpoint's address of a family; zero bytes if it has none.
#[inline(always)]
pub fn own_address(endpoint: &Endpoint, family: Family) -> &Address {
    match family {
        Family::V4 => &endpoint.address4,
        Family::V6 => &endpoint.address6,
    }
}

/// The network's own address of a family; zero bytes if it has none.
#[inline(always)]
pub fn gateway(endpoint: &Endpoint, family: Family) -> &Address {
    match family {
        Family::V4 => &endpoint.gateway4,
        Family::V6 => &endpoint.gateway6,
    }
}

/// Whether nobody may have this address: unspecified, loopback, "this network", class E and
/// broadcast for IPv4.
#[inline(always)]
pub fn is_martian(address: &Address, family: Family) -> bool {
    match family {
        Family::V4 => matches!(address[12], 0 | 127 | 240..=255),
        Family::V6 => {
            let mut rest = 0;
            let mut at = 0;
            while at < 15 {
                rest |= address[at];
                at += 1;
            }
            rest == 0 && address[15] <= 1
        }
    }
}

/// Whether an address is a multicast address, or IPv4's limited broadcast.
#[inline(always)]
pub fn is_multicast(address: &Address, family: Family) -> bool {
    match family {
        Family::V4 => address[12] & 0xf0 == 224 || address[12..16] == [255; 4],
        Family::V6 => address[0] == 0xff,
    }
}

/// Whether an address is of the link-local range of its family.
#[inline(always)]
pub fn is_link_local(address: &Address, family: Family) -> bool {
    match family {
        Family::V4 => address[12] == 169 && address[13] == 254,
        Family::V6 => address[0] == 0xfe && address[1] & 0xc0 == 0x80,
    }
}

/// What an endpoint sends must come from its own address, must not pretend to be
/// infrastructure, and must have a destination that somebody may have.
#[inline(always)]
pub fn sent_by_endpoint(packet: &Packet, endpoint: &Endpoint) -> Result<(), Reason> {
    if is_infrastructure(packet) {
        return Err(Reason::Infrastructure);
    }
    if is_discovery(packet) {
        return Err(Reason::Discovery);
    }
    if !same(&packet.source, own_address(endpoint, packet.family)) {
        return Err(
            if packet.family == Family::V6 && is_link_local(&packet.source, Family::V6) {
                Reason::LinkLocal
            } else {
                Reason::SpoofedAddress
            },
        );
    }
    // Source routes are among them (RFC 7126 section 4.3): where such a packet goes in the end,
    // no rule can say.
    let has_options = packet.family == Family::V4 && packet.l4 - packet.l3 > Ipv4Hdr::LEN as u32;
    if has_options && endpoint.policy != 0 {
        return Err(Reason::IpOptions);
    }
    if is_multicast(&packet.destination, packet.family) {
        return Err(Reason::Multicast);
    }
    if is_martian(&packet.destination, packet.family) {
        return Err(Reason::Martian);
    }
    // IPv4's link-local range holds services that hosts do route to, the metadata of clouds
    // among them: a matter of policy.
    if packet.family == Family::V6 && is_link_local(&packet.destination, Family::V6) {
        return Err(Reason::LinkLocal);
    }
    Ok(())
}

/// What IPv6 hosts say to their link when an interface comes up (RFC 4861, RFC 3810).
#[inline(always)]
fn is_discovery(packet: &Packet) -> bool {
    packet.family == Family::V6
        && packet.destination[0] == 0xff
        && packet.destination[1] & 0x0f == 2
        && matches!(packet.kind, Kind::Icmp | Kind::Extended)
}

/// Router advertisements, redirects and DHCP server replies.
#[inline(always)]
fn is_infrastructure(packet: &Packet) -> bool {
    match packet.kind {
        Kind::Icmp => match packet.family {
            Family::V4 => packet.flags == ICMP_REDIRECT,
            Family::V6 => matches!(packet.flags, ROUTER_ADVERTISEMENT | ICMPV6_REDIRECT),
        },
        Kind::Udp => match packet.family {
            Family::V4 => packet.source_port == 67,
            Family::V6 => packet.source_port == 547,
        },
        _ => false,
    }
}

/// A peer beyond an uplink that opens a flow must have an address that can be there: redirected
/// packets skip the kernel's own checks of the source.
#[inline(always)]
pub fn peer_outside<E: Tables + Host>(
    env: &E,
    point_of_view: u32,
    packet: &Packet,
    route: &mut Route,
) -> Result<(), Reason> {
    reporter_outside(env, point_of_view, packet, route)?;
    match route.kind {
        RouteKind::None => Err(Reason::MartianSource),
        RouteKind::Local | RouteKind::Link => Ok(()),
    }
}

/// Whoever beyond an uplink reports an error may be anybody on the way (RFC 4787 REQ-12a), even
/// somebody whom no route leads back to, but neither the host nor in a managed network.
#[inline(always)]
pub fn reporter_outside<E: Tables + Host>(
    env: &E,
    point_of_view: u32,
    packet: &Packet,
    route: &mut Route,
) -> Result<(), Reason> {
    let source = &packet.source;
    if is_martian(source, packet.family)
        || is_multicast(source, packet.family)
        || env.owner(source).is_some()
    {
        return Err(Reason::MartianSource);
    }
    env.route(point_of_view, &packet.destination, source, route);
    match route.kind {
        RouteKind::Local => Err(Reason::MartianSource),
        // A route to a managed network: an address there that nobody has.
        RouteKind::Link if env.uplink(route.link).is_none() => Err(Reason::MartianSource),
        RouteKind::Link | RouteKind::None => Ok(()),
    }
}
