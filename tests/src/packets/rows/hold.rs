//! Sockets of the host that want a port.

use std::net::IpAddr;

use nucnet_common::packet::{TCP, UDP};
use nucnet_ctl::model::{mapping::MappingSpec, publish::Protocol};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::Bench,
    site::{OTHER, WEB, address},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(published_port_is_taken_on_every_address, logic_only: NO_TEST_RUN),
    each_family!(
        port_published_on_one_address_is_taken_there_and_for_any,
        logic_only: NO_TEST_RUN
    ),
    each_family!(port_of_a_dnat_is_taken_like_a_published_one, logic_only: NO_TEST_RUN),
    each_family!(other_ports_protocols_and_port_zero_are_free, logic_only: NO_TEST_RUN),
    each_family!(socket_of_another_namespace_binds_what_it_likes, logic_only: NO_TEST_RUN),
    each_family!(control_plane_looks_whether_a_published_port_is_free, logic_only: NO_TEST_RUN),
    each_family!(
        groups_and_link_local_addresses_are_nobodys_publish,
        logic_only: NO_TEST_RUN
    ),
    row!(unspecified_ipv6_address_stands_for_ipv4_too, logic_only: NO_TEST_RUN),
    row!(without_cookies_no_port_is_held, logic_only: NO_TEST_RUN),
];

const NO_TEST_RUN: &str = "BPF_PROG_TEST_RUN takes no programs for sockets";

fn any(ip: &Family) -> IpAddr {
    address(if ip.web.is_ipv4() { "0.0.0.0" } else { "::" })
}

fn loopback(ip: &Family) -> IpAddr {
    address(if ip.web.is_ipv4() { "127.0.0.1" } else { "::1" })
}

fn published_port_is_taken_on_every_address(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080-8083:80-83");
    for at in [any(ip), loopback(ip), ip.host, ip.gateway, ip.nowhere] {
        for port in 8080..=8083 {
            assert!(!bench.host_may_bind(TCP, (at, port)), "{at} {port}");
        }
    }
}

fn port_published_on_one_address_is_taken_there_and_for_any(bench: &mut Bench<'_>, ip: &Family) {
    let at = |address: IpAddr, port: u16| match address {
        IpAddr::V4(v4) => format!("{v4}:{port}:80/udp"),
        IpAddr::V6(v6) => format!("[{v6}]:{port}:80/udp"),
    };
    bench.publish(&WEB, &at(ip.host, 5300));
    bench.publish(&OTHER, &at(loopback(ip), 5301));
    assert!(!bench.host_may_bind(UDP, (ip.host, 5300)));
    assert!(!bench.host_may_bind(UDP, (any(ip), 5300)));
    assert!(bench.host_may_bind(UDP, (loopback(ip), 5300)));
    assert!(!bench.host_may_bind(UDP, (loopback(ip), 5301)));
    assert!(!bench.host_may_bind(UDP, (any(ip), 5301)));
    assert!(bench.host_may_bind(UDP, (ip.host, 5301)));
}

fn port_of_a_dnat_is_taken_like_a_published_one(bench: &mut Bench<'_>, ip: &Family) {
    let ports = |text: &str| text.parse().expect("ports");
    let dnat = MappingSpec::dnat(
        ip.host,
        ports("8080"),
        Protocol::Tcp,
        ip.app,
        Some(80),
        None,
    );
    bench.map(1, &dnat.expect("dnat"), None, 0);
    // Only its clients' packets are a hairpin's: the host may serve everybody else.
    let hairpin = MappingSpec::hairpin(ip.host, ip.app, ports("8081"), Protocol::Tcp, None);
    bench.map(2, &hairpin.expect("hairpin"), None, 0);
    for at in [any(ip), ip.host] {
        assert!(!bench.host_may_bind(TCP, (at, 8080)), "{at}");
        assert!(bench.host_may_bind(TCP, (at, 8081)), "{at}");
        assert!(bench.host_may_bind(UDP, (at, 8080)), "{at}");
    }
    assert!(bench.host_may_bind(TCP, (loopback(ip), 8080)));
}

fn other_ports_protocols_and_port_zero_are_free(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    for (protocol, port) in [
        (TCP, 8081),
        (TCP, 80),
        (UDP, 8080),
        (TCP, 0),
        (UDP, 0),
        (132, 8080),
    ] {
        assert!(
            bench.host_may_bind(protocol, (any(ip), port)),
            "{protocol} {port}"
        );
        assert!(
            bench.host_may_bind(protocol, (ip.host, port)),
            "{protocol} {port}"
        );
    }
}

fn socket_of_another_namespace_binds_what_it_likes(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    assert!(bench.other_may_bind(TCP, (any(ip), 8080)));
}

fn control_plane_looks_whether_a_published_port_is_free(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    assert!(bench.probe_may_bind(TCP, (any(ip), 8080)));
}

fn groups_and_link_local_addresses_are_nobodys_publish(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "5353:53/udp");
    let free = if ip.web.is_ipv4() {
        ["224.0.0.251", "169.254.1.1"]
    } else {
        ["ff02::fb", "fe80::1"]
    };
    for at in free {
        assert!(bench.host_may_bind(UDP, (address(at), 5353)), "{at}");
    }
}

fn unspecified_ipv6_address_stands_for_ipv4_too(bench: &mut Bench<'_>) {
    let any = address("::");
    bench.publish(&WEB, "0.0.0.0:8080:80");
    bench.publish(&WEB, "127.0.0.1:8081:81");
    bench.publish(&WEB, "[::1]:8082:82");
    for port in [8080, 8081, 8082] {
        assert!(!bench.host_may_bind(TCP, (any, port)), "{port}");
    }
    // A socket for IPv6 alone is in nobody's way, and neither is one for IPv4 alone.
    assert!(bench.host_may_bind(TCP, (address("::1"), 8080)));
    assert!(bench.host_may_bind(TCP, (address("0.0.0.0"), 8082)));
}

fn without_cookies_no_port_is_held(bench: &mut Bench<'_>) {
    bench.publish(&WEB, "8080:80");
    bench.set(|settings| settings.netns_cookie = 0);
    assert!(bench.host_may_bind(TCP, (address("0.0.0.0"), 8080)));
}
