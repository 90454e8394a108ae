//! Headers: read once into a [`Packet`], judged, then rewritten in place.
//!
//! A [`Frame`] is a packet buffer: a socket buffer in the kernel, a byte slice in tests.
//! Nothing is written before everything is decided, so a dropped frame is never half changed.

use core::mem::offset_of;

use network_types::{
    eth::EthHdr,
    icmp::Icmpv4Hdr,
    ip::{IpProto, Ipv4Hdr, Ipv6Hdr},
    tcp::TcpHdr,
    udp::UdpHdr,
};

use crate::abi::{ANY_V4, ANY_V6, Address, Flow, FlowKey, OutsideKey, Reason, V4_MAPPED};

/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// IP protocol number of ICMP.
pub const ICMP: u8 = IpProto::Icmp as u8;
/// IP protocol number of TCP.
pub const TCP: u8 = IpProto::Tcp as u8;
/// IP protocol number of UDP.
pub const UDP: u8 = IpProto::Udp as u8;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = IpProto::Ipv6Icmp as u8;

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

/// TCP flag bits, as in the 14th byte of the header (RFC 9293 section 3.1).
pub mod tcp_flag {
    /// No more data from the sender.
    pub const FIN: u8 = 0x01;
    /// Synchronise sequence numbers.
    pub const SYN: u8 = 0x02;
    /// Reset the connection.
    pub const RST: u8 = 0x04;
    /// The acknowledgement number counts.
    pub const ACK: u8 = 0x10;
}

/// Which part of a packet changed, for its layer 4 checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// The addresses, which the checksum covers by way of the pseudo header only.
    pub pseudo_header: bool,
    /// UDP: zero means "no checksum" (RFC 768, for tunnels over IPv6 RFC 6935) and stays zero; a
    /// checksum that comes to zero is written as ones.
    pub may_be_absent: bool,
}

/// Whether a checksum inside the packet is changed along with the bytes written, so that the sum
/// over the whole packet, which a network card may have supplied (`CHECKSUM_COMPLETE`), stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// By the IPv4 header checksum, or by the layer 4 checksum for its own bytes.
    Balanced,
    /// Not at all, or not in the kernel's books: IPv6 addresses and hop limit.
    Unbalanced,
}

/// A packet buffer. Offsets are in bytes from its start. The kernel's is a handle to memory that
/// others may hold too, so writing takes no unique reference.
pub trait Frame {
    /// Length of the frame in bytes.
    fn length(&self) -> u32;

    /// Whether the frame came with a VLAN tag. The kernel keeps it beside the frame, whose bytes
    /// are those of an untagged one.
    fn is_tagged(&self) -> bool;

    /// Copies `N` bytes out, or nothing if the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// Writes `N` bytes. They have been loaded before, so only the kernel itself can refuse.
    fn store<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        balance: Balance,
    ) -> Result<(), Reason>;

    /// Keeps `kept` bytes from `l3` on and puts `room` bytes before them, of unspecified contents,
    /// after the link-layer header. What is left is a packet of its own: nobody is to segment
    /// it, or to fill in a checksum of what it was.
    fn wrap(&self, l3: u32, kept: u32, room: u32) -> Result<(), Reason>;

    /// Adds a [`Delta`] to the IPv4 header checksum at `offset`.
    fn fix_header_checksum(&self, offset: u32, delta: Delta) -> Result<(), Reason>;

    /// Adds a [`Delta`] to the layer 4 checksum at `offset`.
    fn fix_checksum(&self, offset: u32, delta: Delta, covered: Covered) -> Result<(), Reason>;
}

/// The change of an Internet checksum (RFC 1624): a one's complement sum over native-endian
/// words, which is what the kernel's checksum helpers take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(pub u64);

impl Delta {
    /// No change.
    pub const NONE: Self = Self(0);

    /// A 32-bit word at an even offset changed.
    #[inline(always)]
    pub fn word(self, old: [u8; 4], new: [u8; 4]) -> Self {
        Self(self.0 + u64::from(!u32::from_ne_bytes(old)) + u64::from(u32::from_ne_bytes(new)))
    }

    /// An address changed: for IPv4 its last four bytes.
    #[inline(always)]
    pub fn address(mut self, family: Family, old: &Address, new: &Address) -> Self {
        if family == Family::V6 {
            self = self.word(quarter(old, 0), quarter(new, 0));
            self = self.word(quarter(old, 4), quarter(new, 4));
            self = self.word(quarter(old, 8), quarter(new, 8));
        }
        self.word(quarter(old, 12), quarter(new, 12))
    }

    /// Adds a word that was not there before.
    #[inline(always)]
    pub fn plus(self, word: [u8; 4]) -> Self {
        Self(self.0 + u64::from(u32::from_ne_bytes(word)))
    }

    /// Adds an address that was not there before.
    #[inline(always)]
    pub fn plus_address(self, address: &Address) -> Self {
        self.plus(quarter(address, 0))
            .plus(quarter(address, 4))
            .plus(quarter(address, 8))
            .plus(quarter(address, 12))
    }

    /// Adds the pseudo header of what a packet carries (RFC 8200 section 8.1; of IPv4, RFC 9293
    /// section 3.1: what a mapped address has before the IPv4 one is zero to such a sum).
    #[inline(always)]
    pub fn pseudo_header(
        self,
        source: &Address,
        destination: &Address,
        length: u32,
        protocol: u8,
    ) -> Self {
        self.plus_address(source)
            .plus_address(destination)
            .plus(length.to_be_bytes())
            .plus([0, 0, 0, protocol])
    }

    /// Both changes together.
    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// A checksum after the change (RFC 1624, equation 3).
    #[inline(always)]
    pub fn applied(self, checksum: [u8; 2]) -> [u8; 2] {
        let old = [checksum[0], checksum[1], 0, 0];
        let sum = Self(self.0 + u64::from(!u32::from_ne_bytes(old)));
        (!sum.folded16()).to_ne_bytes()
    }

    /// Folded to 32 bits.
    #[inline(always)]
    pub fn folded(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// Folded to 16 bits.
    #[inline(always)]
    pub fn folded16(self) -> u16 {
        let sum = self.folded();
        let sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }
}

/// Bytes of a frame that are summed up at a time.
const CHUNK: u32 = 32;
/// How many such chunks are summed up.
const CHUNKS: u32 = 40;
/// How many bytes [`sum`] sums up at most: an ICMPv6 error has no more than 1,280 (RFC 4443
/// section 2.4c), an ICMP error should have no more than 576 (RFC 1812 section 4.3.2.3).
pub(crate) const SUMMED: u32 = CHUNK * CHUNKS + CHUNK - 1;

/// Sums up `length` bytes of a frame, at most [`SUMMED`]. `None`: it ends before.
#[inline(always)]
pub fn sum<F: Frame>(frame: &F, at: u32, length: u32) -> Option<Delta> {
    let mut sum = Delta::NONE;
    let (mut at, mut left) = (at, length);
    let mut chunk = 0;
    while chunk < CHUNKS {
        chunk += 1;
        if left < CHUNK {
            break;
        }
        let bytes: [u8; CHUNK as usize] = frame.load(at)?;
        let mut word = 0;
        while word < CHUNK as usize {
            sum = sum.plus([
                bytes[word],
                bytes[word + 1],
                bytes[word + 2],
                bytes[word + 3],
            ]);
            word += 4;
        }
        at += CHUNK;
        left -= CHUNK;
    }
    let mut byte = 0;
    while byte < CHUNK {
        if byte < left {
            let [value] = frame.load(at + byte)?;
            sum = sum.plus(if byte & 1 == 0 {
                [value, 0, 0, 0]
            } else {
                [0, value, 0, 0]
            });
        }
        byte += 1;
    }
    Some(sum)
}

/// Eight bytes of an address, as a number.
#[inline(always)]
pub(crate) fn half(address: &Address, at: usize) -> u64 {
    let byte = |offset: usize| u64::from(address[at + offset]);
    byte(0) << 56
        | byte(1) << 48
        | byte(2) << 40
        | byte(3) << 32
        | byte(4) << 24
        | byte(5) << 16
        | byte(6) << 8
        | byte(7)
}

#[inline(always)]
pub(crate) fn quarter(address: &Address, at: usize) -> [u8; 4] {
    [
        address[at],
        address[at + 1],
        address[at + 2],
        address[at + 3],
    ]
}

/// Whether two addresses are equal, compared by words: the kernel's target has no `memcmp`.
#[inline(always)]
pub fn same(one: &Address, other: &Address) -> bool {
    quarter(one, 12) == quarter(other, 12)
        && quarter(one, 8) == quarter(other, 8)
        && quarter(one, 4) == quarter(other, 4)
        && quarter(one, 0) == quarter(other, 0)
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[inline(always)]
    pub fn of(address: &Address) -> Self {
        if is_v4(address) { Self::V4 } else { Self::V6 }
    }

    /// "Any address" of the family.
    #[inline(always)]
    pub fn any(self) -> Address {
        match self {
            Self::V4 => ANY_V4,
            Self::V6 => ANY_V6,
        }
    }
}

/// Whether an address is a mapped IPv4 address.
#[inline(always)]
pub fn is_v4(address: &Address) -> bool {
    quarter(address, 0) == [0; 4]
        && quarter(address, 4) == [0; 4]
        && quarter(address, 8) == [0, 0, 0xff, 0xff]
}

/// An IPv4 address in the form that the maps hold.
#[inline(always)]
pub fn mapped(v4: [u8; 4]) -> Address {
    let mut address = [0; 16];
    address[..12].copy_from_slice(&V4_MAPPED);
    address[12..].copy_from_slice(&v4);
    address
}

/// What a packet is, as far as translation is concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP or ICMPv6 echo request.
    EchoRequest,
    /// ICMP or ICMPv6 echo reply.
    EchoReply,
    /// An ICMP or ICMPv6 error that is translated: it quotes a packet (RFC 5508 section 4).
    Error,
    /// Any other ICMP or ICMPv6 message.
    Icmp,
    /// A fragment other than the first: its ports are elsewhere.
    Fragment,
    /// IPv6 with extension headers that hide what it carries.
    Extended,
    /// Any other protocol.
    Other,
}

/// Whether a packet is whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// It is.
    Whole,
    /// It is a first fragment, which begins with the header of what it carries.
    First,
    /// It is a fragment of what follows that.
    Later,
}

/// IPv6 extension headers that are looked behind, fragment header included, in one packet.
const EXTENSIONS: u32 = 6;

/// The headers of an IP packet, as far as decisions need them.
///
/// The order of the fields keeps addresses aligned: the kernel's target reads them by words.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: Address,
    /// Destination address.
    pub destination: Address,
    /// Source port; of an echo message, its identifier.
    pub source_port: u16,
    /// Destination port; of an echo message, its identifier.
    pub destination_port: u16,
    /// Offset of the IP header.
    pub l3: u32,
    /// Offset of what IP carries.
    pub l4: u32,
    /// Length of the IP packet in bytes.
    pub length: u32,
    /// Identification, if it is a fragment.
    pub identification: u32,
    /// IP version.
    pub family: Family,
    /// What it is.
    pub kind: Kind,
    /// Whether it is whole.
    pub fragment: Fragment,
    /// IP protocol number.
    pub protocol: u8,
    /// Time to live or hop limit.
    pub ttl: u8,
    /// TCP flags; of ICMP and ICMPv6, the type.
    pub flags: u8,
    /// Checksum of the IPv4 header.
    pub header_checksum: [u8; 2],
}

impl Packet {
    /// Reads the headers of the IP packet at `l3` into `packet`.
    ///
    /// # Errors
    /// [`Reason::Malformed`] where a header is cut short or contradicts itself;
    /// [`Reason::NotIp`] for another EtherType.
    #[inline(never)]
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
        let header: [u8; Ipv4Hdr::LEN] = frame.load(self.l3).ok_or(Reason::Malformed)?;
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
        let header: [u8; Ipv6Hdr::LEN] = frame.load(self.l3).ok_or(Reason::Malformed)?;
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
            let start: [u8; 14] = frame.load(self.l4).ok_or(Reason::Malformed)?;
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
        let start: [u8; 8] = frame.load(self.l4).ok_or(Reason::Malformed)?;
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

    /// Whether it is an echo request or reply.
    #[inline(always)]
    pub fn is_echo(&self) -> bool {
        matches!(self.kind, Kind::EchoRequest | Kind::EchoReply)
    }

    /// Whether it can belong to a flow.
    #[inline(always)]
    pub fn is_trackable(&self) -> bool {
        matches!(
            self.kind,
            Kind::Tcp | Kind::Udp | Kind::EchoRequest | Kind::EchoReply
        )
    }

    /// The flow of an endpoint that sends this.
    #[inline(always)]
    pub fn sent_key(&self, endpoint: u32) -> FlowKey {
        FlowKey {
            endpoint,
            protocol: u32::from(self.protocol),
            inside: self.source,
            peer: self.destination,
            inside_port: self.source_port,
            peer_port: if self.is_echo() {
                0
            } else {
                self.destination_port
            },
        }
    }

    /// The flow of an endpoint to which this is addressed under its external address.
    #[inline(always)]
    pub fn received_key(&self) -> OutsideKey {
        OutsideKey {
            protocol: u32::from(self.protocol),
            external: self.destination,
            peer: self.source,
            external_port: self.destination_port,
            peer_port: if self.is_echo() { 0 } else { self.source_port },
        }
    }

    /// Whether there is a layer 4 checksum that covers the addresses too.
    #[inline(always)]
    pub(crate) fn covers_addresses(&self) -> bool {
        match self.kind {
            Kind::Tcp | Kind::Udp => true,
            Kind::EchoRequest | Kind::EchoReply | Kind::Error => self.family == Family::V6,
            _ => false,
        }
    }

    /// Offset of the layer 4 checksum.
    #[inline(always)]
    pub(crate) fn checksum(&self) -> u32 {
        self.l4
            + match self.kind {
                Kind::Tcp => offset_of!(TcpHdr, check) as u32,
                Kind::Udp => offset_of!(UdpHdr, check) as u32,
                _ => offset_of!(Icmpv4Hdr, check) as u32,
            }
    }
}

/// New addresses and ports for a packet. For an echo message both ports are its identifier.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// New source address.
    pub source: Address,
    /// New destination address.
    pub destination: Address,
    /// New source port.
    pub source_port: u16,
    /// New destination port.
    pub destination_port: u16,
    /// Whether it crosses a router: time to live or hop limit less one.
    pub hop: bool,
}

impl Rewrite {
    /// Leaves everything as it is.
    #[inline(always)]
    pub fn none(packet: &Packet) -> Self {
        Self {
            source: packet.source,
            destination: packet.destination,
            source_port: packet.source_port,
            destination_port: packet.destination_port,
            hop: false,
        }
    }

    /// What a packet of a flow's endpoint has on its way to the peer.
    #[inline(always)]
    pub fn to_peer(flow: &Flow, packet: &Packet, hop: bool) -> Self {
        Self {
            source: flow.external,
            destination: flow.peer,
            source_port: flow.external_port,
            destination_port: if packet.is_echo() {
                flow.external_port
            } else {
                flow.peer_port
            },
            hop,
        }
    }

    /// What a packet of a flow's peer has on its way to the endpoint.
    #[inline(always)]
    pub fn to_inside(key: &FlowKey, packet: &Packet, hop: bool) -> Self {
        Self {
            source: key.peer,
            destination: key.inside,
            source_port: if packet.is_echo() {
                key.inside_port
            } else {
                key.peer_port
            },
            destination_port: key.inside_port,
            hop,
        }
    }

    /// Writes the changes into the frame and mends its checksums.
    ///
    /// # Errors
    /// [`Reason::Helper`] if the kernel refuses a write to bytes that it gave out before. The
    /// packet is then dropped, never sent on.
    #[inline(never)]
    pub fn apply<F: Frame>(&self, frame: &F, packet: &Packet) -> Result<(), Reason> {
        let family = packet.family;
        let addresses = Delta::NONE
            .address(family, &packet.source, &self.source)
            .address(family, &packet.destination, &self.destination);
        let moved =
            !same(&packet.source, &self.source) || !same(&packet.destination, &self.destination);

        let covered = Covered {
            pseudo_header: true,
            may_be_absent: packet.kind == Kind::Udp,
        };
        if moved && packet.covers_addresses() {
            frame.fix_checksum(packet.checksum(), addresses, covered)?;
        }
        if packet.is_trackable() {
            self.apply_ports(frame, packet, covered)?;
        }

        match family {
            Family::V4 => self.apply_v4(frame, packet, moved, addresses),
            Family::V6 => self.apply_v6(frame, packet, moved),
        }
    }

    #[inline(always)]
    fn apply_ports<F: Frame>(
        &self,
        frame: &F,
        packet: &Packet,
        covered: Covered,
    ) -> Result<(), Reason> {
        if packet.source_port == self.source_port
            && packet.destination_port == self.destination_port
        {
            return Ok(());
        }
        let covered = Covered {
            pseudo_header: false,
            ..covered
        };
        if packet.is_echo() {
            let old = packet.source_port.to_be_bytes();
            let new = self.source_port.to_be_bytes();
            let delta = Delta::NONE.word([old[0], old[1], 0, 0], [new[0], new[1], 0, 0]);
            frame.fix_checksum(packet.checksum(), delta, covered)?;
            return frame.store(packet.l4 + 4, &new, Balance::Balanced);
        }
        let old = ports(packet.source_port, packet.destination_port);
        let new = ports(self.source_port, self.destination_port);
        frame.fix_checksum(packet.checksum(), Delta::NONE.word(old, new), covered)?;
        frame.store(packet.l4, &new, Balance::Balanced)
    }

    #[inline(always)]
    fn apply_v4<F: Frame>(
        &self,
        frame: &F,
        packet: &Packet,
        moved: bool,
        addresses: Delta,
    ) -> Result<(), Reason> {
        if !moved && !self.hop {
            return Ok(());
        }
        let mut delta = addresses;
        let mut ttl = packet.ttl;
        if self.hop {
            ttl = ttl.wrapping_sub(1);
            delta = delta.word(
                [packet.ttl, packet.protocol, 0, 0],
                [ttl, packet.protocol, 0, 0],
            );
        }
        let check = delta.applied(packet.header_checksum);
        let (source, destination) = (quarter(&self.source, 12), quarter(&self.destination, 12));
        // Time to live, protocol, checksum and addresses are the rest of the header.
        frame.store(
            packet.l3 + offset_of!(Ipv4Hdr, ttl) as u32,
            &[
                ttl,
                packet.protocol,
                check[0],
                check[1],
                source[0],
                source[1],
                source[2],
                source[3],
                destination[0],
                destination[1],
                destination[2],
                destination[3],
            ],
            Balance::Balanced,
        )
    }

    #[inline(always)]
    fn apply_v6<F: Frame>(&self, frame: &F, packet: &Packet, moved: bool) -> Result<(), Reason> {
        if self.hop {
            const HOP_LIMIT: u32 = offset_of!(Ipv6Hdr, hop_limit) as u32;
            let hop_limit = [packet.ttl.wrapping_sub(1)];
            frame.store(packet.l3 + HOP_LIMIT, &hop_limit, Balance::Unbalanced)?;
        }
        if moved {
            const SOURCE: u32 = offset_of!(Ipv6Hdr, src_addr) as u32;
            let mut addresses = [0; 32];
            addresses[..16].copy_from_slice(&self.source);
            addresses[16..].copy_from_slice(&self.destination);
            frame.store(packet.l3 + SOURCE, &addresses, Balance::Unbalanced)?;
        }
        Ok(())
    }
}

#[inline(always)]
pub(crate) fn ports(source: u16, destination: u16) -> [u8; 4] {
    let (source, destination) = (source.to_be_bytes(), destination.to_be_bytes());
    [source[0], source[1], destination[0], destination[1]]
}

/// Length of an Ethernet header in bytes.
pub const ETHERNET: u32 = EthHdr::LEN as u32;
