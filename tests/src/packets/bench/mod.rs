//! What rows are written in: a site that is set up, packets that are sent, and everything that
//! must be true of what comes out ([`Sent`]).

mod sent;

pub use sent::{Sent, hidden};

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nucnet_common::abi::{
    Endpoint, Event, Flow, FlowKey, FlowState, MAPPED, Mac, Network, Settings, Snat, Usage,
};
use nucnet_ctl::model::{
    Cidr,
    mapping::MappingSpec,
    policy::{Action, Compiled, Policy},
    publish::PublishSpec,
    rule::Rule,
    to_abi,
};

use super::{
    engine::{Engine, Hook, Socket, State, state_name},
    packet::Packet,
    site::{self, Party},
};

/// A row's engine with the site set up in its tables.
pub struct Bench<'e> {
    engine: &'e mut dyn Engine,
    settings: Settings,
    policies: u32,
}

/// Who sends the frames that come in by uplinks.
pub const ROUTER_MAC: Mac = [2, 0xff, 0, 0, 0, 1];

/// What can be sent: a packet, put into a frame where it has none, or the bytes of a frame.
pub trait Frame {
    /// The bytes, in a frame to and from these addresses unless it is in one already.
    fn framed(&self, to: Mac, from: Mac) -> Vec<u8>;
}

impl Frame for Packet {
    fn framed(&self, to: Mac, from: Mac) -> Vec<u8> {
        self.clone().or_macs(to, from).bytes()
    }
}

impl Frame for Vec<u8> {
    fn framed(&self, _: Mac, _: Mac) -> Vec<u8> {
        self.clone()
    }
}

/// An egress policy as the command line has it.
#[derive(Clone, Copy, Debug, Default)]
pub struct Egress<'a> {
    /// Where no rule says otherwise; deny if there is an allow.
    pub default: Option<Action>,
    /// `--allow`.
    pub allow: &'a [&'a str],
    /// `--deny`.
    pub deny: &'a [&'a str],
    /// `--dns`.
    pub dns: &'a [&'a str],
    /// `--reject`.
    pub reject: bool,
}

/// The entry of an endpoint under a policy, of that number, and the policy's own entries.
fn compile(policy: &Policy, party: &Party, number: u32) -> (Endpoint, Compiled) {
    let compiled = policy.compile(number, 1 + 1_000 * number).expect("policy");
    let mut endpoint = party.entry();
    compiled.enforce(number, &mut endpoint);
    (endpoint, compiled)
}

impl<'a> Egress<'a> {
    /// What these rules allow, and nothing else.
    pub fn allow(rules: &'a [&'a str]) -> Self {
        Self {
            allow: rules,
            ..Self::default()
        }
    }

    /// All but what these rules deny.
    pub fn deny(rules: &'a [&'a str]) -> Self {
        Self {
            deny: rules,
            ..Self::default()
        }
    }

    /// The same, and what is denied is answered.
    pub fn rejecting(self) -> Self {
        Self {
            reject: true,
            ..self
        }
    }

    /// The entry of an endpoint under this policy, of that number, and the policy's own entries.
    pub fn compile(self, party: &Party, number: u32) -> (Endpoint, Compiled) {
        compile(&self.policy(), party, number)
    }

    fn policy(self) -> Policy {
        let rules = |texts: &[&str]| -> Vec<Rule> {
            let rules = texts.iter().map(|text| text.parse().expect("rule"));
            rules.collect()
        };
        let resolvers = self.dns.iter().map(|text| text.parse().expect("resolver"));
        Policy::new(
            self.default,
            rules(self.allow),
            rules(self.deny),
            resolvers.collect(),
        )
        .with_denied_rejected(self.reject)
    }
}

impl<'e> Bench<'e> {
    /// Sets the site up in empty tables.
    pub fn new(engine: &'e mut dyn Engine) -> Self {
        let bench = Self {
            engine,
            settings: site::SETTINGS,
            policies: 0,
        };
        bench.engine.settings(&site::SETTINGS);
        for network in site::NETWORKS {
            bench.engine.network(network, &site::NETWORK);
        }
        for (link, uplink) in site::uplinks() {
            bench.engine.uplink(link, Some(&uplink));
        }
        for party in site::PARTIES {
            bench.engine.usage(party.number, &Usage::default());
            bench.engine.endpoint(party.link, Some(&party.entry()));
            for address in [party.v4, party.v6] {
                bench.engine.owner(&to_abi(address), &party.owner());
            }
        }
        for (link, guest) in site::guests() {
            bench.engine.guest(link, &guest);
        }
        bench
    }

    /// Changes the settings.
    pub fn set(&mut self, change: impl FnOnce(&mut Settings)) {
        change(&mut self.settings);
        self.engine.settings(&self.settings);
    }

    /// Changes what the network of WEB and APP chose from what it is at first.
    pub fn set_network(&mut self, change: impl FnOnce(&mut Network)) {
        let mut network = site::NETWORK;
        change(&mut network);
        self.engine.network(site::WEB.network, &network);
    }

    /// Changes an endpoint's entry from what it is without policy.
    pub fn set_endpoint(&mut self, party: &Party, change: impl FnOnce(&mut Endpoint)) {
        let mut entry = party.entry();
        change(&mut entry);
        self.engine.endpoint(party.link, Some(&entry));
    }

    /// Gives an endpoint another number.
    pub fn renumber(&mut self, party: &Party, number: u32) {
        self.engine.usage(number, &Usage::default());
        self.set_endpoint(party, |endpoint| endpoint.number = number);
    }

    /// Removes an endpoint's entry.
    pub fn remove_endpoint(&mut self, party: &Party) {
        self.engine.endpoint(party.link, None);
    }

    /// Changes an uplink's entry.
    pub fn set_uplink(&mut self, link: u32, change: impl FnOnce(&mut nucnet_common::abi::Uplink)) {
        let known = site::uplinks();
        let mut entry = known
            .iter()
            .find(|(index, _)| *index == link)
            .expect("uplink")
            .1;
        change(&mut entry);
        self.engine.uplink(link, Some(&entry));
    }

    /// Removes an uplink's entry.
    pub fn remove_uplink(&mut self, link: u32) {
        self.engine.uplink(link, None);
    }

    /// Publishes as `-p` does.
    pub fn publish(&mut self, party: &Party, spec: &str) {
        let spec: PublishSpec = spec.parse().expect("publish");
        for (bits, key, publish) in spec.entries(party.owner(), true, true) {
            self.engine.publish(bits, &key, &publish);
        }
    }

    /// Adds a static mapping of that number, as `nat add` does. `lan`: the clients of a hairpin;
    /// `link`: the interface that it is bound to, or 0.
    pub fn map(&mut self, number: u32, spec: &MappingSpec, lan: Option<Cidr>, link: u32) {
        self.set(|settings| settings.mapping_link = site::BRIDGE);
        self.engine.network(MAPPED, &site::NETWORK);
        if number == 1 {
            self.engine.usage(MAPPED, &Usage::default());
        }
        self.engine.mapping(number, &spec.entry(lan, link));
        let is_hairpin = matches!(spec, MappingSpec::Hairpin { .. });
        for (bits, key, publish) in spec.port_entries(number) {
            match is_hairpin {
                true => self.engine.hairpin(bits, &key, &publish),
                false => self.engine.publish(bits, &key, &publish),
            }
        }
        for (bits, key) in spec.source_keys(link).into_iter().flatten() {
            self.engine.snat(bits, &key, &Snat { mapping: number });
        }
    }

    /// Puts a policy in force for an endpoint, in place of any before.
    pub fn egress(&mut self, party: &Party, egress: Egress<'_>) {
        self.policy(party, &egress.policy());
    }

    /// The same, and flows that are open stay.
    pub fn egress_for_new_flows(&mut self, party: &Party, egress: Egress<'_>) {
        let mut endpoint = self.policy(party, &egress.policy());
        endpoint.policy_since = 0;
        self.engine.endpoint(party.link, Some(&endpoint));
    }

    /// Puts a policy in force for an endpoint, in place of any before; the endpoint's entry.
    pub fn policy(&mut self, party: &Party, policy: &Policy) -> Endpoint {
        self.policies += 1;
        let (endpoint, compiled) = compile(policy, party, self.policies);
        for (bits, key, class) in &compiled.cidrs {
            self.engine.policy_class(*bits, key, class);
        }
        for (bits, key, rule) in &compiled.ports {
            self.engine.policy_rule(*bits, key, rule);
        }
        self.engine.endpoint(party.link, Some(&endpoint));
        endpoint
    }

    /// Opens a socket of the host.
    pub fn socket(&mut self, socket: Socket) {
        self.engine.socket(socket);
    }

    /// Lets time pass.
    pub fn wait(&mut self, seconds: f64) {
        self.engine.pass(Duration::from_secs_f64(seconds));
    }

    /// Tells the host the link-layer address of a neighbour.
    pub fn neighbour(&mut self, link: u32, address: IpAddr, mac: Mac) {
        self.engine.neighbour(link, address, mac);
    }

    /// From now on route lookups do not say which address the host has, as before Linux 6.7.
    pub fn hide_sources(&mut self) {
        self.engine.hide_sources();
    }

    /// Sets the maximum transmission unit of an interface of the host.
    pub fn mtu(&mut self, link: u32, bytes: u32) {
        self.engine.mtu(link, bytes);
    }

    /// From now on route lookups do not say how much fits, as before Linux 5.12.
    pub fn hide_mtus(&mut self) {
        self.engine.hide_mtus();
    }

    /// From now on all frames are trains of segments with that many bytes of payload; 0: none is.
    pub fn segment(&mut self, bytes: u32) {
        self.engine.segment(bytes);
    }

    /// Whether a socket of the host may bind an address and port.
    pub fn host_may_bind(&self, protocol: u8, at: impl Into<SocketAddr>) -> bool {
        self.engine.may_bind(true, 0, protocol, at.into())
    }

    /// The same for a socket of another namespace.
    pub fn other_may_bind(&self, protocol: u8, at: impl Into<SocketAddr>) -> bool {
        self.engine.may_bind(false, 0, protocol, at.into())
    }

    /// The same for the control plane's own sockets.
    pub fn probe_may_bind(&self, protocol: u8, at: impl Into<SocketAddr>) -> bool {
        let mark = nucnet_common::hold::PROBE_MARK;
        self.engine.may_bind(true, mark, protocol, at.into())
    }

    /// Gives an endpoint one more address.
    pub fn own(&mut self, party: &Party, address: IpAddr) {
        self.engine.owner(&to_abi(address), &party.owner());
    }

    /// From now on every random number is this one.
    pub fn draw(&mut self, number: u32) {
        self.engine.draw(number);
    }

    /// From now on somebody reads events.
    pub fn watch(&mut self) {
        self.engine.watch();
    }

    /// What was told since the last time.
    pub fn events(&mut self) -> Vec<Event> {
        self.engine.events()
    }

    /// The only event since the last time.
    #[track_caller]
    pub fn only_event(&mut self) -> Event {
        let events = self.events();
        assert_eq!(events.len(), 1, "{events:?}");
        events[0]
    }

    /// A frame cut short before each of its bytes, as far as the engine takes frames so short.
    pub fn cut_short(&self, whole: &[u8]) -> Vec<Vec<u8>> {
        let ethertype = u16::from_be_bytes([whole[12], whole[13]]);
        (self.engine.shortest_frame(ethertype)..whole.len())
            .map(|length| whole[..length].to_vec())
            .collect()
    }

    /// A frame comes from an interface that no endpoint is behind.
    #[track_caller]
    pub fn from_nobody(&mut self, link: u32, frame: &impl Frame) -> Sent {
        let frame = frame.framed(site::interface(link).mac, ROUTER_MAC);
        self.send(Hook::FromEndpoint { link }, frame, 0)
    }

    /// An endpoint sends a packet to its gateway.
    #[track_caller]
    pub fn from_endpoint(&mut self, party: &Party, frame: &impl Frame) -> Sent {
        let frame = frame.framed(party.gateway_mac(), party.mac);
        self.send(Hook::FromEndpoint { link: party.link }, frame, party.number)
    }

    /// The guest of [`site::GUEST`] sends a frame.
    #[track_caller]
    pub fn from_guest(&mut self, frame: &impl Frame) -> Sent {
        let guest = &site::GUEST;
        let frame = frame.framed(guest.gateway_mac(), guest.mac);
        let hook = Hook::FromGuest { link: site::TAP };
        self.send(hook, frame, guest.number)
    }

    /// A frame comes from a TAP that belongs to no slot.
    #[track_caller]
    pub fn beside_slots(&mut self, frame: &impl Frame) -> Sent {
        let link = site::SLOT.link;
        let frame = frame.framed(site::GUEST.gateway_mac(), site::GUEST.mac);
        self.send(Hook::FromGuest { link }, frame, 0)
    }

    /// A frame comes to the slot of [`site::GUEST`].
    #[track_caller]
    pub fn to_guest(&mut self, frame: &impl Frame) -> Sent {
        let guest = &site::GUEST;
        let frame = frame.framed(guest.mac, guest.gateway_mac());
        let hook = Hook::ToGuest { link: site::WIRE };
        self.send(hook, frame, guest.number)
    }

    /// A packet comes in by an uplink from the router there.
    #[track_caller]
    pub fn from_uplink(&mut self, link: u32, frame: &impl Frame) -> Sent {
        let frame = frame.framed(site::interface(link).mac, ROUTER_MAC);
        self.send(Hook::FromUplink { link }, frame, 0)
    }

    /// An endpoint sends a packet, which leaves by the uplink from this address and port.
    #[track_caller]
    pub fn goes_out(&mut self, party: &Party, packet: &Packet, external: impl Into<SocketAddr>) {
        let router = match packet.destination() {
            IpAddr::V4(_) => site::ROUTER4,
            IpAddr::V6(_) => site::ROUTER6,
        };
        let seen = packet.clone().from(external).one_hop_on();
        let sent = self.from_endpoint(party, packet);
        sent.leaves(site::UPLINK, router, &seen);
    }

    /// A packet comes in by the uplink, and reaches an endpoint at this address and port.
    #[track_caller]
    pub fn comes_in(&mut self, packet: &Packet, party: &Party, inside: impl Into<SocketAddr>) {
        let seen = packet.clone().to(inside).one_hop_on();
        let sent = self.from_uplink(site::UPLINK, packet);
        sent.reaches(party, &seen);
    }

    /// A packet comes in by an uplink without link-layer header.
    #[track_caller]
    pub fn from_tunnel(&mut self, packet: &Packet) -> Sent {
        let link = site::TUNNEL;
        self.send(Hook::FromUplinkL3 { link }, packet.bytes(), 0)
    }

    /// The host sends a packet to an endpoint.
    #[track_caller]
    pub fn from_host(&mut self, party: &Party, frame: &impl Frame) -> Sent {
        self.leaves_bridge(party, frame, 0)
    }

    /// The host's stack forwards a packet to an endpoint that came in by `ingress`.
    #[track_caller]
    pub fn forwarded(&mut self, party: &Party, frame: &impl Frame, ingress: u32) -> Sent {
        self.leaves_bridge(party, frame, ingress)
    }

    #[track_caller]
    fn leaves_bridge(&mut self, party: &Party, frame: &impl Frame, ingress: u32) -> Sent {
        let frame = frame.framed(party.mac, party.gateway_mac());
        let hook = Hook::FromHost {
            link: party.bridge,
            ingress,
        };
        self.send(hook, frame, party.number)
    }

    /// The host sends a packet to itself.
    #[track_caller]
    pub fn to_itself(&mut self, frame: &impl Frame) -> Sent {
        self.leaves_loopback(frame, 0, 0)
    }

    /// A packet of an endpoint's comes to the loopback interface with that mark.
    #[track_caller]
    pub fn comes_to_loopback(&mut self, party: &Party, frame: &impl Frame, mark: u32) -> Sent {
        self.leaves_loopback(frame, party.link, mark)
    }

    #[track_caller]
    fn leaves_loopback(&mut self, frame: &impl Frame, ingress: u32, mark: u32) -> Sent {
        let frame = frame.framed([0; 6], [0; 6]);
        self.send(Hook::FromLoopback { ingress, mark }, frame, 0)
    }

    #[track_caller]
    fn send(&mut self, hook: Hook, input: Vec<u8>, account: u32) -> Sent {
        let (outcome, output) = self.engine.run(hook, &input);
        let problems = self.state().problems();
        assert!(
            problems.is_empty(),
            "after {hook:?} the tables do not agree:\n  {}",
            problems.join("\n  ")
        );
        Sent {
            hook,
            account,
            input,
            outcome,
            output,
        }
    }

    /// The tables of flows.
    pub fn state(&self) -> State {
        self.engine.state()
    }

    /// The only flow there is.
    #[track_caller]
    pub fn only_flow(&self) -> (FlowKey, Flow) {
        let flows = self.state().flows;
        assert_eq!(flows.len(), 1, "flows: {flows:?}");
        flows.into_iter().next().expect("one")
    }

    /// The flow of an endpoint's address and port with a peer, as the endpoint sees it.
    #[track_caller]
    pub fn flow(
        &self,
        protocol: u8,
        inside: impl Into<SocketAddr>,
        peer: impl Into<SocketAddr>,
    ) -> Flow {
        let (inside, peer) = (inside.into(), peer.into());
        let state = self.state();
        let found = state.flows.iter().find(|(key, _)| {
            key.protocol == u32::from(protocol)
                && key.inside == to_abi(inside.ip())
                && key.inside_port == inside.port()
                && key.peer == to_abi(peer.ip())
                && key.peer_port == peer.port()
        });
        match found {
            Some((_, flow)) => *flow,
            None => panic!(
                "no flow of {inside} with {peer} among {:?}",
                state.comparable()
            ),
        }
    }

    /// The state of the only flow there is.
    #[track_caller]
    pub fn only_state(&self) -> FlowState {
        let (_, flow) = self.only_flow();
        state_name(flow.state).expect("state")
    }

    /// How many flows and bindings there are.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.flows.len(), state.bindings.len())
    }
}
