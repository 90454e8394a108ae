//! The packet logic on plain collections: a host without a kernel.
//!
//! Everything that the kernel decides by chance or circumstance is in the hands of the test:
//! the clock, the random numbers, the routes, the sockets, and which change of a table fails.

mod drive;
mod entry;
mod failure;
mod frame;
mod host;
mod notes;
mod tables;
mod trie;

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    rc::Rc,
    time::Duration,
};

use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Event, EventLimit, Flow, FlowKey, Guest, Mac, MappingCount,
        Network, OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish,
        PublishKey, Settings, SlotUse, Snat, SnatKey, StaticMapping, Uplink, Usage,
    },
    answer::Account,
    env::{Held, Scratch},
    flow, fragment, place,
    step::Steps,
};

use super::engine::Socket;
use entry::{Entries, values};
use notes::blank;
use trie::Trie;

/// A host without a kernel.
#[derive(Debug)]
pub struct World {
    settings: Settings,
    networks: HashMap<u32, Network>,
    endpoints: HashMap<u32, Endpoint>,
    guests: HashMap<u32, Guest>,
    owners: HashMap<Address, Owner>,
    uplinks: HashMap<u32, Uplink>,
    publishes: Trie<PublishKey, Publish>,
    hairpins: Trie<PublishKey, Publish>,
    mappings: HashMap<u32, StaticMapping>,
    snats: Trie<SnatKey, Snat>,
    mapping_counts: RefCell<HashMap<u32, MappingCount>>,
    policy_cidrs: Trie<PolicyCidrKey, PolicyClass>,
    policy_ports: Trie<PolicyPortKey, PolicyRule>,
    sockets: Vec<Socket>,

    flows: Entries<FlowKey, Flow>,
    bindings: Entries<FlowKey, Binding>,
    outside: RefCell<HashMap<OutsideKey, FlowKey>>,
    slots: RefCell<HashMap<u32, Held>>,
    usage: RefCell<HashMap<u32, Usage>>,
    budgets: Entries<Account, u64>,
    fragments: RefCell<HashMap<fragment::Key, fragment::Note>>,
    notes: Rc<Cell<Option<Scratch>>>,

    watched: bool,
    events: RefCell<Vec<Event>>,
    draft: Rc<Cell<Option<Event>>>,
    limits: Entries<u32, EventLimit>,

    now: u64,
    random: Cell<u64>,
    draws: Cell<u32>,
    drawn: Option<u32>,
    neighbours: HashMap<(u32, Address), Mac>,
    hides_sources: bool,
    mtus: HashMap<u32, u32>,
    hides_mtus: bool,
    segment: u32,
    changes: Cell<u64>,
    failing: Cell<Option<u64>>,
    ports_lost: Cell<u32>,
    places_lost: Cell<u32>,
    writes_left: Cell<Option<u64>>,
    refused: Cell<bool>,

    frame: RefCell<Vec<u8>>,
    tag: Option<[u8; 4]>,
    ingress: u32,
    mark: Cell<u32>,
}

impl Steps for World {}

impl Default for World {
    fn default() -> Self {
        Self::new()
    }
}

impl World {
    /// A host with empty tables, half a year after its boot.
    pub fn new() -> Self {
        Self {
            settings: Settings::default(),
            networks: HashMap::new(),
            endpoints: HashMap::new(),
            guests: HashMap::new(),
            owners: HashMap::new(),
            uplinks: HashMap::new(),
            publishes: Trie::default(),
            hairpins: Trie::default(),
            mappings: HashMap::new(),
            snats: Trie::default(),
            mapping_counts: RefCell::default(),
            policy_cidrs: Trie::default(),
            policy_ports: Trie::default(),
            sockets: Vec::new(),
            flows: RefCell::default(),
            bindings: RefCell::default(),
            outside: RefCell::default(),
            slots: RefCell::default(),
            usage: RefCell::default(),
            budgets: RefCell::default(),
            fragments: RefCell::default(),
            notes: Rc::new(Cell::new(Some(blank()))),
            watched: false,
            events: RefCell::default(),
            draft: Rc::new(Cell::new(Some(Event::default()))),
            limits: RefCell::default(),
            now: Duration::from_secs(15_768_000).as_nanos() as u64,
            random: Cell::new(1),
            draws: Cell::new(0),
            drawn: None,
            neighbours: HashMap::new(),
            hides_sources: false,
            mtus: HashMap::new(),
            hides_mtus: false,
            segment: 0,
            changes: Cell::new(0),
            failing: Cell::new(None),
            ports_lost: Cell::new(0),
            places_lost: Cell::new(0),
            writes_left: Cell::new(None),
            refused: Cell::new(false),
            frame: RefCell::default(),
            tag: None,
            ingress: 0,
            mark: Cell::new(0),
        }
    }

    /// How many random numbers were asked for.
    pub fn draws(&self) -> u32 {
        self.draws.get()
    }

    /// Removes all flows and bindings that are dead, as newcomers that draw their places would.
    pub fn reclaim(&mut self) {
        let mut dead = blank().dead;
        for (key, found) in values(&self.flows) {
            if flow::is_dead(&found, self.now) {
                place::retire(self, SlotUse::Flow, &key, &mut dead);
            }
        }
        for (key, binding) in values(&self.bindings) {
            if flow::is_unbound(&binding, self.now) {
                place::retire(self, SlotUse::Binding, &key, &mut dead);
            }
        }
    }
}
