//! What is too long, and how its sender learns of it.

use std::net::IpAddr;

use super::{Family, Row, V4, each_family, row};
use crate::packets::{
    bench::Bench,
    packet::{Packet, icmp, tcp, udp},
    site::{APP, SECOND_UPLINK, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(packet_longer_than_the_uplink_takes_is_sent_back),
    each_family!(unit_of_an_uplink_that_changes_is_seen_within_a_second),
    each_family!(reply_of_a_publish_obeys_the_uplink_too),
    each_family!(packet_longer_than_the_endpoint_takes_is_sent_back),
    each_family!(packet_longer_than_a_sibling_takes_is_sent_back),
    each_family!(packet_of_the_host_longer_than_the_endpoint_takes_is_sent_back),
    each_family!(train_of_segments_that_fit_passes),
    each_family!(train_of_segments_that_do_not_fit_is_sent_back),
    row!(datagram_that_may_be_cut_is_sent_back_all_the_same),
    each_family!(
        unit_of_the_uplink_counts_where_the_kernel_does_not_say,
        logic_only: "the routes are the kernel's"
    ),
    each_family!(longest_error_fits_everywhere),
];

/// A datagram whose IP packet has that many bytes.
fn sized(length: usize, from: (IpAddr, u16), to: (IpAddr, u16)) -> Packet {
    let headers = if from.0.is_ipv4() { 28 } else { 48 };
    udp(from, to).payload(vec![0x5a; length - headers])
}

fn packet_longer_than_the_uplink_takes_is_sent_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.mtu(UPLINK, 1400);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    // The first packet of the flow, and later ones.
    for _ in 0..2 {
        bench
            .from_endpoint(&WEB, &sized(1401, web, server))
            .exceeds(WEB.number, 1400);
    }
    bench.from_endpoint(&WEB, &sized(1400, web, server)).leaves(
        UPLINK,
        ip.router,
        &sized(1400, host, server).ttl(63),
    );
    bench
        .from_endpoint(&WEB, &sized(1401, web, server))
        .exceeds(WEB.number, 1400);
}

fn unit_of_an_uplink_that_changes_is_seen_within_a_second(bench: &mut Bench<'_>, ip: &Family) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    let (long, seen) = (sized(1500, web, server), sized(1500, host, server).ttl(63));
    bench
        .from_endpoint(&WEB, &long)
        .leaves(UPLINK, ip.router, &seen);
    bench.mtu(UPLINK, 1300);
    bench.wait(1.0);
    bench.from_endpoint(&WEB, &long).exceeds(WEB.number, 1300);
    bench.mtu(UPLINK, 1500);
    bench.wait(1.0);
    bench
        .from_endpoint(&WEB, &long)
        .leaves(UPLINK, ip.router, &seen);
}

fn reply_of_a_publish_obeys_the_uplink_too(bench: &mut Bench<'_>, ip: &Family) {
    bench.mtu(UPLINK, 1400);
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&udp(client, host), &WEB, web);
    bench
        .from_endpoint(&WEB, &sized(1401, web, client))
        .exceeds(WEB.number, 1400);
    bench.from_endpoint(&WEB, &sized(1400, web, client)).leaves(
        UPLINK,
        ip.router,
        &sized(1400, host, client).ttl(63),
    );
    // And by the uplink that it came in by, where the kernel would take another.
    let (host, client) = ((ip.host, 8080), (ip.client, 40_001));
    bench
        .from_uplink(SECOND_UPLINK, &udp(client, host))
        .reaches(&WEB, &udp(client, web).ttl(63));
    bench
        .from_endpoint(&WEB, &sized(1501, web, client))
        .exceeds(WEB.number, 1500);
}

fn packet_longer_than_the_endpoint_takes_is_sent_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_endpoint(&WEB, |endpoint| endpoint.mtu = 1300);
    bench.publish(&WEB, "8080:80/udp");
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench
        .from_uplink(UPLINK, &sized(1301, client, host))
        .exceeds(WEB.number, 1300);
    bench
        .from_uplink(UPLINK, &sized(1300, client, host))
        .reaches(&WEB, &sized(1300, client, web).ttl(63));
}

fn packet_longer_than_a_sibling_takes_is_sent_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_endpoint(&WEB, |endpoint| endpoint.mtu = 1300);
    let (app, web) = ((ip.app, 5000), (ip.web, 80));
    bench
        .from_endpoint(&APP, &sized(1301, app, web))
        .exceeds(APP.number, 1300);
    bench
        .from_endpoint(&APP, &sized(1300, app, web))
        .reaches(&WEB, &sized(1300, app, web));
    // The other way round, too.
    bench.set_endpoint(&APP, |endpoint| endpoint.mtu = 1280);
    bench
        .from_endpoint(&WEB, &sized(1281, web, app))
        .exceeds(WEB.number, 1280);
}

fn packet_of_the_host_longer_than_the_endpoint_takes_is_sent_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.set_endpoint(&WEB, |endpoint| endpoint.mtu = 1300);
    let (gateway, web) = ((ip.gateway, 45_000), (ip.web, 80));
    bench
        .from_host(&WEB, &sized(1301, gateway, web))
        .exceeds(WEB.number, 1300);
    assert_eq!(bench.counts(), (0, 0));
    bench
        .from_host(&WEB, &sized(1300, gateway, web))
        .is_put_through(&WEB, &sized(1300, gateway, web));
}

/// What the headers of a segment or datagram take of the unit.
fn headers(ip: &Family, carried: u32) -> u32 {
    carried + if ip.web.is_ipv4() { 20 } else { 40 }
}

fn train_of_segments_that_fit_passes(bench: &mut Bench<'_>, ip: &Family) {
    bench.mtu(UPLINK, 1300);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.segment(1300 - headers(ip, 20));
    let train = |from| tcp("A", from, server).payload(vec![0x5a; 3000]);
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench
        .from_endpoint(&WEB, &train(web))
        .leaves(UPLINK, ip.router, &train(host).ttl(63));
    bench.segment(1300 - headers(ip, 8));
    let train = |from| udp(from, server).payload(vec![0x5a; 3000]);
    bench
        .from_endpoint(&WEB, &train(web))
        .leaves(UPLINK, ip.router, &train(host).ttl(63));
}

fn train_of_segments_that_do_not_fit_is_sent_back(bench: &mut Bench<'_>, ip: &Family) {
    bench.mtu(UPLINK, 1300);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &tcp("S", web, server), host);
    bench.segment(1301 - headers(ip, 20));
    bench
        .from_endpoint(&WEB, &tcp("A", web, server).payload(vec![0x5a; 3000]))
        .exceeds(WEB.number, 1300);
    bench.segment(1301 - headers(ip, 8));
    bench
        .from_endpoint(&WEB, &udp(web, server).payload(vec![0x5a; 3000]))
        .exceeds(WEB.number, 1300);
}

fn datagram_that_may_be_cut_is_sent_back_all_the_same(bench: &mut Bench<'_>) {
    bench.mtu(UPLINK, 1400);
    let datagram = sized(1401, (WEB.v4, 5000), (V4.server, 443));
    bench
        .from_endpoint(&WEB, &datagram.patched(6, &[0, 0]))
        .exceeds(WEB.number, 1400);
}

fn unit_of_the_uplink_counts_where_the_kernel_does_not_say(bench: &mut Bench<'_>, ip: &Family) {
    bench.hide_mtus();
    bench.set_uplink(UPLINK, |uplink| uplink.mtu = 1400);
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench
        .from_endpoint(&WEB, &sized(1401, web, server))
        .exceeds(WEB.number, 1400);
    // Neither says.
    bench.set_uplink(UPLINK, |uplink| uplink.mtu = 0);
    bench.wait(1.0);
    bench.from_endpoint(&WEB, &sized(1401, web, server)).leaves(
        UPLINK,
        ip.router,
        &sized(1401, host, server).ttl(63),
    );
}

fn longest_error_fits_everywhere(bench: &mut Bench<'_>, ip: &Family) {
    // Errors are carried whatever the unit: they are no longer than every link takes.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench.from_endpoint(&WEB, &sized(1232, web, server)).leaves(
        UPLINK,
        ip.router,
        &sized(1232, host, server).ttl(63),
    );
    bench.set_endpoint(&WEB, |endpoint| endpoint.mtu = 1280);
    let error = |to, quoted: Packet| {
        let start = if ip.web.is_ipv4() {
            [3, 4, 0, 0, 0, 0, 5, 0]
        } else {
            [2, 0, 0, 0, 0, 0, 5, 0]
        };
        icmp(ip.router, to, start).payload(quoted.bytes())
    };
    bench
        .from_uplink(UPLINK, &error(ip.host, sized(1232, host, server)))
        .reaches(&WEB, &error(ip.web, sized(1232, web, server)).ttl(63));
}
