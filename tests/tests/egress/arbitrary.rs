//! Random policies and destinations: few addresses, so that prefixes nest and packets meet rules;
//! few ports, so that ranges overlap.

use std::net::IpAddr;

use nucnet_common::packet::{ICMP, ICMPV6, TCP, UDP};
use nucnet_ctl::model::{
    policy::{Action, Policy, Resolver},
    preset::Preset,
    rule::Rule,
};
use nucnet_tests::packets::site::{self, APP, OTHER, WEB};
use proptest::prelude::*;

use crate::reference::Asked;

/// The host port that leads to APP's port 80.
pub(crate) const PUBLISHED: u16 = 8080;

/// Addresses that packets may have as a destination: neither martian nor IPv6 link-local.
fn destinations() -> Vec<IpAddr> {
    let elsewhere = [
        "1.1.1.1",
        "1.1.1.2",
        "9.255.255.255",
        "10.0.42.254",
        "10.0.43.7",
        "10.1.2.3",
        "11.0.0.0",
        "100.64.0.1",
        "127.255.255.255",
        "128.0.0.0",
        "169.254.169.253",
        "169.254.169.254",
        "169.254.170.2",
        "172.31.255.255",
        "172.32.0.0",
        "192.168.1.1",
        "223.255.255.255",
        "2001:db8::1",
        "2001:db8:f:8000::1",
        "2001:200::1",
        "2606:4700::1111",
        "3fff:1000::1",
        "7fff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "8000::1",
        "::2",
        "::fffe:0:1",
        "64:ff9b::a00:1",
        "fc00::1",
        "fd00:ec2::254",
        "fd42::ffff",
        "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
    ];
    let elsewhere = elsewhere.iter().map(|text| text.parse().expect(text));
    let own = site::INTERFACES
        .iter()
        .flat_map(|interface| interface.addresses)
        .map(|(address, _)| *address);
    let known = [
        site::SERVER4,
        site::SERVER6,
        site::CLIENT4,
        site::CLIENT6,
        site::ROUTER4,
        site::ROUTER6,
        site::STRANGER4,
        site::STRANGER6,
        site::NOWHERE4,
        site::NOWHERE6,
        APP.v4,
        APP.v6,
        OTHER.v4,
        OTHER.v6,
        WEB.v4,
        WEB.v6,
    ];
    let loopback = |address: &IpAddr| address.is_loopback();
    let all = elsewhere.chain(own).chain(known);
    all.filter(|address| !loopback(address)).collect()
}

fn destination() -> impl Strategy<Value = IpAddr> {
    prop::sample::select(destinations())
}

/// Lengths at which addresses of the list part, the ends among them.
fn prefix() -> impl Strategy<Value = String> {
    let lengths = vec![0, 1, 2, 8, 9, 15, 16, 23, 24, 31, 32];
    let longer = vec![
        0, 1, 3, 7, 8, 16, 32, 47, 48, 63, 64, 80, 95, 96, 112, 127, 128,
    ];
    (
        destination(),
        prop::sample::select(lengths),
        prop::sample::select(longer),
    )
        .prop_map(|(address, v4, v6)| match address {
            IpAddr::V4(_) => format!("{address}/{v4}"),
            IpAddr::V6(_) => format!("[{address}/{v6}]"),
        })
}

fn port() -> impl Strategy<Value = u16> {
    prop::sample::select(vec![
        1, 22, 52, 53, 79, 80, 443, 1000, PUBLISHED, 65_534, 65_535,
    ])
}

fn rule() -> impl Strategy<Value = Rule> {
    let range = (port(), port(), any::<bool>()).prop_map(|(a, b, single)| match single {
        true => a.to_string(),
        false => format!("{}-{}", a.min(b), a.max(b)),
    });
    let ports = prop::collection::vec(range, 0..3).prop_map(|ranges| ranges.join(","));
    let target = prop_oneof![
        1 => Just("any".to_owned()),
        1 => Just("255.255.255.255/1".to_owned()),
        1 => Just("[ffff::/1]".to_owned()),
        6 => prefix(),
        3 => prop::sample::select(Preset::ALL.map(|preset| preset.to_string()).to_vec()),
    ];
    let protocol = prop::sample::select(vec!["", "", "/tcp", "/udp", "/icmp"]);
    (target, ports, protocol).prop_map(|(target, ports, protocol)| {
        let text = match ports.as_str() {
            "" => format!("{target}{protocol}"),
            _ if protocol == "/icmp" => format!("{target}{protocol}"),
            ports => format!("{target}:{ports}{protocol}"),
        };
        text.parse().expect(&text)
    })
}

pub(crate) fn policy() -> impl Strategy<Value = Policy> {
    let default = prop::option::of(prop::sample::select(vec![Action::Allow, Action::Deny]));
    let resolver = destination().prop_filter_map("no resolver", |address| {
        address.to_string().parse::<Resolver>().ok()
    });
    (
        default,
        prop::collection::vec(rule(), 0..6),
        prop::collection::vec(rule(), 0..4),
        prop::collection::vec(resolver, 0..2),
        prop::option::weighted(0.2, any::<bool>()),
        any::<bool>(),
    )
        .prop_map(|(default, allow, deny, dns, allow_dns, reject)| {
            let policy = Policy::new(default, allow, deny, dns).with_denied_rejected(reject);
            match allow_dns {
                Some(allowed) => policy.with_dns_allowed(allowed),
                None => policy,
            }
        })
}

/// What a packet of a flow can ask for.
pub(crate) fn asked() -> impl Strategy<Value = Asked> {
    (destination(), 0..3, port()).prop_map(|(to, protocol, port)| {
        let (protocol, port) = match (protocol, to) {
            (0, _) => (TCP, port),
            (1, _) => (UDP, port),
            (_, IpAddr::V4(_)) => (ICMP, 0),
            (_, IpAddr::V6(_)) => (ICMPV6, 0),
        };
        Asked { to, protocol, port }
    })
}
