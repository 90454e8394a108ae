//! The host and its endpoints.

use etherparse::ArpOperation;
use nucnet_common::{
    abi::{PeerKind, Reason},
    packet::TCP,
};

use super::{Family, Row, V4, V6, each_family, row};
use crate::packets::{
    bench::Bench,
    packet::{arp, echo_reply, echo_request, icmp, tcp, udp},
    site::{self, APP, BRIDGE, GATEWAY4, OTHER, SLOT, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(connection_of_the_host_reaches_the_endpoint_and_its_replies_come_back),
    each_family!(host_sends_datagrams_and_echo_requests),
    each_family!(host_reaches_a_microvm),
    each_family!(host_is_no_router_on_the_way_to_its_endpoints),
    each_family!(wrong_link_layer_address_of_a_neighbour_entry_is_mended),
    each_family!(connection_of_an_endpoint_reaches_the_host_and_its_replies_come_back),
    each_family!(every_address_of_the_host_is_the_host),
    each_family!(reply_of_an_endpoint_that_the_host_did_not_ask_is_dropped),
    each_family!(segment_of_the_host_without_flow_goes_through),
    each_family!(host_is_not_taken_for_the_publish_that_an_endpoint_asked_under_its_address),
    each_family!(icmp_error_of_the_host_goes_through_without_flow),
    each_family!(address_that_nobody_has_is_dropped_at_the_bridge),
    each_family!(packet_that_the_hosts_stack_forwards_is_dropped),
    each_family!(other_protocols_of_the_host_are_dropped),
    each_family!(endpoint_that_is_being_removed_is_not_reached),
    row!(multicast_of_the_host_is_dropped),
    row!(arp_request_of_the_host_is_dropped),
    row!(frame_of_the_host_that_is_not_ip_is_dropped),
];

fn connection_of_the_host_reaches_the_endpoint_and_its_replies_come_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 80));
    bench
        .from_host(&WEB, &tcp("S", gateway, web))
        .is_put_through(&WEB, &tcp("S", gateway, web));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, gateway))
        .reaches_host(BRIDGE, &tcp("SA", web, gateway));
    bench
        .from_host(&WEB, &tcp("A", gateway, web))
        .is_put_through(&WEB, &tcp("A", gateway, web));
    let flow = bench.flow(TCP, web, gateway);
    assert_eq!(flow.peer_kind, PeerKind::Host as u32);
    assert_eq!((flow.packets_in, flow.packets_out), (2, 1));
    assert_eq!(bench.counts(), (1, 0));
}

fn host_sends_datagrams_and_echo_requests(bench: &mut Bench<'_>, ip: &Family) {
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 53));
    bench
        .from_host(&WEB, &udp(gateway, web))
        .is_put_through(&WEB, &udp(gateway, web));
    bench
        .from_endpoint(&WEB, &udp(web, gateway))
        .reaches_host(BRIDGE, &udp(web, gateway));
    bench
        .from_host(&WEB, &echo_request(ip.gateway, ip.web, 9))
        .is_put_through(&WEB, &echo_request(ip.gateway, ip.web, 9));
    bench
        .from_endpoint(&WEB, &echo_reply(ip.web, ip.gateway, 9))
        .reaches_host(BRIDGE, &echo_reply(ip.web, ip.gateway, 9));
    assert_eq!(bench.counts(), (2, 0));
}

fn host_reaches_a_microvm(bench: &mut Bench<'_>, ip: &Family) {
    let (gateway, slot) = ((ip.gateway, 45_000), (ip.slot, 80));
    bench
        .from_host(&SLOT, &tcp("S", gateway, slot))
        .is_put_through(&SLOT, &tcp("S", gateway, slot));
    bench
        .from_endpoint(&SLOT, &tcp("SA", slot, gateway))
        .reaches_host(BRIDGE, &tcp("SA", slot, gateway));
}

fn host_is_no_router_on_the_way_to_its_endpoints(bench: &mut Bench<'_>, ip: &Family) {
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 80));
    bench
        .from_host(&WEB, &tcp("S", gateway, web).ttl(1))
        .is_put_through(&WEB, &tcp("S", gateway, web).ttl(1));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, gateway).ttl(1))
        .reaches_host(BRIDGE, &tcp("SA", web, gateway).ttl(1));
}

fn wrong_link_layer_address_of_a_neighbour_entry_is_mended(bench: &mut Bench<'_>, ip: &Family) {
    let packet = tcp("S", (ip.gateway, 45_000), (ip.web, 80));
    bench
        .from_host(
            &WEB,
            &packet.clone().macs([2, 9, 9, 9, 9, 9], [2, 8, 8, 8, 8, 8]),
        )
        .is_put_through(&WEB, &packet);
}

fn connection_of_an_endpoint_reaches_the_host_and_its_replies_come_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (web, gateway) = ((ip.web, 5000), (ip.gateway, 22));
    bench
        .from_endpoint(&WEB, &tcp("S", web, gateway))
        .reaches_host(BRIDGE, &tcp("S", web, gateway));
    bench
        .from_host(&WEB, &tcp("SA", gateway, web))
        .is_put_through(&WEB, &tcp("SA", gateway, web));
    bench
        .from_endpoint(&WEB, &tcp("A", web, gateway))
        .reaches_host(BRIDGE, &tcp("A", web, gateway));
    let flow = bench.flow(TCP, web, gateway);
    assert_eq!((flow.packets_out, flow.packets_in), (2, 1));
    assert_eq!(bench.counts(), (1, 0));
}

fn every_address_of_the_host_is_the_host(bench: &mut Bench<'_>, ip: &Family) {
    let web = (ip.web, 5000);
    for address in [ip.host, ip.gateway] {
        bench
            .from_endpoint(&WEB, &udp(web, (address, 53)))
            .reaches_host(BRIDGE, &udp(web, (address, 53)));
    }
}

fn reply_of_an_endpoint_that_the_host_did_not_ask_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .from_endpoint(&WEB, &tcp("SA", (ip.web, 80), (ip.gateway, 45_000)))
        .is_dropped(Reason::NoFlow);
    bench
        .from_endpoint(&WEB, &echo_reply(ip.web, ip.gateway, 9))
        .is_dropped(Reason::NoFlow);
}

fn segment_of_the_host_without_flow_goes_through(bench: &mut Bench<'_>, ip: &Family) {
    // The host is trusted; a connection from before the programs were there dies by the reset
    // of the endpoint's own.
    let packet = tcp("A", (ip.gateway, 45_000), (ip.web, 80));
    bench.from_host(&WEB, &packet).is_put_through(&WEB, &packet);
    assert_eq!(bench.counts(), (0, 0));
}

fn host_is_not_taken_for_the_publish_that_an_endpoint_asked_under_its_address(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&APP, "8080:80/udp");
    let (web, gateway, app) = ((ip.web, 5000), (ip.gateway, 8080), (ip.app, 80));
    bench
        .from_endpoint(&WEB, &udp(web, gateway))
        .reaches(&APP, &udp(web, app).ttl(63));
    bench
        .from_host(&WEB, &udp(gateway, web))
        .is_dropped_for(WEB.number, Reason::PortsExhausted);
    assert_eq!(bench.counts(), (1, 0));
    // Once that is over, it is the host's.
    bench.wait(60.0);
    bench
        .from_host(&WEB, &udp(gateway, web))
        .is_put_through(&WEB, &udp(gateway, web));
    bench
        .from_endpoint(&WEB, &udp(web, gateway))
        .reaches_host(BRIDGE, &udp(web, gateway));
}

fn icmp_error_of_the_host_goes_through_without_flow(bench: &mut Bench<'_>, ip: &Family) {
    let kind = if ip.web.is_ipv4() { 3 } else { 1 };
    let packet = icmp(ip.gateway, ip.web, [kind, 3, 0, 0, 0, 0, 0, 0]);
    bench.from_host(&WEB, &packet).is_put_through(&WEB, &packet);
    assert_eq!(bench.counts(), (0, 0));
}

fn address_that_nobody_has_is_dropped_at_the_bridge(bench: &mut Bench<'_>, ip: &Family) {
    let packet = tcp("S", (ip.gateway, 45_000), (ip.nobody, 80));
    bench
        .from_host(&WEB, &packet)
        .is_dropped_for(0, Reason::NoSuchAddress);
}

fn packet_that_the_hosts_stack_forwards_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let packet = tcp("S", (ip.client, 40_000), (ip.web, 80));
    bench
        .forwarded(&WEB, &packet, UPLINK)
        .is_dropped(Reason::NotPublished);
    assert_eq!(bench.counts(), (0, 0));
}

fn other_protocols_of_the_host_are_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .from_host(&WEB, &crate::packets::packet::ip(ip.gateway, ip.web, 47))
        .is_dropped(Reason::Protocol);
}

fn endpoint_that_is_being_removed_is_not_reached(bench: &mut Bench<'_>, ip: &Family) {
    bench.remove_endpoint(&WEB);
    bench
        .from_host(&WEB, &tcp("S", (ip.gateway, 45_000), (ip.web, 80)))
        .is_dropped(Reason::NoEndpoint);
}

fn multicast_of_the_host_is_dropped(bench: &mut Bench<'_>) {
    for (ip, group) in [
        (&V4, "224.0.0.251"),
        (&V4, "255.255.255.255"),
        (&V6, "ff02::fb"),
    ] {
        bench
            .from_host(&WEB, &udp((ip.gateway, 5353), (site::address(group), 5353)))
            .is_dropped_for(0, Reason::Multicast);
    }
}

fn arp_request_of_the_host_is_dropped(bench: &mut Bench<'_>) {
    let request = arp(
        ArpOperation::REQUEST,
        ([0xff; 6], OTHER.gateway_mac()),
        (WEB.gateway_mac(), GATEWAY4),
        ([0; 6], WEB.v4),
    );
    bench
        .from_host(&WEB, &request)
        .is_dropped_for(0, Reason::NoNeighbour);
}

fn frame_of_the_host_that_is_not_ip_is_dropped(bench: &mut Bench<'_>) {
    let mut frame = crate::packets::packet::ethernet(WEB.mac, WEB.gateway_mac(), 0x88cc).to_vec();
    frame.resize(60, 0);
    bench
        .from_host(&WEB, &frame)
        .is_dropped_for(0, Reason::NotIp);
}
