//! What senders are told about packets that go no further.

use nucnet_common::abi::Reason;

use super::{Family, Row, each_family};
use crate::packets::{
    bench::Bench,
    packet::{echo_request, tcp, udp},
    site::{APP, SLOT, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(last_hop_of_every_kind_is_told),
    each_family!(
        last_hop_beyond_a_tunnel_is_told,
        logic_only: "BPF_PROG_TEST_RUN gives every frame an Ethernet header"
    ),
    each_family!(quote_has_all_that_fits),
    each_family!(padding_is_not_quoted),
    each_family!(
        more_than_a_burst_is_told_as_time_passes,
        logic_only: "the clock of the programs does not stop"
    ),
    each_family!(
        flood_of_one_silences_nobody_else,
        logic_only: "the clock of the programs does not stop"
    ),
];

fn last_hop_of_every_kind_is_told(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    for packet in [
        udp(web, server),
        udp(web, server).without_checksum(),
        tcp("S", web, server),
        echo_request(ip.web, ip.server, 7),
        udp(web, server).payload([]),
    ] {
        bench
            .from_endpoint(&WEB, &packet.ttl(1))
            .expires(WEB.number);
    }
    bench
        .from_uplink(
            UPLINK,
            &tcp("S", (ip.client, 40_000), (ip.host, 8080)).ttl(1),
        )
        .expires(WEB.number);
    // The reply of a sibling's publish, to the sibling.
    let (app, web) = ((ip.app, 5000), (ip.web, 80));
    bench
        .from_endpoint(&APP, &tcp("S", app, (ip.host, 8080)))
        .reaches(&WEB, &tcp("S", app, web).ttl(63));
    bench
        .from_endpoint(&WEB, &tcp("SA", web, app).ttl(1))
        .expires(WEB.number);
}

fn last_hop_beyond_a_tunnel_is_told(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&SLOT, "8080:80");
    bench
        .from_tunnel(&tcp("S", (ip.client, 40_000), (ip.host, 8080)).ttl(1))
        .expires(SLOT.number);
}

fn quote_has_all_that_fits(bench: &mut Bench<'_>, ip: &Family) {
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    for length in [1, 2, 3, 519, 520, 521, 1183, 1184, 1185, 1400] {
        bench
            .from_endpoint(&WEB, &udp(web, server).payload(vec![0xa5; length]).ttl(1))
            .expires(WEB.number);
    }
}

fn padding_is_not_quoted(bench: &mut Bench<'_>, ip: &Family) {
    bench
        .from_endpoint(
            &WEB,
            &udp((ip.web, 5000), (ip.server, 443))
                .payload("x")
                .padded(17)
                .ttl(1),
        )
        .expires(WEB.number);
}

fn more_than_a_burst_is_told_as_time_passes(bench: &mut Bench<'_>, ip: &Family) {
    bench.set(|settings| settings.flows_per_endpoint = 0);
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443));
    for _ in 0..50 {
        bench
            .from_endpoint(&WEB, &packet)
            .is_refused(Reason::FlowQuota);
    }
    for _ in 0..2 {
        bench
            .from_endpoint(&WEB, &packet)
            .is_dropped(Reason::FlowQuota);
        bench.wait(0.01);
        bench
            .from_endpoint(&WEB, &packet)
            .is_refused(Reason::FlowQuota);
    }
}

fn flood_of_one_silences_nobody_else(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let server = (ip.server, 443);
    let flood = udp((ip.web, 5000), server).ttl(1);
    while bench.from_endpoint(&WEB, &flood).was_told() {}
    bench
        .from_endpoint(&APP, &udp((ip.app, 5000), server).ttl(1))
        .expires(APP.number);
    // Nor whoever comes from outside.
    bench
        .from_uplink(
            UPLINK,
            &tcp("S", (ip.client, 40_000), (ip.host, 8080)).ttl(1),
        )
        .expires(WEB.number);
}
