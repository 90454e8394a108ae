//! Links: veth pairs, moves, settings, and which of them are uplinks.

use std::process::Command;

use nucnet_ctl::kernel::netlink::{
    Error, Ipv6LinkLocal, Link, LinkChange, LinkType, Netlink, Port, State, VethSpec,
};
use nucnet_ctl::kernel::netns::run_in;

use super::lab::{HOST_MAC, PEER_MAC, host, namespace, need_root, net, veth};

#[test]
fn veth_is_born_in_the_container_under_its_name() {
    need_root!();
    let host = host();
    let container = namespace();
    let inside = Netlink::open_in(&container).unwrap();
    let bridge = host.bridge();
    let veth = host.netlink.create_veth(&veth(bridge, &container)).unwrap();

    let outer = host.netlink.link("nuc-a").unwrap();
    assert_eq!(outer.index, veth.index);
    assert_eq!(outer.kind.as_deref(), Some("veth"));
    assert_eq!(outer.link_type, LinkType::Ethernet);
    assert_eq!(outer.master, Some(bridge));
    assert_eq!(outer.mac, Some(HOST_MAC));
    assert_eq!(outer.mtu, 1400);
    assert_eq!(outer.owner(), Some("a"));
    assert_eq!(outer.state, State::Down);
    assert!(outer.peer_netns.is_some());
    assert_eq!(outer.port, veth.port);
    assert!(host.ip("link show nuc-a").contains("qlen 500"));

    let inner = inside.link("eth0").unwrap();
    assert_eq!(inner.index, veth.peer_index);
    assert_eq!((inner.mac, inner.mtu), (Some(PEER_MAC), 1400));
    assert_eq!(inside.links().unwrap().len(), 2, "lo and eth0");
}

#[test]
fn link_becomes_a_port_with_its_settings() {
    need_root!();
    let host = host();
    let bridge = host.bridge();
    host.ip("link add tap0 type veth peer name tap1");
    let link = host.netlink.link("tap0").unwrap().index;
    for _ in 0..2 {
        let port = host.netlink.enslave(link, bridge, Port::ENDPOINT).unwrap();
        assert_eq!(port.learning, Some(false));
        assert_eq!(port.isolated, Some(true));
    }
    let error = host
        .netlink
        .enslave(bridge, link, Port::ENDPOINT)
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "interface tap0 is not a bridge but a veth without alias"
    );
}

#[test]
fn host_side_of_a_veth_has_no_address_of_its_own() {
    need_root!();
    let host = host();
    let container = namespace();
    let inside = Netlink::open_in(&container).unwrap();
    let veth = host
        .netlink
        .create_veth(&veth(host.bridge(), &container))
        .unwrap();
    inside.set_up("eth0").unwrap();
    host.netlink.set_up(veth.index).unwrap();
    assert_eq!(host.netlink.link(veth.index).unwrap().state, State::Up);
    assert_eq!(host.netlink.addresses_of(veth.index).unwrap(), []);
}

#[test]
fn veth_that_cannot_be_made_leaves_nothing() {
    need_root!();
    let host = host();
    let container = namespace();
    let inside = Netlink::open_in(&container).unwrap();
    let bridge = host.bridge();
    let before = host.netlink.links().unwrap();

    // The container has the name.
    run_in(&container, || {
        Command::new("ip")
            .args(["link", "add", "eth0", "type", "bridge"])
            .status()
    })
    .unwrap()
    .unwrap();
    let error = host
        .netlink
        .create_veth(&veth(bridge, &container))
        .unwrap_err();
    assert!(
        matches!(&error, Error::PeerTaken { name } if name == "eth0"),
        "{error}"
    );
    assert_eq!(host.netlink.links().unwrap(), before);

    // The pair is made, but its alias is too long for the kernel.
    let long = "nucnet:".repeat(40);
    let spec = VethSpec {
        peer_name: "eth1",
        alias: &long,
        ..veth(bridge, &container)
    };
    let error = host.netlink.create_veth(&spec).unwrap_err();
    assert!(error.errno().is_some(), "{error}");
    assert_eq!(host.netlink.links().unwrap(), before);
    assert!(inside.find_link("eth1").unwrap().is_none());

    // The master is no bridge.
    let spec = VethSpec {
        peer_name: "eth1",
        ..veth(1, &container)
    };
    host.netlink.create_veth(&spec).unwrap_err();
    assert_eq!(host.netlink.links().unwrap(), before);
    assert!(inside.find_link("eth1").unwrap().is_none());

    // The host has the name.
    host.ip("link add name nuc-a type bridge");
    let error = host.netlink.create_veth(&spec).unwrap_err();
    assert!(
        matches!(&error, Error::Taken { name, .. } if name == "nuc-a"),
        "{error}"
    );
    assert!(inside.find_link("eth1").unwrap().is_none());
}

#[test]
fn link_moves_and_is_renamed_at_once_or_not_at_all() {
    need_root!();
    let host = host();
    let container = namespace();
    let inside = Netlink::open_in(&container).unwrap();
    host.ip("link add first type veth peer name second");
    host.netlink.move_link("first", &container, "eth0").unwrap();
    assert!(inside.find_link("eth0").unwrap().is_some());
    let error = host
        .netlink
        .move_link("second", &container, "eth0")
        .unwrap_err();
    assert!(
        matches!(&error, Error::PeerTaken { name } if name == "eth0"),
        "{error}"
    );
    assert!(host.netlink.find_link("second").unwrap().is_some());
    let names: Vec<_> = inside
        .links()
        .unwrap()
        .into_iter()
        .map(|link: Link| link.name)
        .collect();
    assert_eq!(names, ["lo", "eth0"]);
    let error = host
        .netlink
        .move_link("absent", &container, "eth1")
        .unwrap_err();
    assert!(matches!(error, Error::NoLink { .. }), "{error}");
}

#[test]
fn link_changes_are_made_together_and_repeatable() {
    need_root!();
    let host = host();
    host.ip("link add name a type bridge");
    host.ip("link add b-port type veth peer name b-peer");
    host.ip("link set b-port master a up");
    host.ip("link set b-peer up");
    let change = LinkChange {
        name: Some("b"),
        mac: Some(HOST_MAC),
        mtu: Some(1300),
        alias: Some("nucnet:x"),
        tx_queue_len: Some(7),
        state: Some(State::Up),
        ipv6_link_local: Some(Ipv6LinkLocal::Absent),
        ..LinkChange::default()
    };
    host.netlink.set_link("a", &change).unwrap();
    let index = host.netlink.link("b").unwrap().index;
    host.netlink.set_link(index, &change).unwrap();
    let link = host.netlink.link("b").unwrap();
    assert_eq!(
        (link.mac, link.mtu, link.state),
        (Some(HOST_MAC), 1300, State::Up)
    );
    assert_eq!(link.owner(), Some("x"));
    assert_eq!(host.netlink.addresses_of(index).unwrap(), []);
    let error = host.netlink.set_up("a").unwrap_err();
    assert!(matches!(error, Error::NoLink { .. }), "{error}");
}

#[test]
fn uplinks_are_the_hosts_interfaces_that_lead_somewhere() {
    need_root!();
    let host = host();
    assert_eq!(host.netlink.uplinks().unwrap(), []);
    let link = host.bridge();
    host.netlink.set_up("lo").unwrap();
    host.netlink.set_up(link).unwrap();
    host.netlink
        .ensure_address(link, net("10.9.0.1/24"))
        .unwrap();
    host.ip("link add eth0.5 type bridge");
    host.ip("link set eth0.5 up");
    host.ip("address add 192.0.2.1/24 dev eth0.5");
    host.ip("link add unnumbered type bridge");
    host.ip("link set unnumbered addrgenmode none");
    host.ip("link set unnumbered up");
    host.ip("route add default dev unnumbered");
    host.ip("link add idle type bridge");
    let uplinks = host.netlink.uplinks().unwrap();
    let names: Vec<_> = uplinks
        .iter()
        .map(|uplink| uplink.link.name.as_str())
        .collect();
    assert_eq!(names, ["eth0.5", "unnumbered"]);
    assert!(uplinks[0].addresses.contains(&net("192.0.2.1/24")));
    assert_eq!(uplinks[1].addresses, []);
}
