//! Programs that people use, through every path: much data both ways, whole, and small tools.

use std::io::{Read, Write};
use std::net::{SocketAddr, UdpSocket};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, Node, OUTSIDE, web};

use crate::case::{Case, Families, Scenario, has, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "curl_moves_10_mb_each_way_through_every_path_with_offloads",
        what: "publish from outside, host and sibling, and masquerade: the hashes are equal",
        families: Families::Each,
        run: |case| curl(case, 10_000_000, true),
    },
    Scenario {
        name: "curl_moves_10_mb_each_way_through_every_path_without_offloads",
        what: "the same, one packet at a time",
        families: Families::Each,
        run: |case| curl(case, 10_000_000, false),
    },
    Scenario {
        name: "iperf3_measures_both_directions_by_publish_and_masquerade",
        what: "what everybody measures with, by TCP and UDP",
        families: Families::Each,
        run: iperf3,
    },
    Scenario {
        name: "dig_asks_servers_beyond_and_behind_the_host",
        what: "the resolver's own questions, with EDNS and cookies",
        families: Families::Each,
        run: dig,
    },
    Scenario {
        name: "traceroute_from_a_container_shows_the_gateway_and_the_target",
        what: "by UDP and by ICMP, errors translated back",
        families: Families::Each,
        run: traceroute,
    },
];

/// Those that take long.
pub(crate) const SLOW: &[Scenario] = &[
    Scenario {
        name: "curl_moves_100_mb_each_way_through_every_path_with_offloads",
        what: "as with 10 MB, for sequence numbers and timers that only much data reaches",
        families: Families::Each,
        run: |case| curl(case, 100_000_000, true),
    },
    Scenario {
        name: "curl_moves_100_mb_each_way_through_every_path_without_offloads",
        what: "the same, one packet at a time",
        families: Families::Each,
        run: |case| curl(case, 100_000_000, false),
    },
];

fn needs(program: &str) -> Result<()> {
    match has(program) {
        true => Ok(()),
        false => skip(&format!("there is no program {program} here")),
    }
}

/// Bytes of [`web::payload`], again and again.
fn repeated(mut length: usize) -> impl Iterator<Item = &'static [u8]> {
    std::iter::from_fn(move || {
        let part = &web::payload()[..length.min(web::LARGEST)];
        length -= part.len();
        (!part.is_empty()).then_some(part)
    })
}

fn curl(case: &Case, size: usize, offloads: bool) -> Result<()> {
    case.translates()?;
    let (container, _) = case.attached("container", &["-p", "8080:80"])?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let (outside, host) = (&case.lab.outside, &case.lab.host);
    if !offloads {
        needs("ethtool")?;
        for (node, link) in [
            (&container, "eth0"),
            (&sibling, "eth0"),
            (outside, "eth0"),
            (host, "eth0"),
            (host, "lo"),
        ] {
            let off = ["-K", link, "tso", "off", "gso", "off", "gro", "off"];
            node.run("ethtool", &off)?;
        }
    }
    let _inside = case.web(&container, 80)?;
    let _remote = case.web(outside, 80)?;
    let mut file = tempfile::NamedTempFile::new()?;
    let mut digest = web::Digest::default();
    for part in repeated(size) {
        file.write_all(part)?;
        digest.update(part);
    }
    let expected = digest.finish();
    let file = file.path().to_str().context("a path that is no text")?;

    let publish = HOST.port(case.family, 8080);
    let loopback = SocketAddr::new(case.family.loopback(), 8080);
    for (path, client, to) in [
        ("remote client to publish", outside, publish),
        (
            "endpoint to remote server",
            &container,
            OUTSIDE.port(case.family, 80),
        ),
        ("sibling to publish", &sibling, publish),
        ("host to publish", host, publish),
        ("host to publish by loopback", host, loopback),
    ] {
        let url = format!("http://{to}/bytes/{size}");
        let arrived = downloaded(client, &url).with_context(|| format!("{path}: download"))?;
        ensure!(arrived == expected, "{path}: the download is damaged");
        let words = ["-sSfg", "-m", "120", "-T", file, &url];
        let arrived = client.run("curl", &words);
        let arrived = arrived.with_context(|| format!("{path}: upload"))?;
        ensure!(arrived == expected, "{path}: the upload is damaged");
    }
    Ok(())
}

/// The SHA-256 of what curl prints.
pub(crate) fn downloaded(client: &Node, url: &str) -> Result<String> {
    let mut child = client
        .command("curl")
        .args(["-sSfg", "-m", "120", url])
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdout = child.stdout.take().context("no pipe")?;
    let mut digest = web::Digest::default();
    let mut buffer = vec![0; 256 << 10];
    loop {
        match stdout.read(&mut buffer)? {
            0 => break,
            length => digest.update(&buffer[..length]),
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "curl: {status}");
    Ok(digest.finish())
}

fn iperf3(case: &Case) -> Result<()> {
    case.translates()?;
    needs("iperf3")?;
    let published = ["-p", "5201:5201", "-p", "5201:5201/udp"];
    let (container, _) = case.attached("container", &published)?;
    for (path, client, server, to) in [
        ("publish", &case.lab.outside, &container, HOST),
        ("masquerade", &container, &case.lab.outside, OUTSIDE),
    ] {
        let to = to.of(case.family).to_string();
        for more in [
            &["-n", "10M"][..],
            &["-n", "10M", "-R"],
            &["-n", "1M", "-u", "-b", "50M"],
            &["-n", "1M", "-u", "-b", "50M", "-R"],
        ] {
            // Ends with its one client.
            let mut serving = server
                .command("iperf3")
                .args(["-s", "-1", "-p", "5201"])
                .stdout(Stdio::null())
                .spawn()?;
            let listens = until("iperf3 listens", SOON, || listens(server, 5201));
            let arguments = [&["-J", "-c", &to, "-p", "5201"][..], more].concat();
            let report = listens.and_then(|()| client.run("iperf3", &arguments));
            if report.is_err() {
                let _ = serving.kill();
            }
            serving.wait()?;
            let report = report.with_context(|| format!("{path} {more:?}"))?;
            let report: serde_json::Value = serde_json::from_str(&report)?;
            let end = &report["end"];
            let sum = match end["sum_received"].is_object() {
                true => &end["sum_received"],
                false => &end["sum"],
            };
            let bytes = sum["bytes"].as_u64().unwrap_or(0);
            ensure!(bytes > 0, "{path} {more:?}: nothing arrived: {end}");
        }
    }
    Ok(())
}

/// Whether anybody of a machine listens on a TCP port.
fn listens(node: &Node, port: u16) -> Result<bool> {
    let text = node.run("ss", &["-Hltn", &format!("sport = :{port}")])?;
    Ok(!text.trim().is_empty())
}

fn dig(case: &Case) -> Result<()> {
    case.translates()?;
    needs("dig")?;
    let (container, _) = case.attached("container", &["-p", "5300:53/udp"])?;
    for (path, client, server, to) in [
        (
            "masquerade",
            &container,
            &case.lab.outside,
            OUTSIDE.port(case.family, 53),
        ),
        (
            "publish",
            &case.lab.outside,
            &container,
            HOST.port(case.family, 5300),
        ),
    ] {
        let socket = server.udp(case.any(53))?;
        socket.set_read_timeout(Some(SOON))?;
        let (at, port) = (format!("@{}", to.ip()), to.port().to_string());
        let words = [
            at.as_str(),
            "-p",
            &port,
            "+short",
            "+tries=1",
            "+time=3",
            "name.example",
            "A",
        ];
        let answer = std::thread::scope(|scope| {
            let serving = scope.spawn(|| answer_dns(&socket));
            let answer = client.run("dig", &words);
            serving.join().map_err(|_| anyhow::anyhow!("a panic"))??;
            answer
        });
        let answer = answer.with_context(|| path.to_owned())?;
        ensure!(answer.trim() == "203.0.113.9", "{path}: {answer}");
    }
    Ok(())
}

/// Answers one question (RFC 1035) with 203.0.113.9, whatever it is.
fn answer_dns(socket: &UdpSocket) -> Result<()> {
    let mut bytes = [0; 1500];
    let (length, client) = socket.recv_from(&mut bytes).context("no question came")?;
    let name = bytes[12..length].iter().position(|&byte| byte == 0);
    // Name, its end, type and class.
    let end = 12 + name.context("no name")? + 5;
    let mut answer = bytes[..end].to_vec();
    // An answer without error; one question, one record, nothing else.
    answer[2..12].copy_from_slice(&[0x81, 0x80, 0, 1, 0, 1, 0, 0, 0, 0]);
    // The question's name, type A, class IN, 60 seconds, 4 bytes.
    answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 203, 0, 113, 9]);
    socket.send_to(&answer, client)?;
    Ok(())
}

fn traceroute(case: &Case) -> Result<()> {
    case.translates()?;
    needs("traceroute")?;
    let (container, endpoint) = case.attached("container", &[])?;
    let family = match case.family {
        Family::V4 => "-4",
        Family::V6 => "-6",
    };
    let (gateway, target) = (endpoint.gateway(case.family)?, FAR.of(case.family));
    for way in ["-U", "-I"] {
        let to = target.to_string();
        let words = [family, "-n", "-q", "3", "-w", "2", "-m", "4", way, &to];
        let text = container.run("traceroute", &words)?;
        let hops: Vec<_> = text.lines().skip(1).collect();
        let shows = |hop: usize, address: String| {
            hops.get(hop)
                .is_some_and(|line| line.split_whitespace().any(|word| word == address))
        };
        ensure!(
            shows(0, gateway.to_string()),
            "{way}: no {gateway}:\n{text}"
        );
        ensure!(shows(1, to.clone()), "{way}: no {to}:\n{text}");
    }
    Ok(())
}
