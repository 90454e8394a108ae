//! Static mappings: NAT rules that belong to no endpoint.

use super::{
    Cidr, IfName, Invalid, Problem,
    address::{any_like, to_abi},
    ports::{PortRange, parse_port},
    publish::{HostAddress, Protocol, PublishSpec},
};
use nucnet_common::abi;
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr, str::FromStr};

/// Most ranges in a list of ports.
const MOST_RANGES: usize = 1024;

/// Ports and ranges of ports: at least one, in ascending order, none in two ranges.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PortList(Vec<PortRange>);

impl PortList {
    /// The ranges, in ascending order.
    pub fn ranges(&self) -> &[PortRange] {
        &self.0
    }

    /// The only range; none if there are several.
    pub fn only(&self) -> Option<PortRange> {
        match self.0[..] {
            [range] => Some(range),
            _ => None,
        }
    }

    /// Whether the two have a port in common.
    pub fn overlaps(&self, range: PortRange) -> bool {
        self.0.iter().any(|own| own.overlaps(range))
    }
}

impl FromStr for PortList {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = |problem| Invalid::new("--ports", text, problem);
        let port = |text: &str| {
            parse_port(text)
                .filter(|port| *port > 0)
                .ok_or_else(|| invalid(Problem::MappedPort(text.to_owned())))
        };
        let mut ranges = Vec::new();
        for part in text.split(',') {
            ranges.push(match part.split_once('-') {
                Some((first, last)) => PortRange::new(port(first)?, port(last)?)
                    .ok_or_else(|| invalid(Problem::RangeBackwards))?,
                None => PortRange::one(port(part)?),
            });
        }
        if ranges.len() > MOST_RANGES {
            return Err(invalid(Problem::TooManyRanges(MOST_RANGES)));
        }
        ranges.sort_unstable();
        for pair in ranges.windows(2) {
            if pair[0].overlaps(pair[1]) {
                return Err(invalid(Problem::PortsOverlap(pair[1].to_string())));
            }
        }
        // Written differently, the same ports are the same mapping.
        let mut joined: Vec<PortRange> = Vec::new();
        for range in ranges {
            match joined.last_mut() {
                Some(last) if last.last() + 1 == range.first() => {
                    *last = PortRange::new(last.first(), range.last()).unwrap_or(range);
                }
                _ => joined.push(range),
            }
        }
        Ok(Self(joined))
    }
}

impl TryFrom<String> for PortList {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<PortList> for String {
    fn from(list: PortList) -> Self {
        list.to_string()
    }
}

impl fmt::Display for PortList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, range) in self.0.iter().enumerate() {
            write!(f, "{}{range}", if index > 0 { "," } else { "" })?;
        }
        Ok(())
    }
}

/// A static mapping as it was asked for. The constructors are the only way to one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "lowercase")]
pub enum MappingSpec {
    /// Ports of an external address lead to an internal one.
    Dnat {
        /// The external address.
        ext_ip: IpAddr,
        /// Its ports.
        ports: PortList,
        /// Protocol.
        protocol: Protocol,
        /// The internal address.
        int_ip: IpAddr,
        /// The internal port for the first of the ports; none: the same ports.
        int_port: Option<u16>,
        /// Only what comes in by this interface.
        ext_if: Option<IfName>,
    },
    /// Internal addresses leave as an external one.
    Snat {
        /// The internal addresses.
        int: Cidr,
        /// The external address.
        ext_ip: IpAddr,
        /// Only what leaves by this interface.
        ext_if: Option<IfName>,
    },
    /// Clients near the internal address reach it by the external one.
    Hairpin {
        /// The external address.
        ext_ip: IpAddr,
        /// The internal address.
        int_ip: IpAddr,
        /// The ports, of both.
        ports: PortList,
        /// Protocol.
        protocol: Protocol,
        /// Where the clients are; none: the subnet of this host that the internal address is in.
        lan: Option<Cidr>,
    },
}

impl MappingSpec {
    /// Ports of an external address lead to an internal one.
    pub fn dnat(
        ext_ip: IpAddr,
        ports: PortList,
        protocol: Protocol,
        int_ip: IpAddr,
        int_port: Option<u16>,
        ext_if: Option<IfName>,
    ) -> Result<Self, Invalid> {
        check_pair(ext_ip, int_ip)?;
        let int_port = match (int_port, ports.only()) {
            (None, _) => None,
            (Some(port), None) => {
                return Err(Invalid::new("--int-port", port, Problem::SeveralRanges));
            }
            (Some(0), _) => {
                return Err(Invalid::new(
                    "--int-port",
                    0,
                    Problem::MappedPort("0".to_owned()),
                ));
            }
            (Some(port), Some(range)) => {
                if u32::from(port) + range.count() > 0x1_0000 {
                    let problem = Problem::RangeTooHigh(range.count());
                    return Err(Invalid::new("--int-port", port, problem));
                }
                (port != range.first()).then_some(port)
            }
        };
        Ok(Self::Dnat {
            ext_ip,
            ports,
            protocol,
            int_ip,
            int_port,
            ext_if,
        })
    }

    /// Internal addresses leave as an external one.
    pub fn snat(int: Cidr, ext_ip: IpAddr, ext_if: Option<IfName>) -> Result<Self, Invalid> {
        check_external(ext_ip)?;
        if int.net().addr().is_ipv4() != ext_ip.is_ipv4() {
            return Err(Invalid::new("--int", int, Problem::OtherFamily(ext_ip)));
        }
        Ok(Self::Snat {
            int,
            ext_ip,
            ext_if,
        })
    }

    /// Clients near the internal address reach it by the external one.
    pub fn hairpin(
        ext_ip: IpAddr,
        int_ip: IpAddr,
        ports: PortList,
        protocol: Protocol,
        lan: Option<Cidr>,
    ) -> Result<Self, Invalid> {
        check_pair(ext_ip, int_ip)?;
        if let Some(lan) = lan
            && lan.net().addr().is_ipv4() != ext_ip.is_ipv4()
        {
            return Err(Invalid::new("--lan", lan, Problem::OtherFamily(ext_ip)));
        }
        Ok(Self::Hairpin {
            ext_ip,
            int_ip,
            ports,
            protocol,
            lan,
        })
    }

    /// What kind it is, in one word.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::Dnat { .. } => "dnat",
            Self::Snat { .. } => "snat",
            Self::Hairpin { .. } => "hairpin",
        }
    }

    /// The external address.
    pub fn ext_ip(&self) -> IpAddr {
        match self {
            Self::Dnat { ext_ip, .. }
            | Self::Snat { ext_ip, .. }
            | Self::Hairpin { ext_ip, .. } => *ext_ip,
        }
    }

    /// The target of dnat and hairpin.
    pub fn int_ip(&self) -> Option<IpAddr> {
        match self {
            Self::Dnat { int_ip, .. } | Self::Hairpin { int_ip, .. } => Some(*int_ip),
            Self::Snat { .. } => None,
        }
    }

    /// The interface that it is bound to.
    pub fn ext_if(&self) -> Option<&IfName> {
        match self {
            Self::Dnat { ext_if, .. } | Self::Snat { ext_if, .. } => ext_if.as_ref(),
            Self::Hairpin { .. } => None,
        }
    }

    /// Protocol and ports of dnat and hairpin.
    pub fn ports(&self) -> Option<(Protocol, &PortList)> {
        match self {
            Self::Dnat {
                ports, protocol, ..
            }
            | Self::Hairpin {
                ports, protocol, ..
            } => Some((*protocol, ports)),
            Self::Snat { .. } => None,
        }
    }

    /// The external ports as publishes, one for each range, which is how they are claimed.
    pub fn publishes(&self) -> Vec<PublishSpec> {
        let Some((protocol, ports)) = self.ports() else {
            return Vec::new();
        };
        let host = HostAddress::One(self.ext_ip());
        ports
            .ranges()
            .iter()
            .map(|range| PublishSpec::of(host, *range, protocol))
            .collect()
    }

    /// Its entry in the map `mappings`. `lan`: the clients of a hairpin; `link`: index of the
    /// interface that it is bound to.
    pub fn entry(&self, lan: Option<Cidr>, link: u32) -> abi::StaticMapping {
        let (kind, sources) = match self {
            Self::Dnat { .. } => (abi::MappingKind::Dnat, None),
            Self::Snat { int, .. } => (abi::MappingKind::Snat, Some(*int)),
            Self::Hairpin { .. } => (abi::MappingKind::Hairpin, lan),
        };
        abi::StaticMapping {
            kind: kind as u32,
            link,
            external: to_abi(self.ext_ip()),
            internal: self.int_ip().map(to_abi).unwrap_or_default(),
            sources: sources.map(|s| to_abi(s.net().addr())).unwrap_or_default(),
            sources_bits: sources.map_or(0, bits),
            pad: 0,
        }
    }

    /// Its entries in the map `publishes`, or of a hairpin `hairpins`: length of the key in bits,
    /// key, value. The ports of a hairpin are nobody's but its clients', and are not held.
    pub fn port_entries(&self, number: u32) -> Vec<(u32, abi::PublishKey, abi::Publish)> {
        let Some((protocol, ports)) = self.ports() else {
            return Vec::new();
        };
        let inside = match self {
            Self::Dnat { int_port, .. } => *int_port,
            _ => None,
        };
        let mut entries = Vec::new();
        for range in ports.ranges() {
            let value = abi::Publish {
                host_port: range.first(),
                port: inside.unwrap_or(range.first()),
                mapping: number,
                ..abi::Publish::default()
            };
            for prefix in range.prefixes() {
                let bits = abi::PublishKey::BITS - 16 + u32::from(prefix.length);
                let key = |address, kind| abi::PublishKey {
                    address,
                    protocol: protocol.number(),
                    kind: kind as u8,
                    port: prefix.first.to_be_bytes(),
                };
                let address = to_abi(self.ext_ip());
                entries.push((bits, key(address, abi::PublishUse::Packets), value));
                if matches!(self, Self::Dnat { .. }) {
                    let any = any_like(self.ext_ip());
                    entries.push((bits, key(any, abi::PublishUse::Held), value));
                }
            }
        }
        entries
    }

    /// Its keys in the map `snats`, with their lengths in bits: the one that says where it holds,
    /// and the one that says that there is some mapping for the source.
    pub fn source_keys(&self, link: u32) -> Option<[(u32, abi::SnatKey); 2]> {
        let Self::Snat { int, .. } = self else {
            return None;
        };
        let key = |link: u32| {
            let key = abi::SnatKey {
                link: link.to_be_bytes(),
                source: to_abi(int.net().addr()),
            };
            (abi::SnatKey::BITS - 128 + bits(*int), key)
        };
        Some([key(link), key(abi::SnatKey::SOURCES)])
    }
}

/// Length of a prefix in bits of the form that the maps hold.
fn bits(cidr: Cidr) -> u32 {
    let net = cidr.net();
    let mapped = if net.addr().is_ipv4() { 96 } else { 0 };
    mapped + u32::from(net.prefix_len())
}

fn is_unusable(address: IpAddr) -> bool {
    address.is_unspecified()
        || address.is_loopback()
        || address.is_multicast()
        || match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        }
}

fn check_external(ext_ip: IpAddr) -> Result<(), Invalid> {
    match is_unusable(ext_ip) {
        true => Err(Invalid::new("--ext-ip", ext_ip, Problem::MappedAddress)),
        false => Ok(()),
    }
}

fn check_pair(ext_ip: IpAddr, int_ip: IpAddr) -> Result<(), Invalid> {
    check_external(ext_ip)?;
    if is_unusable(int_ip) {
        return Err(Invalid::new("--int-ip", int_ip, Problem::MappedAddress));
    }
    if ext_ip.is_ipv4() != int_ip.is_ipv4() {
        return Err(Invalid::new(
            "--int-ip",
            int_ip,
            Problem::OtherFamily(ext_ip),
        ));
    }
    if ext_ip == int_ip {
        return Err(Invalid::new("--int-ip", int_ip, Problem::MappedToItself));
    }
    Ok(())
}

/// The words of the `nat add` that asks for it.
impl fmt::Display for MappingSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dnat {
                ext_ip,
                ports,
                protocol,
                int_ip,
                int_port,
                ext_if,
            } => {
                write!(
                    f,
                    "dnat --ext-ip {ext_ip} --ports {ports} --proto {protocol} --int-ip {int_ip}"
                )?;
                if let Some(port) = int_port {
                    write!(f, " --int-port {port}")?;
                }
                bound(f, ext_if.as_ref())
            }
            Self::Snat {
                int,
                ext_ip,
                ext_if,
            } => {
                write!(f, "snat --int {int} --ext-ip {ext_ip}")?;
                bound(f, ext_if.as_ref())
            }
            Self::Hairpin {
                ext_ip,
                int_ip,
                ports,
                protocol,
                lan,
            } => {
                write!(
                    f,
                    "hairpin --ext-ip {ext_ip} --int-ip {int_ip} --ports {ports} --proto {protocol}"
                )?;
                match lan {
                    Some(lan) => write!(f, " --lan {lan}"),
                    None => Ok(()),
                }
            }
        }
    }
}

fn bound(f: &mut fmt::Formatter<'_>, interface: Option<&IfName>) -> fmt::Result {
    match interface {
        Some(interface) => write!(f, " --ext-if {interface}"),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ports(text: &str) -> PortList {
        text.parse().unwrap()
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn dnat(list: &str, int_port: Option<u16>) -> Result<MappingSpec, Invalid> {
        let (ext, int) = (ip("192.0.2.1"), ip("10.0.0.5"));
        MappingSpec::dnat(ext, ports(list), Protocol::Tcp, int, int_port, None)
    }

    #[test]
    fn the_same_ports_are_the_same_list_however_they_are_written() {
        assert_eq!(ports("443,80"), ports("80,443"));
        assert_eq!(ports("80-81,82"), ports("80-82"));
        assert_eq!(ports("8000-8010,22").to_string(), "22,8000-8010");
        assert_eq!(ports("65535,65534").to_string(), "65534-65535");
    }

    #[test]
    fn lists_that_make_no_sense_are_refused() {
        for (bad, problem) in [
            ("", Problem::MappedPort(String::new())),
            ("80,", Problem::MappedPort(String::new())),
            ("0", Problem::MappedPort("0".into())),
            ("80:90", Problem::MappedPort("80:90".into())),
            ("65536", Problem::MappedPort("65536".into())),
            ("90-80", Problem::RangeBackwards),
            ("80,80", Problem::PortsOverlap("80".into())),
            ("80-90,85", Problem::PortsOverlap("85".into())),
        ] {
            assert_eq!(
                bad.parse::<PortList>().unwrap_err().problem,
                problem,
                "{bad}"
            );
        }
        let many: Vec<String> = (0..1025).map(|n| (2 * n + 1).to_string()).collect();
        assert!(many.join(",").parse::<PortList>().is_err());
    }

    #[test]
    fn an_internal_port_is_for_one_range() {
        assert!(dnat("80", Some(8080)).is_ok());
        assert!(dnat("80-89", Some(8080)).is_ok());
        assert_eq!(dnat("80", Some(80)), dnat("80", None));
        for (list, port) in [("80,443", 8080), ("80-89", 65_530), ("80", 0)] {
            assert_eq!(dnat(list, Some(port)).unwrap_err().field, "--int-port");
        }
    }

    #[test]
    fn addresses_of_one_family_that_somebody_may_have_can_be_mapped() {
        let spec = |ext: &str, int: &str| {
            MappingSpec::hairpin(ip(ext), ip(int), ports("80"), Protocol::Udp, None)
        };
        assert!(spec("2001:db8::1", "fd00::1").is_ok());
        for (ext, int, field) in [
            ("0.0.0.0", "10.0.0.1", "--ext-ip"),
            ("127.0.0.1", "10.0.0.1", "--ext-ip"),
            ("224.0.0.1", "10.0.0.1", "--ext-ip"),
            ("fe80::1", "fd00::1", "--ext-ip"),
            ("192.0.2.1", "fd00::1", "--int-ip"),
            ("192.0.2.1", "::1", "--int-ip"),
            ("192.0.2.1", "192.0.2.1", "--int-ip"),
        ] {
            assert_eq!(spec(ext, int).unwrap_err().field, field, "{ext} {int}");
        }
        let int: Cidr = "10.0.0.0/8".parse().unwrap();
        assert!(MappingSpec::snat(int, ip("192.0.2.1"), None).is_ok());
        assert!(MappingSpec::snat(int, ip("2001:db8::1"), None).is_err());
    }

    #[test]
    fn ranges_cost_prefixes_and_not_ports() {
        // Each says where packets go, and that the port is held.
        assert_eq!(dnat("30000-60000", None).unwrap().port_entries(1).len(), 24);
        let entries = dnat("80-81", Some(8080)).unwrap().port_entries(7);
        let kinds: Vec<u8> = entries.iter().map(|(_, key, _)| key.kind).collect();
        let expected = [abi::PublishUse::Packets, abi::PublishUse::Held];
        assert_eq!(kinds, expected.map(|kind| kind as u8));
        for (bits, key, value) in entries {
            assert_eq!((bits, key.port), (abi::PublishKey::BITS - 1, [0, 80]));
            assert_eq!((value.host_port, value.port, value.mapping), (80, 8080, 7));
        }
        let (ext, int) = (ip("192.0.2.1"), ip("10.0.0.1"));
        let hairpin = MappingSpec::hairpin(ext, int, ports("80"), Protocol::Tcp, None).unwrap();
        assert_eq!(hairpin.port_entries(1).len(), 1);
    }

    #[test]
    fn a_mapping_reads_back_as_it_was_written() {
        let spec = dnat("80,443", None).unwrap();
        let text = serde_json::to_string(&spec).unwrap();
        assert_eq!(serde_json::from_str::<MappingSpec>(&text).unwrap(), spec);
    }
}
