//! Places of flows and bindings, which the map calls `slots`. The slots of microVMs are something
//! else: network namespaces.

use super::FlowKey;

/// The kernel's `struct bpf_spin_lock`, which it finds in a map value by this name.
#[repr(C)]
#[allow(non_camel_case_types)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct bpf_spin_lock {
    /// The kernel's.
    pub val: u32,
}

/// What takes a place.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SlotUse {
    /// Nothing.
    Free = 0,
    /// A flow.
    Flow = 1,
    /// A binding.
    Binding = 2,
}

/// A place that a flow or binding must take before it exists. A newcomer looks at a few places
/// drawn at random and takes one that is free or whose holder is dead, so that dead entries
/// are reclaimed in the packet path and live ones never. Map [`super::map::SLOTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Slot {
    /// Guards the rest.
    pub lock: bpf_spin_lock,
    /// Rises each time that the place changes hands.
    pub version: u32,
    /// [`SlotUse`].
    pub holds: u32,
    /// The holder.
    pub key: FlowKey,
}
