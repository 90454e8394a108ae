//! Deletion of links, one by one and together.

use nucnet_ctl::kernel::netlink::{Change, Error, LEAVING_GROUP, Link, Netlink, Owner, VethSpec};
use nucnet_ctl::kernel::netns::NetnsFd;

use super::lab::{Host, host, namespace, need_root, veth};

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
