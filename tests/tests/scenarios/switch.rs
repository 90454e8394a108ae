//! From one datapath to the other.

use std::io::{Read, Write};

use anyhow::{Result, ensure};
use nucnet_tests::lab::{HOST, Node, OUTSIDE, Snapshot, web};

use crate::case::{Case, Datapath, Families, Scenario, Way, connect, has, refused, silent, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "switching_the_datapath_and_back_keeps_everything_and_leaves_nothing",
        what: "a kernel that gets or loses what the programs need; both are found out while containers run",
        families: Families::Each,
        run: there_and_back,
    },
    Scenario {
        name: "tables_of_the_old_kind_carry_the_same",
        what: "hosts whose own rules are iptables-legacy's; rules of both kinds would see half of it each",
        families: Families::Each,
        run: by_legacy,
    },
];

fn by_legacy(case: &Case) -> Result<()> {
    if case.way != Way::Nucnet(Datapath::Iptables) {
        return skip("this is about iptables");
    }
    let rule = ["-A", "FORWARD", "-i", "other0", "-j", "ACCEPT"];
    if !has("iptables-legacy") || case.lab.host.run("iptables-legacy", &rule).is_err() {
        return skip("iptables-legacy does not work here");
    }
    let (client, _servers) = populate(case)?;
    let status = case
        .lab
        .nucnet(&["-o", "json", "status"])?
        .expect(0)?
        .json()?;
    let reason = status["reason"].as_str().unwrap_or_default();
    ensure!(reason.ends_with("by iptables-legacy"), "{reason}");
    works(case, &client)
}

/// Two endpoints, one with a publish, a mapping and a server, one under a policy; and what it may
/// ask outside, and what not.
fn populate(case: &Case) -> Result<(Node, [web::Server; 3])> {
    let (web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let (client, _) = case.attached("client", &["--deny", "any:81/tcp"])?;
    let (ext, int) = (HOST.of(case.family), endpoint.address(case.family)?);
    let (ext, int) = (ext.to_string(), int.to_string());
    let dnat = [
        "nat", "add", "dnat", "--ext-ip", &ext, "--ports", "9090", "--int-ip", &int,
    ];
    let all = [&dnat[..], &["--int-port", "80"]].concat();
    case.lab.nucnet(&all)?.expect(0)?;
    let servers = [
        case.web(&web, 80)?,
        case.web(&case.lab.outside, 80)?,
        case.web(&case.lab.outside, 81)?,
    ];
    Ok((client, servers))
}

/// What is published, mapped and denied, as it is from outside and inside.
fn works(case: &Case, client: &Node) -> Result<()> {
    let family = case.family;
    case.who(&case.lab.outside, HOST.port(family, 8080))?;
    case.who(&case.lab.outside, HOST.port(family, 9090))?;
    case.who(client, OUTSIDE.port(family, 80))?;
    silent(client, OUTSIDE.port(family, 81))?;
    refused(&case.lab.outside, HOST.port(family, 8081))
}

fn there_and_back(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let [first, other] = case.both()?;
    let before = Snapshot::of(&case.lab.host)?;
    let (client, _servers) = populate(case)?;
    works(case, &client)?;
    for datapath in [other, first] {
        let mut open = connect(&case.lab.outside, HOST.port(case.family, 8080))?;
        case.switch_to(datapath)?;
        let shown = case
            .lab
            .nucnet(&["--datapath", "auto", "-o", "json", "inspect", "web"])?;
        let shown = shown.expect(0)?.json()?;
        ensure!(shown["datapath"] == datapath, "{shown}");
        works(case, &client)?;
        let status = case
            .lab
            .nucnet(&["--datapath", "auto", "-o", "json", "status"])?;
        let status = status.expect(0)?.json()?;
        ensure!(status["datapath"] == datapath, "{status}");
        ensure!(
            status["drift"].as_array().is_some_and(Vec::is_empty),
            "{}",
            status["drift"]
        );
        let rules = case.lab.host.run("iptables-save", &[])?;
        ensure!(
            rules.contains("NUCNET-") == (datapath == "iptables"),
            "{rules}"
        );
        let pins = case.lab.bpffs().exists();
        ensure!(pins == (datapath == "ebpf"), "pins: {pins}, by {datapath}");
        // What was open is not carried over by every kernel; that is told, not asserted.
        let request = b"GET /who HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
        let mut answer = String::new();
        let went_on = open
            .set_read_timeout(Some(nucnet_tests::lab::wait::NEVER))
            .and_then(|()| open.write_all(request))
            .and_then(|()| open.read_to_string(&mut answer));
        println!("a connection that was open when the host went over to {datapath}: {went_on:?}");
    }
    case.lab
        .nucnet(&["--datapath", "auto", "down"])?
        .expect(0)?;
    let difference = before.difference(&Snapshot::of(&case.lab.host)?);
    ensure!(difference.is_empty(), "it leaves:\n{difference}");
    Ok(())
}
