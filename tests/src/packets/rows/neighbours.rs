//! Endpoints that ask for link-layer addresses: byte for byte.

use etherparse::ArpOperation;
use nucnet_common::abi::{Mac, Reason};

use super::{Row, row};
use crate::packets::{
    bench::{Bench, Frame as _},
    packet::{Packet, advertisement, arp, icmp, solicitation},
    site::{
        self, APP, BRIDGE, GATEWAY4, GATEWAY6, HOST4, HOST6, NOBODY4, NOBODY6, OTHER, WEB, address,
    },
};

pub(super) const ROWS: &[Row] = &[
    row!(arp_request_for_the_gateway_is_answered),
    row!(arp_request_for_a_sibling_is_answered_with_the_bridges_address),
    row!(arp_probe_is_answered_for_taken_addresses_only),
    row!(arp_answer_keeps_the_padding),
    row!(arp_request_for_anybody_else_is_dropped),
    row!(arp_for_the_own_address_is_discovery),
    row!(spoofed_arp_is_dropped),
    row!(arp_reply_of_an_endpoint_is_dropped),
    row!(malformed_arp_is_dropped),
    row!(solicitation_for_the_gateway_is_answered_as_a_router),
    row!(solicitation_for_a_sibling_is_answered_as_a_host),
    row!(solicitation_of_a_link_local_address_is_answered),
    row!(solicitation_without_option_is_answered_without),
    row!(unicast_solicitation_is_answered),
    row!(solicitation_for_anybody_else_is_dropped),
    row!(duplicate_address_detection_is_discovery),
    row!(spoofed_solicitation_is_dropped),
    row!(malformed_solicitation_is_dropped),
    row!(advertisement_of_an_endpoint_is_dropped),
];

const BROADCAST: Mac = [0xff; 6];

fn request(sender: (Mac, std::net::IpAddr), target: std::net::IpAddr) -> Vec<u8> {
    arp(
        ArpOperation::REQUEST,
        (BROADCAST, WEB.mac),
        sender,
        ([0; 6], target),
    )
}

fn reply(sender: std::net::IpAddr, target: std::net::IpAddr) -> Vec<u8> {
    let bridge = site::interface(BRIDGE).mac;
    arp(
        ArpOperation::REPLY,
        (WEB.mac, bridge),
        (bridge, sender),
        (WEB.mac, target),
    )
}

fn arp_request_for_the_gateway_is_answered(bench: &mut Bench<'_>) {
    bench
        .from_endpoint(&WEB, &request((WEB.mac, WEB.v4), GATEWAY4))
        .is_answered(&reply(GATEWAY4, WEB.v4));
}

fn arp_request_for_a_sibling_is_answered_with_the_bridges_address(bench: &mut Bench<'_>) {
    bench
        .from_endpoint(&WEB, &request((WEB.mac, WEB.v4), APP.v4))
        .is_answered(&reply(APP.v4, WEB.v4));
}

fn arp_probe_is_answered_for_taken_addresses_only(bench: &mut Bench<'_>) {
    let nobody = address("0.0.0.0");
    bench
        .from_endpoint(&WEB, &request((WEB.mac, nobody), APP.v4))
        .is_answered(&reply(APP.v4, nobody));
    bench
        .from_endpoint(&WEB, &request((WEB.mac, nobody), NOBODY4))
        .is_dropped(Reason::NoNeighbour);
}

fn arp_answer_keeps_the_padding(bench: &mut Bench<'_>) {
    let padded = |mut frame: Vec<u8>| {
        frame.resize(60, 0);
        frame
    };
    bench
        .from_endpoint(&WEB, &padded(request((WEB.mac, WEB.v4), GATEWAY4)))
        .is_answered(&padded(reply(GATEWAY4, WEB.v4)));
}

fn arp_request_for_anybody_else_is_dropped(bench: &mut Bench<'_>) {
    for target in [
        NOBODY4,
        OTHER.v4,
        address("10.0.43.1"),
        HOST4,
        address("0.0.0.0"),
        address("255.255.255.255"),
    ] {
        bench
            .from_endpoint(&WEB, &request((WEB.mac, WEB.v4), target))
            .is_dropped(Reason::NoNeighbour);
    }
}

fn arp_for_the_own_address_is_discovery(bench: &mut Bench<'_>) {
    for sender in [address("0.0.0.0"), WEB.v4] {
        bench
            .from_endpoint(&WEB, &request((WEB.mac, sender), WEB.v4))
            .is_dropped(Reason::Discovery);
    }
}

fn spoofed_arp_is_dropped(bench: &mut Bench<'_>) {
    bench
        .from_endpoint(&WEB, &request((APP.mac, WEB.v4), GATEWAY4))
        .is_dropped(Reason::SpoofedMac);
    for sender in [APP.v4, GATEWAY4, NOBODY4] {
        bench
            .from_endpoint(&WEB, &request((WEB.mac, sender), GATEWAY4))
            .is_dropped(Reason::SpoofedAddress);
    }
    let mut frame = request((WEB.mac, WEB.v4), GATEWAY4);
    frame[6..12].copy_from_slice(&APP.mac);
    bench
        .from_endpoint(&WEB, &frame)
        .is_dropped(Reason::SpoofedMac);
}

fn arp_reply_of_an_endpoint_is_dropped(bench: &mut Bench<'_>) {
    // Nobody asked, and nobody believes: the host's neighbours are permanent.
    let frame = arp(
        ArpOperation::REPLY,
        (WEB.gateway_mac(), WEB.mac),
        (WEB.mac, WEB.v4),
        (WEB.gateway_mac(), GATEWAY4),
    );
    bench
        .from_endpoint(&WEB, &frame)
        .is_dropped(Reason::NoNeighbour);
}

fn malformed_arp_is_dropped(bench: &mut Bench<'_>) {
    let whole = request((WEB.mac, WEB.v4), GATEWAY4);
    for frame in bench.cut_short(&whole) {
        bench
            .from_endpoint(&WEB, &frame)
            .is_dropped(Reason::Malformed);
    }
    // Hardware type, protocol type, and their lengths.
    for at in 14..20 {
        let mut frame = whole.clone();
        frame[at] ^= 0x41;
        bench
            .from_endpoint(&WEB, &frame)
            .is_dropped(Reason::Malformed);
    }
}

/// The multicast group of those whose address ends like the target's (RFC 4291 section 2.7.1).
fn group(target: std::net::IpAddr) -> std::net::IpAddr {
    let octets = nucnet_ctl::model::to_abi(target);
    let mut group = nucnet_ctl::model::to_abi(address("ff02::1:ff00:0"));
    group[13..].copy_from_slice(&octets[13..]);
    site::from_abi(&group)
}

fn from_bridge(packet: Packet) -> Vec<u8> {
    packet.framed(WEB.mac, site::interface(BRIDGE).mac)
}

const ROUTER_SOLICITED_OVERRIDE: u8 = 0xe0;
const SOLICITED_OVERRIDE: u8 = 0x60;

fn solicitation_for_the_gateway_is_answered_as_a_router(bench: &mut Bench<'_>) {
    let bridge = site::interface(BRIDGE).mac;
    let question = solicitation(WEB.v6, group(GATEWAY6), GATEWAY6, Some(WEB.mac));
    let answer = advertisement(
        ROUTER_SOLICITED_OVERRIDE,
        GATEWAY6,
        WEB.v6,
        GATEWAY6,
        Some(bridge),
    );
    bench
        .from_endpoint(&WEB, &question)
        .is_answered(&from_bridge(answer));
}

fn solicitation_for_a_sibling_is_answered_as_a_host(bench: &mut Bench<'_>) {
    let bridge = site::interface(BRIDGE).mac;
    let question = solicitation(WEB.v6, group(APP.v6), APP.v6, Some(WEB.mac));
    let answer = advertisement(SOLICITED_OVERRIDE, APP.v6, WEB.v6, APP.v6, Some(bridge));
    bench
        .from_endpoint(&WEB, &question)
        .is_answered(&from_bridge(answer));
}

fn solicitation_of_a_link_local_address_is_answered(bench: &mut Bench<'_>) {
    let bridge = site::interface(BRIDGE).mac;
    let own = address("fe80::ff:fe00:1f");
    let question = solicitation(own, group(GATEWAY6), GATEWAY6, Some(WEB.mac));
    let answer = advertisement(
        ROUTER_SOLICITED_OVERRIDE,
        GATEWAY6,
        own,
        GATEWAY6,
        Some(bridge),
    );
    bench
        .from_endpoint(&WEB, &question)
        .is_answered(&from_bridge(answer));
}

fn solicitation_without_option_is_answered_without(bench: &mut Bench<'_>) {
    let question = solicitation(WEB.v6, GATEWAY6, GATEWAY6, None);
    let answer = advertisement(ROUTER_SOLICITED_OVERRIDE, GATEWAY6, WEB.v6, GATEWAY6, None);
    bench
        .from_endpoint(&WEB, &question)
        .is_answered(&from_bridge(answer));
}

fn unicast_solicitation_is_answered(bench: &mut Bench<'_>) {
    // Whether a neighbour is still there (RFC 4861 section 7.3.3).
    let bridge = site::interface(BRIDGE).mac;
    let question = solicitation(WEB.v6, APP.v6, APP.v6, Some(WEB.mac));
    let answer = advertisement(SOLICITED_OVERRIDE, APP.v6, WEB.v6, APP.v6, Some(bridge));
    bench
        .from_endpoint(&WEB, &question)
        .is_answered(&from_bridge(answer));
}

fn solicitation_for_anybody_else_is_dropped(bench: &mut Bench<'_>) {
    for target in [
        NOBODY6,
        OTHER.v6,
        WEB.v6,
        HOST6,
        address("fe80::1"),
        address("ff02::1"),
    ] {
        bench
            .from_endpoint(
                &WEB,
                &solicitation(WEB.v6, group(target), target, Some(WEB.mac)),
            )
            .is_dropped(Reason::NoNeighbour);
    }
}

fn duplicate_address_detection_is_discovery(bench: &mut Bench<'_>) {
    for target in [WEB.v6, APP.v6, address("fe80::2")] {
        bench
            .from_endpoint(
                &WEB,
                &solicitation(address("::"), group(target), target, None),
            )
            .is_dropped(Reason::Discovery);
    }
}

fn spoofed_solicitation_is_dropped(bench: &mut Bench<'_>) {
    for source in [APP.v6, GATEWAY6, NOBODY6] {
        bench
            .from_endpoint(
                &WEB,
                &solicitation(source, group(GATEWAY6), GATEWAY6, Some(WEB.mac)),
            )
            .is_dropped(Reason::SpoofedAddress);
    }
    for at in 0..6 {
        let mut mac = WEB.mac;
        mac[at] ^= 0x10;
        bench
            .from_endpoint(
                &WEB,
                &solicitation(WEB.v6, group(GATEWAY6), GATEWAY6, Some(mac)),
            )
            .is_dropped(Reason::SpoofedMac);
    }
}

fn malformed_solicitation_is_dropped(bench: &mut Bench<'_>) {
    let question = solicitation(WEB.v6, group(GATEWAY6), GATEWAY6, Some(WEB.mac));
    // From beyond the link (RFC 4861 section 7.1.1); another option; another length of it.
    for packet in [
        question.clone().ttl(254),
        question.clone().patched_l4(24, &[2]),
        question.clone().patched_l4(25, &[2]),
    ] {
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::Malformed);
    }
    // Cut short, or too long, with lengths that agree.
    let target = nucnet_ctl::model::to_abi(GATEWAY6);
    for length in (0..33).filter(|length| ![16, 24].contains(length)) {
        let mut payload = target.to_vec();
        payload.resize(length, 1);
        let packet = icmp(WEB.v6, GATEWAY6, [135, 0, 0, 0, 0, 0, 0, 0]).payload(payload);
        bench
            .from_endpoint(&WEB, &packet.ttl(255))
            .is_dropped(Reason::Malformed);
    }
}

fn advertisement_of_an_endpoint_is_dropped(bench: &mut Bench<'_>) {
    let advertise = |from, to| advertisement(0x20, from, to, from, Some(WEB.mac));
    bench
        .from_endpoint(&WEB, &advertise(WEB.v6, APP.v6))
        .is_dropped(Reason::Protocol);
    bench
        .from_endpoint(&WEB, &advertise(WEB.v6, address("ff02::1")))
        .is_dropped(Reason::Discovery);
    bench
        .from_endpoint(&WEB, &advertise(GATEWAY6, APP.v6))
        .is_dropped(Reason::SpoofedAddress);
}
