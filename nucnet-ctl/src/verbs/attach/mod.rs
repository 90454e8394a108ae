//! `attach`: gives a container its network.

mod intent;
mod slot;

pub(super) use slot::SlotWish;

use self::intent::{Found, Intent, intend, look_up};
use super::{
    EndpointView, Error, Host,
    error::Left,
    host::{Session, namespace},
    netfilter::report_closed_v6,
    network, repair,
    step::{Step, World, endpoint_steps},
};
use crate::{
    kernel::{netns::NetnsFd, process::Process, resolv::Root},
    model::{
        EndpointId, IfName, Invalid, Kind, Mac, Mtu, NetworkName, Problem,
        plan::{self, Plan},
        policy::Policy,
        publish::PublishSpec,
        record::{AttachWish, DatapathKind, EndpointRecord, NetworkRecord},
        slot::SlotRanges,
    },
};
use std::{
    net::IpAddr,
    path::PathBuf,
    time::{Duration, Instant},
};

/// Where a container is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Container {
    /// The namespace of a process.
    Process(u32),
    /// A namespace's file.
    Netns(PathBuf),
}

/// What is wanted of an attach. [`AttachRequest::new`] asks for nucnet's choice in everything.
#[derive(Clone, Debug)]
pub struct AttachRequest {
    /// The container.
    pub container: Container,
    /// The endpoint's id; none: derived from the namespace.
    pub id: Option<EndpointId>,
    /// The network.
    pub network: NetworkName,
    /// Addresses, one of each family at most; what is not given is drawn.
    pub addresses: Vec<IpAddr>,
    /// Link-layer address.
    pub mac: Option<Mac>,
    /// Name of the interface in the container.
    pub ifname: IfName,
    /// MTU; none: the network's.
    pub mtu: Option<Mtu>,
    /// Ports to publish.
    pub publishes: Vec<PublishSpec>,
    /// Egress policy.
    pub egress: Policy,
    /// The container's root directory in the calling thread's mount namespace: `resolv.conf` is
    /// mounted in it. None: it gets none.
    pub rootfs: Option<PathBuf>,
}

impl AttachRequest {
    /// The default network, an address of nucnet's choice, `eth0`, no publishes, no policy,
    /// no `resolv.conf`.
    pub fn new(container: Container) -> Self {
        Self {
            container,
            id: None,
            network: NetworkName::default_network(),
            addresses: Vec::new(),
            mac: None,
            ifname: IfName::eth0(),
            mtu: None,
            publishes: Vec::new(),
            egress: Policy::default(),
            rootfs: None,
        }
    }

    /// The endpoint's id, derived from the namespace where it was given none.
    fn id(&self, netns: &NetnsFd) -> Result<EndpointId, Error> {
        match &self.id {
            Some(id) => Ok(id.clone()),
            None => Ok(EndpointId::derived(namespace(netns)?.number())),
        }
    }

    /// Everything that can be said without looking at the host.
    fn wish(&self) -> Result<AttachWish, Error> {
        let second = |v6: bool| {
            self.addresses
                .iter()
                .filter(|address| address.is_ipv6() == v6)
                .nth(1)
        };
        if let Some(address) = second(false).or_else(|| second(true)) {
            return Err(Invalid::new("--ip", address, Problem::SecondOfFamily).into());
        }
        let mut addresses = self.addresses.clone();
        addresses.sort();
        Ok(AttachWish {
            network: self.network.clone(),
            addresses,
            mac: self.mac,
            ifname: self.ifname.clone(),
            mtu: self.mtu,
            publishes: PublishSpec::check_all(&self.publishes)?,
            egress: self.egress.clone(),
            // In one form, because it is recorded and compared.
            rootfs: self.rootfs.as_ref().map(|path| {
                let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
                path.components().collect()
            }),
            slot: None,
        })
    }
}

/// An endpoint that was attached. It is detached when this is dropped, unless
/// [kept](Attachment::keep), or unless it was there before.
#[derive(Debug)]
pub struct Attachment {
    /// The endpoint.
    pub endpoint: EndpointView,
    /// How long each step took; none: everything was there already.
    pub steps: Vec<(Step, Duration)>,
    /// Whether it was not attached before; what was may have been repaired.
    pub is_new: bool,
    /// How long it took altogether.
    pub took: Duration,
    host: Host,
    detach_on_drop: bool,
}

impl Attachment {
    pub(super) fn of(host: &Host, attached: Attached, start: Instant) -> Self {
        Self {
            endpoint: EndpointView::new(&attached.endpoint, &attached.network),
            took: start.elapsed(),
            host: host.clone(),
            detach_on_drop: attached.is_new,
            is_new: attached.is_new,
            steps: attached.steps,
        }
    }

    /// Leaves the endpoint attached.
    pub fn keep(mut self) -> EndpointView {
        self.detach_on_drop = false;
        self.endpoint.clone()
    }
}

impl Drop for Attachment {
    fn drop(&mut self) {
        if !self.detach_on_drop {
            return;
        }
        if let Err(error) = self.host.detach(std::slice::from_ref(&self.endpoint.id)) {
            tracing::warn!(
                endpoint = %self.endpoint.id,
                error = &error as &dyn std::error::Error,
                "cannot detach"
            );
        }
    }
}

impl Host {
    /// Attaches a container. The same again changes nothing, or repairs what is missing of it;
    /// on failure nothing stays of what is new.
    pub fn attach(&self, request: &AttachRequest) -> Result<Attachment, Error> {
        let start = Instant::now();
        let wish = request.wish()?;
        // Also to open the container takes some.
        self.check_capabilities()?;
        let (netns, path) = open(&request.container)?;
        let root = wish.rootfs.as_deref().map(Root::open).transpose()?;
        let mut session = self.open()?;
        let attached = request.id(&netns).and_then(|id| {
            session.with_fallback(|session| {
                let (id, wish, path) = (id.clone(), wish.clone(), path.clone());
                attach(session, id, wish, None, &netns, path, root.as_ref())
            })
        });
        let attached = match attached {
            Ok(attached) => attached,
            Err(error) => {
                session.abandon_if_fresh();
                return Err(error);
            }
        };
        report_closed_v6(&session.record, &attached.network)?;
        Ok(Attachment::of(self, attached, start))
    }

    /// What an attach would do. Nothing is changed.
    pub fn plan_attach(&self, request: &AttachRequest) -> Result<Plan<Step>, Error> {
        let wish = request.wish()?;
        let (netns, path) = open(&request.container)?;
        let root = wish.rootfs.as_deref().map(Root::open).transpose()?;
        let mut session = self.open()?;
        let planned = planned(&mut session, request, wish, &netns, path, root.as_ref());
        session.abandon_if_fresh();
        planned
    }
}

fn planned(
    session: &mut Session,
    request: &AttachRequest,
    wish: AttachWish,
    netns: &NetnsFd,
    path: PathBuf,
    root: Option<&Root>,
) -> Result<Plan<Step>, Error> {
    let id = request.id(netns)?;
    if let Found::Same(endpoint, network) = look_up(session, &id, &wish, netns)? {
        let steps = repair::plan(session, &endpoint, &network, netns)?;
        return Ok(steps.into_iter().collect());
    }
    let network = network::for_attach(session, &wish.network)?;
    let intent = intend(session, network, id, wish, netns, path, root)?;
    Ok(steps(session, &intent, session.coming_kind())
        .into_iter()
        .collect())
}

/// The container's namespace, opened once, and an absolute path that says where it was.
fn open(container: &Container) -> Result<(NetnsFd, PathBuf), Error> {
    match container {
        Container::Process(pid) => {
            let netns = Process::open(*pid)?.netns()?.other_than_own()?;
            Ok((netns, format!("/proc/{pid}/ns/net").into()))
        }
        Container::Netns(path) => {
            let netns = NetnsFd::open(path)?.other_than_own()?;
            // Resolved for show only: nobody opens it again.
            let path = std::path::absolute(path).unwrap_or_else(|_| path.clone());
            Ok((netns, path))
        }
    }
}

/// What an attach came to.
pub(super) struct Attached {
    pub(super) endpoint: EndpointRecord,
    pub(super) network: NetworkRecord,
    pub(super) steps: Vec<(Step, Duration)>,
    pub(super) is_new: bool,
}

fn attach(
    session: &mut Session,
    id: EndpointId,
    wish: AttachWish,
    slots: Option<SlotRanges>,
    netns: &NetnsFd,
    path: PathBuf,
    root: Option<&Root>,
) -> Result<Attached, Error> {
    if let Found::Same(endpoint, network) = look_up(session, &id, &wish, netns)? {
        return repair::converge(session, *endpoint, *network, netns, root);
    }
    if let Some(left) = session.state.sound_endpoint(&id)? {
        tracing::info!(endpoint = %id, "removing what was left of an earlier attach");
        super::detach::remove(session, left)?;
    }
    let intent = loop {
        let network = match slots {
            None => network::for_attach(session, &wish.network)?,
            Some(ranges) => network::for_slot(session, ranges)?,
        };
        let intended = intend(
            session,
            network,
            id.clone(),
            wish.clone(),
            netns,
            path.clone(),
            root,
        );
        let error = match intended {
            Ok(intent) => break intent,
            Err(error) => error,
        };
        // What only the dead have is free.
        let owner = error
            .owner()
            .map(|owner| session.state.sound_endpoint(owner));
        match owner.transpose()?.flatten() {
            Some(owner) if session.is_dying(&owner)? => {
                tracing::info!(endpoint = %owner.id, "removing an endpoint whose container is gone");
                super::detach::remove(session, owner)?;
            }
            _ => return Err(error),
        }
    };
    session.settle_datapath()?;
    session.put_host()?;
    let mut intent = intent;
    intent.endpoint.datapath = session.kind();
    if session.kind() == DatapathKind::Iptables {
        // What is sent to the gateway is for the port, too, from where it is handed over.
        intent.endpoint.host_mac = intent.network.record.mac;
    }
    let plan: Plan<Step> = steps(session, &intent, session.kind())
        .into_iter()
        .collect();
    let repair = intent.network.repair();

    let mut world = World::new(session);
    world.opened = intent.network.datapath;
    world.network = Some(intent.network.record);
    world.endpoint = Some(intent.endpoint);
    world.policy = intent.policy;
    world.publishes = world
        .endpoint
        .iter()
        .flat_map(|e| e.publishes.clone())
        .collect();
    world.netns = Some(netns);
    world.resolv_conf = root.zip(intent.resolv_conf);
    let mut times = Vec::new();
    if !repair.is_empty() {
        times.extend(network::repair(&mut world, repair)?);
    }
    match plan::run(&plan, &mut world) {
        Ok(durations) => times.extend(plan.steps().iter().cloned().zip(durations)),
        Err(failure) => return Err(failed(&plan, failure)),
    }
    let (datapath, endpoint, network) = (world.datapath, world.endpoint, world.network);
    let network = network.expect("an attach has a network");
    session.settled.note(datapath, network.number);
    Ok(Attached {
        endpoint: endpoint.expect("an attach has an endpoint"),
        network,
        steps: times,
        is_new: true,
    })
}

/// Says which step failed. What is wrong with the request speaks for itself.
pub(super) fn failed(plan: &Plan<Step>, failure: plan::Failure<Error>) -> Error {
    let left = Left(failure.not_undone);
    if failure.error.kind() != Kind::Operation && left.0.is_empty() {
        return failure.error;
    }
    let step = plan
        .steps()
        .get(failure.step)
        .map(ToString::to_string)
        .unwrap_or_default();
    Error::SetUp {
        step,
        source: Box::new(failure.error),
        left,
    }
}

fn steps(session: &Session, intent: &Intent, kind: DatapathKind) -> Vec<Step> {
    let mut steps = vec![
        Step::Datapath(session.bpffs().display().to_string()),
        Step::Uplinks,
    ];
    steps.extend(intent.network.make());
    steps.extend(endpoint_steps(
        &intent.endpoint,
        intent.network.record.bridge.as_str(),
        intent.policy.as_ref(),
    ));
    steps.retain(|step| step.is_of(kind));
    steps
}
