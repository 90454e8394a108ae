//! The maps. Layout and meaning: `nucnet_common::abi`.
//!
//! Every map is defined in BTF, so that `bpftool map dump` prints named fields. None is
//! preallocated unless its kind always is: an idle host pays for what it uses.

use aya_ebpf::{
    bindings::{BPF_F_NO_PREALLOC, bpf_sock_tuple},
    btf_maps::{Array, HashMap, LpmTrie, LruHashMap, PerCpuArray, PerCpuHashMap, RingBuf},
    macros::btf_map,
};
use nucnet_common::{
    abi::{
        Address, Binding, DropCount, DropKey, Endpoint, Event, EventLimit, Flow, FlowKey, Guest,
        Lost, MappingCount, Monitor, Network, OutsideKey, Owner, PolicyCidrKey, PolicyClass,
        PolicyPortKey, PolicyRule, Publish, PublishKey, Settings, Slot, Snat, SnatKey,
        StaticMapping, Uplink, Usage, size,
    },
    answer::Account,
    env::{Route, Scratch},
    fragment,
};

const ON_DEMAND: usize = BPF_F_NO_PREALLOC as usize;

#[btf_map(name = "settings")]
pub static SETTINGS: Array<Settings, 1> = Array::new();
#[btf_map(name = "networks")]
pub static NETWORKS: HashMap<u32, Network, { size::NETWORKS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "endpoints")]
pub static ENDPOINTS: HashMap<u32, Endpoint, { size::ENDPOINTS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "guests")]
pub static GUESTS: HashMap<u32, Guest, { size::GUESTS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "addresses")]
pub static ADDRESSES: HashMap<Address, Owner, { size::ADDRESSES }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "publishes")]
pub static PUBLISHES: LpmTrie<PublishKey, Publish, { size::PUBLISHES }> = LpmTrie::new();
#[btf_map(name = "hairpins")]
pub static HAIRPINS: LpmTrie<PublishKey, Publish, { size::PUBLISHES }> = LpmTrie::new();
#[btf_map(name = "mappings")]
pub static MAPPINGS: HashMap<u32, StaticMapping, { size::MAPPINGS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "snats")]
pub static SNATS: LpmTrie<SnatKey, Snat, { size::SNATS }> = LpmTrie::new();
#[btf_map(name = "mapping_counts")]
pub static MAPPING_COUNTS: PerCpuHashMap<u32, MappingCount, { size::MAPPINGS }, ON_DEMAND> =
    PerCpuHashMap::new();
#[btf_map(name = "flows")]
pub static FLOWS: HashMap<FlowKey, Flow, { size::FLOWS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "outside")]
pub static OUTSIDE: HashMap<OutsideKey, FlowKey, { size::OUTSIDE }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "bindings")]
pub static BINDINGS: HashMap<FlowKey, Binding, { size::BINDINGS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "slots")]
pub static SLOTS: Array<Slot, { size::SLOTS }> = Array::new();
#[btf_map(name = "usage")]
pub static USAGE: HashMap<u32, Usage, { size::ENDPOINTS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "uplinks")]
pub static UPLINKS: HashMap<u32, Uplink, { size::UPLINKS }, ON_DEMAND> = HashMap::new();
#[btf_map(name = "drops")]
pub static DROPS: PerCpuHashMap<DropKey, DropCount, { size::DROPS }, ON_DEMAND> =
    PerCpuHashMap::new();
#[btf_map(name = "policy_cidrs")]
pub static POLICY_CIDRS: LpmTrie<PolicyCidrKey, PolicyClass, { size::POLICY_CIDRS }> =
    LpmTrie::new();
#[btf_map(name = "policy_ports")]
pub static POLICY_PORTS: LpmTrie<PolicyPortKey, PolicyRule, { size::POLICY_PORTS }> =
    LpmTrie::new();

// Of values without a size: to libbpf, and so to bpftool, a ring buffer has none.
#[btf_map(name = "events0")]
pub static EVENTS_0: RingBuf<(), { size::EVENTS }> = RingBuf::new();
#[btf_map(name = "events1")]
pub static EVENTS_1: RingBuf<(), { size::EVENTS }> = RingBuf::new();
#[btf_map(name = "events2")]
pub static EVENTS_2: RingBuf<(), { size::EVENTS }> = RingBuf::new();
#[btf_map(name = "events3")]
pub static EVENTS_3: RingBuf<(), { size::EVENTS }> = RingBuf::new();
/// Of the name by which `aya-log` finds it.
#[btf_map(name = "AYA_LOGS")]
pub static LOG: RingBuf<(), { size::LOG }> = RingBuf::new();
#[btf_map(name = "monitors")]
pub static MONITORS: Array<Monitor, { size::READERS }> = Array::new();
#[btf_map(name = "events_lost")]
pub static EVENTS_LOST: Array<Lost, { size::MONITORS }> = Array::new();
#[btf_map(name = "event_limits")]
pub static EVENT_LIMITS: HashMap<u32, EventLimit, { size::ENDPOINTS }, ON_DEMAND> = HashMap::new();

/// An event that is being drafted. Not part of the ABI.
#[btf_map(name = "draft")]
pub static DRAFT: PerCpuArray<Event, 1> = PerCpuArray::new();
/// What a new entry of `event_limits` is made from: too large for the stack. Not part of the ABI.
#[btf_map(name = "no_limit")]
pub static NO_LIMIT: Array<EventLimit, 1> = Array::new();
/// The notes of a journey. Not part of the ABI.
#[btf_map(name = "scratch")]
pub static SCRATCH: PerCpuArray<Scratch, 1> = PerCpuArray::new();

/// Where first fragments went. Not part of the ABI.
#[btf_map(name = "fragments")]
pub static FRAGMENTS: LruHashMap<fragment::Key, fragment::Note, 8192> = LruHashMap::new();
/// What a function of `step` is asked, and answers, that a number cannot say.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct Question {
    /// What the kernel's routes are asked: a `struct bpf_fib_lookup`, too large for the stack.
    pub params: [u64; 8],
    /// The source of a packet whose route is asked for.
    pub source: Address,
    /// Its destination.
    pub destination: Address,
    /// Its route.
    pub route: Route,
    /// An external view.
    pub key: OutsideKey,
    /// How the kernel is asked for a socket.
    pub tuple: bpf_sock_tuple,
}
/// Not part of the ABI.
#[btf_map(name = "question")]
pub static QUESTION: PerCpuArray<Question, 1> = PerCpuArray::new();

/// Bytes of a packet that an error about it quotes at most.
pub const QUOTED: usize = 1280;
/// Where they are while the frame is made over. Not part of the ABI.
#[btf_map(name = "quote")]
pub static QUOTE: PerCpuArray<[u8; QUOTED], 1> = PerCpuArray::new();
/// When whose errors are used up. Those that are forgotten first have long been full again. Not
/// part of the ABI.
#[btf_map(name = "budgets")]
pub static BUDGETS: LruHashMap<Account, u64, 4096> = LruHashMap::new();
