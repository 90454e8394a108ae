//! Much at once.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{HOST, Node, OUTSIDE, web};

use crate::case::{Case, Families, Scenario, connect, has, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "large_transfers_arrive_whole_with_offloads",
        what: "20 MB each way by publish and by masquerade: GSO and partial checksums",
        families: Families::Each,
        run: transfers_with_offloads,
    },
    Scenario {
        name: "large_transfers_arrive_whole_without_offloads",
        what: "the same, one packet of the wire's size at a time, with full checksums",
        families: Families::Each,
        run: transfers_without_offloads,
    },
    Scenario {
        name: "a_thousand_connections_stand_side_by_side",
        what: "inbound and outbound, all open at once, none mixed up",
        families: Families::Each,
        run: thousand,
    },
];

const SIZE: usize = 20_000_000;

fn transfers_with_offloads(case: &Case) -> Result<()> {
    let (container, _) = case.attached("container", &["-p", "8080:80"])?;
    transfers(case, &container)
}

fn transfers_without_offloads(case: &Case) -> Result<()> {
    if !has("ethtool") {
        return skip("there is no program ethtool here");
    }
    let (container, _) = case.attached("container", &["-p", "8080:80"])?;
    let off = [
        "tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off",
    ];
    for (node, link) in [
        (&container, "eth0"),
        (&case.lab.outside, "eth0"),
        (&case.lab.host, "eth0"),
    ] {
        let mut words = vec!["-K", link];
        words.extend(off);
        node.run("ethtool", &words)?;
    }
    transfers(case, &container)?;
    for node in [&container, &case.lab.outside] {
        let errors = node.within(checksum_errors)?;
        ensure!(
            errors == 0,
            "{} received {errors} wrong TCP checksums",
            node.name()
        );
    }
    Ok(())
}

/// `InCsumErrors` of TCP in this thread's namespace.
fn checksum_errors() -> u64 {
    let text = std::fs::read_to_string("/proc/thread-self/net/snmp").unwrap_or_default();
    let mut lines = text.lines().filter(|line| line.starts_with("Tcp:"));
    let (names, values) = (
        lines.next().unwrap_or_default(),
        lines.next().unwrap_or_default(),
    );
    let column = names.split(' ').position(|name| name == "InCsumErrors");
    column
        .and_then(|column| values.split(' ').nth(column)?.parse().ok())
        .unwrap_or(u64::MAX)
}

fn transfers(case: &Case, container: &Node) -> Result<()> {
    let _inside = case.web(container, 80)?;
    let _outside = case.web(&case.lab.outside, 80)?;
    let body = &web::payload()[..SIZE];
    let expected = web::sha256(body);
    for (way, client, to) in [
        ("publish", &case.lab.outside, HOST.port(case.family, 8080)),
        ("masquerade", container, OUTSIDE.port(case.family, 80)),
    ] {
        let download = web::get(connect(client, to)?, &format!("/bytes/{SIZE}"))
            .with_context(|| format!("{way}: download"))?;
        ensure!(
            web::sha256(&download) == expected,
            "{way}: the download is damaged"
        );
        let upload =
            web::put(connect(client, to)?, body).with_context(|| format!("{way}: upload"))?;
        ensure!(upload == expected, "{way}: the upload is damaged");
    }
    Ok(())
}

fn thousand(case: &Case) -> Result<()> {
    let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, hard) = nix::sys::resource::getrlimit(limit)?;
    nix::sys::resource::setrlimit(limit, hard, hard)?;
    if hard < 10_000 {
        return skip("4,000 descriptors a lab need a higher limit (ulimit -Hn)");
    }
    let (container, _) = case.attached("container", &["-p", "8080:80"])?;
    let inside = container.listen(case.any(80))?;
    let outside = case.lab.outside.listen(case.any(80))?;
    stand(&case.lab.outside, HOST.port(case.family, 8080), &inside).context("inbound")?;
    stand(&container, OUTSIDE.port(case.family, 80), &outside).context("outbound")
}

fn stand(client: &Node, to: SocketAddr, listener: &TcpListener) -> Result<()> {
    let mut pairs = Vec::new();
    for number in 0_u32..1000 {
        let mut stream = client
            .connect(to, SOON)
            .with_context(|| format!("connection {number}"))?;
        stream.write_all(&number.to_be_bytes())?;
        listener.set_nonblocking(true)?;
        let mut accepted = None;
        until("the server accepts it", SOON, || {
            accepted = listener.accept().ok();
            Ok(accepted.is_some())
        })?;
        let (server, _) = accepted.context("not accepted")?;
        server.set_nonblocking(false)?;
        server.set_read_timeout(Some(Duration::from_secs(5)))?;
        pairs.push((stream, server));
    }
    for (number, (client, server)) in pairs.iter_mut().enumerate() {
        let mut bytes = [0; 4];
        server
            .read_exact(&mut bytes)
            .with_context(|| format!("connection {number}"))?;
        ensure!(
            u32::from_be_bytes(bytes) as usize == number,
            "connection {number} is another"
        );
        server.write_all(&bytes)?;
        client
            .read_exact(&mut bytes)
            .with_context(|| format!("answer {number}"))?;
        ensure!(
            u32::from_be_bytes(bytes) as usize == number,
            "answer {number} is another"
        );
    }
    Ok(())
}
