//! `flows` and `flows flush`, with flows that no packet made.

use std::{
    process::Stdio,
    time::{Duration, Instant},
};

use nucnet_common::abi::{
    Binding, Flow, FlowKey, FlowState, OutsideKey, PeerKind, Usage, flow_flag,
};
use nucnet_ctl::{
    kernel::bpf::{Datapath, monotonic},
    model::to_abi,
};
use serde_json::Value;

use crate::lab::{Lab, list, on_a_host};

/// Flow number `n` of an endpoint: outbound, seen a moment ago.
fn flow(endpoint: u32, n: u32) -> (FlowKey, Flow) {
    let [_, a, b, c] = n.to_be_bytes();
    let peer = to_abi(format!("198.{a}.{b}.{c}").parse().expect("address"));
    let now = monotonic().expect("clock");
    let key = FlowKey {
        endpoint,
        protocol: 6,
        inside: to_abi("10.0.42.9".parse().expect("address")),
        peer,
        inside_port: 40_000,
        peer_port: 443,
    };
    let flow = Flow {
        created: now,
        last_seen: now,
        packets_out: 3,
        bytes_out: 300,
        packets_in: 2,
        bytes_in: 3000,
        external: to_abi("192.0.2.1".parse().expect("address")),
        peer,
        external_port: 20_000,
        peer_port: 443,
        state: FlowState::Established as u32,
        peer_kind: PeerKind::Uplink as u32,
        timeout_s: 7440,
        slot: n,
        slot_version: 1,
        ..Flow::default()
    };
    (key, flow)
}

/// The number of an endpoint and the index of its host side.
fn endpoint(lab: &Lab, id: &str) -> (u32, u32) {
    let view = lab.json(&format!("inspect {id}"));
    let name = view["host_ifname"].as_str().expect("text");
    let link = nix::net::if_::if_nametoindex(name).expect("index");
    let entry = lab.datapath().endpoints.get(&link).expect("get");
    (entry.expect("entry").number, link)
}

fn insert(datapath: &mut Datapath, flows: &[(FlowKey, Flow)]) {
    datapath.flows.insert_all(flows).expect("insert");
}

fn ids(flows: &Value) -> Vec<&str> {
    let mut ids: Vec<_> = list(flows)
        .iter()
        .map(|flow| flow["id"].as_str().expect("text"))
        .collect();
    ids.sort_unstable();
    ids
}

#[test]
fn a_hundred_thousand_flows_are_listed_in_two_seconds() {
    const FLOWS: u32 = 100_000;
    on_a_host(|lab| {
        let netns = lab.container("web");
        lab.ok(&format!("attach --netns {} --id web", netns.display()));
        let (number, _) = endpoint(lab, "web");
        let flows: Vec<_> = (0..FLOWS).map(|n| flow(number, n)).collect();
        insert(&mut lab.datapath(), &flows);
        for arguments in ["flows", "flows -o json", "flows --endpoint web -o json"] {
            // As a file takes it: what is done with the text is not the program's time.
            let file = lab.place.join("out");
            let out = std::fs::File::create(&file).expect("file");
            let start = Instant::now();
            let status = lab.command(arguments).stdout(Stdio::from(out)).status();
            let took = start.elapsed();
            assert!(status.expect("nucnet-ctl").success());
            println!("{arguments}: {FLOWS} flows in {took:?}");
            let text = std::fs::read_to_string(&file).expect("text");
            let count = match arguments.contains("json") {
                true => list(&serde_json::from_str(&text).expect("JSON")).len(),
                false => text.lines().count() - 1,
            };
            assert_eq!(count, FLOWS as usize, "{arguments}");
            // What is not optimised, and shares the machine, is only reported.
            let limit = Duration::from_secs(if cfg!(debug_assertions) { 60 } else { 2 });
            assert!(took < limit, "{arguments}: {took:?}");
        }
        let start = Instant::now();
        let ended = lab.json("flows flush");
        println!("flushed in {:?}", start.elapsed());
        assert_eq!(ended["ended"], FLOWS);
        assert_eq!(lab.json("flows"), serde_json::json!([]));
    });
}

#[test]
fn an_endpoint_shows_what_its_live_flows_have_carried_by_each_publish() {
    on_a_host(|lab| {
        let (web, db) = (lab.container("web"), lab.container("db"));
        let attach = |netns: &std::path::Path, rest: &str| {
            lab.ok(&format!("attach --netns {} {rest}", netns.display()));
        };
        attach(&web, "--id web -p 8080:80 -p 9000-9009:90-99");
        attach(&db, "--id db");
        let ((web, link), (db, _)) = (endpoint(lab, "web"), endpoint(lab, "db"));
        // Two from outside, the second of which is over.
        let inbound = |n: u32, host_port: u16, timeout_s: u32| {
            let (mut key, mut flow) = flow(web, n);
            (key.inside_port, key.peer_port) = (80, 50_000);
            (flow.external_port, flow.peer_port) = (host_port, 50_000);
            flow.flags = flow_flag::INBOUND;
            flow.timeout_s = timeout_s;
            (key, flow)
        };
        // What the endpoint opened itself, and what a sibling opened to its publish.
        let own = flow(web, 3);
        let (mut key, mut flow) = flow(db, 4);
        key.peer = to_abi("192.0.2.1".parse().expect("address"));
        key.peer_port = 9003;
        flow.peer = to_abi("10.0.42.9".parse().expect("address"));
        flow.peer_port = 93;
        (flow.peer_kind, flow.peer_link) = (PeerKind::Endpoint as u32, link);
        let flows = [
            inbound(1, 8080, 7440),
            inbound(2, 8080, 0),
            own,
            (key, flow),
        ];
        insert(&mut lab.datapath(), &flows);

        let shown = lab.json("inspect web");
        let forwarded = list(&shown["forwarded"]);
        let sums: Vec<_> = forwarded
            .iter()
            .map(|sum| {
                [
                    "host_port",
                    "flows",
                    "packets_in",
                    "bytes_in",
                    "packets_out",
                    "bytes_out",
                ]
                .map(|key| sum[key].as_u64().expect("number"))
            })
            .collect();
        assert_eq!(
            sums,
            [[8080, 1, 2, 3000, 3, 300], [9000, 1, 3, 300, 2, 3000]],
            "{shown}"
        );
        let text = lab.ok("inspect web");
        let line = "*:8080->80/tcp: 1 live flows, 2 packets (3000 bytes) in, 3 (300) out";
        assert!(text.contains(line), "{text}");
        assert_eq!(lab.json("inspect db")["forwarded"], serde_json::json!([]));
    });
}

#[test]
fn what_lists_prints_one_array_also_when_it_is_empty() {
    on_a_host(|lab| {
        let lists = ["list", "network list", "nat list", "flows"];
        let all_are_empty = |when: &str| {
            for verb in lists {
                let text = lab.ok(&format!("{verb} -o json"));
                let shown: Value = serde_json::from_str(&text).expect("one JSON text");
                assert_eq!(shown, serde_json::json!([]), "{verb}, {when}");
            }
        };
        all_are_empty("nothing was ever attached");
        let netns = lab.container("web");
        lab.ok(&format!("attach --netns {} --id web", netns.display()));
        lab.ok("nat add snat --int 10.5.0.0/24 --ext-ip 192.0.2.1");
        let (number, _) = endpoint(lab, "web");
        let mut datapath = lab.datapath();
        insert(&mut datapath, &[flow(number, 1)]);
        let usage = Usage {
            flows: 1,
            bindings: 0,
        };
        datapath.usage.insert(&number, &usage).expect("insert");
        for verb in lists {
            assert_eq!(list(&lab.json(verb)).len(), 1, "{verb}");
        }
        lab.ok("nat clear");
        lab.ok("detach web");
        all_are_empty("nothing is left");
    });
}

#[test]
fn flows_are_shown_while_they_live_and_by_endpoint() {
    on_a_host(|lab| {
        assert_eq!(lab.json("flows"), serde_json::json!([]));
        assert_eq!(lab.json("flows flush")["ended"], 0);
        assert_eq!(lab.refused("flows --endpoint web").0, 3);
        for id in ["web", "db"] {
            let netns = lab.container(id);
            lab.ok(&format!("attach --netns {} --id {id}", netns.display()));
        }
        let ((web, _), (db, db_link)) = (endpoint(lab, "web"), endpoint(lab, "db"));
        let mut dead = flow(web, 2);
        dead.1.last_seen = 0;
        dead.1.timeout_s = 0;
        let mut between = flow(web, 3);
        between.1.peer_kind = PeerKind::Endpoint as u32;
        between.1.peer_link = db_link;
        let mut inbound = flow(db, 4);
        inbound.1.flags = flow_flag::INBOUND;
        insert(&mut lab.datapath(), &[flow(web, 1), dead, between, inbound]);

        let all = lab.json("flows");
        assert_eq!(ids(&all), ["1.1", "3.1", "4.1"]);
        let one = list(&all).iter().find(|flow| flow["id"] == "1.1");
        let one = one.expect("flow");
        for (field, value) in [
            ("endpoint", "web"),
            ("protocol", "tcp"),
            ("state", "established"),
            ("src", "10.0.42.9"),
            ("dst", "198.0.0.1"),
            ("nat_src", "192.0.2.1"),
            ("nat_dst", "198.0.0.1"),
        ] {
            assert_eq!(one[field], value, "{field}");
        }
        for (field, value) in [
            ("sport", 40_000),
            ("dport", 443),
            ("nat_sport", 20_000),
            ("nat_dport", 443),
            ("packets", 5),
            ("bytes", 3300),
        ] {
            assert_eq!(one[field], value, "{field}");
        }
        assert!(one["age_ms"].as_u64().expect("number") < 60_000);
        assert_eq!(ids(&lab.json("flows --endpoint web")), ["1.1", "3.1"]);
        // A flow between endpoints is the business of both.
        assert_eq!(ids(&lab.json("flows --endpoint db")), ["3.1", "4.1"]);
        assert_eq!(lab.refused("flows --endpoint nobody").0, 3);
        assert_eq!(lab.refused("flows flush --endpoint nobody").0, 3);
        assert_eq!(lab.refused("flows flush --endpoint n/a").0, 2);
        let text = lab.ok("flows --endpoint db");
        assert!(text.starts_with("ENDPOINT"), "{text}");

        let plan = lab.json("flows flush --endpoint db --dry-run");
        assert_eq!(plan["plan"][0], "end 2 flows");
        assert_eq!(lab.json("flows flush --endpoint db")["ended"], 2);
        assert_eq!(lab.json("flows flush --endpoint db")["ended"], 0);
        assert_eq!(ids(&lab.json("flows")), ["1.1"]);
    });
}

#[test]
fn flush_ends_bindings_and_leaves_those_of_others() {
    on_a_host(|lab| {
        for id in ["web", "db"] {
            let netns = lab.container(id);
            lab.ok(&format!("attach --netns {} --id {id}", netns.display()));
        }
        let mut datapath = lab.datapath();
        let numbers = ["web", "db"].map(|id| endpoint(lab, id).0);
        let key = |endpoint| FlowKey {
            endpoint,
            protocol: 17,
            ..FlowKey::default()
        };
        let binding = Binding {
            last_seen: monotonic().expect("clock"),
            timeout_s: 300,
            ..Binding::default()
        };
        for number in numbers {
            datapath
                .bindings
                .insert(&key(number), &binding)
                .expect("insert");
        }
        lab.ok("flows flush --endpoint web");
        let timeout = |number| {
            let found = datapath.bindings.get(&key(number)).expect("get");
            found.expect("binding").timeout_s
        };
        assert_eq!(numbers.map(timeout), [0, 300]);
    });
}

#[test]
fn detach_ends_what_others_opened_to_the_endpoint() {
    on_a_host(|lab| {
        for id in ["web", "db"] {
            let netns = lab.container(id);
            lab.ok(&format!("attach --netns {} --id {id}", netns.display()));
        }
        let ((web, _), (db, db_link)) = (endpoint(lab, "web"), endpoint(lab, "db"));
        let mut between = flow(web, 1);
        between.1.peer_kind = PeerKind::Endpoint as u32;
        between.1.peer_link = db_link;
        let own = flow(db, 2);
        let other = flow(web, 3);
        let mut datapath = lab.datapath();
        insert(&mut datapath, &[between, own, other]);
        let outside = OutsideKey {
            protocol: 6,
            external: own.1.external,
            peer: own.1.peer,
            external_port: own.1.external_port,
            peer_port: own.1.peer_port,
        };
        datapath.outside.insert(&outside, &own.0).expect("insert");
        let usage = Usage {
            flows: 1,
            bindings: 0,
        };
        datapath.usage.insert(&db, &usage).expect("insert");
        lab.ok("detach db");
        assert_eq!(ids(&lab.json("flows")), ["3.1"]);
        assert!(datapath.flows.get(&own.0).expect("get").is_none());
        assert_eq!(datapath.outside.count().expect("count"), 0);
    });
}
