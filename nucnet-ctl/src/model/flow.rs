//! Flows as people read them.

use std::{fmt, net::IpAddr, num::NonZeroU32};

use nucnet_common::{
    abi::{self, Flow, FlowKey, PeerKind, flow_flag},
    flow::SECOND,
};
use serde::{Serialize, Serializer};

use super::{
    EndpointId, from_abi,
    publish::{HostAddress, PublishSpec},
};

/// One conversation and its translation, told as conntrack does: `src` and `dst` are those of the
/// packet that opened it as it was sent, `nat_src` and `nat_dst` those of the same packet as it
/// was delivered. Where nothing is translated, both are the same.
///
/// For ICMP the port of the side that is behind the translation is the query identifier, and the
/// other port is 0.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct FlowView<'a> {
    /// Names this flow and no other while it lives.
    pub id: FlowId,
    /// Whose it is: the endpoint that opened it, or else the one that it was opened to. None: no
    /// record says which that is, or it is a static mapping's.
    pub endpoint: Option<&'a EndpointId>,
    /// Number of the static mapping that it came by.
    pub mapping: Option<NonZeroU32>,
    /// Protocol.
    pub protocol: Protocol,
    /// Who opened it.
    pub direction: Direction,
    /// Source as sent.
    pub src: IpAddr,
    /// Its port.
    pub sport: u16,
    /// Destination as sent.
    pub dst: IpAddr,
    /// Its port.
    pub dport: u16,
    /// Source as delivered.
    pub nat_src: IpAddr,
    /// Its port.
    pub nat_sport: u16,
    /// Destination as delivered.
    pub nat_dst: IpAddr,
    /// Its port.
    pub nat_dport: u16,
    /// How far it is.
    pub state: State,
    /// Packets, both ways.
    pub packets: u64,
    /// Bytes from the IP header on, both ways.
    pub bytes: u64,
    /// Packets that the endpoint sent.
    pub packets_out: u64,
    /// Bytes of them.
    pub bytes_out: u64,
    /// Packets that it received.
    pub packets_in: u64,
    /// Bytes of them.
    pub bytes_in: u64,
    /// Milliseconds since the first packet; none: nobody has noted when that was.
    pub age_ms: Option<u64>,
    /// Milliseconds since the packet that kept it alive last; none: the kernel's table of
    /// connections does not tell.
    pub idle_ms: Option<u64>,
    /// Milliseconds after which it is dead if none comes.
    pub expires_ms: u64,
}

impl<'a> FlowView<'a> {
    /// That of an entry. `now` is CLOCK_MONOTONIC in nanoseconds.
    pub fn of(key: &FlowKey, flow: &Flow, endpoint: Option<&'a EndpointId>, now: u64) -> Self {
        const MILLISECOND: u64 = 1_000_000;
        let since = |then: u64| now.saturating_sub(then) / MILLISECOND;
        let end = flow
            .last_seen
            .saturating_add(u64::from(flow.timeout_s) * SECOND);
        let own = (from_abi(&key.inside), key.inside_port);
        let seen = (from_abi(&flow.external), flow.external_port);
        let peer = (from_abi(&flow.peer), flow.peer_port);
        let addressed = (from_abi(&key.peer), key.peer_port);
        let (direction, [src, dst, nat_src, nat_dst]) = match flow.flags & flow_flag::INBOUND {
            0 => (Direction::Out, [own, addressed, seen, peer]),
            _ => (Direction::In, [peer, seen, addressed, own]),
        };
        Self {
            id: FlowId {
                slot: flow.slot,
                version: flow.slot_version,
            },
            endpoint,
            mapping: NonZeroU32::new(flow.mapping),
            protocol: Protocol(key.protocol),
            direction,
            src: src.0,
            sport: src.1,
            dst: dst.0,
            dport: dst.1,
            nat_src: nat_src.0,
            nat_sport: nat_src.1,
            nat_dst: nat_dst.0,
            nat_dport: nat_dst.1,
            state: State(flow.state),
            packets: flow.packets_out.saturating_add(flow.packets_in),
            bytes: flow.bytes_out.saturating_add(flow.bytes_in),
            packets_out: flow.packets_out,
            bytes_out: flow.bytes_out,
            packets_in: flow.packets_in,
            bytes_in: flow.bytes_in,
            age_ms: Some(since(flow.created)),
            idle_ms: Some(since(flow.last_seen)),
            expires_ms: end.saturating_sub(now) / MILLISECOND,
        }
    }
}

/// The place that a flow has in the datapath, and how often that has changed hands. Of a connection
/// of the kernel's, its number and when it began, for numbers are given again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowId {
    slot: u32,
    version: u32,
}

impl FlowId {
    /// Of a number, and what tells flows apart that have it one after the other.
    pub fn new(slot: u32, version: u32) -> Self {
        Self { slot, version }
    }
}

impl fmt::Display for FlowId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.slot, self.version)
    }
}

impl Serialize for FlowId {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// An IP protocol by its name, or by its number where nucnet has no name for it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Protocol(u32);

impl From<u8> for Protocol {
    fn from(number: u8) -> Self {
        Self(number.into())
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("icmp"),
            6 => f.write_str("tcp"),
            17 => f.write_str("udp"),
            58 => f.write_str("icmpv6"),
            other => write!(f, "{other}"),
        }
    }
}

impl Serialize for Protocol {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// Who opened a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// The endpoint did.
    Out,
    /// The other side did.
    In,
}

/// How far a flow is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct State(u32);

impl From<abi::FlowState> for State {
    fn from(state: abi::FlowState) -> Self {
        Self(state as u32)
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const NAMES: [(abi::FlowState, &str); 4] = [
            (abi::FlowState::Opening, "opening"),
            (abi::FlowState::Established, "established"),
            (abi::FlowState::Closing, "closing"),
            (abi::FlowState::Closed, "closed"),
        ];
        let name = NAMES.iter().find(|(state, _)| *state as u32 == self.0);
        f.write_str(name.map_or("unknown", |(_, name)| name))
    }
}

impl Serialize for State {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

/// One endpoint of all whose flows there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Party {
    /// The endpoint's number.
    pub number: u32,
    /// Index of its host side interface; none: there is none, and nobody's packets go there.
    pub link: Option<u32>,
}

impl Party {
    /// Whether it is one of the two sides of a flow.
    pub fn takes_part(self, key: &FlowKey, flow: &Flow) -> bool {
        key.endpoint == self.number || self.was_opened_to(flow)
    }

    /// Whether another endpoint opened the flow to this one.
    pub fn was_opened_to(self, flow: &Flow) -> bool {
        flow.peer_kind == PeerKind::Endpoint as u32 && self.link == Some(flow.peer_link)
    }

    /// Whether a flow came to this endpoint by one of its publishes: from outside, from the host,
    /// or from an endpoint of the same host.
    pub fn came_by(self, publish: &PublishSpec, key: &FlowKey, flow: &Flow) -> bool {
        let Some(host_ports) = publish.host_ports() else {
            return false;
        };
        let through = |asked: (&abi::Address, u16), port: u16| {
            let address = from_abi(asked.0);
            let is_meant = match publish.host() {
                HostAddress::One(one) => one == address,
                any if address.is_ipv4() => any.v4(),
                any => any.v6(),
            };
            is_meant && host_ports.contains(asked.1) && publish.ports().contains(port)
        };
        if key.protocol != u32::from(publish.protocol().number()) {
            return false;
        }
        if key.endpoint == self.number && flow.flags & flow_flag::INBOUND != 0 {
            return through((&flow.external, flow.external_port), key.inside_port);
        }
        // A sibling that speaks to the endpoint's own address did not come by a publish.
        self.was_opened_to(flow)
            && key.peer != flow.peer
            && through((&key.peer, key.peer_port), flow.peer_port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::to_abi;

    fn address(text: &str) -> abi::Address {
        to_abi(text.parse().expect("address"))
    }

    /// From 10.0.42.7:5000 to 192.0.2.1:443, seen as 192.0.2.2:20000.
    fn outbound() -> (FlowKey, Flow) {
        let key = FlowKey {
            endpoint: 7,
            protocol: 6,
            inside: address("10.0.42.7"),
            peer: address("192.0.2.1"),
            inside_port: 5000,
            peer_port: 443,
        };
        let flow = Flow {
            created: SECOND,
            last_seen: 3 * SECOND,
            packets_out: 2,
            bytes_out: 200,
            packets_in: 1,
            bytes_in: 50,
            external: address("192.0.2.2"),
            peer: key.peer,
            external_port: 20000,
            peer_port: 443,
            state: abi::FlowState::Established as u32,
            peer_kind: PeerKind::Uplink as u32,
            timeout_s: 10,
            slot: 12,
            slot_version: 3,
            ..Flow::default()
        };
        (key, flow)
    }

    /// From 198.51.100.1:6000 to 192.0.2.2:8080, which is port 80 of 10.0.42.7.
    fn inbound() -> (FlowKey, Flow) {
        let key = FlowKey {
            endpoint: 7,
            protocol: 6,
            inside: address("10.0.42.7"),
            peer: address("198.51.100.1"),
            inside_port: 80,
            peer_port: 6000,
        };
        let flow = Flow {
            external: address("192.0.2.2"),
            peer: key.peer,
            external_port: 8080,
            peer_port: 6000,
            flags: flow_flag::INBOUND,
            peer_kind: PeerKind::Uplink as u32,
            ..Flow::default()
        };
        (key, flow)
    }

    /// From 10.0.42.9:7000 to 192.0.2.2:8080, which is port 80 of 10.0.42.7, on link 3.
    fn from_sibling() -> (FlowKey, Flow) {
        let key = FlowKey {
            endpoint: 9,
            protocol: 6,
            inside: address("10.0.42.9"),
            peer: address("192.0.2.2"),
            inside_port: 7000,
            peer_port: 8080,
        };
        let flow = Flow {
            external: key.inside,
            peer: address("10.0.42.7"),
            external_port: 7000,
            peer_port: 80,
            peer_kind: PeerKind::Endpoint as u32,
            peer_link: 3,
            ..Flow::default()
        };
        (key, flow)
    }

    const PARTY: Party = Party {
        number: 7,
        link: Some(3),
    };

    fn spec(text: &str) -> PublishSpec {
        text.parse().expect("publish")
    }

    #[test]
    fn outbound_flow_is_told_from_the_endpoint_on() {
        let (key, flow) = outbound();
        let view = serde_json::to_value(FlowView::of(&key, &flow, None, 5 * SECOND)).expect("JSON");
        let wanted = serde_json::json!({
            "id": "12.3", "endpoint": null, "mapping": null, "protocol": "tcp", "direction": "out",
            "src": "10.0.42.7", "sport": 5000, "dst": "192.0.2.1", "dport": 443,
            "nat_src": "192.0.2.2", "nat_sport": 20000, "nat_dst": "192.0.2.1", "nat_dport": 443,
            "state": "established", "packets": 3, "bytes": 250,
            "packets_out": 2, "bytes_out": 200, "packets_in": 1, "bytes_in": 50,
            "age_ms": 4000, "idle_ms": 2000, "expires_ms": 8000,
        });
        assert_eq!(view, wanted);
    }

    #[test]
    fn inbound_flow_is_told_from_the_client_on() {
        let (key, flow) = inbound();
        let view = FlowView::of(&key, &flow, None, 0);
        let text = |(address, port): (IpAddr, u16)| format!("{address}:{port}");
        assert_eq!(view.direction, Direction::In);
        assert_eq!(text((view.src, view.sport)), "198.51.100.1:6000");
        assert_eq!(text((view.dst, view.dport)), "192.0.2.2:8080");
        assert_eq!(text((view.nat_src, view.nat_sport)), "198.51.100.1:6000");
        assert_eq!(text((view.nat_dst, view.nat_dport)), "10.0.42.7:80");
    }

    #[test]
    fn flow_between_endpoints_belongs_to_both() {
        let (key, flow) = from_sibling();
        let other = Party {
            number: 9,
            link: Some(4),
        };
        let third = Party {
            number: 8,
            link: Some(5),
        };
        assert!(PARTY.takes_part(&key, &flow) && other.takes_part(&key, &flow));
        assert!(!third.takes_part(&key, &flow));
        // An uplink may have any index.
        let (key, mut flow) = outbound();
        flow.peer_link = 5;
        assert!(!third.takes_part(&key, &flow));
    }

    #[test]
    fn publish_is_known_by_protocol_address_and_both_ports() {
        let (key, flow) = inbound();
        for (text, came_by) in [
            ("8080:80", true),
            ("8070-8089:70-89", true),
            ("192.0.2.2:8080:80", true),
            ("0.0.0.0:8080:80", true),
            ("[::]:8080:80", false),
            ("127.0.0.1:8080:80", false),
            ("8080:80/udp", false),
            ("8081:80", false),
            ("8080:81", false),
        ] {
            assert_eq!(PARTY.came_by(&spec(text), &key, &flow), came_by, "{text}");
        }
        let stranger = Party {
            number: 8,
            link: Some(9),
        };
        assert!(!stranger.came_by(&spec("8080:80"), &key, &flow));
        let (key, flow) = outbound();
        assert!(!PARTY.came_by(&spec("20000:5000"), &key, &flow));
    }

    #[test]
    fn sibling_came_by_a_publish_unless_it_spoke_to_the_endpoint_itself() {
        let (mut key, flow) = from_sibling();
        assert!(PARTY.came_by(&spec("8080:80"), &key, &flow));
        assert!(!PARTY.came_by(&spec("8081:80"), &key, &flow));
        (key.peer, key.peer_port) = (flow.peer, flow.peer_port);
        assert!(!PARTY.came_by(&spec("80:80"), &key, &flow));
    }
}
