//! ICMP errors find whoever sent the packet that they are about.

use std::io::{ErrorKind, IoSliceMut};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::cmsg_space;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, setsockopt, sockopt,
};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, Node, OUTSIDE};
use socket2::SockRef;

use crate::case::{Case, Families, Scenario};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "closed_port_is_reported_to_whoever_asked",
        what: "a resolver that is down fails at once and not after a timeout, in every direction",
        families: Families::Each,
        run: closed_port,
    },
    Scenario {
        name: "traceroute_shows_the_host_from_both_sides",
        what: "whoever looks for the fault in a path sees the host in it",
        families: Families::Each,
        run: trace,
    },
];

/// When a datagram without an answer is sent again.
const AGAIN: Duration = Duration::from_secs(2);

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
    ensure!(is_refused(&socket)?, "silence before the server is up");
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

/// Whether a socket is told that nobody listens; false: it is told nothing for as long as it waits.
fn is_refused(socket: &std::net::UdpSocket) -> Result<bool> {
    match socket.recv(&mut [0; 100]) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(true),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(false),
        Err(error) => bail!("not refused but: {error}"),
        Ok(length) => bail!("answered with {length} bytes"),
    }
}

fn unreachable(case: &Case, client: &Node, to: SocketAddr) -> Result<()> {
    let socket = connected(case, client, to)?;
    socket.set_read_timeout(Some(AGAIN))?;
    let what = format!("a refusal from {to} to {}", client.name());
    // A datagram may get lost, as may the error, on a machine that has much else to do.
    let asked = until(&what, SOON, || match socket.send(b"is anybody there") {
        Ok(_) => is_refused(&socket),
        // It came late.
        Err(error) => Ok(error.kind() == ErrorKind::ConnectionRefused),
    });
    asked.with_context(|| format!("from {} to {to}", client.name()))
}

/// Every hop on the way to a UDP port, as traceroute finds them: by datagrams with ever longer
/// lives. The last one is the target itself, which reports a closed port.
fn hops(case: &Case, client: &Node, to: SocketAddr) -> Result<Vec<IpAddr>> {
    let mut hops = Vec::new();
    for limit in 1..5 {
        let socket = connected(case, client, to)?;
        let options = SockRef::from(&socket);
        match case.family {
            Family::V4 => {
                options.set_ttl_v4(limit)?;
                setsockopt(&socket, sockopt::Ipv4RecvErr, &true)?;
            }
            Family::V6 => {
                options.set_unicast_hops_v6(limit)?;
                setsockopt(&socket, sockopt::Ipv6RecvErr, &true)?;
            }
        }
        socket.send(b"how far is it")?;
        let (reporter, is_last) = reported(&socket)
            .with_context(|| format!("from {} to {to}, hop {limit}", client.name()))?;
        hops.push(reporter);
        if is_last {
            return Ok(hops);
        }
    }
    bail!("{to} is not reached: {hops:?}")
}

/// Who reports an error, and whether it is that of a closed port.
fn reported(socket: &std::net::UdpSocket) -> Result<(IpAddr, bool)> {
    let mut polled = [PollFd::new(socket.as_fd(), PollFlags::POLLERR)];
    let ready = poll(&mut polled, PollTimeout::try_from(SOON)?)?;
    ensure!(ready == 1, "no error comes");
    let mut bytes = [0; 100];
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let mut space = cmsg_space!([u8; 64]);
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_ERRQUEUE,
    )?;
    for control in message.cmsgs()? {
        let (error, reporter): (_, IpAddr) = match control {
            ControlMessageOwned::Ipv4RecvErr(error, Some(from)) => (
                error,
                Ipv4Addr::from(u32::from_be(from.sin_addr.s_addr)).into(),
            ),
            ControlMessageOwned::Ipv6RecvErr(error, Some(from)) => {
                (error, Ipv6Addr::from(from.sin6_addr.s6_addr).into())
            }
            _ => continue,
        };
        return Ok((reporter, error.ee_errno == libc::ECONNREFUSED as u32));
    }
    bail!("an error without reporter")
}

fn trace(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, endpoint) = case.attached("container", &["-p", "5300:53/udp"])?;
    let gateway = endpoint.gateway(case.family)?;
    let (outside, host) = (OUTSIDE.of(case.family), HOST.of(case.family));
    let seen = hops(case, &container, SocketAddr::new(outside, 9))?;
    ensure!(seen == [gateway, outside], "from inside: {seen:?}");
    let seen = hops(case, &case.lab.outside, SocketAddr::new(host, 5300))?;
    ensure!(seen == [host, host], "from outside: {seen:?}");
    case.counted("ttl-exceeded")
}
