//! The loaded programs, run by `BPF_PROG_TEST_RUN` in a network namespace that is the site.
//!
//! A test run takes a frame as received by an interface and gives back the frame and the
//! program's return code; where a redirect leads it does not say. Where the kernel can, it is
//! told that the frame's sum is known (`CHECKSUM_COMPLETE`), and checks afterwards that the
//! programs kept its books.

mod drive;
mod namespace;
mod table;
mod test_run;

pub use namespace::{enter_bpffs, enter_site};
pub use test_run::Runner;

use std::{
    any::Any,
    collections::{BTreeMap, HashSet},
    fmt,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf,
    maps::{Array, MapData, MapError, PerCpuHashMap, RingBuf},
    programs::{SchedClassifier, TcAttachType},
};
use nucnet_common::abi::{
    Address, Binding, DropCount, DropKey, Endpoint, EventLimit, Flow, FlowKey, Guest, Lost,
    Monitor, Network, OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule,
    Publish, PublishKey, Reason, Settings, Slot, SlotUse, Snat, SnatKey, StaticMapping, Uplink,
    Usage, map, size,
};
use nucnet_ctl::kernel::bpf::load_unpinned;

use super::{
    engine::{Engine as _, Outcome},
    site::Party,
};
use namespace::ip_batch;
use table::{Prefixes, Table, clear, entries, keys, set};

/// The programs, loaded, in the namespace of the calling thread.
pub struct Loaded {
    object: Ebpf,
    settings: Array<MapData, Settings>,
    networks: Table<u32, Network>,
    endpoints: Table<u32, Endpoint>,
    guests: Table<u32, Guest>,
    owners: Table<Address, Owner>,
    publishes: Prefixes<PublishKey, Publish>,
    hairpins: Prefixes<PublishKey, Publish>,
    mappings: Table<u32, StaticMapping>,
    snats: Prefixes<SnatKey, Snat>,
    flows: Table<FlowKey, Flow>,
    outside: Table<OutsideKey, FlowKey>,
    bindings: Table<FlowKey, Binding>,
    slots: Array<MapData, Slot>,
    usage: Table<u32, Usage>,
    uplinks: Table<u32, Uplink>,
    drops: PerCpuHashMap<MapData, DropKey, DropCount>,
    /// No part of the ABI: whose errors are used up.
    budgets: Table<[u32; 2], u64>,
    /// No part of the ABI either: where first fragments went, the time first.
    fragments: Table<[u32; 11], [u64; 8]>,
    policy_cidrs: Prefixes<PolicyCidrKey, PolicyClass>,
    policy_ports: Prefixes<PolicyPortKey, PolicyRule>,
    monitors: Array<MapData, Monitor>,
    events: RingBuf<MapData>,
    lost: Array<MapData, Lost>,
    /// Lines for who debugs the programs.
    log: RingBuf<MapData>,
    limits: Table<u32, EventLimit>,
    /// Sockets of the host, which only have to be open.
    sockets: Vec<Box<dyn Any + Send>>,
    /// Commands that make the host forget its neighbours.
    neighbours: HashSet<String>,
    /// Interfaces with another maximum transmission unit than 1500.
    shrunk: HashSet<&'static str>,
    /// Payload of the segments that frames are trains of.
    segment: u32,
    /// Whether the kernel can pretend to know the sums of frames.
    knows_sums: bool,
    /// Whether it can pretend that a frame came in by an interface (5.10 cannot).
    knows_ingress: bool,
    /// Why what was asked of the programs says nothing about them here.
    unfit: Option<&'static str>,
}

impl Loaded {
    /// Loads the programs that `nucnet-ctl` embeds, with tables of their own.
    ///
    /// # Errors
    /// Those of the kernel and its verifier.
    pub fn new() -> Result<Self> {
        Self::of(load_unpinned()?)
    }

    /// The same with the tables pinned in a directory, where other programs find them.
    ///
    /// # Errors
    /// As above, and those of pinning.
    pub fn pinned(directory: &Path) -> Result<Self> {
        let object = load_unpinned()?;
        for name in map::ALL {
            let map = object.map(name);
            let map = map.with_context(|| format!("the object has no map {name}"))?;
            map.pin(directory.join(name))?;
        }
        Self::of(object)
    }

    fn of(mut object: Ebpf) -> Result<Self> {
        let mut take = |name: &str| {
            let map = object.take_map(name);
            map.with_context(|| format!("the object has no map {name}"))
        };
        let mut loaded = Self {
            settings: take(map::SETTINGS)?.try_into()?,
            networks: take(map::NETWORKS)?.try_into()?,
            endpoints: take(map::ENDPOINTS)?.try_into()?,
            guests: take(map::GUESTS)?.try_into()?,
            owners: take(map::ADDRESSES)?.try_into()?,
            publishes: take(map::PUBLISHES)?.try_into()?,
            hairpins: take(map::HAIRPINS)?.try_into()?,
            mappings: take(map::MAPPINGS)?.try_into()?,
            snats: take(map::SNATS)?.try_into()?,
            flows: take(map::FLOWS)?.try_into()?,
            outside: take(map::OUTSIDE)?.try_into()?,
            bindings: take(map::BINDINGS)?.try_into()?,
            slots: take(map::SLOTS)?.try_into()?,
            usage: take(map::USAGE)?.try_into()?,
            uplinks: take(map::UPLINKS)?.try_into()?,
            drops: take(map::DROPS)?.try_into()?,
            budgets: take("budgets")?.try_into()?,
            fragments: take("fragments")?.try_into()?,
            policy_cidrs: take(map::POLICY_CIDRS)?.try_into()?,
            policy_ports: take(map::POLICY_PORTS)?.try_into()?,
            monitors: take(map::MONITORS)?.try_into()?,
            events: take(map::EVENTS[0])?.try_into()?,
            lost: take(map::EVENTS_LOST)?.try_into()?,
            log: take(map::LOG)?.try_into()?,
            limits: take(map::EVENT_LIMITS)?.try_into()?,
            object,
            sockets: Vec::new(),
            neighbours: HashSet::new(),
            shrunk: HashSet::new(),
            segment: 0,
            knows_sums: true,
            knows_ingress: true,
            unfit: None,
        };
        loaded.knows_sums = loaded.probe_sums()?;
        loaded.knows_ingress = loaded.probe_ingress()?;
        Ok(loaded)
    }

    /// Empties all tables and closes all sockets.
    pub fn reset(&mut self) {
        self.sockets.clear();
        self.segment = 0;
        if !self.shrunk.is_empty() {
            let shrunk = self.shrunk.drain();
            let commands: Vec<String> = shrunk
                .map(|name| format!("link set {name} mtu 1500"))
                .collect();
            ip_batch(&commands).expect("mtu");
        }
        self.unfit = None;
        if !self.neighbours.is_empty() {
            let commands: Vec<String> = self.neighbours.drain().collect();
            ip_batch(&commands).expect("neighbours");
        }
        for key in keys(&self.flows) {
            let slot = self.flows.get(&key, 0).expect("flow").slot;
            self.free(slot);
            self.flows.remove(&key).expect("remove");
        }
        for key in keys(&self.bindings) {
            let slot = self.bindings.get(&key, 0).expect("binding").slot;
            self.free(slot);
            self.bindings.remove(&key).expect("remove");
        }
        clear(&mut self.outside);
        clear(&mut self.fragments);
        clear(&mut self.budgets);
        clear(&mut self.usage);
        clear(&mut self.networks);
        clear(&mut self.endpoints);
        clear(&mut self.guests);
        clear(&mut self.owners);
        clear(&mut self.uplinks);
        self.publishes.clear();
        self.hairpins.clear();
        self.snats.clear();
        clear(&mut self.mappings);
        self.policy_cidrs.clear();
        self.policy_ports.clear();
        self.forget_drops();
        for reader in 0..size::READERS as u32 {
            self.monitors
                .set(reader, Monitor::default(), 0)
                .expect("set");
        }
        self.events();
        self.log_lines();
        clear(&mut self.limits);
    }

    /// Lets every endpoint cause events again, as after a while.
    pub fn forget_limits(&mut self) {
        for endpoint in keys(&self.limits) {
            set(&mut self.limits, endpoint, Some(&EventLimit::default()));
        }
    }

    /// A flow, if there is one.
    pub fn flow(&self, key: &FlowKey) -> Option<Flow> {
        match self.flows.get(key, 0) {
            Ok(flow) => Some(flow),
            Err(MapError::KeyNotFound) => None,
            Err(error) => panic!("flow: {error}"),
        }
    }

    /// How many events have found no room since the programs were loaded.
    pub fn lost_events(&self) -> u64 {
        self.lost.get(&0, 0).expect("lost").events
    }

    /// Somebody debugs the programs from now on.
    pub fn debug(&mut self) {
        let always = Monitor {
            until: u64::MAX,
            ..Monitor::default()
        };
        let reader = size::MONITORS as u32;
        self.monitors.set(reader, always, 0).expect("set");
    }

    /// How many lines there are for who debugs; they are gone then.
    pub fn log_lines(&mut self) -> usize {
        let mut lines = 0;
        while self.log.next().is_some() {
            lines += 1;
        }
        lines
    }

    /// All that packets change, but the places: whoever takes one has an entry.
    pub fn changeable(&self) -> impl PartialEq + fmt::Debug + use<> {
        (
            entries(&self.flows),
            entries(&self.outside),
            entries(&self.bindings),
            entries(&self.usage),
            entries(&self.limits),
            entries(&self.budgets),
            self.dropped(),
        )
    }

    /// How many packets of which endpoint's were dropped, by reason.
    pub fn dropped(&self) -> BTreeMap<(u32, u32), u64> {
        let drops = self.drops.iter().map(|entry| {
            let (key, counts) = entry.expect("drop");
            let packets = counts.iter().map(|count| count.packets).sum();
            ((key.endpoint, key.reason), packets)
        });
        drops.collect()
    }

    fn free(&mut self, index: u32) {
        let slot = self.slots.get(&index, 0).expect("slot");
        let free = Slot {
            version: slot.version.wrapping_add(1),
            ..Slot::default()
        };
        self.slots.set(index, free, 0).expect("slot");
    }

    /// Places that are taken, among all there are.
    pub fn taken_places(&self) -> Vec<(u32, Slot)> {
        (0..size::SLOTS as u32)
            .map(|index| (index, self.slots.get(&index, 0).expect("slot")))
            .filter(|(_, slot)| slot.holds != SlotUse::Free as u32)
            .collect()
    }

    fn forget_drops(&mut self) {
        let keys: Vec<DropKey> = self.drops.keys().map(|key| key.expect("key")).collect();
        for key in keys {
            self.drops.remove(&key).expect("remove");
        }
    }

    /// The only drop since [`Loaded::forget_drops`], of a frame of that length.
    fn only_drop(&self, length: usize) -> Result<Outcome> {
        let mut counted = Vec::new();
        for entry in self.drops.iter() {
            let (key, counts) = entry?;
            let packets: u64 = counts.iter().map(|count| count.packets).sum();
            let bytes: u64 = counts.iter().map(|count| count.bytes).sum();
            counted.push((key, packets, bytes));
        }
        let [(key, 1, bytes)] = counted[..] else {
            bail!("one drop should be counted: {counted:?}");
        };
        ensure!(
            bytes == length as u64,
            "{bytes} bytes are counted, the frame had {length}"
        );
        Ok(Outcome::Dropped {
            endpoint: key.endpoint,
            reason: Reason::from_number(key.reason).context("unknown reason")?,
        })
    }

    /// Runs a test with programs attached to interfaces, each by its name.
    ///
    /// # Errors
    /// Those of attaching, and the test's own.
    pub fn with_attached<T>(
        &mut self,
        programs: &[(&str, &str)],
        test: impl FnOnce(&mut Self) -> Result<T>,
    ) -> Result<T> {
        let mut links = Vec::new();
        let mut attach = || -> Result<()> {
            for (name, interface) in programs {
                // Kernels before 6.6 have no other hook.
                let clsact = ["qdisc", "replace", "dev", interface, "clsact"];
                let status = Command::new("tc").args(clsact).status()?;
                ensure!(status.success(), "tc {}", clsact.join(" "));
                let link = self
                    .program(name)?
                    .attach(interface, TcAttachType::Ingress)?;
                links.push((*name, link));
            }
            Ok(())
        };
        let outcome = attach().and_then(|()| test(self));
        for (name, link) in links {
            self.program(name)?.detach(link)?;
        }
        outcome
    }

    fn program(&mut self, name: &str) -> Result<&mut SchedClassifier> {
        let program = self.object.program_mut(name);
        let program = program.with_context(|| format!("the object has no program {name}"))?;
        Ok(program.try_into()?)
    }

    /// Why a row could not be run on this machine, if it could not.
    pub fn unfit(&self) -> Option<&'static str> {
        self.unfit
    }

    /// Waits until a drop is counted on an endpoint's account.
    ///
    /// # Errors
    /// None is, for five seconds.
    pub fn wait_for_drop(&self, party: &Party, reason: Reason) -> Result<()> {
        let key = DropKey {
            endpoint: party.number,
            reason: reason as u32,
        };
        let deadline = Instant::now() + Duration::from_secs(5);
        while self.drops.get(&key, 0).is_err() {
            ensure!(Instant::now() < deadline, "no {} is counted", reason.name());
            std::thread::yield_now();
        }
        Ok(())
    }
}
