//! Events as people and scripts read them.

use super::Error;
use crate::{
    kernel::bpf::monotonic,
    model::{EndpointId, from_abi},
};
use nucnet_common::{
    abi::{Event, EventKind, Reason},
    packet::{ICMP, ICMPV6, TCP, UDP},
};
use serde::Serialize;
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    time::{Duration, SystemTime},
};

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
    /// one because there were too many; how many were lost, if that is what happened (0: nobody
    /// knows).
    pub suppressed: u64,
    /// What the programs say, in their own words.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

impl EventView {
    /// That of an event. Whose it is and, of a denial, by which rule, is told by who knows the
    /// numbers.
    pub(super) fn of(
        event: &Event,
        endpoint: Option<EndpointId>,
        rule: Option<String>,
        clock: &Clock,
    ) -> Self {
        let name = name(event);
        let is_flow = matches!(name, EventName::FlowNew | EventName::FlowClosed);
        let is_read = event.source != [0; 16];
        let protocol = (event.protocol != 0).then(|| protocol_name(event.protocol));
        let has_ports = [TCP, UDP].map(u32::from).contains(&event.protocol);
        let is_icmp = [ICMP, ICMPV6].map(u32::from).contains(&event.protocol);
        let port = |port| (has_ports || is_icmp).then_some(port);
        let address = |address| is_read.then(|| from_abi(address));
        Self {
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
        }
    }

    /// One that is about no packet and no flow, as of now.
    pub(super) fn bare(event: EventName, clock: &Clock) -> Self {
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
            let count = match self.suppressed {
                0 => String::new(),
                count => format!("{count} "),
            };
            return write!(f, "{}  lost {count}events: not read fast enough", self.time);
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

/// What happened, by the number of its kind.
pub(super) fn name(event: &Event) -> EventName {
    match event.kind {
        kind if kind == EventKind::Denied as u32 => EventName::Denied,
        kind if kind == EventKind::FlowNew as u32 => EventName::FlowNew,
        kind if kind == EventKind::FlowClosed as u32 => EventName::FlowClosed,
        _ => EventName::Dropped,
    }
}

/// The name that rules have for an IP protocol, or its number.
fn protocol_name(protocol: u32) -> String {
    match u8::try_from(protocol) {
        Ok(TCP) => "tcp".to_owned(),
        Ok(UDP) => "udp".to_owned(),
        Ok(ICMP | ICMPV6) => "icmp".to_owned(),
        _ => protocol.to_string(),
    }
}

/// What the programs' clock and the wall's say at one moment.
pub(super) struct Clock {
    monotonic: u64,
    wall: SystemTime,
}

impl Clock {
    pub(super) fn now() -> Result<Self, Error> {
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
