//! Publishes: port forwards from the host's addresses to an endpoint.

use super::{
    Invalid, Problem,
    address::{any_like, to_abi},
    ports::{PortRange, parse_port},
};
use nucnet_common::abi;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// What can be published.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

impl Protocol {
    /// The IP protocol number.
    pub fn number(self) -> u8 {
        match self {
            Self::Tcp => 6,
            Self::Udp => 17,
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tcp => "tcp",
            Self::Udp => "udp",
        })
    }
}

/// Which addresses of the host a publish is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum HostAddress {
    /// Every local address, in each family that the endpoint has.
    Any,
    /// Every local IPv4 address.
    AnyV4,
    /// Every local IPv6 address.
    AnyV6,
    /// That one.
    One(IpAddr),
}

impl HostAddress {
    /// Whether some address is meant by both.
    pub fn overlaps(self, other: Self) -> bool {
        match (self, other) {
            (Self::One(a), Self::One(b)) => a == b,
            (a, b) => (a.v4() && b.v4()) || (a.v6() && b.v6()),
        }
    }

    /// Whether IPv4 addresses are meant.
    pub fn v4(self) -> bool {
        matches!(self, Self::Any | Self::AnyV4 | Self::One(IpAddr::V4(_)))
    }

    /// Whether IPv6 addresses are meant.
    pub fn v6(self) -> bool {
        matches!(self, Self::Any | Self::AnyV6 | Self::One(IpAddr::V6(_)))
    }

    /// As the JSON shows it: none for any.
    pub fn shown(self) -> Option<IpAddr> {
        match self {
            Self::Any => None,
            Self::AnyV4 => Some(Ipv4Addr::UNSPECIFIED.into()),
            Self::AnyV6 => Some(Ipv6Addr::UNSPECIFIED.into()),
            Self::One(address) => Some(address),
        }
    }

    fn new(address: IpAddr) -> Option<Self> {
        match address {
            IpAddr::V4(v4) if v4.is_unspecified() => Some(Self::AnyV4),
            IpAddr::V6(v6) if v6.is_unspecified() => Some(Self::AnyV6),
            IpAddr::V4(v4) if v4.is_multicast() || v4.is_broadcast() || v4.is_link_local() => None,
            IpAddr::V6(v6) if v6.is_multicast() || v6.is_unicast_link_local() => None,
            address => Some(Self::One(address)),
        }
    }
}

impl fmt::Display for HostAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.shown() {
            None => f.write_str("*"),
            Some(IpAddr::V4(v4)) => v4.fmt(f),
            Some(IpAddr::V6(v6)) => write!(f, "[{v6}]"),
        }
    }
}

/// `[HOST_IP:]HOST_PORT[-END]:PORT[-END][/tcp|udp]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PublishSpec {
    host: HostAddress,
    /// First host port; 0: choose.
    host_port: u16,
    /// The endpoint's ports, as many as there are host ports.
    ports: PortRange,
    protocol: Protocol,
}

impl PublishSpec {
    /// Ports of the host that lead to the same ports.
    pub(super) fn of(host: HostAddress, ports: PortRange, protocol: Protocol) -> Self {
        Self {
            host,
            host_port: ports.first(),
            ports,
            protocol,
        }
    }

    /// Which addresses of the host.
    pub fn host(&self) -> HostAddress {
        self.host
    }

    /// The host ports; none: to be chosen.
    pub fn host_ports(&self) -> Option<PortRange> {
        if self.host_port == 0 {
            return None;
        }
        let span = self.ports.last() - self.ports.first();
        PortRange::new(self.host_port, self.host_port + span)
    }

    /// The endpoint's ports.
    pub fn ports(&self) -> PortRange {
        self.ports
    }

    /// The protocol.
    pub fn protocol(&self) -> Protocol {
        self.protocol
    }

    /// The same with its host ports chosen: those from `first` on. None if there are not as
    /// many.
    #[must_use]
    pub fn with_host_port(self, first: u16) -> Option<Self> {
        let span = self.ports.last() - self.ports.first();
        first.checked_add(span)?;
        Some(Self {
            host_port: first,
            ..self
        })
    }

    /// The same with "any address" narrowed to the families that an endpoint has: two endpoints
    /// of different families may publish the same port.
    #[must_use]
    pub fn narrowed(self, v4: bool, v6: bool) -> Self {
        let host = match (self.host, v4, v6) {
            (HostAddress::Any, true, false) => HostAddress::AnyV4,
            (HostAddress::Any, false, true) => HostAddress::AnyV6,
            (host, ..) => host,
        };
        Self { host, ..self }
    }

    /// Whether a packet could be meant for both. A publish whose port is yet to be chosen
    /// overlaps nothing.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.protocol == other.protocol
            && self.host.overlaps(other.host)
            && matches!((self.host_ports(), other.host_ports()), (Some(a), Some(b)) if a.overlaps(b))
    }

    /// The publishes of one command: each once, none overlapping another.
    pub fn check_all(specs: &[Self]) -> Result<Vec<Self>, Invalid> {
        let mut kept: Vec<Self> = Vec::with_capacity(specs.len());
        for spec in specs {
            // To ask twice for a port of nucnet's choice is to ask for two.
            if spec.host_port != 0 && kept.contains(spec) {
                continue;
            }
            if let Some(other) = kept.iter().find(|other| other.overlaps(spec)) {
                return Err(Invalid::new(
                    "-p",
                    spec,
                    Problem::Overlaps(format!("-p {other}")),
                ));
            }
            kept.push(*spec);
        }
        Ok(kept)
    }

    /// The entries of the map `publishes`, for an endpoint with these families: length of the
    /// key in bits, key, value. Of a publish whose port is yet to be chosen: none.
    pub fn entries(
        &self,
        owner: abi::Owner,
        v4: bool,
        v6: bool,
    ) -> Vec<(u32, abi::PublishKey, abi::Publish)> {
        let Some(host_ports) = self.host_ports() else {
            return Vec::new();
        };
        let mut addresses = Vec::with_capacity(2);
        match self.host {
            HostAddress::One(address) => addresses.push(to_abi(address)),
            any => {
                if any.v4() && v4 {
                    addresses.push(abi::ANY_V4);
                }
                if any.v6() && v6 {
                    addresses.push(abi::ANY_V6);
                }
            }
        }
        let value = abi::Publish {
            link: owner.link,
            endpoint: owner.endpoint,
            host_port: host_ports.first(),
            port: self.ports.first(),
            mapping: 0,
        };
        let mut entries = Vec::new();
        for address in addresses {
            for prefix in host_ports.prefixes() {
                let bits = abi::PublishKey::BITS - 16 + u32::from(prefix.length);
                let key = |address, kind| abi::PublishKey {
                    address,
                    protocol: self.protocol.number(),
                    kind: kind as u8,
                    port: prefix.first.to_be_bytes(),
                };
                entries.push((bits, key(address, abi::PublishUse::Packets), value));
                if let HostAddress::One(one) = self.host {
                    entries.push((bits, key(any_like(one), abi::PublishUse::Held), value));
                }
            }
        }
        entries
    }

    /// Whether an endpoint with these families can be published so.
    pub fn check_families(&self, v4: bool, v6: bool) -> Result<(), Invalid> {
        if (self.host.v4() && v4) || (self.host.v6() && v6) {
            Ok(())
        } else {
            Err(Invalid::new("-p", self, Problem::NoAddressOfFamily))
        }
    }
}

impl FromStr for PublishSpec {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = |problem| Invalid::new("-p", text, problem);
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Protocol::Tcp),
            Some((rest, "udp")) => (rest, Protocol::Udp),
            Some((_, other)) => return Err(invalid(Problem::PublishProtocol(other.to_owned()))),
            None => (text, Protocol::Tcp),
        };
        let (rest, inside) = rest
            .rsplit_once(':')
            .ok_or_else(|| invalid(Problem::Publish))?;
        let (address, outside) = match rest.rsplit_once(':') {
            Some((address, outside)) => (Some(address), outside),
            None => (None, rest),
        };
        let host = match address {
            None => HostAddress::Any,
            Some(address) => {
                let bare = address
                    .strip_prefix('[')
                    .and_then(|rest| rest.strip_suffix(']'));
                let parsed: IpAddr = bare.unwrap_or(address).parse().map_err(|_| {
                    invalid(if address.contains('[') {
                        Problem::Address
                    } else {
                        Problem::Publish
                    })
                })?;
                match (bare, parsed) {
                    (Some(_), IpAddr::V4(_)) => return Err(invalid(Problem::BracketsAreForV6)),
                    (None, IpAddr::V6(_)) => return Err(invalid(Problem::NeedsBrackets)),
                    _ => HostAddress::new(parsed.to_canonical())
                        .ok_or_else(|| invalid(Problem::HostAddress))?,
                }
            }
        };
        let range = |text: &str, lowest: u16, problem: fn(String) -> Problem| {
            let port = |text: &str| {
                parse_port(text)
                    .filter(|port| *port >= lowest)
                    .ok_or_else(|| invalid(problem(text.to_owned())))
            };
            match text.split_once('-') {
                // Port 0 chooses; a range cannot begin with it.
                Some((first, last)) => PortRange::new(
                    port(first)?
                        .checked_sub(1)
                        .ok_or_else(|| invalid(problem(first.to_owned())))?
                        + 1,
                    port(last)?,
                )
                .ok_or_else(|| invalid(Problem::RangeBackwards)),
                None => Ok(PortRange::one(port(text)?)),
            }
        };
        let outside = range(outside, 0, Problem::Port)?;
        let ports = range(inside, 1, Problem::ContainerPort)?;
        if outside.first() != 0 && outside.count() != ports.count() {
            return Err(invalid(Problem::RangesDiffer(
                outside.count(),
                ports.count(),
            )));
        }
        Ok(Self {
            host,
            host_port: outside.first(),
            ports,
            protocol,
        })
    }
}

impl TryFrom<String> for PublishSpec {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<PublishSpec> for String {
    fn from(spec: PublishSpec) -> Self {
        spec.to_string()
    }
}

impl fmt::Display for PublishSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.host != HostAddress::Any {
            write!(f, "{}:", self.host)?;
        }
        match self.host_ports() {
            Some(ports) => write!(f, "{ports}")?,
            None => write!(f, "0")?,
        }
        write!(f, ":{}/{}", self.ports, self.protocol)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn spec(text: &str) -> PublishSpec {
        text.parse().unwrap_or_else(|error| panic!("{error}"))
    }

    #[test]
    fn the_grammar_of_the_contract_is_accepted() {
        for (text, shown) in [
            ("8080:80", "8080:80/tcp"),
            ("8080:80/udp", "8080:80/udp"),
            ("0:80", "0:80/tcp"),
            ("0:80-89", "0:80-89/tcp"),
            ("127.0.0.1:8080:80", "127.0.0.1:8080:80/tcp"),
            ("0.0.0.0:8080:80", "0.0.0.0:8080:80/tcp"),
            ("[::]:8080:80", "[::]:8080:80/tcp"),
            ("[::1]:5353:53/udp", "[::1]:5353:53/udp"),
            (
                "[2001:DB8::1]:8000-8009:80-89",
                "[2001:db8::1]:8000-8009:80-89/tcp",
            ),
            ("[::ffff:10.0.0.1]:1:1", "10.0.0.1:1:1/tcp"),
            ("1-65535:1-65535/udp", "1-65535:1-65535/udp"),
        ] {
            assert_eq!(spec(text).to_string(), shown);
            assert_eq!(spec(shown), spec(text));
        }
    }

    #[test]
    fn what_is_not_a_publish_is_refused_with_its_reason() {
        for (text, problem) in [
            ("", Problem::Publish),
            ("80", Problem::Publish),
            ("8080:80/sctp", Problem::PublishProtocol("sctp".into())),
            ("8080:80/TCP", Problem::PublishProtocol("TCP".into())),
            ("8080:0", Problem::ContainerPort("0".into())),
            ("8080:", Problem::ContainerPort("".into())),
            (":80", Problem::Port("".into())),
            ("65536:80", Problem::Port("65536".into())),
            ("+80:80", Problem::Port("+80".into())),
            ("80:65536", Problem::ContainerPort("65536".into())),
            ("0-5:80-85", Problem::Port("0".into())),
            ("90-80:90-80", Problem::RangeBackwards),
            ("80-90:80", Problem::RangesDiffer(11, 1)),
            ("80:80-90", Problem::RangesDiffer(1, 11)),
            ("::1:80:80", Problem::NeedsBrackets),
            ("[10.0.0.1]:80:80", Problem::BracketsAreForV6),
            ("[::1:80:80", Problem::Address),
            ("example.org:80:80", Problem::Publish),
            ("10.0.0.256:80:80", Problem::Publish),
            ("224.0.0.1:80:80", Problem::HostAddress),
            ("255.255.255.255:80:80", Problem::HostAddress),
            ("[fe80::1]:80:80", Problem::HostAddress),
            ("[ff02::1]:80:80", Problem::HostAddress),
        ] {
            let error = text.parse::<PublishSpec>().expect_err(text);
            assert_eq!(error.problem, problem, "{text:?}");
            assert_eq!((error.field, error.value.as_str()), ("-p", text));
        }
    }

    #[test]
    fn publishes_overlap_where_a_packet_could_be_meant_for_both() {
        for (a, b, overlap) in [
            ("80:80", "80:81", true),
            ("80:80", "80:80/udp", false),
            ("80:80", "127.0.0.1:80:80", true),
            ("0.0.0.0:80:80", "127.0.0.1:80:80", true),
            ("[::]:80:80", "127.0.0.1:80:80", false),
            ("0.0.0.0:80:80", "[::]:80:80", false),
            ("127.0.0.1:80:80", "127.0.0.2:80:80", false),
            ("70-90:70-90", "80:80", true),
            ("70-79:70-79", "80:80", false),
            ("0:80", "0:80", false),
        ] {
            assert_eq!(spec(a).overlaps(&spec(b)), overlap, "{a} {b}");
            assert_eq!(spec(b).overlaps(&spec(a)), overlap, "{b} {a}");
        }
    }

    #[test]
    fn a_command_publishes_each_port_once() {
        let all = |texts: &[&str]| {
            PublishSpec::check_all(&texts.iter().map(|text| spec(text)).collect::<Vec<_>>())
        };
        assert_eq!(all(&["80:80", "80:80/tcp", "81:80"]).unwrap().len(), 2);
        assert_eq!(all(&["0:80", "0:80"]).unwrap().len(), 2);
        assert!(all(&["80:80", "127.0.0.1:80:81"]).is_err());
    }

    #[test]
    fn entries_are_for_the_families_that_the_endpoint_has() {
        let owner = abi::Owner {
            link: 7,
            endpoint: 9,
        };
        assert_eq!(spec("80:80").entries(owner, true, true).len(), 2);
        assert_eq!(
            spec("80:80").entries(owner, false, true)[0].1.address,
            abi::ANY_V6
        );
        // The one address takes packets; under "any" it keeps sockets of the host's away.
        let one = spec("127.0.0.1:80:80").entries(owner, true, true);
        let uses: Vec<_> = one.iter().map(|(_, key, _)| key.kind).collect();
        assert_eq!(
            uses,
            [abi::PublishUse::Packets, abi::PublishUse::Held].map(|kind| kind as u8)
        );
        assert_eq!(one[1].1.address, abi::ANY_V4);
        assert_eq!(spec("0:80").entries(owner, true, true).len(), 0);
        let [(bits, key, value)] = spec("8000-8063:80-143/udp").entries(owner, true, false)[..]
        else {
            panic!("one block")
        };
        assert_eq!((bits, key.protocol, key.port), (160 - 6, 17, [0x1f, 0x40]));
        assert_eq!(
            (value.link, value.endpoint, value.host_port, value.port),
            (7, 9, 8000, 80)
        );
        assert!(spec("127.0.0.1:80:80").check_families(false, true).is_err());
        assert!(spec("80:80").check_families(false, true).is_ok());
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_round_trips(text in "[\\[\\]:0-9./a-f-]{0,30}") {
            if let Ok(spec) = text.parse::<PublishSpec>() {
                prop_assert_eq!(spec.to_string().parse::<PublishSpec>().unwrap(), spec);
            }
        }
    }
}
