//! Guests of microVMs: their entries, and the programs in their slots' network namespaces.

use nucnet_common::abi::{self, program};

use super::{BpfError, Datapath, hook::Hook};

impl Datapath {
    /// Makes the guest known at both ends of its slot.
    pub fn put_guest(&mut self, tap: u32, wire: u32, guest: &abi::Guest) -> Result<(), BpfError> {
        for (link, across) in [(tap, wire), (wire, tap)] {
            self.guests
                .insert(&link, &abi::Guest { across, ..*guest })?;
        }
        Ok(())
    }

    /// Forgets the guest of an endpoint; somebody else's at these interfaces stays.
    pub fn remove_guest(&mut self, tap: u32, wire: u32, endpoint: u32) -> Result<(), BpfError> {
        for link in [tap, wire] {
            if self
                .guests
                .get(&link)?
                .is_some_and(|guest| guest.endpoint == endpoint)
            {
                self.guests.remove(&link)?;
            }
        }
        Ok(())
    }

    /// Puts the programs on the two interfaces of a slot. For a thread in the slot's network
    /// namespace.
    pub fn attach_guest(&self, tap: &str, wire: &str) -> Result<(), BpfError> {
        self.filter(&Hook::new(program::FROM_GUEST, tap))?;
        self.filter(&Hook::new(program::TO_GUEST, wire))
    }
}
