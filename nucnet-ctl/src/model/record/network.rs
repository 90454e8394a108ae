//! Records of networks.

use super::{Record, State};
use crate::model::{
    Cidr, IfName, Mac, Mtu, NetworkName, Subnet,
    behaviour::{Behaviour, BehaviourWish},
    slot::SlotRanges,
};
use serde::{Deserialize, Serialize};
use std::net::IpAddr;

/// What was asked for of a network. Absent: nucnet's choice.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkWish {
    /// Name of the bridge.
    pub bridge: Option<IfName>,
    /// IPv4 subnet.
    pub subnet4: Option<Cidr>,
    /// IPv6 subnet.
    pub subnet6: Option<Cidr>,
    /// The network's own addresses.
    pub gateways: Vec<IpAddr>,
    /// Uplinks that serve its publishes; empty: all.
    pub uplinks: Vec<IfName>,
    /// MTU of its endpoints.
    pub mtu: Option<Mtu>,
    /// No direct traffic to or from other networks.
    pub isolate: bool,
    /// How it translates.
    #[serde(default)]
    pub behaviour: BehaviourWish,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetworkRecord {
    /// Its name.
    pub name: NetworkName,
    /// Its number: never given twice.
    pub number: u32,
    /// How far it is.
    pub state: State,
    /// What was asked for; none: made on first use, goes with its last endpoint.
    pub wish: Option<NetworkWish>,
    /// Its bridge.
    pub bridge: IfName,
    /// Index of the bridge, once made.
    pub link: Option<u32>,
    /// Link-layer address of the bridge.
    pub mac: Mac,
    /// One subnet of each family at most.
    pub subnets: Vec<Subnet>,
    /// MTU of bridge and endpoints.
    pub mtu: Mtu,
    /// No direct traffic to or from other networks.
    pub isolate: bool,
    /// Where the addresses of slots are from, if it is their network: its bridge then has no
    /// ports, of which it could not take enough.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slots: Option<SlotRanges>,
}

impl NetworkRecord {
    /// How it translates.
    pub fn behaviour(&self) -> Behaviour {
        let asked = self.wish.as_ref().map(|wish| wish.behaviour.resolved());
        asked.unwrap_or_else(|| BehaviourWish::default().resolved())
    }

    /// Uplinks that serve its publishes; empty: all.
    pub fn uplinks(&self) -> &[IfName] {
        self.wish.as_ref().map_or(&[], |wish| &wish.uplinks)
    }

    /// The subnet of the family of that address.
    pub fn subnet_of(&self, address: IpAddr) -> Option<Subnet> {
        self.subnet(address.is_ipv6())
    }

    /// Its subnets of the families that are served; of IPv4 it always is.
    pub fn served(&self, v6: bool) -> impl Iterator<Item = Subnet> {
        let subnets = self.subnets.iter().copied();
        subnets.filter(move |subnet| v6 || subnet.gateway().is_ipv4())
    }

    /// The subnet of one family.
    pub fn subnet(&self, v6: bool) -> Option<Subnet> {
        self.subnets
            .iter()
            .copied()
            .find(|subnet| subnet.gateway().is_ipv6() == v6)
    }
}

impl Record for NetworkRecord {
    fn name(&self) -> Option<&str> {
        Some(self.name.as_str())
    }
}
