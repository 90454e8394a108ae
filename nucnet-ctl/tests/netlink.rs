//! Links, addresses, routes and neighbours in network namespaces that each test makes.

use std::net::IpAddr;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::Uid;
use nucnet_ctl::kernel::netlink::{
    AddressScope, BridgeSpec, Change, Error, Hop, Ipv6LinkLocal, LEAVING_GROUP, LINK_GROUP, Link,
    LinkChange, LinkType, Mac, Neighbour, Netlink, Owner, PROTOCOL, Port, Route, State, VethSpec,
};
use nucnet_ctl::kernel::netns::{self, NetnsFd, run_in};
use nucnet_ctl::kernel::process::{self, Life, Process};
use nucnet_ctl::kernel::sysctl::{self, Family, LinkKey, Sysctl};

const BRIDGE_MAC: Mac = [0x02, 0x6e, 0, 0, 0, 1];
const HOST_MAC: Mac = [0x02, 0x6e, 0, 0, 0, 2];
const PEER_MAC: Mac = [0x02, 0x6e, 0, 0, 0, 3];

const BRIDGE: BridgeSpec<'static> = BridgeSpec {
    name: "nuc0",
    mac: BRIDGE_MAC,
    mtu: 1500,
    alias: "nucnet:network:test",
};

/// Leaves the test, saying so, where it cannot make namespaces.
macro_rules! need_root {
    () => {
        if !Uid::effective().is_root() {
            eprintln!("skipped: needs root to make network namespaces");
            return;
        }
    };
}

/// A namespace of the test's own, which goes with its last descriptor.
fn namespace() -> NetnsFd {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        NetnsFd::current().unwrap()
    })
    .join()
    .unwrap()
}

struct Host {
    netns: NetnsFd,
    netlink: Netlink,
}

fn host() -> Host {
    let netns = namespace();
    let netlink = Netlink::open_in(&netns).unwrap();
    Host { netns, netlink }
}

impl Host {
    /// A second opinion: iproute2's.
    fn ip(&self, arguments: &str) -> String {
        let output = run_in(&self.netns, || {
            Command::new("ip")
                .args(arguments.split_whitespace())
                .output()
                .unwrap()
        })
        .unwrap();
        assert!(output.status.success(), "ip {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    fn bridge(&self) -> u32 {
        let (index, change) = self.netlink.ensure_bridge(&BRIDGE).unwrap();
        assert_eq!(change, Change::Made);
        index
    }

    /// Whether this kernel notes who made an address.
    fn marks_addresses(&self, link: u32) -> bool {
        let addresses = self.netlink.addresses_of(link).unwrap();
        let marks = addresses.iter().any(|address| address.protocol.is_some());
        if !marks {
            eprintln!("this kernel does not note who made an address (Linux 5.18)");
        }
        marks
    }

    fn nets(&self, link: u32) -> Vec<IpNet> {
        let mut nets: Vec<_> = self
            .netlink
            .addresses_of(link)
            .unwrap()
            .into_iter()
            .filter(|address| address.scope == AddressScope::Global)
            .map(|address| address.address)
            .collect();
        nets.sort();
        nets
    }

    fn link_local(&self, link: u32) -> Vec<IpNet> {
        let addresses = self.netlink.addresses_of(link).unwrap();
        let local = addresses
            .iter()
            .filter(|address| address.scope == AddressScope::Link);
        local.map(|address| address.address).collect()
    }
}

fn veth<'a>(bridge: u32, container: &'a NetnsFd) -> VethSpec<'a> {
    VethSpec {
        name: "nuc-a",
        mac: HOST_MAC,
        alias: "nucnet:a",
        port: Some((bridge, Port::ENDPOINT)),
        netns: container,
        peer_name: "eth0",
        peer_mac: PEER_MAC,
        mtu: 1400,
        tx_queue_len: 500,
    }
}

fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

#[test]
fn bridge_is_made_as_wanted_and_making_it_again_changes_nothing() {
    need_root!();
    let host = host();
    let index = host.bridge();
    let shown = host.ip("-d link show nuc0");
    for part in [
        "mtu 1500",
        "02:6e:00:00:00:01",
        "alias nucnet:network:test",
        "stp_state 0",
        "forward_delay 0",
        "mcast_snooping 0",
        "ageing_time 30000",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
    let before = host.netlink.links().unwrap();
    assert_eq!(
        host.netlink.ensure_bridge(&BRIDGE).unwrap(),
        (index, Change::Unchanged)
    );
    assert_eq!(host.netlink.links().unwrap(), before);
}

#[test]
fn bridge_that_somebody_changed_is_put_right() {
    need_root!();
    let host = host();
    let index = host.bridge();
    let as_wanted = host.netlink.link(index).unwrap();
    host.ip("link set nuc0 address 02:00:00:00:00:99 mtu 1300");
    host.ip("link set nuc0 type bridge mcast_snooping 1 stp_state 1");
    host.netlink.ensure_bridge(&BRIDGE).unwrap();
    assert_eq!(host.netlink.link(index).unwrap(), as_wanted);
    let shown = host.ip("-d link show nuc0");
    assert!(
        shown.contains("mcast_snooping 0") && shown.contains("stp_state 0"),
        "{shown}"
    );
}

#[test]
fn bridge_left_without_alias_by_a_killed_process_is_taken_over() {
    need_root!();
    let host = host();
    host.ip(&format!("link add nuc0 group {LINK_GROUP} type bridge"));
    assert!(host.netlink.link("nuc0").unwrap().is_owned());
    host.netlink.ensure_bridge(&BRIDGE).unwrap();
    assert_eq!(
        host.netlink.link("nuc0").unwrap().owner(),
        Some("network:test")
    );
}

// E16: a bridge whose name a veth has is no success.
#[test]
fn bridge_name_that_a_veth_has_is_a_conflict() {
    need_root!();
    let host = host();
    host.ip("link add nuc0 type veth peer name nuc1");
    let before = host.netlink.links().unwrap();
    let error = host.netlink.ensure_bridge(&BRIDGE).unwrap_err();
    assert_eq!(
        error.to_string(),
        "interface nuc0 exists already and is a veth without alias"
    );
    assert_eq!(host.netlink.links().unwrap(), before);
}

#[test]
fn bridge_of_somebody_else_is_a_conflict() {
    need_root!();
    let host = host();
    host.ip("link add nuc0 type bridge");
    host.ip("link set nuc0 alias mine");
    let error = host.netlink.ensure_bridge(&BRIDGE).unwrap_err();
    assert_eq!(
        error.to_string(),
        "interface nuc0 exists already and is a bridge with alias mine"
    );
    assert!(matches!(
        host.netlink.delete_bridge("nuc0", Owner::Nucnet),
        Err(Error::Taken { .. })
    ));
    assert!(host.netlink.find_link("nuc0").unwrap().is_some());
}

#[test]
fn bridge_keeps_its_mac_and_mtu_when_ports_come_and_go() {
    need_root!();
    let host = host();
    let container = namespace();
    let index = host.bridge();
    host.netlink.create_veth(&veth(index, &container)).unwrap();
    let bridge = host.netlink.link(index).unwrap();
    assert_eq!((bridge.mac, bridge.mtu), (Some(BRIDGE_MAC), 1500));
    host.netlink.delete_link("nuc-a", Owner::Nucnet).unwrap();
    let bridge = host.netlink.link(index).unwrap();
    assert_eq!((bridge.mac, bridge.mtu), (Some(BRIDGE_MAC), 1500));
}

#[test]
fn bridge_with_ports_is_not_deleted_and_without_is_deleted_once() {
    need_root!();
    let host = host();
    let container = namespace();
    let index = host.bridge();
    assert_eq!(host.netlink.port_count("nuc0").unwrap(), 0);
    host.netlink.create_veth(&veth(index, &container)).unwrap();
    assert_eq!(host.netlink.port_count("nuc0").unwrap(), 1);
    let error = host
        .netlink
        .delete_bridge("nuc0", Owner::Nucnet)
        .unwrap_err();
    assert!(matches!(error, Error::HasPorts { ports: 1, .. }), "{error}");
    let owner = Owner::Alias("nucnet:a");
    assert_eq!(
        host.netlink.delete_link("nuc-a", owner).unwrap(),
        Change::Made
    );
    assert_eq!(
        host.netlink.delete_link("nuc-a", owner).unwrap(),
        Change::Unchanged
    );
    assert_eq!(
        host.netlink.delete_bridge("nuc0", Owner::Nucnet).unwrap(),
        Change::Made
    );
    assert_eq!(
        host.netlink.delete_bridge("nuc0", Owner::Nucnet).unwrap(),
        Change::Unchanged
    );
}

#[test]
fn ports_of_a_bridge_that_cannot_be_asked_are_unknown_not_none() {
    need_root!();
    let host = host();
    assert!(matches!(
        host.netlink.port_count("nuc0"),
        Err(Error::NoLink { .. })
    ));
    host.ip("link add nuc0 type veth peer name nuc1");
    assert!(matches!(
        host.netlink.port_count("nuc0"),
        Err(Error::NotABridge { .. })
    ));
}

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
fn endpoint_port_neither_learns_nor_floods() {
    need_root!();
    let host = host();
    let container = namespace();
    let veth = host
        .netlink
        .create_veth(&veth(host.bridge(), &container))
        .unwrap();
    let mut wanted = Port::ENDPOINT;
    if veth.port.unwrap().locked.is_none() {
        eprintln!("this kernel has no locked ports (Linux 5.16)");
        wanted.locked = None;
    }
    assert_eq!(veth.port, Some(wanted));
    let shown = host.ip("-d link show nuc-a");
    for part in [
        "learning off",
        "flood off",
        "mcast_flood off",
        "bcast_flood off",
        "isolated on",
    ] {
        assert!(shown.contains(part), "{part} is not in {shown}");
    }
}

#[test]
fn bridge_takes_1023_ports_and_then_says_that_it_is_full() {
    need_root!();
    let host = host();
    let container = namespace();
    let bridge = host.bridge();
    for number in 0..1023 {
        let (name, peer_name) = (&format!("port{number}"), &format!("eth{number}"));
        let spec = VethSpec {
            name,
            peer_name,
            ..veth(bridge, &container)
        };
        host.netlink.create_veth(&spec).unwrap();
    }
    assert_eq!(host.netlink.port_count(bridge).unwrap(), 1023);
    let spec = VethSpec {
        peer_name: "last",
        ..veth(bridge, &container)
    };
    let error = host.netlink.create_veth(&spec).unwrap_err();
    assert_eq!(
        error.to_string(),
        "bridge nuc0 is full: a bridge takes at most 1023 ports"
    );
    assert!(host.netlink.find_link("nuc-a").unwrap().is_none());
}

#[test]
fn many_who_want_the_same_bridge_get_the_same_one() {
    need_root!();
    let host = host();
    let made = thread::scope(|scope| {
        let racers: Vec<_> = (0..8)
            .map(|_| {
                scope.spawn(|| {
                    let netlink = Netlink::open_in(&host.netns).unwrap();
                    netlink.ensure_bridge(&BRIDGE).unwrap()
                })
            })
            .collect();
        racers
            .into_iter()
            .map(|racer| racer.join().unwrap())
            .collect::<Vec<_>>()
    });
    assert!(
        made.iter().all(|&(index, _)| index == made[0].0),
        "{made:?}"
    );
    assert_eq!(
        made.iter()
            .filter(|&&(_, change)| change == Change::Made)
            .count(),
        1
    );
    let bridge = host.netlink.link("nuc0").unwrap();
    assert_eq!((bridge.owner(), bridge.mtu), (Some("network:test"), 1500));
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
fn only_the_owners_links_are_deleted() {
    need_root!();
    let host = host();
    host.ip("link add name a type bridge");
    for owner in [Owner::Nucnet, Owner::Alias("nucnet:a")] {
        let error = host.netlink.delete_link("a", owner).unwrap_err();
        assert!(matches!(error, Error::Taken { .. }), "{error}");
    }
    host.ip("link set dev a alias nucnet:b");
    let error = host
        .netlink
        .delete_link("a", Owner::Alias("nucnet:a"))
        .unwrap_err();
    assert!(matches!(error, Error::Taken { .. }), "{error}");
    assert_eq!(
        host.netlink.delete_link("a", Owner::Nucnet).unwrap(),
        Change::Made
    );
}

#[test]
fn addresses_are_added_once_and_removed_once() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink.set_up(link).unwrap();
    for address in [net("10.9.0.1/24"), net("fd09::1/64")] {
        assert_eq!(
            host.netlink.ensure_address(link, address).unwrap(),
            Change::Made
        );
        assert_eq!(
            host.netlink.ensure_address(link, address).unwrap(),
            Change::Unchanged
        );
    }
    let shown = host.ip("address show dev nuc0");
    assert!(shown.contains("10.9.0.1/24 brd 10.9.0.255"), "{shown}");
    assert!(
        !shown.contains("fd09::1/64 scope global tentative"),
        "{shown}"
    );
    assert!(shown.contains("nodad"), "{shown}");
    for address in [net("10.9.0.1/24"), net("fd09::1/64")] {
        assert_eq!(
            host.netlink.remove_address(link, address).unwrap(),
            Change::Made
        );
        assert_eq!(
            host.netlink.remove_address(link, address).unwrap(),
            Change::Unchanged
        );
        assert_eq!(
            host.netlink.remove_address(999, address).unwrap(),
            Change::Unchanged
        );
    }
    let error = host.netlink.addresses_of(999).unwrap_err();
    assert!(matches!(error, Error::NoLink { .. }), "{error}");
}

// E15 and Z-14: a new prefix on a bridge that is up replaces the old one, the link-local address
// stays, and so does what somebody else added.
#[test]
fn changed_prefix_replaces_the_old_one_and_keeps_link_local() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink.set_up(link).unwrap();
    // A bridge has its link-local address once a port has a carrier.
    let container = namespace();
    host.netlink.create_veth(&veth(link, &container)).unwrap();
    Netlink::open_in(&container)
        .unwrap()
        .set_up("eth0")
        .unwrap();
    host.netlink.set_up("nuc-a").unwrap();
    while host.link_local(link).is_empty() {
        thread::yield_now();
    }
    let old = [net("10.9.0.1/28"), net("fd09::1/120")];
    let new = [net("10.9.0.1/26"), net("fd09::1/64")];
    assert_eq!(
        host.netlink.converge_addresses(link, &old).unwrap(),
        Change::Made
    );
    assert_eq!(
        host.netlink.converge_addresses(link, &old).unwrap(),
        Change::Unchanged
    );
    host.ip("address add 192.0.2.9/32 dev nuc0");
    let link_local = host.link_local(link);
    assert_eq!(link_local.len(), 1);

    assert_eq!(
        host.netlink.converge_addresses(link, &new).unwrap(),
        Change::Made
    );
    let [v4, v6] = new;
    let mut expected = vec![v4, v6];
    if host.marks_addresses(link) {
        expected.insert(1, net("192.0.2.9/32"));
    }
    assert_eq!(host.nets(link), expected);
    assert_eq!(host.link_local(link), link_local);
    let routes = host.netlink.routes().unwrap();
    for destination in [net("10.9.0.0/26"), net("fd09::/64"), net("fe80::/64")] {
        assert!(
            routes.iter().any(|route| route.destination == destination),
            "no route to {destination}: {routes:?}"
        );
    }
    assert!(
        !routes
            .iter()
            .any(|route| route.destination == net("10.9.0.0/28"))
    );
}

#[test]
fn addresses_of_others_on_our_bridge_stay() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink
        .ensure_address(link, net("10.9.0.99/24"))
        .unwrap();
    if !host.marks_addresses(link) {
        eprintln!("skipped: all addresses of our bridge count as ours");
        return;
    }
    host.netlink.converge_addresses(link, &[]).unwrap();
    assert_eq!(host.nets(link), []);
    host.ip("address add 192.0.2.9/32 dev nuc0");
    host.ip("address add 10.9.0.1/24 dev nuc0");
    // Even ours cannot be told from its mark here.
    host.netlink
        .converge_addresses(link, &[net("10.9.0.1/24")])
        .unwrap();
    assert_eq!(host.nets(link), [net("10.9.0.1/24"), net("192.0.2.9/32")]);
    host.netlink.converge_addresses(link, &[]).unwrap();
    assert_eq!(host.nets(link), [net("10.9.0.1/24"), net("192.0.2.9/32")]);
    host.netlink
        .converge_addresses(link, &[net("fd09::1/64")])
        .unwrap();
    host.netlink.converge_addresses(link, &[]).unwrap();
    assert_eq!(host.nets(link), [net("10.9.0.1/24"), net("192.0.2.9/32")]);
}

#[test]
fn address_that_was_secondary_survives_the_removal_of_its_primary() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink
        .converge_addresses(link, &[net("10.9.0.1/24")])
        .unwrap();
    host.netlink
        .converge_addresses(link, &[net("10.9.0.254/24")])
        .unwrap();
    assert_eq!(host.nets(link), [net("10.9.0.254/24")]);
}

#[test]
fn default_routes_by_gateway_and_by_device() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink.set_up(link).unwrap();
    let nets = [net("10.9.0.2/24"), net("fd09::2/64")];
    host.netlink.converge_addresses(link, &nets).unwrap();
    for (gateway, further) in [("10.9.0.1", "172.16.0.1"), ("fd09::1", "fd10::1")] {
        for gateway in [gateway, further].map(ip) {
            let route = Route::default_via_gateway(link, gateway, &nets);
            assert_eq!(host.netlink.ensure_route(&route).unwrap(), Change::Made);
            assert_eq!(
                host.netlink.ensure_route(&route).unwrap(),
                Change::Unchanged
            );
            let shown = host.netlink.default_routes().unwrap();
            let shown: Vec<_> = shown
                .iter()
                .filter(|shown| shown.destination == route.destination)
                .collect();
            assert_eq!(shown.len(), 1, "{shown:?}");
            assert_eq!(
                shown[0].hops,
                [Hop {
                    link,
                    gateway: Some(gateway)
                }]
            );
            assert_eq!(shown[0].protocol, PROTOCOL);
        }
        let route = Route::default_via_link(link, ip(gateway));
        assert_eq!(host.netlink.ensure_route(&route).unwrap(), Change::Made);
        assert_eq!(
            host.netlink.ensure_route(&route).unwrap(),
            Change::Unchanged
        );
    }
    assert!(
        host.ip("route show default")
            .contains("default dev nuc0 proto 110 scope link")
    );
    for destination in [net("0.0.0.0/0"), net("::/0")] {
        assert_eq!(
            host.netlink.delete_route(destination, link).unwrap(),
            Change::Made
        );
        assert_eq!(
            host.netlink.delete_route(destination, link).unwrap(),
            Change::Unchanged
        );
        assert_eq!(
            host.netlink.delete_route(destination, 999).unwrap(),
            Change::Unchanged
        );
    }
    assert_eq!(host.netlink.default_routes().unwrap(), []);
}

#[test]
fn host_route_carries_its_preferred_source_and_is_replaced() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink.set_up(link).unwrap();
    let nets = [
        net("10.9.0.1/32"),
        net("10.9.0.2/32"),
        net("fd09::1/128"),
        net("fd09::2/128"),
    ];
    host.netlink.converge_addresses(link, &nets).unwrap();
    for (guest, first, second) in [
        ("10.9.1.5", "10.9.0.1", "10.9.0.2"),
        ("fd19::5", "fd09::1", "fd09::2"),
    ] {
        for source in [first, second] {
            let route = Route::host(link, ip(guest), Some(ip(source)));
            assert_eq!(host.netlink.ensure_route(&route).unwrap(), Change::Made);
            assert_eq!(
                host.netlink.ensure_route(&route).unwrap(),
                Change::Unchanged
            );
            let routes = host.netlink.routes().unwrap();
            let shown: Vec<_> = routes
                .iter()
                .filter(|shown| shown.destination.addr() == ip(guest))
                .collect();
            assert_eq!(shown.len(), 1, "{shown:?}");
            assert_eq!(shown[0].source, Some(ip(source)));
        }
        assert_eq!(
            host.netlink.delete_route(ip(guest).into(), link).unwrap(),
            Change::Made
        );
    }
}

#[test]
fn routes_of_others_are_neither_replaced_nor_deleted() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink.set_up(link).unwrap();
    host.netlink
        .converge_addresses(link, &[net("10.9.0.2/24"), net("fd09::2/64")])
        .unwrap();
    host.ip("route add default via 10.9.0.1");
    host.ip("-6 route add default via fd09::1");
    let before = host.netlink.routes().unwrap();
    for gateway in ["10.9.0.7", "fd09::7"] {
        let route = Route::default_via_gateway(link, ip(gateway), &[]);
        let error = host.netlink.ensure_route(&route).unwrap_err();
        assert!(
            matches!(error, Error::ForeignRoute { protocol: 3, .. }),
            "{error}"
        );
        let deleted = host.netlink.delete_route(route.destination, link).unwrap();
        assert_eq!(deleted, Change::Unchanged);
    }
    assert_eq!(host.netlink.routes().unwrap(), before);
}

#[test]
fn mixed_families_are_refused_before_the_kernel_is_asked() {
    need_root!();
    let host = host();
    let mut route = Route::host(1, ip("10.9.0.9"), Some(ip("fd09::1")));
    assert!(matches!(
        host.netlink.ensure_route(&route),
        Err(Error::FamilyMismatch { .. })
    ));
    route.source = None;
    route.gateway = Some(ip("fd09::1"));
    assert!(matches!(
        host.netlink.ensure_route(&route),
        Err(Error::FamilyMismatch { .. })
    ));
}

#[test]
fn neighbours_are_permanent_and_repeatable() {
    need_root!();
    let host = host();
    let link = host.bridge();
    host.netlink.set_up(link).unwrap();
    let neighbours = [
        ("10.9.0.5", PEER_MAC),
        ("fd09::5", PEER_MAC),
        ("fd09::5", HOST_MAC),
    ];
    for (address, mac) in neighbours {
        let neighbour = Neighbour {
            link,
            address: ip(address),
            mac,
        };
        for _ in 0..2 {
            host.netlink.ensure_neighbour(&neighbour).unwrap();
            assert!(host.netlink.neighbours(link).unwrap().contains(&neighbour));
        }
    }
    assert_eq!(host.netlink.neighbours(link).unwrap().len(), 2);
    assert!(host.ip("neighbour show dev nuc0").contains("PERMANENT"));
    for address in [ip("10.9.0.5"), ip("fd09::5")] {
        assert_eq!(
            host.netlink.remove_neighbour(link, address).unwrap(),
            Change::Made
        );
        assert_eq!(
            host.netlink.remove_neighbour(link, address).unwrap(),
            Change::Unchanged
        );
        assert_eq!(
            host.netlink.remove_neighbour(999, address).unwrap(),
            Change::Unchanged
        );
    }
    assert_eq!(host.netlink.neighbours(link).unwrap(), []);
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

#[test]
fn errors_carry_errno_and_the_kernels_explanation() {
    need_root!();
    let host = host();
    let link = host.bridge();
    let error = host
        .netlink
        .ensure_route(&Route::default_via_gateway(
            link,
            ip("10.9.0.1"),
            &[net("10.9.0.2/24")],
        ))
        .unwrap_err();
    let Error::Refused {
        operation,
        object,
        cause,
    } = error
    else {
        panic!("{error}");
    };
    assert_eq!(
        (operation, object.as_str()),
        ("add the route to", "0.0.0.0/0")
    );
    assert!(
        matches!(cause.errno, Errno::ENETUNREACH | Errno::ENETDOWN),
        "{cause}"
    );
    assert!(cause.message.is_some(), "{cause}");
}

#[test]
fn netlink_can_be_used_inside_another_runtime() {
    need_root!();
    let netns = namespace();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .build()
        .unwrap();
    runtime.block_on(async {
        let netlink = Netlink::open_in(&netns).unwrap();
        assert_eq!(netlink.links().unwrap().len(), 1);
    });
}

#[test]
fn lists_are_complete_while_links_come_and_go() {
    need_root!();
    let host = host();
    let steady = 200;
    host.netlink.links().unwrap();
    for number in 0..steady {
        host.ip(&format!("link add steady{number} type bridge"));
    }
    let churn = Netlink::open_in(&host.netns).unwrap();
    let container = namespace();
    thread::scope(|scope| {
        let done = scope.spawn(|| {
            for _ in 0..50 {
                let spec = VethSpec {
                    port: None,
                    ..veth(0, &container)
                };
                churn.create_veth(&spec).unwrap();
                churn.delete_link("nuc-a", Owner::Nucnet).unwrap();
            }
        });
        while !done.is_finished() {
            let links = host.netlink.links().unwrap();
            let seen = links
                .iter()
                .filter(|link| link.name.starts_with("steady"))
                .count();
            assert_eq!(seen, steady);
        }
        done.join().unwrap();
    });
}

#[test]
fn sysctls_of_an_interface_with_dots_in_its_name() {
    need_root!();
    let host = host();
    host.ip("link add eth0.5 type bridge");
    run_in(&host.netns, || {
        for (family, key, value) in [
            (Family::Ipv4, LinkKey::Forwarding, "1"),
            (Family::Ipv6, LinkKey::Forwarding, "1"),
            (Family::Ipv6, LinkKey::AcceptRa, "0"),
            (Family::Ipv6, LinkKey::AcceptDad, "0"),
            (Family::Ipv6, LinkKey::Autoconf, "0"),
            (Family::Ipv6, LinkKey::AddrGenMode, "1"),
            (Family::Ipv6, LinkKey::DisableIpv6, "1"),
        ] {
            let sysctl = Sysctl::link(family, "eth0.5", key);
            let before = sysctl.read().unwrap();
            assert_ne!(before, value, "{sysctl}");
            assert_eq!(sysctl.write(value).unwrap(), before);
            assert_eq!(sysctl.write(value).unwrap(), value);
            let of_lo = Sysctl::link(family, "lo", key);
            assert_ne!(of_lo.read().unwrap(), value, "{of_lo}");
        }
        let range = Sysctl::IpLocalPortRange.read().unwrap();
        assert_eq!(range.split_whitespace().count(), 2, "{range}");
        for family in [Family::Ipv4, Family::Ipv6] {
            assert_eq!(Sysctl::IpNonlocalBind(family).read().unwrap(), "0");
        }
    })
    .unwrap();
}

#[test]
fn sysctl_errors_name_what_is_missing() {
    let absent = Sysctl::link(Family::Ipv4, "absent0", LinkKey::Forwarding);
    let error = absent.write("1").unwrap_err();
    assert_eq!(
        error.to_string(),
        "sysctl net/ipv4/conf/absent0/forwarding does not exist"
    );
    for name in ["", ".", "..", "../all", "a/b"] {
        let error = Sysctl::link(Family::Ipv4, name, LinkKey::Forwarding)
            .read()
            .unwrap_err();
        assert!(matches!(error, sysctl::Error::Interface { .. }), "{error}");
    }
}

#[test]
fn work_in_a_namespace_leaves_the_caller_where_it_was() {
    need_root!();
    let own = NetnsFd::current().unwrap().id();
    let other = namespace();
    assert_ne!(other.id(), own);
    assert_eq!(
        run_in(&other, || NetnsFd::current().unwrap().id()).unwrap(),
        other.id()
    );
    assert_eq!(NetnsFd::current().unwrap().id(), own);
    let error = run_in(&other, || panic!("on purpose"))
        .map(|(): ()| ())
        .unwrap_err();
    assert!(matches!(&error, netns::Error::Panicked { message, .. } if message == "on purpose"));
    assert_eq!(NetnsFd::current().unwrap().id(), own);
}

#[test]
fn cookies_tell_namespaces_apart() {
    need_root!();
    let (first, second) = (namespace(), namespace());
    let Some(cookie) = first.cookie().unwrap() else {
        eprintln!("skipped: needs SO_NETNS_COOKIE (Linux 5.14)");
        return;
    };
    assert_eq!(first.cookie().unwrap(), Some(cookie));
    assert_ne!(second.cookie().unwrap(), Some(cookie));
}

#[test]
fn only_network_namespaces_other_than_our_own_are_taken() {
    for path in ["/proc/self/ns/mnt", "/proc/self/stat", "/dev/null"] {
        let error = NetnsFd::open(Path::new(path)).unwrap_err();
        assert!(
            matches!(error, netns::Error::NotANetns { .. }),
            "{path}: {error}"
        );
    }
    let error = NetnsFd::open(Path::new("/nowhere")).unwrap_err();
    assert!(matches!(error, netns::Error::NotFound { .. }), "{error}");
    let own = NetnsFd::open(Path::new("/proc/self/ns/net")).unwrap();
    assert!(matches!(
        own.other_than_own(),
        Err(netns::Error::Own { .. })
    ));
}

#[test]
fn named_namespaces_are_made_once_and_removed_as_often_as_wanted() {
    need_root!();
    // A thread with a mount namespace of its own.
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slot-1.net");
        let made = netns::create_named(&path).unwrap();
        assert_ne!(made.id(), NetnsFd::current().unwrap().id());
        assert_eq!(NetnsFd::open(&path).unwrap().id(), made.id());
        netns::create_named(&path).unwrap_err();
        assert_eq!(NetnsFd::open(&path).unwrap().id(), made.id());
        for _ in 0..2 {
            netns::remove_named(&path).unwrap();
            assert!(!path.exists());
        }
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "text").unwrap();
        netns::remove_named(&precious).unwrap_err();
        assert!(precious.exists());
    })
    .join()
    .unwrap();
}

#[test]
fn namespace_of_a_process_outlives_it_and_a_dead_process_is_said_to_be_dead() {
    need_root!();
    let netns = namespace();
    // Any program that waits.
    let mut child = run_in(&netns, || {
        let mut monitor = Command::new("ip");
        monitor
            .arg("monitor")
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    })
    .unwrap();
    let process = Process::open(child.id()).unwrap();
    assert_eq!(process.life().unwrap(), Life::Running);
    let found = process.netns().unwrap();
    assert_eq!(found.id(), netns.id());
    assert!(
        found.to_string().contains(&child.id().to_string()),
        "{found}"
    );

    child.kill().unwrap();
    // A zombie counts as dead.
    let exited = loop {
        match process.netns() {
            Ok(_) => thread::yield_now(),
            Err(error) => break error,
        }
    };
    assert_eq!(
        exited.to_string(),
        format!("process {} has exited", child.id())
    );
    assert_eq!(process.life().unwrap(), Life::Exited);
    child.wait().unwrap();
    assert!(matches!(
        process.netns(),
        Err(process::Error::Exited { .. })
    ));
    assert!(matches!(
        Process::open(child.id()),
        Err(process::Error::NotFound { .. })
    ));
    Netlink::open_in(&found).unwrap().links().unwrap();
}

#[test]
fn impossible_process_ids_are_not_found() {
    for pid in [0, u32::MAX, 1 << 30] {
        let error = Process::open(pid).unwrap_err();
        assert!(matches!(error, process::Error::NotFound { .. }), "{error}");
    }
}

/// The names of all links but the loopback interface.
fn names(netlink: &Netlink) -> Vec<String> {
    let links = netlink.links().unwrap().into_iter();
    links
        .map(|link| link.name)
        .filter(|name| name != "lo")
        .collect()
}

fn three_veths(host: &Host, container: &NetnsFd) {
    let bridge = host.bridge();
    for (name, alias) in [
        ("nuc-a", "nucnet:a"),
        ("nuc-b", "nucnet:b"),
        ("nuc-c", "nucnet:c"),
    ] {
        let spec = VethSpec {
            name,
            alias,
            peer_name: name,
            ..veth(bridge, container)
        };
        host.netlink.create_veth(&spec).unwrap();
    }
}

#[test]
fn links_that_are_deleted_together_go_and_the_others_stay() {
    need_root!();
    let (host, container) = (host(), namespace());
    three_veths(&host, &container);
    host.ip("link add mine type bridge");
    let wanted = |link: &Link| link.name != "nuc-b" && link.kind.as_deref() != Some("bridge");
    assert!(host.netlink.delete_links(wanted).unwrap().is_empty());
    assert_eq!(names(&host.netlink), ["nuc0", "nuc-b", "mine"]);
    assert!(host.netlink.delete_links(wanted).unwrap().is_empty());
    // The bridge and its port at once.
    assert!(host.netlink.delete_links(|_| true).unwrap().is_empty());
    assert_eq!(names(&host.netlink), ["mine"]);
    assert!(names(&Netlink::open_in(&container).unwrap()).is_empty());
}

#[test]
fn foreign_link_in_the_group_of_those_that_are_deleted_together_stays() {
    need_root!();
    let (host, container) = (host(), namespace());
    three_veths(&host, &container);
    host.ip(&format!("link add mine group {LEAVING_GROUP} type bridge"));
    host.ip("link set mine alias mine");
    let before = host.netlink.link("mine").unwrap();
    let ports = |link: &Link| link.kind.as_deref() == Some("veth");
    assert!(host.netlink.delete_links(ports).unwrap().is_empty());
    assert_eq!(names(&host.netlink), ["nuc0", "mine"]);
    assert_eq!(host.netlink.link("mine").unwrap(), before);
}

#[test]
fn link_that_a_killed_process_was_about_to_delete_is_deleted_by_the_next() {
    need_root!();
    let (host, container) = (host(), namespace());
    three_veths(&host, &container);
    host.ip(&format!("link set nuc-a group {LEAVING_GROUP}"));
    let others = |link: &Link| matches!(link.name.as_str(), "nuc-b" | "nuc-c");
    assert!(host.netlink.delete_links(others).unwrap().is_empty());
    assert_eq!(names(&host.netlink), ["nuc0", "nuc-a"]);
    assert!(host.netlink.delete_links(|_| true).unwrap().is_empty());
    assert!(names(&host.netlink).is_empty());
}
