//! `attach`: gives a container its network.

use super::{
    EndpointView, Error, Host,
    egress::numbered,
    error::Left,
    host::{Session, namespace},
    netfilter::{report_closed_v6, will_serve_v6},
    network::{self, Prepared},
    publish, repair, slot,
    step::{Step, World, endpoint_alias, endpoint_steps},
};
use crate::{
    kernel::{
        claims::{Claim, Holder},
        netlink::Link,
        netns::NetnsFd,
        process::Process,
        resolv::{self, Root},
    },
    model::{
        EndpointId, IfName, Invalid, Kind, Mac, Mtu, NetworkName, Problem, ipam,
        plan::{self, Plan},
        policy::{Compiled, Policy},
        publish::PublishSpec,
        record::{AttachWish, DatapathKind, EndpointRecord, NetworkRecord, ResolvRecord, State},
        resolv::{Composed, Families},
        slot::{Slot, SlotRanges},
    },
};
use std::{
    collections::HashSet,
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

/// What an attach is going to do.
struct Intent {
    network: Prepared,
    endpoint: EndpointRecord,
    policy: Option<Compiled>,
    resolv_conf: Option<String>,
}

/// What there is under the id.
enum Found {
    /// Nothing, or what was left of something.
    Nothing,
    /// Just what is wanted.
    Same(Box<EndpointRecord>, Box<NetworkRecord>),
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

/// A slot to be made of an attach to its namespace.
pub(super) struct SlotWish {
    request: AttachRequest,
    slot: Slot,
    ranges: SlotRanges,
}

impl SlotWish {
    pub(super) fn new(request: AttachRequest, slot: Slot, ranges: SlotRanges) -> Self {
        Self {
            request,
            slot,
            ranges,
        }
    }

    fn wish(&self) -> Result<AttachWish, Error> {
        Ok(AttachWish {
            slot: Some(self.slot.clone()),
            ..self.request.wish()?
        })
    }

    /// Whether the slot is there just as wanted.
    pub(super) fn is_there(&self, session: &Session, netns: &NetnsFd) -> Result<bool, Error> {
        let found = look_up(session, &self.slot.number.id(), &self.wish()?, netns)?;
        Ok(matches!(found, Found::Same(..)))
    }

    pub(super) fn attach(
        &self,
        session: &mut Session,
        netns: &NetnsFd,
        path: PathBuf,
    ) -> Result<Attached, Error> {
        let (id, wish) = (self.slot.number.id(), self.wish()?);
        attach(session, id, wish, Some(self.ranges), netns, path, None)
    }

    pub(super) fn plan(
        &self,
        session: &mut Session,
        netns: &NetnsFd,
        path: PathBuf,
    ) -> Result<Plan<Step>, Error> {
        let network = network::for_slot(session, self.ranges)?;
        let (id, wish) = (self.slot.number.id(), self.wish()?);
        let intent = intend(session, network, id, wish, netns, path, None)?;
        Ok(steps(session, &intent, DatapathKind::Ebpf)
            .into_iter()
            .collect())
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

/// What there is under the id already. Of another endpoint that lives: a conflict.
fn look_up(
    session: &Session,
    id: &EndpointId,
    wish: &AttachWish,
    netns: &NetnsFd,
) -> Result<Found, Error> {
    let Some(record) = session.state.sound_endpoint(id)? else {
        return Ok(Found::Nothing);
    };
    let alias = endpoint_alias(&record);
    let link = session.netlink.find_link(record.host_ifname.as_str())?;
    // A veth pair goes with the namespace of either side.
    let is_own = |link: &Link| link.has_alias(&alias) && Some(link.index) == record.link;
    let lives = record.state == State::Active && link.as_ref().is_some_and(is_own);
    if !lives {
        return Ok(Found::Nothing);
    }
    let (old, here) = (&record.wish, namespace(netns)?);
    // A container that is started again under its id: the old one may still be going.
    if record.namespace != here && session.is_dying(&record)? {
        return Ok(Found::Nothing);
    }
    let differs = [
        (record.namespace != here, "network namespace"),
        (old.network != wish.network, "--network"),
        (old.addresses != wish.addresses, "--ip"),
        (old.mac != wish.mac, "--mac"),
        (old.ifname != wish.ifname, "--ifname"),
        (old.mtu != wish.mtu, "--mtu"),
        (old.publishes != wish.publishes, "-p"),
        (old.egress != wish.egress, "egress policy"),
        (old.rootfs != wish.rootfs, "--rootfs"),
        (old.slot != wish.slot, "guest or TAP"),
    ];
    if let Some((_, difference)) = differs.into_iter().find(|(differs, _)| *differs) {
        return Err(Error::EndpointExists {
            id: id.clone(),
            difference,
        });
    }
    match session.state.sound_network(&wish.network)? {
        Some(network) => Ok(Found::Same(Box::new(record), Box::new(network))),
        None => Ok(Found::Nothing),
    }
}

/// Decides everything, and checks it against all that is there. Nothing is changed.
fn intend(
    session: &mut Session,
    network: Prepared,
    id: EndpointId,
    wish: AttachWish,
    netns: &NetnsFd,
    path: PathBuf,
    root: Option<&Root>,
) -> Result<Intent, Error> {
    let record = &network.record;
    let namespace = namespace(netns)?;
    if let Some(owner) = claimed(session, record, Claim::Namespace(namespace.number()))? {
        return Err(Error::NamespaceTaken {
            netns: path.display().to_string(),
            network: record.name.clone(),
            owner: owner.id,
        });
    }
    let addresses = addresses(session, record, &wish)?;
    let (v4, v6) = (
        addresses.iter().any(IpAddr::is_ipv4),
        addresses.iter().any(IpAddr::is_ipv6),
    );
    let mtu = wish.mtu.unwrap_or(record.mtu);
    if v6 {
        mtu.check_v6()?;
    }
    let mac = match wish.mac {
        // All guests have the same, each on a link of its own.
        Some(mac) if wish.slot.is_some() => mac,
        Some(mac) => match claimed(session, record, Claim::Mac(mac))? {
            Some(owner) => {
                return Err(Error::MacTaken {
                    mac,
                    owner: owner.id,
                });
            }
            None => mac,
        },
        None => Mac::local(rand::random()),
    };
    let publishes = publish::choose(session, &wish.publishes, v4, v6)?;
    let (resolv, composed) = match root {
        Some(root) => {
            let (record, composed) = resolv_conf(session, &id, root, &wish, Families { v4, v6 })?;
            (Some(record), Some(composed))
        }
        None => (None, None),
    };
    // The host's resolvers are allowed as given ones are.
    let egress = match &composed {
        Some(composed) => wish
            .egress
            .clone()
            .with_resolvers(composed.resolvers.clone()),
        None if wish.slot.is_some() && wish.egress.dns().is_empty() => {
            let resolvers = slot::host_resolvers()?;
            wish.egress.clone().with_resolvers(resolvers)
        }
        None => wish.egress.clone(),
    };
    let resolv_conf = composed.map(|composed| composed.text(&id));
    let number = session.record.next.endpoint()?;
    let (policy_numbers, policy) = numbered(&mut session.record.next, &egress)?.unzip();
    let endpoint = EndpointRecord {
        id,
        number,
        state: State::Configuring,
        network: record.number,
        netns: path,
        namespace,
        host_ifname: IfName::host_side(number),
        link: None,
        mac,
        host_mac: Mac::local(rand::random()),
        addresses,
        mtu,
        default_route: false,
        publishes,
        pending: Vec::new(),
        policy: policy_numbers,
        egress,
        other_policy: None,
        resolv,
        datapath: session.coming_kind(),
        keeps_open: false,
        wish,
    };
    Ok(Intent {
        network,
        endpoint,
        policy,
        resolv_conf,
    })
}

/// What is to be mounted, and on what.
fn resolv_conf(
    session: &Session,
    id: &EndpointId,
    root: &Root,
    wish: &AttachWish,
    families: Families,
) -> Result<(ResolvRecord, Composed), Error> {
    let record = root.examine(&session.state, id)?;
    let composed = Composed::new(wish.egress.dns(), &resolv::host_files()?, families)?;
    Ok((record, composed))
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

fn claimed(
    session: &Session,
    network: &NetworkRecord,
    claim: Claim,
) -> Result<Option<Holder>, Error> {
    Ok(session.state.claimed(network.number, claim)?)
}

/// One address of each subnet: the requested one, or one that is drawn.
fn addresses(
    session: &Session,
    network: &NetworkRecord,
    wish: &AttachWish,
) -> Result<Vec<IpAddr>, Error> {
    let on_host = session.addresses_of_host()?;
    for address in &wish.addresses {
        let Some(subnet) = network.subnet_of(*address) else {
            let problem = Problem::NoSubnetOfFamily;
            return Err(Invalid::new("--ip", address, problem).into());
        };
        subnet.check(*address)?;
        if let Some(owner) = claimed(session, network, Claim::Address(*address))? {
            return Err(Error::AddressTaken {
                address: *address,
                owner: owner.id,
            });
        }
        if let Some(held) = on_host.iter().find(|held| held.address.addr() == *address) {
            let interface = session.netlink.link(held.link)?.name;
            return Err(Error::AddressOnHost {
                address: *address,
                interface,
            });
        }
    }
    let serves_v6 = will_serve_v6(session)?;
    let mut asked = wish.addresses.iter();
    if let Some(address) = asked.find(|address| !serves_v6 && address.is_ipv6()) {
        return Err(Error::NoIp6tables(format!("--ip {address}")));
    }
    let mut chosen = Vec::with_capacity(2);
    for subnet in network.served(serves_v6) {
        let v6 = subnet.gateway().is_ipv6();
        let wanted = wish
            .addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv6() == v6);
        let drawn = match wanted {
            Some(address) => Some(address),
            None => {
                let excluded: HashSet<IpAddr> = on_host.iter().map(|a| a.address.addr()).collect();
                let leases = session.state.leases(network.number)?;
                ipam::draw(subnet, &excluded, &leases, &mut rand::rng())?
            }
        };
        chosen.push(drawn.ok_or_else(|| Error::SubnetFull {
            network: network.name.clone(),
            subnet: subnet.to_string(),
        })?);
    }
    match chosen.is_empty() {
        true => Err(Error::NoIp6tables(format!("network {}", network.name))),
        false => Ok(chosen),
    }
}
