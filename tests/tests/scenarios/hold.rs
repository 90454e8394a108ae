//! Published ports are taken, and ports that are taken cannot be published (trap 21).

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};
use nix::libc::EADDRINUSE;
use nucnet_ctl::kernel::bpf::Host;
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{HOST, LAN_SERVER, Node, udp};
use socket2::{Domain, Type};

use crate::case::{Case, Families, Scenario, refused, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "host_socket_cannot_bind_a_published_port",
        what: "a service that starts after the container would take its clients",
        families: Families::Each,
        run: published,
    },
    Scenario {
        name: "host_socket_cannot_bind_a_port_published_on_one_of_its_addresses",
        what: "as with a real socket: there and for any address, elsewhere it can",
        families: Families::Each,
        run: published_on_one,
    },
    Scenario {
        name: "port_held_for_two_containers_is_free_after_both",
        what: "one port on two addresses for two containers",
        families: Families::Together,
        run: held_for_two,
    },
    Scenario {
        name: "host_socket_cannot_bind_a_mapped_port",
        what: "a service that starts after the mapping would take its clients",
        families: Families::Each,
        run: mapped,
    },
    Scenario {
        name: "container_binds_what_the_host_has_published",
        what: "only the host's own sockets are in the way",
        families: Families::Each,
        run: container,
    },
    Scenario {
        name: "port_of_a_host_socket_cannot_be_published",
        what: "the service was there first: the error names it",
        families: Families::Each,
        run: taken,
    },
];

/// Whether a socket of the machine's gets an address and port.
fn binds(node: &Node, kind: Type, at: SocketAddr, share: bool) -> Result<bool> {
    let socket = node.socket(Domain::for_address(at), kind, None)?;
    if at.is_ipv6() {
        socket.set_only_v6(true)?;
    }
    socket.set_reuse_address(share)?;
    socket.set_reuse_port(share)?;
    match socket.bind(&at.into()) {
        Ok(()) => Ok(true),
        Err(error) if error.raw_os_error() == Some(EADDRINUSE) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// That sockets of both protocols get an address and port, or do not. One that was closed just now
/// may still be open in a program that another thread is starting.
fn expect(node: &Node, address: IpAddr, port: u16, expected: bool) -> Result<()> {
    for kind in [Type::STREAM, Type::DGRAM] {
        for share in [false, true] {
            let at = SocketAddr::new(address, port);
            let what = format!("{at} {kind:?}, sharing {share}: expected {expected}");
            match expected {
                true => until(&what, SOON, || binds(node, kind, at, share))?,
                false => ensure!(!binds(node, kind, at, share)?, "{what}"),
            }
        }
    }
    Ok(())
}

/// That a program is asked before a socket of the host binds, wherever programs are the datapath.
fn ports_are_held(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    if case.is_by_programs() && Host::current()?.netns_cookie == 0 {
        return skip("this kernel does not tell programs whose sockets bind (before Linux 5.14)");
    }
    Ok(())
}

fn published(case: &Case) -> Result<()> {
    ports_are_held(case)?;
    let publishes = ["-p", "8080-8081:80-81", "-p", "8080-8081:80-81/udp"];
    let (_web, endpoint) = case.attached("web", &publishes)?;
    let (family, host) = (case.family, &case.lab.host);
    let own = [
        family.any(),
        family.loopback(),
        HOST.of(family),
        endpoint.gateway(family)?,
    ];
    for address in own {
        expect(host, address, 8080, false)?;
        expect(host, address, 8081, false)?;
        expect(host, address, 8082, true)?;
        expect(host, address, 0, true)?;
    }
    let words = ["unpublish", "web", "8080-8081:80-81", "8080-8081:80-81/udp"];
    case.lab.nucnet(&words)?.expect(0)?;
    for address in own {
        expect(host, address, 8080, true)?;
    }
    Ok(())
}

fn published_on_one(case: &Case) -> Result<()> {
    ports_are_held(case)?;
    let (family, host) = (case.family, &case.lab.host);
    let at = SocketAddr::new(family.loopback(), 8080);
    let (tcp, udp) = (format!("{at}:80"), format!("{at}:80/udp"));
    case.attached("web", &["-p", &tcp, "-p", &udp])?;
    expect(host, family.loopback(), 8080, false)?;
    expect(host, family.any(), 8080, false)?;
    expect(host, HOST.of(family), 8080, true)?;
    // A service of the host's own beside it serves its own address.
    let _server = case.web_at(host, HOST.port(family, 8080))?;
    case.who(&case.lab.outside, HOST.port(family, 8080))?;
    case.lab.nucnet(&["detach", "web"])?.expect(0)?;
    expect(host, family.loopback(), 8080, true)
}

fn held_for_two(case: &Case) -> Result<()> {
    ports_are_held(case)?;
    let host = &case.lab.host;
    let any = case.family.any();
    case.attached(
        "one",
        &["-p", "127.0.0.1:8080:80", "-p", "127.0.0.1:8080:80/udp"],
    )?;
    case.attached(
        "two",
        &["-p", "192.0.2.2:8080:80", "-p", "192.0.2.2:8080:80/udp"],
    )?;
    for id in ["two", "one"] {
        expect(host, any, 8080, false)?;
        case.lab.nucnet(&["detach", id])?.expect(0)?;
    }
    expect(host, any, 8080, true)?;
    // And the other way round.
    case.attached(
        "three",
        &["-p", "127.0.0.1:8080:80", "-p", "127.0.0.1:8080:80/udp"],
    )?;
    case.attached(
        "four",
        &["-p", "192.0.2.2:8080:80", "-p", "192.0.2.2:8080:80/udp"],
    )?;
    for id in ["three", "four"] {
        expect(host, any, 8080, false)?;
        case.lab.nucnet(&["detach", id])?.expect(0)?;
    }
    expect(host, any, 8080, true)
}

fn mapped(case: &Case) -> Result<()> {
    ports_are_held(case)?;
    let _lan = case.lab.lan()?;
    let (family, host) = (case.family, &case.lab.host);
    let (ext, int) = (HOST.of(family), LAN_SERVER.of(family));
    for proto in ["tcp", "udp"] {
        let words = format!("nat add dnat --ext-ip {ext} --ports 8080 --int-ip {int} --proto");
        let words: Vec<_> = words.split(' ').chain([proto]).collect();
        case.lab.nucnet(&words)?.expect(0)?;
    }
    for (address, is_free) in [
        (family.any(), false),
        (ext, false),
        (family.loopback(), true),
    ] {
        expect(host, address, 8080, is_free)?;
        expect(host, address, 8081, true)?;
    }
    // A publish of another address holds the port for any address as well, for as long as it has it.
    let at = SocketAddr::new(family.loopback(), 8080);
    let (tcp, udp) = (format!("{at}:80"), format!("{at}:80/udp"));
    case.attached("web", &["-p", &tcp, "-p", &udp])?;
    case.lab.nucnet(&["nat", "clear"])?.expect(0)?;
    expect(host, family.any(), 8080, false)?;
    expect(host, ext, 8080, true)?;
    case.lab.nucnet(&["detach", "web"])?.expect(0)?;
    expect(host, family.any(), 8080, true)
}

fn container(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (web, _) = case.attached("web", &["-p", "8080:8080", "-p", "8080:8080/udp"])?;
    expect(&web, case.family.any(), 8080, true)?;
    expect(&case.lab.outside, case.family.any(), 8080, true)
}

fn taken(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    let server = case.web(&case.lab.host, 8080)?;
    let udp_server = case.udp(&case.lab.host, 5300)?;
    let container = case.lab.container("web")?;
    let pid = container.pid().to_string();
    for spec in ["8080:80", "5300:53/udp", "8000-8999:8000-8999"] {
        let outcome = case.lab.nucnet(&["attach", "--pid", &pid, "-p", spec])?;
        let outcome = outcome.expect(4)?;
        ensure!(
            outcome.stderr.contains("process"),
            "it names no owner\n{outcome}"
        );
    }
    case.who(&case.lab.host, SocketAddr::new(family.loopback(), 8080))?;
    let socket = case.lab.host.udp(case.any(0))?;
    let to = SocketAddr::new(family.loopback(), 5300);
    udp::exchange(&socket, to, "who", SOON)?;
    drop((server, udp_server));
    // A program that another thread is starting may have copies of them for a moment.
    until("the host's sockets are gone", SOON, || {
        Ok(binds(&case.lab.host, Type::STREAM, case.any(8080), true)?
            && binds(&case.lab.host, Type::DGRAM, case.any(5300), true)?)
    })?;
    case.attach(&container, &["-p", "8080:80", "-p", "5300:53/udp"])?;
    refused(&case.lab.host, SocketAddr::new(family.loopback(), 8080))
}
