//! What people and programs get to see of endpoints and networks.

use crate::model::{
    EndpointId, IfName, Mac, Mtu, NetworkName,
    behaviour::Behaviour,
    policy::{Policy, Resolver},
    publish::{Protocol, PublishSpec},
    record::{EndpointRecord, NetworkRecord, State},
    slot::{GATEWAY_MAC, Slot, SlotNumber},
};
use ipnet::IpNet;
use nucnet_common::abi::Flow;
use serde::Serialize;
use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
};

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
    /// The slot that it is the guest of.
    #[serde(flatten)]
    pub guest: Option<GuestView>,
}

/// What a virtual machine monitor and its guest need to know of a slot.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct GuestView {
    /// The slot's number.
    pub slot: SlotNumber,
    /// Name of the TAP in the slot's network namespace.
    pub tap: IfName,
    /// Link-layer address of the TAP: that of the guest's gateway.
    pub tap_mac: Mac,
    /// The guest's address.
    pub guest_ip: Ipv4Addr,
    /// The mask of its subnet.
    pub netmask: Ipv4Addr,
    /// Its link-layer address.
    pub guest_mac: Mac,
    /// Its gateway.
    pub gateway: Ipv4Addr,
    /// The address by which the guest is known to the host.
    pub host_ip: Ipv4Addr,
    /// The host's address on the link to the slot, which the guest knows as its gateway.
    pub link_ip: Ipv4Addr,
    /// Resolvers for the guest.
    pub dns: Vec<Resolver>,
}

impl GuestView {
    fn of(slot: &Slot, egress: &Policy) -> Self {
        Self {
            slot: slot.number,
            tap: slot.tap.name.clone(),
            tap_mac: GATEWAY_MAC,
            guest_ip: slot.guest.address(),
            netmask: slot.guest.netmask(),
            guest_mac: slot.guest.mac(),
            gateway: slot.guest.gateway(),
            host_ip: slot.address,
            link_ip: slot.link,
            dns: egress.dns().to_vec(),
        }
    }
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
            gateways: match record.slot() {
                Some(slot) => vec![slot.link.into()],
                None => record
                    .addresses
                    .iter()
                    .filter_map(|address| Some(subnet(address)?.gateway()))
                    .collect(),
            },
            mtu: record.mtu,
            datapath: record.datapath.name(),
            published: record.publishes.iter().filter_map(Published::of).collect(),
            egress: record.egress.clone(),
            guest: record
                .slot()
                .map(|slot| GuestView::of(slot, &record.egress)),
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

/// A port forward as the JSON shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Published {
    /// Address of the host; none: any.
    pub host_ip: Option<IpAddr>,
    /// First host port.
    pub host_port: u16,
    /// Last host port.
    pub host_port_end: u16,
    /// First port of the endpoint.
    pub port: u16,
    /// Last port of the endpoint.
    pub port_end: u16,
    /// Protocol.
    pub protocol: Protocol,
}

impl Published {
    /// That of a publish whose host ports are chosen.
    pub fn of(spec: &PublishSpec) -> Option<Self> {
        let host = spec.host_ports()?;
        Some(Self {
            host_ip: spec.host().shown(),
            host_port: host.first(),
            host_port_end: host.last(),
            port: spec.ports().first(),
            port_end: spec.ports().last(),
            protocol: spec.protocol(),
        })
    }
}

/// What the live flows have carried that came by one publish. Those that have ended are not in it:
/// to keep their sum would cost packets another count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Forwarded {
    /// The publish.
    #[serde(flatten)]
    pub publish: Published,
    /// How many flows there are.
    pub flows: u64,
    /// Packets to the endpoint.
    pub packets_in: u64,
    /// Bytes to the endpoint.
    pub bytes_in: u64,
    /// Packets from the endpoint.
    pub packets_out: u64,
    /// Bytes from the endpoint.
    pub bytes_out: u64,
}

impl Forwarded {
    pub(super) fn nothing(publish: Published) -> Self {
        Self {
            publish,
            flows: 0,
            packets_in: 0,
            bytes_in: 0,
            packets_out: 0,
            bytes_out: 0,
        }
    }

    /// Counts a flow, which is the endpoint's own or that of a sibling, who sees it from the other
    /// side.
    pub(super) fn add(&mut self, flow: &Flow, is_own: bool) {
        let inward = (flow.packets_in, flow.bytes_in);
        let outward = (flow.packets_out, flow.bytes_out);
        let (inward, outward) = match is_own {
            true => (inward, outward),
            false => (outward, inward),
        };
        self.flows += 1;
        self.packets_in += inward.0;
        self.bytes_in += inward.1;
        self.packets_out += outward.0;
        self.bytes_out += outward.1;
    }
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
    /// What came by each of its publishes; nothing where rules carry packets.
    pub forwarded: Vec<Forwarded>,
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
