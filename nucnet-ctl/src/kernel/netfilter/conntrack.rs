//! The kernel's table of connections (`nf_conntrack`, by nfnetlink), that of the calling thread's
//! network namespace.

mod adopted;
mod events;

use std::{
    io,
    net::{IpAddr, Ipv6Addr},
};

use nix::{errno::Errno, libc};

use super::nfnetlink::{Request, Socket, attributes, inner, kind, long, number, short};
use crate::{
    kernel::fault::{self, Operation},
    model::netfilter::Tuple,
};

pub use adopted::Adopted;
use adopted::{described, write_tuple};
pub use events::{ConnectionChange, ConnectionEvents};

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
    /// What the kernel has of a connection that it adopted.
    #[cfg(test)]
    pub(crate) fn of(adopted: &Adopted) -> Self {
        let (family, name) = described(adopted);
        Self {
            original: adopted.original,
            reply: adopted.reply,
            id: 1,
            is_answered: adopted.is_answered,
            tcp: adopted.tcp,
            sent: Count::default(),
            answered: Count::default(),
            start: None,
            expires: adopted.expires,
            name,
            family,
        }
    }

    /// Whether an address or a port is another one on the way.
    pub fn is_translated(&self) -> bool {
        self.reply != self.original.turned()
    }

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

    fn number(self, is_answered: bool) -> u8 {
        match (self, is_answered) {
            // `SYN_SENT` and `SYN_RECV`.
            (Self::Opening, false) => 1,
            (Self::Opening, true) => 2,
            (Self::Established, _) => 3,
            // `FIN_WAIT`.
            (Self::Closing, _) => 4,
            // `CLOSE`.
            (Self::Closed, _) => 8,
        }
    }
}

/// linux/netfilter/nfnetlink.h and nfnetlink_conntrack.h.
mod abi {
    pub(super) const SUBSYSTEM: u16 = 1;
    pub(super) const NEW: u16 = 0;
    pub(super) const GET: u16 = 1;
    pub(super) const DELETE: u16 = 2;
    pub(super) const TUPLE_ORIG: u16 = 1;
    pub(super) const TUPLE_REPLY: u16 = 2;
    pub(super) const STATUS: u16 = 3;
    pub(super) const PROTOINFO: u16 = 4;
    pub(super) const NAT_SRC: u16 = 6;
    pub(super) const TIMEOUT: u16 = 7;
    pub(super) const COUNTERS_ORIG: u16 = 9;
    pub(super) const COUNTERS_REPLY: u16 = 10;
    pub(super) const ID: u16 = 12;
    pub(super) const NAT_DST: u16 = 13;
    pub(super) const ZONE: u16 = 18;
    pub(super) const TIMESTAMP: u16 = 20;
    pub(super) const PROTOINFO_TCP: u16 = 1;
    pub(super) const TCP_STATE: u16 = 1;
    pub(super) const TCP_FLAGS: [u16; 2] = [4, 5];
    /// `IP_CT_TCP_FLAG_BE_LIBERAL`: its windows are unknown.
    pub(super) const TCP_LIBERAL: u8 = 8;
    pub(super) const PACKETS: u16 = 1;
    pub(super) const BYTES: u16 = 2;
    pub(super) const START: u16 = 1;
    /// `IPS_SEEN_REPLY`.
    pub(super) const SEEN_REPLY: u32 = 2;
    /// `IPS_ASSURED`: not the first to go when the table is full.
    pub(super) const ASSURED: u32 = 4;
    /// `IPS_CONFIRMED`: in the table.
    pub(super) const CONFIRMED: u32 = 8;
    pub(super) const TUPLE_IP: u16 = 1;
    pub(super) const TUPLE_PROTO: u16 = 2;
    pub(super) const PROTO_NUM: u16 = 1;
    pub(super) const PROTO_SRC_PORT: u16 = 2;
    pub(super) const PROTO_DST_PORT: u16 = 3;
    pub(super) const PROTO_ICMP_ID: u16 = 4;
    pub(super) const PROTO_ICMPV6_ID: u16 = 7;
    /// Smallest and largest address, of IPv4 and of IPv6.
    pub(super) const NAT_ADDRESSES: [[u16; 2]; 2] = [[1, 2], [4, 5]];
    pub(super) const NAT_PROTO: u16 = 3;
    /// Smallest and largest port.
    pub(super) const NAT_PORTS: [u16; 2] = [1, 2];
}

/// A socket to the table.
#[derive(Debug)]
pub struct Conntrack(Socket);

impl Conntrack {
    /// That of the calling thread's namespace.
    pub fn open() -> io::Result<Self> {
        Socket::open().map(Self)
    }

    /// All connections of both families. A kernel that tracks none has none.
    pub fn list(&self) -> io::Result<Vec<Tracked>> {
        let mut all = Vec::new();
        for family in [libc::AF_INET, libc::AF_INET6] {
            let request = request(abi::GET, libc::NLM_F_DUMP, family as u8, &[]);
            self.0.ask(&request, |message| {
                all.extend(tracked(message.family, message.contents));
            })?;
        }
        Ok(all)
    }

    /// What a connection is like now; none: it is gone.
    pub fn look(&self, known: &Tracked) -> io::Result<Option<Tracked>> {
        let mut found = None;
        let request = request(abi::GET, libc::NLM_F_ACK, known.family, &known.name);
        let answer = self.0.ask(&request, |message| {
            found = tracked(message.family, message.contents);
        });
        unless_gone(answer)?;
        Ok(found)
    }

    /// Forgets a connection; one that is gone is fine.
    pub fn forget(&self, tracked: &Tracked) -> io::Result<()> {
        fault::before(Operation::Netlink)?;
        unless_gone(self.change(abi::DELETE, 0, tracked.family, &tracked.name))
    }

    fn change(&self, number: u16, flags: i32, family: u8, attributes: &[u8]) -> io::Result<()> {
        self.0.change(request(number, flags, family, attributes))
    }

    /// Has the kernel track a connection, by TCP or UDP, with the translation that it has. Whatever
    /// the kernel made of its packets so far is forgotten, unless nothing is translated.
    pub fn adopt(&self, adopted: &Adopted) -> io::Result<()> {
        fault::before(Operation::Netlink)?;
        let (family, attributes) = described(adopted);
        let exists = Some(Errno::EEXIST as i32);
        let create = libc::NLM_F_CREATE | libc::NLM_F_EXCL;
        match self.change(abi::NEW, create, family, &attributes) {
            Err(error) if error.raw_os_error() == exists => {}
            created => return created,
        }
        if adopted.reply == adopted.original.turned() {
            return Ok(());
        }
        let mut name = Vec::new();
        write_tuple(&mut name, abi::TUPLE_ORIG, &adopted.original);
        unless_gone(self.change(abi::DELETE, 0, family, &name))?;
        self.change(abi::NEW, create, family, &attributes)
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
}

fn request(number: u16, flags: i32, family: u8, attributes: &[u8]) -> Request<'_> {
    Request {
        kind: kind(abi::SUBSYSTEM, number),
        flags,
        family,
        resource: 0,
        attributes,
    }
}

/// What is gone is fine.
fn unless_gone(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.raw_os_error() == Some(Errno::ENOENT as i32) => Ok(()),
        result => result,
    }
}

/// A connection by its attributes.
fn tracked(family: u8, bytes: &[u8]) -> Option<Tracked> {
    let (mut original, mut reply, mut name) = (None, None, Vec::new());
    let (mut id, mut expires, mut is_answered) = (0, 0, false);
    let (mut tcp, mut start) = (None, None);
    let (mut sent, mut answered) = (Count::default(), Count::default());
    for (kind, contents, whole) in attributes(bytes) {
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
        family,
    })
}

fn count(bytes: &[u8]) -> Count {
    let of = |kind| inner(bytes, kind).and_then(long).unwrap_or_default();
    Count {
        packets: of(abi::PACKETS),
        bytes: of(abi::BYTES),
    }
}

pub(super) fn tuple(bytes: &[u8]) -> Option<Tuple> {
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
                ) => source_port = short(value)?,
                (abi::TUPLE_PROTO, abi::PROTO_DST_PORT) => destination_port = short(value)?,
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

fn address(bytes: &[u8]) -> Option<IpAddr> {
    match bytes.len() {
        4 => Some(IpAddr::from(*bytes.first_chunk::<4>()?)),
        _ => Some(Ipv6Addr::from(*bytes.first_chunk::<16>()?).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn between(from: (&str, u16), to: (&str, u16)) -> Tuple {
        Tuple {
            source: from.0.parse().expect("address"),
            destination: to.0.parse().expect("address"),
            protocol: 6,
            source_port: from.1,
            destination_port: to.1,
        }
    }

    #[test]
    fn what_the_kernel_is_told_is_what_it_would_tell() {
        for (inside, outside, host) in [
            ("10.0.42.2", "192.0.2.1", "192.0.2.2"),
            ("fd00::2", "2001:db8::1", "2001:db8::2"),
        ] {
            let adopted = Adopted {
                original: between((inside, 40_000), (outside, 443)),
                reply: between((outside, 443), (host, 20_000)),
                is_answered: true,
                tcp: Some(TcpState::Established),
                expires: 7440,
            };
            let (family, attributes) = described(&adopted);
            let told = tracked(family, &attributes).expect("a connection");
            assert_eq!(told.original, adopted.original);
            // The kernel translates it by what else it is told.
            assert_eq!(told.reply, adopted.original.turned());
            assert_eq!((told.tcp, told.is_answered), (adopted.tcp, true));
            assert_eq!(told.expires, 7440);
        }
    }

    #[test]
    fn only_what_differs_is_translated() {
        let original = between(("192.0.2.1", 5000), ("192.0.2.2", 8080));
        let published = Adopted {
            original,
            reply: between(("10.0.42.2", 80), ("192.0.2.1", 5000)),
            is_answered: false,
            tcp: Some(TcpState::Opening),
            expires: 240,
        };
        let has = |adopted: &Adopted| {
            let (_, bytes) = described(adopted);
            let kinds: Vec<u16> = attributes(&bytes).map(|(kind, ..)| kind).collect();
            [abi::NAT_DST, abi::NAT_SRC].map(|kind| kinds.contains(&kind))
        };
        assert_eq!(has(&published), [true, false]);
        let direct = Adopted {
            reply: original.turned(),
            ..published
        };
        assert_eq!(has(&direct), [false, false]);
    }
}
