//! Containers among themselves, and with the host.

use std::net::SocketAddr;

use anyhow::{Result, ensure};

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
    let own = nucnet_tests::lab::HOST.of(case.family);
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
    for (name, bridge, v4, v6) in [
        ("red", "red0", "10.71.0.0/24", "fd71::/64"),
        ("blue", "blue0", "10.72.0.0/24", "fd72::/64"),
    ] {
        let words = [
            "network",
            "create",
            name,
            "--bridge",
            bridge,
            "--subnet",
            v4,
            "--subnet6",
            v6,
        ];
        case.lab.nucnet(&words)?.expect(0)?;
    }
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
