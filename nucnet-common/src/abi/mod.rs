//! The ABI between the BPF programs and the control plane: map names, keys, values, sizes.
//!
//! Conventions, for every type here:
//! * An [`Address`] is 16 bytes in network order; an IPv4 address is held in its mapped form
//!   (`::ffff:a.b.c.d`, RFC 4291 section 2.5.5.2), so that one table serves both families and
//!   `bpftool` prints the bytes of an address in the order in which people write them.
//! * Ports are in host byte order (a 53 prints as 53), except inside keys of
//!   longest-prefix-match tries, whose bits are compared from the first byte on.
//! * Times are nanoseconds of `CLOCK_MONOTONIC` (`bpf_ktime_get_ns`), unless a name ends in
//!   `_s`: seconds.
//! * No type has implicit padding: the kernel compares keys byte by byte.
//! * Names of maps are cut at 15 characters by the kernel; none is longer.

mod endpoint;
mod event;
mod explained;
mod flow;
pub mod map;
mod mapping;
mod network;
mod place;
#[cfg(feature = "user")]
#[allow(unsafe_code)]
mod pod;
mod policy;
pub mod program;
mod publish;
mod reason;
pub mod size;

pub use endpoint::*;
pub use event::*;
pub use explained::*;
pub use flow::*;
pub use mapping::*;
pub use network::*;
pub use place::*;
pub use policy::*;
pub use publish::*;
pub use reason::*;

/// Rises with every change of a map's layout or meaning. Programs and control plane of
/// different versions never share maps.
pub const VERSION: u32 = 4;

/// An IPv6 address, or an IPv4 address in its mapped form; network byte order.
pub type Address = [u8; 16];

/// A link-layer address.
pub type Mac = [u8; 6];

/// The first twelve bytes of every mapped IPv4 address.
pub const V4_MAPPED: [u8; 12] = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff];

/// "Any address" of IPv4, as a publish without a host address has it.
pub const ANY_V4: Address = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 0, 0, 0, 0];

/// "Any address" of IPv6.
pub const ANY_V6: Address = [0; 16];

/// No address at all.
pub const NO_ADDRESS: Address = [0; 16];
