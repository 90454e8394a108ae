//! `publish` and `unpublish`: port forwards of a live endpoint.

use super::{
    EndpointView, Error, Host, Step,
    attach::failed,
    error::Left,
    host::Session,
    nat,
    step::{World, endpoint_alias, families, publish_steps},
};
use crate::{
    kernel::{
        bpf::HostPorts,
        sockets::{self, Listener, Sockets},
    },
    model::{
        EndpointId,
        plan::{self, Plan},
        publish::PublishSpec,
        record::{EndpointRecord, NetworkRecord, State},
    },
};
use rand::{Rng, seq::SliceRandom};

impl Host {
    /// Publishes more ports of an endpoint. What it publishes already is fine; on failure
    /// nothing stays.
    pub fn publish(
        &self,
        id: &EndpointId,
        publishes: &[PublishSpec],
    ) -> Result<EndpointView, Error> {
        let wanted = PublishSpec::check_all(publishes)?;
        let session = self.session_with(id)?;
        let (endpoint, network) = live(&session, id)?;
        let endpoint = take_back_pending(&session, endpoint)?;
        let more = missing(&session, &endpoint, &wanted)?;
        let plan: Plan<Step> = publish_steps(&more).into_iter().collect();
        let mut world = World::new(&session);
        world.datapath = session.open_datapath()?;
        world.publishes = more;
        world.endpoint = Some(endpoint);
        if !world.publishes.is_empty() {
            plan::run(&plan, &mut world).map_err(|failure| failed(&plan, failure))?;
        }
        Ok(EndpointView::of(
            &world.endpoint.expect("it has one"),
            network.as_ref(),
        ))
    }

    /// What a publish would do. Nothing is changed.
    pub fn plan_publish(
        &self,
        id: &EndpointId,
        publishes: &[PublishSpec],
    ) -> Result<Plan<Step>, Error> {
        let wanted = PublishSpec::check_all(publishes)?;
        let session = self.session_with(id)?;
        let (endpoint, _) = live(&session, id)?;
        let more = missing(&session, &endpoint, &wanted)?;
        match more.is_empty() {
            true => Ok(Plan::default()),
            false => Ok(publish_steps(&more).into_iter().collect()),
        }
    }

    /// Takes ports of an endpoint back, and ends what came in by them. All or nothing of what is
    /// asked for must be published.
    pub fn unpublish(
        &self,
        id: &EndpointId,
        publishes: &[PublishSpec],
    ) -> Result<EndpointView, Error> {
        let session = self.session_with(id)?;
        let (endpoint, network) = recorded(&session, id)?;
        let less = present(&endpoint, publishes)?;
        // Also what an earlier call did not get to.
        let endpoint = take_back_pending(&session, endpoint)?;
        let endpoint = take_back(&session, endpoint, less)?;
        Ok(EndpointView::of(&endpoint, network.as_ref()))
    }

    /// What an unpublish would undo, in the order of the set-up.
    pub fn plan_unpublish(
        &self,
        id: &EndpointId,
        publishes: &[PublishSpec],
    ) -> Result<Plan<Step>, Error> {
        let session = self.session_with(id)?;
        let (endpoint, _) = recorded(&session, id)?;
        Ok(publish_steps(&present(&endpoint, publishes)?)
            .into_iter()
            .collect())
    }

    pub(super) fn session_with(&self, id: &EndpointId) -> Result<Session, Error> {
        self.open_existing()?
            .ok_or_else(|| Error::NoEndpoint(id.clone()))
    }
}

/// Takes back publishes of an endpoint that are recorded, in whatever way.
fn take_back(
    session: &Session,
    endpoint: EndpointRecord,
    less: Vec<PublishSpec>,
) -> Result<EndpointRecord, Error> {
    let what = format!("unpublish {}", endpoint.id);
    let plan: Plan<Step> = publish_steps(&less).into_iter().collect();
    let mut world = World::new(session);
    world.datapath = session.open_datapath()?;
    world.publishes = less;
    world.endpoint = Some(endpoint);
    let left = Left(plan::tear_down(&plan, &mut world)?);
    left.or(what, world.endpoint.expect("it has one"))
}

/// Takes back what a call that died had begun to publish, or to take back.
pub(super) fn take_back_pending(
    session: &Session,
    endpoint: EndpointRecord,
) -> Result<EndpointRecord, Error> {
    match endpoint.pending.clone() {
        pending if pending.is_empty() => Ok(endpoint),
        pending => take_back(session, endpoint, pending),
    }
}

type Found = (EndpointRecord, Option<NetworkRecord>);

pub(super) fn recorded(session: &Session, id: &EndpointId) -> Result<Found, Error> {
    match session.state.sound_endpoint(id)? {
        Some(endpoint) => {
            let network = session.state.sound_network(&endpoint.wish.network)?;
            Ok((endpoint, network))
        }
        None => Err(Error::NoEndpoint(id.clone())),
    }
}

pub(super) fn live(session: &Session, id: &EndpointId) -> Result<Found, Error> {
    let (endpoint, network) = recorded(session, id)?;
    let alias = endpoint_alias(&endpoint);
    let link = session.netlink.find_link(endpoint.host_ifname.as_str())?;
    let has_link = link.is_some_and(|link| link.has_alias(&alias));
    match has_link && endpoint.state == State::Active {
        true => Ok((endpoint, network)),
        false => Err(Error::NotActive(id.clone())),
    }
}

/// Those that the endpoint does not publish yet, with their host ports.
fn missing(
    session: &Session,
    endpoint: &EndpointRecord,
    wanted: &[PublishSpec],
) -> Result<Vec<PublishSpec>, Error> {
    let more: Vec<PublishSpec> = wanted
        .iter()
        .copied()
        .filter(|spec| !endpoint.publishes.contains(spec))
        .collect();
    let (v4, v6) = families(endpoint);
    choose(session, &more, v4, v6)
}

/// Those of the endpoint's that are asked for; each must be there, or be left of a call that
/// died.
fn present(endpoint: &EndpointRecord, wanted: &[PublishSpec]) -> Result<Vec<PublishSpec>, Error> {
    let wanted = PublishSpec::check_all(wanted)?;
    match wanted
        .iter()
        .find(|spec| !endpoint.publishes.contains(spec) && !endpoint.pending.contains(spec))
    {
        Some(absent) => Err(Error::NoPublish {
            id: endpoint.id.clone(),
            spec: absent.to_string(),
        }),
        None => Ok(wanted),
    }
}

/// The publishes with their host ports, none of which is taken.
pub(super) fn choose(
    session: &Session,
    wanted: &[PublishSpec],
    v4: bool,
    v6: bool,
) -> Result<Vec<PublishSpec>, Error> {
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let mappings = session.state.sound_mappings()?;
    let (claims, sockets) = (session.state.port_claims()?, Sockets::default());
    let taken = |spec: &PublishSpec| -> Result<Option<Error>, Error> {
        let narrow = spec.narrowed(v4, v6);
        if let Some(error) = nat::in_the_way(&mappings, &narrow) {
            return Ok(Some(error));
        }
        if let Some((owner, taken)) = claims.conflict(&narrow, &[])? {
            let (spec, owner) = (spec.to_string(), owner.id);
            return Ok(Some(Error::PortPublished { spec, taken, owner }));
        }
        let socket = sockets.in_the_way(&narrow)?;
        Ok(socket.map(|listener| in_use(spec, listener)))
    };
    let mut chosen = wanted.to_vec();
    for spec in &chosen {
        spec.check_families(v4, v6)?;
        if let Some(error) = taken(spec)? {
            return Err(error);
        }
    }
    if chosen.iter().all(|spec| spec.host_ports().is_some()) {
        return Ok(chosen);
    }
    let candidates = choosable()?;
    for index in 0..chosen.len() {
        let spec = chosen[index];
        if spec.host_ports().is_some() {
            continue;
        }
        for first in &candidates {
            if let Some(candidate) = spec.with_host_port(*first)
                && !chosen.iter().any(|other| other.overlaps(&candidate))
                && taken(&candidate)?.is_none()
            {
                chosen[index] = candidate;
                break;
            }
        }
        if chosen[index].host_ports().is_none() {
            return Err(Error::NoFreePort {
                spec: spec.to_string(),
            });
        }
    }
    Ok(chosen)
}

pub(super) fn in_use(spec: &PublishSpec, listener: &Listener) -> Error {
    Error::PortInUse {
        spec: spec.to_string(),
        taken: listener.to_string(),
        owner: owner_of(listener),
    }
}

/// Whose a socket of the host is, in words.
pub(super) fn owner_of(listener: &Listener) -> String {
    sockets::process_of(listener).map_or_else(
        || "a socket of the host".to_owned(),
        |(pid, command)| format!("process {pid} ({})", command.escape_debug()),
    )
}

/// Host ports that nucnet may choose for a publish, in random order: neither well-known nor
/// such as the host, or masquerade, takes for connections; of those, beyond the range of the
/// host first, because few expect anything there.
fn choosable() -> Result<Vec<u16>, Error> {
    let ports = HostPorts::read()?;
    let (first, mask) = ports.dynamic(None)?;
    let usable = |port: &u16| {
        !ports.ephemeral.contains(port) && !(first..=first.saturating_add(mask)).contains(port)
    };
    let mut rng = rand::rng();
    let mut above: Vec<u16> = (*ports.ephemeral.end()..=u16::MAX).filter(usable).collect();
    let mut below: Vec<u16> = (1024..*ports.ephemeral.start()).filter(usable).collect();
    above.shuffle(&mut rng);
    below.shuffle(&mut rng);
    above.extend(below);
    // A host that takes nearly all ports for itself still has some that nobody listens on.
    if above.is_empty() {
        above.extend((0..1000).map(|_| rng.random_range(1024..=u16::MAX)));
    }
    Ok(above)
}
