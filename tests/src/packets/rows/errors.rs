//! ICMP and ICMPv6 errors about packets of a flow, with what they quote.

use std::net::IpAddr;

use nucnet_common::abi::Reason;

use super::{Family, Row, V4, each_family, row};
use crate::packets::{
    bench::{Bench, Egress},
    packet::{Packet, echo_reply, echo_request, icmp, tcp, udp},
    site::{self, APP, BRIDGE, STRAY, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(error_from_outside_reaches_the_endpoint_with_what_it_sent),
    each_family!(error_of_every_kind_is_translated),
    each_family!(error_of_a_router_on_the_way_is_taken_from_anybody),
    each_family!(error_from_outside_about_a_reply_of_a_published_port),
    each_family!(error_with_another_client_port_inside),
    each_family!(error_of_an_endpoint_leaves_with_the_published_address),
    each_family!(error_of_an_endpoint_about_what_it_asked_for_leaves),
    each_family!(error_between_siblings_is_carried_as_it_is),
    each_family!(error_about_a_siblings_publish_is_translated_back),
    each_family!(error_to_oneself_by_ones_own_publish),
    each_family!(error_of_an_endpoint_reaches_the_host),
    each_family!(error_about_an_echo_request),
    each_family!(quote_cut_after_eight_bytes),
    each_family!(datagram_without_checksum_is_quoted_without),
    each_family!(extensions_after_the_quote_are_carried_along),
    row!(options_in_the_quote_are_stepped_over),
    each_family!(wrong_checksum_of_an_error_is_dropped),
    row!(wrong_checksum_of_a_quoted_header_is_none_of_ours),
    each_family!(long_error_of_odd_length_is_summed_up_whole),
    each_family!(error_neither_makes_nor_refreshes_nor_ends_a_flow),
    each_family!(error_neither_ends_nor_refreshes_a_connection),
    each_family!(error_about_an_unknown_or_dead_flow_is_the_hosts),
    each_family!(error_of_an_endpoint_about_nothing_is_dropped),
    each_family!(error_of_an_endpoint_goes_to_the_sender_of_what_it_quotes_only),
    each_family!(error_about_an_error_is_about_nothing),
    each_family!(error_from_an_impossible_source_is_dropped),
    each_family!(error_passes_the_policy_that_its_flow_passed),
    each_family!(error_of_a_flow_that_is_denied_by_now_is_dropped),
    each_family!(last_hop_of_an_error_ends_at_the_router_without_another),
    row!(source_quench_is_not_translated),
    each_family!(error_forwarded_by_the_host_is_dropped),
];

/// The type of "destination unreachable".
fn unreachable(ip: &Family) -> u8 {
    if ip.web.is_ipv4() { 3 } else { 1 }
}

/// "Port unreachable" about a packet.
fn about(from: IpAddr, to: IpAddr, quoted: &Packet) -> Packet {
    let start = if from.is_ipv4() {
        [3, 3, 0, 0, 0, 0, 0, 0]
    } else {
        [1, 4, 0, 0, 0, 0, 0, 0]
    };
    icmp(from, to, start).payload(quoted.bytes())
}

/// "Port unreachable" about what the outside sees of a packet of WEB's reaches WEB, and is about
/// what WEB sent.
#[track_caller]
fn error_comes_in(bench: &mut Bench<'_>, ip: &Family, from: IpAddr, seen: &Packet, sent: &Packet) {
    bench
        .from_uplink(UPLINK, &about(from, ip.host, seen))
        .reaches(&WEB, &about(from, ip.web, sent).ttl(63));
}

/// "Port unreachable" of WEB's about a packet that it got leaves, and is about what its sender
/// sent.
#[track_caller]
fn error_goes_out(bench: &mut Bench<'_>, ip: &Family, to: IpAddr, got: &Packet, sent: &Packet) {
    bench.from_endpoint(&WEB, &about(ip.web, to, got)).leaves(
        UPLINK,
        ip.router,
        &about(ip.host, to, sent).ttl(63),
    );
}

fn error_from_outside_reaches_the_endpoint_with_what_it_sent(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    for (sent, seen) in [
        (udp(web, server), udp(host, server)),
        (tcp("S", web, server), tcp("S", host, server)),
    ] {
        bench
            .from_endpoint(&WEB, &sent)
            .leaves(UPLINK, ip.router, &seen.clone().ttl(63));
        let quoted = seen.ttl(60);
        bench
            .from_uplink(UPLINK, &about(ip.server, ip.host, &quoted).ttl(61))
            .reaches(&WEB, &about(ip.server, ip.web, &sent.ttl(60)).ttl(60));
    }
}

fn error_of_every_kind_is_translated(bench: &mut Bench<'_>, ip: &Family) {
    // With the maximum transmission unit or pointer where there is one.
    let kinds: &[[u8; 8]] = if ip.web.is_ipv4() {
        &[
            [3, 0, 0, 0, 0, 0, 0, 0],
            [3, 4, 0, 0, 0, 0, 5, 0x14],
            [3, 13, 0, 0, 0, 0, 0, 0],
            [11, 0, 0, 0, 0, 0, 0, 0],
            [11, 1, 0, 0, 0, 0, 0, 0],
            [12, 0, 0, 0, 20, 0, 0, 0],
        ]
    } else {
        &[
            [1, 0, 0, 0, 0, 0, 0, 0],
            [1, 6, 0, 0, 0, 0, 0, 0],
            [2, 0, 0, 0, 0, 0, 5, 0x14],
            [3, 0, 0, 0, 0, 0, 0, 0],
            [4, 1, 0, 0, 0, 0, 0, 6],
        ]
    };
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    for start in kinds {
        let error = icmp(ip.router, ip.host, *start).payload(tcp("S", host, server).bytes());
        let expected = icmp(ip.router, ip.web, *start).payload(tcp("S", web, server).bytes());
        bench
            .from_uplink(UPLINK, &error)
            .reaches(&WEB, &expected.ttl(63));
    }
}

fn error_of_a_router_on_the_way_is_taken_from_anybody(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    for router in [ip.router, ip.client, ip.nowhere] {
        error_comes_in(bench, ip, router, &udp(host, server), &udp(web, server));
    }
}

fn error_from_outside_about_a_reply_of_a_published_port(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    error_comes_in(
        bench,
        ip,
        ip.router,
        &tcp("SA", host, client),
        &tcp("SA", web, client),
    );
}

fn error_with_another_client_port_inside(bench: &mut Bench<'_>, ip: &Family) {
    // One client port by two published ports that lead to one port inside.
    bench.publish(&WEB, "8080:80");
    bench.publish(&WEB, "8081:80");
    let (client, web) = ((ip.client, 40_000), (ip.web, 80));
    bench.comes_in(&tcp("S", client, (ip.host, 8080)), &WEB, web);
    let host = (ip.host, 8081);
    let sent = bench.from_uplink(UPLINK, &tcp("S", client, host));
    let state = bench.state();
    let (key, _) = state
        .flows
        .iter()
        .find(|(_, flow)| flow.external_port == 8081)
        .expect("flow");
    let inside = (ip.client, key.peer_port);
    sent.reaches(&WEB, &tcp("S", inside, web).ttl(63));
    error_comes_in(
        bench,
        ip,
        ip.router,
        &tcp("SA", host, client),
        &tcp("SA", web, inside),
    );
    error_goes_out(
        bench,
        ip,
        ip.client,
        &tcp("S", inside, web),
        &tcp("S", client, host),
    );
}

fn error_of_an_endpoint_leaves_with_the_published_address(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&udp(client, host), &WEB, web);
    error_goes_out(bench, ip, ip.client, &udp(client, web), &udp(client, host));
}

fn error_of_an_endpoint_about_what_it_asked_for_leaves(bench: &mut Bench<'_>, ip: &Family) {
    // The socket is closed when the answer comes.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 53));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench.comes_in(&udp(server, host), &WEB, web);
    error_goes_out(bench, ip, ip.server, &udp(server, web), &udp(server, host));
}

fn error_between_siblings_is_carried_as_it_is(bench: &mut Bench<'_>, ip: &Family) {
    let (app, web) = ((ip.app, 5000), (ip.web, 53));
    bench
        .from_endpoint(&APP, &udp(app, web))
        .reaches(&WEB, &udp(app, web));
    let error = about(ip.web, ip.app, &udp(app, web));
    bench.from_endpoint(&WEB, &error).reaches(&APP, &error);
    bench
        .from_endpoint(&WEB, &udp(web, app))
        .reaches(&APP, &udp(web, app));
    let error = about(ip.app, ip.web, &udp(web, app));
    bench.from_endpoint(&APP, &error).reaches(&WEB, &error);
}

fn error_about_a_siblings_publish_is_translated_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "5353:53/udp");
    let (app, host, web) = ((ip.app, 5000), (ip.host, 5353), (ip.web, 53));
    bench
        .from_endpoint(&APP, &udp(app, host))
        .reaches(&WEB, &udp(app, web).ttl(63));
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.app, &udp(app, web)))
        .reaches(&APP, &about(ip.host, ip.app, &udp(app, host)).ttl(63));
    bench
        .from_endpoint(&WEB, &udp(web, app))
        .reaches(&APP, &udp(host, app).ttl(63));
    bench
        .from_endpoint(&APP, &about(ip.app, ip.host, &udp(host, app)))
        .reaches(&WEB, &about(ip.app, ip.web, &udp(web, app)).ttl(63));
}

fn error_to_oneself_by_ones_own_publish(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "5353:53/udp");
    let (inside, host, web) = ((ip.web, 5000), (ip.host, 5353), (ip.web, 53));
    let gateway = (ip.gateway, 5000);
    bench
        .from_endpoint(&WEB, &udp(inside, host))
        .reaches(&WEB, &udp(gateway, web).ttl(63));
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.gateway, &udp(gateway, web)))
        .reaches(&WEB, &about(ip.host, ip.web, &udp(inside, host)).ttl(63));
}

fn error_of_an_endpoint_reaches_the_host(bench: &mut Bench<'_>, ip: &Family) {
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 53));
    bench
        .from_host(&WEB, &udp(gateway, web))
        .is_put_through(&WEB, &udp(gateway, web));
    let error = about(ip.web, ip.gateway, &udp(gateway, web));
    bench
        .from_endpoint(&WEB, &error)
        .reaches_host(BRIDGE, &error);
}

fn error_about_an_echo_request(bench: &mut Bench<'_>, ip: &Family) {
    let request = echo_request(ip.web, ip.server, 40_000);
    let sent = bench.from_endpoint(&WEB, &request);
    let (_, flow) = bench.only_flow();
    let outside = request.clone().from((ip.host, flow.external_port));
    sent.leaves(UPLINK, ip.router, &outside.clone().ttl(63));
    error_comes_in(bench, ip, ip.router, &outside, &request);
    // The endpoint no longer wants the answer.
    let reply = echo_reply(ip.server, ip.web, 40_000);
    error_goes_out(
        bench,
        ip,
        ip.server,
        &reply,
        &reply.clone().to((ip.host, flow.external_port)),
    );
}

/// The first bytes of a packet.
fn cut(packet: &Packet, after_ip: usize) -> Vec<u8> {
    let bytes = packet.bytes();
    let header = if bytes[0] >> 4 == 4 {
        usize::from(bytes[0] & 0x0f) * 4
    } else {
        40
    };
    bytes[..header + after_ip].to_vec()
}

fn quote_cut_after_eight_bytes(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    let error =
        |to, quoted: &Packet, after_ip| about(ip.router, to, quoted).payload(cut(quoted, after_ip));
    // Without checksum, then with it.
    for after_ip in [8, 9, 16, 18, 19, 20] {
        bench
            .from_uplink(UPLINK, &error(ip.host, &tcp("S", host, server), after_ip))
            .reaches(
                &WEB,
                &error(ip.web, &tcp("S", web, server), after_ip).ttl(63),
            );
    }
    for after_ip in [0, 7] {
        bench
            .from_uplink(UPLINK, &error(ip.host, &tcp("S", host, server), after_ip))
            .passes();
    }
    // Of a datagram the checksum is always quoted.
    bench.goes_out(&WEB, &udp(web, server), host);
    bench
        .from_uplink(UPLINK, &error(ip.host, &udp(host, server), 8))
        .reaches(&WEB, &error(ip.web, &udp(web, server), 8).ttl(63));
}

fn datagram_without_checksum_is_quoted_without(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let (sent, seen) = (
        udp(web, server).without_checksum(),
        udp(host, server).without_checksum(),
    );
    bench
        .from_endpoint(&WEB, &sent)
        .leaves(UPLINK, ip.router, &seen.clone().ttl(63));
    error_comes_in(bench, ip, ip.server, &seen, &sent);
}

fn extensions_after_the_quote_are_carried_along(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 4884: an extension structure after a quote padded to 128 bytes; the length is in
    // words of four bytes, in IPv6 of eight.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let error = |to, quoted: Packet| {
        let start = if ip.web.is_ipv4() {
            [11, 0, 0, 0, 0, 32, 0, 0]
        } else {
            [3, 0, 0, 0, 16, 0, 0, 0]
        };
        let mut payload = quoted.bytes();
        payload.resize(128, 0);
        payload.extend([0x20, 0, 0xdf, 0xf4, 0, 8, 1, 1, 0x12, 0x34, 0x51, 1]);
        icmp(ip.router, to, start).payload(payload)
    };
    bench
        .from_uplink(UPLINK, &error(ip.host, udp(host, server)))
        .reaches(&WEB, &error(ip.web, udp(web, server)).ttl(63));
}

fn options_in_the_quote_are_stepped_over(bench: &mut Bench<'_>) {
    let (web, host) = ((WEB.v4, 5000), (V4.host, 5000));
    let server = (V4.server, 443);
    for options in [&[1, 1, 0, 0][..], &[1; 40]] {
        for (sent, seen) in [
            (udp(web, server), udp(host, server)),
            (tcp("S", web, server), tcp("S", host, server)),
        ] {
            let (sent, seen) = (sent.options(options), seen.options(options));
            bench
                .from_endpoint(&WEB, &sent)
                .leaves(UPLINK, V4.router, &seen.clone().ttl(63));
            // The error has options of its own, too.
            bench
                .from_uplink(
                    UPLINK,
                    &about(V4.router, V4.host, &seen).options(&[1, 1, 1, 0]),
                )
                .reaches(
                    &WEB,
                    &about(V4.router, WEB.v4, &sent)
                        .options(&[1, 1, 1, 0])
                        .ttl(63),
                );
        }
    }
}

fn wrong_checksum_of_an_error_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench
        .from_uplink(
            UPLINK,
            &about(ip.server, ip.host, &udp(host, server)).patched_l4(4, &[0, 1]),
        )
        .is_dropped_for(WEB.number, Reason::Malformed);
    bench
        .from_endpoint(
            &WEB,
            &about(ip.web, ip.server, &udp(server, web)).patched_l4(4, &[0, 1]),
        )
        .is_dropped(Reason::Malformed);
}

fn wrong_checksum_of_a_quoted_header_is_none_of_ours(bench: &mut Bench<'_>) {
    let (web, host, server) = ((WEB.v4, 5000), (V4.host, 5000), (V4.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let mut quoted = udp(host, server).bytes();
    quoted[11] ^= 1;
    bench
        .from_uplink(
            UPLINK,
            &about(V4.server, V4.host, &udp(host, server)).payload(quoted),
        )
        .passes();
    let mut quoted = udp(server, web).bytes();
    quoted[11] ^= 1;
    bench
        .from_endpoint(
            &WEB,
            &about(WEB.v4, V4.server, &udp(server, web)).payload(quoted),
        )
        .is_dropped(Reason::Malformed);
}

fn long_error_of_odd_length_is_summed_up_whole(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let ip_header = if ip.web.is_ipv4() { 20 } else { 40 };
    // An error of 576 and 1,280 bytes, around these, and longer than is summed up.
    for length in [547, 548, 549, 1231, 1232, 1233, 1400] {
        let datagram = vec![0x5a; length - ip_header - 8];
        let quoted = |from| udp(from, server).payload(datagram.clone());
        let error = about(ip.server, ip.host, &quoted(host));
        bench
            .from_uplink(UPLINK, &error)
            .reaches(&WEB, &about(ip.server, ip.web, &quoted(web)).ttl(63));
        if length < 1272 {
            bench
                .from_uplink(UPLINK, &error.patched_l4(8 + length - 1, &[0x5b]))
                .is_dropped_for(WEB.number, Reason::Malformed);
        }
    }
}

fn error_neither_makes_nor_refreshes_nor_ends_a_flow(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench.comes_in(&udp(server, host), &WEB, web);
    let before = bench.state();
    error_comes_in(bench, ip, ip.server, &udp(host, server), &udp(web, server));
    error_goes_out(bench, ip, ip.server, &udp(server, web), &udp(server, host));
    let after = bench.state();
    assert_eq!(before.flows, after.flows);
    assert_eq!(before.bindings, after.bindings);
    // So many errors as one likes: the flow dies when its own packets stop.
    for _ in 0..3 {
        bench.wait(20.0);
        let _ = bench.from_uplink(UPLINK, &about(ip.server, ip.host, &udp(host, server)));
        let _ = bench.from_endpoint(&WEB, &about(ip.web, ip.server, &udp(server, web)));
    }
    bench
        .from_uplink(UPLINK, &about(ip.server, ip.host, &udp(host, server)))
        .passes();
}

fn error_neither_ends_nor_refreshes_a_connection(bench: &mut Bench<'_>, ip: &Family) {
    // RFC 5382 REQ-10.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench.comes_in(&tcp("SA", server, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("A", web, server), host);
    let before = bench.state().flows;
    for router in [ip.server, ip.router] {
        bench
            .from_uplink(UPLINK, &about(router, ip.host, &tcp("A", host, server)))
            .reaches(&WEB, &about(router, ip.web, &tcp("A", web, server)).ttl(63));
    }
    assert_eq!(before, bench.state().flows);
    bench.wait(30.0);
    let _ = bench.from_uplink(UPLINK, &about(ip.server, ip.host, &tcp("A", host, server)));
    bench.comes_in(&tcp("A", server, host), &WEB, web);
    // It goes on, and dies of its own silence only.
    bench.wait(50.0);
    let _ = bench.from_uplink(UPLINK, &about(ip.server, ip.host, &tcp("A", host, server)));
    bench.wait(10.0);
    bench.from_uplink(UPLINK, &tcp("A", server, host)).passes();
}

fn error_about_an_unknown_or_dead_flow_is_the_hosts(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let error = about(ip.server, ip.host, &udp(host, server));
    bench.from_uplink(UPLINK, &error).passes();
    bench.goes_out(&WEB, &udp(web, server), host);
    // To another address than that of the sender of what it quotes.
    let elsewhere = about(ip.server, ip.gateway, &udp(host, server));
    bench.from_uplink(UPLINK, &elsewhere).passes();
    bench.wait(51.0);
    bench.from_uplink(UPLINK, &error).passes();
}

fn error_of_an_endpoint_about_nothing_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 80), (ip.server, 443));
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.server, &udp(server, web)))
        .is_dropped(Reason::NoFlow);
    bench
        .from_endpoint(
            &WEB,
            &icmp(ip.web, ip.server, [unreachable(ip), 0, 0, 0, 0, 0, 0, 0]),
        )
        .is_dropped(Reason::Malformed);
    assert_eq!(bench.counts(), (0, 0));
}

fn error_of_an_endpoint_goes_to_the_sender_of_what_it_quotes_only(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&udp(client, host), &WEB, web);
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.server, &udp(client, web)))
        .is_dropped(Reason::NoFlow);
    // Nor is it about a packet that a sibling received.
    bench
        .from_endpoint(&APP, &about(ip.app, ip.client, &udp(client, web)))
        .is_dropped(Reason::NoFlow);
}

fn error_about_an_error_is_about_nothing(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let error = about(ip.host, ip.server, &udp(server, host));
    bench
        .from_uplink(UPLINK, &about(ip.server, ip.host, &error))
        .passes();
    let error = about(ip.server, ip.web, &udp(web, server));
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.server, &error))
        .is_dropped(Reason::NoFlow);
}

fn error_from_an_impossible_source_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let (loopback, group) = if ip.web.is_ipv4() {
        ("127.0.0.1", "224.0.0.1")
    } else {
        ("::1", "ff02::1")
    };
    for source in [
        ip.host,
        ip.gateway,
        ip.app,
        site::address(loopback),
        site::address(group),
    ] {
        bench
            .from_uplink(UPLINK, &about(source, ip.host, &udp(host, server)))
            .is_dropped_for(WEB.number, Reason::MartianSource);
    }
}

fn error_passes_the_policy_that_its_flow_passed(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    let allowed = match ip.server {
        IpAddr::V4(v4) => format!("{v4}:443/udp"),
        IpAddr::V6(v6) => format!("[{v6}]:443/udp"),
    };
    bench.egress(&WEB, Egress::allow(&[&allowed]));
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    error_comes_in(bench, ip, ip.router, &udp(host, server), &udp(web, server));
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&udp(client, host), &WEB, web);
    error_goes_out(bench, ip, ip.client, &udp(client, web), &udp(client, host));
}

fn error_of_a_flow_that_is_denied_by_now_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench.egress(&WEB, Egress::deny(&["any"]));
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.server, &udp(server, web)))
        .is_dropped(Reason::Policy);
}

fn last_hop_of_an_error_ends_at_the_router_without_another(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    bench
        .from_uplink(
            UPLINK,
            &about(ip.server, ip.host, &udp(host, server)).ttl(1),
        )
        .is_dropped_for(WEB.number, Reason::TtlExceeded);
    bench
        .from_endpoint(&WEB, &about(ip.web, ip.server, &udp(server, web)).ttl(1))
        .is_dropped(Reason::TtlExceeded);
}

fn source_quench_is_not_translated(bench: &mut Bench<'_>) {
    let (web, host, server) = ((WEB.v4, 5000), (V4.host, 5000), (V4.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    let quench = [4, 0, 0, 0, 0, 0, 0, 0];
    bench
        .from_uplink(
            UPLINK,
            &icmp(V4.router, V4.host, quench).payload(udp(host, server).bytes()),
        )
        .passes();
    bench
        .from_endpoint(
            &WEB,
            &icmp(WEB.v4, V4.server, quench).payload(udp(server, web).bytes()),
        )
        .is_dropped(Reason::Protocol);
}

fn error_forwarded_by_the_host_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    bench
        .forwarded(&WEB, &about(ip.stranger, ip.web, &udp(web, server)), STRAY)
        .is_dropped(Reason::NotPublished);
}
