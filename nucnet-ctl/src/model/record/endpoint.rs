//! Records of endpoints.

use super::{DatapathKind, Namespace, Record, State};
use crate::model::{
    EndpointId, IfName, Invalid, Mac, Mtu, NetworkName,
    flow::Party,
    policy::{Compiled, Policy},
    publish::PublishSpec,
    slot::Slot,
};
use serde::{Deserialize, Serialize};
use std::{net::IpAddr, path::PathBuf};

/// What was asked for of an endpoint. Absent: nucnet's choice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachWish {
    /// The network.
    pub network: NetworkName,
    /// Its addresses, one of each family at most.
    pub addresses: Vec<IpAddr>,
    /// Its link-layer address.
    pub mac: Option<Mac>,
    /// Name of its interface.
    pub ifname: IfName,
    /// Its MTU.
    pub mtu: Option<Mtu>,
    /// Its publishes; a host port may be to be chosen.
    pub publishes: Vec<PublishSpec>,
    /// Its egress policy.
    pub egress: Policy,
    /// The container's root directory, for its `resolv.conf`.
    pub rootfs: Option<PathBuf>,
    /// The slot that it is the guest of; none: it is a container.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub slot: Option<Slot>,
}

/// An endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EndpointRecord {
    /// Its id.
    pub id: EndpointId,
    /// Its number: identity and generation in one, never given twice.
    pub number: u32,
    /// How far it is.
    pub state: State,
    /// What was asked for.
    pub wish: AttachWish,
    /// Number of its network.
    pub network: u32,
    /// Where its namespace was found.
    pub netns: PathBuf,
    /// Which namespace that is.
    pub namespace: Namespace,
    /// Host side of its veth pair.
    pub host_ifname: IfName,
    /// Index of the host side, once made: its key in the maps.
    pub link: Option<u32>,
    /// Link-layer address of its interface.
    pub mac: Mac,
    /// Link-layer address of the host side.
    pub host_mac: Mac,
    /// Its addresses.
    pub addresses: Vec<IpAddr>,
    /// Its MTU.
    pub mtu: Mtu,
    /// Whether its namespace's default routes lead through it.
    pub default_route: bool,
    /// Its publishes with the host ports that they have.
    pub publishes: Vec<PublishSpec>,
    /// Publishes that are being made or taken back, or were left behind by that.
    #[serde(default)]
    pub pending: Vec<PublishSpec>,
    /// Its egress policy, if there is anything to enforce.
    pub policy: Option<PolicyNumbers>,
    /// Its egress policy in force, with the host's resolvers where it was given those.
    pub egress: Policy,
    /// Another one that may be in the maps: that which is coming or, once it is in force, that
    /// which is going.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub other_policy: Option<OtherPolicy>,
    /// Its `resolv.conf`, if it was asked for.
    pub resolv: Option<ResolvRecord>,
    /// What carries its packets.
    #[serde(default)]
    pub datapath: DatapathKind,
    /// Whether connections that were open when its policy came go on, where only the record says
    /// so.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub keeps_open: bool,
}

/// Where an endpoint's `resolv.conf` is mounted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ResolvRecord {
    /// Where the container's root directory was found.
    pub rootfs: PathBuf,
    /// Device number of that directory.
    pub device: u64,
    /// Inode number of that directory.
    pub inode: u64,
    /// What was made in it, to be removed again.
    pub made: MountPoint,
}

/// What a mount point is, beginning with what takes least to make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum MountPoint {
    /// A file that was there.
    Found,
    /// An empty file of nucnet's.
    File,
    /// An empty file in a directory, both nucnet's.
    DirectoryAndFile,
}

/// Under which numbers a policy is in the maps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PolicyNumbers {
    /// Of the policy.
    pub policy: u32,
    /// Of its first class.
    pub first_class: u32,
}

/// A policy that is coming or going.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct OtherPolicy {
    /// Its numbers; none: there is nothing to enforce.
    pub numbers: Option<PolicyNumbers>,
    /// The policy.
    pub egress: Policy,
}

impl OtherPolicy {
    /// The number in the endpoint's entry; 0: none.
    pub fn number(&self) -> u32 {
        self.numbers.map_or(0, |numbers| numbers.policy)
    }

    /// What the maps hold of it; none: nothing.
    pub fn compile(&self) -> Result<Option<Compiled>, Invalid> {
        self.numbers
            .map(|numbers| self.egress.compile(numbers.policy, numbers.first_class))
            .transpose()
    }
}

impl EndpointRecord {
    /// Who of them has an address.
    pub fn holder(endpoints: &[Self], address: IpAddr) -> Option<&Self> {
        let mut endpoints = endpoints.iter();
        endpoints.find(|endpoint| endpoint.addresses.contains(&address))
    }

    /// Its policy in force, as one that others may replace.
    pub fn policy_in_force(&self) -> OtherPolicy {
        OtherPolicy {
            numbers: self.policy,
            egress: self.egress.clone(),
        }
    }

    /// Makes the other policy the one in force, and the reverse.
    pub fn exchange_policies(&mut self) {
        let former = self.policy_in_force();
        if let Some(other) = self.other_policy.replace(former) {
            self.policy = other.numbers;
            self.egress = other.egress;
        } else {
            self.other_policy = None;
        }
    }

    /// Its address of one family.
    pub fn address(&self, v6: bool) -> Option<IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv6() == v6)
    }

    /// The slot that it is the guest of; none: it is a container.
    pub fn slot(&self) -> Option<&Slot> {
        self.wish.slot.as_ref()
    }

    /// What tells its flows from others'.
    pub fn party(&self) -> Party {
        Party {
            number: self.number,
            link: self.link,
        }
    }
}

impl Record for EndpointRecord {
    fn name(&self) -> Option<&str> {
        Some(self.id.as_str())
    }
}
