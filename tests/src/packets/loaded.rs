//! The loaded programs, run by `BPF_PROG_TEST_RUN` in a network namespace that is the site.
//!
//! A test run takes a frame as received by an interface and gives back the frame and the
//! program's return code; where a redirect leads it does not say. Where the kernel can, it is
//! told that the frame's sum is known (`CHECKSUM_COMPLETE`), and checks afterwards that the
//! programs kept its books.

use std::{
    any::Any,
    collections::HashSet,
    fs,
    io::{self, Write as _},
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    os::fd::{AsFd as _, AsRawFd as _},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use aya::{
    Ebpf, Pod,
    maps::{
        Array, HashMap, MapData, PerCpuHashMap, RingBuf,
        lpm_trie::{Key, LpmTrie},
    },
    programs::{SchedClassifier, TcAttachType},
};
use nix::sched::{CloneFlags, unshare};
use nucnet_common::{
    abi::{
        Address, Binding, DropCount, DropKey, Endpoint, Event, EventLimit, Flow, FlowKey, Mac,
        Monitor, Network, OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule,
        Publish, PublishKey, Reason, Settings, Slot, SlotUse, Snat, SnatKey, StaticMapping, Uplink,
        Usage, map, program, size,
    },
    env::Held,
};
use nucnet_ctl::kernel::bpf::{decode, load_unpinned};

use super::{
    engine::{Engine, Hook, Outcome, Socket, State},
    site::{self, Kind, Party, Via},
};

type Table<K, V> = HashMap<MapData, K, V>;

/// A trie, and what is in it.
struct Prefixes<K: Pod, V: Pod> {
    trie: LpmTrie<MapData, K, V>,
    keys: Vec<Key<K>>,
}

impl<K: Pod, V: Pod> Prefixes<K, V> {
    fn insert(&mut self, bits: u32, key: K, value: V) {
        let key = Key::new(bits, key);
        self.trie.insert(&key, value, 0).expect("insert");
        self.keys.push(key);
    }

    fn clear(&mut self) {
        for key in self.keys.drain(..) {
            // The same prefix may have been written twice.
            let _ = self.trie.remove(&key);
        }
    }
}

/// The programs, loaded, in the namespace of the calling thread.
pub struct Loaded {
    object: Ebpf,
    settings: Array<MapData, Settings>,
    networks: Table<u32, Network>,
    endpoints: Table<u32, Endpoint>,
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
    /// Whether entries should have become older than the machine is.
    too_young: bool,
}

/// Gives the calling thread a network namespace of its own, with the site in it.
///
/// # Errors
/// Privilege is missing, or the kernel refuses a link, an address or a route.
pub fn enter_site() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
    let mut lines = vec!["link set lo up".to_owned()];
    for interface in site::INTERFACES {
        let (name, index) = (interface.name, interface.index);
        let mac = interface.mac.map(|byte| format!("{byte:02x}")).join(":");
        match interface.kind {
            // A test run always has an Ethernet header.
            Kind::Tunnel => continue,
            Kind::Bridge => lines.push(format!(
                "link add name {name} index {index} address {mac} type bridge"
            )),
            Kind::Ethernet | Kind::Endpoint => {
                lines.push(format!(
                    "link add name {name} index {index} address {mac} type veth peer name {name}-far"
                ));
                lines.push(format!("link set {name}-far up"));
            }
        }
        lines.push(format!("link set {name} up"));
        for (address, length) in interface.addresses {
            let flags = if address.is_ipv6() { " nodad" } else { "" };
            lines.push(format!("addr add {address}/{length} dev {name}{flags}"));
        }
    }
    for (prefix, length, via) in site::ROUTES {
        lines.push(match via {
            Via::Gateway(gateway, index) => format!(
                "route add {prefix}/{length} via {gateway} dev {}",
                site::interface(*index).name
            ),
            Via::Unreachable => format!("route add unreachable {prefix}/{length}"),
        });
    }
    ip_batch(&lines)?;
    let bridges = site::INTERFACES.iter().filter(|it| it.kind == Kind::Bridge);
    for bridge in bridges {
        for family in ["ipv4", "ipv6"] {
            let path = format!("/proc/sys/net/{family}/conf/{}/forwarding", bridge.name);
            fs::write(&path, "1").with_context(|| format!("writing {path}"))?;
        }
    }
    Ok(())
}

fn ip_batch(lines: &[String]) -> Result<()> {
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("starting ip")?;
    let mut input = ip.stdin.take().context("no input")?;
    input.write_all(lines.join("\n").as_bytes())?;
    drop(input);
    let status = ip.wait()?;
    ensure!(status.success(), "ip -batch: {status}");
    Ok(())
}

impl Loaded {
    /// Loads the programs that `nucnet-ctl` embeds, with tables of their own.
    ///
    /// # Errors
    /// Those of the kernel and its verifier.
    pub fn new() -> Result<Self> {
        let mut object = load_unpinned()?;
        let mut take = |name: &str| {
            let map = object.take_map(name);
            map.with_context(|| format!("the object has no map {name}"))
        };
        let mut loaded = Self {
            settings: take(map::SETTINGS)?.try_into()?,
            networks: take(map::NETWORKS)?.try_into()?,
            endpoints: take(map::ENDPOINTS)?.try_into()?,
            owners: take(map::ADDRESSES)?.try_into()?,
            publishes: Prefixes {
                trie: take(map::PUBLISHES)?.try_into()?,
                keys: Vec::new(),
            },
            hairpins: Prefixes {
                trie: take(map::HAIRPINS)?.try_into()?,
                keys: Vec::new(),
            },
            mappings: take(map::MAPPINGS)?.try_into()?,
            snats: Prefixes {
                trie: take(map::SNATS)?.try_into()?,
                keys: Vec::new(),
            },
            flows: take(map::FLOWS)?.try_into()?,
            outside: take(map::OUTSIDE)?.try_into()?,
            bindings: take(map::BINDINGS)?.try_into()?,
            slots: take(map::SLOTS)?.try_into()?,
            usage: take(map::USAGE)?.try_into()?,
            uplinks: take(map::UPLINKS)?.try_into()?,
            drops: take(map::DROPS)?.try_into()?,
            budgets: take("budgets")?.try_into()?,
            fragments: take("fragments")?.try_into()?,
            policy_cidrs: Prefixes {
                trie: take(map::POLICY_CIDRS)?.try_into()?,
                keys: Vec::new(),
            },
            policy_ports: Prefixes {
                trie: take(map::POLICY_PORTS)?.try_into()?,
                keys: Vec::new(),
            },
            monitors: take(map::MONITORS)?.try_into()?,
            events: take(map::EVENTS[0])?.try_into()?,
            limits: take(map::EVENT_LIMITS)?.try_into()?,
            object,
            sockets: Vec::new(),
            neighbours: HashSet::new(),
            shrunk: HashSet::new(),
            segment: 0,
            knows_sums: true,
            too_young: false,
        };
        loaded.knows_sums = loaded.probe_sums()?;
        Ok(loaded)
    }

    /// Whether frames of known sum can be had (Linux 6.11).
    fn probe_sums(&self) -> Result<bool> {
        let hook = Hook::FromUplink { link: site::UPLINK };
        match self.test_run(hook, &[0; 64], true) {
            Ok(_) => Ok(true),
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => Ok(false),
            Err(error) => Err(error).context("probing for known sums"),
        }
    }

    /// Whether the kernel checks that the programs keep the sums of frames.
    pub fn knows_sums(&self) -> bool {
        self.knows_sums
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
        self.too_young = false;
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
        clear(&mut self.owners);
        clear(&mut self.uplinks);
        self.publishes.clear();
        self.hairpins.clear();
        self.snats.clear();
        clear(&mut self.mappings);
        self.policy_cidrs.clear();
        self.policy_ports.clear();
        self.forget_drops();
        self.monitors.set(0, Monitor::default(), 0).expect("set");
        self.events();
        clear(&mut self.limits);
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

    /// Whether a row could not be run: the machine was booted too short a time ago for entries
    /// that are as old as it wants them.
    pub fn is_too_young(&self) -> bool {
        self.too_young
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

    /// A run of a frame whose sum is known, or not.
    /// The mean time that a program takes for a frame, in nanoseconds, over many runs. Each run
    /// finds the frame as the one before left it: dropped frames stay as they are.
    ///
    /// # Errors
    /// The kernel refuses the run.
    pub fn nanoseconds(&self, hook: Hook, frame: &[u8], runs: u32) -> io::Result<u32> {
        let (_, _, nanoseconds) = self.test_runs(hook, frame, false, runs)?;
        Ok(nanoseconds)
    }

    fn test_run(&self, hook: Hook, frame: &[u8], knows_sum: bool) -> io::Result<(i32, Vec<u8>)> {
        let (code, output, _) = self.test_runs(hook, frame, knows_sum, 1)?;
        Ok((code, output))
    }

    fn test_runs(
        &self,
        hook: Hook,
        frame: &[u8],
        knows_sum: bool,
        runs: u32,
    ) -> io::Result<(i32, Vec<u8>, u32)> {
        let (name, link, ingress, mark) = match hook {
            Hook::FromEndpoint { link } => (program::FROM_ENDPOINT, link, 0, 0),
            Hook::FromUplink { link } => (program::FROM_UPLINK, link, link, 0),
            Hook::FromUplinkL3 { link } => (program::FROM_UPLINK_L3, link, link, 0),
            Hook::FromHost { link, ingress } => (program::FROM_HOST, link, ingress, 0),
            Hook::FromLoopback { ingress, mark } => {
                (program::FROM_LOOPBACK, site::LOOPBACK, ingress, mark)
            }
        };
        let program: &SchedClassifier = self
            .object
            .program(name)
            .and_then(|program| program.try_into().ok())
            .expect("program");
        // `struct __sk_buff` (linux/bpf.h): all zero but mark, interfaces and segments.
        let mut context = [0; 192];
        context[8..12].copy_from_slice(&mark.to_ne_bytes());
        context[36..40].copy_from_slice(&ingress.to_ne_bytes());
        context[40..44].copy_from_slice(&link.to_ne_bytes());
        context[176..180].copy_from_slice(&self.segment.to_ne_bytes());
        let mut output = vec![0; frame.len() + 256];
        let mut attributes = TestRun {
            prog_fd: program.fd().map_err(io::Error::other)?.as_fd().as_raw_fd() as u32,
            data_size_in: frame.len() as u32,
            data_size_out: output.len() as u32,
            data_in: frame.as_ptr() as u64,
            data_out: output.as_mut_ptr() as u64,
            repeat: runs,
            ctx_size_in: context.len() as u32,
            ctx_in: context.as_ptr() as u64,
            flags: if knows_sum {
                BPF_F_TEST_SKB_CHECKSUM_COMPLETE
            } else {
                0
            },
            ..TestRun::default()
        };
        // SAFETY: the attributes are those of BPF_PROG_TEST_RUN, and every buffer lives on and
        // has the size that is given with it.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                BPF_PROG_TEST_RUN,
                &raw mut attributes,
                size_of::<TestRun>(),
            )
        };
        if result != 0 {
            return Err(io::Error::last_os_error());
        }
        output.truncate(attributes.data_size_out as usize);
        Ok((attributes.retval as i32, output, attributes.duration))
    }
}

/// Command number of `bpf(2)`.
const BPF_PROG_TEST_RUN: libc::c_int = 10;
/// The kernel sums the frame up before the run and compares the sum it kept after it.
const BPF_F_TEST_SKB_CHECKSUM_COMPLETE: u32 = 1 << 2;
/// What the programs return (linux/pkt_cls.h).
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_REDIRECT: i32 = 7;

/// `union bpf_attr` for `BPF_PROG_TEST_RUN` (linux/bpf.h); aya's has no flags for frames.
#[repr(C)]
#[derive(Default)]
struct TestRun {
    prog_fd: u32,
    retval: u32,
    data_size_in: u32,
    data_size_out: u32,
    data_in: u64,
    data_out: u64,
    repeat: u32,
    duration: u32,
    ctx_size_in: u32,
    ctx_size_out: u32,
    ctx_in: u64,
    ctx_out: u64,
    flags: u32,
    cpu: u32,
    batch_size: u32,
    pad: u32,
}

/// Nothing balances new ports in a datagram without checksum: the sum that the kernel keeps is
/// then wrong. Nobody ever looks at it, for there is no checksum that it could prove right.
fn is_udp_without_checksum(frame: &[u8]) -> bool {
    let at = |range| frame.get::<std::ops::Range<usize>>(range);
    at(12..14) == Some(&[8, 0]) && at(23..24) == Some(&[17]) && at(40..42) == Some(&[0, 0])
        || at(12..14) == Some(&[0x86, 0xdd])
            && at(20..21) == Some(&[17])
            && at(60..62) == Some(&[0, 0])
}

fn keys<K: Pod, V: Pod>(table: &Table<K, V>) -> Vec<K> {
    table.keys().map(|key| key.expect("key")).collect()
}

fn clear<K: Pod, V: Pod>(table: &mut Table<K, V>) {
    for key in keys(table) {
        table.remove(&key).expect("remove");
    }
}

fn entries<K: Pod + Eq + std::hash::Hash, V: Pod>(
    table: &Table<K, V>,
) -> std::collections::HashMap<K, V> {
    table.iter().map(|entry| entry.expect("entry")).collect()
}

fn set<K: Pod, V: Pod>(table: &mut Table<K, V>, key: K, value: Option<&V>) {
    match value {
        Some(value) => table.insert(key, value, 0).expect("insert"),
        None => table.remove(&key).expect("remove"),
    }
}

impl Engine for Loaded {
    fn settings(&mut self, settings: &Settings) {
        self.settings.set(0, settings, 0).expect("settings");
    }

    fn network(&mut self, number: u32, network: &Network) {
        set(&mut self.networks, number, Some(network));
    }

    fn endpoint(&mut self, link: u32, endpoint: Option<&Endpoint>) {
        set(&mut self.endpoints, link, endpoint);
    }

    fn owner(&mut self, address: &Address, owner: &Owner) {
        set(&mut self.owners, *address, Some(owner));
    }

    fn uplink(&mut self, link: u32, uplink: Option<&Uplink>) {
        set(&mut self.uplinks, link, uplink);
    }

    fn usage(&mut self, endpoint: u32, usage: &Usage) {
        set(&mut self.usage, endpoint, Some(usage));
    }

    fn publish(&mut self, bits: u32, key: &PublishKey, publish: &Publish) {
        self.publishes.insert(bits, *key, *publish);
    }

    fn hairpin(&mut self, bits: u32, key: &PublishKey, publish: &Publish) {
        self.hairpins.insert(bits, *key, *publish);
    }

    fn mapping(&mut self, number: u32, mapping: &StaticMapping) {
        set(&mut self.mappings, number, Some(mapping));
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
        self.sockets.push(match socket {
            Socket::Listener(at) => Box::new(TcpListener::bind(at).expect("listen")),
            Socket::Udp(at) => Box::new(UdpSocket::bind(at).expect("bind")),
            Socket::UdpTo(at, to) => {
                let socket = UdpSocket::bind(at).expect("bind");
                socket.connect(to).expect("connect");
                Box::new(socket)
            }
        });
    }

    /// What counts is how old an entry is, so this makes all of them older.
    fn pass(&mut self, time: Duration) {
        let nanoseconds = time.as_nanos() as u64;
        let mut too_young = self.too_young;
        let mut earlier = |then: u64| {
            let earlier = then.checked_sub(nanoseconds);
            too_young |= earlier.is_none();
            earlier.unwrap_or_default()
        };
        for (key, flow) in entries(&self.flows) {
            let flow = Flow {
                created: earlier(flow.created),
                last_seen: earlier(flow.last_seen),
                // 0: it is to be looked at with its next packet.
                checked: flow.checked.saturating_sub(nanoseconds),
                ..flow
            };
            set(&mut self.flows, key, Some(&flow));
        }
        for (key, mut limit) in entries(&self.limits) {
            let budgets = [&mut limit.refusals, &mut limit.flows];
            for budget in budgets.into_iter().filter(|budget| budget.since != 0) {
                budget.since = earlier(budget.since);
            }
            for recent in limit.recent.iter_mut().filter(|recent| recent.hash != 0) {
                recent.seen = earlier(recent.seen);
            }
            set(&mut self.limits, key, Some(&limit));
        }
        for (key, binding) in entries(&self.bindings) {
            let binding = Binding {
                last_seen: earlier(binding.last_seen),
                ..binding
            };
            set(&mut self.bindings, key, Some(&binding));
        }
        for (key, used_up) in entries(&self.budgets) {
            set(&mut self.budgets, key, Some(&earlier(used_up)));
        }
        for (key, mut note) in entries(&self.fragments) {
            note[0] = earlier(note[0]);
            set(&mut self.fragments, key, Some(&note));
        }
        self.too_young = too_young;
    }

    fn neighbour(&mut self, link: u32, address: IpAddr, mac: Mac) {
        let name = site::interface(link).name;
        let mac = mac.map(|byte| format!("{byte:02x}")).join(":");
        let neighbour = format!("neigh replace {address} lladdr {mac} dev {name} nud permanent");
        ip_batch(&[neighbour]).expect("neighbour");
        self.neighbours
            .insert(format!("neigh del {address} dev {name}"));
    }

    fn hide_sources(&mut self) {
        panic!("the routes are the kernel's");
    }

    fn mtu(&mut self, link: u32, bytes: u32) {
        let name = site::interface(link).name;
        ip_batch(&[format!("link set {name} mtu {bytes}")]).expect("mtu");
        self.shrunk.insert(name);
    }

    fn hide_mtus(&mut self) {
        panic!("the routes are the kernel's");
    }

    fn segment(&mut self, bytes: u32) {
        self.segment = bytes;
    }

    fn may_bind(&self, _: bool, _: u32, _: u8, _: SocketAddr) -> bool {
        panic!("there are no test runs of programs for sockets");
    }

    fn draw(&mut self, _: u32) {
        panic!("the random numbers are the kernel's");
    }

    /// The kernel wants an Ethernet header at least, and newer ones that of IP as well.
    fn shortest_frame(&self, ethertype: u16) -> usize {
        let hook = Hook::FromUplink { link: site::UPLINK };
        let mut frame = vec![0; 14];
        frame[12..14].copy_from_slice(&ethertype.to_be_bytes());
        while let Err(error) = self.test_run(hook, &frame, false) {
            assert_eq!(error.raw_os_error(), Some(libc::EINVAL), "{error}");
            frame.push(0);
        }
        frame.len()
    }

    fn run(&mut self, hook: Hook, frame: &[u8]) -> (Outcome, Vec<u8>) {
        self.forget_drops();
        let budgets = entries(&self.budgets);
        let knows_sum = self.knows_sums && !is_udp_without_checksum(frame);
        let mut result = self.test_run(hook, frame, knows_sum);
        let is_lost = matches!(&result, Err(error) if error.raw_os_error() == Some(libc::EBADMSG));
        if is_lost {
            // The kernel forgets the sum of a frame that gets another length.
            self.forget_drops();
            clear(&mut self.budgets);
            for (account, used_up) in budgets {
                set(&mut self.budgets, account, Some(&used_up));
            }
            result = self.test_run(hook, frame, false);
        }
        let (code, output) =
            result.unwrap_or_else(|error| panic!("{hook:?}: {} bytes: {error}", frame.len()));
        assert!(
            !is_lost || output.len() != frame.len(),
            "{hook:?}: the sum over the frame is not what the kernel believes it is"
        );
        let outcome = match code {
            TC_ACT_UNSPEC => Outcome::Passed,
            TC_ACT_REDIRECT if self.drops.keys().next().is_some() => {
                match self.only_drop(frame.len()).expect("drop") {
                    Outcome::Dropped { endpoint, reason } => Outcome::Refused {
                        endpoint,
                        reason,
                        link: None,
                    },
                    other => other,
                }
            }
            TC_ACT_REDIRECT => Outcome::Redirected(None),
            TC_ACT_SHOT => self.only_drop(frame.len()).expect("drop"),
            code => panic!("{hook:?}: the program returned {code}"),
        };
        (outcome, output)
    }

    fn watch(&mut self) {
        let always = Monitor {
            until: u64::MAX,
            ..Monitor::default()
        };
        self.monitors.set(0, always, 0).expect("set");
    }

    fn events(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        while let Some(bytes) = self.events.next() {
            events.push(decode(&bytes).expect("a whole event"));
        }
        events
    }

    fn state(&self) -> State {
        let flows = entries(&self.flows);
        let bindings = entries(&self.bindings);
        let places = flows.values().map(|flow| flow.slot);
        let places = places.chain(bindings.values().map(|binding| binding.slot));
        let slots = places
            .map(|index| {
                let slot = self.slots.get(&index, 0).expect("slot");
                let held = Held {
                    version: slot.version,
                    holds: slot.holds,
                    key: slot.key,
                };
                (index, held)
            })
            .collect();
        State {
            outside: entries(&self.outside),
            usage: entries(&self.usage),
            slots,
            flows,
            bindings,
        }
    }
}
