//! What is said where iptables carries packets: of settings that it has its own ways for, and of
//! what it lacks.

use std::process::Output;

use serde_json::Value;

use crate::{
    lab::{Lab, command, on_a_host, text},
    status::{findings, named},
};

const NO_EFFECT: &str = "of no effect where iptables carries packets";

/// What a call says that succeeds.
fn said(output: &Output) -> String {
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{errors}");
    errors
}

#[test]
fn settings_that_iptables_cannot_honour_are_named() {
    on_a_host(|lab| {
        let create = |flags: &str| {
            let create = format!("--datapath iptables network create red {flags}");
            let said = said(&lab.run(&create));
            lab.ok("--datapath iptables network remove red");
            said
        };
        let each = "--filtering endpoint-independent --udp-mapping endpoint-independent \
                    --tcp-mapping endpoint-independent --timeout udp=600";
        let named = create(each);
        let flags = "--filtering, --udp-mapping, --tcp-mapping, --timeout";
        assert!(named.contains(NO_EFFECT), "{named:?}");
        assert!(named.contains(flags) && named.contains("red"), "{named:?}");
        // What netfilter does by itself is honoured, and so is whose ports are kept.
        let honoured = create("--filtering address-and-port-dependent --keep-ports");
        assert_eq!(honoured, "");
    });
}

#[test]
fn settings_that_lose_their_effect_by_a_switch_are_named() {
    on_a_host(|lab| {
        let created = lab.run("network create red --timeout udp=600");
        assert_eq!(said(&created), "");
        lab.ok("network create blue");
        let switched = said(&lab.run("--datapath iptables gc"));
        assert!(switched.contains(NO_EFFECT), "{switched:?}");
        assert!(switched.contains("--timeout"), "{switched:?}");
        let networks: Vec<bool> = ["red", "blue"].map(|name| switched.contains(name)).into();
        assert_eq!(networks, [true, false], "{switched:?}");
        let back = said(&lab.run("--datapath ebpf gc"));
        assert!(!back.contains(NO_EFFECT), "{back:?}");
    });
}

/// What doctor says of something, and its exit code.
fn found(lab: &Lab, id: &str) -> (Value, Option<i32>) {
    let (all, code) = findings(&mut lab.command("--datapath iptables doctor -o json"));
    (named(&all, id).clone(), code)
}

#[test]
fn doctor_says_what_rules_lack_that_carry_packets() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let web = web.display();
        lab.ok(&format!(
            "--datapath iptables attach --netns {web} --id web"
        ));
        let (iptables, code) = found(lab, "iptables");
        assert_eq!((&iptables["severity"], code), (&"ok".into(), Some(0)));
        assert!(
            text(&iptables["text"]).contains("for both families"),
            "{iptables}"
        );

        lab.take_away(|program| program.starts_with("ip6tables"));
        let (iptables, code) = found(lab, "iptables");
        lab.give_back();
        assert_eq!((&iptables["severity"], code), (&"warn".into(), Some(0)));
        assert!(
            text(&iptables["text"]).contains("IPv6 is closed"),
            "{iptables}"
        );
        assert_eq!(iptables["remedy"], "install ip6tables");

        lab.take_away(|program| {
            program.starts_with("iptables") || program.starts_with("ip6tables")
        });
        let (iptables, code) = found(lab, "iptables");
        lab.give_back();
        assert_eq!((&iptables["severity"], code), (&"fail".into(), Some(5)));
        assert!(
            text(&iptables["text"]).contains("endpoints need it"),
            "{iptables}"
        );
        let remedy = text(&iptables["remedy"]);
        assert!(remedy.contains("--datapath ebpf gc"), "{remedy}");
    });
}

#[test]
fn doctor_says_that_rules_pass_a_firewall_that_drops_by_default() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let web = web.display();
        lab.ok(&format!(
            "--datapath iptables attach --netns {web} --id web"
        ));
        command("iptables", "-P FORWARD DROP");
        let (forward, code) = found(lab, "forward-policy");
        assert_eq!((&forward["severity"], code), (&"ok".into(), Some(0)));
        let accepted = text(&forward["text"]);
        assert!(
            accepted.contains("nucnet's rules accept its packets"),
            "{forward}"
        );
    });
}
