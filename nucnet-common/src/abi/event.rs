//! What monitors are told.

use super::{Address, size};

/// What an [`Event`] is about.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EventKind {
    /// A packet was dropped because the endpoint's policy denies it.
    Denied = 1,
    /// A packet was dropped for another reason.
    Dropped = 2,
    /// A flow was opened.
    FlowNew = 3,
    /// A TCP connection was closed, or an entry removed that was idle for too long.
    FlowClosed = 4,
}

/// Something worth telling. Rings [`super::map::EVENTS`].
///
/// Of a packet, source and destination are those that it had when it was dropped; of a flow,
/// those that its first packet had for the endpoint.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Event {
    /// When.
    pub time: u64,
    /// Events of the same endpoint, of the same sort (refusals or flows), that were not told
    /// since the one before, for there were too many.
    pub suppressed: u64,
    /// Of a flow: packets in both directions.
    pub packets: u64,
    /// Bytes of them.
    pub bytes: u64,
    /// Source; zero bytes: the packet could not be read.
    pub source: Address,
    /// Destination.
    pub destination: Address,
    /// Of a flow: its source as the other side sees it.
    pub nat_source: Address,
    /// Of a flow: its destination as the other side has it.
    pub nat_destination: Address,
    /// Source port; of an echo message, its identifier.
    pub source_port: u16,
    /// Destination port.
    pub destination_port: u16,
    /// The port of `nat_source`.
    pub nat_source_port: u16,
    /// The port of `nat_destination`.
    pub nat_destination_port: u16,
    /// [`EventKind`].
    pub kind: u32,
    /// The endpoint's number; 0: none is known.
    pub endpoint: u32,
    /// [`super::Reason`]; 0: none, it is about a flow.
    pub reason: u32,
    /// IP protocol number; 0: the packet could not be read.
    pub protocol: u32,
    /// The policy that denied it; 0: none did.
    pub policy: u32,
    /// Which rule of that policy; 0: its default.
    pub rule: u32,
}

/// Whether anybody reads a ring of [`super::map::EVENTS`]. Map [`super::map::MONITORS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Monitor {
    /// Events are written until then. The reader puts it off while it runs, so that nobody
    /// writes for one that was killed.
    pub until: u64,
    /// The reader's process id.
    pub process: u32,
    /// Chosen at random by the reader: tells its claims from others of the same process.
    pub token: u32,
}

/// What found no room. Map [`super::map::EVENTS_LOST`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Lost {
    /// Events.
    pub events: u64,
}

/// How many events of one sort an endpoint has caused within a second.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventBudget {
    /// When the second began.
    pub since: u64,
    /// Events told since then.
    pub told: u64,
    /// Events that were not, since the latest that was. Two processors that count at the same
    /// moment may count as one.
    pub suppressed: u64,
}

/// A refusal that was told, [`EventLimit::recent`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Recent {
    /// A hash over packet and reason.
    pub hash: u64,
    /// The latest packet of that kind.
    pub seen: u64,
}

/// Keeps the events of one endpoint within bounds. Map [`super::map::EVENT_LIMITS`], key: the
/// endpoint's number; 0: of no endpoint. Only used while somebody monitors.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct EventLimit {
    /// Of denied and dropped packets.
    pub refusals: EventBudget,
    /// Of flows.
    pub flows: EventBudget,
    /// What was told lately, each at a place that its hash chooses: a retransmission is no news.
    pub recent: [Recent; size::RECENT],
}
