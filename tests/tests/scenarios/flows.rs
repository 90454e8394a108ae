//! `flows` and `flows flush`, and what ends flows besides.

use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{HOST, OUTSIDE, udp};
use serde_json::Value;

use crate::case::{Case, Families, Scenario, connect};
use crate::conversation::{Conversation, go_on};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "flows_tell_both_ends_before_and_after_translation",
        what: "inbound by publish and outbound by masquerade, as JSON and as text",
        families: Families::Each,
        run: told,
    },
    Scenario {
        name: "flush_of_one_endpoint_costs_another_nothing",
        what: "conversations go on while another endpoint's flows are ended again and again",
        families: Families::Each,
        run: flushed,
    },
    Scenario {
        name: "conversation_that_goes_on_after_a_flush_is_a_new_flow",
        what: "UDP by publish and by masquerade: another flow, and another external port",
        families: Families::Each,
        run: comes_back,
    },
    Scenario {
        name: "unpublish_ends_what_came_by_the_publish",
        what: "a remote client's and a sibling's connection end, one to another port does not",
        families: Families::Each,
        run: unpublished,
    },
];

fn flows(case: &Case, arguments: &[&str]) -> Result<Vec<Value>> {
    let all = [&["-o", "json", "flows"], arguments].concat();
    let printed = case.lab.nucnet(&all)?.expect(0)?.json()?;
    Ok(printed.as_array().context("no array")?.clone())
}

/// A side of a flow: `src`, `dst`, `nat_src` or `nat_dst`.
fn side(flow: &Value, name: &str) -> Result<SocketAddr> {
    let address: IpAddr = flow[name].as_str().context("no address")?.parse()?;
    let port = match name.strip_prefix("nat_") {
        Some(rest) => format!("nat_{}port", &rest[..1]),
        None => format!("{}port", &name[..1]),
    };
    let port = flow[&port].as_u64().context("no port")?;
    Ok(SocketAddr::new(address, u16::try_from(port)?))
}

fn told(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let inside = web.listen(case.any(80))?;
    let outside = case.lab.outside.listen(case.any(443))?;
    let own = endpoint.address(case.family)?;
    let remote = OUTSIDE.of(case.family);

    let mut client = connect(&case.lab.outside, HOST.port(case.family, 8080))?;
    let (_accepted, seen) = inside.accept()?;
    client.write_all(b"twelve bytes")?;
    let found = flows(case, &["--endpoint", "web"])?;
    ensure!(found.len() == 1, "{found:?}");
    let flow = &found[0];
    ensure!(side(flow, "src")? == client.local_addr()?, "{flow}");
    ensure!(side(flow, "dst")? == HOST.port(case.family, 8080), "{flow}");
    ensure!(side(flow, "nat_src")? == seen, "{flow}");
    ensure!(side(flow, "nat_dst")? == SocketAddr::new(own, 80), "{flow}");
    ensure!(
        flow["direction"] == "in" && flow["state"] == "established",
        "{flow}"
    );
    ensure!(
        flow["endpoint"] == "web" && flow["protocol"] == "tcp",
        "{flow}"
    );
    // SYN, SYN and ACK, ACK, data; the answer to that may not be there yet.
    ensure!(flow["packets"].as_u64() >= Some(4), "{flow}");
    drop((client, _accepted));

    let client = connect(&web, OUTSIDE.port(case.family, 443))?;
    let (accepted, seen) = outside.accept()?;
    let found = flows(case, &[])?;
    let found: Vec<_> = found
        .iter()
        .filter(|flow| flow["direction"] == "out")
        .collect();
    ensure!(found.len() == 1, "{found:?}");
    let flow = found[0];
    ensure!(side(flow, "src")? == client.local_addr()?, "{flow}");
    ensure!(side(flow, "dst")? == SocketAddr::new(remote, 443), "{flow}");
    ensure!(side(flow, "nat_src")? == seen, "{flow}");
    ensure!(
        side(flow, "nat_dst")? == SocketAddr::new(remote, 443),
        "{flow}"
    );
    ensure!(seen.ip() == HOST.of(case.family), "{seen}");

    let text = case.lab.nucnet(&["flows"])?.expect(0)?.stdout;
    let line = text.lines().find(|line| line.contains(&seen.to_string()));
    let line = line.with_context(|| format!("{seen} is not in\n{text}"))?;
    ensure!(line.contains("established"), "{line}");
    drop((client, accepted));
    until("both are closed", SOON, || {
        let found = flows(case, &[])?;
        Ok(found.len() == 2 && found.iter().all(|flow| flow["state"] == "closed"))
    })
}

fn flushed(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let (db, _) = case.attached("db", &["-p", "5432:5432"])?;
    let servers = [
        web.listen(case.any(80))?,
        case.lab.outside.listen(case.any(443))?,
    ];
    let open = [
        Conversation::start(
            "by publish",
            &case.lab.outside,
            HOST.port(case.family, 8080),
            &servers[0],
        )?,
        Conversation::start(
            "by masquerade",
            &web,
            OUTSIDE.port(case.family, 443),
            &servers[1],
        )?,
    ];
    let victim = db.listen(case.any(5432))?;
    for round in 0..5 {
        let _client = connect(&case.lab.outside, HOST.port(case.family, 5432))?;
        let _accepted = victim.accept()?;
        let ended = case
            .lab
            .nucnet(&["-o", "json", "flows", "flush", "--endpoint", "db"])?
            .expect(0)?
            .json()?;
        ensure!(ended["ended"].as_u64() >= Some(1), "round {round}: {ended}");
        ensure!(
            flows(case, &["--endpoint", "db"])?.is_empty(),
            "it has flows"
        );
        go_on("after a flush", &open, 100_000, Duration::from_secs(10))?;
    }
    ensure!(
        flows(case, &["--endpoint", "web"])?.len() == 2,
        "web has fewer"
    );
    open.into_iter().try_for_each(Conversation::close)
}

fn comes_back(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, _) = case.attached("web", &["-p", "5300:53/udp"])?;
    let _inside = case.udp(&web, 53)?;
    let _outside = case.udp(&case.lab.outside, 7)?;
    let inbound = case.lab.outside.udp(case.any(0))?;
    let outbound = web.udp(case.any(0))?;
    let exchange = || -> Result<_> {
        udp::exchange(&inbound, HOST.port(case.family, 5300), "in", SOON)?;
        udp::exchange(&outbound, OUTSIDE.port(case.family, 7), "out", SOON)?;
        let mut found = flows(case, &["--endpoint", "web"])?;
        found.sort_by_key(|flow| flow["direction"].to_string());
        ensure!(found.len() == 2, "{found:?}");
        Ok(found)
    };
    let before = exchange()?;
    case.lab.nucnet(&["flows", "flush"])?.expect(0)?;
    ensure!(flows(case, &[])?.is_empty(), "there are flows");
    let after = exchange()?;
    for (old, new) in before.iter().zip(&after) {
        ensure!(old["id"] != new["id"], "the same flow: {new}");
        ensure!(
            old["src"] == new["src"] && old["sport"] == new["sport"],
            "{old} {new}"
        );
    }
    // Inbound first. The external port is drawn anew, and may come out the same once in a while.
    ensure!(
        side(&before[0], "nat_dst")? == side(&after[0], "nat_dst")?,
        "{after:?}"
    );
    let usage = case
        .lab
        .nucnet(&["-o", "json", "inspect", "web"])?
        .expect(0)?
        .json()?;
    // Netfilter has flows only.
    let bindings = u64::from(case.is_by_programs());
    ensure!(
        usage["flows"] == 2 && usage["bindings"] == bindings,
        "leaked: {usage}"
    );
    Ok(())
}

fn unpublished(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, _) = case.attached("web", &["-p", "8080:80", "-p", "8443:443"])?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let (http, https) = (web.listen(case.any(80))?, web.listen(case.any(443))?);
    let start = |name, client, port, server| {
        Conversation::start(name, client, HOST.port(case.family, port), server)
    };
    let open = [start("https", &case.lab.outside, 8443, &https)?];
    let doomed = [
        start("of the client", &case.lab.outside, 8080, &http)?,
        start("of the sibling", &sibling, 8080, &http)?,
    ];
    go_on("before", &doomed, 10_000, SOON)?;
    case.lab
        .nucnet(&["unpublish", "web", "8080:80"])?
        .expect(0)?;
    let found = flows(case, &["--endpoint", "web"])?;
    ensure!(found.len() == 1 && found[0]["dport"] == 8443, "{found:?}");
    go_on("afterwards", &open, 100_000, Duration::from_secs(10))?;
    ensure!(flows(case, &[])?.len() == 1, "a flow came back");
    drop(doomed);
    open.into_iter().try_for_each(Conversation::close)
}
