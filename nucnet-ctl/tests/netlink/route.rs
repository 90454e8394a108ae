//! Routes.

use nucnet_ctl::kernel::netlink::{Change, Error, Hop, PROTOCOL, Route};

use super::lab::{host, ip, need_root, net};

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
