//! The egress policies of a container runtime whose hosts move to nucnet, given in its own words.
//! Each row says what its iptables rules did and must stay so, or what they missed. `N-..` are the
//! lines of the list of what it does; those that are not packets alone are held elsewhere:
//!
//! | line | where |
//! |---|---|
//! | N-46 out of the container's reach | scenario `root_in_the_container_cannot_lift_its_policy` |
//! | N-48, N-65 no window, all or nothing | `verbs::egress`: failures and deaths at every step; scenario `policy_swap_under_load_...` |
//! | N-55 tightening | `policy`: `peer_of_a_flow_that_is_denied_now_...`, `flow_from_before_a_policy_for_new_flows_...` |
//! | N-56 loopback | never reaches the host side |
//! | N-57 logging | `events` |
//! | N-62, N-63 odd and forged frames | `headers`, `guard`, `neighbours`; scenarios `odd_frames_never_leave_...` |
//! | N-64 a bad prefix changes nothing | `verbs::egress`: `bad_policies_are_refused_and_the_old_one_stays` |
//! | N-66 again replaces | `verbs::egress`: `a_policy_is_replaced_shown_and_removed` |

use std::net::IpAddr;

use nucnet_common::abi::Reason;
use nucnet_ctl::model::{policy::Policy, policy_file::Format};

use super::{Family, Row, V4, V6, each_family, row};
use crate::packets::{
    bench::Bench,
    packet::{Packet, echo_reply, echo_request, ip as other, solicitation, tcp, udp},
    site::{APP, BRIDGE, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(runtime_policy_allows_the_resolvers_by_default_and_nothing_else),
    each_family!(runtime_rules_are_resolvers_then_prefixes_then_drop),
    each_family!(runtime_prefix_without_ports_is_open_for_every_protocol),
    each_family!(runtime_ports_of_one_protocol_close_the_other_and_icmp),
    each_family!(runtime_ports_are_open_to_every_prefix),
    each_family!(runtime_ports_without_a_prefix_open_nothing),
    each_family!(runtime_prefixes_that_overlap_are_a_union),
    row!(runtime_prefix_of_everything_is_everything_to_the_last_address),
    each_family!(runtime_resolvers_are_open_on_port_53_whatever_the_lists_say),
    each_family!(runtime_policy_without_resolvers_denies_dns),
    each_family!(runtime_deny_all_denies_dns),
    each_family!(runtime_allow_list_implies_dns),
    each_family!(runtime_deny_all_lets_published_services_answer),
    each_family!(runtime_denial_is_silent),
    each_family!(runtime_policy_says_nothing_about_what_comes_in),
    each_family!(runtime_policy_covers_host_and_siblings),
    each_family!(container_without_a_policy_reaches_the_host),
    row!(runtime_policy_for_ipv4_closes_ipv6_but_for_neighbour_discovery),
];

/// Puts a policy in the runtime's words in force for WEB.
fn policy(bench: &mut Bench<'_>, ip: &Family, text: &str) {
    let everything = if is_v4(ip) { "0.0.0.0/0" } else { "::/0" };
    let text = text
        .replace("SERVERS", servers(ip))
        .replace("EVERYTHING", everything)
        .replace("SERVER", &ip.server.to_string());
    let policy = Policy::from_text(&text, Format::Json).expect(&text);
    let resolver = ip.client.to_string().parse().expect("resolver");
    bench.policy(&WEB, &policy.with_resolvers(vec![resolver]));
}

fn is_v4(ip: &Family) -> bool {
    ip.web.is_ipv4()
}

/// The prefix that the server is in, and the resolver, which is the client.
fn servers(ip: &Family) -> &'static str {
    if is_v4(ip) {
        "198.51.100.0/24"
    } else {
        "2001:db8:f::/64"
    }
}

#[track_caller]
fn passes(bench: &mut Bench<'_>, ip: &Family, packet: Packet, port: u16) {
    bench.from_endpoint(&WEB, &packet).leaves(
        UPLINK,
        ip.router,
        &packet.clone().from((ip.host, port)).ttl(63),
    );
}

#[track_caller]
fn tcp_passes(bench: &mut Bench<'_>, ip: &Family, to: (IpAddr, u16)) {
    let port = to.1.wrapping_add(10_000);
    passes(bench, ip, tcp("S", (ip.web, port), to), port);
}

#[track_caller]
fn udp_passes(bench: &mut Bench<'_>, ip: &Family, to: (IpAddr, u16)) {
    passes(bench, ip, udp((ip.web, 6000), to), 6000);
}

#[track_caller]
fn ping_passes(bench: &mut Bench<'_>, ip: &Family, to: IpAddr) {
    passes(bench, ip, echo_request(ip.web, to, 7000), 7000);
}

#[track_caller]
fn is_denied(bench: &mut Bench<'_>, packet: &Packet) {
    bench.from_endpoint(&WEB, packet).is_dropped(Reason::Policy);
}

#[track_caller]
fn tcp_is_denied(bench: &mut Bench<'_>, ip: &Family, to: (IpAddr, u16)) {
    is_denied(bench, &tcp("S", (ip.web, 5000), to));
}

#[track_caller]
fn udp_is_denied(bench: &mut Bench<'_>, ip: &Family, to: (IpAddr, u16)) {
    is_denied(bench, &udp((ip.web, 5000), to));
}

#[track_caller]
fn ping_is_denied(bench: &mut Bench<'_>, ip: &Family, to: IpAddr) {
    is_denied(bench, &echo_request(ip.web, to, 5000));
}

/// N-45.
fn runtime_policy_allows_the_resolvers_by_default_and_nothing_else(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    policy(bench, ip, r#"{"log_denied": true}"#);
    udp_passes(bench, ip, (ip.client, 53));
    tcp_passes(bench, ip, (ip.client, 53));
    tcp_is_denied(bench, ip, (ip.client, 443));
    tcp_is_denied(bench, ip, (ip.server, 443));
    ping_is_denied(bench, ip, ip.client);
}

/// N-47.
fn runtime_rules_are_resolvers_then_prefixes_then_drop(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let text = r#"{"allowed_cidrs": ["SERVER"], "allowed_tcp_ports": [443]}"#;
    policy(bench, ip, text);
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    passes_as(bench, ip, tcp("SA", web, client), host);
    udp_passes(bench, ip, (ip.client, 53));
    tcp_passes(bench, ip, (ip.client, 53));
    tcp_passes(bench, ip, (ip.server, 443));
    tcp_is_denied(bench, ip, (ip.server, 80));
    tcp_is_denied(bench, ip, (ip.client, 443));
    udp_is_denied(bench, ip, (ip.server, 443));
    ping_is_denied(bench, ip, ip.server);
}

#[track_caller]
fn passes_as(bench: &mut Bench<'_>, ip: &Family, packet: Packet, from: (IpAddr, u16)) {
    bench.from_endpoint(&WEB, &packet).leaves(
        UPLINK,
        ip.router,
        &packet.clone().from(from).ttl(63),
    );
}

/// N-49: both lists are empty. Protocols that are not translated are dropped all the same.
fn runtime_prefix_without_ports_is_open_for_every_protocol(bench: &mut Bench<'_>, ip: &Family) {
    let text = r#"{"allowed_cidrs": ["SERVERS"], "allowed_tcp_ports": []}"#;
    policy(bench, ip, text);
    tcp_passes(bench, ip, (ip.server, 1));
    tcp_passes(bench, ip, (ip.server, 65_535));
    udp_passes(bench, ip, (ip.server, 123));
    ping_passes(bench, ip, ip.server);
    tcp_is_denied(bench, ip, (ip.router, 1));
    ping_is_denied(bench, ip, ip.router);
    let sctp = other(ip.web, ip.server, 132);
    bench
        .from_endpoint(&WEB, &sctp)
        .is_dropped(Reason::Protocol);
}

/// N-49: one list is empty.
fn runtime_ports_of_one_protocol_close_the_other_and_icmp(bench: &mut Bench<'_>, ip: &Family) {
    let text = r#"{"allowed_cidrs": ["SERVERS"], "allowed_tcp_ports": [80, 443]}"#;
    policy(bench, ip, text);
    tcp_passes(bench, ip, (ip.server, 443));
    tcp_is_denied(bench, ip, (ip.server, 444));
    udp_is_denied(bench, ip, (ip.server, 443));
    ping_is_denied(bench, ip, ip.server);
    let text = r#"{"allowed_cidrs": ["SERVERS"], "allowed_udp_ports": [123]}"#;
    policy(bench, ip, text);
    udp_passes(bench, ip, (ip.server, 123));
    tcp_is_denied(bench, ip, (ip.server, 123));
    tcp_is_denied(bench, ip, (ip.server, 80));
    ping_is_denied(bench, ip, ip.server);
}

/// N-49: the cartesian product.
fn runtime_ports_are_open_to_every_prefix(bench: &mut Bench<'_>, ip: &Family) {
    let router = ip.router.to_string();
    let text = r#"{"allowed_cidrs": ["SERVERS", "ROUTER"], "allowed_tcp_ports": [80, 443],
        "allowed_udp_ports": [123]}"#;
    policy(bench, ip, &text.replace("ROUTER", &router));
    for address in [ip.server, ip.router] {
        for port in [80, 443] {
            tcp_passes(bench, ip, (address, port));
            udp_is_denied(bench, ip, (address, port));
        }
        udp_passes(bench, ip, (address, 123));
        tcp_is_denied(bench, ip, (address, 123));
    }
    tcp_is_denied(bench, ip, (ip.app, 443));
}

/// N-50.
fn runtime_ports_without_a_prefix_open_nothing(bench: &mut Bench<'_>, ip: &Family) {
    let text = r#"{"allowed_tcp_ports": [443], "allowed_udp_ports": [123]}"#;
    policy(bench, ip, text);
    tcp_is_denied(bench, ip, (ip.server, 443));
    udp_is_denied(bench, ip, (ip.server, 123));
    udp_passes(bench, ip, (ip.client, 53));
}

/// N-51.
fn runtime_prefixes_that_overlap_are_a_union(bench: &mut Bench<'_>, ip: &Family) {
    let text = r#"{"allowed_cidrs": ["EVERYTHING", "SERVERS", "SERVER"]}"#;
    policy(bench, ip, text);
    for address in [ip.server, ip.client, ip.router] {
        tcp_passes(bench, ip, (address, 443));
        udp_passes(bench, ip, (address, 443));
    }
}

/// N-51, and a bug of another system whose ranges ended one address early.
fn runtime_prefix_of_everything_is_everything_to_the_last_address(bench: &mut Bench<'_>) {
    let address = |text: &str| -> IpAddr { text.parse().expect(text) };
    for text in [
        r#"{"allowed_cidrs": ["0.0.0.0/0"]}"#,
        r#"{"allowed_cidrs": ["128.0.0.0/1"]}"#,
    ] {
        policy(bench, &V4, text);
        tcp_passes(bench, &V4, (address("223.255.255.255"), 65_535));
        tcp_is_denied(bench, &V6, (V6.server, 65_535));
    }
    let last = "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff";
    for text in [
        r#"{"allowed_cidrs": ["::/0"]}"#,
        r#"{"allowed_cidrs": ["8000::/1"]}"#,
    ] {
        policy(bench, &V6, text);
        tcp_passes(bench, &V6, (address(last), 65_535));
        tcp_is_denied(bench, &V4, (V4.server, 65_535));
    }
}

/// N-52.
fn runtime_resolvers_are_open_on_port_53_whatever_the_lists_say(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let text = r#"{"allowed_cidrs": ["SERVER"], "allowed_tcp_ports": [443],
        "allowed_udp_ports": [123]}"#;
    policy(bench, ip, text);
    udp_passes(bench, ip, (ip.client, 53));
    tcp_passes(bench, ip, (ip.client, 53));
    udp_is_denied(bench, ip, (ip.client, 54));
    udp_is_denied(bench, ip, (ip.server, 53));
    tcp_is_denied(bench, ip, (ip.server, 53));
    ping_is_denied(bench, ip, ip.client);
}

/// N-52: an empty list of resolvers.
fn runtime_policy_without_resolvers_denies_dns(bench: &mut Bench<'_>, ip: &Family) {
    let policy = Policy::from_text(r#"{"allow_dns": true}"#, Format::Json).expect("policy");
    bench.policy(&WEB, &policy);
    udp_is_denied(bench, ip, (ip.client, 53));
    tcp_is_denied(bench, ip, (ip.client, 53));
}

/// N-53.
fn runtime_deny_all_denies_dns(bench: &mut Bench<'_>, ip: &Family) {
    policy(bench, ip, r#"{"allow_dns": false}"#);
    udp_is_denied(bench, ip, (ip.client, 53));
    tcp_is_denied(bench, ip, (ip.client, 53));
    assert_eq!(bench.counts(), (0, 0));
}

/// N-53.
fn runtime_allow_list_implies_dns(bench: &mut Bench<'_>, ip: &Family) {
    policy(bench, ip, r#"{"allowed_cidrs": ["SERVER"]}"#);
    udp_passes(bench, ip, (ip.client, 53));
    let text = r#"{"allowed_cidrs": ["SERVER"], "allow_dns": false}"#;
    policy(bench, ip, text);
    udp_is_denied(bench, ip, (ip.client, 53));
}

/// N-54. ICMP errors are in [`super::errors`].
fn runtime_deny_all_lets_published_services_answer(bench: &mut Bench<'_>, ip: &Family) {
    policy(bench, ip, r#"{"allow_dns": false}"#);
    bench.publish(&WEB, "8080:80");
    bench.publish(&WEB, "5353:53/udp");
    let client = (ip.client, 40_000);
    bench.comes_in(&tcp("S", client, (ip.host, 8080)), &WEB, (ip.web, 80));
    passes_as(bench, ip, tcp("SA", (ip.web, 80), client), (ip.host, 8080));
    bench.comes_in(&udp(client, (ip.host, 5353)), &WEB, (ip.web, 53));
    passes_as(bench, ip, udp((ip.web, 53), client), (ip.host, 5353));
    // The host's own connections, and its pings.
    let ping = echo_request(ip.gateway, ip.web, 9);
    bench.from_host(&WEB, &ping).is_put_through(&WEB, &ping);
    let pong = echo_reply(ip.web, ip.gateway, 9);
    bench.from_endpoint(&WEB, &pong).reaches_host(BRIDGE, &pong);
}

/// N-58: nothing comes back, so a connection times out.
fn runtime_denial_is_silent(bench: &mut Bench<'_>, ip: &Family) {
    policy(bench, ip, r#"{"allow_dns": false}"#);
    // Whoever is refused aloud is not `is_dropped`.
    tcp_is_denied(bench, ip, (ip.server, 443));
    udp_is_denied(bench, ip, (ip.server, 443));
}

/// N-59.
fn runtime_policy_says_nothing_about_what_comes_in(bench: &mut Bench<'_>, ip: &Family) {
    policy(bench, ip, r#"{"allow_dns": false}"#);
    let (app, web) = ((ip.app, 5000), (ip.web, 9999));
    bench
        .from_endpoint(&APP, &tcp("S", app, web))
        .reaches(&WEB, &tcp("S", app, web));
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 9999));
    bench
        .from_host(&WEB, &tcp("S", gateway, web))
        .is_put_through(&WEB, &tcp("S", gateway, web));
}

/// N-60.
fn runtime_policy_covers_host_and_siblings(bench: &mut Bench<'_>, ip: &Family) {
    policy(bench, ip, r#"{"allowed_cidrs": ["SERVERS"]}"#);
    for address in [ip.gateway, ip.host, ip.app, ip.other] {
        tcp_is_denied(bench, ip, (address, 22));
        ping_is_denied(bench, ip, address);
    }
    let text = r#"{"allowed_cidrs": ["SERVERS", "SIBLING", "GATEWAY"]}"#;
    let text = text
        .replace("SIBLING", &ip.app.to_string())
        .replace("GATEWAY", &ip.gateway.to_string());
    policy(bench, ip, &text);
    let packet = tcp("S", (ip.web, 5000), (ip.app, 22));
    bench.from_endpoint(&WEB, &packet).reaches(&APP, &packet);
    let packet = tcp("S", (ip.web, 5000), (ip.gateway, 22));
    bench
        .from_endpoint(&WEB, &packet)
        .reaches_host(BRIDGE, &packet);
    tcp_is_denied(bench, ip, (ip.host, 22));
}

/// N-60.
fn container_without_a_policy_reaches_the_host(bench: &mut Bench<'_>, ip: &Family) {
    for address in [ip.gateway, ip.host] {
        let packet = tcp("S", (ip.web, 5000), (address, 22));
        bench
            .from_endpoint(&WEB, &packet)
            .reaches_host(BRIDGE, &packet);
    }
}

/// N-61: the runtime had no rules for IPv6 at all, which was a way out.
fn runtime_policy_for_ipv4_closes_ipv6_but_for_neighbour_discovery(bench: &mut Bench<'_>) {
    policy(bench, &V4, r#"{"allowed_cidrs": ["0.0.0.0/0"]}"#);
    tcp_passes(bench, &V4, (V4.server, 443));
    for address in [V6.server, V6.app, V6.gateway, V6.host] {
        tcp_is_denied(bench, &V6, (address, 443));
        udp_is_denied(bench, &V6, (address, 53));
        ping_is_denied(bench, &V6, address);
    }
    let sent = bench.from_endpoint(
        &WEB,
        &solicitation(V6.web, V6.gateway, V6.gateway, Some(WEB.mac)),
    );
    sent.is_redirected();
}
