//! What a transaction costs, on the lab's wires, by each way of connecting a container.
//!
//! Client and server run on one CPU. There the kernel's own work for their packets is charged to
//! them (or to `ksoftirqd`), so CPU run time per transaction is the whole path and other programs
//! on the machine hardly move it. A kernel with `CONFIG_IRQ_TIME_ACCOUNTING` keeps that work
//! apart: there the elapsed time of the busy CPU has to do.

pub mod gate;
pub mod slots;
pub mod worker;

use std::fmt;
use std::io::{BufRead, BufReader, Write};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::time::{ClockId, clock_gettime};
use nix::unistd::Pid;

use crate::lab::seeds::{Forward, Rules};
use crate::lab::{Family, HOST, Lab, Node, OUTSIDE, peer_program};

/// What a transaction is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Request and response of one byte each, on one connection.
    Rr,
    /// Connect, request, response, close.
    Crr,
}

impl Kind {
    fn from_name(name: &str) -> Option<Self> {
        [Self::Rr, Self::Crr]
            .into_iter()
            .find(|kind| kind.to_string() == name)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Rr => "rr",
            Self::Crr => "crr",
        })
    }
}

/// Who connects.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// A remote client to the container's publish.
    In,
    /// A client in the container to a remote server.
    Out,
}

/// How the container is connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// Not at all: the host itself is client and server, on the same wire.
    Limit,
    /// Plain routing or iptables.
    Seeds(Rules),
    /// nucnet.
    Nucnet,
}

impl fmt::Display for Way {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Limit => "limit",
            Self::Seeds(Rules::Routed) => "routed",
            Self::Seeds(Rules::IptablesLegacy) => "iptables-legacy",
            Self::Seeds(Rules::IptablesNft) => "iptables-nft",
            Self::Nucnet => "nucnet",
        })
    }
}

/// One measurement.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// How many transactions.
    pub transactions: u64,
    /// CPU run time of client, server and `ksoftirqd`.
    pub cpu: Duration,
    /// Time from the first to the last.
    pub elapsed: Duration,
}

/// A lab with one container connected in one way, and clients and servers at both ends.
#[derive(Debug)]
pub struct Track {
    inbound: Pair,
    outbound: Pair,
    _container: Node,
    _lab: Lab,
}

impl Track {
    /// Builds one; its clients and servers will run on a CPU.
    ///
    /// # Errors
    /// A command or nucnet fails.
    pub fn new(way: Way, family: Family, cpu: usize) -> Result<Self> {
        const PORT: u16 = 80;
        const HOST_PORT: u16 = 8080;
        const REMOTE_PORT: u16 = 9000;
        let lab = Lab::new()?;
        let container = lab.container("container")?;
        let forward = Forward {
            protocol: "tcp",
            host_port: HOST_PORT,
            port: PORT,
        };
        let entrance = match way {
            Way::Limit => HOST.port(family, PORT),
            Way::Seeds(rules) => {
                lab.seeds().prepare(&lab)?;
                let forwards = match rules {
                    Rules::Routed => {
                        lab.seeds().route_back(&lab)?;
                        &[][..]
                    }
                    Rules::IptablesLegacy | Rules::IptablesNft => &[forward],
                };
                let endpoint = lab
                    .seeds()
                    .attach(&lab, &container, rules, &[family], forwards)?;
                lab.seeds().settle(&lab, &container, &endpoint)?;
                match rules {
                    Rules::Routed => SocketAddr::new(endpoint.address(family)?, PORT),
                    _ => HOST.port(family, HOST_PORT),
                }
            }
            Way::Nucnet => {
                lab.attach(&container, &["-p", &format!("{HOST_PORT}:{PORT}")])?;
                HOST.port(family, HOST_PORT)
            }
        };
        let inside = match way {
            Way::Limit => &lab.host,
            Way::Seeds(_) | Way::Nucnet => &container,
        };
        for client in [&lab.outside, inside] {
            // So that connects never run out of ports.
            client.sysctl("net/ipv4/tcp_tw_reuse", "1")?;
            client.sysctl("net/ipv4/ip_local_port_range", "10000 65535")?;
        }
        let any = |port| SocketAddr::new(family.any(), port);
        let remote = OUTSIDE.port(family, REMOTE_PORT);
        Ok(Self {
            inbound: Pair::start(inside, any(PORT), &lab.outside, entrance, cpu)?,
            outbound: Pair::start(&lab.outside, any(REMOTE_PORT), inside, remote, cpu)?,
            _container: container,
            _lab: lab,
        })
    }

    /// Measures for as long as given.
    ///
    /// # Errors
    /// A transaction fails.
    pub fn sample(&mut self, direction: Direction, kind: Kind, time: Duration) -> Result<Sample> {
        match direction {
            Direction::In => self.inbound.sample(kind, time),
            Direction::Out => self.outbound.sample(kind, time),
        }
    }
}

/// A server and its client.
#[derive(Debug)]
struct Pair {
    server: Child,
    client: Child,
    orders: Option<ChildStdin>,
    answers: BufReader<ChildStdout>,
    softirqs: Option<Pid>,
}

impl Pair {
    fn start(
        server: &Node,
        listen: SocketAddr,
        client: &Node,
        target: SocketAddr,
        cpu: usize,
    ) -> Result<Self> {
        let start = |node: &Node, role: &str, address: SocketAddr| -> Result<_> {
            let mut child = node
                .command(peer_program()?)
                .args([role, &address.to_string(), "--cpu", &cpu.to_string()])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn()
                .with_context(|| format!("starting a {role}"))?;
            let out = child.stdout.take().context("no pipe")?;
            Ok((child, BufReader::new(out)))
        };
        let (server, mut ready) = start(server, "serve", listen)?;
        let (mut client, answers) = start(client, "drive", target)?;
        let orders = client.stdin.take();
        let pair = Self {
            server,
            client,
            orders,
            answers,
            softirqs: ksoftirqd(cpu),
        };
        let mut line = String::new();
        ready.read_line(&mut line)?;
        ensure!(
            line.trim() == worker::READY,
            "the server on {listen} did not start"
        );
        Ok(pair)
    }

    fn sample(&mut self, kind: Kind, time: Duration) -> Result<Sample> {
        let before = self.cpu()?;
        let orders = self.orders.as_mut().context("no pipe")?;
        writeln!(orders, "{kind} {}", time.as_millis())?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        let cpu = self.cpu()?.saturating_sub(before);
        let parse = || {
            let (transactions, elapsed) = line.trim().split_once(' ')?;
            Some((transactions.parse().ok()?, elapsed.parse().ok()?))
        };
        let Some((transactions, elapsed)) = parse() else {
            bail!("the client gave up: its reason is above, or it waited for an answer in vain")
        };
        ensure!(transactions > 0, "not one transaction in {time:?}");
        Ok(Sample {
            transactions,
            cpu,
            elapsed: Duration::from_nanos(elapsed),
        })
    }

    /// CPU run time so far.
    fn cpu(&self) -> Result<Duration> {
        let mut total = Duration::ZERO;
        let own = [&self.server, &self.client].map(|child| i32::try_from(child.id()));
        let own = own.into_iter().collect::<Result<Vec<_>, _>>()?;
        for pid in own.into_iter().map(Pid::from_raw).chain(self.softirqs) {
            let clock =
                ClockId::pid_cpu_clock_id(pid).with_context(|| format!("process {pid} is gone"))?;
            total += Duration::from(clock_gettime(clock)?);
        }
        Ok(total)
    }
}

impl Drop for Pair {
    fn drop(&mut self) {
        self.orders.take();
        self.server.stdin.take();
        let _ = (self.client.wait(), self.server.wait());
    }
}

/// The kernel thread that works off what interrupts leave undone on a CPU.
fn ksoftirqd(cpu: usize) -> Option<Pid> {
    let name = format!("ksoftirqd/{cpu}");
    let entries = std::fs::read_dir("/proc").ok()?;
    let found = entries.flatten().find(|entry| {
        std::fs::read_to_string(entry.path().join("comm")).is_ok_and(|comm| comm.trim() == name)
    });
    found?.file_name().to_str()?.parse().ok().map(Pid::from_raw)
}
