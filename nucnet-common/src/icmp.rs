//! Errors that nucnet sends itself, about packets that it drops (RFC 792, RFC 1812 section 4.3,
//! RFC 4443): a router that is silent breaks traceroute and path MTU discovery.
//!
//! The packet that is dropped becomes the quote in the error about it, so nothing is copied and
//! the sender sees what it sent.

use core::mem::offset_of;

use network_types::{
    icmp::Icmpv4Hdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
};

use crate::{
    abi::{Address, Reason},
    env::{Env, Scratch},
    guard,
    packet::{Balance, Delta, ETHERNET, Family, Frame, ICMP, ICMPV6, Packet, quarter, same},
    path::Drop,
};

/// Most bytes of an ICMP error (RFC 1812 section 4.3.2.3).
const LONGEST_V4: u32 = 576;
/// Most bytes of an ICMPv6 error (RFC 4443 section 2.4c).
const LONGEST_V6: u32 = 1280;
/// Time to live of an error.
const TTL: u8 = 64;
/// Type of service of an ICMP error: internetwork control (RFC 1812 section 4.3.2.5).
const CONTROL: u8 = 0xc0;

/// Nanoseconds between errors of one account in the long run.
const INTERVAL: u64 = 10_000_000;
/// How many errors may come at once.
const BURST: u64 = 50;

/// Where a packet was seen that is dropped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It came from an endpoint.
    Endpoint,
    /// It came in by an uplink.
    Uplink,
    /// The host sent it.
    Host,
}

/// Who pays for an error: nobody's flood silences the errors for others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Account {
    /// The number of the endpoint on whose account the packet is dropped.
    pub endpoint: u32,
    /// [`Origin`].
    pub origin: u32,
}

/// Turns a packet that is dropped into an error for its sender; gives the interface that it goes
/// out of, or for the host's own, comes in by. `None`: the sender is told nothing. `link` is the
/// interface that the packet was seen at.
#[inline(never)]
pub fn answer<E: Env>(env: &E, origin: Origin, link: u32, drop: &Drop) -> Option<u32> {
    // Most drops have no answer, and many come before there are notes.
    if !has_answer(origin, drop.reason) {
        return None;
    }
    let mut scratch = env.scratch()?;
    let scratch = &mut *scratch;
    let account = Account {
        endpoint: drop.endpoint,
        origin: origin as u32,
    };
    // Never about another error (RFC 1122 section 3.2.2, RFC 4443 section 2.4e). What is not
    // unicast has been refused before, without an answer.
    if !scratch.packet.is_trackable() || !may_answer(env, &account) {
        return None;
    }
    turn(env, origin, link, drop.reason, scratch).ok()?;
    Some(link)
}

#[inline(always)]
fn has_answer(origin: Origin, reason: Reason) -> bool {
    match reason {
        Reason::TtlExceeded | Reason::TooBig => true,
        // RFC 5508 REQ-8. From outside nobody is owed an explanation.
        Reason::PortsExhausted | Reason::FlowQuota | Reason::FlowTableFull => {
            origin == Origin::Endpoint
        }
        _ => false,
    }
}

/// Type, code and the four bytes after the checksum of the error.
#[inline(always)]
fn start(family: Family, reason: Reason, mtu: u32) -> [u8; 8] {
    let [a, b, c, d] = mtu.to_be_bytes();
    match (family, reason) {
        (Family::V4, Reason::TooBig) => [3, 4, 0, 0, 0, 0, c, d],
        (Family::V6, Reason::TooBig) => [2, 0, 0, 0, a, b, c, d],
        (Family::V4, Reason::TtlExceeded) => [11, 0, 0, 0, 0, 0, 0, 0],
        (Family::V6, Reason::TtlExceeded) => [3, 0, 0, 0, 0, 0, 0, 0],
        // Communication administratively prohibited. Host unreachable (RFC 6888 REQ-11) would
        // have the sender believe that the far end is gone.
        (Family::V4, _) => [3, 13, 0, 0, 0, 0, 0, 0],
        (Family::V6, _) => [1, 1, 0, 0, 0, 0, 0, 0],
    }
}

/// Takes one error from an account (RFC 1812 section 4.3.2.8, RFC 4443 section 2.4f): a token
/// bucket, kept as the time at which it will be full again.
#[inline(always)]
fn may_answer<E: Env>(env: &E, account: &Account) -> bool {
    let now = env.now();
    let Some(mut full) = env.budget(account) else {
        env.insert_budget(account, now + INTERVAL);
        return true;
    };
    let start = if *full > now { *full } else { now };
    if start - now > (BURST - 1) * INTERVAL {
        return false;
    }
    *full = start + INTERVAL;
    true
}

#[inline(always)]
fn turn<E: Env>(
    env: &E,
    origin: Origin,
    link: u32,
    reason: Reason,
    scratch: &mut Scratch,
) -> Result<(), Reason> {
    let Scratch {
        packet,
        rewrite,
        mtu,
        ..
    } = scratch;
    rewrite.source = packet.destination;
    rewrite.destination = packet.source;
    if origin == Origin::Endpoint {
        let endpoint = env.endpoint(link).ok_or(Reason::NoEndpoint)?;
        rewrite.source = *guard::gateway(endpoint, packet.family);
        if same(&rewrite.source, &[0; 16]) {
            return Err(Reason::NoRoute);
        }
    }
    if packet.l3 == ETHERNET {
        turn_round(env)?;
    }
    build(
        env,
        packet,
        &rewrite.source,
        &rewrite.destination,
        start(packet.family, reason, *mtu),
    )
}

/// Exchanges the link-layer addresses of a frame.
#[inline(always)]
fn turn_round<F: Frame>(frame: &F) -> Result<(), Reason> {
    let macs: [u8; 12] = frame.load(0).ok_or(Reason::Malformed)?;
    let turned = [
        macs[6], macs[7], macs[8], macs[9], macs[10], macs[11], macs[0], macs[1], macs[2], macs[3],
        macs[4], macs[5],
    ];
    frame.store(0, &turned, Balance::Balanced)
}

/// Puts the headers of an error before a packet.
#[inline(always)]
fn build<E: Env>(
    env: &E,
    packet: &Packet,
    from: &Address,
    to: &Address,
    start: [u8; 8],
) -> Result<(), Reason> {
    const HEADER: u32 = Icmpv4Hdr::LEN as u32;
    let (ip, longest) = match packet.family {
        Family::V4 => (Ipv4Hdr::LEN as u32, LONGEST_V4),
        Family::V6 => (Ipv6Hdr::LEN as u32, LONGEST_V6),
    };
    let room = ip + HEADER;
    let mut kept = longest - room;
    if packet.length < kept {
        kept = packet.length;
    }
    let l3 = packet.l3;
    env.wrap(l3, kept, room)?;

    let carried = HEADER + kept;
    let mut total = Delta::NONE;
    match packet.family {
        Family::V4 => store_v4(env, l3, from, to, (ip + carried) as u16)?,
        Family::V6 => {
            store_v6(env, l3, from, to, carried as u16)?;
            total = total.pseudo_header(from, to, carried, ICMPV6);
        }
    }
    let l4 = l3 + ip;
    env.store(l4, &start, Balance::Unbalanced)?;
    total = total.and(env.sum(l4, carried).ok_or(Reason::Malformed)?);
    const CHECK: u32 = offset_of!(Icmpv4Hdr, check) as u32;
    let checksum = (!total.folded16()).to_ne_bytes();
    env.store(l4 + CHECK, &checksum, Balance::Unbalanced)
}

#[inline(always)]
fn store_v4<F: Frame>(
    frame: &F,
    l3: u32,
    from: &Address,
    to: &Address,
    length: u16,
) -> Result<(), Reason> {
    let (from, to) = (quarter(from, 12), quarter(to, 12));
    let [high, low] = length.to_be_bytes();
    // Do not fragment, so that it needs no identification (RFC 6864).
    let words = [
        [0x45, CONTROL, high, low],
        [0, 0, 0x40, 0],
        [TTL, ICMP, 0, 0],
        from,
        to,
    ];
    let mut total = Delta::NONE;
    let mut header = [0; Ipv4Hdr::LEN];
    let mut word = 0;
    while word < words.len() {
        total = total.plus(words[word]);
        header[4 * word..4 * word + 4].copy_from_slice(&words[word]);
        word += 1;
    }
    const CHECK: usize = offset_of!(Ipv4Hdr, check);
    header[CHECK..CHECK + 2].copy_from_slice(&(!total.folded16()).to_ne_bytes());
    frame.store(l3, &header, Balance::Unbalanced)
}

#[inline(always)]
fn store_v6<F: Frame>(
    frame: &F,
    l3: u32,
    from: &Address,
    to: &Address,
    payload: u16,
) -> Result<(), Reason> {
    const SOURCE: u32 = offset_of!(Ipv6Hdr, src_addr) as u32;
    let [high, low] = payload.to_be_bytes();
    let start = [0x60, 0, 0, 0, high, low, ICMPV6, TTL];
    frame.store(l3, &start, Balance::Unbalanced)?;
    frame.store(l3 + SOURCE, from, Balance::Unbalanced)?;
    frame.store(l3 + SOURCE + 16, to, Balance::Unbalanced)
}
