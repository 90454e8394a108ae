//! A packet that somebody asks about.

use super::{Invalid, Problem, parse_ip};
use etherparse::PacketBuilder;
use nucnet_common::abi::Mac;
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    str::FromStr,
};

/// Time to live of the packet, as most systems send it.
const TTL: u8 = 64;

/// What it carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Payload {
    /// The first segment of a TCP connection.
    Tcp,
    /// A UDP datagram.
    Udp,
    /// An echo request of ICMP or ICMPv6.
    Icmp,
}

impl Payload {
    /// The name that rules have for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
            Self::Icmp => "icmp",
        }
    }
}

impl fmt::Display for Payload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// `ADDR[:PORT]`; IPv6 in brackets where there is a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Side {
    /// The address.
    pub address: IpAddr,
    /// The port.
    pub port: Option<u16>,
}

impl FromStr for Side {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        if let Ok(both) = text.parse::<SocketAddr>() {
            return Ok(Self {
                address: both.ip().to_canonical(),
                port: Some(both.port()),
            });
        }
        let bare = text
            .strip_prefix('[')
            .and_then(|text| text.strip_suffix(']'));
        match parse_ip("", bare.unwrap_or(text)) {
            Ok(address) if bare.is_none() || address.is_ipv6() => Ok(Self {
                address,
                port: None,
            }),
            _ => Err(Invalid::new("", text, Problem::Address)),
        }
    }
}

/// A packet. Of an echo request, the source port is the identifier.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// What it carries.
    pub payload: Payload,
    /// Where it comes from.
    pub source: SocketAddr,
    /// Where it goes.
    pub destination: SocketAddr,
}

impl Probe {
    /// The Ethernet frame that it is in. `None`: the addresses are not of one family.
    pub fn frame(&self, from: Mac, to: Mac) -> Option<Vec<u8>> {
        let ethernet = PacketBuilder::ethernet2(from, to);
        let (sport, dport) = (self.source.port(), self.destination.port());
        let (ip, is_v4) = match (self.source.ip(), self.destination.ip()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                (ethernet.ipv4(from.octets(), to.octets(), TTL), true)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                (ethernet.ipv6(from.octets(), to.octets(), TTL), false)
            }
            _ => return None,
        };
        let mut frame = Vec::new();
        let written = match (self.payload, is_v4) {
            (Payload::Tcp, _) => ip
                .tcp(sport, dport, 1, u16::MAX)
                .syn()
                .write(&mut frame, &[]),
            (Payload::Udp, _) => ip.udp(sport, dport).write(&mut frame, &[]),
            (Payload::Icmp, true) => ip.icmpv4_echo_request(sport, 1).write(&mut frame, &[]),
            (Payload::Icmp, false) => ip.icmpv6_echo_request(sport, 1).write(&mut frame, &[]),
        };
        written.ok().map(|()| frame)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_are_read_as_people_write_them() {
        let side = |text: &str| {
            text.parse::<Side>()
                .ok()
                .map(|s| (s.address.to_string(), s.port))
        };
        assert_eq!(side("10.0.0.1"), Some(("10.0.0.1".into(), None)));
        assert_eq!(side("10.0.0.1:80"), Some(("10.0.0.1".into(), Some(80))));
        assert_eq!(side("fd00::1"), Some(("fd00::1".into(), None)));
        assert_eq!(side("[fd00::1]"), Some(("fd00::1".into(), None)));
        assert_eq!(side("[fd00::1]:80"), Some(("fd00::1".into(), Some(80))));
        for bad in [
            "",
            "a",
            "10.0.0.1:",
            "10.0.0.1:70000",
            "[10.0.0.1]",
            "[fd00::1]80",
        ] {
            assert_eq!(side(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn families_do_not_mix() {
        let probe = Probe {
            payload: Payload::Tcp,
            source: "10.0.0.1:1".parse().unwrap(),
            destination: "[fd00::1]:80".parse().unwrap(),
        };
        assert_eq!(probe.frame([2; 6], [4; 6]), None);
    }
}
