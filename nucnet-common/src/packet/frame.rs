//! A packet buffer, and what a link layer says of it.

use network_types::eth::EthHdr;

use super::{Balance, Covered, Delta};
use crate::abi::Reason;

/// Length of an Ethernet header in bytes.
pub const ETHERNET: u32 = EthHdr::LEN as u32;

/// EtherType of ARP.
pub const ETHERTYPE_ARP: u16 = 0x0806;
/// EtherType of IPv4.
pub const ETHERTYPE_IPV4: u16 = 0x0800;
/// EtherType of IPv6.
pub const ETHERTYPE_IPV6: u16 = 0x86dd;

/// A packet buffer. Offsets are in bytes from its start. The kernel's is a handle to memory that
/// others may hold too, so writing takes no unique reference.
pub trait Frame {
    /// Length of the frame in bytes.
    fn length(&self) -> u32;

    /// Whether the frame came with a VLAN tag. The kernel keeps it beside the frame, whose bytes
    /// are those of an untagged one.
    fn is_tagged(&self) -> bool;

    /// Copies `N` bytes out, or nothing if the frame ends before.
    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]>;

    /// The same for a header, near the start of the frame, where the kernel has it at hand.
    fn header<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        self.load(offset)
    }

    /// Writes `N` bytes. They have been loaded before, so only the kernel itself can refuse.
    fn store<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        balance: Balance,
    ) -> Result<(), Reason>;

    /// Keeps `kept` bytes from `l3` on and puts `room` bytes before them, of unspecified contents,
    /// after the link-layer header. What is left is a packet of its own: nobody is to segment
    /// it, or to fill in a checksum of what it was.
    fn wrap(&self, l3: u32, kept: u32, room: u32) -> Result<(), Reason>;

    /// Adds a [`Delta`] to the IPv4 header checksum at `offset`.
    fn fix_header_checksum(&self, offset: u32, delta: Delta) -> Result<(), Reason>;

    /// Adds a [`Delta`] to the layer 4 checksum at `offset`.
    fn fix_checksum(&self, offset: u32, delta: Delta, covered: Covered) -> Result<(), Reason>;
}
