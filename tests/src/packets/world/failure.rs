//! What goes wrong because the test wants it to.

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
