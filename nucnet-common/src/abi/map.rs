//! Names of maps as pinned under `BPFFS/maps/`, equal to the names in the object.

/// `Settings`, one entry.
pub const SETTINGS: &str = "settings";
/// Network number (`u32`) to [`super::Network`].
pub const NETWORKS: &str = "networks";
/// Interface index (`u32`) to [`super::Endpoint`].
pub const ENDPOINTS: &str = "endpoints";
/// Interface index (`u32`) to [`super::Guest`].
pub const GUESTS: &str = "guests";
/// [`super::Address`] to [`super::Owner`].
pub const ADDRESSES: &str = "addresses";
/// [`super::PublishKey`] (trie) to [`super::Publish`].
pub const PUBLISHES: &str = "publishes";
/// The same for hairpins, whose sources are limited.
pub const HAIRPINS: &str = "hairpins";
/// Number of a mapping (`u32`) to [`super::StaticMapping`].
pub const MAPPINGS: &str = "mappings";
/// [`super::SnatKey`] (trie) to [`super::Snat`].
pub const SNATS: &str = "snats";
/// Number of a mapping (`u32`) to [`super::MappingCount`], per CPU.
pub const MAPPING_COUNTS: &str = "mapping_counts";
/// [`super::FlowKey`] to [`super::Flow`].
pub const FLOWS: &str = "flows";
/// [`super::OutsideKey`] to [`super::FlowKey`].
pub const OUTSIDE: &str = "outside";
/// [`super::FlowKey`] without a peer to [`super::Binding`].
pub const BINDINGS: &str = "bindings";
/// [`super::Slot`] array: who takes which place in the tables of flows and bindings. It has
/// nothing to do with the slots of microVMs.
pub const SLOTS: &str = "slots";
/// Endpoint number (`u32`) to [`super::Usage`].
pub const USAGE: &str = "usage";
/// Interface index (`u32`) to [`super::Uplink`].
pub const UPLINKS: &str = "uplinks";
/// [`super::DropKey`] to [`super::DropCount`], per CPU.
pub const DROPS: &str = "drops";
/// [`super::PolicyCidrKey`] (trie) to [`super::PolicyClass`].
pub const POLICY_CIDRS: &str = "policy_cidrs";
/// [`super::PolicyPortKey`] (trie) to [`super::PolicyRule`].
pub const POLICY_PORTS: &str = "policy_ports";
/// Ring buffer of lines that aya-log makes, for the monitor that debugs.
pub const LOG: &str = "AYA_LOGS";
/// Ring buffers of [`super::Event`], one for each monitor.
pub const EVENTS: [&str; super::size::MONITORS] = ["events0", "events1", "events2", "events3"];
/// [`super::Monitor`] array: which of them somebody reads.
pub const MONITORS: &str = "monitors";
/// [`super::Lost`] array: what did not fit into which.
pub const EVENTS_LOST: &str = "events_lost";
/// Endpoint number (`u32`) to [`super::EventLimit`].
pub const EVENT_LIMITS: &str = "event_limits";

/// Every map, in the order of the object.
pub const ALL: [&str; 27] = [
    SETTINGS,
    NETWORKS,
    ENDPOINTS,
    GUESTS,
    ADDRESSES,
    PUBLISHES,
    HAIRPINS,
    MAPPINGS,
    SNATS,
    MAPPING_COUNTS,
    FLOWS,
    OUTSIDE,
    BINDINGS,
    SLOTS,
    USAGE,
    UPLINKS,
    DROPS,
    POLICY_CIDRS,
    POLICY_PORTS,
    EVENTS[0],
    EVENTS[1],
    EVENTS[2],
    EVENTS[3],
    MONITORS,
    EVENTS_LOST,
    EVENT_LIMITS,
    LOG,
];
