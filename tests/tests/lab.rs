//! The lab itself: private, gone without a trace.

use std::path::Path;

use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{Family, HOST, Lab, OUTSIDE, Snapshot, web};

/// A lab, or `None` with a word about why there is none.
fn lab() -> Option<Lab> {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("skipped: network namespaces need root");
        return None;
    }
    Some(Lab::new().expect("a lab"))
}

#[test]
fn labs_side_by_side_do_not_meet() {
    let (Some(one), Some(two)) = (lab(), lab()) else {
        return;
    };
    for family in Family::ALL {
        let address = OUTSIDE.port(family, 80);
        let server =
            web::Server::start(one.outside.listen(address).expect("listening")).expect("a server");
        let stream = one.host.connect(address, SOON).expect("connecting");
        let seen = web::who(stream).expect("an answer");
        assert_eq!(seen.ip(), HOST.of(family));
        let other = two
            .host
            .connect(address, SOON)
            .expect_err("the other lab has no server");
        assert_eq!(other.kind(), std::io::ErrorKind::ConnectionRefused);
        assert_eq!(server.clients(), [seen]);
    }
}

#[test]
fn lab_is_gone_when_it_is_dropped() {
    let Some(lab) = lab() else { return };
    let container = lab.container("container").expect("a container");
    let pids = [lab.host.pid(), lab.outside.pid(), container.pid()];
    let cgroup = lab.host.path(lab.host.cgroup().expect("a cgroup"));
    assert!(cgroup.is_dir());
    // Something that would live on.
    let child = lab.host.command("sleep").arg("1000").spawn();
    let mut child = child.expect("sleep");
    drop((container, lab));
    for pid in pids {
        assert!(!Path::new(&format!("/proc/{pid}")).exists(), "{pid} lives");
    }
    until("what ran on the host is ended", SOON, || {
        Ok(child.try_wait()?.is_some())
    })
    .expect("an end");
}

#[test]
fn snapshot_sees_what_changes_and_only_that() {
    let Some(lab) = lab() else { return };
    let before = Snapshot::of(&lab.host).expect("a snapshot");
    let second = Snapshot::of(&lab.host).expect("a snapshot");
    assert_eq!(before.difference(&second), "");
    lab.host
        .ip("route add 198.18.0.0/15 via 192.0.2.1")
        .expect("a route");
    lab.host
        .sysctl("net/ipv4/ip_forward", "1")
        .expect("a sysctl");
    let after = before.difference(&Snapshot::of(&lab.host).expect("a snapshot"));
    assert!(
        after.contains("new in routes: unicast 198.18.0.0/15"),
        "{after}"
    );
    assert!(
        after.contains("new in sysctls: /proc/sys/net/ipv4/ip_forward = 1"),
        "{after}"
    );
}
