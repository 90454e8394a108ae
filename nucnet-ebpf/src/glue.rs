//! The kernel's side of `nucnet_common::env`: socket buffer, maps, clock, routes, sockets.

use core::{
    mem::{MaybeUninit, size_of},
    ops::{Deref, DerefMut},
};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_ANY, BPF_F_CURRENT_NETNS, BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM,
        BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH, BPF_FIB_LKUP_RET_NOT_FWDED,
        BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SRC, BPF_NOEXIST, BPF_RB_NO_WAKEUP,
        bpf_adj_room_mode, bpf_fib_lookup,
    },
    btf_maps::lpm_trie::Key,
    helpers::{
        bpf_get_prandom_u32, bpf_ktime_get_ns,
        generated::{
            bpf_fib_lookup as fib_lookup, bpf_l3_csum_replace, bpf_l4_csum_replace,
            bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release, bpf_skb_adjust_room,
            bpf_skb_change_tail, bpf_skb_load_bytes, bpf_skb_store_bytes, bpf_spin_lock,
            bpf_spin_unlock,
        },
    },
    programs::TcContext,
};
use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Event, EventLimit, Flow, FlowKey, Guest, MappingCount, Network,
        OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish,
        PublishKey, Reason, Settings, SlotUse, Snat, SnatKey, StaticMapping, Uplink, Usage,
    },
    answer::Account,
    env::{Held, Host, Monitors, Route, RouteKind, Scratch, Tables},
    fragment,
    packet::{Balance, Covered, Delta, Family, Frame, TCP, mapped},
    path::Drop,
};

use crate::{dry_run, log::step_log, maps::*, step};

/// Linux address family numbers (`AF_INET`, `AF_INET6`).
pub const AF_INET: u8 = 2;
pub const AF_INET6: u8 = 10;

const EINVAL: i64 = -22;

/// One packet in the kernel.
pub struct Skb {
    pub ctx: TcContext,
}

/// An entry of a hash map.
///
/// The kernel frees an entry only after a grace period, and a program runs inside one, so the
/// memory outlives the program. Another processor may write the same entry: fields are plain
/// integers, and no decision relies on two of them agreeing.
pub struct Entry<T>(pub *mut T);

impl<T> Deref for Entry<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        // SAFETY: the pointer came from a lookup that succeeded in this run of the program; see
        // the type for its lifetime.
        unsafe { &*self.0 }
    }
}

impl<T> DerefMut for Entry<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe { &mut *self.0 }
    }
}

/// Bytes that the compiler may read by words: the target has no unaligned access.
#[repr(C, align(8))]
struct Aligned<const N: usize>([u8; N]);

impl Frame for Skb {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<Aligned<N>>::uninit();
        // SAFETY: the context is the program's own, and the buffer has N bytes.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                offset,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        if result != 0 {
            return None;
        }
        // SAFETY: the helper returned 0: it filled the buffer.
        Some(unsafe { bytes.assume_init() }.0)
    }

    #[inline(always)]
    fn store<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        balance: Balance,
    ) -> Result<(), Reason> {
        let flags = match balance {
            Balance::Balanced => 0,
            Balance::Unbalanced => BPF_F_RECOMPUTE_CSUM,
        };
        // SAFETY: the context is the program's own, and the buffer has N bytes.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.ctx.skb.skb,
                offset,
                bytes.as_ptr().cast(),
                N as u32,
                flags.into(),
            )
        };
        done(result)
    }

    #[inline(never)]
    fn wrap(&self, l3: u32, kept: u32, room: u32) -> Result<(), Reason> {
        let buffer = QUOTE.get_ptr_mut(0).ok_or(Reason::Helper)?;
        // Compared as the 64 bits that the register has, which is what the verifier follows; and
        // less one, for before Linux 6.8 it learns nothing from a comparison with zero.
        let but_one = opaque(kept.wrapping_sub(1));
        if but_one >= QUOTED as u64 {
            return Err(Reason::Helper);
        }
        let kept = but_one as u32 + 1;
        let skb = self.ctx.skb.skb;
        // SAFETY: the context is the program's own, and the buffer has `QUOTED` bytes.
        unsafe {
            done(bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                l3,
                buffer.cast(),
                kept,
            ))?;
            // A new length ends segmentation. Taking the start away, behind which the kernel was
            // to fill in a checksum, ends that.
            done(bpf_skb_change_tail(skb, l3 + LEAST_LEFT + TAKEN, 0))?;
            let mode = bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
            done(bpf_skb_adjust_room(skb, -(TAKEN as i32), mode, 0))?;
            done(bpf_skb_change_tail(skb, l3 + room + kept, 0))?;
            done(bpf_skb_store_bytes(
                skb,
                l3 + room,
                buffer.cast(),
                kept,
                BPF_F_RECOMPUTE_CSUM.into(),
            ))
        }
    }

    #[inline(always)]
    fn fix_header_checksum(&self, offset: u32, delta: Delta) -> Result<(), Reason> {
        // SAFETY: the context is the program's own. Size 0 means that `to` is a difference.
        done(unsafe { bpf_l3_csum_replace(self.ctx.skb.skb, offset, 0, delta.folded().into(), 0) })
    }

    #[inline(always)]
    fn fix_checksum(&self, offset: u32, delta: Delta, covered: Covered) -> Result<(), Reason> {
        let mut flags = 0;
        if covered.pseudo_header {
            flags |= BPF_F_PSEUDO_HDR;
        }
        if covered.may_be_absent {
            flags |= BPF_F_MARK_MANGLED_0;
        }
        // SAFETY: as above.
        done(unsafe {
            bpf_l4_csum_replace(
                self.ctx.skb.skb,
                offset,
                0,
                delta.folded().into(),
                flags.into(),
            )
        })
    }
}

/// Bytes of IP that the kernel wants left when a frame is shortened: an IPv6 header.
const LEAST_LEFT: u32 = 40;
/// Bytes that are taken away to have no checksum filled in: all headers before a place where one
/// could be.
const TAKEN: u32 = 192;

/// The same number, of which the compiler knows nothing: what it makes of a comparison may be
/// more than the verifier can follow.
#[inline(always)]
fn opaque(number: u32) -> u64 {
    let mut number = u64::from(number);
    // SAFETY: a register is copied to itself.
    unsafe { core::arch::asm!("{0} = {0}", inout(reg) number) };
    number
}

#[inline(always)]
fn done(result: i64) -> Result<(), Reason> {
    if result == 0 {
        Ok(())
    } else {
        Err(Reason::Helper)
    }
}

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
        // SAFETY: an entry may be replaced while it is read: by one for the same addresses and
        // identification, so that either is right or both are wrong.
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
unsafe fn add(counter: *mut u64, change: i64) {
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!(
            "lock *(u64 *)({counter} + 0) += {change}",
            counter = in(reg) counter,
            change = in(reg) change,
        );
    }
}

impl Monitors for Skb {
    type Draft = Entry<Event>;
    type Limit = Entry<EventLimit>;

    #[inline(always)]
    fn reads_until(&self, monitor: u32) -> u64 {
        if dry_run::is_dry() {
            return 0;
        }
        MONITORS.get(monitor).map_or(0, |monitor| monitor.until)
    }

    #[inline(always)]
    fn draft(&self) -> Option<Self::Draft> {
        DRAFT.get_ptr_mut(0).map(Entry)
    }

    #[inline(always)]
    fn limit(&self, endpoint: u32) -> Option<Self::Limit> {
        if let Some(limit) = EVENT_LIMITS.get_ptr_mut(endpoint) {
            return Some(Entry(limit));
        }
        // Another processor may have made it just now.
        let _ = EVENT_LIMITS.insert(endpoint, NO_LIMIT.get(0)?, BPF_NOEXIST.into());
        EVENT_LIMITS.get_ptr_mut(endpoint).map(Entry)
    }

    #[inline(always)]
    fn tell(&self, monitor: u32, event: &Event) {
        // To wake the reader would take many times as long as to tell him: he looks by himself.
        let flags = BPF_RB_NO_WAKEUP.into();
        let told = match monitor {
            0 => EVENTS_0.output_untyped::<Event>(event, flags),
            1 => EVENTS_1.output_untyped::<Event>(event, flags),
            2 => EVENTS_2.output_untyped::<Event>(event, flags),
            _ => EVENTS_3.output_untyped::<Event>(event, flags),
        };
        if told.is_err()
            && let Some(lost) = EVENTS_LOST.get_ptr_mut(monitor)
        {
            // SAFETY: the pointer came from a lookup that succeeded; the field is aligned.
            unsafe { add(&raw mut (*lost).events, 1) };
        }
    }

    #[inline(always)]
    fn log(&self, drop: &Drop) {
        step_log(
            drop.reason as u32,
            drop.endpoint,
            self.link(),
            self.length(),
        );
    }
}

impl Host for Skb {
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn route(&self, from: u32, source: &Address, destination: &Address, route: &mut Route) {
        let Some(question) = QUESTION.get_ptr_mut(0) else {
            route.kind = RouteKind::None;
            return;
        };
        // SAFETY: nobody else has this processor's.
        unsafe {
            (*question).source = *source;
            (*question).destination = *destination;
            step::step_route(self.ctx.skb.skb, from);
            *route = (*question).route;
        }
    }

    #[inline(always)]
    fn has_socket(&self, key: &OutsideKey) -> bool {
        step::ask_about(key) && step::step_has_socket(self.ctx.skb.skb) != 0
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).ingress_ifindex }
    }

    #[inline(always)]
    fn mark(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.ctx.skb.skb).mark }
    }

    #[inline(always)]
    fn set_mark(&self, mark: u32) {
        // SAFETY: as above; the field may be written.
        unsafe { (*self.ctx.skb.skb).mark = mark };
    }
}

impl Skb {
    /// Looks a route up: that of `question.source` and `question.destination`.
    #[inline(always)]
    pub fn find_route(&self, from: u32, question: &mut Question) {
        let Question {
            params,
            source,
            destination,
            route,
            ..
        } = question;
        // SAFETY: any bytes are a valid `bpf_fib_lookup`, for which there is room.
        let params = unsafe { &mut *params.as_mut_ptr().cast::<bpf_fib_lookup>() };
        // With a length, whether the frame at hand fits is no question, and the unit part of the
        // answer (Linux 5.12).
        ask(params, from, source, destination, 1);
        route.kind = RouteKind::None;
        let mut result = self.look_up(params, BPF_FIB_LOOKUP_SRC);
        let mut knows_source = true;
        if result == EINVAL {
            // Before Linux 6.7 the flag is not known.
            knows_source = false;
            result = self.look_up(params, 0);
        }
        route.link = params.ifindex;
        route.source = [0; 16];
        route.macs = [0; 12];
        route.mtu = 0;
        if result == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) {
            route.kind = RouteKind::Local;
        } else if result == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
            || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)
        {
            route.kind = RouteKind::Link;
            if result == i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
                route.macs[..6].copy_from_slice(&params.dmac);
                route.macs[6..].copy_from_slice(&params.smac);
            }
            // SAFETY: all fields of these unions are integers, written by the kernel.
            unsafe {
                route.mtu = mtu_of(params);
                route.next_hop = address(params.family, &params.__bindgen_anon_4.ipv6_dst);
                if knows_source {
                    route.source = address(params.family, &params.__bindgen_anon_3.ipv6_src);
                }
            }
        }
        if result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
            // Without neighbour, the unit is said only of what exceeds it.
            ask(params, from, source, destination, u16::MAX);
            if self.look_up(params, 0) == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
                route.mtu = mtu_of(params);
            }
        }
    }

    /// Looks a socket of the host up that takes packets of the external view `question.key`.
    #[inline(always)]
    pub fn find_socket(&self, question: &mut Question) -> bool {
        let Question { tuple, key, .. } = question;
        let (sport, dport) = (key.peer_port.to_be(), key.external_port.to_be());
        // SAFETY: any bytes are valid fields of unions of integers.
        let size = unsafe {
            match Family::of(&key.external) {
                Family::V4 => {
                    let v4 = &mut tuple.__bindgen_anon_1.ipv4;
                    v4.saddr = word(&key.peer, 12);
                    v4.daddr = word(&key.external, 12);
                    (v4.sport, v4.dport) = (sport, dport);
                    size_of_val(v4)
                }
                Family::V6 => {
                    let v6 = &mut tuple.__bindgen_anon_1.ipv6;
                    v6.saddr = words(&key.peer);
                    v6.daddr = words(&key.external);
                    (v6.sport, v6.dport) = (sport, dport);
                    size_of_val(v6)
                }
            }
        } as u32;
        let netns = BPF_F_CURRENT_NETNS as u64;
        // SAFETY: context and tuple are this run's own; every socket found is released.
        unsafe {
            let socket = if key.protocol == u32::from(TCP) {
                bpf_sk_lookup_tcp(self.ctx.as_ptr(), tuple, size, netns, 0)
            } else if key.protocol == u32::from(nucnet_common::packet::UDP) {
                bpf_sk_lookup_udp(self.ctx.as_ptr(), tuple, size, netns, 0)
            } else {
                return false;
            };
            if socket.is_null() {
                return false;
            }
            bpf_sk_release(socket.cast());
        }
        true
    }

    #[inline(always)]
    fn look_up(&self, params: &mut bpf_fib_lookup, flags: u32) -> i64 {
        // SAFETY: context and parameters are the program's own; the size is theirs.
        unsafe {
            fib_lookup(
                self.ctx.as_ptr(),
                params,
                size_of::<bpf_fib_lookup>() as i32,
                flags,
            )
        }
    }
}

/// Asks for the route of a packet of some length.
#[inline(never)]
fn ask(
    params: &mut bpf_fib_lookup,
    from: u32,
    source: &Address,
    destination: &Address,
    length: u16,
) {
    // SAFETY: an all-zero `bpf_fib_lookup` is a valid one.
    *params = unsafe { core::mem::zeroed() };
    params.ifindex = from;
    params.__bindgen_anon_1.tot_len = length;
    match Family::of(destination) {
        Family::V4 => {
            params.family = AF_INET;
            params.__bindgen_anon_3.ipv4_src = word(source, 12);
            params.__bindgen_anon_4.ipv4_dst = word(destination, 12);
        }
        Family::V6 => {
            params.family = AF_INET6;
            params.__bindgen_anon_3.ipv6_src = words(source);
            params.__bindgen_anon_4.ipv6_dst = words(destination);
        }
    }
}

/// The unit in an answer; 0: it is still the length that was asked about.
#[inline(always)]
fn mtu_of(params: &bpf_fib_lookup) -> u32 {
    // SAFETY: both fields of the union are integers.
    match unsafe { params.__bindgen_anon_1.mtu_result } {
        1 | u16::MAX => 0,
        mtu => mtu.into(),
    }
}

/// Four bytes of an address in the order in which they are on the wire.
#[inline(always)]
pub fn word(address: &Address, at: usize) -> u32 {
    u32::from_ne_bytes([
        address[at],
        address[at + 1],
        address[at + 2],
        address[at + 3],
    ])
}

/// An address as the kernel's structures have it.
#[inline(always)]
pub fn words(address: &Address) -> [u32; 4] {
    [
        word(address, 0),
        word(address, 4),
        word(address, 8),
        word(address, 12),
    ]
}

/// An address from the kernel's structures; IPv4 is in the first word.
#[inline(always)]
pub fn address(family: u8, words: &[u32; 4]) -> Address {
    if family == AF_INET {
        return mapped(words[0].to_ne_bytes());
    }
    let mut address = [0; 16];
    address[0..4].copy_from_slice(&words[0].to_ne_bytes());
    address[4..8].copy_from_slice(&words[1].to_ne_bytes());
    address[8..12].copy_from_slice(&words[2].to_ne_bytes());
    address[12..16].copy_from_slice(&words[3].to_ne_bytes());
    address
}
