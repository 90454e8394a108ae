//! The kernel's side of `nucnet_common::step`: a global function for each step.
//!
//! The linker leaves visible symbols of `.text` global, as the kernel and libbpf understand it
//! (`cargo xtask build` hides the others). Linux 5.6 and later verify such a function once, by its
//! signature: besides the context, which must be called `__sk_buff`, it takes numbers and returns
//! one. (References would need Linux 5.13, and be maybe null.)

use core::arch::asm;

use aya_ebpf::{bindings::__sk_buff, programs::TcContext};
use nucnet_common::{
    abi::{FlowKey, OutsideKey, Reason, SlotUse},
    embedded,
    env::{Dead, Scratch, Tables as _},
    packet::{self, Delta, Packet, Rewrite},
    place, ports,
    step::Steps,
};

use crate::{maps::QUESTION, skb::Skb};

impl Steps for Skb {
    #[inline(always)]
    fn parse(&self, packet: &mut Packet, l3: u32, ethertype: u16) -> Result<(), Reason> {
        hand_over(packet);
        outcome(step_parse(self.ctx.skb.skb, l3, ethertype.into()))
    }

    #[inline(always)]
    fn rewrite(&self, packet: &Packet, rewrite: &Rewrite) -> Result<(), Reason> {
        hand_over(packet);
        hand_over(rewrite);
        outcome(step_rewrite(self.ctx.skb.skb))
    }

    #[inline(always)]
    fn rewrite_quote(
        &self,
        packet: &Packet,
        quoted: &Packet,
        rewrite: &Rewrite,
    ) -> Result<(), Reason> {
        hand_over(packet);
        hand_over(quoted);
        hand_over(rewrite);
        outcome(step_rewrite_quote(self.ctx.skb.skb))
    }

    #[inline(always)]
    fn sum(&self, at: u32, length: u32) -> Option<Delta> {
        match step_sum(self.ctx.skb.skb, at, length) {
            NONE => None,
            sum => Some(Delta(sum)),
        }
    }

    #[inline(always)]
    fn is_free(&self, key: &OutsideKey) -> bool {
        ask_about(key) && step_is_free(self.ctx.skb.skb) != 0
    }

    #[inline(always)]
    fn weigh_view(
        &self,
        key: &FlowKey,
        outside: &OutsideKey,
        found: &mut FlowKey,
        best: u64,
        now: u64,
    ) -> u64 {
        hand_over(key);
        hand_over(outside);
        hand_over(found);
        step_weigh_view(self.ctx.skb.skb, best, now)
    }

    #[inline(always)]
    fn weigh_bound(
        &self,
        bound: &OutsideKey,
        outside: &OutsideKey,
        found: &mut FlowKey,
        best: u64,
        now: u64,
    ) -> u64 {
        hand_over(bound);
        hand_over(outside);
        hand_over(found);
        step_weigh_bound(self.ctx.skb.skb, best, now)
    }

    #[inline(always)]
    fn find_place(&self, dead: &mut Dead, endpoint: u32, now: u64) -> Result<(), Reason> {
        hand_over(dead);
        outcome(step_find_place(self.ctx.skb.skb, endpoint, now))
    }

    #[inline(always)]
    fn settle(&self, scratch: &mut Scratch, holds: SlotUse, now: u64) -> Result<(), Reason> {
        hand_over(scratch);
        outcome(match holds {
            SlotUse::Binding => step_settle_binding(self.ctx.skb.skb, now),
            _ => step_settle_flow(self.ctx.skb.skb, now),
        })
    }

    #[inline(always)]
    fn spare(&self, holds: SlotUse, found: &FlowKey, dead: &mut Dead, now: u64) -> bool {
        hand_over(found);
        hand_over(dead);
        0 != match holds {
            SlotUse::Binding => step_spare_binding(self.ctx.skb.skb, now),
            _ => step_spare_flow(self.ctx.skb.skb, now),
        }
    }

    #[inline(always)]
    fn weigh(&self, dead: &mut Dead, index: u32, only: u32, now: u64) -> u64 {
        hand_over(dead);
        step_weigh(self.ctx.skb.skb, index, only, now)
    }

    #[inline(always)]
    fn remove_holder(&self, dead: &mut Dead, index: u32) {
        hand_over(dead);
        step_remove_holder(self.ctx.skb.skb, index);
    }
}

/// Lets the compiler know that a function which is called without a reference may use what it
/// refers to all the same.
#[inline(always)]
fn hand_over<T>(notes: &T) {
    // SAFETY: a register is copied to itself. (Without any instruction, its line would be given
    // the next one's place, of which the kernel wants each once.)
    unsafe { asm!("{0} = {0}", inout(reg) &raw const *notes => _) };
}

/// Puts an external view where the functions for it find it.
#[inline(always)]
pub fn ask_about(key: &OutsideKey) -> bool {
    let Some(question) = QUESTION.get_ptr_mut(0) else {
        return false;
    };
    // SAFETY: nobody else has this processor's.
    unsafe { (*question).key = *key };
    true
}

/// What [`Delta`] never is: the sum of two thousand bytes.
const NONE: u64 = u64::MAX;

#[inline(always)]
fn number(result: Result<(), Reason>) -> u32 {
    match result {
        Ok(()) => 0,
        Err(reason) => reason as u32,
    }
}

#[inline(always)]
fn outcome(number: u32) -> Result<(), Reason> {
    match number {
        0 => Ok(()),
        _ => Err(Reason::from_number(number).unwrap_or(Reason::Helper)),
    }
}

/// Does a step with the packet and the notes of its journey.
#[inline(always)]
fn step(ctx: *mut __sk_buff, step: impl FnOnce(&Skb, &mut Scratch) -> Result<(), Reason>) -> u32 {
    let skb = skb(ctx);
    number(match skb.scratch() {
        Some(mut scratch) => step(&skb, &mut scratch),
        None => Err(Reason::Helper),
    })
}

#[inline(always)]
fn skb(mut ctx: *mut __sk_buff) -> Skb {
    // What the function does not use its caller would not pass, and the verifier insists.
    // SAFETY: a register is copied to itself.
    unsafe { asm!("{0} = {0}", inout(reg) ctx) };
    Skb {
        ctx: TcContext::new(ctx),
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_parse(ctx: *mut __sk_buff, l3: u32, ethertype: u32) -> u32 {
    step(ctx, |skb, scratch| {
        Packet::parse(skb, l3, ethertype as u16, &mut scratch.packet)
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_rewrite(ctx: *mut __sk_buff) -> u32 {
    step(ctx, |skb, scratch| {
        scratch.rewrite.apply(skb, &scratch.packet)
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_rewrite_quote(ctx: *mut __sk_buff) -> u32 {
    step(ctx, |skb, scratch| {
        embedded::rewrite_quote(skb, &scratch.packet, &scratch.quoted, &scratch.rewrite)
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_sum(ctx: *mut __sk_buff, at: u32, length: u32) -> u64 {
    packet::sum(&skb(ctx), at, length).map_or(NONE, |sum| sum.0)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_is_free(ctx: *mut __sk_buff) -> u32 {
    let Some(question) = QUESTION.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: nobody else has this processor's.
    ports::is_free(&skb(ctx), unsafe { &(*question).key }).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn step_has_socket(ctx: *mut __sk_buff) -> u32 {
    let Some(question) = QUESTION.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: nobody else has this processor's.
    skb(ctx).find_socket(unsafe { &mut *question }).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn step_route(ctx: *mut __sk_buff, from: u32) -> u32 {
    let Some(question) = QUESTION.get_ptr_mut(0) else {
        return 0;
    };
    // SAFETY: nobody else has this processor's.
    skb(ctx).find_route(from, unsafe { &mut *question });
    0
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_weigh_view(ctx: *mut __sk_buff, best: u64, now: u64) -> u64 {
    let skb = skb(ctx);
    let Some(mut scratch) = skb.scratch() else {
        return 0;
    };
    let Scratch {
        key,
        outside,
        found,
        ..
    } = &mut *scratch;
    ports::weigh_view(&skb, key, outside, found, best, now)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_weigh_bound(ctx: *mut __sk_buff, best: u64, now: u64) -> u64 {
    let skb = skb(ctx);
    let Some(mut scratch) = skb.scratch() else {
        return 0;
    };
    let Scratch {
        bound,
        outside,
        found,
        ..
    } = &mut *scratch;
    ports::weigh_bound(&skb, bound, outside, found, best, now)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_find_place(ctx: *mut __sk_buff, endpoint: u32, now: u64) -> u32 {
    step(ctx, |skb, scratch| {
        place::find_place(skb, &mut scratch.dead, endpoint, now)
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_settle_flow(ctx: *mut __sk_buff, now: u64) -> u32 {
    step(ctx, |skb, scratch| {
        place::settle(skb, scratch, SlotUse::Flow, now)
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_settle_binding(ctx: *mut __sk_buff, now: u64) -> u32 {
    step(ctx, |skb, scratch| {
        place::settle(skb, scratch, SlotUse::Binding, now)
    })
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_spare_flow(ctx: *mut __sk_buff, now: u64) -> u32 {
    spare(ctx, SlotUse::Flow, now)
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_spare_binding(ctx: *mut __sk_buff, now: u64) -> u32 {
    spare(ctx, SlotUse::Binding, now)
}

#[inline(always)]
fn spare(ctx: *mut __sk_buff, holds: SlotUse, now: u64) -> u32 {
    let skb = skb(ctx);
    let Some(mut scratch) = skb.scratch() else {
        return 0;
    };
    let Scratch { found, dead, .. } = &mut *scratch;
    place::spare(&skb, holds, found, dead, now).into()
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_weigh(ctx: *mut __sk_buff, index: u32, only: u32, now: u64) -> u64 {
    let skb = skb(ctx);
    match skb.scratch() {
        Some(mut scratch) => place::weigh(&skb, &mut scratch.dead.held, index, only, now),
        None => 0,
    }
}

#[unsafe(no_mangle)]
#[inline(never)]
extern "C" fn step_remove_holder(ctx: *mut __sk_buff, index: u32) -> u32 {
    step(ctx, |skb, scratch| {
        place::remove_holder(skb, &mut scratch.dead, index);
        Ok(())
    })
}
