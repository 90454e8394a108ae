//! The kernel's table of connections (`nf_conntrack`, by nfnetlink), that of the calling thread's
//! network namespace.

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

use crate::kernel::fault::{self, Operation};

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Who sends.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The sender's port; 0: the protocol has none. Of an ICMP query, its identifier.
    pub source_port: u16,
    /// The receiver's port; 0: the protocol has none.
    pub destination_port: u16,
}

/// A connection that the kernel tracks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tracked {
    /// As its first packet was sent.
    pub original: Tuple,
    /// As the answer to it is.
    pub reply: Tuple,
    /// The kernel's number for it.
    pub id: u32,
    /// Whether there was an answer.
    pub is_answered: bool,
    /// How far a TCP connection is.
    pub tcp: Option<TcpState>,
    /// What was sent in the first direction.
    pub sent: Count,
    /// What was sent in the other one.
    pub answered: Count,
    /// Nanoseconds since 1970 at its first packet; none: the kernel did not note it.
    pub start: Option<u64>,
    /// Seconds after which the kernel forgets it if no packet comes.
    pub expires: u32,
    /// What names it to the kernel: the attributes of the first direction, and more.
    name: Vec<u8>,
    family: u8,
}

impl Tracked {
    /// Whether one of those addresses takes part, on whichever side of a translation.
    pub fn is_of(&self, addresses: &[IpAddr]) -> bool {
        [&self.original, &self.reply].iter().any(|tuple| {
            addresses.contains(&tuple.source) || addresses.contains(&tuple.destination)
        })
    }
}

/// What the kernel has counted, where it counts (`nf_conntrack_acct`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Count {
    /// Packets.
    pub packets: u64,
    /// Bytes of them, from the IP header on.
    pub bytes: u64,
}

/// How far a TCP connection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpState {
    /// Not all of the handshake was seen.
    Opening,
    /// It was.
    Established,
    /// One side has said that it is done.
    Closing,
    /// Both have, or one has reset it.
    Closed,
}

impl TcpState {
    /// linux/netfilter/nf_conntrack_tcp.h, `enum tcp_conntrack`.
    fn of(state: u8) -> Self {
        match state {
            3 => Self::Established,
            4..=6 => Self::Closing,
            7 | 8 => Self::Closed,
            _ => Self::Opening,
        }
    }
}

/// linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
mod abi {
    pub(super) const SUBSYSTEM: u16 = 1;
    pub(super) const GET: u16 = 1;
    pub(super) const DELETE: u16 = 2;
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const PROTOINFO: u16 = 4;
    pub(super) const TIMEOUT: u16 = 7;
    pub(super) const COUNTERS_ORIG: u16 = 9;
    pub(super) const COUNTERS_REPLY: u16 = 10;
    pub(super) const ID: u16 = 12;
    pub(super) const ZONE: u16 = 18;
    pub(super) const TIMESTAMP: u16 = 20;
    pub(super) const PROTOINFO_TCP: u16 = 1;
    pub(super) const TCP_STATE: u16 = 1;
    pub(super) const PACKETS: u16 = 1;
    pub(super) const BYTES: u16 = 2;
    pub(super) const START: u16 = 1;
    /// `IPS_SEEN_REPLY`.
    pub(super) const SEEN_REPLY: u32 = 2;
    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;
    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_SRC_PORT: u16 = 2;
    pub(super) const PROTO_DST_PORT: u16 = 3;
    pub(super) const PROTO_ICMP_ID: u16 = 4;
    pub(super) const PROTO_ICMPV6_ID: u16 = 7;
    /// Nested, or in network order: not part of the type.
    pub(super) const TYPE_MASK: u16 = 0x3fff;
}

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct nfgenmsg`, after it.
const GENERAL: usize = 4;

/// A socket to the table.
#[derive(Debug)]
pub struct Conntrack(OwnedFd);

impl Conntrack {
    /// That of the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        let (kind, protocol) = (SockType::Raw, SockProtocol::NetlinkNetFilter);
        let fd = socket(
            AddressFamily::Netlink,
            kind,
            SockFlag::SOCK_CLOEXEC,
            protocol,
        )?;
        Ok(Self(fd))
    }

    /// All connections of both families. A kernel that tracks none has none.
    pub fn list(&self) -> io::Result<Vec<Tracked>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            self.send(abi::GET, libc::NLM_F_DUMP, family as u8, &[])?;
            let mut is_done = false;
            while !is_done {
                let mut buffer = vec![0; 1 << 16];
                let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
                is_done = messages(&buffer[..length], |payload| {
                    all.extend(tracked(payload));
                })?;
            }
        }
        Ok(all)
    }

    /// Forgets a connection; one that is gone is fine.
    pub fn forget(&self, tracked: &Tracked) -> io::Result<()> {
        fault::before(Operation::Netlink)?;
        self.send(abi::DELETE, libc::NLM_F_ACK, tracked.family, &tracked.name)?;
        let mut buffer = vec![0; 1 << 12];
        let length = recv(self.0.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        match messages(&buffer[..length], |_| {}) {
            Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
            result => result.map(drop),
        }
    }

    /// Forgets the connections of which that is true. How many there were.
    pub fn forget_all(&self, is_meant: impl Fn(&Tracked) -> bool) -> io::Result<u64> {
        let mut count = 0;
        for tracked in self.list()?.iter().filter(|tracked| is_meant(tracked)) {
            self.forget(tracked)?;
            count += 1;
        }
        Ok(count)
    }

    fn send(&self, kind: u16, flags: i32, family: u8, attributes: &[u8]) -> io::Result<()> {
        let flags = (libc::NLM_F_REQUEST | flags) as u16;
        let length = HEADER + GENERAL + attributes.len();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend((length as u32).to_ne_bytes());
        bytes.extend((abi::SUBSYSTEM << 8 | kind).to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Sequence number and port of the sender: each request has its answer before the next one.
        bytes.extend([0; 8]);
        // Version 0 and no resource.
        bytes.extend([family, 0, 0, 0]);
        bytes.extend(attributes);
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }
}

/// Calls `each` with what comes after the headers of each message. Whether that was the end.
fn messages(mut bytes: &[u8], mut each: impl FnMut(&[u8])) -> io::Result<bool> {
    while let Some(header) = bytes.get(..HEADER) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = i32::from(u16::from_ne_bytes([header[4], header[5]]));
        let Some(payload) = bytes.get(HEADER..length) else {
            return Err(Errno::EBADMSG.into());
        };
        match kind {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let code = payload
                    .first_chunk::<4>()
                    .map(|code| i32::from_ne_bytes(*code));
                return match code {
                    Some(0) => Ok(true),
                    Some(code) => Err(io::Error::from_raw_os_error(-code)),
                    None => Err(Errno::EBADMSG.into()),
                };
            }
            _ => each(payload),
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The attributes in some bytes: type, contents, and both with their header.
fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & abi::TYPE_MASK;
        let (whole, contents) = (bytes.get(..length)?, bytes.get(4..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, contents, whole))
    })
}

fn tracked(payload: &[u8]) -> Option<Tracked> {
    let (mut original, mut reply, mut name) = (None, None, Vec::new());
    let (mut id, mut expires, mut is_answered) = (0, 0, false);
    let (mut tcp, mut start) = (None, None);
    let (mut sent, mut answered) = (Count::default(), Count::default());
    for (kind, contents, whole) in attributes(payload.get(GENERAL..)?) {
        match kind {
            abi::TUPLE_ORIG => original = tuple(contents),
            abi::TUPLE_REPLY => reply = tuple(contents),
            abi::ID => id = number(contents)?,
            abi::TIMEOUT => expires = number(contents)?,
            abi::STATUS => is_answered = number(contents)? & abi::SEEN_REPLY != 0,
            abi::COUNTERS_ORIG => sent = count(contents),
            abi::COUNTERS_REPLY => answered = count(contents),
            abi::TIMESTAMP => start = inner(contents, abi::START).and_then(long),
            abi::PROTOINFO => {
                let state = inner(contents, abi::PROTOINFO_TCP);
                let state = state.and_then(|tcp| inner(tcp, abi::TCP_STATE)?.first());
                tcp = state.map(|state| TcpState::of(*state));
            }
            _ => {}
        }
        if matches!(kind, abi::TUPLE_ORIG | abi::ID | abi::ZONE) {
            name.extend(whole);
            name.resize(name.len().next_multiple_of(4), 0);
        }
    }
    Some(Tracked {
        original: original?,
        reply: reply?,
        id,
        is_answered,
        tcp,
        sent,
        answered,
        start,
        expires,
        name,
        family: *payload.first()?,
    })
}

/// The contents of the first attribute of that type.
fn inner(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut found = attributes(bytes).filter(|(kind, ..)| *kind == wanted);
    found.next().map(|(_, contents, _)| contents)
}

fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?))
}

fn long(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.first_chunk()?))
}

fn count(bytes: &[u8]) -> Count {
    let of = |kind| inner(bytes, kind).and_then(long).unwrap_or_default();
    Count {
        packets: of(abi::PACKETS),
        bytes: of(abi::BYTES),
    }
}

fn tuple(bytes: &[u8]) -> Option<Tuple> {
    let (mut source, mut destination) = (None, None);
    let (mut protocol, mut source_port, mut destination_port) = (None, 0, 0);
    for (kind, contents, _) in attributes(bytes) {
        for (inner, value, _) in attributes(contents) {
            match (kind, inner) {
                // IPv4 source and destination are 1 and 2, IPv6 ones 3 and 4.
                (abi::TUPLE_IP, 1 | 3) => source = address(value),
                (abi::TUPLE_IP, 2 | 4) => destination = address(value),
                (abi::TUPLE_PROTO, abi::PROTO_NUM) => protocol = value.first().copied(),
                (
                    abi::TUPLE_PROTO,
                    abi::PROTO_SRC_PORT | abi::PROTO_ICMP_ID | abi::PROTO_ICMPV6_ID,
                ) => source_port = port(value)?,
                (abi::TUPLE_PROTO, abi::PROTO_DST_PORT) => destination_port = port(value)?,
                _ => {}
            }
        }
    }
    Some(Tuple {
        source: source?,
        destination: destination?,
        protocol: protocol?,
        source_port,
        destination_port,
    })
}

fn port(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
        _ => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
    }
}
