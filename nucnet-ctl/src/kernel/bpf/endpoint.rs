//! An endpoint in the maps, and all that the datapath keeps about it.

use nucnet_common::{
    abi::{Address, Binding, Endpoint, Flow, FlowKey, MAPPED, OutsideKey, Owner, Usage},
    filter::{is_permitting, permission_key},
    flow::{bound_key, outside_key},
    mapping::inside_view,
};

use super::{
    BpfError, Datapath,
    flows::{connection, end_connections},
};

/// What [`Datapath::purge_endpoint`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Flows.
    pub flows: u64,
    /// Bindings.
    pub bindings: u64,
}

impl Datapath {
    /// Makes an endpoint known, or changes it: `link` is the index of its host side interface.
    /// Its flows, and the count of them, stay.
    pub fn put_endpoint(&mut self, link: u32, endpoint: &Endpoint) -> Result<(), BpfError> {
        // Without a count, the programs make no flows for it.
        if self.usage.get(&endpoint.number)?.is_none() {
            self.usage.insert(&endpoint.number, &Usage::default())?;
        }
        let owner = Owner {
            link,
            endpoint: endpoint.number,
        };
        for address in addresses(endpoint) {
            self.addresses.insert(address, &owner)?;
        }
        self.endpoints.insert(&link, endpoint)
    }

    /// Forgets an endpoint, and all that the datapath keeps about it. Its publishes and its
    /// policy are entries of their own. `None`: there is none with that interface; repeating it
    /// after a crash is [`Datapath::purge_endpoint`].
    pub fn remove_endpoint(&mut self, link: u32) -> Result<Option<Purged>, BpfError> {
        let Some(endpoint) = self.endpoints.get(&link)? else {
            return Ok(None);
        };
        for address in addresses(&endpoint) {
            // Somebody else may have it by now.
            let owner = self.addresses.get(address)?;
            if owner.is_some_and(|owner| owner.endpoint == endpoint.number) {
                self.addresses.remove(address)?;
            }
        }
        let purged = self.purge_endpoint(endpoint.number)?;
        self.endpoints.remove(&link)?;
        Ok(Some(purged))
    }

    /// Removes an endpoint's flows and bindings with their outside entries, its usage and its
    /// drops. Repeating it is fine.
    ///
    /// A program that is just running may still make a flow, which then lives until it is idle
    /// for too long. Places in the table of flows need no care: one whose holder is gone is as
    /// good as free, and only the programs can take it without a race.
    pub fn purge_endpoint(&mut self, number: u32) -> Result<Purged, BpfError> {
        // Its count is exact: where it says none, there is no need to look at everybody's. And
        // without it, the programs make no more.
        let usage = self.usage.get(&number)?;
        self.usage.remove(&number)?;
        let mut purged = Purged::default();
        if usage.is_none_or(|usage| usage.flows > 0) {
            purged.flows = self.purge_flows(number)?;
        }
        if usage.is_none_or(|usage| usage.bindings > 0) {
            purged.bindings = self.purge_bindings(number)?;
        }
        self.drops.forget(number)?;
        self.event_limits.remove(&number)?;
        Ok(purged)
    }

    fn purge_flows(&mut self, number: u32) -> Result<u64, BpfError> {
        let (mut keys, mut outside): (Vec<FlowKey>, Vec<OutsideKey>) = Default::default();
        let mut inside = Vec::new();
        let mut connections = Vec::new();
        let mut permissions = Vec::new();
        self.flows.for_each(|key, flow: &Flow| {
            if key.endpoint == number {
                keys.push(*key);
                outside.push(outside_key(key.protocol, flow));
                inside.push(inside_view(key));
                connections.extend(connection(key, flow));
                if is_permitting(key, flow) {
                    permissions.push(permission_key(key.protocol, flow));
                }
            }
        })?;
        // Programs that close a flow go by the same rule: whoever removed the flow removes its
        // outside entry, so nobody takes away the entry of a successor.
        let mut removed = Vec::with_capacity(keys.len());
        self.flows
            .remove_all(&keys, |index| removed.push(outside[index]))?;
        self.outside.remove_all(&removed, |_| {})?;
        if number == MAPPED {
            self.outside.remove_all(&inside, |_| {})?;
        }
        end_connections(&connections);
        // These may name a flow of whoever has the port by now.
        let mut own = Vec::new();
        for permission in permissions {
            let named = self.outside.get(&permission)?;
            if named.is_some_and(|flow| flow.endpoint == number) {
                own.push(permission);
            }
        }
        self.outside.remove_all(&own, |_| {})?;
        Ok(removed.len() as u64)
    }

    fn purge_bindings(&mut self, number: u32) -> Result<u64, BpfError> {
        let (mut keys, mut outside): (Vec<FlowKey>, Vec<OutsideKey>) = Default::default();
        self.bindings.for_each(|key, binding: &Binding| {
            if key.endpoint == number {
                keys.push(*key);
                outside.push(bound_key(
                    key.protocol,
                    &binding.external,
                    binding.external_port,
                ));
            }
        })?;
        let mut removed = Vec::with_capacity(keys.len());
        self.bindings
            .remove_all(&keys, |index| removed.push(outside[index]))?;
        self.outside.remove_all(&removed, |_| {})?;
        Ok(removed.len() as u64)
    }
}

/// The addresses that an endpoint has.
fn addresses(endpoint: &Endpoint) -> impl Iterator<Item = &Address> {
    [&endpoint.address4, &endpoint.address6]
        .into_iter()
        .filter(|address| **address != Address::default())
}
