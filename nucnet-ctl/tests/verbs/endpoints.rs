//! Endpoints: what the verbs make, refuse and remove.

use std::{collections::BTreeSet, fs, path::PathBuf, process::Command};

use nucnet_common::abi;
use nucnet_ctl::{
    AttachRequest, Container, Error, Kind,
    kernel::netns::{self, NetnsFd, run_in},
    model::EndpointId,
};
use serde_json::Value;

use crate::lab::{command, has_faults, inside, ip, on_a_host, try_addresses};

#[test]
fn a_container_gets_address_routes_and_neighbours_and_loses_everything_again() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let before = lab.snapshot();
        // Its own must be of use at once all the same.
        try_addresses(&NetnsFd::open(&web).expect("namespace"), true);
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
fn what_the_dead_have_is_free() {
    on_a_host(|lab| {
        let (web, next) = (lab.container("web"), lab.container("next"));
        lab.ok(&format!(
            "attach --netns {} --id web --ip 10.0.42.9 -p 8080:80",
            web.display()
        ));
        lab.bury("web");
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
