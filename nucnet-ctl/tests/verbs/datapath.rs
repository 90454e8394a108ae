//! Which datapath carries packets, and going from one to the other.

use std::{
    fs::{self, Permissions},
    os::unix::fs::PermissionsExt as _,
    process::Command,
};

use serde_json::Value;

use crate::lab::{Lab, firewall, has_faults, json, list, on_a_host, text};

const NOTHING: [Value; 0] = [];
const TO_RULES: &str = "--datapath iptables gc";
const TO_PROGRAMS: &str = "--datapath ebpf gc";

fn attach(lab: &Lab, id: &str) -> String {
    let container = lab.container(id);
    let container = container.display();
    format!("attach --netns {container} --id {id} -p 8080:80 --allow 10.0.0.0/8:443 --deny any:25")
}

/// The host without a BPF filesystem.
fn without_bpffs(lab: &Lab, arguments: &str) -> Command {
    let plain = lab.place.join("plain");
    fs::create_dir_all(&plain).expect("directory");
    let mut command = lab.command(arguments);
    command.env("NUCNET_BPFFS", plain.join("nucnet"));
    command
}

fn printed(mut command: Command) -> String {
    let output = command.output().expect("a program");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{command:?}: {errors}");
    String::from_utf8(output.stdout).expect("text")
}

#[test]
fn auto_takes_iptables_where_programs_cannot_be_loaded_and_says_why() {
    on_a_host(|lab| {
        let attach = attach(lab, "web");
        let before = lab.snapshot();
        let insisted = without_bpffs(lab, &attach).output().expect("nucnet-ctl");
        assert_eq!(insisted.status.code(), Some(5), "{insisted:?}");
        lab.assert_unchanged(&before, "after an attach that insists on programs");

        let auto = |arguments: &str| {
            let arguments = format!("--datapath auto {arguments}");
            without_bpffs(lab, &arguments)
        };
        let output = auto(&format!("{attach} -o json"))
            .output()
            .expect("nucnet-ctl");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}");
        assert!(said.contains("so iptables carries packets"), "{said}");
        assert!(said.contains("BPF filesystem"), "{said}");
        let attached = json(&String::from_utf8_lossy(&output.stdout));
        assert_eq!(attached["datapath"], "iptables");
        let status = json(&printed(auto("status -o json")));
        assert_eq!(status["datapath"], "iptables");
        assert!(
            text(&status["reason"]).contains("BPF filesystem"),
            "{status}"
        );
        assert_eq!(list(&status["drift"]), NOTHING);
        // It stays with what there is.
        let second = self::attach(lab, "other").replace("8080:80", "9090:90");
        let second = json(&printed(auto(&format!("{second} -o json"))));
        assert_eq!(second["datapath"], "iptables");
        printed(auto("down"));
    });
}

#[test]
fn host_that_has_neither_programs_nor_iptables_says_so_and_stays_as_it_was() {
    on_a_host(|lab| {
        let attach = attach(lab, "web");
        let before = lab.snapshot();
        lab.take_away(|program| {
            program.starts_with("iptables") || program.starts_with("ip6tables")
        });
        let mut command = without_bpffs(lab, &format!("--datapath auto {attach}"));
        let output = command.output().expect("nucnet-ctl");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(5), "{said}");
        assert!(
            said.contains("iptables datapath cannot be used either"),
            "{said}"
        );
        lab.give_back();
        lab.assert_unchanged(&before, "after an attach that could not be done");
    });
}

#[test]
fn rules_go_where_the_hosts_own_are_and_leave_those_as_they_were() {
    on_a_host(|lab| {
        for (kind, other) in [("legacy", "nft"), ("nft", "legacy")] {
            let (own, own6) = (format!("iptables-{kind}"), format!("ip6tables-{kind}"));
            let rules = |program: &str, action: &str| {
                [
                    format!("-t filter -{action} FORWARD -i other0 -j ACCEPT"),
                    format!("-t nat -{action} POSTROUTING -o other0 -j MASQUERADE"),
                ]
                .iter()
                .all(|rule| {
                    let status = Command::new(program).args(rule.split(' ')).status();
                    status.is_ok_and(|status| status.success())
                })
            };
            if !rules(&own, "A") || !rules(&own6, "A") {
                eprintln!("skipped in part: {own} does not work here");
                continue;
            }
            let foreign =
                || [format!("{own}-save"), format!("{own6}-save")].map(|it| firewall(&it));
            let before = foreign();
            lab.ok(&format!("--datapath iptables {}", attach(lab, kind)));
            let status = lab.json("--datapath iptables status");
            let reason = text(&status["reason"]);
            assert!(reason.ends_with(&own), "{reason}");
            assert_eq!(list(&status["drift"]), NOTHING);
            for text in foreign() {
                assert!(
                    text.contains("nucnet:") && text.contains("other0"),
                    "{text}"
                );
            }
            let others = firewall(&format!("iptables-{other}-save"));
            assert!(!others.contains("NUCNET"), "{others}");
            lab.ok("--datapath iptables down");
            // Chains that nobody had are there now where tables are of the old kind.
            assert_eq!(
                without_empty_tables(&foreign()),
                without_empty_tables(&before)
            );
            assert!(rules(&own, "D") && rules(&own6, "D"));
        }
    });
}

/// Rules and policies; a table that has neither is there once somebody has looked at it.
fn without_empty_tables(saved: &[String]) -> Vec<String> {
    let lines = saved.iter().flat_map(|text| text.lines());
    let lines = lines.filter(|line| line.starts_with("-A ") || line.contains(" DROP "));
    lines.map(str::to_owned).collect()
}

#[test]
fn rules_are_the_same_whoever_writes_them() {
    on_a_host(|lab| {
        let gc = |call: &str| {
            let gone = lab.json(call);
            assert_eq!(list(&gone["removed"]), NOTHING, "{call}");
            let status = lab.json("--datapath auto status --sample 0s");
            assert_eq!(list(&status["drift"]), NOTHING, "{call}");
        };
        // By their names, the one that comes later is the first.
        lab.ok(&format!("--datapath iptables {}", attach(lab, "web")));
        let client = attach(lab, "client").replace("8080:80", "9090:90");
        lab.ok(&format!("--datapath iptables {client}"));
        for external in [2, 1] {
            lab.ok(&format!(
                "--datapath iptables nat add dnat --ext-ip 192.0.2.{external} --ports 443 \
                 --int-ip 10.0.42.2"
            ));
        }
        for call in [TO_RULES, TO_PROGRAMS, TO_RULES, TO_RULES] {
            gc(call);
        }
    });
}

#[test]
fn programs_are_never_looked_for_along_path() {
    on_a_host(|lab| {
        let (fakes, ran) = (lab.place.join("fakes"), lab.place.join("ran"));
        fs::create_dir(&fakes).expect("directory");
        for family in ["iptables", "ip6tables"] {
            for backend in ["", "-nft", "-legacy"] {
                for verb in ["", "-save", "-restore"] {
                    let fake = fakes.join(format!("{family}{backend}{verb}"));
                    let text = format!("#!/bin/sh\necho $0 >>{}\n", ran.display());
                    fs::write(&fake, text).expect("program");
                    fs::set_permissions(&fake, Permissions::from_mode(0o755)).expect("mode");
                }
            }
        }
        let with_fakes = |mut command: Command| {
            command.env("PATH", &fakes).current_dir(&fakes);
            command
        };
        let mut shell = Command::new("/bin/sh");
        shell.args(["-c", "iptables"]);
        printed(with_fakes(shell));
        fs::remove_file(&ran).expect("whoever looks there finds them");

        let call = |arguments: &str| {
            let arguments = format!("--datapath iptables {arguments}");
            with_fakes(lab.command(&arguments))
        };
        printed(call(&attach(lab, "web")));
        // What dead containers left is swept by the same programs.
        printed(call(&attach(lab, "dead").replace("8080:80", "9090:90")));
        lab.bury("dead");
        let swept = json(&printed(call("-o json gc")));
        assert!(swept.to_string().contains("endpoint dead"), "{swept}");
        assert!(firewall("iptables-save").contains("nucnet:web"));
        printed(call("down"));
        assert!(!firewall("iptables-save").contains("nucnet:"));

        lab.take_away(|program| {
            program.starts_with("iptables") || program.starts_with("ip6tables")
        });
        let refused = call(&attach(lab, "late")).output().expect("nucnet-ctl");
        lab.give_back();
        assert_eq!(refused.status.code(), Some(5), "{refused:?}");
        assert!(!ran.exists(), "{:?}", fs::read_to_string(&ran));
    });
}

/// What is published, under a policy, of two networks.
fn populate(lab: &Lab) {
    lab.ok(&attach(lab, "web"));
    lab.ok("network create red --subnet 10.71.0.0/24 --subnet6 fd00:71::/64 --isolate");
    let red = lab.container("red");
    lab.ok(&format!(
        "attach --netns {} --id red --network red",
        red.display()
    ));
    // The host side of each gets its bridge's MAC with the first move, and keeps it.
    lab.ok(TO_RULES);
    lab.ok(TO_PROGRAMS);
}

#[test]
fn a_switch_that_dies_at_a_step_is_gone_on_with() {
    const MANY: usize = 7;
    dying_switches(std::process::id() as usize % MANY, MANY);
}

#[test]
#[ignore = "slow: takes minutes"]
fn a_switch_that_dies_at_any_step_is_gone_on_with() {
    dying_switches(0, 1);
}

/// Kills switches before one in so many of their steps.
fn dying_switches(first: usize, many: usize) {
    if !has_faults() {
        return;
    }
    on_a_host(move |lab| {
        populate(lab);
        let by_programs = lab.snapshot();
        lab.ok(TO_RULES);
        let by_rules = lab.snapshot();
        lab.ok(TO_PROGRAMS);
        lab.assert_unchanged(&by_programs, "there and back");
        for (call, back, after, before) in [
            (TO_RULES, TO_PROGRAMS, &by_rules, &by_programs),
            (TO_PROGRAMS, TO_RULES, &by_programs, &by_rules),
        ] {
            if call == TO_PROGRAMS {
                lab.ok(TO_RULES);
            }
            for (round, step) in (first..).step_by(many).enumerate() {
                let mut command = lab.command(call);
                let output = command.env("NUCNET_FAULT", format!("stop:{step}")).output();
                let is_over = output.expect("nucnet-ctl").status.code().is_some();
                let when = format!("{call}, dead at step {step}");
                // Whoever comes next goes on, or goes back.
                match round % 3 {
                    0 => drop(lab.ok("--datapath auto gc")),
                    1 => drop(lab.ok(call)),
                    _ => drop(lab.ok(back)),
                }
                let status = lab.json("--datapath auto status --sample 0s");
                assert_eq!(list(&status["drift"]), NOTHING, "{when}");
                if round % 3 != 2 {
                    lab.assert_unchanged(after, &when);
                    lab.ok(back);
                }
                lab.assert_unchanged(before, &when);
                if is_over {
                    assert!(step > 10, "{call}: {step}");
                    break;
                }
            }
        }
    });
}
