//! What may not leave an endpoint, policy or not.

use nucnet_common::{
    abi::{Mac, Reason},
    packet::UDP,
};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::{Bench, Egress},
    packet::{icmp, tcp, udp},
    site::{self, APP, BRIDGE, SERVER4, SERVER6, WEB, address},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(foreign_link_layer_source_is_dropped),
    each_family!(foreign_source_address_is_dropped),
    each_family!(source_of_a_family_that_the_endpoint_lacks_is_dropped),
    each_family!(frame_from_an_interface_without_endpoint_is_dropped),
    each_family!(destination_that_nobody_may_have_is_dropped),
    each_family!(multicast_and_broadcast_are_dropped),
    row!(broadcast_address_of_a_subnet_is_for_the_host),
    row!(link_local_destination_is_dropped),
    row!(link_local_source_is_dropped),
    row!(redirects_and_router_advertisements_are_dropped),
    row!(answers_of_a_dhcp_server_are_dropped),
    row!(questions_of_a_dhcp_client_are_multicast_and_spoofed),
    row!(discovery_of_a_link_is_dropped_without_suspicion),
    each_family!(nothing_that_is_refused_makes_a_flow),
];

fn foreign_link_layer_source_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let packet = tcp("S", (ip.web, 5000), (ip.server, 443));
    let own = WEB.mac;
    // Wrong in each of its bytes.
    for at in 0..6 {
        let mut mac: Mac = own;
        mac[at] ^= 0x10;
        bench
            .from_endpoint(&WEB, &packet.clone().macs(WEB.gateway_mac(), mac))
            .is_dropped(Reason::SpoofedMac);
    }
}

fn foreign_source_address_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    for source in [ip.app, ip.gateway, ip.host, ip.client] {
        bench
            .from_endpoint(&WEB, &tcp("S", (source, 5000), (ip.server, 443)))
            .is_dropped(Reason::SpoofedAddress);
    }
    // Wrong in any byte: 16 of them, the last 4 for IPv4.
    let own = nucnet_ctl::model::to_abi(ip.web);
    for at in if ip.web.is_ipv4() { 12..16 } else { 0..16 } {
        let mut source = own;
        source[at] ^= 0x01;
        let source = site::from_abi(&source);
        bench
            .from_endpoint(&WEB, &tcp("S", (source, 5000), (ip.server, 443)))
            .is_dropped(Reason::SpoofedAddress);
    }
}

fn source_of_a_family_that_the_endpoint_lacks_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench.set_endpoint(&WEB, |endpoint| {
        if ip.web.is_ipv4() {
            endpoint.address4 = [0; 16];
        } else {
            endpoint.address6 = [0; 16];
        }
    });
    let unspecified = if ip.web.is_ipv4() { "0.0.0.0" } else { "::1" };
    for source in [ip.web, address(unspecified)] {
        bench
            .from_endpoint(&WEB, &tcp("S", (source, 5000), (ip.server, 443)))
            .is_dropped(Reason::SpoofedAddress);
    }
}

fn frame_from_an_interface_without_endpoint_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    bench.remove_endpoint(&WEB);
    bench
        .from_nobody(WEB.link, &tcp("S", (ip.web, 5000), (ip.server, 443)))
        .is_dropped(Reason::NoEndpoint);
}

fn destination_that_nobody_may_have_is_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let destinations: &[&str] = if ip.web.is_ipv4() {
        &[
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "127.255.0.1",
            "240.0.0.1",
            "255.0.0.1",
        ]
    } else {
        &["::", "::1"]
    };
    bench.publish(&WEB, "8080:80");
    for destination in destinations {
        bench
            .from_endpoint(
                &WEB,
                &tcp("S", (ip.web, 5000), (address(destination), 8080)),
            )
            .is_dropped(Reason::Martian);
    }
}

fn multicast_and_broadcast_are_dropped(bench: &mut Bench<'_>, ip: &Family) {
    let groups: &[&str] = if ip.web.is_ipv4() {
        &["224.0.0.251", "239.255.255.250", "255.255.255.255"]
    } else {
        &["ff02::fb", "ff05::2", "ff0e::1"]
    };
    for group in groups {
        bench
            .from_endpoint(&WEB, &udp((ip.web, 5353), (address(group), 5353)))
            .is_dropped(Reason::Multicast);
    }
}

fn broadcast_address_of_a_subnet_is_for_the_host(bench: &mut Bench<'_>) {
    // Programs are not told such addresses from the host's own, and nothing is forwarded: RFC 2644.
    for subnet in [address("10.0.42.255"), address("192.0.2.255")] {
        let packet = udp((WEB.v4, 5000), (subnet, 5353));
        bench
            .from_endpoint(&WEB, &packet)
            .reaches_host(BRIDGE, &packet);
    }
    bench.egress(&WEB, Egress::deny(&["any"]));
    let packet = udp((WEB.v4, 5000), (address("10.0.42.255"), 5353));
    bench
        .from_endpoint(&WEB, &packet)
        .is_dropped(Reason::Policy);
}

fn link_local_destination_is_dropped(bench: &mut Bench<'_>) {
    // RFC 4291 section 2.5.6: no router forwards to them.
    for destination in ["fe80::1", "febf::1"] {
        bench
            .from_endpoint(&WEB, &tcp("S", (WEB.v6, 5000), (address(destination), 80)))
            .is_dropped(Reason::LinkLocal);
    }
}

fn link_local_source_is_dropped(bench: &mut Bench<'_>) {
    bench
        .from_endpoint(&WEB, &udp((address("fe80::2"), 546), (SERVER6, 443)))
        .is_dropped(Reason::LinkLocal);
    bench
        .from_endpoint(&WEB, &udp((address("169.254.7.7"), 5000), (SERVER4, 443)))
        .is_dropped(Reason::SpoofedAddress);
}

fn redirects_and_router_advertisements_are_dropped(bench: &mut Bench<'_>) {
    bench
        .from_endpoint(&WEB, &icmp(WEB.v4, APP.v4, [5, 1, 0, 0, 10, 0, 42, 9]))
        .is_dropped(Reason::Infrastructure);
    for kind in [134, 137] {
        for (from, to) in [
            (WEB.v6, APP.v6),
            (address("fe80::2"), address("ff02::1")),
            (site::GATEWAY6, APP.v6),
        ] {
            bench
                .from_endpoint(&WEB, &icmp(from, to, [kind, 0, 0, 0, 64, 0, 7, 8]).ttl(255))
                .is_dropped(Reason::Infrastructure);
        }
    }
}

fn answers_of_a_dhcp_server_are_dropped(bench: &mut Bench<'_>) {
    for destination in [address("255.255.255.255"), APP.v4] {
        bench
            .from_endpoint(&WEB, &udp((WEB.v4, 67), (destination, 68)))
            .is_dropped(Reason::Infrastructure);
    }
    bench
        .from_endpoint(
            &WEB,
            &udp((address("fe80::2"), 547), (address("fe80::3"), 546)),
        )
        .is_dropped(Reason::Infrastructure);
    // Of the same number, but TCP: nobody's business.
    bench
        .from_endpoint(&WEB, &tcp("S", (WEB.v4, 67), (APP.v4, 5000)))
        .reaches(&APP, &tcp("S", (WEB.v4, 67), (APP.v4, 5000)));
}

fn questions_of_a_dhcp_client_are_multicast_and_spoofed(bench: &mut Bench<'_>) {
    bench
        .from_endpoint(
            &WEB,
            &udp((address("0.0.0.0"), 68), (address("255.255.255.255"), 67)),
        )
        .is_dropped(Reason::SpoofedAddress);
    bench
        .from_endpoint(
            &WEB,
            &udp((address("fe80::2"), 546), (address("ff02::1:2"), 547)),
        )
        .is_dropped(Reason::LinkLocal);
}

fn discovery_of_a_link_is_dropped_without_suspicion(bench: &mut Bench<'_>) {
    let own = address("fe80::2");
    // Router solicitation, listener report with and without its hop-by-hop header.
    bench
        .from_endpoint(
            &WEB,
            &icmp(own, address("ff02::2"), [133, 0, 0, 0, 0, 0, 0, 0]).ttl(255),
        )
        .is_dropped(Reason::Discovery);
    let report = icmp(
        address("::"),
        address("ff02::16"),
        [143, 0, 0, 0, 0, 0, 0, 1],
    )
    .ttl(1);
    bench
        .from_endpoint(&WEB, &report)
        .is_dropped(Reason::Discovery);
    bench
        .from_endpoint(&WEB, &report.extension(0))
        .is_dropped(Reason::Discovery);
}

fn nothing_that_is_refused_makes_a_flow(bench: &mut Bench<'_>, ip: &Family) {
    for packet in [
        udp((ip.app, 5000), (ip.server, 443)),
        udp((ip.web, 5000), (ip.nowhere, 443)),
        udp((ip.web, 5000), (ip.stranger, 443)),
        udp((ip.web, 5000), (ip.server, 443)).fragment(2, true),
    ] {
        let _ = bench.from_endpoint(&WEB, &packet);
        assert_eq!(bench.counts(), (0, 0));
    }
    // What the last hop ends has made one, which its sender's next packet uses.
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, 443));
    bench
        .from_endpoint(&WEB, &udp(web, server).ttl(1))
        .expires(WEB.number);
    bench.goes_out(&WEB, &udp(web, server), host);
    assert_eq!(bench.flow(UDP, web, server).packets_out, 1);
}
