//! Lets the control plane read and write the types as they are.

use super::*;

macro_rules! pod {
    ($($name:ty),+) => {
        // SAFETY: `repr(C)`, `Copy`, `'static`, made of integers and arrays of integers
        // only, so every bit pattern is valid; none has implicit padding.
        $(unsafe impl aya::Pod for $name {})+
    };
}

pod!(
    Settings,
    Network,
    Endpoint,
    Guest,
    Owner,
    PublishKey,
    Publish,
    StaticMapping,
    SnatKey,
    Snat,
    MappingCount,
    FlowKey,
    OutsideKey,
    Flow,
    Binding,
    Slot,
    Usage,
    Uplink,
    PolicyCidrKey,
    PolicyClass,
    PolicyPortKey,
    PolicyRule,
    DropKey,
    DropCount,
    Event,
    Monitor,
    Lost,
    EventLimit,
    Explained
);
