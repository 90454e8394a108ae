//! Links that take less than the sender believes.

use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nucnet_ctl::kernel::probe::known_names;
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, Node, OUTSIDE};

use crate::case::{Case, Families, Scenario, connect, has, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "upload_over_a_smaller_uplink_completes",
        what: "a container that knows nothing of a PPPoE or VPN uplink does not hang",
        families: Families::Each,
        run: smaller_uplink,
    },
    Scenario {
        name: "upload_over_a_smaller_route_completes",
        what: "the unit that a route insists on counts, not only that of its interface",
        families: Families::Each,
        run: smaller_route,
    },
    Scenario {
        name: "upload_to_a_smaller_container_completes",
        what: "a client beyond the uplink learns what the container takes",
        families: Families::Each,
        run: smaller_container,
    },
    Scenario {
        name: "datagram_too_long_for_the_container_is_reported",
        what: "QUIC finds its packet size by such errors",
        families: Families::Each,
        run: long_datagram,
    },
    Scenario {
        name: "datagrams_in_fragments_arrive_whole_in_every_direction",
        what: "DNSSEC answers, NFS and syslog over UDP are longer than a frame",
        families: Families::Each,
        run: fragments,
    },
    Scenario {
        name: "long_pings_are_answered",
        what: "the first thing that people try when something hangs",
        families: Families::Each,
        run: long_pings,
    },
];

/// What is sent: more than all buffers on the way hold.
const BYTES: usize = 8 << 20;

/// Sends it to a listener, which must get the whole of it.
fn upload(client: &Node, to: SocketAddr, listener: &TcpListener) -> Result<()> {
    let limit = Some(Duration::from_secs(10));
    std::thread::scope(|scope| {
        let server = scope.spawn(|| -> Result<u64> {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(limit)?;
            let (mut sum, mut bytes) = (0_u64, vec![0; 65536]);
            let mut left = BYTES;
            while left > 0 {
                let length = stream.read(&mut bytes).context("reading")?;
                ensure!(length > 0, "{left} bytes are missing");
                left -= length;
                sum += bytes[..length]
                    .iter()
                    .map(|byte| u64::from(*byte))
                    .sum::<u64>();
            }
            stream.write_all(b"!")?;
            Ok(sum)
        });
        let content: Vec<u8> = (0..BYTES).map(|at| (at % 251) as u8).collect();
        let mut stream = connect(client, to)?;
        stream.write_all(&content).context("writing")?;
        stream.read_exact(&mut [0]).context("waiting for the end")?;
        let sum = server.join().map_err(|_| anyhow::anyhow!("a panic"))??;
        let expected: u64 = content.iter().map(|byte| u64::from(*byte)).sum();
        ensure!(sum == expected, "other bytes came than were sent");
        Ok(())
    })
}

/// With segmentation by the interface and without.
fn with_and_without_offload(client: &Node, test: impl Fn() -> Result<()>) -> Result<()> {
    if !has("ethtool") {
        return skip("there is no program ethtool here");
    }
    for state in ["on", "off"] {
        client.run("ethtool", &["-K", "eth0", "tso", state, "gso", state])?;
        test().with_context(|| format!("segmentation offload {state}"))?;
    }
    Ok(())
}

fn smaller_uplink(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, _) = case.attached("container", &[])?;
    case.lab.host.ip("link set eth0 mtu 1300")?;
    if case.is_by_programs() && !routes_tell_units() {
        case.lab.nucnet(&["gc"])?.expect(0)?;
    }
    let to = OUTSIDE.port(case.family, 80);
    let listener = case.lab.outside.listen(case.any(80))?;
    with_and_without_offload(&container, || {
        forget_units(&container)?;
        upload(&container, to, &listener)
    })?;
    case.counted("too-big")
}

/// Whether this kernel tells programs the unit of a route. `nucnet-ctl gc` tells them that of the
/// uplink anyhow.
fn routes_tell_units() -> bool {
    known_names(["mtu_result"]) != Some([false])
}

/// Has a machine forget what it learned of paths.
fn forget_units(node: &Node) -> Result<()> {
    for family in ["-4", "-6"] {
        node.run("ip", &[family, "route", "flush", "cache"])?;
    }
    Ok(())
}

fn smaller_route(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    if case.is_by_programs() && !routes_tell_units() {
        return skip("this kernel does not tell programs the unit of a route (before Linux 5.12)");
    }
    let (container, _) = case.attached("container", &[])?;
    case.lab.host.ip(&format!(
        "route add {} via {} mtu lock 1300",
        FAR.of(case.family),
        OUTSIDE.of(case.family)
    ))?;
    let listener = case.lab.outside.listen(case.any(80))?;
    upload(&container, FAR.port(case.family, 80), &listener)?;
    case.counted("too-big")
}

fn smaller_container(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let arguments = ["--mtu", "1300", "-p", "8080:80"];
    let (container, _) = case.attached("container", &arguments)?;
    // It then tells its peers that it takes more, as something behind it may do.
    container.ip("link set eth0 mtu 1500")?;
    let listener = container.listen(case.any(80))?;
    let outside = &case.lab.outside;
    with_and_without_offload(outside, || {
        forget_units(outside)?;
        upload(outside, HOST.port(case.family, 8080), &listener)
    })?;
    case.counted("too-big")
}

fn long_datagram(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let arguments = ["--mtu", "1300", "-p", "5300:53/udp"];
    let (container, _) = case.attached("container", &arguments)?;
    let server = case.udp(&container, 53)?;
    let socket = case.lab.outside.udp(case.any(0))?;
    socket.connect(HOST.port(case.family, 5300))?;
    let (level, option) = match case.family {
        Family::V4 => (libc::IPPROTO_IP, libc::IP_MTU_DISCOVER),
        Family::V6 => (libc::IPPROTO_IPV6, libc::IPV6_MTU_DISCOVER),
    };
    // Never cut, and mind what is learned of the path.
    integer(&socket, level, option, Some(libc::IP_PMTUDISC_DO))?;
    socket.send(&[0; 1400])?;
    let learned = match case.family {
        Family::V4 => libc::IP_MTU,
        Family::V6 => libc::IPV6_MTU,
    };
    until("the sender learns of it", SOON, || {
        Ok(integer(&socket, level, learned, None)? == 1300)
    })?;
    let pending = socket.take_error()?.and_then(|error| error.raw_os_error());
    ensure!(
        pending.is_none_or(|errno| errno == libc::EMSGSIZE),
        "{pending:?}"
    );
    let fits = match case.family {
        Family::V4 => 1300 - 28,
        Family::V6 => 1300 - 48,
    };
    socket.send(&vec![0; fits])?;
    until("what just fits arrives", SOON, || {
        Ok(server.seen().iter().any(|seen| seen.text.len() == fits))
    })?;
    case.counted("too-big")
}

/// Sends back what it gets, once.
fn echo_once(server: &UdpSocket) -> Result<()> {
    let mut bytes = vec![0; 65536];
    let (length, from) = server.recv_from(&mut bytes).context("the server")?;
    server.send_to(&bytes[..length], from)?;
    Ok(())
}

fn fragments(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, endpoint) = case.attached("container", &["-p", "5300:53/udp"])?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let (address, gateway) = (
        endpoint.address(case.family)?,
        endpoint.gateway(case.family)?,
    );
    let (outside, host) = (&case.lab.outside, &case.lab.host);
    let published = HOST.port(case.family, 5300);
    let inside = SocketAddr::new(address, 53);
    for (client, server, to) in [
        (&container, outside, OUTSIDE.port(case.family, 53)),
        (outside, &container, published),
        (&sibling, &container, inside),
        (&sibling, &container, published),
        (&container, host, SocketAddr::new(gateway, 53)),
        (host, &container, inside),
    ] {
        let what = || format!("from {} to {to}", client.name());
        // Bound for this case only: the host takes the port of the gateway from nobody.
        let server = server.udp(case.any(53)).with_context(what)?;
        server.set_read_timeout(Some(SOON))?;
        let socket = client.udp(case.any(0))?;
        socket.set_read_timeout(Some(SOON))?;
        socket.connect(to)?;
        for length in [1400, 1473, 4000, 8000, 60_000] {
            let sent: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
            let what = || format!("{length} bytes {}", what());
            socket.send(&sent).with_context(what)?;
            echo_once(&server).with_context(what)?;
            let mut got = vec![0; 65536];
            let came = socket.recv(&mut got).with_context(what)?;
            ensure!(got[..came] == sent, "{}: other bytes come back", what());
        }
    }
    Ok(())
}

fn long_pings(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, endpoint) = case.attached("container", &[])?;
    let gateway = endpoint.gateway(case.family)?;
    for to in [OUTSIDE.of(case.family), FAR.of(case.family), gateway] {
        let to = to.to_string();
        container.run(
            "ping",
            &["-n", "-q", "-c", "1", "-W", "5", "-s", "8000", &to],
        )?;
    }
    Ok(())
}

/// Sets an option of a socket, or else reads it.
fn integer(
    socket: &UdpSocket,
    level: libc::c_int,
    option: libc::c_int,
    new: Option<libc::c_int>,
) -> Result<libc::c_int> {
    let descriptor = socket.as_raw_fd();
    let mut value = new.unwrap_or_default();
    let mut size = size_of_val(&value) as libc::socklen_t;
    // SAFETY: value and size are integers that live on, the size that of the value.
    let result = unsafe {
        let place = (&raw mut value).cast();
        match new {
            Some(_) => libc::setsockopt(descriptor, level, option, place, size),
            None => libc::getsockopt(descriptor, level, option, place, &raw mut size),
        }
    };
    ensure!(result == 0, std::io::Error::last_os_error());
    Ok(value)
}
