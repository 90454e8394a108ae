//! The kernel's side of `nucnet_common::env`: socket buffer, maps, clock, routes, sockets.

mod address;
mod frame;
mod host;
mod monitors;
mod tables;

pub use address::{AF_INET, AF_INET6, address, word, words};

use core::{
    hint::assert_unchecked,
    ops::{Deref, DerefMut},
};

use aya_ebpf::programs::TcContext;

/// One packet in the kernel.
pub struct Skb {
    pub ctx: TcContext,
}

/// A value of a hash map or an array.
///
/// A program runs inside a grace period, and maps give memory back after one, so it outlives the
/// program. But one that is deleted may at once become another key's of the same map, and another
/// processor may write to it: fields are plain integers, and no decision relies on two of them
/// agreeing.
pub struct Entry<T>(pub *mut T);

impl<T> Deref for Entry<T> {
    type Target = T;

    #[inline(always)]
    fn deref(&self) -> &T {
        const { assert!(align_of::<T>() <= 8) };
        // SAFETY: the pointer came from a lookup that succeeded in this run of the program; see
        // the type for its lifetime. These maps align values to eight bytes. (The compiler has to
        // be told, or reads them byte by byte.)
        unsafe {
            assert_unchecked(self.0.is_aligned());
            &*self.0
        }
    }
}

impl<T> DerefMut for Entry<T> {
    #[inline(always)]
    fn deref_mut(&mut self) -> &mut T {
        // SAFETY: as above.
        unsafe {
            assert_unchecked(self.0.is_aligned());
            &mut *self.0
        }
    }
}
