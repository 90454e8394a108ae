//! Static mappings.

use super::Address;

/// Stands for the number of an endpoint, and of its network, in the flows of hosts that are none:
/// those beyond the interfaces of the host that static mappings lead to, or translate.
pub const MAPPED: u32 = u32::MAX;

/// What a static mapping translates.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MappingKind {
    /// The destination: ports of an external address lead to an internal one.
    Dnat = 1,
    /// The source: internal addresses leave as an external one.
    Snat = 2,
    /// Both: clients in the network of the internal address reach it by the external one.
    Hairpin = 3,
}

/// A static mapping. Map [`super::map::MAPPINGS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StaticMapping {
    /// [`MappingKind`].
    pub kind: u32,
    /// Only what comes in by this interface (dnat) or leaves by it (snat); 0: any.
    pub link: u32,
    /// External address.
    pub external: Address,
    /// Target of dnat and hairpin.
    pub internal: Address,
    /// Whose packets are translated: the prefix's address.
    pub sources: Address,
    /// Length of that prefix in bits of the mapped form; 0: everybody's.
    pub sources_bits: u32,
    /// Zero.
    pub pad: u32,
}

/// The data of a key of the trie [`super::map::SNATS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SnatKey {
    /// Interface by which packets leave, network byte order; 0: any;
    /// [`SnatKey::SOURCES`]: whether there is any mapping for the source.
    pub link: [u8; 4],
    /// Source.
    pub source: Address,
}

impl SnatKey {
    /// In place of an interface.
    pub const SOURCES: u32 = u32::MAX;
    /// Length in bits of a key with a whole address.
    pub const BITS: u32 = 8 * size_of::<Self>() as u32;
}

/// Which mapping translates a source. Map [`super::map::SNATS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Snat {
    /// Its number.
    pub mapping: u32,
}

/// What came by a mapping. Map [`super::map::MAPPING_COUNTS`], per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MappingCount {
    /// Flows that were opened.
    pub flows: u64,
    /// Packets of them, both directions.
    pub packets: u64,
    /// Bytes of those (layer 3 and up).
    pub bytes: u64,
}
