//! `nat add|list|remove|clear`: static mappings.

use super::{
    Error, Host, Step,
    attach::failed,
    error::Left,
    host::Session,
    netfilter, publish, repair,
    step::{MAPPING_ROUTES, World, mapping_entries, mapping_routes_alias, mapping_steps},
};
use crate::{
    kernel::{
        bpf::Datapath,
        claims::Holder,
        netlink::Netlink,
        sockets::{Listener, Sockets},
    },
    model::{
        Cidr, EndpointId, Invalid, Problem,
        mapping::MappingSpec,
        netfilter::{Family, Saved, of_mapping},
        plan::{self, Plan},
        publish::PublishSpec,
        record::{HostRecord, MappingRecord, State},
    },
};
use nucnet_common::abi;
use serde::Serialize;
use std::{fmt, net::IpAddr};

/// A static mapping as the JSON shows it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MappingView {
    /// Its id.
    pub id: EndpointId,
    /// How far it is.
    pub state: State,
    /// What was asked for.
    #[serde(flatten)]
    pub spec: MappingSpec,
    /// Where the clients of a hairpin are.
    pub clients: Option<Cidr>,
    /// Whether the external address is the host's now; if not, the mapping is inert.
    pub local: bool,
    /// Flows that came by it.
    pub flows: u64,
    /// Packets of them, both directions.
    pub packets: u64,
    /// Bytes of those, from the IP header on.
    pub bytes: u64,
}

/// Which mapping is meant.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum MappingChoice {
    /// The one with that id.
    Id(EndpointId),
    /// The one that was asked for in those words.
    Spec(MappingSpec),
}

impl fmt::Display for MappingChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Id(id) => id.fmt(f),
            Self::Spec(spec) => spec.fmt(f),
        }
    }
}

impl MappingChoice {
    fn is(&self, record: &MappingRecord) -> bool {
        match self {
            Self::Id(id) => record.id == *id,
            Self::Spec(spec) => record.spec == *spec,
        }
    }
}

impl Host {
    /// Adds a static mapping. The same again changes nothing; on failure nothing stays.
    pub fn add_mapping(&self, spec: &MappingSpec) -> Result<MappingView, Error> {
        self.check_capabilities()?;
        let mut session = self.open()?;
        let added = session.with_fallback(|session| add(session, spec));
        if added.is_err() {
            session.abandon_if_fresh();
        }
        added
    }

    /// What adding a mapping would do. Nothing is changed.
    pub fn plan_add_mapping(&self, spec: &MappingSpec) -> Result<Plan<Step>, Error> {
        let mut session = self.open()?;
        let planned = intend(&mut session, spec);
        let bpffs = session.bpffs().display().to_string();
        session.abandon_if_fresh();
        Ok(match planned? {
            Intent::Whole(_) => Plan::default(),
            Intent::New(record) | Intent::Damaged(record) => std::iter::once(Step::Datapath(bpffs))
                .chain(mapping_steps(&record))
                .collect(),
        })
    }

    /// All static mappings with their counters, in the order of their ids.
    pub fn mappings(&self) -> Result<Vec<MappingView>, Error> {
        let Some(store) = self.read()? else {
            return Ok(Vec::new());
        };
        let mut records = super::list::readable(store.mappings()?);
        let counters = Counters::open(self, store.host()?.as_ref())?;
        let netlink = Netlink::open()?;
        records.sort_by_key(|record| record.number);
        records
            .into_iter()
            .map(|record| view(&netlink, &counters, record))
            .collect()
    }

    /// Removes a mapping, and ends what came by it. One that is gone is fine: none.
    pub fn remove_mapping(&self, which: &MappingChoice) -> Result<Option<EndpointId>, Error> {
        Ok(self
            .remove_mappings(|record| which.is(record), "nat remove")?
            .pop())
    }

    /// Removes all mappings. Returns their ids.
    pub fn clear_mappings(&self) -> Result<Vec<EndpointId>, Error> {
        self.remove_mappings(|_| true, "nat clear")
    }

    fn remove_mappings(
        &self,
        which: impl Fn(&MappingRecord) -> bool,
        what: &str,
    ) -> Result<Vec<EndpointId>, Error> {
        self.check_capabilities()?;
        let Some(session) = self.open_existing()? else {
            return Ok(Vec::new());
        };
        let (mut removed, mut left) = (Vec::new(), Left::default());
        for record in session.state.sound_mappings()?.into_iter().filter(which) {
            let id = record.id.clone();
            match remove(&session, record) {
                Ok(()) => removed.push(id),
                Err(error) => left.note(format!("mapping {id}"), error),
            }
        }
        netfilter::leave_unused(&session)?;
        session.abandon_if_fresh();
        left.or(what, removed)
    }

    /// What removing mappings would undo, in the order of the set-up; all of them if none is
    /// chosen.
    pub fn plan_remove_mappings(&self, which: Option<&MappingChoice>) -> Result<Plan<Step>, Error> {
        let Some(store) = self.read()? else {
            return Ok(Plan::default());
        };
        let (records, _) = store.mappings()?;
        Ok(records
            .iter()
            .filter(|record| which.is_none_or(|which| which.is(record)))
            .flat_map(mapping_steps)
            .collect())
    }
}

/// Where mappings are counted.
enum Counters {
    Nowhere,
    Programs(Box<Datapath>),
    /// The rules of each family.
    Rules(Vec<(Family, Saved)>),
}

impl Counters {
    fn open(host: &Host, record: Option<&HostRecord>) -> Result<Self, Error> {
        let netfilter = record.map(netfilter::of_host).transpose()?.flatten();
        if let Some(netfilter) = netfilter {
            let saved = Family::ALL.map(|family| Ok((family, netfilter.saved(family)?)));
            let saved = saved.into_iter().collect::<Result<_, Error>>()?;
            return Ok(Self::Rules(saved));
        }
        Ok(match host.open_datapath()? {
            Some(datapath) => Self::Programs(Box::new(datapath)),
            None => Self::Nowhere,
        })
    }

    fn of(&self, record: &MappingRecord) -> Result<abi::MappingCount, Error> {
        match self {
            Self::Nowhere => Ok(abi::MappingCount::default()),
            Self::Programs(datapath) => Ok(datapath.mapping_counts.get(record.number)?),
            Self::Rules(saved) => {
                let v6 = record.spec.ext_ip().is_ipv6();
                let owner = of_mapping(record);
                let target = match record.spec {
                    MappingSpec::Snat { .. } => "SNAT",
                    MappingSpec::Dnat { .. } | MappingSpec::Hairpin { .. } => "DNAT",
                };
                let mut count = abi::MappingCount::default();
                for (_, saved) in saved.iter().filter(|(family, _)| family.is_v6() == v6) {
                    let passed = saved.counted(&owner);
                    count.flows += saved.translated(&owner, target);
                    count.packets += passed.packets;
                    count.bytes += passed.bytes;
                }
                Ok(count)
            }
        }
    }
}

fn view(
    netlink: &Netlink,
    counters: &Counters,
    record: MappingRecord,
) -> Result<MappingView, Error> {
    let counts = counters.of(&record)?;
    Ok(MappingView {
        local: is_local(netlink, record.spec.ext_ip())?,
        id: record.id,
        state: record.state,
        clients: record.lan,
        spec: record.spec,
        flows: counts.flows,
        packets: counts.packets,
        bytes: counts.bytes,
    })
}

fn is_local(netlink: &Netlink, address: IpAddr) -> Result<bool, Error> {
    let addresses = netlink.addresses()?;
    Ok(addresses.iter().any(|held| held.address.addr() == address))
}

/// What an add is going to do.
enum Intent {
    /// Nothing: it is there.
    Whole(MappingRecord),
    /// It is recorded, but something is missing.
    Damaged(MappingRecord),
    /// It will be made.
    New(MappingRecord),
}

fn add(session: &mut Session, spec: &MappingSpec) -> Result<MappingView, Error> {
    // What a call that died had begun, or begun to remove, is neither there nor in the way.
    for record in session.state.sound_mappings()? {
        if record.state != State::Active {
            tracing::info!(mapping = %record.id, "removing what was left of an earlier call");
            remove(session, record)?;
        }
    }
    let intent = intend(session, spec)?;
    // Whatever is to be told is asked for now: once the mapping is there, nothing may fail.
    let (Intent::Whole(record) | Intent::Damaged(record) | Intent::New(record)) = &intent;
    let counters = Counters::open(&session.host, Some(&session.record))?;
    let mut shown = view(&session.netlink, &counters, record.clone())?;
    drop(counters);
    shown.state = State::Active;
    let (record, is_new) = match intent {
        Intent::Whole(_) => return Ok(shown),
        Intent::Damaged(record) => (record, false),
        Intent::New(record) => (record, true),
    };
    session.settle_datapath()?;
    session.put_host()?;
    let mut steps = mapping_steps(&record);
    steps.insert(0, Step::Datapath(session.bpffs().display().to_string()));
    let mut world = World::new(session);
    world.mapping = Some(record);
    if is_new {
        let plan: Plan<Step> = steps.into_iter().collect();
        plan::run(&plan, &mut world).map_err(|failure| failed(&plan, failure))?;
    } else {
        // It is on record, and what was active is not taken for unfinished if this fails.
        steps.retain(|step| !matches!(step, Step::MappingIntent(_)));
        repair::run(&mut world, steps)?;
    }
    Ok(shown)
}

/// Decides everything about a mapping, and checks it against all that is there. Nothing is
/// changed.
fn intend(session: &mut Session, spec: &MappingSpec) -> Result<Intent, Error> {
    let records = session.state.sound_mappings()?;
    let link = match spec.ext_if() {
        Some(name) => {
            let link = session.netlink.find_link(name.as_str())?;
            link.ok_or_else(|| Error::NoInterface(name.clone()))?.index
        }
        None => 0,
    };
    if let Some(mut record) = records
        .iter()
        .find(|record| record.spec == *spec && record.state == State::Active)
        .cloned()
    {
        let is_whole = record.link == link && is_whole(session, &record)?;
        return Ok(match is_whole {
            true => Intent::Whole(record),
            false => {
                record.link = link;
                Intent::Damaged(record)
            }
        });
    }
    if spec.ext_ip().is_ipv6() && !netfilter::will_serve_v6(session)? {
        return Err(Error::NoIp6tables(spec.to_string()));
    }
    let lan = check(session, spec)?;
    refuse_conflicts(session, spec, &records)?;
    let number = session.record.next.endpoint()?;
    let id = format!("{}-{number}", spec.kind());
    Ok(Intent::New(MappingRecord {
        id: id.parse()?,
        number,
        state: State::Configuring,
        spec: spec.clone(),
        lan,
        link,
    }))
}

/// What can be said only by looking at the host; for a hairpin, where its clients are.
fn check(session: &Session, spec: &MappingSpec) -> Result<Option<Cidr>, Error> {
    let Some(int_ip) = spec.int_ip() else {
        return Ok(None);
    };
    let addresses = session.netlink.addresses()?;
    if addresses.iter().any(|held| held.address.addr() == int_ip) {
        return Err(Invalid::new("--int-ip", int_ip, Problem::MappedToHost).into());
    }
    let MappingSpec::Hairpin { lan, .. } = spec else {
        return Ok(None);
    };
    if lan.is_some() {
        return Ok(*lan);
    }
    let nearest = addresses
        .iter()
        .filter(|held| held.address.contains(&int_ip))
        .max_by_key(|held| held.address.prefix_len());
    let subnet = nearest.map(|held| held.address.trunc().to_string().parse::<Cidr>());
    match subnet {
        Some(subnet) => Ok(Some(subnet?)),
        None => Err(Invalid::new("--int-ip", int_ip, Problem::NoLan).into()),
    }
}

/// Whether everything that a mapping needs is there.
fn is_whole(session: &Session, record: &MappingRecord) -> Result<bool, Error> {
    if let Some(netfilter) = netfilter::of_host(&session.record)? {
        let recorded = netfilter::Recorded::of(session)?;
        return Ok(netfilter::differences(&netfilter, &recorded.wanted())?.is_empty());
    }
    let Some(datapath) = session.open_datapath()? else {
        return Ok(false);
    };
    let routes = session.netlink.find_link(MAPPING_ROUTES)?;
    let is_ours = routes.is_some_and(|link| {
        link.has_alias(&mapping_routes_alias())
            && datapath
                .settings()
                .is_ok_and(|settings| settings.mapping_link == link.index)
    });
    let has_behaviour = datapath.networks.get(&abi::MAPPED)?.is_some();
    Ok(is_ours && has_behaviour && datapath.missing_entries(&mapping_entries(record))? == 0)
}

/// Fails, naming the owner, if somebody has what the mapping wants.
fn refuse_conflicts(
    session: &Session,
    spec: &MappingSpec,
    records: &[MappingRecord],
) -> Result<(), Error> {
    let conflict = |taken: String, owner: String| {
        Err(Error::MappingTaken {
            spec: spec.to_string(),
            taken,
            owner,
        })
    };
    if let MappingSpec::Snat { int, ext_if, .. } = spec {
        for record in records {
            if let MappingSpec::Snat {
                int: theirs,
                ext_if: bound,
                ..
            } = &record.spec
                && theirs == int
                && bound == ext_if
            {
                return conflict(int.to_string(), format!("mapping {}", record.id));
            }
        }
        return Ok(());
    }
    let Some((protocol, ports)) = spec.ports() else {
        return Ok(());
    };
    // A dnat and a hairpin may share ports that lead to the same host.
    let is_pair = |record: &MappingRecord| {
        record.spec.kind() != spec.kind() && record.spec.int_ip() == spec.int_ip()
    };
    for record in records.iter().filter(|record| !is_pair(record)) {
        let Some((theirs, list)) = record.spec.ports() else {
            continue;
        };
        if record.spec.ext_ip() == spec.ext_ip() && theirs == protocol {
            let shared = ports.ranges().iter().find(|range| list.overlaps(**range));
            if let Some(range) = shared {
                let taken = format!("{}:{range}/{protocol}", record.spec.ext_ip());
                return conflict(taken, format!("mapping {}", record.id));
            }
        }
    }
    let pairs: Vec<u32> = records
        .iter()
        .filter(|record| is_pair(record))
        .map(|record| record.number)
        .collect();
    let (claims, sockets) = (session.state.port_claims()?, Sockets::default());
    for publish in spec.publishes() {
        if let Some((owner, taken)) = claims.conflict(&publish, &pairs)? {
            return conflict(taken, owner_name(session, &owner)?);
        }
        if let Some(listener) = sockets.in_the_way(&publish)? {
            return Err(in_use(spec, listener));
        }
    }
    Ok(())
}

pub(super) fn in_use(spec: &MappingSpec, listener: &Listener) -> Error {
    Error::MappingTaken {
        spec: spec.to_string(),
        taken: listener.to_string(),
        owner: publish::owner_of(listener),
    }
}

/// Whose a claim is, in words.
fn owner_name(session: &Session, owner: &Holder) -> Result<String, Error> {
    let mapping = session.state.sound_mapping(&owner.id)?;
    let kind = match mapping.is_some_and(|record| record.number == owner.number) {
        true => "mapping",
        false => "endpoint",
    };
    Ok(format!("{kind} {}", owner.id))
}

/// Why a publish cannot have its ports, if one of these mappings has one of them.
pub(super) fn in_the_way(mappings: &[MappingRecord], spec: &PublishSpec) -> Option<Error> {
    let wanted = spec.host_ports()?;
    for record in mappings {
        for own in record.spec.publishes() {
            if own.overlaps(spec) {
                let ports = own.host_ports().unwrap_or(wanted);
                return Some(Error::PortMapped {
                    spec: spec.to_string(),
                    taken: format!("{}:{ports}/{}", own.host(), own.protocol()),
                    owner: record.id.clone(),
                });
            }
        }
    }
    None
}

/// Removes a mapping with all that it has.
pub(super) fn remove(session: &Session, record: MappingRecord) -> Result<(), Error> {
    let what = format!("remove mapping {}", record.id);
    let plan: Plan<Step> = mapping_steps(&record).into_iter().collect();
    let mut world = World::new(session);
    world.datapath = session.open_datapath()?;
    world.mapping = Some(record);
    Left(plan::tear_down(&plan, &mut world)?).or(what, ())
}
