//! What a network chooses.

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::Outcome;

use crate::case::{Case, Families, Scenario};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "network_keeps_what_it_was_created_with",
    what: "filtering, mapping and idle times: defaults, conflicts, and what the map says",
    families: Families::Together,
    run: created,
}];

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
