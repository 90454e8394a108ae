//! A flow and an entry of the kernel's table of connections say the same: who asked whom, and how
//! the answer comes back. Each as the other; nothing here asks the host anything.

use crate::{
    kernel::{
        bpf::LOOPBACK,
        netfilter::{Adopted, TcpState, Tracked},
    },
    model::{
        from_abi,
        netfilter::Tuple,
        record::{EndpointRecord, MappingRecord, NetworkRecord},
        to_abi,
    },
    verbs::netfilter::came_by,
};
use nucnet_common::{
    abi::{Flow, FlowKey, FlowState, PeerKind, UNJUDGED, flow_flag},
    flow::SECOND,
    packet::{TCP, UDP},
};
use std::net::IpAddr;

/// A flow as the kernel is to track it. `None`: it is over, or a query of ICMP, which begins
/// anew with the next one.
pub(super) fn connection(key: &FlowKey, flow: &Flow, now: u64) -> Option<Adopted> {
    let protocol = u8::try_from(key.protocol).ok()?;
    let tcp = match protocol {
        TCP => Some(tcp_state(flow)?),
        UDP => None,
        _ => return None,
    };
    let (own, seen) = (
        (from_abi(&key.inside), key.inside_port),
        (from_abi(&flow.external), flow.external_port),
    );
    let (peer, addressed) = (
        (from_abi(&flow.peer), flow.peer_port),
        (from_abi(&key.peer), key.peer_port),
    );
    let between = |(source, source_port), (destination, destination_port)| Tuple {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
    };
    let (original, reply) = match flow.flags & flow_flag::INBOUND {
        0 => (between(own, addressed), between(peer, seen)),
        _ => (between(peer, seen), between(own, addressed)),
    };
    let idle = now.saturating_sub(flow.last_seen) / SECOND;
    Some(Adopted {
        original,
        reply,
        is_answered: match tcp {
            Some(_) => flow.flags & flow_flag::ANSWERED != 0,
            None => flow.state != FlowState::Opening as u32,
        },
        tcp,
        expires: flow
            .timeout_s
            .saturating_sub(u32::try_from(idle).unwrap_or(u32::MAX))
            .max(1),
    })
}

fn tcp_state(flow: &Flow) -> Option<TcpState> {
    Some(match flow.state {
        state if state == FlowState::Opening as u32 => TcpState::Opening,
        state if state == FlowState::Established as u32 => TcpState::Established,
        state if state == FlowState::Closing as u32 => TcpState::Closing,
        _ => return None,
    })
}

/// Has connections of these be flows.
pub(super) struct Adopter<'a> {
    pub(super) endpoints: &'a [EndpointRecord],
    pub(super) networks: &'a [NetworkRecord],
    pub(super) mappings: &'a [MappingRecord],
    /// The host's own addresses.
    pub(super) local: Vec<IpAddr>,
    /// CLOCK_MONOTONIC in nanoseconds.
    pub(super) now: u64,
    /// Nanoseconds since 1970.
    pub(super) clock: u64,
}

impl Adopter<'_> {
    pub(super) fn network_of(&self, endpoint: u32) -> Option<&NetworkRecord> {
        let endpoint = self.endpoints.iter().find(|it| it.number == endpoint)?;
        let mut networks = self.networks.iter();
        networks.find(|network| network.number == endpoint.network)
    }

    fn is_host(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local.contains(&address)
    }

    /// A connection as the programs keep it, but for the way to a peer beyond an uplink, which
    /// they look up with the next packet of the endpoint's. `None`: it is over, or none of theirs.
    pub(super) fn flow(&self, tracked: &Tracked) -> Option<(FlowKey, Flow)> {
        let (asked, answer) = (&tracked.original, &tracked.reply);
        let (state, mut flags) = match (asked.protocol, tracked.tcp) {
            (TCP, Some(state)) => tcp_flags(state, tracked.is_answered)?,
            (UDP, _) if tracked.is_answered => (FlowState::Established, 0),
            (UDP, _) => (FlowState::Opening, 0),
            _ => return None,
        };
        let holder = |address| EndpointRecord::holder(self.endpoints, address);
        let (opener, opened_to) = (holder(asked.source), holder(answer.source));
        let owner = opener.or(opened_to)?;
        let bridge = self.network_of(owner.number)?.link?;
        let is_translated = tracked.is_translated();
        let peer = match opener {
            Some(_) => answer.source,
            None => asked.source,
        };
        let (peer_kind, peer_link) = match (opener.and(opened_to), self.is_host(peer)) {
            (Some(sibling), _) => (PeerKind::Endpoint, sibling.link?),
            (None, true) if opener.is_none() && is_translated => (PeerKind::Loopback, LOOPBACK),
            (None, true) => (PeerKind::Host, bridge),
            // Whatever comes in or goes out is translated.
            (None, false) if !is_translated => return None,
            (None, false) => (PeerKind::Uplink, 0),
        };
        // The endpoint's own side, as it sees it, and the other one, as it is.
        let (inside, view) = match opener {
            Some(_) => (asked, answer),
            None => (answer, asked),
        };
        let (out, back) = match opener {
            Some(_) => (tracked.sent, tracked.answered),
            None => (tracked.answered, tracked.sent),
        };
        if opener.is_none() {
            flags |= flow_flag::INBOUND;
        }
        let closing = match opener {
            Some(_) => flow_flag::FIN_INSIDE,
            None => flow_flag::FIN_PEER,
        };
        if state == FlowState::Closing {
            // Who opens is who closes, as a rule.
            flags |= closing;
        }
        let age = tracked
            .start
            .map_or(0, |start| self.clock.saturating_sub(start));
        let mapping = self.mappings.iter().find(|it| came_by(&it.spec, tracked));
        let key = FlowKey {
            endpoint: owner.number,
            protocol: asked.protocol.into(),
            inside: to_abi(inside.source),
            peer: to_abi(inside.destination),
            inside_port: inside.source_port,
            peer_port: inside.destination_port,
        };
        let flow = Flow {
            created: self.now.saturating_sub(age),
            last_seen: self.now,
            packets_out: out.packets,
            bytes_out: out.bytes,
            packets_in: back.packets,
            bytes_in: back.bytes,
            external: to_abi(view.destination),
            external_port: view.destination_port,
            peer: to_abi(view.source),
            peer_port: view.source_port,
            state: state as u32,
            flags,
            peer_kind: peer_kind as u32,
            policy: UNJUDGED,
            link: owner.link?,
            peer_link,
            mapping: mapping.map_or(0, |mapping| mapping.number),
            ..Flow::default()
        };
        Some((key, flow))
    }
}

/// State and flags of a TCP connection. `None`: it is over.
fn tcp_flags(state: TcpState, is_answered: bool) -> Option<(FlowState, u32)> {
    let answered = match is_answered {
        true => flow_flag::ANSWERED,
        false => 0,
    };
    let connected = flow_flag::ANSWERED | flow_flag::CONNECTED;
    Some(match state {
        TcpState::Opening => (FlowState::Opening, answered),
        TcpState::Established => (FlowState::Established, connected),
        TcpState::Closing => (FlowState::Closing, connected),
        TcpState::Closed => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::fixture::{endpoint, network};
    use nucnet_common::{abi::Address, packet::ICMP};

    const NOW: u64 = 1_000 * SECOND;
    const SIBLING: u32 = 8;

    /// There and back: what the programs make of what the kernel is told of a flow.
    fn carried(key: &FlowKey, flow: &Flow) -> Option<(FlowKey, Flow)> {
        let sibling = EndpointRecord {
            id: "db".parse().unwrap(),
            number: SIBLING,
            link: Some(10),
            addresses: vec![ip("10.0.42.8"), ip("fd00::8")],
            ..endpoint()
        };
        let adopter = Adopter {
            endpoints: &[endpoint(), sibling],
            networks: &[network()],
            mappings: &[],
            local: vec![ip("192.0.2.1"), ip("2001:db8::1"), ip("10.0.42.1")],
            now: NOW,
            clock: 0,
        };
        adopter.flow(&Tracked::of(&connection(key, flow, NOW)?))
    }

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn address(text: &str) -> Address {
        to_abi(ip(text))
    }

    /// A flow of web's by that protocol: its own side, the other one as web addresses it; that one
    /// as it is, and web as that one sees it.
    fn between(
        protocol: u8,
        [inside, addressed]: [(&str, u16); 2],
        [peer, external]: [(&str, u16); 2],
    ) -> (FlowKey, Flow) {
        let key = FlowKey {
            endpoint: 7,
            protocol: protocol.into(),
            inside: address(inside.0),
            peer: address(addressed.0),
            inside_port: inside.1,
            peer_port: addressed.1,
        };
        let flow = Flow {
            last_seen: NOW,
            external: address(external.0),
            external_port: external.1,
            peer: address(peer.0),
            peer_port: peer.1,
            state: FlowState::Established as u32,
            flags: match protocol {
                TCP => flow_flag::ANSWERED | flow_flag::CONNECTED,
                _ => 0,
            },
            timeout_s: 300,
            policy: UNJUDGED,
            link: 9,
            ..Flow::default()
        };
        (key, flow)
    }

    /// What the programs find out anew is not compared.
    fn assert_kept(key: FlowKey, flow: Flow, kind: PeerKind, peer_link: u32) {
        let expected = Flow {
            peer_kind: kind as u32,
            peer_link,
            created: NOW,
            timeout_s: 0,
            ..flow
        };
        assert_eq!(carried(&key, &flow), Some((key, expected)));
    }

    #[test]
    fn masqueraded_connection_keeps_its_address_and_port() {
        for protocol in [TCP, UDP] {
            for [inside, server, external] in [
                ["10.0.42.7", "198.51.100.9", "192.0.2.1"],
                ["fd00::7", "2001:db8:9::9", "2001:db8::1"],
            ] {
                let server = (server, 443);
                let (key, flow) = between(
                    protocol,
                    [(inside, 5_000), server],
                    [server, (external, 40_000)],
                );
                assert_kept(key, flow, PeerKind::Uplink, 0);
            }
        }
    }

    #[test]
    fn published_connection_keeps_its_client() {
        let client = ("198.51.100.9", 5_000);
        let (key, mut flow) = between(
            TCP,
            [("10.0.42.7", 80), client],
            [client, ("192.0.2.1", 8_080)],
        );
        flow.flags |= flow_flag::INBOUND;
        assert_kept(key, flow, PeerKind::Uplink, 0);
    }

    #[test]
    fn connection_to_a_siblings_publish_leads_to_the_sibling() {
        let (key, flow) = between(
            TCP,
            [("10.0.42.7", 5_000), ("192.0.2.1", 8_080)],
            [("10.0.42.8", 80), ("10.0.42.7", 5_000)],
        );
        assert_kept(key, flow, PeerKind::Endpoint, 10);
    }

    #[test]
    fn hosts_own_connection_to_a_publish_is_that_of_a_socket() {
        let client = ("10.0.42.1", 5_000);
        let (key, mut flow) = between(
            TCP,
            [("10.0.42.7", 80), client],
            [("127.0.0.1", 5_000), ("127.0.0.1", 8_080)],
        );
        flow.flags |= flow_flag::INBOUND;
        assert_kept(key, flow, PeerKind::Loopback, LOOPBACK);
    }

    #[test]
    fn connection_to_the_host_itself_stays_on_the_bridge() {
        let (inside, gateway) = (("10.0.42.7", 5_000), ("10.0.42.1", 22));
        let (key, flow) = between(TCP, [inside, gateway], [gateway, inside]);
        assert_kept(key, flow, PeerKind::Host, 5);
    }

    #[test]
    fn half_open_and_closing_connections_stay_so() {
        let server = ("198.51.100.9", 443);
        let ends = [
            [("10.0.42.7", 5_000), server],
            [server, ("192.0.2.1", 40_000)],
        ];
        for (state, flags) in [
            (FlowState::Opening, 0),
            (FlowState::Opening, flow_flag::ANSWERED),
            (
                FlowState::Closing,
                flow_flag::ANSWERED | flow_flag::CONNECTED | flow_flag::FIN_INSIDE,
            ),
        ] {
            let (key, mut flow) = between(TCP, ends[0], ends[1]);
            (flow.state, flow.flags) = (state as u32, flags);
            assert_kept(key, flow, PeerKind::Uplink, 0);
        }
    }

    #[test]
    fn idle_time_counts_on() {
        let server = ("198.51.100.9", 53);
        let (key, mut flow) = between(
            UDP,
            [("10.0.42.7", 5_000), server],
            [server, ("192.0.2.1", 40_000)],
        );
        let expires = |flow: &Flow| connection(&key, flow, NOW).map(|adopted| adopted.expires);
        flow.last_seen = NOW - 100 * SECOND;
        assert_eq!(expires(&flow), Some(200));
        flow.last_seen = NOW - 900 * SECOND;
        assert_eq!(expires(&flow), Some(1), "0 seconds are none to the kernel");
    }

    #[test]
    fn what_is_over_or_no_connection_is_not_carried() {
        let server = ("198.51.100.9", 443);
        let ends = [
            [("10.0.42.7", 5_000), server],
            [server, ("192.0.2.1", 40_000)],
        ];
        let (key, mut flow) = between(TCP, ends[0], ends[1]);
        flow.state = FlowState::Closed as u32;
        assert_eq!(connection(&key, &flow, NOW), None);
        let (key, flow) = between(ICMP, ends[0], ends[1]);
        assert_eq!(connection(&key, &flow, NOW), None);
    }

    #[test]
    fn strangers_connections_are_none_of_the_programs() {
        let server = ("198.51.100.9", 443);
        let (key, flow) = between(
            TCP,
            [("10.0.42.99", 5_000), server],
            [server, ("192.0.2.1", 40_000)],
        );
        assert_eq!(carried(&key, &flow), None);
    }

    #[test]
    fn connection_that_passes_untranslated_is_none_of_the_programs() {
        let (inside, server) = (("10.0.42.7", 5_000), ("198.51.100.9", 443));
        let (key, flow) = between(TCP, [inside, server], [server, inside]);
        assert_eq!(carried(&key, &flow), None);
    }
}
