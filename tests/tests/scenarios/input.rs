//! What bad input gets: a precise refusal before anything is touched.

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::Snapshot;

use crate::case::{Case, Families, Scenario};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "bad_input_exits_2_and_touches_nothing",
        what: "every value is checked before the first step",
        families: Families::Together,
        run: bad_input,
    },
    Scenario {
        name: "missing_things_exit_3_and_touch_nothing",
        what: "a dead process, a path without namespace, an unknown network",
        families: Families::Together,
        run: missing,
    },
];

/// Arguments of `attach` for a live container, and a word that the message must have.
const ATTACH: &[(&[&str], &str)] = &[
    (&["--id", ""], "id"),
    (&["--id", ".hidden"], ".hidden"),
    (&["--id", "a/b"], "a/b"),
    (&["--id", "a b"], "a b"),
    (&["--id", "ä"], "ä"),
    (
        &[
            "--id",
            "x123456789012345678901234567890123456789012345678901234567890123456",
        ],
        "64",
    ),
    (&["-p", "0"], "0"),
    (&["-p", "80"], "80"),
    (&["-p", ":80"], ":80"),
    (&["-p", "8080:0"], "8080:0"),
    (&["-p", "8080:65536"], "65536"),
    (&["-p", "70000:80"], "70000"),
    (&["-p", "8080:80/sctp"], "sctp"),
    (&["-p", "8080:80/"], "8080:80/"),
    (&["-p", "9000-9002:80-81"], "9000-9002"),
    (&["-p", "9002-9000:80-82"], "9002-9000"),
    (&["-p", "192.0.2.300:80:80"], "192.0.2.300"),
    (&["-p", "::1:8080:80"], "::1:8080:80"),
    (&["-p", "[::1:8080:80"], "[::1"),
    (&["-p", "+8080:80"], "+8080"),
    (&["-p", "8080:80:80:80"], "8080:80:80:80"),
    (&["--ip", "10.0.42.1"], "10.0.42.1"),
    (&["--ip", "10.0.42.0"], "10.0.42.0"),
    (&["--ip", "10.0.42.255"], "10.0.42.255"),
    (&["--ip", "10.9.9.9"], "10.9.9.9"),
    (&["--ip", "fd99::1"], "fd99::1"),
    (&["--ip", "10.0.42.9", "--ip", "10.0.42.10"], "10.0.42.10"),
    (&["--ip", "10.0.42.300"], "10.0.42.300"),
    (&["--ip", "127.0.0.1"], "127.0.0.1"),
    (&["--mac", "01:00:00:00:00:01"], "01:00:00:00:00:01"),
    (&["--mac", "00:00:00:00:00:00"], "00:00:00:00:00:00"),
    (&["--mac", "02:00:00:00:00"], "02:00:00:00:00"),
    (&["--mac", "zz:00:00:00:00:01"], "zz:00:00:00:00:01"),
    (&["--ifname", "far-too-long-name"], "far-too-long-name"),
    (&["--ifname", ""], "ifname"),
    (&["--ifname", "."], "."),
    (&["--ifname", ".."], ".."),
    (&["--ifname", "lo"], "lo"),
    (&["--ifname", "a/b"], "a/b"),
    (&["--ifname", "a b"], "a b"),
    (&["--ifname", "all"], "all"),
    (&["--ifname", "default"], "default"),
    (&["--ifname", "eth%d"], "eth%d"),
    (&["--mtu", "0"], "0"),
    (&["--mtu", "67"], "67"),
    (&["--mtu", "1279"], "1279"),
    (&["--mtu", "65536"], "65536"),
    (&["--mtu", "1500x"], "1500x"),
    (&["--allow", ""], "allow"),
    (&["--allow", "10.0.0.0/33"], "10.0.0.0/33"),
    (&["--allow", "2001:db8::/129"], "2001:db8::/129"),
    (&["--allow", "example.org"], "example.org"),
    (&["--allow", "10.0.0.0/8:0"], "10.0.0.0/8:0"),
    (&["--allow", "10.0.0.0/8:65536"], "65536"),
    (&["--allow", "10.0.0.0/8:90-80"], "90-80"),
    (&["--allow", "10.0.0.0/8:80/sctp"], "sctp"),
    (&["--allow", "10.0.0.0/8:80/icmp"], "icmp"),
    (&["--allow", "10.0.0.0/8:80,"], "80,"),
    (&["--deny", "any:"], "any:"),
    (&["--egress-default", "maybe"], "maybe"),
    (&["--dns", "example.org"], "example.org"),
    (&["--dns", "0.0.0.0"], "0.0.0.0"),
    (&["--network", "a/b"], "a/b"),
    (&["--no-such-flag"], "--no-such-flag"),
];

/// Whole command lines.
const OTHERS: &[&[&str]] = &[
    &[],
    &["no-such-verb"],
    &["attach"],
    &["attach", "--pid", "x"],
    &["attach", "--pid", "-1"],
    &["attach", "--pid", "1", "--netns", "/proc/1/ns/net"],
    &["detach"],
    &["detach", "a/b"],
    &["inspect"],
    &["inspect", "../etc"],
    &["-o", "yaml", "list"],
    &["network", "create"],
    &["network", "create", "a/b"],
    &["network", "create", "red", "--subnet", "10.71.0.0/33"],
    &["network", "create", "red", "--subnet", "10.71.0.0/32"],
    &["network", "create", "red", "--subnet", "0.0.0.0/0"],
    &["network", "create", "red", "--subnet", "127.0.0.0/8"],
    &["network", "create", "red", "--subnet", "224.0.0.0/24"],
    &["network", "create", "red", "--subnet", "fd71::/64"],
    &["network", "create", "red", "--subnet6", "10.71.0.0/24"],
    &["network", "create", "red", "--subnet6", "fe80::/64"],
    &[
        "network",
        "create",
        "red",
        "--subnet",
        "10.71.0.0/24",
        "--gateway",
        "10.72.0.1",
    ],
    &[
        "network",
        "create",
        "red",
        "--subnet",
        "10.71.0.0/24",
        "--gateway",
        "10.71.0.255",
    ],
    &["network", "create", "red", "--bridge", "far-too-long-name"],
    &["network", "create", "red", "--filtering", "none"],
    &["network", "create", "red", "--udp-mapping", "symmetric"],
    &["network", "create", "red", "--timeout", "udp=119"],
    &["network", "create", "red", "--timeout", "udp=5m"],
    &[
        "network",
        "create",
        "red",
        "--timeout",
        "udp=300",
        "--timeout",
        "udp=400",
    ],
    &[
        "network",
        "create",
        "red",
        "--subnet",
        "10.71.0.0/24",
        "--mtu",
        "10",
    ],
];

fn bad_input(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = case.lab.container("web")?;
    let pid = container.pid().to_string();
    let before = [Snapshot::of(&case.lab.host)?, Snapshot::of(&container)?];
    let mut wrong = String::new();
    for (words, named) in ATTACH {
        let mut all = vec!["attach", "--pid", &pid];
        all.extend(*words);
        let outcome = case.lab.nucnet(&all)?;
        if outcome.code != Some(2) {
            wrong += &format!("expected exit code 2\n{outcome}\n");
        } else if !outcome.stderr.contains(named) {
            wrong += &format!("the message does not name `{named}`\n{outcome}\n");
        }
    }
    for words in OTHERS {
        let outcome = case.lab.nucnet(words)?;
        if outcome.code != Some(2) {
            wrong += &format!("expected exit code 2\n{outcome}\n");
        }
    }
    let after = [Snapshot::of(&case.lab.host)?, Snapshot::of(&container)?];
    for (before, after) in before.iter().zip(&after) {
        wrong += &before.difference(after);
    }
    case.lab.forget();
    ensure!(wrong.is_empty(), "{wrong}");
    Ok(())
}

fn missing(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = case.lab.container("web")?;
    let pid = container.pid().to_string();
    let before = Snapshot::of(&case.lab.host)?;
    // A process that was there and is not any more.
    let mut dead = std::process::Command::new("true")
        .spawn()
        .context("running true")?;
    let dead_pid = dead.id().to_string();
    dead.wait()?;
    for words in [
        &["attach", "--pid", &dead_pid][..],
        &["attach", "--netns", "/run/no-such-netns"],
        &["attach", "--pid", &pid, "--network", "no-such-network"],
        &["inspect", "nobody"],
    ] {
        case.lab.nucnet(words)?.expect(3)?;
    }
    // A file that is no namespace, and the host's own namespace.
    case.lab
        .nucnet(&["attach", "--netns", "/etc/hostname"])?
        .expect(2)?;
    let own = format!("/proc/{}/ns/net", case.lab.host.pid());
    case.lab.nucnet(&["attach", "--netns", &own])?.expect(2)?;
    let difference = before.difference(&Snapshot::of(&case.lab.host)?);
    ensure!(difference.is_empty(), "{difference}");
    Ok(())
}
