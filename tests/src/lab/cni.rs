//! What nucnet is measured against: the plugins of CNI, run as a container runtime runs them.
//!
//! A chain of `bridge` (with `host-local` addresses and masquerade), `portmap` and `firewall`:
//! each gets its configuration on standard input and what to do in its environment, `ADD` in
//! that order and `DEL` in the other, with the result of those before.

use std::fmt::Write as _;
use std::io::Write as _;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::seeds::{Forward, Rules};
use super::{Lab, Node};

/// Where distributions put the plugins.
const DIRECTORIES: [&str; 2] = ["/usr/lib/cni", "/opt/cni/bin"];
const CHAIN: [&str; 3] = ["bridge", "portmap", "firewall"];
const BRIDGE: &str = "cni0";
const NETWORK: &str = "10.0.64.0/20";
/// The plugins' state, in the `/run` that the lab's host has for itself.
const STATE: &str = "/run/cni";

/// The directory of the plugins, if they are installed.
pub fn plugins() -> Option<PathBuf> {
    DIRECTORIES.into_iter().map(PathBuf::from).find(|path| {
        let mut needed = CHAIN.into_iter().chain(["host-local"]);
        needed.all(|plugin| path.join(plugin).is_file())
    })
}

/// The plugins, with one of the backends of iptables.
#[derive(Debug)]
pub struct Cni {
    plugins: PathBuf,
    /// `iptables` and its like under the names that the plugins call.
    programs: TempDir,
}

/// A container that the plugins attached.
#[derive(Debug)]
pub struct Attached {
    id: String,
    netns: String,
    mappings: Value,
    result: Value,
}

impl Cni {
    /// Finds the plugins.
    ///
    /// # Errors
    /// They, or iptables, are not installed.
    pub fn new(rules: Rules) -> Result<Self> {
        let plugins = plugins().context("the CNI plugins are not installed")?;
        let programs = TempDir::new()?;
        for (v6, name) in [(false, "iptables"), (true, "ip6tables")] {
            let backend = rules.program(v6).context("CNI needs iptables")?;
            for end in ["", "-save", "-restore"] {
                let program = find(&format!("{backend}{end}"))?;
                symlink(program, programs.path().join(format!("{name}{end}")))?;
            }
        }
        Ok(Self { plugins, programs })
    }

    /// Attaches a container.
    ///
    /// # Errors
    /// A plugin fails.
    pub fn attach(
        &self,
        lab: &Lab,
        container: &Node,
        id: &str,
        forwards: &[Forward],
    ) -> Result<Attached> {
        let mappings = forwards.iter().map(|forward| {
            json!({
                "hostPort": forward.host_port,
                "containerPort": forward.port,
                "protocol": forward.protocol,
            })
        });
        let mut attached = Attached {
            id: id.to_owned(),
            netns: format!("/proc/{}/ns/net", container.pid()),
            mappings: mappings.collect(),
            result: Value::Null,
        };
        for plugin in CHAIN {
            let printed = self.run(lab, plugin, "ADD", &attached)?;
            attached.result = serde_json::from_str(&printed)
                .with_context(|| format!("what {plugin} printed: {printed}"))?;
        }
        Ok(attached)
    }

    /// Detaches it.
    ///
    /// # Errors
    /// A plugin fails.
    pub fn detach(&self, lab: &Lab, attached: &Attached) -> Result<()> {
        for plugin in CHAIN.into_iter().rev() {
            self.run(lab, plugin, "DEL", attached)?;
        }
        Ok(())
    }

    fn run(&self, lab: &Lab, plugin: &str, command: &str, attached: &Attached) -> Result<String> {
        let mut configuration = json!({ "cniVersion": "0.4.0", "name": "lab", "type": plugin });
        match plugin {
            "bridge" => {
                configuration["bridge"] = BRIDGE.into();
                configuration["isGateway"] = true.into();
                configuration["ipMasq"] = true.into();
                configuration["ipam"] = json!({
                    "type": "host-local",
                    "dataDir": STATE,
                    "ranges": [[{ "subnet": NETWORK }]],
                    "routes": [{ "dst": "0.0.0.0/0" }],
                });
            }
            "portmap" => {
                configuration["capabilities"] = json!({ "portMappings": true });
                configuration["runtimeConfig"] = json!({ "portMappings": attached.mappings });
            }
            _ => {}
        }
        if !attached.result.is_null() {
            configuration["prevResult"] = attached.result.clone();
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let path =
            std::iter::once(self.programs.path().to_owned()).chain(std::env::split_paths(&path));
        let mut child = lab
            .host
            .command(self.plugins.join(plugin))
            .env("PATH", std::env::join_paths(path)?)
            .env("CNI_COMMAND", command)
            .env("CNI_CONTAINERID", &attached.id)
            .env("CNI_NETNS", &attached.netns)
            .env("CNI_IFNAME", "eth0")
            .env("CNI_PATH", &self.plugins)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("running {plugin}"))?;
        let mut input = child.stdin.take().context("no pipe")?;
        input.write_all(configuration.to_string().as_bytes())?;
        drop(input);
        let output = child.wait_with_output()?;
        // Errors are JSON on standard output.
        ensure!(
            output.status.success(),
            "{plugin} {command} {}: {} {}",
            attached.id,
            String::from_utf8_lossy(&output.stdout).trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Attaches many containers as the plugins would leave them. One is attached and detached by
    /// them, and the rules that it had all others get, in one call: by the plugins themselves 500
    /// take minutes. The ports of each are ten in a row from a multiple of ten on.
    ///
    /// # Errors
    /// A command fails.
    pub fn attach_all(
        &self,
        lab: &Lab,
        containers: &[Node],
        forwards: impl Fn(u16) -> Vec<Forward>,
    ) -> Result<()> {
        let Some(model) = containers.first() else {
            return Ok(());
        };
        let attached = self.attach(lab, model, "model", &forwards(0))?;
        let address = attached.result["ips"][0]["address"]
            .as_str()
            .and_then(|address| address.split_once('/'))
            .map(|(address, _)| address.to_owned())
            .context("the plugins gave no address")?;
        let saved = lab.host.run(&self.program("iptables-save"), &[])?;
        self.detach(lab, &attached)?;
        let model = Model::new(&saved, &address, &forwards(0))?;

        let (mut links, mut leases) = (String::new(), Vec::new());
        for (number, container) in (0..).zip(containers) {
            writeln!(
                links,
                "link add crowd{number} type veth peer name eth0 netns {}\n\
                 link set crowd{number} master {BRIDGE} up",
                container.pid()
            )?;
            leases.push((member_address(number), format!("crowd{number}\r\neth0")));
        }
        lab.host.ip(&links)?;
        let members = (0..).zip(containers).map(|(number, _)| number);
        let members: Vec<_> = members.map(|number| (number, forwards(number))).collect();
        let rules = model.rules(&members)?;
        lab.host.batch(
            &self.program("iptables-restore"),
            &["--wait", "--noflush"],
            &rules,
        )?;
        for (address, lease) in leases {
            std::fs::write(lab.host.path(STATE).join("lab").join(address), lease)?;
        }
        for (number, container) in (0..).zip(containers) {
            container.ip(&format!(
                "addr add {}/20 dev eth0\n\
                 link set eth0 up\n\
                 route add default via 10.0.64.1",
                member_address(number)
            ))?;
        }
        Ok(())
    }

    fn program(&self, name: &str) -> String {
        self.programs.path().join(name).display().to_string()
    }
}

/// Beyond those that `host-local`, which counts up, gives to others.
fn member_address(number: u16) -> String {
    let [high, low] = number.to_be_bytes();
    format!("10.0.{}.{low}", 72 + high)
}

/// The rules of one container, from which those of others follow.
struct Model {
    /// Lines of `iptables-save`, by table.
    tables: Vec<(String, Vec<String>)>,
    /// What the names of its chains have in common.
    mark: String,
    address: String,
    /// Its ports without their last digit.
    ports: u16,
}

impl Model {
    fn new(saved: &str, address: &str, forwards: &[Forward]) -> Result<Self> {
        let mark = saved
            .lines()
            .find_map(|line| Some(line.strip_prefix(":CNI-DN-")?.split(' ').next()?.to_owned()))
            .context("portmap made no chain")?;
        let mut tables: Vec<(String, Vec<String>)> = Vec::new();
        for line in saved.lines() {
            if line.starts_with('*') {
                tables.push((line.to_owned(), Vec::new()));
            } else if let Some((_, lines)) = tables.last_mut()
                && (line.contains(&mark) || line.contains(&format!("{address}/32")))
            {
                lines.push(line.to_owned());
            }
        }
        Ok(Self {
            tables,
            mark,
            address: address.to_owned(),
            ports: tens(forwards)?,
        })
    }

    /// Input of `iptables-restore` for those members.
    fn rules(&self, members: &[(u16, Vec<Forward>)]) -> Result<String> {
        let mut text = String::new();
        for (table, lines) in &self.tables {
            writeln!(text, "{table}")?;
            for (member, forwards) in members {
                for line in lines {
                    writeln!(text, "{}", self.of_member(line, *member, tens(forwards)?))?;
                }
            }
            writeln!(text, "COMMIT")?;
        }
        Ok(text)
    }

    fn of_member(&self, line: &str, member: u16, ports: u16) -> String {
        let mut line = line.to_owned();
        // What comes before a port: of a match, of a list, in a list, of a target.
        for before in ["port ", "ports ", ",", &format!("{}:", self.address)] {
            let (from, to) = (self.ports, ports);
            line = line.replace(&format!("{before}{from}"), &format!("{before}{to}"));
        }
        line.replace(&self.address, &member_address(member))
            .replace(&self.mark, &format!("crowd{member}"))
    }
}

fn tens(forwards: &[Forward]) -> Result<u16> {
    let first = forwards.first().context("no ports")?.host_port;
    ensure!(
        first % 10 == 0 && forwards.len() <= 10,
        "the ports from {first} on differ by more than their last digit"
    );
    Ok(first / 10)
}

fn find(program: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .map(|directory| directory.join(program))
        .find(|path| Path::is_file(path))
        .with_context(|| format!("there is no program {program}"))
}
