//! `flows` and `flows flush`.

use super::{
    Error, Host,
    connections::{Connections, Parties},
};
use crate::{
    kernel::{bpf::Datapath, netfilter::Conntrack},
    model::{
        EndpointId,
        flow::{FlowView, Party},
        record::{DatapathKind, EndpointRecord},
    },
};
use std::collections::HashMap;

/// The live flows of a moment, still in the datapath.
#[derive(Debug)]
pub struct Flows(Source);

#[derive(Debug)]
enum Source {
    Nothing,
    Programs {
        datapath: Box<Datapath>,
        owners: HashMap<u32, EndpointId>,
        party: Option<Party>,
    },
    Rules(Connections),
}

impl Flows {
    /// Calls `visit` with each, in no order. Thousands of flows are read by one system call, and
    /// those of programs are not kept: there may be very many.
    pub fn for_each<'a>(&'a self, mut visit: impl FnMut(FlowView<'a>)) -> Result<(), Error> {
        match &self.0 {
            Source::Nothing => {}
            Source::Programs {
                datapath,
                owners,
                party,
            } => datapath.for_each_live_flow(|key, flow, now| {
                if party.is_none_or(|party| party.takes_part(key, flow)) {
                    visit(FlowView::of(key, flow, owners.get(&key.endpoint), now));
                }
            })?,
            Source::Rules(connections) => connections.views().for_each(visit),
        }
        Ok(())
    }
}

impl Host {
    /// The live flows, of all endpoints or of those in which one takes part. Needs no lock.
    pub fn flows(&self, endpoint: Option<&EndpointId>) -> Result<Flows, Error> {
        let Some(store) = self.read()? else {
            return match endpoint {
                Some(id) => Err(Error::NoEndpoint(id.clone())),
                None => Ok(Flows(Source::Nothing)),
            };
        };
        let records = super::list::readable(store.endpoints()?);
        let party = endpoint.map(|id| party(id, &records)).transpose()?;
        let datapath = store.host()?.and_then(|host| host.datapath);
        if datapath.is_some_and(|datapath| datapath.kind == DatapathKind::Iptables) {
            let mappings = super::list::readable(store.mappings()?);
            let parties = Parties::new(records, mappings, endpoint.cloned());
            return Ok(Flows(Source::Rules(Connections::read(parties)?)));
        }
        Ok(Flows(match self.open_datapath()? {
            Some(datapath) => Source::Programs {
                datapath: Box::new(datapath),
                owners: records.into_iter().map(|r| (r.number, r.id)).collect(),
                party,
            },
            None => Source::Nothing,
        }))
    }

    /// Ends the live flows, of all endpoints or of those in which one takes part, with the
    /// bindings of these endpoints. How many flows there were. A conversation that goes on is a
    /// new flow, where its next packet may open one.
    pub fn flush_flows(&self, endpoint: Option<&EndpointId>) -> Result<u64, Error> {
        self.check_capabilities()?;
        let Some(session) = self.open_existing()? else {
            return match endpoint {
                Some(id) => Err(Error::NoEndpoint(id.clone())),
                None => Ok(0),
            };
        };
        let records = match endpoint {
            Some(id) => session.state.sound_endpoint(id)?.into_iter().collect(),
            None => Vec::new(),
        };
        if session.kind() == DatapathKind::Iptables {
            let mut endpoints = session.state.sound_endpoints()?;
            endpoints.retain(|record| endpoint.is_none_or(|id| record.id == *id));
            if let (Some(id), true) = (endpoint, endpoints.is_empty()) {
                return Err(Error::NoEndpoint(id.clone()));
            }
            let addresses: Vec<_> = endpoints.into_iter().flat_map(|e| e.addresses).collect();
            return Conntrack::open()
                .and_then(|conntrack| conntrack.forget_all(|tracked| tracked.is_of(&addresses)))
                .map_err(Error::Conntrack);
        }
        let party = endpoint.map(|id| party(id, &records)).transpose()?;
        let Some(mut datapath) = session.open_datapath()? else {
            return Ok(0);
        };
        datapath.end_bindings(party.map(|party| party.number))?;
        let ended = datapath
            .end_flows(|key, flow| party.is_none_or(|party| party.takes_part(key, flow)))?;
        Ok(ended)
    }
}

fn party(id: &EndpointId, records: &[EndpointRecord]) -> Result<Party, Error> {
    let record = records.iter().find(|record| record.id == *id);
    let record = record.ok_or_else(|| Error::NoEndpoint(id.clone()))?;
    Ok(record.party())
}
