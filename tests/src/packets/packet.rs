//! Packets as rows write them: a description that becomes bytes, with every length and checksum
//! right unless a row asks for a wrong one.

use std::net::{IpAddr, SocketAddr};

use etherparse::{
    ArpHardwareId, ArpOperation, ArpPacket, EtherType, Icmpv4Header, Icmpv4Type, Icmpv6Header,
    Icmpv6Type, IpDscp, IpFragOffset, IpNumber, Ipv4Header, Ipv4Options, Ipv6Header, TcpHeader,
    UdpHeader,
};
use nucnet_common::{
    abi::Mac,
    packet::{ICMPV6, UDP, tcp_flag},
};

use super::checksum;

/// What the IP packet carries.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Carried {
    Tcp {
        ports: (u16, u16),
        flags: u8,
    },
    Reset {
        ports: (u16, u16),
        sequence: u32,
        acknowledgement: Option<u32>,
    },
    Udp {
        ports: (u16, u16),
        checksum: bool,
    },
    Icmp {
        start: [u8; 8],
    },
    Other {
        protocol: u8,
    },
}

/// An IP packet in, or without, an Ethernet frame.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    macs: Option<(Mac, Mac)>,
    vlan: Option<u16>,
    source: IpAddr,
    destination: IpAddr,
    ttl: u8,
    control: bool,
    options: Vec<u8>,
    extension: Option<u8>,
    fragment: Option<(u16, bool)>,
    carried: Carried,
    payload: Vec<u8>,
    padding: usize,
    patches: Vec<(usize, Vec<u8>)>,
}

/// A TCP segment with flags as tcpdump writes them: `S`, `A`, `F`, `R`.
pub fn tcp(flags: &str, from: impl Into<SocketAddr>, to: impl Into<SocketAddr>) -> Packet {
    let flags = flags.chars().fold(0, |bits, flag| {
        bits | match flag {
            'S' => tcp_flag::SYN,
            'A' => tcp_flag::ACK,
            'F' => tcp_flag::FIN,
            'R' => tcp_flag::RST,
            _ => panic!("no TCP flag is written {flag}"),
        }
    });
    let (from, to) = (from.into(), to.into());
    let ports = (from.port(), to.port());
    Packet::new(from.ip(), to.ip(), Carried::Tcp { ports, flags })
}

/// The sequence number of every segment that is no [`reset`].
pub const SEQUENCE: u32 = 0x0102_0304;
/// Its acknowledgement number.
pub const ACKNOWLEDGEMENT: u32 = 0x0506_0708;

/// A TCP segment that nothing has but a reset, of a host without state (RFC 9293 section
/// 3.10.7.1).
pub fn reset(
    from: impl Into<SocketAddr>,
    to: impl Into<SocketAddr>,
    sequence: u32,
    acknowledgement: Option<u32>,
) -> Packet {
    let (from, to) = (from.into(), to.into());
    let carried = Carried::Reset {
        ports: (from.port(), to.port()),
        sequence,
        acknowledgement,
    };
    Packet::new(from.ip(), to.ip(), carried).payload([])
}

/// A UDP datagram.
pub fn udp(from: impl Into<SocketAddr>, to: impl Into<SocketAddr>) -> Packet {
    let (from, to) = (from.into(), to.into());
    let carried = Carried::Udp {
        ports: (from.port(), to.port()),
        checksum: true,
    };
    Packet::new(from.ip(), to.ip(), carried)
}

/// An echo request of the family of the addresses.
pub fn echo_request(from: IpAddr, to: IpAddr, identifier: u16) -> Packet {
    let kind = if from.is_ipv4() { 8 } else { 128 };
    echo(kind, from, to, identifier)
}

/// An echo reply of the family of the addresses.
pub fn echo_reply(from: IpAddr, to: IpAddr, identifier: u16) -> Packet {
    let kind = if from.is_ipv4() { 0 } else { 129 };
    echo(kind, from, to, identifier)
}

fn echo(kind: u8, from: IpAddr, to: IpAddr, identifier: u16) -> Packet {
    let [high, low] = identifier.to_be_bytes();
    icmp(from, to, [kind, 0, 0, 0, high, low, 0, 7])
}

/// An ICMP or ICMPv6 message, its first eight bytes given; the checksum among them is computed.
pub fn icmp(from: IpAddr, to: IpAddr, start: [u8; 8]) -> Packet {
    Packet::new(from, to, Carried::Icmp { start })
}

/// A packet of any other protocol.
pub fn ip(from: IpAddr, to: IpAddr, protocol: u8) -> Packet {
    Packet::new(from, to, Carried::Other { protocol })
}

/// A neighbour solicitation for `target`, with the option that names the sender's address.
pub fn solicitation(from: IpAddr, to: IpAddr, target: IpAddr, mac: Option<Mac>) -> Packet {
    neighbour([135, 0, 0, 0, 0, 0, 0, 0], from, to, target, (1, mac))
}

/// A neighbour advertisement with these flags (RFC 4861 section 4.4).
pub fn advertisement(
    flags: u8,
    from: IpAddr,
    to: IpAddr,
    target: IpAddr,
    mac: Option<Mac>,
) -> Packet {
    neighbour([136, 0, 0, 0, flags, 0, 0, 0], from, to, target, (2, mac))
}

fn neighbour(
    start: [u8; 8],
    from: IpAddr,
    to: IpAddr,
    target: IpAddr,
    (option, mac): (u8, Option<Mac>),
) -> Packet {
    let IpAddr::V6(target) = target else {
        panic!("neighbour discovery is IPv6");
    };
    let mut payload = target.octets().to_vec();
    if let Some(mac) = mac {
        payload.extend([option, 1]);
        payload.extend(mac);
    }
    icmp(from, to, start).payload(payload).ttl(255)
}

/// An ARP packet: a request, or else a reply, in a frame of the given addresses.
pub fn arp(
    operation: ArpOperation,
    (to, from): (Mac, Mac),
    (sender_mac, sender): (Mac, IpAddr),
    (target_mac, target): (Mac, IpAddr),
) -> Vec<u8> {
    let v4 = |address| match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(_) => panic!("ARP is IPv4"),
    };
    let arp = ArpPacket::new(
        ArpHardwareId::ETHERNET,
        EtherType::IPV4,
        operation,
        &sender_mac,
        &v4(sender),
        &target_mac,
        &v4(target),
    )
    .expect("lengths agree");
    let mut frame = ethernet(to, from, EtherType::ARP.0).to_vec();
    frame.extend(arp.to_bytes());
    frame
}

/// An Ethernet header.
pub fn ethernet(to: Mac, from: Mac, ethertype: u16) -> [u8; 14] {
    let mut header = [0; 14];
    header[..6].copy_from_slice(&to);
    header[6..12].copy_from_slice(&from);
    header[12..].copy_from_slice(&ethertype.to_be_bytes());
    header
}

impl Packet {
    fn new(source: IpAddr, destination: IpAddr, carried: Carried) -> Self {
        assert_eq!(
            source.is_ipv4(),
            destination.is_ipv4(),
            "a packet has one family"
        );
        Self {
            macs: None,
            vlan: None,
            source,
            destination,
            ttl: 64,
            control: false,
            options: Vec::new(),
            extension: None,
            fragment: None,
            carried,
            payload: b"Where there is a will, there is a way.".to_vec(),
            padding: 0,
            patches: Vec::new(),
        }
    }

    /// From another address and port; of an echo message, the port is its identifier.
    pub fn from(mut self, from: impl Into<SocketAddr>) -> Self {
        let from = from.into();
        self.source = from.ip();
        match &mut self.carried {
            Carried::Tcp { ports, .. }
            | Carried::Reset { ports, .. }
            | Carried::Udp { ports, .. } => ports.0 = from.port(),
            Carried::Icmp { start } => start[4..6].copy_from_slice(&from.port().to_be_bytes()),
            Carried::Other { .. } => {}
        }
        self
    }

    /// To another address and port; of an echo message, the port is its identifier.
    pub fn to(mut self, to: impl Into<SocketAddr>) -> Self {
        let to = to.into();
        self.destination = to.ip();
        match &mut self.carried {
            Carried::Tcp { ports, .. }
            | Carried::Reset { ports, .. }
            | Carried::Udp { ports, .. } => ports.1 = to.port(),
            Carried::Icmp { start } => start[4..6].copy_from_slice(&to.port().to_be_bytes()),
            Carried::Other { .. } => {}
        }
        self
    }

    /// Where it goes.
    pub fn destination(&self) -> IpAddr {
        self.destination
    }

    /// The same to another address.
    #[must_use]
    pub fn to_address(mut self, to: IpAddr) -> Self {
        self.destination = to;
        self
    }

    /// In a frame to and from these addresses.
    #[must_use]
    pub fn macs(mut self, to: Mac, from: Mac) -> Self {
        self.macs = Some((to, from));
        self
    }

    /// In a frame to and from these addresses, unless it is in one already.
    pub fn or_macs(self, to: Mac, from: Mac) -> Self {
        let (to, from) = self.macs.unwrap_or((to, from));
        self.macs(to, from)
    }

    /// With a VLAN tag.
    pub fn vlan(mut self, id: u16) -> Self {
        self.vlan = Some(id);
        self
    }

    /// With this time to live or hop limit, in place of 64.
    pub fn ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// As the next router forwards it.
    pub fn one_hop_on(mut self) -> Self {
        self.ttl -= 1;
        self
    }

    /// As a router's own: of internetwork control, and in IPv4 without identification.
    pub fn of_router(mut self) -> Self {
        self.control = true;
        self
    }

    /// With IPv4 options, a multiple of four bytes.
    pub fn options(mut self, options: &[u8]) -> Self {
        self.options = options.to_vec();
        self
    }

    /// With an empty IPv6 extension header of that number.
    pub fn extension(mut self, number: u8) -> Self {
        self.extension = Some(number);
        self
    }

    /// As a fragment: offset in units of eight bytes, and whether more follow.
    pub fn fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some((offset, more));
        self
    }

    /// With this payload.
    pub fn payload(mut self, payload: impl Into<Vec<u8>>) -> Self {
        self.payload = payload.into();
        self
    }

    /// UDP without checksum.
    pub fn without_checksum(mut self) -> Self {
        if let Carried::Udp { checksum, .. } = &mut self.carried {
            *checksum = false;
        }
        self
    }

    /// With zeros after the IP packet, as short Ethernet frames have them.
    pub fn padded(mut self, bytes: usize) -> Self {
        self.padding = bytes;
        self
    }

    /// With these bytes at an offset from the start of the IP header, whatever they make of it.
    /// The checksum of an IPv4 header is right even so.
    pub fn patched(mut self, offset: usize, bytes: &[u8]) -> Self {
        self.patches.push((offset, bytes.to_vec()));
        self
    }

    /// The same at an offset from the start of what IP carries, whose checksum is then wrong.
    pub fn patched_l4(self, offset: usize, bytes: &[u8]) -> Self {
        let header = match self.source {
            IpAddr::V4(_) => Ipv4Header::MIN_LEN + self.options.len(),
            IpAddr::V6(_) => Ipv6Header::LEN,
        };
        self.patched(header + offset, bytes)
    }

    /// The packet's bytes; with an Ethernet header if it was given addresses.
    pub fn bytes(&self) -> Vec<u8> {
        let ethertype = match self.source {
            IpAddr::V4(_) => EtherType::IPV4.0,
            IpAddr::V6(_) => EtherType::IPV6.0,
        };
        let mut frame = Vec::new();
        if let Some((to, from)) = self.macs {
            match self.vlan {
                None => frame.extend(ethernet(to, from, ethertype)),
                Some(id) => {
                    frame.extend(ethernet(to, from, EtherType::VLAN_TAGGED_FRAME.0));
                    frame.extend(id.to_be_bytes());
                    frame.extend(ethertype.to_be_bytes());
                }
            }
        }
        let l3 = frame.len();
        let carried = self.carried_bytes();
        match (self.source, self.destination) {
            (IpAddr::V4(source), IpAddr::V4(destination)) => {
                let (offset, more) = self.fragment.unwrap_or_default();
                let mut header = Ipv4Header {
                    identification: 0x4e75,
                    fragment_offset: IpFragOffset::try_new(offset).expect("13 bits"),
                    more_fragments: more,
                    dont_fragment: self.fragment.is_none(),
                    time_to_live: self.ttl,
                    protocol: IpNumber(self.protocol()),
                    source: source.octets(),
                    destination: destination.octets(),
                    options: Ipv4Options::try_from(self.options.as_slice()).expect("options"),
                    ..Ipv4Header::default()
                };
                if self.control {
                    header.dscp = IpDscp::CS6;
                }
                // What nucnet makes itself is never cut.
                if self.control || matches!(self.carried, Carried::Reset { .. }) {
                    header.identification = 0;
                }
                header.set_payload_len(carried.len()).expect("length");
                header.header_checksum = header.calc_header_checksum();
                frame.extend(header.to_bytes());
            }
            (IpAddr::V6(source), IpAddr::V6(destination)) => {
                let extensions = self.extension_bytes();
                let header = Ipv6Header {
                    payload_length: (extensions.len() + carried.len()) as u16,
                    next_header: IpNumber(match (self.extension, self.fragment) {
                        (Some(number), _) => number,
                        (None, Some(_)) => IpNumber::IPV6_FRAGMENTATION_HEADER.0,
                        (None, None) => self.protocol(),
                    }),
                    hop_limit: self.ttl,
                    source: source.octets(),
                    destination: destination.octets(),
                    ..Ipv6Header::default()
                };
                frame.extend(header.to_bytes());
                frame.extend(extensions);
            }
            _ => unreachable!("a packet has one family"),
        }
        frame.extend(carried);
        self.patch(&mut frame[l3..]);
        frame.resize(frame.len() + self.padding, 0);
        frame
    }

    fn patch(&self, packet: &mut [u8]) {
        for (offset, bytes) in &self.patches {
            packet[*offset..offset + bytes.len()].copy_from_slice(bytes);
        }
        if !self.patches.is_empty() && self.source.is_ipv4() {
            let length = (usize::from(packet[0] & 0x0f) * 4).clamp(20, packet.len());
            packet[10..12].fill(0);
            let checksum = !checksum::sum(0, &packet[..length]) as u16;
            packet[10..12].copy_from_slice(&checksum.to_be_bytes());
        }
    }

    fn protocol(&self) -> u8 {
        match self.carried {
            Carried::Tcp { .. } | Carried::Reset { .. } => IpNumber::TCP.0,
            Carried::Udp { .. } => UDP,
            Carried::Icmp { .. } if self.source.is_ipv4() => IpNumber::ICMP.0,
            Carried::Icmp { .. } => ICMPV6,
            Carried::Other { protocol } => protocol,
        }
    }

    fn extension_bytes(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        if self.extension.is_some() {
            let next = match self.fragment {
                Some(_) => IpNumber::IPV6_FRAGMENTATION_HEADER.0,
                None => self.protocol(),
            };
            // One unit of eight bytes, padded by an option that says nothing.
            bytes.extend([next, 0, 1, 4, 0, 0, 0, 0]);
        }
        if let Some((offset, more)) = self.fragment {
            let [high, low] = (offset << 3 | u16::from(more)).to_be_bytes();
            bytes.extend([self.protocol(), 0, high, low, 0, 0, 0, 1]);
        }
        bytes
    }

    fn carried_bytes(&self) -> Vec<u8> {
        let mut bytes = match self.carried {
            Carried::Tcp { ports, flags } => {
                let mut header = TcpHeader::new(ports.0, ports.1, SEQUENCE, 0xfaf0);
                header.acknowledgment_number = ACKNOWLEDGEMENT;
                header.fin = flags & tcp_flag::FIN != 0;
                header.syn = flags & tcp_flag::SYN != 0;
                header.rst = flags & tcp_flag::RST != 0;
                header.ack = flags & tcp_flag::ACK != 0;
                self.tcp_bytes(header)
            }
            Carried::Reset {
                ports,
                sequence,
                acknowledgement,
            } => {
                let mut header = TcpHeader::new(ports.0, ports.1, sequence, 0);
                header.acknowledgment_number = acknowledgement.unwrap_or_default();
                header.ack = acknowledgement.is_some();
                header.rst = true;
                self.tcp_bytes(header)
            }
            Carried::Udp { ports, checksum } => {
                let mut header = UdpHeader {
                    source_port: ports.0,
                    destination_port: ports.1,
                    length: (UdpHeader::LEN + self.payload.len()) as u16,
                    checksum: 0,
                };
                if checksum {
                    header.checksum = self.checksum(
                        |from, to, payload| header.calc_checksum_ipv4_raw(from, to, payload),
                        |from, to, payload| header.calc_checksum_ipv6_raw(from, to, payload),
                    );
                }
                header.to_bytes().to_vec()
            }
            Carried::Icmp { start } => self.icmp_bytes(start),
            Carried::Other { .. } => Vec::new(),
        };
        bytes.extend(&self.payload);
        bytes
    }

    fn tcp_bytes(&self, mut header: TcpHeader) -> Vec<u8> {
        header.checksum = self.checksum(
            |from, to, payload| header.calc_checksum_ipv4_raw(from, to, payload),
            |from, to, payload| header.calc_checksum_ipv6_raw(from, to, payload),
        );
        header.to_bytes().to_vec()
    }

    /// That of a transport header, by the way that its family has.
    fn checksum<E: std::fmt::Debug>(
        &self,
        v4: impl Fn([u8; 4], [u8; 4], &[u8]) -> Result<u16, E>,
        v6: impl Fn([u8; 16], [u8; 16], &[u8]) -> Result<u16, E>,
    ) -> u16 {
        match (self.source, self.destination) {
            (IpAddr::V4(from), IpAddr::V4(to)) => v4(from.octets(), to.octets(), &self.payload),
            (IpAddr::V6(from), IpAddr::V6(to)) => v6(from.octets(), to.octets(), &self.payload),
            _ => unreachable!("a packet has one family"),
        }
        .expect("length")
    }

    fn icmp_bytes(&self, start: [u8; 8]) -> Vec<u8> {
        let [type_u8, code_u8, _, _, a, b, c, d] = start;
        let bytes5to8 = [a, b, c, d];
        match (self.source, self.destination) {
            (IpAddr::V6(from), IpAddr::V6(to)) => Icmpv6Header::with_checksum(
                Icmpv6Type::Unknown {
                    type_u8,
                    code_u8,
                    bytes5to8,
                },
                from.octets(),
                to.octets(),
                &self.payload,
            )
            .expect("length")
            .to_bytes()
            .to_vec(),
            _ => Icmpv4Header::with_checksum(
                Icmpv4Type::Unknown {
                    type_u8,
                    code_u8,
                    bytes5to8,
                },
                &self.payload,
            )
            .to_bytes()
            .to_vec(),
        }
    }
}
