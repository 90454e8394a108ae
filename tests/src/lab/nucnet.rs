//! Running the real `nucnet-ctl` on the lab's host.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::MutexGuard;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use super::{Family, Lab, Node, node, nucnet_program};

/// No verb takes this long, not even where the processor is emulated, and shared, and verifies the
/// programs.
const LIMIT: Duration = Duration::from_secs(240);

/// Where nucnet keeps its records, as the host sees it.
const STATE_DIR: &str = "/run/nucnet";
/// Where nucnet keeps its pins.
const BPFFS: &str = "/sys/fs/bpf/nucnet";

/// How one run of `nucnet-ctl` ended.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// The command line, without the program.
    pub arguments: Vec<String>,
    /// Exit code; `None`: a signal ended it.
    pub code: Option<i32>,
    /// What it printed.
    pub stdout: String,
    /// What it complained about.
    pub stderr: String,
    /// From its start to its end.
    pub took: Duration,
}

impl Outcome {
    /// Itself, if the exit code is this one.
    ///
    /// # Errors
    /// It is another; the message has all that nucnet said.
    pub fn expect(self, code: i32) -> Result<Self> {
        ensure!(self.code == Some(code), "expected exit code {code}\n{self}");
        Ok(self)
    }

    /// What it printed, as JSON.
    ///
    /// # Errors
    /// It is none.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.stdout).with_context(|| format!("no JSON\n{self}"))
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            formatter,
            "$ nucnet-ctl {}\nexit code ",
            self.arguments.join(" ")
        )?;
        match self.code {
            Some(code) => writeln!(formatter, "{code} after {:?}", self.took)?,
            None => writeln!(formatter, "none: ended by a signal")?,
        }
        for (stream, text) in [("stdout", &self.stdout), ("stderr", &self.stderr)] {
            if !text.trim().is_empty() {
                writeln!(formatter, "{stream}: {}", text.trim())?;
            }
        }
        Ok(())
    }
}

/// An attached container.
#[derive(Clone, Debug)]
pub struct Endpoint {
    /// Its id.
    pub id: String,
    /// Its addresses, without prefix.
    pub addresses: Vec<IpAddr>,
    /// The network's own addresses.
    pub gateways: Vec<IpAddr>,
    /// The object that `attach` printed; `Null` where another way than nucnet did it.
    pub json: Value,
}

impl Endpoint {
    /// Its address of a family.
    ///
    /// # Errors
    /// It has none.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        of_family(&self.addresses, family)
            .with_context(|| format!("{} has no {family} address: {:?}", self.id, self.addresses))
    }

    /// The network's address of a family.
    ///
    /// # Errors
    /// It has none.
    pub fn gateway(&self, family: Family) -> Result<IpAddr> {
        of_family(&self.gateways, family)
            .with_context(|| format!("{} has no {family} gateway: {:?}", self.id, self.gateways))
    }

    /// The host port that `attach` says leads to a port of the container.
    ///
    /// # Errors
    /// It names none.
    pub fn host_port(&self, port: u16) -> Result<u16> {
        let published = self.json["published"]
            .as_array()
            .context("no `published`")?;
        published
            .iter()
            .find(|publish| publish["port"] == port)
            .and_then(|publish| u16::try_from(publish["host_port"].as_u64()?).ok())
            .with_context(|| format!("no publish for port {port}: {published:?}"))
    }

    /// From what `attach` or `inspect` printed.
    ///
    /// # Errors
    /// The object lacks what the contract promises.
    pub fn from_json(json: Value) -> Result<Self> {
        let list = |key: &str| -> Result<Vec<IpAddr>> {
            let values = json[key]
                .as_array()
                .with_context(|| format!("no `{key}` in {json}"))?;
            values
                .iter()
                .map(|value| {
                    let text = value
                        .as_str()
                        .with_context(|| format!("`{key}` in {json}"))?;
                    let address = text.split_once('/').map_or(text, |(address, _)| address);
                    address.parse().with_context(|| format!("`{key}`: {text}"))
                })
                .collect()
        };
        Ok(Self {
            id: json["id"]
                .as_str()
                .with_context(|| format!("no `id` in {json}"))?
                .to_owned(),
            addresses: list("addresses")?,
            gateways: list("gateways")?,
            json,
        })
    }
}

fn of_family(addresses: &[IpAddr], family: Family) -> Option<IpAddr> {
    addresses
        .iter()
        .copied()
        .find(|address| address.is_ipv4() == (family == Family::V4))
}

fn owned(arguments: &[&str]) -> Vec<String> {
    arguments.iter().map(|&word| word.to_owned()).collect()
}

impl Lab {
    /// Runs `nucnet-ctl` on the host, whatever comes of it.
    ///
    /// # Errors
    /// It cannot be run, or does not end.
    pub fn nucnet(&self, arguments: &[&str]) -> Result<Outcome> {
        let start = Instant::now();
        let child = self
            .program(arguments)?
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()?;
        let (code, stdout, stderr) = node::finish(child, LIMIT)
            .with_context(|| format!("nucnet-ctl {}", arguments.join(" ")))?;
        let outcome = Outcome {
            arguments: owned(arguments),
            code,
            stdout,
            stderr,
            took: start.elapsed(),
        };
        self.history_mut().push(outcome.clone());
        Ok(outcome)
    }

    /// Runs `nucnet-ctl` on the host and kills it after some time. `false`: it ended by itself
    /// before.
    ///
    /// # Errors
    /// It cannot be run.
    pub fn nucnet_killed(&self, arguments: &[&str], after: Duration) -> Result<bool> {
        let start = Instant::now();
        let mut child = self
            .program(arguments)?
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // The moment is what is asked for, not anything that could be waited for.
        std::thread::sleep(after);
        child.kill()?;
        let code = child.wait()?.code();
        self.history_mut().push(Outcome {
            arguments: owned(arguments),
            code,
            stdout: String::new(),
            stderr: String::new(),
            took: start.elapsed(),
        });
        Ok(code.is_none())
    }

    /// `nucnet-ctl` with these arguments, to be run on the host.
    ///
    /// # Errors
    /// It is not built.
    pub fn program(&self, arguments: &[&str]) -> Result<Command> {
        let program = nucnet_program().context("nucnet-ctl is not built")?;
        let mut command = self.host.command(program);
        command
            .env("NUCNET_STATE_DIR", STATE_DIR)
            .env("NUCNET_BPFFS", BPFFS)
            .env(
                "NUCNET_CGROUP",
                self.host.cgroup().context("the host has no cgroup")?,
            )
            .args(arguments);
        if let Some(datapath) = self.datapath {
            command.env("NUCNET_DATAPATH", datapath);
        }
        Ok(command)
    }

    /// Every run so far, for whoever looks at a failure.
    pub fn history(&self) -> Vec<Outcome> {
        self.history_mut().clone()
    }

    /// Forgets those runs.
    pub fn forget(&self) {
        self.history_mut().clear();
    }

    fn history_mut(&self) -> MutexGuard<'_, Vec<Outcome>> {
        self.history
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
    }

    /// Attaches a container by its pid.
    ///
    /// # Errors
    /// nucnet fails, or prints another object than the contract's.
    pub fn attach(&self, container: &Node, arguments: &[&str]) -> Result<Endpoint> {
        let pid = container.pid().to_string();
        let mut all = vec!["-o", "json", "attach", "--pid", &pid];
        all.extend(arguments);
        Endpoint::from_json(self.nucnet(&all)?.expect(0)?.json()?)
    }

    /// Where nucnet's pins are, as this process can open them.
    pub fn bpffs(&self) -> PathBuf {
        self.host.path(BPFFS)
    }

    /// Where nucnet's records are, as this process can open them.
    pub fn state_dir(&self) -> PathBuf {
        self.host.path(STATE_DIR)
    }
}
