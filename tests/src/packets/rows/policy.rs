//! Egress rules.

use std::net::IpAddr;

use nucnet_common::abi::Reason;
use nucnet_ctl::model::policy::Action;

use super::{Family, Row, V6, each_family, row, talk::Connection};
use crate::packets::{
    bench::{Bench, Egress},
    packet::{echo_reply, echo_request, tcp, udp},
    site::{APP, BRIDGE, SLOT, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(default_deny_lets_nothing_out),
    each_family!(allowed_prefix_is_reached_and_no_other),
    each_family!(ports_and_protocols_of_a_rule_count),
    each_family!(deny_beats_allow_however_long_the_prefixes),
    each_family!(rules_of_all_covering_prefixes_count),
    each_family!(resolvers_are_allowed_on_their_port),
    each_family!(icmp_rules_cover_echo),
    each_family!(siblings_and_host_are_destinations_like_any_other),
    each_family!(microvm_has_a_policy_like_any_endpoint),
    each_family!(reply_passes_under_default_deny),
    each_family!(reply_to_the_host_passes_under_default_deny),
    each_family!(reply_to_a_sibling_passes_under_default_deny),
    each_family!(allow_is_judged_on_the_destination_that_was_asked_for),
    each_family!(deny_is_judged_on_where_the_packet_really_goes_too),
    each_family!(changed_policy_ends_a_live_flow_that_it_denies),
    each_family!(changed_policy_leaves_a_live_flow_that_it_allows),
    each_family!(changed_policy_ends_a_live_flow_to_a_published_sibling_that_it_denies),
    each_family!(changed_policy_leaves_flows_that_came_in_from_outside),
    each_family!(lifted_policy_lets_everything_out_again),
    row!(rules_for_all_of_ipv6_say_nothing_about_ipv4),
    each_family!(peer_of_a_flow_that_is_denied_now_reaches_nobody),
    each_family!(sibling_that_answers_a_flow_that_is_denied_now_reaches_nobody),
    each_family!(host_that_answers_a_flow_that_is_denied_now_finds_none),
    each_family!(late_answer_of_the_host_opens_nothing_that_is_denied_now),
    each_family!(flow_that_is_allowed_still_goes_on_in_both_directions),
    each_family!(flow_from_before_a_policy_for_new_flows_goes_on_in_both_directions),
    each_family!(connection_on_the_ports_of_a_kept_one_is_judged),
    each_family!(policy_after_one_that_kept_flows_judges_them),
    each_family!(rules_about_the_host_cover_each_of_its_addresses_and_no_other),
    each_family!(deny_of_the_host_beats_an_allow_of_its_prefix),
    each_family!(deny_of_the_host_covers_published_ports_of_its_addresses),
    row!(options_of_ipv4_are_dropped_under_a_policy),
    row!(metadata_services_are_denied_by_name),
    row!(private_and_internet_part_the_world),
    each_family!(deny_all_is_no_opinion_about_what_came_in_by_a_published_port),
];

fn default_deny_lets_nothing_out(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(
        &WEB,
        Egress {
            default: Some(Action::Deny),
            ..Egress::default()
        },
    );
    for packet in [
        tcp("S", (ip.web, 5000), (ip.server, 443)),
        udp((ip.web, 5000), (ip.server, 53)),
        echo_request(ip.web, ip.server, 5000),
        tcp("S", (ip.web, 5000), (ip.app, 80)),
        tcp("S", (ip.web, 5000), (ip.gateway, 22)),
    ] {
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::Policy);
    }
    assert_eq!(bench.counts(), (0, 0));
}

/// The /24 or /64 that server and client are in.
fn internet(ip: &Family) -> &'static str {
    if ip.web.is_ipv4() {
        "198.51.100.0/24"
    } else {
        "2001:db8:f::/64"
    }
}

/// A rule for one address and one port of it.
fn one(address: IpAddr, port: &str) -> String {
    if address.is_ipv4() {
        format!("{address}:{port}")
    } else {
        format!("[{address}]:{port}")
    }
}

#[track_caller]
fn is_allowed(bench: &mut Bench<'_>, ip: &Family, port: u16, to: (std::net::IpAddr, u16)) {
    let packet = tcp("S", (ip.web, port), to);
    bench.from_endpoint(&WEB, &packet).leaves(
        UPLINK,
        ip.router,
        &packet.clone().from((ip.host, port)).ttl(63),
    );
}

#[track_caller]
fn is_denied(bench: &mut Bench<'_>, ip: &Family, port: u16, to: (std::net::IpAddr, u16)) {
    bench
        .from_endpoint(&WEB, &tcp("S", (ip.web, port), to))
        .is_dropped(Reason::Policy);
}

fn allowed_prefix_is_reached_and_no_other(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(&WEB, Egress::allow(&[internet(ip)]));
    is_allowed(bench, ip, 5000, (ip.server, 443));
    is_allowed(bench, ip, 5000, (ip.client, 443));
    is_denied(bench, ip, 5000, (ip.router, 443));
    // Another endpoint has no policy.
    let packet = tcp("S", (ip.app, 5001), (ip.router, 443));
    bench.from_endpoint(&APP, &packet).leaves(
        UPLINK,
        ip.router,
        &packet.clone().from((ip.host, 5001)).ttl(63),
    );
}

fn ports_and_protocols_of_a_rule_count(bench: &mut Bench<'_>, ip: &Family) {
    let rule = one(ip.server, "80,440-450/tcp");
    bench.egress(&WEB, Egress::allow(&[&rule]));
    for port in [80, 440, 445, 450] {
        is_allowed(bench, ip, 5000, (ip.server, port));
    }
    for port in [79, 81, 439, 451] {
        is_denied(bench, ip, 5000, (ip.server, port));
    }
    bench
        .from_endpoint(&WEB, &udp((ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::Policy);
    bench
        .from_endpoint(&WEB, &echo_request(ip.web, ip.server, 5000))
        .is_dropped(Reason::Policy);
}

fn deny_beats_allow_however_long_the_prefixes(bench: &mut Bench<'_>, ip: &Family) {
    let server = one(ip.server, "443");
    bench.egress(
        &WEB,
        Egress {
            allow: &[&server],
            deny: &[internet(ip)],
            ..Egress::default()
        },
    );
    is_denied(bench, ip, 5000, (ip.server, 443));
    let client = one(ip.client, "443");
    bench.egress(
        &WEB,
        Egress {
            allow: &["any"],
            deny: &[&client],
            ..Egress::default()
        },
    );
    is_denied(bench, ip, 5000, (ip.client, 443));
    is_allowed(bench, ip, 5000, (ip.client, 444));
    is_allowed(bench, ip, 5000, (ip.server, 443));
}

fn rules_of_all_covering_prefixes_count(bench: &mut Bench<'_>, ip: &Family) {
    // The longest prefix alone would allow port 80 only.
    let server = one(ip.server, "80");
    let all = format!(
        "{}:443",
        if ip.web.is_ipv4() {
            "0.0.0.0/0"
        } else {
            "[::/0]"
        }
    );
    bench.egress(&WEB, Egress::allow(&[&server, &all]));
    is_allowed(bench, ip, 5000, (ip.server, 80));
    is_allowed(bench, ip, 5000, (ip.server, 443));
    is_allowed(bench, ip, 5000, (ip.client, 443));
    is_denied(bench, ip, 5000, (ip.client, 80));
    is_denied(bench, ip, 5000, (ip.server, 81));
}

fn resolvers_are_allowed_on_their_port(bench: &mut Bench<'_>, ip: &Family) {
    let (sibling, resolver) = (one(ip.app, "80"), ip.server.to_string());
    bench.egress(
        &WEB,
        Egress {
            allow: &[&sibling],
            dns: &[&resolver],
            ..Egress::default()
        },
    );
    is_allowed(bench, ip, 5000, (ip.server, 53));
    let question = udp((ip.web, 5000), (ip.server, 53));
    bench.from_endpoint(&WEB, &question).leaves(
        UPLINK,
        ip.router,
        &question.clone().from((ip.host, 5000)).ttl(63),
    );
    is_denied(bench, ip, 5000, (ip.server, 54));
    is_denied(bench, ip, 5000, (ip.client, 53));
}

fn icmp_rules_cover_echo(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(&WEB, Egress::allow(&["any/icmp"]));
    bench.goes_out(
        &WEB,
        &echo_request(ip.web, ip.server, 5000),
        (ip.host, 5000),
    );
    bench.comes_in(&echo_reply(ip.server, ip.host, 5000), &WEB, (ip.web, 5000));
    is_denied(bench, ip, 5000, (ip.server, 443));
}

fn siblings_and_host_are_destinations_like_any_other(bench: &mut Bench<'_>, ip: &Family) {
    let (sibling, gateway) = (one(ip.app, "80"), one(ip.gateway, "53"));
    bench.egress(&WEB, Egress::allow(&[&sibling, &gateway]));
    let to_app = tcp("S", (ip.web, 5000), (ip.app, 80));
    bench.from_endpoint(&WEB, &to_app).reaches(&APP, &to_app);
    let to_host = udp((ip.web, 5000), (ip.gateway, 53));
    bench
        .from_endpoint(&WEB, &to_host)
        .reaches_host(BRIDGE, &to_host);
    is_denied(bench, ip, 5000, (ip.app, 81));
    is_denied(bench, ip, 5000, (ip.gateway, 22));
}

fn microvm_has_a_policy_like_any_endpoint(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(&SLOT, Egress::allow(&[internet(ip)]));
    bench.publish(&SLOT, "8080:80");
    let slot = (ip.slot, 5000);
    bench.goes_out(&SLOT, &tcp("S", slot, (ip.server, 443)), (ip.host, 5000));
    for to in [ip.router, ip.app, ip.other, ip.gateway, ip.host] {
        bench
            .from_endpoint(&SLOT, &tcp("S", slot, (to, 443)))
            .is_dropped(Reason::Policy);
    }
    let (client, host, slot) = ((ip.client, 40_000), (ip.host, 8080), (ip.slot, 80));
    bench.egress(&SLOT, Egress::deny(&["any"]));
    bench.comes_in(&tcp("S", client, host), &SLOT, slot);
    bench.goes_out(&SLOT, &tcp("SA", slot, client), host);
}

fn deny_all(bench: &mut Bench<'_>) {
    bench.egress(&WEB, Egress::deny(&["any"]));
}

fn reply_passes_under_default_deny(bench: &mut Bench<'_>, ip: &Family) {
    deny_all(bench);
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("SA", web, client), host);
    // The way that the client opened is for its connection only.
    is_denied(bench, ip, 5000, client);
    is_denied(bench, ip, 80, (ip.client, 40_001));
}

fn reply_to_the_host_passes_under_default_deny(bench: &mut Bench<'_>, ip: &Family) {
    deny_all(bench);
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 80));
    bench
        .from_host(&WEB, &tcp("S", gateway, web))
        .is_put_through(&WEB, &tcp("S", gateway, web));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, gateway))
        .reaches_host(BRIDGE, &tcp("SA", web, gateway));
    is_denied(bench, ip, 5000, gateway);
}

fn reply_to_a_sibling_passes_under_default_deny(bench: &mut Bench<'_>, ip: &Family) {
    deny_all(bench);
    bench.publish(&WEB, "8080:80");
    let (app, host, web) = ((ip.app, 5000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_endpoint(&APP, &tcp("S", app, host))
        .reaches(&WEB, &tcp("S", app, web).ttl(63));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app))
        .reaches(&APP, &tcp("SA", host, app).ttl(63));
    is_denied(bench, ip, 81, app);
}

fn allow_is_judged_on_the_destination_that_was_asked_for(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&APP, "8080:80");
    let asked = one(ip.host, "8080");
    bench.egress(&WEB, Egress::allow(&[&asked]));
    let (web, host, app) = ((ip.web, 5000), (ip.host, 8080), (ip.app, 80));
    bench
        .from_endpoint(&WEB, &tcp("S", web, host))
        .reaches(&APP, &tcp("S", web, app).ttl(63));
    is_denied(bench, ip, 5001, app);
}

fn deny_is_judged_on_where_the_packet_really_goes_too(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&APP, "8080-8081:80-81");
    let real = one(ip.app, "80");
    bench.egress(&WEB, Egress::deny(&[&real]));
    is_denied(bench, ip, 5000, (ip.host, 8080));
    is_denied(bench, ip, 5000, (ip.app, 80));
    let (web, host, app) = ((ip.web, 5000), (ip.host, 8081), (ip.app, 81));
    bench
        .from_endpoint(&WEB, &tcp("S", web, host))
        .reaches(&APP, &tcp("S", web, app).ttl(63));
}

fn changed_policy_ends_a_live_flow_that_it_denies(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &udp(web, server))
        .is_dropped(Reason::Policy);
    assert_eq!(bench.counts(), (0, 1));
    // Nor does anything come in by that way any more.
    bench
        .from_uplink(UPLINK, &udp(server, host))
        .is_dropped_for(WEB.number, Reason::Filtered);
}

fn changed_policy_leaves_a_live_flow_that_it_allows(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    is_allowed(bench, ip, 5000, server);
    bench.egress(&WEB, Egress::allow(&[internet(ip)]));
    bench.goes_out(&WEB, &tcp("A", web, server), host);
    let (_, flow) = bench.only_flow();
    assert_eq!(flow.policy, 1);
}

fn changed_policy_ends_a_live_flow_to_a_published_sibling_that_it_denies(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&APP, "8080:80");
    let (web, host, app) = ((ip.web, 5000), (ip.host, 8080), (ip.app, 80));
    bench
        .from_endpoint(&WEB, &tcp("S", web, host))
        .reaches(&APP, &tcp("S", web, app).ttl(63));
    let real = one(ip.app, "80");
    bench.egress(&WEB, Egress::deny(&[&real]));
    bench
        .from_endpoint(&WEB, &tcp("A", web, host))
        .is_dropped(Reason::Policy);
    assert_eq!(bench.counts(), (0, 0));
}

fn changed_policy_leaves_flows_that_came_in_from_outside(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    deny_all(bench);
    bench.goes_out(&WEB, &tcp("SA", web, client), host);
}

fn lifted_policy_lets_everything_out_again(bench: &mut Bench<'_>, ip: &Family) {
    deny_all(bench);
    is_denied(bench, ip, 5000, (ip.server, 443));
    bench.set_endpoint(&WEB, |_| {});
    is_allowed(bench, ip, 5000, (ip.server, 443));
}

fn rules_for_all_of_ipv6_say_nothing_about_ipv4(bench: &mut Bench<'_>) {
    let ip = &super::V4;
    bench.egress(&WEB, Egress::allow(&["::/0"]));
    is_denied(bench, ip, 5000, (ip.server, 443));
    is_allowed(bench, &V6, 5000, (V6.server, 443));
    bench.egress(&WEB, Egress::deny(&["::/0"]));
    is_allowed(bench, ip, 5001, (ip.server, 443));
    is_denied(bench, &V6, 5001, (V6.server, 443));
}

fn peer_of_a_flow_that_is_denied_now_reaches_nobody(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    deny_all(bench);
    // The peer is the first to speak under the new policy.
    bench
        .from_uplink(UPLINK, &tcp("SA", server, host))
        .is_dropped_for(WEB.number, Reason::Policy);
    assert_eq!(bench.counts(), (0, 0));
    bench.from_uplink(UPLINK, &tcp("A", server, host)).passes();
    is_denied(bench, ip, 5000, server);
}

fn sibling_that_answers_a_flow_that_is_denied_now_reaches_nobody(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (web, app) = ((ip.web, 5000), (ip.app, 80));
    bench
        .from_endpoint(&WEB, &tcp("S", web, app))
        .reaches(&APP, &tcp("S", web, app));
    deny_all(bench);
    bench
        .from_endpoint(&APP, &tcp("SA", app, web))
        .is_dropped_for(APP.number, Reason::Policy);
    assert_eq!(bench.counts(), (0, 0));
    bench
        .from_endpoint(&APP, &tcp("A", app, web))
        .is_dropped(Reason::NoFlow);
}

/// WEB asks the host something, and is denied that while the host thinks.
#[track_caller]
fn is_denied_what_it_asked(bench: &mut Bench<'_>, web: (IpAddr, u16), host: (IpAddr, u16)) {
    bench
        .from_endpoint(&WEB, &udp(web, host))
        .reaches_host(BRIDGE, &udp(web, host));
    deny_all(bench);
}

fn host_that_answers_a_flow_that_is_denied_now_finds_none(bench: &mut Bench<'_>, ip: &Family) {
    let (web, gateway) = ((ip.web, 5000), (ip.gateway, 53));
    is_denied_what_it_asked(bench, web, gateway);
    bench
        .from_endpoint(&WEB, &udp(web, gateway))
        .is_dropped(Reason::Policy);
    assert_eq!(bench.counts(), (0, 0));
    // What the host sends by itself is its own business, and may be answered.
    bench
        .from_host(&WEB, &udp(gateway, web))
        .is_put_through(&WEB, &udp(gateway, web));
    bench
        .from_endpoint(&WEB, &udp(web, gateway))
        .reaches_host(BRIDGE, &udp(web, gateway));
}

fn late_answer_of_the_host_opens_nothing_that_is_denied_now(bench: &mut Bench<'_>, ip: &Family) {
    let (web, gateway) = ((ip.web, 5000), (ip.gateway, 53));
    is_denied_what_it_asked(bench, web, gateway);
    bench
        .from_host(&WEB, &udp(gateway, web))
        .is_dropped_for(WEB.number, Reason::Policy);
    assert_eq!(bench.counts(), (0, 0));
    bench
        .from_endpoint(&WEB, &udp(web, gateway))
        .is_dropped(Reason::Policy);
}

/// That the connection goes on, whoever speaks first.
#[track_caller]
fn goes_on(bench: &mut Bench<'_>, ip: &Family) {
    let connection = Connection { ip };
    connection.back(bench, "A");
    bench.wait(1.5);
    connection.out(bench, "A");
}

fn flow_that_is_allowed_still_goes_on_in_both_directions(bench: &mut Bench<'_>, ip: &Family) {
    Connection { ip }.establish(bench);
    bench.egress(&WEB, Egress::allow(&[internet(ip)]));
    goes_on(bench, ip);
    let (_, flow) = bench.only_flow();
    assert_eq!(flow.policy, 1, "judged by the peer's packet");
}

fn flow_from_before_a_policy_for_new_flows_goes_on_in_both_directions(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    Connection { ip }.establish(bench);
    bench.egress_for_new_flows(&WEB, Egress::deny(&["any"]));
    goes_on(bench, ip);
    is_denied(bench, ip, 5001, (ip.server, 443));
}

fn connection_on_the_ports_of_a_kept_one_is_judged(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    Connection { ip }.establish(bench);
    bench.egress_for_new_flows(&WEB, Egress::deny(&["any"]));
    bench.goes_out(&WEB, &tcp("FA", web, server), host);
    bench.comes_in(&tcp("FA", server, host), &WEB, web);
    // It would open the closed flow anew in place.
    is_denied(bench, ip, 5000, server);
    assert_eq!(bench.counts(), (0, 0));
}

fn policy_after_one_that_kept_flows_judges_them(bench: &mut Bench<'_>, ip: &Family) {
    let deny = Egress::deny(&["any"]);
    Connection { ip }.establish(bench);
    bench.egress_for_new_flows(&WEB, deny);
    goes_on(bench, ip);
    bench.egress(&WEB, deny);
    bench
        .from_endpoint(&WEB, &tcp("A", (ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::Policy);
}

fn rules_about_the_host_cover_each_of_its_addresses_and_no_other(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.egress(&WEB, Egress::allow(&["host:22/tcp"]));
    for address in [ip.host, ip.gateway] {
        let packet = tcp("S", (ip.web, 5000), (address, 22));
        bench
            .from_endpoint(&WEB, &packet)
            .reaches_host(BRIDGE, &packet);
        is_denied(bench, ip, 5000, (address, 23));
    }
    for address in [ip.router, ip.server, ip.app, ip.nowhere] {
        is_denied(bench, ip, 5000, (address, 22));
    }
}

fn deny_of_the_host_beats_an_allow_of_its_prefix(bench: &mut Bench<'_>, ip: &Family) {
    let host = one(ip.host, "22");
    bench.egress(
        &WEB,
        Egress {
            allow: &["any", &host],
            deny: &["host"],
            ..Egress::default()
        },
    );
    is_denied(bench, ip, 5000, (ip.host, 22));
    is_denied(bench, ip, 5000, (ip.gateway, 53));
    is_allowed(bench, ip, 5000, (ip.server, 22));
    let packet = tcp("S", (ip.web, 5000), (ip.app, 22));
    bench.from_endpoint(&WEB, &packet).reaches(&APP, &packet);
}

fn deny_of_the_host_covers_published_ports_of_its_addresses(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&APP, "8080:80");
    bench.egress(&WEB, Egress::deny(&["host"]));
    is_denied(bench, ip, 5000, (ip.host, 8080));
    let packet = tcp("S", (ip.web, 5000), (ip.app, 80));
    bench.from_endpoint(&WEB, &packet).reaches(&APP, &packet);
}

fn metadata_services_are_denied_by_name(bench: &mut Bench<'_>) {
    bench.egress(&WEB, Egress::deny(&["metadata"]));
    let address = |text: &str| -> std::net::IpAddr { text.parse().expect(text) };
    for text in ["169.254.169.254", "169.254.170.2"] {
        is_denied(bench, &super::V4, 5000, (address(text), 80));
    }
    is_denied(bench, &V6, 5000, (address("fd00:ec2::254"), 80));
    is_allowed(bench, &super::V4, 5000, (address("169.254.169.253"), 53));
    is_allowed(bench, &V6, 5000, (address("fd00:ec2::253"), 53));
}

fn private_and_internet_part_the_world(bench: &mut Bench<'_>) {
    let address = |text: &str| -> std::net::IpAddr { text.parse().expect(text) };
    bench.egress(&WEB, Egress::allow(&["internet"]));
    is_allowed(bench, &super::V4, 5000, (address("1.1.1.1"), 443));
    is_allowed(bench, &V6, 5000, (address("2606:4700::1111"), 443));
    for ip in [&super::V4, &V6] {
        is_denied(bench, ip, 5000, (ip.app, 80));
        is_denied(bench, ip, 5000, (ip.gateway, 80));
    }
    for text in [
        "192.168.1.1",
        "100.64.0.1",
        "169.254.169.254",
        "203.0.113.7",
    ] {
        is_denied(bench, &super::V4, 5000, (address(text), 80));
    }
    for text in ["fc00::1", "64:ff9b::a00:1", "2002:a00:1::1", "2001:db8::1"] {
        is_denied(bench, &V6, 5000, (address(text), 80));
    }
    bench.egress(&WEB, Egress::deny(&["private"]));
    is_allowed(bench, &super::V4, 5001, (address("1.1.1.1"), 443));
    for text in ["192.168.1.1", "100.64.0.1", "10.9.9.9"] {
        is_denied(bench, &super::V4, 5001, (address(text), 80));
    }
}

fn deny_all_is_no_opinion_about_what_came_in_by_a_published_port(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    deny_all(bench);
    bench.publish(&WEB, "5353:53/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 5353), (ip.web, 53));
    // From the published port to somebody who never asked.
    bench
        .from_endpoint(&WEB, &udp(web, client))
        .is_dropped(Reason::Policy);
    bench.comes_in(&udp(client, host), &WEB, web);
    bench.goes_out(&WEB, &udp(web, client), host);
    for other in [(ip.client, 40_001), (ip.server, 40_000)] {
        bench
            .from_endpoint(&WEB, &udp(web, other))
            .is_dropped(Reason::Policy);
    }
}

/// What they are without a policy: `ipv4_options_are_carried_along`.
fn options_of_ipv4_are_dropped_under_a_policy(bench: &mut Bench<'_>) {
    let ip = &super::V4;
    bench.publish(&WEB, "8080:80");
    bench.egress(
        &WEB,
        Egress {
            allow: &["any"],
            deny: &["private"],
            ..Egress::default()
        },
    );
    // A loose source route by way of the server to a private address, and options that do nothing.
    let route = [131, 7, 4, 10, 9, 9, 9, 0];
    for options in [&route[..], &[1; 4], &[1; 40]] {
        let packet = tcp("S", (ip.web, 5000), (ip.server, 443)).options(options);
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::IpOptions);
    }
    // Replies are no exception.
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench
        .from_endpoint(&WEB, &tcp("SA", web, client).options(&route))
        .is_dropped(Reason::IpOptions);
}
