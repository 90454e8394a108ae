//! Sockets of the host that connect to a publish.

use nucnet_common::packet::{TCP, UDP};

use super::{Family, Row, each_family, row};
use crate::packets::{
    bench::Bench,
    site::{HOST4, SLOT, WEB, address},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(
        socket_that_connects_to_a_publish_connects_to_the_endpoint,
        logic_only: NO_TEST_RUN
    ),
    each_family!(every_way_to_say_loopback_leads_to_the_publish, logic_only: NO_TEST_RUN),
    each_family!(
        publish_of_one_address_is_reached_by_that_address_only,
        logic_only: NO_TEST_RUN
    ),
    each_family!(socket_that_connects_elsewhere_is_left_alone, logic_only: NO_TEST_RUN),
    each_family!(socket_of_another_namespace_is_left_alone, logic_only: NO_TEST_RUN),
    each_family!(
        publish_of_an_endpoint_that_is_gone_leads_nowhere,
        logic_only: NO_TEST_RUN
    ),
    each_family!(
        where_anything_can_be_bound_only_loopback_is_sure_to_be_local,
        logic_only: NO_TEST_RUN
    ),
    row!(
        link_local_and_multicast_destinations_are_nobodys_publish,
        logic_only: NO_TEST_RUN
    ),
];

const NO_TEST_RUN: &str = "BPF_PROG_TEST_RUN takes no programs for sockets";

fn socket_that_connects_to_a_publish_connects_to_the_endpoint(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080-8083:80-83");
    for offset in 0..4 {
        for host in [ip.host, ip.gateway] {
            assert_eq!(
                bench.host_connects(TCP, (host, 8080 + offset)),
                Some((ip.web, 80 + offset).into())
            );
        }
    }
}

fn every_way_to_say_loopback_leads_to_the_publish(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    let ways: &[&str] = if ip.web.is_ipv4() {
        &["127.0.0.1", "127.1.2.3", "0.0.0.0"]
    } else {
        &["::1", "::"]
    };
    for way in ways {
        assert_eq!(
            bench.host_connects(TCP, (address(way), 8080)),
            Some((ip.web, 80).into()),
            "{way}"
        );
    }
    // "Any" is loopback for a publish of loopback alone, too.
    let (loopback, any) = (ways[0], ways[ways.len() - 1]);
    let publish = if ip.web.is_ipv4() {
        format!("{loopback}:9090:90")
    } else {
        format!("[{loopback}]:9090:90")
    };
    bench.publish(&SLOT, &publish);
    for way in [loopback, any] {
        assert_eq!(
            bench.host_connects(TCP, (address(way), 9090)),
            Some((ip.slot, 90).into()),
            "{way}"
        );
    }
    assert_eq!(bench.host_connects(TCP, (ip.host, 9090)), None);
}

fn publish_of_one_address_is_reached_by_that_address_only(bench: &mut Bench<'_>, ip: &Family) {
    let publish = if ip.web.is_ipv4() {
        format!("{}:8080:80", ip.host)
    } else {
        format!("[{}]:8080:80", ip.host)
    };
    bench.publish(&WEB, &publish);
    assert_eq!(
        bench.host_connects(TCP, (ip.host, 8080)),
        Some((ip.web, 80).into())
    );
    assert_eq!(bench.host_connects(TCP, (ip.gateway, 8080)), None);
    let loopback = if ip.web.is_ipv4() { "127.0.0.1" } else { "::1" };
    assert_eq!(bench.host_connects(TCP, (address(loopback), 8080)), None);
}

fn socket_that_connects_elsewhere_is_left_alone(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    assert_eq!(bench.host_connects(TCP, (ip.server, 8080)), None);
    assert_eq!(bench.host_connects(TCP, (ip.host, 8081)), None);
    assert_eq!(bench.host_connects(UDP, (ip.host, 8080)), None);
}

fn socket_of_another_namespace_is_left_alone(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    assert_eq!(bench.other_connects(TCP, (ip.host, 8080)), None);
}

fn publish_of_an_endpoint_that_is_gone_leads_nowhere(bench: &mut Bench<'_>, ip: &Family) {
    bench.publish(&WEB, "8080:80");
    bench.set_endpoint(&WEB, |endpoint| endpoint.number += 1_000);
    assert_eq!(bench.host_connects(TCP, (ip.host, 8080)), None);
    bench.remove_endpoint(&WEB);
    assert_eq!(bench.host_connects(TCP, (ip.host, 8080)), None);
}

fn where_anything_can_be_bound_only_loopback_is_sure_to_be_local(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    bench.publish(&WEB, "8080:80");
    bench.set(|settings| settings.nonlocal_bind = 1);
    assert_eq!(bench.host_connects(TCP, (ip.host, 8080)), None);
    let loopback = if ip.web.is_ipv4() { "127.0.0.1" } else { "::1" };
    assert_eq!(
        bench.host_connects(TCP, (address(loopback), 8080)),
        Some((ip.web, 80).into())
    );
}

fn link_local_and_multicast_destinations_are_nobodys_publish(bench: &mut Bench<'_>) {
    // A printer on the link, say: the kernel's answer to binding to its address is not "not
    // mine" but "on which link?".
    bench.publish(&WEB, "8080:80");
    for destination in ["fe80::1", "169.254.1.1", "ff02::1", "224.0.0.1"] {
        assert_eq!(
            bench.host_connects(TCP, (address(destination), 8080)),
            None,
            "{destination}"
        );
    }
    assert_eq!(
        bench.host_connects(TCP, (HOST4, 8080)),
        Some((WEB.v4, 80).into())
    );
}
