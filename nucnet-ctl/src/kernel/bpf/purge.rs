//! Removal of all that the datapath keeps about an endpoint.

use nucnet_common::abi::{Binding, Flow, FlowKey, OutsideKey, Slot, SlotUse};

use super::{BpfError, Datapath};

/// What [`Datapath::purge_endpoint`] found.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Purged {
    /// Flows.
    pub flows: u64,
    /// Bindings.
    pub bindings: u64,
}

impl Datapath {
    /// Removes an endpoint's flows and bindings with their outside entries and places, its
    /// usage and its drops. Its entries in `endpoints` and `addresses` must be gone before, so
    /// that no packet makes new ones; a program that was just running may still make a flow,
    /// which then lives until it is idle for too long. Repeating it is fine.
    pub fn purge_endpoint(&mut self, number: u32) -> Result<Purged, BpfError> {
        let mut purged = Purged::default();
        // Its count is exact: no flow, no need to look at those of everybody else.
        let usage = self.usage.get(&number)?.unwrap_or_default();
        if usage.flows > 0 {
            let mut found: Vec<(FlowKey, Flow)> = Vec::new();
            self.flows.for_each(|key, flow| {
                if key.endpoint == number {
                    found.push((*key, *flow));
                }
            })?;
            let keys: Vec<FlowKey> = found.iter().map(|(key, _)| *key).collect();
            // Programs that close a flow go by the same rule: whoever removed the flow removes
            // its outside entry, so nobody takes away the entry of a successor.
            let mut removed = Vec::new();
            self.flows.remove_all(&keys, |index| removed.push(index))?;
            let outside: Vec<OutsideKey> = removed
                .iter()
                .map(|&index| outside_of_flow(&found[index]))
                .collect();
            self.outside.remove_all(&outside, |_| {})?;
            for &index in &removed {
                let (key, flow) = &found[index];
                self.free_slot(flow.slot, SlotUse::Flow, key)?;
            }
            purged.flows = removed.len() as u64;
        }
        if usage.bindings > 0 {
            let mut found: Vec<(FlowKey, Binding)> = Vec::new();
            self.bindings.for_each(|key, binding| {
                if key.endpoint == number {
                    found.push((*key, *binding));
                }
            })?;
            let keys: Vec<FlowKey> = found.iter().map(|(key, _)| *key).collect();
            let mut removed = Vec::new();
            self.bindings
                .remove_all(&keys, |index| removed.push(index))?;
            let outside: Vec<OutsideKey> = removed
                .iter()
                .map(|&index| outside_of_binding(&found[index]))
                .collect();
            self.outside.remove_all(&outside, |_| {})?;
            for &index in &removed {
                let (key, binding) = &found[index];
                self.free_slot(binding.slot, SlotUse::Binding, key)?;
            }
            purged.bindings = removed.len() as u64;
        }
        self.usage.remove(&number)?;
        self.drops.forget(number)?;
        Ok(purged)
    }

    /// Frees a place, if it still is the holder's. Reading and writing each happen under the
    /// place's lock, but not both under one: a newcomer that takes the place in between, for a
    /// holder that is gone, loses it. All that follows is one place given twice.
    fn free_slot(&mut self, index: u32, held: SlotUse, key: &FlowKey) -> Result<(), BpfError> {
        let slot = self.slots.get(index)?;
        if slot.holds == held as u32 && slot.key == *key {
            let free = Slot {
                version: slot.version.wrapping_add(1),
                holds: SlotUse::Free as u32,
                ..Slot::default()
            };
            self.slots.set(index, &free)?;
        }
        Ok(())
    }
}

fn outside_of_flow((key, flow): &(FlowKey, Flow)) -> OutsideKey {
    OutsideKey {
        protocol: key.protocol,
        external: flow.external,
        peer: flow.peer,
        external_port: flow.external_port,
        peer_port: flow.peer_port,
    }
}

fn outside_of_binding((key, binding): &(FlowKey, Binding)) -> OutsideKey {
    OutsideKey {
        protocol: key.protocol,
        external: binding.external,
        external_port: binding.external_port,
        ..OutsideKey::default()
    }
}
