//! Who gets a place for a flow or a port when they are scarce: quotas, full tables, used up ports.

use nucnet_common::{
    abi::{FlowState, Mapping, Reason},
    packet::TCP,
};

use super::{
    DRAWS, Family, Row, each_family,
    talk::{Connection, answer, ask},
};
use crate::packets::{
    bench::Bench,
    packet::{tcp, udp},
    site::{APP, DYNAMIC_FIRST, SETTINGS, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(endpoint_at_its_quota_opens_no_more_and_keeps_what_it_has),
    each_family!(bindings_count_towards_the_quota),
    each_family!(endpoint_without_usage_opens_nothing),
    each_family!(full_table_refuses_the_newcomer_and_evicts_nobody_alive, logic_only: DRAWS),
    each_family!(dead_flow_makes_room_for_a_newcomer, logic_only: DRAWS),
    each_family!(closed_flow_makes_room_under_pressure, logic_only: DRAWS),
    each_family!(answered_question_makes_room_under_pressure, logic_only: DRAWS),
    each_family!(unanswered_question_makes_room_after_a_second, logic_only: DRAWS),
    each_family!(unanswered_datagram_to_another_port_makes_no_room, logic_only: DRAWS),
    each_family!(half_open_connection_from_outside_makes_room_after_a_second, logic_only: DRAWS),
    each_family!(port_of_a_spent_question_is_taken_when_no_other_is_free),
    each_family!(port_of_a_binding_that_serves_others_too_is_not_taken),
    each_family!(port_of_a_closed_connection_is_taken_when_no_other_is_free),
    each_family!(dead_binding_makes_room_for_a_newcomer, logic_only: DRAWS),
    each_family!(endpoint_at_its_quota_leaves_the_dead_of_others_alone, logic_only: DRAWS),
    each_family!(endpoint_at_its_quota_takes_the_places_of_its_own_dead_only, logic_only: DRAWS),
];

fn endpoint_at_its_quota_opens_no_more_and_keeps_what_it_has(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.flows_per_endpoint = 2);
    let server = (ip.server, 443);
    for port in [5000, 5001] {
        let (web, host) = ((ip.web, port), (ip.host, port));
        bench.goes_out(&WEB, &tcp("S", web, server), host);
    }
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5002), server))
        .is_refused(Reason::FlowQuota);
    // Its own flood is nobody else's trouble, and does not touch what it has.
    let (app, host) = ((ip.app, 5002), (ip.host, 5002));
    bench.goes_out(&APP, &tcp("S", app, server), host);
    for port in [5000, 5001] {
        let (web, host) = ((ip.web, port), (ip.host, port));
        bench.comes_in(&tcp("SA", server, host), &WEB, web);
    }
    // From outside, too.
    bench.publish(&WEB, "8080:80");
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .is_dropped_for(WEB.number, Reason::FlowQuota);
}

fn bindings_count_towards_the_quota(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.flows_per_endpoint = 3);
    ask(bench, ip, 443);
    ask(bench, ip, 444);
    assert_eq!(bench.counts(), (2, 1));
    bench
        .from_endpoint(&WEB, &udp((ip.web, 5000), (ip.server, 445)))
        .is_refused(Reason::FlowQuota);
    assert_eq!(bench.counts(), (2, 1));
}

fn endpoint_without_usage_opens_nothing(bench: &mut Bench<'_>, ip: &Family) {
    // What nobody counts would be left over: an endpoint that is on its way out.
    bench.set_endpoint(&WEB, |endpoint| endpoint.number += 1_000);
    let number = WEB.number + 1_000;
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 443)))
        .is_dropped_for(number, Reason::NoEndpoint);
}

fn full_table_refuses_the_newcomer_and_evicts_nobody_alive(bench: &mut Bench<'_>, ip: &Family) {
    bench.draw(7);
    let server = (ip.server, 443);
    Connection { ip }.establish(bench);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), server))
        .is_refused(Reason::FlowTableFull);
    bench
        .from_endpoint(&WEB, &udp((ip.web, 5001), server))
        .is_refused(Reason::FlowTableFull);
    Connection { ip }.back(bench, "A");
    assert_eq!(bench.counts(), (1, 0));
}

fn dead_flow_makes_room_for_a_newcomer(bench: &mut Bench<'_>, ip: &Family) {
    bench.draw(7);
    let server = (ip.server, 443);
    Connection { ip }.establish(bench);
    bench.wait(61.0);
    let (web, host) = ((ip.web, 5001), (ip.host, 5001));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    assert_eq!(bench.counts(), (1, 0));
    bench
        .from_endpoint(&WEB, &tcp("A", (ip.web, 5000), server))
        .is_dropped(Reason::NoFlow);
}

fn closed_flow_makes_room_under_pressure(bench: &mut Bench<'_>, ip: &Family) {
    bench.draw(7);
    let server = (ip.server, 443);
    let connection = Connection { ip };
    connection.establish(bench);
    connection.back(bench, "FA");
    // Closing is alive.
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), server))
        .is_refused(Reason::FlowTableFull);
    connection.out(bench, "FA");
    let (web, host) = ((ip.web, 5001), (ip.host, 5001));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    assert_eq!(bench.counts(), (1, 0));
}

fn answered_question_makes_room_under_pressure(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_network(|network| network.udp_mapping = Mapping::PerFlow as u32);
    bench.draw(7);
    let server = (ip.server, 443);
    ask(bench, ip, 53);
    ask(bench, ip, 53);
    answer(bench, ip, 53);
    // Two were asked, one is answered: glibc asks for A and AAAA at once.
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), server))
        .is_refused(Reason::FlowTableFull);
    answer(bench, ip, 53);
    let (web, host) = ((ip.web, 5001), (ip.host, 5001));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    assert_eq!(bench.counts(), (1, 0));
}

fn unanswered_question_makes_room_after_a_second(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_network(|network| network.udp_mapping = Mapping::PerFlow as u32);
    bench.draw(7);
    let (web, host, server) = ((ip.web, 5001), (ip.host, 5001), (ip.server, 443));
    ask(bench, ip, 53);
    bench.wait(0.9);
    bench
        .from_endpoint(&WEB, &tcp("S", web, server))
        .is_refused(Reason::FlowTableFull);
    bench.wait(0.1);
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    assert_eq!(bench.counts(), (1, 0));
}

fn unanswered_datagram_to_another_port_makes_no_room(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_network(|network| network.udp_mapping = Mapping::PerFlow as u32);
    bench.draw(7);
    ask(bench, ip, 443);
    bench.wait(45.0);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), (ip.server, 443)))
        .is_refused(Reason::FlowTableFull);
    answer(bench, ip, 443);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), (ip.server, 443)))
        .is_refused(Reason::FlowTableFull);
}

fn half_open_connection_from_outside_makes_room_after_a_second(bench: &mut Bench<'_>, ip: &Family) {
    // A flood of SYN of no return address.
    bench.publish(&WEB, "8080:80");
    bench.draw(7);
    let (host, web) = ((ip.host, 8080), (ip.web, 80));
    let syn = |bench: &mut Bench<'_>, port: u16| {
        bench.from_uplink(UPLINK, &tcp("S", (ip.client, port), host))
    };
    let _ = syn(bench, 40_000);
    syn(bench, 40_001).is_dropped_for(WEB.number, Reason::FlowTableFull);
    bench.wait(1.0);
    syn(bench, 40_002).reaches(&WEB, &tcp("S", (ip.client, 40_002), web).ttl(63));
    // One that was answered and taken up stays.
    let client = (ip.client, 40_002);
    let _ = bench.from_endpoint(&WEB, &tcp("SA", web, client));
    let _ = bench.from_uplink(UPLINK, &tcp("A", client, host));
    bench.wait(30.0);
    syn(bench, 40_003).is_dropped_for(WEB.number, Reason::FlowTableFull);
    assert_eq!(bench.only_state(), FlowState::Established);
}

fn port_of_a_spent_question_is_taken_when_no_other_is_free(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.dynamic_port_mask = 0);
    let server = (ip.server, 53);
    let (web, app) = ((ip.web, 40_000), (ip.app, 40_000));
    let host = (ip.host, DYNAMIC_FIRST);
    let ask = |bench: &mut Bench<'_>, party, from| bench.from_endpoint(party, &udp(from, server));
    let asked = udp(host, server).ttl(63);
    ask(bench, &WEB, web).leaves(UPLINK, ip.router, &asked);
    ask(bench, &APP, app).is_refused(Reason::PortsExhausted);
    bench.wait(1.0);
    ask(bench, &APP, app).leaves(UPLINK, ip.router, &asked);
    // The late answer is whose the port is now, and so is the permission.
    bench.comes_in(&udp(server, host), &APP, app);
    let other = (ip.server, 5353);
    bench.comes_in(&udp(other, host), &APP, app);
    // Who lost its port asks again by another.
    bench.set(|settings| settings.dynamic_port_mask = SETTINGS.dynamic_port_mask);
    bench.wait(1.0);
    let _ = ask(bench, &WEB, web);
    assert_eq!(bench.counts().1, 2);
}

fn port_of_a_binding_that_serves_others_too_is_not_taken(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.dynamic_port_mask = 0);
    let web = (ip.web, 40_000);
    for port in [53, 443, 53] {
        let _ = bench.from_endpoint(&WEB, &udp(web, (ip.server, port)));
    }
    bench.wait(30.0);
    bench
        .from_endpoint(&APP, &udp((ip.app, 40_000), (ip.server, 53)))
        .is_refused(Reason::PortsExhausted);
}

fn port_of_a_closed_connection_is_taken_when_no_other_is_free(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.dynamic_port_mask = 0);
    let server = (ip.server, 443);
    let (web, app) = ((ip.web, 40_000), (ip.app, 40_000));
    let host = (ip.host, DYNAMIC_FIRST);
    let _ = bench.from_endpoint(&WEB, &tcp("S", web, server));
    bench
        .from_endpoint(&APP, &tcp("S", app, server))
        .is_refused(Reason::PortsExhausted);
    let _ = bench.from_uplink(UPLINK, &tcp("RA", server, host));
    bench.goes_out(&APP, &tcp("S", app, server), host);
    assert_eq!(bench.counts(), (1, 0));
}

fn dead_binding_makes_room_for_a_newcomer(bench: &mut Bench<'_>, ip: &Family) {
    bench.draw(7);
    // The binding takes the only place that is ever drawn; its flow gets none.
    bench
        .from_endpoint(&WEB, &udp((ip.web, 5000), (ip.server, 443)))
        .is_refused(Reason::FlowTableFull);
    assert_eq!(bench.counts(), (0, 1));
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 443)))
        .is_refused(Reason::FlowTableFull);
    bench.wait(52.0);
    Connection { ip }.establish(bench);
    assert_eq!(bench.counts(), (1, 0));
}

fn endpoint_at_its_quota_takes_the_places_of_its_own_dead_only(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.flows_per_endpoint = 1);
    bench.draw(7);
    let server = (ip.server, 443);
    Connection { ip }.establish(bench);
    // A free place is none for it.
    bench.draw(8);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), server))
        .is_refused(Reason::FlowQuota);
    bench.wait(61.0);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), server))
        .is_refused(Reason::FlowQuota);
    bench.draw(7);
    let (web, host) = ((ip.web, 5001), (ip.host, 5001));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    assert_eq!(bench.counts(), (1, 0));
}

fn endpoint_at_its_quota_leaves_the_dead_of_others_alone(bench: &mut Bench<'_>, ip: &Family) {
    // Endpoint 14's window begins 239 places after endpoint 1001's, so they share places.
    let number = 14;
    bench.renumber(&APP, number);
    bench.draw(7);
    let server = (ip.server, 443);
    let (app, host) = ((ip.app, 5001), (ip.host, 5001));
    bench.goes_out(&APP, &tcp("S", app, server), host);
    let slot_of_app = bench.flow(TCP, app, server).slot;
    let (web, host) = ((ip.web, 5000), (ip.host, 5000));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    let slot_of_web = bench.flow(TCP, web, server).slot;
    bench.wait(41.0);
    bench.set(|settings| settings.flows_per_endpoint = 1);
    let offset = slot_of_app.wrapping_sub(slot_of_web);
    assert!(offset < 1_000, "the endpoints share no places: {offset}");
    bench.draw(7 + offset);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5002), server))
        .is_refused(Reason::FlowQuota);
    bench.set(|settings| settings.flows_per_endpoint = 10);
    let (web, host) = ((ip.web, 5002), (ip.host, 5002));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    assert_eq!(bench.flow(TCP, web, server).slot, slot_of_app);
}
