//! A host that learnt its default route from a router's advertisement.

use std::{
    fs,
    os::fd::AsRawFd,
    path::Path,
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    net::if_::if_nametoindex,
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn6, sendto, setsockopt,
        socket, sockopt::Ipv6MulticastHops,
    },
};
use nucnet_ctl::kernel::netns::{NetnsFd, run_in};

use crate::lab::{Lab, has_faults, ip, on_a_host};

/// A router advertisement (RFC 4861 section 4.2): a default router for half an hour.
const ADVERTISEMENT: [u8; 16] = [134, 0, 0, 0, 64, 0, 0x07, 0x08, 0, 0, 0, 0, 0, 0, 0, 0];

fn advertise(router: &Path) {
    let netns = NetnsFd::open(router).expect("namespace");
    run_in(&netns, || {
        let socket = socket(
            AddressFamily::Inet6,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::IcmpV6,
        )
        .expect("raw socket");
        // Whoever comes by a router is no neighbour (RFC 4861 section 6.1.2).
        setsockopt(&socket, Ipv6MulticastHops, &255).expect("hop limit");
        let index = if_nametoindex("router0").expect("interface");
        let all_nodes = std::net::SocketAddrV6::new("ff02::1".parse().expect("group"), 0, 0, index);
        let to = SockaddrIn6::from(all_nodes);
        match sendto(socket.as_raw_fd(), &ADVERTISEMENT, &to, MsgFlags::empty()) {
            // Its address comes with the carrier; whoever waits for a route asks again.
            Ok(_) | Err(Errno::ENETUNREACH | Errno::EADDRNOTAVAIL) => {}
            Err(error) => panic!("advertisement: {error}"),
        }
    })
    .expect("inside");
}

fn default_route() -> String {
    ip("-6 route show default")
        .split(" expires")
        .next()
        .unwrap_or_default()
        .to_owned()
}

/// Makes the host learn a default route, and gives it as shown.
fn learn_from_router(lab: &Lab) -> String {
    let router = lab.container("router");
    ip(&format!(
        "link add learnt0 type veth peer name router0 netns {}",
        router.display()
    ));
    let netns = NetnsFd::open(&router).expect("namespace");
    run_in(&netns, || {
        fs::write("/proc/sys/net/ipv6/conf/router0/accept_dad", "0").expect("sysctl");
        ip("link set router0 up");
    })
    .expect("inside");
    ip("link set learnt0 up");
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let route = default_route();
        if route.contains("proto ra") {
            return route;
        }
        assert!(Instant::now() < deadline, "no advertisement was heard");
        advertise(&router);
        thread::sleep(Duration::from_millis(20));
    }
}

fn accepts() -> String {
    fs::read_to_string("/proc/sys/net/ipv6/conf/learnt0/accept_ra").expect("sysctl")
}

/// Forwarding that is turned on for one interface makes the kernel forget what routers said, on
/// all that do not accept advertisements while they forward.
#[test]
fn advertised_default_route_outlives_networks_and_mappings() {
    on_a_host(|lab| {
        let route = learn_from_router(lab);
        let accepted = accepts();
        let web = lab.container("web");
        for arguments in [
            "network create red --subnet6 fd00:71::/64".to_owned(),
            format!("attach --netns {} --id web", web.display()),
            "nat add dnat --ext-ip 2001:db8::1 --ports 80 --int-ip 2001:db8:1::2".to_owned(),
            "down".to_owned(),
        ] {
            lab.ok(&arguments);
            assert_eq!(default_route(), route, "{arguments}");
            assert_eq!(accepts(), accepted, "{arguments}");
        }
    });
}

/// The interface that listens to the router is made to listen always while that happens.
#[test]
fn what_a_killed_call_has_changed_of_the_hosts_interfaces_is_given_back() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let route = learn_from_router(lab);
        let accepted = accepts();
        let create = "network create red --subnet6 fd00:71::/64";
        lab.ok("network create blue --subnet 10.9.0.0/24");
        let mut changed = 0;
        for call in ["gc", create] {
            for number in 0.. {
                let mut killed = lab.command(create);
                let output = killed.env("NUCNET_FAULT", format!("file:{number}:kill"));
                let is_over = output.output().expect("nucnet-ctl").status.code().is_some();
                changed += usize::from(accepts() != accepted);
                lab.ok(call);
                assert_eq!(
                    accepts(),
                    accepted,
                    "killed at change {number}, then {call}"
                );
                assert_eq!(
                    default_route(),
                    route,
                    "killed at change {number}, then {call}"
                );
                assert!(!lab.place.join("state/lent").exists());
                lab.ok(create);
                lab.ok("network remove red");
                if is_over {
                    break;
                }
            }
        }
        assert!(changed > 1, "or this shows nothing");
    });
}
