//! Sockets of the host that ask for a publish: over the loopback interface and back.

use std::net::{IpAddr, SocketAddr};

use nucnet_common::{
    abi::{FlowState, PeerKind, Reason},
    packet::{TCP, UDP},
};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::{Bench, hidden},
    engine::Socket,
    packet::{Packet, tcp, udp},
    site::{APP, BRIDGE, OTHER, SLOT, UPLINK, WEB, address},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(connection_to_a_loopback_address_reaches_the_endpoint_as_its_gateways),
    each_family!(connection_to_an_address_of_the_host_keeps_its_source),
    each_family!(datagrams_of_the_host_reach_the_endpoint_and_its_answers_come_back),
    each_family!(every_loopback_address_leads_to_the_publish_of_any),
    each_family!(publish_of_one_address_is_asked_for_by_that_address_only),
    each_family!(publish_of_a_loopback_address_is_for_the_host_alone),
    each_family!(what_the_host_says_to_itself_otherwise_goes_on_untouched),
    each_family!(socket_of_the_host_that_has_the_port_keeps_its_packets),
    each_family!(segment_over_loopback_without_flow_goes_on_untouched),
    each_family!(same_port_of_two_loopback_clients_stays_apart),
    each_family!(publish_of_an_endpoint_that_is_gone_takes_nothing_from_the_host),
    each_family!(unpublished_port_takes_nothing_more_from_the_host),
    each_family!(microvm_is_reached_over_loopback),
    each_family!(last_hop_reaches_the_endpoint_over_loopback),
    each_family!(link_local_and_multicast_destinations_over_loopback_are_left_alone),
    row!(destination_is_restored_for_what_endpoints_send_only),
];

/// What an endpoint sends to the host arrives as this packet.
#[track_caller]
fn arrives(bench: &mut Bench<'_>, sent: &Packet, expected: &Packet) {
    bench.from_endpoint(&WEB, sent).reaches_loopback(expected);
    if let IpAddr::V4(to) = expected.destination() {
        let frame = hidden(expected, [0; 6], [0; 6]);
        bench
            .comes_to_loopback(&WEB, &frame, u32::from_ne_bytes(to.octets()))
            .passes_as(expected);
    }
}

fn loopback(ip: &Family) -> IpAddr {
    address(if ip.web.is_ipv4() { "127.0.0.1" } else { "::1" })
}

fn spec(host: IpAddr, rest: &str) -> String {
    match host {
        IpAddr::V4(host) => format!("{host}:{rest}"),
        IpAddr::V6(host) => format!("[{host}]:{rest}"),
    }
}

fn connection_to_a_loopback_address_reaches_the_endpoint_as_its_gateways(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80");
    let (client, asked) = ((loopback(ip), 40_000), (loopback(ip), 8080));
    let (seen, web) = ((ip.gateway, 40_000), (ip.web, 80));
    bench
        .to_itself(&tcp("S", client, asked))
        .is_put_through(&WEB, &tcp("S", seen, web));
    arrives(bench, &tcp("SA", web, seen), &tcp("SA", asked, client));
    bench
        .to_itself(&tcp("A", client, asked))
        .is_put_through(&WEB, &tcp("A", seen, web));
    let flow = bench.flow(TCP, web, seen);
    assert_eq!(flow.peer_kind, PeerKind::Loopback as u32);
    assert_eq!(flow.state, FlowState::Established as u32);
    assert_eq!((flow.packets_in, flow.packets_out), (2, 1));
    assert_eq!(bench.counts(), (1, 0));
}

fn connection_to_an_address_of_the_host_keeps_its_source(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, asked, web) = ((ip.host, 40_000), (ip.host, 8080), (ip.web, 80));
    bench
        .to_itself(&tcp("S", client, asked))
        .is_put_through(&WEB, &tcp("S", client, web));
    arrives(bench, &tcp("SA", web, client), &tcp("SA", asked, client));
    // Another of the host's own addresses for a source.
    let (client, asked) = ((ip.host, 40_001), (ip.gateway, 8080));
    bench
        .to_itself(&tcp("S", client, asked))
        .is_put_through(&WEB, &tcp("S", client, web));
    arrives(bench, &tcp("SA", web, client), &tcp("SA", asked, client));
}

fn datagrams_of_the_host_reach_the_endpoint_and_its_answers_come_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "5300:53/udp");
    let web = (ip.web, 53);
    for (source, seen) in [(loopback(ip), ip.gateway), (ip.host, ip.host)] {
        let (client, asked, seen) = ((source, 40_000), (source, 5300), (seen, 40_000));
        for _ in 0..2 {
            bench
                .to_itself(&udp(client, asked))
                .is_put_through(&WEB, &udp(seen, web));
            arrives(bench, &udp(web, seen), &udp(asked, client));
        }
        assert_eq!(bench.flow(UDP, web, seen).packets_out, 2);
    }
    // An answer to a client that sends no checksum has one all the same.
    let client = (loopback(ip), 40_001);
    let asked = (loopback(ip), 5300);
    bench
        .to_itself(&udp(client, asked).without_checksum())
        .is_put_through(&WEB, &udp((ip.gateway, 40_001), web).without_checksum());
    arrives(bench, &udp(web, (ip.gateway, 40_001)), &udp(asked, client));
}

fn every_loopback_address_leads_to_the_publish_of_any(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080-8081:80-81");
    let ways: &[&str] = if ip.web.is_ipv4() {
        &["127.0.0.1", "127.1.2.3"]
    } else {
        &["::1"]
    };
    for (way, port) in ways.iter().zip(40_000..) {
        let client: SocketAddr = (loopback(ip), port).into();
        bench
            .to_itself(&tcp("S", client, (address(way), 8081)))
            .is_put_through(&WEB, &tcp("S", (ip.gateway, port), (ip.web, 81)));
    }
}

fn publish_of_one_address_is_asked_for_by_that_address_only(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, &spec(ip.host, "8080:80"));
    let client = (ip.host, 40_000);
    bench
        .to_itself(&tcp("S", client, (ip.host, 8080)))
        .is_put_through(&WEB, &tcp("S", client, (ip.web, 80)));
    for other in [ip.gateway, loopback(ip)] {
        bench
            .to_itself(&tcp("S", (other, 40_001), (other, 8080)))
            .passes();
    }
}

fn publish_of_a_loopback_address_is_for_the_host_alone(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, &spec(loopback(ip), "8080:80"));
    let client = (loopback(ip), 40_000);
    bench
        .to_itself(&tcp("S", client, (loopback(ip), 8080)))
        .is_put_through(&WEB, &tcp("S", (ip.gateway, 40_000), (ip.web, 80)));
    bench
        .to_itself(&tcp("S", (ip.host, 40_001), (ip.host, 8080)))
        .passes();
    for to in [ip.host, loopback(ip)] {
        bench
            .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (to, 8080)))
            .passes();
    }
    let asked = (ip.host, 8080);
    for (party, source) in [(&WEB, ip.web), (&APP, ip.app)] {
        let packet = tcp("S", (source, 40_000), asked);
        bench
            .from_endpoint(party, &packet)
            .reaches_host(BRIDGE, &packet);
    }
    bench
        .from_endpoint(&APP, &tcp("S", (ip.app, 40_001), (loopback(ip), 8080)))
        .is_dropped(Reason::Martian);
}

fn what_the_host_says_to_itself_otherwise_goes_on_untouched(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    for own in [loopback(ip), ip.host] {
        for packet in [
            tcp("S", (own, 40_000), (own, 8081)),
            udp((own, 40_000), (own, 8080)),
            crate::packets::packet::echo_request(own, own, 8080),
            crate::packets::packet::ip(own, own, 132),
            tcp("S", (own, 40_000), (own, 8080)).fragment(0, true),
        ] {
            bench.to_itself(&packet).passes();
        }
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn socket_of_the_host_that_has_the_port_keeps_its_packets(bench: &mut Bench<'_>, ip: &Family) {
    // By chance, or from before the publish: the host asked somebody on a published port.
    bench.publish(&WEB, "40000-40099:40000-40099/udp");
    bench.publish(&WEB, "40000-40099:40000-40099");
    bench.socket(Socket::UdpTo(
        (loopback(ip), 40_050).into(),
        (loopback(ip), 53).into(),
    ));
    bench.socket(Socket::Listener((loopback(ip), 40_051).into()));
    bench
        .to_itself(&udp((loopback(ip), 53), (loopback(ip), 40_050)))
        .passes();
    bench
        .to_itself(&tcp("S", (loopback(ip), 50_000), (loopback(ip), 40_051)))
        .passes();
    bench
        .to_itself(&tcp("SA", (loopback(ip), 80), (loopback(ip), 40_052)))
        .passes();
    assert_eq!(bench.counts(), (0, 0));
}

fn segment_over_loopback_without_flow_goes_on_untouched(bench: &mut Bench<'_>, ip: &Family) {
    // The host's stack refuses it: so ends a connection whose port is no longer published.
    bench.publish(&WEB, "8080:80");
    for flags in ["A", "SA", "R", "F"] {
        bench
            .to_itself(&tcp(flags, (ip.host, 40_000), (ip.host, 8080)))
            .passes();
    }
}

fn same_port_of_two_loopback_clients_stays_apart(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.publish(&WEB, "9090:80");
    let client = (loopback(ip), 40_000);
    bench
        .to_itself(&tcp("S", client, (loopback(ip), 8080)))
        .is_put_through(&WEB, &tcp("S", (ip.gateway, 40_000), (ip.web, 80)));
    let _ = bench.to_itself(&tcp("S", client, (loopback(ip), 9090)));
    assert_eq!(bench.counts(), (2, 0));
    let state = bench.state();
    let other = state
        .flows
        .iter()
        .find(|(_, flow)| flow.external_port == 9090);
    let (key, _) = other.expect("flow");
    let seen = (ip.gateway, key.peer_port);
    assert_ne!(key.peer_port, 40_000);
    arrives(
        bench,
        &tcp("SA", (ip.web, 80), seen),
        &tcp("SA", (loopback(ip), 9090), client),
    );
}

fn publish_of_an_endpoint_that_is_gone_takes_nothing_from_the_host(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80");
    let packet = tcp("S", (ip.host, 40_000), (ip.host, 8080));
    bench.renumber(&WEB, WEB.number + 1_000);
    bench
        .to_itself(&packet)
        .is_dropped_for(0, Reason::NoEndpoint);
    bench.remove_endpoint(&WEB);
    bench
        .to_itself(&packet)
        .is_dropped_for(0, Reason::NoEndpoint);
}

fn unpublished_port_takes_nothing_more_from_the_host(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "5300:53/udp");
    let packet = udp((ip.host, 40_000), (ip.host, 5300));
    bench
        .to_itself(&packet)
        .is_put_through(&WEB, &udp((ip.host, 40_000), (ip.web, 53)));
    // The flow is idle for too long; only then is the publish asked again.
    bench.wait(301.0);
    bench.socket(Socket::Udp((ip.host, 5300).into()));
    bench.to_itself(&packet).passes();
    assert_eq!(bench.counts(), (0, 0));
}

fn microvm_is_reached_over_loopback(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&SLOT, "8080:80");
    bench
        .to_itself(&tcp("S", (loopback(ip), 40_000), (loopback(ip), 8080)))
        .is_put_through(&SLOT, &tcp("S", (ip.gateway, 40_000), (ip.slot, 80)));
}

fn last_hop_reaches_the_endpoint_over_loopback(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench
        .to_itself(&tcp("S", (ip.host, 40_000), (ip.host, 8080)).ttl(1))
        .is_put_through(&WEB, &tcp("S", (ip.host, 40_000), (ip.web, 80)).ttl(1));
}

fn link_local_and_multicast_destinations_over_loopback_are_left_alone(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80/udp");
    let destinations = if ip.web.is_ipv4() {
        ["169.254.1.1", "224.0.0.251", "255.255.255.255"]
    } else {
        ["fe80::1", "ff02::fb", "ff01::1"]
    };
    for to in destinations {
        bench
            .to_itself(&udp((ip.host, 40_000), (address(to), 8080)))
            .passes();
    }
}

fn destination_is_restored_for_what_endpoints_send_only(bench: &mut Bench<'_>) {
    let own = address("127.0.0.1");
    let packet = udp((address("192.0.2.1"), 5300), (own, 40_000));
    let mark = u32::from_ne_bytes([192, 0, 2, 1]);
    bench.comes_to_loopback(&WEB, &packet, 0).passes();
    bench.remove_endpoint(&OTHER);
    bench.comes_to_loopback(&OTHER, &packet, mark).passes();
    let packet = udp((own, 5300), (address("127.0.0.2"), 40_000));
    bench.comes_to_loopback(&WEB, &packet, mark).passes();
}
