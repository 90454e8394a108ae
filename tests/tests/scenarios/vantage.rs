//! The vantage points of a publish (checklist row X-09): from where and by which address it is
//! reached, as whom the client is seen, and from where it must not be reached.

use std::io::{ErrorKind, Read};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream, UdpSocket};

use anyhow::{Context, Result, bail, ensure};
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{Endpoint, Family, HOST, HOST2, Node, OUTSIDE, udp, web};
use socket2::{Domain, Protocol, Type};

use crate::case::{Case, Families, Scenario, connect, refused};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "publish_is_reached_from_every_vantage_point",
        what: "remote client, host by each of its addresses, sibling, itself, other network (X-09)",
        families: Families::Each,
        run: every_place,
    },
    Scenario {
        name: "publish_of_loopback_is_reached_by_the_host_alone",
        what: "-p 127.0.0.1:8080:80 is private to the host, for tcp and udp (N-35)",
        families: Families::Each,
        run: loopback_only,
    },
    Scenario {
        name: "publish_of_one_address_is_reached_by_that_address_alone",
        what: "-p 192.0.2.2:8080:80, for tcp and udp",
        families: Families::Each,
        run: one_address,
    },
    Scenario {
        name: "mapped_clients_reach_a_publish",
        what: "a dual-stack socket asks ::ffff:127.0.0.1 and ::ffff:192.0.2.2 (trap 19)",
        families: Families::Together,
        run: mapped,
    },
    Scenario {
        name: "clients_bound_to_an_address_reach_a_publish",
        what: "nc -s 127.0.0.1, and services that bind their sockets (trap 19)",
        families: Families::Each,
        run: bound,
    },
    Scenario {
        name: "one_socket_hears_each_server_from_the_address_that_it_asked",
        what: "a resolver with one UDP socket for all servers, published ones and others",
        families: Families::Each,
        run: many_servers,
    },
    Scenario {
        name: "host_reaches_a_publish_by_an_address_that_it_got_meanwhile",
        what: "DHCP changes the address; nobody calls nucnet-ctl (trap 28)",
        families: Families::Each,
        run: new_address,
    },
    Scenario {
        name: "host_reaches_a_publish_behind_its_own_firewall",
        what: "INPUT drops all but loopback and answers, as with ufw",
        families: Families::Each,
        run: firewall,
    },
    Scenario {
        name: "host_client_of_an_old_publish_never_reaches_the_next_owner",
        what: "a statsd client that goes on sending after the container is gone (trap 20)",
        families: Families::Each,
        run: next_owner,
    },
    Scenario {
        name: "large_answers_reach_clients_of_the_host",
        what: "an answer in fragments comes over lo as a short one does: DNS with signatures",
        families: Families::Each,
        run: large_answers,
    },
    Scenario {
        name: "connections_of_the_host_end_with_their_publish",
        what: "a client that waits for an answer hears at once that there will be none",
        families: Families::Each,
        run: connections_end,
    },
    Scenario {
        name: "host_client_of_a_silent_port_is_refused",
        what: "nobody listens in the container: an error at once, not a timeout",
        families: Families::Each,
        run: silent_port,
    },
];

/// How a client asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Asks {
    Tcp,
    /// `sendto` and `recvfrom`.
    Udp,
    /// `connect`, `send`, `recv`.
    ConnectedUdp,
}

impl Asks {
    const ALL: [Self; 3] = [Self::Tcp, Self::Udp, Self::ConnectedUdp];

    fn port(self) -> u16 {
        match self {
            Self::Tcp => 8080,
            Self::Udp | Self::ConnectedUdp => 5300,
        }
    }
}

/// Asks by an address; whom the server sees.
fn ask(client: &Node, asks: Asks, from: Option<SocketAddr>, to: SocketAddr) -> Result<SocketAddr> {
    let any = match to {
        SocketAddr::V4(_) => Family::V4.any(),
        SocketAddr::V6(_) => Family::V6.any(),
    };
    if asks == Asks::Tcp {
        let stream = client.connect_from(from, to, SOON)?;
        let asked = stream.peer_addr()?;
        ensure!(
            is_asked(asked, to),
            "asked {to}, and the socket says {asked}"
        );
        return web::who(stream);
    }
    let socket = client.socket(Domain::for_address(to), Type::DGRAM, Some(Protocol::UDP))?;
    socket.bind(&from.unwrap_or(SocketAddr::new(any, 0)).into())?;
    let socket: UdpSocket = socket.into();
    if asks == Asks::Udp {
        return Ok(exchange(&socket, to)?.peer);
    }
    socket.connect(to)?;
    let asked = socket.peer_addr()?;
    ensure!(
        is_asked(asked, to),
        "asked {to}, and the socket says {asked}"
    );
    socket.set_read_timeout(Some(SOON))?;
    socket.send(b"who")?;
    let mut bytes = [0; 2048];
    let length = socket.recv(&mut bytes)?;
    let answer = String::from_utf8_lossy(&bytes[..length]).into_owned();
    let peer = answer.split(' ').next().context("no answer")?;
    peer.parse().with_context(|| format!("answer {answer}"))
}

/// The unspecified address means the loopback one, to the kernel and so to the socket.
fn is_asked(found: SocketAddr, to: SocketAddr) -> bool {
    found == to || to.ip().is_unspecified() && found.ip().is_loopback() && found.port() == to.port()
}

/// The answer comes from the address that was asked.
fn exchange(socket: &UdpSocket, to: SocketAddr) -> Result<udp::Seen> {
    if to.ip().is_unspecified() {
        let loopback = match to {
            SocketAddr::V4(_) => Family::V4.loopback(),
            SocketAddr::V6(_) => Family::V6.loopback(),
        };
        socket.send_to(b"first", to)?;
        socket.set_read_timeout(Some(SOON))?;
        let (_, from) = socket.recv_from(&mut [0; 2048])?;
        ensure!(from.ip() == loopback, "asked {to}, and {from} answers");
        return udp::exchange(socket, SocketAddr::new(loopback, to.port()), "who", SOON);
    }
    udp::exchange(socket, to, "who", SOON)
}

/// A container that serves, and what keeps its servers alive.
struct Served {
    node: Node,
    endpoint: Endpoint,
    tcp: web::Server,
    udp: udp::Server,
}

impl Served {
    fn new(case: &Case, name: &str, publishes: &[&str]) -> Result<Self> {
        let (node, endpoint) = case.attached(name, publishes)?;
        Ok(Self {
            tcp: case.web(&node, 80)?,
            udp: case.udp(&node, 53)?,
            node,
            endpoint,
        })
    }

    /// How many clients came, by TCP and by UDP.
    fn came(&self) -> (usize, usize) {
        (self.tcp.clients().len(), self.udp.seen().len())
    }
}

/// That a place reaches no publish by an address, with either protocol.
fn unreached(case: &Case, client: &Node, to: IpAddr) -> Result<()> {
    refused(client, SocketAddr::new(to, 8080))?;
    let socket = client.udp(case.any(0))?;
    match udp::exchange(&socket, SocketAddr::new(to, 5300), "who", NEVER) {
        Err(_) => Ok(()),
        Ok(seen) => bail!("{} to {to} by UDP: answered ({seen:?})", client.name()),
    }
}

/// The host's address that a publish is bound to, before its ports.
fn published_on(address: IpAddr) -> [String; 4] {
    let host = match address {
        IpAddr::V4(address) => address.to_string(),
        IpAddr::V6(address) => format!("[{address}]"),
    };
    [
        "-p".into(),
        format!("{host}:8080:80"),
        "-p".into(),
        format!("{host}:5300:53/udp"),
    ]
}

fn every_place(case: &Case) -> Result<()> {
    let remote2 = case.lab.second_uplink()?;
    let served = Served::new(case, "web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let (sibling, sibling_endpoint) = case.attached("sibling", &[])?;
    case.only_nucnet()?;
    case.network("other")?;
    let (other, other_endpoint) = case.attached("other", &["--network", "other"])?;

    let family = case.family;
    let gateway = served.endpoint.gateway(family)?;
    let own = HOST.of(family);
    let loopback = family.loopback();
    let mut places = vec![
        ("remote client", &case.lab.outside, own, OUTSIDE.of(family)),
        (
            "remote client of the second uplink",
            &remote2,
            HOST2.of(family),
            nucnet_tests::lab::OUTSIDE2.of(family),
        ),
        ("host to loopback", &case.lab.host, loopback, gateway),
        (
            "host to the unspecified address",
            &case.lab.host,
            family.any(),
            gateway,
        ),
        ("host to its own address", &case.lab.host, own, own),
        (
            "host to another address of its own",
            &case.lab.host,
            HOST2.of(family),
            HOST2.of(family),
        ),
        (
            "host to the network's address",
            &case.lab.host,
            gateway,
            gateway,
        ),
        (
            "sibling by the host's address",
            &sibling,
            own,
            sibling_endpoint.address(family)?,
        ),
        (
            "sibling by the network's address",
            &sibling,
            gateway,
            sibling_endpoint.address(family)?,
        ),
        ("itself by the host's address", &served.node, own, gateway),
        (
            "other network by the host's address",
            &other,
            own,
            other_endpoint.address(family)?,
        ),
    ];
    if family == Family::V4 {
        let address = IpAddr::V4(Ipv4Addr::new(127, 1, 2, 3));
        places.push(("host to 127.1.2.3", &case.lab.host, address, gateway));
    }
    let mut wrong = Vec::new();
    for (place, client, address, expected) in &places {
        for asks in Asks::ALL {
            let to = SocketAddr::new(*address, asks.port());
            let row = format!("{place}, {asks:?}, {to}");
            match ask(client, asks, None, to) {
                Ok(seen) if seen.ip() == *expected => println!("{row}: seen as {}", seen.ip()),
                Ok(seen) => wrong.push(format!("{row}: seen as {seen}, not as {expected}")),
                Err(error) => wrong.push(format!("{row}: {error:#}")),
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

fn loopback_only(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    let specs = published_on(family.loopback());
    let served = Served::new(case, "web", &specs.each_ref().map(String::as_str))?;
    let (sibling, _) = case.attached("sibling", &[])?;
    case.network("other")?;
    let (other, _) = case.attached("other", &["--network", "other"])?;
    let gateway = served.endpoint.gateway(family)?;
    for client in [
        &case.lab.outside,
        &case.lab.host,
        &sibling,
        &served.node,
        &other,
    ] {
        unreached(case, client, HOST.of(family))?;
    }
    unreached(case, &sibling, gateway)?;
    for client in [&sibling, &other] {
        refused(client, SocketAddr::new(family.loopback(), 8080))?;
    }
    ensure!(served.came() == (0, 0), "{:?} came", served.came());
    for asks in Asks::ALL {
        let to = SocketAddr::new(family.loopback(), asks.port());
        let seen = ask(&case.lab.host, asks, None, to).with_context(|| format!("{asks:?}"))?;
        ensure!(seen.ip() == gateway, "{asks:?}: seen as {seen}");
    }
    ensure!(served.came() == (1, 2), "{:?} came", served.came());
    Ok(())
}

fn one_address(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let remote2 = case.lab.second_uplink()?;
    let family = case.family;
    let specs = published_on(HOST.of(family));
    let served = Served::new(case, "web", &specs.each_ref().map(String::as_str))?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let gateway = served.endpoint.gateway(family)?;
    unreached(case, &remote2, HOST2.of(family))?;
    unreached(case, &sibling, gateway)?;
    for other in [family.loopback(), HOST2.of(family), gateway] {
        unreached(case, &case.lab.host, other)?;
    }
    ensure!(served.came() == (0, 0), "{:?} came", served.came());
    for client in [&case.lab.outside, &case.lab.host, &sibling, &served.node] {
        for asks in Asks::ALL {
            let to = HOST.port(family, asks.port());
            ask(client, asks, None, to)
                .with_context(|| format!("{} by {asks:?}", client.name()))?;
        }
    }
    Ok(())
}

fn mapped(case: &Case) -> Result<()> {
    let served = Served::new(case, "web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let gateway = served.endpoint.gateway(Family::V4)?;
    let host = &case.lab.host;
    for (address, expected) in [(Ipv4Addr::LOCALHOST, gateway), (HOST.v4, HOST.v4.into())] {
        let address = IpAddr::V6(address.to_ipv6_mapped());
        for asks in Asks::ALL {
            let to = SocketAddr::new(address, asks.port());
            let seen = ask(host, asks, None, to).with_context(|| format!("{to} by {asks:?}"))?;
            ensure!(seen.ip() == expected, "{to} by {asks:?}: seen as {seen}");
        }
    }
    Ok(())
}

fn bound(case: &Case) -> Result<()> {
    let family = case.family;
    let served = Served::new(case, "web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let gateway = served.endpoint.gateway(family)?;
    let (own, loopback) = (HOST.of(family), family.loopback());
    let mut pairs = vec![
        (loopback, loopback, gateway),
        (own, own, own),
        (gateway, own, gateway),
        (own, gateway, own),
    ];
    if family == Family::V4 {
        // IPv6 has no way from one to the other: there the kernel itself refuses.
        pairs.extend([(loopback, own, gateway), (own, loopback, own)]);
    }
    for (from, to, expected) in pairs {
        for asks in Asks::ALL {
            let to = SocketAddr::new(to, asks.port());
            let from = SocketAddr::new(from, 0);
            let seen = ask(&case.lab.host, asks, Some(from), to)
                .with_context(|| format!("bound to {from}, to {to} by {asks:?}"))?;
            ensure!(seen.ip() == expected, "{from} to {to}: seen as {seen}");
        }
    }
    Ok(())
}

fn many_servers(case: &Case) -> Result<()> {
    let family = case.family;
    let (one, _) = case.attached("one", &["-p", "5301:53/udp"])?;
    let (two, _) = case.attached("two", &["-p", "5302:53/udp"])?;
    let _servers = [
        case.udp(&one, 53)?,
        case.udp(&two, 53)?,
        case.udp(&case.lab.outside, 53)?,
        case.udp(&case.lab.host, 5353)?,
    ];
    let socket = case.lab.host.udp(case.any(0))?;
    let (own, loopback) = (HOST.of(family), family.loopback());
    for _ in 0..2 {
        for (address, port) in [
            (loopback, 5301),
            (own, 5302),
            (OUTSIDE.of(family), 53),
            (loopback, 5353),
            (own, 5301),
            (loopback, 5302),
        ] {
            udp::exchange(&socket, SocketAddr::new(address, port), "who", SOON)?;
        }
    }
    Ok(())
}

/// Waits until a machine takes packets for an address that it has just got.
fn settle(machine: &Node, address: IpAddr) -> Result<()> {
    match address {
        IpAddr::V4(_) => Ok(()),
        IpAddr::V6(v6) => machine.settle("eth0", v6),
    }
}

fn new_address(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    let served = Served::new(case, "web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let (new, length) = match family {
        Family::V4 => (IpAddr::from([192, 0, 2, 77]), "24"),
        Family::V6 => ("2001:db8:1::77".parse()?, "64 nodad"),
    };
    // Before, it is a neighbour's.
    case.lab
        .outside
        .ip(&format!("addr add {new}/{length} dev eth0"))?;
    let remote = (
        case.web(&case.lab.outside, 8080)?,
        case.udp(&case.lab.outside, 5300)?,
    );
    let host = &case.lab.host;
    for asks in Asks::ALL {
        ask(host, asks, None, SocketAddr::new(new, asks.port()))?;
    }
    ensure!(served.came() == (0, 0), "hijacked: {:?}", served.came());
    let length_only = length.split(' ').next().unwrap_or(length);
    case.lab
        .outside
        .ip(&format!("addr del {new}/{length_only} dev eth0"))?;
    host.ip(&format!("addr add {new}/{length} dev eth0"))?;
    settle(host, new)?;
    for asks in Asks::ALL {
        let to = SocketAddr::new(new, asks.port());
        ask(host, asks, None, to).with_context(|| format!("{asks:?}"))?;
    }
    ensure!(served.came() == (1, 2), "{:?} came", served.came());
    // And afterwards it is a neighbour's again.
    host.ip(&format!("addr del {new}/{length_only} dev eth0"))?;
    case.lab
        .outside
        .ip(&format!("addr add {new}/{length} dev eth0"))?;
    settle(&case.lab.outside, new)?;
    for asks in Asks::ALL {
        ask(host, asks, None, SocketAddr::new(new, asks.port()))
            .with_context(|| format!("{asks:?} to what was the host's own"))?;
    }
    ensure!(served.came() == (1, 2), "hijacked: {:?}", served.came());
    ensure!(remote.0.clients().len() == 2, "{:?}", remote.0.clients());
    Ok(())
}

fn firewall(case: &Case) -> Result<()> {
    let tool = match case.family {
        Family::V4 => "iptables-restore",
        Family::V6 => "ip6tables-restore",
    };
    if !crate::case::has(tool) {
        return crate::case::skip("there is no iptables here");
    }
    let icmp = match case.family {
        Family::V4 => "",
        // Neighbour discovery.
        Family::V6 => "-A INPUT -p icmpv6 -j ACCEPT\n",
    };
    let rules = format!(
        "*filter\n:INPUT DROP\n:FORWARD DROP\n:OUTPUT ACCEPT\n-A INPUT -i lo -j ACCEPT\n\
         -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n{icmp}COMMIT\n"
    );
    let file = case.lab.host.path("/run/rules");
    std::fs::write(&file, rules)?;
    case.lab
        .host
        .run("sh", &["-c", &format!("{tool} < /run/rules")])?;
    let served = Served::new(case, "web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let gateway = served.endpoint.gateway(case.family)?;
    for address in [case.family.loopback(), HOST.of(case.family), gateway] {
        for asks in Asks::ALL {
            let to = SocketAddr::new(address, asks.port());
            ask(&case.lab.host, asks, None, to).with_context(|| format!("{to} by {asks:?}"))?;
        }
    }
    Ok(())
}

fn next_owner(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    // The network stays as long as somebody is in it.
    let (_other, _) = case.attached("other", &[])?;
    let old = Served::new(case, "old", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let address = old.endpoint.address(family)?.to_string();
    let host = &case.lab.host;
    let mut sockets = Vec::new();
    for own in [family.loopback(), HOST.of(family)] {
        let to = SocketAddr::new(own, 5300);
        let unconnected = host.udp(case.any(0))?;
        udp::exchange(&unconnected, to, "who", SOON)?;
        let connected = host.udp(case.any(0))?;
        connected.connect(to)?;
        connected.set_read_timeout(Some(SOON))?;
        connected.send(b"who")?;
        connected.recv(&mut [0; 2048])?;
        sockets.push((unconnected, connected, to));
    }
    case.lab.nucnet(&["detach", "old"])?.expect(0)?;
    let next = case.lab.container("next")?;
    case.attach(&next, &["--ip", &address])?;
    let server = case.udp(&next, 53)?;
    for (unconnected, connected, to) in &sockets {
        unconnected.send_to(b"late", to)?;
        let sent = connected
            .send(b"late")
            .and_then(|_| connected.recv(&mut [0; 2048]));
        match sent {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {}
            other => bail!("connected to {to}: expected a refusal, not {other:?}"),
        }
    }
    ensure!(server.seen().is_empty(), "it got {:?}", server.seen());
    // Published anew, the same sockets are served by the new owner.
    case.lab
        .nucnet(&["publish", "next", "5300:53/udp"])?
        .expect(0)?;
    for (unconnected, _, to) in &sockets {
        udp::exchange(unconnected, *to, "who", SOON)?;
    }
    Ok(())
}

fn large_answers(case: &Case) -> Result<()> {
    let served = Served::new(case, "web", &["-p", "5300:53/udp"])?;
    let gateway = served.endpoint.gateway(case.family)?;
    let question = match case.family {
        Family::V4 => "?".repeat(1500 - 28),
        Family::V6 => "?".repeat(1500 - 48),
    };
    for own in [case.family.loopback(), HOST.of(case.family), gateway] {
        let socket = case.lab.host.udp(case.any(0))?;
        let to = SocketAddr::new(own, 5300);
        // The answer says more, and does not fit any more.
        let seen = udp::exchange(&socket, to, &question, SOON)?;
        ensure!(seen.text == question, "{to} understood {:?}", seen.text);
    }
    Ok(())
}

fn connections_end(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    let served = Served::new(case, "web", &["-p", "8080:80", "-p", "8081:80"])?;
    let gateway = served.endpoint.gateway(family)?;
    let connect_all = |port| -> Result<Vec<TcpStream>> {
        [family.loopback(), HOST.of(family), gateway]
            .into_iter()
            .map(|own| connect(&case.lab.host, SocketAddr::new(own, port)))
            .collect()
    };
    let ended = |streams: &mut [TcpStream]| -> Result<()> {
        for stream in streams {
            let asked = stream.peer_addr();
            match stream.read(&mut [0]) {
                Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                other => bail!("{asked:?}: expected that it was aborted, not {other:?}"),
            }
        }
        Ok(())
    };
    let (mut first, mut second) = (connect_all(8080)?, connect_all(8081)?);
    let direct = SocketAddr::new(served.endpoint.address(family)?, 80);
    let direct = connect(&case.lab.host, direct)?;
    // A service of the host's own on a port that a client of the publish has.
    let client = first[0].local_addr()?;
    let beside = case.lab.host.listen(HOST.port(family, client.port()));
    case.lab
        .nucnet(&["unpublish", "web", "8080:80"])?
        .expect(0)?;
    ended(&mut first)?;
    web::who(direct).context("the host's connection to the container itself")?;
    let third = second.pop().context("three connections")?;
    web::who(third).context("a connection by the other publish")?;
    case.lab.nucnet(&["detach", "web"])?.expect(0)?;
    ended(&mut second)?;
    drop(beside);
    Ok(())
}

fn silent_port(case: &Case) -> Result<()> {
    let (_web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let gateway = endpoint.gateway(case.family)?;
    for address in [case.family.loopback(), HOST.of(case.family), gateway] {
        until("the container refuses", SOON, || {
            Ok(refused(&case.lab.host, SocketAddr::new(address, 8080)).is_ok())
        })?;
    }
    Ok(())
}
