//! `monitor`: what is refused, and which flows come and go, while it happens.

use super::{Error, Host, naming::Naming};
use crate::{
    kernel::bpf::{self, Datapath, EventReader, LogReader, monotonic},
    model::{EndpointId, from_abi},
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nucnet_common::{
    abi::{Event, EventKind, Reason},
    packet::{ICMP, ICMPV6, TCP, UDP},
};
use serde::Serialize;
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    thread,
    time::{Duration, Instant, SystemTime},
};

/// How often a monitor says that it is still there, and looks whether the datapath is.
const TICK: Duration = Duration::from_secs(1);

/// How often a monitor looks for events, since nobody wakes it.
const LOOK: Duration = Duration::from_millis(20);

/// Most events that one call gives.
const BATCH: usize = 1024;

/// What happened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum EventName {
    /// The endpoint's policy denied a packet.
    Denied,
    /// A packet was dropped for another reason.
    Dropped,
    /// A flow was opened.
    FlowNew,
    /// A flow is over.
    FlowClosed,
    /// Events found no room in the buffer: nobody read fast enough.
    Lost,
    /// What the programs themselves say about the packet of an event.
    Debug,
}

/// An event. Of a refused packet, the addresses are those that it had; of a flow, those of its
/// first packet, and with `nat_` what they are translated to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EventView {
    /// When, as RFC 3339 has it, in UTC.
    pub time: String,
    /// What.
    pub event: EventName,
    /// Whose; none: nobody's, or of an endpoint that left no trace.
    pub endpoint: Option<EndpointId>,
    /// IP protocol: a name, or a number where there is none here; none: it could not be read.
    pub protocol: Option<String>,
    /// Source address.
    pub src: Option<IpAddr>,
    /// Source port; of an ICMP echo, its identifier.
    pub sport: Option<u16>,
    /// Destination address.
    pub dst: Option<IpAddr>,
    /// Destination port; 0 for ICMP.
    pub dport: Option<u16>,
    /// Why it was refused.
    pub reason: Option<&'static str>,
    /// The rule that denied it, or "default".
    pub rule: Option<String>,
    /// Source address after translation.
    pub nat_src: Option<IpAddr>,
    /// Source port after translation.
    pub nat_sport: Option<u16>,
    /// Destination address after translation.
    pub nat_dst: Option<IpAddr>,
    /// Destination port after translation.
    pub nat_dport: Option<u16>,
    /// Of a flow: packets in both directions.
    pub packets: Option<u64>,
    /// Bytes of them, from the IP header on.
    pub bytes: Option<u64>,
    /// Events of that endpoint, of that sort (refusals or flows), which were left out before this
    /// one because there were too many; how many were lost, if that is what happened.
    pub suppressed: u64,
    /// What the programs say, in their own words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl EventView {
    /// One that is about no packet and no flow, as of now.
    fn bare(event: EventName, clock: &Clock) -> Self {
        Self {
            time: clock.text(clock.monotonic),
            event,
            endpoint: None,
            protocol: None,
            src: None,
            sport: None,
            dst: None,
            dport: None,
            reason: None,
            rule: None,
            nat_src: None,
            nat_sport: None,
            nat_dst: None,
            nat_dport: None,
            packets: None,
            bytes: None,
            suppressed: 0,
            message: None,
        }
    }
}

impl fmt::Display for EventView {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.event == EventName::Lost {
            let count = self.suppressed;
            return write!(
                f,
                "{}  lost {count} events: not read fast enough",
                self.time
            );
        }
        if let Some(message) = &self.message {
            return write!(f, "{}  debug    {message}", self.time);
        }
        let name = match self.event {
            EventName::Denied => "denied",
            EventName::Dropped => "dropped",
            EventName::FlowNew => "new",
            EventName::FlowClosed => "closed",
            EventName::Lost => "lost",
            EventName::Debug => "debug",
        };
        let id = self.endpoint.as_ref().map_or("-", EndpointId::as_str);
        write!(f, "{}  {name:<7}  {id}", self.time)?;
        if let (Some(protocol), Some(src), Some(dst)) = (&self.protocol, self.src, self.dst) {
            let (from, to) = (Side(src, self.sport), Side(dst, self.dport));
            write!(f, "  {protocol} {from} -> {to}")?;
            let nat = (self.nat_src, self.nat_sport, self.nat_dst, self.nat_dport);
            if let (Some(nat_src), sport, Some(nat_dst), dport) = nat
                && nat != (Some(src), self.sport, Some(dst), self.dport)
            {
                write!(
                    f,
                    " as {} -> {}",
                    Side(nat_src, sport),
                    Side(nat_dst, dport)
                )?;
            }
        }
        if let (Some(packets), Some(bytes), EventName::FlowClosed) =
            (self.packets, self.bytes, self.event)
        {
            write!(f, "  {packets} packets, {bytes} bytes")?;
        }
        match (&self.rule, self.reason) {
            (Some(rule), _) => write!(f, "  by rule {rule}")?,
            (None, Some(reason)) => write!(f, "  {reason}")?,
            (None, None) => {}
        }
        if self.suppressed > 0 {
            write!(f, "  ({} more before it)", self.suppressed)?;
        }
        Ok(())
    }
}

/// An address, with its port if it has one.
struct Side(IpAddr, Option<u16>);

impl fmt::Display for Side {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Self(address, Some(port)) => SocketAddr::new(address, port).fmt(f),
            Self(address, None) => address.fmt(f),
        }
    }
}

/// Reads events, of endpoints that come and go meanwhile, too, and over times at which nothing is
/// attached.
pub struct Monitor {
    host: Host,
    only: Option<EndpointId>,
    /// Whether the programs' debug output is wanted, too.
    debugs: bool,
    reader: Option<Reader>,
    stayed: Instant,
    naming: Naming,
}

struct Reader {
    events: EventReader,
    log: Option<LogReader>,
}

impl Reader {
    fn stay(&mut self) -> Result<bool, Error> {
        let keeps_log = match &mut self.log {
            Some(log) => log.stay()?,
            None => true,
        };
        Ok(keeps_log && self.events.stay()?)
    }
}

impl Host {
    /// Begins to read events: all, or those of one endpoint.
    ///
    /// # Errors
    /// Kind [`NotFound`](crate::Kind::NotFound): there is no such endpoint.
    /// [`Conflict`](crate::Kind::Conflict): as many monitors as may are running.
    pub fn monitor(&self, only: Option<EndpointId>) -> Result<Monitor, Error> {
        self.begin_monitor(only, false)
    }

    /// Begins to read all events, and what the programs themselves have to say about packets that
    /// they drop.
    ///
    /// # Errors
    /// [`Conflict`](crate::Kind::Conflict): another one does, or as many monitors as may are
    /// running.
    pub fn monitor_debug(&self) -> Result<Monitor, Error> {
        self.begin_monitor(None, true)
    }

    fn begin_monitor(&self, only: Option<EndpointId>, debugs: bool) -> Result<Monitor, Error> {
        self.needs_programs("monitor")?;
        if let Some(id) = &only {
            self.read_endpoint(id)?;
        }
        let mut monitor = Monitor {
            host: self.clone(),
            only,
            debugs,
            reader: None,
            stayed: Instant::now(),
            naming: Naming::default(),
        };
        monitor.find_reader()?;
        Ok(monitor)
    }
}

impl Monitor {
    /// Whether there is a datapath to read from.
    pub fn is_reading(&self) -> bool {
        self.reader.is_some()
    }

    /// The events that there are, or that come within `patience`: none, if none does. Whoever
    /// does not call it every few seconds misses events.
    pub fn wait(&mut self, patience: Duration) -> Result<Vec<EventView>, Error> {
        if self.reader.is_none() || self.stayed.elapsed() >= TICK {
            self.find_reader()?;
        }
        let patience = patience.min(TICK);
        let Some(reader) = &mut self.reader else {
            thread::sleep(patience);
            return Ok(Vec::new());
        };
        let deadline = Instant::now() + patience;
        let mut events = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::MAX);
            let mut fds = vec![PollFd::new(reader.events.as_fd(), PollFlags::POLLIN)];
            let log = reader.log.as_ref();
            fds.extend(log.map(|log| PollFd::new(log.as_fd(), PollFlags::POLLIN)));
            // A signal ends one look early, which is as good as nothing having come.
            let is_something_there = poll(&mut fds, timeout).is_ok_and(|ready| ready > 0);
            while events.len() < BATCH
                && let Some(event) = reader.events.read()
            {
                events.push(event);
            }
            if is_something_there || !events.is_empty() || left.is_zero() {
                break;
            }
        }
        let lost = reader.events.take_lost()?;
        let log = reader.log.as_mut();
        let messages = log.map(LogReader::read).unwrap_or_default();
        let clock = Clock::now()?;
        let mut views = Vec::new();
        for event in events {
            let view = self.view(&event, &clock)?;
            if self.only.is_none() || self.only == view.endpoint {
                views.push(view);
            }
        }
        if lost > 0 {
            let mut view = EventView::bare(EventName::Lost, &clock);
            view.suppressed = lost;
            views.push(view);
        }
        for message in messages {
            let mut view = EventView::bare(EventName::Debug, &clock);
            view.message = Some(message);
            views.push(view);
        }
        Ok(views)
    }

    fn find_reader(&mut self) -> Result<(), Error> {
        self.stayed = Instant::now();
        let bpffs = &self.host.options.bpffs;
        if let Some(reader) = &mut self.reader {
            // `down` takes the pins away; what comes after it has other maps.
            if Datapath::pinned(bpffs)?.is_some() && reader.stay()? {
                return Ok(());
            }
            self.reader = None;
        }
        if let Some(mut datapath) = Datapath::open_existing(bpffs, &bpf::Host::current()?)? {
            let log = match self.debugs {
                true => Some(datapath.read_log()?),
                false => None,
            };
            let events = datapath.read_events()?;
            self.reader = Some(Reader { events, log });
        }
        Ok(())
    }

    fn view(&mut self, event: &Event, clock: &Clock) -> Result<EventView, Error> {
        let name = match event.kind {
            kind if kind == EventKind::Denied as u32 => EventName::Denied,
            kind if kind == EventKind::FlowNew as u32 => EventName::FlowNew,
            kind if kind == EventKind::FlowClosed as u32 => EventName::FlowClosed,
            _ => EventName::Dropped,
        };
        let endpoint = self.naming.endpoint(&self.host, event.endpoint)?;
        let rule = match name {
            EventName::Denied => Some(self.naming.rule(&self.host, event.policy, event.rule)?),
            _ => None,
        };
        let is_flow = matches!(name, EventName::FlowNew | EventName::FlowClosed);
        let is_read = event.source != [0; 16];
        let protocol = (event.protocol != 0).then(|| protocol_name(event.protocol));
        let has_ports = [TCP, UDP].map(u32::from).contains(&event.protocol);
        let is_icmp = [ICMP, ICMPV6].map(u32::from).contains(&event.protocol);
        let port = |port| (has_ports || is_icmp).then_some(port);
        let address = |address| is_read.then(|| from_abi(address));
        Ok(EventView {
            time: clock.text(event.time),
            event: name,
            endpoint,
            protocol: protocol.filter(|_| is_read),
            src: address(&event.source),
            sport: port(event.source_port),
            dst: address(&event.destination),
            dport: port(event.destination_port),
            reason: Reason::from_number(event.reason).map(Reason::name),
            rule,
            nat_src: address(&event.nat_source).filter(|_| is_flow),
            nat_sport: port(event.nat_source_port).filter(|_| is_flow),
            nat_dst: address(&event.nat_destination).filter(|_| is_flow),
            nat_dport: port(event.nat_destination_port).filter(|_| is_flow),
            packets: is_flow.then_some(event.packets),
            bytes: is_flow.then_some(event.bytes),
            suppressed: event.suppressed,
            message: None,
        })
    }
}

/// The name that rules have for an IP protocol, or its number.
pub(super) fn protocol_name(protocol: u32) -> String {
    match u8::try_from(protocol) {
        Ok(TCP) => "tcp".to_owned(),
        Ok(UDP) => "udp".to_owned(),
        Ok(ICMP | ICMPV6) => "icmp".to_owned(),
        _ => protocol.to_string(),
    }
}

/// What the programs' clock and the wall's say at one moment.
struct Clock {
    monotonic: u64,
    wall: SystemTime,
}

impl Clock {
    fn now() -> Result<Self, Error> {
        Ok(Self {
            monotonic: monotonic()?,
            wall: SystemTime::now(),
        })
    }

    fn text(&self, time: u64) -> String {
        let ago = Duration::from_nanos(self.monotonic.saturating_sub(time));
        humantime::format_rfc3339_micros(self.wall - ago).to_string()
    }
}
