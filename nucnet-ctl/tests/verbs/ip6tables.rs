//! Hosts on which iptables carries packets, and which lack `ip6tables`.

use std::{
    fs,
    io::ErrorKind,
    net::{Ipv6Addr, UdpSocket},
    path::Path,
    thread,
};

use nucnet_ctl::kernel::netns::{NetnsFd, run_in};
use serde_json::Value;

use crate::lab::{Lab, inside, ip, json, list, on_a_host, text};

const NOTHING: [Value; 0] = [];

fn is_of_v6(program: &str) -> bool {
    program.starts_with("ip6tables")
}

fn by_rules(arguments: &str) -> String {
    format!("--datapath iptables {arguments}")
}

fn attach(container: &Path) -> String {
    let container = container.display();
    by_rules(&format!(
        "attach --netns {container} --id web --allow 192.0.2.0/24"
    ))
}

/// Whether IPv6 is off on an interface.
fn is_closed(interface: &str) -> bool {
    let path = format!("/proc/sys/net/ipv6/conf/{interface}/disable_ipv6");
    fs::read_to_string(path).expect("sysctl").trim() == "1"
}

fn has_v6(endpoint: &Value) -> bool {
    let addresses = list(&endpoint["addresses"]).iter();
    addresses.map(text).any(|address| address.contains(':'))
}

/// What `status` says of bridges that are closed, and of all else that is not as it should be.
fn drift(lab: &Lab) -> (Vec<String>, Vec<Value>) {
    let status = lab.json(&by_rules("status"));
    let found = list(&status["drift"]).iter().cloned();
    let (closed, others): (Vec<_>, Vec<_>) = found.partition(|drift| drift["id"] == "IPv6");
    let closed = closed.iter().map(|drift| text(&drift["problem"]));
    (closed.collect(), others)
}

/// How many packets the host has thrown away because IPv6 is off on its bridge.
fn discarded() -> u64 {
    let counts = fs::read_to_string("/proc/thread-self/net/dev_snmp6/nucnet0").expect("counts");
    let mut lines = counts.lines();
    let count = lines.find_map(|line| line.strip_prefix("Ip6InDiscards"));
    count.expect("count").trim().parse().expect("number")
}

/// Gives a container an address and a route of IPv6 through the bridge, as whoever is root in it
/// may.
fn give_v6(lab: &Lab, container: &Path) {
    let networks = lab.json(&by_rules("network list"));
    let gateways = list(&networks[0]["gateways"]).iter().map(text);
    let mut gateways = gateways.filter_map(|gateway| gateway.parse::<Ipv6Addr>().ok());
    let gateway = gateways.next().expect("an IPv6 gateway");
    let own = Ipv6Addr::from(u128::from(gateway) + 0x70);
    let bridge = ip("-o link show nucnet0");
    let (_, mac) = bridge.split_once("link/ether ").expect("MAC");
    let mac = mac.split(' ').next().expect("MAC");
    for arguments in [
        format!("address add {own}/64 dev eth0 nodad"),
        format!("neighbour replace {gateway} lladdr {mac} dev eth0"),
        format!("-6 route replace default via {gateway}"),
    ] {
        inside(container, &arguments);
    }
}

/// Whether a datagram of a container comes to the host's own address.
fn reaches_the_host(container: &Path) -> bool {
    let host = UdpSocket::bind("[2001:db8::1]:0").expect("socket");
    host.set_nonblocking(true).expect("non-blocking");
    let (before, to) = (discarded(), host.local_addr().expect("address"));
    let netns = NetnsFd::open(container).expect("namespace");
    run_in(&netns, || {
        let socket = UdpSocket::bind("[::]:0").expect("socket");
        socket.send_to(b"x", to).expect("sent");
    })
    .expect("inside");
    loop {
        match host.recv(&mut [0; 8]) {
            Ok(_) => return true,
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock),
        }
        if discarded() > before {
            return false;
        }
        thread::yield_now();
    }
}

#[test]
fn without_ip6tables_ipv6_is_closed_and_said_to_be() {
    on_a_host(|lab| {
        lab.take_away(is_of_v6);
        let web = lab.container("web");
        let output = lab.run(&format!("{} -o json", attach(&web)));
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert!(said.contains("no ip6tables, so IPv6 is closed"), "{said:?}");
        let attached = json(&String::from_utf8_lossy(&output.stdout));
        assert!(!has_v6(&attached), "{attached}");
        assert_eq!(attached["state"], "active");
        let (closed, others) = drift(lab);
        assert_eq!(closed, ["closed on bridge nucnet0: there is no ip6tables"]);
        assert_eq!(others, NOTHING);
        give_v6(lab, &web);
        assert!(!reaches_the_host(&web));
        // The same again has nothing to repair.
        assert!(lab.ok(&attach(&web)).contains("is attached already"));
    });
}

#[test]
fn what_is_of_ipv6_alone_is_refused_without_ip6tables() {
    on_a_host(|lab| {
        let before = lab.snapshot();
        lab.take_away(is_of_v6);
        for arguments in [
            "network create six --subnet6 fd01::/64",
            "nat add dnat --ext-ip 2001:db8::1 --ports 80 --int-ip fd02::1",
        ] {
            let (code, error) = lab.refused(&by_rules(arguments));
            assert_eq!((code, &error["kind"]), (5, &"unsupported".into()));
            assert!(text(&error["message"]).contains("no ip6tables"), "{error}");
        }
        lab.give_back();
        lab.assert_unchanged(&before, "after refusals");
        lab.take_away(is_of_v6);
        lab.ok(&by_rules(
            "network create both --subnet 10.9.0.0/24 --subnet6 fd03::/64",
        ));
        let web = lab.container("web");
        let asked = format!(
            "attach --netns {} --network both --ip fd03::7",
            web.display()
        );
        let (code, error) = lab.refused(&by_rules(&asked));
        assert_eq!((code, &error["kind"]), (5, &"unsupported".into()));
    });
}

#[test]
fn ip6tables_that_goes_closes_ipv6_with_the_next_change_and_opens_it_coming_back() {
    on_a_host(|lab| {
        let web = lab.container("web");
        assert!(has_v6(&lab.json(&attach(&web))));
        assert!(!is_closed("nucnet0"));
        assert_eq!(drift(lab), (Vec::new(), NOTHING.to_vec()));
        lab.ok(&by_rules("egress clear web"));
        assert!(reaches_the_host(&web));

        lab.take_away(is_of_v6);
        let (_, others) = drift(lab);
        assert_eq!(others.len(), 1, "{others:?}");
        assert!(text(&others[0]["problem"]).contains("takes IPv6"));
        // The rules of IPv6 are those of the old policy, and nobody can change them.
        lab.ok(&by_rules("egress set web --deny any"));
        assert!(is_closed("nucnet0"));
        assert_eq!(
            lab.json(&by_rules("inspect web"))["state"],
            Value::from("degraded")
        );
        assert!(!reaches_the_host(&web));
        let (closed, others) = drift(lab);
        assert_eq!((closed.len(), others), (1, NOTHING.to_vec()));

        lab.give_back();
        assert!(lab.ok(&attach(&web)).contains("is repaired"));
        assert!(!is_closed("nucnet0"));
        assert_eq!(drift(lab), (Vec::new(), NOTHING.to_vec()));
        assert_eq!(
            lab.json(&by_rules("inspect web"))["state"],
            Value::from("active")
        );
    });
}

#[test]
fn programs_serve_ipv6_that_rules_could_not() {
    on_a_host(|lab| {
        let web = lab.container("web");
        lab.ok(&format!("attach --netns {} --id web", web.display()));
        lab.take_away(is_of_v6);
        lab.ok(&by_rules("gc"));
        assert!(is_closed("nucnet0"));
        lab.ok("--datapath ebpf gc");
        assert!(!is_closed("nucnet0"));
        let status = lab.json("status");
        assert_eq!(list(&status["drift"]), NOTHING);
    });
}

#[test]
fn network_without_ipv6_takes_none_from_the_link_either() {
    for datapath in ["ebpf", "iptables"] {
        on_a_host(move |lab| {
            lab.ok(&format!(
                "--datapath {datapath} network create four --subnet 10.9.0.0/24 --bridge four0"
            ));
            assert!(is_closed("four0"), "{datapath}");
            assert!(!ip("address show dev four0").contains("fe80"), "{datapath}");
        });
    }
}
