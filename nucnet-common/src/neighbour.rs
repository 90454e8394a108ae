//! Answers to endpoints that ask for link-layer addresses: ARP (RFC 826) and neighbour
//! discovery (RFC 4861).
//!
//! The answer is always the bridge's address, for the gateway and for siblings alike: every
//! frame passes the program anyway. Nothing of this ever reaches another endpoint.

use core::mem::offset_of;

use network_types::{arp::ArpHdr, ip::Ipv6Hdr};

use crate::{
    abi::{Address, Endpoint, Mac, Reason},
    env::Env,
    guard::{gateway, is_link_local, own_address},
    packet::{Balance, Delta, ETHERNET, Family, Frame, ICMPV6, Kind, Packet, mapped, same},
};

const ARP_REQUEST: [u8; 2] = [0, 1];
const ARP_REPLY: u8 = 2;
const NEIGHBOUR_SOLICITATION: u8 = 135;
const NEIGHBOUR_ADVERTISEMENT: u8 = 136;
const OPTION_SOURCE: u8 = 1;
const OPTION_TARGET: u8 = 2;
/// Length of a solicitation without options, from the ICMPv6 header on.
const SOLICITATION: usize = 24;
/// The same with one link-layer address option.
const SOLICITATION_OPTION: usize = 32;

/// Whether a packet is a neighbour solicitation.
#[inline(always)]
pub fn is_solicitation(packet: &Packet) -> bool {
    packet.kind == Kind::Icmp
        && packet.family == Family::V6
        // With extension headers it would have to be answered otherwise: nobody sends such.
        && packet.l4 - packet.l3 == Ipv6Hdr::LEN as u32
        && packet.flags == NEIGHBOUR_SOLICITATION
}

/// Whether the endpoint may know of this address: the gateway's, or a sibling's.
#[inline(always)]
fn is_neighbour<E: Env>(env: &E, endpoint: &Endpoint, target: &Address, family: Family) -> bool {
    if same(target, gateway(endpoint, family)) {
        return true;
    }
    let Some(owner) = env.owner(target) else {
        return false;
    };
    owner.endpoint != endpoint.number
        && env
            .endpoint(owner.link)
            .is_some_and(|sibling| sibling.network == endpoint.network)
}

#[inline(always)]
fn turn_round<F: Frame>(frame: &F, endpoint: &Endpoint) -> Result<(), Reason> {
    let (to, from) = (&endpoint.mac, &endpoint.gateway_mac);
    frame.store(0, &join(to, from), Balance::Balanced)
}

#[inline(always)]
fn join(to: &Mac, from: &Mac) -> [u8; 12] {
    [
        to[0], to[1], to[2], to[3], to[4], to[5], from[0], from[1], from[2], from[3], from[4],
        from[5],
    ]
}

/// Answers an ARP request of an endpoint in place.
///
/// # Errors
/// Why there is no answer; the frame is then unchanged.
#[inline(never)]
pub fn answer_arp<E: Env>(env: &E, endpoint: &Endpoint) -> Result<(), Reason> {
    let header: [u8; 28] = env.load(ETHERNET).ok_or(Reason::Malformed)?;
    // Ethernet, IPv4, lengths 6 and 4.
    if header[0] != 0
        || header[1] != 1
        || header[2] != 8
        || header[3] != 0
        || header[4] != 6
        || header[5] != 4
    {
        return Err(Reason::Malformed);
    }
    const SENDER_MAC: usize = offset_of!(ArpHdr, sha);
    const SENDER: usize = offset_of!(ArpHdr, spa);
    const TARGET: usize = offset_of!(ArpHdr, tpa);
    let mac = &endpoint.mac;
    if header[SENDER_MAC] != mac[0]
        || header[SENDER_MAC + 1] != mac[1]
        || header[SENDER_MAC + 2] != mac[2]
        || header[SENDER_MAC + 3] != mac[3]
        || header[SENDER_MAC + 4] != mac[4]
        || header[SENDER_MAC + 5] != mac[5]
    {
        return Err(Reason::SpoofedMac);
    }
    let sender = [
        header[SENDER],
        header[SENDER + 1],
        header[SENDER + 2],
        header[SENDER + 3],
    ];
    let target = [
        header[TARGET],
        header[TARGET + 1],
        header[TARGET + 2],
        header[TARGET + 3],
    ];
    // A probe (RFC 5227) has no sender address yet.
    if sender != [0; 4] && !same(&mapped(sender), &endpoint.address4) {
        return Err(Reason::SpoofedAddress);
    }
    if same(&mapped(target), &endpoint.address4) {
        // A probe or announcement of its own address (RFC 5227).
        return Err(Reason::Discovery);
    }
    if [header[6], header[7]] != ARP_REQUEST
        || !is_neighbour(env, endpoint, &mapped(target), Family::V4)
    {
        return Err(Reason::NoNeighbour);
    }
    let from = &endpoint.gateway_mac;
    let body = [
        0, ARP_REPLY, from[0], from[1], from[2], from[3], from[4], from[5], target[0], target[1],
        target[2], target[3], mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], sender[0], sender[1],
        sender[2], sender[3],
    ];
    turn_round(env, endpoint)?;
    env.store(ETHERNET + 6, &body, Balance::Unbalanced)
}

/// Answers a neighbour solicitation of an endpoint in place.
///
/// # Errors
/// Why there is no answer; the frame is then unchanged.
#[inline(never)]
pub fn answer_solicitation<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    packet: &Packet,
) -> Result<(), Reason> {
    let is_own = same(&packet.source, own_address(endpoint, Family::V6))
        || is_link_local(&packet.source, Family::V6);
    if !is_own && !same(&packet.source, &[0; 16]) {
        return Err(Reason::SpoofedAddress);
    }
    // RFC 4861 section 7.1.1.
    if packet.ttl != 255 {
        return Err(Reason::Malformed);
    }
    let start: [u8; SOLICITATION] = env.load(packet.l4).ok_or(Reason::Malformed)?;
    if !is_own {
        // Duplicate address detection: nobody contests an address that was given out once.
        return Err(Reason::Discovery);
    }
    let mut target = [0; 16];
    target.copy_from_slice(&start[8..24]);
    if !is_neighbour(env, endpoint, &target, Family::V6) {
        return Err(Reason::NoNeighbour);
    }
    let carried = packet.length.saturating_sub(packet.l4 - packet.l3);
    let with_option = match carried as usize {
        SOLICITATION => false,
        SOLICITATION_OPTION => {
            let option: [u8; 8] = env
                .load(packet.l4 + SOLICITATION as u32)
                .ok_or(Reason::Malformed)?;
            if option[0] != OPTION_SOURCE || option[1] != 1 {
                return Err(Reason::Malformed);
            }
            let mac = &endpoint.mac;
            if option[2] != mac[0]
                || option[3] != mac[1]
                || option[4] != mac[2]
                || option[5] != mac[3]
                || option[6] != mac[4]
                || option[7] != mac[5]
            {
                return Err(Reason::SpoofedMac);
            }
            true
        }
        _ => return Err(Reason::Malformed),
    };

    // Router, solicited, override (section 4.4).
    let flags = if same(&target, &endpoint.gateway6) {
        0xe0
    } else {
        0x60
    };
    let from = &endpoint.gateway_mac;
    let option = [
        OPTION_TARGET,
        1,
        from[0],
        from[1],
        from[2],
        from[3],
        from[4],
        from[5],
    ];
    let header = [NEIGHBOUR_ADVERTISEMENT, 0, 0, 0, flags, 0, 0, 0];
    let mut sum = Delta::NONE
        .plus([0, 0, 0, ICMPV6])
        .plus((carried).to_be_bytes())
        .plus([header[0], header[1], header[2], header[3]])
        .plus([header[4], header[5], header[6], header[7]])
        // The target is counted twice: once as the source of the answer.
        .plus_address(&target)
        .plus_address(&target)
        .plus_address(&packet.source);
    if with_option {
        sum = sum
            .plus([option[0], option[1], option[2], option[3]])
            .plus([option[4], option[5], option[6], option[7]]);
    }
    let checksum = (!sum.folded16()).to_ne_bytes();
    turn_round(env, endpoint)?;
    env.store(packet.l3 + 7, &[255], Balance::Unbalanced)?;
    env.store(packet.l3 + 8, &target, Balance::Unbalanced)?;
    env.store(packet.l3 + 24, &packet.source, Balance::Unbalanced)?;
    env.store(
        packet.l4,
        &[
            header[0],
            header[1],
            checksum[0],
            checksum[1],
            flags,
            0,
            0,
            0,
        ],
        Balance::Unbalanced,
    )?;
    if with_option {
        env.store(
            packet.l4 + SOLICITATION as u32,
            &option,
            Balance::Unbalanced,
        )?;
    }
    Ok(())
}
