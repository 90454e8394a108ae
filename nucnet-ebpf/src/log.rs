//! The programs' own debug output, for `nucnet-ctl monitor --debug`: lines as `aya-log` reads
//! them.
//!
//! The macros are aya-log's. What they write to is not: `aya-log-ebpf` declares its ring buffer
//! in a section that libbpf, and so bpftool, refuses, and has a level that is fixed when the
//! programs are loaded. `macro_support` here is what the macros expect of that crate, with a ring
//! declared in BTF; whether a line is written is decided by who calls.

/// What the macros refer to, as `::aya_log_ebpf::macro_support`.
pub mod macro_support {
    pub use aya_log_common::{
        Argument, DefaultFormatter, DisplayHint, Field, Header, IpFormatter, Level, LogValueLength,
        LowerHexFormatter,
    };

    pub use crate::maps::LOG as AYA_LOGS;

    /// Nobody calls unless somebody reads.
    #[inline(always)]
    pub fn level_enabled(_level: Level) -> bool {
        true
    }
}

use aya_log_ebpf_macros::debug;

use crate::maps::SCRATCH;

/// Writes a line about a packet that is dropped: what the packet is, as the notes have it, and
/// the route that was asked for last on this processor, which is its own if it came that far.
///
/// A step, which the verifier walks through once.
#[unsafe(no_mangle)]
#[inline(never)]
pub extern "C" fn step_log(reason: u32, endpoint: u32, interface: u32, frame: u32) -> u32 {
    let Some(scratch) = SCRATCH.get_ptr(0) else {
        return 0;
    };
    // SAFETY: nobody else has this processor's notes. They are zero bytes at first, which are
    // valid for both types, and then what programs have written.
    let (packet, route) = unsafe { (&(*scratch).packet, &(*scratch).route) };
    debug!(
        (),
        "drop: reason {} endpoint {} interface {} frame {} protocol {} {:i} {} -> {:i} {} length {} ttl {} flags {:x} route {} interface {} via {:i} unit {}",
        reason,
        endpoint,
        interface,
        frame,
        packet.protocol,
        packet.source,
        packet.source_port,
        packet.destination,
        packet.destination_port,
        packet.length,
        packet.ttl,
        packet.flags,
        route.kind as u32,
        route.link,
        route.next_hop,
        route.mtu,
    );
    0
}
