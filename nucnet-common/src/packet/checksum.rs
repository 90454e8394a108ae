//! Internet checksums: what changes of them, and sums of what they cover.

use super::{Family, Frame, address::quarter};
use crate::abi::Address;

/// Which part of a packet changed, for its layer 4 checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Covered {
    /// The addresses, which the checksum covers by way of the pseudo header only.
    pub pseudo_header: bool,
    /// UDP: zero means "no checksum" (RFC 768, for tunnels over IPv6 RFC 6935) and stays zero; a
    /// checksum that comes to zero is written as ones.
    pub may_be_absent: bool,
}

/// Whether a checksum inside the packet is changed along with the bytes written, so that the sum
/// over the whole packet, which a network card may have supplied (`CHECKSUM_COMPLETE`), stays.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Balance {
    /// By the IPv4 header checksum, or by the layer 4 checksum for its own bytes.
    Balanced,
    /// Not at all, or not in the kernel's books: IPv6 addresses and hop limit.
    Unbalanced,
}

/// The change of an Internet checksum (RFC 1624): a one's complement sum over native-endian
/// words, which is what the kernel's checksum helpers take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Delta(pub u64);

impl Delta {
    /// No change.
    pub const NONE: Self = Self(0);

    /// A 32-bit word at an even offset changed.
    #[inline(always)]
    pub fn word(self, old: [u8; 4], new: [u8; 4]) -> Self {
        Self(self.0 + u64::from(!u32::from_ne_bytes(old)) + u64::from(u32::from_ne_bytes(new)))
    }

    /// An address changed: for IPv4 its last four bytes.
    #[inline(always)]
    pub fn address(mut self, family: Family, old: &Address, new: &Address) -> Self {
        if family == Family::V6 {
            self = self.word(quarter(old, 0), quarter(new, 0));
            self = self.word(quarter(old, 4), quarter(new, 4));
            self = self.word(quarter(old, 8), quarter(new, 8));
        }
        self.word(quarter(old, 12), quarter(new, 12))
    }

    /// Adds a word that was not there before.
    #[inline(always)]
    pub fn plus(self, word: [u8; 4]) -> Self {
        Self(self.0 + u64::from(u32::from_ne_bytes(word)))
    }

    /// Adds an address that was not there before.
    #[inline(always)]
    pub fn plus_address(self, address: &Address) -> Self {
        self.plus(quarter(address, 0))
            .plus(quarter(address, 4))
            .plus(quarter(address, 8))
            .plus(quarter(address, 12))
    }

    /// Adds the pseudo header of what a packet carries (RFC 8200 section 8.1; of IPv4, RFC 9293
    /// section 3.1: what a mapped address has before the IPv4 one is zero to such a sum).
    #[inline(always)]
    pub fn pseudo_header(
        self,
        source: &Address,
        destination: &Address,
        length: u32,
        protocol: u8,
    ) -> Self {
        self.plus_address(source)
            .plus_address(destination)
            .plus(length.to_be_bytes())
            .plus([0, 0, 0, protocol])
    }

    /// Both changes together.
    #[inline(always)]
    pub fn and(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }

    /// A checksum after the change (RFC 1624, equation 3).
    #[inline(always)]
    pub fn applied(self, checksum: [u8; 2]) -> [u8; 2] {
        let old = [checksum[0], checksum[1], 0, 0];
        let sum = Self(self.0 + u64::from(!u32::from_ne_bytes(old)));
        (!sum.folded16()).to_ne_bytes()
    }

    /// Folded to 32 bits.
    #[inline(always)]
    pub fn folded(self) -> u32 {
        let sum = (self.0 & 0xffff_ffff) + (self.0 >> 32);
        ((sum & 0xffff_ffff) + (sum >> 32)) as u32
    }

    /// Folded to 16 bits.
    #[inline(always)]
    pub fn folded16(self) -> u16 {
        let sum = self.folded();
        let sum = (sum & 0xffff) + (sum >> 16);
        ((sum & 0xffff) + (sum >> 16)) as u16
    }
}

/// Bytes of a frame that are summed up at a time.
const CHUNK: u32 = 32;
/// How many such chunks are summed up.
const CHUNKS: u32 = 40;
/// How many bytes [`sum`] sums up at most: an ICMPv6 error has no more than 1,280 (RFC 4443
/// section 2.4c), an ICMP error should have no more than 576 (RFC 1812 section 4.3.2.3).
pub(crate) const SUMMED: u32 = CHUNK * CHUNKS + CHUNK - 1;

/// Sums up `length` bytes of a frame, at most [`SUMMED`]. `None`: it ends before.
#[inline(always)]
pub fn sum<F: Frame>(frame: &F, at: u32, length: u32) -> Option<Delta> {
    let mut sum = Delta::NONE;
    let (mut at, mut left) = (at, length);
    let mut chunk = 0;
    while chunk < CHUNKS {
        chunk += 1;
        if left < CHUNK {
            break;
        }
        let bytes: [u8; CHUNK as usize] = frame.load(at)?;
        let mut word = 0;
        while word < CHUNK as usize {
            sum = sum.plus([
                bytes[word],
                bytes[word + 1],
                bytes[word + 2],
                bytes[word + 3],
            ]);
            word += 4;
        }
        at += CHUNK;
        left -= CHUNK;
    }
    let mut byte = 0;
    while byte < CHUNK {
        if byte < left {
            let [value] = frame.load(at + byte)?;
            sum = sum.plus(if byte & 1 == 0 {
                [value, 0, 0, 0]
            } else {
                [0, value, 0, 0]
            });
        }
        byte += 1;
    }
    Some(sum)
}
