//! Who reads which ring buffer.
//!
//! A ring has one reader. Whoever wants to read takes one that nobody reads, and says again and
//! again that he is still there; the programs write nothing for one who has stopped saying so.

use std::{ops::Range, time::Duration};

use nix::time::{ClockId, clock_gettime};
use nucnet_common::abi::{Monitor, map, size};

use super::{BpfError, Cells, pins::Pins};

/// For how long the programs go on writing for a reader who says nothing any more.
const PATIENCE: Duration = Duration::from_secs(5);

/// Nanoseconds of `CLOCK_MONOTONIC`, which the programs' times are.
///
/// # Errors
/// None that a kernel is known for.
pub fn monotonic() -> Result<u64, BpfError> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC).map_err(|errno| BpfError::Clock {
        source: errno.into(),
    })?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// A ring that is this process's to read, until the value goes.
pub(super) struct Claim {
    pins: Pins,
    monitors: Cells<Monitor>,
    pub(super) index: u32,
    claim: Monitor,
}

impl Claim {
    /// Takes one of these rings. `busy`: what it means that these processes read all of them.
    /// `prepare`: what is done with the ring of that number before the programs write to it for
    /// this reader; told whether nobody reads another of them.
    pub(super) fn take<T>(
        pins: &Pins,
        rings: Range<usize>,
        busy: impl FnOnce(Vec<u32>) -> BpfError,
        prepare: impl FnOnce(usize, bool) -> Result<T, BpfError>,
    ) -> Result<(Self, T), BpfError> {
        let pin = (pins.map(map::MONITORS), map::MONITORS);
        let mut monitors = Cells::open(pin, size::READERS, 0)?;
        let _lock = pins.lock()?;
        let now = monotonic()?;
        let mut free = None;
        let mut holders = Vec::new();
        for index in rings {
            let index = index as u32;
            let monitor: Monitor = monitors.get(index)?;
            if monitor.until > now {
                holders.push(monitor.process);
            } else {
                free = free.or(Some(index));
            }
        }
        let Some(index) = free else {
            return Err(busy(holders));
        };
        // What the programs write from the claim on is this reader's, and nothing may throw it away.
        let prepared = prepare(index as usize, holders.is_empty())?;
        let claim = Monitor {
            until: until(monotonic()?),
            process: std::process::id(),
            token: rand::random(),
        };
        monitors.set(index, &claim)?;
        let claim = Self {
            pins: pins.clone(),
            monitors,
            index,
            claim,
        };
        Ok((claim, prepared))
    }

    /// Says that the reader is still there. `false`: somebody else took the ring meanwhile.
    pub(super) fn stay(&mut self) -> Result<bool, BpfError> {
        let now = monotonic()?;
        // Somebody takes it over only once the claim has run out.
        if self.claim.until <= now {
            let _lock = self.pins.lock()?;
            let found = self.monitors.get(self.index)?;
            if (found.process, found.token) != (self.claim.process, self.claim.token) {
                return Ok(false);
            }
        }
        self.claim.until = until(now);
        self.monitors.set(self.index, &self.claim)?;
        Ok(true)
    }
}

fn until(now: u64) -> u64 {
    now + PATIENCE.as_nanos() as u64
}

impl Drop for Claim {
    fn drop(&mut self) {
        let Ok(found) = self.monitors.get(self.index) else {
            return;
        };
        if (found.process, found.token) == (self.claim.process, self.claim.token) {
            // Otherwise it runs out by itself.
            let _ = self.monitors.set(self.index, &Monitor::default());
        }
    }
}
