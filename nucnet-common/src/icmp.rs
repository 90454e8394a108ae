//! The ICMP error about a packet that is dropped, whose quote the packet becomes: nothing is
//! copied, and the sender sees what it sent.

use core::mem::offset_of;

use network_types::icmp::Icmpv4Hdr;

use crate::{
    abi::{Address, Reason},
    answer::{Header, header_length},
    env::Env,
    packet::{Balance, Delta, Family, ICMP, ICMPV6, Packet},
};

/// Most bytes of an ICMP error (RFC 1812 section 4.3.2.3).
const LONGEST_V4: u32 = 576;
/// Most bytes of an ICMPv6 error (RFC 4443 section 2.4c).
const LONGEST_V6: u32 = 1280;
/// Type of service of an ICMP error: internetwork control (RFC 1812 section 4.3.2.5).
const CONTROL: u8 = 0xc0;

/// Type, code and the four bytes after the checksum of the error.
#[inline(always)]
pub(crate) fn start(family: Family, reason: Reason, mtu: u32) -> [u8; 8] {
    let [a, b, c, d] = mtu.to_be_bytes();
    match (family, reason) {
        (Family::V4, Reason::TooBig) => [3, 4, 0, 0, 0, 0, c, d],
        (Family::V6, Reason::TooBig) => [2, 0, 0, 0, a, b, c, d],
        (Family::V4, Reason::TtlExceeded) => [11, 0, 0, 0, 0, 0, 0, 0],
        (Family::V6, Reason::TtlExceeded) => [3, 0, 0, 0, 0, 0, 0, 0],
        // Communication administratively prohibited (RFC 1812 section 5.2.7.1, RFC 4443 section
        // 3.1). Host unreachable (RFC 6888 REQ-11) would have the sender believe that the far
        // end is gone.
        (Family::V4, _) => [3, 13, 0, 0, 0, 0, 0, 0],
        (Family::V6, _) => [1, 1, 0, 0, 0, 0, 0, 0],
    }
}

/// Puts the headers of an error before a packet.
#[inline(always)]
pub(crate) fn build<E: Env>(
    env: &E,
    packet: &Packet,
    from: &Address,
    to: &Address,
    start: [u8; 8],
) -> Result<(), Reason> {
    const HEADER: u32 = Icmpv4Hdr::LEN as u32;
    let (protocol, longest) = match packet.family {
        Family::V4 => (ICMP, LONGEST_V4),
        Family::V6 => (ICMPV6, LONGEST_V6),
    };
    let ip = header_length(packet.family);
    let room = ip + HEADER;
    let mut kept = longest - room;
    if packet.length < kept {
        kept = packet.length;
    }
    let l3 = packet.l3;
    env.wrap(l3, kept, room)?;

    let carried = HEADER + kept;
    let header = Header {
        from,
        to,
        protocol,
        service: CONTROL,
    };
    header.store(env, packet.family, l3, carried)?;
    let mut total = match packet.family {
        Family::V4 => Delta::NONE,
        Family::V6 => Delta::NONE.pseudo_header(from, to, carried, ICMPV6),
    };
    let l4 = l3 + ip;
    env.store(l4, &start, Balance::Unbalanced)?;
    total = total.and(env.sum(l4, carried).ok_or(Reason::Malformed)?);
    const CHECK: u32 = offset_of!(Icmpv4Hdr, check) as u32;
    let checksum = (!total.folded16()).to_ne_bytes();
    env.store(l4 + CHECK, &checksum, Balance::Unbalanced)
}
