//! Neighbours.

use nucnet_ctl::kernel::netlink::{Change, Neighbour};

use super::lab::{HOST_MAC, PEER_MAC, host, ip, need_root};

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
