//! Whose packets come in by a port that an endpoint has outside.

use nucnet_common::{
    abi::{Filtering, Mapping, Reason},
    packet::UDP,
};

use super::{DRAWS, Family, Row, each_family};
use crate::packets::{
    bench::{Bench, Egress},
    engine::Socket,
    packet::{echo_reply, echo_request, tcp, udp},
    site::{APP, SECOND_UPLINK, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(peer_that_was_spoken_to_may_answer_from_another_port),
    each_family!(answer_from_another_port_gets_its_answer),
    each_family!(address_and_port_that_were_spoken_to_are_all_that_gets_in_where_asked_for),
    each_family!(anybody_gets_in_where_asked_for),
    each_family!(policy_keeps_strangers_out_whatever_the_network_says),
    each_family!(filtering_opens_no_way_out_past_a_policy),
    each_family!(impossible_source_does_not_get_in),
    each_family!(what_comes_in_keeps_nothing_alive),
    each_family!(what_comes_in_and_is_answered_lives_on),
    each_family!(permission_ends_with_the_flow),
    each_family!(permission_is_renewed_by_the_flow_that_lives_on),
    each_family!(permission_is_one_socket_s),
    each_family!(what_belongs_to_no_live_flow_is_for_the_hosts_socket_on_a_bindings_port),
    each_family!(echo_replies_come_from_whom_was_asked),
    each_family!(connections_mapped_per_flow_are_filtered_by_address_and_port),
    each_family!(connection_comes_in_by_an_endpoint_independent_port),
    each_family!(flood_that_nobody_answers_makes_room, logic_only: DRAWS),
];

/// WEB's socket, as it and as the outside sees it.
fn socket(ip: &Family) -> [(std::net::IpAddr, u16); 2] {
    [(ip.web, 5000), (ip.host, 5000)]
}

#[track_caller]
fn ask(bench: &mut Bench<'_>, ip: &Family, peer: (std::net::IpAddr, u16)) {
    let [web, host] = socket(ip);
    bench.goes_out(&WEB, &udp(web, peer), host);
}

#[track_caller]
fn gets_in(bench: &mut Bench<'_>, ip: &Family, peer: (std::net::IpAddr, u16)) {
    let [web, host] = socket(ip);
    bench.comes_in(&udp(peer, host), &WEB, web);
}

#[track_caller]
fn is_filtered(bench: &mut Bench<'_>, ip: &Family, peer: (std::net::IpAddr, u16)) {
    let [_, host] = socket(ip);
    bench
        .from_uplink(UPLINK, &udp(peer, host))
        .is_dropped_for(WEB.number, Reason::Filtered);
}

fn filter(bench: &mut Bench<'_>, filtering: Filtering) {
    bench.set_network(|network| network.filtering = filtering as u32);
}

fn peer_that_was_spoken_to_may_answer_from_another_port(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 4787 REQ-8.
    ask(bench, ip, (ip.server, 443));
    for port in [444, 3478, 53, 1] {
        gets_in(bench, ip, (ip.server, port));
    }
    is_filtered(bench, ip, (ip.client, 443));
    assert_eq!(bench.counts(), (5, 1));
}

fn answer_from_another_port_gets_its_answer(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, (ip.server, 443));
    gets_in(bench, ip, (ip.server, 444));
    for _ in 0..2 {
        ask(bench, ip, (ip.server, 444));
        gets_in(bench, ip, (ip.server, 444));
    }
    // Such a flow stands for the address as well as any.
    bench.wait(45.0);
    ask(bench, ip, (ip.server, 444));
    bench.wait(10.0);
    gets_in(bench, ip, (ip.server, 443));
    gets_in(bench, ip, (ip.server, 445));
}

fn address_and_port_that_were_spoken_to_are_all_that_gets_in_where_asked_for(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    filter(bench, Filtering::AddressAndPortDependent);
    ask(bench, ip, (ip.server, 443));
    is_filtered(bench, ip, (ip.server, 444));
    is_filtered(bench, ip, (ip.client, 443));
    gets_in(bench, ip, (ip.server, 443));
}

fn anybody_gets_in_where_asked_for(bench: &mut Bench<'_>, ip: &Family) {
    filter(bench, Filtering::EndpointIndependent);
    let [web, host] = socket(ip);
    ask(bench, ip, (ip.server, 443));
    gets_in(bench, ip, (ip.client, 9999));
    ask(bench, ip, (ip.client, 9999));
    // By another uplink than the route's: the answer goes back there.
    let peer = (ip.client, 10_000);
    bench
        .from_uplink(SECOND_UPLINK, &udp(peer, host))
        .reaches(&WEB, &udp(peer, web).ttl(63));
    bench
        .from_endpoint(&WEB, &udp(web, peer))
        .goes_back(SECOND_UPLINK, &udp(host, peer).ttl(63));
    // Where there is no binding there is no way in.
    bench
        .from_uplink(UPLINK, &udp(peer, (ip.host, 5001)))
        .passes();
}

fn policy_keeps_strangers_out_whatever_the_network_says(bench: &mut Bench<'_>, ip: &Family) {
    filter(bench, Filtering::EndpointIndependent);
    bench.egress(
        &WEB,
        Egress::allow(&["198.51.100.0/24:443-444", "[2001:db8:f::/64]:443-444"]),
    );
    ask(bench, ip, (ip.server, 443));
    is_filtered(bench, ip, (ip.client, 443));
    gets_in(bench, ip, (ip.server, 444));
}

fn filtering_opens_no_way_out_past_a_policy(bench: &mut Bench<'_>, ip: &Family) {
    let [web, host] = socket(ip);
    let allowed = Egress::allow(&["198.51.100.80/32:443", "[2001:db8:f::80]:443"]);
    bench.egress(&WEB, allowed);
    ask(bench, ip, (ip.server, 443));
    // What may not be answered does not come in either.
    let other = (ip.server, 444);
    bench
        .from_uplink(UPLINK, &udp(other, host))
        .is_dropped_for(WEB.number, Reason::Policy);
    bench
        .from_endpoint(&WEB, &udp(web, other))
        .is_dropped(Reason::Policy);
    assert_eq!(bench.counts(), (1, 1));
    // A policy that comes later judges it, too.
    bench.egress(&WEB, Egress::default());
    gets_in(bench, ip, other);
    bench.egress(&WEB, allowed);
    bench
        .from_endpoint(&WEB, &udp(web, other))
        .is_dropped(Reason::Policy);
}

fn impossible_source_does_not_get_in(bench: &mut Bench<'_>, ip: &Family) {
    filter(bench, Filtering::EndpointIndependent);
    let [_, host] = socket(ip);
    ask(bench, ip, (ip.server, 443));
    for source in [ip.host, ip.gateway, ip.app] {
        bench
            .from_uplink(UPLINK, &udp((source, 443), host))
            .is_dropped_for(WEB.number, Reason::MartianSource);
    }
}

fn what_comes_in_keeps_nothing_alive(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 4787 REQ-6.
    filter(bench, Filtering::EndpointIndependent);
    ask(bench, ip, (ip.server, 443));
    for _ in 0..3 {
        bench.wait(15.0);
        gets_in(bench, ip, (ip.server, 444));
        gets_in(bench, ip, (ip.client, 444));
    }
    bench.wait(5.0);
    for peer in [(ip.server, 444), (ip.client, 444), (ip.client, 445)] {
        is_filtered(bench, ip, peer);
    }
}

fn what_comes_in_and_is_answered_lives_on(bench: &mut Bench<'_>, ip: &Family) {
    // A question's binding is short-lived; a conversation that grows out of it is none.
    ask(bench, ip, (ip.server, 53));
    let other = (ip.server, 4444);
    gets_in(bench, ip, other);
    ask(bench, ip, other);
    bench.wait(45.0);
    gets_in(bench, ip, other);
    ask(bench, ip, other);
    bench.wait(45.0);
    gets_in(bench, ip, other);
    bench.wait(5.0);
    is_filtered(bench, ip, other);
}

fn permission_ends_with_the_flow(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, (ip.server, 443));
    bench.wait(30.0);
    ask(bench, ip, (ip.client, 443));
    bench.wait(20.0);
    // The binding lives on for the client.
    is_filtered(bench, ip, (ip.server, 443));
    is_filtered(bench, ip, (ip.server, 444));
    gets_in(bench, ip, (ip.client, 444));
}

fn permission_is_renewed_by_the_flow_that_lives_on(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, (ip.server, 443));
    bench.wait(10.0);
    ask(bench, ip, (ip.server, 444));
    for _ in 0..3 {
        bench.wait(25.0);
        ask(bench, ip, (ip.server, 444));
    }
    // The one to port 443 is long dead, and may be the one that was named.
    gets_in(bench, ip, (ip.server, 9));
    for _ in 0..3 {
        bench.wait(25.0);
        ask(bench, ip, (ip.server, 443));
    }
    gets_in(bench, ip, (ip.server, 10));
}

fn permission_is_one_socket_s(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, (ip.server, 443));
    let (app, client) = ((ip.app, 5001), (ip.client, 443));
    bench.goes_out(&APP, &udp(app, client), (ip.host, 5001));
    bench
        .from_uplink(UPLINK, &udp((ip.server, 443), (ip.host, 5001)))
        .is_dropped_for(APP.number, Reason::Filtered);
}

fn what_belongs_to_no_live_flow_is_for_the_hosts_socket_on_a_bindings_port(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    // The endpoint was first; the host's server has bound the port since.
    let [_, host] = socket(ip);
    ask(bench, ip, (ip.server, 443));
    bench.socket(Socket::Udp(host.into()));
    let (spoken_to, others) = ((ip.server, 443), [(ip.server, 444), (ip.client, 9999)]);
    for filtering in [
        Filtering::AddressDependent,
        Filtering::EndpointIndependent,
        Filtering::AddressAndPortDependent,
    ] {
        filter(bench, filtering);
        gets_in(bench, ip, spoken_to);
        for peer in others {
            bench.from_uplink(UPLINK, &udp(peer, host)).passes();
        }
    }
    assert_eq!(bench.counts(), (1, 1));
    bench.wait(50.0);
    bench.from_uplink(UPLINK, &udp(spoken_to, host)).passes();
}

fn echo_replies_come_from_whom_was_asked(bench: &mut Bench<'_>, ip: &Family) {
    filter(bench, Filtering::EndpointIndependent);
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.server, 5000),
        (ip.host, 5000),
    );
    bench
        .from_uplink(UPLINK, &echo_reply(ip.client, ip.host, 5000))
        .is_dropped_for(WEB.number, Reason::Filtered);
}

fn connections_mapped_per_flow_are_filtered_by_address_and_port(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    // No by design for RFC 5382 REQ-3: a port that several peers share lets in nobody else.
    filter(bench, Filtering::EndpointIndependent);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    for peer in [(ip.server, 444), (ip.client, 443)] {
        bench.from_uplink(UPLINK, &tcp("S", peer, host)).passes();
    }
}

fn connection_comes_in_by_an_endpoint_independent_port(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_network(|network| network.tcp_mapping = Mapping::EndpointIndependent as u32);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    let other = (ip.server, 444);
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 444), host))
        .is_dropped_for(WEB.number, Reason::Filtered);
    // What opens nothing is the host's to refuse.
    bench.from_uplink(UPLINK, &tcp("SA", other, host)).passes();
    bench.comes_in(&tcp("S", other, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("SA", web, other), host);
    bench.comes_in(&tcp("A", other, host), &WEB, web);
}

fn flood_that_nobody_answers_makes_room(bench: &mut Bench<'_>, ip: &Family) {
    filter(bench, Filtering::EndpointIndependent);
    bench.set(|settings| settings.flows_per_endpoint = 3);
    ask(bench, ip, (ip.server, 443));
    let [web, _] = socket(ip);
    let place = bench.flow(UDP, web, (ip.server, 443)).slot;
    gets_in(bench, ip, (ip.client, 1));
    let spare = bench.flow(UDP, web, (ip.client, 1)).slot;
    assert_ne!(place, spare);
    // From now on only that place is ever drawn.
    let window = spare.wrapping_sub(341_846) & 0x3ff;
    bench.draw(window);
    for port in 2..10 {
        gets_in(bench, ip, (ip.client, port));
    }
    assert_eq!(bench.counts(), (2, 1));
    gets_in(bench, ip, (ip.server, 443));
}
