//! What the control plane remembers: of the host, of each network, of each endpoint.
//!
//! A record holds what is wanted, as it was asked for, and what was made to fulfil it. It is
//! written before the first step of a change and removed after the last step of a teardown, so
//! that whoever comes next knows what may exist. State is of one boot.

use super::{
    Cidr, EndpointId, IfName, Invalid, Mac, Mtu, NetworkName, Subnet,
    behaviour::{Behaviour, BehaviourWish},
    flow::Party,
    mapping::MappingSpec,
    netfilter::Backend,
    policy::{Compiled, Policy},
    publish::{Protocol, PublishSpec},
    slot::{Slot, SlotRanges},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::{fmt, net::IpAddr, path::PathBuf};
use thiserror::Error;

/// Rises with every change of a record that older versions cannot read.
pub const VERSION: u32 = 1;

/// Why a record cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// It is no record, or not a whole one.
    #[error("the record is damaged")]
    Damaged(#[source] serde_json::Error),
    /// It was written by a later version.
    #[error("the record has version {0}, which this nucnet-ctl does not know")]
    Newer(u32),
    /// It is of another object than its name says.
    #[error("the record is of {0:?}")]
    Misplaced(String),
}

/// A record: versioned, and known by a name.
pub trait Record: Serialize + DeserializeOwned {
    /// The name that it is filed under; none if there is only one.
    fn name(&self) -> Option<&str>;
}

#[derive(Serialize)]
struct Outgoing<'a, T> {
    version: u32,
    record: &'a T,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Incoming<T> {
    record: T,
}

/// The bytes of a record.
pub fn encode<T: Record>(record: &T) -> Result<Vec<u8>, Error> {
    let mut bytes = serde_json::to_vec_pretty(&Outgoing {
        version: VERSION,
        record,
    })
    .map_err(Error::Damaged)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The record of those bytes, filed under that name.
pub fn decode<T: Record>(bytes: &[u8], name: Option<&str>) -> Result<T, Error> {
    let Version { version } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if version > VERSION {
        return Err(Error::Newer(version));
    }
    let Incoming::<T> { record } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if record.name() != name {
        return Err(Error::Misplaced(
            record.name().unwrap_or_default().to_owned(),
        ));
    }
    Ok(record)
}

/// Which network namespace it is. Device and inode are unique while it lives; the cookie
/// (`SO_NETNS_COOKIE`, Linux 5.14) for as long as the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Device number of the nsfs.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// The cookie.
    pub cookie: Option<u64>,
}

impl Namespace {
    /// A number for names that are derived from the namespace, and for files that stand for it.
    pub fn number(&self) -> u64 {
        self.cookie.unwrap_or(self.inode)
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// The host: whose state this is, and the numbers that are never given twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// `/proc/sys/kernel/random/boot_id` of the boot that the state belongs to.
    pub boot: String,
    /// The host's network namespace.
    pub netns: Namespace,
    /// Where the datapath is pinned.
    pub bpffs: PathBuf,
    /// The next numbers.
    pub next: Numbers,
    /// What carries packets, once something does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath: Option<DatapathRecord>,
}

/// What carries packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatapathKind {
    /// nucnet's programs.
    #[default]
    Ebpf,
    /// The host's own stack, with rules in its netfilter.
    Iptables,
}

impl DatapathKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        }
    }
}

impl fmt::Display for DatapathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What carries packets, why, and what it made of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatapathRecord {
    /// Which.
    pub kind: DatapathKind,
    /// Why not the other one; none: it was asked for, or is the best.
    pub reason: Option<String>,
    /// Not everything has moved to it yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moving: bool,
    /// Whose tables the rules are in; none: there are no rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// What was changed of the host's own settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<SysctlChange>,
}

/// A setting of the host's that nucnet has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SysctlChange {
    /// Its path below `/proc/sys`.
    pub name: String,
    /// What it was.
    pub before: String,
    /// What was written.
    pub written: String,
}

impl Record for HostRecord {
    fn name(&self) -> Option<&str> {
        None
    }
}

/// The next number of each kind. They begin at 1: 0 means none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// Of endpoints and static mappings.
    pub endpoint: u32,
    /// Of networks.
    pub network: u32,
    /// Of policies.
    pub policy: u32,
    /// Of classes of policies.
    pub class: u32,
}

impl Default for Numbers {
    fn default() -> Self {
        Self {
            endpoint: 1,
            network: 1,
            policy: 1,
            class: 1,
        }
    }
}

/// All numbers of a kind were given out; only a reboot or `down` begins anew.
#[derive(Debug, Error)]
#[error("the numbers of {0} are used up")]
pub struct UsedUp(pub &'static str);

impl Numbers {
    /// A number for an endpoint or a static mapping.
    pub fn endpoint(&mut self) -> Result<u32, UsedUp> {
        take(&mut self.endpoint, 1, "endpoints")
    }

    /// A number for a network.
    pub fn network(&mut self) -> Result<u32, UsedUp> {
        take(&mut self.network, 1, "networks")
    }

    /// A number for a policy.
    pub fn policy(&mut self) -> Result<u32, UsedUp> {
        take(&mut self.policy, 1, "policies")
    }

    /// That many successive numbers for classes: the first.
    pub fn classes(&mut self, count: u32) -> Result<u32, UsedUp> {
        take(&mut self.class, count, "classes of policies")
    }
}

fn take(next: &mut u32, count: u32, kind: &'static str) -> Result<u32, UsedUp> {
    let first = *next;
    *next = first.checked_add(count).ok_or(UsedUp(kind))?;
    Ok(first)
}

/// How far an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Being made, or left behind while being made.
    Configuring,
    /// Whole.
    Active,
    /// Something that it needs is missing.
    Degraded,
    /// Being removed, or left behind while being removed.
    Removing,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuring => "configuring",
            Self::Active => "active",
            Self::Degraded => "degraded",
            Self::Removing => "removing",
        })
    }
}

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

/// A static mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingRecord {
    /// Its id.
    pub id: EndpointId,
    /// Its number: of the same sequence as those of endpoints, never given twice.
    pub number: u32,
    /// How far it is.
    pub state: State,
    /// What was asked for.
    pub spec: MappingSpec,
    /// Where the clients of a hairpin are.
    pub lan: Option<Cidr>,
    /// Index of the interface that it is bound to; 0: it is bound to none.
    pub link: u32,
}

impl Record for MappingRecord {
    fn name(&self) -> Option<&str> {
        Some(self.id.as_str())
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostRecord {
        HostRecord {
            boot: "b".into(),
            netns: Namespace {
                device: 4,
                inode: 4_026_531_840,
                cookie: Some(1),
            },
            bpffs: "/sys/fs/bpf/nucnet".into(),
            next: Numbers::default(),
            datapath: None,
        }
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let bytes = encode(&host()).unwrap();
        assert_eq!(decode::<HostRecord>(&bytes, None).unwrap(), host());
    }

    #[test]
    fn a_record_cut_short_anywhere_is_damaged() {
        let bytes = encode(&host()).unwrap();
        for end in 0..bytes.len() - 2 {
            let read = decode::<HostRecord>(&bytes[..end], None);
            assert!(matches!(read, Err(Error::Damaged(_))), "{end}");
        }
    }

    #[test]
    fn a_record_of_a_later_version_is_refused_untouched() {
        let bytes = br#"{"version": 2, "record": {"what": "ever"}}"#;
        assert!(matches!(
            decode::<HostRecord>(bytes, None),
            Err(Error::Newer(2))
        ));
    }

    #[test]
    fn a_record_under_the_wrong_name_is_refused() {
        let bytes = encode(&host()).unwrap();
        assert!(matches!(
            decode::<HostRecord>(&bytes, Some("x")),
            Err(Error::Misplaced(_))
        ));
    }

    #[test]
    fn numbers_are_never_given_twice() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.endpoint().unwrap(), 1);
        assert_eq!(numbers.endpoint().unwrap(), 2);
        assert_eq!(numbers.classes(10).unwrap(), 1);
        assert_eq!(numbers.classes(1).unwrap(), 11);
        numbers.policy = u32::MAX;
        assert!(numbers.policy().is_err());
        assert_eq!(numbers.policy, u32::MAX);
    }
}
