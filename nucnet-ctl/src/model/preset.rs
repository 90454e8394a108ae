//! Presets: destinations of egress rules that have a name.
//!
//! Which addresses a preset stands for is fixed here, but for `host`: the host's own addresses
//! change while policies are in force, so the datapath asks the kernel instead.

use super::Cidr;
use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use std::{
    fmt,
    net::{Ipv4Addr, Ipv6Addr},
};

/// Destinations by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Preset {
    /// Where clouds tell a machine who it is, credentials included: EC2, Azure, Google and most
    /// others (169.254.169.254), ECS (169.254.170.2), EC2 by IPv6 (fd00:ec2::254).
    Metadata,
    /// What is private to a site: RFC 1918, shared address space (RFC 6598), unique local
    /// addresses (RFC 4193), and the site-local ones before them (RFC 3879).
    Private,
    /// The host's own addresses, whichever it has when a flow is opened; networks' gateways are
    /// among them.
    Host,
    /// The link-local ranges.
    LinkLocal,
    /// Everything unicast that no registry of special purpose addresses holds.
    Internet,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 5] = [
        Self::Metadata,
        Self::Private,
        Self::Host,
        Self::LinkLocal,
        Self::Internet,
    ];

    /// The word in a rule.
    pub fn name(self) -> &'static str {
        match self {
            Self::Metadata => "metadata",
            Self::Private => "private",
            Self::Host => "host",
            Self::LinkLocal => "link-local",
            Self::Internet => "internet",
        }
    }

    /// The preset of that name.
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preset| preset.name() == name)
    }

    /// The prefixes that it stands for; none: only the kernel knows.
    pub fn prefixes(self) -> Option<Vec<Cidr>> {
        let both = |v4: &[Ipv4Net], v6: &[Ipv6Net]| {
            let v4 = v4.iter().copied().map(IpNet::V4);
            let v6 = v6.iter().copied().map(IpNet::V6);
            v4.chain(v6).map(Cidr::from).collect()
        };
        Some(match self {
            Self::Metadata => both(&METADATA_V4, &METADATA_V6),
            Self::Private => both(&PRIVATE_V4, &PRIVATE_V6),
            Self::LinkLocal => both(&[LINK_LOCAL_V4], &[LINK_LOCAL_V6]),
            Self::Internet => {
                let v4 = without(IpNet::V4(ALL_V4), &SPECIAL_V4.map(IpNet::V4));
                let v6 = without(IpNet::V6(GLOBAL_V6), &SPECIAL_V6.map(IpNet::V6));
                v4.into_iter().chain(v6).map(Cidr::from).collect()
            }
            Self::Host => return None,
        })
    }
}

impl fmt::Display for Preset {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What is left of a prefix without others, as prefixes in ascending order.
fn without(whole: IpNet, others: &[IpNet]) -> Vec<IpNet> {
    if others.iter().any(|other| other.contains(&whole)) {
        return Vec::new();
    }
    if !others.iter().any(|other| whole.contains(other)) {
        return vec![whole];
    }
    // What contains another prefix is longer than none, so it has halves.
    let halves = whole.subnets(whole.prefix_len() + 1);
    halves
        .into_iter()
        .flatten()
        .flat_map(|half| without(half, others))
        .collect()
}

const fn v4(a: u8, b: u8, c: u8, d: u8, length: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), length)
}

const fn v6(start: [u16; 4], length: u8) -> Ipv6Net {
    let [a, b, c, d] = start;
    Ipv6Net::new_assert(Ipv6Addr::new(a, b, c, d, 0, 0, 0, 0), length)
}

const METADATA_V4: [Ipv4Net; 2] = [v4(169, 254, 169, 254, 32), v4(169, 254, 170, 2, 32)];
const METADATA_V6: [Ipv6Net; 1] = [Ipv6Net::new_assert(
    Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
    128,
)];

const PRIVATE_V4: [Ipv4Net; 4] = [
    v4(10, 0, 0, 0, 8),
    v4(100, 64, 0, 0, 10),
    v4(172, 16, 0, 0, 12),
    v4(192, 168, 0, 0, 16),
];
const PRIVATE_V6: [Ipv6Net; 2] = [v6([0xfc00, 0, 0, 0], 7), v6([0xfec0, 0, 0, 0], 10)];

const LINK_LOCAL_V4: Ipv4Net = v4(169, 254, 0, 0, 16);
const LINK_LOCAL_V6: Ipv6Net = v6([0xfe80, 0, 0, 0], 10);

const ALL_V4: Ipv4Net = v4(0, 0, 0, 0, 0);
/// The IANA IPv4 Special-Purpose Address Registry (RFC 6890), and multicast.
const SPECIAL_V4: [Ipv4Net; 18] = [
    v4(0, 0, 0, 0, 8),
    v4(10, 0, 0, 0, 8),
    v4(100, 64, 0, 0, 10),
    v4(127, 0, 0, 0, 8),
    LINK_LOCAL_V4,
    v4(172, 16, 0, 0, 12),
    v4(192, 0, 0, 0, 24),
    v4(192, 0, 2, 0, 24),
    v4(192, 31, 196, 0, 24),
    v4(192, 52, 193, 0, 24),
    v4(192, 88, 99, 0, 24),
    v4(192, 168, 0, 0, 16),
    v4(192, 175, 48, 0, 24),
    v4(198, 18, 0, 0, 15),
    v4(198, 51, 100, 0, 24),
    v4(203, 0, 113, 0, 24),
    v4(224, 0, 0, 0, 4),
    v4(240, 0, 0, 0, 4),
];

/// The global unicast addresses that are given out so far (IANA). Everything else, the
/// translations of IPv4 in `64:ff9b::/96` among it, is in no public use or in a special one.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0, 0], 3);

/// What the IANA IPv6 Special-Purpose Address Registry (RFC 6890) holds of those.
const SPECIAL_V6: [Ipv6Net; 5] = [
    v6([0x2001, 0, 0, 0], 23),
    v6([0x2001, 0xdb8, 0, 0], 32),
    v6([0x2002, 0, 0, 0], 16),
    v6([0x2620, 0x4f, 0x8000, 0], 48),
    v6([0x3fff, 0, 0, 0], 20),
];

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::IpAddr;

    fn holds(preset: Preset, address: &str) -> bool {
        let address: IpAddr = address.parse().unwrap();
        let prefixes = preset.prefixes().unwrap();
        prefixes.iter().any(|prefix| prefix.contains(address))
    }

    #[test]
    fn the_internet_is_what_no_special_registry_holds() {
        for inside in [
            "1.1.1.1",
            "9.255.255.255",
            "11.0.0.0",
            "100.63.255.255",
            "100.128.0.0",
            "172.15.255.255",
            "172.32.0.0",
            "192.0.1.0",
            "192.0.3.0",
            "198.17.255.255",
            "198.20.0.0",
            "223.255.255.255",
            "2000::",
            "2001:200::",
            "2001:db7:ffff::",
            "2001:db9::",
            "2606:4700::1111",
            "3ffe:ffff::1",
            "3fff:1000::",
        ] {
            assert!(holds(Preset::Internet, inside), "{inside}");
            assert!(!holds(Preset::Private, inside), "{inside}");
        }
        for outside in [
            "0.0.0.1",
            "10.0.0.1",
            "100.64.0.1",
            "127.0.0.1",
            "169.254.169.254",
            "172.16.0.1",
            "172.31.255.255",
            "192.0.2.1",
            "192.168.0.1",
            "198.19.255.255",
            "203.0.113.1",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "64:ff9b::a00:1",
            "64:ff9b:1::1",
            "100::1",
            "2001::1",
            "2001:1ff:ffff::",
            "2001:db8::1",
            "2002:a00:1::1",
            "3fff:fff::1",
            "4000::1",
            "5f00::1",
            "fc00::1",
            "fd00:ec2::254",
            "fe80::1",
            "ff02::1",
        ] {
            assert!(!holds(Preset::Internet, outside), "{outside}");
        }
    }

    #[test]
    fn prefixes_of_the_internet_are_disjoint() {
        let prefixes = Preset::Internet.prefixes().unwrap();
        for (index, one) in prefixes.iter().enumerate() {
            assert!(
                prefixes[index + 1..]
                    .iter()
                    .all(|other| !one.overlaps(*other))
            );
        }
    }

    #[test]
    fn presets_have_both_families() {
        for preset in Preset::ALL {
            if let Some(prefixes) = preset.prefixes() {
                for v6 in [false, true] {
                    let family = |prefix: &Cidr| prefix.net().addr().is_ipv6() == v6;
                    assert!(prefixes.iter().any(family), "{preset}");
                }
            }
        }
        for address in ["169.254.169.254", "169.254.170.2", "fd00:ec2::254"] {
            assert!(holds(Preset::Metadata, address));
        }
        assert!(!holds(Preset::Metadata, "169.254.169.253"));
        assert!(holds(Preset::LinkLocal, "169.254.1.1"));
        assert!(holds(Preset::LinkLocal, "fe80::1"));
    }

    #[test]
    fn a_preset_is_found_by_the_name_that_it_shows() {
        for preset in Preset::ALL {
            assert_eq!(Preset::named(&preset.to_string()), Some(preset));
        }
        assert_eq!(Preset::named("Private"), None);
    }
}
