//! What containers reach beyond the host, and how they look from there.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::sniffer::Sniffer;
use nucnet_tests::lab::wait::SOON;
use nucnet_tests::lab::{FAR, Family, HOST, HOST2, OUTSIDE, OUTSIDE2, udp};
use serde_json::json;
use socket2::{Domain, Protocol, Type};

use crate::case::{Case, Families, Scenario, silent_udp};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "outside_sees_the_uplinks_address",
        what: "masquerade by TCP, UDP and ping, on the wire and beyond a router",
        families: Families::Each,
        run: masquerade,
    },
    Scenario {
        name: "first_datagram_after_attach_gets_its_answer",
        what: "when attach returns the container is ready, however busy the kernel is",
        families: Families::Each,
        run: first_datagram,
    },
    Scenario {
        name: "two_containers_with_one_source_port_both_get_their_answers",
        what: "equal source ports must not meet behind one address",
        families: Families::Each,
        run: same_source_port,
    },
    Scenario {
        name: "each_uplink_masquerades_with_its_own_address",
        what: "a host with two providers",
        families: Families::Each,
        run: two_uplinks,
    },
    Scenario {
        name: "first_packet_after_a_neighbour_flush_is_translated",
        what: "a missing neighbour entry must not put an untranslated packet on the wire",
        families: Families::Each,
        run: neighbour_flush,
    },
    Scenario {
        name: "time_to_live_is_decremented_by_one",
        what: "the host is a router, both ways; without it a loop never ends",
        families: Families::Each,
        run: time_to_live,
    },
    Scenario {
        name: "used_up_time_to_live_goes_no_further",
        what: "a router drops what arrives with a time to live of one",
        families: Families::Each,
        run: used_up_time_to_live,
    },
    Scenario {
        name: "spoofed_source_never_leaves",
        what: "a container cannot speak as anybody else",
        families: Families::Each,
        run: spoofed,
    },
    Scenario {
        name: "untranslatable_packet_never_leaves",
        what: "lost fragments and unknown protocols are dropped, not sent on as they are",
        families: Families::Each,
        run: untranslatable,
    },
    Scenario {
        name: "hosts_own_traffic_is_untouched",
        what: "what is none of nucnet's business passes as before",
        families: Families::Each,
        run: hosts_own,
    },
];

fn masquerade(case: &Case) -> Result<()> {
    case.translates()?;
    let sniffer = Sniffer::on(&case.lab.outside)?;
    let (client, endpoint) = case.attached("client", &[])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    let host = HOST.of(case.family);
    for remote in [OUTSIDE, FAR] {
        let (seen, _) = case.who(&client, remote.port(case.family, 80))?;
        ensure!(
            seen.ip() == host,
            "TCP: the outside sees {seen} instead of {host}"
        );
        let seen = case.who_udp(&client, remote.port(case.family, 53))?;
        ensure!(
            seen.peer.ip() == host,
            "UDP: the outside sees {} instead of {host}",
            seen.peer
        );
        let remote = remote.of(case.family);
        ensure!(
            case.pings(&client, remote)?,
            "{remote} does not answer pings"
        );
    }
    sniffer.never_saw(endpoint.address(case.family)?)
}

fn first_datagram(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let _server = case.udp(&case.lab.outside, 53)?;
    std::thread::scope(|scope| {
        let workers: Vec<_> = ["a", "b", "c", "d", "e", "f"]
            .into_iter()
            .map(|name| {
                scope.spawn(move || -> Result<()> {
                    let (container, _) = case.attached(name, &[])?;
                    case.who_udp(&container, OUTSIDE.port(case.family, 53))?;
                    Ok(())
                })
            })
            .collect();
        for worker in workers {
            worker.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        }
        Ok(())
    })
}

fn same_source_port(case: &Case) -> Result<()> {
    case.translates()?;
    let (one, _) = case.attached("one", &[])?;
    let (two, _) = case.attached("two", &[])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    let mut streams = Vec::new();
    let mut sockets = Vec::new();
    for client in [&one, &two] {
        let from = Some(case.any(5555));
        let to = OUTSIDE.port(case.family, 80);
        let stream = client.connect_from(from, to, SOON);
        streams.push(stream.with_context(|| format!("{} by TCP", client.name()))?);
        sockets.push(client.udp(case.any(5555))?);
    }
    let mut seen = Vec::new();
    for (number, socket) in sockets.iter().enumerate().chain(sockets.iter().enumerate()) {
        let text = format!("number {number}");
        let answer = udp::exchange(socket, OUTSIDE.port(case.family, 53), &text, SOON)?;
        ensure!(
            answer.text == text,
            "{text} got the answer for {}",
            answer.text
        );
        seen.push(answer.peer);
    }
    ensure!(
        seen[0] != seen[1],
        "two clients behind one address and port: {seen:?}"
    );
    ensure!(
        seen[..2] == seen[2..],
        "a client's port changed between two datagrams: {seen:?}"
    );
    let mut ports = Vec::new();
    for stream in streams {
        ports.push(nucnet_tests::lab::web::who(stream)?);
    }
    ensure!(
        ports[0] != ports[1],
        "two clients behind one address and port: {ports:?}"
    );
    Ok(())
}

fn two_uplinks(case: &Case) -> Result<()> {
    case.translates()?;
    let second = case.lab.second_uplink()?;
    let (client, _) = case.attached("client", &[])?;
    let _one = case.web(&case.lab.outside, 80)?;
    let _two = case.web(&second, 80)?;
    for (remote, own) in [(OUTSIDE, HOST), (OUTSIDE2, HOST2)] {
        let (seen, _) = case.who(&client, remote.port(case.family, 80))?;
        let own = own.of(case.family);
        ensure!(seen.ip() == own, "the outside sees {seen} instead of {own}");
    }
    Ok(())
}

fn neighbour_flush(case: &Case) -> Result<()> {
    case.translates()?;
    let (client, endpoint) = case.attached("client", &["-p", "5300:53/udp"])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _inside = case.udp(&client, 53)?;
    let sniffer = Sniffer::on(&case.lab.outside)?;
    let socket = case.lab.outside.udp(OUTSIDE.port(case.family, 0))?;
    let to = HOST.port(case.family, 5300);
    for round in 0..3 {
        case.lab.host.ip("neigh flush dev eth0")?;
        case.who(&client, OUTSIDE.port(case.family, 80))
            .with_context(|| format!("round {round}"))?;
        case.lab.host.ip("neigh flush dev eth0")?;
        udp::exchange(&socket, to, "who", SOON).with_context(|| format!("round {round}"))?;
    }
    sniffer.never_saw(endpoint.address(case.family)?)
}

fn time_to_live(case: &Case) -> Result<()> {
    let (container, endpoint) = case.attached("container", &[])?;
    let _outside = case.udp(&case.lab.outside, 53)?;
    let seen = case.who_udp(&container, OUTSIDE.port(case.family, 53))?;
    ensure!(seen.ttl == 63, "outbound: {} instead of 63", seen.ttl);
    if case.translates().is_err() {
        let _inside = case.udp(&container, 53)?;
        let to = SocketAddr::new(endpoint.address(case.family)?, 53);
        let seen = case.who_udp(&case.lab.outside, to)?;
        ensure!(seen.ttl == 63, "inbound: {} instead of 63", seen.ttl);
        return Ok(());
    }
    let (container, _) = case.attached("dns", &["-p", "5300:53/udp"])?;
    let _inside = case.udp(&container, 53)?;
    let seen = case.who_udp(&case.lab.outside, HOST.port(case.family, 5300))?;
    ensure!(seen.ttl == 63, "inbound: {} instead of 63", seen.ttl);
    Ok(())
}

fn used_up_time_to_live(case: &Case) -> Result<()> {
    let (container, _) = case.attached("container", &[])?;
    let server = case.udp(&case.lab.outside, 53)?;
    let to = OUTSIDE.port(case.family, 53);
    let socket = container.udp(case.any(0))?;
    let options = socket2::SockRef::from(&socket);
    for limit in [1, 64] {
        match case.family {
            Family::V4 => options.set_ttl_v4(limit)?,
            Family::V6 => options.set_unicast_hops_v6(limit)?,
        }
        socket.send_to(format!("{limit}").as_bytes(), to)?;
    }
    // Both took the same way, so the first would have arrived first.
    let seen = udp::exchange(&socket, to, "last", SOON);
    let arrived: Vec<_> = server
        .seen()
        .into_iter()
        .map(|datagram| datagram.text)
        .collect();
    ensure!(
        !arrived.contains(&"1".to_owned()),
        "it arrived: {arrived:?}"
    );
    ensure!(
        arrived.contains(&"64".to_owned()),
        "the other did not: {arrived:?} ({seen:?})"
    );
    case.counted("ttl-exceeded")
}

fn spoofed(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, endpoint) = case.attached("container", &[])?;
    let (_sibling, other) = case.attached("sibling", &[])?;
    let _server = case.udp(&case.lab.outside, 53)?;
    let sniffer = Sniffer::on(&case.lab.outside)?;
    let stranger: IpAddr = match case.family {
        Family::V4 => "203.0.113.77".parse()?,
        Family::V6 => "2001:db8:77::77".parse()?,
    };
    let sources = [stranger, other.address(case.family)?, HOST.of(case.family)];
    let to = OUTSIDE.port(case.family, 9);
    let before = sniffer.count(|packet| packet.destination == to.ip() && packet.port == Some(9));
    let monitor = case.lab.monitor(&[])?;
    for source in sources {
        raw(case, &container, &datagram(source, to, 17))?;
    }
    case.who_udp(&container, OUTSIDE.port(case.family, 53))
        .context("its honest traffic")?;
    let after = sniffer.count(|packet| packet.destination == to.ip() && packet.port == Some(9));
    ensure!(
        after == before,
        "{} of {} got out",
        after - before,
        sources.len()
    );
    sniffer.never_saw(stranger)?;
    sniffer.never_saw(endpoint.address(case.family)?)?;
    // Whoever monitors reads who it was, and not whom he gave himself out for.
    for source in sources {
        let event = monitor.wait_for("what was dropped", |event| {
            event["event"] == "dropped" && event["src"] == source.to_string()
        })?;
        for (key, value) in [
            ("endpoint", json!("container")),
            ("reason", json!("spoofed-address")),
            ("dst", json!(to.ip().to_string())),
            ("rule", json!(null)),
        ] {
            ensure!(event[key] == value, "{key} is not {value}: {event}");
        }
    }
    case.counted("spoofed-address")
}

fn untranslatable(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, endpoint) = case.attached("container", &[])?;
    let _server = case.udp(&case.lab.outside, 53)?;
    let sniffer = Sniffer::on(&case.lab.outside)?;
    let address = endpoint.address(case.family)?;
    // In fragments, as the interface's MTU wants it.
    let socket = container.udp(case.any(0))?;
    let _ = socket.send_to(&[0; 4000], OUTSIDE.port(case.family, 53));
    // SCTP, GRE and a protocol that nobody has.
    for protocol in [132, 47, 253] {
        raw(
            case,
            &container,
            &datagram(address, OUTSIDE.port(case.family, 9), protocol),
        )?;
    }
    case.who_udp(&container, OUTSIDE.port(case.family, 53))
        .context("its other traffic")?;
    sniffer.never_saw(address)?;
    case.counted("protocol")
}

fn hosts_own(case: &Case) -> Result<()> {
    let (container, _) = case.attached("container", &[])?;
    let _remote = case.web(&case.lab.outside, 80)?;
    let _remote_udp = case.udp(&case.lab.outside, 53)?;
    let _own = case.web(&case.lab.host, 22)?;
    let _own_udp = case.udp(&case.lab.host, 123)?;
    let host = &case.lab.host;
    let outside = &case.lab.outside;
    case.who(host, OUTSIDE.port(case.family, 80))?;
    case.who_udp(host, OUTSIDE.port(case.family, 53))?;
    ensure!(
        case.pings(host, OUTSIDE.of(case.family))?,
        "the host cannot ping"
    );
    let (seen, client) = case.who(outside, HOST.port(case.family, 22))?;
    ensure!(
        seen == client,
        "the client is {client}, the host sees {seen}"
    );
    case.who_udp(outside, HOST.port(case.family, 123))?;
    ensure!(
        case.pings(outside, HOST.of(case.family))?,
        "the host does not answer pings"
    );
    case.who(host, SocketAddr::new(case.family.loopback(), 22))?;
    silent_udp(case, outside, HOST.port(case.family, 124))?;
    drop(container);
    Ok(())
}

/// An IP packet with an empty UDP-like body, as a container's raw socket may send it.
fn datagram(source: IpAddr, to: SocketAddr, protocol: u8) -> Vec<u8> {
    let mut body = vec![0x12, 0x34];
    body.extend(to.port().to_be_bytes());
    body.extend([0, 8, 0, 0]);
    let mut packet = Vec::new();
    match (source, to.ip()) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => {
            // The kernel fills in length and checksum.
            packet.extend([0x45, 0, 0, 28, 0, 1, 0, 0, 64, protocol, 0, 0]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
        }
        (IpAddr::V6(source), IpAddr::V6(destination)) => {
            packet.extend([0x60, 0, 0, 0, 0, 8, protocol, 64]);
            packet.extend(source.octets());
            packet.extend(destination.octets());
        }
        _ => {}
    }
    packet.extend(body);
    packet
}

fn raw(case: &Case, node: &nucnet_tests::lab::Node, packet: &[u8]) -> Result<()> {
    let (domain, to) = match case.family {
        Family::V4 => (Domain::IPV4, OUTSIDE.port(case.family, 0)),
        Family::V6 => (Domain::IPV6, OUTSIDE.port(case.family, 0)),
    };
    // IPPROTO_RAW: the caller's header is the header.
    let socket = node.socket(domain, Type::RAW, Some(Protocol::from(255)))?;
    socket
        .send_to(packet, &to.into())
        .context("sending a raw packet")?;
    Ok(())
}
