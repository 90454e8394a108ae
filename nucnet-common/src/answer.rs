//! What nucnet tells the sender of a packet that it drops: a router that is silent breaks
//! traceroute and path MTU discovery (RFC 1812 section 4.3, RFC 4443), and a policy that is
//! silent has clients wait until they give up, which is for the policy to choose.
//!
//! The answer takes the place of the packet. What a policy denies is answered to the endpoint that
//! it is about: a TCP segment by a reset, anything else by an ICMP error.

use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use crate::{
    abi::{Address, NO_ADDRESS, Reason},
    env::{Env, Scratch},
    guard, icmp,
    packet::{Balance, Delta, ETHERNET, Family, Frame, Kind, quarter, same, tcp_flag},
    path::Drop,
    reset,
};

/// Time to live of an answer.
const TTL: u8 = 64;

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

/// Set in [`Account::origin`] of what a policy denies: who is denied all the time still hears
/// about path MTUs.
const DENIED: u32 = 1 << 31;

/// Who pays for an error: nobody's flood silences the errors for others.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Account {
    /// The number of the endpoint on whose account the packet is dropped.
    pub endpoint: u32,
    /// [`Origin`], and perhaps [`DENIED`].
    pub origin: u32,
}

/// Turns a packet that is dropped into an answer for its sender; gives the interface that it goes
/// out of, or for the host's own, comes in by. `None`: the sender is told nothing. `link` is the
/// interface that the packet was seen at.
#[inline(never)]
pub fn answer<E: Env>(env: &E, origin: Origin, link: u32, drop: &Drop) -> Option<u32> {
    // Most drops have no answer, and many come before there are notes.
    let may_be_denied = may_be_denied(origin, drop.reason);
    if !may_be_denied && !is_told(origin, drop.reason) {
        return None;
    }
    let mut scratch = env.scratch()?;
    let scratch = &mut *scratch;
    // Never about another error (RFC 1122 section 3.2.2, RFC 4443 section 2.4e). What is not
    // unicast has been refused before, without an answer.
    if !scratch.packet.is_trackable() {
        return None;
    }
    let mut account = Account {
        endpoint: drop.endpoint,
        origin: origin as u32,
    };
    if may_be_denied {
        if !is_rejected(origin, drop, scratch) {
            return None;
        }
        // No limit: it is no longer than the segment, and goes to nobody but the endpoint that
        // has sent it. A limit would have some clients wait all the same.
        if scratch.packet.kind == Kind::Tcp {
            turn_round(env).ok()?;
            reset::build(env, &scratch.packet).ok()?;
            return Some(link);
        }
        account.origin |= DENIED;
    }
    if !may_answer(env, &account) {
        return None;
    }
    turn(env, origin, link, drop.reason, scratch).ok()?;
    Some(link)
}

/// Whether a policy has the sender of a dropped packet told that it is denied.
#[inline(always)]
pub fn is_rejected(origin: Origin, drop: &Drop, scratch: &Scratch) -> bool {
    let packet = &scratch.packet;
    may_be_denied(origin, drop.reason)
        && scratch.rejects
        // The policy may be the one of the endpoint that the packet is for.
        && scratch.key.endpoint == drop.endpoint
        && packet.is_trackable()
        // RFC 9293 section 3.10.7.1.
        && !(packet.kind == Kind::Tcp && packet.flags & tcp_flag::RST != 0)
}

/// Whether a policy may be why a packet is dropped, and its sender the endpoint that it is about.
#[inline(always)]
fn may_be_denied(origin: Origin, reason: Reason) -> bool {
    origin == Origin::Endpoint && matches!(reason, Reason::Policy | Reason::NoFlow)
}

/// Whether senders are told about drops for a reason, whatever the policy.
#[inline(always)]
fn is_told(origin: Origin, reason: Reason) -> bool {
    match reason {
        Reason::TtlExceeded | Reason::TooBig => true,
        // RFC 5508 REQ-8. From outside nobody is owed an explanation.
        Reason::PortsExhausted | Reason::FlowQuota | Reason::FlowTableFull => {
            origin == Origin::Endpoint
        }
        _ => false,
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

/// Makes an ICMP error of a packet: an endpoint gets it from its gateway, everybody else from
/// whom the packet was sent to.
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
        if same(&rewrite.source, &NO_ADDRESS) {
            return Err(Reason::NoRoute);
        }
    }
    if packet.l3 == ETHERNET {
        turn_round(env)?;
    }
    icmp::build(
        env,
        packet,
        &rewrite.source,
        &rewrite.destination,
        icmp::start(packet.family, reason, *mtu),
    )
}

/// Exchanges the link-layer addresses of a frame.
///
/// # Errors
/// It was for more than one station: no packet in such a frame is answered (RFC 1122 section
/// 3.2.2, RFC 4443 section 2.4e, RFC 9293 section 3.9.2.2).
#[inline(always)]
fn turn_round<F: Frame>(frame: &F) -> Result<(), Reason> {
    let macs: [u8; 12] = frame.load(0).ok_or(Reason::Malformed)?;
    if macs[0] & 1 != 0 {
        return Err(Reason::Multicast);
    }
    let turned = [
        macs[6], macs[7], macs[8], macs[9], macs[10], macs[11], macs[0], macs[1], macs[2], macs[3],
        macs[4], macs[5],
    ];
    frame.store(0, &turned, Balance::Balanced)
}

/// The IP header of an answer.
pub(crate) struct Header<'a> {
    /// Source address.
    pub(crate) from: &'a Address,
    /// Destination address.
    pub(crate) to: &'a Address,
    /// IP protocol number.
    pub(crate) protocol: u8,
    /// IPv4: type of service.
    pub(crate) service: u8,
}

/// Length of such a header in bytes.
#[inline(always)]
pub(crate) fn header_length(family: Family) -> u32 {
    match family {
        Family::V4 => Ipv4Hdr::LEN as u32,
        Family::V6 => Ipv6Hdr::LEN as u32,
    }
}

impl Header<'_> {
    /// Writes it before `carried` bytes of what it carries.
    #[inline(always)]
    pub(crate) fn store<F: Frame>(
        &self,
        frame: &F,
        family: Family,
        l3: u32,
        carried: u32,
    ) -> Result<(), Reason> {
        match family {
            Family::V4 => self.store_v4(frame, l3, carried),
            Family::V6 => self.store_v6(frame, l3, carried),
        }
    }

    #[inline(always)]
    fn store_v4<F: Frame>(&self, frame: &F, l3: u32, carried: u32) -> Result<(), Reason> {
        let [high, low] = (Ipv4Hdr::LEN as u16 + carried as u16).to_be_bytes();
        // Do not fragment, so that it needs no identification (RFC 6864).
        let words = [
            [0x45, self.service, high, low],
            [0, 0, 0x40, 0],
            [TTL, self.protocol, 0, 0],
            quarter(self.from, 12),
            quarter(self.to, 12),
        ];
        let header = with_checksum(words, offset_of!(Ipv4Hdr, check), Delta::NONE);
        frame.store(l3, &header, Balance::Unbalanced)
    }

    #[inline(always)]
    fn store_v6<F: Frame>(&self, frame: &F, l3: u32, carried: u32) -> Result<(), Reason> {
        const SOURCE: u32 = offset_of!(Ipv6Hdr, src_addr) as u32;
        let [high, low] = (carried as u16).to_be_bytes();
        let start = [0x60, 0, 0, 0, high, low, self.protocol, TTL];
        frame.store(l3, &start, Balance::Unbalanced)?;
        frame.store(l3 + SOURCE, self.from, Balance::Unbalanced)?;
        frame.store(l3 + SOURCE + 16, self.to, Balance::Unbalanced)
    }
}

/// A header of five words, with its checksum in the two zero bytes at `check`. `besides`: what
/// that covers too.
#[inline(always)]
pub(crate) fn with_checksum(words: [[u8; 4]; 5], check: usize, besides: Delta) -> [u8; 20] {
    let mut total = besides;
    let mut header = [0; 20];
    let mut word = 0;
    while word < words.len() {
        total = total.plus(words[word]);
        header[4 * word..4 * word + 4].copy_from_slice(&words[word]);
        word += 1;
    }
    header[check..check + 2].copy_from_slice(&(!total.folded16()).to_ne_bytes());
    header
}
