//! The tables: maps, and during a dry run the overlay over them.

use core::{mem::size_of, ops::Deref};

use aya_ebpf::{
    bindings::{BPF_ANY, BPF_NOEXIST},
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_spin_lock, bpf_spin_unlock},
};
use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Flow, FlowKey, Guest, MappingCount, Network, OutsideKey, Owner,
        PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish, PublishKey, Settings,
        SlotUse, Snat, SnatKey, StaticMapping, Uplink, Usage,
    },
    answer::Account,
    env::{Held, Scratch, Tables},
    fragment,
};

use super::{Entry, Skb};
use crate::{dry_run, maps::*};

impl Tables for Skb {
    type Scratch = Entry<Scratch>;
    type Flow = Entry<Flow>;
    type Binding = Entry<Binding>;
    type Budget = Entry<u64>;

    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        SETTINGS.get(0)
    }

    #[inline(always)]
    fn network(&self, number: u32) -> Option<&Network> {
        // SAFETY: the control plane replaces entries whole; see `Entry` for the lifetime.
        unsafe { NETWORKS.get(number) }
    }

    #[inline(always)]
    fn endpoint(&self, link: u32) -> Option<&Endpoint> {
        // SAFETY: the control plane replaces entries whole; see `Entry` for the lifetime.
        unsafe { ENDPOINTS.get(link) }
    }

    #[inline(always)]
    fn guest(&self, link: u32) -> Option<&Guest> {
        // SAFETY: as above.
        unsafe { GUESTS.get(link) }
    }

    #[inline(always)]
    fn owner(&self, address: &Address) -> Option<&Owner> {
        // SAFETY: as above.
        unsafe { ADDRESSES.get(address) }
    }

    #[inline(always)]
    fn uplink(&self, link: u32) -> Option<&Uplink> {
        // SAFETY: as above.
        unsafe { UPLINKS.get(link) }
    }

    #[inline(always)]
    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        PUBLISHES.get(&Key::new(PublishKey::BITS, *key))
    }

    #[inline(always)]
    fn hairpin(&self, key: &PublishKey) -> Option<&Publish> {
        HAIRPINS.get(&Key::new(PublishKey::BITS, *key))
    }

    #[inline(always)]
    fn mapping(&self, number: u32) -> Option<&StaticMapping> {
        // SAFETY: the control plane replaces entries whole; see `Entry` for the lifetime.
        unsafe { MAPPINGS.get(number) }
    }

    #[inline(always)]
    fn snat(&self, key: &SnatKey) -> Option<&Snat> {
        SNATS.get(&Key::new(SnatKey::BITS, *key))
    }

    #[inline(always)]
    fn count_mapped(&self, number: u32, more: &MappingCount) {
        // The control plane makes the entry with the mapping; what comes after its removal is
        // nobody's.
        if dry_run::is_dry() {
            return;
        }
        if let Some(count) = MAPPING_COUNTS.get_ptr_mut(number) {
            // SAFETY: a per-CPU value, which nobody else writes while the program runs.
            unsafe {
                (*count).flows += more.flows;
                (*count).packets += more.packets;
                (*count).bytes += more.bytes;
            }
        }
    }

    #[inline(always)]
    fn policy_class(&self, key: &PolicyCidrKey) -> Option<&PolicyClass> {
        POLICY_CIDRS.get(&Key::new(8 * size_of::<PolicyCidrKey>() as u32, *key))
    }

    #[inline(always)]
    fn policy_rule(&self, key: &PolicyPortKey) -> Option<&PolicyRule> {
        POLICY_PORTS.get(&Key::new(8 * size_of::<PolicyPortKey>() as u32, *key))
    }

    #[inline(always)]
    fn note(&self, key: &fragment::Key, note: &mut fragment::Note) -> bool {
        // SAFETY: plain integers, which may change while they are copied: `fragment` looks whether
        // what they name fits the packet.
        match unsafe { FRAGMENTS.get(key) } {
            Some(found) => {
                *note = *found;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn set_note(&self, key: &fragment::Key, note: &fragment::Note) {
        // A full table evicts what was not used for longest; what cannot be noted is dropped
        // when it comes.
        let _ = FRAGMENTS.insert(key, note, BPF_ANY.into());
    }

    #[inline(always)]
    fn budget(&self, account: &Account) -> Option<Self::Budget> {
        BUDGETS.get_ptr_mut(account).map(Entry)
    }

    #[inline(always)]
    fn insert_budget(&self, account: &Account, used_up: u64) {
        // Somebody else was faster: that error is free.
        let _ = BUDGETS.insert(account, used_up, BPF_NOEXIST.into());
    }

    #[inline(always)]
    fn scratch(&self) -> Option<Self::Scratch> {
        SCRATCH.get_ptr_mut(0).map(Entry)
    }

    #[inline(always)]
    fn flow(&self, key: &FlowKey) -> Option<Self::Flow> {
        if dry_run::is_dry() {
            return dry_run::flow(key);
        }
        FLOWS.get_ptr_mut(key).map(Entry)
    }

    #[inline(always)]
    fn peek_flow(&self, key: &FlowKey) -> Option<impl Deref<Target = Flow>> {
        FLOWS.get_ptr_mut(key).map(Entry)
    }

    #[inline(always)]
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> bool {
        if dry_run::is_dry() {
            return dry_run::insert_flow(key, flow);
        }
        FLOWS.insert(key, flow, BPF_NOEXIST.into()).is_ok()
    }

    #[inline(always)]
    fn remove_flow(&self, key: &FlowKey) -> bool {
        dry_run::is_dry() || FLOWS.remove(key).is_ok()
    }

    #[inline(always)]
    fn outside(&self, key: &OutsideKey, flow: &mut FlowKey) -> bool {
        // SAFETY: entries are inserted whole and never changed.
        match unsafe { OUTSIDE.get(key) } {
            Some(found) => {
                *flow = *found;
                true
            }
            None => false,
        }
    }

    #[inline(always)]
    fn insert_outside(&self, key: &OutsideKey, flow: &FlowKey) -> bool {
        if dry_run::is_dry() {
            return dry_run::insert_outside(key);
        }
        OUTSIDE.insert(key, flow, BPF_NOEXIST.into()).is_ok()
    }

    #[inline(always)]
    fn insert_permission(&self, key: &OutsideKey, flow: &FlowKey) {
        if !dry_run::is_dry() {
            let _ = OUTSIDE.insert(key, flow, BPF_NOEXIST.into());
        }
    }

    #[inline(always)]
    fn remove_outside(&self, key: &OutsideKey) {
        if dry_run::is_dry() {
            return;
        }
        // Gone already is what was wanted.
        let _ = OUTSIDE.remove(key);
    }

    #[inline(always)]
    fn binding(&self, key: &FlowKey) -> Option<Self::Binding> {
        // A dry run keeps no binding alive, and has no stack left for a copy here.
        if dry_run::is_dry() {
            return None;
        }
        BINDINGS.get_ptr_mut(key).map(Entry)
    }

    #[inline(never)]
    fn binding_to_use(&self, key: &FlowKey) -> Option<Self::Binding> {
        if dry_run::is_dry() {
            return dry_run::binding(key);
        }
        BINDINGS.get_ptr_mut(key).map(Entry)
    }

    #[inline(always)]
    fn peek_binding(&self, key: &FlowKey) -> Option<impl Deref<Target = Binding>> {
        BINDINGS.get_ptr_mut(key).map(Entry)
    }

    #[inline(never)]
    fn insert_binding(&self, key: &FlowKey, binding: &Binding) -> bool {
        dry_run::is_dry() || BINDINGS.insert(key, binding, BPF_NOEXIST.into()).is_ok()
    }

    #[inline(never)]
    fn remove_binding(&self, key: &FlowKey) -> bool {
        dry_run::is_dry() || BINDINGS.remove(key).is_ok()
    }

    #[inline(always)]
    fn slot(&self, index: u32, held: &mut Held) -> bool {
        let Some(slot) = SLOTS.get_ptr_mut(index) else {
            return false;
        };
        // SAFETY: the pointer is to an array entry, which lives as long as the map; the lock
        // is the one that every writer takes, and nothing is called while it is held.
        unsafe {
            bpf_spin_lock((&raw mut (*slot).lock).cast());
            held.version = (*slot).version;
            held.holds = (*slot).holds;
            held.key = (*slot).key;
            bpf_spin_unlock((&raw mut (*slot).lock).cast());
        }
        true
    }

    #[inline(always)]
    fn take_slot(
        &self,
        index: u32,
        version: u32,
        holds: SlotUse,
        key: &FlowKey,
        held: &mut Held,
    ) -> bool {
        if dry_run::is_dry() {
            // Nothing is removed, whoever has it.
            held.holds = SlotUse::Free as u32;
            return true;
        }
        let Some(slot) = SLOTS.get_ptr_mut(index) else {
            return false;
        };
        // SAFETY: as above.
        unsafe {
            bpf_spin_lock((&raw mut (*slot).lock).cast());
            let is_same = (*slot).version == version;
            if is_same {
                held.version = version;
                held.holds = (*slot).holds;
                held.key = (*slot).key;
                (*slot).version = version.wrapping_add(1);
                (*slot).holds = holds as u32;
                (*slot).key = *key;
            }
            bpf_spin_unlock((&raw mut (*slot).lock).cast());
            is_same
        }
    }

    #[inline(always)]
    fn free_slot(&self, index: u32, version: u32) {
        if dry_run::is_dry() {
            return;
        }
        let Some(slot) = SLOTS.get_ptr_mut(index) else {
            return;
        };
        // SAFETY: as above.
        unsafe {
            bpf_spin_lock((&raw mut (*slot).lock).cast());
            if (*slot).version == version {
                (*slot).version = version.wrapping_add(1);
                (*slot).holds = SlotUse::Free as u32;
                (*slot).key = FlowKey::default();
            }
            bpf_spin_unlock((&raw mut (*slot).lock).cast());
        }
    }

    #[inline(always)]
    fn usage(&self, endpoint: u32) -> Option<Usage> {
        // SAFETY: two counters, each read once.
        unsafe { USAGE.get(endpoint) }.copied()
    }

    #[inline(never)]
    fn count(&self, endpoint: u32, what: SlotUse, more: bool) {
        if dry_run::is_dry() {
            return;
        }
        let Some(usage) = USAGE.get_ptr_mut(endpoint) else {
            return;
        };
        let change: i64 = if more { 1 } else { -1 };
        // SAFETY: the pointer came from a lookup that succeeded; the field is 8-byte aligned.
        unsafe {
            let counter = match what {
                SlotUse::Binding => &raw mut (*usage).bindings,
                _ => &raw mut (*usage).flows,
            };
            add(counter, change);
        }
    }
}

/// Adds to a counter that other processors change too, by the kernel's atomic add without a
/// result, which is as old as BPF; this target offers `core`'s atomics no such thing.
///
/// # Safety
/// The pointer is to a value of a map, and 8-byte aligned.
#[inline(always)]
pub(super) unsafe fn add(counter: *mut u64, change: i64) {
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {change}",
            counter = in(reg) counter,
            change = in(reg) change,
        );
    }
}
