//! What rows run on: the packet logic alone, or the loaded programs. Both have the same tables
//! and take the same frames.

use std::{
    collections::HashMap,
    fmt,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nucnet_common::{
    abi::{
        Address, Binding, Endpoint, Event, Flow, FlowKey, FlowState, Guest, MAPPED, Mac, Network,
        OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyRule, Publish,
        PublishKey, Reason, Settings, SlotUse, Snat, SnatKey, StaticMapping, Uplink, Usage,
        flow_flag,
    },
    env::Held,
    filter::{is_permitting, permission_key},
    flow::{binding_key, bound_key, is_dead, is_unbound, outside_key},
    mapping::inside_view,
    path::Way,
};

use super::site;

/// Where a frame is seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hook {
    /// It comes from the endpoint behind an interface.
    FromEndpoint {
        /// The interface.
        link: u32,
    },
    /// It comes from a microVM's guest, by its TAP.
    FromGuest {
        /// The TAP.
        link: u32,
    },
    /// It comes to the slot of a microVM.
    ToGuest {
        /// The slot's side of its veth pair.
        link: u32,
    },
    /// It comes in by an uplink with Ethernet headers.
    FromUplink {
        /// The uplink.
        link: u32,
    },
    /// It comes in by an uplink without link-layer header.
    FromUplinkL3 {
        /// The uplink.
        link: u32,
    },
    /// It leaves by a bridge.
    FromHost {
        /// The bridge.
        link: u32,
        /// The interface that it came in by; 0: it is the host's own.
        ingress: u32,
    },
    /// It leaves by the loopback interface.
    FromLoopback {
        /// The interface that it came in by; 0: it is the host's own.
        ingress: u32,
        /// Its mark.
        mark: u32,
    },
}

/// What became of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// It goes on untouched.
    Passed,
    /// It goes elsewhere. A program's redirect does not say where.
    Redirected(Option<Way>),
    /// It is dropped, on an endpoint's account (0: nobody's).
    Dropped {
        /// The endpoint's number.
        endpoint: u32,
        /// Why.
        reason: Reason,
    },
    /// It is dropped, and its sender is told.
    Refused {
        /// The endpoint's number.
        endpoint: u32,
        /// Why.
        reason: Reason,
        /// By which interface the error goes, or comes in for the host. A program's redirect
        /// does not say.
        link: Option<u32>,
    },
}

impl fmt::Debug for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Passed => f.write_str("passed"),
            Self::Redirected(None) => f.write_str("redirected"),
            Self::Redirected(Some(way)) => match way {
                Way::Uplink { link, next_hop } => {
                    write!(
                        f,
                        "redirected to uplink {link} by {}",
                        site::from_abi(next_hop)
                    )
                }
                way => write!(f, "redirected to {way:?}"),
            },
            Self::Dropped { endpoint, reason } => {
                write!(f, "dropped ({}) on account of {endpoint}", reason.name())
            }
            Self::Refused {
                endpoint,
                reason,
                link,
            } => {
                let reason = reason.name();
                write!(
                    f,
                    "refused ({reason}) on account of {endpoint}, by {link:?}"
                )
            }
        }
    }
}

impl Outcome {
    /// Whether this is what was expected, as far as it says.
    pub fn is(&self, expected: &Self) -> bool {
        match (self, expected) {
            (Self::Redirected(None), Self::Redirected(_)) => true,
            (
                Self::Refused {
                    endpoint,
                    reason,
                    link: None,
                },
                Self::Refused {
                    endpoint: account,
                    reason: expected,
                    ..
                },
            ) => (endpoint, reason) == (account, expected),
            (one, other) => one == other,
        }
    }
}

/// A socket of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Socket {
    /// A TCP server.
    Listener(SocketAddr),
    /// A UDP socket that takes datagrams of anybody.
    Udp(SocketAddr),
    /// A UDP socket that has asked one peer, and takes datagrams of that one only.
    UdpTo(SocketAddr, SocketAddr),
}

/// The contents of the tables of flows.
#[derive(Clone, Debug, Default)]
pub struct State {
    /// The time at which they were read, by the clock that the entries hold: nanoseconds.
    pub now: u64,
    /// Flows.
    pub flows: HashMap<FlowKey, Flow>,
    /// Their external views.
    pub outside: HashMap<OutsideKey, FlowKey>,
    /// Bindings.
    pub bindings: HashMap<FlowKey, Binding>,
    /// Places that are taken.
    pub slots: HashMap<u32, Held>,
    /// What endpoints use.
    pub usage: HashMap<u32, Usage>,
}

/// The control plane's side of the tables, a clock that can be moved, and a place to send
/// frames to.
pub trait Engine {
    /// Writes the settings.
    fn settings(&mut self, settings: &Settings);
    /// Writes what a network chose.
    fn network(&mut self, number: u32, network: &Network);
    /// Writes, or removes, an endpoint.
    fn endpoint(&mut self, link: u32, endpoint: Option<&Endpoint>);
    /// Writes who the guest behind an interface is.
    fn guest(&mut self, link: u32, guest: &Guest);
    /// Writes who owns an address.
    fn owner(&mut self, address: &Address, owner: &Owner);
    /// Writes, or removes, an uplink.
    fn uplink(&mut self, link: u32, uplink: Option<&Uplink>);
    /// Writes the usage of an endpoint.
    fn usage(&mut self, endpoint: u32, usage: &Usage);
    /// Adds a prefix of published ports.
    fn publish(&mut self, bits: u32, key: &PublishKey, publish: &Publish);
    /// Adds a prefix of a hairpin's ports.
    fn hairpin(&mut self, bits: u32, key: &PublishKey, publish: &Publish);
    /// Writes a static mapping.
    fn mapping(&mut self, number: u32, mapping: &StaticMapping);
    /// Adds a prefix of sources.
    fn snat(&mut self, bits: u32, key: &SnatKey, snat: &Snat);
    /// Adds a prefix of a policy.
    fn policy_class(&mut self, bits: u32, key: &PolicyCidrKey, class: &PolicyClass);
    /// Adds ports of a policy.
    fn policy_rule(&mut self, bits: u32, key: &PolicyPortKey, rule: &PolicyRule);
    /// Opens a socket of the host.
    fn socket(&mut self, socket: Socket);
    /// Lets time pass.
    fn pass(&mut self, time: Duration);
    /// Tells the host the link-layer address of a neighbour.
    fn neighbour(&mut self, link: u32, address: IpAddr, mac: Mac);
    /// From now on route lookups do not say which address the host has, as before Linux 6.7.
    ///
    /// # Panics
    /// Where the routes are the kernel's.
    fn hide_sources(&mut self);
    /// Sets the maximum transmission unit of an interface of the host.
    fn mtu(&mut self, link: u32, bytes: u32);
    /// From now on route lookups do not say how much fits, as before Linux 5.12.
    ///
    /// # Panics
    /// Where the routes are the kernel's.
    fn hide_mtus(&mut self);
    /// From now on all frames are trains of segments with that many bytes of payload; 0: none is.
    fn segment(&mut self, bytes: u32);
    /// Whether a socket may bind an address and port: one of the host's network namespace, or of
    /// another, with that mark.
    ///
    /// # Panics
    /// Where that is a program: there are no test runs of its kind.
    fn may_bind(&self, is_hosts: bool, mark: u32, protocol: u8, at: SocketAddr) -> bool;
    /// From now on every random number is this one.
    ///
    /// # Panics
    /// Where the random numbers are the kernel's.
    fn draw(&mut self, number: u32);
    /// The shortest frame of an EtherType that it takes, in bytes.
    fn shortest_frame(&self, ethertype: u16) -> usize;
    /// Sends a frame; what became of it, and its bytes afterwards.
    fn run(&mut self, hook: Hook, frame: &[u8]) -> (Outcome, Vec<u8>);
    /// From now on somebody reads events.
    fn watch(&mut self);
    /// What was told since the last time.
    fn events(&mut self) -> Vec<Event>;
    /// The tables of flows.
    fn state(&self) -> State;
}

impl State {
    /// What is wrong with the tables: every count is exact, every entry has all that belongs to
    /// it, and nothing is left over.
    pub fn problems(&self) -> Vec<String> {
        let mut problems = Vec::new();
        for (key, flow) in &self.flows {
            let outside = outside_key(key.protocol, flow);
            if self.outside.get(&outside) != Some(key) {
                problems.push(format!("no external view of {}", Shown(key)));
            }
            if key.endpoint == MAPPED && self.outside.get(&inside_view(key)) != Some(key) {
                problems.push(format!("no inside view of {}", Shown(key)));
            }
            let place = (flow.slot, flow.slot_version, SlotUse::Flow);
            self.check_place(place, key, &mut problems);
        }
        for (key, binding) in &self.bindings {
            let bound = bound_key(key.protocol, &binding.external, binding.external_port);
            if self.outside.get(&bound) != Some(key) {
                problems.push(format!("no external side of binding {}", Shown(key)));
            }
            let place = (binding.slot, binding.slot_version, SlotUse::Binding);
            self.check_place(place, key, &mut problems);
        }
        for (outside, key) in &self.outside {
            let is_flows = self.flows.get(key).is_some_and(|flow| {
                outside_key(key.protocol, flow) == *outside
                    || key.endpoint == MAPPED && inside_view(key) == *outside
            });
            let is_bindings = self.bindings.get(key).is_some_and(|binding| {
                bound_key(key.protocol, &binding.external, binding.external_port) == *outside
            });
            let is_permission = self.flows.get(key).is_some_and(|flow| {
                is_permitting(key, flow) && permission_key(key.protocol, flow) == *outside
            });
            if !is_flows && !is_bindings && !is_permission {
                problems.push(format!("orphaned external view {outside:?}"));
            }
        }
        for (index, held) in &self.slots {
            let holder = match held.holds {
                holds if holds == SlotUse::Flow as u32 => {
                    self.flows.get(&held.key).map(|flow| flow.slot)
                }
                _ => self.bindings.get(&held.key).map(|binding| binding.slot),
            };
            if holder != Some(*index) {
                problems.push(format!("place {index} is held by nobody: {held:?}"));
            }
        }
        self.check_counts(&mut problems);
        problems
    }

    fn check_place(
        &self,
        (index, version, holds): (u32, u32, SlotUse),
        key: &FlowKey,
        problems: &mut Vec<String>,
    ) {
        let has_it = self.slots.get(&index).is_some_and(|held| {
            held.version == version && held.holds == holds as u32 && held.key == *key
        });
        if !has_it {
            problems.push(format!("no place for {}", Shown(key)));
        }
    }

    fn check_counts(&self, problems: &mut Vec<String>) {
        let mut counted: HashMap<u32, Usage> = HashMap::new();
        for key in self.flows.keys() {
            counted.entry(key.endpoint).or_default().flows += 1;
        }
        for key in self.bindings.keys() {
            counted.entry(key.endpoint).or_default().bindings += 1;
        }
        for (endpoint, usage) in &self.usage {
            let counted = counted.remove(endpoint).unwrap_or_default();
            if counted != *usage {
                problems.push(format!("endpoint {endpoint}: {usage:?}, but {counted:?}"));
            }
        }
        for (endpoint, counted) in counted {
            problems.push(format!("endpoint {endpoint}: no usage, but {counted:?}"));
        }
    }

    /// The flows in a form that two engines agree on: without times and places, and with a
    /// stand-in for what was drawn at random. The dead are left out: which of them made room for
    /// somebody is drawn too.
    pub fn comparable(&self) -> Vec<String> {
        let drawn = |port: u16| match port {
            site::DYNAMIC_FIRST..=site::DYNAMIC_LAST => 0,
            port => port,
        };
        let alive = self.flows.iter().filter(|it| !is_dead(it.1, self.now));
        let flows = alive.map(|(key, flow)| {
            let mut key = *key;
            if flow.flags & flow_flag::INBOUND != 0 && key.peer_port != flow.peer_port {
                key.peer_port = 0;
            }
            let flow = Flow {
                created: 0,
                last_seen: 0,
                checked: 0,
                slot: 0,
                slot_version: 0,
                external_port: drawn(flow.external_port),
                ..*flow
            };
            format!("{}: {flow:?}", Shown(&key))
        });
        let bound = self
            .bindings
            .iter()
            .filter(|it| !is_unbound(it.1, self.now));
        let bindings = bound.map(|(key, binding)| {
            let binding = Binding {
                last_seen: 0,
                slot: 0,
                slot_version: 0,
                external_port: drawn(binding.external_port),
                ..*binding
            };
            format!("binding {}: {binding:?}", Shown(key))
        });
        let mut lines: Vec<String> = flows.chain(bindings).collect();
        lines.sort();
        lines
    }

    /// The binding that a flow uses.
    pub fn binding_of(&self, key: &FlowKey, flow: &Flow) -> Option<&Binding> {
        self.bindings.get(&binding_key(key, &flow.external))
    }
}

/// A flow's key, for people.
pub struct Shown<'a>(pub &'a FlowKey);

impl fmt::Display for Shown<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let key = self.0;
        let inside = SocketAddr::new(site::from_abi(&key.inside), key.inside_port);
        let peer = SocketAddr::new(site::from_abi(&key.peer), key.peer_port);
        write!(
            f,
            "{} {inside} {peer} protocol {}",
            key.endpoint, key.protocol
        )
    }
}

/// The state of a flow by number.
pub fn state_name(state: u32) -> Option<FlowState> {
    [
        FlowState::Opening,
        FlowState::Established,
        FlowState::Closing,
        FlowState::Closed,
    ]
    .into_iter()
    .find(|known| *known as u32 == state)
}
