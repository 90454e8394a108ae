//! Endpoints that speak to the outside, and the answers.

use nucnet_common::{
    abi::{Filtering, FlowState, Mac, Mapping, Reason},
    packet::{ICMP, ICMPV6, TCP, UDP},
};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::Bench,
    engine::Socket,
    packet::{echo_reply, echo_request, tcp, udp},
    site::{
        APP, DYNAMIC_FIRST, DYNAMIC_LAST, HOST4, ROUTER4, SECOND_UPLINK, SERVER4, SLOT, UPLINK, WEB,
    },
};

pub(super) const ROWS: &[Row] = &[
    each_family!(connection_leaves_with_the_hosts_address_and_its_replies_come_back),
    each_family!(datagram_leaves_with_the_hosts_address_and_its_reply_comes_back),
    each_family!(echo_request_leaves_with_the_hosts_address_and_its_reply_comes_back),
    each_family!(reply_to_a_microvm_leaves_by_its_interface),
    each_family!(reply_by_another_uplink_is_taken_too),
    each_family!(port_of_the_hosts_own_range_is_replaced_by_a_dynamic_one),
    each_family!(privileged_port_is_replaced_by_a_dynamic_one),
    each_family!(port_of_a_socket_of_the_host_is_replaced_by_a_dynamic_one),
    each_family!(connected_socket_of_the_host_keeps_its_port_and_its_answers),
    each_family!(connected_socket_of_the_host_keeps_its_peer_from_a_bindings_port),
    each_family!(published_port_is_replaced_by_a_dynamic_one),
    each_family!(second_endpoint_with_the_same_port_and_server_gets_another_port),
    each_family!(external_tcp_port_serves_several_peers),
    each_family!(external_udp_port_is_the_same_for_every_peer),
    each_family!(external_udp_port_is_never_given_to_two_endpoints),
    each_family!(external_echo_identifier_is_the_same_for_every_peer),
    each_family!(datagram_of_a_stranger_to_a_bound_port_is_filtered),
    each_family!(echo_reply_of_a_stranger_to_a_bound_identifier_is_filtered),
    each_family!(echo_request_for_the_host_passes_even_with_a_bound_identifier),
    each_family!(segment_of_a_stranger_to_a_masquerade_port_passes_to_the_host),
    each_family!(network_that_keeps_no_ports_gives_dynamic_ones),
    each_family!(datagrams_mapped_per_flow_have_a_port_each),
    each_family!(connections_mapped_independently_of_the_endpoint_share_a_port),
    each_family!(exhausted_ports_drop_the_newcomer_only),
    each_family!(exhausted_bindings_drop_the_newcomer_only),
    each_family!(uplink_without_program_is_not_used),
    each_family!(destination_without_route_is_dropped),
    each_family!(connection_that_did_not_begin_with_syn_is_dropped),
    each_family!(uplink_that_vanished_is_replaced_by_the_one_of_the_route),
    each_family!(next_hop_is_looked_up_once_a_second),
    each_family!(established_flow_goes_straight_to_its_neighbour_between_probes),
    each_family!(published_flow_goes_straight_to_its_neighbour_between_probes),
    each_family!(neighbour_that_moved_is_followed_within_a_second),
    each_family!(uplink_without_resolved_neighbour_asks_the_kernel_each_time),
    each_family!(
        address_of_the_uplink_serves_where_the_kernel_names_none,
        logic_only: "kernels before 6.7 only; `cargo xtask vm` boots some"
    ),
    row!(udp_checksum_zero_stays_zero_on_the_way_out_and_back),
    each_family!(udp_checksum_that_comes_to_zero_is_sent_as_ones),
];

fn connection_leaves_with_the_hosts_address_and_its_replies_come_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench
        .from_uplink(UPLINK, &tcp("SA", server, host).ttl(55))
        .reaches(&WEB, &tcp("SA", server, web).ttl(54));
    bench.goes_out(&WEB, &tcp("A", web, server), host);
    assert_eq!(bench.only_state(), FlowState::Established);
    bench.comes_in(&tcp("A", server, host).payload([1; 999]), &WEB, web);
    let flow = bench.flow(TCP, web, server);
    assert_eq!((flow.packets_out, flow.packets_in), (2, 2));
}

fn datagram_leaves_with_the_hosts_address_and_its_reply_comes_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 53));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench.comes_in(&udp(server, host).payload("reply"), &WEB, web);
    assert_eq!(bench.counts(), (1, 1));
    assert_eq!(bench.only_state(), FlowState::Established);
}

fn echo_request_leaves_with_the_hosts_address_and_its_reply_comes_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let protocol = if ip.web.is_ipv4() { ICMP } else { ICMPV6 };
    let sent = bench.from_endpoint(&WEB, &echo_request(ip.web, ip.server, 77));
    let flow = bench.flow(protocol, (ip.web, 77), (ip.server, 0));
    let identifier = flow.external_port;
    assert!((DYNAMIC_FIRST..=DYNAMIC_LAST).contains(&identifier));
    sent.leaves(
        UPLINK,
        ip.router,
        &echo_request(ip.host, ip.server, identifier).ttl(63),
    );
    bench.comes_in(
        &echo_reply(ip.server, ip.host, identifier),
        &WEB,
        (ip.web, 77),
    );
    assert_eq!(bench.counts(), (1, 1));
}

fn reply_to_a_microvm_leaves_by_its_interface(bench: &mut Bench<'_>, ip: &Family) {
    let (slot, host, server) = ((ip.slot, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&SLOT, &tcp("S", slot, server), host);
    bench.comes_in(&tcp("SA", server, host), &SLOT, slot);
}

fn reply_by_another_uplink_is_taken_too(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench
        .from_uplink(SECOND_UPLINK, &tcp("SA", server, host))
        .reaches(&WEB, &tcp("SA", server, web).ttl(63));
}

/// Sends a first segment and checks that it leaves with a dynamic port, which it returns.
#[track_caller]
fn leaves_with_dynamic_port(bench: &mut Bench<'_>, ip: &Family, port: u16) -> u16 {
    let (web, server) = ((ip.web, port), (ip.server, 443));
    let sent = bench.from_endpoint(&WEB, &tcp("S", web, server));
    let external = bench.flow(TCP, web, server).external_port;
    assert!(
        (DYNAMIC_FIRST..=DYNAMIC_LAST).contains(&external),
        "{external} is no dynamic port"
    );
    sent.leaves(
        UPLINK,
        ip.router,
        &tcp("S", (ip.host, external), server).ttl(63),
    );
    bench.comes_in(&tcp("SA", server, (ip.host, external)), &WEB, web);
    external
}

fn port_of_the_hosts_own_range_is_replaced_by_a_dynamic_one(bench: &mut Bench<'_>, ip: &Family) {
    leaves_with_dynamic_port(bench, ip, 32_768);
    leaves_with_dynamic_port(bench, ip, 60_999);
    for beside in [32_767, 61_000] {
        let (web, host, server) = ((ip.web, beside), (ip.host, beside), (ip.server, 443));
        bench.goes_out(&WEB, &tcp("S", web, server), host);
    }
}

fn privileged_port_is_replaced_by_a_dynamic_one(bench: &mut Bench<'_>, ip: &Family) {
    leaves_with_dynamic_port(bench, ip, 1023);
    let (web, host, server) = ((ip.web, 1024), (ip.host, 1024), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
}

fn port_of_a_socket_of_the_host_is_replaced_by_a_dynamic_one(bench: &mut Bench<'_>, ip: &Family) {
    bench.socket(Socket::Listener((ip.host, 5000).into()));
    leaves_with_dynamic_port(bench, ip, 5000);
    // A socket of another protocol takes nothing away.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench.socket(Socket::Udp((ip.host, 5001).into()));
    let (web, server) = ((ip.web, 5001), (ip.server, 443));
    let sent = bench.from_endpoint(&WEB, &udp(web, server));
    let external = bench.flow(UDP, web, server).external_port;
    assert_ne!(external, 5001);
    sent.leaves(UPLINK, ip.router, &udp((ip.host, external), server).ttl(63));
}

fn connected_socket_of_the_host_keeps_its_port_and_its_answers(bench: &mut Bench<'_>, ip: &Family) {
    // It is found by its peer only.
    let (host, server) = ((ip.host, 5000), (ip.server, 443));
    bench.socket(Socket::UdpTo(host.into(), server.into()));
    let web = (ip.web, 5000);
    let sent = bench.from_endpoint(&WEB, &udp(web, server));
    let external = bench.flow(UDP, web, server).external_port;
    assert_ne!(external, 5000);
    sent.leaves(UPLINK, ip.router, &udp((ip.host, external), server).ttl(63));
    bench.from_uplink(UPLINK, &udp(server, host)).passes();
    bench
        .from_uplink(UPLINK, &udp(server, (ip.host, external)))
        .reaches(&WEB, &udp(server, web).ttl(63));
}

fn connected_socket_of_the_host_keeps_its_peer_from_a_bindings_port(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.set_network(|network| network.filtering = Filtering::EndpointIndependent as u32);
    let (web, host) = ((ip.web, 5000), (ip.host, 5000));
    let (server, client) = ((ip.server, 443), (ip.client, 443));
    bench.from_endpoint(&WEB, &udp(web, server)).leaves(
        UPLINK,
        ip.router,
        &udp(host, server).ttl(63),
    );
    bench.socket(Socket::UdpTo(host.into(), client.into()));
    // One answer cannot be for both: that peer is the host's while its socket is there.
    bench
        .from_endpoint(&WEB, &udp(web, client))
        .is_refused(Reason::PortsExhausted);
    bench.from_uplink(UPLINK, &udp(client, host)).passes();
    bench
        .from_uplink(UPLINK, &udp(server, host))
        .reaches(&WEB, &udp(server, web).ttl(63));
    assert_eq!(bench.counts(), (1, 1));
}

fn published_port_is_replaced_by_a_dynamic_one(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&APP, "5000:80");
    leaves_with_dynamic_port(bench, ip, 5000);
}

fn second_endpoint_with_the_same_port_and_server_gets_another_port(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (host, server) = ((ip.host, 5000), (ip.server, 443));
    let app = (ip.app, 5000);
    bench.goes_out(&APP, &tcp("S", app, server), host);
    leaves_with_dynamic_port(bench, ip, 5000);
    bench.comes_in(&tcp("SA", server, host), &APP, app);
}

fn external_tcp_port_serves_several_peers(bench: &mut Bench<'_>, ip: &Family) {
    let host = (ip.host, 5000);
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    let (app, client) = ((ip.app, 5000), (ip.client, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench.goes_out(&APP, &tcp("S", app, client), host);
    bench.comes_in(&tcp("SA", server, host), &WEB, web);
    bench.comes_in(&tcp("SA", client, host), &APP, app);
}

fn external_udp_port_is_the_same_for_every_peer(bench: &mut Bench<'_>, ip: &Family) {
    let web = (ip.web, 40_000);
    let (server, client) = ((ip.server, 3478), (ip.client, 9999));
    let sent = bench.from_endpoint(&WEB, &udp(web, server));
    let external = bench.flow(UDP, web, server).external_port;
    let host = (ip.host, external);
    sent.leaves(UPLINK, ip.router, &udp(host, server).ttl(63));
    bench.goes_out(&WEB, &udp(web, client), host);
    bench.comes_in(&udp(client, host), &WEB, web);
    assert_eq!(bench.counts(), (2, 1));
}

fn external_udp_port_is_never_given_to_two_endpoints(bench: &mut Bench<'_>, ip: &Family) {
    // Not even towards different peers: RFC 4787 REQ-3.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let (app, client) = ((ip.app, 5000), (ip.client, 443));
    let sent = bench.from_endpoint(&APP, &udp(app, client));
    let external = bench.flow(UDP, app, client).external_port;
    assert_ne!(external, 5000);
    sent.leaves(UPLINK, ip.router, &udp((ip.host, external), client).ttl(63));
}

fn external_echo_identifier_is_the_same_for_every_peer(bench: &mut Bench<'_>, ip: &Family) {
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.server, 5000),
        (ip.host, 5000),
    );
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.client, 5000),
        (ip.host, 5000),
    );
    bench.comes_in(&echo_reply(ip.client, ip.host, 5000), &WEB, (ip.web, 5000));
    assert_eq!(bench.counts(), (2, 1));
}

fn datagram_of_a_stranger_to_a_bound_port_is_filtered(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench
        .from_uplink(UPLINK, &udp((ip.client, 443), host))
        .is_dropped_for(WEB.number, Reason::Filtered);
    assert_eq!(bench.counts(), (1, 1));
}

fn echo_reply_of_a_stranger_to_a_bound_identifier_is_filtered(bench: &mut Bench<'_>, ip: &Family) {
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.server, 5000),
        (ip.host, 5000),
    );
    bench
        .from_uplink(UPLINK, &echo_reply(ip.client, ip.host, 5000))
        .is_dropped_for(WEB.number, Reason::Filtered);
}

fn echo_request_for_the_host_passes_even_with_a_bound_identifier(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.server, 5000),
        (ip.host, 5000),
    );
    for peer in [ip.server, ip.client] {
        bench
            .from_uplink(UPLINK, &echo_request(peer, ip.host, 5000))
            .passes();
    }
}

fn segment_of_a_stranger_to_a_masquerade_port_passes_to_the_host(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    for peer in [(ip.client, 443), (ip.server, 444)] {
        bench.from_uplink(UPLINK, &tcp("SA", peer, host)).passes();
    }
}

fn network_that_keeps_no_ports_gives_dynamic_ones(bench: &mut Bench<'_>, ip: &Family) {
    // Somebody else's masquerade on this host keeps them: that of a `docker` beside us.
    bench.set_network(|network| network.keeps_ports = 0);
    let port = leaves_with_dynamic_port(bench, ip, 5000);
    assert_ne!(port, 5000);
    let (web, server) = ((ip.web, 5001), (ip.server, 443));
    let _ = bench.from_endpoint(&WEB, &udp(web, server));
    let external = bench.flow(UDP, web, server).external_port;
    assert!((DYNAMIC_FIRST..=DYNAMIC_LAST).contains(&external));
}

fn datagrams_mapped_per_flow_have_a_port_each(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_network(|network| network.udp_mapping = Mapping::PerFlow as u32);
    let web = (ip.web, 40_000);
    let mut ports = Vec::new();
    for peer in [(ip.server, 443), (ip.server, 444), (ip.client, 443)] {
        let sent = bench.from_endpoint(&WEB, &udp(web, peer));
        let host = (ip.host, bench.flow(UDP, web, peer).external_port);
        sent.leaves(UPLINK, ip.router, &udp(host, peer).ttl(63));
        bench.comes_in(&udp(peer, host), &WEB, web);
        ports.push(host.1);
    }
    assert_eq!(bench.counts(), (3, 0));
    ports.dedup();
    assert!(ports.len() > 1, "one port for all: {ports:?}");
}

fn connections_mapped_independently_of_the_endpoint_share_a_port(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    // RFC 5382 REQ-1.
    bench.set_network(|network| network.tcp_mapping = Mapping::EndpointIndependent as u32);
    let web = (ip.web, 40_000);
    let (server, client) = ((ip.server, 443), (ip.client, 443));
    let sent = bench.from_endpoint(&WEB, &tcp("S", web, server));
    let host = (ip.host, bench.flow(TCP, web, server).external_port);
    sent.leaves(UPLINK, ip.router, &tcp("S", host, server).ttl(63));
    bench.goes_out(&WEB, &tcp("S", web, client), host);
    assert_eq!(bench.counts(), (2, 1));
    // RFC 5382 REQ-7: no other socket gets that port.
    bench.set(|settings| {
        settings.dynamic_port_first = host.1;
        settings.dynamic_port_mask = 0;
    });
    bench
        .from_endpoint(&APP, &tcp("S", (ip.app, 40_000), (ip.server, 80)))
        .is_refused(Reason::PortsExhausted);
    // The binding lives as long as the longest-lived of its connections.
    bench.comes_in(&tcp("SA", server, host), &WEB, web);
    let _ = bench.from_endpoint(&WEB, &tcp("A", web, server));
    bench.wait(55.0);
    bench.goes_out(&WEB, &tcp("S", web, client), host);
}

fn exhausted_ports_drop_the_newcomer_only(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.dynamic_port_mask = 0);
    let server = (ip.server, 443);
    let (web, host) = ((ip.web, 40_000), (ip.host, DYNAMIC_FIRST));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 40_001), server))
        .is_refused(Reason::PortsExhausted);
    bench.comes_in(&tcp("SA", server, host), &WEB, web);
    assert_eq!(bench.counts(), (1, 0));
}

fn exhausted_bindings_drop_the_newcomer_only(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.dynamic_port_mask = 0);
    let (server, client) = ((ip.server, 443), (ip.client, 443));
    let (web, host) = ((ip.web, 40_000), (ip.host, DYNAMIC_FIRST));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench
        .from_endpoint(&APP, &udp((ip.app, 40_000), client))
        .is_refused(Reason::PortsExhausted);
    bench.goes_out(&WEB, &udp(web, client), host);
    assert_eq!(bench.counts(), (2, 1));
}

fn uplink_without_program_is_not_used(bench: &mut Bench<'_>, ip: &Family) {
    for packet in [
        tcp("S", (ip.web, 5000), (ip.stranger, 443)),
        udp((ip.web, 5000), (ip.stranger, 443)),
        echo_request(ip.web, ip.stranger, 5000),
    ] {
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::UplinkUnmanaged);
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn destination_without_route_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.nowhere, 443)))
        .is_dropped(Reason::NoRoute);
    assert_eq!(bench.counts(), (0, 0));
}

fn connection_that_did_not_begin_with_syn_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    for flags in ["A", "SA", "FA", "R", "RA", "SR", ""] {
        bench
            .from_endpoint(&WEB, &tcp(flags, (ip.web, 5000), (ip.server, 443)))
            .is_dropped(Reason::NoFlow);
    }
    bench
        .from_endpoint(&WEB, &echo_reply(ip.web, ip.server, 5000))
        .is_dropped(Reason::NoFlow);
    assert_eq!(bench.counts(), (0, 0));
}

fn uplink_that_vanished_is_replaced_by_the_one_of_the_route(bench: &mut Bench<'_>, ip: &Family) {
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.publish(&WEB, "8080:80");
    bench
        .from_uplink(SECOND_UPLINK, &tcp("S", client, host))
        .reaches(&WEB, &tcp("S", client, web).ttl(63));
    bench.remove_uplink(SECOND_UPLINK);
    // At most a second passes until that is noticed.
    bench.wait(1.0);
    bench.goes_out(&WEB, &tcp("SA", web, client), host);
}

fn next_hop_is_looked_up_once_a_second(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let out = tcp("S", web, server);
    let seen = tcp("S", host, server).ttl(63);
    bench
        .from_endpoint(&WEB, &out)
        .leaves(UPLINK, ip.router, &seen);
    let first = bench.flow(TCP, web, server).checked;
    bench
        .from_endpoint(&WEB, &out)
        .leaves(UPLINK, ip.router, &seen);
    assert_eq!(bench.flow(TCP, web, server).checked, first);
    bench.wait(1.5);
    bench
        .from_endpoint(&WEB, &out)
        .leaves(UPLINK, ip.router, &seen);
    let flow = bench.flow(TCP, web, server);
    assert_eq!(flow.checked, flow.last_seen);
}

/// The router's link-layer address, as the host's neighbour entry has it.
const RESOLVED: Mac = [2, 0xee, 0, 0, 0, 9];

fn established_flow_goes_straight_to_its_neighbour_between_probes(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.neighbour(UPLINK, ip.router, RESOLVED);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let (out, seen) = (udp(web, server), udp(host, server).ttl(63));
    // As long as nobody answered, the kernel is asked, so that it resolves and probes.
    for _ in 0..2 {
        bench
            .from_endpoint(&WEB, &out)
            .leaves(UPLINK, ip.router, &seen);
    }
    bench.comes_in(&udp(server, host), &WEB, web);
    for _ in 0..2 {
        for _ in 0..2 {
            bench
                .from_endpoint(&WEB, &out)
                .goes_straight(UPLINK, RESOLVED, &seen);
        }
        bench.wait(1.0);
        bench
            .from_endpoint(&WEB, &out)
            .leaves(UPLINK, ip.router, &seen);
    }
}

fn published_flow_goes_straight_to_its_neighbour_between_probes(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.neighbour(UPLINK, ip.router, RESOLVED);
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("SA", web, client), host);
    bench.comes_in(&tcp("A", client, host), &WEB, web);
    bench
        .from_endpoint(&WEB, &tcp("A", web, client))
        .goes_straight(UPLINK, RESOLVED, &tcp("A", host, client).ttl(63));
}

fn neighbour_that_moved_is_followed_within_a_second(bench: &mut Bench<'_>, ip: &Family) {
    bench.neighbour(UPLINK, ip.router, RESOLVED);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let (out, seen) = (udp(web, server), udp(host, server).ttl(63));
    bench
        .from_endpoint(&WEB, &out)
        .leaves(UPLINK, ip.router, &seen);
    bench.comes_in(&udp(server, host), &WEB, web);
    let moved = [2, 0xee, 0, 0, 0, 10];
    bench.neighbour(UPLINK, ip.router, moved);
    bench
        .from_endpoint(&WEB, &out)
        .goes_straight(UPLINK, RESOLVED, &seen);
    bench.wait(1.0);
    bench
        .from_endpoint(&WEB, &out)
        .leaves(UPLINK, ip.router, &seen);
    bench
        .from_endpoint(&WEB, &out)
        .goes_straight(UPLINK, moved, &seen);
}

fn uplink_without_resolved_neighbour_asks_the_kernel_each_time(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    for _ in 0..2 {
        bench.goes_out(&WEB, &udp(web, server), host);
        bench.comes_in(&udp(server, host), &WEB, web);
    }
}

fn address_of_the_uplink_serves_where_the_kernel_names_none(bench: &mut Bench<'_>, ip: &Family) {
    bench.hide_sources();
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench.set_uplink(UPLINK, |uplink| {
        uplink.address4 = [0; 16];
        uplink.address6 = [0; 16];
    });
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), server))
        .is_dropped(Reason::NoRoute);
}

fn udp_checksum_zero_stays_zero_on_the_way_out_and_back(bench: &mut Bench<'_>) {
    let (web, host, server) = ((WEB.v4, 40_000), HOST4, (SERVER4, 443));
    let sent = bench.from_endpoint(&WEB, &udp(web, server).without_checksum());
    let host = (host, bench.flow(UDP, web, server).external_port);
    sent.leaves(
        UPLINK,
        ROUTER4,
        &udp(host, server).without_checksum().ttl(63),
    );
    bench.comes_in(&udp(server, host).without_checksum(), &WEB, web);
}

fn udp_checksum_that_comes_to_zero_is_sent_as_ones(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 768: zero would say that there is no checksum, which IPv6 forbids.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let blank = udp(host, server).payload([0, 0]).bytes();
    let checksum = [blank[blank.len() - 4], blank[blank.len() - 3]];
    let expected = udp(host, server).payload(checksum).ttl(63);
    let bytes = expected.bytes();
    assert_eq!(bytes[bytes.len() - 4..bytes.len() - 2], [0xff, 0xff]);
    bench
        .from_endpoint(&WEB, &udp(web, server).payload(checksum))
        .leaves(UPLINK, ip.router, &expected);

    let blank = udp(server, web).payload([0, 0]).bytes();
    let checksum = [blank[blank.len() - 4], blank[blank.len() - 3]];
    bench.comes_in(&udp(server, host).payload(checksum), &WEB, web);
}
