//! What differs between the kernel and a test: tables, clock, random numbers, routes, sockets.
//!
//! The packet itself is the fourth such thing: [`crate::packet::Frame`].

use core::ops::{Deref, DerefMut};

use crate::{
    abi::{
        Address, Binding, Endpoint, Event, EventLimit, Flow, FlowKey, Guest, MappingCount,
        NO_ADDRESS, Network, OutsideKey, Owner, PolicyCidrKey, PolicyClass, PolicyPortKey,
        PolicyRule, Publish, PublishKey, Settings, SlotUse, Snat, SnatKey, StaticMapping, Uplink,
        Usage,
    },
    answer::Account,
    fragment,
    packet::{Family, Frame, Packet, Rewrite, same},
    path::{Drop, Way},
    place::Place,
    step::Steps,
};

/// The notes of a journey. A program's stack has 512 bytes, for all functions together; the
/// kernel keeps these in a map instead, one a processor: programs of these kinds are never
/// interrupted by another on the same processor.
#[derive(Clone, Copy, Debug)]
pub struct Scratch {
    /// The packet.
    pub packet: Packet,
    /// The packet that it quotes, if it is an ICMP error.
    pub quoted: Packet,
    /// What is written into it.
    pub rewrite: Rewrite,
    /// Who sent it, as fragments have it: [`fragment::Key::from`].
    pub from: u32,
    /// What it has in common with the other fragments, if it is one.
    pub fragments: fragment::Key,
    /// Where the first of them went.
    pub note: fragment::Note,
    /// The unit that it exceeds, if it is too long.
    pub mtu: u32,
    /// Its flow, or the one that it opens.
    pub key: FlowKey,
    /// The external view of a flow.
    pub outside: OutsideKey,
    /// Whose external view that is.
    pub found: FlowKey,
    /// A flow that is being made.
    pub flow: Flow,
    /// A binding that is being made.
    pub binding: Binding,
    /// Its key.
    pub inside: FlowKey,
    /// Its external side.
    pub bound: OutsideKey,
    /// The way to the peer.
    pub route: Route,
    /// Where the packet goes next.
    pub way: Way,
    /// Of dead entries.
    pub dead: Dead,
    /// The policy that denies the packet, if that is why it is dropped; 0: nobody wants to know.
    pub policy: u32,
    /// The rule of that policy; 0: its default.
    pub rule: u32,
    /// Whether the policy that denies the packet has its sender told, if that is why it is dropped.
    pub rejects: bool,
}

/// A copy of what a [`crate::abi::Slot`] says, without its lock.
#[derive(Clone, Copy, Debug, Default)]
pub struct Held {
    /// Version of the place.
    pub version: u32,
    /// What holds it: [`SlotUse`].
    pub holds: u32,
    /// The holder.
    pub key: FlowKey,
}

/// Notes on entries that may be dead.
#[derive(Clone, Copy, Debug)]
pub struct Dead {
    /// The place that it holds.
    pub held: Held,
    /// Its external view.
    pub outside: OutsideKey,
    /// Whose external view that is.
    pub named: FlowKey,
    /// The greatest merit so far ([`crate::flow::merit`]).
    pub best: u64,
    /// The place with that merit, if it is a place that is looked for.
    pub place: Place,
}

/// The maps. Methods that change a table say whether *this* call did it, which is what keeps
/// counts exact when several processors do the same at once.
pub trait Tables {
    /// Where a journey keeps its notes.
    type Scratch: DerefMut<Target = Scratch>;
    /// A flow in its table, writable in place.
    type Flow: DerefMut<Target = Flow>;
    /// A binding in its table, writable in place.
    type Binding: DerefMut<Target = Binding>;
    /// A time, writable in place.
    type Budget: DerefMut<Target = u64>;

    /// What the control plane says.
    fn settings(&self) -> Option<&Settings>;
    /// What the network of a number chose.
    fn network(&self, number: u32) -> Option<&Network>;
    /// The endpoint behind a host side interface.
    fn endpoint(&self, link: u32) -> Option<&Endpoint>;
    /// The guest of a microVM behind an interface of its slot's.
    fn guest(&self, link: u32) -> Option<&Guest>;
    /// The endpoint that has an address.
    fn owner(&self, address: &Address) -> Option<&Owner>;
    /// The host interface of an index, if a program sits on it.
    fn uplink(&self, link: u32) -> Option<&Uplink>;
    /// The publish with the longest prefix that covers a key.
    fn publish(&self, key: &PublishKey) -> Option<&Publish>;
    /// The same for hairpins.
    fn hairpin(&self, key: &PublishKey) -> Option<&Publish>;
    /// The static mapping of a number.
    fn mapping(&self, number: u32) -> Option<&StaticMapping>;
    /// The mapping with the longest prefix that covers a source.
    fn snat(&self, key: &SnatKey) -> Option<&Snat>;
    /// Adds to what came by a mapping.
    fn count_mapped(&self, number: u32, more: &MappingCount);
    /// The rules with the longest prefix that covers a destination.
    fn policy_class(&self, key: &PolicyCidrKey) -> Option<&PolicyClass>;
    /// The verdict for a port of a class.
    fn policy_rule(&self, key: &PolicyPortKey) -> Option<&PolicyRule>;

    /// Writes where the first fragment of a packet went to `note`; false: not known.
    fn note(&self, key: &fragment::Key, note: &mut fragment::Note) -> bool;
    /// Notes where the first fragment of a packet went. Who comes late may find it forgotten.
    fn set_note(&self, key: &fragment::Key, note: &fragment::Note);

    /// When an account has used up its errors, writable in place.
    fn budget(&self, account: &Account) -> Option<Self::Budget>;
    /// Opens an account.
    fn insert_budget(&self, account: &Account, used_up: u64);

    /// The notes of this journey, of unspecified contents.
    fn scratch(&self) -> Option<Self::Scratch>;
    /// A flow, dead or alive.
    fn flow(&self, key: &FlowKey) -> Option<Self::Flow>;
    /// A flow that is only looked at.
    fn peek_flow(&self, key: &FlowKey) -> Option<impl Deref<Target = Flow>> {
        self.flow(key)
    }
    /// Adds a flow; false if there is one or the table is full.
    fn insert_flow(&self, key: &FlowKey, flow: &Flow) -> bool;
    /// Removes a flow; false if it was gone.
    fn remove_flow(&self, key: &FlowKey) -> bool;

    /// Whose external view it is, written to `flow`; false: nobody's.
    fn outside(&self, key: &OutsideKey, flow: &mut FlowKey) -> bool;
    /// Adds an external view; false if somebody has it or the table is full.
    fn insert_outside(&self, key: &OutsideKey, flow: &FlowKey) -> bool;
    /// The same for a view that lets a peer in: nobody needs to know whether it succeeded.
    fn insert_permission(&self, key: &OutsideKey, flow: &FlowKey) {
        self.insert_outside(key, flow);
    }
    /// Removes an external view.
    fn remove_outside(&self, key: &OutsideKey);

    /// A binding, dead or alive.
    fn binding(&self, key: &FlowKey) -> Option<Self::Binding>;
    /// The same for a binding that a new flow is to use.
    fn binding_to_use(&self, key: &FlowKey) -> Option<Self::Binding> {
        self.binding(key)
    }
    /// A binding that is only looked at.
    fn peek_binding(&self, key: &FlowKey) -> Option<impl Deref<Target = Binding>> {
        self.binding(key)
    }
    /// Adds a binding; false if there is one or the table is full.
    fn insert_binding(&self, key: &FlowKey, binding: &Binding) -> bool;
    /// Removes a binding; false if it was gone.
    fn remove_binding(&self, key: &FlowKey) -> bool;

    /// Writes a consistent copy of a place to `held`; false: there is no such place.
    fn slot(&self, index: u32, held: &mut Held) -> bool;
    /// Gives a place to a holder, if it has not changed hands since `version`, and writes what it
    /// was until then to `held`.
    fn take_slot(
        &self,
        index: u32,
        version: u32,
        holds: SlotUse,
        key: &FlowKey,
        held: &mut Held,
    ) -> bool;
    /// Gives a place back, if it has not changed hands since `version`.
    fn free_slot(&self, index: u32, version: u32);

    /// What an endpoint uses.
    fn usage(&self, endpoint: u32) -> Option<Usage>;
    /// Adds one to, or takes one from, an endpoint's flows or bindings.
    fn count(&self, endpoint: u32, what: SlotUse, more: bool);
}

/// Where a packet with a destination would go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RouteKind {
    /// To the host itself.
    Local,
    /// Out of an interface.
    Link,
    /// Nowhere.
    None,
}

/// The kernel's answer to a route lookup.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// The gateway, or the destination itself where it is a neighbour.
    pub next_hop: Address,
    /// The host's address towards that destination; zero bytes: the kernel cannot say.
    pub source: Address,
    /// Destination and source of frames to that next hop; zero bytes: the neighbour is not
    /// resolved, or the link has no such addresses.
    pub macs: [u8; 12],
    /// The interface, for [`RouteKind::Link`].
    pub link: u32,
    /// Largest IP packet that the route takes, in bytes; 0: the kernel cannot say.
    pub mtu: u32,
    /// Which of the other fields count.
    pub kind: RouteKind,
}

impl Route {
    /// The host's address towards the destination; where the kernel cannot say, that of the
    /// uplink, if it has one.
    #[inline(always)]
    pub fn source_by(&self, uplink: &Uplink, family: Family) -> Address {
        if !same(&self.source, &NO_ADDRESS) {
            self.source
        } else if family == Family::V4 {
            uplink.address4
        } else {
            uplink.address6
        }
    }
}

/// The rest of the kernel.
pub trait Host {
    /// Monotonic time in nanoseconds.
    fn now(&self) -> u64;
    /// 32 random bits.
    fn random(&self) -> u32;
    /// Looks a route up from the point of view of the interface `from`, into `route`.
    fn route(&self, from: u32, source: &Address, destination: &Address, route: &mut Route);
    /// Whether a socket of the host takes packets of this external view.
    fn has_socket(&self, key: &OutsideKey) -> bool;
    /// The payload of each segment, in bytes, of a frame that is a train of them; 0: it is none.
    fn segment(&self) -> u32;
    /// The interface that the frame came in by; 0: it is the host's own.
    fn ingress(&self) -> u32;
    /// The frame's mark, which stays with it on its way through the host.
    fn mark(&self) -> u32;
    /// Changes the mark.
    fn set_mark(&self, mark: u32);
    /// Whether the frame came in by an interface: it is forwarded, not the host's own.
    fn is_forwarded(&self) -> bool {
        self.ingress() != 0
    }
}

/// Those who want to know what happens.
pub trait Monitors {
    /// Where an event is drafted, one a processor.
    type Draft: DerefMut<Target = Event>;
    /// The limit of an endpoint, writable in place.
    type Limit: DerefMut<Target = EventLimit>;

    /// Until when one of [`MONITORS`](crate::abi::size::MONITORS) monitors reads.
    fn reads_until(&self, monitor: u32) -> u64;
    /// A draft of unspecified contents.
    fn draft(&self) -> Option<Self::Draft>;
    /// The limit of an endpoint, made if there is none. `None`: the table is full.
    fn limit(&self, endpoint: u32) -> Option<Self::Limit>;
    /// Gives an event to a monitor, or counts it as lost.
    fn tell(&self, monitor: u32, event: &Event);
    /// Writes a line about a packet that is dropped, for who debugs the programs.
    fn log(&self, _drop: &Drop) {}
}

/// Everything that a journey needs.
pub trait Env: Frame + Tables + Host + Monitors + Steps + Sized {}

impl<T: Frame + Tables + Host + Monitors + Steps> Env for T {}
