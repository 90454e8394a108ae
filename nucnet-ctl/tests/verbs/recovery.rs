//! What fails, dies or is damaged on the way, and what becomes of it.

use std::fs;

use nucnet_ctl::kernel::netns::{NetnsFd, run_in};
use serde_json::Value;

use crate::lab::{has_faults, ip, on_a_host};

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
        lab.bury("dead");
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
