//! Policies that answer what they deny.

use std::net::IpAddr;

use nucnet_common::abi::{EventKind, Reason};
use nucnet_ctl::model::policy::Action;

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::{Bench, Egress},
    packet::{ACKNOWLEDGEMENT, Packet, SEQUENCE, echo_reply, echo_request, icmp, reset, tcp, udp},
    site::{APP, SLOT, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(denied_connect_is_reset_as_if_nobody_listened),
    each_family!(denied_datagram_and_echo_request_are_answered_by_an_error),
    each_family!(reset_comes_from_whom_was_asked),
    each_family!(tap_gets_its_resets_too),
    each_family!(connection_that_a_new_policy_ends_is_reset),
    each_family!(connection_whose_peer_found_out_first_is_reset),
    each_family!(datagrams_of_a_flow_that_a_new_policy_ends_are_answered),
    each_family!(kept_connection_is_not_reset),
    each_family!(train_of_segments_gets_one_reset),
    each_family!(bytes_after_the_packet_do_not_count),
    row!(options_and_extension_headers_are_stepped_over),
    each_family!(reset_is_never_answered),
    each_family!(error_is_never_answered),
    each_family!(stray_echo_reply_is_not_answered),
    each_family!(later_fragment_is_not_answered),
    each_family!(frame_for_many_is_not_answered),
    each_family!(segment_of_no_flow_to_where_it_may_go_is_not_answered),
    each_family!(peer_of_a_denied_flow_is_told_nothing),
    each_family!(sibling_that_answers_a_denied_flow_is_told_nothing),
    each_family!(policy_that_does_not_reject_answers_nothing),
    each_family!(resets_have_no_limit),
    each_family!(
        errors_have_a_limit_of_their_own,
        logic_only: "the clock of the programs does not stop"
    ),
    each_family!(answered_packet_is_told_to_monitors_as_before),
];

/// Bytes of payload that packets have unless they are given another.
const PAYLOAD: u32 = 38;

fn deny_all(bench: &mut Bench<'_>) {
    let deny = Egress {
        default: Some(Action::Deny),
        ..Egress::default()
    };
    bench.egress(&WEB, deny.rejecting());
}

/// The reset for a segment that acknowledges something.
fn to_acknowledgement(from: (IpAddr, u16), to: (IpAddr, u16)) -> Packet {
    reset(from, to, ACKNOWLEDGEMENT, None)
}

/// The reset for a segment that does not, and takes so much of the sequence space.
fn to_sequence(from: (IpAddr, u16), to: (IpAddr, u16), length: u32) -> Packet {
    reset(from, to, 0, Some(SEQUENCE + length))
}

fn denied_connect_is_reset_as_if_nobody_listened(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    for (segment, length) in [
        (tcp("S", web, server).payload([]), 1),
        // Data in the first segment (RFC 7413).
        (tcp("S", web, server), 1 + PAYLOAD),
        (tcp("S", web, server).payload(vec![0xa5; 1400]), 1401),
        (tcp("SF", web, server).payload("x"), 3),
    ] {
        bench
            .from_endpoint(&WEB, &segment)
            .is_reset(Reason::Policy, &to_sequence(server, web, length));
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn denied_datagram_and_echo_request_are_answered_by_an_error(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    for packet in [
        udp(web, server),
        udp(web, server).without_checksum(),
        udp(web, server).payload([]),
        udp(web, server).payload(vec![0xa5; 1400]),
        udp(web, server).fragment(0, true),
        echo_request(ip.web, ip.server, 7),
    ] {
        bench
            .from_endpoint(&WEB, &packet)
            .is_refused(Reason::Policy);
    }
    assert_eq!(bench.counts(), (0, 0));
}

fn reset_comes_from_whom_was_asked(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&APP, "8080:80");
    deny_all(bench);
    let web = (ip.web, 5000);
    let asked = |bench: &mut Bench<'_>, peer| {
        bench
            .from_endpoint(&WEB, &tcp("S", web, peer))
            .is_reset(Reason::Policy, &to_sequence(peer, web, 1 + PAYLOAD));
    };
    for peer in [ip.server, ip.nowhere, ip.app, ip.gateway, ip.host] {
        asked(bench, (peer, 8080));
    }
    // Where the packet would really go is none of the sender's business.
    let real = match ip.app {
        IpAddr::V4(v4) => format!("{v4}:80"),
        IpAddr::V6(v6) => format!("[{v6}]:80"),
    };
    bench.egress(&WEB, Egress::deny(&[&real]).rejecting());
    asked(bench, (ip.host, 8080));
}

fn tap_gets_its_resets_too(bench: &mut Bench<'_>, ip: &Family) {
    let (slot, server) = ((ip.slot, 5000), (ip.server, 443));
    bench.egress(&SLOT, Egress::deny(&["any"]).rejecting());
    bench
        .from_endpoint(&SLOT, &tcp("S", slot, server))
        .is_reset(Reason::Policy, &to_sequence(server, slot, 1 + PAYLOAD));
}

/// A connection to the server, both sides of which have spoken.
fn connect(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench.comes_in(&tcp("SA", server, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("A", web, server), host);
}

fn connection_that_a_new_policy_ends_is_reset(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    connect(bench, ip);
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_reset(Reason::Policy, &to_acknowledgement(server, web));
    assert_eq!(bench.counts(), (0, 0));
    // What is on its way already, in case that the reset got lost.
    for flags in ["A", "FA", "SA"] {
        bench
            .from_endpoint(&WEB, &tcp(flags, web, server))
            .is_reset(Reason::NoFlow, &to_acknowledgement(server, web));
    }
    bench
        .from_endpoint(&WEB, &tcp("F", web, server))
        .is_reset(Reason::NoFlow, &to_sequence(server, web, 1 + PAYLOAD));
}

fn connection_whose_peer_found_out_first_is_reset(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    connect(bench, ip);
    deny_all(bench);
    bench
        .from_uplink(UPLINK, &tcp("A", server, host))
        .is_dropped_for(WEB.number, Reason::Policy);
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_reset(Reason::NoFlow, &to_acknowledgement(server, web));
}

fn datagrams_of_a_flow_that_a_new_policy_ends_are_answered(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), host);
    deny_all(bench);
    for _ in 0..2 {
        bench
            .from_endpoint(&WEB, &udp(web, server))
            .is_refused(Reason::Policy);
    }
}

fn kept_connection_is_not_reset(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    connect(bench, ip);
    bench.egress_for_new_flows(&WEB, Egress::deny(&["any"]).rejecting());
    bench.goes_out(&WEB, &tcp("A", web, server), host);
    let other = (ip.web, 5001);
    bench
        .from_endpoint(&WEB, &tcp("S", other, server))
        .is_reset(Reason::Policy, &to_sequence(server, other, 1 + PAYLOAD));
}

fn train_of_segments_gets_one_reset(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    connect(bench, ip);
    deny_all(bench);
    bench.segment(500);
    bench
        .from_endpoint(&WEB, &tcp("A", web, server).payload(vec![0xa5; 1400]))
        .is_reset(Reason::Policy, &to_acknowledgement(server, web));
    bench
        .from_endpoint(&WEB, &udp(web, server).payload(vec![0xa5; 1400]))
        .is_refused(Reason::Policy);
}

fn bytes_after_the_packet_do_not_count(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &tcp("S", web, server).payload("x").padded(17))
        .is_reset(Reason::Policy, &to_sequence(server, web, 2));
    bench
        .from_endpoint(&WEB, &udp(web, server).payload("x").padded(17))
        .is_refused(Reason::Policy);
}

/// IPv4 options never get as far: `options_of_ipv4_are_dropped_under_a_policy`.
fn options_and_extension_headers_are_stepped_over(bench: &mut Bench<'_>) {
    const DESTINATION_OPTIONS: u8 = 60;
    let ip = &super::V6;
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &tcp("S", web, server).extension(DESTINATION_OPTIONS))
        .is_reset(Reason::Policy, &to_sequence(server, web, 1 + PAYLOAD));
    bench
        .from_endpoint(&WEB, &udp(web, server).extension(DESTINATION_OPTIONS))
        .is_refused(Reason::Policy);
    // The option that no operation follows, in the header of TCP: six words long.
    let segment = tcp("S", web, server)
        .payload([1, 1, 1, 0, b'x'])
        .patched_l4(12, &[6 << 4]);
    bench
        .from_endpoint(&WEB, &segment)
        .is_reset(Reason::Policy, &to_sequence(server, web, 2));
}

fn reset_is_never_answered(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    connect(bench, ip);
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &tcp("RA", web, server))
        .is_dropped(Reason::Policy);
    for flags in ["R", "RA", "SR"] {
        bench
            .from_endpoint(&WEB, &tcp(flags, web, server))
            .is_dropped(Reason::NoFlow);
    }
}

fn error_is_never_answered(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let start = match ip.web {
        IpAddr::V4(_) => [3, 3, 0, 0, 0, 0, 0, 0],
        IpAddr::V6(_) => [1, 4, 0, 0, 0, 0, 0, 0],
    };
    let error = icmp(ip.web, ip.server, start).payload(udp(server, web).bytes());
    bench.goes_out(&WEB, &udp(web, server), host);
    deny_all(bench);
    bench.from_endpoint(&WEB, &error).is_dropped(Reason::Policy);
    bench.from_endpoint(&WEB, &error).is_dropped(Reason::NoFlow);
}

fn stray_echo_reply_is_not_answered(bench: &mut Bench<'_>, ip: &Family) {
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &echo_reply(ip.web, ip.server, 7))
        .is_dropped(Reason::NoFlow);
}

fn later_fragment_is_not_answered(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let whole = vec![0xa5; 1600];
    let first = udp(web, server).payload(&whole[..792]).fragment(0, true);
    let later = udp(web, server).payload(&whole[..800]).fragment(100, false);
    bench.goes_out(&WEB, &first, host);
    deny_all(bench);
    bench.from_endpoint(&WEB, &later).is_dropped(Reason::Policy);
    bench
        .from_endpoint(&WEB, &later)
        .is_dropped(Reason::Fragment);
}

fn frame_for_many_is_not_answered(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    for mac in [[0xff; 6], [1, 0, 0x5e, 0, 0, 1]] {
        for packet in [tcp("S", web, server), udp(web, server)] {
            bench
                .from_endpoint(&WEB, &packet.macs(mac, WEB.mac))
                .is_dropped(Reason::Policy);
        }
    }
    let group = match ip.web {
        IpAddr::V4(_) => "224.0.0.251",
        IpAddr::V6(_) => "ff0e::fb",
    };
    let group: IpAddr = group.parse().expect("address");
    bench
        .from_endpoint(&WEB, &udp(web, (group, 5353)))
        .is_dropped(Reason::Multicast);
}

fn segment_of_no_flow_to_where_it_may_go_is_not_answered(bench: &mut Bench<'_>, ip: &Family) {
    bench.egress(&WEB, Egress::deny(&["any:25/tcp"]).rejecting());
    bench
        .from_endpoint(&WEB, &tcp("A", (ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::NoFlow);
    let (web, server) = ((ip.web, 5000), (ip.server, 25));
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_reset(Reason::NoFlow, &to_acknowledgement(server, web));
}

fn peer_of_a_denied_flow_is_told_nothing(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    for (opens, goes_on) in [
        (udp(web, server), udp(server, host)),
        (tcp("S", web, server), tcp("SA", server, host)),
    ] {
        bench.set_endpoint(&WEB, |_| {});
        bench.goes_out(&WEB, &opens, host);
        deny_all(bench);
        bench
            .from_uplink(UPLINK, &goes_on)
            .is_dropped_for(WEB.number, Reason::Policy);
    }
}

fn sibling_that_answers_a_denied_flow_is_told_nothing(bench: &mut Bench<'_>, ip: &Family) {
    let (web, app) = ((ip.web, 5000), (ip.app, 80));
    bench
        .from_endpoint(&WEB, &tcp("S", web, app))
        .reaches(&APP, &tcp("S", web, app));
    deny_all(bench);
    for reason in [Reason::Policy, Reason::NoFlow] {
        bench
            .from_endpoint(&APP, &tcp("SA", app, web))
            .is_dropped(reason);
    }
    bench
        .from_endpoint(&WEB, &tcp("A", web, app))
        .is_reset(Reason::NoFlow, &to_acknowledgement(app, web));
}

fn policy_that_does_not_reject_answers_nothing(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    bench
        .from_endpoint(&WEB, &tcp("S", web, server))
        .is_reset(Reason::Policy, &to_sequence(server, web, 1 + PAYLOAD));
    bench.egress(&WEB, Egress::deny(&["any"]));
    for packet in [
        tcp("S", web, server),
        udp(web, server),
        echo_request(ip.web, ip.server, 7),
    ] {
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::Policy);
    }
    bench
        .from_endpoint(&WEB, &tcp("A", web, server))
        .is_dropped(Reason::NoFlow);
}

fn resets_have_no_limit(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    deny_all(bench);
    for _ in 0..200 {
        bench
            .from_endpoint(&WEB, &tcp("S", web, server))
            .is_reset(Reason::Policy, &to_sequence(server, web, 1 + PAYLOAD));
    }
}

fn errors_have_a_limit_of_their_own(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    bench.egress(&WEB, Egress::deny(&["any:443"]).rejecting());
    for _ in 0..50 {
        bench
            .from_endpoint(&WEB, &udp(web, server))
            .is_refused(Reason::Policy);
    }
    bench
        .from_endpoint(&WEB, &udp(web, server))
        .is_dropped(Reason::Policy);
    bench.wait(0.01);
    bench
        .from_endpoint(&WEB, &udp(web, server))
        .is_refused(Reason::Policy);
    // Others are told as ever, and so is the endpoint about what it may send.
    bench
        .from_endpoint(&WEB, &udp(web, (ip.server, 444)).ttl(1))
        .expires(WEB.number);
    bench.egress(&APP, Egress::deny(&["any"]).rejecting());
    bench
        .from_endpoint(&APP, &udp((ip.app, 5000), server))
        .is_refused(Reason::Policy);
}

fn answered_packet_is_told_to_monitors_as_before(bench: &mut Bench<'_>, ip: &Family) {
    bench.watch();
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    let egress = Egress::deny(&["any:25/tcp", "any:443"]);
    let mut told = Vec::new();
    for egress in [egress, egress.rejecting()] {
        bench.egress(&WEB, egress);
        // Another port, for a retransmission is no news.
        let from = (ip.web, web.1 + told.len() as u16);
        let sent = bench.from_endpoint(&WEB, &tcp("S", from, server));
        assert_eq!(sent.was_told(), egress.reject);
        let mut event = bench.only_event();
        assert_eq!((event.kind, event.rule), (EventKind::Denied as u32, 2));
        assert_eq!((event.source_port, event.destination_port), (from.1, 443));
        (event.time, event.policy) = (0, 0);
        (event.source_port, event.nat_source_port) = (0, 0);
        told.push(event);
    }
    assert_eq!(told[0], told[1]);
}
