//! The reset that answers a TCP segment which a policy denies: as if nobody listened at its
//! destination (RFC 9293 section 3.10.7.1).

use core::mem::offset_of;

use network_types::tcp::TcpHdr;

use crate::{
    abi::Reason,
    answer::{Header, header_length, with_checksum},
    packet::{Balance, Delta, Frame, Packet, TCP, ports, tcp_flag},
};

const LENGTH: u32 = TcpHdr::LEN as u32;

/// Puts the reset that answers a segment in its place.
#[inline(never)]
pub(crate) fn build<F: Frame>(frame: &F, segment: &Packet) -> Result<(), Reason> {
    let [sequence, acknowledgement, flags] = answer(frame, segment)?;
    let ip = header_length(segment.family);
    frame.wrap(segment.l3, LENGTH, ip)?;

    let (from, to) = (&segment.destination, &segment.source);
    let header = Header {
        from,
        to,
        protocol: TCP,
        service: 0,
    };
    header.store(frame, segment.family, segment.l3, LENGTH)?;
    let words = [
        ports(segment.destination_port, segment.source_port),
        sequence,
        acknowledgement,
        flags,
        [0; 4],
    ];
    let pseudo_header = Delta::NONE.pseudo_header(from, to, LENGTH, TCP);
    let reset = with_checksum(words, offset_of!(TcpHdr, check), pseudo_header);
    frame.store(segment.l3 + ip, &reset, Balance::Unbalanced)
}

/// Sequence number, acknowledgement number, and the word with the flags.
#[inline(always)]
fn answer<F: Frame>(frame: &F, segment: &Packet) -> Result<[[u8; 4]; 3], Reason> {
    const SEQUENCE: u32 = offset_of!(TcpHdr, seq) as u32;
    // Up to and with the byte that has the length of the header.
    let start: [u8; 12] = frame.load(segment.l4 + SEQUENCE).ok_or(Reason::Malformed)?;
    let acknowledged = [start[4], start[5], start[6], start[7]];
    const WORDS: u8 = (LENGTH as u8 / 4) << 4;
    if segment.flags & tcp_flag::ACK != 0 {
        return Ok([acknowledged, [0; 4], [WORDS, tcp_flag::RST, 0, 0]]);
    }
    let header = u32::from(start[8] >> 4) * 4;
    let mut end = u32::from_be_bytes([start[0], start[1], start[2], start[3]])
        .wrapping_add(segment.l3 + segment.length - segment.l4 - header);
    if segment.flags & tcp_flag::SYN != 0 {
        end = end.wrapping_add(1);
    }
    if segment.flags & tcp_flag::FIN != 0 {
        end = end.wrapping_add(1);
    }
    let flags = [WORDS, tcp_flag::RST | tcp_flag::ACK, 0, 0];
    Ok([[0; 4], end.to_be_bytes(), flags])
}
