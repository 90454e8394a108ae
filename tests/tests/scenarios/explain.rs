//! Asking beforehand what would happen.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::{Endpoint, FAR, HOST, OUTSIDE};
use serde_json::{Value, json};

use crate::case::{Case, Families, Scenario, silent};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "explain_says_what_then_happens_to_a_new_connection",
        what: "one asks before one changes a policy, or after a complaint",
        families: Families::Each,
        run: outbound,
    },
    Scenario {
        name: "explain_follows_a_packet_from_outside_to_a_publish",
        what: "why does nobody reach my server",
        families: Families::Each,
        run: inbound,
    },
    Scenario {
        name: "explain_knows_where_a_packet_goes_whoever_it_is_for",
        what: "the same answers whatever carries packets: siblings, publishes, mappings, the host",
        families: Families::Each,
        run: everywhere,
    },
    Scenario {
        name: "explain_changes_nothing",
        what: "a question must not cost a flow, a port or a count",
        families: Families::Each,
        run: nothing,
    },
    Scenario {
        name: "explain_refuses_questions_that_make_no_sense",
        what: "exit codes of the contract",
        families: Families::Together,
        run: nonsense,
    },
];

/// Asks, and expects an answer with these values.
fn explain(case: &Case, arguments: &[&str], expected: &[(&str, Value)]) -> Result<Value> {
    let mut all = vec!["-o", "json", "explain"];
    all.extend(arguments);
    let outcome = case.lab.nucnet(&all)?.expect(0)?;
    let answer = outcome.json()?;
    for (key, value) in expected {
        ensure!(answer[*key] == *value, "{key} is not {value}: {answer}");
    }
    Ok(answer)
}

fn one(address: IpAddr) -> String {
    match address {
        IpAddr::V4(address) => format!("{address}/32"),
        IpAddr::V6(address) => format!("[{address}/128]"),
    }
}

fn outbound(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (to, far) = (OUTSIDE.port(case.family, 80), FAR.port(case.family, 80));
    let allow = format!("{}:80/tcp", one(to.ip()));
    let (client, endpoint) = case.attached("client", &["--allow", &allow])?;
    let source = endpoint.address(case.family)?;
    let allowed = json!(endpoint.json["egress"]["allow"][0]);
    let from = ["--from", "client", "--to"];
    let target = to.to_string();
    let asked = [&from[..], &[&target]].concat();
    let answer = explain(
        case,
        &asked,
        &[
            ("verdict", json!("pass")),
            ("reason", json!("policy")),
            ("rule", allowed.clone()),
            ("endpoint", json!("client")),
            ("src", json!(source.to_string())),
            ("nat_dst", json!(to.ip().to_string())),
            ("nat_dport", json!(80)),
            ("interface", json!("eth0")),
        ],
    )?;
    explain(
        case,
        &[&from[..], &[&far.to_string()]].concat(),
        &[
            ("verdict", json!("drop")),
            ("reason", json!("policy")),
            ("rule", json!("default")),
            ("nat_src", Value::Null),
        ],
    )?;
    explain(
        case,
        &[&from[..], &[&to.to_string(), "--proto", "udp"]].concat(),
        &[("verdict", json!("drop")), ("rule", json!("default"))],
    )?;
    explain(
        case,
        &[&from[..], &[&to.ip().to_string()]].concat(),
        &[("verdict", json!("drop")), ("protocol", json!("icmp"))],
    )?;

    // People read the same.
    let all = [&["explain"], &asked[..]].concat();
    let text = case.lab.nucnet(&all)?.expect(0)?.stdout;
    let allowed = allowed.as_str().unwrap_or_default();
    for line in [
        format!("pass: tcp {}", SocketAddr::new(source, 40_000)),
        format!("-> {target}\n"),
        "\n  reason     policy\n".to_owned(),
        format!("\n  rule       {allowed}\n"),
        "\n  goes on as ".to_owned(),
        "\n  by         eth0, neighbour ".to_owned(),
    ] {
        ensure!(text.contains(&line), "{line:?} is not in {text}");
    }

    // And that is what happens.
    let _web = case.web(&case.lab.outside, 80)?;
    let stream = client.connect(to, std::time::Duration::from_secs(5))?;
    let seen = case
        .lab
        .nucnet(&["-o", "json", "flows"])?
        .expect(0)?
        .json()?;
    ensure!(answer["nat_src"] == seen[0]["nat_src"], "{answer}\n{seen}");
    silent(&client, far)?;
    let local = stream.local_addr()?;
    explain(
        case,
        &[&asked[..], &["--source", &local.to_string()]].concat(),
        &[
            ("verdict", json!("pass")),
            ("reason", json!("flow")),
            ("rule", Value::Null),
            ("sport", json!(local.port())),
            ("nat_sport", seen[0]["nat_sport"].clone()),
        ],
    )?;
    Ok(())
}

fn inbound(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (_server, endpoint) = case.attached("server", &["-p", "8080:80"])?;
    let to = HOST.port(case.family, 8080).to_string();
    let client = SocketAddr::new(OUTSIDE.of(case.family), 5000).to_string();
    let from = ["--from", "uplink", "--source", &client, "--to"];
    explain(
        case,
        &[&from[..], &[&to]].concat(),
        &[
            ("verdict", json!("pass")),
            ("reason", json!("published")),
            ("rule", Value::Null),
            ("endpoint", json!("server")),
            ("nat_src", json!(OUTSIDE.of(case.family).to_string())),
            ("nat_sport", json!(5000)),
            ("nat_dst", json!(endpoint.address(case.family)?.to_string())),
            ("nat_dport", json!(80)),
        ],
    )?;
    let other = HOST.port(case.family, 8081).to_string();
    explain(
        case,
        &["--from", "uplink", "--to", &other],
        &[("verdict", json!("pass")), ("reason", json!("host"))],
    )?;
    Ok(())
}

fn everywhere(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    case.network("red --isolate")?;
    let (_server, server) = case.attached("server", &["-p", "8080:80", "-p", "8081:81"])?;
    let own = server.address(case.family)?;
    let denied = SocketAddr::new(own, 81).to_string();
    let (_client, client) = case.attached("client", &["--deny", &denied])?;
    let (_other, other) = case.attached("other", &["--network", "red"])?;
    let address = client.address(case.family)?;
    let (ext, int) = (HOST.of(case.family).to_string(), address.to_string());
    #[rustfmt::skip]
    let dnat = [
        "nat", "add", "dnat", "--ext-ip", &ext, "--ports", "9090", "--int-ip", &int,
        "--int-port", "90",
    ];
    case.lab.nucnet(&dnat)?.expect(0)?;

    let at = |address: IpAddr, port: u16| SocketAddr::new(address, port).to_string();
    let host = |port: u16| HOST.port(case.family, port).to_string();
    let interface = |endpoint: &Endpoint| endpoint.json["host_ifname"].clone();
    // It would not take its own address as a source.
    let gateway = server.gateway(case.family)?;
    let bridge = json!("nucnet0");
    let at_host = HOST.of(case.family);
    #[rustfmt::skip]
    let passing = [
        ("client", at(own, 80), "policy", address, (own, 80), interface(&server)),
        ("client", host(8080), "policy", address, (own, 80), interface(&server)),
        ("server", host(8080), "no-policy", gateway, (own, 80), interface(&server)),
        ("server", host(9090), "no-policy", own, (address, 90), interface(&client)),
        ("client", host(22), "policy", address, (at_host, 22), bridge),
    ];
    for (from, to, reason, source, (destination, port), interface) in passing {
        explain(
            case,
            &["--from", from, "--to", &to],
            &[
                ("verdict", json!("pass")),
                ("reason", json!(reason)),
                ("endpoint", json!(from)),
                ("nat_src", json!(source.to_string())),
                ("nat_sport", json!(40_000)),
                ("nat_dst", json!(destination.to_string())),
                ("nat_dport", json!(port)),
                ("interface", interface),
                ("next_hop", Value::Null),
            ],
        )?;
    }

    let neighbour = OUTSIDE.port(case.family, 5000).to_string();
    let from_outside = ["--from", "uplink", "--source", &neighbour, "--to"];
    explain(
        case,
        &[&from_outside[..], &[&host(9090)]].concat(),
        &[
            ("verdict", json!("pass")),
            ("reason", json!("published")),
            ("endpoint", json!("client")),
            ("nat_dst", json!(address.to_string())),
            ("nat_dport", json!(90)),
            ("interface", interface(&client)),
        ],
    )?;
    explain(
        case,
        &[&from_outside[..], &[&host(8080), "--proto", "udp"]].concat(),
        &[("verdict", json!("pass")), ("reason", json!("host"))],
    )?;

    let dropped = |arguments: &[&str], reason: &str| {
        let expected = [("verdict", json!("drop")), ("reason", json!(reason))];
        explain(case, arguments, &expected)
    };
    let from = ["--from", "client", "--to"];
    for to in [at(own, 81), host(8081)] {
        let answer = dropped(&[&from[..], &[&to]].concat(), "policy")?;
        ensure!(
            answer["rule"] == client.json["egress"]["deny"][0],
            "{answer}"
        );
        ensure!(answer["endpoint"] == "client", "{answer}");
    }
    // The gateway has the first one.
    let mut others = (100..103).map(|last| match own {
        IpAddr::V4(own) => IpAddr::from((u32::from(own) & !0xff | last).to_be_bytes()),
        IpAddr::V6(own) => IpAddr::from((u128::from(own) & !0xff | u128::from(last)).to_be_bytes()),
    });
    let free = others.find(|other| *other != own && *other != address);
    let nobody = at(free.context("an address that is free")?, 80);
    dropped(&[&from[..], &[&nobody]].concat(), "no-such-address")?;
    let isolated = at(other.address(case.family)?, 80);
    dropped(&[&from[..], &[&isolated]].concat(), "isolated")?;
    let source = own.to_string();
    let out = OUTSIDE.port(case.family, 80).to_string();
    let forged = [&from[..], &[&out, "--source", &source]].concat();
    dropped(&forged, "spoofed-address")?;
    let to = host(8080);
    let forged = ["--from", "uplink", "--to", &to, "--source", &source];
    dropped(&forged, "martian-source")?;
    Ok(())
}

fn nothing(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let far = FAR.of(case.family);
    let (client, _) = case.attached("client", &["-p", "8080:80", "--deny", &one(far)])?;
    let (_other, other) = case.attached("other", &[])?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    let monitor = case.lab.monitor(&[])?;
    silent(&client, SocketAddr::new(far, 443))?;
    monitor.wait_for("a denial", |event| event["event"] == "denied")?;
    let (told, before) = (monitor.events()?, case.lab.tables()?);
    let outside = |port| OUTSIDE.port(case.family, port).to_string();
    let host = |port| HOST.port(case.family, port).to_string();
    let sibling = SocketAddr::new(other.address(case.family)?, 80).to_string();
    let far = SocketAddr::new(far, 443).to_string();
    for (from, to, proto) in [
        ("client", outside(443), "tcp"),
        ("client", outside(53), "udp"),
        ("client", outside(54), "udp"),
        ("client", OUTSIDE.of(case.family).to_string(), "icmp"),
        ("client", far, "tcp"),
        ("client", sibling, "tcp"),
        ("client", host(8080), "tcp"),
        ("client", host(22), "tcp"),
        ("uplink", host(8080), "tcp"),
        ("uplink", host(8080), "udp"),
        ("uplink", host(22), "tcp"),
    ] {
        case.lab
            .nucnet(&["explain", "--from", from, "--to", &to, "--proto", proto])?
            .expect(0)?;
    }
    let after = case.lab.tables()?;
    ensure!(
        before == after,
        "before\n  {}\nafter\n  {}",
        before.join("\n  "),
        after.join("\n  ")
    );
    let denials = |events: Vec<Value>| events.iter().filter(|e| e["event"] == "denied").count();
    ensure!(
        denials(monitor.events()?) == denials(told),
        "{:?}",
        monitor.events()
    );
    Ok(())
}

fn nonsense(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let explain = |arguments: &[&str], code| {
        let all = [&["explain"], arguments].concat();
        case.lab.nucnet(&all)?.expect(code)
    };
    explain(&["--from", "client", "--to", "192.0.2.1:80"], 3)?;
    let (_client, _) = case.attached("client", &[])?;
    explain(&["--from", "nobody", "--to", "192.0.2.1:80"], 3)?;
    for wrong in [
        &["--to", "192.0.2"][..],
        &["--to", "192.0.2.1:80", "--proto", "icmp"],
        &["--to", "192.0.2.1", "--proto", "udp"],
        &["--to", "192.0.2.1:80", "--source", "fd00::1"],
        &["--to", "192.0.2.1:80", "--proto", "gre"],
    ] {
        explain(&[&["--from", "client"], wrong].concat(), 2)?;
    }
    explain(&["--from", "client", "--to", "192.0.2.1:80"], 0)?;
    Ok(())
}
