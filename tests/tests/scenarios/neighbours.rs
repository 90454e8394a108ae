//! Containers among themselves, and with the host.

use std::net::SocketAddr;

use anyhow::{Result, ensure};
use nucnet_tests::lab::{Family, HOST, OUTSIDE};

use crate::case::{Case, Families, Scenario};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "siblings_reach_each_other_with_their_own_addresses",
        what: "container to container on one network, by TCP, UDP and ping (E7)",
        families: Families::Each,
        run: siblings,
    },
    Scenario {
        name: "host_reaches_containers_by_their_addresses",
        what: "health checks of a runtime on the host",
        families: Families::Each,
        run: host_to_container,
    },
    Scenario {
        name: "containers_reach_services_of_the_host",
        what: "a resolver or a database that listens on the host",
        families: Families::Each,
        run: container_to_host,
    },
    Scenario {
        name: "networks_reach_each_other",
        what: "two networks that are not isolated are two subnets behind one router",
        families: Families::Each,
        run: networks,
    },
    Scenario {
        name: "network_without_a_family_does_not_cost_the_others_theirs",
        what: "the first network of a host may have IPv4 only, or IPv6 only",
        families: Families::Each,
        run: other_family,
    },
];

fn siblings(case: &Case) -> Result<()> {
    let (one, first) = case.attached("one", &[])?;
    let (two, _) = case.attached("two", &[])?;
    let _web = case.web(&one, 80)?;
    let _udp = case.udp(&one, 53)?;
    let address = first.address(case.family)?;
    let (seen, client) = case.who(&two, SocketAddr::new(address, 80))?;
    ensure!(
        seen == client,
        "the client is {client}, the server sees {seen}"
    );
    let seen = case.who_udp(&two, SocketAddr::new(address, 53))?;
    ensure!(
        seen.peer.ip() == client.ip(),
        "UDP: {} instead of {}",
        seen.peer.ip(),
        client.ip()
    );
    ensure!(
        case.pings(&two, address)?,
        "{address} does not answer pings"
    );
    Ok(())
}

fn host_to_container(case: &Case) -> Result<()> {
    let (container, endpoint) = case.attached("container", &[])?;
    let _web = case.web(&container, 80)?;
    let _udp = case.udp(&container, 53)?;
    let address = endpoint.address(case.family)?;
    let (seen, client) = case.who(&case.lab.host, SocketAddr::new(address, 80))?;
    ensure!(
        seen == client,
        "the client is {client}, the server sees {seen}"
    );
    case.who_udp(&case.lab.host, SocketAddr::new(address, 53))?;
    ensure!(
        case.pings(&case.lab.host, address)?,
        "{address} does not answer pings"
    );
    Ok(())
}

fn container_to_host(case: &Case) -> Result<()> {
    let (container, endpoint) = case.attached("container", &[])?;
    let _web = case.web(&case.lab.host, 80)?;
    let _udp = case.udp(&case.lab.host, 53)?;
    let own = HOST.of(case.family);
    for address in [endpoint.gateway(case.family)?, own] {
        let (seen, client) = case.who(&container, SocketAddr::new(address, 80))?;
        ensure!(
            seen == client,
            "the client is {client}, the host sees {seen}"
        );
        case.who_udp(&container, SocketAddr::new(address, 53))?;
        ensure!(
            case.pings(&container, address)?,
            "{address} does not answer pings"
        );
    }
    Ok(())
}

fn networks(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    case.network("red --bridge red0 --subnet 10.71.0.0/24 --subnet6 fd71::/64")?;
    case.network("blue --bridge blue0 --subnet 10.72.0.0/24 --subnet6 fd72::/64")?;
    let (one, first) = case.attached("one", &["--network", "red"])?;
    let (two, _) = case.attached("two", &["--network", "blue"])?;
    let _web = case.web(&one, 80)?;
    let to = SocketAddr::new(first.address(case.family)?, 80);
    let (seen, client) = case.who(&two, to)?;
    ensure!(
        seen == client,
        "the client is {client}, the server sees {seen}"
    );
    Ok(())
}

fn other_family(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let subnet = match case.family {
        Family::V4 => "--subnet6 fd71::/64",
        Family::V6 => "--subnet 10.71.0.0/24",
    };
    case.network(&format!("red --bridge red0 {subnet}"))?;
    let (_first, _) = case.attached("first", &["--network", "red"])?;
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let _web = case.web(&web, 80)?;
    let _remote = case.web(&case.lab.outside, 80)?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    case.who(&web, OUTSIDE.port(case.family, 80))?;
    Ok(())
}
