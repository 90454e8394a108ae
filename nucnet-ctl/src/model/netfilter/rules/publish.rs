//! Publishes and mappings: where what asks for the host's addresses goes.

use super::{Chains, Wanted, host, is_of, of_mapping, own_chain, ports};
use crate::model::{
    mapping::MappingSpec,
    netfilter::{Family, Table},
    ports::PortRange,
    publish::{HostAddress, Protocol, PublishSpec},
    record::MappingRecord,
};
use std::net::IpAddr;

impl Wanted<'_> {
    /// Where what asks for the host's addresses goes.
    pub(super) fn publishes(&self, chains: &mut Chains) {
        let family = chains.family;
        let mut entries: Vec<Entry> = Vec::new();
        // A hairpin is for neighbours, and asked before a dnat that shares its ports.
        let mut mappings: Vec<_> = self.mappings.iter().filter(|m| is_of(m, family)).collect();
        mappings.sort_by_key(|mapping| !matches!(mapping.spec, MappingSpec::Hairpin { .. }));
        for mapping in mappings {
            let chain = own_chain(mapping.number);
            let Some((rules, ext_if)) = mapped(mapping) else {
                continue;
            };
            let owner = of_mapping(mapping);
            for (matches, target) in rules {
                chains
                    .chain(Table::Nat, &chain)
                    .rule(matches, &owner, target);
            }
            entries.push(Entry {
                owner,
                chain,
                interfaces: ext_if.into_iter().collect(),
                serves_host: mapping.spec.ext_if().is_none(),
            });
        }
        for (endpoint, network, address) in self.endpoints(family) {
            let (id, chain) = (
                endpoint.record.id.to_string(),
                own_chain(endpoint.record.number),
            );
            let rules = published(endpoint.publishes, address);
            if rules.is_empty() {
                continue;
            }
            for (matches, target) in rules {
                chains.chain(Table::Nat, &chain).rule(matches, &id, target);
            }
            let mut interfaces: Vec<String> =
                network.uplinks().iter().map(ToString::to_string).collect();
            if !interfaces.is_empty() {
                let bridges = self
                    .networks
                    .iter()
                    .map(|network| network.bridge.to_string());
                interfaces.extend(bridges);
            }
            entries.push(Entry {
                owner: id,
                chain,
                interfaces,
                serves_host: true,
            });
        }
        if entries.is_empty() {
            return;
        }
        let unserved: &[&str] = match family {
            Family::Ipv4 => &["-d 169.254.0.0/16"],
            // The kernel carries packets to ::1 nowhere.
            Family::Ipv6 => &["-d fe80::/10", "-d ::1/128"],
        };
        for hook in ["PREROUTING", "OUTPUT"] {
            let hook = chains.hook(Table::Nat, hook);
            hook.rule("-m addrtype ! --dst-type LOCAL", "host", "-j RETURN");
            for matches in unserved {
                hook.rule(*matches, "host", "-j RETURN");
            }
        }
        for entry in entries {
            let target = format!("-j {}", entry.chain);
            let prerouting = chains.hook(Table::Nat, "PREROUTING");
            if entry.interfaces.is_empty() {
                prerouting.rule("", &entry.owner, &target);
            }
            for interface in &entry.interfaces {
                prerouting.rule(format!("-i {interface}"), &entry.owner, &target);
            }
            if entry.serves_host {
                chains
                    .hook(Table::Nat, "OUTPUT")
                    .rule("", &entry.owner, &target);
            }
        }
    }
}

/// What leads to the chain of an endpoint or a mapping.
struct Entry {
    owner: String,
    chain: String,
    /// By which interfaces packets come in for it; empty: by any.
    interfaces: Vec<String>,
    serves_host: bool,
}

/// The target that leads ports of the host to as many ports of an address.
fn translation(address: IpAddr, from: PortRange, to: PortRange) -> String {
    let address = match address {
        IpAddr::V4(v4) => v4.to_string(),
        IpAddr::V6(v6) => format!("[{v6}]"),
    };
    let target = match (from == to, to.count()) {
        (true, _) => address.trim_matches(['[', ']']).to_owned(),
        (false, 1) => format!("{address}:{}", to.first()),
        // How far a port is from the first one of the host's, it is from the first one there.
        (false, _) => format!("{address}:{}-{}/{}", to.first(), to.last(), from.first()),
    };
    format!("-j DNAT --to-destination {target}")
}

fn to_ports(protocol: Protocol, range: PortRange) -> String {
    format!("-p {protocol} -m {protocol} --dport {}", ports(range))
}

/// What rules match, and their target.
type Translations = Vec<(String, String)>;

/// The rules of publishes of an endpoint's address.
pub(super) fn published(publishes: &[PublishSpec], address: IpAddr) -> Translations {
    let is_meant = |host: HostAddress| match address {
        IpAddr::V4(_) => host.v4(),
        IpAddr::V6(_) => host.v6(),
    };
    let mut rules = Vec::new();
    // A publish of one address goes before one of any, whoever comes first.
    let mut publishes: Vec<&PublishSpec> =
        publishes.iter().filter(|p| is_meant(p.host())).collect();
    publishes.sort_by_key(|publish| !matches!(publish.host(), HostAddress::One(_)));
    for publish in publishes {
        let Some(from) = publish.host_ports() else {
            continue;
        };
        let mut matches = to_ports(publish.protocol(), from);
        if let HostAddress::One(one) = publish.host() {
            matches = format!("-d {} {matches}", host(one));
        }
        rules.push((matches, translation(address, from, publish.ports())));
    }
    rules
}

/// The rules of a mapping that changes destinations, and the interface that packets must come
/// in by.
fn mapped(mapping: &MappingRecord) -> Option<(Translations, Option<String>)> {
    let (protocol, list) = mapping.spec.ports()?;
    let (int_ip, ext) = (mapping.spec.int_ip()?, host(mapping.spec.ext_ip()));
    let (clients, int_port) = match &mapping.spec {
        MappingSpec::Hairpin { .. } => (format!("-s {} ", mapping.lan?), None),
        MappingSpec::Dnat { int_port, .. } => (String::new(), *int_port),
        MappingSpec::Snat { .. } => return None,
    };
    let rules = list.ranges().iter().filter_map(|&from| {
        let to = match int_port {
            Some(first) => PortRange::new(first, first + (from.last() - from.first()))?,
            None => from,
        };
        let matches = format!("{clients}-d {ext} {}", to_ports(protocol, from));
        Some((matches, translation(int_ip, from, to)))
    });
    let ext_if = mapping.spec.ext_if().map(ToString::to_string);
    Some((rules.collect(), ext_if))
}
