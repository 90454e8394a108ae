//! What nucnet is measured against: plain routing, and the way of the tools before it (`ip` and
//! `iptables`, one process a rule, as they do it).

use std::net::IpAddr;
use std::sync::atomic::{AtomicU8, Ordering};

use anyhow::Result;
use serde_json::Value;

use super::{Endpoint, Family, Lab, Node};

/// The bridge, as the tools before nucnet call theirs.
const BRIDGE: &str = "seed0";
const NETWORK4: &str = "10.0.43.0/24";
const NETWORK6: &str = "fd00:43::/64";

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
    fn program(self, v6: bool) -> Option<&'static str> {
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
    attached: AtomicU8,
}

impl Seeds {
    /// Makes the bridge and turns forwarding on.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn prepare(&self, lab: &Lab) -> Result<()> {
        lab.host.ip(&format!(
            "link add {BRIDGE} type bridge\n\
             addr add 10.0.43.1/24 dev {BRIDGE}\n\
             addr add fd00:43::1/64 dev {BRIDGE} nodad\n\
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
        let number = self.attached.fetch_add(1, Ordering::Relaxed) + 2;
        let (v4, v6) = (format!("10.0.43.{number}"), format!("fd00:43::{number:x}"));
        lab.host.ip(&format!(
            "link add vseed{number} type veth peer name eth0 netns {}\n\
             link set vseed{number} master {BRIDGE} up",
            container.pid()
        ))?;
        container.ip(&format!(
            "link set lo up\n\
             addr add {v4}/24 dev eth0\n\
             addr add {v6}/64 dev eth0 nodad\n\
             link set eth0 up\n\
             route add default via 10.0.43.1\n\
             route add default via fd00:43::1"
        ))?;
        let endpoint = Endpoint {
            id: format!("seed{number}"),
            addresses: vec![v4.parse()?, v6.parse()?],
            gateways: vec!["10.0.43.1".parse()?, "fd00:43::1".parse()?],
            json: Value::Null,
        };
        change(lab, "-A", &endpoint, rules, families, forwards)?;
        Ok(endpoint)
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

fn change(
    lab: &Lab,
    action: &str,
    endpoint: &Endpoint,
    rules: Rules,
    families: &[Family],
    forwards: &[Forward],
) -> Result<()> {
    for &family in families {
        let address = endpoint.address(family)?;
        let v6 = family == Family::V6;
        let Some(program) = rules.program(v6) else {
            continue;
        };
        let rule = |chain: &str, words: &[&str]| -> Result<()> {
            let mut all = vec!["-w", "-t", "nat", action, chain];
            all.extend(words);
            lab.host.run(program, &all).map(drop)
        };
        let network = if v6 { NETWORK6 } else { NETWORK4 };
        rule(
            "POSTROUTING",
            &["-s", network, "!", "-o", BRIDGE, "-j", "MASQUERADE"],
        )?;
        for forward in forwards {
            let target = std::net::SocketAddr::new(address, forward.port).to_string();
            let port = forward.host_port.to_string();
            let matched = ["-p", forward.protocol, "--dport", &port];
            let jump = ["-j", "DNAT", "--to-destination", &target];
            rule("PREROUTING", &[&matched[..], &jump].concat())?;
            let local = ["-m", "addrtype", "--dst-type", "LOCAL"];
            rule("OUTPUT", &[&matched[..], &local, &jump].concat())?;
        }
    }
    Ok(())
}
