//! Connections that are open while the host goes over to the other datapath, and back.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{JoinHandle, sleep, spawn};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{Family, HOST, Node, OUTSIDE, udp, web};

use crate::case::{Case, Families, Scenario, connect};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "transfers_survive_a_switch_of_the_datapath_and_back",
        what: "nobody's connection is cut because the host's administrator chose otherwise",
        families: Families::Each,
        run: transfers_survive,
    },
    Scenario {
        name: "connections_that_are_carried_over_are_held_to_the_policy",
        what: "a connection must not outlive the policy that denies it, whoever carries it by then",
        families: Families::Each,
        run: policy_holds,
    },
];

/// How long a connection may stand still: what was lost meanwhile is sent again later each time.
const PATIENCE: Duration = Duration::from_secs(90);

/// Data that flows both ways over a connection until it is told to stop.
struct Transfer {
    name: &'static str,
    stops: Arc<AtomicBool>,
    /// What has arrived at either end.
    arrived: [Arc<AtomicU64>; 2],
    senders: Vec<JoinHandle<Result<String>>>,
    receivers: Vec<JoinHandle<Result<String>>>,
}

impl Transfer {
    fn start(name: &'static str, ends: [TcpStream; 2]) -> Result<Self> {
        let stops = Arc::new(AtomicBool::new(false));
        let arrived = [Arc::default(), Arc::default()];
        let (mut senders, mut receivers) = (Vec::new(), Vec::new());
        for (end, count) in ends.into_iter().zip(&arrived) {
            end.set_read_timeout(Some(PATIENCE))?;
            end.set_write_timeout(Some(PATIENCE))?;
            let (writes, stops) = (end.try_clone()?, stops.clone());
            senders.push(spawn(move || send(writes, &stops)));
            let count = Arc::clone(count);
            receivers.push(spawn(move || receive(end, &count)));
        }
        Ok(Self {
            name,
            stops,
            arrived,
            senders,
            receivers,
        })
    }

    /// Waits until more has arrived at both ends.
    fn goes_on(&self) -> Result<()> {
        const MORE: u64 = 1 << 16;
        for (end, count) in ["client", "server"].iter().zip(&self.arrived) {
            let before = count.load(Ordering::Relaxed);
            let what = format!("{}: more arrives at the {end}", self.name);
            until(&what, PATIENCE, || {
                Ok(count.load(Ordering::Relaxed) >= before + MORE)
            })?;
        }
        Ok(())
    }

    /// Ends it; what arrived is what was sent.
    fn finish(self) -> Result<()> {
        self.stops.store(true, Ordering::Relaxed);
        let join = |threads: Vec<JoinHandle<Result<String>>>| -> Result<Vec<String>> {
            let ends = threads.into_iter().map(|thread| {
                let result = thread.join();
                result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
            });
            ends.collect()
        };
        let sent = join(self.senders).with_context(|| format!("{}: sending", self.name))?;
        let mut got = join(self.receivers).with_context(|| format!("{}: receiving", self.name))?;
        // What one end sends arrives at the other.
        got.reverse();
        ensure!(sent == got, "{}: the data is damaged", self.name);
        Ok(())
    }
}

/// Some two hundred kilobytes a second: enough that something is under way at any moment, and little
/// enough that twenty of them leave the processor to the switch.
fn send(mut stream: TcpStream, stops: &AtomicBool) -> Result<String> {
    let mut digest = web::Digest::default();
    for piece in web::payload().chunks(1 << 12).cycle() {
        if stops.load(Ordering::Relaxed) {
            break;
        }
        stream.write_all(piece)?;
        digest.update(piece);
        sleep(Duration::from_millis(20));
    }
    stream.shutdown(Shutdown::Write)?;
    Ok(digest.finish())
}

fn receive(mut stream: TcpStream, count: &AtomicU64) -> Result<String> {
    let mut digest = web::Digest::default();
    let mut buffer = vec![0; 1 << 16];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(digest.finish()),
            length => {
                digest.update(&buffer[..length]);
                count.fetch_add(length as u64, Ordering::Relaxed);
            }
        }
    }
}

/// A connection and its server's end.
fn opened(client: &Node, to: SocketAddr, server: &TcpListener) -> Result<[TcpStream; 2]> {
    let stream = connect(client, to)?;
    let (accepted, _) = server.accept()?;
    Ok([stream, accepted])
}

/// A UDP conversation that goes on until it is told to stop.
struct Talk {
    name: &'static str,
    stops: Arc<AtomicBool>,
    answers: Arc<AtomicU64>,
    /// Whom its server took the client for.
    seen: JoinHandle<BTreeSet<SocketAddr>>,
}

impl Talk {
    fn start(case: &Case, name: &'static str, client: &Node, to: SocketAddr) -> Result<Self> {
        let socket = client.udp(case.any(0))?;
        let (stops, answers) = (
            Arc::new(AtomicBool::new(false)),
            Arc::<AtomicU64>::default(),
        );
        let (is_over, count) = (stops.clone(), answers.clone());
        let seen = spawn(move || {
            let mut seen = BTreeSet::new();
            while !is_over.load(Ordering::Relaxed) {
                // What is lost while the host goes over is asked again.
                if let Ok(answer) = udp::exchange(&socket, to, "still there?", NEVER) {
                    seen.insert(answer.peer);
                    count.fetch_add(1, Ordering::Relaxed);
                }
                sleep(Duration::from_millis(20));
            }
            seen
        });
        Ok(Self {
            name,
            stops,
            answers,
            seen,
        })
    }

    fn goes_on(&self) -> Result<()> {
        let before = self.answers.load(Ordering::Relaxed);
        until(&format!("{}: another answer", self.name), PATIENCE, || {
            Ok(self.answers.load(Ordering::Relaxed) > before + 1)
        })
    }

    /// Ends it; the client was the same all the time.
    fn finish(self) -> Result<()> {
        self.stops.store(true, Ordering::Relaxed);
        let seen = self.seen.join();
        let seen = seen.unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        ensure!(seen.len() == 1, "{}: it was seen as {seen:?}", self.name);
        Ok(())
    }
}

fn transfers_survive(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    let published = ["-p", "8080:80", "-p", "5300:5353/udp"];
    // Whatever is asked of it may be answered, and nothing else leaves.
    let closed = [&published[..], &["--egress-default", "deny"]].concat();
    let (web, endpoint) = case.attached("web", &closed)?;
    let (client, other) = case.attached("client", &[])?;
    let (outside, host) = (&case.lab.outside, &case.lab.host);
    let (inside, gateway) = (endpoint.address(family)?, endpoint.gateway(family)?);
    let (ext, int) = (HOST.of(family).to_string(), inside.to_string());
    let dnat = [
        "nat", "add", "dnat", "--ext-ip", &ext, "--ports", "9090", "--int-ip", &int,
    ];
    let dnat = [&dnat[..], &["--int-port", "80"]].concat();
    case.lab.nucnet(&dnat)?.expect(0)?;

    let in_web = web.listen(case.any(80))?;
    let in_client = client.listen(case.any(81))?;
    let beyond = outside.listen(case.any(80))?;
    let on_host = host.listen(case.any(81))?;
    let _listeners = [case.udp(outside, 5353)?, case.udp(&web, 5353)?];

    let publish = HOST.port(family, 8080);
    let ways = [
        ("remote client to publish", outside, publish, &in_web),
        (
            "remote client to mapping",
            outside,
            HOST.port(family, 9090),
            &in_web,
        ),
        (
            "endpoint to outside",
            &client,
            OUTSIDE.port(family, 80),
            &beyond,
        ),
        ("sibling", &client, SocketAddr::new(inside, 80), &in_web),
        ("sibling to publish", &client, publish, &in_web),
        ("host to publish", host, publish, &in_web),
        (
            "host to endpoint",
            host,
            SocketAddr::new(other.address(family)?, 81),
            &in_client,
        ),
        (
            "endpoint to host",
            &client,
            SocketAddr::new(gateway, 81),
            &on_host,
        ),
    ];
    let mut transfers = Vec::new();
    for (name, from, to, server) in ways {
        let ends = opened(from, to, server).context(name)?;
        transfers.push(Transfer::start(name, ends)?);
    }
    if family == Family::V4 {
        // The kernel carries nothing to ::1.
        let to = SocketAddr::new(family.loopback(), 8080);
        let ends = opened(host, to, &in_web).context("loopback")?;
        transfers.push(Transfer::start("host to publish by loopback", ends)?);
    }
    let talks = [
        Talk::start(
            case,
            "endpoint to outside by UDP",
            &client,
            OUTSIDE.port(family, 5353),
        )?,
        Talk::start(
            case,
            "remote client by UDP",
            outside,
            HOST.port(family, 5300),
        )?,
    ];
    let [first, other] = case.both()?;
    for datapath in [other, first] {
        for transfer in &transfers {
            transfer.goes_on()?;
        }
        for talk in &talks {
            talk.goes_on()?;
        }
        case.switch_to(datapath)?;
        for transfer in &transfers {
            let went_on = transfer.goes_on();
            went_on.with_context(|| format!("gone over to {datapath}"))?;
        }
        for talk in &talks {
            talk.goes_on()
                .with_context(|| format!("gone over to {datapath}"))?;
        }
    }
    talks.into_iter().try_for_each(Talk::finish)?;
    transfers.into_iter().try_for_each(Transfer::finish)
}

/// That what is said at one end arrives at the other.
fn says([from, to]: &mut [TcpStream; 2]) -> Result<()> {
    let mut said = [0; 5];
    from.write_all(b"hello")?;
    to.set_read_timeout(Some(SOON))?;
    to.read_exact(&mut said)?;
    Ok(())
}

/// That nothing arrives any more.
fn is_cut([from, to]: &mut [TcpStream; 2]) -> Result<()> {
    // The host may have reset it by now, which is as good.
    let _ = from.write_all(b"hello");
    to.set_read_timeout(Some(NEVER))?;
    let heard = to.read(&mut [0; 5]);
    ensure!(!matches!(heard, Ok(1..)), "it goes on");
    Ok(())
}

fn policy_holds(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let server = case.lab.outside.listen(case.any(80))?;
    let to = OUTSIDE.port(case.family, 80);
    let mut connections = Vec::new();
    for _ in 0..2 {
        connections.push(opened(&client, to, &server)?);
    }
    let deny = ["egress", "set", "client", "--deny", "any:80/tcp"];
    let [first, other] = case.both()?;
    case.switch_to(other)?;
    for connection in &mut connections {
        says(connection)?;
    }
    case.lab
        .nucnet(&[&["--datapath", "auto"], &deny[..]].concat())?
        .expect(0)?;
    is_cut(&mut connections[0]).with_context(|| format!("by {other}"))?;
    case.switch_to(first)?;
    for connection in &mut connections {
        is_cut(connection).with_context(|| format!("back by {first}"))?;
    }
    Ok(())
}
