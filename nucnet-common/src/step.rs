//! Steps of a journey that the kernel verifies by themselves.
//!
//! The verifier walks through a function once for each way that leads to it; of these a journey
//! has hundreds. A *global* function it walks through once, whoever calls it, for the price that
//! nothing is known of what it is given and of what it returns, and that both are numbers.
//!
//! So a step gets its notes in two ways: a caller hands them over, as to any function; the kernel's
//! side (`nucnet-ebpf/src/step.rs`) drops them and finds them again among those of the journey. All
//! references are therefore to parts of [`Scratch`], each to the part that the method names; a key may be
//! anybody's, since it is copied.

use crate::{
    abi::{FlowKey, OutsideKey, Reason, SlotUse},
    embedded,
    env::{Dead, Env, Scratch},
    packet::{self, Delta, Packet, Rewrite},
    place, ports,
};

/// The steps, each of which is what it does wherever there is no verifier.
pub trait Steps {
    /// [`Packet::parse`] into `Scratch::packet`.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    fn parse(&self, packet: &mut Packet, l3: u32, ethertype: u16) -> Result<(), Reason>
    where
        Self: Env,
    {
        Packet::parse(self, l3, ethertype, packet)
    }

    /// [`Rewrite::apply`] of `Scratch::rewrite` to `Scratch::packet`.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    fn rewrite(&self, packet: &Packet, rewrite: &Rewrite) -> Result<(), Reason>
    where
        Self: Env,
    {
        rewrite.apply(self, packet)
    }

    /// [`embedded::rewrite_quote`] with `Scratch::rewrite`, of `Scratch::quoted` in
    /// `Scratch::packet`.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    fn rewrite_quote(
        &self,
        packet: &Packet,
        quoted: &Packet,
        rewrite: &Rewrite,
    ) -> Result<(), Reason>
    where
        Self: Env,
    {
        embedded::rewrite_quote(self, packet, quoted, rewrite)
    }

    /// [`packet::sum`].
    #[inline(always)]
    fn sum(&self, at: u32, length: u32) -> Option<Delta>
    where
        Self: Env,
    {
        packet::sum(self, at, length)
    }

    /// [`ports::is_free`].
    #[inline(always)]
    fn is_free(&self, key: &OutsideKey) -> bool
    where
        Self: Env,
    {
        ports::is_free(self, key)
    }

    /// [`ports::weigh_view`] with `Scratch::key`, `Scratch::outside` and `Scratch::found`.
    #[inline(always)]
    fn weigh_view(
        &self,
        key: &FlowKey,
        outside: &OutsideKey,
        found: &mut FlowKey,
        best: u64,
        now: u64,
    ) -> u64
    where
        Self: Env,
    {
        ports::weigh_view(self, key, outside, found, best, now)
    }

    /// [`ports::weigh_bound`] with `Scratch::bound`, `Scratch::outside` and `Scratch::found`.
    #[inline(always)]
    fn weigh_bound(
        &self,
        bound: &OutsideKey,
        outside: &OutsideKey,
        found: &mut FlowKey,
        best: u64,
        now: u64,
    ) -> u64
    where
        Self: Env,
    {
        ports::weigh_bound(self, bound, outside, found, best, now)
    }

    /// [`place::find_place`] with `Scratch::dead`.
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    fn find_place(&self, dead: &mut Dead, endpoint: u32, now: u64) -> Result<(), Reason>
    where
        Self: Env,
    {
        place::find_place(self, dead, endpoint, now)
    }

    /// [`place::settle`].
    ///
    /// # Errors
    /// As there.
    #[inline(always)]
    fn settle(&self, scratch: &mut Scratch, holds: SlotUse, now: u64) -> Result<(), Reason>
    where
        Self: Env,
    {
        place::settle(self, scratch, holds, now)
    }

    /// [`place::spare`] with `Scratch::found` and `Scratch::dead`.
    #[inline(always)]
    fn spare(&self, holds: SlotUse, found: &FlowKey, dead: &mut Dead, now: u64) -> bool
    where
        Self: Env,
    {
        place::spare(self, holds, found, dead, now)
    }

    /// [`place::weigh`] with `Scratch::dead`.
    #[inline(always)]
    fn weigh(&self, dead: &mut Dead, index: u32, only: u32, now: u64) -> u64
    where
        Self: Env,
    {
        place::weigh(self, &mut dead.held, index, only, now)
    }

    /// [`place::remove_holder`] with `Scratch::dead`.
    #[inline(always)]
    fn remove_holder(&self, dead: &mut Dead, index: u32)
    where
        Self: Env,
    {
        place::remove_holder(self, dead, index);
    }
}
