//! Repair: brings what is recorded, and not all there any more, back in place. Nothing of it is
//! undone when a step fails: what there is belongs to an endpoint that lives.

use super::{
    Error, Step,
    attach::Attached,
    egress,
    error::Left,
    host::Session,
    netfilter as rules, publish,
    sight::View,
    step::{World, endpoint_steps, network_steps},
};
use crate::{
    kernel::{
        bpf::{self, Datapath},
        netlink::Direction,
        netns::NetnsFd,
        resolv::{self, Root},
    },
    model::{
        drift::{self, Drift, Hooked, Unexplained},
        plan::Executor,
        record::{EndpointRecord, NetworkRecord},
        resolv::{Composed, Families},
    },
};
use nucnet_common::abi::program;
use std::time::{Duration, Instant};

/// What an endpoint, or the network that it is in, lacks.
#[derive(Debug, Default)]
pub(super) struct Damage {
    host: Vec<Drift>,
    network: Vec<Drift>,
    endpoint: Vec<Drift>,
    resolv_conf: bool,
}

impl Damage {
    fn is_none(&self) -> bool {
        self.host.is_empty() && self.network.is_empty() && self.endpoint.is_empty()
    }
}

/// Looks for what an endpoint lacks.
fn look(
    session: &Session,
    endpoint: &EndpointRecord,
    network: &NetworkRecord,
    netns: &NetnsFd,
) -> Result<Damage, Error> {
    let datapath = session.open_datapath()?;
    let mut links = Vec::with_capacity(2);
    for name in [&endpoint.host_ifname, &network.bridge] {
        links.extend(session.netlink.find_link(name.as_str())?);
    }
    let mounts = match endpoint.resolv {
        Some(_) => resolv::mounts(session.state.path())?,
        None => Vec::new(),
    };
    let mut view = View::new(&session.netlink, links, datapath.as_ref(), mounts)?;
    view.carried_by(session.kind(), rules::serves_v6(Some(&session.record))?);
    let sight = view.endpoint(endpoint, Some(network), Some(netns))?;
    let mut unexplained = Unexplained::default();
    if let Some(datapath) = &datapath {
        let (name, direction) = (program::FROM_LOOPBACK, Direction::Egress);
        let (_, hooked) = view.hooked(bpf::LOOPBACK, name, direction)?;
        unexplained.loopback_gone = hooked != Hooked::Yes;
        unexplained.bind_hooks = datapath.missing_bind_hooks()?;
    }
    if let Some(netfilter) = rules::of_host(&session.record)? {
        let recorded = rules::Recorded::of(session)?;
        unexplained.rules = rules::differences(&netfilter, &recorded.wanted())?;
    }
    let mut host = unexplained.drift();
    for seen in view.uplinks()? {
        host.extend(drift::of_uplink(&seen.uplink.link.name, seen.hooked, 1));
    }
    Ok(Damage {
        host,
        network: drift::of_network(network, &view.network(network)?),
        resolv_conf: endpoint.resolv.is_some() && !sight.resolv_conf,
        endpoint: drift::of_endpoint(endpoint, &sight),
    })
}

/// What a network lacks; and the datapath, which was opened to see that.
pub(super) fn of_network(
    session: &Session,
    network: &NetworkRecord,
) -> Result<(Vec<Drift>, Option<Datapath>), Error> {
    let datapath = session.open_datapath()?;
    let link = session.netlink.find_link(network.bridge.as_str())?;
    let mut view = View::new(&session.netlink, link, datapath.as_ref(), Vec::new())?;
    view.carried_by(session.kind(), rules::serves_v6(Some(&session.record))?);
    let lacks = drift::of_network(network, &view.network(network)?);
    Ok((lacks, datapath))
}

/// The steps that bring a network back.
pub(super) fn network_repair(network: &NetworkRecord) -> Vec<Step> {
    let mut steps = network_steps(network);
    // It is on record, and what was active is not taken for unfinished if this one dies.
    steps.retain(|step| !matches!(step, Step::NetworkIntent(_)));
    steps.insert(steps.len() - 1, Step::Members(network.bridge.to_string()));
    steps
}

/// The steps that bring an endpoint back; none: it is all there.
pub(super) fn plan(
    session: &Session,
    endpoint: &EndpointRecord,
    network: &NetworkRecord,
    netns: &NetnsFd,
) -> Result<Vec<Step>, Error> {
    let damage = look(session, endpoint, network, netns)?;
    if damage.is_none() {
        return Ok(Vec::new());
    }
    let found = [&damage.host, &damage.network, &damage.endpoint];
    for drift in found.into_iter().flatten() {
        tracing::info!(of = drift.id, "repairing: {}", drift.problem);
    }
    let bridge = network.bridge.to_string();
    let mut steps = vec![
        Step::Datapath(session.bpffs().display().to_string()),
        Step::Uplinks,
    ];
    let kind = session.kind();
    if !damage.network.is_empty() {
        steps.extend(network_repair(network));
    } else if damage.endpoint.is_empty() {
        return Ok(steps);
    }
    for step in endpoint_steps(endpoint, &bridge, None) {
        match step {
            Step::EndpointIntent(_) => {}
            // The link is there: that is what lives by.
            Step::Veth(_) => steps.push(Step::Port(bridge.clone())),
            Step::ResolvConf(_) if !damage.resolv_conf => {}
            step => steps.push(step),
        }
    }
    steps.retain(|step| step.is_of(kind));
    Ok(steps)
}

/// Brings an endpoint that lives back to what is recorded of it. No steps: it was.
pub(super) fn converge(
    session: &Session,
    endpoint: EndpointRecord,
    network: NetworkRecord,
    netns: &NetnsFd,
    root: Option<&Root>,
) -> Result<Attached, Error> {
    let mut endpoint = publish::take_back_pending(session, endpoint)?;
    if endpoint.other_policy.is_some() {
        let mut datapath = session.open_datapath()?;
        egress::settle(session, &mut endpoint, &mut datapath)?;
    }
    let steps = plan(session, &endpoint, &network, netns)?;
    if steps.is_empty() {
        return Ok(Attached {
            endpoint,
            network,
            steps: Vec::new(),
            is_new: false,
        });
    }
    let mut world = World::new(session);
    world.policy = endpoint.policy_in_force().compile()?;
    if let Some(root) = root {
        let families = Families {
            v4: endpoint.address(false).is_some(),
            v6: endpoint.address(true).is_some(),
        };
        // The resolvers that it was given, whatever the host's are now.
        let composed = Composed::new(endpoint.egress.dns(), &resolv::host_files()?, families)?;
        world.resolv_conf = Some((root, composed.text(&endpoint.id)));
    }
    world.publishes = endpoint.publishes.clone();
    world.netns = Some(netns);
    world.endpoint = Some(endpoint);
    world.network = Some(network);
    let times = run(&mut world, steps)?;
    let (endpoint, network) = (world.endpoint, world.network);
    Ok(Attached {
        endpoint: endpoint.expect("a repair has an endpoint"),
        network: network.expect("a repair has a network"),
        steps: times,
        is_new: false,
    })
}

/// Does the steps.
pub(super) fn run(world: &mut World<'_>, steps: Vec<Step>) -> Result<Vec<(Step, Duration)>, Error> {
    let mut times = Vec::with_capacity(steps.len());
    world.repairs = true;
    for (index, step) in steps.into_iter().enumerate() {
        let start = Instant::now();
        world
            .before(index)
            .and_then(|()| world.apply(&step))
            .map_err(|error| Error::SetUp {
                step: step.to_string(),
                source: Box::new(error),
                left: Left::default(),
            })?;
        times.push((step, start.elapsed()));
    }
    world.repairs = false;
    Ok(times)
}
