//! The frame that is on its way.

use nucnet_common::{
    abi::Reason,
    packet::{Balance, Covered, Delta, Frame},
};

use super::World;

impl Frame for World {
    fn length(&self) -> u32 {
        self.frame.borrow().len() as u32
    }

    fn is_tagged(&self) -> bool {
        self.tag.is_some()
    }

    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        let frame = self.frame.borrow();
        Some(frame.get(start..start + N)?.try_into().expect("N bytes"))
    }

    fn store<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        _: Balance,
    ) -> Result<(), Reason> {
        self.may_write()?;
        let start = offset as usize;
        let mut frame = self.frame.borrow_mut();
        let place = frame.get_mut(start..start + N).ok_or(Reason::Helper)?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn wrap(&self, l3: u32, kept: u32, room: u32) -> Result<(), Reason> {
        self.may_write()?;
        let (l3, kept) = (l3 as usize, kept as usize);
        let mut frame = self.frame.borrow_mut();
        frame.truncate(l3 + kept);
        assert_eq!(frame.len(), l3 + kept, "the frame is shorter");
        frame.splice(l3..l3, std::iter::repeat_n(0xee, room as usize));
        Ok(())
    }

    fn fix_header_checksum(&self, offset: u32, delta: Delta) -> Result<(), Reason> {
        let old: [u8; 2] = self.load(offset).ok_or(Reason::Helper)?;
        self.store(offset, &changed(old, delta), Balance::Balanced)
    }

    fn fix_checksum(&self, offset: u32, delta: Delta, covered: Covered) -> Result<(), Reason> {
        let old: [u8; 2] = self.load(offset).ok_or(Reason::Helper)?;
        // As `bpf_l4_csum_replace` with BPF_F_MARK_MANGLED_0 (bpf-helpers(7)).
        if covered.may_be_absent && old == [0, 0] {
            return Ok(());
        }
        let new = match changed(old, delta) {
            [0, 0] if covered.may_be_absent => [0xff, 0xff],
            new => new,
        };
        self.store(offset, &new, Balance::Balanced)
    }
}

/// A checksum after a change (RFC 1624, equation 3).
fn changed(old: [u8; 2], delta: Delta) -> [u8; 2] {
    let mut sum = u64::from(!u16::from_ne_bytes(old)) + u64::from(delta.folded());
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_ne_bytes()
}
