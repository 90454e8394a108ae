//! `attach` of what is attached, and damaged: it is brought back in place.

use std::{fs, path::Path, thread};

use nix::mount::umount2;
use nucnet_common::abi;
use nucnet_ctl::kernel::{bpf::Prefix, resolv};

use crate::lab::{Lab, command, has_faults, inside, ip, list, on_a_host, text};

/// Attaches, has somebody do damage, and attaches again: everything is as it was, and status
/// knew.
fn repaired(damage: impl Fn(&Lab, &Path, &str) + Send + 'static) {
    on_a_host(move |lab| {
        let netns = lab.container("web");
        let root = lab.place.join("root");
        fs::create_dir_all(root.join("etc")).expect("root directory");
        let attach = format!(
            "attach --netns {} --id web -p 8080:80 -p 53:53/udp --allow 10.0.0.0/8:443 \
             --deny any:25 --dns 192.0.2.53 --rootfs {}",
            netns.display(),
            root.display()
        );
        let host_side = text(&lab.json(&attach)["host_ifname"]);
        lab.attach("another", "-p 9090:90");
        let sound = lab.snapshot();
        assert_eq!(
            lab.json(&format!("{attach} --dry-run"))["plan"],
            serde_json::json!([])
        );
        lab.ok(&attach);
        lab.assert_unchanged(&sound, "nothing to repair");

        damage(lab, &netns, &host_side);
        assert_ne!(lab.drift(), [], "status does not see it");
        let planned = lab.json(&format!("{attach} --dry-run"));
        assert_ne!(planned["plan"], serde_json::json!([]));
        let said = lab.ok(&attach);
        assert!(said.contains("repaired"), "{said}");
        assert_eq!(lab.drift(), []);
        lab.assert_unchanged(&sound, "repaired");
        assert!(lab.ok(&attach).contains("already"));
        lab.ok("detach web another");
        lab.ok("down");
    });
}

#[test]
fn a_program_that_somebody_took_off_is_put_back() {
    repaired(|_, _, host_side| {
        command("tc", &format!("filter del dev {host_side} ingress"));
    });
}

#[test]
fn the_queueing_discipline_of_the_program_is_put_back() {
    repaired(|_, _, host_side| {
        command("tc", &format!("qdisc del dev {host_side} clsact"));
    });
}

#[test]
fn an_uplink_whose_program_somebody_took_off_gets_it_back() {
    repaired(|lab, _, _| {
        let link = lab.options().bpffs.join("links/from_uplink@up0");
        command("bpftool", &format!("link detach pinned {}", link.display()));
    });
}

#[test]
fn an_uplink_that_came_up_since_the_attach_gets_its_program() {
    repaired(|lab, _, _| {
        let link = lab.options().bpffs.join("links/from_uplink@up0");
        fs::remove_file(link).expect("remove");
        let mut datapath = lab.datapath();
        assert!(datapath.uplinks.remove(&index("up0")).expect("remove"));
    });
}

fn index(interface: &str) -> u32 {
    nix::net::if_::if_nametoindex(interface).expect("index")
}

#[test]
fn an_endpoint_that_the_maps_lost_is_put_back() {
    repaired(|lab, _, host_side| {
        let mut datapath = lab.datapath();
        datapath.remove_endpoint(index(host_side)).expect("remove");
    });
}

#[test]
fn an_entry_that_says_something_else_is_put_right() {
    repaired(|lab, _, host_side| {
        let mut datapath = lab.datapath();
        let link = index(host_side);
        let mut entry = datapath.endpoints.get(&link).expect("get").expect("entry");
        entry.policy = 0;
        datapath.endpoints.insert(&link, &entry).expect("insert");
    });
}

#[test]
fn an_address_that_the_maps_lost_is_put_back() {
    repaired(|lab, _, host_side| {
        let mut datapath = lab.datapath();
        let entry = datapath.endpoints.get(&index(host_side)).expect("get");
        let address = entry.expect("entry").address6;
        assert!(datapath.addresses.remove(&address).expect("remove"));
    });
}

#[test]
fn publishes_that_the_maps_lost_are_put_back() {
    repaired(|lab, _, _| {
        let mut datapath = lab.datapath();
        for (key, publish) in datapath.publishes.entries().expect("entries") {
            if publish.host_port == 53 {
                datapath.publishes.remove(&key).expect("remove");
            }
        }
    });
}

#[test]
fn a_policy_that_the_maps_lost_is_put_back() {
    repaired(|lab, _, _| {
        let mut datapath = lab.datapath();
        for (key, _) in datapath.policy_cidrs.entries().expect("entries") {
            datapath.policy_cidrs.remove(&key).expect("remove");
        }
    });
}

#[test]
fn ports_of_a_policy_that_the_maps_lost_are_put_back() {
    repaired(|lab, _, _| {
        let mut datapath = lab.datapath();
        let entries: Vec<(Prefix<abi::PolicyPortKey>, _)> =
            datapath.policy_ports.entries().expect("entries");
        datapath.policy_ports.remove(&entries[0].0).expect("remove");
    });
}

#[test]
fn a_host_side_that_is_down_or_no_port_is_put_right() {
    repaired(|_, _, host_side| {
        ip(&format!("link set {host_side} down"));
        ip(&format!("link set {host_side} nomaster"));
    });
}

#[test]
fn neighbours_of_the_host_are_put_back() {
    repaired(|lab, _, _| {
        let own: Vec<String> = list(&lab.json("inspect web")["addresses"])
            .iter()
            .filter_map(|address| Some(text(address).split_once('/')?.0.to_owned()))
            .collect();
        let there = ip("neighbour show dev nucnet0 nud permanent");
        for address in there.lines().filter_map(|line| line.split(' ').next()) {
            if own.contains(&address.to_owned()) {
                ip(&format!("neighbour del {address} dev nucnet0"));
            }
        }
    });
}

#[test]
fn a_bridge_that_somebody_deleted_is_made_again_with_all_that_was_on_it() {
    on_a_host(|lab| {
        let netns = lab.attach("web", "-p 8080:80");
        lab.attach("another", "");
        ip("link delete nucnet0");
        let drift = lab.drift();
        assert!(
            drift.iter().any(|(id, _)| id == "network default"),
            "{drift:?}"
        );
        lab.ok(&format!(
            "attach --netns {} --id web -p 8080:80",
            netns.display()
        ));
        assert_eq!(lab.drift(), []);
    });
}

#[test]
fn a_datapath_that_somebody_removed_is_loaded_again() {
    on_a_host(|lab| {
        let netns = lab.attach("web", "-p 8080:80 --allow any:443");
        for directory in ["links", "progs", "maps", ""] {
            let directory = lab.place.join("bpf/nucnet").join(directory);
            for entry in fs::read_dir(&directory).expect("pins").flatten() {
                fs::remove_file(entry.path()).expect("remove");
            }
            fs::remove_dir(directory).expect("remove");
        }
        assert_ne!(lab.drift(), []);
        lab.ok(&format!(
            "attach --netns {} --id web -p 8080:80 --allow any:443",
            netns.display()
        ));
        assert_eq!(lab.drift(), []);
    });
}

#[test]
fn a_repair_that_dies_or_fails_is_made_by_the_next_attach() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let attach = format!("--netns {} --id web", lab.attach("web", "").display());
        let attach = format!("attach {attach}");
        let sound = lab.snapshot();
        let mut steps = 0;
        for how in ["stop", "fail"] {
            for step in 0.. {
                ip("link set nucnet0 down");
                inside(&lab.place.join("web"), "link set eth0 down");
                let mut command = lab.command(&attach);
                command.env("NUCNET_FAULT", format!("{how}:{step}"));
                if command.output().expect("nucnet-ctl").status.success() {
                    break;
                }
                // Nobody takes it for something unfinished.
                lab.ok("gc");
                lab.ok(&attach);
                // The kernel notices carriers in its own time.
                while !ip("link show nucnet0").contains("state UP") {
                    thread::yield_now();
                }
                lab.assert_unchanged(&sound, &format!("{how} at step {step}"));
                steps += 1;
            }
        }
        assert!(steps > 20, "{steps}");
    });
}

#[test]
fn a_container_side_that_is_down_is_set_up_with_its_routes() {
    repaired(|_, netns, _| {
        inside(netns, "link set eth0 down");
    });
}

#[test]
fn addresses_within_the_container_are_put_back() {
    repaired(|_, netns, _| {
        inside(netns, "address flush dev eth0 scope global");
    });
}

#[test]
fn routes_and_neighbours_within_the_container_are_put_back() {
    repaired(|_, netns, _| {
        inside(netns, "route del default");
        inside(netns, "-6 route del default");
        inside(netns, "neighbour flush dev eth0 nud permanent");
    });
}

#[test]
fn a_resolv_conf_that_somebody_unmounted_is_mounted_again() {
    repaired(|lab, _, _| {
        let mounts = resolv::mounts(&lab.options().state_dir).expect("mounts");
        umount2(mounts[0].point(), nix::mount::MntFlags::empty()).expect("unmount");
    });
}

#[test]
fn a_bridge_without_address_is_mended_by_an_attach_that_was_made_already() {
    repaired(|_, _, _| {
        ip("address del 10.0.42.1/24 dev nucnet0");
    });
}

#[test]
fn a_bridge_that_does_not_forward_is_mended() {
    repaired(|_, _, _| {
        fs::write("/proc/sys/net/ipv4/conf/nucnet0/forwarding", "0").expect("sysctl");
        fs::write("/proc/sys/net/ipv6/conf/nucnet0/forwarding", "0").expect("sysctl");
    });
}

#[test]
fn a_bridge_without_its_program_is_mended() {
    repaired(|lab, _, _| {
        lab.datapath().detach_bridge("nucnet0").expect("detach");
    });
}

#[test]
fn a_bridge_that_is_down_is_mended() {
    repaired(|_, _, _| {
        ip("link set nucnet0 down");
    });
}

#[test]
fn a_network_that_the_maps_lost_is_put_back() {
    repaired(|lab, _, _| {
        let mut datapath = lab.datapath();
        let networks = datapath.networks.entries().expect("entries");
        datapath.networks.remove(&networks[0].0).expect("remove");
    });
}
