//! What monitors are told where rules carry packets: refusals, which the rules log, and connections
//! as the kernel tells of them.
//!
//! Of either an event is made as a program would have written it, within the same limits.

use super::{Error, Host};
use crate::{
    kernel::{
        bpf::{BpfError, monotonic},
        netfilter::{
            ConnectionChange, ConnectionEvents, Conntrack, Log, Logged, TcpState, Tracked, readers,
        },
        netlink::Netlink,
    },
    model::{
        flow::FlowView,
        netfilter::{MONITOR_GROUPS, Tuple},
        record::DatapathKind,
        to_abi,
    },
    verbs::{connections::Parties, list::readable, naming::policies, netfilter::local},
};
use nucnet_common::{
    abi::{self, Event, EventKind, EventLimit, Reason},
    event::{tells_flow, tells_refusal},
};
use std::{
    collections::{HashMap, HashSet},
    os::fd::{AsFd, BorrowedFd},
};

/// Reads what rules and the kernel tell.
pub(super) struct RulesReader {
    log: Log,
    connections: ConnectionEvents,
    table: Conntrack,
    known: Known,
    limits: HashMap<u32, EventLimit>,
    /// Connections that are over, as was told, and that the kernel has not forgotten yet.
    closed: HashSet<u32>,
    lost: Vec<u64>,
}

impl RulesReader {
    pub(super) fn open() -> Result<Self, Error> {
        // The first such socket has the process's id for a port, by which others know it.
        let mut log = Log::open().map_err(Error::Log)?;
        let connections = ConnectionEvents::open().map_err(Error::Conntrack)?;
        let table = Conntrack::open().map_err(Error::Conntrack)?;
        if !log.take(MONITOR_GROUPS).map_err(Error::Log)? {
            let mut holders = readers().map_err(Error::Log)?;
            holders.retain(|(group, _)| MONITOR_GROUPS.contains(group));
            let holders = holders.into_iter().map(|(_, process)| process).collect();
            return Err(BpfError::MonitorsBusy { holders }.into());
        }
        Ok(Self {
            log,
            connections,
            table,
            known: Known::default(),
            limits: HashMap::new(),
            closed: HashSet::new(),
            lost: Vec::new(),
        })
    }

    pub(super) fn stay(&mut self, host: &Host) -> Result<bool, Error> {
        // Two changes may have one time.
        self.known.changed = None;
        host.is_by_rules()
    }

    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        vec![self.log.as_fd(), self.connections.as_fd()]
    }

    pub(super) fn read(&mut self, host: &Host, events: &mut Vec<Event>) -> Result<(), Error> {
        let (logged, lost) = self.log.read().map_err(Error::Log)?;
        let (changes, is_whole) = self.connections.read().map_err(Error::Conntrack)?;
        if lost > 0 {
            self.lost.push(lost);
        }
        if !is_whole {
            self.lost.push(0);
            // Their end may have been among it.
            self.closed.clear();
        }
        if logged.is_empty() && changes.is_empty() {
            return Ok(());
        }
        if self.known.refresh(host)? {
            // Numbers are never given twice.
            let parties = &self.known.parties;
            let is_known =
                |number: &u32| matches!(*number, 0 | abi::MAPPED) || parties.has(*number);
            self.limits.retain(|number, _| is_known(number));
        }
        let now = monotonic()?;
        for logged in logged {
            events.extend(self.refusal(&logged, now)?);
        }
        // What moves to the other datapath goes on there, and is not over.
        let carrier = host.carrier()?;
        if carrier.is_some_and(|it| it.kind == DatapathKind::Iptables && !it.moving) {
            for change in changes {
                events.extend(self.flow(change, now)?);
            }
        }
        Ok(())
    }

    pub(super) fn take_lost(&mut self) -> Vec<u64> {
        std::mem::take(&mut self.lost)
    }

    /// The event of a packet that was refused; none: it is no news.
    fn refusal(&mut self, logged: &Logged, now: u64) -> Result<Option<Event>, Error> {
        let Some(reason) = Reason::named(&logged.prefix) else {
            return Ok(None);
        };
        let is_denied = reason == Reason::Policy;
        let really = logged.packet;
        // Of what policies deny, the source is the endpoint's: the guards have seen to that.
        let endpoint = match (is_denied, really) {
            (true, Some(packet)) => self.known.parties.holder(packet.source),
            _ => logged
                .sender
                .and_then(|mac| self.known.parties.station(mac)),
        };
        let is_asker =
            |asked: &Tuple| is_denied && really.is_some_and(|it| it.source == asked.source);
        let asked = logged.asked.filter(is_asker).or(really);
        let mut event = Event {
            time: now,
            kind: match is_denied {
                true => EventKind::Denied as u32,
                false => EventKind::Dropped as u32,
            },
            endpoint: endpoint.map_or(0, |endpoint| endpoint.number),
            reason: reason as u32,
            ..asked.map(event_of_packet).unwrap_or_default()
        };
        let limit = self.limits.entry(event.endpoint).or_default();
        if !tells_refusal(limit, &mut event) {
            return Ok(None);
        }
        if is_denied && let (Some(endpoint), Some(asked), Some(really)) = (endpoint, asked, really)
        {
            let hosts = local(&Netlink::open()?)?;
            let goes_to = |packet: Tuple| packet.goes_to(hosts.contains(&packet.destination));
            let (asked, really) = (goes_to(asked), goes_to(really));
            // While it is being changed, either may be in force.
            for (number, policy) in policies(endpoint) {
                if let Some(rule) = policy.denied_by(&asked, &really) {
                    (event.policy, event.rule) = (number, rule);
                    break;
                }
            }
        }
        Ok(Some(event))
    }

    /// The event of a flow that comes or goes; none: it does neither, or is nobody's.
    fn flow(&mut self, change: ConnectionChange, now: u64) -> Result<Option<Event>, Error> {
        let (kind, tracked) = match change {
            ConnectionChange::New(tracked) => (EventKind::FlowNew, tracked),
            ConnectionChange::Other(tracked) => {
                let is_over = tracked.tcp == Some(TcpState::Closed);
                let is_flow = is_over && self.known.parties.flow(&tracked, 0).is_some();
                if !is_flow || !self.closed.insert(tracked.id) {
                    return Ok(None);
                }
                (EventKind::FlowClosed, self.counted(tracked)?)
            }
            ConnectionChange::Gone(tracked) if self.closed.remove(&tracked.id) => return Ok(None),
            ConnectionChange::Gone(tracked) => (EventKind::FlowClosed, tracked),
        };
        let parties = &self.known.parties;
        let Some(flow) = parties.flow(&tracked, 0) else {
            return Ok(None);
        };
        let opener = parties.holder(tracked.original.source);
        let owner = opener.or_else(|| parties.holder(tracked.reply.source));
        let number = owner.map_or(abi::MAPPED, |endpoint| endpoint.number);
        let mut event = Event {
            kind: kind as u32,
            endpoint: number,
            protocol: tracked.original.protocol.into(),
            time: now,
            ..event_of_flow(&flow)
        };
        let limit = self.limits.entry(number).or_default();
        Ok(tells_flow(limit, &mut event).then_some(event))
    }

    /// The same with what it has counted, which the kernel tells only of one that it forgets.
    fn counted(&self, tracked: Tracked) -> Result<Tracked, Error> {
        let now = self.table.look(&tracked).map_err(Error::Conntrack)?;
        Ok(now.filter(|now| now.id == tracked.id).unwrap_or(tracked))
    }
}

fn event_of_packet(packet: Tuple) -> Event {
    Event {
        source: to_abi(packet.source),
        source_port: packet.source_port,
        destination: to_abi(packet.destination),
        destination_port: packet.destination_port,
        protocol: packet.protocol.into(),
        ..Event::default()
    }
}

fn event_of_flow(flow: &FlowView<'_>) -> Event {
    Event {
        packets: flow.packets,
        bytes: flow.bytes,
        source: to_abi(flow.src),
        source_port: flow.sport,
        destination: to_abi(flow.dst),
        destination_port: flow.dport,
        nat_source: to_abi(flow.nat_src),
        nat_source_port: flow.nat_sport,
        nat_destination: to_abi(flow.nat_dst),
        nat_destination_port: flow.nat_dport,
        ..Event::default()
    }
}

/// Whose packets and connections are told about, as of the latest look at the records.
#[derive(Default)]
struct Known {
    parties: Parties,
    /// When the records had changed; none: they are to be read.
    changed: Option<Vec<(i64, i64)>>,
}

impl Known {
    /// Reads the records, if they have changed: then `true`.
    fn refresh(&mut self, host: &Host) -> Result<bool, Error> {
        let Some(store) = host.read()? else {
            *self = Self::default();
            return Ok(true);
        };
        let changed = Some(store.changed()?);
        if self.changed == changed {
            return Ok(false);
        }
        let endpoints = readable(store.endpoints()?);
        let mappings = readable(store.mappings()?);
        self.parties = Parties::new(endpoints, mappings, None);
        self.changed = changed;
        Ok(true)
    }
}
