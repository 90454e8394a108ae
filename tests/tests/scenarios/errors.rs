//! ICMP errors find whoever sent the packet that they are about.

use std::io::ErrorKind;
use std::net::SocketAddr;

use anyhow::{Context, Result, bail, ensure};
use nucnet_tests::lab::wait::SOON;
use nucnet_tests::lab::{FAR, HOST, Node, OUTSIDE};

use crate::case::{Case, Families, Scenario};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "closed_port_is_reported_to_whoever_asked",
    what: "a resolver that is down fails at once and not after a timeout, in every direction",
    families: Families::Each,
    run: closed_port,
}];

fn closed_port(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let publishes = ["-p", "5300:53/udp"];
    let (container, endpoint) = case.attached("container", &publishes)?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let address = endpoint.address(case.family)?;
    let gateway = endpoint.gateway(case.family)?;
    let published = HOST.port(case.family, 5300);
    let outside = &case.lab.outside;
    for (client, to) in [
        (&container, OUTSIDE.port(case.family, 9)),
        (&container, FAR.port(case.family, 9)),
        (&container, SocketAddr::new(gateway, 9)),
        (&container, published),
        (outside, published),
        (&sibling, published),
        (&sibling, SocketAddr::new(address, 53)),
        (&case.lab.host, SocketAddr::new(address, 53)),
    ] {
        unreachable(case, client, to)?;
    }
    // And the error has ended nothing: the server comes up, and the same socket reaches it.
    let socket = connected(case, outside, published)?;
    socket.send(b"nobody")?;
    refused(&socket).context("before the server is up")?;
    let _server = case.udp(&container, 53)?;
    socket.send(b"somebody")?;
    let mut bytes = [0; 100];
    let length = socket.recv(&mut bytes).context("after it is up")?;
    ensure!(length > 0, "an empty answer");
    Ok(())
}

fn connected(case: &Case, client: &Node, to: SocketAddr) -> Result<std::net::UdpSocket> {
    let socket = client.udp(case.any(0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(SOON))?;
    Ok(socket)
}

fn refused(socket: &std::net::UdpSocket) -> Result<()> {
    match socket.recv(&mut [0; 100]) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => bail!("not refused but: {error}"),
        Ok(length) => bail!("answered with {length} bytes"),
    }
}

fn unreachable(case: &Case, client: &Node, to: SocketAddr) -> Result<()> {
    let socket = connected(case, client, to)?;
    socket.send(b"is anybody there")?;
    refused(&socket).with_context(|| format!("from {} to {to}", client.name()))
}
