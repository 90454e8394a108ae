//! Who has which address in the lab. All are documentation prefixes (RFC 5737, RFC 3849).

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// An address family.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// The unspecified address.
    pub fn any(self) -> IpAddr {
        ANY.of(self)
    }

    /// `127.0.0.1` or `::1`.
    pub fn loopback(self) -> IpAddr {
        LOOPBACK.of(self)
    }
}

impl fmt::Display for Family {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        })
    }
}

/// The two addresses of one machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pair {
    /// IPv4.
    pub v4: Ipv4Addr,
    /// IPv6.
    pub v6: Ipv6Addr,
}

impl Pair {
    const fn new(v4: [u8; 4], v6: [u16; 8]) -> Self {
        let [a, b, c, d] = v4;
        let [e, f, g, h, i, j, k, l] = v6;
        Self {
            v4: Ipv4Addr::new(a, b, c, d),
            v6: Ipv6Addr::new(e, f, g, h, i, j, k, l),
        }
    }

    /// The one of a family.
    pub const fn of(self, family: Family) -> IpAddr {
        match family {
            Family::V4 => IpAddr::V4(self.v4),
            Family::V6 => IpAddr::V6(self.v6),
        }
    }

    /// The one of a family, with a port.
    pub const fn port(self, family: Family, port: u16) -> SocketAddr {
        SocketAddr::new(self.of(family), port)
    }
}

const ANY: Pair = Pair::new([0; 4], [0; 8]);
const LOOPBACK: Pair = Pair::new([127, 0, 0, 1], [0, 0, 0, 0, 0, 0, 0, 1]);

/// The machine at the other end of the host's uplink.
pub const OUTSIDE: Pair = Pair::new([192, 0, 2, 1], [0x2001, 0xdb8, 1, 0, 0, 0, 0, 1]);
/// The host, on its uplink.
pub const HOST: Pair = Pair::new([192, 0, 2, 2], [0x2001, 0xdb8, 1, 0, 0, 0, 0, 2]);
/// The same remote machine by an address that only the default route leads to.
pub const FAR: Pair = Pair::new([198, 51, 100, 1], [0x2001, 0xdb8, 0xf, 0, 0, 0, 0, 1]);
/// The machine at the other end of the second uplink.
pub const OUTSIDE2: Pair = Pair::new([203, 0, 113, 1], [0x2001, 0xdb8, 2, 0, 0, 0, 0, 1]);
/// The host, on its second uplink.
pub const HOST2: Pair = Pair::new([203, 0, 113, 2], [0x2001, 0xdb8, 2, 0, 0, 0, 0, 2]);
/// The host, on the network behind it.
pub const LAN_HOST: Pair = Pair::new([10, 77, 0, 1], [0xfd77, 0, 0, 0, 0, 0, 0, 1]);
/// A server there.
pub const LAN_SERVER: Pair = Pair::new([10, 77, 0, 5], [0xfd77, 0, 0, 0, 0, 0, 0, 5]);
/// A client there.
pub const LAN_CLIENT: Pair = Pair::new([10, 77, 0, 7], [0xfd77, 0, 0, 0, 0, 0, 0, 7]);
