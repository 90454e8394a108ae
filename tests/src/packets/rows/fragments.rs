//! Packets in fragments, and IPv6 packets with extension headers.

use std::net::IpAddr;

use nucnet_common::{
    abi::Reason,
    packet::{TCP, UDP},
};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::{Bench, Egress},
    packet::{self, Packet, echo_reply, echo_request, icmp, tcp, udp},
    site::{self, APP, BRIDGE, SECOND_UPLINK, STRAY, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(fragments_follow_the_first_one_out_and_back),
    each_family!(fragments_of_every_kind_follow),
    each_family!(fragments_follow_to_a_published_port_and_back),
    each_family!(fragments_follow_between_siblings),
    each_family!(fragments_follow_to_a_siblings_publish_and_back),
    each_family!(fragments_follow_to_the_host_and_from_it),
    each_family!(fragment_before_the_first_one_is_dropped),
    each_family!(fragment_long_after_the_first_one_is_dropped),
    each_family!(fragment_of_another_packet_does_not_follow),
    each_family!(fragments_are_judged_by_the_first_one),
    each_family!(fragment_of_a_flow_that_is_denied_by_now_is_dropped),
    each_family!(later_fragments_change_no_state),
    each_family!(first_fragment_that_lacks_its_header_is_dropped),
    each_family!(fragments_that_the_hosts_stack_forwards_are_dropped),
    each_family!(fragmented_error_is_not_translated),
    row!(extension_headers_are_looked_behind),
    row!(extension_headers_before_and_behind_the_fragment_header),
    row!(more_extension_headers_than_anybody_needs_are_dropped),
    row!(extension_headers_that_hide_what_follows_are_dropped),
    row!(packet_that_is_its_only_fragment_is_whole),
    row!(extension_headers_in_a_quote_are_stepped_over),
];

/// A later fragment: offset in units of eight bytes, and whether more follow.
fn later(from: IpAddr, to: IpAddr, protocol: u8, offset: u16, more: bool) -> Packet {
    packet::ip(from, to, protocol)
        .payload(vec![offset as u8; 24])
        .fragment(offset, more)
}

fn fragments_follow_the_first_one_out_and_back(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 53));
    bench.goes_out(&WEB, &udp(web, server).fragment(0, true), host);
    for (offset, more) in [(6, true), (9, false)] {
        bench
            .from_endpoint(&WEB, &later(ip.web, ip.server, UDP, offset, more))
            .leaves(
                UPLINK,
                ip.router,
                &later(ip.host, ip.server, UDP, offset, more).ttl(63),
            );
    }
    bench.comes_in(&udp(server, host).fragment(0, true), &WEB, web);
    for (offset, more) in [(6, true), (9, false)] {
        bench
            .from_uplink(UPLINK, &later(ip.server, ip.host, UDP, offset, more))
            .reaches(&WEB, &later(ip.server, ip.web, UDP, offset, more).ttl(63));
    }
    let flow = bench.flow(UDP, web, server);
    assert_eq!((flow.packets_out, flow.packets_in), (3, 3));
    assert_eq!(bench.counts(), (1, 1));
}

fn fragments_of_every_kind_follow(bench: &mut Bench<'_>, ip: &Family) {
    let echo = if ip.web.is_ipv4() { 1 } else { 58 };
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    for (protocol, first) in [
        (TCP, tcp("S", web, server)),
        (UDP, udp(web, server).without_checksum()),
        (echo, echo_request(ip.web, ip.server, 5000)),
    ] {
        let first = first.fragment(0, true);
        bench.from_endpoint(&WEB, &first).leaves(
            UPLINK,
            ip.router,
            &first.clone().from((ip.host, 5000)).ttl(63),
        );
        bench
            .from_endpoint(&WEB, &later(ip.web, ip.server, protocol, 9, false))
            .leaves(
                UPLINK,
                ip.router,
                &later(ip.host, ip.server, protocol, 9, false).ttl(63),
            );
    }
    let reply = echo_reply(ip.server, ip.host, 5000).fragment(0, true);
    bench
        .from_uplink(UPLINK, &reply)
        .reaches(&WEB, &reply.clone().to(web).ttl(63));
    bench
        .from_uplink(UPLINK, &later(ip.server, ip.host, echo, 9, false))
        .reaches(&WEB, &later(ip.server, ip.web, echo, 9, false).ttl(63));
}

fn fragments_follow_to_a_published_port_and_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&udp(client, host).fragment(0, true), &WEB, web);
    bench
        .from_uplink(UPLINK, &later(ip.client, ip.host, UDP, 9, false))
        .reaches(&WEB, &later(ip.client, ip.web, UDP, 9, false).ttl(63));
    bench.goes_out(&WEB, &udp(web, client).fragment(0, true), host);
    bench
        .from_endpoint(&WEB, &later(ip.web, ip.client, UDP, 9, false))
        .leaves(
            UPLINK,
            ip.router,
            &later(ip.host, ip.client, UDP, 9, false).ttl(63),
        );
}

fn fragments_follow_between_siblings(bench: &mut Bench<'_>, ip: &Family) {
    let (app, web) = ((ip.app, 5000), (ip.web, 53));
    for (from, to, first) in [
        (&APP, &WEB, udp(app, web).fragment(0, true)),
        (&WEB, &APP, udp(web, app).fragment(0, true)),
    ] {
        bench.from_endpoint(from, &first).reaches(to, &first);
        let (source, destination) = if from.link == APP.link {
            (ip.app, ip.web)
        } else {
            (ip.web, ip.app)
        };
        let last = later(source, destination, UDP, 9, false);
        bench.from_endpoint(from, &last).reaches(to, &last);
    }
}

fn fragments_follow_to_a_siblings_publish_and_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "5353:53/udp");
    let (app, host, web) = ((ip.app, 5000), (ip.host, 5353), (ip.web, 53));
    bench
        .from_endpoint(&APP, &udp(app, host).fragment(0, true))
        .reaches(&WEB, &udp(app, web).fragment(0, true).ttl(63));
    bench
        .from_endpoint(&APP, &later(ip.app, ip.host, UDP, 9, false))
        .reaches(&WEB, &later(ip.app, ip.web, UDP, 9, false).ttl(63));
    bench
        .from_endpoint(&WEB, &udp(web, app).fragment(0, true))
        .reaches(&APP, &udp(host, app).fragment(0, true).ttl(63));
    bench
        .from_endpoint(&WEB, &later(ip.web, ip.app, UDP, 9, false))
        .reaches(&APP, &later(ip.host, ip.app, UDP, 9, false).ttl(63));
}

fn fragments_follow_to_the_host_and_from_it(bench: &mut Bench<'_>, ip: &Family) {
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 53));
    for packet in [
        udp(gateway, web).fragment(0, true),
        later(ip.gateway, ip.web, UDP, 9, false),
    ] {
        bench.from_host(&WEB, &packet).is_put_through(&WEB, &packet);
    }
    for packet in [
        udp(web, gateway).fragment(0, true),
        later(ip.web, ip.gateway, UDP, 9, false),
    ] {
        bench
            .from_endpoint(&WEB, &packet)
            .reaches_host(BRIDGE, &packet);
    }
    assert_eq!(bench.counts(), (1, 0));
}

fn fragment_before_the_first_one_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .from_endpoint(&WEB, &later(ip.web, ip.server, UDP, 9, false))
        .is_dropped(Reason::Fragment);
    // From outside it may be for the host.
    bench
        .from_uplink(UPLINK, &later(ip.server, ip.host, UDP, 9, false))
        .passes();
    assert_eq!(bench.counts(), (0, 0));
}

fn fragment_long_after_the_first_one_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 53));
    bench.goes_out(&WEB, &udp(web, server).fragment(0, true), host);
    bench.wait(4.0);
    let last = later(ip.web, ip.server, UDP, 9, false);
    bench.from_endpoint(&WEB, &last).leaves(
        UPLINK,
        ip.router,
        &later(ip.host, ip.server, UDP, 9, false).ttl(63),
    );
    bench.wait(1.0);
    bench
        .from_endpoint(&WEB, &last)
        .is_dropped(Reason::Fragment);
}

fn fragment_of_another_packet_does_not_follow(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&udp(client, host).fragment(0, true), &WEB, web);
    // Of another sender, by another uplink, with another identification.
    let last = later(ip.client, ip.host, UDP, 9, false);
    bench
        .from_uplink(UPLINK, &later(ip.server, ip.host, UDP, 9, false))
        .passes();
    bench.from_uplink(SECOND_UPLINK, &last).passes();
    let identification = if ip.web.is_ipv4() { 4 } else { 44 };
    bench
        .from_uplink(UPLINK, &last.clone().patched(identification, &[7, 7]))
        .passes();
    // Nor are those of one endpoint another's.
    bench.goes_out(
        &APP,
        &udp((ip.app, 5000), (ip.server, 53)).fragment(0, true),
        (ip.host, 5000),
    );
    bench
        .from_endpoint(&WEB, &later(ip.web, ip.server, UDP, 9, false))
        .is_dropped(Reason::Fragment);
}

fn fragments_are_judged_by_the_first_one(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(&WEB, Egress::allow(&["any:53/udp"]));
    let (web, host) = ((ip.web, 5000), (ip.host, 5000));
    let last = later(ip.web, ip.server, UDP, 9, false);
    bench
        .from_endpoint(&WEB, &udp(web, (ip.server, 54)).fragment(0, true))
        .is_dropped(Reason::Policy);
    bench
        .from_endpoint(&WEB, &last)
        .is_dropped(Reason::Fragment);
    bench.goes_out(&WEB, &udp(web, (ip.server, 53)).fragment(0, true), host);
    bench.from_endpoint(&WEB, &last).leaves(
        UPLINK,
        ip.router,
        &later(ip.host, ip.server, UDP, 9, false).ttl(63),
    );
    // Another first fragment of the same packet is judged for itself.
    bench
        .from_endpoint(&WEB, &udp(web, (ip.server, 54)).fragment(0, true))
        .is_dropped(Reason::Policy);
}

fn fragment_of_a_flow_that_is_denied_by_now_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 53));
    bench.goes_out(&WEB, &udp(web, server).fragment(0, true), host);
    bench.egress(&WEB, Egress::deny(&["any"]));
    let last = later(ip.web, ip.server, UDP, 9, false);
    bench.from_endpoint(&WEB, &last).is_dropped(Reason::Policy);
    bench
        .from_endpoint(&WEB, &last)
        .is_dropped(Reason::Fragment);
}

fn later_fragments_change_no_state(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench.comes_in(&tcp("SA", server, host).fragment(0, true), &WEB, web);
    let before = bench.only_state();
    bench
        .from_uplink(UPLINK, &later(ip.server, ip.host, TCP, 9, false))
        .reaches(&WEB, &later(ip.server, ip.web, TCP, 9, false).ttl(63));
    assert_eq!(bench.only_state(), before);
}

fn first_fragment_that_lacks_its_header_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    // What is to be judged would come in the second (RFC 1858).
    for (protocol, length) in [(TCP, 8), (TCP, 16), (UDP, 0)] {
        let tiny = packet::ip(ip.web, ip.server, protocol)
            .payload(vec![0; length])
            .fragment(0, true);
        bench
            .from_endpoint(&WEB, &tiny)
            .is_dropped(Reason::Malformed);
    }
}

fn fragments_that_the_hosts_stack_forwards_are_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .forwarded(&WEB, &later(ip.stranger, ip.web, UDP, 9, false), STRAY)
        .is_dropped(Reason::NotPublished);
}

fn fragmented_error_is_not_translated(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 53));
    bench.goes_out(&WEB, &udp(web, server), host);
    let kind = if ip.web.is_ipv4() { 3 } else { 1 };
    let error = icmp(ip.server, ip.host, [kind, 3, 0, 0, 0, 0, 0, 0])
        .payload(udp(host, server).bytes())
        .fragment(0, true);
    bench.from_uplink(UPLINK, &error).passes();
}

/// Headers, each of eight bytes: its number, and the four bytes after its length.
fn extended(packet: &Packet, headers: &[(u8, [u8; 6])], last: u8) -> Packet {
    let whole = packet.bytes();
    let mut payload = Vec::new();
    for (number, (_, body)) in headers.iter().enumerate() {
        let next = headers.get(number + 1).map_or(last, |(next, _)| *next);
        payload.extend([next, 0]);
        payload.extend(body);
    }
    payload.extend(&whole[40..]);
    let address = |at: usize| {
        let bytes: [u8; 16] = whole[at..at + 16].try_into().expect("address");
        IpAddr::from(bytes)
    };
    packet::ip(address(8), address(24), headers[0].0)
        .payload(payload)
        .ttl(whole[7])
}

/// An option that says nothing.
const PADDING: [u8; 6] = [1, 4, 0, 0, 0, 0];
/// A routing header of type 2 whose packet has arrived.
const ARRIVED: [u8; 6] = [2, 0, 0, 0, 0, 0];

fn extension_headers_are_looked_behind(bench: &mut Bench<'_>) {
    let (web, host, server) = ((WEB.v6, 5000), (site::HOST6, 5000), (site::SERVER6, 443));
    for headers in [
        &[(0, PADDING)][..],
        &[(60, PADDING)],
        &[(43, ARRIVED)],
        &[(0, PADDING), (60, PADDING), (43, ARRIVED), (60, PADDING)],
        &[
            (0, PADDING),
            (60, PADDING),
            (60, PADDING),
            (60, PADDING),
            (60, PADDING),
            (60, PADDING),
        ],
    ] {
        for (protocol, out, seen) in [
            (UDP, udp(web, server), udp(host, server)),
            (TCP, tcp("S", web, server), tcp("S", host, server)),
        ] {
            bench
                .from_endpoint(&WEB, &extended(&out, headers, protocol))
                .leaves(
                    UPLINK,
                    site::ROUTER6,
                    &extended(&seen.ttl(63), headers, protocol),
                );
        }
        let (back, seen) = (udp(server, host), udp(server, web).ttl(63));
        bench
            .from_uplink(UPLINK, &extended(&back, headers, UDP))
            .reaches(&WEB, &extended(&seen, headers, UDP));
    }
}

fn extension_headers_before_and_behind_the_fragment_header(bench: &mut Bench<'_>) {
    let (web, host, server) = ((WEB.v6, 5000), (site::HOST6, 5000), (site::SERVER6, 443));
    let first = [(0, PADDING), (44, [0, 1, 0, 0, 0, 9]), (60, PADDING)];
    let last = [(0, PADDING), (44, [0, 0x10, 0, 0, 0, 9])];
    bench
        .from_endpoint(&WEB, &extended(&udp(web, server), &first, UDP))
        .leaves(
            UPLINK,
            site::ROUTER6,
            &extended(&udp(host, server).ttl(63), &first, UDP),
        );
    // The bytes are no header: nothing of them is changed.
    let rest = |from: IpAddr, ttl| {
        let rest = packet::ip(from, site::SERVER6, 60).payload(vec![9; 30]);
        extended(&rest.ttl(ttl), &last, 60)
    };
    bench.from_endpoint(&WEB, &rest(WEB.v6, 64)).leaves(
        UPLINK,
        site::ROUTER6,
        &rest(site::HOST6, 63),
    );
}

fn more_extension_headers_than_anybody_needs_are_dropped(bench: &mut Bench<'_>) {
    let packet = udp((WEB.v6, 5000), (site::SERVER6, 443));
    bench
        .from_endpoint(&WEB, &extended(&packet, &[(60, PADDING); 7], UDP))
        .is_dropped(Reason::ExtensionHeader);
}

fn extension_headers_that_hide_what_follows_are_dropped(bench: &mut Bench<'_>) {
    let packet = udp((WEB.v6, 5000), (site::SERVER6, 443));
    // Routing of type 0, routing that has not arrived, authentication, no next header, mobility,
    // host identity, shim6; hop-by-hop options that are not the first header; two fragment
    // headers.
    for headers in [
        &[(43, [0, 0, 0, 0, 0, 0])][..],
        &[(43, [2, 1, 0, 0, 0, 0])],
        &[(51, PADDING)],
        &[(59, PADDING)],
        &[(135, PADDING)],
        &[(139, PADDING)],
        &[(140, PADDING)],
        &[(60, PADDING), (0, PADDING)],
        &[(44, [0, 1, 0, 0, 0, 9]), (44, [0, 1, 0, 0, 0, 9])],
    ] {
        bench
            .from_endpoint(&WEB, &extended(&packet, headers, UDP))
            .is_dropped(Reason::ExtensionHeader);
    }
    assert_eq!(bench.counts(), (0, 0));
    // A header that ends beyond the packet.
    let long = extended(&packet, &[(60, PADDING)], UDP).patched(41, &[200]);
    bench
        .from_endpoint(&WEB, &long)
        .is_dropped(Reason::Malformed);
    bench.publish(&WEB, "8080:80/udp");
    let packet = udp((site::CLIENT6, 40_000), (site::HOST6, 8080));
    bench
        .from_uplink(UPLINK, &extended(&packet, &[(59, PADDING)], UDP))
        .passes();
}

fn packet_that_is_its_only_fragment_is_whole(bench: &mut Bench<'_>) {
    // RFC 6946.
    let (web, host, server) = ((WEB.v6, 5000), (site::HOST6, 5000), (site::SERVER6, 443));
    let header = [(44, [0, 0, 0, 0, 0, 9])];
    bench
        .from_endpoint(&WEB, &extended(&udp(web, server), &header, UDP))
        .leaves(
            UPLINK,
            site::ROUTER6,
            &extended(&udp(host, server).ttl(63), &header, UDP),
        );
    bench
        .from_endpoint(&WEB, &later(WEB.v6, site::SERVER6, UDP, 9, false))
        .is_dropped(Reason::Fragment);
}

fn extension_headers_in_a_quote_are_stepped_over(bench: &mut Bench<'_>) {
    let (web, host, server) = ((WEB.v6, 5000), (site::HOST6, 5000), (site::SERVER6, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    for headers in [
        &[(60, PADDING)][..],
        &[(60, PADDING), (44, [0, 1, 0, 0, 0, 9])],
    ] {
        let error = |to, quoted: Packet| {
            icmp(site::ROUTER6, to, [3, 0, 0, 0, 0, 0, 0, 0])
                .payload(extended(&quoted, headers, UDP).bytes())
        };
        bench
            .from_uplink(UPLINK, &error(site::HOST6, udp(host, server)))
            .reaches(&WEB, &error(WEB.v6, udp(web, server)).ttl(63));
    }
}
