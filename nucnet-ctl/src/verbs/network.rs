//! `network create|list|remove`, and the networks of attaches.

use super::{
    Error, Host, NetworkView,
    attach::failed,
    error::Left,
    host::Session,
    netfilter, repair,
    step::{Step, World, network_alias, network_steps},
};
use crate::{
    kernel::{
        bpf::Datapath,
        netlink::{self, Owner},
        sysctl::{self, Family, Sysctl},
    },
    model::{
        Cidr, IfName, Invalid, Mac, Mtu, NetworkName, Problem, Subnet,
        plan::{self, Plan},
        record::{DatapathKind, NetworkRecord, NetworkWish, State},
        slot::{self, SlotRanges},
    },
};
use ipnet::IpNet;
use nucnet_common::abi::NETWORK_UPLINKS;
use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

/// The IPv4 subnet of the network that is made on first use.
pub(super) const DEFAULT_SUBNET: (Ipv4Addr, u8) = (Ipv4Addr::new(10, 0, 42, 0), 24);

/// A network for use: as recorded, or as it will be.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) record: NetworkRecord,
    condition: Condition,
    /// The datapath, where it was opened to see what the network lacks.
    pub(super) datapath: Option<Datapath>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    /// It will be made.
    New,
    /// It is recorded, but something is missing.
    Damaged,
    /// It is all there.
    Sound,
}

impl Prepared {
    /// The steps that make it, if it is new.
    pub(super) fn make(&self) -> Vec<Step> {
        match self.condition {
            Condition::New => network_steps(&self.record),
            _ => Vec::new(),
        }
    }

    /// The steps that make it whole, if it is recorded but not all there. They are not undone.
    pub(super) fn repair(&self) -> Vec<Step> {
        match self.condition {
            Condition::Damaged => repair::network_repair(&self.record),
            _ => Vec::new(),
        }
    }
}

/// The network of an attach: one that is recorded, or the default one, new.
pub(super) fn for_attach(session: &mut Session, name: &NetworkName) -> Result<Prepared, Error> {
    match session.state.sound_network(name)? {
        Some(record) => recorded(session, record),
        None if name.is_default() => {
            let record = design(session, name, None)?;
            Ok(Prepared {
                record,
                condition: Condition::New,
                datapath: None,
            })
        }
        None => Err(Error::NoNetwork(name.clone())),
    }
}

/// The network of all slots: the one that is recorded, or a new one of those ranges.
pub(super) fn for_slot(session: &mut Session, ranges: SlotRanges) -> Result<Prepared, Error> {
    if let Some(record) = session.state.sound_network(&slot::network())? {
        return recorded(session, record);
    }
    let taken = Taken::look(session)?;
    if let Some(other) = taken.by(ranges.links()) {
        let subnet = ranges.links().to_string();
        return Err(Error::SubnetTaken { subnet, other });
    }
    let asked = NetworkWish {
        bridge: Some(slot::bridge()),
        isolate: true,
        ..NetworkWish::default()
    };
    let subnets = vec![ranges.subnet()?];
    let mut record = lay_out(session, &slot::network(), asked, subnets, &taken)?;
    record.mac = slot::GATEWAY_MAC;
    record.slots = Some(ranges);
    Ok(Prepared {
        record,
        condition: Condition::New,
        datapath: None,
    })
}

/// Where the addresses of slots are from: as is recorded, which what is asked for must be.
pub(super) fn slot_ranges(
    session: &Session,
    asked: Option<SlotRanges>,
) -> Result<SlotRanges, Error> {
    let name = slot::network();
    let Some(record) = session.state.sound_network(&name)? else {
        return Ok(asked.unwrap_or_default());
    };
    let difference = match (record.slots, asked) {
        (Some(ranges), None) => return Ok(ranges),
        (Some(ranges), Some(asked)) if ranges == asked => return Ok(ranges),
        (Some(ranges), Some(asked)) if ranges.hosts() != asked.hosts() => "--hosts",
        (Some(_), Some(_)) => "--links",
        (None, _) => "kind",
    };
    Err(Error::NetworkExists { name, difference })
}

fn recorded(session: &Session, record: NetworkRecord) -> Result<Prepared, Error> {
    // An earlier endpoint of this call has had a look at it.
    if session.settled.has_network(record.number) {
        return Ok(Prepared {
            record,
            condition: Condition::Sound,
            datapath: None,
        });
    }
    let (lacks, datapath) = repair::of_network(session, &record)?;
    let condition = match lacks.is_empty() {
        true => Condition::Sound,
        false => Condition::Damaged,
    };
    Ok(Prepared {
        record,
        condition,
        datapath,
    })
}

/// Makes a recorded network whole.
pub(super) fn repair(
    world: &mut World<'_>,
    steps: Vec<Step>,
) -> Result<Vec<(Step, Duration)>, Error> {
    tracing::info!("repairing the network: its bridge is not as recorded");
    let datapath = Step::Datapath(world.session.bpffs().display().to_string());
    repair::run(world, std::iter::once(datapath).chain(steps).collect())
}

/// Whether a network has neither endpoints nor, whatever became of its records, ports.
pub(super) fn is_unused(session: &Session, network: &NetworkRecord) -> Result<bool, Error> {
    if session.state.endpoint_of(network.number)?.is_some() {
        return Ok(false);
    }
    match session.netlink.port_count(network.bridge.as_str()) {
        Ok(ports) => Ok(ports == 0),
        Err(netlink::Error::NoLink { .. }) => Ok(true),
        Err(error) => Err(error.into()),
    }
}

/// Removes the networks that were made on first use and have no endpoints any more.
pub(super) fn remove_unused(session: &Session) -> Result<(), Error> {
    for network in session.state.sound_networks()? {
        if network.wish.is_none() && is_unused(session, &network)? {
            let mut world = World::new(session);
            world.datapath = session.open_datapath()?;
            tear_down(&mut world, network)?;
        }
    }
    netfilter::leave_unused(session)
}

/// Removes a network without endpoints.
pub(super) fn tear_down(world: &mut World<'_>, network: NetworkRecord) -> Result<(), Error> {
    let what = format!("remove network {}", network.name);
    let plan: Plan<Step> = network_steps(&network).into_iter().collect();
    world.network = Some(network);
    Left(plan::tear_down(&plan, world)?).or(what, ())
}

impl Host {
    /// Creates a network. The same again changes nothing; on failure nothing stays.
    pub fn create_network(
        &self,
        name: &NetworkName,
        wish: NetworkWish,
    ) -> Result<NetworkView, Error> {
        check(&wish)?;
        let mut session = self.open()?;
        let created = session.with_fallback(|session| create(session, name, wish.clone()));
        let record = match created {
            Ok(record) => record,
            Err(error) => {
                session.abandon_if_fresh();
                return Err(error);
            }
        };
        netfilter::report_closed_v6(&session.record, &record)?;
        if session.kind() == DatapathKind::Iptables {
            netfilter::report_ineffective(&record);
        }
        Ok(NetworkView::new(&record))
    }

    /// What creating a network would do. Nothing is changed.
    pub fn plan_network(&self, name: &NetworkName, wish: NetworkWish) -> Result<Plan<Step>, Error> {
        check(&wish)?;
        let mut session = self.open()?;
        let prepared = prepare(&mut session, name, wish);
        let bpffs = session.bpffs().display().to_string();
        session.abandon_if_fresh();
        let prepared = prepared?;
        let steps = [prepared.make(), prepared.repair()].concat();
        match steps.is_empty() {
            true => Ok(Plan::default()),
            false => Ok([Step::Datapath(bpffs), Step::Uplinks]
                .into_iter()
                .chain(steps)
                .collect()),
        }
    }

    /// All networks, in the order of their names.
    pub fn networks(&self) -> Result<Vec<NetworkView>, Error> {
        let Some(store) = self.read()? else {
            return Ok(Vec::new());
        };
        let networks = super::list::readable(store.networks()?);
        Ok(networks.iter().map(NetworkView::new).collect())
    }

    /// Removes a network that has no endpoints.
    pub fn remove_network(&self, name: &NetworkName) -> Result<(), Error> {
        let (session, network) = self.removable(name)?;
        let mut world = World::new(&session);
        world.datapath = session.open_datapath()?;
        tear_down(&mut world, network)?;
        netfilter::leave_unused(&session)
    }

    /// What removing a network would undo, in the order of the set-up.
    pub fn plan_remove_network(&self, name: &NetworkName) -> Result<Plan<Step>, Error> {
        let (_, network) = self.removable(name)?;
        Ok(network_steps(&network).into_iter().collect())
    }

    fn removable(&self, name: &NetworkName) -> Result<(Session, NetworkRecord), Error> {
        let not_found = || Error::NoNetwork(name.clone());
        let session = self.open_existing()?.ok_or_else(not_found)?;
        let network = session.state.sound_network(name)?.ok_or_else(not_found)?;
        match session.state.endpoint_of(network.number)? {
            Some(holder) => Err(Error::NetworkInUse {
                name: name.clone(),
                endpoint: holder.id,
            }),
            None => Ok((session, network)),
        }
    }
}

fn create(
    session: &mut Session,
    name: &NetworkName,
    wish: NetworkWish,
) -> Result<NetworkRecord, Error> {
    let prepared = prepare(session, name, wish)?;
    session.settle_datapath()?;
    session.put_host()?;
    let (make, repairs) = (prepared.make(), prepared.repair());
    let mut world = World::new(session);
    world.opened = prepared.datapath;
    world.network = Some(prepared.record);
    if !repairs.is_empty() {
        repair(&mut world, repairs)?;
    }
    let is_new = !make.is_empty();
    if is_new {
        let begin = [
            Step::Datapath(session.bpffs().display().to_string()),
            Step::Uplinks,
        ];
        let plan: Plan<Step> = begin.into_iter().chain(make).collect();
        plan::run(&plan, &mut world).map_err(|failure| failed(&plan, failure))?;
    }
    let record = world.network.expect("a network is created");
    // One that was made for use becomes one that was asked for.
    if !is_new {
        session.state.put_network(&record)?;
    }
    Ok(record)
}

fn prepare(
    session: &mut Session,
    name: &NetworkName,
    wish: NetworkWish,
) -> Result<Prepared, Error> {
    let Some(mut record) = session.state.sound_network(name)? else {
        let record = design(session, name, Some(wish))?;
        return Ok(Prepared {
            record,
            condition: Condition::New,
            datapath: None,
        });
    };
    let old = record.wish.clone().unwrap_or_default();
    let differs = [
        (old.bridge != wish.bridge, "--bridge"),
        (old.subnet4 != wish.subnet4, "--subnet"),
        (old.subnet6 != wish.subnet6, "--subnet6"),
        (old.gateways != wish.gateways, "--gateway"),
        (old.uplinks != wish.uplinks, "--uplink"),
        (old.mtu != wish.mtu, "--mtu"),
        (old.isolate != wish.isolate, "--isolate"),
    ];
    let difference = differs
        .into_iter()
        .find_map(|(differs, flag)| differs.then_some(flag))
        .or_else(|| {
            let behaviour = wish.behaviour.resolved();
            old.behaviour.resolved().difference(&behaviour)
        });
    if let Some(difference) = difference {
        return Err(Error::NetworkExists {
            name: name.clone(),
            difference,
        });
    }
    record.wish = Some(wish);
    recorded(session, record)
}

/// Everything that can be said without looking at the host.
fn check(wish: &NetworkWish) -> Result<(), Error> {
    if let Some(cidr) = wish.subnet4.filter(|cidr| cidr.net().addr().is_ipv6()) {
        return Err(Invalid::new("--subnet", cidr, Problem::NotV4).into());
    }
    if let Some(cidr) = wish.subnet6.filter(|cidr| cidr.net().addr().is_ipv4()) {
        return Err(Invalid::new("--subnet6", cidr, Problem::NotV6).into());
    }
    for (index, gateway) in wish.gateways.iter().enumerate() {
        let cidr = if gateway.is_ipv4() {
            wish.subnet4
        } else {
            wish.subnet6
        };
        let Some(cidr) = cidr else {
            return Err(Invalid::new("--gateway", gateway, Problem::NoSubnetOfFamily).into());
        };
        if wish.gateways[..index]
            .iter()
            .any(|other| other.is_ipv4() == gateway.is_ipv4())
        {
            return Err(Invalid::new("--gateway", gateway, Problem::SecondOfFamily).into());
        }
        Subnet::new(cidr, Some(*gateway))?;
    }
    for cidr in wish.subnet4.into_iter().chain(wish.subnet6) {
        Subnet::new(cidr, None)?;
    }
    if let Some(uplink) = wish.uplinks.get(NETWORK_UPLINKS) {
        let problem = Problem::TooManyUplinks(NETWORK_UPLINKS);
        return Err(Invalid::new("--uplink", uplink, problem).into());
    }
    if let (Some(mtu), Some(_)) = (wish.mtu, wish.subnet6) {
        mtu.check_v6()?;
    }
    Ok(())
}

/// Decides everything about a new network, and checks it against all that is there. Nothing is
/// changed.
fn design(
    session: &mut Session,
    name: &NetworkName,
    wish: Option<NetworkWish>,
) -> Result<NetworkRecord, Error> {
    let asked = wish.clone().unwrap_or_default();
    let taken = Taken::look(session)?;
    let subnets = subnets(name, &asked, &taken)?;
    let is_v6_only = subnets.iter().all(|subnet| subnet.gateway().is_ipv6());
    if is_v6_only && !netfilter::will_serve_v6(session)? {
        return Err(Error::NoIp6tables(format!("network {name}")));
    }
    let mut record = lay_out(session, name, asked, subnets, &taken)?;
    record.wish = wish;
    Ok(record)
}

/// A new network of those subnets, made on first use unless its record says otherwise.
fn lay_out(
    session: &mut Session,
    name: &NetworkName,
    asked: NetworkWish,
    subnets: Vec<Subnet>,
    taken: &Taken,
) -> Result<NetworkRecord, Error> {
    let others = session.state.sound_networks()?;
    let bridge = asked
        .bridge
        .clone()
        .unwrap_or_else(|| IfName::bridge_of(name));
    if let Some(other) = others.iter().find(|other| other.bridge == bridge) {
        let (bridge, owner) = (bridge.to_string(), other.name.clone());
        return Err(Error::BridgeTaken { bridge, owner });
    }
    for subnet in &subnets {
        if let Some(other) = taken.by(subnet.cidr()) {
            return Err(Error::SubnetTaken {
                subnet: subnet.to_string(),
                other,
            });
        }
    }
    let has_v6 = subnets.iter().any(|subnet| subnet.gateway().is_ipv6());
    let mtu = match asked.mtu {
        Some(mtu) => mtu,
        None => mtu_of_uplinks(session, has_v6)?,
    };
    if has_v6 {
        mtu.check_v6()?;
    }
    let record = NetworkRecord {
        name: name.clone(),
        number: session.record.next.network()?,
        state: State::Configuring,
        wish: None,
        bridge,
        link: None,
        mac: Mac::local(rand::random()),
        subnets,
        mtu,
        isolate: asked.isolate,
        slots: None,
    };
    if let Some(link) = session.netlink.find_link(record.bridge.as_str())?
        && !link.is_of(Owner::Alias(&network_alias(&record)))
    {
        return Err(link.taken().into());
    }
    Ok(record)
}

/// The smallest MTU of an uplink, within what the families take; Ethernet's if there is none.
fn mtu_of_uplinks(session: &Session, has_v6: bool) -> Result<Mtu, Error> {
    let uplinks = session.netlink.uplinks()?;
    let smallest = uplinks.iter().map(|uplink| uplink.link.mtu).min();
    let least = if has_v6 { Mtu::MIN_V6.bytes() } else { 576 };
    let bytes = smallest
        .unwrap_or(Mtu::ETHERNET.bytes())
        .clamp(least, 65_535);
    Ok(Mtu::try_from(bytes)?)
}

/// The subnets that were asked for; if none was, one of each family that the host has.
fn subnets(name: &NetworkName, wish: &NetworkWish, taken: &Taken) -> Result<Vec<Subnet>, Error> {
    let gateway = |v6: bool| {
        wish.gateways
            .iter()
            .copied()
            .find(|gateway| gateway.is_ipv6() == v6)
    };
    let mut subnets = Vec::with_capacity(2);
    let asked = [wish.subnet4, wish.subnet6].into_iter().flatten();
    for cidr in asked {
        subnets.push(Subnet::new(cidr, gateway(cidr.net().addr().is_ipv6()))?);
    }
    if subnets.is_empty() {
        let v4 = match name.is_default() {
            true => cidr(DEFAULT_SUBNET.0.into(), DEFAULT_SUBNET.1),
            false => taken
                .first_free_v4()
                .ok_or_else(|| Error::NoFreeSubnet(name.clone()))?,
        };
        subnets.push(Subnet::new(v4, None)?);
        if has_ipv6()? {
            subnets.push(Subnet::new(taken.free_ula(), None)?);
        }
    }
    Ok(subnets)
}

fn has_ipv6() -> Result<bool, Error> {
    match Sysctl::IpNonlocalBind(Family::Ipv6).read() {
        Ok(_) => Ok(true),
        Err(sysctl::Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn cidr(address: IpAddr, length: u8) -> Cidr {
    let whole = Cidr::host(address);
    format!("{address}/{length}").parse().unwrap_or(whole)
}

/// What of the address space is in use, and by what.
struct Taken(Vec<(IpNet, String)>);

impl Taken {
    fn look(session: &Session) -> Result<Self, Error> {
        let mut taken = Vec::new();
        for network in session.state.sound_networks()? {
            for subnet in &network.subnets {
                let what = format!("{subnet} of network {}", network.name);
                taken.push((subnet.cidr().net(), what));
            }
        }
        for held in session.netlink.addresses()? {
            let interface = session.netlink.find_link(held.link)?.map(|link| link.name);
            let what = format!(
                "{} of interface {}",
                held.address,
                interface.unwrap_or_default()
            );
            taken.push((held.address, what));
        }
        for route in session.netlink.routes()? {
            // Half of everything is the default route of a VPN.
            if route.destination.prefix_len() > 1 {
                taken.push((
                    route.destination,
                    format!("the host's route to {}", route.destination),
                ));
            }
        }
        Ok(Self(taken))
    }

    /// What overlaps the subnet.
    fn by(&self, subnet: Cidr) -> Option<String> {
        let subnet = subnet.net();
        let overlaps =
            |net: &IpNet| net.contains(&subnet.network()) || subnet.contains(&net.network());
        self.0
            .iter()
            .find(|(net, _)| overlaps(&net.trunc()))
            .map(|(_, what)| what.clone())
    }

    /// The first free /24 after the default network's, in 10.0.0.0/8.
    fn first_free_v4(&self) -> Option<Cidr> {
        let first = u32::from(DEFAULT_SUBNET.0) >> 8;
        let end = u32::from(Ipv4Addr::new(11, 0, 0, 0)) >> 8;
        (first + 1..end)
            .map(|block| cidr(Ipv4Addr::from(block << 8).into(), 24))
            .find(|subnet| self.by(*subnet).is_none())
    }

    /// A /64 of local addresses with a random global id (RFC 4193 section 3.2).
    fn free_ula(&self) -> Cidr {
        loop {
            let random: u64 = rand::random();
            let bits = 0xfd << 120 | u128::from(random >> 24) << 80;
            let subnet = cidr(Ipv6Addr::from(bits).into(), 64);
            if self.by(subnet).is_none() {
                return subnet;
            }
        }
    }
}
