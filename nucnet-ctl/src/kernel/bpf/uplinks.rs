//! Programs on the host's interfaces: all of them that are not nucnet's own, so that replies
//! and publishes work whichever way packets come.

use std::net::IpAddr;

use nucnet_common::abi::{Uplink, program};

use crate::model::to_abi;

use super::{BpfError, Datapath, attach::AttachKind, hook::Hook};

/// How frames begin on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkLayer {
    /// With an Ethernet header.
    Ethernet,
    /// With the IP header: tun, wireguard, ppp, tunnels.
    None,
}

impl LinkLayer {
    /// By hardware type (`ARPHRD_*`, linux/if_arp.h). `None`: a loopback, or a kind that
    /// nucnet does not know.
    pub fn from_hardware_type(hardware_type: u16) -> Option<Self> {
        match hardware_type {
            // ARPHRD_ETHER
            1 => Some(Self::Ethernet),
            // ARPHRD_PPP, RAWIP, TUNNEL, TUNNEL6, SIT, IPGRE, IP6GRE, NONE
            512 | 519 | 768 | 769 | 776 | 778 | 823 | 0xfffe => Some(Self::None),
            _ => None,
        }
    }

    /// Bytes of link-layer header.
    fn header(self) -> u32 {
        match self {
            Self::Ethernet => 14,
            Self::None => 0,
        }
    }

    /// The program for it.
    pub fn program(self) -> &'static str {
        match self {
            Self::Ethernet => program::FROM_UPLINK,
            Self::None => program::FROM_UPLINK_L3,
        }
    }
}

/// An interface of the host that is not nucnet's own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostInterface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// How its frames begin.
    pub link_layer: LinkLayer,
    /// Largest IP packet that it takes, in bytes.
    pub mtu: u32,
    /// Its addresses, in the order of preference.
    pub addresses: Vec<IpAddr>,
}

impl HostInterface {
    fn entry(&self) -> Uplink {
        let first = |wanted: fn(&IpAddr) -> bool| {
            self.addresses
                .iter()
                .copied()
                .find(|a| is_global(a) && wanted(a))
                .map(to_abi)
        };
        Uplink {
            header: self.link_layer.header(),
            mtu: self.mtu,
            address4: first(IpAddr::is_ipv4).unwrap_or_default(),
            address6: first(IpAddr::is_ipv6).unwrap_or_default(),
        }
    }
}

/// What [`Datapath::sync_uplinks`] did.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct UplinkChanges {
    /// Interfaces that now have a program, and had none.
    pub attached: Vec<(String, AttachKind)>,
    /// Interfaces that have one no longer.
    pub detached: Vec<String>,
}

impl Datapath {
    /// Puts a program on each of `interfaces`, which are all those of the host that are not
    /// nucnet's own, and takes it off all others. Interfaces that are renamed keep theirs.
    pub fn sync_uplinks(
        &mut self,
        interfaces: &[HostInterface],
    ) -> Result<UplinkChanges, BpfError> {
        let mut changes = UplinkChanges::default();
        let is_uplink =
            |hook: &Hook| [program::FROM_UPLINK, program::FROM_UPLINK_L3].contains(&hook.program);
        let wanted =
            |interface: &HostInterface| Hook::new(interface.link_layer.program(), &interface.name);
        let mut there = Vec::new();
        for (hook, index) in self
            .attached()?
            .into_iter()
            .filter(|(hook, _)| is_uplink(hook))
        {
            let stays = index != 0
                && interfaces.iter().any(|interface| {
                    interface.index == index && interface.link_layer.program() == hook.program
                });
            if stays {
                there.push((hook, index));
            } else {
                self.uplinks.remove(&index)?;
                self.detach(&hook)?;
                changes.detached.push(hook.interface);
            }
        }
        self.rename_uplinks(&mut there, interfaces, wanted)?;
        for interface in interfaces {
            let hook = wanted(interface);
            let is_new = !there.contains(&(hook.clone(), interface.index));
            let kind = self.attach(&hook, interface.index)?;
            if is_new {
                changes.attached.push((interface.name.clone(), kind));
            }
            let entry = interface.entry();
            if self.uplinks.get(&interface.index)? != Some(entry) {
                self.uplinks.insert(&interface.index, &entry)?;
            }
        }
        for (index, _) in self.uplinks.entries()? {
            if !interfaces.iter().any(|interface| interface.index == index) {
                self.uplinks.remove(&index)?;
            }
        }
        Ok(changes)
    }

    /// Gives the records of interfaces that were renamed their new names, by way of names that
    /// no interface has: two may have swapped theirs.
    fn rename_uplinks(
        &self,
        there: &mut [(Hook, u32)],
        interfaces: &[HostInterface],
        wanted: impl Fn(&HostInterface) -> Hook,
    ) -> Result<(), BpfError> {
        let mut renamed = Vec::new();
        for (hook, index) in there.iter_mut() {
            let Some(interface) = interfaces.iter().find(|i| i.index == *index) else {
                continue;
            };
            let now = wanted(interface);
            if *hook != now {
                let between = Hook::new(hook.program, &format!("renamed:{index}"));
                self.rename(hook, &between)?;
                renamed.push((between, now.clone()));
                *hook = now;
            }
        }
        renamed
            .iter()
            .try_for_each(|(between, now)| self.rename(between, now))
    }
}

/// Whether an address can stand for endpoints towards the outside.
fn is_global(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(address) => {
            !(address.is_loopback() || address.is_link_local() || address.is_unspecified())
        }
        IpAddr::V6(address) => {
            !(address.is_loopback()
                || address.is_unicast_link_local()
                || address.is_unspecified()
                || address.is_multicast())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uplink_entry_has_the_first_global_address_of_each_family() {
        let interface = HostInterface {
            index: 3,
            name: "eth0".into(),
            link_layer: LinkLayer::Ethernet,
            mtu: 1420,
            addresses: [
                "fe80::1",
                "169.254.1.1",
                "192.0.2.1",
                "192.0.2.2",
                "2001:db8::1",
            ]
            .map(|text| text.parse().expect("address"))
            .into(),
        };
        assert_eq!(
            interface.entry(),
            Uplink {
                header: 14,
                mtu: 1420,
                address4: "::ffff:192.0.2.1"
                    .parse::<std::net::Ipv6Addr>()
                    .unwrap()
                    .octets(),
                address6: "2001:db8::1"
                    .parse::<std::net::Ipv6Addr>()
                    .unwrap()
                    .octets(),
            }
        );
    }

    #[test]
    fn loopback_is_no_uplink() {
        assert_eq!(LinkLayer::from_hardware_type(772), None);
        assert_eq!(LinkLayer::from_hardware_type(1), Some(LinkLayer::Ethernet));
        assert_eq!(LinkLayer::from_hardware_type(0xfffe), Some(LinkLayer::None));
    }
}
