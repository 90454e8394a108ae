//! Requests: errors, other runtimes, lists that change while they are read.

use std::{sync::mpsc, thread};

use nix::errno::Errno;
use nucnet_ctl::kernel::netlink::{Error, Netlink, Owner, Route, VethSpec};

use super::lab::{host, ip, namespace, need_root, net, veth};

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
    let other = Netlink::open_in(&host.netns).unwrap();
    let container = namespace();
    let (change, changes) = mpsc::sync_channel(0);
    thread::scope(|scope| {
        scope.spawn(|| {
            for () in changes {
                let spec = VethSpec {
                    port: None,
                    ..veth(0, &container)
                };
                other.create_veth(&spec).unwrap();
                other.delete_link("nuc-a", Owner::Nucnet).unwrap();
            }
        });
        for _ in 0..50 {
            // One link for each list: where they change for ever, lists are given up.
            change.send(()).unwrap();
            let links = host.netlink.links().unwrap();
            let steady_ones = links
                .iter()
                .filter(|link| link.name.starts_with("steady"))
                .count();
            assert_eq!(steady_ones, steady);
        }
        drop(change);
    });
}
