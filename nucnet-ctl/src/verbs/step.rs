//! The steps of set-ups, and how each is done and undone.
//!
//! A teardown undoes the steps of the set-up that the records describe, so that there is one
//! place for each thing that is made and removed. Undoing what was never done, or is gone, is
//! no error.

use super::{Error, OpenFlows, host::Session, publish, sight::link_layer};
use crate::{
    kernel::{
        bpf::{Datapath, HostInterface, Prefix},
        claims::{Claim, Holder, Use},
        netlink::{
            self, BridgeSpec, Change, Link, Neighbour, Netlink, Owner, Port, Route, VethSpec,
        },
        netns::{self, NetnsFd},
        resolv::Root,
        sockets::Sockets,
        sysctl::{self, Family, LinkKey, Sysctl},
    },
    model::{
        plan::Executor,
        policy::Compiled,
        publish::PublishSpec,
        record::{EndpointRecord, MappingRecord, NetworkRecord, OtherPolicy, State},
        to_abi,
    },
};
use ipnet::IpNet;
use nucnet_common::abi;
use std::{fmt, net::IpAddr, time::Duration};

/// Length of transmit queues in packets: the kernel's default for Ethernet.
const TX_QUEUE_LEN: u32 = 1000;

/// One step. What it is about is in the records of the [`World`]; what it holds is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Load the datapath, or open it.
    Datapath(String),
    /// Have a program on every uplink.
    Uplinks,
    /// Record that a network is being made.
    NetworkIntent(String),
    /// Make the bridge.
    Bridge(String),
    /// Let route lookups look from the bridge.
    BridgeSysctls(String),
    /// Give the bridge the network's own addresses.
    BridgeAddresses(String),
    /// Tell the programs how the network translates.
    NetworkEntry(String),
    /// Have the program on the bridge.
    BridgeProgram(String),
    /// Set the bridge up, and tell the programs of it.
    BridgeUp(String),
    /// Give a bridge that lost them its ports and neighbours.
    Members(String),
    /// Record that the network is there.
    NetworkRecord(String),
    /// Record that an endpoint is being made.
    EndpointIntent(String),
    /// Take addresses and ports.
    Claims(String),
    /// Make the veth pair.
    Veth(String),
    /// Have the program on the host side.
    Program(String),
    /// Write a policy into the maps.
    Policy(usize),
    /// Record that a policy is coming.
    EgressIntent(String),
    /// Have another policy of the maps in force for the endpoint.
    EgressSwitch(String),
    /// Record which policy is in force.
    EgressRecord(String),
    /// Tell the programs of the endpoint.
    Entries(String),
    /// Make the host side a port of the bridge again.
    Port(String),
    /// Tell the host where the endpoint's addresses are.
    Neighbours(String),
    /// Set the host side up.
    HostSide(String),
    /// Configure the container side.
    ContainerSide(String),
    /// Mount the container's `resolv.conf`.
    ResolvConf(String),
    /// Publish the ports.
    Publishes(String),
    /// Record that ports are being published.
    PublishIntent(String),
    /// Take the ports.
    PublishClaims(String),
    /// Record that ports are published.
    PublishRecord(String),
    /// Record that the endpoint is there.
    EndpointRecord(String),
    /// Record that a static mapping is being made.
    MappingIntent(String),
    /// Have an interface from which routes are looked up for mappings.
    MappingRoutes(String),
    /// Take the ports of a mapping.
    MappingClaims(String),
    /// Put a mapping in force.
    Mapping(String),
    /// Record that the mapping is there.
    MappingRecord(String),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Datapath(bpffs) => write!(f, "open or load the datapath under {bpffs}"),
            Self::Uplinks => write!(f, "put programs on the uplinks"),
            Self::NetworkIntent(name) => write!(f, "record network {name}"),
            Self::Bridge(bridge) => write!(f, "make bridge {bridge}"),
            Self::BridgeAddresses(what) => write!(f, "add addresses to bridge {what}"),
            Self::BridgeSysctls(bridge) => write!(f, "set forwarding of bridge {bridge} (only)"),
            Self::NetworkEntry(name) => write!(f, "tell the datapath of network {name}"),
            Self::BridgeProgram(bridge) => write!(f, "put the program on bridge {bridge}"),
            Self::BridgeUp(bridge) => write!(f, "set bridge {bridge} up"),
            Self::Members(bridge) => write!(f, "bring the endpoints on bridge {bridge} back"),
            Self::NetworkRecord(name) => write!(f, "record network {name} as active"),
            Self::EndpointIntent(id) => write!(f, "record endpoint {id}"),
            Self::Claims(what) => write!(f, "take {what}"),
            Self::Veth(what) => write!(f, "make {what}"),
            Self::Program(link) => write!(f, "put the program on {link}"),
            Self::Policy(entries) => {
                write!(f, "write the egress policy ({entries} entries)")
            }
            Self::EgressIntent(what) => write!(f, "record {what}"),
            Self::EgressSwitch(id) => write!(f, "switch endpoint {id} to it"),
            Self::EgressRecord(id) => write!(f, "record the egress policy of endpoint {id}"),
            Self::Entries(what) => write!(f, "tell the datapath of {what}"),
            Self::Port(bridge) => write!(f, "make it a port of bridge {bridge}"),
            Self::Neighbours(bridge) => write!(f, "add neighbours on {bridge}"),
            Self::HostSide(link) => write!(f, "set {link} up"),
            Self::ContainerSide(what) => write!(f, "configure {what} in the container"),
            Self::ResolvConf(what) => write!(f, "mount {what}"),
            Self::Publishes(what) => write!(f, "publish {what}"),
            Self::PublishIntent(what) => write!(f, "record {what}"),
            Self::PublishClaims(what) => write!(f, "take {what}"),
            Self::PublishRecord(what) => write!(f, "record {what} as published"),
            Self::EndpointRecord(id) => write!(f, "record endpoint {id} as active"),
            Self::MappingIntent(id) => write!(f, "record mapping {id}"),
            Self::MappingRoutes(link) => {
                write!(f, "make interface {link}, for route lookups only")
            }
            Self::MappingClaims(what) => write!(f, "take {what}"),
            Self::Mapping(words) => write!(f, "map {words}"),
            Self::MappingRecord(id) => write!(f, "record mapping {id} as active"),
        }
    }
}

/// What the programs are told of an endpoint.
pub(super) fn endpoint_entry(
    endpoint: &EndpointRecord,
    network: &NetworkRecord,
    bridge: u32,
    policy: Option<&Compiled>,
) -> abi::Endpoint {
    let address = |v6| endpoint.address(v6).map(to_abi).unwrap_or_default();
    let gateway = |v6| match endpoint.address(v6) {
        Some(_) => network
            .subnet(v6)
            .map(|s| to_abi(s.gateway()))
            .unwrap_or_default(),
        None => abi::Address::default(),
    };
    let mut entry = abi::Endpoint {
        number: endpoint.number,
        network: endpoint.network,
        bridge,
        delivery: abi::Delivery::Peer as u32,
        address4: address(false),
        address6: address(true),
        gateway4: gateway(false),
        gateway6: gateway(true),
        mac: endpoint.mac.octets(),
        gateway_mac: network.mac.octets(),
        isolated: network.isolate.into(),
        mtu: endpoint.mtu.bytes(),
        ..abi::Endpoint::default()
    };
    if let Some(policy) = policy {
        policy.enforce(policy.number, &mut entry);
    }
    entry
}

/// What the programs are told of a network. An uplink that is not there now serves nothing.
pub(super) fn network_entry(
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

/// The alias of an endpoint's host side.
pub(super) fn endpoint_alias(record: &EndpointRecord) -> String {
    format!("{}{}", netlink::ALIAS_PREFIX, record.id)
}

/// The alias of a network's bridge. No id has a colon in it.
pub(super) fn network_alias(record: &NetworkRecord) -> String {
    format!("{}network:{}", netlink::ALIAS_PREFIX, record.name)
}

/// The steps that make a network.
pub(super) fn network_steps(network: &NetworkRecord) -> Vec<Step> {
    let (name, bridge) = (network.name.to_string(), network.bridge.to_string());
    let addresses: Vec<String> = network
        .subnets
        .iter()
        .map(|subnet| subnet.gateway_net().to_string())
        .collect();
    vec![
        Step::NetworkIntent(name.clone()),
        Step::Bridge(bridge.clone()),
        Step::BridgeSysctls(bridge.clone()),
        Step::BridgeAddresses(format!("{bridge}: {}", addresses.join(", "))),
        Step::NetworkEntry(name.clone()),
        Step::BridgeProgram(bridge.clone()),
        Step::BridgeUp(bridge),
        Step::NetworkRecord(name),
    ]
}

/// The steps that make an endpoint.
pub(super) fn endpoint_steps(
    endpoint: &EndpointRecord,
    bridge: &str,
    policy: Option<&Compiled>,
) -> Vec<Step> {
    let (id, host) = (endpoint.id.to_string(), endpoint.host_ifname.to_string());
    let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
    let addresses = list(&mut endpoint.addresses.iter().map(ToString::to_string));
    let publishes = list(&mut endpoint.publishes.iter().map(|spec| format!("-p {spec}")));
    let claimed = match publishes.is_empty() {
        true => addresses.clone(),
        false => format!("{addresses}, {publishes}"),
    };
    let mut steps = vec![
        Step::EndpointIntent(id.clone()),
        Step::Claims(claimed),
        Step::Veth(format!(
            "veth pair {host}, {} in {}",
            endpoint.wish.ifname,
            endpoint.netns.display()
        )),
        Step::Program(host.clone()),
    ];
    if endpoint.policy.is_some() || policy.is_some() {
        steps.push(Step::Policy(policy.map_or(0, Compiled::entries)));
    }
    steps.extend([
        Step::Entries(format!("endpoint {id}")),
        Step::Neighbours(bridge.to_owned()),
        Step::HostSide(host),
        Step::ContainerSide(endpoint.wish.ifname.to_string()),
    ]);
    if let Some(resolv) = &endpoint.resolv {
        let resolvers = list(&mut endpoint.egress.dns().iter().map(ToString::to_string));
        let path = resolv.rootfs.join("etc/resolv.conf");
        steps.push(Step::ResolvConf(format!(
            "{} ({resolvers})",
            path.display()
        )));
    }
    if !publishes.is_empty() {
        steps.push(Step::Publishes(publishes));
    }
    steps.push(Step::EndpointRecord(id));
    steps
}

/// What the record of an endpoint says of a publish.
#[derive(Clone, Copy)]
enum Standing {
    Absent,
    Pending,
    Published,
}

type CidrEntries = Vec<(Prefix<abi::PolicyCidrKey>, abi::PolicyClass)>;
type PortEntries = Vec<(Prefix<abi::PolicyPortKey>, abi::PolicyRule)>;

/// The steps that publish more ports of an endpoint.
pub(super) fn publish_steps(publishes: &[PublishSpec]) -> Vec<Step> {
    let list: Vec<String> = publishes.iter().map(|spec| format!("-p {spec}")).collect();
    let what = list.join(", ");
    vec![
        Step::PublishIntent(what.clone()),
        Step::PublishClaims(what.clone()),
        Step::Publishes(what.clone()),
        Step::PublishRecord(what),
    ]
}

/// The steps that replace an endpoint's policy. Afterwards the former one is superseded.
pub(super) fn egress_steps(endpoint: &EndpointRecord, policy: Option<&Compiled>) -> Vec<Step> {
    let id = endpoint.id.to_string();
    // Nothing to enforce, before and after: there is only something to remember.
    if endpoint.policy.is_none() && policy.is_none() {
        return vec![
            Step::EgressIntent(COMING.to_owned()),
            Step::EgressRecord(id),
        ];
    }
    let mut steps = superseded_steps(policy);
    steps.extend([Step::EgressSwitch(id.clone()), Step::EgressRecord(id)]);
    steps
}

/// The steps that have made a policy what it is, once it is not in force any more.
pub(super) fn superseded_steps(policy: Option<&Compiled>) -> Vec<Step> {
    let mut steps = vec![Step::EgressIntent(COMING.to_owned())];
    steps.extend(policy.map(|policy| Step::Policy(policy.entries())));
    steps
}

const COMING: &str = "another egress policy";

/// What steps act upon.
pub(super) struct World<'a> {
    pub(super) session: &'a Session,
    pub(super) datapath: Option<Datapath>,
    /// Whether this process loaded the datapath.
    pub(super) loaded: bool,
    pub(super) network: Option<NetworkRecord>,
    pub(super) endpoint: Option<EndpointRecord>,
    pub(super) mapping: Option<MappingRecord>,
    pub(super) policy: Option<Compiled>,
    /// The policy that is to be in force.
    pub(super) coming: Option<OtherPolicy>,
    /// What becomes of flows that are open when the policy changes.
    pub(super) open_flows: OpenFlows,
    /// The endpoint's entry before the policy changed.
    pub(super) entry_before: Option<abi::Endpoint>,
    /// The publishes that steps are about: all of the endpoint's, or those that change.
    pub(super) publishes: Vec<PublishSpec>,
    pub(super) netns: Option<&'a NetnsFd>,
    /// The container's root directory, and the text of its `resolv.conf`.
    pub(super) resolv_conf: Option<(&'a Root, String)>,
    /// Whether what is undone was ever in use.
    pub(super) usage: Use,
    /// What steps are about is in use: one that fails undoes nothing.
    pub(super) repairs: bool,
    /// Something could not be removed: what says that it may be there stays.
    pub(super) troubled: bool,
}

impl<'a> World<'a> {
    pub(super) fn new(session: &'a Session) -> Self {
        Self {
            session,
            datapath: None,
            loaded: false,
            network: None,
            endpoint: None,
            mapping: None,
            policy: None,
            coming: None,
            open_flows: OpenFlows::default(),
            entry_before: None,
            publishes: Vec::new(),
            netns: None,
            resolv_conf: None,
            usage: Use::Unused,
            repairs: false,
            troubled: false,
        }
    }

    fn netlink(&self) -> &Netlink {
        &self.session.netlink
    }

    fn network(&self) -> &NetworkRecord {
        self.network
            .as_ref()
            .expect("steps of a network have its record")
    }

    fn endpoint(&self) -> &EndpointRecord {
        self.endpoint
            .as_ref()
            .expect("steps of an endpoint have its record")
    }

    pub(super) fn datapath(&mut self) -> Result<&mut Datapath, Error> {
        let bpffs = self.session.bpffs();
        self.datapath
            .as_mut()
            .ok_or_else(|| Error::DatapathGone(bpffs.to_owned()))
    }

    fn put_network(&mut self, change: impl FnOnce(&mut NetworkRecord)) -> Result<(), Error> {
        if let Some(network) = &mut self.network {
            change(network);
            self.session.state.put_network(network)?;
        }
        Ok(())
    }

    fn put_endpoint(&mut self, change: impl FnOnce(&mut EndpointRecord)) -> Result<(), Error> {
        if let Some(endpoint) = &mut self.endpoint {
            change(endpoint);
            self.session.state.put_endpoint(endpoint)?;
        }
        Ok(())
    }

    fn open_datapath(&mut self) -> Result<(), Error> {
        if self.datapath.is_some() {
            return Ok(());
        }
        let (bpffs, host) = (self.session.bpffs(), &self.session.bpf_host);
        self.loaded = Datapath::open_existing(bpffs, host)?.is_none();
        let datapath = Datapath::open_or_load(bpffs, host)?;
        let hooked = self.hook_host(&datapath);
        if hooked.is_err() && self.loaded {
            drop(datapath);
            // The error that led here is the one to report.
            let _ = Datapath::remove(bpffs);
            return hooked;
        }
        hooked?;
        self.datapath = Some(datapath);
        Ok(())
    }

    /// Puts the programs about the host's own sockets where they belong.
    fn hook_host(&self, datapath: &Datapath) -> Result<(), Error> {
        datapath.attach_loopback()?;
        let held = self
            .session
            .cgroup()
            .and_then(|cgroup| Ok(datapath.attach_bind(&cgroup)?));
        match held {
            // Who publishes nothing has no ports to hold, and without control groups nobody can.
            Err(error)
                if self.session.host.options().cgroup.is_none()
                    || self
                        .endpoint
                        .as_ref()
                        .is_some_and(|e| e.publishes.is_empty()) =>
            {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "sockets of the host can take published ports"
                );
                Ok(())
            }
            held => held,
        }
    }

    /// Puts programs on all uplinks and takes them off what is none any more.
    fn sync_uplinks(&mut self) -> Result<(), Error> {
        let interfaces: Vec<HostInterface> = self
            .netlink()
            .uplinks()?
            .into_iter()
            .filter_map(|uplink| {
                Some(HostInterface {
                    index: uplink.link.index,
                    link_layer: link_layer(&uplink.link)?,
                    mtu: uplink.link.mtu,
                    addresses: uplink.addresses.iter().map(IpNet::addr).collect(),
                    name: uplink.link.name,
                })
            })
            .collect();
        let changes = self.datapath()?.sync_uplinks(&interfaces)?;
        for (name, kind) in changes.attached {
            tracing::debug!(interface = name, ?kind, "put a program on the uplink");
        }
        for name in changes.detached {
            tracing::debug!(interface = name, "took the program off the uplink");
        }
        // One that is restricted to uplinks knows them by their indexes.
        for network in self.session.state.sound_networks()? {
            let entry = network_entry(&network, |name| {
                let interface = interfaces.iter().find(|there| there.name == name)?;
                Some(interface.index)
            });
            let known = self.datapath()?.networks.get(&network.number)?;
            if network.state == State::Active && known != Some(entry) {
                self.datapath()?.networks.insert(&network.number, &entry)?;
            }
        }
        let host = self.session.bpf_host;
        self.datapath()?.refresh_settings(&host)?;
        Ok(())
    }

    fn write_network(&mut self) -> Result<(), Error> {
        let network = self.network().clone();
        let links = self.netlink().links()?;
        let entry = network_entry(&network, |name| {
            let link = links.iter().find(|link| link.name == name)?;
            Some(link.index)
        });
        Ok(self.datapath()?.networks.insert(&network.number, &entry)?)
    }

    fn remove_network_entry(&mut self) -> Result<(), Error> {
        let number = self.network().number;
        if let Some(datapath) = &mut self.datapath {
            datapath.networks.remove(&number)?;
        }
        Ok(())
    }

    fn make_bridge(&mut self) -> Result<(), Error> {
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

    fn bridge_link(&self) -> Result<u32, Error> {
        match self.network().link {
            Some(link) => Ok(link),
            None => Ok(self.netlink().link(self.network().bridge.as_str())?.index),
        }
    }

    /// Of this bridge only: forwarding makes route lookups from it possible, and where IPv6 is
    /// off for new interfaces, it is on for this one.
    fn set_bridge_sysctls(&self) -> Result<(), Error> {
        let network = self.network();
        let bridge = network.bridge.as_str();
        for subnet in &network.subnets {
            let family = match subnet.gateway() {
                IpAddr::V4(_) => Family::Ipv4,
                IpAddr::V6(_) => Family::Ipv6,
            };
            if family == Family::Ipv6 {
                Sysctl::link(family, bridge, LinkKey::DisableIpv6).write("0")?;
                // A link-local address would be looked for twice and asked after by nobody.
                Sysctl::link(family, bridge, LinkKey::AddrGenMode).write("1")?;
            }
            sysctl::forward(family, bridge)?;
        }
        Ok(())
    }

    fn holder(&self) -> Holder {
        Holder {
            number: self.endpoint().number,
            id: self.endpoint().id.clone(),
        }
    }

    fn claim(&self) -> Result<(), Error> {
        let (endpoint, holder) = (self.endpoint(), self.holder());
        let state = &self.session.state;
        for address in &endpoint.addresses {
            if let Some(owner) = state.claim(endpoint.network, Claim::Address(*address), &holder)? {
                return Err(Error::AddressTaken {
                    address: *address,
                    owner: owner.id,
                });
            }
        }
        if let Some(owner) = state.claim(endpoint.network, Claim::Mac(endpoint.mac), &holder)? {
            return Err(Error::MacTaken {
                mac: endpoint.mac,
                owner: owner.id,
            });
        }
        let namespace = Claim::Namespace(endpoint.namespace.number());
        if let Some(owner) = state.claim(endpoint.network, namespace, &holder)? {
            return Err(Error::NamespaceTaken {
                netns: endpoint.netns.display().to_string(),
                network: endpoint.wish.network.clone(),
                owner: owner.id,
            });
        }
        self.claim_publishes()
    }

    fn release(&self) -> Result<(), Error> {
        let endpoint = self.endpoint();
        let state = &self.session.state;
        self.release_publishes()?;
        let addresses = endpoint
            .addresses
            .iter()
            .map(|address| Claim::Address(*address));
        let namespace = Claim::Namespace(endpoint.namespace.number());
        for claim in addresses.chain([Claim::Mac(endpoint.mac), namespace]) {
            state.release(endpoint.network, claim, endpoint.number, self.usage)?;
        }
        Ok(())
    }

    fn make_veth(&mut self) -> Result<(), Error> {
        let (endpoint, bridge) = (self.endpoint(), self.bridge_link()?);
        let netns = self.netns.expect("an attach has its namespace");
        let alias = endpoint_alias(endpoint);
        let veth = self.netlink().create_veth(&VethSpec {
            name: endpoint.host_ifname.as_str(),
            mac: endpoint.host_mac.octets(),
            alias: &alias,
            port: Some((bridge, Port::ENDPOINT)),
            netns,
            peer_name: endpoint.wish.ifname.as_str(),
            peer_mac: endpoint.mac.octets(),
            mtu: endpoint.mtu.bytes(),
            tx_queue_len: TX_QUEUE_LEN,
        })?;
        self.put_endpoint(|endpoint| endpoint.link = Some(veth.index))
            .inspect_err(|_| {
                // The error that led here is the one to report.
                let _ = self.netlink().delete_link(veth.index, Owner::Alias(&alias));
            })
    }

    fn enslave(&self) -> Result<(), Error> {
        let link = self.netlink().link(self.endpoint().host_ifname.as_str())?;
        self.make_port(&link)
    }

    fn make_port(&self, link: &Link) -> Result<(), Error> {
        let bridge = self.bridge_link()?;
        if link.master != Some(bridge) {
            self.netlink().enslave(link.index, bridge, Port::ENDPOINT)?;
        }
        Ok(())
    }

    /// A bridge that was down has lost its neighbours; one that was made anew, its ports as well,
    /// and the maps know another one.
    fn bring_members_back(&mut self) -> Result<(), Error> {
        let (number, bridge) = (self.network().number, self.bridge_link()?);
        let mut endpoints = self.session.state.sound_endpoints()?;
        endpoints.retain(|endpoint| endpoint.network == number && endpoint.state == State::Active);
        for endpoint in endpoints {
            let link = self.netlink().find_link(endpoint.host_ifname.as_str())?;
            let alias = endpoint_alias(&endpoint);
            let Some(link) = link.filter(|link| link.alias.as_deref() == Some(&alias)) else {
                continue;
            };
            self.make_port(&link)?;
            self.introduce(&endpoint)?;
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

    fn policy_entries(&self) -> (CidrEntries, PortEntries) {
        let Some(policy) = &self.policy else {
            return (Vec::new(), Vec::new());
        };
        let cidrs = policy.cidrs.iter();
        let ports = policy.ports.iter();
        (
            cidrs
                .map(|(bits, key, value)| (Prefix::new(*bits, *key), *value))
                .collect(),
            ports
                .map(|(bits, key, value)| (Prefix::new(*bits, *key), *value))
                .collect(),
        )
    }

    /// Ports first: a prefix never leads to a class whose verdicts are not there.
    fn write_policy(&mut self) -> Result<(), Error> {
        let (cidrs, ports) = self.policy_entries();
        let datapath = self.datapath()?;
        let written = datapath
            .policy_ports
            .insert_all(&ports)
            .and_then(|()| datapath.policy_cidrs.insert_all(&cidrs));
        if written.is_err() && !self.repairs {
            // Some may be in; the error that led here is the one to report.
            let _ = self.remove_policy();
        }
        Ok(written?)
    }

    fn remove_policy(&mut self) -> Result<(), Error> {
        let (cidrs, ports) = self.policy_entries();
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let cidrs: Vec<_> = cidrs.into_iter().map(|(key, _)| key).collect();
        let ports: Vec<_> = ports.into_iter().map(|(key, _)| key).collect();
        datapath.policy_cidrs.remove_all(&cidrs, |_| {})?;
        datapath.policy_ports.remove_all(&ports, |_| {})?;
        Ok(())
    }

    /// The endpoint's entry, unless the interface has come to be somebody else's.
    fn entry(&mut self) -> Result<(u32, abi::Endpoint), Error> {
        let endpoint = self.endpoint();
        let (id, number, link) = (endpoint.id.clone(), endpoint.number, endpoint.link);
        let datapath = self.datapath()?;
        let entry = match link {
            Some(link) => datapath.endpoints.get(&link)?.map(|entry| (link, entry)),
            None => None,
        };
        entry
            .filter(|(_, entry)| entry.number == number)
            .ok_or(Error::NotActive(id))
    }

    /// One write: no packet sees anything between the old policy and the new one.
    fn switch_policy(&mut self) -> Result<(), Error> {
        let (link, before) = self.entry()?;
        let policy = self.policy.clone().unwrap_or_default();
        let since = match self.open_flows {
            OpenFlows::Judged => policy.number,
            OpenFlows::Kept => before.policy_since,
        };
        let mut entry = before;
        policy.enforce(since, &mut entry);
        self.datapath()?.endpoints.insert(&link, &entry)?;
        self.entry_before = Some(before);
        Ok(())
    }

    fn switch_policy_back(&mut self) -> Result<(), Error> {
        let Some(before) = self.entry_before.take() else {
            return Ok(());
        };
        let (link, _) = self.entry()?;
        Ok(self.datapath()?.endpoints.insert(&link, &before)?)
    }

    fn owner(&self) -> Option<abi::Owner> {
        let endpoint = self.endpoint();
        Some(abi::Owner {
            link: endpoint.link?,
            endpoint: endpoint.number,
        })
    }

    fn write_entries(&mut self) -> Result<(), Error> {
        let bridge = self.bridge_link()?;
        let (endpoint, network) = (self.endpoint().clone(), self.network().clone());
        let Some(owner) = self.owner() else {
            return Ok(());
        };
        let policy = match &self.policy {
            Some(policy) => Some(policy.clone()),
            None => endpoint.policy_in_force().compile()?,
        };
        let mut entry = endpoint_entry(&endpoint, &network, bridge, policy.as_ref());
        if let Some(there) = self.datapath()?.endpoints.get(&owner.link)?
            && (there.number, there.policy) == (entry.number, entry.policy)
        {
            // Flows that were to go on under an earlier policy do.
            entry.policy_since = there.policy_since;
        }
        Ok(self.datapath()?.put_endpoint(owner.link, &entry)?)
    }

    fn remove_entries(&mut self) -> Result<(), Error> {
        let endpoint = self.endpoint().clone();
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        // The index of the link, or the address, may have come to be somebody else's.
        if let Some(link) = endpoint.link
            && datapath
                .endpoints
                .get(&link)?
                .is_some_and(|entry| entry.number == endpoint.number)
        {
            datapath.remove_endpoint(link)?;
        } else {
            for address in &endpoint.addresses {
                let key = to_abi(*address);
                if datapath
                    .addresses
                    .get(&key)?
                    .is_some_and(|owner| owner.endpoint == endpoint.number)
                {
                    datapath.addresses.remove(&key)?;
                }
            }
            datapath.purge_endpoint(endpoint.number)?;
        }
        // Those that siblings opened to it: somebody else may get its addresses.
        let party = endpoint.party();
        datapath.end_flows(|_, flow| party.was_opened_to(flow))?;
        Ok(())
    }

    fn add_neighbours(&self) -> Result<(), Error> {
        self.introduce(self.endpoint())
    }

    /// Tells the host where an endpoint's addresses are.
    fn introduce(&self, endpoint: &EndpointRecord) -> Result<(), Error> {
        let (link, mac) = (self.bridge_link()?, endpoint.mac.octets());
        endpoint.addresses.iter().try_for_each(|address| {
            Ok(self.netlink().ensure_neighbour(&Neighbour {
                link,
                address: *address,
                mac,
            })?)
        })
    }

    fn remove_neighbours(&self) -> Result<(), Error> {
        // With the bridge went its neighbours.
        let Some(link) = self.network.as_ref().and_then(|network| network.link) else {
            return Ok(());
        };
        for address in &self.endpoint().addresses {
            self.netlink().remove_neighbour(link, *address)?;
        }
        Ok(())
    }

    fn configure_container(&mut self) -> Result<(), Error> {
        let (endpoint, network) = (self.endpoint(), self.network());
        let netns = self.netns.expect("an attach has its namespace");
        let default_route = netns::run_in(netns, || configure(endpoint, network))??;
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.default_route = default_route;
        }
        // With its first port the bridge gets carrier, and only then its addresses work.
        let gateways = self.network().subnets.iter().map(|subnet| subnet.gateway());
        await_addresses(self.netlink(), self.bridge_link()?, gateways)
    }

    fn mount_resolv_conf(&mut self) -> Result<(), Error> {
        let (Some((root, text)), Some(endpoint)) = (&self.resolv_conf, &mut self.endpoint) else {
            return Ok(());
        };
        let Some(record) = &mut endpoint.resolv else {
            return Ok(());
        };
        let intended = record.made;
        let state = &self.session.state;
        state.mount_resolv_conf(&endpoint.id, root, text, record)?;
        if self.repairs {
            // What is there to mount on was made for it.
            record.made = intended;
        }
        if record.made != intended {
            state.put_endpoint(endpoint)?;
        }
        Ok(())
    }

    fn unmount_resolv_conf(&self) -> Result<(), Error> {
        let endpoint = self.endpoint();
        let record = endpoint.resolv.as_ref();
        Ok(self
            .session
            .state
            .unmount_resolv_conf(&endpoint.id, record)?)
    }

    fn publish_entries(&self) -> Vec<(Prefix<abi::PublishKey>, abi::Publish)> {
        let Some(owner) = self.owner() else {
            return Vec::new();
        };
        let (v4, v6) = families(self.endpoint());
        self.publishes
            .iter()
            .flat_map(|spec| spec.entries(owner, v4, v6))
            .map(|(bits, key, value)| (Prefix::new(bits, key), value))
            .collect()
    }

    fn publish(&mut self) -> Result<(), Error> {
        let entries = self.publish_entries();
        let published = match self.datapath()?.publishes.insert_all(&entries) {
            // What is repaired was published before whoever may be listening now came.
            Ok(()) if self.repairs => Ok(()),
            Ok(()) => self.check_sockets(),
            Err(error) => Err(error.into()),
        };
        if published.is_err() && !self.repairs {
            // Some may be in; the error that led here is the one to report.
            let _ = self.unpublish();
        }
        published
    }

    /// From now on no socket of the host can bind the ports; one may have done so since they
    /// were looked at.
    fn check_sockets(&self) -> Result<(), Error> {
        let ((v4, v6), sockets) = (families(self.endpoint()), Sockets::default());
        for spec in &self.publishes {
            if let Some(listener) = sockets.in_the_way(&spec.narrowed(v4, v6))? {
                return Err(publish::in_use(spec, listener));
            }
        }
        Ok(())
    }

    /// Removes the entries, and ends what came in by them.
    fn unpublish(&mut self) -> Result<(), Error> {
        let (entries, number) = (self.publish_entries(), self.endpoint().number);
        let (party, publishes) = (self.endpoint().party(), self.publishes.clone());
        let goes = self.endpoint().state == State::Removing;
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let keys: Vec<_> = entries.into_iter().map(|(key, _)| key).collect();
        datapath.remove_publishes(&keys, |owner| owner == number)?;
        // All flows of an endpoint that goes are removed with its entries.
        if !goes {
            datapath.end_flows(|key, flow| {
                let mut publishes = publishes.iter();
                publishes.any(|publish| party.came_by(publish, key, flow))
            })?;
        }
        Ok(())
    }

    fn claim_publishes(&self) -> Result<(), Error> {
        let ((v4, v6), holder) = (families(self.endpoint()), self.holder());
        for spec in &self.publishes {
            self.session
                .state
                .claim_publish(&spec.narrowed(v4, v6), &holder)?;
        }
        Ok(())
    }

    fn release_publishes(&self) -> Result<(), Error> {
        let (endpoint, (v4, v6)) = (self.endpoint(), families(self.endpoint()));
        for spec in &self.publishes {
            let spec = spec.narrowed(v4, v6);
            self.session.state.release_publish(&spec, endpoint.number)?;
        }
        Ok(())
    }

    fn record_publishes(&mut self, standing: Standing) -> Result<(), Error> {
        let these = self.publishes.clone();
        self.put_endpoint(|endpoint| {
            endpoint.publishes.retain(|spec| !these.contains(spec));
            endpoint.pending.retain(|spec| !these.contains(spec));
            match standing {
                Standing::Published => endpoint.publishes.extend(these),
                Standing::Pending => endpoint.pending.extend(these),
                Standing::Absent => {}
            }
        })
    }
}

fn families(endpoint: &EndpointRecord) -> (bool, bool) {
    (
        endpoint.address(false).is_some(),
        endpoint.address(true).is_some(),
    )
}

/// Inside the container's namespace: addresses, links up, default routes, the gateways as
/// neighbours. Says whether default routes were added: not where others own them.
fn configure(endpoint: &EndpointRecord, network: &NetworkRecord) -> Result<bool, Error> {
    let netlink = Netlink::open()?;
    let name = endpoint.wish.ifname.as_str();
    let link = netlink.link(name)?.index;
    if endpoint.address(true).is_some() {
        for (key, value) in [
            (LinkKey::DisableIpv6, "0"),
            // Addresses and routes are nucnet's to give.
            (LinkKey::AcceptRa, "0"),
            // And nobody else has them.
            (LinkKey::AcceptDad, "0"),
        ] {
            match Sysctl::link(Family::Ipv6, name, key).write(value) {
                // The kernel says by refusing the address whether there is IPv6 at all.
                Err(sysctl::Error::NotFound { .. }) => {}
                result => drop(result?),
            }
        }
    }
    let defaults = netlink.default_routes()?;
    let pairs: Vec<_> = endpoint
        .addresses
        .iter()
        .filter_map(|address| {
            let subnet = network.subnet_of(*address)?;
            Some((subnet.with_prefix(*address), subnet))
        })
        .collect();
    for (address, _) in &pairs {
        netlink.ensure_address(link, *address)?;
    }
    netlink.set_up("lo")?;
    netlink.set_up(link)?;
    let mut added = false;
    for (address, subnet) in &pairs {
        let gateway = subnet.gateway();
        netlink.ensure_neighbour(&Neighbour {
            link,
            address: gateway,
            mac: network.mac.octets(),
        })?;
        let is_owned = |d: &netlink::KernelRoute| {
            d.destination.addr().is_ipv4() == gateway.is_ipv4()
                && d.hops.iter().all(|hop| hop.link != link)
        };
        if !defaults.iter().any(is_owned) {
            netlink.ensure_route(&Route::default_via_gateway(link, gateway, &[*address]))?;
            added = true;
        }
    }
    await_addresses(
        &netlink,
        link,
        pairs.iter().map(|(address, _)| address.addr()),
    )?;
    Ok(added)
}

/// Waits until packets to addresses of a link are taken, so that the first one after an attach
/// gets its answer.
fn await_addresses(
    netlink: &Netlink,
    link: u32,
    addresses: impl Iterator<Item = IpAddr>,
) -> Result<(), Error> {
    // Being asked for the link has the kernel notice its carrier now, not within a second.
    netlink.link(link)?;
    for address in addresses {
        if !netlink.await_local(address, Duration::from_secs(2))? {
            tracing::warn!(%address, "the kernel does not take packets to this address yet");
        }
    }
    Ok(())
}

impl Executor<Step> for World<'_> {
    type Error = Error;

    fn apply(&mut self, step: &Step) -> Result<(), Error> {
        match step {
            Step::Datapath(_) => self.open_datapath(),
            Step::Uplinks => self.sync_uplinks(),
            Step::NetworkIntent(_) => {
                self.put_network(|network| network.state = State::Configuring)
            }
            Step::Bridge(_) => self.make_bridge(),
            Step::BridgeAddresses(_) => {
                let wanted: Vec<IpNet> = self
                    .network()
                    .subnets
                    .iter()
                    .map(|subnet| subnet.gateway_net())
                    .collect();
                self.netlink()
                    .converge_addresses(self.bridge_link()?, &wanted)?;
                Ok(())
            }
            Step::BridgeSysctls(_) => self.set_bridge_sysctls(),
            Step::NetworkEntry(_) => self.write_network(),
            Step::BridgeProgram(bridge) => {
                self.datapath()?.attach_bridge(bridge)?;
                Ok(())
            }
            Step::BridgeUp(_) => {
                let link = self.bridge_link()?;
                self.netlink().set_up(link)?;
                Ok(())
            }
            Step::Members(_) => self.bring_members_back(),
            Step::NetworkRecord(_) => self.put_network(|network| network.state = State::Active),
            Step::EndpointIntent(_) => {
                self.put_endpoint(|endpoint| endpoint.state = State::Configuring)
            }
            Step::Claims(_) => self.claim(),
            Step::Veth(_) => self.make_veth(),
            Step::Program(link) => Ok(self.datapath()?.attach_endpoint(link)?),
            Step::Policy(_) => self.write_policy(),
            Step::EgressIntent(_) => {
                let coming = self.coming.clone();
                self.put_endpoint(|endpoint| endpoint.other_policy = coming)
            }
            Step::EgressSwitch(_) => self.switch_policy(),
            Step::EgressRecord(_) => self.put_endpoint(EndpointRecord::exchange_policies),
            Step::Entries(_) => self.write_entries(),
            Step::Port(_) => self.enslave(),
            Step::Neighbours(_) => self.add_neighbours(),
            Step::HostSide(link) => Ok(self.netlink().set_up(link)?),
            Step::ContainerSide(_) => self.configure_container(),
            Step::ResolvConf(_) => self.mount_resolv_conf(),
            Step::Publishes(_) => self.publish(),
            Step::PublishIntent(_) => self.record_publishes(Standing::Pending),
            Step::PublishClaims(_) => self.claim_publishes(),
            Step::PublishRecord(_) => self.record_publishes(Standing::Published),
            Step::EndpointRecord(_) => self.put_endpoint(|endpoint| endpoint.state = State::Active),
            Step::MappingIntent(_) => self.put_mapping(State::Configuring),
            Step::MappingRoutes(_) => self.make_mapping_routes(),
            Step::MappingClaims(_) => self.claim_mapping(),
            Step::Mapping(_) => self.write_mapping(),
            Step::MappingRecord(_) => self.put_mapping(State::Active),
        }
        .inspect_err(|_| self.clean_up_after(step))
    }

    fn undo(&mut self, step: &Step) -> Result<(), Error> {
        let result = match step {
            Step::Datapath(_) => self.unload(),
            // They go with their links, or with the datapath.
            Step::Uplinks
            | Step::BridgeAddresses(_)
            | Step::BridgeSysctls(_)
            | Step::BridgeUp(_)
            | Step::Members(_)
            | Step::Program(_)
            | Step::Port(_)
            | Step::HostSide(_)
            | Step::ContainerSide(_) => Ok(()),
            Step::NetworkRecord(_) => self.put_network(|network| network.state = State::Removing),
            Step::NetworkEntry(_) => self.remove_network_entry(),
            Step::BridgeProgram(bridge) => match &self.datapath {
                Some(datapath) => datapath.detach_bridge(bridge).map_err(Error::from),
                None => Ok(()),
            },
            Step::Bridge(bridge) => {
                let alias = network_alias(self.network());
                let deleted = self.netlink().delete_bridge(bridge, Owner::Alias(&alias));
                deleted.map(drop).map_err(Error::from)
            }
            Step::NetworkIntent(_) if self.troubled => Ok(()),
            Step::NetworkIntent(_) => self.forget_network(),
            Step::EndpointRecord(_) => {
                self.put_endpoint(|endpoint| endpoint.state = State::Removing)
            }
            Step::ResolvConf(_) => self.unmount_resolv_conf(),
            Step::Publishes(_) => self.unpublish(),
            Step::PublishIntent(_) if self.troubled => Ok(()),
            Step::PublishIntent(_) => self.record_publishes(Standing::Absent),
            Step::PublishRecord(_) => self.record_publishes(Standing::Pending),
            Step::PublishClaims(_) if self.troubled => Ok(()),
            Step::PublishClaims(_) => self.release_publishes(),
            Step::Neighbours(_) => self.remove_neighbours(),
            Step::EgressRecord(_) => self.put_endpoint(EndpointRecord::exchange_policies),
            Step::EgressSwitch(_) => self.switch_policy_back(),
            Step::EgressIntent(_) if self.troubled => Ok(()),
            Step::EgressIntent(_) => self.put_endpoint(|endpoint| endpoint.other_policy = None),
            Step::Entries(_) => self.remove_entries(),
            Step::Policy(_) => self.remove_policy(),
            Step::Veth(_) => {
                let endpoint = self.endpoint();
                let alias = endpoint_alias(endpoint);
                let name = endpoint.host_ifname.as_str();
                let deleted = self.netlink().delete_link(name, Owner::Alias(&alias));
                deleted.map(drop).map_err(Error::from)
            }
            Step::MappingRecord(_) => self.put_mapping(State::Removing),
            Step::Mapping(_) => self.unwrite_mapping(),
            Step::MappingClaims(_) if self.troubled => Ok(()),
            Step::MappingClaims(_) => self.release_mapping(),
            Step::MappingRoutes(_) => self.remove_mapping_routes(),
            Step::MappingIntent(_) if self.troubled => Ok(()),
            Step::MappingIntent(_) => self.forget_mapping(),
            // Nobody gets what may still be in use.
            Step::Claims(_) | Step::EndpointIntent(_) if self.troubled => Ok(()),
            Step::Claims(_) => self.release(),
            Step::EndpointIntent(_) => {
                let id = &self.endpoint().id;
                self.session.state.remove_endpoint(id).map_err(Error::from)
            }
        };
        self.troubled |= result.is_err();
        result
    }

    fn before(&mut self, _: usize) -> Result<(), Error> {
        #[cfg(any(debug_assertions, feature = "faults"))]
        super::faults::strike()?;
        Ok(())
    }
}

impl World<'_> {
    /// A step that fails half-way leaves nothing: what it writes in several pieces is undone.
    fn clean_up_after(&mut self, step: &Step) {
        let partial = matches!(
            step,
            Step::NetworkIntent(_)
                | Step::EndpointIntent(_)
                | Step::Claims(_)
                | Step::PublishIntent(_)
                | Step::PublishClaims(_)
                | Step::PublishRecord(_)
                | Step::EgressIntent(_)
                | Step::EgressRecord(_)
                | Step::Entries(_)
                | Step::Neighbours(_)
                | Step::ResolvConf(_)
                | Step::MappingIntent(_)
                | Step::MappingRoutes(_)
                | Step::MappingClaims(_)
                | Step::Mapping(_)
                | Step::MappingRecord(_)
        );
        if partial
            && !self.repairs
            && let Err(error) = self.undo(step)
        {
            tracing::warn!(%step, error = &error as &dyn std::error::Error, "not undone");
        }
    }

    fn forget_network(&mut self) -> Result<(), Error> {
        let network = self.network();
        self.session.state.forget_network(network.number)?;
        self.session.state.remove_network(&network.name)?;
        Ok(())
    }

    /// Takes away the datapath if this process loaded it.
    fn unload(&mut self) -> Result<(), Error> {
        self.datapath = None;
        if !self.loaded {
            return Ok(());
        }
        match Datapath::remove(self.session.bpffs()).pop() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }
}
