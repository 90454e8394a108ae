//! What people and programs get to see of refusals.

use std::{net::IpAddr, process::Stdio, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use nucnet_common::abi::Reason;
use nucnet_tests::lab::{OUTSIDE, wait, web};
use serde_json::{Value, json};

use crate::case::{Case, Families, Scenario, connect, silent};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "monitor_names_the_rule_that_denies_a_connection",
        what: "whoever runs sandboxes reads why a connection hangs",
        families: Families::Each,
        run: denied,
    },
    Scenario {
        name: "monitor_shows_flows_of_endpoints_that_come_later",
        what: "a monitor that was started at boot sees every container",
        families: Families::Each,
        run: flows,
    },
    Scenario {
        name: "monitor_shows_the_end_of_flows_that_it_has_not_seen_begin",
        what: "whoever is asked about a slow host starts a monitor when it is slow",
        families: Families::Each,
        run: ends,
    },
    Scenario {
        name: "monitor_says_how_many_refusals_it_leaves_out",
        what: "a scan must neither fill the log nor look like a few attempts",
        families: Families::Each,
        run: many,
    },
    Scenario {
        name: "monitor_goes_on_over_an_exchange_of_the_datapath",
        what: "whoever watches a host that is moved to the other datapath sees it go on",
        families: Families::Together,
        run: exchange,
    },
    Scenario {
        name: "several_monitors_see_the_same_and_end_cleanly",
        what: "a log collector must not keep an operator from looking",
        families: Families::Together,
        run: several,
    },
    Scenario {
        name: "monitor_shows_what_the_programs_say_to_one_who_debugs",
        what: "whoever reports a bug can say what the programs saw",
        families: Families::Each,
        run: debug,
    },
    Scenario {
        name: "monitor_ends_when_nobody_reads_it",
        what: "nucnet-ctl monitor | head",
        families: Families::Together,
        run: closed_pipe,
    },
    Scenario {
        name: "monitor_that_was_killed_gives_way",
        what: "nothing is left on that somebody would have to switch off",
        families: Families::Together,
        run: killed,
    },
];

fn denied(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let to = OUTSIDE.port(case.family, 443);
    let rule = match to.ip() {
        IpAddr::V4(v4) => format!("{v4}/32:443/tcp"),
        IpAddr::V6(v6) => format!("[{v6}/128]:443/tcp"),
    };
    let (client, endpoint) = case.attached("client", &["--deny", &rule])?;
    let monitor = case.lab.monitor(&["--endpoint", "client"])?;
    silent(&client, to)?;
    let event = monitor.wait_for("a denial", |event| event["event"] == "denied")?;
    let source = endpoint.address(case.family)?.to_string();
    for (key, value) in [
        ("endpoint", json!("client")),
        ("protocol", json!("tcp")),
        ("src", json!(source)),
        ("dst", json!(to.ip().to_string())),
        ("dport", json!(443)),
        ("reason", json!("policy")),
        ("suppressed", json!(0)),
    ] {
        ensure!(event[key] == value, "{key} is not {value}: {event}");
    }
    let shown = event["rule"].as_str().context("no rule")?;
    let canonical: Value = case
        .lab
        .nucnet(&["-o", "json", "inspect", "client"])?
        .expect(0)?
        .json()?;
    ensure!(
        canonical["egress"]["deny"][0] == shown,
        "{shown} is not the rule as inspect shows it: {canonical}"
    );
    // The kernel repeats a SYN after a second; that is no event of its own.
    let denials = |events: Vec<Value>| events.iter().filter(|e| e["event"] == "denied").count();
    ensure!(denials(monitor.events()?) == 1, "{:?}", monitor.events());

    case.lab
        .nucnet(&["egress", "set", "client", "--egress-default", "deny"])?
        .expect(0)?;
    silent(&client, to)?;
    let event = monitor.wait_for("a denial by default", |event| event["rule"] == "default")?;
    ensure!(event["event"] == "denied", "{event}");
    Ok(())
}

fn flows(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (_first, _) = case.attached("first", &[])?;
    let monitor = case.lab.monitor(&[])?;
    let (client, endpoint) = case.attached("client", &[])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let (seen, local) = case.who(&client, OUTSIDE.port(case.family, 80))?;
    let is_it = |name: &'static str| {
        move |event: &Value| event["event"] == name && event["endpoint"] == "client"
    };
    let event = monitor.wait_for("a new flow", is_it("flow-new"))?;
    let source = endpoint.address(case.family)?.to_string();
    for (key, value) in [
        ("src", json!(source)),
        ("sport", json!(local.port())),
        ("dport", json!(80)),
        ("nat_src", json!(seen.ip().to_string())),
        ("nat_sport", json!(seen.port())),
    ] {
        ensure!(event[key] == value, "{key} is not {value}: {event}");
    }
    let event = monitor.wait_for("its end", is_it("flow-closed"))?;
    ensure!(event["packets"].as_u64() > Some(5), "{event}");
    Ok(())
}

fn ends(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let open = connect(&client, OUTSIDE.port(case.family, 80))?;
    let local = open.local_addr()?;
    let monitor = case.lab.monitor(&[])?;
    web::who(open)?;
    let event = monitor.wait_for("its end", |event| {
        event["event"] == "flow-closed" && event["sport"] == local.port()
    })?;
    ensure!(event["src"] == local.ip().to_string(), "{event}");
    ensure!(event["packets"].as_u64() > Some(5), "{event}");
    Ok(())
}

fn many(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &["--egress-default", "deny"])?;
    let monitor = case.lab.monitor(&[])?;
    let socket = client.udp(case.any(0))?;
    let mut sent = 0;
    let mut send = || {
        sent += 1;
        socket.send_to(b"x", OUTSIDE.port(case.family, 1000 + sent))
    };
    for _ in 0..200 {
        send()?;
    }
    let number = |event: &Value, key: &str| event[key].as_u64().unwrap_or_default();
    let mut told = Vec::new();
    wait::until("those that were left out are named", wait::SOON, || {
        send()?;
        told = monitor.events()?;
        told.retain(|event| event["event"] == "denied");
        Ok(told.iter().any(|event| number(event, "suppressed") > 0))
    })?;
    let left_out = told
        .iter()
        .position(|event| number(event, "suppressed") > 0);
    told.truncate(left_out.context("none")? + 1);
    let latest = told.last().context("none")?;
    let (shown, left_out) = (told.len() as u64, number(latest, "suppressed"));
    // Each packet has a port of its own, one after the other. Two processors that drop at the same
    // moment may count as one, or in another order.
    let all = number(latest, "dport") - 1000;
    ensure!(
        (shown + left_out).abs_diff(all) <= 5,
        "{shown} are shown, {left_out} left out of {all}: {latest}"
    );
    Ok(())
}

fn exchange(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let [first, other] = case.both()?;
    let (client, _) = case.attached("client", &["--deny", "any/udp"])?;
    let monitor = case.lab.monitor(&[])?;
    let socket = client.udp(case.any(0))?;
    let _web = case.web(&case.lab.outside, 80)?;
    let open = connect(&client, OUTSIDE.port(case.family, 80))?;
    let local = open.local_addr()?.port();
    let mut port = 1000;
    for datapath in [first, other, first] {
        case.switch_to(datapath)?;
        let from = port + 1;
        wait::until(&format!("a denial by {datapath}"), wait::SOON, || {
            port += 1;
            socket.send_to(b"x", OUTSIDE.port(case.family, port))?;
            let is_it = |event: &Value| event["dport"].as_u64() >= Some(from.into());
            Ok(monitor.events()?.iter().any(is_it))
        })?;
    }
    // What was open all the time has begun once, and is not over.
    let is_of_open = |event: &Value| event["protocol"] == "tcp" && event["sport"] == local;
    let mut told = monitor.events()?;
    told.retain(is_of_open);
    ensure!(
        told.len() == 1 && told[0]["event"] == "flow-new",
        "{told:?}"
    );
    Ok(())
}

fn several(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &["--egress-default", "deny"])?;
    let mut monitors = Vec::new();
    for _ in 0..4 {
        monitors.push(case.lab.monitor(&[])?);
    }
    let refused = case.lab.nucnet(&["monitor"])?.expect(4)?;
    ensure!(
        refused.stderr.contains("4 monitors are running"),
        "{refused}"
    );
    silent(&client, OUTSIDE.port(case.family, 443))?;
    for (monitor, signal) in monitors.into_iter().zip([
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGTERM,
    ]) {
        monitor.wait_for("a denial", |event| event["event"] == "denied")?;
        ensure!(monitor.end(signal)? == Some(0), "{signal} is no clean end");
    }
    let _again = case.lab.monitor(&[])?;
    Ok(())
}

fn debug(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, endpoint) = case.attached("client", &["--egress-default", "deny"])?;
    let to = OUTSIDE.port(case.family, 443);
    let monitor = case.lab.monitor(&["--debug"])?;
    let another = case.lab.nucnet(&["monitor", "--debug"])?.expect(4)?;
    ensure!(another.stderr.contains("another monitor"), "{another}");
    let plain = case.lab.monitor(&[])?;
    silent(&client, to)?;
    plain.wait_for("a denial", |event| event["event"] == "denied")?;
    let address = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.to_ipv6_mapped().to_string(),
        IpAddr::V6(v6) => v6.to_string(),
    };
    let (source, destination) = (address(endpoint.address(case.family)?), address(to.ip()));
    let wanted = [
        format!("drop: reason {} ", Reason::Policy as u32),
        format!(" protocol 6 {source} "),
        format!(" -> {destination} 443 "),
    ];
    // Among others: the container's own stack reports which groups it listens to.
    let is_wanted = |message: &str| wanted.iter().all(|part| message.contains(part));
    monitor.wait_for("a line about the denial", |event| {
        event["event"] == "debug" && event["message"].as_str().is_some_and(is_wanted)
    })?;
    ensure!(
        plain
            .events()?
            .iter()
            .all(|event| event["event"] != "debug"),
        "{:?}",
        plain.events()
    );
    // Whoever comes next reads it in turn.
    ensure!(monitor.end(Signal::SIGTERM)? == Some(0), "no clean end");
    case.lab.monitor(&["--debug"]).map(drop)
}

fn closed_pipe(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (_client, _) = case.attached("client", &[])?;
    let mut child = case
        .lab
        .program(&["monitor"])?
        .stdout(Stdio::piped())
        .spawn()?;
    drop(child.stdout.take());
    let mut code = None;
    wait::until("the monitor ends", wait::SOON, || {
        code = child.try_wait()?;
        Ok(code.is_some())
    })?;
    ensure!(code.is_some_and(|code| code.success()), "{code:?}");
    Ok(())
}

fn killed(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (_client, _) = case.attached("client", &[])?;
    for _ in 0..4 {
        let monitor = case.lab.monitor(&[])?;
        ensure!(monitor.end(Signal::SIGKILL)?.is_none(), "not killed");
    }
    wait::until("a place is free again", Duration::from_secs(20), || {
        Ok(case.lab.monitors()?.len() < 4)
    })?;
    case.lab.monitor(&[]).map(drop)
}
