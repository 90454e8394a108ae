//! Bridges and their ports.

use std::thread;

use nucnet_ctl::kernel::netlink::{Change, Error, LINK_GROUP, Netlink, Owner, Port, VethSpec};

use super::lab::{BRIDGE, BRIDGE_MAC, host, namespace, need_root, veth};

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
