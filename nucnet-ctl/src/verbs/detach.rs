//! `detach`: removes everything that an endpoint owns.

use super::{
    Error, Host,
    error::Left,
    gc,
    host::Session,
    network,
    step::{World, endpoint_steps},
};
use crate::{
    kernel::{bpf::Datapath, claims::Use},
    model::{
        EndpointId,
        plan::{self, Plan},
        record::EndpointRecord,
    },
};

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
        for id in ids {
            match session.state.sound_endpoint(id)? {
                None => match gc::remove_unrecorded(&session, id) {
                    Ok(true) => detached.removed.push(id.clone()),
                    Ok(false) => detached.absent.push(id.clone()),
                    Err(error) => left.0.push((format!("endpoint {id}"), error)),
                },
                Some(record) => match remove(&session, record) {
                    Ok(()) => detached.removed.push(id.clone()),
                    Err(Error::Teardown { left: more, .. }) => left.0.extend(more.0),
                    Err(error) => left.0.push((format!("endpoint {id}"), error)),
                },
            }
        }
        // Also what an earlier detach did not get to.
        match network::remove_unused(&session) {
            Ok(()) => {}
            Err(Error::Teardown { left: more, .. }) => left.0.extend(more.0),
            Err(error) => left.0.push(("remove unused networks".to_owned(), error)),
        }
        session.abandon_if_fresh();
        match left.0.is_empty() {
            true => Ok(detached),
            false => {
                let ids: Vec<&str> = ids.iter().map(EndpointId::as_str).collect();
                Err(Error::Teardown {
                    what: format!("detach {}", ids.join(" ")),
                    left,
                })
            }
        }
    }

    /// What a detach would undo, in the order of the set-up.
    pub fn plan_detach(&self, id: &EndpointId) -> Result<Plan<super::Step>, Error> {
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
    let network = session.state.sound_network(&endpoint.wish.network)?;
    // Of another network of the same name nothing is this endpoint's.
    let network = network.filter(|network| network.number == endpoint.network);
    let bridge = network
        .as_ref()
        .map_or("its bridge", |network| network.bridge.as_str());
    let mut world = World::new(session);
    world.usage = Use::Used;
    world.datapath = Datapath::open_existing(session.bpffs(), &session.bpf_host)?;
    if let Some(numbers) = endpoint.policy {
        world.policy = Some(
            endpoint
                .egress
                .compile(numbers.policy, numbers.first_class)?,
        );
    }
    let steps = endpoint_steps(&endpoint, bridge, world.policy.as_ref());
    let plan: Plan<_> = steps.into_iter().collect();
    let what = format!("detach {}", endpoint.id);
    world.network = network;
    world.publishes = endpoint.publishes.clone();
    world.endpoint = Some(endpoint);
    let left = plan::tear_down(&plan, &mut world)?;
    match left.is_empty() {
        true => Ok(()),
        false => Err(Error::Teardown {
            what,
            left: Left(left),
        }),
    }
}
