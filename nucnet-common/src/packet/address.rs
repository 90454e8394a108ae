//! Addresses as the maps hold them: their family, and comparison by words.

use crate::abi::{ANY_V4, ANY_V6, Address, V4_MAPPED};

/// Eight bytes of an address, as a number.
#[inline(always)]
pub(crate) fn half(address: &Address, at: usize) -> u64 {
    let byte = |offset: usize| u64::from(address[at + offset]);
    byte(0) << 56
        | byte(1) << 48
        | byte(2) << 40
        | byte(3) << 32
        | byte(4) << 24
        | byte(5) << 16
        | byte(6) << 8
        | byte(7)
}

/// Four bytes of an address, from one on.
#[inline(always)]
pub fn quarter(address: &Address, at: usize) -> [u8; 4] {
    [
        address[at],
        address[at + 1],
        address[at + 2],
        address[at + 3],
    ]
}

/// Whether two addresses are equal, compared by words: the kernel's target has no `memcmp`.
#[inline(always)]
pub fn same(one: &Address, other: &Address) -> bool {
    quarter(one, 12) == quarter(other, 12)
        && quarter(one, 8) == quarter(other, 8)
        && quarter(one, 4) == quarter(other, 4)
        && quarter(one, 0) == quarter(other, 0)
}

/// An IP version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// The family of an address.
    #[inline(always)]
    pub fn of(address: &Address) -> Self {
        if is_v4(address) { Self::V4 } else { Self::V6 }
    }

    /// "Any address" of the family.
    #[inline(always)]
    pub fn any(self) -> Address {
        match self {
            Self::V4 => ANY_V4,
            Self::V6 => ANY_V6,
        }
    }
}

/// Whether an address is a mapped IPv4 address.
#[inline(always)]
pub fn is_v4(address: &Address) -> bool {
    quarter(address, 0) == [0; 4]
        && quarter(address, 4) == [0; 4]
        && quarter(address, 8) == [0, 0, 0xff, 0xff]
}

/// An IPv4 address in the form that the maps hold.
#[inline(always)]
pub fn mapped(v4: [u8; 4]) -> Address {
    let mut address = [0; 16];
    address[..12].copy_from_slice(&V4_MAPPED);
    address[12..].copy_from_slice(&v4);
    address
}
