//! `list` and `inspect`: nouns that read. They need no lock.

use super::{
    Error, Host, netfilter,
    step::endpoint_alias,
    view::{Dropped, EndpointDetails, EndpointView, Forwarded, Published},
};
use crate::{
    kernel::{
        bpf::Datapath,
        netfilter::Conntrack,
        netlink::{Link, Netlink},
        store,
    },
    model::{
        EndpointId,
        netfilter::Family,
        publish::PublishSpec,
        record::{DatapathKind, EndpointRecord, State},
    },
};
use nucnet_common::abi;
use std::collections::{BTreeMap, HashMap};

impl Host {
    /// All endpoints, in the order of their ids.
    pub fn list(&self) -> Result<Vec<EndpointView>, Error> {
        let Some(store) = self.read()? else {
            return Ok(Vec::new());
        };
        let endpoints = readable(store.endpoints()?);
        let (networks, _) = store.networks()?;
        let links = Netlink::open()?.links()?;
        let links: HashMap<&str, &Link> = links.iter().map(|l| (l.name.as_str(), l)).collect();
        Ok(endpoints
            .iter()
            .map(|endpoint| {
                let network = networks.iter().find(|n| n.number == endpoint.network);
                let mut view = EndpointView::of(endpoint, network);
                view.state = state(endpoint, links.get(endpoint.host_ifname.as_str()).copied());
                view
            })
            .collect())
    }

    /// One endpoint with its counters.
    pub fn inspect(&self, id: &EndpointId) -> Result<EndpointDetails, Error> {
        let (store, record) = self.read_endpoint(id)?;
        let network = store.network(&record.wish.network)?;
        let mut endpoint = EndpointView::of(&record, network.as_ref());
        let link = Netlink::open()?.find_link(record.host_ifname.as_str())?;
        endpoint.state = state(&record, link.as_ref());
        let mut details = EndpointDetails {
            endpoint,
            flows: 0,
            bindings: 0,
            forwarded: Vec::new(),
            dropped: BTreeMap::new(),
        };
        if record.datapath == DatapathKind::Iptables {
            self.by_rules(&store, &record, &mut details)?;
            return Ok(details);
        }
        let datapath = self.open_datapath()?;
        let Some(datapath) = datapath else {
            details.endpoint.state = degraded(details.endpoint.state);
            return Ok(details);
        };
        if let Some(usage) = datapath.usage.get(&record.number)? {
            (details.flows, details.bindings) = (usage.flows, usage.bindings);
        }
        details.forwarded = forwarded(&datapath, &record)?;
        for &reason in abi::Reason::ALL {
            let key = abi::DropKey {
                endpoint: record.number,
                reason: reason as u32,
            };
            let abi::DropCount { packets, bytes } = datapath.drops.get(&key)?;
            if packets > 0 {
                details
                    .dropped
                    .insert(reason.name(), Dropped { packets, bytes });
            }
        }
        let is_known = match record.link {
            Some(link) => datapath
                .endpoints
                .get(&link)?
                .is_some_and(|entry| entry.number == record.number),
            None => false,
        };
        if !is_known {
            details.endpoint.state = degraded(details.endpoint.state);
        }
        Ok(details)
    }
}

impl Host {
    /// What the rules have counted of an endpoint.
    fn by_rules(
        &self,
        store: &store::Store,
        record: &EndpointRecord,
        details: &mut EndpointDetails,
    ) -> Result<(), Error> {
        let host = store.host()?;
        let Some(netfilter) = host.as_ref().map(netfilter::of_host).transpose()?.flatten() else {
            details.endpoint.state = degraded(details.endpoint.state);
            return Ok(());
        };
        for family in Family::ALL {
            let is_closed = !netfilter.has(family) && record.address(family.is_v6()).is_some();
            if is_closed {
                details.endpoint.state = degraded(details.endpoint.state);
            }
            let saved = netfilter.saved(family)?;
            if family == Family::Ipv4 && !saved.has_own() {
                details.endpoint.state = degraded(details.endpoint.state);
            }
            for (reason, count) in saved.dropped(record.id.as_str()) {
                let Some(reason) = abi::Reason::named(&reason) else {
                    continue;
                };
                let total = details.dropped.entry(reason.name()).or_insert(Dropped {
                    packets: 0,
                    bytes: 0,
                });
                total.packets += count.packets;
                total.bytes += count.bytes;
            }
        }
        let tracked = Conntrack::open().and_then(|conntrack| conntrack.list());
        let tracked = tracked.map_err(Error::Conntrack)?;
        let own = tracked
            .iter()
            .filter(|tracked| tracked.is_of(&record.addresses));
        details.flows = own.count() as u64;
        Ok(())
    }
}

/// What came by each publish of an endpoint: its flows, and those that siblings opened to it.
fn forwarded(datapath: &Datapath, record: &EndpointRecord) -> Result<Vec<Forwarded>, Error> {
    let mut sums: Vec<(PublishSpec, Forwarded)> = record
        .publishes
        .iter()
        .filter_map(|spec| Some((*spec, Forwarded::nothing(Published::of(spec)?))))
        .collect();
    if !sums.is_empty() {
        let party = record.party();
        datapath.for_each_live_flow(|key, flow, _| {
            let mut sums = sums.iter_mut();
            if let Some((_, sum)) = sums.find(|(spec, _)| party.came_by(spec, key, flow)) {
                sum.add(flow, key.endpoint == record.number);
            }
        })?;
    }
    Ok(sums.into_iter().map(|(_, sum)| sum).collect())
}

/// The records that can be read. Says what cannot.
pub(super) fn readable<T>((records, unreadable): (Vec<T>, Vec<store::Error>)) -> Vec<T> {
    for error in &unreadable {
        tracing::warn!(
            error = error as &dyn std::error::Error,
            "a record cannot be read"
        );
    }
    records
}

/// The recorded state, unless the kernel knows better.
fn state(record: &EndpointRecord, link: Option<&Link>) -> State {
    let alias = endpoint_alias(record);
    match link {
        Some(link) if link.has_alias(&alias) => record.state,
        _ => degraded(record.state),
    }
}

fn degraded(state: State) -> State {
    match state {
        State::Active => State::Degraded,
        state => state,
    }
}
