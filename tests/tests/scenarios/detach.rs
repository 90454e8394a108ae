//! What detach and down leave on the host, and what they do not.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{Family, HOST, OUTSIDE, Snapshot};
use serde_json::Value;

use crate::case::{Case, Families, Scenario, refused};
use crate::unchanged::{both, unchanged, unchanged_but_for_pins};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "detach_leaves_nothing",
        what: "links, addresses, routes, neighbours, map entries, records",
        families: Families::Together,
        run: detach_leaves_nothing,
    },
    Scenario {
        name: "detach_of_what_is_gone_succeeds",
        what: "a runtime that cleans up twice, or after the container died",
        families: Families::Together,
        run: detach_gone,
    },
    Scenario {
        name: "detach_leaves_the_others_alone",
        what: "connections of a sibling survive",
        families: Families::Each,
        run: others_survive,
    },
    Scenario {
        name: "down_leaves_no_trace",
        what: "after traffic of all kinds, with endpoints still there",
        families: Families::Together,
        run: down,
    },
];

/// A container whose loopback interface is up: attach sees to that, and it stays, because it
/// belongs to the container.
fn with_loopback(case: &Case, name: &str) -> Result<nucnet_tests::lab::Node> {
    let container = case.lab.container(name)?;
    container.ip("link set lo up")?;
    Ok(container)
}

fn detach_leaves_nothing(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = with_loopback(case, "web")?;
    let before = both(case, &container)?;
    let words = [
        "-p",
        "8080:80",
        "-p",
        "5300:53/udp",
        "--allow",
        "192.0.2.0/24",
        "--allow",
        "2001:db8::/32",
    ];
    let endpoint = case.attach(&container, &words)?;
    traffic(case, &container)?;
    case.lab.nucnet(&["detach", &endpoint.id])?.expect(0)?;
    unchanged_but_for_pins(&before, &both(case, &container)?)?;
    let entries = case.lab.entries()?;
    for (map, entries) in entries {
        // One entry of settings, and what the host's own interfaces need, is nobody's.
        ensure!(entries == 0, "{entries} entries stay in the map {map}");
    }
    let list = case
        .lab
        .nucnet(&["-o", "json", "list"])?
        .expect(0)?
        .json()?;
    ensure!(list == Value::Array(Vec::new()), "{list}");
    case.lab
        .nucnet(&["-o", "json", "inspect", &endpoint.id])?
        .expect(3)?;
    // And all of it is free for the next one.
    case.attach(&container, &words)?;
    traffic(case, &container)
}

fn traffic(case: &Case, container: &nucnet_tests::lab::Node) -> Result<()> {
    for family in Family::ALL {
        let any = |port| SocketAddr::new(family.any(), port);
        let _web = nucnet_tests::lab::web::Server::start(container.listen(any(80))?)?;
        let _remote = nucnet_tests::lab::web::Server::start(case.lab.outside.listen(any(80))?)?;
        let _udp = nucnet_tests::lab::udp::Server::start(container.udp(any(53))?)?;
        case.who(&case.lab.outside, HOST.port(family, 8080))?;
        if case.serves_loopback(family) {
            case.who(&case.lab.host, SocketAddr::new(family.loopback(), 8080))?;
        }
        case.who(container, OUTSIDE.port(family, 80))?;
        let socket = case.lab.outside.udp(OUTSIDE.port(family, 0))?;
        nucnet_tests::lab::udp::exchange(&socket, HOST.port(family, 5300), "who", SOON)?;
        ensure!(
            case.pings(container, OUTSIDE.of(family))?,
            "no ping by IP{family}"
        );
    }
    Ok(())
}

fn detach_gone(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let before = Snapshot::of(&case.lab.host)?;
    case.lab.nucnet(&["detach", "nobody"])?.expect(0)?;
    let (_first, endpoint) = case.attached("first", &["-p", "8080:80"])?;
    case.lab.nucnet(&["detach", &endpoint.id])?.expect(0)?;
    case.lab.nucnet(&["detach", &endpoint.id])?.expect(0)?;
    let (second, endpoint) = case.attached("second", &["-p", "8080:80"])?;
    let host_ifname = endpoint.json["host_ifname"]
        .as_str()
        .context("host_ifname")?
        .to_owned();
    drop(second);
    until(
        "the kernel takes the dead container's interface away",
        SOON,
        || {
            Ok(case
                .lab
                .host
                .run("ip", &["link", "show", "dev", &host_ifname])
                .is_err())
        },
    )?;
    case.lab.nucnet(&["detach", &endpoint.id])?.expect(0)?;
    let (_third, endpoint) = case.attached("third", &["-p", "8080:80"])?;
    case.lab
        .nucnet(&["detach", &endpoint.id, "nobody"])?
        .expect(0)?;
    let difference = before
        .without_pins()
        .difference(&Snapshot::of(&case.lab.host)?.without_pins());
    ensure!(difference.is_empty(), "it leaves:\n{difference}");
    Ok(())
}

fn others_survive(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let (_other, other) = case.attached("other", &["-p", "8081:80"])?;
    let listener = web.listen(case.any(80))?;
    let mut client = crate::case::connect(&case.lab.outside, HOST.port(case.family, 8080))?;
    let (mut server, _) = listener.accept()?;
    case.lab.nucnet(&["detach", &other.id])?.expect(0)?;
    std::io::Write::write_all(&mut client, b"still here")?;
    let mut bytes = [0; 10];
    server.set_read_timeout(Some(SOON))?;
    std::io::Read::read_exact(&mut server, &mut bytes).context("the connection broke")?;
    refused(&case.lab.outside, HOST.port(case.family, 8081))
}

fn down(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let container = with_loopback(case, "web")?;
    let sibling = case.lab.container("sibling")?;
    let before = both(case, &container)?;
    case.lab.nucnet(&["down"])?.expect(0)?;
    unchanged(&before, &both(case, &container)?, "down of nothing")?;
    case.network("red --bridge red0 --subnet 10.71.0.0/24")?;
    case.attach(
        &container,
        &["-p", "8080:80", "-p", "5300:53/udp", "--allow", "any"],
    )?;
    case.attach(&sibling, &["--network", "red"])?;
    traffic(case, &container)?;
    case.lab.nucnet(&["down"])?.expect(0)?;
    unchanged(&before, &both(case, &container)?, "down")?;
    case.lab.nucnet(&["down"])?.expect(0)?;
    // The host is as good as new.
    case.attach(&container, &["-p", "8080:80", "-p", "5300:53/udp"])?;
    traffic(case, &container)
}
