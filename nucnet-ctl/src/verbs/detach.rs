//! `detach`: removes everything that an endpoint owns.

use super::{
    Error, Host, Step,
    error::Left,
    gc,
    host::Session,
    network,
    step::{World, endpoint_alias, endpoint_steps},
};
use crate::{
    kernel::{bpf::Datapath, claims::Use, netlink::Link},
    model::{
        EndpointId,
        plan::{self, Plan},
        record::EndpointRecord,
    },
};
use std::collections::HashMap;

/// What became of the endpoints that were to be detached.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Detached {
    /// Those that are gone now.
    pub removed: Vec<EndpointId>,
    /// Those that were not there.
    pub absent: Vec<EndpointId>,
}

impl Host {
    /// Detaches endpoints; those that are gone already are fine. What cannot be removed stops
    /// nothing else, is listed in the error, and can be removed by another call.
    pub fn detach(&self, ids: &[EndpointId]) -> Result<Detached, Error> {
        let mut detached = Detached::default();
        let Some(session) = self.open_existing()? else {
            detached.absent.extend_from_slice(ids);
            return Ok(detached);
        };
        let mut left = Left::default();
        let mut recorded: Vec<EndpointRecord> = Vec::new();
        for id in ids {
            match session.state.sound_endpoint(id)? {
                Some(record) if recorded.iter().any(|other| other.id == record.id) => {}
                Some(record) => recorded.push(record),
                None => match gc::remove_unrecorded(&session, id) {
                    Ok(true) => detached.removed.push(id.clone()),
                    Ok(false) => detached.absent.push(id.clone()),
                    Err(error) => left.note(format!("endpoint {id}"), error),
                },
            }
        }
        for (id, result) in remove_all(&session, recorded) {
            match result {
                Ok(()) => detached.removed.push(id),
                Err(error) => left.note(format!("endpoint {id}"), error),
            }
        }
        // Also what an earlier detach did not get to.
        if let Err(error) = network::remove_unused(&session) {
            left.note("remove unused networks", error);
        }
        session.abandon_if_fresh();
        let ids: Vec<&str> = ids.iter().map(EndpointId::as_str).collect();
        left.or(format!("detach {}", ids.join(" ")), detached)
    }

    /// What a detach would undo, in the order of the set-up.
    pub fn plan_detach(&self, id: &EndpointId) -> Result<Plan<Step>, Error> {
        let Some(store) = self.read()? else {
            return Ok(Plan::default());
        };
        let Some(record) = store.endpoint(id)? else {
            return Ok(Plan::default());
        };
        let network = store.network(&record.wish.network)?;
        let bridge = network
            .as_ref()
            .map_or("its bridge", |network| network.bridge.as_str());
        Ok(endpoint_steps(&record, bridge, None).into_iter().collect())
    }
}

/// Removes an endpoint with all that it owns.
pub(super) fn remove(session: &Session, endpoint: EndpointRecord) -> Result<(), Error> {
    let mut datapath = None;
    Removal::begin(session, endpoint, &mut datapath)?.finish(&mut datapath)
}

/// Removes endpoints with all that they own, and says of each what became of it. Their links
/// are deleted together, which for many takes little longer than for one.
pub(super) fn remove_all(
    session: &Session,
    endpoints: Vec<EndpointRecord>,
) -> Vec<(EndpointId, Result<(), Error>)> {
    let mut datapath = None;
    let begun: Vec<_> = endpoints
        .into_iter()
        .map(|endpoint| {
            let id = endpoint.id.clone();
            (id, Removal::begin(session, endpoint, &mut datapath))
        })
        .collect();
    let links: HashMap<String, String> = begun
        .iter()
        .filter_map(|(_, removal)| removal.as_ref().ok()?.link())
        .collect();
    let is_theirs = |link: &Link| {
        let alias = links.get(&link.name);
        alias.is_some_and(|alias| link.has_alias(alias))
    };
    // What stays is tried again on its own, and is reported then.
    if links.len() > 1
        && let Err(error) = session.netlink.delete_links(is_theirs)
    {
        tracing::debug!(error = &error as &dyn std::error::Error, "one by one");
    }
    begun
        .into_iter()
        .map(|(id, removal)| {
            let result = removal.and_then(|removal| removal.finish(&mut datapath));
            (id, result)
        })
        .collect()
}

/// An endpoint that is being removed.
struct Removal<'a> {
    world: World<'a>,
    /// The steps up to that which makes the link.
    rest: Plan<Step>,
    what: String,
    left: Vec<(String, Error)>,
}

impl<'a> Removal<'a> {
    /// Takes an endpoint out of use: afterwards there is its link, and what others could get
    /// were it free already. The datapath is opened if it is not yet, and handed back.
    fn begin(
        session: &'a Session,
        endpoint: EndpointRecord,
        datapath: &mut Option<Datapath>,
    ) -> Result<Self, Error> {
        let network = session.state.sound_network(&endpoint.wish.network)?;
        // Of another network of the same name nothing is this endpoint's.
        let network = network.filter(|network| network.number == endpoint.network);
        let bridge = network
            .as_ref()
            .map_or("its bridge", |network| network.bridge.as_str());
        let mut world = World::new(session);
        world.usage = Use::Used;
        world.datapath = match datapath.take() {
            Some(datapath) => Some(datapath),
            None => session.open_datapath()?,
        };
        world.policy = endpoint.policy_in_force().compile()?;
        if let Some(other) = &endpoint.other_policy
            && let Some(mut more) = other.compile()?
        {
            let policy = world.policy.get_or_insert_default();
            policy.cidrs.append(&mut more.cidrs);
            policy.ports.append(&mut more.ports);
        }
        let mut steps = endpoint_steps(&endpoint, bridge, world.policy.as_ref());
        let what = format!("detach {}", endpoint.id);
        world.network = network;
        world.publishes = [&endpoint.publishes[..], &endpoint.pending].concat();
        world.endpoint = Some(endpoint);
        let link = steps.iter().position(|step| matches!(step, Step::Veth(_)));
        let in_use: Plan<Step> = steps.drain(link.map_or(0, |at| at + 1)..).collect();
        let left = plan::tear_down(&in_use, &mut world)?;
        *datapath = world.datapath.take();
        Ok(Self {
            world,
            rest: steps.into_iter().collect(),
            what,
            left,
        })
    }

    /// Name and alias of the link.
    fn link(&self) -> Option<(String, String)> {
        let endpoint = self.world.endpoint.as_ref()?;
        Some((endpoint.host_ifname.to_string(), endpoint_alias(endpoint)))
    }

    /// Removes the rest: the link if it is still there, then what says that it was.
    fn finish(mut self, datapath: &mut Option<Datapath>) -> Result<(), Error> {
        self.world.datapath = datapath.take();
        self.left
            .extend(plan::tear_down(&self.rest, &mut self.world)?);
        *datapath = self.world.datapath.take();
        Left(self.left).or(self.what, ())
    }
}
