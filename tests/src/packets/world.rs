//! The packet logic on plain collections: a host without a kernel.
//!
//! Everything that the kernel decides by chance or circumstance is in the hands of the test:
//! the clock, the random numbers, the routes, the sockets, and which change of a table fails.

use std::{
    cell::{Cell, RefCell},
    collections::HashMap,
    net::{IpAddr, SocketAddr},
    ops::{Deref, DerefMut},
    rc::Rc,
    time::Duration,
};

use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Event, EventLimit, Flow, FlowKey, Mac, MappingCount, Network,
        OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish,
        PublishKey, Reason, Settings, SlotUse, Snat, SnatKey, StaticMapping, Uplink, Usage, size,
    },
    env::{Dead, Held, Host, Monitors, Route, RouteKind, Scratch, Tables},
    event, fragment, hold,
    icmp::{self, Account, Origin},
    loopback,
    packet::{Balance, Covered, Delta, Family, Fragment, Frame, Kind, Packet, Rewrite, TCP, UDP},
    path::{self, Verdict},
};
use nucnet_ctl::model::to_abi;

use super::{
    engine::{Engine, Hook, Outcome, Socket, State},
    site::{self, Via, covers, from_abi},
};

/// An entry of a table, and how often somebody looked at it.
#[derive(Debug)]
struct Entry<T: Copy> {
    value: Cell<T>,
    looks: Cell<u64>,
}

/// A value in a table, writable in place.
///
/// The kernel hands out pointers; two of them to one entry see each other's writes. Here each
/// guard has a copy, which is written back when it goes. Where that would be seen, because
/// somebody looked at the entry while it was being changed, it panics.
#[derive(Debug)]
pub struct Guard<T: Copy + PartialEq> {
    copy: T,
    before: T,
    entry: Rc<Entry<T>>,
    look: u64,
}

impl<T: Copy + PartialEq> Guard<T> {
    fn of(entry: &Rc<Entry<T>>) -> Self {
        let look = entry.looks.get() + 1;
        entry.looks.set(look);
        Self {
            copy: entry.value.get(),
            before: entry.value.get(),
            entry: Rc::clone(entry),
            look,
        }
    }
}

impl<T: Copy + PartialEq> Deref for Guard<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.copy
    }
}

impl<T: Copy + PartialEq> DerefMut for Guard<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.copy
    }
}

impl<T: Copy + PartialEq> Drop for Guard<T> {
    fn drop(&mut self) {
        if self.copy != self.before {
            self.entry.value.set(self.copy);
            if self.look != self.entry.looks.get() && !std::thread::panicking() {
                panic!("somebody looked at an entry while another changed it");
            }
        }
    }
}

type Entries<K, T> = RefCell<HashMap<K, Rc<Entry<T>>>>;

/// Adds an entry unless there is one.
fn insert<K: std::hash::Hash + Eq + Copy, T: Copy>(
    entries: &Entries<K, T>,
    key: &K,
    value: &T,
) -> bool {
    let mut entries = entries.borrow_mut();
    if entries.contains_key(key) {
        return false;
    }
    let entry = Entry {
        value: Cell::new(*value),
        looks: Cell::new(0),
    };
    entries.insert(*key, Rc::new(entry));
    true
}

fn look<K: std::hash::Hash + Eq + Copy, T: Copy + PartialEq>(
    entries: &Entries<K, T>,
    key: &K,
) -> Option<Guard<T>> {
    entries.borrow().get(key).map(Guard::of)
}

fn values<K: std::hash::Hash + Eq + Copy, T: Copy>(entries: &Entries<K, T>) -> HashMap<K, T> {
    let entries = entries.borrow();
    entries
        .iter()
        .map(|(key, entry)| (*key, entry.value.get()))
        .collect()
}

/// The notes of a journey, one set for the whole host as one processor has it.
#[derive(Debug)]
pub struct Notes {
    scratch: Scratch,
    home: Rc<Cell<Option<Scratch>>>,
}

impl Deref for Notes {
    type Target = Scratch;

    fn deref(&self) -> &Scratch {
        &self.scratch
    }
}

impl DerefMut for Notes {
    fn deref_mut(&mut self) -> &mut Scratch {
        &mut self.scratch
    }
}

impl Drop for Notes {
    fn drop(&mut self) {
        // What this journey noted is what the next one finds.
        self.home.set(Some(self.scratch));
    }
}

/// An event that is being drafted.
#[derive(Debug)]
pub struct Draft {
    event: Event,
    home: Rc<Cell<Event>>,
}

impl Deref for Draft {
    type Target = Event;

    fn deref(&self) -> &Event {
        &self.event
    }
}

impl DerefMut for Draft {
    fn deref_mut(&mut self) -> &mut Event {
        &mut self.event
    }
}

impl Drop for Draft {
    fn drop(&mut self) {
        self.home.set(self.event);
    }
}

/// A trie: length of the prefix in bits, key, value.
#[derive(Debug)]
struct Trie<K, V>(Vec<(u32, K, V)>);

impl<K, V> Default for Trie<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: PartialEq, V> Trie<K, V> {
    fn insert(&mut self, bits: u32, key: K, value: V) {
        self.0
            .retain(|(other_bits, other, _)| (*other_bits, other) != (bits, &key));
        self.0.push((bits, key, value));
    }

    /// The value of the longest prefix that covers a key.
    fn find(&self, key: &K, bytes: impl Fn(&K) -> Vec<u8>) -> Option<&V> {
        let wanted = bytes(key);
        self.0
            .iter()
            .filter(|(bits, key, _)| starts_equal(&bytes(key), &wanted, *bits))
            .max_by_key(|(bits, ..)| *bits)
            .map(|(.., value)| value)
    }
}

fn starts_equal(one: &[u8], other: &[u8], bits: u32) -> bool {
    one.iter().zip(other).enumerate().all(|(at, (one, other))| {
        let bits = bits.saturating_sub(8 * at as u32).min(8);
        let mask = !(0xff_u8.checked_shr(bits).unwrap_or(0));
        (one ^ other) & mask == 0
    })
}

fn publish_bytes(key: &PublishKey) -> Vec<u8> {
    let mut bytes = key.address.to_vec();
    bytes.extend([key.protocol, key.kind]);
    bytes.extend(key.port);
    bytes
}

fn snat_bytes(key: &SnatKey) -> Vec<u8> {
    [key.link.as_slice(), &key.source].concat()
}

fn cidr_bytes(key: &PolicyCidrKey) -> Vec<u8> {
    [key.policy.as_slice(), &key.address].concat()
}

fn port_bytes(key: &PolicyPortKey) -> Vec<u8> {
    let mut bytes = key.class.to_vec();
    bytes.extend([key.protocol, key.pad]);
    bytes.extend(key.port);
    bytes
}

/// A host without a kernel.
#[derive(Debug)]
pub struct World {
    settings: Settings,
    networks: HashMap<u32, Network>,
    endpoints: HashMap<u32, Endpoint>,
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
    draft: Rc<Cell<Event>>,
    limits: Entries<u32, EventLimit>,

    now: u64,
    random: Cell<u64>,
    drawn: Option<u32>,
    neighbours: HashMap<(u32, Address), Mac>,
    hides_sources: bool,
    mtus: HashMap<u32, u32>,
    hides_mtus: bool,
    segment: u32,
    changes: Cell<u64>,
    failing: Cell<Option<u64>>,
    writes_left: Cell<Option<u64>>,
    refused: Cell<bool>,

    frame: RefCell<Vec<u8>>,
    tag: Option<[u8; 4]>,
    ingress: u32,
    mark: Cell<u32>,
}

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
            draft: Rc::default(),
            limits: RefCell::default(),
            now: Duration::from_secs(15_768_000).as_nanos() as u64,
            random: Cell::new(1),
            drawn: None,
            neighbours: HashMap::new(),
            hides_sources: false,
            mtus: HashMap::new(),
            hides_mtus: false,
            segment: 0,
            changes: Cell::new(0),
            failing: Cell::new(None),
            writes_left: Cell::new(None),
            refused: Cell::new(false),
            frame: RefCell::default(),
            tag: None,
            ingress: 0,
            mark: Cell::new(0),
        }
    }

    /// The next change of a table but `after` fails, once: an insert finds the table full, a
    /// place changes hands.
    pub fn fail_change(&mut self, after: u64) {
        self.failing.set(Some(self.changes.get() + after));
    }

    /// Whether the failure that was asked for has yet to come; it is then called off.
    pub fn call_off_failure(&mut self) -> bool {
        self.failing.take().is_some()
    }

    /// The next write to the frame but `after` is refused, and all that follow.
    pub fn fail_write(&mut self, after: u64) {
        self.writes_left.set(Some(after));
    }

    /// Whether the refusal that was asked for has yet to come; it is then called off.
    pub fn call_off_refusal(&mut self) -> bool {
        self.writes_left.set(None);
        !self.refused.take()
    }

    fn may_write(&self) -> Result<(), Reason> {
        match self.writes_left.get() {
            Some(0) => {
                self.refused.set(true);
                Err(Reason::Helper)
            }
            left => {
                self.writes_left.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }

    fn may_change(&self) -> bool {
        let number = self.changes.get();
        self.changes.set(number + 1);
        if self.failing.get() == Some(number) {
            self.failing.set(None);
            return false;
        }
        true
    }

    /// Removes all flows and bindings that are dead, as newcomers that draw their places would.
    pub fn reclaim(&mut self) {
        let mut dead = blank().dead;
        for (key, flow) in values(&self.flows) {
            if nucnet_common::flow::is_dead(&flow, self.now) {
                nucnet_common::flow::retire_flow(self, &key, &mut dead);
            }
        }
        for (key, binding) in values(&self.bindings) {
            if nucnet_common::flow::is_unbound(&binding, self.now) {
                nucnet_common::flow::retire_binding(self, &key, &mut dead);
            }
        }
    }
}

/// Notes that make no sense to any journey.
fn blank() -> Scratch {
    let garbage = [0xee; 16];
    let key = FlowKey {
        endpoint: 0xeeee_eeee,
        protocol: 0xeeee_eeee,
        inside: garbage,
        peer: garbage,
        inside_port: 0xeeee,
        peer_port: 0xeeee,
    };
    let outside = OutsideKey {
        protocol: 0xeeee_eeee,
        external: garbage,
        peer: garbage,
        external_port: 0xeeee,
        peer_port: 0xeeee,
    };
    let held = Held {
        version: 0xeeee_eeee,
        holds: 0xeeee_eeee,
        key,
    };
    let packet = Packet {
        source: garbage,
        destination: garbage,
        source_port: 0xeeee,
        destination_port: 0xeeee,
        l3: 0xeeee,
        l4: 0xeeee,
        length: 0xeeee,
        identification: 0xeeee_eeee,
        fragment: Fragment::Later,
        family: Family::V6,
        kind: Kind::Other,
        protocol: 0xee,
        ttl: 0xee,
        flags: 0xee,
    };
    Scratch {
        packet,
        quoted: packet,
        rewrite: Rewrite::none(&packet),
        from: 0xeeee_eeee,
        fragments: fragment::Key {
            from: 0xeeee_eeee,
            identification: 0xeeee_eeee,
            source: garbage,
            destination: garbage,
            protocol: 0xeeee_eeee,
        },
        note: fragment::Note {
            seen: u64::MAX,
            flow: key,
            source_port: 0xeeee,
            destination_port: 0xeeee,
            is_inside: 0xeeee_eeee,
            pad: 0,
        },
        key,
        outside,
        found: key,
        flow: Flow {
            external: garbage,
            peer: garbage,
            next_hop: garbage,
            inside_hop: garbage,
            mapping: 0xeeee_eeee,
            flags: 0xeeee_eeee,
            macs: [0xee; 12],
            mtu: 0xeeee_eeee,
            reserved: [0xee; 8],
            ..Flow::default()
        },
        binding: Binding {
            external: garbage,
            external_port: 0xeeee,
            is_for_questions: 0xeeee,
            reserved: [0xee; 8],
            ..Binding::default()
        },
        inside: key,
        bound: outside,
        route: Route {
            kind: RouteKind::Local,
            link: 0xeeee_eeee,
            next_hop: garbage,
            source: garbage,
            macs: [0xee; 12],
            mtu: 0xeeee_eeee,
        },
        mtu: 0xeeee_eeee,
        dead: Dead {
            held,
            outside,
            named: key,
            best: 0xeeee_eeee,
        },
        policy: 0xeeee_eeee,
        rule: 0xeeee_eeee,
    }
}

impl Frame for World {
    fn length(&self) -> u32 {
        self.frame.borrow().len() as u32
    }

    fn is_tagged(&self) -> bool {
        self.tag.is_some()
    }

    fn load<const N: usize>(&self, offset: u32) -> Option<[u8; N]> {
        let start = offset as usize;
        let frame = self.frame.borrow();
        Some(frame.get(start..start + N)?.try_into().expect("N bytes"))
    }

    fn store<const N: usize>(
        &self,
        offset: u32,
        bytes: &[u8; N],
        _: Balance,
    ) -> Result<(), Reason> {
        self.may_write()?;
        let start = offset as usize;
        let mut frame = self.frame.borrow_mut();
        let place = frame.get_mut(start..start + N).ok_or(Reason::Helper)?;
        place.copy_from_slice(bytes);
        Ok(())
    }

    fn wrap(&self, l3: u32, kept: u32, room: u32) -> Result<(), Reason> {
        self.may_write()?;
        let (l3, kept) = (l3 as usize, kept as usize);
        let mut frame = self.frame.borrow_mut();
        frame.truncate(l3 + kept);
        assert_eq!(frame.len(), l3 + kept, "the frame is shorter");
        frame.splice(l3..l3, std::iter::repeat_n(0xee, room as usize));
        Ok(())
    }

    fn fix_header_checksum(&self, offset: u32, delta: Delta) -> Result<(), Reason> {
        let old: [u8; 2] = self.load(offset).ok_or(Reason::Helper)?;
        self.store(offset, &changed(old, delta), Balance::Balanced)
    }

    fn fix_checksum(&self, offset: u32, delta: Delta, covered: Covered) -> Result<(), Reason> {
        let old: [u8; 2] = self.load(offset).ok_or(Reason::Helper)?;
        // As `bpf_l4_csum_replace` with BPF_F_MARK_MANGLED_0 (bpf-helpers(7)).
        if covered.may_be_absent && old == [0, 0] {
            return Ok(());
        }
        let new = match changed(old, delta) {
            [0, 0] if covered.may_be_absent => [0xff, 0xff],
            new => new,
        };
        self.store(offset, &new, Balance::Balanced)
    }
}

/// A checksum after a change (RFC 1624, equation 3).
fn changed(old: [u8; 2], delta: Delta) -> [u8; 2] {
    let mut sum = u64::from(!u16::from_ne_bytes(old)) + u64::from(delta.folded());
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!(sum as u16)).to_ne_bytes()
}

impl Tables for World {
    type Scratch = Notes;
    type Flow = Guard<Flow>;
    type Binding = Guard<Binding>;
    type Budget = Guard<u64>;

    fn settings(&self) -> Option<&Settings> {
        Some(&self.settings)
    }

    fn network(&self, number: u32) -> Option<&Network> {
        self.networks.get(&number)
    }

    fn endpoint(&self, link: u32) -> Option<&Endpoint> {
        self.endpoints.get(&link)
    }

    fn owner(&self, address: &Address) -> Option<&Owner> {
        self.owners.get(address)
    }

    fn uplink(&self, link: u32) -> Option<&Uplink> {
        self.uplinks.get(&link)
    }

    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        self.publishes.find(key, publish_bytes)
    }

    fn hairpin(&self, key: &PublishKey) -> Option<&Publish> {
        self.hairpins.find(key, publish_bytes)
    }

    fn mapping(&self, number: u32) -> Option<&StaticMapping> {
        self.mappings.get(&number)
    }

    fn snat(&self, key: &SnatKey) -> Option<&Snat> {
        self.snats.find(key, snat_bytes)
    }

    fn count_mapped(&self, number: u32, more: &MappingCount) {
        if let Some(count) = self.mapping_counts.borrow_mut().get_mut(&number) {
            count.flows += more.flows;
            count.packets += more.packets;
            count.bytes += more.bytes;
        }
    }

    fn policy_class(&self, key: &PolicyCidrKey) -> Option<&PolicyClass> {
        self.policy_cidrs.find(key, cidr_bytes)
    }

    fn policy_rule(&self, key: &PolicyPortKey) -> Option<&PolicyRule> {
        self.policy_ports.find(key, port_bytes)
    }

    fn note(&self, key: &fragment::Key, note: &mut fragment::Note) -> bool {
        match self.fragments.borrow().get(key) {
            Some(found) => {
                *note = *found;
                true
            }
            None => false,
        }
    }

    fn set_note(&self, key: &fragment::Key, note: &fragment::Note) {
        self.fragments.borrow_mut().insert(*key, *note);
    }

    fn budget(&self, account: &Account) -> Option<Guard<u64>> {
        look(&self.budgets, account)
    }

    fn insert_budget(&self, account: &Account, used_up: u64) {
        insert(&self.budgets, account, &used_up);
    }

    fn scratch(&self) -> Option<Notes> {
        Some(Notes {
            scratch: self.notes.take().expect("one journey at a time"),
            home: Rc::clone(&self.notes),
        })
    }

    fn flow(&self, key: &FlowKey) -> Option<Guard<Flow>> {
        look(&self.flows, key)
    }

    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> bool {
        self.may_change() && insert(&self.flows, key, flow)
    }

    fn remove_flow(&self, key: &FlowKey) -> bool {
        self.flows.borrow_mut().remove(key).is_some()
    }

    fn outside(&self, key: &OutsideKey, flow: &mut FlowKey) -> bool {
        match self.outside.borrow().get(key) {
            Some(found) => {
                *flow = *found;
                true
            }
            None => false,
        }
    }

    fn insert_outside(&self, key: &OutsideKey, flow: &FlowKey) -> bool {
        if !self.may_change() || self.outside.borrow().contains_key(key) {
            return false;
        }
        self.outside.borrow_mut().insert(*key, *flow);
        true
    }

    fn remove_outside(&self, key: &OutsideKey) {
        self.outside.borrow_mut().remove(key);
    }

    fn binding(&self, key: &FlowKey) -> Option<Guard<Binding>> {
        look(&self.bindings, key)
    }

    fn insert_binding(&self, key: &FlowKey, binding: &Binding) -> bool {
        self.may_change() && insert(&self.bindings, key, binding)
    }

    fn remove_binding(&self, key: &FlowKey) -> bool {
        self.bindings.borrow_mut().remove(key).is_some()
    }

    fn slot(&self, index: u32, held: &mut Held) -> bool {
        *held = self.slots.borrow().get(&index).copied().unwrap_or_default();
        (index as usize) < size::SLOTS
    }

    fn take_slot(&self, index: u32, version: u32, holds: SlotUse, key: &FlowKey) -> bool {
        // Giving a place back fails only if somebody has taken it.
        if (index as usize) >= size::SLOTS || holds != SlotUse::Free && !self.may_change() {
            return false;
        }
        let mut slots = self.slots.borrow_mut();
        let held = slots.entry(index).or_default();
        if held.version != version {
            return false;
        }
        *held = Held {
            version: version.wrapping_add(1),
            holds: holds as u32,
            key: *key,
        };
        true
    }

    fn usage(&self, endpoint: u32) -> Option<Usage> {
        self.usage.borrow().get(&endpoint).copied()
    }

    fn count(&self, endpoint: u32, what: SlotUse, more: bool) {
        if let Some(usage) = self.usage.borrow_mut().get_mut(&endpoint) {
            let counter = match what {
                SlotUse::Binding => &mut usage.bindings,
                _ => &mut usage.flows,
            };
            *counter = if more {
                *counter + 1
            } else {
                counter
                    .checked_sub(1)
                    .expect("more were removed than there were")
            };
        }
    }
}

impl Monitors for World {
    type Draft = Draft;
    type Limit = Guard<EventLimit>;

    fn reads_until(&self, monitor: u32) -> u64 {
        if self.watched && monitor == 0 {
            u64::MAX
        } else {
            0
        }
    }

    fn draft(&self) -> Option<Draft> {
        Some(Draft {
            event: self.draft.get(),
            home: Rc::clone(&self.draft),
        })
    }

    fn limit(&self, endpoint: u32) -> Option<Guard<EventLimit>> {
        insert(&self.limits, &endpoint, &EventLimit::default());
        look(&self.limits, &endpoint)
    }

    fn tell(&self, monitor: u32, event: &Event) {
        assert_eq!(monitor, 0, "nobody else reads");
        self.events.borrow_mut().push(*event);
    }
}

impl Host for World {
    fn now(&self) -> u64 {
        self.now
    }

    fn random(&self) -> u32 {
        if let Some(number) = self.drawn {
            return number;
        }
        // SplitMix64.
        let state = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 32) as u32
    }

    fn route(&self, from: u32, _: &Address, destination: &Address, route: &mut Route) {
        // The kernel answers "forwarding is off" for any other interface.
        if site::INTERFACES
            .iter()
            .any(|interface| interface.index == from && interface.kind == site::Kind::Bridge)
        {
            find_route(from_abi(destination), route);
            if let Some(mac) = self.neighbours.get(&(route.link, route.next_hop)) {
                route.macs[..6].copy_from_slice(mac);
                route.macs[6..].copy_from_slice(&site::interface(route.link).mac);
            }
            if route.kind == RouteKind::Link {
                route.mtu = self.mtus.get(&route.link).copied().unwrap_or(1500);
            }
            if self.hides_sources {
                route.source = [0; 16];
            }
            if self.hides_mtus {
                route.mtu = 0;
            }
        } else {
            route.kind = RouteKind::None;
        }
    }

    fn has_socket(&self, key: &OutsideKey) -> bool {
        let local = SocketAddr::new(from_abi(&key.external), key.external_port);
        let peer = SocketAddr::new(from_abi(&key.peer), key.peer_port);
        self.sockets.iter().any(|socket| match *socket {
            Socket::Listener(at) => key.protocol == u32::from(TCP) && is_bound_to(at, local),
            Socket::Udp(at) => key.protocol == u32::from(UDP) && is_bound_to(at, local),
            Socket::UdpTo(at, to) => {
                key.protocol == u32::from(UDP) && is_bound_to(at, local) && to == peer
            }
        })
    }

    fn segment(&self) -> u32 {
        self.segment
    }

    fn ingress(&self) -> u32 {
        self.ingress
    }

    fn mark(&self) -> u32 {
        self.mark.get()
    }

    fn set_mark(&self, mark: u32) {
        self.mark.set(mark);
    }
}

fn is_bound_to(at: SocketAddr, local: SocketAddr) -> bool {
    at.port() == local.port()
        && at.is_ipv4() == local.is_ipv4()
        && (at.ip() == local.ip() || at.ip().is_unspecified())
}

/// What the kernel's longest prefix match over the site's routes gives.
fn find_route(destination: IpAddr, route: &mut Route) {
    let link = |link: u32, next_hop: IpAddr| {
        let addresses = site::interface(link).addresses.iter();
        let source = addresses
            .map(|(address, _)| *address)
            .find(|address| address.is_ipv4() == destination.is_ipv4());
        Route {
            kind: RouteKind::Link,
            link,
            next_hop: to_abi(next_hop),
            source: source.map_or([0; 16], to_abi),
            macs: [0; 12],
            mtu: 0,
        }
    };
    let nowhere = |kind| Route {
        kind,
        link: 0,
        next_hop: [0; 16],
        source: [0; 16],
        macs: [0; 12],
        mtu: 0,
    };
    let mut longest: Option<(u8, Route)> = None;
    let mut offer = |length: u8, found: Route| {
        if longest.is_none_or(|(known, _)| length > known) {
            longest = Some((length, found));
        }
    };
    if destination.is_loopback() {
        offer(128, nowhere(RouteKind::Local));
    }
    for interface in site::INTERFACES {
        for (address, length) in interface.addresses {
            if is_own(*address, *length, destination) {
                offer(128, nowhere(RouteKind::Local));
            } else if covers((*address, *length), destination) {
                offer(*length, link(interface.index, destination));
            }
        }
    }
    for (prefix, length, via) in site::ROUTES {
        if covers((*prefix, *length), destination) {
            let found = match via {
                Via::Gateway(gateway, index) => link(*index, *gateway),
                Via::Unreachable => nowhere(RouteKind::None),
            };
            offer(*length, found);
        }
    }
    *route = longest.map_or(nowhere(RouteKind::None), |(_, found)| found);
}

/// Whether a destination is a host's address, or the broadcast address that comes with it.
fn is_own(address: IpAddr, length: u8, destination: IpAddr) -> bool {
    let broadcast = match address {
        IpAddr::V4(v4) => {
            let host_bits = u32::MAX.checked_shr(length.into()).unwrap_or(0);
            Some(IpAddr::V4((v4.to_bits() | host_bits).into()))
        }
        IpAddr::V6(_) => None,
    };
    destination == address || Some(destination) == broadcast
}

/// A socket that is about to be bound.
struct Caller<'w> {
    world: &'w World,
    netns_cookie: u64,
    mark: u32,
}

impl hold::Socket for Caller<'_> {
    fn settings(&self) -> Option<&Settings> {
        Some(&self.world.settings)
    }

    fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    fn mark(&self) -> u32 {
        self.mark
    }

    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        Tables::publish(self.world, key)
    }
}

impl Engine for World {
    fn settings(&mut self, settings: &Settings) {
        self.settings = *settings;
    }

    fn network(&mut self, number: u32, network: &Network) {
        self.networks.insert(number, *network);
    }

    fn endpoint(&mut self, link: u32, endpoint: Option<&Endpoint>) {
        match endpoint {
            Some(endpoint) => self.endpoints.insert(link, *endpoint),
            None => self.endpoints.remove(&link),
        };
    }

    fn owner(&mut self, address: &Address, owner: &Owner) {
        self.owners.insert(*address, *owner);
    }

    fn uplink(&mut self, link: u32, uplink: Option<&Uplink>) {
        match uplink {
            Some(uplink) => self.uplinks.insert(link, *uplink),
            None => self.uplinks.remove(&link),
        };
    }

    fn usage(&mut self, endpoint: u32, usage: &Usage) {
        self.usage.get_mut().insert(endpoint, *usage);
    }

    fn publish(&mut self, bits: u32, key: &PublishKey, publish: &Publish) {
        self.publishes.insert(bits, *key, *publish);
    }

    fn hairpin(&mut self, bits: u32, key: &PublishKey, publish: &Publish) {
        self.hairpins.insert(bits, *key, *publish);
    }

    fn mapping(&mut self, number: u32, mapping: &StaticMapping) {
        self.mappings.insert(number, *mapping);
    }

    fn snat(&mut self, bits: u32, key: &SnatKey, snat: &Snat) {
        self.snats.insert(bits, *key, *snat);
    }

    fn policy_class(&mut self, bits: u32, key: &PolicyCidrKey, class: &PolicyClass) {
        self.policy_cidrs.insert(bits, *key, *class);
    }

    fn policy_rule(&mut self, bits: u32, key: &PolicyPortKey, rule: &PolicyRule) {
        self.policy_ports.insert(bits, *key, *rule);
    }

    fn socket(&mut self, socket: Socket) {
        self.sockets.push(socket);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time.as_nanos() as u64;
    }

    fn neighbour(&mut self, link: u32, address: IpAddr, mac: Mac) {
        self.neighbours.insert((link, to_abi(address)), mac);
    }

    fn hide_sources(&mut self) {
        self.hides_sources = true;
    }

    fn mtu(&mut self, link: u32, bytes: u32) {
        self.mtus.insert(link, bytes);
    }

    fn hide_mtus(&mut self) {
        self.hides_mtus = true;
    }

    fn segment(&mut self, bytes: u32) {
        self.segment = bytes;
    }

    fn may_bind(&self, is_hosts: bool, mark: u32, protocol: u8, at: SocketAddr) -> bool {
        let caller = Caller {
            world: self,
            netns_cookie: u64::from(!is_hosts) + site::SETTINGS.netns_cookie,
            mark,
        };
        !hold::is_published(&caller, &to_abi(at.ip()), at.port(), protocol)
    }

    fn draw(&mut self, number: u32) {
        self.drawn = Some(number);
    }

    fn shortest_frame(&self, _: u16) -> usize {
        0
    }

    /// What `nucnet-ebpf`'s entry points do around the logic: which journey it is, and that an
    /// uplink's frames for others are left alone.
    fn run(&mut self, hook: Hook, frame: &[u8]) -> (Outcome, Vec<u8>) {
        *self.frame.get_mut() = frame.to_vec();
        self.ingress = 0;
        self.mark.set(0);
        self.tag = None;
        // The kernel takes tags out of frames before any program sees them.
        if let Some(&[0x81, 0x00, high, low]) = frame.get(12..16) {
            self.tag = Some([0x81, 0x00, high, low]);
            self.frame.get_mut().drain(12..16);
        }
        let ethertype = self
            .load(12)
            .map_or(0, |bytes: [u8; 2]| u16::from_be_bytes(bytes));
        let verdict = match hook {
            Hook::FromEndpoint { link } => path::from_endpoint(self, link),
            Hook::FromUplink { link } => {
                if frame.get(..6) == Some(&site::interface(link).mac) {
                    path::from_uplink(self, link, 14, ethertype)
                } else {
                    Ok(path::Way::Pass)
                }
            }
            Hook::FromUplinkL3 { link } => {
                let ethertype = match frame.first().map(|first| first >> 4) {
                    Some(6) => 0x86dd,
                    _ => 0x0800,
                };
                self.headerless(link, ethertype)
            }
            Hook::FromHost { ingress, .. } => {
                self.ingress = ingress;
                path::from_host(self, ethertype)
            }
            Hook::FromLoopback { ingress, mark } => {
                self.ingress = ingress;
                self.mark.set(mark);
                let link = loopback::from_loopback(self, site::LOOPBACK, ethertype);
                link.map(|link| link.map_or(path::Way::Pass, |link| path::Way::Link { link }))
            }
        };
        let outcome = match verdict {
            Ok(path::Way::Pass) => Outcome::Passed,
            Ok(way) => Outcome::Redirected(Some(way)),
            Err(drop) => {
                let header = match hook {
                    Hook::FromUplinkL3 { .. } => 0,
                    _ => 14,
                };
                event::refused(self, &drop, header, ethertype);
                let path::Drop { endpoint, reason } = drop;
                let answer = match hook {
                    Hook::FromEndpoint { link } => Some((Origin::Endpoint, link)),
                    Hook::FromUplink { link } | Hook::FromUplinkL3 { link } => {
                        Some((Origin::Uplink, link))
                    }
                    Hook::FromHost { link, .. } => Some((Origin::Host, link)),
                    Hook::FromLoopback { .. } => None,
                };
                match answer.and_then(|(origin, link)| icmp::answer(self, origin, link, &drop)) {
                    Some(link) => Outcome::Refused {
                        endpoint,
                        reason,
                        link: Some(link),
                    },
                    None => Outcome::Dropped { endpoint, reason },
                }
            }
        };
        let mut frame = std::mem::take(self.frame.get_mut());
        if let Some(tag) = self.tag {
            frame.splice(12..12, tag);
        }
        (outcome, frame)
    }

    fn watch(&mut self) {
        self.watched = true;
    }

    fn events(&mut self) -> Vec<Event> {
        std::mem::take(self.events.get_mut())
    }

    fn state(&self) -> State {
        let slots = self.slots.borrow();
        State {
            flows: values(&self.flows),
            outside: self.outside.borrow().clone(),
            bindings: values(&self.bindings),
            slots: slots
                .iter()
                .filter(|(_, held)| held.holds != SlotUse::Free as u32)
                .map(|(index, held)| (*index, *held))
                .collect(),
            usage: self.usage.borrow().clone(),
        }
    }
}

impl World {
    fn headerless(&mut self, link: u32, ethertype: u16) -> Verdict {
        let verdict = path::from_uplink(self, link, 0, ethertype);
        if let Ok(path::Way::Peer { .. } | path::Way::Link { .. }) = verdict {
            self.frame.get_mut().splice(0..0, [0; 14]);
            path::add_header(self, verdict, ethertype).expect("room for a header");
        }
        verdict
    }
}
