//! What nucnet is measured against: plain routing, and the way of the tools before it (`ip` and
//! `iptables`, one process a rule, as they do it).

use std::fmt::Write as _;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU16, Ordering};

use anyhow::{Context as _, Result};
use serde_json::Value;

use super::{Endpoint, Family, Lab, Node};

/// The bridge, as the tools before nucnet call theirs.
const BRIDGE: &str = "seed0";
const NETWORK4: &str = "10.0.48.0/20";
const NETWORK6: &str = "fd00:43::/64";
const GATEWAY4: &str = "10.0.48.1";
const GATEWAY6: &str = "fd00:43::1";

/// Which rules there are besides the routes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rules {
    /// None at all: routing between the wire and the bridge.
    Routed,
    /// DNAT in PREROUTING and OUTPUT, MASQUERADE in POSTROUTING, with the legacy backend.
    IptablesLegacy,
    /// The same rules with the nftables backend.
    IptablesNft,
}

impl Rules {
    /// The command for a family's rules.
    pub(super) fn program(self, v6: bool) -> Option<&'static str> {
        match (self, v6) {
            (Self::Routed, _) => None,
            (Self::IptablesLegacy, false) => Some("iptables-legacy"),
            (Self::IptablesLegacy, true) => Some("ip6tables-legacy"),
            (Self::IptablesNft, false) => Some("iptables-nft"),
            (Self::IptablesNft, true) => Some("ip6tables-nft"),
        }
    }
}

/// A port forward, in all there is to it here.
#[derive(Clone, Copy, Debug)]
pub struct Forward {
    /// `tcp` or `udp`.
    pub protocol: &'static str,
    /// On every address of the host.
    pub host_port: u16,
    /// Of the container.
    pub port: u16,
}

/// How many containers are attached that way.
#[derive(Debug, Default)]
pub struct Seeds {
    attached: AtomicU16,
}

impl Seeds {
    /// Makes the bridge and turns forwarding on.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn prepare(&self, lab: &Lab) -> Result<()> {
        lab.host.ip(&format!(
            "link add {BRIDGE} type bridge\n\
             addr add {GATEWAY4}/20 dev {BRIDGE}\n\
             addr add {GATEWAY6}/64 dev {BRIDGE} nodad\n\
             link set {BRIDGE} up"
        ))?;
        lab.host.sysctl("net/ipv4/ip_forward", "1")?;
        lab.host.sysctl("net/ipv6/conf/all/forwarding", "1")
    }

    /// Tells the outside how to reach containers directly: without NAT there is no other way.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn route_back(&self, lab: &Lab) -> Result<()> {
        lab.outside.ip(&format!(
            "route add {NETWORK4} via {}\n\
             route add {NETWORK6} via {}",
            super::HOST.v4,
            super::HOST.v6
        ))
    }

    /// Attaches a container, with rules for some families.
    ///
    /// # Errors
    /// A command fails.
    pub fn attach(
        &self,
        lab: &Lab,
        container: &Node,
        rules: Rules,
        families: &[Family],
        forwards: &[Forward],
    ) -> Result<Endpoint> {
        let endpoint = self.next()?;
        lab.host.ip(&veth(&endpoint, container))?;
        configure(container, &endpoint)?;
        change(lab, "-A", &endpoint, rules, families, forwards)?;
        Ok(endpoint)
    }

    /// Attaches many containers with IPv4 rules, as [`Self::attach`] would leave them, but with
    /// one call of each program: rule by rule, the time for each grows with those that are there.
    ///
    /// # Errors
    /// A command fails.
    pub fn attach_all(
        &self,
        lab: &Lab,
        containers: &[Node],
        rules: Rules,
        forwards: impl Fn(u16) -> Vec<Forward>,
    ) -> Result<()> {
        let program = rules.program(false).context("plain routing has no rules")?;
        let (mut links, mut text) = (String::new(), String::from("*nat\n"));
        let mut endpoints = Vec::new();
        for (number, container) in (0..).zip(containers) {
            let endpoint = self.next()?;
            writeln!(links, "{}", veth(&endpoint, container))?;
            for rule in rules_of(&endpoint, Family::V4, &forwards(number))? {
                writeln!(text, "-A {}", rule.join(" "))?;
            }
            endpoints.push(endpoint);
        }
        lab.host.ip(&links)?;
        for (container, endpoint) in containers.iter().zip(&endpoints) {
            configure(container, endpoint)?;
        }
        text.push_str("COMMIT\n");
        let restore = format!("{program}-restore");
        lab.host.batch(&restore, &["--wait", "--noflush"], &text)
    }

    fn next(&self) -> Result<Endpoint> {
        let number = self.attached.fetch_add(1, Ordering::Relaxed) + 2;
        let [high, low] = number.to_be_bytes();
        Ok(Endpoint {
            id: format!("seed{number}"),
            addresses: vec![
                format!("10.0.{}.{low}", 48 + high).parse()?,
                format!("fd00:43::{number:x}").parse()?,
            ],
            gateways: vec![GATEWAY4.parse()?, GATEWAY6.parse()?],
            json: Value::Null,
        })
    }

    /// Waits until a container that was just attached can be spoken to.
    ///
    /// # Errors
    /// It cannot.
    pub fn settle(&self, lab: &Lab, container: &Node, endpoint: &Endpoint) -> Result<()> {
        for (node, ifname, addresses) in [
            (container, "eth0", &endpoint.addresses),
            (&lab.host, BRIDGE, &endpoint.gateways),
        ] {
            for address in addresses {
                if let IpAddr::V6(address) = address {
                    node.settle(ifname, *address)?;
                }
            }
        }
        Ok(())
    }

    /// Takes away what [`Self::attach`] made.
    ///
    /// # Errors
    /// A command fails.
    pub fn detach(
        &self,
        lab: &Lab,
        endpoint: &Endpoint,
        rules: Rules,
        families: &[Family],
        forwards: &[Forward],
    ) -> Result<()> {
        change(lab, "-D", endpoint, rules, families, forwards)?;
        lab.host.ip(&format!("link del v{}", endpoint.id))
    }
}

/// Lines of `ip` for the host.
fn veth(endpoint: &Endpoint, container: &Node) -> String {
    let host = format!("v{}", endpoint.id);
    format!(
        "link add {host} type veth peer name eth0 netns {}\n\
         link set {host} master {BRIDGE} up",
        container.pid()
    )
}

fn configure(container: &Node, endpoint: &Endpoint) -> Result<()> {
    container.ip(&format!(
        "link set lo up\n\
         addr add {}/20 dev eth0\n\
         addr add {}/64 dev eth0 nodad\n\
         link set eth0 up\n\
         route add default via {GATEWAY4}\n\
         route add default via {GATEWAY6}",
        endpoint.address(Family::V4)?,
        endpoint.address(Family::V6)?
    ))
}

fn change(
    lab: &Lab,
    action: &str,
    endpoint: &Endpoint,
    rules: Rules,
    families: &[Family],
    forwards: &[Forward],
) -> Result<()> {
    for &family in families {
        let Some(program) = rules.program(family == Family::V6) else {
            continue;
        };
        for rule in rules_of(endpoint, family, forwards)? {
            let mut all = vec!["-w", "-t", "nat", action];
            all.extend(rule.iter().map(String::as_str));
            lab.host.run(program, &all)?;
        }
    }
    Ok(())
}

/// The rules of table `nat` for an endpoint, each with its chain first.
fn rules_of(endpoint: &Endpoint, family: Family, forwards: &[Forward]) -> Result<Vec<Vec<String>>> {
    let address = endpoint.address(family)?;
    let network = match family {
        Family::V4 => NETWORK4,
        Family::V6 => NETWORK6,
    };
    let words = |text: &str| text.split(' ').map(str::to_owned).collect::<Vec<_>>();
    let mut rules = vec![words(&format!(
        "POSTROUTING -s {network} ! -o {BRIDGE} -j MASQUERADE"
    ))];
    for forward in forwards {
        let target = std::net::SocketAddr::new(address, forward.port);
        let matched = format!("-p {} --dport {}", forward.protocol, forward.host_port);
        let jump = format!("-j DNAT --to-destination {target}");
        rules.push(words(&format!("PREROUTING {matched} {jump}")));
        rules.push(words(&format!(
            "OUTPUT {matched} -m addrtype --dst-type LOCAL {jump}"
        )));
    }
    Ok(rules)
}
