//! The logic's view of the tables, and of who reads events.

use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Event, EventLimit, Flow, FlowKey, Guest, MappingCount, Network,
        OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish,
        PublishKey, Settings, SlotUse, Snat, SnatKey, StaticMapping, Uplink, Usage, size,
    },
    answer::Account,
    env::{Held, Monitors, Scratch, Tables},
    fragment,
};

use super::{
    World,
    entry::{Guard, insert, look},
    notes::Room,
    trie::{cidr_bytes, port_bytes, publish_bytes, snat_bytes},
};

impl Tables for World {
    type Scratch = Room<Scratch>;
    type Flow = Guard<Flow>;
    type Binding = Guard<Binding>;
    type Budget = Guard<u64>;

    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn network(&self, number: u32) -> Option<&Network> {
        self.networks.get(&number)
    }

    fn endpoint(&self, link: u32) -> Option<&Endpoint> {
        self.endpoints.get(&link)
    }

    fn guest(&self, link: u32) -> Option<&Guest> {
        self.guests.get(&link)
    }

    fn owner(&self, address: &Address) -> Option<&Owner> {
        self.owners.get(address)
    }

    fn uplink(&self, link: u32) -> Option<&Uplink> {
        self.uplinks.get(&link)
    }

    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        self.publishes.find(key, publish_bytes)
    }

    fn hairpin(&self, key: &PublishKey) -> Option<&Publish> {
        self.hairpins.find(key, publish_bytes)
    }

    fn mapping(&self, number: u32) -> Option<&StaticMapping> {
        self.mappings.get(&number)
    }

    fn snat(&self, key: &SnatKey) -> Option<&Snat> {
        self.snats.find(key, snat_bytes)
    }

    fn count_mapped(&self, number: u32, more: &MappingCount) {
        if let Some(count) = self.mapping_counts.borrow_mut().get_mut(&number) {
            count.flows += more.flows;
            count.packets += more.packets;
            count.bytes += more.bytes;
        }
    }

    fn policy_class(&self, key: &PolicyCidrKey) -> Option<&PolicyClass> {
        self.policy_cidrs.find(key, cidr_bytes)
    }

    fn policy_rule(&self, key: &PolicyPortKey) -> Option<&PolicyRule> {
        self.policy_ports.find(key, port_bytes)
    }

    fn note(&self, key: &fragment::Key, note: &mut fragment::Note) -> bool {
        match self.fragments.borrow().get(key) {
            Some(found) => {
                *note = *found;
                true
            }
            None => false,
        }
    }

    fn set_note(&self, key: &fragment::Key, note: &fragment::Note) {
        self.fragments.borrow_mut().insert(*key, *note);
    }

    fn budget(&self, account: &Account) -> Option<Guard<u64>> {
        look(&self.budgets, account)
    }

    fn insert_budget(&self, account: &Account, used_up: u64) {
        insert(&self.budgets, account, &used_up);
    }

    fn scratch(&self) -> Option<Room<Scratch>> {
        Some(Room::take(&self.notes))
    }

    fn flow(&self, key: &FlowKey) -> Option<Guard<Flow>> {
        look(&self.flows, key)
    }

    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> bool {
        self.may_change() && insert(&self.flows, key, flow)
    }

    fn remove_flow(&self, key: &FlowKey) -> bool {
        self.flows.borrow_mut().remove(key).is_some()
    }

    fn outside(&self, key: &OutsideKey, flow: &mut FlowKey) -> bool {
        match self.outside.borrow().get(key) {
            Some(found) => {
                *flow = *found;
                true
            }
            None => false,
        }
    }

    fn insert_outside(&self, key: &OutsideKey, flow: &FlowKey) -> bool {
        if !self.may_change()
            || Self::is_outrun(&self.ports_lost)
            || self.outside.borrow().contains_key(key)
        {
            return false;
        }
        self.outside.borrow_mut().insert(*key, *flow);
        true
    }

    fn remove_outside(&self, key: &OutsideKey) {
        self.outside.borrow_mut().remove(key);
    }

    fn binding(&self, key: &FlowKey) -> Option<Guard<Binding>> {
        look(&self.bindings, key)
    }

    fn insert_binding(&self, key: &FlowKey, binding: &Binding) -> bool {
        self.may_change() && insert(&self.bindings, key, binding)
    }

    fn remove_binding(&self, key: &FlowKey) -> bool {
        self.bindings.borrow_mut().remove(key).is_some()
    }

    fn slot(&self, index: u32, held: &mut Held) -> bool {
        *held = self.slots.borrow().get(&index).copied().unwrap_or_default();
        (index as usize) < size::SLOTS
    }

    fn take_slot(
        &self,
        index: u32,
        version: u32,
        holds: SlotUse,
        key: &FlowKey,
        held: &mut Held,
    ) -> bool {
        if !self.may_change() || Self::is_outrun(&self.places_lost) {
            return false;
        }
        self.give_slot(index, version, holds, key)
            .is_some_and(|before| {
                *held = before;
                true
            })
    }

    fn free_slot(&self, index: u32, version: u32) {
        // Somebody has taken it since: it is theirs.
        let _ = self.give_slot(index, version, SlotUse::Free, &FlowKey::default());
    }

    fn usage(&self, endpoint: u32) -> Option<Usage> {
        self.usage.borrow().get(&endpoint).copied()
    }

    fn count(&self, endpoint: u32, what: SlotUse, more: bool) {
        if let Some(usage) = self.usage.borrow_mut().get_mut(&endpoint) {
            let counter = match what {
                SlotUse::Binding => &mut usage.bindings,
                _ => &mut usage.flows,
            };
            *counter = if more {
                *counter + 1
            } else {
                counter
                    .checked_sub(1)
                    .expect("more were removed than there were")
            };
        }
    }
}

impl World {
    /// What a place was, which has not changed hands since `version`, until now.
    fn give_slot(&self, index: u32, version: u32, holds: SlotUse, key: &FlowKey) -> Option<Held> {
        let mut slots = self.slots.borrow_mut();
        let slot = ((index as usize) < size::SLOTS).then(|| slots.entry(index).or_default())?;
        let now = Held {
            version: version.wrapping_add(1),
            holds: holds as u32,
            key: *key,
        };
        (slot.version == version).then(|| std::mem::replace(slot, now))
    }
}

impl Monitors for World {
    type Draft = Room<Event>;
    type Limit = Guard<EventLimit>;

    fn reads_until(&self, monitor: u32) -> u64 {
        if self.watched && monitor == 0 {
            u64::MAX
        } else {
            0
        }
    }

    fn draft(&self) -> Option<Room<Event>> {
        Some(Room::take(&self.draft))
    }

    fn limit(&self, endpoint: u32) -> Option<Guard<EventLimit>> {
        insert(&self.limits, &endpoint, &EventLimit::default());
        look(&self.limits, &endpoint)
    }

    fn tell(&self, monitor: u32, event: &Event) {
        assert_eq!(monitor, 0, "nobody else reads");
        self.events.borrow_mut().push(*event);
    }
}
