//! What the kernel has of networks and endpoints: what `status` shows as drift, and `attach`
//! mends.

use super::{
    Error,
    step::{endpoint_alias, endpoint_entry, guest_entry, network_alias, network_entry},
};
use crate::{
    kernel::{
        bpf::{self, Attachment, Datapath, LinkLayer, Prefix},
        netlink::{
            self, Direction, Link, LinkType, Neighbour, Netlink, State as LinkState, Uplink,
        },
        netns::{self, NetnsFd},
        resolv,
        sysctl::{Family, LinkKey, Sysctl},
    },
    model::{
        drift::{self, EndpointSight, Hooked, LinkSight, NetnsSight, NetworkSight},
        record::{DatapathKind, EndpointRecord, NetworkRecord},
        slot::Slot,
        to_abi,
    },
};
use nucnet_common::abi::{self, program};
use std::{cell::RefCell, collections::HashMap, net::IpAddr};

/// An interface by which packets come and go.
pub(super) struct SeenUplink {
    pub(super) uplink: Uplink,
    pub(super) layer: LinkLayer,
    /// How the program sits there.
    pub(super) kind: Option<bpf::AttachKind>,
    /// Whether it does.
    pub(super) hooked: Hooked,
}

/// How frames begin on an interface; none: there is no program for it.
pub(super) fn link_layer(link: &Link) -> Option<LinkLayer> {
    match link.link_type {
        LinkType::Ethernet => Some(LinkLayer::Ethernet),
        LinkType::Loopback => None,
        LinkType::Other(kind) => LinkLayer::from_hardware_type(kind),
    }
}

/// What is there, looked at once.
pub(super) struct View<'a> {
    pub(super) netlink: &'a Netlink,
    /// Links by name: those that will be asked about.
    pub(super) links: HashMap<String, Link>,
    pub(super) datapath: Option<&'a Datapath>,
    /// What carries packets.
    pub(super) kind: DatapathKind,
    /// Whether IPv6 is served by it.
    serves_v6: bool,
    programs: Vec<bpf::ProgramStatus>,
    pub(super) attachments: Vec<Attachment>,
    mounts: Vec<resolv::Mount>,
    /// Neighbours by the bridge that they are on, once asked for.
    neighbours: RefCell<HashMap<u32, Vec<Neighbour>>>,
}

impl<'a> View<'a> {
    pub(super) fn new(
        netlink: &'a Netlink,
        links: impl IntoIterator<Item = Link>,
        datapath: Option<&'a Datapath>,
        mounts: Vec<resolv::Mount>,
    ) -> Result<Self, Error> {
        let (programs, attachments) = match datapath {
            Some(datapath) => (datapath.programs()?, datapath.attachments()?),
            None => Default::default(),
        };
        Ok(Self {
            netlink,
            links: links
                .into_iter()
                .map(|link| (link.name.clone(), link))
                .collect(),
            datapath,
            kind: DatapathKind::Ebpf,
            serves_v6: true,
            programs,
            attachments,
            mounts,
            neighbours: RefCell::default(),
        })
    }

    /// Says what carries packets, and whether it serves IPv6.
    pub(super) fn carried_by(&mut self, kind: DatapathKind, serves_v6: bool) {
        (self.kind, self.serves_v6) = (kind, serves_v6);
    }

    fn has_neighbour(&self, neighbour: &Neighbour) -> Result<bool, Error> {
        let mut known = self.neighbours.borrow_mut();
        Ok(match known.get(&neighbour.link) {
            Some(there) => there.contains(neighbour),
            None => {
                let there = self.netlink.neighbours(neighbour.link)?;
                let is_there = there.contains(neighbour);
                known.insert(neighbour.link, there);
                is_there
            }
        })
    }

    fn program_id(&self, name: &str) -> Option<u32> {
        let program = self.programs.iter().find(|program| program.name == name)?;
        Some(program.id)
    }

    fn has_filter(&self, link: u32, direction: Direction, name: &str) -> Result<bool, Error> {
        let Some(id) = self.program_id(name) else {
            return Ok(false);
        };
        let filters = self.netlink.filters(link, direction)?;
        Ok(filters.iter().any(|filter| filter.program == Some(id)))
    }

    /// How a program sits on an interface of the host, and whether it is really there.
    pub(super) fn hooked(
        &self,
        link: u32,
        name: &str,
        direction: Direction,
    ) -> Result<(Option<bpf::AttachKind>, Hooked), Error> {
        let noted = self
            .attachments
            .iter()
            .find(|noted| noted.index == link && noted.program == name);
        let Some(noted) = noted else {
            return Ok((None, Hooked::Never));
        };
        let is_there = match noted.linked {
            Some(program) => Some(program) == self.program_id(name),
            None => self.has_filter(link, direction, name)?,
        };
        let hooked = if is_there { Hooked::Yes } else { Hooked::Lost };
        Ok((Some(noted.kind), hooked))
    }

    /// All uplinks that there is a program for.
    pub(super) fn uplinks(&self) -> Result<Vec<SeenUplink>, Error> {
        let mut seen = Vec::new();
        for uplink in self.netlink.uplinks()? {
            let Some(layer) = link_layer(&uplink.link) else {
                continue;
            };
            let (kind, hooked) = match self.kind {
                DatapathKind::Ebpf => {
                    self.hooked(uplink.link.index, layer.program(), Direction::Ingress)?
                }
                DatapathKind::Iptables => (None, forwards(&uplink.link.name)),
            };
            seen.push(SeenUplink {
                uplink,
                layer,
                kind,
                hooked,
            });
        }
        Ok(seen)
    }

    fn link(&self, name: &str, alias: &str, index: Option<u32>) -> LinkSight {
        let link = self.links.get(name);
        drift::link_sight(
            link.is_some(),
            link.is_some_and(|l| l.has_alias(alias) && Some(l.index) == index),
            link.is_some_and(|link| link.state == LinkState::Up),
        )
    }

    pub(super) fn network(&self, network: &NetworkRecord) -> Result<NetworkSight, Error> {
        let index = network.link.unwrap_or_default();
        let bridge = self.link(
            network.bridge.as_str(),
            &network_alias(network),
            network.link,
        );
        // Where rules carry packets, they are looked at altogether.
        let by_rules = self.kind == DatapathKind::Iptables;
        let (_, hooked) = self.hooked(index, program::FROM_HOST, Direction::Egress)?;
        let mut sight = NetworkSight {
            bridge,
            program: by_rules || hooked == Hooked::Yes,
            entry: by_rules || self.has_network_entry(network)?,
            addresses: Vec::new(),
            not_forwarding: Vec::new(),
            is_open: by_rules && self.is_open(network),
        };
        if matches!(bridge, LinkSight::Absent | LinkSight::Foreign) {
            return Ok(sight);
        }
        let present = self.netlink.addresses_of(index)?;
        for subnet in network.served(self.serves_v6) {
            let gateway = subnet.gateway();
            if !present.iter().any(|a| a.address == subnet.gateway_net()) {
                sight.addresses.push(gateway);
            }
            let family = match gateway {
                IpAddr::V4(_) => Family::Ipv4,
                IpAddr::V6(_) => Family::Ipv6,
            };
            let sysctl = Sysctl::link(family, network.bridge.as_str(), LinkKey::Forwarding);
            // One that cannot be read is nobody's drift.
            if sysctl.read().is_ok_and(|value| value == "0") {
                sight.not_forwarding.push(family.to_string());
            }
        }
        Ok(sight)
    }

    /// Whether IPv6 comes in by a bridge where no rule is about it.
    fn is_open(&self, network: &NetworkRecord) -> bool {
        let has_rules = self.serves_v6 && network.subnet(true).is_some();
        let bridge = network.bridge.as_str();
        let off = Sysctl::link(Family::Ipv6, bridge, LinkKey::DisableIpv6);
        !has_rules && off.read().is_ok_and(|value| value == "0")
    }

    fn has_network_entry(&self, network: &NetworkRecord) -> Result<bool, Error> {
        let Some(datapath) = self.datapath else {
            return Ok(false);
        };
        let mut indexes = HashMap::new();
        for name in network.uplinks() {
            if let Some(link) = self.netlink.find_link(name.as_str())? {
                indexes.insert(link.name, link.index);
            }
        }
        let expected = network_entry(network, |name| indexes.get(name).copied());
        Ok(datapath.networks.get(&network.number)? == Some(expected))
    }

    /// `netns` is the endpoint's namespace, if it is open already.
    pub(super) fn endpoint(
        &self,
        endpoint: &EndpointRecord,
        network: Option<&NetworkRecord>,
        netns: Option<&NetnsFd>,
    ) -> Result<EndpointSight, Error> {
        let name = endpoint.host_ifname.as_str();
        let bridge = network.and_then(|network| network.link);
        let found;
        let (sight_of_netns, netns) = match netns {
            Some(netns) => (NetnsSight::Same, Some(netns)),
            None => {
                found = netns_sight(endpoint);
                (found.0, found.1.as_ref())
            }
        };
        let mut sight = EndpointSight {
            link: self.link(name, &endpoint_alias(endpoint), endpoint.link),
            // The bridge of slots has no ports.
            port: endpoint.slot().is_some()
                || self
                    .links
                    .get(name)
                    .is_some_and(|link| link.master == bridge),
            netns: sight_of_netns,
            program: endpoint.datapath == DatapathKind::Iptables,
            entry: endpoint.datapath == DatapathKind::Iptables,
            addresses: Vec::new(),
            publishes: 0,
            policy: 0,
            neighbours: Vec::new(),
            inside: Vec::new(),
            resolv_conf: self.mounts.iter().any(|m| m.id() == endpoint.id.as_str()),
        };
        if matches!(sight.link, LinkSight::Absent | LinkSight::Foreign) {
            return Ok(sight);
        }
        if let (Some(network), Some(netns)) = (network, netns) {
            sight.inside = match endpoint.slot() {
                None => inside(endpoint, network, netns)?,
                Some(slot) => self.slot(endpoint, slot, netns)?,
            };
        }
        if let Some(bridge) = bridge {
            let served = |address: &&IpAddr| self.serves_v6 || address.is_ipv4();
            for &address in endpoint.addresses.iter().filter(served) {
                let neighbour = Neighbour {
                    link: bridge,
                    address,
                    mac: endpoint.mac.octets(),
                };
                if !self.has_neighbour(&neighbour)? {
                    sight.neighbours.push(address);
                }
            }
        }
        if let (Some(link), Some(datapath), DatapathKind::Ebpf) =
            (endpoint.link, self.datapath, endpoint.datapath)
        {
            sight.program = self.has_filter(link, Direction::Ingress, program::FROM_ENDPOINT)?;
            entries(endpoint, network, link, datapath, &mut sight)?;
        }
        Ok(sight)
    }
}

/// Whether the host forwards what comes in by an uplink.
fn forwards(interface: &str) -> Hooked {
    let sysctl = Sysctl::link(Family::Ipv4, interface, LinkKey::Forwarding);
    match sysctl.read().as_deref() {
        Ok("0") => Hooked::NotForwarding,
        // One that cannot be read is nobody's drift.
        _ => Hooked::Yes,
    }
}

impl View<'_> {
    /// What a slot lacks; of its namespace nothing, if that may not be entered.
    fn slot(
        &self,
        endpoint: &EndpointRecord,
        slot: &Slot,
        netns: &NetnsFd,
    ) -> Result<Vec<String>, Error> {
        let mut lacks = Vec::new();
        let (tap, wire) = (slot.number.tap_index(), slot.number.wire_index());
        if let Some(datapath) = self.datapath {
            for (link, across) in [(tap, wire), (wire, tap)] {
                let expected = abi::Guest {
                    across,
                    ..guest_entry(endpoint, slot)
                };
                if datapath.guests.get(&link)? != Some(expected) {
                    lacks.push("the datapath does not know its guest".to_owned());
                    break;
                }
            }
        }
        if let Some(link) = endpoint.link {
            let held = self.netlink.addresses_of(link)?;
            if !held
                .iter()
                .any(|held| held.address.addr() == IpAddr::V4(slot.link))
            {
                lacks.push(format!("the host has no address {} on its link", slot.link));
            }
        }
        let Ok(netlink) = Netlink::open_in(netns) else {
            return Ok(lacks);
        };
        for (index, name, what) in [
            (tap, &slot.tap.name, program::FROM_GUEST),
            (wire, &endpoint.wish.ifname, program::TO_GUEST),
        ] {
            let Some(link) = netlink.find_link(name.as_str())? else {
                lacks.push(format!("has no interface {name}"));
                continue;
            };
            if link.index != index {
                lacks.push(format!("interface {name} is another one"));
            }
            if link.state != LinkState::Up {
                lacks.push(format!("interface {name} is down"));
            }
            let filters = netlink.filters(index, Direction::Ingress)?;
            let id = self.program_id(what);
            if id.is_none() || !filters.iter().any(|filter| filter.program == id) {
                lacks.push(format!("interface {name} has no program"));
            }
        }
        Ok(lacks)
    }
}

/// What the maps lack of an endpoint.
fn entries(
    endpoint: &EndpointRecord,
    network: Option<&NetworkRecord>,
    link: u32,
    datapath: &Datapath,
    sight: &mut EndpointSight,
) -> Result<(), Error> {
    let is_own = |number: u32| number == endpoint.number;
    let policy = endpoint.policy_in_force().compile()?;
    let entry = datapath.endpoints.get(&link)?;
    let is_counted = datapath.usage.get(&endpoint.number)?.is_some();
    sight.entry = is_counted
        && entry.is_some_and(|entry| match network {
            Some(network) => {
                let bridge = network.link.unwrap_or_default();
                let expected = endpoint_entry(endpoint, network, bridge, policy.as_ref());
                // Since when flows are judged by it is in the entry alone.
                let policy_since = entry.policy_since;
                entry
                    == abi::Endpoint {
                        policy_since,
                        ..expected
                    }
            }
            None => is_own(entry.number),
        });
    for &address in &endpoint.addresses {
        let owner = datapath.addresses.get(&to_abi(address))?;
        if !owner.is_some_and(|owner| is_own(owner.endpoint) && owner.link == link) {
            sight.addresses.push(address);
        }
    }
    let owner = abi::Owner {
        link,
        endpoint: endpoint.number,
    };
    let has = |v6| endpoint.address(v6).is_some();
    for publish in &endpoint.publishes {
        for (bits, key, value) in publish.entries(owner, has(false), has(true)) {
            let entry = datapath.publishes.get(&Prefix::new(bits, key))?;
            let is_shared = key.kind == abi::PublishUse::Held as u8;
            let is_there = entry.is_some_and(|entry| is_shared || entry == value);
            sight.publishes += usize::from(!is_there);
        }
    }
    let policy = policy.unwrap_or_default();
    for (bits, key, class) in policy.cidrs {
        let entry = datapath.policy_cidrs.get(&Prefix::new(bits, key))?;
        sight.policy += usize::from(entry != Some(class));
    }
    for (bits, key, rule) in policy.ports {
        let entry = datapath.policy_ports.get(&Prefix::new(bits, key))?;
        sight.policy += usize::from(entry != Some(rule));
    }
    Ok(())
}

/// What an endpoint's namespace lacks; nothing if it may not be entered.
fn inside(
    endpoint: &EndpointRecord,
    network: &NetworkRecord,
    netns: &NetnsFd,
) -> Result<Vec<String>, Error> {
    let Ok(netlink) = Netlink::open_in(netns) else {
        return Ok(Vec::new());
    };
    let name = &endpoint.wish.ifname;
    let Some(link) = netlink.find_link(name.as_str())? else {
        return Ok(vec![format!("has no interface {name}")]);
    };
    let mut lacks = Vec::new();
    if link.state != LinkState::Up {
        lacks.push(format!("interface {name} is down"));
    }
    let present = netlink.addresses_of(link.index)?;
    let neighbours = netlink.neighbours(link.index)?;
    let defaults = netlink.default_routes()?;
    for address in &endpoint.addresses {
        let Some(subnet) = network.subnet_of(*address) else {
            continue;
        };
        let (wanted, gateway) = (subnet.with_prefix(*address), subnet.gateway());
        if !present.iter().any(|there| there.address == wanted) {
            lacks.push(format!("has no address {wanted}"));
        }
        let neighbour = Neighbour {
            link: link.index,
            address: gateway,
            mac: network.mac.octets(),
        };
        if !neighbours.contains(&neighbour) {
            lacks.push(format!("has no neighbour {gateway}"));
        }
        let leads = |route: &netlink::KernelRoute| {
            route.destination.addr().is_ipv4() == gateway.is_ipv4()
                && route.hops.iter().any(|hop| hop.link == link.index)
        };
        if endpoint.default_route && !defaults.iter().any(leads) {
            lacks.push(format!("has no default route by {gateway}"));
        }
    }
    Ok(lacks)
}

fn netns_sight(endpoint: &EndpointRecord) -> (NetnsSight, Option<NetnsFd>) {
    match NetnsFd::open(&endpoint.netns) {
        Ok(netns) => {
            let id = netns.id();
            let is_same =
                (id.dev, id.inode) == (endpoint.namespace.device, endpoint.namespace.inode);
            match is_same {
                true => (NetnsSight::Same, Some(netns)),
                false => (NetnsSight::Gone, None),
            }
        }
        Err(netns::Error::NotFound { .. } | netns::Error::NotANetns { .. }) => {
            (NetnsSight::Gone, None)
        }
        Err(_) => (NetnsSight::Unknown, None),
    }
}
