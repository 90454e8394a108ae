//! Headers read into a [`Packet`].

use core::mem::offset_of;

use network_types::{
    icmp::Icmpv4Hdr,
    ip::{Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use super::{
    ETHERTYPE_IPV4, ETHERTYPE_IPV6, Family, Fragment, Frame, ICMP, ICMPV6, Kind, Packet, TCP, UDP,
    address::is_v4,
};
use crate::abi::{ANY_V4, Reason};

/// IPv6 extension headers that are looked behind.
const HOP_BY_HOP: u8 = 0;
const ROUTING: u8 = 43;
const FRAGMENT: u8 = 44;
const DESTINATION_OPTIONS: u8 = 60;

/// Whether a number is that of an IPv6 extension header (RFC 7045): besides those above
/// authentication, no next header, mobility, host identity, shim6. Behind encapsulating security
/// there is nothing to be seen.
#[inline(always)]
fn is_extension(protocol: u8) -> bool {
    matches!(
        protocol,
        HOP_BY_HOP | ROUTING | FRAGMENT | DESTINATION_OPTIONS | 51 | 59 | 135 | 139 | 140
    )
}

/// IPv6 extension headers that are looked behind, fragment header included, in one packet.
const EXTENSIONS: u32 = 6;

impl Packet {
    /// Reads the headers of the IP packet at `l3` into `packet`.
    ///
    /// # Errors
    /// [`Reason::Malformed`] where a header is cut short or contradicts itself;
    /// [`Reason::NotIp`] for another EtherType.
    #[inline(always)]
    pub fn parse<F: Frame>(
        frame: &F,
        l3: u32,
        ethertype: u16,
        packet: &mut Self,
    ) -> Result<(), Reason> {
        packet.l3 = l3;
        packet.source_port = 0;
        packet.destination_port = 0;
        packet.flags = 0;
        packet.fragment = Fragment::Whole;
        match ethertype {
            ETHERTYPE_IPV4 => packet.parse_v4(frame)?,
            ETHERTYPE_IPV6 => packet.parse_v6(frame)?,
            _ => return Err(Reason::NotIp),
        }
        packet.parse_l4(frame)
    }

    #[inline(always)]
    fn parse_v4<F: Frame>(&mut self, frame: &F) -> Result<(), Reason> {
        let header: [u8; Ipv4Hdr::LEN] = frame.header(self.l3).ok_or(Reason::Malformed)?;
        let header_length = u32::from(header[0] & 0x0f) * 4;
        if header[0] >> 4 != 4 || header_length < Ipv4Hdr::LEN as u32 {
            return Err(Reason::Malformed);
        }
        const TOTAL: usize = offset_of!(Ipv4Hdr, tot_len);
        const FRAGMENT: usize = offset_of!(Ipv4Hdr, frags);
        const SOURCE: usize = offset_of!(Ipv4Hdr, src_addr);
        const DESTINATION: usize = offset_of!(Ipv4Hdr, dst_addr);
        let available = frame.length().saturating_sub(self.l3);
        let mut length = u32::from(u16::from_be_bytes([header[TOTAL], header[TOTAL + 1]]));
        if length == 0 {
            // A segmentation offload larger than the field can say (BIG TCP).
            length = available;
        }
        if length < header_length || length > available {
            return Err(Reason::Malformed);
        }
        const IDENTIFICATION: usize = offset_of!(Ipv4Hdr, id);
        // The offset, and the flag "more fragments"; "do not fragment" is none of ours.
        let fragment = u16::from_be_bytes([header[FRAGMENT], header[FRAGMENT + 1]]) & 0x3fff;
        self.source = ANY_V4;
        self.source[12..].copy_from_slice(&header[SOURCE..SOURCE + 4]);
        self.destination = ANY_V4;
        self.destination[12..].copy_from_slice(&header[DESTINATION..DESTINATION + 4]);
        self.l4 = self.l3 + header_length;
        self.length = length;
        self.family = Family::V4;
        self.kind = Kind::Other;
        if fragment != 0 {
            self.identification =
                u16::from_be_bytes([header[IDENTIFICATION], header[IDENTIFICATION + 1]]).into();
            self.set_fragment(fragment & 0x1fff != 0);
        }
        const CHECK: usize = offset_of!(Ipv4Hdr, check);
        self.protocol = header[offset_of!(Ipv4Hdr, proto)];
        self.ttl = header[offset_of!(Ipv4Hdr, ttl)];
        self.header_checksum = [header[CHECK], header[CHECK + 1]];
        Ok(())
    }

    #[inline(always)]
    fn parse_v6<F: Frame>(&mut self, frame: &F) -> Result<(), Reason> {
        let header: [u8; Ipv6Hdr::LEN] = frame.header(self.l3).ok_or(Reason::Malformed)?;
        if header[0] >> 4 != 6 {
            return Err(Reason::Malformed);
        }
        const PAYLOAD: usize = offset_of!(Ipv6Hdr, payload_len);
        const SOURCE: usize = offset_of!(Ipv6Hdr, src_addr);
        const DESTINATION: usize = offset_of!(Ipv6Hdr, dst_addr);
        let payload = u32::from(u16::from_be_bytes([header[PAYLOAD], header[PAYLOAD + 1]]));
        self.length = Ipv6Hdr::LEN as u32 + payload;
        if self.length > frame.length().saturating_sub(self.l3) {
            return Err(Reason::Malformed);
        }
        self.source.copy_from_slice(&header[SOURCE..SOURCE + 16]);
        self.destination
            .copy_from_slice(&header[DESTINATION..DESTINATION + 16]);
        if is_v4(&self.source) || is_v4(&self.destination) {
            // Mapped addresses never appear on a wire (RFC 4291 section 2.5.5.2); here they
            // would pass for IPv4.
            return Err(Reason::Malformed);
        }
        self.protocol = header[offset_of!(Ipv6Hdr, next_hdr)];
        self.kind = Kind::Other;
        self.l4 = self.l3 + Ipv6Hdr::LEN as u32;
        self.family = Family::V6;
        self.ttl = header[offset_of!(Ipv6Hdr, hop_limit)];
        if is_extension(self.protocol) {
            return self.walk(frame);
        }
        Ok(())
    }

    #[inline(always)]
    fn set_fragment(&mut self, is_later: bool) {
        if is_later {
            self.fragment = Fragment::Later;
            self.kind = Kind::Fragment;
        } else {
            self.fragment = Fragment::First;
        }
    }

    /// Looks behind the extension headers of an IPv6 packet for what it carries.
    #[inline(always)]
    pub(crate) fn walk<F: Frame>(&mut self, frame: &F) -> Result<(), Reason> {
        let end = self.l3 + self.length;
        let mut number = 0;
        while number < EXTENSIONS {
            if !is_extension(self.protocol) {
                return Ok(());
            }
            if self.l4 + 8 > end {
                return Err(Reason::Malformed);
            }
            let start: [u8; 8] = frame.load(self.l4).ok_or(Reason::Malformed)?;
            let mut length = (u32::from(start[1]) + 1) * 8;
            match self.protocol {
                HOP_BY_HOP if number == 0 => {}
                DESTINATION_OPTIONS => {}
                // Type 0 was a danger (RFC 5095); with segments left, the destination is not
                // where the packet ends.
                ROUTING if start[2] != 0 && start[3] == 0 => {}
                FRAGMENT if self.fragment == Fragment::Whole => {
                    let offset = u16::from_be_bytes([start[2], start[3]]);
                    self.identification =
                        u32::from_be_bytes([start[4], start[5], start[6], start[7]]);
                    // Of a packet that is a fragment of its own, nothing is elsewhere (RFC 6946).
                    if offset & !6 != 0 {
                        self.set_fragment(offset & 0xfff8 != 0);
                    }
                    length = 8;
                }
                _ => {
                    self.kind = Kind::Extended;
                    return Ok(());
                }
            }
            self.protocol = start[0];
            self.l4 += length;
            if self.l4 > end {
                return Err(Reason::Malformed);
            }
            if self.kind == Kind::Fragment {
                return Ok(());
            }
            number += 1;
        }
        if is_extension(self.protocol) {
            self.kind = Kind::Extended;
        }
        Ok(())
    }

    #[inline(always)]
    fn parse_l4<F: Frame>(&mut self, frame: &F) -> Result<(), Reason> {
        if self.kind != Kind::Other {
            return Ok(());
        }
        let least = match (self.protocol, self.family) {
            (TCP, _) => TcpHdr::LEN,
            (UDP, _) => UdpHdr::LEN,
            (ICMP, Family::V4) | (ICMPV6, Family::V6) => Icmpv4Hdr::LEN,
            _ => return Ok(()),
        } as u32;
        if self.l4 + least > self.l3 + self.length {
            return Err(Reason::Malformed);
        }
        if self.protocol == TCP {
            // Up to and with the flags.
            let start: [u8; 14] = frame.header(self.l4).ok_or(Reason::Malformed)?;
            self.source_port = u16::from_be_bytes([start[0], start[1]]);
            self.destination_port = u16::from_be_bytes([start[2], start[3]]);
            let header_length = u32::from(start[12] >> 4) * 4;
            if header_length < least || self.l4 + header_length > self.l3 + self.length {
                return Err(Reason::Malformed);
            }
            self.flags = start[13];
            self.kind = Kind::Tcp;
            return Ok(());
        }
        let start: [u8; 8] = frame.header(self.l4).ok_or(Reason::Malformed)?;
        match self.protocol {
            UDP => {
                self.source_port = u16::from_be_bytes([start[0], start[1]]);
                self.destination_port = u16::from_be_bytes([start[2], start[3]]);
                self.kind = Kind::Udp;
            }
            _ => {
                self.flags = start[0];
                self.kind = match (self.family, start[0]) {
                    (Family::V4, 8) | (Family::V6, 128) => Kind::EchoRequest,
                    (Family::V4, 0) | (Family::V6, 129) => Kind::EchoReply,
                    // Destination unreachable, time exceeded, parameter problem, packet too
                    // big; a source quench is not (RFC 5508 REQ-10c).
                    (Family::V4, 3 | 11 | 12) | (Family::V6, 1..=4)
                        if self.fragment == Fragment::Whole =>
                    {
                        Kind::Error
                    }
                    _ => Kind::Icmp,
                };
                if self.is_echo() {
                    self.source_port = u16::from_be_bytes([start[4], start[5]]);
                    self.destination_port = self.source_port;
                }
            }
        }
        Ok(())
    }
}
