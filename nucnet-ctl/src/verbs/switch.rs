//! From one datapath to the other: every endpoint, publish, policy and mapping moves, and nothing
//! of the first stays.
//!
//! Either carries packets until the other can, but for a moment in which nothing passes: then what
//! is open goes over, too ([`carry`]). A process that dies on the way leaves records that say of
//! each endpoint where it is; the same again goes on.

use super::{
    Error, Step, carry,
    host::Session,
    netfilter, publish, repair,
    step::{
        MAPPING_ROUTES, World, endpoint_steps, mapping_routes_alias, mapping_steps, network_steps,
    },
};
use crate::{
    kernel::{
        bpf::{Datapath, Origin},
        netlink::{LinkChange, Owner},
    },
    model::record::{DatapathKind, EndpointRecord, MappingRecord, NetworkRecord, State},
};

/// Moves everything.
pub(super) fn to(session: &mut Session, kind: DatapathKind) -> Result<(), Error> {
    let mut endpoints = session.state.sound_endpoints()?;
    if kind == DatapathKind::Iptables && endpoints.iter().any(|it| it.slot().is_some()) {
        return Err(Error::NoSlots);
    }
    tracing::info!(datapath = %kind, "moving everything to the other datapath");
    // What is half made or half removed is gc's, and is in neither datapath.
    endpoints.retain(|endpoint| matches!(endpoint.state, State::Active | State::Degraded));
    let mut whole = Vec::with_capacity(endpoints.len());
    for endpoint in endpoints {
        let mut endpoint = publish::take_back_pending(session, endpoint)?;
        super::egress::settle(session, &mut endpoint, &mut datapath(session)?)?;
        whole.push(endpoint);
    }
    let mut networks = session.state.sound_networks()?;
    networks.retain(|network| network.state == State::Active);
    let mut mappings = session.state.sound_mappings()?;
    mappings.retain(|mapping| mapping.state == State::Active);
    match kind {
        DatapathKind::Iptables => to_rules(session, whole, &networks, &mappings)?,
        DatapathKind::Ebpf => to_programs(session, whole, &networks, &mappings)?,
    }
    session.note_moving(false)
}

fn datapath(session: &Session) -> Result<Option<Datapath>, Error> {
    Ok(Datapath::open_existing(session.bpffs(), &session.bpf_host)?)
}

/// The steps of a network that are about its datapath.
fn of_network(network: &NetworkRecord, kind: DatapathKind) -> Vec<Step> {
    let mut steps = network_steps(network);
    steps.retain(|step| {
        let is_meant = matches!(
            step,
            Step::BridgeSysctls(_)
                | Step::BridgeAddresses(_)
                | Step::NetworkEntry(_)
                | Step::BridgeProgram(_)
        );
        is_meant && step.is_of(kind)
    });
    steps
}

/// The steps of an endpoint that are about its datapath: those that close it to whatever the
/// other one would have carried, and those that open it.
fn of_endpoint(endpoint: &EndpointRecord, bridge: &str, kind: DatapathKind) -> [Vec<Step>; 2] {
    let is_closing = |step: &Step| match kind {
        // An endpoint with a program, but without entries, sends and gets nothing.
        DatapathKind::Ebpf => matches!(step, Step::Program(_) | Step::Publishes(_)),
        DatapathKind::Iptables => false,
    };
    let steps = endpoint_steps(endpoint, bridge, None).into_iter();
    let (closing, opening) = steps
        .filter(|step| {
            let is_meant = matches!(
                step,
                Step::Program(_)
                    | Step::Policy(_)
                    | Step::Entries(_)
                    | Step::Neighbours(_)
                    | Step::Publishes(_)
            );
            is_meant && step.is_of(kind)
        })
        .partition(is_closing);
    [closing, opening]
}

/// Does the steps of networks, endpoints and mappings.
fn set_up(
    session: &Session,
    endpoints: &[EndpointRecord],
    networks: &[NetworkRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    let kind = session.kind();
    let mut world = World::new(session);
    let begin = [
        Step::Datapath(session.bpffs().display().to_string()),
        Step::Uplinks,
    ];
    repair::run(
        &mut world,
        begin.into_iter().filter(|step| step.is_of(kind)).collect(),
    )?;
    for network in networks {
        world.network = Some(network.clone());
        repair::run(&mut world, of_network(network, kind))?;
    }
    let host_rules = match kind {
        DatapathKind::Ebpf => Some(carry::HostRules::find()?),
        DatapathKind::Iptables => None,
    };
    let mut opening = Vec::with_capacity(endpoints.len());
    for endpoint in endpoints {
        let network = networks
            .iter()
            .find(|network| network.number == endpoint.network);
        let Some(network) = network else { continue };
        let [close, open] = of_endpoint(endpoint, network.bridge.as_str(), kind);
        let port = session.netlink.link(endpoint.host_ifname.as_str())?;
        let change = LinkChange {
            mac: Some(endpoint.host_mac.octets()).filter(|mac| port.mac != Some(*mac)),
            ..LinkChange::default()
        };
        if change.mac.is_some() {
            session.netlink.set_link(port.index, &change)?;
        }
        if kind == DatapathKind::Ebpf {
            session.netlink.remove_hooks(port.index)?;
        }
        enter(&mut world, endpoint, network)?;
        repair::run(&mut world, close)?;
        opening.push((endpoint, network, open));
    }
    if let Some(rules) = host_rules {
        rules.leave(session, endpoints)?;
    }
    for (endpoint, network, steps) in opening {
        enter(&mut world, endpoint, network)?;
        repair::run(&mut world, steps)?;
    }
    world.endpoint = None;
    world.network = None;
    for mapping in mappings {
        let mut steps = mapping_steps(mapping);
        steps.retain(|step| {
            matches!(step, Step::MappingRoutes(_) | Step::Mapping(_)) && step.is_of(kind)
        });
        world.mapping = Some(mapping.clone());
        repair::run(&mut world, steps)?;
    }
    Ok(())
}

/// Has the next steps be about an endpoint.
fn enter(
    world: &mut World<'_>,
    endpoint: &EndpointRecord,
    network: &NetworkRecord,
) -> Result<(), Error> {
    world.network = Some(network.clone());
    world.policy = endpoint.policy_in_force().compile()?;
    world.publishes.clone_from(&endpoint.publishes);
    world.endpoint = Some(endpoint.clone());
    Ok(())
}

fn to_rules(
    session: &mut Session,
    mut endpoints: Vec<EndpointRecord>,
    networks: &[NetworkRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    session.note_datapath(DatapathKind::Iptables)?;
    session.note_moving(true)?;
    if let Some(datapath) = datapath(session)? {
        carry::shield_host(&datapath)?;
    }
    for endpoint in &mut endpoints {
        endpoint.datapath = DatapathKind::Iptables;
        endpoint.keeps_open = false;
        let network = networks
            .iter()
            .find(|network| network.number == endpoint.network);
        if let Some(network) = network {
            endpoint.host_mac = network.mac;
        }
        session.state.put_endpoint(endpoint)?;
    }
    set_up(session, &endpoints, networks, mappings)?;
    for network in networks {
        netfilter::report_closed_v6(&session.record, network)?;
        netfilter::report_ineffective(network);
    }
    if let Some(mut datapath) = datapath(session)? {
        carry::to_connections(&mut datapath, netfilter::serves_v6(Some(&session.record))?)?;
    }
    let alias = mapping_routes_alias();
    session
        .netlink
        .delete_bridge(MAPPING_ROUTES, Owner::Alias(&alias))?;
    match Datapath::remove(session.bpffs()).pop() {
        Some(error) => Err(error.into()),
        None => Ok(()),
    }
}

fn to_programs(
    session: &mut Session,
    mut endpoints: Vec<EndpointRecord>,
    networks: &[NetworkRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    if !session.is_moving()
        && let Some(error) = Datapath::remove(session.bpffs()).pop()
    {
        // What a call left that died before anything moved.
        return Err(error.into());
    }
    // Where the programs cannot be loaded, everything stays as it is.
    let (mut datapath, origin) = Datapath::open_or_load(session.bpffs(), &session.bpf_host)?;
    if origin == Origin::Loaded {
        carry::to_flows(session, &mut datapath, &endpoints, networks, mappings)?;
    }
    drop(datapath);
    session.note_datapath(DatapathKind::Ebpf)?;
    session.note_moving(true)?;
    for endpoint in &mut endpoints {
        endpoint.datapath = DatapathKind::Ebpf;
        session.state.put_endpoint(endpoint)?;
    }
    let addresses: Vec<_> = endpoints.iter().flat_map(|e| e.addresses.clone()).collect();
    let stations: Vec<_> = endpoints
        .iter()
        .filter_map(|endpoint| Some((endpoint.link?, endpoint.mac.octets())))
        .collect();
    set_up(session, &endpoints, networks, mappings)?;
    for (port, mac) in stations {
        session.netlink.remove_station(port, mac)?;
    }
    for network in networks {
        let Some(bridge) = network.link else { continue };
        for address in addresses.iter().filter(|address| address.is_ipv6()) {
            session.netlink.remove_proxy(bridge, *address)?;
        }
        netfilter::route_loopback(network, "0")?;
    }
    // Whichever tables they are in: a call that died may have noted another one since.
    netfilter::clear_left_over()?;
    netfilter::leave(session)?;
    // Where interfaces cannot be told to forward one by one (before Linux 6.17), giving the host's
    // switch back has turned off what bridges were told, too.
    let mut world = World::new(session);
    for network in networks {
        world.network = Some(network.clone());
        let bridge = network.bridge.to_string();
        repair::run(&mut world, vec![Step::BridgeSysctls(bridge)])?;
    }
    carry::forget_carried(session, &endpoints, mappings)
}
