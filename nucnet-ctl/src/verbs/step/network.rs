//! A network: its bridge, and what the programs are told of it.

use super::{World, endpoint_alias};
use crate::{
    kernel::{
        netlink::{self, BridgeSpec, Change, Owner},
        sysctl::{self, Family, LinkKey, Sysctl},
    },
    model::record::{DatapathKind, NetworkRecord, State},
    verbs::{
        Error,
        netfilter::{close_v6, serves_v6},
    },
};
use ipnet::IpNet;
use nucnet_common::abi;
use std::net::IpAddr;

/// The alias of a network's bridge. No id has a colon in it.
pub(in crate::verbs) fn network_alias(record: &NetworkRecord) -> String {
    format!("{}network:{}", netlink::ALIAS_PREFIX, record.name)
}

/// What the programs are told of a network. An uplink that is not there now serves nothing.
pub(in crate::verbs) fn network_entry(
    network: &NetworkRecord,
    index: impl Fn(&str) -> Option<u32>,
) -> abi::Network {
    let mut entry = network.behaviour().abi();
    let listed = network.uplinks();
    entry.is_restricted = (!listed.is_empty()).into();
    for (place, name) in entry.uplinks.iter_mut().zip(listed) {
        *place = index(name.as_str()).unwrap_or_default();
    }
    entry
}

impl World<'_> {
    pub(super) fn put_network(
        &mut self,
        change: impl FnOnce(&mut NetworkRecord),
    ) -> Result<(), Error> {
        if let Some(network) = &mut self.network {
            change(network);
            self.session.state.put_network(network)?;
        }
        Ok(())
    }

    pub(super) fn forget_network(&mut self) -> Result<(), Error> {
        let network = self.network();
        self.session.state.forget_network(network.number)?;
        self.session.state.remove_network(&network.name)?;
        Ok(())
    }

    pub(super) fn make_bridge(&mut self) -> Result<(), Error> {
        let network = self.network();
        let alias = network_alias(network);
        let (index, change) = self.netlink().ensure_bridge(&BridgeSpec {
            name: network.bridge.as_str(),
            mac: network.mac.octets(),
            mtu: network.mtu.bytes(),
            alias: &alias,
        })?;
        self.put_network(|network| network.link = Some(index))
            .inspect_err(|_| {
                if change == Change::Made {
                    // The error that led here is the one to report.
                    let _ = self.netlink().delete_bridge(index, Owner::Alias(&alias));
                }
            })
    }

    pub(super) fn delete_bridge(&self) -> Result<(), Error> {
        let network = self.network();
        let (bridge, alias) = (network.bridge.as_str(), network_alias(network));
        self.netlink().delete_bridge(bridge, Owner::Alias(&alias))?;
        Ok(())
    }

    pub(super) fn set_bridge_addresses(&self) -> Result<(), Error> {
        let subnets = self.network().served(self.serves_v6()?);
        let wanted: Vec<IpNet> = subnets.map(|subnet| subnet.gateway_net()).collect();
        self.netlink()
            .converge_addresses(self.bridge_link()?, &wanted)?;
        Ok(())
    }

    /// Whether IPv6 is served by what carries packets.
    pub(super) fn serves_v6(&self) -> Result<bool, Error> {
        serves_v6(Some(&self.session.record))
    }

    pub(super) fn bridge_link(&self) -> Result<u32, Error> {
        match self.network().link {
            Some(link) => Ok(link),
            None => Ok(self.netlink().link(self.network().bridge.as_str())?.index),
        }
    }

    /// Of this bridge only: forwarding makes route lookups from it possible, and where IPv6 is
    /// off for new interfaces, it is on for this one.
    pub(super) fn set_bridge_sysctls(&self) -> Result<(), Error> {
        let network = self.network();
        let bridge = network.bridge.as_str();
        let serves_v6 = self.serves_v6()?;
        if !serves_v6 || network.subnet(true).is_none() {
            // The kernel would give it an address of its own, which no policy is about.
            close_v6(network)?;
        }
        for subnet in network.served(serves_v6) {
            let family = match subnet.gateway() {
                IpAddr::V4(_) => Family::Ipv4,
                IpAddr::V6(_) => Family::Ipv6,
            };
            if family == Family::Ipv6 {
                Sysctl::link(family, bridge, LinkKey::DisableIpv6).write("0")?;
                // A link-local address would be looked for twice and asked after by nobody.
                Sysctl::link(family, bridge, LinkKey::AddrGenMode).write("1")?;
            }
            self.session.state.forward(family, bridge)?;
            self.answer_for_siblings(family, bridge)?;
        }
        Ok(())
    }

    /// Where the host's stack carries packets, it answers who asks for an endpoint on the same
    /// bridge, since nothing passes between its ports.
    fn answer_for_siblings(&self, family: Family, bridge: &str) -> Result<(), Error> {
        let by_rules = self.session.kind() == DatapathKind::Iptables;
        let key = match family {
            Family::Ipv4 => LinkKey::ProxyArpPvlan,
            Family::Ipv6 => LinkKey::ProxyNdp,
        };
        let answer = Sysctl::link(family, bridge, key);
        answer.write(if by_rules { "1" } else { "0" })?;
        if !by_rules {
            return Ok(());
        }
        Sysctl::ProxyDelay(family, bridge.to_owned()).write("0")?;
        if family == Family::Ipv6 {
            match Sysctl::link(family, bridge, LinkKey::ForceForwarding).write("1") {
                // Before Linux 6.17 the host forwards, or nobody does.
                Err(sysctl::Error::NotFound { .. }) => {}
                result => drop(result?),
            }
        }
        Ok(())
    }

    pub(super) fn write_network(&mut self) -> Result<(), Error> {
        let network = self.network().clone();
        let links = self.netlink().links()?;
        let entry = network_entry(&network, |name| {
            let link = links.iter().find(|link| link.name == name)?;
            Some(link.index)
        });
        Ok(self.datapath()?.networks.insert(&network.number, &entry)?)
    }

    pub(super) fn remove_network_entry(&mut self) -> Result<(), Error> {
        let number = self.network().number;
        if let Some(datapath) = &mut self.datapath {
            datapath.networks.remove(&number)?;
        }
        Ok(())
    }

    /// A bridge that was down has lost its neighbours; one that was made anew, its ports as well,
    /// and the maps know another one.
    pub(super) fn bring_members_back(&mut self) -> Result<(), Error> {
        let (number, bridge) = (self.network().number, self.bridge_link()?);
        let mut endpoints = self.session.state.sound_endpoints()?;
        endpoints.retain(|endpoint| endpoint.network == number && endpoint.state == State::Active);
        for endpoint in endpoints {
            let link = self.netlink().find_link(endpoint.host_ifname.as_str())?;
            let alias = endpoint_alias(&endpoint);
            let Some(link) = link.filter(|link| link.has_alias(&alias)) else {
                continue;
            };
            self.make_port(&link)?;
            self.introduce(&endpoint)?;
            if endpoint.datapath == DatapathKind::Iptables {
                continue;
            }
            let endpoints = &mut self.datapath()?.endpoints;
            if let Some(mut entry) = endpoints.get(&link.index)?
                && entry.number == endpoint.number
                && entry.bridge != bridge
            {
                entry.bridge = bridge;
                endpoints.replace(&link.index, &entry)?;
            }
        }
        Ok(())
    }
}
