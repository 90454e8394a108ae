//! What monitors are told: drafts, limits, ring buffers.

use aya_ebpf::bindings::{BPF_NOEXIST, BPF_RB_NO_WAKEUP};
use nucnet_common::{
    abi::{Event, EventLimit},
    env::Monitors,
    packet::Frame as _,
    path::Drop,
};

use super::{Entry, Skb, tables::add};
use crate::{dry_run, log::step_log, maps::*};

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
