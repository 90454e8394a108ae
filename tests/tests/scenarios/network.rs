//! What a network chooses.

use std::{net::IpAddr, process::Stdio, time::Duration};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, HOST2, OUTSIDE, OUTSIDE2, Outcome, udp};

use crate::case::{Case, Families, Scenario};
use crate::differences::closes_unmanaged;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "networks_are_made_once",
        what: "creating what exists succeeds with the same settings and conflicts with others",
        families: Families::Together,
        run: network_create,
    },
    Scenario {
        name: "network_keeps_what_it_was_created_with",
        what: "filtering, mapping and idle times: defaults, conflicts, and what the map says",
        families: Families::Together,
        run: created,
    },
    Scenario {
        name: "uplink_that_gets_another_address_masquerades_with_it",
        what: "a lease that was renewed: no call of nucnet-ctl in between",
        families: Families::Each,
        run: readdressed,
    },
    Scenario {
        name: "uplink_that_comes_up_later_is_used_after_gc",
        what: "a VPN that connects: dropped and counted until it has its program",
        families: Families::Each,
        run: late_uplink,
    },
    Scenario {
        name: "resolver_may_answer_from_another_port",
        what: "filtering is by address: whoever was spoken to may answer, nobody else",
        families: Families::Each,
        run: other_port,
    },
];

/// A network as `network list -o json` shows it.
fn shown(case: &Case, name: &str) -> Result<serde_json::Value> {
    let outcome = case
        .lab
        .nucnet(&["-o", "json", "network", "list"])?
        .expect(0)?;
    let networks: Vec<serde_json::Value> = serde_json::from_str(&outcome.stdout)?;
    networks
        .into_iter()
        .find(|network| network["id"] == name)
        .with_context(|| format!("no network {name}"))
}

fn create(case: &Case, words: &[&str]) -> Result<Outcome> {
    let mut all = vec!["network", "create"];
    all.extend(words);
    case.lab.nucnet(&all)
}

fn created(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    create(case, &["plain"])?.expect(0)?;
    let plain = shown(case, "plain")?;
    ensure!(plain["filtering"] == "address-dependent", "{plain}");
    ensure!(plain["udp_mapping"] == "endpoint-independent", "{plain}");
    ensure!(plain["tcp_mapping"] == "per-flow", "{plain}");
    let expected = serde_json::json!({
        "tcp-established": 7440, "tcp-transitory": 240, "udp": 300, "udp-dns": 10, "icmp": 60,
    });
    ensure!(plain["timeouts"] == expected, "{plain}");

    // The network that is made on first use may be made on purpose.
    let wanted = [
        "default",
        "--filtering",
        "endpoint-independent",
        "--udp-mapping",
        "per-flow",
        "--timeout",
        "udp=600",
        "--timeout",
        "icmp=90",
    ];
    create(case, &wanted)?.expect(0)?;
    create(case, &wanted)?.expect(0)?;
    let ours = shown(case, "default")?;
    ensure!(ours["filtering"] == "endpoint-independent", "{ours}");
    ensure!(ours["udp_mapping"] == "per-flow", "{ours}");
    ensure!(ours["timeouts"]["udp"] == 600, "{ours}");
    ensure!(ours["timeouts"]["icmp"] == 90, "{ours}");
    // A default that is spelled out is no difference; anything else is a conflict.
    let mut same = wanted.to_vec();
    same.extend(["--timeout", "udp-dns=10"]);
    create(case, &same)?.expect(0)?;
    for (words, flag) in [
        (&["default"][..], "--filtering"),
        (&["plain", "--timeout", "udp=301"], "--timeout"),
        (
            &["plain", "--tcp-mapping", "endpoint-independent"],
            "--tcp-mapping",
        ),
        (&["plain", "--keep-ports"], "--keep-ports"),
    ] {
        let outcome = create(case, words)?.expect(4)?;
        ensure!(
            outcome.stderr.contains(flag),
            "no word of {flag}:\n{outcome}"
        );
    }
    let outcome = create(case, &["short", "--timeout", "tcp-established=60"])?.expect(2)?;
    for word in ["--timeout", "tcp-established=60", "7440"] {
        ensure!(
            outcome.stderr.contains(word),
            "no word of {word}:\n{outcome}"
        );
    }

    let (_client, _) = case.attached("client", &[])?;
    case.lab.nucnet(&["detach", "client"])?.expect(0)?;
    ensure!(
        shown(case, "default")?["timeouts"]["udp"] == 600,
        "it went with its last endpoint"
    );
    Ok(())
}

/// The host's address after the change.
fn renewed(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::from([192, 0, 2, 77]),
        Family::V6 => IpAddr::from([0x2001, 0xdb8, 1, 0, 0, 0, 0, 0x77]),
    }
}

fn readdressed(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    let (web, dns) = (OUTSIDE.port(case.family, 80), OUTSIDE.port(case.family, 53));
    let (before, after) = (HOST.of(case.family), renewed(case.family));
    let socket = client.udp(case.any(4000))?;
    let seen = udp::exchange(&socket, dns, "before", SOON)?;
    ensure!(seen.peer.ip() == before, "UDP: {}", seen.peer);
    ensure!(case.who(&client, web)?.0.ip() == before, "TCP before");

    let (bits, flags) = match case.family {
        Family::V4 => (24, ""),
        Family::V6 => (64, " nodad"),
    };
    case.lab.host.ip(&format!(
        "addr del {before}/{bits} dev eth0\n\
         addr add {after}/{bits} dev eth0{flags}\n\
         route replace default via {}",
        OUTSIDE.of(case.family)
    ))?;
    let (seen, _) = case.who(&client, web)?;
    ensure!(seen.ip() == after, "TCP: the outside sees {seen}");
    // A socket that goes on is followed within a second.
    let mut seen = None;
    until("the same socket is seen by the new address", SOON, || {
        seen = udp::exchange(&socket, dns, "after", Duration::from_millis(100)).ok();
        Ok(seen.as_ref().is_some_and(|seen| seen.peer.ip() == after))
    })
    .with_context(|| format!("last seen: {seen:?}"))?;
    ensure!(case.pings(&client, OUTSIDE.of(case.family))?, "no pong");
    Ok(())
}

fn other_port(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let _server = case.udp(&case.lab.outside, 53)?;
    let socket = client.udp(case.any(4000))?;
    let to = OUTSIDE.port(case.family, 53);
    let seen = udp::exchange(&socket, to, "who", SOON)?;
    let other = case.lab.outside.udp(OUTSIDE.port(case.family, 5353))?;
    let stranger = case.lab.outside.udp(FAR.port(case.family, 5454))?;
    stranger.send_to(b"stranger", seen.peer)?;
    other.send_to(b"other", seen.peer)?;
    socket.set_read_timeout(Some(SOON))?;
    let mut buffer = [0; 64];
    let (length, from) = socket.recv_from(&mut buffer)?;
    ensure!(
        &buffer[..length] == b"other" && from.port() == 5353,
        "{:?} from {from}",
        &buffer[..length]
    );
    case.counted("filtered")
}

fn late_uplink(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let second = case.lab.second_uplink()?;
    let _web = case.web(&second, 80)?;
    let to = OUTSIDE2.port(case.family, 80);
    if closes_unmanaged(case.way, case.family) {
        ensure!(
            client.connect(to, NEVER).is_err(),
            "connected without a way back"
        );
        case.counted("uplink-unmanaged")?;
    }
    case.lab.nucnet(&["gc"])?.expect(0)?;
    let (seen, _) = case.who(&client, to)?;
    ensure!(
        seen.ip() == HOST2.of(case.family),
        "the outside sees {seen}"
    );
    Ok(())
}

fn network_create(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let create = |words: &[&str]| case.lab.nucnet(&[&["network", "create"], words].concat());
    let same = ["red", "--bridge", "red0", "--subnet", "10.71.0.0/24"];
    create(&same)?.expect(0)?;
    create(&same)?.expect(0)?;
    create(&["red", "--bridge", "red0", "--subnet", "10.72.0.0/24"])?.expect(4)?;
    create(&["blue", "--bridge", "eth0", "--subnet", "10.72.0.0/24"])?.expect(4)?;
    create(&["blue", "--bridge", "red0", "--subnet", "10.72.0.0/24"])?.expect(4)?;
    // The uplink's own subnet, and one that a network has.
    create(&["blue", "--bridge", "blue0", "--subnet", "192.0.2.0/24"])?.expect(4)?;
    create(&["blue", "--bridge", "blue0", "--subnet", "10.71.0.128/25"])?.expect(4)?;
    let status = case
        .lab
        .host
        .command("ip")
        .args(["link", "show", "dev", "blue0"])
        .stderr(Stdio::null())
        .stdout(Stdio::null())
        .status()?;
    ensure!(
        !status.success(),
        "a network that was refused left its bridge"
    );
    Ok(())
}
