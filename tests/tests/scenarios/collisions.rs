//! Equal source ports behind one address: the host's own, those of endpoints, and those of a
//! neighbour whom netfilter masquerades, in either order.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::seeds::Rules;
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{Endpoint, Family, HOST, Node, OUTSIDE, udp};

use crate::case::{Case, Families, Scenario, skip};
use crate::differences::gives_another_port;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "endpoint_leaves_the_hosts_connections_their_ports",
        what: "the host was first: an endpoint with that very port must get another",
        families: Families::Each,
        run: host_first,
    },
    Scenario {
        name: "host_takes_the_port_of_a_binding_and_gives_it_back",
        what: "the endpoint was first, and the host's socket is connected elsewhere: it is the host's",
        families: Families::Each,
        run: bound_first,
    },
    Scenario {
        name: "masquerade_draws_around_the_connections_that_the_host_has",
        what: "a range of 1,024 ports, a third of which connections of the host have taken",
        families: Families::Each,
        run: crowded_by_connections,
    },
    Scenario {
        name: "masquerade_draws_around_the_sockets_that_the_host_holds",
        what: "the same where nothing has left by them yet",
        families: Families::Each,
        run: crowded_by_sockets,
    },
    Scenario {
        name: "host_socket_on_an_endpoints_port_takes_nothing_from_the_endpoint",
        what: "the endpoint was first: its connection goes on, whatever the host binds",
        families: Families::Each,
        run: endpoint_first,
    },
    Scenario {
        name: "endpoints_that_keep_one_source_port_are_told_apart",
        what: "source ports are kept where they can be, which is once for each server",
        families: Families::Each,
        run: two_endpoints,
    },
    Scenario {
        name: "neighbour_masqueraded_by_netfilter_before_the_endpoint_keeps_its_flows",
        what: "another runtime's containers on the same host, with the same source port",
        families: Families::Each,
        run: neighbour_first,
    },
    Scenario {
        name: "neighbour_masqueraded_by_netfilter_after_the_endpoint_gets_its_flows",
        what: "the same in the other order",
        families: Families::Each,
        run: neighbour_second,
    },
];

/// A port of the range that masquerade draws from, and not of the host's own.
const PORT: u16 = 20_000;

/// What both sides of a test talk to.
struct Servers {
    tcp: TcpListener,
    _udp: udp::Server,
}

const TCP_PORT: u16 = 80;
const UDP_PORT: u16 = 53;

impl Servers {
    fn start(case: &Case) -> Result<Self> {
        Ok(Self {
            tcp: case.lab.outside.listen(case.any(TCP_PORT))?,
            _udp: case.udp(&case.lab.outside, UDP_PORT)?,
        })
    }
}

/// A TCP connection and a UDP socket from one source port to one server.
struct Client {
    name: String,
    stream: TcpStream,
    /// The server's end.
    accepted: TcpStream,
    socket: UdpSocket,
    udp: SocketAddr,
}

impl Client {
    fn open(case: &Case, node: &Node, port: u16, servers: &Servers) -> Result<Self> {
        let from = Some(case.any(port));
        let name = node.name().to_owned();
        let stream = node
            .connect_from(from, OUTSIDE.port(case.family, TCP_PORT), SOON)
            .with_context(|| format!("{name} by TCP"))?;
        let (accepted, _) = servers.tcp.accept()?;
        accepted.set_read_timeout(Some(SOON))?;
        let socket = node.udp(case.any(port))?;
        let udp = OUTSIDE.port(case.family, UDP_PORT);
        socket.connect(udp)?;
        let mut client = Self {
            name,
            stream,
            accepted,
            socket,
            udp,
        };
        client.talk("hello")?;
        Ok(client)
    }

    /// Whom the server takes the client for, by TCP.
    fn seen(&self) -> Result<SocketAddr> {
        Ok(self.accepted.peer_addr()?)
    }

    /// Says something by both protocols, and hears exactly that. Returns whom the server takes
    /// the client for, by UDP.
    fn talk(&mut self, word: &str) -> Result<SocketAddr> {
        let text = format!("{} says {word}", self.name);
        carry(&mut self.stream, &mut self.accepted, &text)
            .with_context(|| format!("{text}, by TCP to the server"))?;
        carry(&mut self.accepted, &mut self.stream, &text)
            .with_context(|| format!("{text}, by TCP from the server"))?;
        let seen =
            said(&self.socket, self.udp, &text).with_context(|| format!("{text}, by UDP"))?;
        Ok(seen.peer)
    }
}

/// That what is written at one end is what the other end reads next.
fn carry(from: &mut TcpStream, to: &mut TcpStream, text: &str) -> Result<()> {
    from.write_all(text.as_bytes())?;
    let mut bytes = vec![0; text.len()];
    to.read_exact(&mut bytes)?;
    let arrived = String::from_utf8_lossy(&bytes);
    ensure!(arrived == text, "{arrived:?} arrived");
    Ok(())
}

/// Asks a UDP server, and gets the answer to this question.
fn said(socket: &UdpSocket, to: SocketAddr, text: &str) -> Result<udp::Seen> {
    let seen = udp::exchange(socket, to, text, SOON)?;
    ensure!(seen.text == text, "the answer is to {:?}", seen.text);
    Ok(seen)
}

/// Both talk in turns.
fn both_talk(one: &mut Client, two: &mut Client) -> Result<()> {
    for word in ["one", "two", "three"] {
        let seen = [one.talk(word)?, two.talk(word)?];
        ensure!(seen[0] != seen[1], "UDP: one address and port: {seen:?}");
    }
    let seen = [one.seen()?, two.seen()?];
    ensure!(seen[0] != seen[1], "TCP: one address and port: {seen:?}");
    Ok(())
}

/// Endpoints of a network that keeps source ports, so that the first port tried is known.
fn keeping(case: &Case, names: &[&str]) -> Result<Vec<(Node, Endpoint)>> {
    case.only_nucnet()?;
    case.network("keep --bridge keep0 --subnet 10.71.0.0/24 --subnet6 fd71::/64 --keep-ports")?;
    let attach = |name: &&str| case.attached(name, &["--network", "keep"]);
    names.iter().map(attach).collect()
}

fn host_first(case: &Case) -> Result<()> {
    let endpoints = keeping(case, &["container"])?;
    let servers = Servers::start(case)?;
    let mut host = Client::open(case, &case.lab.host, PORT, &servers)?;
    ensure!(host.seen()? == HOST.port(case.family, PORT));
    let mut container = Client::open(case, &endpoints[0].0, PORT, &servers)?;
    both_talk(&mut host, &mut container)
}

fn bound_first(case: &Case) -> Result<()> {
    let endpoints = keeping(case, &["container"])?;
    let servers = Servers::start(case)?;
    let mut container = Client::open(case, &endpoints[0].0, PORT, &servers)?;
    // Towards another server.
    let port = container.talk("where it is seen")?.port();
    let _other = case.udp(&case.lab.outside, UDP_PORT + 1)?;
    let to = OUTSIDE.port(case.family, UDP_PORT + 1);
    let own = case.lab.host.udp(case.any(port))?;
    own.connect(to)?;
    said(&own, to, "the host asks another")?;
    container.socket.connect(to)?;
    let answer = udp::exchange(&container.socket, to, "the endpoint asks it too", NEVER);
    ensure!(answer.is_err(), "the host's port was used: {answer:?}");
    case.counted("ports-exhausted")?;
    said(&own, to, "the host asks it again")?;
    drop(own);
    // A program that another thread is starting may have a copy of it for a moment.
    until(
        "the endpoint has the answer when the host is gone",
        SOON,
        || Ok(udp::exchange(&container.socket, to, "and now", NEVER).is_ok()),
    )
}

/// Leaves masquerade the last block of 1,024 ports, every third of which the caller takes.
fn last_block(case: &Case) -> Result<(Node, Servers)> {
    case.only_nucnet()?;
    let host = &case.lab.host;
    host.sysctl("net/ipv4/ip_local_port_range", "1024 64511")?;
    let (container, _) = case.attached("container", &[])?;
    Ok((container, Servers::start(case)?))
}

/// Ports that the host takes of the last block: multiples of three.
fn thirds() -> impl Iterator<Item = u16> {
    (64_512..=65_535).step_by(3)
}

fn is_left(seen: SocketAddr) -> Result<()> {
    ensure!(seen.port() >= 64_512, "{seen} is not of the range");
    ensure!(!seen.port().is_multiple_of(3), "{seen} is the host's");
    Ok(())
}

fn crowded_by_connections(case: &Case) -> Result<()> {
    let (container, servers) = last_block(case)?;
    let to = OUTSIDE.port(case.family, TCP_PORT);
    let mut open = Vec::new();
    for port in thirds() {
        let stream = case.lab.host.connect_from(Some(case.any(port)), to, SOON)?;
        open.push((stream, servers.tcp.accept()?.0));
    }
    for number in 0..100 {
        let stream = container.connect(to, SOON);
        let stream = stream.with_context(|| format!("connection {number}"))?;
        let (accepted, seen) = servers.tcp.accept()?;
        is_left(seen)?;
        open.push((stream, accepted));
    }
    for (number, (stream, accepted)) in open.iter_mut().enumerate() {
        let text = format!("number {number}");
        accepted.set_read_timeout(Some(SOON))?;
        carry(stream, accepted, &text).with_context(|| text.clone())?;
        carry(accepted, stream, &text).with_context(|| text.clone())?;
    }
    Ok(())
}

fn crowded_by_sockets(case: &Case) -> Result<()> {
    let (container, _servers) = last_block(case)?;
    let to = OUTSIDE.port(case.family, UDP_PORT);
    let mut open = Vec::new();
    for port in thirds() {
        let socket = case.lab.host.udp(case.any(port))?;
        socket.connect(to)?;
        open.push(socket);
    }
    for number in 0..100 {
        let socket = container.udp(case.any(0))?;
        let text = format!("socket {number}");
        let seen = said(&socket, to, &text).with_context(|| text)?;
        is_left(seen.peer)?;
        open.push(socket);
    }
    for (number, socket) in open.iter().enumerate() {
        said(socket, to, &format!("number {number}"))?;
    }
    Ok(())
}

fn endpoint_first(case: &Case) -> Result<()> {
    let endpoints = keeping(case, &["container"])?;
    let servers = Servers::start(case)?;
    let mut container = Client::open(case, &endpoints[0].0, PORT, &servers)?;
    ensure!(
        container.seen()? == HOST.port(case.family, PORT),
        "the port is not kept: {}",
        container.seen()?
    );
    // The server has that connection already: what it says to the SYN is not for the host, which
    // gets none, or by rules one from another port.
    let host = &case.lab.host;
    let from = Some(case.any(PORT));
    let second = host.connect_from(from, OUTSIDE.port(case.family, TCP_PORT), NEVER);
    if gives_another_port(case.way) && second.is_ok() {
        let (_, seen) = servers.tcp.accept()?;
        ensure!(
            seen.port() != PORT,
            "two connections with one address and port"
        );
    } else {
        ensure!(second.is_err(), "two connections with one address and port");
    }
    container.talk("after the host's TCP")?;

    // To other servers the port is the host's as much as the endpoint's.
    let other = case.lab.outside.listen(case.any(TCP_PORT + 1))?;
    let to = OUTSIDE.port(case.family, TCP_PORT + 1);
    let mut stream = host.connect_from(from, to, SOON)?;
    let (mut accepted, seen) = other.accept()?;
    ensure!(seen == HOST.port(case.family, PORT), "{seen}");
    carry(&mut stream, &mut accepted, "to another server")?;
    carry(&mut accepted, &mut stream, "from another server")?;
    container.talk("after the host's other TCP")?;

    // A server of the host is everybody's but the endpoint's own peer.
    let _server = case.udp(host, PORT)?;
    let seen = case.who_udp(&case.lab.outside, HOST.port(case.family, PORT))?;
    ensure!(seen.peer.ip() == OUTSIDE.of(case.family), "{seen:?}");
    container.talk("after the host's server")?;
    Ok(())
}

fn two_endpoints(case: &Case) -> Result<()> {
    let endpoints = keeping(case, &["one", "two"])?;
    let servers = Servers::start(case)?;
    let mut one = Client::open(case, &endpoints[0].0, PORT, &servers)?;
    let mut two = Client::open(case, &endpoints[1].0, PORT, &servers)?;
    ensure!(one.seen()?.port() == PORT, "{}", one.seen()?);
    both_talk(&mut one, &mut two)
}

/// A container that netfilter masquerades, as other runtimes have it done.
fn neighbour(case: &Case) -> Result<Node> {
    case.only_nucnet()?;
    let program = match case.family {
        Family::V4 => "iptables-nft",
        Family::V6 => "ip6tables-nft",
    };
    if let Err(error) = case.lab.host.run(program, &["-w", "-t", "nat", "-S"]) {
        return skip(&format!("no NAT of netfilter here: {error:#}"));
    }
    let seeds = case.lab.seeds();
    seeds.prepare(&case.lab)?;
    let node = case.lab.container("neighbour")?;
    let endpoint = seeds.attach(&case.lab, &node, Rules::IptablesNft, &[case.family], &[])?;
    seeds.settle(&case.lab, &node, &endpoint)?;
    Ok(node)
}

/// One that a kernel chooses by itself: netfilter keeps it.
const EPHEMERAL: u16 = 40_000;

fn neighbour_first(case: &Case) -> Result<()> {
    let neighbour = neighbour(case)?;
    let (container, _) = case.attached("container", &[])?;
    let servers = Servers::start(case)?;
    let mut theirs = Client::open(case, &neighbour, EPHEMERAL, &servers)?;
    let mut ours = Client::open(case, &container, EPHEMERAL, &servers)?;
    ensure!(theirs.seen()? == HOST.port(case.family, EPHEMERAL));
    both_talk(&mut theirs, &mut ours)
}

fn neighbour_second(case: &Case) -> Result<()> {
    let neighbour = neighbour(case)?;
    let (container, _) = case.attached("container", &[])?;
    let servers = Servers::start(case)?;
    let mut ours = Client::open(case, &container, EPHEMERAL, &servers)?;
    let mut theirs = Client::open(case, &neighbour, EPHEMERAL, &servers)?;
    ensure!(theirs.seen()? == HOST.port(case.family, EPHEMERAL));
    both_talk(&mut theirs, &mut ours)
}
