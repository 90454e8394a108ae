//! Addresses as the kernel's structures have them.

use nucnet_common::{
    abi::Address,
    packet::{mapped, quarter},
};

/// Linux address family numbers (`AF_INET`, `AF_INET6`).
pub const AF_INET: u8 = 2;
pub const AF_INET6: u8 = 10;

/// Four bytes of an address in the order in which they are on the wire.
#[inline(always)]
pub fn word(address: &Address, at: usize) -> u32 {
    u32::from_ne_bytes(quarter(address, at))
}

/// An address as the kernel's structures have it.
#[inline(always)]
pub fn words(address: &Address) -> [u32; 4] {
    [
        word(address, 0),
        word(address, 4),
        word(address, 8),
        word(address, 12),
    ]
}

/// An address from the kernel's structures; IPv4 is in the first word.
#[inline(always)]
pub fn address(family: u8, words: &[u32; 4]) -> Address {
    if family == AF_INET {
        return mapped(words[0].to_ne_bytes());
    }
    let mut address = [0; 16];
    address[0..4].copy_from_slice(&words[0].to_ne_bytes());
    address[4..8].copy_from_slice(&words[1].to_ne_bytes());
    address[8..12].copy_from_slice(&words[2].to_ne_bytes());
    address[12..16].copy_from_slice(&words[3].to_ne_bytes());
    address
}
