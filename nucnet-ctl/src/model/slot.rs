//! Slots of microVMs: which addresses and names the n-th one has, and what its guest is.

use super::{Cidr, EndpointId, IfName, Invalid, Mac, NetworkName, Problem, Subnet, parse_ip};
use ipnet::{IpNet, Ipv4Net};
use serde::{Deserialize, Serialize};
use std::{
    fmt,
    net::{IpAddr, Ipv4Addr},
    str::FromStr,
};

/// The number of a slot, from 1 on. How many there are is a matter of [`SlotRanges`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "u32", into = "u32")]
pub struct SlotNumber(u32);

/// Two interface indexes a slot, and none of them one that the kernel gives out by itself for as
/// long as it has not made that many interfaces.
const FIRST_INDEX: u32 = 1 << 24;

impl SlotNumber {
    /// The largest number for which there are interface indexes. No range of addresses has as
    /// many.
    const MAX: u32 = (1 << 24) - 1;

    /// The number.
    pub fn get(self) -> u32 {
        self.0
    }

    /// The id of its endpoint.
    pub fn id(self) -> EndpointId {
        let id = format!("slot-{self}");
        id.parse().expect("a word, a hyphen and a number are an id")
    }

    /// The slot of an endpoint's id.
    pub fn of(id: &EndpointId) -> Option<Self> {
        id.as_str().strip_prefix("slot-")?.parse().ok()
    }

    /// Index of the TAP in the slot's network namespace: of all slots, the only one with it.
    pub fn tap_index(self) -> u32 {
        FIRST_INDEX + 2 * self.0
    }

    /// Index of the slot's side of its veth pair, likewise.
    pub fn wire_index(self) -> u32 {
        self.tap_index() + 1
    }
}

impl TryFrom<u32> for SlotNumber {
    type Error = Invalid;

    fn try_from(number: u32) -> Result<Self, Invalid> {
        match number {
            1..=Self::MAX => Ok(Self(number)),
            _ => Err(Invalid::new("slot", number, Problem::SlotNumber)),
        }
    }
}

impl From<SlotNumber> for u32 {
    fn from(number: SlotNumber) -> Self {
        number.0
    }
}

impl FromStr for SlotNumber {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let number = text.parse::<u32>().ok();
        // One name a slot: neither "+7" nor "007".
        number
            .filter(|number| number.to_string() == text)
            .and_then(|number| Self::try_from(number).ok())
            .ok_or_else(|| Invalid::new("slot", text, Problem::SlotNumber))
    }
}

impl fmt::Display for SlotNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// `N` or `A-B`: slots in ascending order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SlotNumbers {
    first: SlotNumber,
    last: SlotNumber,
}

impl SlotNumbers {
    /// The last one.
    pub fn last(self) -> SlotNumber {
        self.last
    }

    /// Whether it is one slot.
    pub fn is_one(self) -> bool {
        self.first == self.last
    }

    /// Each of them.
    pub fn iter(self) -> impl Iterator<Item = SlotNumber> {
        (self.first.0..=self.last.0).map(SlotNumber)
    }
}

impl FromStr for SlotNumbers {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let (first, last) = text.split_once('-').unwrap_or((text, text));
        let (first, last): (SlotNumber, SlotNumber) = (first.parse()?, last.parse()?);
        if last < first {
            return Err(Invalid::new("slot", text, Problem::RangeBackwards));
        }
        Ok(Self { first, last })
    }
}

/// Where the addresses of slots are from: of the first range one a slot, of the second two.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SlotRanges {
    hosts: Cidr,
    links: Cidr,
}

impl Default for SlotRanges {
    /// 10.11.0.0/16 and 10.12.0.0/16.
    fn default() -> Self {
        let range = |third| {
            let net = Ipv4Net::new_assert(Ipv4Addr::new(10, third, 0, 0), 16);
            Cidr::from(IpNet::V4(net))
        };
        Self {
            hosts: range(11),
            links: range(12),
        }
    }
}

impl SlotRanges {
    /// Ranges that do not overlap, each with room for one slot at least.
    ///
    /// # Errors
    /// Names the flag.
    pub fn new(hosts: Cidr, links: Cidr) -> Result<Self, Invalid> {
        for (field, range) in [("--hosts", hosts), ("--links", links)] {
            v4(range).ok_or_else(|| Invalid::new(field, range, Problem::NotV4))?;
        }
        let ranges = Self { hosts, links };
        let subnet = ranges.subnet().map_err(|invalid| invalid.of("--hosts"))?;
        if links.overlaps(subnet.cidr()) {
            let other = hosts.to_string();
            return Err(Invalid::new("--links", links, Problem::Overlaps(other)));
        }
        if ranges.host_limit() == 0 {
            return Err(Invalid::new("--hosts", hosts, Problem::SubnetSize));
        }
        if ranges.link_limit() == 0 {
            return Err(Invalid::new("--links", links, Problem::SubnetSize));
        }
        Ok(ranges)
    }

    /// The range of addresses by which slots are known.
    pub fn hosts(self) -> Cidr {
        self.hosts
    }

    /// The range of addresses of links.
    pub fn links(self) -> Cidr {
        self.links
    }

    /// The subnet of the slots' network, whose own address is the last one.
    ///
    /// # Errors
    /// It is none.
    pub fn subnet(self) -> Result<Subnet, Invalid> {
        let (base, size) = extent(self.hosts);
        let gateway = Ipv4Addr::from_bits(base + size.saturating_sub(2));
        Subnet::new(self.hosts, Some(IpAddr::V4(gateway)))
    }

    /// Less the network's address, its broadcast address and its own.
    fn host_limit(self) -> u32 {
        extent(self.hosts).1.saturating_sub(3)
    }

    /// Slot 0, which there is not, has two as well.
    fn link_limit(self) -> u32 {
        (extent(self.links).1 / 2).saturating_sub(1)
    }

    /// The largest slot number for which there are addresses.
    pub fn limit(self) -> u32 {
        self.host_limit().min(self.link_limit())
    }

    /// The address by which a slot is known, and the host's on the link to it.
    ///
    /// # Errors
    /// The ranges have none for it.
    pub fn addresses(self, slot: SlotNumber) -> Result<(Ipv4Addr, Ipv4Addr), Invalid> {
        let number = slot.get();
        if number > self.limit() {
            let problem = Problem::SlotBeyond {
                limit: self.limit(),
                hosts: self.hosts.to_string(),
                links: self.links.to_string(),
            };
            return Err(Invalid::new("slot", number, problem));
        }
        let host = extent(self.hosts).0 + number;
        let link = extent(self.links).0 + 2 * number;
        Ok((Ipv4Addr::from_bits(host), Ipv4Addr::from_bits(link)))
    }
}

fn v4(range: Cidr) -> Option<Ipv4Net> {
    match range.net() {
        IpNet::V4(net) => Some(net),
        IpNet::V6(_) => None,
    }
}

/// First address and number of addresses; of everything, one less.
fn extent(range: Cidr) -> (u32, u32) {
    match v4(range) {
        Some(net) => {
            let size = 1u64 << (32 - net.prefix_len());
            (
                net.network().to_bits(),
                u32::try_from(size).unwrap_or(u32::MAX),
            )
        }
        None => (0, 0),
    }
}

/// What every guest of one snapshot has itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    address: Ipv4Addr,
    prefix: u8,
    gateway: Ipv4Addr,
    mac: Mac,
}

impl Default for Guest {
    /// 169.254.0.21/30 by way of 169.254.0.22, 02:fc:00:00:00:05.
    fn default() -> Self {
        Self {
            address: Ipv4Addr::new(169, 254, 0, 21),
            prefix: 30,
            gateway: Ipv4Addr::new(169, 254, 0, 22),
            mac: Mac::fixed([0x02, 0xfc, 0, 0, 0, 0x05]),
        }
    }
}

impl Guest {
    /// A guest with other properties than the default ones, where they are given.
    ///
    /// # Errors
    /// Names the flag: no IPv4 address, or a gateway that is not beside it.
    pub fn new(
        address: Option<&str>,
        gateway: Option<&str>,
        mac: Option<Mac>,
    ) -> Result<Self, Invalid> {
        let mut guest = Self::default();
        if let Some(mac) = mac {
            guest.mac = mac;
        }
        let net = match address {
            None => guest.net(),
            Some(text) => {
                let net = text.parse::<Ipv4Net>();
                net.map_err(|_| Invalid::new("--guest-ip", text, Problem::GuestNet))?
            }
        };
        let gateway = gateway.map(|text| parse_ip("--guest-gateway", text));
        let invalid = || Invalid::new("--guest-ip", net, Problem::GuestNet);
        let is_unicast = !net.addr().is_loopback() && net.addr().octets()[0] < 224;
        if !is_unicast || net.prefix_len() > 30 || !is_host(net, net.addr()) {
            return Err(invalid());
        }
        (guest.address, guest.prefix) = (net.addr(), net.prefix_len());
        guest.gateway = match gateway.transpose()? {
            // The first one that is not the guest's.
            None => {
                let free = net.hosts().find(|host| *host != net.addr());
                free.ok_or_else(invalid)?
            }
            Some(IpAddr::V4(gateway)) if gateway != net.addr() && is_host(net, gateway) => gateway,
            Some(other) => {
                let problem = Problem::GuestGateway(net.to_string());
                return Err(Invalid::new("--guest-gateway", other, problem));
            }
        };
        Ok(guest)
    }

    fn net(self) -> Ipv4Net {
        Ipv4Net::new_assert(self.address, self.prefix)
    }

    /// Its address.
    pub fn address(self) -> Ipv4Addr {
        self.address
    }

    /// The mask of its subnet.
    pub fn netmask(self) -> Ipv4Addr {
        self.net().netmask()
    }

    /// Its gateway.
    pub fn gateway(self) -> Ipv4Addr {
        self.gateway
    }

    /// Its link-layer address.
    pub fn mac(self) -> Mac {
        self.mac
    }
}

/// Whether a host of the subnet may have the address.
fn is_host(net: Ipv4Net, address: Ipv4Addr) -> bool {
    net.contains(&address) && address != net.network() && address != net.broadcast()
}

/// The TAP that a virtual machine monitor opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Tap {
    /// Its name.
    pub name: IfName,
    /// Number of the user who may open it; none: root.
    pub owner: Option<u32>,
    /// Number of the group whose members may open it.
    pub group: Option<u32>,
    /// Whether it has several queues.
    pub multi_queue: bool,
    /// Length of its transmit queue in packets.
    pub queue_len: u32,
}

impl Default for Tap {
    /// `tap0`, root's, of one queue that takes the bursts of a fast uplink.
    fn default() -> Self {
        Self {
            name: IfName::tap0(),
            owner: None,
            group: None,
            multi_queue: false,
            queue_len: 5000,
        }
    }
}

/// A slot as it was asked for, with the addresses that follow from that.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Its number.
    pub number: SlotNumber,
    /// The address by which it is known.
    pub address: Ipv4Addr,
    /// The host's address on the link to it, which the guest knows as its gateway.
    pub link: Ipv4Addr,
    /// What the guest has itself.
    pub guest: Guest,
    /// Its TAP.
    pub tap: Tap,
}

/// The link-layer address of every guest's gateway: that of the TAP, and of the slots' bridge. A
/// guest that resumes elsewhere finds the neighbour that it knows.
pub const GATEWAY_MAC: Mac = Mac::fixed([0x02, 0xfc, 0, 0, 0, 0x06]);

/// The network of all slots.
pub fn network() -> NetworkName {
    "slots".parse().expect("a word is a name")
}

/// Its bridge.
pub fn bridge() -> IfName {
    "nucnet-slots"
        .parse()
        .expect("it is a name of an interface")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ranges(hosts: &str, links: &str) -> Result<SlotRanges, Invalid> {
        SlotRanges::new(hosts.parse().unwrap(), links.parse().unwrap())
    }

    fn slot(number: u32) -> SlotNumber {
        SlotNumber::try_from(number).unwrap()
    }

    #[test]
    fn addresses_are_those_of_the_seed_without_its_overflow() {
        let ranges = SlotRanges::default();
        for (number, host, link) in [
            (1, "10.11.0.1", "10.12.0.2"),
            (255, "10.11.0.255", "10.12.1.254"),
            (256, "10.11.1.0", "10.12.2.0"),
            (32_767, "10.11.127.255", "10.12.255.254"),
        ] {
            let expected = (host.parse().unwrap(), link.parse().unwrap());
            assert_eq!(ranges.addresses(slot(number)).unwrap(), expected);
        }
        assert_eq!(ranges.limit(), 32_767);
        let error = ranges.addresses(slot(32_768)).unwrap_err();
        assert!(error.to_string().contains("32767"), "{error}");
    }

    #[test]
    fn bases_need_not_end_in_zeros() {
        let ranges = ranges("10.99.1.192/26", "172.30.0.128/25").unwrap();
        assert_eq!(
            ranges.addresses(slot(61)).unwrap(),
            (
                "10.99.1.253".parse().unwrap(),
                "172.30.0.250".parse().unwrap()
            )
        );
        // 64 addresses less three; the last one is the network's own.
        assert_eq!(ranges.limit(), 61);
        assert_eq!(
            ranges.subnet().unwrap().gateway(),
            "10.99.1.254".parse::<IpAddr>().unwrap()
        );
    }

    #[test]
    fn no_two_slots_share_an_address_or_an_index() {
        let ranges = ranges("10.99.0.0/22", "10.98.0.0/21").unwrap();
        let mut seen = std::collections::HashSet::new();
        let mut indexes = std::collections::HashSet::new();
        for number in 1..=ranges.limit() {
            let (host, link) = ranges.addresses(slot(number)).unwrap();
            assert!(ranges.hosts().contains(host.into()) && ranges.links().contains(link.into()));
            assert!(seen.insert(host) && seen.insert(link), "{number}");
            assert!(indexes.insert(slot(number).tap_index()));
            assert!(indexes.insert(slot(number).wire_index()));
        }
        let own = ranges.subnet().unwrap().gateway();
        assert!(!seen.iter().any(|address| IpAddr::V4(*address) == own));
    }

    #[test]
    fn ranges_are_checked() {
        for (hosts, links, field) in [
            ("fd00::/64", "10.12.0.0/16", "--hosts"),
            ("10.11.0.0/16", "fd00::/64", "--links"),
            ("10.11.0.0/16", "10.11.128.0/17", "--links"),
            ("10.11.0.0/31", "10.12.0.0/16", "--hosts"),
            ("10.11.0.0/16", "10.12.0.0/31", "--links"),
        ] {
            assert_eq!(
                ranges(hosts, links).unwrap_err().field,
                field,
                "{hosts} {links}"
            );
        }
    }

    #[test]
    fn numbers_are_written_in_one_way() {
        assert_eq!("7".parse::<SlotNumber>().unwrap(), slot(7));
        for bad in [
            "",
            "0",
            "-1",
            "+7",
            "007",
            "7 ",
            "x",
            "16777216",
            "4294967296",
        ] {
            assert!(bad.parse::<SlotNumber>().is_err(), "{bad:?}");
        }
        let some: SlotNumbers = "3-5".parse().unwrap();
        let numbers: Vec<u32> = some.iter().map(SlotNumber::get).collect();
        assert_eq!(numbers, [3, 4, 5]);
        for bad in ["5-3", "3-", "-3", "1-2-3"] {
            assert!(bad.parse::<SlotNumbers>().is_err(), "{bad:?}");
        }
        assert_eq!(SlotNumber::of(&slot(12).id()), Some(slot(12)));
        assert_eq!(SlotNumber::of(&"slot-x".parse().unwrap()), None);
    }

    #[test]
    fn guest_is_the_seeds_unless_something_else_is_said() {
        let guest = Guest::default();
        assert_eq!(Guest::new(None, None, None).unwrap(), guest);
        assert_eq!(guest.netmask(), Ipv4Addr::new(255, 255, 255, 252));
        assert_eq!(guest.mac().to_string(), "02:fc:00:00:00:05");
        let other = Guest::new(Some("172.16.0.2/24"), Some("172.16.0.1"), None).unwrap();
        assert_eq!(other.gateway(), Ipv4Addr::new(172, 16, 0, 1));
        assert_eq!(other.address(), Ipv4Addr::new(172, 16, 0, 2));
        for (address, gate, field) in [
            (Some("fd00::2/64"), None, "--guest-ip"),
            (Some("127.0.0.2/24"), None, "--guest-ip"),
            (Some("10.0.0.2/32"), None, "--guest-ip"),
            (Some("172.16.0.2/24"), Some("172.17.0.1"), "--guest-gateway"),
            (Some("172.16.0.2/24"), Some("172.16.0.2"), "--guest-gateway"),
            (Some("172.16.0.255/24"), Some("172.16.0.1"), "--guest-ip"),
        ] {
            assert_eq!(Guest::new(address, gate, None).unwrap_err().field, field);
        }
    }
}
