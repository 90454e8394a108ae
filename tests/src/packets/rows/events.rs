//! What monitors are told.

use nucnet_common::{
    abi::{Event, EventKind, Reason},
    event::{FLOWS, REFUSALS},
    packet::{TCP, UDP},
};
use nucnet_ctl::model::{
    policy::{Action, Policy},
    to_abi,
};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::{Bench, Egress},
    packet::{echo_request, icmp, tcp, udp},
    site::{UPLINK, WEB, address},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(denied_packet_is_told_with_its_rule),
    each_family!(denial_by_default_names_no_rule),
    each_family!(denial_of_where_a_packet_really_goes_names_that_rule),
    each_family!(denied_flow_names_the_rule_of_the_new_policy),
    each_family!(retransmission_is_no_news),
    each_family!(dropped_packet_is_told_with_its_reason),
    row!(discovery_is_counted_and_not_told),
    each_family!(denial_by_a_policy_that_logs_none_is_counted_and_not_told),
    each_family!(masqueraded_flow_is_told_when_it_is_opened_and_closed),
    each_family!(published_flow_is_told_as_the_client_sees_it),
    each_family!(flow_of_the_hosts_own_is_told_as_its_socket_sees_it),
    each_family!(idle_flow_is_told_when_its_entry_goes),
    each_family!(connection_that_is_opened_anew_in_place_is_told),
    each_family!(
        too_many_refusals_are_counted,
        logic_only: "the kernel's clock runs on meanwhile"
    ),
    each_family!(
        flows_and_refusals_have_limits_of_their_own,
        logic_only: "the kernel's clock runs on meanwhile"
    ),
    each_family!(nothing_is_told_while_nobody_monitors),
];

fn deny<'a>(rules: &'a [&'a str]) -> Egress<'a> {
    Egress {
        deny: rules,
        ..Egress::default()
    }
}

/// A rule for one address.
fn only(address: std::net::IpAddr) -> String {
    match address {
        std::net::IpAddr::V4(v4) => format!("{v4}/32"),
        std::net::IpAddr::V6(v6) => format!("[{v6}/128]"),
    }
}

fn denied_packet_is_told_with_its_rule(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    let rule = only(ip.server);
    bench.egress(&WEB, deny(&["any:25/tcp", &rule]));
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::Policy);
    let event = bench.only_event();
    assert_eq!(
        event,
        Event {
            time: event.time,
            source: to_abi(ip.web),
            destination: to_abi(ip.server),
            nat_source: to_abi(ip.web),
            nat_destination: to_abi(ip.server),
            source_port: 5000,
            destination_port: 443,
            nat_source_port: 5000,
            nat_destination_port: 443,
            kind: EventKind::Denied as u32,
            endpoint: WEB.number,
            reason: Reason::Policy as u32,
            protocol: TCP.into(),
            policy: 1,
            rule: 2,
            ..Event::default()
        }
    );
}

fn denial_by_default_names_no_rule(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    let egress = Egress {
        default: Some(Action::Deny),
        ..Egress::default()
    };
    bench.egress(&WEB, egress);
    bench
        .from_endpoint(&WEB, &echo_request(ip.web, ip.server, 77))
        .is_dropped(Reason::Policy);
    let event = bench.only_event();
    assert_eq!((event.policy, event.rule), (1, 0));
    assert_eq!((event.source_port, event.destination_port), (77, 0));
}

fn denial_of_where_a_packet_really_goes_names_that_rule(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    let rule = only(ip.app);
    bench.egress(&WEB, deny(&[&rule]));
    bench.publish(&crate::packets::site::APP, "8080:80");
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.host, 8080)))
        .is_dropped(Reason::Policy);
    let event = bench.only_event();
    assert_eq!((event.policy, event.rule), (1, 1));
    assert_eq!(
        (event.destination, event.destination_port),
        (to_abi(ip.host), 8080)
    );
}

fn denied_flow_names_the_rule_of_the_new_policy(bench: &mut Bench<'_>, ip: &Family) {
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443));
    bench.from_endpoint(&WEB, &packet).leaves(
        UPLINK,
        ip.router,
        &packet.clone().from((ip.host, 5000)).ttl(63),
    );
    bench.watch();
    bench.egress(&WEB, deny(&["any:443/tcp"]));
    bench
        .from_endpoint(&WEB, &tcp("A", (ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::Policy);
    let events = bench.events();
    let told: Vec<_> = events
        .iter()
        .map(|event| (event.kind, event.rule))
        .collect();
    let (closed, denied) = (EventKind::FlowClosed as u32, EventKind::Denied as u32);
    assert_eq!(told, [(closed, 0), (denied, 1)]);
}

fn retransmission_is_no_news(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    bench.egress(&WEB, deny(&["any"]));
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443));
    for wait in [0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0] {
        bench.wait(wait);
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::Policy);
    }
    bench.only_event();
    bench.wait(71.0);
    bench
        .from_endpoint(&WEB, &packet)
        .is_dropped(Reason::Policy);
    bench.only_event();
    // Another source port is another flow.
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5001), (ip.server, 443)))
        .is_dropped(Reason::Policy);
    bench.only_event();
}

fn dropped_packet_is_told_with_its_reason(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    bench
        .from_endpoint(&WEB, &udp((ip.app, 5000), (ip.server, 53)))
        .is_dropped(Reason::SpoofedAddress);
    let event = bench.only_event();
    assert_eq!(event.kind, EventKind::Dropped as u32);
    assert_eq!(event.reason, Reason::SpoofedAddress as u32);
    assert_eq!((event.source, event.protocol), (to_abi(ip.app), UDP.into()));
    assert_eq!((event.policy, event.rule), (0, 0));
}

fn discovery_is_counted_and_not_told(bench: &mut Bench<'_>) {
    bench.watch();
    // Router solicitation, listener report.
    for (source, group, kind) in [("fe80::2", "ff02::2", 133), ("::", "ff02::16", 143)] {
        let packet = icmp(address(source), address(group), [kind, 0, 0, 0, 0, 0, 0, 0]);
        bench
            .from_endpoint(&WEB, &packet.ttl(255))
            .is_dropped(Reason::Discovery);
    }
    assert_eq!(bench.events(), []);
}

/// `log_denied` of a container runtime's policies (N-57).
fn denial_by_a_policy_that_logs_none_is_counted_and_not_told(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    let policy = Policy::new(Some(Action::Deny), Vec::new(), Vec::new(), Vec::new());
    bench.policy(&WEB, &policy.with_denied_logged(false));
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::Policy);
    assert_eq!(bench.events(), []);
    // What no policy has to do with is told.
    bench
        .from_endpoint(&WEB, &udp((ip.app, 5000), (ip.server, 53)))
        .is_dropped(Reason::SpoofedAddress);
    bench.only_event();
}

fn masqueraded_flow_is_told_when_it_is_opened_and_closed(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443));
    let _ = bench.from_endpoint(&WEB, &packet);
    let event = bench.only_event();
    assert_eq!(event.kind, EventKind::FlowNew as u32);
    assert_eq!((event.source, event.source_port), (to_abi(ip.web), 5000));
    assert_eq!(
        (event.destination, event.destination_port),
        (to_abi(ip.server), 443)
    );
    assert_eq!(
        (event.nat_source, event.nat_source_port),
        (to_abi(ip.host), 5000)
    );
    assert_eq!(
        (event.nat_destination, event.reason),
        (event.destination, 0)
    );
    let _ = bench.from_uplink(UPLINK, &tcp("SA", (ip.server, 443), (ip.host, 5000)));
    assert_eq!(bench.events(), [], "an answer is no event");
    let _ = bench.from_uplink(UPLINK, &tcp("R", (ip.server, 443), (ip.host, 5000)));
    let event = bench.only_event();
    assert_eq!(
        (event.kind, event.packets),
        (EventKind::FlowClosed as u32, 3)
    );
}

fn published_flow_is_told_as_the_client_sees_it(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    bench.publish(&WEB, "8080:80");
    let _ = bench.from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)));
    let event = bench.only_event();
    assert_eq!(
        (event.kind, event.endpoint),
        (EventKind::FlowNew as u32, WEB.number)
    );
    assert_eq!(
        (event.source, event.source_port),
        (to_abi(ip.client), 40_000)
    );
    assert_eq!(
        (event.destination, event.destination_port),
        (to_abi(ip.host), 8080)
    );
    assert_eq!(
        (event.nat_source, event.nat_source_port),
        (event.source, 40_000)
    );
    assert_eq!(
        (event.nat_destination, event.nat_destination_port),
        (to_abi(ip.web), 80)
    );
}

fn flow_of_the_hosts_own_is_told_as_its_socket_sees_it(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    bench.publish(&WEB, "8080:80");
    let packet = tcp("S", (ip.host, 40_000), (ip.host, 8080));
    let _ = bench.to_itself(&packet);
    let event = bench.only_event();
    assert_eq!(
        (event.kind, event.endpoint),
        (EventKind::FlowNew as u32, WEB.number)
    );
    let (source, destination) = (event.source, event.destination);
    assert_eq!((source, event.source_port), (to_abi(ip.host), 40_000));
    assert_eq!((destination, event.destination_port), (source, 8080));
    assert_eq!(event.nat_destination, to_abi(ip.web));
    let _ = bench.to_itself(&packet);
    assert_eq!(bench.events(), []);
}

fn idle_flow_is_told_when_its_entry_goes(bench: &mut Bench<'_>, ip: &Family) {
    let packet = udp((ip.web, 5000), (ip.server, 443));
    let _ = bench.from_endpoint(&WEB, &packet);
    bench.watch();
    bench.wait(301.0);
    let _ = bench.from_endpoint(&WEB, &packet);
    let kinds: Vec<_> = bench.events().iter().map(|event| event.kind).collect();
    let (new, closed) = (EventKind::FlowNew as u32, EventKind::FlowClosed as u32);
    assert_eq!(kinds, [closed, new]);
}

fn connection_that_is_opened_anew_in_place_is_told(bench: &mut Bench<'_>, ip: &Family) {
    let syn = tcp("S", (ip.web, 5000), (ip.server, 443));
    let _ = bench.from_endpoint(&WEB, &syn);
    bench.watch();
    let _ = bench.from_uplink(UPLINK, &tcp("R", (ip.server, 443), (ip.host, 5000)));
    let _ = bench.from_endpoint(&WEB, &syn);
    let kinds: Vec<_> = bench.events().iter().map(|event| event.kind).collect();
    let (new, closed) = (EventKind::FlowNew as u32, EventKind::FlowClosed as u32);
    assert_eq!(kinds, [closed, new]);
}

fn too_many_refusals_are_counted(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    bench.egress(&WEB, deny(&["any"]));
    let mut port = 5000;
    let mut send = |bench: &mut Bench<'_>| {
        port += 1;
        bench
            .from_endpoint(&WEB, &tcp("S", (ip.web, port), (ip.server, 443)))
            .is_dropped(Reason::Policy);
    };
    for _ in 0..REFUSALS + 7 {
        send(bench);
    }
    let told = bench.events();
    assert_eq!(told.len() as u64, REFUSALS);
    assert!(told.iter().all(|event| event.suppressed == 0));
    bench.wait(1.0);
    send(bench);
    assert_eq!(bench.only_event().suppressed, 7);
    send(bench);
    assert_eq!(bench.only_event().suppressed, 0);
}

fn flows_and_refusals_have_limits_of_their_own(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    bench.egress(&WEB, deny(&["any:25"]));
    for port in 0..FLOWS as u16 + 1 {
        let _ = bench.from_endpoint(&WEB, &tcp("S", (ip.web, 5000 + port), (ip.server, 443)));
    }
    assert_eq!(bench.events().len() as u64, FLOWS);
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 25)))
        .is_dropped(Reason::Policy);
    assert_eq!(bench.only_event().suppressed, 0);
}

fn nothing_is_told_while_nobody_monitors(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(&WEB, deny(&["any:25"]));
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 25)))
        .is_dropped(Reason::Policy);
    let _ = bench.from_endpoint(&WEB, &tcp("S", (ip.web, 5000), (ip.server, 443)));
    assert_eq!(bench.events(), []);
}
