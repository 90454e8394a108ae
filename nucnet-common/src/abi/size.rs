//! Capacities of the maps.

/// Endpoints of one host (a bridge takes at most 1023 ports; there may be many bridges).
pub const ENDPOINTS: usize = 65_536;
/// Interfaces of microVM slots: two a piece.
pub const GUESTS: usize = 2 * ENDPOINTS;
/// Addresses of endpoints: two a piece.
pub const ADDRESSES: usize = 2 * ENDPOINTS;
/// Prefixes of published ports; a range of ports takes at most 30 (IPv4 and IPv6: 60).
pub const PUBLISHES: usize = 262_144;
/// Networks of one host.
pub const NETWORKS: usize = 4_096;
/// Static mappings of one host.
pub const MAPPINGS: usize = 16_384;
/// Prefixes of snat mappings: two a piece.
pub const SNATS: usize = 2 * MAPPINGS;
/// Places: flows and bindings of all endpoints together; a power of two ([`super::Slot`]).
pub const SLOTS: usize = 524_288;
/// No more than places, so that whoever has a place finds room.
pub const FLOWS: usize = SLOTS;
/// Likewise.
pub const BINDINGS: usize = SLOTS;
/// A flow has two entries at most, a binding one.
pub const OUTSIDE: usize = 2 * SLOTS;
/// Places among which the flows of one endpoint are, at most; a power of two.
pub const SLOT_WINDOW: usize = 65_536;
/// Interfaces of the host that are not nucnet's own.
pub const UPLINKS: usize = 4_096;
/// Endpoint and reason.
pub const DROPS: usize = 262_144;
/// Prefixes of all policies together.
pub const POLICY_CIDRS: usize = 1_048_576;
/// Port prefixes of all classes together.
pub const POLICY_PORTS: usize = 1_048_576;
/// Monitors that may run at once: a ring buffer has one reader.
pub const MONITORS: usize = 4;
/// Those who read something: monitors, and who of them reads [`super::map::LOG`], last.
pub const READERS: usize = MONITORS + 1;
/// Bytes of [`super::map::LOG`]: some 500 lines; a power of two, in whole pages.
pub const LOG: usize = 131_072;
/// Bytes of a monitor's ring buffer: some 700 events; a power of two, in whole pages.
pub const EVENTS: usize = 131_072;
/// Refusals that an endpoint has in mind so as to tell them once ([`super::EventLimit`]); a
/// power of two.
pub const RECENT: usize = 8;
