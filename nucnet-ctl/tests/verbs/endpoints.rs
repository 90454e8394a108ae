//! Endpoints and networks: what the verbs make, refuse, and leave behind when they fail or are
//! killed.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command, thread};

use nucnet_common::abi;
use nucnet_ctl::{
    AttachRequest, Container, Error, Kind,
    kernel::netns::{self, NetnsFd, run_in},
    model::EndpointId,
};
use serde_json::Value;

use crate::lab::{command, has_faults, inside, ip, on_a_host};

#[test]
fn a_container_gets_address_routes_and_neighbours_and_loses_everything_again() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let before = lab.snapshot();
        let attach = format!(
            "attach --netns {} --id web -p 8080:80 --allow any:443",
            web.display()
        );
        let view = lab.json(&attach);
        assert_eq!(view["state"], "active");
        assert_eq!(view["network"], "default");
        assert_eq!(view["netns"], web.display().to_string());
        assert_eq!(view["datapath"], "ebpf");
        assert_eq!(view["egress"]["default"], "deny");
        assert_eq!(view["egress"]["allow"][0], "any:443");
        assert_eq!(view["published"][0]["host_ip"], Value::Null);
        assert_eq!(view["published"][0]["host_port"], 8080);
        assert_eq!(view["addresses"].as_array().expect("list").len(), 2);
        assert_eq!(view["mtu"], 1480, "the smallest of the uplinks'");

        let addresses = inside(&web, "address show eth0");
        for address in view["addresses"].as_array().expect("list") {
            assert!(
                addresses.contains(address.as_str().expect("text")),
                "{addresses}"
            );
        }
        let global = |line: &str| line.contains("scope global");
        let waits = addresses
            .lines()
            .any(|line| global(line) && line.contains("tentative"));
        assert!(addresses.contains("UP") && !waits, "{addresses}");
        assert!(inside(&web, "route show default").contains("via 10.0.42.1 dev eth0 proto 110"));
        assert!(inside(&web, "-6 route show default").contains("dev eth0 proto 110"));
        assert!(inside(&web, "neighbour show nud permanent").contains("10.0.42.1 dev eth0"));
        let host_side = view["host_ifname"].as_str().expect("text");
        let link = ip(&format!("-details link show dev {host_side}"));
        assert!(
            link.contains("alias nucnet:web") && link.contains("locked on"),
            "{link}"
        );
        assert!(command("tc", &format!("filter show dev {host_side} ingress")).contains("bpf"));
        assert_eq!(
            fs::read_to_string("/proc/sys/net/ipv4/ip_forward")
                .expect("read")
                .trim(),
            "0"
        );

        let datapath = lab.datapath();
        assert_eq!(datapath.endpoints.count().expect("count"), 1);
        assert_eq!(datapath.addresses.count().expect("count"), 2);
        assert_eq!(datapath.publishes.count().expect("count"), 2);
        drop(datapath);

        assert_eq!(lab.json("list")[0]["id"], "web");
        assert_eq!(lab.json("inspect web")["flows"], 0);
        assert_eq!(lab.json("network list")[0]["id"], "default");

        lab.ok("detach web");
        lab.ok("detach web");
        assert_eq!(lab.json("list"), Value::Array(vec![]));
        assert_eq!(
            lab.json("network list"),
            Value::Array(vec![]),
            "it went with its endpoint"
        );
        let datapath = lab.datapath();
        for count in [
            datapath.endpoints.count(),
            datapath.addresses.count(),
            datapath.publishes.count(),
            datapath.policy_cidrs.count(),
            datapath.policy_ports.count(),
            datapath.usage.count(),
        ] {
            assert_eq!(count.expect("count"), 0);
        }
        drop(datapath);
        lab.ok("down");
        lab.ok("down");
        lab.assert_unchanged(&before, "afterwards");
    });
}

#[test]
fn the_same_again_changes_nothing_and_others_are_a_conflict() {
    on_a_host(|lab| {
        let (web, db) = (lab.container("web"), lab.container("db"));
        let attach = format!("attach --netns {} --id web -p 0:80", web.display());
        let (first, second) = (lab.json(&attach), lab.json(&attach));
        for field in ["addresses", "mac", "host_ifname", "published"] {
            assert_eq!(first[field], second[field], "{field}");
        }
        for other in [
            format!("{attach} --mtu 1400"),
            format!("{attach} -p 81:81"),
            format!("{attach} --deny any:25"),
            format!("attach --netns {} --id web -p 0:80", db.display()),
            // The namespace has an endpoint of the network.
            format!("attach --netns {} --id other", web.display()),
        ] {
            let (code, error) = lab.refused(&other);
            assert_eq!(
                (code, &error["kind"]),
                (4, &Value::from("conflict")),
                "{other}"
            );
            assert!(
                error["message"].as_str().expect("text").contains("web"),
                "{error}"
            );
        }
    });
}

#[test]
fn bad_input_is_refused_with_the_exit_code_of_the_contract_and_nothing_is_touched() {
    on_a_host(|lab| {
        let web = lab.container("web");
        fs::write(lab.place.join("file"), "").expect("write");
        let place = lab.place.display();
        let before = lab.snapshot();
        let netns = format!("attach --netns {}", web.display());
        for (arguments, code, says) in [
            ("attach", 2, "--pid"),
            ("attach --pid x", 2, "--pid"),
            ("attach --pid 1 --netns /x", 2, "--pid"),
            ("frobnicate", 2, "frobnicate"),
            (&format!("{netns} --id a/b"), 2, "a/b"),
            (&format!("{netns} --id {}", "a".repeat(65)), 2, "--id"),
            (&format!("{netns} --ip 10.0.43.1"), 2, "10.0.42.0/24"),
            (&format!("{netns} --ip 10.0.42.1"), 2, "gateway"),
            (&format!("{netns} --ip 10.0.42.0"), 2, "10.0.42.0"),
            (&format!("{netns} --ip 10.0.42.255"), 2, "broadcast"),
            (&format!("{netns} --ip 10.0.42.256"), 2, "--ip"),
            (
                &format!("{netns} --ip 10.0.42.2 --ip 10.0.42.3"),
                2,
                "10.0.42.3",
            ),
            (&format!("{netns} --mac 01:00:00:00:00:01"), 2, "--mac"),
            (&format!("{netns} --mtu 67"), 2, "--mtu"),
            (&format!("{netns} --mtu 65536"), 2, "--mtu"),
            (&format!("{netns} --mtu 1000"), 2, "IPv6"),
            (&format!("{netns} --ifname a/b"), 2, "--ifname"),
            (&format!("{netns} --ifname sixteen-bytes-xx"), 2, "--ifname"),
            (&format!("{netns} -p 80"), 2, "80"),
            (&format!("{netns} -p 80:80/sctp"), 2, "sctp"),
            (&format!("{netns} -p 80:80 -p 80:81"), 2, "80:81"),
            (&format!("{netns} --allow 10.0.0.0/33"), 2, "--allow"),
            (&format!("{netns} --deny any:80/icmp"), 2, "--deny"),
            (&format!("{netns} --dns 127.0.0.53"), 2, "--dns"),
            (&format!("{netns} --egress-default maybe"), 2, "maybe"),
            (&format!("{netns} --network a/b"), 2, "--network"),
            (&format!("{netns} --network blue"), 3, "blue"),
            (&format!("{netns} --rootfs /"), 2, "--rootfs /"),
            (&format!("attach --netns {place}/none"), 3, "none"),
            (&format!("attach --netns {place}/file"), 2, "file"),
            ("attach --netns /proc/self/ns/net", 2, "host"),
            ("attach --netns /proc/self/ns/mnt", 2, "mnt"),
            ("attach --pid 4194304", 3, "4194304"),
            ("attach --pid 0", 3, "0"),
            ("inspect web", 3, "web"),
            ("network remove blue", 3, "blue"),
            ("network remove blue --dry-run", 3, "blue"),
            ("network create blue --subnet 10.1.0.0/31", 2, "--subnet"),
            ("network create blue --subnet fd00::/64", 2, "--subnet6"),
            (
                "network create blue --subnet 10.1.0.0/24 --gateway 10.2.0.1",
                2,
                "--gateway",
            ),
            ("network create blue --gateway 10.2.0.1", 2, "--gateway"),
            (
                "network create blue --subnet6 fd00::/64 --mtu 1000",
                2,
                "--mtu",
            ),
            ("network create blue --subnet 192.0.2.128/25", 4, "up0"),
            (
                "network create blue --bridge up0 --subnet 10.1.0.0/24",
                4,
                "up0",
            ),
        ] {
            let (found, error) = lab.refused(arguments);
            assert_eq!(found, code, "{arguments}: {error}");
            let text = error.to_string();
            assert!(text.contains(says), "{arguments}: {text}");
            assert!(!error["message"].as_str().expect("text").is_empty());
        }
        lab.assert_unchanged(&before, "afterwards");
    });
}

#[test]
fn what_is_taken_is_a_conflict_that_names_its_owner() {
    on_a_host(|lab| {
        let (web, db) = (lab.container("web"), lab.container("db"));
        let listener = std::net::TcpListener::bind("0.0.0.0:7070").expect("bind");
        lab.ok(&format!(
            "attach --netns {} --id web --ip 10.0.42.9 --mac 02:00:00:00:00:09 -p 8080:80 \
             -p 9000-9009:1000-1009/udp",
            web.display()
        ));
        ip("address add 10.0.42.77/32 dev up0");
        let before = lab.snapshot();
        let attach = format!("attach --netns {} --id db", db.display());
        let me = std::process::id().to_string();
        for (flags, owner) in [
            ("--ip 10.0.42.77", "up0"),
            ("--ip 10.0.42.9", "web"),
            ("--mac 02:00:00:00:00:09", "web"),
            ("-p 127.0.0.1:8080:80", "web"),
            ("-p 9005:9005/udp", "web"),
            ("-p 7070:80", me.as_str()),
        ] {
            let (code, error) = lab.refused(&format!("{attach} {flags}"));
            assert_eq!(code, 4, "{flags}: {error}");
            assert!(
                error["message"].as_str().expect("text").contains(owner),
                "{flags}: {error}"
            );
        }
        inside(&db, "link add eth0 type bridge");
        assert_eq!(lab.refused(&attach).0, 4, "the container has an eth0");
        inside(&db, "link delete eth0");
        lab.assert_unchanged(&before, "afterwards");
        drop(listener);
        lab.ok(&format!("{attach} -p 8080:80/udp -p 7070:80"));
    });
}

#[test]
fn a_subnet_that_is_full_is_said_to_be_and_what_is_given_back_is_given_out() {
    on_a_host(|lab| {
        lab.ok("network create tiny --subnet 10.9.0.0/30");
        let attach = |id: &str| {
            let netns = lab.place.join(id);
            format!(
                "attach --netns {} --id {id} --network tiny",
                netns.display()
            )
        };
        let (web, _) = (lab.container("web"), lab.container("db"));
        // Whoever makes the container may leave that to nucnet.
        inside(&web, "link set lo down");
        let endpoint = lab.json(&attach("web"));
        assert_eq!(endpoint["addresses"], serde_json::json!(["10.9.0.2/30"]));
        assert!(inside(&web, "link show lo").contains("LOOPBACK,UP"));
        let before = lab.snapshot();
        let (code, error) = lab.refused(&attach("db"));
        assert_eq!(code, 1, "{error}");
        let message = error["message"].as_str().expect("text");
        assert!(message.contains("10.9.0.0/30"), "{error}");
        lab.assert_unchanged(&before, "no address");
        lab.ok("detach web");
        let endpoint = lab.json(&attach("db"));
        assert_eq!(endpoint["addresses"], serde_json::json!(["10.9.0.2/30"]));
    });
}

#[test]
fn what_the_dead_have_is_free() {
    on_a_host(|lab| {
        let (web, next) = (lab.container("web"), lab.container("next"));
        lab.ok(&format!(
            "attach --netns {} --id web --ip 10.0.42.9 -p 8080:80",
            web.display()
        ));
        netns::remove_named(&web).expect("remove");
        // The kernel takes namespaces apart in its own time.
        while !ip("link show type veth").contains("up0") || ip("link show").contains("nucnet:web") {
            thread::yield_now();
        }
        assert_eq!(lab.json("list")[0]["state"], "degraded");
        lab.ok(&format!(
            "attach --netns {} --id next --ip 10.0.42.9 -p 8080:80",
            next.display()
        ));
        assert_eq!(lab.json("list").as_array().expect("list").len(), 1);
        // And a container that is started again under its name.
        netns::remove_named(&next).expect("remove");
        let again = lab.container("again");
        lab.ok(&format!(
            "attach --netns {} --id next --ip 10.0.42.9 -p 8080:80",
            again.display()
        ));
    });
}

#[test]
fn created_networks_stay_and_are_what_was_asked_for() {
    on_a_host(|lab| {
        let create = "network create blue --bridge br-blue --subnet 10.9.0.7/16 --subnet6 \
                      fd09::/64 --gateway 10.9.255.254 --mtu 1400 --isolate --uplink up0";
        let view = lab.json(create);
        assert_eq!(view["id"], "blue");
        assert_eq!(
            view["subnets"],
            serde_json::json!(["10.9.0.0/16", "fd09::/64"])
        );
        assert_eq!(
            view["gateways"],
            serde_json::json!(["10.9.255.254", "fd09::1"])
        );
        assert_eq!(lab.json(create), view, "the same again");
        assert_eq!(lab.refused(&create.replace("1400", "1399")).0, 4);
        assert_eq!(lab.refused("network create red --subnet 10.9.1.0/24").0, 4);
        assert_eq!(lab.refused("network create red --bridge br-blue").0, 4);
        let addresses = ip("address show br-blue");
        assert!(addresses.contains("10.9.255.254/16") && addresses.contains("fd09::1/64"));

        let web = lab.container("web");
        let view = lab.json(&format!(
            "attach --netns {} --id web --network blue",
            web.display()
        ));
        assert_eq!(view["mtu"], 1400);
        for remove in ["network remove blue", "network remove blue --dry-run"] {
            let (code, error) = lab.refused(remove);
            assert_eq!(code, 4, "{remove}");
            assert!(error["message"].as_str().expect("text").contains("web"));
        }
        // A second network in the same container: the first owns the default routes.
        lab.ok(&format!(
            "attach --netns {} --id web2 --ifname eth1",
            web.display()
        ));
        assert!(inside(&web, "route show default").contains("dev eth0"));
        assert!(!inside(&web, "route show default").contains("dev eth1"));
        lab.ok("detach web web2");
        assert_eq!(lab.json("network list").as_array().expect("list").len(), 1);
        let plan = lab.json("network remove blue --dry-run");
        assert!(
            plan.to_string().contains("undo: make bridge br-blue"),
            "{plan}"
        );
        lab.ok("network remove blue");
        assert!(!ip("link show").contains("br-blue"));
        let view = lab.json("network create auto");
        assert_eq!(view["subnets"][0], "10.0.43.0/24");
        lab.ok("down");
    });
}

#[test]
fn a_dry_run_shows_the_plan_and_touches_nothing() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let before = lab.snapshot();
        let attach = format!("attach --netns {} --id web -p 8080:80", web.display());
        let plan = lab.json(&format!("{attach} --dry-run"));
        assert!(plan["plan"].as_array().expect("list").len() > 10, "{plan}");
        lab.json("network create blue --dry-run");
        lab.assert_unchanged(&before, "afterwards");
        lab.ok(&attach);
        let before = lab.snapshot();
        assert!(
            !lab.json("detach web --dry-run")["plan"]
                .as_array()
                .expect("list")
                .is_empty()
        );
        assert!(
            !lab.json("down --dry-run")["plan"]
                .as_array()
                .expect("list")
                .is_empty()
        );
        assert_eq!(
            lab.json(&format!("{attach} --dry-run"))["plan"],
            Value::Array(vec![])
        );
        lab.assert_unchanged(&before, "afterwards");
    });
}

#[test]
fn a_failure_at_any_step_leaves_the_host_exactly_as_it_was() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let (web, db) = (lab.container("web"), lab.container("db"));
        let flags = "-p 8080:80 -p 53:53/udp --allow 10.0.0.0/8:443 --deny any:25";
        let first = format!("attach --netns {} --id web {flags}", web.display());
        let second = format!("attach --netns {} --id db -p 8081:80", db.display());
        for attach in [first, second] {
            let before = lab.snapshot();
            let mut failures = 0;
            loop {
                let output = lab
                    .command(&attach)
                    .env("NUCNET_FAULT", format!("fail:{failures}"))
                    .output()
                    .expect("nucnet-ctl");
                if output.status.success() {
                    break;
                }
                let text = String::from_utf8_lossy(&output.stderr).into_owned();
                assert_eq!(output.status.code(), Some(1), "{text}");
                assert!(text.contains("injected"), "{text}");
                lab.assert_unchanged(&before, &format!("before step {failures}: {text}"));
                failures += 1;
            }
            assert!(failures > 9, "{failures}");
        }
    });
}

#[test]
fn whatever_step_it_is_killed_at_the_repeated_call_succeeds_and_nothing_stays() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let web = lab.container("web");
        let flags = "-p 8080:80 --allow 10.0.0.0/8:443";
        let attach = format!("attach --netns {} --id web {flags}", web.display());
        let before = lab.snapshot();
        let killed = |arguments: &str, step: usize| {
            let mut command = lab.command(arguments);
            let output = command.env("NUCNET_FAULT", format!("stop:{step}")).output();
            output.expect("nucnet-ctl").status.code().is_none()
        };
        lab.ok(&attach);
        lab.ok("detach web");
        let loaded = lab.snapshot();
        lab.ok("down");
        // The call is repeated, or what is left is collected, or all is taken down.
        let mut step = 0;
        while killed(&attach, step) {
            let when = format!("attach killed before step {step}");
            if step % 3 == 1 {
                lab.ok("gc");
                lab.assert_unchanged(&before, &when);
            } else if step % 6 != 5 {
                lab.ok(&attach);
                lab.ok("detach web");
                lab.assert_unchanged(&loaded, &when);
            } else {
                lab.ok("down");
                lab.assert_unchanged(&before, &when);
            }
            step += 1;
        }
        assert!(step > 15, "{step}");
        for (verb, after) in [("detach web", loaded), ("down", before)] {
            let mut step = 0;
            loop {
                lab.ok(&attach);
                let was_killed = killed(verb, step);
                lab.ok(verb);
                lab.assert_unchanged(&after, &format!("{verb} killed before step {step}"));
                if !was_killed {
                    break;
                }
                step += 1;
            }
            assert!(step > 9, "{verb}: {step}");
        }
    });
}

#[test]
fn attaches_from_many_processes_at_once_get_addresses_of_their_own() {
    const PROCESSES: usize = 16;
    on_a_host(|lab| {
        let containers: Vec<PathBuf> = (0..PROCESSES)
            .map(|n| lab.container(&format!("c{n}")))
            .collect();
        for _ in 0..2 {
            let children: Vec<_> = containers
                .iter()
                .enumerate()
                .map(|(n, netns)| {
                    let flags = format!("--id c{n} -p 0:80 -p {}:80/udp", 5000 + n);
                    let attach = format!("-o json attach --netns {} {flags}", netns.display());
                    let mut command = lab.command(&attach);
                    command.stdout(std::process::Stdio::piped());
                    command.spawn().expect("nucnet-ctl")
                })
                .collect();
            let mut addresses = BTreeSet::new();
            let mut ports = BTreeSet::new();
            for child in children {
                let output = child.wait_with_output().expect("wait");
                assert!(output.status.success());
                let view: Value = serde_json::from_slice(&output.stdout).expect("JSON");
                addresses.insert(view["addresses"][0].to_string());
                ports.insert(view["published"][0]["host_port"].to_string());
            }
            assert_eq!((addresses.len(), ports.len()), (PROCESSES, PROCESSES));
            let detached: Vec<_> = (0..PROCESSES)
                .map(|n| {
                    lab.command(&format!("detach c{n}"))
                        .spawn()
                        .expect("nucnet-ctl")
                })
                .collect();
            for mut child in detached {
                assert!(child.wait().expect("wait").success());
            }
            assert_eq!(lab.json("list"), Value::Array(vec![]));
            assert!(!ip("link show").contains("nucnet:"));
        }
    });
}

#[test]
fn endpoints_that_are_detached_together_go_and_the_others_stay() {
    on_a_host(|lab| {
        let containers: Vec<PathBuf> = (0..5).map(|n| lab.container(&format!("c{n}"))).collect();
        let attach = |n: usize| {
            let flags = format!("--id c{n} -p {}:80 --allow any", 8000 + n);
            lab.ok(&format!(
                "attach --netns {} {flags}",
                containers[n].display()
            ));
        };
        attach(0);
        lab.ok("detach c0");
        let before = lab.snapshot();
        (1..5).for_each(attach);
        lab.ok("detach c1 nobody c2 c4 c2");
        let list = lab.json("list");
        assert_eq!(
            (list.as_array().map(Vec::len), &list[0]["id"]),
            (Some(1), &"c3".into())
        );
        let links = ip("link show");
        assert!(links.contains("nucnet:c3"), "{links}");
        assert!(!links.contains("nucnet:c1"), "{links}");
        lab.ok("detach c3");
        lab.assert_unchanged(&before, "detached together");
    });
}

#[test]
fn detach_of_several_that_is_killed_is_finished_by_the_same_call_or_by_gc() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let containers = [lab.container("c0"), lab.container("c1")];
        let before = lab.snapshot();
        let mut killed = 0;
        // Every step has its turn with one endpoint, elsewhere.
        for step in (0..).step_by(4) {
            for (n, netns) in containers.iter().enumerate() {
                let flags = format!("--id c{n} -p {}:80", 8000 + n);
                lab.ok(&format!("attach --netns {} {flags}", netns.display()));
            }
            let mut command = lab.command("detach c0 c1");
            let command = command.env("NUCNET_FAULT", format!("stop:{step}"));
            let is_over = command.output().expect("nucnet-ctl").status.success();
            lab.ok(if step % 8 == 0 { "detach c0 c1" } else { "gc" });
            lab.ok("detach c0 c1");
            lab.ok("down");
            lab.assert_unchanged(&before, &format!("killed at step {step}"));
            if is_over {
                break;
            }
            killed += 1;
        }
        assert!(killed > 5, "{killed}");
    });
}

#[test]
fn state_of_another_host_or_bpffs_is_refused_with_the_remedy() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let attach = format!("attach --netns {} --id web", web.display());
        lab.ok(&attach);
        let other = lab.place.join("bpf/other");
        let (code, error) = lab.refused(&format!("{attach} --bpffs {}", other.display()));
        assert_eq!(code, 4, "{error}");
        assert!(
            error["hint"].as_str().expect("hint").contains("--bpffs"),
            "{error}"
        );
        // Another host with the same state directory, or with the same pins only.
        let elsewhere = lab.container("elsewhere");
        let elsewhere = NetnsFd::open(&elsewhere).expect("namespace");
        run_in(&elsewhere, || {
            assert_eq!(lab.refused(&attach).0, 4);
            assert_eq!(lab.refused("list").0, 4);
            assert_eq!(lab.refused("down").0, 4);
            let state = lab.place.join("state2");
            assert_eq!(
                lab.refused(&format!("{attach} --state-dir {}", state.display()))
                    .0,
                4
            );
            assert!(!state.exists());
        })
        .expect("elsewhere");
        assert_eq!(lab.json("list")[0]["state"], "active");
    });
}

#[test]
fn an_attachment_detaches_when_dropped_unless_kept() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let mut request = AttachRequest::new(Container::Netns(web));
        let id: EndpointId = "web".parse().expect("id");
        request.id = Some(id.clone());
        let host = lab.host();
        drop(host.attach(&request).expect("attach"));
        assert_eq!(host.list().expect("list"), []);
        let view = host.attach(&request).expect("attach").keep();
        assert_eq!(host.list().expect("list"), [view]);
        // Whoever finds it attached does not own it.
        drop(host.attach(&request).expect("attach"));
        assert_eq!(host.list().expect("list").len(), 1);
        let mut other = request.clone();
        other.id = None;
        let error: Error = host.attach(&other).expect_err("taken");
        assert_eq!(error.kind(), Kind::Conflict);
        assert_eq!(host.detach(&[id]).expect("detach").removed.len(), 1);
    });
}

#[test]
fn a_container_given_by_process_id_gets_a_derived_id() {
    on_a_host(|lab| {
        let netns = NetnsFd::open(&lab.container("web")).expect("namespace");
        let mut process = run_in(&netns, || Command::new("sleep").arg("600").spawn())
            .expect("inside")
            .expect("sleep");
        let attach = format!("attach --pid {}", process.id());
        let view = lab.json(&attach);
        assert_eq!(view["netns"], format!("/proc/{}/ns/net", process.id()));
        assert_eq!(lab.json(&attach)["id"], view["id"]);
        lab.ok(&format!("detach {}", view["id"].as_str().expect("text")));
        process.kill().expect("kill");
        process.wait().expect("wait");
        assert_eq!(lab.refused(&attach).0, 3);
    });
}

#[test]
fn a_damaged_record_stops_nobody_else() {
    on_a_host(|lab| {
        let (web, db) = (lab.container("web"), lab.container("db"));
        lab.ok(&format!("attach --netns {} --id web", web.display()));
        let record = lab.place.join("state/endpoints/web.json");
        fs::write(&record, "{").expect("write");
        let output = lab.run("list -o json");
        assert!(output.status.success());
        assert!(
            String::from_utf8_lossy(&output.stderr).contains("web.json"),
            "it is reported"
        );
        lab.ok(&format!("attach --netns {} --id db", db.display()));
        lab.ok("detach db");
        // What it has is nobody else's, and it is kept until it is detached.
        assert_eq!(lab.json("gc")["unrecorded"], serde_json::json!(["web"]));
        assert!(ip("link show").contains("nucnet:web"));
        lab.ok("detach web");
        assert!(!ip("link show").contains("nucnet:web"));
        assert_eq!(lab.datapath().endpoints.count().expect("count"), 0);
        lab.ok(&format!("attach --netns {} --id web", web.display()));
        lab.ok("detach web");
        let before = fs::read_to_string(lab.place.join("state/host.json")).expect("read");
        fs::write(lab.place.join("state/host.json"), &before[..20]).expect("write");
        // Numbers are not given twice for that.
        let view = lab.json(&format!("attach --netns {} --id db", db.display()));
        assert!(
            view["host_ifname"].as_str().expect("text") > "nn00000002",
            "{view}"
        );
        lab.ok("down");
    });
}

#[test]
fn ports_of_a_live_endpoint_come_and_go() {
    on_a_host(|lab| {
        let (web, db) = (lab.container("web"), lab.container("db"));
        lab.ok(&format!(
            "attach --netns {} --id web -p 8080:80",
            web.display()
        ));
        lab.ok(&format!(
            "attach --netns {} --id db -p 5432:5432",
            db.display()
        ));
        let ports = |view: &Value| -> Vec<u64> {
            let published = view["published"].as_array().expect("list").iter();
            published
                .map(|p| p["host_port"].as_u64().expect("port"))
                .collect()
        };
        let view = lab.json("publish web 8443:443 127.0.0.1:53:53/udp 8080:80");
        assert_eq!(ports(&view), [8080, 8443, 53]);
        // One more for the port that is published at one address, and held at any.
        assert_eq!(
            lab.datapath().publishes.count().expect("count"),
            2 + 2 + (1 + 1) + 2
        );
        let before = lab.snapshot();
        for (arguments, code) in [
            ("publish web 8443:444", 4),
            ("publish web 5432:80", 4),
            ("publish nobody 80:80", 3),
            ("publish web 80", 2),
            ("unpublish web 8443:444", 3),
            // All or nothing.
            ("unpublish web 8443:443 9999:9", 3),
            ("unpublish nobody 80:80", 3),
        ] {
            assert_eq!(lab.refused(arguments).0, code, "{arguments}");
        }
        let view = lab.json("publish web 0:81");
        let chosen = *ports(&view).last().expect("port");
        assert!(chosen > 1024);
        lab.ok(&format!("unpublish web {chosen}:81"));
        lab.assert_unchanged(&before, "afterwards");

        // What came in by a publish ends with it; what else the endpoint has does not.
        let host_side = view["host_ifname"].as_str().expect("text").to_owned();
        let link = nix::net::if_::if_nametoindex(host_side.as_str()).expect("index");
        let mut datapath = lab.datapath();
        let number = datapath
            .endpoints
            .get(&link)
            .expect("get")
            .expect("entry")
            .number;
        let mut flows = Vec::new();
        for (inside_port, external_port) in [(443, 8443), (80, 8080)] {
            let key = abi::FlowKey {
                endpoint: number,
                protocol: 6,
                inside_port,
                ..abi::FlowKey::default()
            };
            let flow = abi::Flow {
                flags: abi::flow_flag::INBOUND,
                external_port,
                // Not before this machine was booted.
                last_seen: u64::MAX,
                timeout_s: 240,
                ..abi::Flow::default()
            };
            datapath.flows.insert(&key, &flow).expect("insert");
            flows.push(key);
        }
        let usage = abi::Usage {
            flows: 2,
            bindings: 0,
        };
        datapath.usage.insert(&number, &usage).expect("insert");
        lab.ok("unpublish web 8443:443");
        let timeout = |key| {
            datapath
                .flows
                .get(key)
                .expect("get")
                .expect("flow")
                .timeout_s
        };
        assert_eq!((timeout(&flows[0]), timeout(&flows[1])), (0, 240));

        // Killed half-way, the repeated call succeeds.
        for step in 0..if has_faults() { 5 } else { 0 } {
            for verb in ["publish web 9090:90", "unpublish web 9090:90"] {
                let mut command = lab.command(verb);
                let output = command.env("NUCNET_FAULT", format!("stop:{step}")).output();
                assert_eq!(output.expect("nucnet-ctl").status.code(), None);
                // What was done but for the report cannot be undone again.
                let is_over = step == 4 && verb.starts_with("un");
                let code = lab.run(verb).status.code();
                assert_eq!(
                    code,
                    Some(if is_over { 3 } else { 0 }),
                    "{verb}, step {step}"
                );
            }
            let entries = lab.datapath().publishes.count().expect("count");
            assert_eq!(entries, 2 + (1 + 1) + 2);
        }
        lab.ok("detach web db");
        assert_eq!(lab.datapath().publishes.count().expect("count"), 0);
    });
}

#[test]
fn collection_takes_what_has_no_record_and_leaves_the_living_alone() {
    on_a_host(|lab| {
        let (web, dead, lost) = (
            lab.container("web"),
            lab.container("dead"),
            lab.container("lost"),
        );
        // Of somebody else's.
        ip("link add foreign0 type bridge");
        ip("link set foreign0 alias nucnot");
        lab.ok(&format!(
            "attach --netns {} --id web -p 8080:80 --allow any:443",
            web.display()
        ));
        lab.ok("network create blue");
        lab.ok("gc");
        let before = lab.snapshot();
        lab.ok(&format!(
            "attach --netns {} --id dead -p 81:80 --deny any:25",
            dead.display()
        ));
        lab.ok(&format!(
            "attach --netns {} --id lost -p 82:80 --deny any:26",
            lost.display()
        ));
        netns::remove_named(&dead).expect("remove");
        while ip("link show").contains("nucnet:dead") {
            thread::yield_now();
        }
        let remains = |line: &&str| !line.starts_with("dead: ");
        let before: Vec<&str> = before.lines().filter(remains).collect();
        let before = before
            .join("\n")
            .replace(&format!("mount {}\n", dead.display()), "");
        fs::remove_file(lab.place.join("state/endpoints/lost.json")).expect("remove");
        let planned = lab.json("gc --dry-run");
        assert!(
            planned["removed"].to_string().contains("endpoint dead"),
            "{planned}"
        );
        assert!(
            ip("link show").contains("nucnet:lost"),
            "it was only planned"
        );
        let removed = lab.json("gc")["removed"].to_string();
        for what in ["endpoint dead", "nucnet:lost", "policy_ports", "publishes"] {
            assert!(removed.contains(what), "{what}: {removed}");
        }
        lab.assert_unchanged(&before, "collected");
        assert_eq!(lab.json("gc")["removed"], Value::Array(vec![]));
        let datapath = lab.datapath();
        assert_eq!(datapath.endpoints.count().expect("count"), 1);
        assert_eq!(datapath.publishes.count().expect("count"), 2);
        assert_eq!(lab.json("list")[0]["state"], "active");
    });
}

#[test]
fn completions_are_printed_without_a_host() {
    let output = Command::new(env!("CARGO_BIN_EXE_nucnet-ctl"))
        .args(["completions", "bash"])
        .output();
    let output = output.expect("nucnet-ctl");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("unpublish"));
}

#[test]
fn what_cannot_be_written_is_an_error_unless_it_tells_of_something_done() {
    on_a_host(|lab| {
        let full = |arguments: &str| {
            let full = fs::File::options().write(true).open("/dev/full");
            let mut command = lab.command(arguments);
            let output = command.stdout(full.expect("/dev/full")).output();
            let output = output.expect("nucnet-ctl");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            (output.status.code(), said)
        };
        let (code, said) = full("network create blue");
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("it is done, but cannot be shown"), "{said}");
        assert_eq!(lab.json("network list")[0]["id"], "blue");
        for answer in [
            "network list",
            "-o json list",
            "flows",
            "-o json flows",
            "-o json gc --dry-run",
        ] {
            let (code, said) = full(answer);
            assert_eq!(code, Some(1), "{answer}: {said}");
            assert!(said.contains("cannot write to standard output"), "{said}");
        }

        let (reader, writer) = std::io::pipe().expect("pipe");
        drop(reader);
        let mut unheard = lab.command("network list");
        let status = unheard.stdout(writer).status().expect("nucnet-ctl");
        assert!(status.success(), "nobody listening is no error: {status}");
    });
}
