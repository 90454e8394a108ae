//! Headers: what is read, what is written, and what is too odd to be touched.

use nucnet_common::abi::Reason;

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::{Bench, Frame as _, ROUTER_MAC},
    packet::{self, Packet, echo_request, tcp, udp},
    site::{self, HOST4, ROUTER4, SERVER4, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(last_hop_ends_at_the_router_on_the_way_out),
    each_family!(last_hop_ends_at_the_router_on_the_way_in),
    each_family!(last_hop_ends_at_the_router_on_the_way_to_a_sibling_by_its_publish),
    row!(ipv4_options_are_carried_along),
    row!(length_that_the_field_cannot_say_is_that_of_the_frame),
    each_family!(padding_after_a_short_packet_stays),
    each_family!(empty_datagrams_are_translated),
    each_family!(odd_lengths_are_translated),
    each_family!(frame_cut_short_at_any_byte_is_dropped_from_an_endpoint),
    each_family!(frame_cut_short_at_any_byte_passes_from_an_uplink),
    each_family!(frame_cut_short_at_any_byte_is_dropped_from_the_host),
    row!(ipv4_header_that_contradicts_itself_is_dropped),
    row!(ipv6_header_that_contradicts_itself_is_dropped),
    each_family!(tcp_header_that_contradicts_itself_is_dropped),
    each_family!(header_that_ends_beyond_the_packet_is_dropped),
    row!(mapped_ipv4_addresses_on_the_wire_are_dropped),
    each_family!(other_protocols_of_an_endpoint_are_dropped),
    each_family!(tagged_frame_of_an_endpoint_is_dropped),
    each_family!(tagged_frame_from_an_uplink_passes_to_whoever_has_the_vlan),
    each_family!(tagged_frame_of_the_host_is_dropped),
    row!(frames_that_are_not_ip_are_dropped_from_an_endpoint),
    row!(frames_that_are_not_ip_pass_from_an_uplink),
];

fn last_hop_ends_at_the_router_on_the_way_out(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.from_endpoint(&WEB, &udp(web, server).ttl(2)).leaves(
        UPLINK,
        ip.router,
        &udp(host, server).ttl(1),
    );
    for ttl in [1, 0] {
        bench
            .from_endpoint(&WEB, &udp(web, server).ttl(ttl))
            .expires(WEB.number);
    }
    bench
        .from_endpoint(&WEB, &udp(web, server).ttl(255))
        .leaves(UPLINK, ip.router, &udp(host, server).ttl(254));
}

fn last_hop_ends_at_the_router_on_the_way_in(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_uplink(UPLINK, &udp(client, host).ttl(2))
        .reaches(&WEB, &udp(client, web).ttl(1));
    for ttl in [1, 0] {
        bench
            .from_uplink(UPLINK, &udp(client, host).ttl(ttl))
            .expires(WEB.number);
    }
}

fn last_hop_ends_at_the_router_on_the_way_to_a_sibling_by_its_publish(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80/udp");
    bench
        .from_endpoint(&site::APP, &udp((ip.app, 5000), (ip.host, 8080)).ttl(1))
        .expires(site::APP.number);
}

fn ipv4_options_are_carried_along(bench: &mut Bench<'_>) {
    // No operation, no operation, end; then all the room there is.
    for options in [&[1, 1, 0, 0][..], &[1; 40]] {
        let (web, host, server) = ((WEB.v4, 5000), (HOST4, 5000), (SERVER4, 443));
        for (out, back) in [
            (udp(web, server), udp(server, host)),
            (tcp("S", web, server), tcp("SA", server, host)),
        ] {
            bench
                .from_endpoint(&WEB, &out.clone().options(options))
                .leaves(UPLINK, ROUTER4, &out.options(options).from(host).ttl(63));
            bench
                .from_uplink(UPLINK, &back.clone().options(options))
                .reaches(&WEB, &back.options(options).to(web).ttl(63));
        }
        let request = echo_request(WEB.v4, SERVER4, 5000).options(options);
        bench.from_endpoint(&WEB, &request).leaves(
            UPLINK,
            ROUTER4,
            &request.clone().from(host).ttl(63),
        );
    }
}

fn length_that_the_field_cannot_say_is_that_of_the_frame(bench: &mut Bench<'_>) {
    // Segmentation offload beyond 64 KiB has a total length of zero.
    let out = tcp("S", (WEB.v4, 5000), (SERVER4, 443)).patched(2, &[0, 0]);
    bench.from_endpoint(&WEB, &out).leaves(
        UPLINK,
        ROUTER4,
        &out.clone().from((HOST4, 5000)).ttl(63),
    );
    let (_, flow) = bench.only_flow();
    assert_eq!(flow.bytes_out, out.bytes().len() as u64);
}

fn padding_after_a_short_packet_stays(bench: &mut Bench<'_>, ip: &Family) {
    let out = udp((ip.web, 5000), (ip.server, 443))
        .payload("x")
        .padded(17);
    bench.from_endpoint(&WEB, &out).leaves(
        UPLINK,
        ip.router,
        &out.clone().from((ip.host, 5000)).ttl(63),
    );
    let (_, flow) = bench.only_flow();
    assert_eq!(flow.bytes_out, out.bytes().len() as u64 - 17);
}

fn empty_datagrams_are_translated(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    for out in [
        udp(web, server),
        tcp("S", web, server),
        echo_request(ip.web, ip.server, 5000),
    ] {
        let out = out.payload([]);
        bench
            .from_endpoint(&WEB, &out)
            .leaves(UPLINK, ip.router, &out.clone().from(host).ttl(63));
    }
}

fn odd_lengths_are_translated(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 40_000), ip.host, (ip.server, 443));
    for length in 0..9 {
        let out = udp(web, server).payload(vec![0xa5; length]);
        let sent = bench.from_endpoint(&WEB, &out);
        let (_, flow) = bench.only_flow();
        let host = (host, flow.external_port);
        sent.leaves(UPLINK, ip.router, &out.clone().from(host).ttl(63));
        let back = udp(server, host).payload(vec![0x5a; length]);
        bench
            .from_uplink(UPLINK, &back)
            .reaches(&WEB, &back.clone().to(web).ttl(63));
    }
}

/// Packets of every kind that is translated.
fn of_every_kind(from: (std::net::IpAddr, u16), to: (std::net::IpAddr, u16)) -> Vec<Packet> {
    let mut packets = vec![
        tcp("S", from, to),
        udp(from, to),
        echo_request(from.0, to.0, 5000),
    ];
    if from.0.is_ipv4() {
        packets.push(tcp("S", from, to).options(&[1; 12]));
    }
    packets
        .into_iter()
        .map(|packet| packet.payload("short"))
        .collect()
}

fn frame_cut_short_at_any_byte_is_dropped_from_an_endpoint(bench: &mut Bench<'_>, ip: &Family) {
    for packet in of_every_kind((ip.web, 5000), (ip.server, 443)) {
        let whole = packet.framed(WEB.gateway_mac(), WEB.mac);
        for frame in bench.cut_short(&whole) {
            bench
                .from_endpoint(&WEB, &frame)
                .is_dropped(Reason::Malformed);
        }
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn frame_cut_short_at_any_byte_passes_from_an_uplink(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.publish(&WEB, "8080:80/udp");
    let mac = site::interface(UPLINK).mac;
    for packet in of_every_kind((ip.client, 40_000), (ip.host, 8080)) {
        let whole = packet.framed(mac, ROUTER_MAC);
        for frame in bench.cut_short(&whole) {
            bench.from_uplink(UPLINK, &frame).passes();
        }
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn frame_cut_short_at_any_byte_is_dropped_from_the_host(bench: &mut Bench<'_>, ip: &Family) {
    for packet in of_every_kind((ip.gateway, 45_000), (ip.web, 80)) {
        let whole = packet.framed(WEB.mac, WEB.gateway_mac());
        for frame in bench.cut_short(&whole) {
            if frame.len() < 14 {
                // Without an EtherType there is no telling what it was.
                continue;
            }
            bench
                .from_host(&WEB, &frame)
                .is_dropped_for(0, Reason::Malformed);
        }
    }
    assert_eq!(bench.counts(), (0, 0));
}

#[track_caller]
fn is_malformed(bench: &mut Bench<'_>, packet: &Packet) {
    bench
        .from_endpoint(&WEB, packet)
        .is_dropped(Reason::Malformed);
}

fn ipv4_header_that_contradicts_itself_is_dropped(bench: &mut Bench<'_>) {
    let packet = udp((WEB.v4, 5000), (SERVER4, 443));
    let length = packet.bytes().len() as u16;
    // Versions, then header lengths below the least and beyond the packet's.
    for first in [0x05, 0x55, 0x65, 0xf5, 0x40, 0x44] {
        is_malformed(bench, &packet.clone().patched(0, &[first]));
    }
    is_malformed(bench, &packet.clone().payload("").patched(0, &[0x4f]));
    for total in [1, 19, 27, length + 1, u16::MAX] {
        is_malformed(bench, &packet.clone().patched(2, &total.to_be_bytes()));
    }
}

fn ipv6_header_that_contradicts_itself_is_dropped(bench: &mut Bench<'_>) {
    let packet = udp((WEB.v6, 5000), (site::SERVER6, 443));
    let payload = packet.bytes().len() as u16 - 40;
    for first in [0x00, 0x40, 0x50, 0x70] {
        is_malformed(bench, &packet.clone().patched(0, &[first]));
    }
    for length in [0, 7, payload + 1, u16::MAX] {
        is_malformed(bench, &packet.clone().patched(4, &length.to_be_bytes()));
    }
}

fn tcp_header_that_contradicts_itself_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443)).payload("1234");
    for words in [0, 4, 7, 15] {
        is_malformed(bench, &packet.clone().patched_l4(12, &[words << 4]));
    }
}

fn header_that_ends_beyond_the_packet_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    // The frame has all the bytes; the packet says that it is shorter than its headers.
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443));
    for carried in [0, 3, 8, 19] {
        let short = if ip.web.is_ipv4() {
            packet
                .clone()
                .patched(2, &(20 + carried as u16).to_be_bytes())
        } else {
            packet.clone().patched(4, &(carried as u16).to_be_bytes())
        };
        is_malformed(bench, &short);
    }
}

fn mapped_ipv4_addresses_on_the_wire_are_dropped(bench: &mut Bench<'_>) {
    let packet = udp((WEB.v6, 5000), (site::SERVER6, 443));
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0xff, 0xff, 10, 0, 42, 2];
    for offset in [8, 24] {
        is_malformed(bench, &packet.clone().patched(offset, &mapped));
    }
    let packet = udp((site::CLIENT6, 40_000), (site::HOST6, 8080));
    bench.publish(&WEB, "8080:80/udp");
    bench
        .from_uplink(UPLINK, &packet.patched(8, &mapped))
        .passes();
}

fn other_protocols_of_an_endpoint_are_dropped(bench: &mut Bench<'_>, ip: &Family) {
    // IP in IP, GRE, SCTP, and the ICMP of the other family.
    let foreign_icmp = if ip.web.is_ipv4() { 58 } else { 1 };
    for protocol in [4, 47, 132, foreign_icmp] {
        bench
            .from_endpoint(&WEB, &packet::ip(ip.web, ip.server, protocol))
            .is_dropped(Reason::Protocol);
    }
    // A node information query, and a timestamp request.
    let query = if ip.web.is_ipv4() { 13 } else { 139 };
    bench
        .from_endpoint(
            &WEB,
            &packet::icmp(ip.web, ip.server, [query, 0, 0, 0, 0, 0, 0, 0]),
        )
        .is_dropped(Reason::Protocol);
}

fn tagged_frame_of_an_endpoint_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    for id in [0, 1, 42, 4094] {
        bench
            .from_endpoint(&WEB, &udp((ip.web, 5000), (ip.server, 443)).vlan(id))
            .is_dropped(Reason::NotIp);
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn tagged_frame_from_an_uplink_passes_to_whoever_has_the_vlan(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_uplink(UPLINK, &tcp("S", client, host).vlan(42))
        .passes();
    assert_eq!(bench.counts(), (0, 0));
    // Not even packets of a flow: the interface of that VLAN is an uplink of its own.
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench
        .from_uplink(UPLINK, &tcp("A", client, host).vlan(42))
        .passes();
}

fn tagged_frame_of_the_host_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .from_host(&WEB, &udp((ip.gateway, 45_000), (ip.web, 80)).vlan(42))
        .is_dropped_for(0, Reason::NotIp);
}

/// Frames of other EtherTypes: link-layer discovery, MPLS, PPPoE, and a length in place of a
/// type.
fn not_ip(to: nucnet_common::abi::Mac, from: nucnet_common::abi::Mac) -> [Vec<u8>; 4] {
    [0x88cc, 0x8847, 0x8864, 0x0026].map(|ethertype| {
        let mut frame = packet::ethernet(to, from, ethertype).to_vec();
        frame.resize(60, 0x42);
        frame
    })
}

fn frames_that_are_not_ip_are_dropped_from_an_endpoint(bench: &mut Bench<'_>) {
    for frame in not_ip(WEB.gateway_mac(), WEB.mac) {
        bench.from_endpoint(&WEB, &frame).is_dropped(Reason::NotIp);
    }
}

fn frames_that_are_not_ip_pass_from_an_uplink(bench: &mut Bench<'_>) {
    for frame in not_ip(site::interface(UPLINK).mac, ROUTER_MAC) {
        bench.from_uplink(UPLINK, &frame).passes();
    }
    let request = packet::arp(
        etherparse::ArpOperation::REQUEST,
        (site::interface(UPLINK).mac, ROUTER_MAC),
        (ROUTER_MAC, ROUTER4),
        ([0; 6], HOST4),
    );
    bench.from_uplink(UPLINK, &request).passes();
}
