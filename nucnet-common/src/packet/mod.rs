//! Headers: read once into a [`Packet`], judged, then rewritten in place.
//!
//! A [`Frame`] is a packet buffer: a socket buffer in the kernel, a byte slice in tests.
//! Nothing is written before everything is decided, so a dropped frame is never half changed.

mod address;
mod checksum;
mod frame;
mod parse;
mod rewrite;

pub(crate) use address::half;
pub use address::{Family, is_v4, mapped, quarter, same};
pub(crate) use checksum::SUMMED;
pub use checksum::{Balance, Covered, Delta, sum};
pub use frame::{ETHERNET, ETHERTYPE_ARP, ETHERTYPE_IPV4, ETHERTYPE_IPV6, Frame};
pub use rewrite::Rewrite;
pub(crate) use rewrite::ports;

use core::mem::offset_of;

use network_types::{icmp::Icmpv4Hdr, ip::IpProto, tcp::TcpHdr, udp::UdpHdr};

use crate::abi::{Address, FlowKey, OutsideKey};

/// IP protocol number of ICMP.
pub const ICMP: u8 = IpProto::Icmp as u8;
/// IP protocol number of TCP.
pub const TCP: u8 = IpProto::Tcp as u8;
/// IP protocol number of UDP.
pub const UDP: u8 = IpProto::Udp as u8;
/// IP protocol number of ICMPv6.
pub const ICMPV6: u8 = IpProto::Ipv6Icmp as u8;

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
