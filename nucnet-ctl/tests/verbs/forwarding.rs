//! Hosts whose kernel forwards IPv6 for all interfaces or for none (before Linux 6.17).

use std::{collections::BTreeMap, fs, path::Path};

use nix::mount::MsFlags;
use serde_json::Value;

use crate::lab::{Lab, has_faults, ip, mounted, on_a_host};

const CREATE: &str = "--datapath iptables network create red --subnet6 fd00:71::/64";
const REMOVE: &str = "--datapath iptables network remove red";

/// Hides from the host that single interfaces can be told to forward.
fn with_one_switch(lab: &Lab) {
    let own = Path::new("/proc/sys/net/ipv6/conf/up0/force_forwarding");
    if own.exists() {
        // What is no text cannot be read as a sysctl.
        let unreadable = lab.place.join("unreadable");
        fs::write(&unreadable, [0xff]).expect("file");
        let unreadable = unreadable.to_str().expect("text");
        mounted(unreadable, own, None, MsFlags::MS_BIND);
    }
}

fn path(interface: &str) -> String {
    format!("/proc/sys/net/ipv6/conf/{interface}/forwarding")
}

fn set(interface: &str, value: &str) {
    fs::write(path(interface), value).expect("sysctl");
}

/// Which interfaces forward, `all` and `default` among them.
fn forwarding() -> BTreeMap<String, bool> {
    let interfaces = fs::read_dir("/proc/sys/net/ipv6/conf").expect("interfaces");
    let names = interfaces.map(|entry| entry.expect("entry").file_name());
    let names = names.map(|name| name.into_string().expect("text"));
    let value = |name: &String| fs::read_to_string(path(name)).expect("sysctl");
    names
        .map(|name| (name.clone(), value(&name).trim() != "0"))
        .collect()
}

/// A host on which somebody has told single interfaces to forward, though it forwards nothing.
fn told_one_by_one(lab: &Lab) -> BTreeMap<String, bool> {
    with_one_switch(lab);
    ip("link add user0 type veth peer name user1");
    ip("link add user2 type veth peer name user3");
    for interface in ["user0", "user2", "user3", "default"] {
        set(interface, "1");
    }
    forwarding()
}

#[test]
fn interfaces_that_were_told_to_forward_still_do_after_the_hosts_switch() {
    on_a_host(|lab| {
        let mut before = told_one_by_one(lab);
        assert!(!before["all"] && before["user0"] && !before["user1"]);
        for meanwhile in [false, true] {
            lab.ok(CREATE);
            assert!(forwarding()["all"], "or this shows nothing");
            if meanwhile {
                // What somebody says in the meantime stays, and what is gone is.
                set("user0", "0");
                ip("link delete user2");
                before.retain(|name, _| name != "user2" && name != "user3");
                before.insert("user0".to_owned(), false);
            }
            lab.ok(REMOVE);
            assert_eq!(forwarding(), before);
        }
    });
}

#[test]
fn hosts_switch_that_somebody_turned_off_himself_is_left_to_him() {
    on_a_host(|lab| {
        let mut before = told_one_by_one(lab);
        lab.ok(CREATE);
        set("all", "0");
        lab.ok(REMOVE);
        before.values_mut().for_each(|forwards| *forwards = false);
        assert_eq!(forwarding(), before);
    });
}

#[test]
fn interfaces_that_were_told_to_forward_still_do_after_a_killed_call() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let before = told_one_by_one(lab);
        let mut half_done = 0;
        for number in 0.. {
            let mut is_over = true;
            for call in [CREATE, REMOVE] {
                let mut killed = lab.command(call);
                let output = killed.env("NUCNET_FAULT", format!("file:{number}:kill"));
                is_over &= output.output().expect("nucnet-ctl").status.code().is_some();
                let now = forwarding();
                half_done += usize::from(!now["all"] && !now["user0"]);
                lab.ok("--datapath iptables gc");
                let is_there = lab.json("network list") != Value::Array(Vec::new());
                match call {
                    CREATE => drop(lab.ok(CREATE)),
                    _ if is_there => drop(lab.ok(REMOVE)),
                    _ => {}
                }
            }
            assert_eq!(forwarding(), before, "killed at change {number}");
            if is_over {
                break;
            }
        }
        assert!(half_done > 0, "or this shows nothing");
    });
}
