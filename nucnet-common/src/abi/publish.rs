//! Published ports.

use super::Address;

/// Which packets a publish takes: the data of a key of the trie [`super::map::PUBLISHES`].
/// A range of ports is a handful of prefixes.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PublishKey {
    /// Host address, or [`super::ANY_V4`] or [`super::ANY_V6`].
    pub address: Address,
    /// IP protocol number.
    pub protocol: u8,
    /// [`PublishUse`].
    pub kind: u8,
    /// Host port, network byte order: last, because a prefix may end in it.
    pub port: [u8; 2],
}

/// What an entry of [`super::map::PUBLISHES`] is for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PublishUse {
    /// It takes packets.
    Packets = 0,
    /// It only says, under "any address", that the port is published, or that of a dnat, on some
    /// address of the family: no socket of the host's may bind it for all of them.
    Held = 1,
}

impl PublishKey {
    /// Length in bits of a key with a whole port. A block of `2^n` ports is `n` shorter.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
}

/// Where a published port leads. Map [`super::map::PUBLISHES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Publish {
    /// Index of the endpoint's host side interface.
    pub link: u32,
    /// The endpoint's number.
    pub endpoint: u32,
    /// First host port of the range; the range maps port by port.
    pub host_port: u16,
    /// The endpoint's port for that first one.
    pub port: u16,
    /// The mapping whose target it leads to, in place of an endpoint; 0: an endpoint.
    pub mapping: u32,
}
