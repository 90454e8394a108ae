//! The machines of the story, and its chapters.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use nucnet_tests::lab::{
    Endpoint, FAR, Family, HOST, Lab, Node, OUTSIDE, Snapshot,
    web::{self, Server},
};

use super::{
    bpftool,
    story::{Ran, Story},
};
use crate::apt;

/// Where both containers serve.
const PORT: u16 = 80;
/// Where the host publishes that of `web`.
const HOST_PORT: u16 = 8080;
/// Where the outside serves what `app` may not reach.
const FORBIDDEN: u16 = 81;
/// Size of the download, in bytes.
const DOWNLOAD: usize = 20_000_000;

/// Draws the machines.
pub(super) fn introduce(story: &mut Story) -> Result<()> {
    story.title("nucnet: two containers, their host, and a machine outside")?;
    story.say(&format!(
        "
   outside                        host                       containers
+------------------+        +---------------------+        +-------------+
| {outside4:<15}  |  eth0  | {host4:<13}       |    +---| web         |
| {outside6:<15}  |--------| {host6:<15}     |    |   | serves :{PORT}  |
|                  |        |                     |    |   +-------------+
| {far4:<15}  |        |    nucnet0, eBPF    |----+
| {far6:<15}  |        |                     |    |   +-------------+
|                  |        | publishes {HOST_PORT}      |    +---| app         |
| serves :{PORT}, :{FORBIDDEN}  |        | as web:{PORT}           |        | serves :{PORT}  |
+------------------+        +---------------------+        +-------------+

Each is a network namespace, gone when the demo ends. The servers answer
/who with the address from which they see the client come.",
        outside4 = OUTSIDE.v4.to_string(),
        outside6 = OUTSIDE.v6.to_string(),
        far4 = FAR.v4.to_string(),
        far6 = FAR.v6.to_string(),
        host4 = HOST.v4.to_string(),
        host6 = HOST.v6.to_string(),
    ))
}

/// The machines, and the servers that run on them.
pub(super) struct Stage {
    untouched: Snapshot,
    lab: Lab,
    web: Container,
    app: Container,
    /// Serves what everybody may reach, in both families.
    outside: Servers,
    /// Serves what `app` may not.
    forbidden: Servers,
}

/// A container and its server.
struct Container {
    node: Node,
    servers: Servers,
    /// What nucnet made of it.
    endpoint: Option<Endpoint>,
}

/// A server for each family.
struct Servers([(Family, Server); 2]);

impl Servers {
    fn start(node: &Node, port: u16) -> Result<Self> {
        let start = |family: Family| -> Result<_> {
            let listener = node.listen(SocketAddr::new(family.any(), port));
            let listener =
                listener.with_context(|| format!("{}: port {port}, {family}", node.name()))?;
            Ok((family, Server::start(listener)?))
        };
        Ok(Self([start(Family::V4)?, start(Family::V6)?]))
    }

    /// Every client so far.
    fn clients(&self) -> Vec<SocketAddr> {
        let Self(servers) = self;
        servers
            .iter()
            .flat_map(|(_, server)| server.clients())
            .collect()
    }

    /// What `/who` printed, if it names the expected address and it was here that it was asked.
    fn saw(&self, ran: &Ran, expected: IpAddr) -> Result<String> {
        ran.succeeded()?;
        let text = ran.stdout.trim();
        let seen: SocketAddr = text.parse().context("it printed no address")?;
        ensure!(seen.ip() == expected, "expected to be seen as {expected}");
        ensure!(
            self.clients().contains(&seen),
            "another server has answered"
        );
        Ok(text.to_owned())
    }
}

impl Container {
    fn start(lab: &Lab, name: &str) -> Result<Self> {
        let node = lab.container(name)?;
        Ok(Self {
            servers: Servers::start(&node, PORT)?,
            node,
            endpoint: None,
        })
    }

    fn address(&self, family: Family) -> Result<IpAddr> {
        let endpoint = self.endpoint.as_ref().context("not attached yet")?;
        endpoint.address(family)
    }
}

impl Stage {
    /// Builds the machines and starts the servers. No container is attached.
    pub(super) fn build() -> Result<Self> {
        let lab = Lab::new()?;
        Ok(Self {
            untouched: Snapshot::of(&lab.host)?,
            web: Container::start(&lab, "web")?,
            app: Container::start(&lab, "app")?,
            outside: Servers::start(&lab.outside, PORT)?,
            forbidden: Servers::start(&lab.outside, FORBIDDEN)?,
            lab,
        })
    }

    /// Chapter: attach.
    pub(super) fn attach(&mut self, story: &mut Story) -> Result<()> {
        story.chapter("Attach the containers, which have nothing but a loopback interface yet.")?;
        let netns = |node: &Node| format!("/proc/{}/ns/net", node.pid());
        let (web, app) = (netns(&self.web.node), netns(&self.app.node));
        let lines = [
            format!("nucnet-ctl attach --netns {web} --id web -p {HOST_PORT}:{PORT}"),
            format!(
                "nucnet-ctl attach --netns {app} --id app \\\n       \
                 --allow {}:{PORT}/tcp --allow '[{}]:{PORT}/tcp'",
                FAR.v4, FAR.v6
            ),
        ];
        for (container, line) in [&mut self.web, &mut self.app].into_iter().zip(lines) {
            story.types(&self.lab.host, &line, |ran| {
                ran.succeeded()?;
                let wanted = ["attached", "addresses", "published", "egress", "allow"];
                let lines = ran.stdout.lines();
                let lines = lines.filter(|line| wanted.iter().any(|word| line.contains(word)));
                Ok(lines.collect::<Vec<_>>().join("\n"))
            })?;
            let id = container.node.name();
            let inspected = self.lab.nucnet(&["-o", "json", "inspect", id])?;
            container.endpoint = Some(Endpoint::from_json(inspected.expect(0)?.json()?)?);
        }
        story.say("The first one on a host also loads the programs into the kernel.")
    }

    /// Chapter: a published port from outside.
    pub(super) fn publish(&self, story: &mut Story) -> Result<()> {
        story.chapter("The published port from outside: web sees the client's own address.")?;
        for family in Family::ALL {
            let line = who(HOST.port(family, HOST_PORT));
            story.types(&self.lab.outside, &line, |ran| {
                self.web.servers.saw(ran, OUTSIDE.of(family))
            })?;
        }
        Ok(())
    }

    /// Chapter: the tables as bpftool shows them.
    pub(super) fn flow(&self, story: &mut Story) -> Result<()> {
        story.chapter("What the kernel knows of it: a flow, by bpftool.")?;
        let line = "bpftool map dump pinned /sys/fs/bpf/nucnet/maps/flows";
        if apt::find_program("bpftool").is_none() {
            return story.say(&format!(
                "There is no bpftool here; it would show it by\n{line}"
            ));
        }
        story.types(&self.lab.host, line, |ran| {
            ran.succeeded()?;
            let peer = OUTSIDE.v4.octets().map(|byte| byte.to_string());
            bpftool::element_with(&ran.stdout, &format!("255,255,{}", peer.join(",")))
        })?;
        story.say("An address has 16 bytes; IPv4 ones are the last four. State 4: closed.")
    }

    /// Chapter: a published port from the host itself.
    pub(super) fn localhost(&self, story: &mut Story) -> Result<()> {
        story.chapter("The published port on the host itself.")?;
        for (flags, host) in [("-4 -s", "localhost"), ("-s", "[::1]")] {
            let line = format!("curl {flags} http://{host}:{HOST_PORT}/who");
            story.types(&self.lab.host, &line, |ran| {
                // By which address the host comes is its own choice.
                let seen: SocketAddr = ran.stdout.trim().parse()?;
                self.web.servers.saw(ran, seen.ip())
            })?;
        }
        Ok(())
    }

    /// Chapter: from a container to the outside.
    pub(super) fn masquerade(&self, story: &mut Story) -> Result<()> {
        story.chapter("From a container to the outside, which sees the host's address.")?;
        for family in Family::ALL {
            let line = who(FAR.port(family, PORT));
            story.types(&self.web.node, &line, |ran| {
                self.outside.saw(ran, HOST.of(family))
            })?;
        }
        for family in Family::ALL {
            story.types(&self.web.node, &ping(FAR.of(family)), pong)?;
        }
        Ok(())
    }

    /// Chapter: from container to container.
    pub(super) fn neighbours(&self, story: &mut Story) -> Result<()> {
        story.chapter("From container to container: no translation.")?;
        for family in Family::ALL {
            let target = self.app.address(family)?;
            let line = who(SocketAddr::new(target, PORT));
            story.types(&self.web.node, &line, |ran| {
                self.app.servers.saw(ran, self.web.address(family)?)
            })?;
            story.types(&self.web.node, &ping(target), pong)?;
        }
        Ok(())
    }

    /// Chapter: egress rules.
    pub(super) fn egress(&self, story: &mut Story) -> Result<()> {
        story.chapter("Egress rules: app may reach port 80 of that machine and nothing else.")?;
        for family in Family::ALL {
            story.types(&self.app.node, &who(FAR.port(family, PORT)), |ran| {
                self.outside.saw(ran, HOST.of(family))
            })?;
        }
        for family in Family::ALL {
            let line = format!(
                "curl -sS --max-time 1 http://{}/who",
                FAR.port(family, FORBIDDEN)
            );
            story.types(&self.app.node, &line, |ran| {
                ensure!(!ran.status.success(), "it got through");
                ensure!(
                    self.forbidden.clients().is_empty(),
                    "the server was reached"
                );
                Ok(ran.stderr.trim().to_owned())
            })?;
        }
        // The same for web, which has no rules: it is the rules that stopped app.
        let line = who(FAR.port(Family::V4, FORBIDDEN));
        story.types(&self.web.node, &line, |ran| {
            self.forbidden.saw(ran, HOST.of(Family::V4))
        })?;
        story.types(
            &self.lab.host,
            "nucnet-ctl inspect app | grep policy",
            |ran| {
                ran.succeeded()?;
                Ok(ran
                    .stdout
                    .lines()
                    .map(str::trim)
                    .collect::<Vec<_>>()
                    .join("\n"))
            },
        )
    }

    /// Chapter: 20 MB each way.
    pub(super) fn downloads(&self, story: &mut Story) -> Result<()> {
        let expected = web::sha256(&web::payload()[..DOWNLOAD]);
        let digits = &expected[..16];
        story.chapter(&format!(
            "20 MB in through the published port and out: SHA-256 {digits}..."
        ))?;
        let ways = [
            (&self.lab.outside, HOST, HOST_PORT),
            (&self.web.node, FAR, PORT),
        ];
        for (client, server, port) in ways {
            for family in Family::ALL {
                let server = server.port(family, port);
                let line = format!("curl -s {}/bytes/{DOWNLOAD} | sha256sum", url(server));
                story.types(client, &line, |ran| {
                    ran.succeeded()?;
                    let sum = ran.stdout.split_whitespace().next().unwrap_or_default();
                    ensure!(sum == expected, "expected {expected}");
                    Ok(format!("the same, {}", milliseconds(ran.took)))
                })?;
            }
        }
        Ok(())
    }

    /// Chapter: nothing stays.
    pub(super) fn leave(&self, story: &mut Story) -> Result<()> {
        story.chapter("Detach: nothing stays on the host.")?;
        for line in ["nucnet-ctl detach web app", "nucnet-ctl down"] {
            story.types(&self.lab.host, line, |ran| {
                ran.succeeded()?;
                Ok(milliseconds(ran.took))
            })?;
        }
        let left = self.untouched.difference(&Snapshot::of(&self.lab.host)?);
        if !left.is_empty() {
            bail!("the host is not as it was before:\n{left}");
        }
        story.say("Links, addresses, routes, rules, sysctls, programs and pins: as before.")
    }
}

fn who(server: SocketAddr) -> String {
    format!("curl -s {}/who", url(server))
}

/// As people write it: without the port that everybody knows.
fn url(server: SocketAddr) -> String {
    let text = format!("http://{server}");
    text.strip_suffix(":80").map_or(text.clone(), str::to_owned)
}

fn ping(target: IpAddr) -> String {
    format!("ping -c 1 -W 2 {target}")
}

/// What `ping` has to say, if there was an answer.
fn pong(ran: &Ran) -> Result<String> {
    ran.succeeded()?;
    let line = ran.line_with("bytes from")?;
    let start = line.find("ttl=").context("no ttl in the answer")?;
    Ok(line[start..].to_owned())
}

fn milliseconds(time: Duration) -> String {
    format!("{:.0} ms", time.as_secs_f64() * 1e3)
}
