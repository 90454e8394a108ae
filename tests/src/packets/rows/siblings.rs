//! Endpoints that speak to each other, directly or by way of a published port.

use nucnet_common::{
    abi::{PeerKind, Reason},
    packet::TCP,
};

use super::{Family, Row, each_family};
use crate::packets::{
    bench::Bench,
    packet::{echo_reply, echo_request, tcp, udp},
    site::{self, APP, BRIDGE, OTHER, SLOT, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(sibling_is_reached_directly_and_its_replies_come_back),
    each_family!(sibling_takes_datagrams_and_echo_requests),
    each_family!(microvm_is_reached_by_its_interface),
    each_family!(sibling_sees_no_router_between),
    each_family!(echo_request_is_never_taken_for_a_reply_to_a_sibling),
    each_family!(endpoint_of_another_network_is_reached_directly),
    each_family!(isolated_network_is_neither_reached_nor_left),
    each_family!(isolated_network_serves_its_publishes_all_the_same),
    each_family!(address_that_nobody_has_is_dropped),
    each_family!(published_port_of_a_sibling_is_reached_by_the_hosts_address),
    each_family!(published_range_of_a_sibling_maps_port_by_port),
    each_family!(own_published_port_is_reached_as_from_the_gateway),
    each_family!(publish_for_any_is_reached_by_the_gateways_address),
    each_family!(sibling_that_left_is_dropped_and_not_its_successor_on_the_interface),
    each_family!(one_port_reaches_a_sibling_both_ways_at_once),
    each_family!(endpoint_that_talks_to_itself_is_not_answered_as_the_host),
    each_family!(host_is_not_answered_as_an_endpoint_that_talks_to_itself),
];

fn sibling_is_reached_directly_and_its_replies_come_back(bench: &mut Bench<'_>, ip: &Family) {
    let (web, app) = ((ip.web, 80), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &tcp("S", app, web))
        .reaches(&WEB, &tcp("S", app, web));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app))
        .reaches(&APP, &tcp("SA", web, app));
    bench
        .from_endpoint(&APP, &tcp("A", app, web))
        .reaches(&WEB, &tcp("A", app, web));
    let flow = bench.flow(TCP, app, web);
    assert_eq!(flow.peer_kind, PeerKind::Endpoint as u32);
    assert_eq!((flow.packets_out, flow.packets_in), (2, 1));
    assert_eq!(bench.counts(), (1, 0));
}

fn sibling_takes_datagrams_and_echo_requests(bench: &mut Bench<'_>, ip: &Family) {
    let (web, app) = ((ip.web, 53), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &udp(app, web))
        .reaches(&WEB, &udp(app, web));
    bench
        .from_endpoint(&WEB, &udp(web, app))
        .reaches(&APP, &udp(web, app));
    bench
        .from_endpoint(&APP, &echo_request(ip.app, ip.web, 7))
        .reaches(&WEB, &echo_request(ip.app, ip.web, 7));
    bench
        .from_endpoint(&WEB, &echo_reply(ip.web, ip.app, 7))
        .reaches(&APP, &echo_reply(ip.web, ip.app, 7));
    assert_eq!(bench.counts(), (2, 0));
}

fn microvm_is_reached_by_its_interface(bench: &mut Bench<'_>, ip: &Family) {
    let (slot, app) = ((ip.slot, 80), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &tcp("S", app, slot))
        .reaches(&SLOT, &tcp("S", app, slot));
    bench
        .from_endpoint(&SLOT, &tcp("SA", slot, app))
        .reaches(&APP, &tcp("SA", slot, app));
}

fn sibling_sees_no_router_between(bench: &mut Bench<'_>, ip: &Family) {
    let (web, app) = ((ip.web, 80), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &tcp("S", app, web).ttl(1))
        .reaches(&WEB, &tcp("S", app, web).ttl(1));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app).ttl(1))
        .reaches(&APP, &tcp("SA", web, app).ttl(1));
}

fn echo_request_is_never_taken_for_a_reply_to_a_sibling(bench: &mut Bench<'_>, ip: &Family) {
    // Both sides may use the same identifier: two flows.
    for (from, to) in [
        ((&APP, ip.app), (&WEB, ip.web)),
        ((&WEB, ip.web), (&APP, ip.app)),
    ] {
        bench
            .from_endpoint(from.0, &echo_request(from.1, to.1, 7))
            .reaches(to.0, &echo_request(from.1, to.1, 7));
    }
    assert_eq!(bench.counts(), (2, 0));
}

fn endpoint_of_another_network_is_reached_directly(bench: &mut Bench<'_>, ip: &Family) {
    let (other, app) = ((ip.other, 80), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &tcp("S", app, other))
        .reaches(&OTHER, &tcp("S", app, other));
    bench
        .from_endpoint(&OTHER, &tcp("SA", other, app))
        .reaches(&APP, &tcp("SA", other, app));
}

fn isolated_network_is_neither_reached_nor_left(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_endpoint(&OTHER, |endpoint| endpoint.isolated = 1);
    bench
        .from_endpoint(&APP, &tcp("S", (ip.app, 5000), (ip.other, 80)))
        .is_dropped(Reason::Isolated);
    bench
        .from_endpoint(&OTHER, &tcp("S", (ip.other, 5000), (ip.app, 80)))
        .is_dropped(Reason::Isolated);
    assert_eq!(bench.counts(), (0, 0));
    // Inside one isolated network everybody is reached.
    for party in [&WEB, &APP] {
        bench.set_endpoint(party, |endpoint| endpoint.isolated = 1);
    }
    let (web, app) = ((ip.web, 80), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &tcp("S", app, web))
        .reaches(&WEB, &tcp("S", app, web));
}

fn isolated_network_serves_its_publishes_all_the_same(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_endpoint(&OTHER, |endpoint| endpoint.isolated = 1);
    bench.publish(&OTHER, "8080:80");
    let (app, host, other) = ((ip.app, 5000), (ip.host, 8080), (ip.other, 80));
    bench
        .from_endpoint(&APP, &tcp("S", app, host))
        .reaches(&OTHER, &tcp("S", app, other).ttl(63));
}

fn address_that_nobody_has_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let nobody = (ip.nobody, 80);
    bench
        .from_endpoint(&APP, &tcp("S", (ip.app, 5000), nobody))
        .is_dropped(Reason::NoSuchAddress);
}

fn published_port_of_a_sibling_is_reached_by_the_hosts_address(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.publish(&WEB, "5353:53/udp");
    let (app, host, web) = ((ip.app, 5000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_endpoint(&APP, &tcp("S", app, host))
        .reaches(&WEB, &tcp("S", app, web).ttl(63));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app))
        .reaches(&APP, &tcp("SA", host, app).ttl(63));
    bench
        .from_endpoint(&APP, &tcp("A", app, host))
        .reaches(&WEB, &tcp("A", app, web).ttl(63));
    let (host, web) = ((ip.host, 5353), (ip.web, 53));
    bench
        .from_endpoint(&APP, &udp(app, host))
        .reaches(&WEB, &udp(app, web).ttl(63));
    bench
        .from_endpoint(&WEB, &udp(web, app))
        .reaches(&APP, &udp(host, app).ttl(63));
}

fn published_range_of_a_sibling_maps_port_by_port(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "9001-9006:7001-7006");
    for offset in 0..6 {
        let app = (ip.app, 5000);
        bench
            .from_endpoint(&APP, &tcp("S", app, (ip.host, 9001 + offset)))
            .reaches(&WEB, &tcp("S", app, (ip.web, 7001 + offset)).ttl(63));
    }
}

/// WEB opens a connection to what it publishes itself.
#[track_caller]
fn asks_itself(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let sent = bench.from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.host, 8080)));
    let seen = tcp("S", (ip.gateway, 5000), (ip.web, 80));
    sent.reaches(&WEB, &seen.ttl(63));
}

/// And has its own answer.
#[track_caller]
fn is_answered_by_itself(bench: &mut Bench<'_>, ip: &Family) {
    let sent = bench.from_endpoint(&WEB, &tcp("SA", (ip.web, 80), (ip.gateway, 5000)));
    let seen = tcp("SA", (ip.host, 8080), (ip.web, 5000));
    sent.reaches(&WEB, &seen.ttl(63));
}

fn own_published_port_is_reached_as_from_the_gateway(bench: &mut Bench<'_>, ip: &Family) {
    asks_itself(bench, ip);
    is_answered_by_itself(bench, ip);
    let (inside, host, web) = ((ip.web, 5000), (ip.host, 8080), (ip.web, 80));
    let gateway = (ip.gateway, 5000);
    bench
        .from_endpoint(&WEB, &tcp("A", inside, host))
        .reaches(&WEB, &tcp("A", gateway, web).ttl(63));
    assert_eq!(bench.counts(), (1, 0));
}

fn publish_for_any_is_reached_by_the_gateways_address(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (app, gateway, web) = ((ip.app, 5000), (ip.gateway, 8080), (ip.web, 80));
    bench
        .from_endpoint(&APP, &tcp("S", app, gateway))
        .reaches(&WEB, &tcp("S", app, web).ttl(63));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app))
        .reaches(&APP, &tcp("SA", gateway, app).ttl(63));
}

fn sibling_that_left_is_dropped_and_not_its_successor_on_the_interface(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (web, app) = ((ip.web, 80), (ip.app, 5000));
    bench
        .from_endpoint(&APP, &tcp("S", app, web))
        .reaches(&WEB, &tcp("S", app, web));
    bench.set_endpoint(&WEB, |endpoint| {
        endpoint.address4[15] = 77;
        endpoint.address6[15] = 77;
    });
    bench
        .from_endpoint(&APP, &tcp("A", app, web))
        .is_dropped(Reason::NoEndpoint);
    bench.remove_endpoint(&WEB);
    bench
        .from_endpoint(&APP, &tcp("A", app, web))
        .is_dropped(Reason::NoEndpoint);
}

fn one_port_reaches_a_sibling_both_ways_at_once(bench: &mut Bench<'_>, ip: &Family) {
    // By the published port and directly, the sibling would see one and the same pair of
    // addresses and ports: the second one is seen by another port.
    bench.publish(&WEB, "8080:80");
    let (app, host, web) = ((ip.app, 5000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_endpoint(&APP, &tcp("S", app, host))
        .reaches(&WEB, &tcp("S", app, web).ttl(63));
    let sent = bench.from_endpoint(&APP, &tcp("S", app, web));
    let other = (ip.app, bench.flow(TCP, app, web).external_port);
    assert_ne!(other, app);
    sent.reaches(&WEB, &tcp("S", other, web));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, other))
        .reaches(&APP, &tcp("SA", web, app));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app))
        .reaches(&APP, &tcp("SA", host, app).ttl(63));
    assert_eq!(bench.counts(), (2, 0));
}

fn endpoint_that_talks_to_itself_is_not_answered_as_the_host(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (inside, host, web) = ((ip.web, 5000), (ip.host, 8080), (ip.web, 80));
    let gateway = (ip.gateway, 5000);
    bench
        .from_host(&WEB, &tcp("S", gateway, web))
        .is_put_through(&WEB, &tcp("S", gateway, web));
    let sent = bench.from_endpoint(&WEB, &tcp("S", inside, host));
    let other = (ip.gateway, bench.flow(TCP, inside, host).external_port);
    assert_ne!(other, gateway);
    sent.reaches(&WEB, &tcp("S", other, web).ttl(63));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, other))
        .reaches(&WEB, &tcp("SA", host, inside).ttl(63));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, gateway))
        .reaches_host(BRIDGE, &tcp("SA", web, gateway));
}

fn host_is_not_answered_as_an_endpoint_that_talks_to_itself(bench: &mut Bench<'_>, ip: &Family) {
    asks_itself(bench, ip);
    let (gateway, web) = ((ip.gateway, 5000), (ip.web, 80));
    bench
        .from_host(&WEB, &tcp("S", gateway, web))
        .is_dropped_for(WEB.number, Reason::PortsExhausted);
    // A client of the host's on its loopback interface may be seen by another port.
    let loopback = site::address(if ip.web.is_ipv4() { "127.0.0.1" } else { "::1" });
    let _ = bench.to_itself(&tcp("S", (loopback, 5000), (loopback, 8080)));
    assert_eq!(bench.counts(), (2, 0));
    let state = bench.state();
    let (key, _) = state
        .flows
        .iter()
        .find(|(_, flow)| flow.peer_kind == PeerKind::Loopback as u32)
        .expect("flow");
    assert_ne!(key.peer_port, 5000);
    is_answered_by_itself(bench, ip);
}
