//! With whose address packets leave.

use super::{Chains, Wanted, by, host, is_of, of_mapping, of_network, ports, publish::published};
use crate::model::{
    mapping::MappingSpec,
    netfilter::{Chain, Family, Table},
    ports::PortRange,
};
use std::net::IpAddr;

/// Privileged ports are the host's own, whatever it serves now.
const PRIVILEGED: u16 = 1023;

/// With which address a packet leaves.
#[derive(Clone, Copy)]
enum Source {
    /// That of the interface.
    Interface,
    One(IpAddr),
}

impl Source {
    /// The target of a rule, with ports from that range.
    fn target(self, ports: Option<PortRange>) -> String {
        let ports = ports.map(|range| format!("{}-{}", range.first(), range.last()));
        match (self, ports) {
            (Self::Interface, None) => "-j MASQUERADE".to_owned(),
            (Self::Interface, Some(ports)) => format!("-j MASQUERADE --to-ports {ports}"),
            (Self::One(address), None) => format!("-j SNAT --to-source {address}"),
            (Self::One(IpAddr::V4(v4)), Some(ports)) => format!("-j SNAT --to-source {v4}:{ports}"),
            (Self::One(IpAddr::V6(v6)), Some(ports)) => {
                format!("-j SNAT --to-source [{v6}]:{ports}")
            }
        }
    }
}

impl Wanted<'_> {
    /// With whose address packets leave.
    pub(super) fn sources(&self, chains: &mut Chains) {
        let family = chains.family;
        for (endpoint, network, address) in self.endpoints(family) {
            if published(endpoint.publishes, address).is_empty() {
                continue;
            }
            let Some(subnet) = network.subnet(family.is_v6()) else {
                continue;
            };
            // It would take a packet from its own address for a forged one.
            let (own, id) = (host(address), endpoint.record.id.as_str());
            let matches = format!("-s {own} -d {own} -o {}", network.bridge);
            let target = format!("-j SNAT --to-source {}", subnet.gateway());
            chains
                .hook(Table::Nat, "POSTROUTING")
                .rule(matches, id, target);
        }
        for (network, gateway, _) in self.networks(family) {
            let (owner, bridge) = (of_network(network), &network.bridge);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            if family == Family::Ipv4 {
                let matches = format!("-s 127.0.0.0/8 -o {bridge}");
                hook.rule(matches, &owner, format!("-j SNAT --to-source {gateway}"));
            }
            hook.rule(format!("-o {bridge}"), &owner, "-j RETURN");
        }
        for mapping in self
            .mappings
            .iter()
            .filter(|mapping| is_of(mapping, family))
        {
            let owner = of_mapping(mapping);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            match &mapping.spec {
                MappingSpec::Dnat { .. } => {}
                MappingSpec::Snat {
                    int,
                    ext_ip,
                    ext_if,
                } => {
                    hook.rule("-o lo", &owner, "-j RETURN");
                    let matches = format!("-s {int}{}", by("-o", ext_if.as_ref()));
                    self.translate(hook, &matches, &owner, Source::One(*ext_ip), false);
                }
                MappingSpec::Hairpin { ext_ip, int_ip, .. } => {
                    let Some(lan) = mapping.lan else { continue };
                    let matches = format!(
                        "-s {lan} -d {} -m conntrack --ctstate DNAT --ctorigdst {}",
                        host(*int_ip),
                        host(*ext_ip)
                    );
                    self.translate(hook, &matches, &owner, Source::Interface, false);
                }
            }
        }
        for (network, _, subnet) in self.networks(family) {
            let owner = of_network(network);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            hook.rule("-o lo", &owner, "-j RETURN");
            let (matches, keeps) = (format!("-s {subnet}"), network.behaviour().keep_ports);
            self.translate(hook, &matches, &owner, Source::Interface, keeps);
        }
    }

    /// Rules for what leaves with another address: where it has ports, with one that is never the
    /// host's. The kernel draws one that nobody can foresee, and takes the one that a socket has
    /// been given already where it can.
    fn translate(
        &self,
        chain: &mut Chain,
        matches: &str,
        owner: &str,
        source: Source,
        keeps_ports: bool,
    ) {
        if let Some(range) = self.ports {
            let privileged = PortRange::new(0, PRIVILEGED);
            for protocol in ["tcp", "udp"] {
                let matches = format!("{matches} -p {protocol}");
                if !keeps_ports {
                    chain.rule(matches, owner, source.target(Some(range.drawn)));
                    continue;
                }
                for hosts in privileged.into_iter().chain([range.host]) {
                    let matches = format!("{matches} -m {protocol} --sport {}", ports(hosts));
                    chain.rule(matches, owner, source.target(Some(range.drawn)));
                }
            }
        }
        chain.rule(matches, owner, source.target(None));
    }
}
