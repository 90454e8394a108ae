//! What attach does, prints and refuses.

use std::net::IpAddr;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::{Family, HOST, OUTSIDE};
use serde_json::Value;

use crate::case::{Case, Families, Scenario};
use crate::unchanged::{both, unchanged, unchanged_but_for_pins};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "attach_prints_the_endpoint",
        what: "scripts read what the contract promises",
        families: Families::Together,
        run: attach_prints,
    },
    Scenario {
        name: "attach_with_only_a_pid_derives_an_id",
        what: "the shortest command works",
        families: Families::Together,
        run: only_pid,
    },
    Scenario {
        name: "attach_by_netns_path",
        what: "runtimes that name namespaces instead of processes",
        families: Families::Each,
        run: netns_path,
    },
    Scenario {
        name: "attach_again_changes_nothing",
        what: "a runtime that retries",
        families: Families::Together,
        run: again,
    },
    Scenario {
        name: "attach_again_with_other_settings_is_a_conflict",
        what: "nothing is changed behind anybody's back",
        families: Families::Together,
        run: again_with_others,
    },
    Scenario {
        name: "attach_takes_address_mac_name_and_mtu",
        what: "everything about the container's interface can be asked for",
        families: Families::Together,
        run: asked_for,
    },
    Scenario {
        name: "attaches_at_once_get_addresses_of_their_own",
        what: "eight containers started by one command",
        families: Families::Together,
        run: at_once,
    },
    Scenario {
        name: "taken_port_address_and_id_are_conflicts_that_name_the_owner",
        what: "exit code 4, and host and container as before",
        families: Families::Together,
        run: conflicts,
    },
    Scenario {
        name: "foreign_bridge_of_the_default_name_is_a_conflict",
        what: "nothing foreign is ever taken over (E16)",
        families: Families::Together,
        run: foreign_bridge,
    },
    Scenario {
        name: "failing_attach_leaves_host_and_container_as_before",
        what: "the container already has an interface of that name; a way out is missing",
        families: Families::Together,
        run: failing,
    },
    Scenario {
        name: "list_and_inspect_agree",
        what: "what was attached is what is shown",
        families: Families::Together,
        run: list_and_inspect,
    },
];

/// What `attach` promises for every endpoint.
const KEYS: [&str; 12] = [
    "id",
    "state",
    "network",
    "netns",
    "ifname",
    "host_ifname",
    "mac",
    "addresses",
    "gateways",
    "datapath",
    "published",
    "egress",
];

fn attach_prints(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let words = [
        "-p",
        "8080:80",
        "-p",
        "192.0.2.2:5300:53/udp",
        "--allow",
        "192.0.2.9/24:443",
    ];
    let (container, endpoint) = case.attached("web", &words)?;
    let json = &endpoint.json;
    for key in KEYS {
        ensure!(!json[key].is_null(), "no `{key}` in {json:#}");
    }
    ensure!(json["id"] == "web" && json["state"] == "active", "{json:#}");
    ensure!(
        json["network"] == "default" && json["ifname"] == "eth0",
        "{json:#}"
    );
    ensure!(
        json["netns"]
            .as_str()
            .is_some_and(|path| path.starts_with('/')),
        "{json:#}"
    );
    let published = json["published"]
        .as_array()
        .context("`published` is no array")?;
    let tcp = published
        .iter()
        .find(|publish| publish["protocol"] == "tcp");
    let udp = published
        .iter()
        .find(|publish| publish["protocol"] == "udp");
    let (tcp, udp) = (
        tcp.context("no tcp publish")?,
        udp.context("no udp publish")?,
    );
    ensure!(
        tcp["host_ip"].is_null() && tcp["host_port"] == 8080 && tcp["port"] == 80,
        "{tcp}"
    );
    ensure!(
        udp["host_ip"] == "192.0.2.2" && udp["host_port"] == 5300,
        "{udp}"
    );
    let egress = &json["egress"];
    ensure!(
        egress["default"] == "deny",
        "giving any --allow makes the default deny: {egress}"
    );
    for key in ["allow", "deny", "dns"] {
        ensure!(egress[key].is_array(), "no list `{key}` in {egress}");
    }
    let text = egress["allow"].to_string();
    ensure!(
        text.contains("192.0.2.0/24"),
        "the rule is not in canonical form: {text}"
    );

    let links = container.run("ip", &["-j", "link", "show", "dev", "eth0"])?;
    let links: Value = serde_json::from_str(&links)?;
    ensure!(
        links[0]["address"] == json["mac"],
        "{} is not {}",
        links[0]["address"],
        json["mac"]
    );
    let host_ifname = json["host_ifname"].as_str().context("host_ifname")?;
    let link = case
        .lab
        .host
        .run("ip", &["-d", "link", "show", "dev", host_ifname])?;
    ensure!(link.contains("alias nucnet:web"), "no alias: {link}");
    Ok(())
}

fn only_pid(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = case.lab.container("web")?;
    let endpoint = case.lab.attach(&container, &[])?;
    ensure!(!endpoint.id.is_empty(), "no id");
    for family in Family::ALL {
        ensure!(
            case.pings(&container, OUTSIDE.of(family))?,
            "no way out by IP{family}"
        );
    }
    let text = case.lab.nucnet(&["list"])?.expect(0)?.stdout;
    ensure!(
        text.contains(&endpoint.id),
        "{} is not in the list: {text}",
        endpoint.id
    );
    Ok(())
}

fn netns_path(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = case.lab.container("web")?;
    let path = format!("/proc/{}/ns/net", container.pid());
    // A bind mount outlives the process, as `ip netns add` and runtimes have it.
    let named = "/run/netns-of-web";
    case.lab.host.run("touch", &[named])?;
    case.lab.host.run("mount", &["--bind", &path, named])?;
    let words = ["attach", "--netns", named, "--id", "web", "-p", "8080:80"];
    let outcome = case.lab.nucnet(&words)?.expect(0)?;
    ensure!(
        outcome.stdout.contains("web"),
        "it does not print the endpoint: {outcome}"
    );
    let _server = case.web(&container, 80)?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    case.lab.nucnet(&["detach", "web"])?.expect(0)?;
    case.lab
        .nucnet(&["attach", "--netns", "/run/no-such", "--id", "x"])?
        .expect(3)?;
    Ok(())
}

fn again(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let words = ["-p", "8080:80", "--allow", "192.0.2.0/24"];
    let (container, first) = case.attached("web", &words)?;
    let before = both(case, &container)?;
    let second = case.attach(&container, &words)?;
    unchanged(&before, &both(case, &container)?, "attaching again")?;
    let strip = |json: &Value| {
        let mut json = json.clone();
        // The one thing that may differ is how long it took.
        if let Some(object) = json.as_object_mut() {
            object.retain(|key, _| KEYS.contains(&key.as_str()));
        }
        json
    };
    ensure!(
        strip(&first.json) == strip(&second.json),
        "{:#}\n{:#}",
        first.json,
        second.json
    );
    Ok(())
}

fn again_with_others(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, _) = case.attached("web", &["-p", "8080:80"])?;
    let pid = container.pid().to_string();
    let before = both(case, &container)?;
    let other = ["attach", "--pid", &pid, "--id", "web", "-p", "8081:80"];
    case.lab.nucnet(&other)?.expect(4)?;
    unchanged(&before, &both(case, &container)?, "the conflict")
}

fn asked_for(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = case.lab.container("web")?;
    case.network("red --bridge red0 --subnet 10.71.0.0/24 --subnet6 fd71::/64")?;
    let endpoint = case.attach(
        &container,
        &[
            "--network",
            "red",
            "--ip",
            "10.71.0.77",
            "--ip",
            "fd71::77",
            "--mac",
            "02:00:00:00:00:77",
            "--ifname",
            "net7",
            "--mtu",
            "1400",
        ],
    )?;
    let addresses: [IpAddr; 2] = ["10.71.0.77".parse()?, "fd71::77".parse()?];
    for address in addresses {
        ensure!(
            endpoint.addresses.contains(&address),
            "{address}: {:?}",
            endpoint.addresses
        );
    }
    let link = container.run("ip", &["link", "show", "dev", "net7"])?;
    ensure!(
        link.contains("mtu 1400") && link.contains("02:00:00:00:00:77"),
        "{link}"
    );
    for family in Family::ALL {
        ensure!(
            case.pings(&container, OUTSIDE.of(family))?,
            "no way out by IP{family}"
        );
    }
    Ok(())
}

fn at_once(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let containers = (0..8)
        .map(|number| case.lab.container(&format!("c{number}")))
        .collect::<Result<Vec<_>>>()?;
    let endpoints = std::thread::scope(|scope| {
        let workers: Vec<_> = containers
            .iter()
            .map(|container| scope.spawn(|| case.attach(container, &[])))
            .collect();
        workers
            .into_iter()
            .map(|worker| worker.join().map_err(|_| anyhow::anyhow!("a panic"))?)
            .collect::<Result<Vec<_>>>()
    })?;
    let mut addresses: Vec<_> = endpoints
        .iter()
        .flat_map(|endpoint| endpoint.addresses.clone())
        .collect();
    let count = addresses.len();
    addresses.sort();
    addresses.dedup();
    ensure!(
        count == 16 && addresses.len() == 16,
        "not 16 different addresses: {addresses:?}"
    );
    for container in &containers {
        for family in Family::ALL {
            ensure!(
                case.pings(container, OUTSIDE.of(family))?,
                "{} IP{family}",
                container.name()
            );
        }
    }
    let ids: Vec<_> = endpoints
        .iter()
        .map(|endpoint| endpoint.id.as_str())
        .collect();
    case.lab
        .nucnet(&[&["detach"], &ids[..]].concat())?
        .expect(0)?;
    Ok(())
}

fn conflicts(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (_owner, endpoint) = case.attached("owner", &["-p", "8080:80", "-p", "192.0.2.2:90:90"])?;
    let newcomer = case.lab.container("newcomer")?;
    let pid = newcomer.pid().to_string();
    let address = endpoint.address(Family::V4)?.to_string();
    let before = both(case, &newcomer)?;
    for words in [
        &["--id", "newcomer", "-p", "8080:8080"][..],
        &["--id", "newcomer", "-p", "192.0.2.2:8080:8080"],
        &["--id", "newcomer", "-p", "8000-8100:8000-8100"],
        &["--id", "newcomer", "-p", "90:90"],
        &["--id", "newcomer", "--ip", &address],
        &["--id", "owner"],
    ] {
        let mut all = vec!["attach", "--pid", &pid];
        all.extend(words);
        let outcome = case.lab.nucnet(&all)?.expect(4)?;
        ensure!(
            outcome.stderr.contains("owner"),
            "the owner is not named\n{outcome}"
        );
        unchanged(&before, &both(case, &newcomer)?, "the conflict")?;
    }
    // The other protocol and another address are no conflict.
    case.attach(&newcomer, &["-p", "8080:80/udp", "-p", "127.0.0.1:90:90"])?;
    Ok(())
}

fn foreign_bridge(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    case.lab
        .host
        .ip("link add nucnet0 type veth peer name foreign0")?;
    let container = case.lab.container("web")?;
    let pid = container.pid().to_string();
    let before = both(case, &container)?;
    let outcome = case
        .lab
        .nucnet(&["attach", "--pid", &pid, "--id", "web"])?
        .expect(4)?;
    ensure!(
        outcome.stderr.contains("nucnet0"),
        "the link is not named\n{outcome}"
    );
    unchanged_but_for_pins(&before, &both(case, &container)?)
}

fn failing(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = case.lab.container("web")?;
    let pid = container.pid().to_string();
    container.ip("link add eth0 type veth peer name other")?;
    let before = both(case, &container)?;
    let outcome = case
        .lab
        .nucnet(&["attach", "--pid", &pid, "--id", "web", "-p", "8080:80"])?;
    let outcome = outcome.expect(4)?;
    ensure!(
        outcome.stderr.contains("eth0"),
        "the interface is not named\n{outcome}"
    );
    unchanged(&before, &both(case, &container)?, "the conflict")?;

    let elsewhere = [
        "--bpffs",
        "/tmp/no-bpffs",
        "attach",
        "--pid",
        &pid,
        "--ifname",
        "net1",
    ];
    let outcome = case.lab.nucnet(&elsewhere)?.expect(5)?;
    ensure!(
        outcome.stderr.contains("/tmp/no-bpffs"),
        "the path is not named\n{outcome}"
    );
    unchanged(&before, &both(case, &container)?, "the failure")
}

fn list_and_inspect(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (_one, _) = case.attached("one", &["-p", "8080:80"])?;
    let (_two, _) = case.attached("two", &["--egress-default", "deny"])?;
    let list = case
        .lab
        .nucnet(&["list", "-o", "json"])?
        .expect(0)?
        .json()?;
    let list = list.as_array().context("no array")?;
    ensure!(list.len() == 2, "{list:?}");
    for shown in list {
        let id = shown["id"].as_str().context("no id")?;
        let inspected = case
            .lab
            .nucnet(&["-o", "json", "inspect", id])?
            .expect(0)?
            .json()?;
        for key in KEYS {
            ensure!(
                shown[key] == inspected[key],
                "{key}: {} {}",
                shown[key],
                inspected[key]
            );
        }
    }
    let outcome = case
        .lab
        .nucnet(&["inspect", "three", "-o", "json"])?
        .expect(3)?;
    let error: Value = serde_json::from_str(&outcome.stderr).context("no JSON on stderr")?;
    for key in ["kind", "message", "hint"] {
        ensure!(error["error"].get(key).is_some(), "no `{key}` in {error}");
    }
    Ok(())
}
