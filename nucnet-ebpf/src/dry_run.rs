//! Runs that change nothing, for `nucnet-ctl explain`: the object is loaded a second time on the
//! pinned maps, and its programs are run on a packet that is thrown away.
//!
//! What a run would write it writes to an overlay of its own, a single entry of each kind, which
//! is as many as one packet makes. In the programs that carry packets, the verifier takes all of
//! this out.

use aya_ebpf::{Global, bindings::TC_ACT_UNSPEC, btf_maps::Array, macros::btf_map};
use nucnet_common::{
    abi::{Binding, Explained, Flow, FlowKey, OutsideKey, Reason, WayKind},
    answer::{self, Origin},
    env::Tables as _,
    flow::same_flow,
    packet::same,
    path::{Drop, Verdict, Way},
};

use crate::{
    maps::*,
    skb::{Entry, Skb},
};

/// Whether a run may not change anything.
#[unsafe(no_mangle)]
static DRY_RUN: Global<u8> = Global::new(0);

/// What a dry run would have written.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Overlay {
    key: FlowKey,
    flow: Flow,
    /// A copy of a flow that exists, which the run may change.
    copy: Flow,
    /// The same of a binding.
    binding: Binding,
    /// The external view that the run could not add last.
    refused: OutsideKey,
    /// Whether `key` and `flow` are those of a flow that the run made.
    has_flow: u32,
    pad: u32,
}

#[btf_map(name = "overlay")]
static OVERLAY: Array<Overlay, 1> = Array::new();
/// What user space reads after a dry run.
#[btf_map(name = "explained")]
static EXPLAINED: Array<Explained, 1> = Array::new();

/// Whether this run may not change anything. Known to the verifier.
#[inline(always)]
pub fn is_dry() -> bool {
    DRY_RUN.load() != 0
}

/// Forgets the run before.
#[inline(always)]
pub fn begin() {
    if is_dry()
        && let (Some(overlay), Some(explained)) = (OVERLAY.get_ptr_mut(0), EXPLAINED.get_ptr_mut(0))
    {
        // SAFETY: one dry run at a time has these maps.
        unsafe {
            (*overlay).has_flow = 0;
            (*overlay).refused.protocol = 0;
            (*explained).way = WayKind::Pass as u32;
            (*explained).link = 0;
            (*explained).reason = 0;
            (*explained).endpoint = 0;
            (*explained).rule = 0;
            (*explained).has_flow = 0;
            (*explained).is_new = 0;
            (*explained).is_rejected = 0;
        }
    }
}

/// Copies a value word by word: a copy as a whole takes more stack than is left.
///
/// # Safety
/// Both pointers are valid, and aligned to four bytes; the type is made of whole words.
#[inline(always)]
unsafe fn copy<T>(from: *const T, to: *mut T) {
    let mut word = 0;
    while word < size_of::<T>() / 4 {
        // SAFETY: the caller's.
        unsafe {
            let value = from.cast::<u32>().add(word).read_volatile();
            to.cast::<u32>().add(word).write_volatile(value);
        }
        word += 1;
    }
}

/// A flow that the run made, or a copy of one that exists.
#[inline(never)]
pub fn flow(key: &FlowKey) -> Option<Entry<Flow>> {
    let overlay = OVERLAY.get_ptr_mut(0)?;
    // SAFETY: one dry run at a time has these maps; a flow is integers, whole or not.
    unsafe {
        if (*overlay).has_flow != 0 && same_flow(&(*overlay).key, key) {
            return Some(Entry(&raw mut (*overlay).flow));
        }
        copy(FLOWS.get_ptr_mut(key)?, &raw mut (*overlay).copy);
        Some(Entry(&raw mut (*overlay).copy))
    }
}

/// Makes a flow in the overlay.
#[inline(never)]
pub fn insert_flow(key: &FlowKey, flow: &Flow) -> bool {
    let Some(overlay) = OVERLAY.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as above.
    unsafe {
        copy(key, &raw mut (*overlay).key);
        copy(flow, &raw mut (*overlay).flow);
        (*overlay).has_flow = 1;
    }
    true
}

/// A copy of a binding that exists.
#[inline(never)]
pub fn binding(key: &FlowKey) -> Option<Entry<Binding>> {
    let overlay = OVERLAY.get_ptr_mut(0)?;
    // SAFETY: as above.
    unsafe {
        copy(BINDINGS.get_ptr_mut(key)?, &raw mut (*overlay).binding);
        Some(Entry(&raw mut (*overlay).binding))
    }
}

/// Whether an external view could be added: if nobody has it, or if this is the second attempt,
/// which is made only once a dead flow was removed that had it.
#[inline(never)]
pub fn insert_outside(key: &OutsideKey) -> bool {
    let Some(overlay) = OVERLAY.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: as above.
    unsafe {
        let refused = &(*overlay).refused;
        let is_again = refused.protocol == key.protocol
            && refused.external_port == key.external_port
            && refused.peer_port == key.peer_port
            && same(&refused.external, &key.external)
            && same(&refused.peer, &key.peer);
        if is_again || OUTSIDE.get(key).is_none() {
            return true;
        }
        copy(key, &raw mut (*overlay).refused);
    }
    false
}

/// Leaves what became of the packet to user space.
#[inline(always)]
pub fn conclude(skb: &Skb, origin: Origin, verdict: Verdict<'_>) -> i32 {
    let (way, link) = match verdict {
        Ok(&Way::Pass) => return TC_ACT_UNSPEC,
        Ok(&Way::Peer { link }) => (WayKind::Endpoint, link),
        Ok(&Way::Link { link } | &Way::Uplink { link, .. }) => (WayKind::Link, link),
        Ok(&Way::Host { link } | &Way::Loopback { link, .. }) => (WayKind::Host, link),
        Err(drop) => {
            note_drop(skb, origin, drop.endpoint, drop.reason);
            return TC_ACT_UNSPEC;
        }
    };
    note(skb, way as u32, link);
    TC_ACT_UNSPEC
}

#[inline(never)]
fn note_drop(skb: &Skb, origin: Origin, endpoint: u32, reason: Reason) {
    let (Some(explained), Some(scratch)) = (EXPLAINED.get_ptr_mut(0), skb.scratch()) else {
        return;
    };
    let drop = Drop { endpoint, reason };
    // SAFETY: one dry run at a time has these maps.
    unsafe {
        (*explained).way = WayKind::Dropped as u32;
        (*explained).endpoint = endpoint;
        (*explained).reason = reason as u32;
        (*explained).rule = scratch.rule;
        (*explained).is_rejected = answer::is_rejected(origin, &drop, &scratch).into();
    }
}

#[inline(never)]
fn note(skb: &Skb, way: u32, link: u32) {
    let (Some(explained), Some(overlay), Some(scratch)) = (
        EXPLAINED.get_ptr_mut(0),
        OVERLAY.get_ptr_mut(0),
        skb.scratch(),
    ) else {
        return;
    };
    // SAFETY: one dry run at a time has these maps.
    unsafe {
        (*explained).way = way;
        (*explained).link = link;
        (*explained).rule = scratch.rule;
        if let Some(flow) = flow(&scratch.key) {
            (*explained).endpoint = scratch.key.endpoint;
            (*explained).has_flow = 1;
            (*explained).is_new = (*overlay).has_flow;
            copy(&scratch.key, &raw mut (*explained).key);
            copy(&*flow, &raw mut (*explained).flow);
        }
    }
}
