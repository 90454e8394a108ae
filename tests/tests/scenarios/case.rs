//! What every scenario gets, and small words that they share.

use std::io::{self, ErrorKind};
use std::net::{IpAddr, SocketAddr, TcpStream};

use crate::differences;
use anyhow::{Context, Result, bail, ensure};
use nucnet_tests::lab::seeds::{Forward, Rules};
use nucnet_tests::lab::wait::{NEVER, SOON};
use nucnet_tests::lab::{Endpoint, Family, Lab, Node, udp, web};

/// One row of the list.
pub(crate) struct Scenario {
    /// A sentence that is true.
    pub(crate) name: &'static str,
    /// For whom it matters, or what breaks if it is not.
    pub(crate) what: &'static str,
    pub(crate) families: Families,
    pub(crate) run: fn(&Case) -> Result<()>,
}

/// How often a scenario runs.
pub(crate) enum Families {
    /// Once for IPv4, once for IPv6.
    Each,
    /// Once: it is about neither, or about both at once.
    Together,
}

/// Who connects the containers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    Nucnet(Datapath),
    Seeds(Rules),
}

/// What of nucnet carries packets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Datapath {
    Ebpf,
    Iptables,
}

impl Datapath {
    pub(crate) const ALL: [Self; 2] = [Self::Ebpf, Self::Iptables];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        }
    }
}

impl Way {
    /// The ways that the list is held to.
    pub(crate) fn chosen() -> Result<Vec<Self>> {
        let seeds = |rules| Ok(vec![Self::Seeds(rules)]);
        match std::env::var("NUCNET_LAB_WAY").as_deref() {
            Err(_) | Ok("nucnet") => {
                let all = Datapath::ALL.into_iter();
                match std::env::var("NUCNET_DATAPATH").as_deref() {
                    Err(_) | Ok("auto") => Ok(all.map(Self::Nucnet).collect()),
                    Ok(name) => Ok(all.filter(|d| d.name() == name).map(Self::Nucnet).collect()),
                }
            }
            Ok("iptables") => seeds(Rules::IptablesNft),
            Ok("iptables-legacy") => seeds(Rules::IptablesLegacy),
            Ok("routed") => seeds(Rules::Routed),
            Ok(other) => {
                bail!("NUCNET_LAB_WAY={other}: known are nucnet, iptables, iptables-legacy, routed")
            }
        }
    }
}

/// Why a scenario cannot run.
#[derive(Debug)]
pub(crate) struct Skip(pub(crate) String);

impl std::fmt::Display for Skip {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for Skip {}

/// A fresh lab and what it is to be tested for.
pub(crate) struct Case {
    pub(crate) lab: Lab,
    pub(crate) way: Way,
    pub(crate) family: Family,
}

impl Case {
    pub(crate) fn new(way: Way, family: Family) -> Result<Self> {
        let mut lab = Lab::new()?;
        if let Way::Nucnet(datapath) = way {
            lab.datapath = Some(datapath.name());
        }
        if let Way::Seeds(rules) = way {
            lab.seeds().prepare(&lab)?;
            if rules == Rules::Routed {
                lab.seeds().route_back(&lab)?;
            }
        }
        Ok(Self { lab, way, family })
    }

    /// Makes a network: the words of `nucnet-ctl network create`, separated by blanks.
    pub(crate) fn network(&self, words: &str) -> Result<()> {
        let arguments: Vec<_> = "network create"
            .split(' ')
            .chain(words.split(' '))
            .collect();
        self.lab.nucnet(&arguments)?.expect(0)?;
        Ok(())
    }

    /// A new container, attached with these arguments of `nucnet-ctl attach`.
    pub(crate) fn attached(&self, name: &str, arguments: &[&str]) -> Result<(Node, Endpoint)> {
        let container = self.lab.container(name)?;
        let endpoint = self.attach(&container, arguments)?;
        Ok((container, endpoint))
    }

    /// Attaches a container with these arguments of `nucnet-ctl attach`.
    pub(crate) fn attach(&self, container: &Node, arguments: &[&str]) -> Result<Endpoint> {
        match self.way {
            Way::Nucnet(_) => {
                let mut all = vec!["--id", container.name()];
                all.extend(arguments);
                self.lab.attach(container, &all)
            }
            Way::Seeds(rules) => {
                let forwards = forwards(arguments)?;
                if rules == Rules::Routed && !forwards.is_empty() {
                    return skip("plain routing publishes nothing");
                }
                let seeds = self.lab.seeds();
                let endpoint =
                    seeds.attach(&self.lab, container, rules, &Family::ALL, &forwards)?;
                seeds.settle(&self.lab, container, &endpoint)?;
                Ok(endpoint)
            }
        }
    }

    /// For scenarios about `nucnet-ctl` itself.
    pub(crate) fn only_nucnet(&self) -> Result<()> {
        match self.way {
            Way::Nucnet(_) => Ok(()),
            Way::Seeds(_) => skip("this is about nucnet-ctl itself"),
        }
    }

    /// The datapath that the scenario begins with, and the other one.
    pub(crate) fn both(&self) -> Result<[&'static str; 2]> {
        if !has("iptables-restore") {
            return skip("there is no program iptables-restore here");
        }
        Ok(match self.lab.datapath {
            Some("iptables") => ["iptables", "ebpf"],
            _ => ["ebpf", "iptables"],
        })
    }

    /// Has the host go over to a datapath.
    pub(crate) fn switch_to(&self, datapath: &str) -> Result<()> {
        let switched = self.lab.nucnet(&["--datapath", datapath, "gc"])?;
        switched.expect(0).map(drop)
    }

    /// Whether programs carry packets.
    pub(crate) fn is_by_programs(&self) -> bool {
        self.way == Way::Nucnet(Datapath::Ebpf)
    }

    /// Whether a publish is to be reached by the loopback address: by netfilter, not by `::1`,
    /// which the kernel carries nowhere.
    pub(crate) fn serves_loopback(&self, family: Family) -> bool {
        self.way != Way::Nucnet(Datapath::Iptables) || family == Family::V4
    }

    /// For scenarios about what needs translation.
    pub(crate) fn translates(&self) -> Result<()> {
        match self.way {
            Way::Seeds(Rules::Routed) => skip("plain routing translates nothing"),
            _ => Ok(()),
        }
    }

    /// The unspecified address of this family with a port.
    pub(crate) fn any(&self, port: u16) -> SocketAddr {
        SocketAddr::new(self.family.any(), port)
    }

    /// A web server of this family on every address of a machine.
    pub(crate) fn web(&self, node: &Node, port: u16) -> Result<web::Server> {
        self.web_at(node, self.any(port))
    }

    /// A web server on one address of a machine.
    pub(crate) fn web_at(&self, node: &Node, at: SocketAddr) -> Result<web::Server> {
        web::Server::start(node.listen(at).with_context(|| at.to_string())?)
    }

    /// A UDP server of this family on every address of a machine.
    pub(crate) fn udp(&self, node: &Node, port: u16) -> Result<udp::Server> {
        udp::Server::start(
            node.udp(self.any(port))
                .with_context(|| format!("port {port}"))?,
        )
    }

    /// Connects, and returns whom the server takes the client for and who the client is.
    pub(crate) fn who(&self, client: &Node, to: SocketAddr) -> Result<(SocketAddr, SocketAddr)> {
        let stream = connect(client, to)?;
        let local = stream.local_addr()?;
        let seen =
            web::who(stream).with_context(|| format!("asking {to} from {}", client.name()))?;
        Ok((seen, local))
    }

    /// Whom a UDP server takes a new client for.
    pub(crate) fn who_udp(&self, client: &Node, to: SocketAddr) -> Result<udp::Seen> {
        let socket = client.udp(self.any(0))?;
        udp::exchange(&socket, to, "who", SOON)
            .with_context(|| format!("asking {to} by UDP from {}", client.name()))
    }

    /// Whether one ping gets its answer.
    pub(crate) fn pings(&self, client: &Node, to: IpAddr) -> Result<bool> {
        let to = to.to_string();
        let status = client
            .command("ping")
            .args(["-n", "-q", "-c", "1", "-W", "1", &to])
            .stdout(std::process::Stdio::null())
            .status()?;
        Ok(status.success())
    }

    /// What a person needs to know who looks at a failure.
    pub(crate) fn report(&self) -> String {
        let mut report = String::new();
        for outcome in self.lab.history() {
            report += &format!("{outcome}");
        }
        match (self.way, self.lab.drops()) {
            (Way::Seeds(_), _) => {}
            (Way::Nucnet(_), Ok(drops)) => report += &format!("dropped so far: {drops:?}\n"),
            (Way::Nucnet(_), Err(error)) => report += &format!("dropped so far: {error:#}\n"),
        }
        report
    }

    /// That the datapath has counted a drop for this reason.
    pub(crate) fn counted(&self, reason: &str) -> Result<()> {
        if self.way == Way::Nucnet(Datapath::Iptables) && differences::is_uncounted(reason) {
            return Ok(());
        }
        if let Way::Nucnet(_) = self.way {
            let drops = self.lab.drops()?;
            ensure!(
                drops.contains_key(reason),
                "no drop counted as {reason}: {drops:?}"
            );
        }
        Ok(())
    }
}

/// The port forwards among arguments of `nucnet-ctl attach`.
fn forwards(arguments: &[&str]) -> Result<Vec<Forward>> {
    let mut forwards = Vec::new();
    let mut words = arguments.iter();
    while let Some(&word) = words.next() {
        if word != "-p" {
            return skip(&format!("the tools before nucnet know no {word}"));
        }
        let spec = words.next().context("-p without value")?;
        let (ports, protocol) = match spec.rsplit_once('/') {
            Some((ports, "udp")) => (ports, "udp"),
            Some((ports, _)) => (ports, "tcp"),
            None => (*spec, "tcp"),
        };
        match ports
            .split_once(':')
            .map(|(host, port)| (host.parse(), port.parse()))
        {
            Some((Ok(host_port), Ok(port))) => forwards.push(Forward {
                protocol,
                host_port,
                port,
            }),
            _ => {
                return skip(&format!(
                    "the tools before nucnet are not tried with {spec}"
                ));
            }
        }
    }
    Ok(forwards)
}

/// Ends a scenario that cannot run.
pub(crate) fn skip<T>(reason: &str) -> Result<T> {
    Err(Skip(reason.to_owned()).into())
}

/// Whether there is a program of that name.
pub(crate) fn has(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories = std::env::split_paths(&path);
    directories.any(|directory| directory.join(program).is_file())
}

/// Connects by TCP, or says who could not reach what.
pub(crate) fn connect(client: &Node, to: SocketAddr) -> Result<TcpStream> {
    client
        .connect(to, SOON)
        .with_context(|| format!("connecting from {} to {to}", client.name()))
}

/// That a connection finds a closed door: the host itself answers.
pub(crate) fn refused(client: &Node, to: SocketAddr) -> Result<()> {
    match client.connect(to, SOON) {
        Err(error) if error.kind() == ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => bail!("{} to {to}: not refused but: {error}", client.name()),
        Ok(_) => bail!("{} to {to}: connected, expected a refusal", client.name()),
    }
}

/// That a connection finds no answer at all.
pub(crate) fn silent(client: &Node, to: SocketAddr) -> Result<()> {
    match client.connect(to, NEVER) {
        Err(error) if error.kind() == ErrorKind::TimedOut => Ok(()),
        Err(error) => bail!("{} to {to}: expected silence, not: {error}", client.name()),
        Ok(_) => bail!("{} to {to}: connected, expected silence", client.name()),
    }
}

/// That nobody answers a datagram.
pub(crate) fn silent_udp(case: &Case, client: &Node, to: SocketAddr) -> Result<()> {
    let socket = client.udp(case.any(0))?;
    match udp::exchange(&socket, to, "who", NEVER) {
        Ok(seen) => bail!("{} to {to} by UDP: answered ({seen:?})", client.name()),
        Err(error) if is_timeout(&error) => Ok(()),
        Err(error) => Err(error.context("expected silence")),
    }
}

/// Whether an answer was waited for that did not come.
fn is_timeout(error: &anyhow::Error) -> bool {
    let kind = error.downcast_ref::<io::Error>().map(io::Error::kind);
    matches!(kind, Some(ErrorKind::WouldBlock | ErrorKind::TimedOut))
}
