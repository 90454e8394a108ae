//! The frame: bytes and checksums of the socket buffer.

use core::{arch::asm, mem::MaybeUninit};

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_MARK_MANGLED_0, BPF_F_PSEUDO_HDR, BPF_F_RECOMPUTE_CSUM, bpf_adj_room_mode},
    helpers::generated::{
        bpf_l3_csum_replace, bpf_l4_csum_replace, bpf_skb_adjust_room, bpf_skb_change_tail,
        bpf_skb_load_bytes, bpf_skb_pull_data, bpf_skb_store_bytes,
    },
};
use nucnet_common::{
    abi::Reason,
    packet::{Balance, Covered, Delta, Frame},
};

use super::Skb;
use crate::maps::{QUOTE, QUOTED};

/// Bytes that the compiler may read by words: the target has no unaligned access.
#[repr(C, align(8))]
struct Aligned<const N: usize>([u8; N]);

impl Frame for Skb {
    #[inline(always)]
    fn length(&self) -> u32 {
        self.ctx.len()
    }

    #[inline(always)]
    fn is_tagged(&self) -> bool {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).vlan_present != 0 }
    }

    #[inline(always)]
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let mut bytes = MaybeUninit::<Aligned<N>>::uninit();
        // SAFETY: the context is the program's own, and the buffer has N bytes.
        let result = unsafe {
            bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                offset,
                bytes.as_mut_ptr().cast(),
                N as u32,
            )
        };
        if result != 0 {
            return None;
        }
        // SAFETY: the helper returned 0: it filled the buffer.
        Some(unsafe { bytes.assume_init() }.0)
    }

    #[inline(always)]
    fn header<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        // As many extension headers as are looked behind end before that.
        let offset = opaque(offset) & FARTHEST;
        // Read in place: a call of a helper costs more than all that is read.
        let end = offset as usize + N;
        if self.ctx.data() + end > self.ctx.data_end() {
            // SAFETY: the context is the program's own. If that fails, so does the next comparison.
            unsafe { bpf_skb_pull_data(self.ctx.skb.skb, end as u32) };
        }
        let mut start = self.ctx.data() + offset as usize;
        // SAFETY: a register is copied to itself: the verifier follows what is compared only if
        // the same is read from.
        unsafe { asm!("{0} = {0}", inout(reg) start) };
        if start + N > self.ctx.data_end() {
            return None;
        }
        // SAFETY: the bytes are before the end of what the kernel has in one piece.
        Some(unsafe { *(start as *const [u8; N]) })
    }

    #[inline(always)]
    fn store<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        balance: Balance,
    ) -> Result<(), Reason> {
        let flags = match balance {
            Balance::Balanced => 0,
            Balance::Unbalanced => BPF_F_RECOMPUTE_CSUM,
        };
        // SAFETY: the context is the program's own, and the buffer has N bytes.
        let result = unsafe {
            bpf_skb_store_bytes(
                self.ctx.skb.skb,
                offset,
                bytes.as_ptr().cast(),
                N as u32,
                flags.into(),
            )
        };
        done(result)
    }

    #[inline(never)]
    fn wrap(&self, l3: u32, kept: u32, room: u32) -> Result<(), Reason> {
        let buffer = QUOTE.get_ptr_mut(0).ok_or(Reason::Helper)?;
        // Compared as the 64 bits that the register has, which is what the verifier follows; and
        // less one, for before Linux 6.8 it learns nothing from a comparison with zero.
        let but_one = opaque(kept.wrapping_sub(1));
        if but_one >= QUOTED as u64 {
            return Err(Reason::Helper);
        }
        let kept = but_one as u32 + 1;
        let skb = self.ctx.skb.skb;
        // SAFETY: the context is the program's own, and the buffer has `QUOTED` bytes.
        unsafe {
            done(bpf_skb_load_bytes(
                self.ctx.as_ptr(),
                l3,
                buffer.cast(),
                kept,
            ))?;
            // A new length ends segmentation. Taking the start away, behind which the kernel was
            // to fill in a checksum, ends that.
            done(bpf_skb_change_tail(skb, l3 + LEAST_LEFT + TAKEN, 0))?;
            let mode = bpf_adj_room_mode::BPF_ADJ_ROOM_MAC;
            done(bpf_skb_adjust_room(skb, -(TAKEN as i32), mode, 0))?;
            done(bpf_skb_change_tail(skb, l3 + room + kept, 0))?;
            done(bpf_skb_store_bytes(
                skb,
                l3 + room,
                buffer.cast(),
                kept,
                BPF_F_RECOMPUTE_CSUM.into(),
            ))
        }
    }

    #[inline(always)]
    fn fix_header_checksum(&self, offset: u32, delta: Delta) -> Result<(), Reason> {
        // SAFETY: the context is the program's own. Size 0 means that `to` is a difference.
        done(unsafe { bpf_l3_csum_replace(self.ctx.skb.skb, offset, 0, delta.folded().into(), 0) })
    }

    #[inline(always)]
    fn fix_checksum(&self, offset: u32, delta: Delta, covered: Covered) -> Result<(), Reason> {
        let mut flags = 0;
        if covered.pseudo_header {
            flags |= BPF_F_PSEUDO_HDR;
        }
        if covered.may_be_absent {
            flags |= BPF_F_MARK_MANGLED_0;
        }
        // SAFETY: as above.
        done(unsafe {
            bpf_l4_csum_replace(
                self.ctx.skb.skb,
                offset,
                0,
                delta.folded().into(),
                flags.into(),
            )
        })
    }
}

/// Where a header begins at most; all its bits are set.
const FARTHEST: u64 = 0x3fff;

/// Bytes of IP that the kernel wants left when a frame is shortened: an IPv6 header.
const LEAST_LEFT: u32 = 40;
/// Bytes that are taken away to have no checksum filled in: all headers before a place where one
/// could be.
const TAKEN: u32 = 192;

/// The same number, of which the compiler knows nothing: what it makes of a comparison may be
/// more than the verifier can follow.
#[inline(always)]
fn opaque(number: u32) -> u64 {
    let mut number = u64::from(number);
    // SAFETY: a register is copied to itself.
    unsafe { asm!("{0} = {0}", inout(reg) number) };
    number
}

#[inline(always)]
fn done(result: i64) -> Result<(), Reason> {
    if result == 0 {
        Ok(())
    } else {
        Err(Reason::Helper)
    }
}
