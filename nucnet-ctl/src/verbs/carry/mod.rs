//! Connections that are open while the host goes over to the other datapath, and keep their
//! translation. What a policy says of them is judged anew.

mod same;

use same::{Adopter, connection};

use super::{
    Error,
    host::Session,
    netfilter::{came_by, end_asker, local},
};
use crate::{
    kernel::{
        bpf::{Datapath, monotonic},
        netfilter::{self, Adopted, Conntrack, Netfilter, Tracked},
    },
    model::{
        behaviour::BehaviourWish,
        netfilter::{Family, Table},
        record::{EndpointRecord, MappingRecord, NetworkRecord},
    },
};
use nucnet_common::abi::{Flow, FlowKey, PeerKind};
use std::{
    collections::HashSet,
    io,
    time::{SystemTime, UNIX_EPOCH},
};

/// The chain of the kernel's for what sockets of the host send.
const OUTPUT: &str = "OUTPUT";

/// Has the kernel know the connections of the host's own sockets with publishes as the programs
/// have them pass it by, untranslated, before there are rules that would translate what the sockets
/// send: the programs send the answers past the kernel's table, which would take them for other
/// connections of the same sockets, and give them other ports.
pub(super) fn shield_host(datapath: &Datapath) -> Result<(), Error> {
    let conntrack = Conntrack::open().map_err(Error::Conntrack)?;
    let mut open = Vec::new();
    datapath.for_each_live_flow(|key, flow, now| {
        let is_open = connection(key, flow, now).filter(|_| is_hosts(flow));
        open.extend(is_open.map(Adopted::untranslated));
    })?;
    for adopted in open {
        if let Err(error) = conntrack.adopt(&adopted) {
            not_carried(&adopted, &error);
        }
    }
    Ok(())
}

/// Has the kernel track what the programs carry, before they are taken away: for a moment nothing
/// passes then. What fails is not carried over; everything else is.
pub(super) fn to_connections(datapath: &mut Datapath, has_v6: bool) -> Result<(), Error> {
    let mut handover = Handover {
        conntrack: Conntrack::open().map_err(Error::Conntrack)?,
        has_v6,
        done: HashSet::new(),
        lost: 0,
    };
    handover.pass(datapath, |flow| !is_hosts(flow))?;
    let mut links = Vec::new();
    datapath.endpoints.for_each(|link, _| links.push(*link))?;
    for link in links {
        datapath.endpoints.remove(&link)?;
    }
    handover.pass(datapath, |_| true)?;
    report(handover.done.len() as u64 - handover.lost, handover.lost);
    Ok(())
}

/// Whether a socket of the host's has asked for a publish.
fn is_hosts(flow: &Flow) -> bool {
    flow.peer_kind == PeerKind::Loopback as u32
}

fn not_carried(adopted: &Adopted, error: &io::Error) {
    tracing::debug!(
        connection = ?adopted.original,
        error = error as &dyn std::error::Error,
        "a connection is not carried over"
    );
}

/// Flows on their way to the kernel's table.
struct Handover {
    conntrack: Conntrack,
    has_v6: bool,
    done: HashSet<FlowKey>,
    lost: u64,
}

impl Handover {
    fn pass(&mut self, datapath: &Datapath, is_meant: impl Fn(&Flow) -> bool) -> Result<(), Error> {
        let mut open = Vec::new();
        datapath.for_each_live_flow(|key, flow, now| {
            if is_meant(flow)
                && !self.done.contains(key)
                && let Some(adopted) = connection(key, flow, now)
            {
                open.push((*key, adopted));
            }
        })?;
        for (key, adopted) in open {
            self.done.insert(key);
            if is_unserved(&adopted, self.has_v6) {
                end_asker(&adopted.original);
                self.lost += 1;
            } else if let Err(error) = self.conntrack.adopt(&adopted) {
                not_carried(&adopted, &error);
                self.lost += 1;
            }
        }
        Ok(())
    }
}

fn report(carried: u64, lost: u64) {
    tracing::info!(carried, "carried open connections over");
    if lost > 0 {
        tracing::warn!(
            lost,
            "some open connections cannot be carried over, and end"
        );
    }
}

/// What the kernel carries nowhere, or has no rules for.
fn is_unserved(adopted: &Adopted, has_v6: bool) -> bool {
    let asked = adopted.original.destination;
    asked.is_ipv6() && (!has_v6 || asked.is_loopback())
}

/// Has the programs know of the connections that the kernel tracks, before any of them sits
/// anywhere. `datapath` has just been loaded.
pub(super) fn to_flows(
    session: &Session,
    datapath: &mut Datapath,
    endpoints: &[EndpointRecord],
    networks: &[NetworkRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    let tracked = Conntrack::open().and_then(|conntrack| conntrack.list());
    let tracked = tracked.map_err(Error::Conntrack)?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let adopter = Adopter {
        endpoints,
        networks,
        mappings,
        local: local(&session.netlink)?,
        now: monotonic()?,
        clock: clock.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
    };
    let mut adoption = datapath.adoption()?;
    let (mut carried, mut lost) = (0, 0);
    for tracked in &tracked {
        let Some((key, flow)) = adopter.flow(tracked) else {
            continue;
        };
        let network = adopter.network_of(key.endpoint);
        let behaviour = match network {
            Some(network) => network.behaviour(),
            None => BehaviourWish::default().resolved(),
        };
        match adoption.add(&behaviour.abi(), key, flow) {
            true => carried += 1,
            false => lost += 1,
        }
    }
    datapath.adopt(&adoption)?;
    report(carried, lost);
    Ok(())
}

/// The rules for the host's own sockets, wherever there are any: found while all still works, for
/// nothing passes while they go.
pub(super) struct HostRules(Vec<(Netfilter, Vec<Family>)>);

impl HostRules {
    pub(super) fn find() -> Result<Self, Error> {
        let mut found = Vec::new();
        for netfilter in netfilter::all()? {
            let mut families = Vec::new();
            for family in Family::ALL {
                if netfilter.saved(family)?.has_hook(Table::Nat, OUTPUT) {
                    families.push(family);
                }
            }
            found.push((netfilter, families));
        }
        Ok(Self(found))
    }

    /// Leaves publishes to the programs for the host's own sockets, too. Until then, what these
    /// send is translated by what the kernel tracks, and what the programs answer is past it: the
    /// caller sees to it that they answer nothing yet.
    pub(super) fn leave(
        &self,
        session: &Session,
        endpoints: &[EndpointRecord],
    ) -> Result<(), Error> {
        for (netfilter, families) in &self.0 {
            for family in families {
                netfilter.empty(*family, Table::Nat, OUTPUT)?;
            }
        }
        let local = local(&session.netlink)?;
        forget(|tracked| {
            let asker = tracked.original.source;
            tracked.is_translated()
                && (asker.is_loopback() || local.contains(&asker))
                && EndpointRecord::holder(endpoints, tracked.reply.source).is_some()
        })
    }
}

/// Has the kernel forget the connections that programs carry now. Those between the host and an
/// endpoint of which nothing is translated are known to the host's own rules, and stay.
pub(super) fn forget_carried(
    session: &Session,
    endpoints: &[EndpointRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    let addresses: Vec<_> = endpoints.iter().flat_map(|e| e.addresses.clone()).collect();
    let local = local(&session.netlink)?;
    let is_hosts = |tracked: &Tracked| {
        let parties = [tracked.original.source, tracked.original.destination];
        !tracked.is_translated() && parties.iter().any(|party| local.contains(party))
    };
    forget(|tracked| {
        tracked.is_of(&addresses) && !is_hosts(tracked)
            || mappings.iter().any(|it| came_by(&it.spec, tracked))
    })
}

fn forget(is_meant: impl Fn(&Tracked) -> bool) -> Result<(), Error> {
    let forgotten = Conntrack::open().and_then(|conntrack| conntrack.forget_all(is_meant));
    forgotten.map(drop).map_err(Error::Conntrack)
}
