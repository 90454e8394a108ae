//! The test's hands on the loaded programs: what is in the maps, what time it is, and which frames
//! come.

use std::{
    net::{IpAddr, SocketAddr, TcpListener, UdpSocket},
    time::Duration,
};

use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Event, Flow, Guest, Mac, Monitor, Network, Owner,
        PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish, PublishKey, Settings, Snat,
        SnatKey, StaticMapping, Uplink, Usage, policy_flag,
    },
    env::Held,
};
use nucnet_ctl::kernel::bpf::{decode, monotonic};

use super::{
    Loaded,
    namespace::ip_batch,
    table::{clear, entries, set},
    test_run::asks_for_ingress,
};
use crate::packets::{
    engine::{Engine, Hook, Outcome, Socket, State},
    site,
};

/// What the programs return (linux/pkt_cls.h).
const TC_ACT_UNSPEC: i32 = -1;
const TC_ACT_SHOT: i32 = 2;
const TC_ACT_REDIRECT: i32 = 7;

/// Nothing balances new ports in a datagram without checksum: the sum that the kernel keeps is
/// then wrong. Nobody ever looks at it, for there is no checksum that it could prove right.
fn is_udp_without_checksum(frame: &[u8]) -> bool {
    let at = |range| frame.get::<std::ops::Range<usize>>(range);
    at(12..14) == Some(&[8, 0]) && at(23..24) == Some(&[17]) && at(40..42) == Some(&[0, 0])
        || at(12..14) == Some(&[0x86, 0xdd])
            && at(20..21) == Some(&[17])
            && at(60..62) == Some(&[0, 0])
}

impl Loaded {
    /// Whether a frame may be answered that ends its flow: a second run, with the sum unknown, would
    /// find another state than the first.
    fn may_be_rejected(&self, hook: Hook) -> bool {
        let Hook::FromEndpoint { link } = hook else {
            return false;
        };
        let endpoint = self.endpoints.get(&link, 0);
        endpoint.is_ok_and(|endpoint| endpoint.policy_flags & policy_flag::REJECT != 0)
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

    fn guest(&mut self, link: u32, guest: &Guest) {
        set(&mut self.guests, link, Some(guest));
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
        let mut too_young = false;
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
        if too_young {
            self.unfit = Some("this machine was booted too short a time ago");
        }
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
            assert!(frame.len() < 64, "no frame is long enough");
            frame.push(0);
        }
        frame.len()
    }

    fn run(&mut self, hook: Hook, frame: &[u8]) -> (Outcome, Vec<u8>) {
        if !self.knows_ingress && asks_for_ingress(hook) {
            self.unfit = Some("this kernel's test runs know no interface that a frame came in by");
        }
        self.forget_drops();
        let budgets = entries(&self.budgets);
        let knows_sum =
            self.knows_sums && !is_udp_without_checksum(frame) && !self.may_be_rejected(hook);
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
            now: monotonic().expect("clock"),
            outside: entries(&self.outside),
            usage: entries(&self.usage),
            slots,
            flows,
            bindings,
        }
    }
}
