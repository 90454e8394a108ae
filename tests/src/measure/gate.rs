//! What attaching and detaching a container costs, by each way, beside others that are there.

use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, UsageWho, getrlimit, getrusage, setrlimit};
use nix::sys::time::{TimeVal, TimeValLike};

use crate::lab::cni::{self, Cni};
use crate::lab::seeds::{Forward, Rules};
use crate::lab::{Endpoint, Family, Lab, Node};

/// How a container is attached.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Means {
    /// By nucnet.
    Nucnet,
    /// By `ip` and `iptables`, one process a rule.
    Seeds(Rules),
    /// By CNI's plugins, with that backend of iptables.
    Cni(Rules),
}

impl fmt::Display for Means {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Nucnet => "nucnet",
            Self::Seeds(_) => "ip + iptables",
            Self::Cni(_) => "CNI",
        })
    }
}

/// What attaching or detaching one container costs.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// From start to end.
    pub wall: Duration,
    /// CPU time of every process that took part.
    pub cpu: Duration,
    /// How much of that was in the kernel.
    pub kernel: Duration,
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self {
            wall: self.wall + other.wall,
            cpu: self.cpu + other.cpu,
            kernel: self.kernel + other.kernel,
        }
    }
}

/// The tools before nucnet know one family.
const SEEDS: &[Family] = &[Family::V4];

/// The first of the host ports of containers that are always there.
const CROWD_PORT: u16 = 40_000;

/// The network of nucnet's containers.
const NETWORK: &str = "crowd";

/// A lab in which containers are attached and detached.
#[derive(Debug)]
pub struct Gate {
    lab: Lab,
    means: Means,
    plugins: Option<Cni>,
    /// The containers that are always there.
    _crowd: Vec<Node>,
    /// Kept: the kernel takes namespaces apart in the background, under the lock that every
    /// change of a link needs.
    used: Vec<Node>,
}

#[derive(Debug)]
enum Attached {
    Endpoint(Endpoint),
    ByCni(cni::Attached),
}

impl Gate {
    /// Ports that each container publishes.
    pub const PUBLISHES: u16 = 10;

    /// Most containers that can be there: each has its own ports.
    pub const MOST: u16 = 2000;

    /// Builds one, in which so many containers are attached already. The cost is that of the
    /// first attach on the host, before there was anything.
    ///
    /// # Errors
    /// A command, a plugin or nucnet fails.
    pub fn new(means: Means, crowd: u16) -> Result<(Self, Cost)> {
        let mut lab = Lab::new()?;
        lab.host.leave_cgroup();
        let plugins = match means {
            Means::Cni(rules) => Some(Cni::new(rules)?),
            Means::Seeds(_) => {
                lab.seeds().prepare(&lab)?;
                None
            }
            Means::Nucnet => None,
        };
        let mut gate = Self {
            lab,
            means,
            plugins,
            _crowd: Vec::new(),
            used: Vec::new(),
        };
        let first = gate.lab.container("first")?;
        let (attached, cost) = gate.attach(&first, None)?;
        gate.detach(&attached)?;
        gate.used.push(first);
        if means == Means::Nucnet {
            let create = ["network", "create", NETWORK, "--subnet", "10.0.80.0/20"];
            gate.lab
                .nucnet(&[&create[..], &["--subnet6", "fd00:80::/64"]].concat())?
                .expect(0)?;
        }
        gate.gather(crowd)?;
        Ok((gate, cost))
    }

    fn gather(&mut self, crowd: u16) -> Result<()> {
        if crowd > Self::MOST {
            bail!("{crowd} containers are more than there are ports for");
        }
        allow_descriptors()?;
        let members = (0..crowd).map(|number| self.lab.container(&format!("crowd{number}")));
        let members: Vec<Node> = members.collect::<Result<_>>()?;
        let ports = |number| Self::forwards(CROWD_PORT + number * Self::PUBLISHES);
        match (self.means, &self.plugins) {
            (Means::Nucnet, _) => {
                for (number, member) in (0..).zip(&members) {
                    self.attach_by_nucnet(member, Some(NETWORK), &ports(number))?;
                }
                self.lab.forget();
            }
            (Means::Seeds(rules), _) => {
                let seeds = self.lab.seeds();
                seeds.attach_all(&self.lab, &members, rules, ports)?;
            }
            (Means::Cni(_), Some(plugins)) => {
                // One is attached by the plugins first, with the first one's ports.
                plugins.attach_all(&self.lab, &members, ports)?;
            }
            (Means::Cni(_), None) => bail!("there are no plugins"),
        }
        self._crowd = members;
        Ok(())
    }

    /// Attaches a new container and detaches it.
    ///
    /// # Errors
    /// A command, a plugin or nucnet fails.
    pub fn pass(&mut self) -> Result<[Cost; 2]> {
        let container = self.lab.container(&format!("next{}", self.used.len()))?;
        let (attached, attach) = self.attach(&container, Some(NETWORK))?;
        let detach = self.detach(&attached)?;
        self.used.push(container);
        Ok([attach, detach])
    }

    /// The host ports of the container that comes and goes.
    const FIRST_PORT: u16 = 2000;

    fn forwards(first: u16) -> Vec<Forward> {
        let ports = first..first + Self::PUBLISHES;
        ports
            .map(|port| Forward {
                protocol: "tcp",
                host_port: port,
                port,
            })
            .collect()
    }

    fn attach(&self, container: &Node, network: Option<&str>) -> Result<(Attached, Cost)> {
        let forwards = Self::forwards(Self::FIRST_PORT);
        let lab = &self.lab;
        cost(|| match (self.means, &self.plugins) {
            (Means::Nucnet, _) => {
                let endpoint = self.attach_by_nucnet(container, network, &forwards)?;
                Ok(Attached::Endpoint(endpoint))
            }
            (Means::Seeds(rules), _) => lab
                .seeds()
                .attach(lab, container, rules, SEEDS, &forwards)
                .map(Attached::Endpoint),
            (Means::Cni(_), Some(plugins)) => plugins
                .attach(lab, container, container.name(), &forwards)
                .map(Attached::ByCni),
            (Means::Cni(_), None) => bail!("there are no plugins"),
        })
    }

    fn attach_by_nucnet(
        &self,
        container: &Node,
        network: Option<&str>,
        forwards: &[Forward],
    ) -> Result<Endpoint> {
        let specs: Vec<_> = forwards
            .iter()
            .map(|f| format!("{}:{}", f.host_port, f.port))
            .collect();
        let mut words: Vec<_> = specs.iter().flat_map(|spec| ["-p", spec]).collect();
        words.extend(network.iter().flat_map(|name| ["--network", *name]));
        self.lab.attach(container, &words)
    }

    fn detach(&self, attached: &Attached) -> Result<Cost> {
        let lab = &self.lab;
        let ((), cost) = cost(|| match (self.means, attached) {
            (Means::Nucnet, Attached::Endpoint(endpoint)) => {
                lab.nucnet(&["detach", &endpoint.id])?.expect(0).map(drop)
            }
            (Means::Seeds(rules), Attached::Endpoint(endpoint)) => {
                let forwards = Self::forwards(Self::FIRST_PORT);
                lab.seeds().detach(lab, endpoint, rules, SEEDS, &forwards)
            }
            (_, Attached::ByCni(attached)) => {
                let plugins = self.plugins.as_ref().context("there are no plugins")?;
                plugins.detach(lab, attached)
            }
            (Means::Cni(_), Attached::Endpoint(_)) => bail!("it was not attached by CNI"),
        })?;
        Ok(cost)
    }
}

/// Each container costs this process two descriptors.
fn allow_descriptors() -> Result<()> {
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE)?;
    Ok(setrlimit(Resource::RLIMIT_NOFILE, most, most)?)
}

/// What a piece of work costs in time, and its children in CPU time.
pub(super) fn cost<T>(work: impl FnOnce() -> Result<T>) -> Result<(T, Cost)> {
    let children = || -> Result<[Duration; 2]> {
        let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
        let time = |time: TimeVal| -> Result<_> {
            Ok(Duration::from_micros(time.num_microseconds().try_into()?))
        };
        Ok([time(usage.user_time())?, time(usage.system_time())?])
    };
    let ([user, kernel], start) = (children()?, Instant::now());
    let result = work()?;
    let wall = start.elapsed();
    let after = children()?;
    let (user, kernel) = (
        after[0].saturating_sub(user),
        after[1].saturating_sub(kernel),
    );
    Ok((
        result,
        Cost {
            wall,
            cpu: user + kernel,
            kernel,
        },
    ))
}
