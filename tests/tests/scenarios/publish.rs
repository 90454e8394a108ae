//! Port forwards, from every place that a client can be in.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, HOST2, OUTSIDE, OUTSIDE2, udp, web};

use crate::case::{Case, Families, Scenario, connect, refused, silent, silent_udp};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "remote_client_reaches_a_publish_and_keeps_its_address",
        what: "the point of publishing a port; servers log and limit by client address",
        families: Families::Each,
        run: remote_client,
    },
    Scenario {
        name: "remote_client_reaches_a_udp_publish_and_keeps_its_address",
        what: "the same for datagrams, whose answers must come from where they were asked",
        families: Families::Each,
        run: remote_client_udp,
    },
    Scenario {
        name: "host_reaches_a_publish_by_loopback",
        what: "curl localhost is what everybody types first (E3)",
        families: Families::Each,
        run: host_by_loopback,
    },
    Scenario {
        name: "host_reaches_a_publish_by_its_own_address",
        what: "a service on the host that is configured with the host's address (E4)",
        families: Families::Each,
        run: host_by_address,
    },
    Scenario {
        name: "mapped_loopback_client_reaches_a_publish",
        what: "runtimes with one dual-stack socket connect to ::ffff:127.0.0.1 (trap 19)",
        families: Families::Together,
        run: mapped_loopback,
    },
    Scenario {
        name: "sibling_reaches_a_publish_by_the_hosts_address",
        what: "two containers that know each other by the host's name (E6)",
        families: Families::Each,
        run: sibling,
    },
    Scenario {
        name: "sibling_reaches_a_udp_publish_by_the_hosts_address",
        what: "the same for datagrams",
        families: Families::Each,
        run: sibling_udp,
    },
    Scenario {
        name: "container_reaches_its_own_publish_by_the_hosts_address",
        what: "hairpin: a server that fetches its own public URL (E5)",
        families: Families::Each,
        run: hairpin,
    },
    Scenario {
        name: "container_reaches_its_own_udp_publish_by_the_hosts_address",
        what: "hairpin by UDP",
        families: Families::Each,
        run: hairpin_udp,
    },
    Scenario {
        name: "remote_server_on_a_published_port_is_not_hijacked",
        what: "publishing 443 must not cut containers and host off from everybody's 443 (E2)",
        families: Families::Each,
        run: not_hijacked,
    },
    Scenario {
        name: "host_client_with_a_published_source_port_gets_its_answers",
        what: "a published range may cover the host's own ephemeral ports (trap 5)",
        families: Families::Each,
        run: published_source_port,
    },
    Scenario {
        name: "unpublished_port_is_refused",
        what: "from outside only published ports reach a container",
        families: Families::Each,
        run: unpublished,
    },
    Scenario {
        name: "direct_access_from_outside_is_dropped",
        what: "a neighbour who routes the container network to the host gets nothing",
        families: Families::Each,
        run: direct_access,
    },
    Scenario {
        name: "loopback_publish_is_for_the_host_only",
        what: "-p 127.0.0.1:8080:80 is how people keep a database private",
        families: Families::Each,
        run: loopback_publish,
    },
    Scenario {
        name: "publish_of_one_address_serves_that_address_only",
        what: "-p 192.0.2.2:8080:80 on a host with two uplinks",
        families: Families::Each,
        run: one_address,
    },
    Scenario {
        name: "publish_answers_by_the_uplink_that_the_client_came_in_on",
        what: "a host with two providers",
        families: Families::Each,
        run: second_uplink,
    },
    Scenario {
        name: "published_range_maps_port_by_port",
        what: "-p 9000-9002:80-82",
        families: Families::Each,
        run: range,
    },
    Scenario {
        name: "host_port_zero_chooses_a_port",
        what: "-p 0:80 for test suites that run in parallel",
        families: Families::Together,
        run: port_zero,
    },
    Scenario {
        name: "detached_publish_is_refused",
        what: "nothing answers for a container that is gone",
        families: Families::Each,
        run: detached,
    },
];

fn remote_client(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let (seen, client) = case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    ensure!(
        seen == client,
        "the client is {client}, the server sees {seen}"
    );
    Ok(())
}

fn remote_client_udp(case: &Case) -> Result<()> {
    let (dns, _) = case.attached("dns", &["-p", "5300:53/udp"])?;
    let _server = case.udp(&dns, 53)?;
    let socket = case.lab.outside.udp(OUTSIDE.port(case.family, 0))?;
    for _ in 0..3 {
        let seen = udp::exchange(&socket, HOST.port(case.family, 5300), "who", SOON)?;
        let client = socket.local_addr()?;
        ensure!(
            seen.peer == client,
            "the client is {client}, the server sees {}",
            seen.peer
        );
    }
    Ok(())
}

fn host_by_loopback(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let to = SocketAddr::new(case.family.loopback(), 8080);
    let body = web::get(connect(&case.lab.host, to)?, "/bytes/1000")?;
    ensure!(
        body == web::payload()[..1000],
        "another body than the server's"
    );
    let url = format!("http://{to}/who");
    case.lab
        .host
        .run("curl", &["-sS", "--noproxy", "*", "--max-time", "5", &url])?;
    Ok(())
}

fn host_by_address(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    case.who(&case.lab.host, HOST.port(case.family, 8080))?;
    Ok(())
}

fn mapped_loopback(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let mapped = IpAddr::V6(Ipv4Addr::LOCALHOST.to_ipv6_mapped());
    case.who(&case.lab.host, SocketAddr::new(mapped, 8080))?;
    Ok(())
}

fn sibling(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let (client, _) = case.attached("client", &[])?;
    let _server = case.web(&web, 80)?;
    let (seen, client) = case.who(&client, HOST.port(case.family, 8080))?;
    ensure!(
        seen == client,
        "siblings keep their source: it is {client}, the server sees {seen}"
    );
    Ok(())
}

fn sibling_udp(case: &Case) -> Result<()> {
    let (dns, _) = case.attached("dns", &["-p", "5300:53/udp"])?;
    let (client, endpoint) = case.attached("client", &[])?;
    let _server = case.udp(&dns, 53)?;
    let seen = case.who_udp(&client, HOST.port(case.family, 5300))?;
    let address = endpoint.address(case.family)?;
    ensure!(
        seen.peer.ip() == address,
        "the client is {address}, the server sees {}",
        seen.peer
    );
    Ok(())
}

fn hairpin(case: &Case) -> Result<()> {
    let (web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let (seen, _) = case.who(&web, HOST.port(case.family, 8080))?;
    let gateway = endpoint.gateway(case.family)?;
    ensure!(
        seen.ip() == gateway,
        "it must see itself as the gateway {gateway}, not as {seen}"
    );
    Ok(())
}

fn hairpin_udp(case: &Case) -> Result<()> {
    let (dns, endpoint) = case.attached("dns", &["-p", "5300:53/udp"])?;
    let _server = case.udp(&dns, 53)?;
    let seen = case.who_udp(&dns, HOST.port(case.family, 5300))?;
    let gateway = endpoint.gateway(case.family)?;
    ensure!(
        seen.peer.ip() == gateway,
        "expected the gateway {gateway}, not {}",
        seen.peer
    );
    Ok(())
}

fn not_hijacked(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let (client, _) = case.attached("client", &[])?;
    let own = case.web(&web, 80)?;
    let own_udp = case.udp(&web, 53)?;
    let remote = case.web(&case.lab.outside, 8080)?;
    let remote_udp = case.udp(&case.lab.outside, 5300)?;
    let clients = [&web, &client, &case.lab.host];
    for (count, client) in clients.into_iter().enumerate() {
        for address in [OUTSIDE, FAR] {
            case.who(client, address.port(case.family, 8080))?;
            case.who_udp(client, address.port(case.family, 5300))?;
        }
        let arrived = (remote.clients().len(), remote_udp.seen().len());
        let expected = 2 * (count + 1);
        ensure!(
            arrived == (expected, expected),
            "{}: {arrived:?} of {expected} reached the remote server",
            client.name()
        );
    }
    ensure!(own.clients().is_empty(), "hijacked: {:?}", own.clients());
    ensure!(own_udp.seen().is_empty(), "hijacked: {:?}", own_udp.seen());
    Ok(())
}

fn published_source_port(case: &Case) -> Result<()> {
    // No socket can ask for such a port, but the kernel chooses one where it likes.
    let range = "net/ipv4/ip_local_port_range";
    case.lab.host.sysctl(range, "40040 40059")?;
    let (web, _) = case.attached(
        "web",
        &[
            "-p",
            "40000-40099:40000-40099",
            "-p",
            "40000-40099:40000-40099/udp",
        ],
    )?;
    let inside: Result<Vec<_>> = (40_040..40_060).map(|port| case.web(&web, port)).collect();
    let inside_udp: Result<Vec<_>> = (40_040..40_060).map(|port| case.udp(&web, port)).collect();
    let (inside, inside_udp) = (inside?, inside_udp?);
    let _remote = case.web(&case.lab.outside, 80)?;
    let _remote_udp = case.udp(&case.lab.outside, 53)?;

    let is_published = |address: SocketAddr| (40_000..40_100).contains(&address.port());
    let stream = connect(&case.lab.host, OUTSIDE.port(case.family, 80))?;
    let from = stream.local_addr()?;
    ensure!(is_published(from), "{from} shows nothing");
    let seen = web::who(stream).context("TCP from a published port")?;
    ensure!(seen == from, "the outside sees {seen} instead of {from}");

    let socket = case.lab.host.udp(HOST.port(case.family, 0))?;
    let from = socket.local_addr()?;
    ensure!(is_published(from), "{from} shows nothing");
    let seen = udp::exchange(&socket, OUTSIDE.port(case.family, 53), "who", SOON)
        .context("UDP from a published port")?;
    ensure!(
        seen.peer == from,
        "the outside sees {} instead of {from}",
        seen.peer
    );
    ensure!(
        inside.iter().all(|server| server.clients().is_empty())
            && inside_udp.iter().all(|server| server.seen().is_empty()),
        "the container got it"
    );
    Ok(())
}

fn unpublished(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let published = case.web(&web, 80)?;
    let hidden = case.web(&web, 8081)?;
    let hidden_udp = case.udp(&web, 8080)?;
    refused(&case.lab.outside, HOST.port(case.family, 8081))?;
    refused(&case.lab.outside, HOST.port(case.family, 80))?;
    silent_udp(case, &case.lab.outside, HOST.port(case.family, 8080))?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    ensure!(published.clients().len() == 1, "{:?}", published.clients());
    ensure!(
        hidden.clients().is_empty() && hidden_udp.seen().is_empty(),
        "it was reached"
    );
    Ok(())
}

fn direct_access(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    // A host that routes, as one with Docker on it does.
    case.lab.host.sysctl("net/ipv4/ip_forward", "1")?;
    case.lab.host.sysctl("net/ipv6/conf/all/forwarding", "1")?;
    let (web, endpoint) = case.attached("web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let server = case.web(&web, 80)?;
    let server_udp = case.udp(&web, 53)?;
    let address = endpoint.address(case.family)?;
    let outside = &case.lab.outside;
    outside.ip(&format!("route add {address} via {}", HOST.of(case.family)))?;
    silent(outside, SocketAddr::new(address, 80))?;
    silent_udp(case, outside, SocketAddr::new(address, 53))?;
    ensure!(
        !case.pings(outside, address)?,
        "its address answers pings from outside"
    );
    // The same server is fine by the front door.
    case.who(outside, HOST.port(case.family, 8080))?;
    case.who_udp(outside, HOST.port(case.family, 5300))?;
    ensure!(server.clients().len() == 1, "{:?}", server.clients());
    ensure!(server_udp.seen().len() == 1, "{:?}", server_udp.seen());
    case.counted("not-published")
}

fn loopback_publish(case: &Case) -> Result<()> {
    let spec = match case.family {
        Family::V4 => "127.0.0.1:8080:80",
        Family::V6 => "[::1]:8080:80",
    };
    let (web, _) = case.attached("web", &["-p", spec])?;
    let (client, _) = case.attached("client", &[])?;
    let server = case.web(&web, 80)?;
    refused(&case.lab.outside, HOST.port(case.family, 8080))?;
    refused(&client, HOST.port(case.family, 8080))?;
    refused(&case.lab.host, HOST.port(case.family, 8080))?;
    case.who(
        &case.lab.host,
        SocketAddr::new(case.family.loopback(), 8080),
    )?;
    ensure!(server.clients().len() == 1, "{:?}", server.clients());
    Ok(())
}

fn one_address(case: &Case) -> Result<()> {
    let remote = case.lab.second_uplink()?;
    let spec = SocketAddr::new(HOST.of(case.family), 8080).to_string() + ":80";
    let (web, _) = case.attached("web", &["-p", &spec])?;
    let server = case.web(&web, 80)?;
    refused(&remote, HOST2.port(case.family, 8080))?;
    refused(
        &case.lab.host,
        SocketAddr::new(case.family.loopback(), 8080),
    )?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    case.who(&case.lab.host, HOST.port(case.family, 8080))?;
    ensure!(server.clients().len() == 2, "{:?}", server.clients());
    Ok(())
}

fn second_uplink(case: &Case) -> Result<()> {
    let remote = case.lab.second_uplink()?;
    // By the better one of two default routes the answer to this client would leave elsewhere.
    let gateway = OUTSIDE2.of(case.family);
    case.lab
        .host
        .ip(&format!("route add default via {gateway} metric 3000"))?;
    remote.ip(&format!("addr add {} dev lo", FAR.of(case.family)))?;
    let (web, _) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let to = HOST2.port(case.family, 8080);
    let (seen, client) = case.who(&remote, to)?;
    ensure!(
        seen == client,
        "the client is {client}, the server sees {seen}"
    );
    case.only_nucnet()?;
    let from = FAR.port(case.family, 0);
    let stream = remote
        .connect_from(Some(from), to, SOON)
        .context("a client far behind eth1")?;
    let (client, seen) = (stream.local_addr()?, web::who(stream)?);
    ensure!(
        seen == client,
        "the client is {client}, the server sees {seen}"
    );
    Ok(())
}

fn range(case: &Case) -> Result<()> {
    let (web, _) = case.attached("web", &["-p", "9000-9002:80-82"])?;
    let servers = [80, 81, 82].map(|port| case.web(&web, port));
    for (port, server) in (9000..).zip(servers) {
        case.who(&case.lab.outside, HOST.port(case.family, port))?;
        let clients = server?.clients();
        ensure!(
            clients.len() == 1,
            "host port {port} led elsewhere: {clients:?}"
        );
    }
    refused(&case.lab.outside, HOST.port(case.family, 9003))?;
    refused(&case.lab.outside, HOST.port(case.family, 8999))
}

fn port_zero(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (one, first) = case.attached("one", &["-p", "0:80"])?;
    let (two, second) = case.attached("two", &["-p", "0:80"])?;
    ensure!(
        first.host_port(80)? != second.host_port(80)?,
        "both got the same port"
    );
    for (container, endpoint) in [(&one, &first), (&two, &second)] {
        let server = case.web(container, 80)?;
        case.who(
            &case.lab.outside,
            HOST.port(case.family, endpoint.host_port(80)?),
        )?;
        ensure!(server.clients().len() == 1, "another container was reached");
    }
    Ok(())
}

fn detached(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let (_other, _) = case.attached("other", &["-p", "8081:80"])?;
    let _server = case.web(&web, 80)?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    case.lab.nucnet(&["detach", &endpoint.id])?.expect(0)?;
    until("the host refuses the port", SOON, || {
        Ok(refused(&case.lab.outside, HOST.port(case.family, 8080)).is_ok())
    })?;
    refused(
        &case.lab.host,
        SocketAddr::new(case.family.loopback(), 8080),
    )
}
