//! Flows that another datapath had, before any program carries packets: nobody else writes.

use std::collections::{HashMap, hash_map::Entry};

use nucnet_common::{
    abi::{
        Binding, Flow, FlowKey, Network, OutsideKey, Settings, Slot, SlotUse, Usage, flow_flag,
        size,
    },
    filter::{is_permitting, permission_key},
    flow::{binding_key, bound_key, is_question, outside_key, timeout},
    nat::is_bound,
};

use super::{BpfError, Datapath};

/// The version of a place that was free when its first holder took it.
const VERSION: u32 = 1;

/// The most places that are taken: half of them are left to newcomers.
const MOST: usize = size::SLOTS / 2;

/// Entries for flows that are to be taken over.
#[derive(Debug)]
pub struct Adoption {
    settings: Settings,
    flows: HashMap<FlowKey, Flow>,
    bindings: HashMap<FlowKey, Binding>,
    outside: HashMap<OutsideKey, FlowKey>,
    places: HashMap<u32, Slot>,
    usage: HashMap<u32, Usage>,
}

impl Adoption {
    fn new(settings: Settings) -> Self {
        Self {
            settings,
            flows: HashMap::new(),
            bindings: HashMap::new(),
            outside: HashMap::new(),
            places: HashMap::new(),
            usage: HashMap::new(),
        }
    }

    /// Takes a flow over, but for what only the maps know: its idle time, its place, its binding.
    /// `false`: another one has its view, or its endpoint has as many as it may.
    pub fn add(&mut self, network: &Network, key: FlowKey, mut flow: Flow) -> bool {
        flow.timeout_s = timeout(network, key.protocol, &flow);
        let view = outside_key(key.protocol, &flow);
        if self.outside.contains_key(&view) || self.flows.contains_key(&key) {
            return false;
        }
        let Some(place) = self.take_place(SlotUse::Flow, key) else {
            return false;
        };
        (flow.slot, flow.slot_version) = place;
        self.outside.insert(view, key);
        if is_bound(network, key.protocol) && self.bind(&key, &flow) {
            flow.flags |= flow_flag::BOUND;
            if is_permitting(&key, &flow) {
                let permission = permission_key(key.protocol, &flow);
                self.outside.entry(permission).or_insert(key);
            }
        }
        self.flows.insert(key, flow);
        true
    }

    /// Gives a flow that masquerades a binding, if its port can be that of one: of several that an
    /// inside port has, the first is.
    fn bind(&mut self, key: &FlowKey, flow: &Flow) -> bool {
        let masquerades = flow.flags & flow_flag::INBOUND == 0 && flow.external != key.inside;
        let hosts = self.settings.host_port_first..=self.settings.host_port_last;
        // As long as the host lives it may take one of its own for itself.
        if !masquerades || hosts.contains(&flow.external_port) {
            return false;
        }
        let inside = binding_key(key, &flow.external);
        let is_question = is_question(key.protocol, flow);
        if let Some(binding) = self.bindings.get_mut(&inside) {
            if binding.external_port != flow.external_port {
                return false;
            }
            binding.timeout_s = binding.timeout_s.max(flow.timeout_s);
            binding.is_for_questions &= u16::from(is_question);
            return true;
        }
        let view = bound_key(key.protocol, &flow.external, flow.external_port);
        if self.outside.contains_key(&view) {
            return false;
        }
        let Some((slot, slot_version)) = self.take_place(SlotUse::Binding, inside) else {
            return false;
        };
        let binding = Binding {
            last_seen: flow.last_seen,
            external: flow.external,
            external_port: flow.external_port,
            is_for_questions: is_question.into(),
            timeout_s: flow.timeout_s,
            slot,
            slot_version,
            reserved: [0; 8],
        };
        self.bindings.insert(inside, binding);
        self.outside.insert(view, inside);
        true
    }

    /// Takes a place, any one: where they are spread, all newcomers find some that are free among
    /// those that they look at.
    fn take_place(&mut self, holds: SlotUse, key: FlowKey) -> Option<(u32, u32)> {
        let usage = self.usage.entry(key.endpoint).or_default();
        let quota = u64::from(self.settings.flows_per_endpoint);
        if usage.flows + usage.bindings >= quota || self.places.len() >= MOST {
            return None;
        }
        let index = loop {
            let index = rand::random::<u32>() & (size::SLOTS as u32 - 1);
            if let Entry::Vacant(place) = self.places.entry(index) {
                place.insert(Slot {
                    version: VERSION,
                    holds: holds as u32,
                    key,
                    ..Slot::default()
                });
                break index;
            }
        };
        match holds {
            SlotUse::Binding => usage.bindings += 1,
            _ => usage.flows += 1,
        }
        Some((index, VERSION))
    }
}

impl Datapath {
    /// Begins to take flows over.
    pub fn adoption(&self) -> Result<Adoption, BpfError> {
        Ok(Adoption::new(self.settings()?))
    }

    /// Writes the flows that are taken over. The maps are as they were made, and no program that
    /// would use them sits anywhere yet.
    pub fn adopt(&mut self, adoption: &Adoption) -> Result<(), BpfError> {
        for (place, slot) in &adoption.places {
            self.slots.set(*place, slot)?;
        }
        for (endpoint, usage) in &adoption.usage {
            self.usage.insert(endpoint, usage)?;
        }
        self.outside.insert_all(&pairs(&adoption.outside))?;
        self.bindings.insert_all(&pairs(&adoption.bindings))?;
        self.flows.insert_all(&pairs(&adoption.flows))
    }
}

fn pairs<K: Copy, V: Copy>(entries: &HashMap<K, V>) -> Vec<(K, V)> {
    entries.iter().map(|(key, value)| (*key, *value)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::to_abi;
    use nucnet_common::packet::UDP;

    fn adoption(flows_per_endpoint: u32) -> Adoption {
        Adoption::new(Settings {
            host_port_first: 32_768,
            host_port_last: 60_999,
            flows_per_endpoint,
            ..Settings::default()
        })
    }

    /// What endpoint 7 says by UDP, from a port to a host and by an external port.
    fn said(inside_port: u16, peer: &str, external_port: u16) -> (FlowKey, Flow) {
        let peer = to_abi(peer.parse().expect("address"));
        let key = FlowKey {
            endpoint: 7,
            protocol: UDP.into(),
            inside: to_abi("10.0.42.7".parse().expect("address")),
            peer,
            inside_port,
            peer_port: 4433,
        };
        let flow = Flow {
            external: to_abi("192.0.2.2".parse().expect("address")),
            external_port,
            peer,
            peer_port: 4433,
            ..Flow::default()
        };
        (key, flow)
    }

    fn add(adoption: &mut Adoption, (key, flow): (FlowKey, Flow)) -> bool {
        adoption.add(&Network::default(), key, flow)
    }

    #[test]
    fn flows_of_one_inside_port_share_a_binding() {
        let mut adoption = adoption(10);
        assert!(add(&mut adoption, said(5000, "192.0.2.1", 20_000)));
        assert!(add(&mut adoption, said(5000, "192.0.2.9", 20_000)));
        let usage = adoption.usage[&7];
        assert_eq!((usage.flows, usage.bindings), (2, 1));
        let is_bound = |flow: &Flow| flow.flags & flow_flag::BOUND != 0;
        assert!(adoption.flows.values().all(is_bound));
        // A view each, a permission each, and that of the binding.
        assert_eq!(adoption.outside.len(), 5);
        assert_eq!(adoption.places.len(), 3);
    }

    #[test]
    fn port_that_may_come_to_be_the_hosts_is_no_binding() {
        let mut adoption = adoption(10);
        assert!(add(&mut adoption, said(5000, "192.0.2.1", 40_000)));
        assert!(adoption.bindings.is_empty());
        assert_eq!(adoption.outside.len(), 1);
    }

    #[test]
    fn second_flow_with_one_view_is_refused() {
        let mut adoption = adoption(10);
        assert!(add(&mut adoption, said(5000, "192.0.2.1", 20_000)));
        assert!(!add(&mut adoption, said(5001, "192.0.2.1", 20_000)));
        assert_eq!(adoption.flows.len(), 1);
    }

    #[test]
    fn nobody_gets_more_than_their_quota() {
        let mut adoption = adoption(3);
        let taken = (0..5).filter(|n| add(&mut adoption, said(5000 + n, "192.0.2.1", 40_000 + n)));
        assert_eq!(taken.count(), 3);
        assert_eq!(adoption.places.len(), 3);
    }
}
