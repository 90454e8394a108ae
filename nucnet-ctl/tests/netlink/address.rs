//! Addresses.

use std::thread;

use nucnet_ctl::kernel::netlink::{Change, Error, Netlink};

use super::lab::{host, namespace, need_root, net, veth};

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
