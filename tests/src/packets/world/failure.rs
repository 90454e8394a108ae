//! What goes wrong because the test wants it to.

use std::cell::Cell;

use nucnet_common::abi::Reason;

use super::World;

impl World {
    /// The next change of a table but `after` fails, once: an insert finds the table full, a
    /// place changes hands.
    pub fn fail_change(&mut self, after: u64) {
        self.failing.set(Some(self.changes.get() + after));
    }

    /// Whether the failure that was asked for has yet to come; it is then called off.
    pub fn call_off_failure(&mut self) -> bool {
        self.failing.take().is_some()
    }

    /// Another processor is faster so many times: what a newcomer has found is taken when it
    /// comes to take it.
    pub fn outrun(&mut self, ports: u32, places: u32) {
        self.ports_lost.set(ports);
        self.places_lost.set(places);
    }

    /// What is noted of one packet's first fragment is read for that of another, by turns.
    pub fn exchange_fragments(&mut self) {
        let notes = self.fragments.get_mut();
        let mut others: Vec<_> = notes.values().copied().collect();
        others.rotate_left(1);
        for (note, other) in notes.values_mut().zip(others) {
            *note = other;
        }
    }

    /// The next write to the frame but `after` is refused, and all that follow.
    pub fn fail_write(&mut self, after: u64) {
        self.writes_left.set(Some(after));
    }

    /// Whether the refusal that was asked for has yet to come; it is then called off.
    pub fn call_off_refusal(&mut self) -> bool {
        self.writes_left.set(None);
        !self.refused.take()
    }

    pub(super) fn may_write(&self) -> Result<(), Reason> {
        match self.writes_left.get() {
            Some(0) => {
                self.refused.set(true);
                Err(Reason::Helper)
            }
            left => {
                self.writes_left.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }

    /// Whether another processor is faster this time.
    pub(super) fn is_outrun(times: &Cell<u32>) -> bool {
        let left = times.get();
        times.set(left.saturating_sub(1));
        left != 0
    }

    pub(super) fn may_change(&self) -> bool {
        let number = self.changes.get();
        self.changes.set(number + 1);
        if self.failing.get() == Some(number) {
            self.failing.set(None);
            return false;
        }
        true
    }
}
