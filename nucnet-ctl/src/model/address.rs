//! Addresses: prefixes, subnets of networks, link-layer addresses, MTUs.

use super::{Invalid, Problem};
use ipnet::IpNet;
use nucnet_common::abi;
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    str::FromStr,
};

/// Parses an address; the mapped form of an IPv4 address is the IPv4 address.
pub fn parse_ip(field: &'static str, text: &str) -> Result<IpAddr, Invalid> {
    let address: IpAddr = text
        .parse()
        .map_err(|_| Invalid::new(field, text, Problem::Address))?;
    Ok(address.to_canonical())
}

/// An address as the maps hold it: 16 bytes, IPv4 in its mapped form.
pub fn to_abi(address: IpAddr) -> abi::Address {
    match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().octets(),
        IpAddr::V6(v6) => v6.octets(),
    }
}

/// "Any address" of an address's family, as the maps hold it.
pub(super) fn any_like(address: IpAddr) -> abi::Address {
    match address {
        IpAddr::V4(_) => abi::ANY_V4,
        IpAddr::V6(_) => abi::ANY_V6,
    }
}

/// The address that the maps hold.
pub fn from_abi(address: &abi::Address) -> IpAddr {
    IpAddr::from(*address).to_canonical()
}

/// A prefix of either family, host bits masked. A bare address is a prefix of full length.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cidr(IpNet);

impl Cidr {
    /// A single address.
    pub fn host(address: IpAddr) -> Self {
        Self(IpNet::from(address))
    }

    /// Everything of IPv4.
    pub const ALL_V4: Self = Self(IpNet::V4(ipnet::Ipv4Net::new_assert(
        Ipv4Addr::UNSPECIFIED,
        0,
    )));
    /// Everything of IPv6.
    pub const ALL_V6: Self = Self(IpNet::V6(ipnet::Ipv6Net::new_assert(
        Ipv6Addr::UNSPECIFIED,
        0,
    )));

    /// The prefix.
    pub fn net(self) -> IpNet {
        self.0
    }

    /// Whether the address lies within.
    pub fn contains(self, address: IpAddr) -> bool {
        self.0.contains(&address)
    }

    /// Whether all of the other lies within.
    pub fn covers(self, other: Self) -> bool {
        self.0.contains(&other.0)
    }

    /// Whether the two have an address in common.
    pub fn overlaps(self, other: Self) -> bool {
        self.0.contains(&other.0) || other.0.contains(&self.0)
    }
}

impl From<IpNet> for Cidr {
    /// The prefix with its host bits masked.
    fn from(net: IpNet) -> Self {
        Self(net.trunc())
    }
}

impl FromStr for Cidr {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("prefix", text, Problem::Cidr);
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| invalid())?;
        let whole = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            // Neither sign nor leading zeros, which the integer parser would take.
            Some(length) if length == "0" || !length.starts_with(['0', '+']) => {
                length.parse::<u8>().map_err(|_| invalid())?
            }
            Some(_) => return Err(invalid()),
            None => whole,
        };
        let net = match (address, length) {
            // Mapped IPv4 is IPv4, as the datapath sees it.
            (IpAddr::V6(v6), 96..) if v6.to_ipv4_mapped().is_some() => {
                IpNet::new(v6.to_canonical(), length - 96)
            }
            _ => IpNet::new(address, length),
        };
        Ok(Self(net.map_err(|_| invalid())?.trunc()))
    }
}

impl TryFrom<String> for Cidr {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Cidr> for String {
    fn from(cidr: Cidr) -> Self {
        cidr.to_string()
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A subnet of a network: a prefix with room for endpoints, in unicast address space, and its
/// gateway, which is an address of the subnet that an endpoint could have.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subnet {
    cidr: Cidr,
    gateway: IpAddr,
}

impl Subnet {
    /// The subnet with that gateway, or with the first address as gateway.
    pub fn new(cidr: Cidr, gateway: Option<IpAddr>) -> Result<Self, Invalid> {
        let field = if cidr.0.addr().is_ipv4() {
            "--subnet"
        } else {
            "--subnet6"
        };
        let invalid = |problem| Err(Invalid::new(field, cidr, problem));
        let (size, space) = match cidr.0 {
            IpNet::V4(net) => (8..=30, V4_NOT_UNICAST.iter().any(|not| overlap4(*not, net))),
            IpNet::V6(net) => (
                16..=126,
                V6_NOT_UNICAST.iter().any(|not| overlap6(*not, net)),
            ),
        };
        if !size.contains(&cidr.0.prefix_len()) {
            return invalid(Problem::SubnetSize);
        }
        if space {
            return invalid(Problem::SubnetRange);
        }
        let gateway = gateway.unwrap_or_else(|| match cidr.0 {
            IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) + 1).into(),
            IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) + 1).into(),
        });
        let subnet = Self { cidr, gateway };
        match subnet.judge(gateway) {
            Err(problem) if problem != Problem::IsGateway => {
                Err(Invalid::new("--gateway", gateway, problem))
            }
            _ => Ok(subnet),
        }
    }

    /// The prefix.
    pub fn cidr(self) -> Cidr {
        self.cidr
    }

    /// The network's own address.
    pub fn gateway(self) -> IpAddr {
        self.gateway
    }

    /// An address of the subnet with the subnet's prefix length, as a link has it.
    pub fn with_prefix(self, address: IpAddr) -> IpNet {
        let whole = IpNet::from(address);
        IpNet::new(address, self.cidr.0.prefix_len()).unwrap_or(whole)
    }

    /// The gateway with the prefix length.
    pub fn gateway_net(self) -> IpNet {
        self.with_prefix(self.gateway)
    }

    /// Whether an endpoint may have the address. IPv6 has no broadcast address, but the first
    /// address is everybody's router (RFC 4291 section 2.6.1).
    pub fn check(self, address: IpAddr) -> Result<(), Invalid> {
        self.judge(address)
            .map_err(|problem| Invalid::new("--ip", address, problem))
    }

    fn judge(self, address: IpAddr) -> Result<(), Problem> {
        if !self.cidr.contains(address) {
            Err(Problem::OutsideSubnet(super::error::Subnets(vec![self])))
        } else if address == self.cidr.0.network() {
            Err(Problem::IsNetwork)
        } else if address.is_ipv4() && address == self.cidr.0.broadcast() {
            Err(Problem::IsBroadcast)
        } else if address == self.gateway {
            Err(Problem::IsGateway)
        } else {
            Ok(())
        }
    }
}

impl fmt::Display for Subnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.cidr.fmt(f)
    }
}

const V4_NOT_UNICAST: [ipnet::Ipv4Net; 4] = [
    ipnet::Ipv4Net::new_assert(Ipv4Addr::new(0, 0, 0, 0), 8),
    ipnet::Ipv4Net::new_assert(Ipv4Addr::new(127, 0, 0, 0), 8),
    ipnet::Ipv4Net::new_assert(Ipv4Addr::new(169, 254, 0, 0), 16),
    ipnet::Ipv4Net::new_assert(Ipv4Addr::new(224, 0, 0, 0), 3),
];

const V6_NOT_UNICAST: [ipnet::Ipv6Net; 3] = [
    // Unspecified, loopback, mapped and translated IPv4.
    ipnet::Ipv6Net::new_assert(Ipv6Addr::UNSPECIFIED, 8),
    ipnet::Ipv6Net::new_assert(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0), 10),
    ipnet::Ipv6Net::new_assert(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0), 8),
];

fn overlap4(a: ipnet::Ipv4Net, b: ipnet::Ipv4Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

fn overlap6(a: ipnet::Ipv6Net, b: ipnet::Ipv6Net) -> bool {
    a.contains(&b) || b.contains(&a)
}

/// A unicast link-layer address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Mac(abi::Mac);

impl Mac {
    /// A locally administered address of those random bytes.
    pub fn local(random: [u8; 6]) -> Self {
        let mut bytes = random;
        bytes[0] = (bytes[0] & 0xfc) | 0x02;
        Self(bytes)
    }

    /// An address that is written here: unicast.
    pub(super) const fn fixed(octets: abi::Mac) -> Self {
        assert!(octets[0] & 1 == 0);
        Self(octets)
    }

    /// Network byte order.
    pub fn octets(self) -> abi::Mac {
        self.0
    }
}

impl FromStr for Mac {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("--mac", text, Problem::Mac);
        let mut octets = [0; 6];
        let mut parts = text.split(':');
        for octet in &mut octets {
            let part = parts
                .next()
                .filter(|part| part.len() == 2)
                .ok_or_else(invalid)?;
            if !part.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(invalid());
            }
            *octet = u8::from_str_radix(part, 16).map_err(|_| invalid())?;
        }
        if parts.next().is_some() || octets[0] & 1 != 0 || octets == [0; 6] {
            return Err(invalid());
        }
        Ok(Self(octets))
    }
}

impl TryFrom<String> for Mac {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Mac> for String {
    fn from(mac: Mac) -> Self {
        mac.to_string()
    }
}

impl fmt::Display for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

/// Largest IP packet of a link, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct Mtu(u32);

impl Mtu {
    /// Ethernet's.
    pub const ETHERNET: Self = Self(1500);
    /// The least that IPv6 takes (RFC 8200 section 5).
    pub const MIN_V6: Self = Self(1280);

    /// In bytes.
    pub fn bytes(self) -> u32 {
        self.0
    }

    /// Whether a link with this MTU can carry IPv6.
    pub fn check_v6(self) -> Result<(), Invalid> {
        if self < Self::MIN_V6 {
            return Err(Invalid::new("--mtu", self.0, Problem::MtuForV6));
        }
        Ok(())
    }
}

impl TryFrom<u32> for Mtu {
    type Error = Invalid;

    /// 68 (RFC 791) to 65,535 bytes: what a veth takes.
    fn try_from(bytes: u32) -> Result<Self, Invalid> {
        if (68..=65_535).contains(&bytes) {
            Ok(Self(bytes))
        } else {
            Err(Invalid::new("--mtu", bytes, Problem::Mtu))
        }
    }
}

impl FromStr for Mtu {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = || Invalid::new("--mtu", text, Problem::Mtu);
        if text.starts_with('+') {
            return Err(invalid());
        }
        Self::try_from(text.parse::<u32>().map_err(|_| invalid())?)
    }
}

impl From<Mtu> for u32 {
    fn from(mtu: Mtu) -> Self {
        mtu.0
    }
}

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_bits_are_masked_and_the_canonical_form_is_shown() {
        for (text, shown) in [
            ("10.0.42.7/24", "10.0.42.0/24"),
            ("10.0.42.7", "10.0.42.7/32"),
            ("2001:DB8::7/32", "2001:db8::/32"),
            ("::1", "::1/128"),
            ("0.0.0.0/0", "0.0.0.0/0"),
            ("::ffff:10.1.2.3/104", "10.0.0.0/8"),
            ("255.255.255.255/1", "128.0.0.0/1"),
        ] {
            assert_eq!(text.parse::<Cidr>().unwrap().to_string(), shown);
        }
        for bad in [
            "",
            "10.0.0.0/33",
            "10.0.0/8",
            "010.0.0.0/8",
            "10.0.0.0/+8",
            "10.0.0.0/08",
            "::/129",
            "10.0.0.0/",
            "10.0.0.0/8/8",
            " 10.0.0.0/8",
            "fe80::1%eth0",
        ] {
            assert!(bad.parse::<Cidr>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn subnets_have_room_and_are_unicast() {
        let subnet = |text: &str| Subnet::new(text.parse().unwrap(), None);
        for (text, gateway) in [
            ("10.0.42.0/24", "10.0.42.1"),
            ("10.0.42.128/25", "10.0.42.129"),
            ("10.0.42.4/30", "10.0.42.5"),
            ("fd00::/64", "fd00::1"),
            ("fd00::4/126", "fd00::5"),
        ] {
            assert_eq!(subnet(text).unwrap().gateway().to_string(), gateway);
        }
        for bad in [
            "10.0.42.0/31",
            "10.0.42.1/32",
            "10.0.0.0/7",
            "0.0.0.0/8",
            "127.0.0.0/24",
            "169.254.1.0/24",
            "224.0.0.0/8",
            "fd00::/127",
            "fe80::/64",
            "ff02::/64",
            "::/64",
            "64::/15",
        ] {
            assert!(subnet(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn gateway_is_an_address_that_an_endpoint_could_have() {
        let cidr: Cidr = "10.0.42.0/24".parse().unwrap();
        for bad in ["10.0.42.0", "10.0.42.255", "10.0.43.1", "fd00::1"] {
            assert!(
                Subnet::new(cidr, Some(bad.parse().unwrap())).is_err(),
                "{bad:?}"
            );
        }
        assert!(Subnet::new(cidr, Some("10.0.42.254".parse().unwrap())).is_ok());
    }

    #[test]
    fn requested_addresses_are_checked() {
        let subnet = Subnet::new("10.0.42.0/24".parse().unwrap(), None).unwrap();
        let problem = |text: &str| subnet.check(text.parse().unwrap()).map_err(|e| e.problem);
        assert_eq!(problem("10.0.42.2"), Ok(()));
        assert_eq!(problem("10.0.42.0"), Err(Problem::IsNetwork));
        assert_eq!(problem("10.0.42.1"), Err(Problem::IsGateway));
        assert_eq!(problem("10.0.42.255"), Err(Problem::IsBroadcast));
        assert!(matches!(
            problem("10.0.43.2"),
            Err(Problem::OutsideSubnet(_))
        ));
        let v6 = Subnet::new("fd00::/126".parse().unwrap(), None).unwrap();
        assert!(
            v6.check("fd00::3".parse().unwrap()).is_ok(),
            "IPv6 has no broadcast address"
        );
    }

    #[test]
    fn macs_are_unicast() {
        let mac: Mac = "02:00:AB:00:00:07".parse().unwrap();
        assert_eq!(mac.to_string(), "02:00:ab:00:00:07");
        for bad in [
            "",
            "02:00:00:00:00",
            "01:00:00:00:00:07",
            "00:00:00:00:00:00",
            "ff:ff:ff:ff:ff:ff",
            "2:0:0:0:0:7",
            "02:00:00:00:00:07:08",
            "+2:00:00:00:00:07",
        ] {
            assert!(bad.parse::<Mac>().is_err(), "{bad:?}");
        }
        assert_eq!(Mac::local([0xff; 6]).octets()[0], 0xfe);
    }

    #[test]
    fn mtus_are_what_a_veth_takes() {
        assert!("68".parse::<Mtu>().is_ok() && "65535".parse::<Mtu>().is_ok());
        for bad in ["", "0", "67", "65536", "-1", "+1500", "1500 ", "4294967296"] {
            assert!(bad.parse::<Mtu>().is_err(), "{bad:?}");
        }
        assert!("1279".parse::<Mtu>().unwrap().check_v6().is_err());
    }
}
