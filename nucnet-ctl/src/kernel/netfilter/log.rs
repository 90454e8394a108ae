//! Packets that rules log (`NFLOG`), for whoever monitors.
//!
//! A group has one reader in a network namespace, and is free when that ends, however it does.

use std::{
    fs, io,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd},
};

use etherparse::{Icmpv4Type, Icmpv6Type, LaxNetSlice, LaxSlicedPacket, TransportSlice};
use nix::{errno::Errno, libc};

use super::{
    conntrack::tuple,
    nfnetlink::{Request, Socket, attributes, inner, kind, number, short, write},
};
use crate::model::netfilter::Tuple;

/// linux/netfilter/nfnetlink_log.h.
mod abi {
    pub(super) const SUBSYSTEM: u16 = 4;
    pub(super) const PACKET: u16 = 0;
    pub(super) const CONFIG: u16 = 1;
    pub(super) const CONFIG_COMMAND: u16 = 1;
    pub(super) const CONFIG_MODE: u16 = 2;
    pub(super) const CONFIG_TIMEOUT: u16 = 4;
    pub(super) const CONFIG_FLAGS: u16 = 6;
    pub(super) const BIND: u8 = 1;
    /// Headers and contents are told, not the headers alone.
    pub(super) const COPY_PACKET: u8 = 2;
    pub(super) const NUMBERED: u16 = 1;
    pub(super) const WITH_CONNECTION: u16 = 4;
    pub(super) const SENDER: u16 = 8;
    pub(super) const PAYLOAD: u16 = 9;
    pub(super) const PREFIX: u16 = 10;
    pub(super) const NUMBER: u16 = 12;
    pub(super) const CONNECTION: u16 = 18;
    /// Of a connection (nfnetlink_conntrack.h).
    pub(super) const TUPLE_ORIG: u16 = 1;
}

/// What of a packet is told: its headers.
const COPIED: u32 = 256;

/// For how long the kernel gathers packets, in hundredths of a second.
const GATHERED: u32 = 2;

/// A packet that was logged.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Logged {
    /// What the rule calls it.
    pub prefix: String,
    /// Link-layer address of its sender; none: it has none.
    pub sender: Option<[u8; 6]>,
    /// As it was when it was logged; none: it cannot be read.
    pub packet: Option<Tuple>,
    /// As the first packet of its connection was sent, before anything was translated; none: it is
    /// of none, or the kernel does not tell.
    pub asked: Option<Tuple>,
}

/// The reader of a group.
#[derive(Debug)]
pub struct Log {
    socket: Socket,
    /// The number that the next packet has if none is lost.
    next: u32,
}

impl Log {
    /// One that reads nothing yet.
    pub fn open() -> io::Result<Self> {
        Ok(Self {
            socket: Socket::told(0)?,
            next: 0,
        })
    }

    /// Takes one of those groups that nobody reads. `false`: all are read.
    pub fn take(&mut self, groups: RangeInclusive<u16>) -> io::Result<bool> {
        for group in groups {
            match self.bind(group, abi::NUMBERED | abi::WITH_CONNECTION) {
                Ok(()) => return Ok(true),
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    // Somebody else's; without the right, others had said so before.
                    Some(Errno::EPERM) if readers()?.iter().any(|(it, _)| *it == group) => {}
                    // A kernel that is built without connections in what it logs.
                    Some(Errno::EOPNOTSUPP) => {
                        self.bind(group, abi::NUMBERED)?;
                        return Ok(true);
                    }
                    _ => return Err(error),
                },
            }
        }
        Ok(false)
    }

    fn bind(&self, group: u16, flags: u16) -> io::Result<()> {
        let mut attributes = Vec::new();
        write(&mut attributes, abi::CONFIG_COMMAND, |bytes| {
            bytes.push(abi::BIND);
        });
        write(&mut attributes, abi::CONFIG_MODE, |bytes| {
            bytes.extend(COPIED.to_be_bytes());
            bytes.extend([abi::COPY_PACKET, 0]);
        });
        write(&mut attributes, abi::CONFIG_TIMEOUT, |bytes| {
            bytes.extend(GATHERED.to_be_bytes());
        });
        write(&mut attributes, abi::CONFIG_FLAGS, |bytes| {
            bytes.extend(flags.to_be_bytes());
        });
        self.socket.change(Request {
            kind: kind(abi::SUBSYSTEM, abi::CONFIG),
            family: libc::AF_UNSPEC as u8,
            resource: group,
            attributes: &attributes,
            ..Request::default()
        })
    }

    /// The packets that there are already, and how many before them were lost, for nobody read them
    /// in time.
    pub fn read(&mut self) -> io::Result<(Vec<Logged>, u64)> {
        const PACKET: u16 = kind(abi::SUBSYSTEM, abi::PACKET);
        let (mut packets, mut lost) = (Vec::new(), 0);
        let next = &mut self.next;
        // That something was lost shows in the numbers.
        self.socket.drain(|message| {
            if message.kind == PACKET {
                let own = inner(message.contents, abi::NUMBER).and_then(number);
                let own = own.unwrap_or(*next);
                lost += u64::from(own.wrapping_sub(*next));
                *next = own.wrapping_add(1);
                packets.push(logged(message.contents));
            }
        })?;
        Ok((packets, lost))
    }
}

impl AsFd for Log {
    /// Readable when there is something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The groups that are read in the calling thread's network namespace, and by whom: the port of a
/// socket, which is the id of its process where that has no other one.
pub fn readers() -> io::Result<Vec<(u16, u32)>> {
    match fs::read_to_string("/proc/thread-self/net/netfilter/nfnetlink_log") {
        Ok(text) => Ok(text.lines().filter_map(reader).collect()),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Vec::new()),
        Err(error) => Err(error),
    }
}

/// `GROUP PORT QUEUED MODE RANGE TIMEOUT USERS`.
fn reader(line: &str) -> Option<(u16, u32)> {
    let mut words = line.split_whitespace();
    Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?))
}

fn logged(bytes: &[u8]) -> Logged {
    let mut logged = Logged {
        prefix: String::new(),
        sender: None,
        packet: None,
        asked: None,
    };
    for (kind, contents, _) in attributes(bytes) {
        match kind {
            abi::PREFIX => {
                let text = contents.strip_suffix(&[0]).unwrap_or(contents);
                logged.prefix = String::from_utf8_lossy(text).into_owned();
            }
            abi::SENDER => logged.sender = sender(contents),
            abi::PAYLOAD => logged.packet = packet(contents),
            abi::CONNECTION => logged.asked = inner(contents, abi::TUPLE_ORIG).and_then(tuple),
            _ => {}
        }
    }
    logged
}

/// `struct nfulnl_msg_packet_hw`: length, padding, address.
fn sender(bytes: &[u8]) -> Option<[u8; 6]> {
    match short(bytes)? {
        6 => Some(*bytes.get(4..)?.first_chunk()?),
        _ => None,
    }
}

/// A packet by its headers, as far as they are there.
fn packet(bytes: &[u8]) -> Option<Tuple> {
    let sliced = LaxSlicedPacket::from_ip(bytes).ok()?;
    let (source, destination) = match sliced.net.as_ref()? {
        LaxNetSlice::Ipv4(v4) => {
            let header = v4.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        LaxNetSlice::Ipv6(v6) => {
            let header = v6.header();
            (
                header.source_addr().into(),
                header.destination_addr().into(),
            )
        }
        LaxNetSlice::Arp(_) => return None,
    };
    let (source_port, destination_port) = match &sliced.transport {
        Some(TransportSlice::Tcp(tcp)) => (tcp.source_port(), tcp.destination_port()),
        Some(TransportSlice::Udp(udp)) => (udp.source_port(), udp.destination_port()),
        Some(TransportSlice::Icmpv4(icmp)) => match icmp.icmp_type() {
            Icmpv4Type::EchoRequest(echo) | Icmpv4Type::EchoReply(echo) => (echo.id, 0),
            _ => (0, 0),
        },
        Some(TransportSlice::Icmpv6(icmp)) => match icmp.icmp_type() {
            Icmpv6Type::EchoRequest(echo) | Icmpv6Type::EchoReply(echo) => (echo.id, 0),
            _ => (0, 0),
        },
        Some(TransportSlice::Igmp(_)) | None => (0, 0),
    };
    Some(Tuple {
        source,
        destination,
        protocol: sliced.ip_payload()?.ip_number.0,
        source_port,
        destination_port,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use etherparse::PacketBuilder;

    #[test]
    fn packet_that_is_cut_off_is_read_as_far_as_it_is_there() {
        let builder = PacketBuilder::ipv4([10, 0, 42, 2], [192, 0, 2, 1], 64).udp(5000, 53);
        let mut bytes = Vec::new();
        builder.write(&mut bytes, &[7; 1000]).expect("a packet");
        let expected = Tuple {
            source: [10, 0, 42, 2].into(),
            destination: [192, 0, 2, 1].into(),
            protocol: 17,
            source_port: 5000,
            destination_port: 53,
        };
        assert_eq!(packet(&bytes[..COPIED as usize]), Some(expected));
        let later = Tuple {
            source_port: 0,
            destination_port: 0,
            ..expected
        };
        assert_eq!(packet(&bytes[..20]), Some(later));
        assert_eq!(packet(&bytes[..10]), None);
    }

    #[test]
    fn echo_has_its_identifier_for_a_port() {
        let (from, to) = ([0xfd; 16], [0x20; 16]);
        let mut bytes = Vec::new();
        let builder = PacketBuilder::ipv6(from, to, 64).icmpv6_echo_request(77, 1);
        builder.write(&mut bytes, b"x").expect("a packet");
        let found = packet(&bytes).expect("a packet");
        let ports = (found.source_port, found.destination_port);
        assert_eq!((found.protocol, ports), (58, (77, 0)));
        assert_eq!(found.source, std::net::IpAddr::from(from));
    }

    #[test]
    fn what_is_logged_names_what_its_connection_asked_for() {
        let mut bytes = Vec::new();
        write(&mut bytes, abi::PREFIX, |bytes| bytes.extend(b"policy\0"));
        write(&mut bytes, abi::SENDER, |bytes| {
            bytes.extend([0, 6, 0, 0, 2, 0, 0, 0, 0, 7, 0, 0]);
        });
        write(&mut bytes, abi::CONNECTION, |bytes| {
            write(bytes, abi::TUPLE_ORIG, |bytes| {
                write(bytes, 1, |bytes| {
                    write(bytes, 1, |bytes| bytes.extend([10, 0, 42, 2]));
                    write(bytes, 2, |bytes| bytes.extend([192, 0, 2, 2]));
                });
                write(bytes, 2, |bytes| {
                    write(bytes, 1, |bytes| bytes.push(6));
                    write(bytes, 2, |bytes| bytes.extend(5000_u16.to_be_bytes()));
                    write(bytes, 3, |bytes| bytes.extend(8080_u16.to_be_bytes()));
                });
            });
        });
        let found = logged(&bytes);
        assert_eq!((found.prefix.as_str(), found.packet), ("policy", None));
        assert_eq!(found.sender, Some([2, 0, 0, 0, 0, 7]));
        let asked = found.asked.expect("a connection");
        assert_eq!(
            (asked.destination.to_string(), asked.destination_port),
            ("192.0.2.2".to_owned(), 8080)
        );
    }

    #[test]
    fn readers_are_found_by_their_group() {
        let line = "  111   4711     0 2   256      2  1";
        assert_eq!(reader(line), Some((111, 4711)));
        assert_eq!(reader(""), None);
    }
}
