//! Published ports, from outside and back.

use nucnet_common::{
    abi::{FlowState, Reason},
    packet::TCP,
};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::Bench,
    engine::Socket,
    packet::{self, echo_request, tcp, udp},
    site::{self, CLIENT4, CLIENT6, HOST4, HOST6, OTHER, SECOND_UPLINK, SLOT, TUNNEL, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(connection_to_a_published_port_reaches_the_endpoint_and_its_replies_go_back),
    each_family!(datagram_to_a_published_port_reaches_the_endpoint_and_its_replies_go_back),
    each_family!(published_range_maps_port_by_port),
    each_family!(publish_of_one_host_address_beats_the_one_of_any),
    each_family!(publish_of_another_host_address_takes_nothing),
    each_family!(publish_of_another_protocol_takes_nothing),
    each_family!(publish_to_a_microvm_leaves_by_its_interface),
    each_family!(publish_for_an_address_that_is_not_local_passes_untouched),
    each_family!(traffic_of_the_host_itself_passes_untouched),
    each_family!(socket_of_the_host_wins_over_a_published_range),
    each_family!(packet_that_is_not_the_first_of_a_connection_passes_to_the_host),
    each_family!(live_connection_stays_with_its_endpoint_when_its_port_is_published_anew),
    each_family!(reply_from_unpublished_port_is_dropped),
    each_family!(network_restricted_to_an_uplink_is_served_there_only),
    each_family!(network_restricted_to_absent_uplinks_is_served_nowhere),
    each_family!(interface_without_entry_serves_nothing),
    each_family!(frame_for_another_host_passes_untouched),
    each_family!(publish_of_an_endpoint_that_is_gone_is_dropped),
    each_family!(publish_of_a_former_holder_of_the_interface_is_dropped),
    each_family!(flow_of_a_former_holder_of_the_interface_is_dropped),
    each_family!(source_of_an_endpoint_from_outside_is_martian),
    each_family!(source_of_an_endpoint_is_martian_wherever_its_route_leads),
    each_family!(source_of_the_host_from_outside_is_martian),
    each_family!(source_without_route_from_outside_is_martian),
    each_family!(source_in_a_managed_network_from_outside_is_martian),
    each_family!(same_client_port_by_two_published_ports_stays_apart),
    each_family!(same_client_port_by_two_addresses_of_the_host_stays_apart),
    each_family!(reply_leaves_by_the_uplink_that_the_connection_came_in_on),
    row!(multicast_and_loopback_sources_from_outside_are_martians),
    row!(unreachable_kinds_of_destinations_pass_to_the_host),
    row!(
        packet_without_link_layer_header_gets_one,
        logic_only: "BPF_PROG_TEST_RUN gives every frame an Ethernet header"
    ),
];

fn connection_to_a_published_port_reaches_the_endpoint_and_its_replies_go_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("SA", web, client), host);
    bench.comes_in(&tcp("A", client, host).payload("GET / HTTP/1.1"), &WEB, web);
    bench.goes_out(&WEB, &tcp("A", web, client).payload([0x5a; 1_001]), host);
    assert_eq!(bench.only_state(), FlowState::Established);
    let flow = bench.flow(TCP, web, client);
    assert_eq!((flow.packets_in, flow.packets_out), (2, 2));
}

fn datagram_to_a_published_port_reaches_the_endpoint_and_its_replies_go_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "5353:53/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 5353), (ip.web, 53));
    bench.comes_in(&udp(client, host), &WEB, web);
    bench.goes_out(&WEB, &udp(web, client).payload("an answer"), host);
    assert_eq!(bench.counts(), (1, 0));
}

fn published_range_maps_port_by_port(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "9001-9006:7001-7006");
    for offset in 0..6 {
        let client = (ip.client, 40_000 + offset);
        bench.comes_in(
            &tcp("S", client, (ip.host, 9001 + offset)),
            &WEB,
            (ip.web, 7001 + offset),
        );
    }
    for beside in [9000, 9007] {
        bench
            .from_uplink(UPLINK, &tcp("S", (ip.client, 40_010), (ip.host, beside)))
            .passes();
    }
}

fn publish_of_one_host_address_beats_the_one_of_any(bench: &mut Bench<'_>, ip: &Family) {
    let host = bracketed(ip.host);
    bench.publish(&WEB, "8080:80");
    bench.publish(&SLOT, &format!("{host}:8080:81"));
    let (client, host) = ((ip.client, 40_000), (ip.host, 8080));
    bench.comes_in(&tcp("S", client, host), &SLOT, (ip.slot, 81));
}

fn publish_of_another_host_address_takes_nothing(bench: &mut Bench<'_>, ip: &Family) {
    let gateway = bracketed(ip.gateway);
    bench.publish(&WEB, &format!("{gateway}:8080:80"));
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .passes();
}

fn bracketed(address: std::net::IpAddr) -> String {
    if address.is_ipv6() {
        format!("[{address}]")
    } else {
        address.to_string()
    }
}

fn publish_of_another_protocol_takes_nothing(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .passes();
}

fn publish_to_a_microvm_leaves_by_its_interface(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&SLOT, "8080:80");
    let (client, host, slot) = ((ip.client, 40_000), (ip.host, 8080), (ip.slot, 80));
    bench.comes_in(&tcp("S", client, host), &SLOT, slot);
    bench.goes_out(&SLOT, &tcp("SA", slot, client), host);
}

fn publish_for_an_address_that_is_not_local_passes_untouched(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.router, 8080)))
        .passes();
    assert_eq!(bench.counts(), (0, 0));
}

fn traffic_of_the_host_itself_passes_untouched(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host) = ((ip.client, 40_000), (ip.host, 22));
    for packet in [
        tcp("S", client, host),
        tcp("A", client, host),
        udp(client, host),
        echo_request(ip.client, ip.host, 7),
        packet::ip(ip.client, ip.host, 47),
        tcp("S", client, (ip.host, 8080)).fragment(9, true),
    ] {
        bench.from_uplink(UPLINK, &packet).passes();
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn socket_of_the_host_wins_over_a_published_range(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "32768-60999:32768-60999");
    bench.publish(&WEB, "32768-60999:32768-60999/udp");
    let (server, host) = ((ip.server, 53), (ip.host, 50_000));
    bench.socket(Socket::UdpTo(host.into(), server.into()));
    bench.socket(Socket::Listener((ip.host, 50_001).into()));
    bench.from_uplink(UPLINK, &udp(server, host)).passes();
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 50_001)))
        .passes();
    // The socket has asked that one server; the port of anybody else's packet is published.
    let client = (ip.client, 53);
    bench.comes_in(&udp(client, host), &WEB, (ip.web, 50_000));
}

fn packet_that_is_not_the_first_of_a_connection_passes_to_the_host(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80");
    for flags in ["A", "SA", "FA", "R", "RA", "SR"] {
        bench
            .from_uplink(UPLINK, &tcp(flags, (ip.client, 40_000), (ip.host, 8080)))
            .passes();
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn live_connection_stays_with_its_endpoint_when_its_port_is_published_anew(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    // A flow is all that its packets need: nothing is looked up a second time.
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench.publish(&SLOT, "8080:80");
    bench.comes_in(&tcp("A", client, host), &WEB, web);
}

fn reply_from_unpublished_port_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench
        .from_endpoint(&WEB, &tcp("SA", (ip.web, 81), (ip.client, 40_000)))
        .is_dropped(Reason::NoFlow);
}

fn network_restricted_to_an_uplink_is_served_there_only(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.publish(&OTHER, "8081:80");
    bench.set_network(|network| {
        network.is_restricted = 1;
        network.uplinks[3] = SECOND_UPLINK;
    });
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.from_uplink(UPLINK, &tcp("S", client, host)).passes();
    bench
        .from_uplink(SECOND_UPLINK, &tcp("S", client, host))
        .reaches(&WEB, &tcp("S", client, web).ttl(63));
    // A matter of that network alone.
    bench.comes_in(&tcp("S", client, (ip.host, 8081)), &OTHER, (ip.other, 80));
}

fn network_restricted_to_absent_uplinks_is_served_nowhere(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.set_network(|network| network.is_restricted = 1);
    for uplink in [UPLINK, SECOND_UPLINK] {
        bench
            .from_uplink(uplink, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
            .passes();
    }
}

fn interface_without_entry_serves_nothing(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.remove_uplink(UPLINK);
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .passes();
}

fn frame_for_another_host_passes_untouched(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let packet = tcp("S", (ip.client, 40_000), (ip.host, 8080));
    let from = [2, 0xff, 0, 0, 0, 1];
    for to in [[2, 0xff, 0, 0, 0, 2], [0xff; 6], [0x33, 0x33, 0, 0, 0, 1]] {
        bench
            .from_uplink(UPLINK, &packet.clone().macs(to, from))
            .passes();
    }
}

fn publish_of_an_endpoint_that_is_gone_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.remove_endpoint(&WEB);
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .is_dropped(Reason::NoEndpoint);
}

fn publish_of_a_former_holder_of_the_interface_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.set_endpoint(&WEB, |endpoint| endpoint.number += 1_000);
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .is_dropped(Reason::NoEndpoint);
}

fn flow_of_a_former_holder_of_the_interface_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench.set_endpoint(&WEB, |endpoint| endpoint.number += 1_000);
    bench
        .from_uplink(UPLINK, &tcp("A", client, host))
        .is_dropped_for(WEB.number, Reason::NoEndpoint);
}

fn source_of_an_endpoint_from_outside_is_martian(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    for source in [ip.app, ip.web, ip.other] {
        bench
            .from_uplink(UPLINK, &tcp("S", (source, 40_000), (ip.host, 8080)))
            .is_dropped(Reason::MartianSource);
    }
}

fn source_of_an_endpoint_is_martian_wherever_its_route_leads(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.own(&SLOT, ip.server);
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.server, 40_000), (ip.host, 8080)))
        .is_dropped(Reason::MartianSource);
}

fn source_of_the_host_from_outside_is_martian(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    for source in [ip.host, ip.gateway] {
        bench
            .from_uplink(UPLINK, &tcp("S", (source, 40_000), (ip.host, 8080)))
            .is_dropped(Reason::MartianSource);
    }
}

fn source_without_route_from_outside_is_martian(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.nowhere, 40_000), (ip.host, 8080)))
        .is_dropped(Reason::MartianSource);
}

fn source_in_a_managed_network_from_outside_is_martian(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench
        .from_uplink(UPLINK, &udp((ip.nobody, 40_000), (ip.host, 8080)))
        .passes();
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.nobody, 40_000), (ip.host, 8080)))
        .is_dropped(Reason::MartianSource);
    // So is one beyond an interface that has no program: its replies could not go back.
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.stranger, 40_000), (ip.host, 8080)))
        .is_dropped(Reason::MartianSource);
}

fn same_client_port_by_two_published_ports_stays_apart(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080-8081:80-81");
    bench.publish(&WEB, "9090:80");
    let (client, web) = ((ip.client, 40_000), (ip.web, 80));
    bench.comes_in(&tcp("S", client, (ip.host, 8080)), &WEB, web);
    // The second connection needs another client port, drawn at random: it is read back.
    let second = bench.from_uplink(UPLINK, &tcp("S", client, (ip.host, 9090)));
    let state = bench.state();
    let mut ports = state.flows.keys().map(|key| key.peer_port);
    let drawn = ports.find(|port| *port != client.1).expect("second flow");
    assert!(drawn >= 0x8000, "{drawn} is no ephemeral port");
    let seen = (ip.client, drawn);
    second.reaches(&WEB, &tcp("S", seen, web).ttl(63));
    bench.from_endpoint(&WEB, &tcp("SA", web, seen)).leaves(
        UPLINK,
        ip.router,
        &tcp("SA", (ip.host, 9090), client).ttl(63),
    );
    bench.goes_out(&WEB, &tcp("SA", web, client), (ip.host, 8080));
}

fn same_client_port_by_two_addresses_of_the_host_stays_apart(bench: &mut Bench<'_>, ip: &Family) {
    // Two addresses of the host, one published port: two external views, one inside.
    bench.publish(&WEB, "8080:80");
    let (client, web) = ((ip.client, 40_000), (ip.web, 80));
    bench
        .from_uplink(UPLINK, &udp(client, (ip.host, 8080)))
        .passes();
    bench.comes_in(&tcp("S", client, (ip.host, 8080)), &WEB, web);
    let second = bench.from_uplink(SECOND_UPLINK, &tcp("S", client, (ip.gateway, 8080)));
    let state = bench.state();
    let mut ports = state.flows.keys().map(|key| key.peer_port);
    let drawn = ports.find(|port| *port != client.1).expect("second flow");
    second.reaches(&WEB, &tcp("S", (ip.client, drawn), web).ttl(63));
}

fn reply_leaves_by_the_uplink_that_the_connection_came_in_on(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_uplink(SECOND_UPLINK, &tcp("S", client, host))
        .reaches(&WEB, &tcp("S", client, web).ttl(63));
    let reply = tcp("SA", host, client).ttl(63);
    bench
        .from_endpoint(&WEB, &tcp("SA", web, client))
        .goes_back(SECOND_UPLINK, &reply);
    // Looked up again after a second: the route prefers another, this one still exists.
    bench.wait(2.0);
    bench
        .from_endpoint(&WEB, &tcp("SA", web, client))
        .goes_back(SECOND_UPLINK, &reply);
    bench.remove_uplink(SECOND_UPLINK);
    bench.wait(2.0);
    bench
        .from_endpoint(&WEB, &tcp("SA", web, client))
        .leaves(UPLINK, ip.router, &reply);
}

fn multicast_and_loopback_sources_from_outside_are_martians(bench: &mut Bench<'_>) {
    bench.publish(&WEB, "8080:80");
    for source in [
        "224.0.0.1",
        "127.0.0.1",
        "0.0.0.0",
        "255.255.255.255",
        "240.0.0.1",
    ] {
        let source = site::address(source);
        bench
            .from_uplink(UPLINK, &tcp("S", (source, 40_000), (HOST4, 8080)))
            .is_dropped(Reason::MartianSource);
    }
    for source in ["ff02::1", "::1", "::"] {
        let source = site::address(source);
        bench
            .from_uplink(UPLINK, &tcp("S", (source, 40_000), (HOST6, 8080)))
            .is_dropped(Reason::MartianSource);
    }
}

fn unreachable_kinds_of_destinations_pass_to_the_host(bench: &mut Bench<'_>) {
    bench.publish(&WEB, "8080:80/udp");
    for destination in ["127.0.0.1", "224.0.0.251", "255.255.255.255", "169.254.1.1"] {
        let destination = site::address(destination);
        bench
            .from_uplink(UPLINK, &udp((CLIENT4, 40_000), (destination, 8080)))
            .passes();
    }
    for destination in ["::1", "ff02::fb", "fe80::1"] {
        let destination = site::address(destination);
        bench
            .from_uplink(UPLINK, &udp((CLIENT6, 40_000), (destination, 8080)))
            .passes();
    }
}

fn packet_without_link_layer_header_gets_one(bench: &mut Bench<'_>) {
    bench.publish(&WEB, "8080:80");
    for family in [&super::V4, &super::V6] {
        let (client, web) = ((family.client, 40_000), (family.web, 80));
        bench
            .from_tunnel(&tcp("S", client, (family.host, 8080)))
            .reaches(&WEB, &tcp("S", client, web).ttl(63));
        // The route to the client leads elsewhere: back with whatever addresses, which the
        // kernel takes off again.
        let reply = tcp("SA", (family.host, 8080), client).ttl(63);
        bench
            .from_endpoint(&WEB, &tcp("SA", web, client))
            .goes_back(TUNNEL, &reply.macs([0; 6], [0; 6]));
    }
    bench
        .from_tunnel(&tcp("S", (CLIENT4, 40_000), (HOST4, 22)))
        .passes();
}
