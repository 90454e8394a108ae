//! Guests of microVMs, which have one address inside and another outside: byte for byte.

use etherparse::ArpOperation;
use nucnet_common::abi::{Mac, Reason};
use std::net::IpAddr;

use super::{Row, row};
use crate::packets::{
    bench::Bench,
    packet::{Packet, arp, echo_reply, echo_request, icmp, ip, tcp, udp},
    site::{APP, GATEWAY4, GUEST, GUEST_GATEWAY4, GUEST4, SERVER4, SERVER6, address},
};

pub(super) const ROWS: &[Row] = &[
    row!(guest_is_known_by_the_address_of_its_slot),
    row!(guest_hears_its_own_address),
    row!(gateway_of_a_guest_is_the_host_on_its_link),
    row!(fragments_and_other_protocols_of_a_guest_are_translated_by_address),
    row!(options_of_a_guests_packet_are_stepped_over),
    row!(error_of_a_guest_quotes_what_others_sent),
    row!(error_to_a_guest_quotes_what_it_sent),
    row!(guest_with_another_address_is_left_to_the_other_programs),
    row!(guest_with_the_address_of_its_slot_is_dropped),
    row!(arp_of_a_guest_is_translated),
    row!(what_is_not_ipv4_crosses_as_it_is),
    row!(malformed_packets_of_a_guest_are_left_to_the_other_programs),
    row!(frame_beside_any_slot_is_dropped),
];

fn guest_is_known_by_the_address_of_its_slot(bench: &mut Bench<'_>) {
    let (inside, outside, server) = ((GUEST4, 5000), (GUEST.v4, 5000), (SERVER4, 443));
    for flags in ["S", "A", "FA", "R"] {
        bench
            .from_guest(&tcp(flags, inside, server))
            .crosses(&tcp(flags, outside, server));
    }
    bench
        .from_guest(&udp(inside, server))
        .crosses(&udp(outside, server));
    bench
        .from_guest(&udp(inside, server).without_checksum())
        .crosses(&udp(outside, server).without_checksum());
    bench
        .from_guest(&echo_request(GUEST4, SERVER4, 7))
        .crosses(&echo_request(GUEST.v4, SERVER4, 7));
    // The slot is a wire: nothing on it counts as a hop.
    bench
        .from_guest(&udp(inside, server).ttl(1))
        .crosses(&udp(outside, server).ttl(1));
}

fn guest_hears_its_own_address(bench: &mut Bench<'_>) {
    let (inside, outside, server) = ((GUEST4, 5000), (GUEST.v4, 5000), (SERVER4, 443));
    for (sent, seen) in [
        (tcp("SA", server, outside), tcp("SA", server, inside)),
        (udp(server, outside), udp(server, inside)),
        (
            udp(server, outside).without_checksum(),
            udp(server, inside).without_checksum(),
        ),
        (
            echo_reply(SERVER4, GUEST.v4, 7),
            echo_reply(SERVER4, GUEST4, 7),
        ),
    ] {
        bench.to_guest(&sent).crosses(&seen);
    }
}

fn gateway_of_a_guest_is_the_host_on_its_link(bench: &mut Bench<'_>) {
    bench
        .from_guest(&echo_request(GUEST4, GUEST_GATEWAY4, 7))
        .crosses(&echo_request(GUEST.v4, GATEWAY4, 7));
    bench
        .to_guest(&echo_reply(GATEWAY4, GUEST.v4, 7))
        .crosses(&echo_reply(GUEST_GATEWAY4, GUEST4, 7));
    // A client on the host's loopback is seen as the gateway.
    bench
        .to_guest(&tcp("S", (GATEWAY4, 40_000), (GUEST.v4, 80)))
        .crosses(&tcp("S", (GUEST_GATEWAY4, 40_000), (GUEST4, 80)));
}

fn fragments_and_other_protocols_of_a_guest_are_translated_by_address(bench: &mut Bench<'_>) {
    let later = |from, to| ip(from, to, 17).fragment(185, false);
    bench
        .from_guest(&later(GUEST4, SERVER4))
        .crosses(&later(GUEST.v4, SERVER4));
    bench
        .to_guest(&later(SERVER4, GUEST.v4))
        .crosses(&later(SERVER4, GUEST4));
    // A first fragment has the checksum of the whole.
    let first = |from: IpAddr| udp((from, 5000), (SERVER4, 53)).fragment(0, true);
    bench.from_guest(&first(GUEST4)).crosses(&first(GUEST.v4));
    let gre = |from, to| ip(from, to, 47);
    bench
        .from_guest(&gre(GUEST4, SERVER4))
        .crosses(&gre(GUEST.v4, SERVER4));
}

fn options_of_a_guests_packet_are_stepped_over(bench: &mut Bench<'_>) {
    // Router alert.
    let options = [0x94, 4, 0, 0];
    bench
        .from_guest(&udp((GUEST4, 5000), (SERVER4, 53)).options(&options))
        .crosses(&udp((GUEST.v4, 5000), (SERVER4, 53)).options(&options));
}

/// "Port unreachable" about a packet.
fn about(from: IpAddr, to: IpAddr, quoted: &Packet) -> Packet {
    icmp(from, to, [3, 3, 0, 0, 0, 0, 0, 0]).payload(quoted.bytes())
}

fn error_of_a_guest_quotes_what_others_sent(bench: &mut Bench<'_>) {
    let (inside, outside, client) = ((GUEST4, 5000), (GUEST.v4, 5000), (SERVER4, 53));
    bench
        .from_guest(&about(GUEST4, SERVER4, &udp(client, inside)))
        .crosses(&about(GUEST.v4, SERVER4, &udp(client, outside)));
    // About what the gateway sent.
    bench
        .from_guest(&about(
            GUEST4,
            GUEST_GATEWAY4,
            &tcp("S", (GUEST_GATEWAY4, 40_000), inside),
        ))
        .crosses(&about(
            GUEST.v4,
            GATEWAY4,
            &tcp("S", (GATEWAY4, 40_000), outside),
        ));
}

fn error_to_a_guest_quotes_what_it_sent(bench: &mut Bench<'_>) {
    let (inside, outside, server) = ((GUEST4, 5000), (GUEST.v4, 5000), (SERVER4, 443));
    for router in [SERVER4, APP.v4] {
        bench
            .to_guest(&about(router, GUEST.v4, &tcp("S", outside, server)))
            .crosses(&about(router, GUEST4, &tcp("S", inside, server)));
    }
    // Its gateway reports, as traceroute wants it.
    bench
        .to_guest(&about(GATEWAY4, GUEST.v4, &udp(outside, server)))
        .crosses(&about(GUEST_GATEWAY4, GUEST4, &udp(inside, server)));
}

fn guest_with_another_address_is_left_to_the_other_programs(bench: &mut Bench<'_>) {
    for source in [APP.v4, address("10.9.8.7"), address("0.0.0.0")] {
        let forged = udp((source, 5000), (SERVER4, 53));
        bench.from_guest(&forged).crosses(&forged);
    }
    // Nor can it be its gateway: nobody's packets come from that but the host's.
    bench
        .from_guest(&udp((GUEST_GATEWAY4, 5000), (SERVER4, 53)))
        .crosses(&udp((GATEWAY4, 5000), (SERVER4, 53)));
}

fn guest_with_the_address_of_its_slot_is_dropped(bench: &mut Bench<'_>) {
    // Nobody could tell it from the guest's own, translated.
    bench
        .from_guest(&udp((GUEST.v4, 5000), (SERVER4, 53)))
        .is_dropped(Reason::SpoofedAddress);
}

fn arp_of_a_guest_is_translated(bench: &mut Bench<'_>) {
    const NOBODY: Mac = [0; 6];
    let (guest, gateway) = (GUEST.mac, GUEST.gateway_mac());
    let request = |sender, target| {
        let macs = ([0xff; 6], guest);
        arp(
            ArpOperation::REQUEST,
            macs,
            (guest, sender),
            (NOBODY, target),
        )
    };
    bench
        .from_guest(&request(GUEST4, GUEST_GATEWAY4))
        .crosses(&request(GUEST.v4, GATEWAY4));
    // It asks whether somebody has its address.
    bench
        .from_guest(&request(address("0.0.0.0"), GUEST4))
        .crosses(&request(address("0.0.0.0"), GUEST.v4));
    bench
        .from_guest(&request(APP.v4, GUEST_GATEWAY4))
        .crosses(&request(APP.v4, GATEWAY4));
    let reply = |sender, target| {
        let macs = (guest, gateway);
        arp(
            ArpOperation::REPLY,
            macs,
            (gateway, sender),
            (guest, target),
        )
    };
    bench
        .to_guest(&reply(GATEWAY4, GUEST.v4))
        .crosses(&reply(GUEST_GATEWAY4, GUEST4));
}

fn what_is_not_ipv4_crosses_as_it_is(bench: &mut Bench<'_>) {
    let v6 = udp((GUEST.v6, 5000), (SERVER6, 53));
    bench.from_guest(&v6).crosses(&v6);
    let mut other = vec![0; 60];
    other[12..14].copy_from_slice(&[0x88, 0xcc]);
    bench.from_guest(&other).crosses(&other);
    bench.to_guest(&other).crosses(&other);
}

fn malformed_packets_of_a_guest_are_left_to_the_other_programs(bench: &mut Bench<'_>) {
    let short = udp((GUEST4, 5000), (SERVER4, 53)).patched(0, &[0x44]);
    bench.from_guest(&short).crosses(&short);
}

fn frame_beside_any_slot_is_dropped(bench: &mut Bench<'_>) {
    bench
        .beside_slots(&udp((GUEST4, 5000), (SERVER4, 53)))
        .is_dropped(Reason::NoEndpoint);
}
