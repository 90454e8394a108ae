//! The life of flows and bindings: states and idle times.

use nucnet_common::{
    abi::{FlowState, Reason, flow_flag},
    packet::UDP,
};

use super::{
    Family, Row, each_family,
    talk::{Connection, answer, ask},
};
use crate::packets::{
    bench::Bench,
    packet::{echo_reply, echo_request, tcp, udp},
    site::{UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(tcp_is_established_when_the_opener_acknowledges),
    each_family!(tcp_closes_when_both_sides_have_sent_fin),
    each_family!(tcp_closes_when_the_peer_sends_fin_first),
    each_family!(tcp_closes_by_a_reset_of_either_side),
    each_family!(tcp_of_a_published_port_closes_the_same_way),
    each_family!(syn_of_the_opener_reopens_a_closed_connection_in_place),
    each_family!(syn_of_the_other_side_does_not_reopen),
    each_family!(half_open_connection_dies_after_the_transitory_time),
    each_family!(established_connection_dies_after_its_time),
    each_family!(closed_connection_dies_after_the_transitory_time),
    each_family!(reset_connection_dies_after_the_transitory_time),
    each_family!(connection_that_goes_on_after_a_reset_is_established_again),
    each_family!(handshake_that_goes_on_after_a_reset_is_completed),
    each_family!(simultaneous_open_is_established),
    each_family!(simultaneous_open_of_a_published_port_is_established),
    each_family!(reopened_connection_waits_for_its_answer),
    each_family!(datagram_flow_dies_after_its_time),
    each_family!(question_to_a_resolver_dies_sooner),
    each_family!(echo_flow_dies_after_its_time),
    each_family!(outbound_packets_keep_a_bound_flow_alive_and_inbound_ones_do_not),
    each_family!(inbound_packets_keep_a_published_flow_alive),
    each_family!(binding_outlives_its_flows),
    each_family!(binding_lives_while_one_of_its_flows_does),
    each_family!(binding_in_use_keeps_its_port_for_new_peers),
    each_family!(binding_lives_as_long_as_its_longest_lived_flow),
    each_family!(dead_binding_is_made_anew),
];

fn tcp_is_established_when_the_opener_acknowledges(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.out(bench, "S");
    assert_eq!(bench.only_state(), FlowState::Opening);
    // An acknowledgement of nothing, and one more attempt.
    connection.out(bench, "A");
    connection.out(bench, "S");
    assert_eq!(bench.only_state(), FlowState::Opening);
    connection.back(bench, "SA");
    assert_eq!(bench.only_state(), FlowState::Opening);
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Established);
    assert_eq!(bench.only_flow().1.timeout_s, 60);
}

fn tcp_closes_when_both_sides_have_sent_fin(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.establish(bench);
    connection.out(bench, "FA");
    assert_eq!(bench.only_state(), FlowState::Closing);
    assert_eq!(bench.only_flow().1.timeout_s, 40);
    // The other side may go on for a while.
    connection.back(bench, "A");
    connection.out(bench, "A");
    connection.out(bench, "FA");
    assert_eq!(bench.only_state(), FlowState::Closing);
    connection.back(bench, "FA");
    assert_eq!(bench.only_state(), FlowState::Closed);
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Closed);
}

fn tcp_closes_when_the_peer_sends_fin_first(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.establish(bench);
    connection.back(bench, "FA");
    assert_eq!(bench.only_state(), FlowState::Closing);
    connection.out(bench, "FA");
    assert_eq!(bench.only_state(), FlowState::Closed);
}

fn tcp_closes_by_a_reset_of_either_side(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.establish(bench);
    connection.back(bench, "R");
    assert_eq!(bench.only_state(), FlowState::Closed);
    assert_eq!(bench.only_flow().1.timeout_s, 40);
    connection.out(bench, "S");
    assert_eq!(bench.only_state(), FlowState::Opening);
    connection.out(bench, "RA");
    assert_eq!(bench.only_state(), FlowState::Closed);
}

fn tcp_of_a_published_port_closes_the_same_way(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    let steps = [
        (true, "S", FlowState::Opening),
        (false, "SA", FlowState::Opening),
        (true, "A", FlowState::Established),
        (false, "A", FlowState::Established),
        (false, "FA", FlowState::Closing),
        (true, "A", FlowState::Closing),
        (true, "FA", FlowState::Closed),
        (true, "S", FlowState::Opening),
    ];
    for (is_in, flags, state) in steps {
        if is_in {
            bench.comes_in(&tcp(flags, client, host), &WEB, web);
        } else {
            bench.goes_out(&WEB, &tcp(flags, web, client), host);
        }
        assert_eq!(bench.only_state(), state, "after {flags}");
    }
}

fn syn_of_the_opener_reopens_a_closed_connection_in_place(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.establish(bench);
    connection.out(bench, "FA");
    connection.back(bench, "FA");
    let (key, closed) = bench.only_flow();
    connection.out(bench, "S");
    let (same, reopened) = bench.only_flow();
    assert_eq!(bench.only_state(), FlowState::Opening);
    assert_eq!((key, closed.slot), (same, reopened.slot));
    assert_eq!(
        reopened.flags & (flow_flag::FIN_INSIDE | flow_flag::FIN_PEER),
        0
    );
    connection.back(bench, "SA");
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Established);
}

fn syn_of_the_other_side_does_not_reopen(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.establish(bench);
    connection.back(bench, "R");
    connection.back(bench, "S");
    assert_eq!(bench.only_state(), FlowState::Closed);
    connection.out(bench, "SA");
    assert_eq!(bench.only_state(), FlowState::Closed);
}

fn half_open_connection_dies_after_the_transitory_time(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    let [web, host, server] = connection.ends();
    connection.out(bench, "S");
    bench.wait(38.0);
    connection.back(bench, "SA");
    bench.wait(38.0);
    connection.back(bench, "SA");
    bench.wait(40.0);
    bench.from_uplink(UPLINK, &tcp("SA", server, host)).passes();
    assert_eq!(bench.counts(), (0, 0));
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_dropped(Reason::NoFlow);
}

fn established_connection_dies_after_its_time(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    let [web, _, server] = connection.ends();
    connection.establish(bench);
    bench.wait(58.0);
    connection.back(bench, "A");
    bench.wait(58.0);
    connection.out(bench, "A");
    bench.wait(60.0);
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_dropped(Reason::NoFlow);
    assert_eq!(bench.counts(), (0, 0));
    connection.out(bench, "S");
}

fn closed_connection_dies_after_the_transitory_time(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    let [web, _, server] = connection.ends();
    connection.establish(bench);
    connection.out(bench, "FA");
    connection.back(bench, "FA");
    bench.wait(38.0);
    connection.out(bench, "A");
    bench.wait(40.0);
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_dropped(Reason::NoFlow);
    assert_eq!(bench.counts(), (0, 0));
}

fn reset_connection_dies_after_the_transitory_time(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 7857 section 2.2: four minutes after the RST, and not at once.
    let connection = Connection { ip };
    let [web, _, server] = connection.ends();
    connection.establish(bench);
    connection.out(bench, "RA");
    bench.wait(38.0);
    connection.back(bench, "R");
    bench.wait(40.0);
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_dropped(Reason::NoFlow);
    assert_eq!(bench.counts(), (0, 0));
}

fn connection_that_goes_on_after_a_reset_is_established_again(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 7857 section 2.2: a stranger can forge a RST, but not make both ends believe it.
    let connection = Connection { ip };
    connection.establish(bench);
    connection.back(bench, "R");
    assert_eq!(bench.only_state(), FlowState::Closed);
    connection.back(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Established);
    assert_eq!(bench.only_flow().1.timeout_s, 60);
    connection.out(bench, "FA");
    connection.back(bench, "R");
    assert_eq!(bench.only_state(), FlowState::Closed);
    connection.back(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Closing);
    connection.back(bench, "FA");
    connection.out(bench, "R");
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Closed);
}

fn handshake_that_goes_on_after_a_reset_is_completed(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.out(bench, "S");
    connection.back(bench, "R");
    assert_eq!(bench.only_state(), FlowState::Closed);
    connection.back(bench, "SA");
    assert_eq!(bench.only_state(), FlowState::Opening);
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Established);
}

fn simultaneous_open_is_established(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 5382 REQ-2a, RFC 9293 figure 8.
    let connection = Connection { ip };
    connection.out(bench, "S");
    connection.back(bench, "S");
    assert_eq!(bench.only_state(), FlowState::Opening);
    connection.out(bench, "SA");
    connection.back(bench, "SA");
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Established);
}

fn simultaneous_open_of_a_published_port_is_established(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    for (inbound, flags) in [
        (true, "S"),
        (false, "S"),
        (true, "SA"),
        (false, "SA"),
        (true, "A"),
    ] {
        if inbound {
            bench.comes_in(&tcp(flags, client, host), &WEB, web);
        } else {
            bench.goes_out(&WEB, &tcp(flags, web, client), host);
        }
    }
    assert_eq!(bench.only_state(), FlowState::Established);
}

fn reopened_connection_waits_for_its_answer(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.establish(bench);
    connection.back(bench, "R");
    connection.out(bench, "S");
    // The answers of the connection before are none.
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Opening);
    connection.back(bench, "SA");
    connection.out(bench, "A");
    assert_eq!(bench.only_state(), FlowState::Established);
}

/// The server's answer, which comes too late.
#[track_caller]
fn answer_in_vain(bench: &mut Bench<'_>, ip: &Family, port: u16) {
    bench
        .from_uplink(UPLINK, &udp((ip.server, port), (ip.host, 5000)))
        .is_dropped_for(WEB.number, Reason::Filtered);
}

fn datagram_flow_dies_after_its_time(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, 443);
    bench.wait(48.0);
    answer(bench, ip, 443);
    bench.wait(2.0);
    answer_in_vain(bench, ip, 443);
    assert_eq!(bench.counts(), (0, 1));
}

fn question_to_a_resolver_dies_sooner(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, 53);
    bench.wait(18.0);
    answer(bench, ip, 53);
    bench.wait(2.0);
    answer_in_vain(bench, ip, 53);
    assert_eq!(bench.counts(), (0, 1));
}

fn echo_flow_dies_after_its_time(bench: &mut Bench<'_>, ip: &Family) {
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.server, 5000),
        (ip.host, 5000),
    );
    bench.wait(28.0);
    bench.comes_in(&echo_reply(ip.server, ip.host, 5000), &WEB, (ip.web, 5000));
    bench.wait(2.0);
    bench
        .from_uplink(UPLINK, &echo_reply(ip.server, ip.host, 5000))
        .is_dropped_for(WEB.number, Reason::Filtered);
}

fn outbound_packets_keep_a_bound_flow_alive_and_inbound_ones_do_not(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    // RFC 4787 REQ-6.
    ask(bench, ip, 443);
    for _ in 0..3 {
        bench.wait(45.0);
        ask(bench, ip, 443);
    }
    bench.wait(45.0);
    answer(bench, ip, 443);
    bench.wait(5.0);
    answer_in_vain(bench, ip, 443);
}

fn inbound_packets_keep_a_published_flow_alive(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    for _ in 0..3 {
        bench.comes_in(&udp(client, host), &WEB, web);
        bench.wait(45.0);
    }
    bench.goes_out(&WEB, &udp(web, client), host);
    let (_, flow) = bench.only_flow();
    assert_eq!((flow.packets_in, flow.packets_out), (3, 1));
}

/// The place of the only binding there is, which says whether it is the same as before.
#[track_caller]
fn only_binding(bench: &Bench<'_>) -> (u32, u32) {
    let state = bench.state();
    let bindings: Vec<_> = state.bindings.into_values().collect();
    assert_eq!(bindings.len(), 1);
    (bindings[0].slot, bindings[0].slot_version)
}

fn binding_outlives_its_flows(bench: &mut Bench<'_>, ip: &Family) {
    // The binding notes its use once a second only; it must not die before its flows for that.
    ask(bench, ip, 443);
    bench.wait(0.9);
    ask(bench, ip, 443);
    bench.wait(49.5);
    // A new peer, the same external port: were the binding dead, it could be another.
    let (web, client) = ((ip.web, 5000), (ip.client, 9999));
    let before = only_binding(bench);
    bench.goes_out(&WEB, &udp(web, client), (ip.host, 5000));
    assert_eq!(only_binding(bench), before, "the binding is another");
    answer(bench, ip, 443);
}

fn binding_lives_while_one_of_its_flows_does(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, 443);
    let binding = only_binding(bench);
    for _ in 0..3 {
        bench.wait(45.0);
        ask(bench, ip, 443);
    }
    let (web, host, client) = ((ip.web, 5000), (ip.host, 5000), (ip.client, 9999));
    bench.goes_out(&WEB, &udp(web, client), host);
    assert_eq!(only_binding(bench), binding, "the binding is another");
}

fn binding_in_use_keeps_its_port_for_new_peers(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 40_000), (ip.server, 443));
    let _ = bench.from_endpoint(&WEB, &udp(web, server));
    let external = bench.flow(UDP, web, server).external_port;
    for port in 1000..1010 {
        bench.wait(45.0);
        let client = (ip.client, port);
        let host = (ip.host, external);
        bench.goes_out(&WEB, &udp(web, client), host);
    }
}

fn binding_lives_as_long_as_its_longest_lived_flow(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, 53);
    let binding = only_binding(bench);
    ask(bench, ip, 443);
    ask(bench, ip, 53);
    bench.wait(45.0);
    answer(bench, ip, 443);
    ask(bench, ip, 53);
    assert_eq!(bench.counts(), (2, 1));
    assert_eq!(only_binding(bench), binding, "the binding is another");
}

fn dead_binding_is_made_anew(bench: &mut Bench<'_>, ip: &Family) {
    ask(bench, ip, 443);
    let binding = only_binding(bench);
    bench.wait(52.0);
    ask(bench, ip, 443);
    assert_eq!(bench.counts(), (1, 1));
    assert_ne!(only_binding(bench), binding, "the binding is the same");
    answer(bench, ip, 443);
}
