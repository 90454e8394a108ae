//! Places: who takes which, and what becomes of the former holder.
//!
//! Every flow and every binding has a place. A newcomer draws a few at random and takes the one
//! that can be spared best, so that dead entries are reclaimed in the packet path.

use crate::{
    abi::{FlowKey, MAPPED, Reason, SlotUse, size},
    env::{Dead, Env, Held, Scratch},
    event,
    filter::{allow_every_port, is_permitting},
    flow::{
        GONE, Standing, binding_merit, bound_key, flow_merit, is_enough, outside_key, same_flow,
    },
    mapping::forget_inside_view,
};

/// How many places a newcomer looks at before it is refused.
const DRAWS: u32 = 16;

/// How many of these are among the places near the beginning of its endpoint's window, which
/// are about as many as its quota: what it may take when it has no more to spend is then dense.
const NEAR_DRAWS: u32 = 12;

/// Fewest places near the beginning of a window.
const LEAST_NEAR: u32 = 1_024;

/// How often a newcomer looks for a place before it is refused because another processor was
/// faster each time, which is rare once.
const TRIES: u32 = 4;

/// A place that may be taken.
#[derive(Clone, Copy, Debug, Default)]
pub struct Place {
    /// Which.
    pub index: u32,
    /// Its version when it was looked at.
    pub version: u32,
}

impl Place {
    /// No place.
    pub const NONE: Self = Self {
        index: u32::MAX,
        version: 0,
    };
}

/// Looks for a place for a newcomer, `dead.place`: one that is free or whose holder is dead, else
/// the one whose holder can be spared best. Live flows keep theirs. It begins with the one that
/// `dead.place` is already, which was given back for the newcomer's sake, unless that is none.
///
/// # Errors
/// [`Reason::FlowQuota`] if the endpoint has as many flows as it may have and none that was
/// drawn can be spared; [`Reason::FlowTableFull`] if all places drawn are taken by live flows.
#[inline(always)]
pub fn find_place<E: Env>(env: &E, dead: &mut Dead, endpoint: u32, now: u64) -> Result<(), Reason> {
    let settings = env.settings().ok_or(Reason::Helper)?;
    let usage = env.usage(endpoint).ok_or(Reason::NoEndpoint)?;
    // All mapped hosts share a number: they draw from all places, and leave half to others.
    let quota = match endpoint {
        MAPPED => size::SLOTS as u32 / 2,
        _ => settings.flows_per_endpoint,
    };
    let own_only = usage.flows + usage.bindings >= u64::from(quota);
    // Spreads the windows of neighbouring endpoint numbers (Knuth's multiplicative hash).
    let window = endpoint.wrapping_mul(0x9e37_79b1) >> 13;
    let near = near(quota);
    dead.best = 0;
    let mut draw = 0;
    while draw < DRAWS {
        let mask = if endpoint == MAPPED {
            size::SLOTS as u32 - 1
        } else if draw < NEAR_DRAWS {
            near - 1
        } else {
            2 * near - 1
        };
        let index = if draw == 0 && dead.place.index != Place::NONE.index {
            dead.place.index
        } else {
            window.wrapping_add(env.random() & mask)
        };
        draw += 1;
        let index = index & (size::SLOTS as u32 - 1);
        let merit = env.weigh(dead, index, if own_only { endpoint } else { 0 }, now);
        if merit > dead.best {
            dead.best = merit;
            dead.place = Place {
                index,
                version: dead.held.version,
            };
        }
        if is_enough(dead.best, draw) {
            break;
        }
    }
    if dead.best != 0 {
        return Ok(());
    }
    Err(if own_only {
        Reason::FlowQuota
    } else {
        Reason::FlowTableFull
    })
}

/// How many places are near the beginning of a window; a power of two.
#[inline(always)]
fn near(quota: u32) -> u32 {
    let most = size::SLOT_WINDOW as u32 / 2;
    let mut near = LEAST_NEAR;
    while near < quota && near < most {
        near *= 2;
    }
    near
}

/// The merit of the holder of a place, to which `held` is set. `only`: the number of the endpoint
/// whose places alone may be taken; 0: anybody's may.
#[inline(always)]
pub fn weigh<E: Env>(env: &E, held: &mut Held, index: u32, only: u32, now: u64) -> u64 {
    if !env.slot(index, held) {
        return 0;
    }
    if held.holds == SlotUse::Free as u32 {
        return if only == 0 { GONE } else { 0 };
    }
    if only != 0 && held.key.endpoint != only {
        return 0;
    }
    holder(env, held, index, now)
}

#[inline(always)]
fn holder<E: Env>(env: &E, held: &Held, index: u32, now: u64) -> u64 {
    if held.holds == SlotUse::Binding as u32 {
        return match env.peek_binding(&held.key) {
            Some(binding) if binding.slot == index => binding_merit(&binding, now),
            _ => GONE,
        };
    }
    match env.peek_flow(&held.key) {
        Some(flow) if flow.slot == index => flow_merit(held.key.protocol, &flow, now),
        _ => GONE,
    }
}

/// Puts the flow of `scratch.key`, or the binding of `scratch.inside`, that is being made into its
/// table and gives it a place, whose former holder is removed.
///
/// Between looking for a place and taking it, another processor may take it: then the entry looks
/// for another. It is in its table before it has the place, for a holder that is in none is taken
/// for dead.
///
/// # Errors
/// Those of [`find_place`], and [`Reason::FlowTableFull`]; it is then in no table.
#[inline(always)]
pub fn settle<E: Env>(
    env: &E,
    scratch: &mut Scratch,
    holds: SlotUse,
    now: u64,
) -> Result<(), Reason> {
    let mut tries = 0;
    while tries < TRIES {
        tries += 1;
        env.find_place(&mut scratch.dead, scratch.key.endpoint, now)?;
        let has_place = enter(env, scratch, holds)?;
        let dead = &mut scratch.dead;
        if has_place {
            if dead.held.holds != SlotUse::Free as u32 {
                env.remove_holder(dead, dead.place.index);
            }
            return Ok(());
        }
        dead.place = Place::NONE;
    }
    Err(Reason::FlowTableFull)
}

/// Puts what is being made into its table and takes the place that was found, from its holder
/// `scratch.dead.held`. False: somebody else was faster, and it is in no table.
#[inline(never)]
fn enter<E: Env>(env: &E, scratch: &mut Scratch, holds: SlotUse) -> Result<bool, Reason> {
    let Scratch {
        key,
        flow,
        inside,
        binding,
        dead,
        ..
    } = scratch;
    let Place { index, version } = dead.place;
    let (entry, is_inserted) = match holds {
        SlotUse::Binding => {
            binding.slot = index;
            binding.slot_version = version.wrapping_add(1);
            (&*inside, env.insert_binding(inside, binding))
        }
        _ => {
            flow.slot = index;
            flow.slot_version = version.wrapping_add(1);
            (&*key, env.insert_flow(key, flow))
        }
    };
    if !is_inserted {
        return Err(Reason::FlowTableFull);
    }
    env.count(entry.endpoint, holds, true);
    if env.take_slot(index, version, holds, entry, &mut dead.held) {
        return Ok(true);
    }
    let is_removed = match holds {
        SlotUse::Binding => env.remove_binding(entry),
        _ => env.remove_flow(entry),
    };
    if is_removed {
        env.count(entry.endpoint, holds, false);
    }
    Ok(false)
}

/// Removes the flow or binding `dead.held` that has, or had, the place `index`; nothing if it
/// lives elsewhere by now.
#[inline(always)]
pub fn remove_holder<E: Env>(env: &E, dead: &mut Dead, index: u32) {
    if dead.held.holds == SlotUse::Flow as u32 {
        remove_flow(env, dead, index);
    } else {
        remove_binding(env, dead, index);
    }
}

#[inline(always)]
fn remove_flow<E: Env>(env: &E, dead: &mut Dead, index: u32) {
    let Dead {
        held,
        outside,
        named,
        ..
    } = dead;
    let key = &held.key;
    let Some(flow) = env.peek_flow(key) else {
        return;
    };
    if flow.slot != index || flow.slot_version != held.version {
        return;
    }
    *outside = outside_key(key.protocol, &flow);
    if env.remove_flow(key) {
        event::removed(env, key, &flow);
        env.remove_outside(outside);
        if key.endpoint == MAPPED {
            forget_inside_view(env, key, outside);
        }
        env.count(key.endpoint, SlotUse::Flow, false);
        if is_permitting(key, &flow) {
            allow_every_port(outside);
            if env.outside(outside, named) && same_flow(named, key) {
                env.remove_outside(outside);
            }
        }
    }
}

#[inline(always)]
fn remove_binding<E: Env>(env: &E, dead: &mut Dead, index: u32) {
    let Dead { held, outside, .. } = dead;
    let key = &held.key;
    let Some(binding) = env.peek_binding(key) else {
        return;
    };
    if binding.slot != index || binding.slot_version != held.version {
        return;
    }
    *outside = bound_key(key.protocol, &binding.external, binding.external_port);
    if env.remove_binding(key) {
        env.remove_outside(outside);
        env.count(key.endpoint, SlotUse::Binding, false);
    }
}

/// Removes a flow or a binding and gives its place back: `dead.place`.
#[inline(never)]
pub fn retire<E: Env>(env: &E, holds: SlotUse, key: &FlowKey, dead: &mut Dead) {
    if holds == SlotUse::Binding {
        if let Some(binding) = env.peek_binding(key) {
            clear(env, holds, key, binding.slot, binding.slot_version, dead);
        }
    } else if let Some(flow) = env.peek_flow(key) {
        clear(env, holds, key, flow.slot, flow.slot_version, dead);
    }
}

/// The same if it can be spared. False: it is alive, or in no table, as one that is just being
/// made.
#[inline(always)]
pub fn spare<E: Env>(env: &E, holds: SlotUse, key: &FlowKey, dead: &mut Dead, now: u64) -> bool {
    if holds == SlotUse::Binding {
        if let Some(binding) = env.peek_binding(key)
            && Standing::of_binding(&binding, now) != Standing::Live
        {
            clear(env, holds, key, binding.slot, binding.slot_version, dead);
            return true;
        }
    } else if let Some(flow) = env.peek_flow(key)
        && Standing::of(key.protocol, &flow, now) != Standing::Live
    {
        clear(env, holds, key, flow.slot, flow.slot_version, dead);
        return true;
    }
    false
}

#[inline(always)]
fn clear<E: Env>(
    env: &E,
    holds: SlotUse,
    key: &FlowKey,
    index: u32,
    version: u32,
    dead: &mut Dead,
) {
    dead.held.version = version;
    dead.held.holds = holds as u32;
    dead.held.key = *key;
    env.remove_holder(dead, index);
    dead.place.index = index;
    env.free_slot(index, dead.held.version);
}
