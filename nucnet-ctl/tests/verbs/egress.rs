//! Egress policies of live endpoints: set, shown, cleared, and what is left when that fails or is
//! killed.

use std::{
    fs,
    path::Path,
    time::{Duration, Instant},
};

use nucnet_common::abi;
use serde_json::{Value, json};

use crate::lab::{Lab, has_faults, list, on_a_host};

const OLD: &str = "--allow 10.0.0.0/8:443/tcp --deny host --dns 9.9.9.9";
const NEW: &str = "--allow internet --allow private:53 --deny metadata";

fn attach(lab: &Lab, netns: &Path, flags: &str) {
    lab.ok(&format!(
        "attach --netns {} --id web {flags}",
        netns.display()
    ));
}

/// The endpoint's entry in the maps.
fn entry(lab: &Lab) -> abi::Endpoint {
    let entries = lab.datapath().endpoints.entries().expect("entries");
    let [(_, entry)] = entries[..] else {
        panic!("one endpoint, not {entries:?}");
    };
    entry
}

/// How many entries each policy number has.
fn policies(lab: &Lab) -> Vec<(u32, usize)> {
    let mut counts = std::collections::BTreeMap::new();
    for (key, _) in lab.datapath().policy_cidrs.entries().expect("entries") {
        *counts
            .entry(u32::from_be_bytes(key.data().policy))
            .or_default() += 1;
    }
    counts.into_iter().collect()
}

fn port_entries(lab: &Lab) -> usize {
    lab.datapath().policy_ports.count().expect("count")
}

#[test]
fn a_policy_is_replaced_shown_and_removed() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, OLD);
        let before = entry(lab);
        let shown = lab.json("egress show web");
        assert_eq!(shown["id"], "web");
        assert_eq!(shown["allow"], json!(["10.0.0.0/8:443/tcp"]));
        assert_eq!(shown["deny"], json!(["host"]));
        assert_ne!(before.policy_host, 0, "there is a rule about the host");

        let set = lab.json(&format!("egress set web {NEW}"));
        assert_eq!(set["default"], "deny");
        assert_eq!(set["allow"], json!(["internet", "private:53"]));
        assert_eq!(set["deny"], json!(["metadata"]));
        assert_eq!(set["dns"], json!(["9.9.9.9"]), "the attach's stay");
        assert_eq!(lab.json("egress show web"), set);
        assert_eq!(
            lab.json("inspect web")["egress"]["deny"],
            json!(["metadata"])
        );
        let now = entry(lab);
        assert!(now.policy > before.policy, "a number of its own");
        assert_eq!((now.policy_since, now.policy_host), (now.policy, 0));
        let policies = policies(lab);
        assert_eq!(policies.len(), 1, "{policies:?}");
        assert_eq!(policies[0].0, now.policy);

        let text = lab.ok("egress show web");
        assert!(text.contains("deny     metadata"), "{text}");

        // The attach is still what was asked for.
        attach(lab, &web, OLD);
        assert_eq!(lab.json("egress show web"), set);

        let cleared = lab.json("egress clear web");
        assert_eq!(cleared["default"], "allow");
        assert_eq!(cleared["allow"], json!([]));
        assert_eq!(cleared["dns"], json!(["9.9.9.9"]));
        assert_eq!(entry(lab).policy, 0);
        assert_eq!(port_entries(lab), 0);
        assert_eq!(lab.json("egress clear web"), cleared, "again is fine");

        lab.ok("egress set web --egress-default deny --dns 192.0.2.53");
        assert_eq!(lab.json("egress show web")["dns"], json!(["192.0.2.53"]));
        lab.ok("detach web");
        assert!(policies_are_gone(lab));
    });
}

fn policies_are_gone(lab: &Lab) -> bool {
    policies(lab).is_empty() && port_entries(lab) == 0
}

#[test]
fn flows_that_are_kept_are_those_that_were_judged_before() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, "");
        lab.ok("egress set web --egress-default deny --keep-established");
        let first = entry(lab);
        assert_ne!(first.policy, 0);
        assert_eq!(first.policy_since, 0, "also those from before any policy");
        lab.ok("egress set web --deny any");
        let second = entry(lab);
        assert_eq!(second.policy_since, second.policy);
        lab.ok("egress set web --deny any/icmp --keep-established");
        assert_eq!(entry(lab).policy_since, second.policy);
        // The same policy again has something to do: it is to judge them.
        lab.ok("egress set web --deny any/icmp --keep-established");
        assert_eq!(entry(lab).policy_since, second.policy);
        lab.ok("egress set web --deny any/icmp");
        let last = entry(lab);
        assert_eq!(last.policy_since, last.policy);
        lab.ok("egress set web --deny any/icmp");
        assert_eq!(entry(lab), last, "now there is nothing to do");
    });
}

#[test]
fn whether_denials_are_answered_is_part_of_the_policy() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let flags = || entry(lab).policy_flags;
        let attaches = |flags: &str| {
            let line = format!("attach --netns {} --id web {flags}", web.display());
            lab.run(&line).status.code()
        };
        attach(lab, &web, "--deny metadata --reject");
        assert_eq!(flags(), abi::policy_flag::REJECT);
        assert_eq!(lab.json("inspect web")["egress"]["reject"], true);
        let text = lab.ok("inspect web");
        assert!(text.contains("denials are answered"), "{text}");
        assert_eq!(attaches("--deny metadata --reject"), Some(0), "the same");
        assert_eq!(attaches("--deny metadata"), Some(4), "another policy");

        let shown = lab.json("egress set web --deny metadata");
        assert_eq!(shown["reject"], false);
        assert_eq!(flags(), 0);
        let text = lab.ok("egress show web");
        assert!(!text.contains("answered"), "{text}");
        assert_eq!(
            lab.json("egress set web --deny metadata --reject")["reject"],
            true
        );
        assert_eq!(flags(), abi::policy_flag::REJECT);

        let file = lab.place.join("policy.json");
        fs::write(&file, r#"{"deny": ["host"], "reject": true}"#).expect("write");
        let set = format!("egress set web --file {}", file.display());
        assert_eq!(lab.json(&set)["reject"], true);
        fs::write(&file, r#"{"allowed_cidrs": [], "log_denied": false}"#).expect("write");
        assert_eq!(lab.json(&set)["reject"], false);
        assert_eq!(flags(), abi::policy_flag::QUIET);
        assert_eq!(lab.json(&format!("{set} --reject"))["reject"], true);
        let both = abi::policy_flag::QUIET | abi::policy_flag::REJECT;
        assert_eq!(flags(), both);

        let cleared = lab.json("egress clear web");
        assert_eq!((&cleared["reject"], flags()), (&json!(false), 0));
        // That alone is no policy: it would take the rules away.
        assert_eq!(lab.refused("egress set web --reject").0, 2);
    });
}

#[test]
fn a_file_has_nucnets_fields_or_a_runtimes() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, "--dns 9.9.9.9");
        let file = lab.place.join("policy.json");
        let set = |text: &str| {
            fs::write(&file, text).expect("write");
            lab.json(&format!("egress set web --file {}", file.display()))
        };
        let own = set(r#"{"allow": ["any:443/tcp"], "deny": ["metadata"]}"#);
        assert_eq!(own["allow"], json!(["any:443/tcp"]));
        assert_eq!(
            set(&own.to_string()),
            own,
            "what is shown can be given back"
        );
        let inspected = lab.json("inspect web")["egress"].to_string();
        assert_eq!(set(&inspected), own);

        let theirs = set(
            r#"{"allowed_cidrs": ["10.0.0.0/8"], "allowed_tcp_ports": [443],
            "allowed_udp_ports": [], "log_denied": false, "allow_dns": true}"#,
        );
        assert_eq!(theirs["allow"], json!(["10.0.0.0/8:443/tcp"]));
        assert_eq!(theirs["default"], "deny");
        assert_eq!(theirs["dns"], json!(["9.9.9.9"]));
        assert_eq!(entry(lab).policy_flags, abi::policy_flag::QUIET);
        assert_eq!(set(&theirs.to_string()), theirs);

        let toml = lab.place.join("policy.toml");
        fs::write(&toml, "default = \"deny\"\nallow = [\"host:53/udp\"]\n").expect("write");
        let view = lab.json(&format!("egress set web --file {}", toml.display()));
        assert_eq!(view["allow"], json!(["host:53/udp"]));
    });
}

#[test]
fn bad_policies_are_refused_and_the_old_one_stays() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, OLD);
        let file = lab.place.join("policy.json");
        let before = lab.snapshot();
        let path = file.display();
        for (text, words) in [
            (r#"{"alow": []}"#, vec!["alow", "unknown field", "line 1"]),
            (r#"{"allow": ["x"]}"#, vec!["allow[0]", "line 1 column 15"]),
            (
                r#"{"deny": [], "allowed_cidrs": []}"#,
                vec!["deny", "allowed_cidrs"],
            ),
            (
                r#"{"allowed_cidrs": ["10.0.0.0/40"]}"#,
                vec!["allowed_cidrs[0]"],
            ),
        ] {
            fs::write(&file, text).expect("write");
            let (code, error) = lab.refused(&format!("egress set web --file {path}"));
            assert_eq!(
                (code, &error["kind"]),
                (2, &Value::from("usage")),
                "{error}"
            );
            let message = error["message"].as_str().expect("text");
            assert!(message.contains("policy.json"), "{message}");
            assert!(words.iter().all(|word| message.contains(word)), "{message}");
            assert!(error["hint"].is_string());
        }
        fs::remove_file(&file).expect("remove");
        for (arguments, expected) in [
            (format!("egress set web --file {path}"), 2),
            ("egress set web --allow all".to_owned(), 2),
            ("egress set web".to_owned(), 2),
            ("egress set nobody --allow any".to_owned(), 3),
            ("egress show nobody".to_owned(), 3),
            ("egress clear nobody".to_owned(), 3),
        ] {
            let (code, error) = lab.refused(&arguments);
            assert_eq!(code, expected, "{arguments}: {error}");
        }
        lab.assert_unchanged(&before, "after refusals");
    });
}

#[test]
fn a_policy_that_is_too_large_is_refused_with_the_limit() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, OLD);
        let before = lab.snapshot();
        let ports: Vec<String> = (0..10_000).map(|n| (n * 6 + 1).to_string()).collect();
        let mut allow = vec![format!("any:{}/tcp", ports.join(","))];
        allow.extend((0..200).map(|n| format!("10.{n}.0.0/16/icmp")));
        let file = lab.place.join("policy.json");
        fs::write(&file, json!({ "allow": allow }).to_string()).expect("write");
        let (code, error) = lab.refused(&format!("egress set web --file {}", file.display()));
        assert_eq!(code, 2);
        let message = error["message"].as_str().expect("text");
        assert!(
            message.contains("1048576") && message.contains("policy_ports"),
            "{message}"
        );
        fs::remove_file(&file).expect("remove");
        lab.assert_unchanged(&before, "after the refusal");
    });
}

#[test]
fn ten_thousand_prefixes_with_ports_are_in_force_within_a_second() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, "");
        let rule = |n: u32| {
            let (high, low) = (n / 256, n % 256);
            match n % 4 {
                0 => format!("10.{high}.{low}.0/24:{}/tcp", 1000 + n),
                1 => format!("11.{high}.{low}.0/24:80,443,{}-{}", 1000 + n, 2000 + n),
                2 => format!("[2001:db8:{n:x}::/48]:53/udp"),
                _ => format!("2001:db9:{n:x}::/48/icmp"),
            }
        };
        let allow: Vec<String> = (0..10_000).map(rule).collect();
        let file = lab.place.join("policy.json");
        let policy = json!({ "allow": allow, "deny": ["any:25", "metadata"] });
        fs::write(&file, policy.to_string()).expect("write");
        let set = format!("egress set web --file {}", file.display());
        // The program without optimization takes several times as long.
        let limit = Duration::from_secs(if cfg!(debug_assertions) { 10 } else { 1 });
        for (verb, entries) in [(set.as_str(), 10_000), ("egress clear web", 0)] {
            let start = Instant::now();
            lab.ok(verb);
            let took = start.elapsed();
            let cidrs = lab.datapath().policy_cidrs.count().expect("count");
            println!(
                "{verb}: {took:?}, {cidrs} prefixes, {} ports",
                port_entries(lab)
            );
            assert!(cidrs >= entries && took < limit, "{took:?}");
        }
    });
}

#[test]
fn a_policy_that_was_removed_leaves_no_drift() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, OLD);
        lab.ok("egress clear web");
        assert_eq!(entry(lab).policy_default, 0);
        let status = lab.json("status --sample 0s");
        assert_eq!(list(&status["drift"]), [] as [Value; 0]);
    });
}

#[test]
fn a_dry_run_shows_the_steps_and_changes_nothing() {
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, OLD);
        let before = lab.snapshot();
        let set = lab.json(&format!("--dry-run egress set web {NEW}"));
        let steps = list(&set["plan"]);
        assert!(
            steps.iter().any(|step| step == "switch endpoint web to it"),
            "{steps:?}"
        );
        let last = steps.last().and_then(Value::as_str).unwrap_or_default();
        assert!(last.starts_with("undo: "), "the old one goes: {steps:?}");
        assert_eq!(
            lab.ok(&format!("--dry-run egress set web {OLD}")),
            "nothing to do\n"
        );
        let clear = lab.json("--dry-run egress clear web");
        assert!(!list(&clear["plan"]).is_empty());
        lab.assert_unchanged(&before, "after dry runs");
    });
}

#[test]
fn a_failure_at_any_step_leaves_the_old_policy_and_nothing_else() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let web = lab.container("web");
        attach(lab, &web, OLD);
        for verb in [
            format!("egress set web {NEW}"),
            "egress clear web".to_owned(),
        ] {
            let plan = lab.json(&format!("--dry-run {verb}"));
            let done = list(&plan["plan"])
                .iter()
                .filter(|step| !step.as_str().expect("text").starts_with("undo: "))
                .count();
            let (before, old) = (lab.snapshot(), entry(lab));
            for step in 0..=done {
                let output = lab
                    .command(&verb)
                    .env("NUCNET_FAULT", format!("fail:{step}"))
                    .output()
                    .expect("nucnet-ctl");
                assert_eq!(output.status.code(), Some(1), "{verb}, step {step}");
                lab.assert_unchanged(&before, &format!("{verb}, step {step}"));
                assert_eq!(entry(lab), old, "{verb}, step {step}");
            }
        }
    });
}

#[test]
fn whatever_step_it_is_killed_at_one_policy_is_in_force_and_the_next_call_tidies_up() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        let web = lab.container("web");
        let (old, new): (Value, Value) = {
            attach(lab, &web, OLD);
            let old = lab.json("egress show web");
            let new = lab.json(&format!("egress set web {NEW}"));
            lab.ok("detach web");
            (old, new)
        };
        let none = json!({ "id": "web", "default": "allow", "allow": [], "deny": [],
            "dns": ["9.9.9.9"], "reject": false });
        let set = format!("egress set web {NEW}");
        let mut seen = [0, 0];
        for (verb, after) in [(set.as_str(), &new), ("egress clear web", &none)] {
            for way_out in ["again", "gc", "detach"] {
                for step in 0.. {
                    attach(lab, &web, OLD);
                    let status = lab
                        .command(verb)
                        .env("NUCNET_FAULT", format!("stop:{step}"))
                        .output()
                        .expect("nucnet-ctl")
                        .status;
                    let when = format!("{verb} killed before step {step}, then {way_out}");
                    let policy = entry(lab).policy;
                    let shown = lab.json("egress show web");
                    assert!(shown == old || shown == *after, "{when}: {shown}");
                    seen[usize::from(shown == *after)] += 1;
                    let in_force = policies(lab).iter().any(|(number, _)| *number == policy);
                    let is_none = shown == none;
                    assert_eq!(policy == 0, is_none, "{when}");
                    assert!(in_force || is_none, "{when}: {policy} has no rules");
                    match way_out {
                        "again" => assert_eq!(lab.json(verb), *after, "{when}"),
                        "gc" => {
                            lab.ok("gc");
                            assert_eq!(lab.json("egress show web"), shown, "{when}");
                            assert_eq!(entry(lab).policy, policy, "{when}");
                            let again = lab.json("gc");
                            assert_eq!(list(&again["removed"]), [] as [Value; 0], "{when}");
                        }
                        _ => {}
                    }
                    if way_out != "detach" {
                        let left = policies(lab);
                        let policy = entry(lab).policy;
                        assert!(
                            left.iter().all(|(number, _)| *number == policy),
                            "{when}: {left:?}"
                        );
                        assert_eq!(left.is_empty(), policy == 0, "{when}");
                    }
                    lab.ok("detach web");
                    assert!(policies_are_gone(lab), "{when}: entries are left");
                    if status.success() {
                        assert!(step > 4, "{verb}: {step} steps");
                        break;
                    }
                }
            }
        }
        assert!(
            seen[0] > 5 && seen[1] > 5,
            "before and after the switch: {seen:?}"
        );
    });
}
