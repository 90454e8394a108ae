//! What people and programs get to see of endpoints and networks.

use crate::model::{
    EndpointId, IfName, Mac, Mtu, NetworkName,
    behaviour::Behaviour,
    policy::Policy,
    record::{EndpointRecord, NetworkRecord, Published, State},
};
use ipnet::IpNet;
use serde::Serialize;
use std::{collections::BTreeMap, net::IpAddr, path::PathBuf};

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointView {
    /// Its id.
    pub id: EndpointId,
    /// How far it is.
    pub state: State,
    /// Its network.
    pub network: NetworkName,
    /// Where its namespace was found.
    pub netns: PathBuf,
    /// Its interface.
    pub ifname: IfName,
    /// The host side of its interface.
    pub host_ifname: IfName,
    /// Its link-layer address.
    pub mac: Mac,
    /// Its addresses with prefix lengths.
    pub addresses: Vec<IpNet>,
    /// The network's own addresses, of the same families.
    pub gateways: Vec<IpAddr>,
    /// Its MTU in bytes.
    pub mtu: Mtu,
    /// What carries its packets.
    pub datapath: &'static str,
    /// Its publishes.
    pub published: Vec<Published>,
    /// Its egress policy.
    pub egress: Policy,
}

impl EndpointView {
    /// That of a record. Without its network, an address has no prefix.
    pub(super) fn of(record: &EndpointRecord, network: Option<&NetworkRecord>) -> Self {
        let subnet = |address: &IpAddr| network?.subnet_of(*address);
        let with_prefix = |address: &IpAddr| {
            subnet(address).map_or(IpNet::from(*address), |subnet| subnet.with_prefix(*address))
        };
        Self {
            id: record.id.clone(),
            state: record.state,
            network: record.wish.network.clone(),
            netns: record.netns.clone(),
            ifname: record.wish.ifname.clone(),
            host_ifname: record.host_ifname.clone(),
            mac: record.mac,
            addresses: record.addresses.iter().map(with_prefix).collect(),
            gateways: record
                .addresses
                .iter()
                .filter_map(|address| Some(subnet(address)?.gateway()))
                .collect(),
            mtu: record.mtu,
            datapath: record.datapath.name(),
            published: record.publishes.iter().filter_map(Published::of).collect(),
            egress: record.egress.clone(),
        }
    }

    pub(super) fn new(record: &EndpointRecord, network: &NetworkRecord) -> Self {
        Self::of(record, Some(network))
    }
}

/// What was dropped for one reason.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Dropped {
    /// Packets.
    pub packets: u64,
    /// Bytes, link-layer headers included.
    pub bytes: u64,
}

/// An endpoint with its counters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EndpointDetails {
    /// The endpoint.
    #[serde(flatten)]
    pub endpoint: EndpointView,
    /// Flows in the table.
    pub flows: u64,
    /// Endpoint-independent bindings in the table.
    pub bindings: u64,
    /// What was dropped, by reason.
    pub dropped: BTreeMap<&'static str, Dropped>,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkView {
    /// Its name.
    pub id: NetworkName,
    /// How far it is.
    pub state: State,
    /// Its bridge.
    pub bridge: IfName,
    /// Its subnets, one of each family at most.
    pub subnets: Vec<String>,
    /// Its own addresses.
    pub gateways: Vec<IpAddr>,
    /// MTU of its endpoints in bytes.
    pub mtu: Mtu,
    /// Uplinks that serve its publishes; empty: all.
    pub uplinks: Vec<IfName>,
    /// No direct traffic to or from other networks.
    pub isolate: bool,
    /// How it translates.
    #[serde(flatten)]
    pub behaviour: Behaviour,
}

impl NetworkView {
    pub(super) fn new(record: &NetworkRecord) -> Self {
        Self {
            id: record.name.clone(),
            state: record.state,
            bridge: record.bridge.clone(),
            subnets: record.subnets.iter().map(ToString::to_string).collect(),
            gateways: record
                .subnets
                .iter()
                .map(|subnet| subnet.gateway())
                .collect(),
            mtu: record.mtu,
            uplinks: record.uplinks().to_vec(),
            isolate: record.isolate,
            behaviour: record.behaviour(),
        }
    }
}
