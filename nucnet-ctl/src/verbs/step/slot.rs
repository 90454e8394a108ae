//! The slot of a microVM: its network namespace, the TAP in it, and what the programs are told of
//! the guest.

use super::World;
use crate::{
    kernel::{
        bpf::Datapath,
        netlink::{Ipv6LinkLocal, LinkChange, Netlink, State},
        netns,
        sysctl::{self, Family, LinkKey, Sysctl},
        tap::{self, TapSpec},
    },
    model::{
        record::EndpointRecord,
        slot::{GATEWAY_MAC, Slot},
        to_abi,
    },
    verbs::Error,
};
use ipnet::IpNet;
use nucnet_common::abi;
use std::net::IpAddr;

/// What the programs are told of a slot's guest, but for the interface at the other end.
pub(in crate::verbs) fn guest_entry(endpoint: &EndpointRecord, slot: &Slot) -> abi::Guest {
    let address = |v4| to_abi(IpAddr::V4(v4));
    abi::Guest {
        endpoint: endpoint.number,
        address: address(slot.guest.address()),
        gateway: address(slot.guest.gateway()),
        outer_address: address(slot.address),
        outer_gateway: address(slot.link),
        ..abi::Guest::default()
    }
}

impl World<'_> {
    /// Takes away the name of the slot's namespace, which goes with its last user.
    pub(super) fn forget_namespace(&self) -> Result<(), Error> {
        Ok(netns::remove_named(&self.endpoint().netns)?)
    }

    /// The host's own address on the link to the slot. A pair of addresses would make a neighbour
    /// of the other one, which nobody has.
    pub(super) fn address_link(&self, slot: &Slot) -> Result<(), Error> {
        let name = self.endpoint().host_ifname.as_str();
        let link = self.netlink().link(name)?.index;
        let address = IpNet::from(IpAddr::V4(slot.link));
        self.netlink().ensure_address(link, address)?;
        Ok(())
    }

    /// The guest's entries come first: what its programs do not know, they drop.
    pub(super) fn make_guest(&mut self) -> Result<(), Error> {
        let endpoint = self.endpoint().clone();
        let Some(slot) = endpoint.slot() else {
            return Ok(());
        };
        let netns = self.netns.expect("a set-up of a slot has its namespace");
        let entry = guest_entry(&endpoint, slot);
        let (tap, wire) = (slot.number.tap_index(), slot.number.wire_index());
        let datapath = self.datapath()?;
        datapath.put_guest(tap, wire, &entry)?;
        let datapath = &*datapath;
        netns::run_in(netns, || configure(&endpoint, slot, datapath))?
    }

    pub(super) fn forget_guest(&mut self) -> Result<(), Error> {
        let (number, slot) = (self.endpoint().number, self.endpoint().slot().cloned());
        if let (Some(slot), Some(datapath)) = (slot, &mut self.datapath) {
            let (tap, wire) = (slot.number.tap_index(), slot.number.wire_index());
            datapath.remove_guest(tap, wire, number)?;
        }
        Ok(())
    }
}

/// Inside the slot's namespace: the TAP, the programs on it and on the veth pair's end, all up.
/// The kernel itself has no address there, of neither family.
fn configure(endpoint: &EndpointRecord, slot: &Slot, datapath: &Datapath) -> Result<(), Error> {
    let netlink = Netlink::open()?;
    let (name, wire) = (slot.tap.name.as_str(), endpoint.wish.ifname.as_str());
    tap::create(&TapSpec {
        name,
        index: Some(slot.number.tap_index()),
        owner: slot.tap.owner,
        group: slot.tap.group,
        multi_queue: slot.tap.multi_queue,
    })?;
    for interface in [name, wire] {
        match Sysctl::link(Family::Ipv6, interface, LinkKey::DisableIpv6).write("1") {
            Err(sysctl::Error::NotFound { .. }) => {}
            result => drop(result?),
        }
    }
    let change = LinkChange {
        mac: Some(GATEWAY_MAC.octets()),
        mtu: Some(endpoint.mtu.bytes()),
        alias: Some(&super::endpoint_alias(endpoint)),
        tx_queue_len: Some(slot.tap.queue_len),
        ipv6_link_local: Some(Ipv6LinkLocal::Absent),
        ..LinkChange::default()
    };
    netlink.set_link(name, &change)?;
    datapath.attach_guest(name, wire)?;
    for interface in ["lo", wire, name] {
        let up = LinkChange {
            state: Some(State::Up),
            ..LinkChange::default()
        };
        netlink.set_link(interface, &up)?;
    }
    Ok(())
}
