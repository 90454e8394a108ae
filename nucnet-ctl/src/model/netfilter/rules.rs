//! Which rules are wanted, from what is on record.
//!
//! ```text
//! mangle PREROUTING   who sends: an endpoint may only send as itself, and nobody else as one
//! nat    PREROUTING   publishes and mappings, for what comes in
//! nat    OUTPUT       the same for the host's own sockets
//! filter FORWARD      policies, on the destination that was asked for; then what may pass
//! filter INPUT        policies, for what endpoints send to the host
//! filter OUTPUT       redirects, which would lead endpoints round the host
//! nat    POSTROUTING  whose address a packet leaves with
//! ```
//!
//! Policies come after the translation, because only there can a packet be refused with a word:
//! what was asked for is in the kernel's entry of the connection (`--ctorigdst`).

use super::{CHAIN_PREFIX, Chain, Family, LOG_GROUP, Table};
use crate::model::{
    mapping::MappingSpec,
    policy::{Action, Policy},
    ports::PortRange,
    preset::Preset,
    publish::{HostAddress, Protocol, PublishSpec},
    record::{EndpointRecord, MappingRecord, NetworkRecord},
    rule::{Rule as EgressRule, RuleProtocol, Target},
};
use nucnet_common::abi::Reason;
use std::net::IpAddr;

/// How many denials of an endpoint are logged in a second; the rest is only counted.
const LOGGED: &str = "20/sec";

/// An endpoint as it is to be served.
#[derive(Clone, Copy, Debug)]
pub struct WantedEndpoint<'a> {
    /// Its record.
    pub record: &'a EndpointRecord,
    /// What it publishes.
    pub publishes: &'a [PublishSpec],
    /// What it may reach.
    pub egress: &'a Policy,
    /// Whether connections that are open go on, whatever the policy says of them.
    pub keeps_open: bool,
}

/// All that is to be served.
#[derive(Clone, Debug, Default)]
pub struct Wanted<'a> {
    /// The networks.
    pub networks: Vec<&'a NetworkRecord>,
    /// The endpoints.
    pub endpoints: Vec<WantedEndpoint<'a>>,
    /// The static mappings.
    pub mappings: Vec<&'a MappingRecord>,
}

/// The chain of an endpoint or a mapping; both have numbers of the same sequence.
fn own_chain(number: u32) -> String {
    format!("{CHAIN_PREFIX}{number}")
}

/// Where what an endpoint's policy denies ends.
fn deny_chain(number: u32) -> String {
    format!("{CHAIN_PREFIX}{number}-DENY")
}

fn dropped(owner: &str, reason: Reason) -> String {
    format!("{owner} {}", reason.name())
}

fn of_network(network: &NetworkRecord) -> String {
    format!("network:{}", network.name)
}

fn of_mapping(mapping: &MappingRecord) -> String {
    format!("mapping:{}", mapping.id)
}

/// Chains in the order in which they are written.
struct Chains {
    family: Family,
    chains: Vec<Chain>,
}

impl Chains {
    fn chain(&mut self, table: Table, name: &str) -> &mut Chain {
        let found = self
            .chains
            .iter()
            .position(|chain| chain.table == table && chain.name == name);
        let at = found.unwrap_or_else(|| {
            self.chains.push(Chain::new(table, name));
            self.chains.len() - 1
        });
        &mut self.chains[at]
    }

    /// The chain that one of the kernel's leads to.
    fn hook(&mut self, table: Table, hook: &str) -> &mut Chain {
        self.chain(table, &format!("{CHAIN_PREFIX}{hook}"))
    }
}

impl Wanted<'_> {
    /// The chains of one family. None of a family that nothing here has.
    pub fn chains(&self, family: Family) -> Vec<Chain> {
        let mut chains = Chains {
            family,
            chains: Vec::new(),
        };
        self.guards(&mut chains);
        self.policies(&mut chains);
        self.passes(&mut chains);
        self.publishes(&mut chains);
        self.sources(&mut chains);
        chains.chains
    }

    fn networks(&self, family: Family) -> impl Iterator<Item = (&NetworkRecord, IpAddr, String)> {
        self.networks.iter().filter_map(move |network| {
            let subnet = network.subnet(family.is_v6())?;
            Some((*network, subnet.gateway(), subnet.cidr().to_string()))
        })
    }

    fn endpoints(
        &self,
        family: Family,
    ) -> impl Iterator<Item = (&WantedEndpoint<'_>, &NetworkRecord, IpAddr)> {
        self.endpoints.iter().filter_map(move |endpoint| {
            let network = self.network_of(endpoint.record)?;
            Some((endpoint, network, endpoint.record.address(family.is_v6())?))
        })
    }

    fn network_of(&self, endpoint: &EndpointRecord) -> Option<&NetworkRecord> {
        let mut networks = self.networks.iter();
        networks
            .find(|network| network.number == endpoint.network)
            .copied()
    }

    /// Who may send as whom.
    fn guards(&self, chains: &mut Chains) {
        const SOURCES: &str = "NUCNET-SOURCES";
        let family = chains.family;
        for (network, _, _) in self.networks(family) {
            let owner = of_network(network);
            let hook = chains.hook(Table::Mangle, "PREROUTING");
            if hook.is_empty() {
                hook.rule("-i lo", "host", "-j RETURN");
            }
            hook.rule(
                format!("-i {}", network.bridge),
                &owner,
                format!("-g {SOURCES}"),
            );
        }
        for (network, _, subnet) in self.networks(family) {
            let comment = dropped(&of_network(network), Reason::MartianSource);
            let hook = chains.hook(Table::Mangle, "PREROUTING");
            hook.rule(format!("-s {subnet}"), &comment, "-j DROP");
        }
        if self.networks(family).next().is_none() {
            return;
        }
        if family.is_v6() {
            let sources = chains.chain(Table::Mangle, SOURCES);
            // Their answers change nothing: endpoints are permanent neighbours of the host's.
            for kind in ["135", "136"] {
                let matches = format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}");
                sources.rule(matches, "host", "-j RETURN");
            }
            for kind in ["133", "143"] {
                let matches = format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}");
                sources.rule(matches, &dropped("host", Reason::Discovery), "-j DROP");
            }
        }
        for (endpoint, network, address) in self.endpoints(family) {
            let record = endpoint.record;
            let (id, chain) = (record.id.as_str(), own_chain(record.number));
            let own = format!(
                "-s {} -i {} -m mac --mac-source {}",
                host(address),
                network.bridge,
                record.mac
            );
            let sources = chains.chain(Table::Mangle, SOURCES);
            sources.rule(own, id, format!("-g {chain}"));
            let guard = chains.chain(Table::Mangle, &chain);
            let forbidden: &[(&str, Reason)] = match family {
                Family::Ipv4 => &[
                    ("-d 127.0.0.0/8", Reason::Martian),
                    ("-d 224.0.0.0/4", Reason::Multicast),
                    ("-m addrtype --dst-type BROADCAST", Reason::Multicast),
                    ("-d 169.254.0.0/16", Reason::LinkLocal),
                    (
                        "-p udp -m udp --sport 67 --dport 68",
                        Reason::Infrastructure,
                    ),
                    ("-p icmp -m icmp --icmp-type 5", Reason::Infrastructure),
                ],
                Family::Ipv6 => &[
                    ("-d ::1/128", Reason::Martian),
                    ("-d ff00::/8", Reason::Multicast),
                    ("-d fe80::/10", Reason::LinkLocal),
                    (
                        "-p udp -m udp --sport 547 --dport 546",
                        Reason::Infrastructure,
                    ),
                    (
                        "-p ipv6-icmp -m icmp6 --icmpv6-type 134",
                        Reason::Infrastructure,
                    ),
                    (
                        "-p ipv6-icmp -m icmp6 --icmpv6-type 137",
                        Reason::Infrastructure,
                    ),
                ],
            };
            for (matches, reason) in forbidden {
                guard.rule(*matches, &dropped(id, *reason), "-j DROP");
            }
        }
        for (endpoint, network, _) in self.endpoints(family) {
            let record = endpoint.record;
            let matches = format!("-i {} -m mac --mac-source {}", network.bridge, record.mac);
            let comment = dropped(record.id.as_str(), Reason::SpoofedAddress);
            let sources = chains.chain(Table::Mangle, SOURCES);
            sources.rule(matches, &comment, "-j DROP");
        }
        let comment = dropped("host", Reason::SpoofedMac);
        chains
            .chain(Table::Mangle, SOURCES)
            .rule("", &comment, "-j DROP");
    }

    /// What endpoints may reach.
    fn policies(&self, chains: &mut Chains) {
        const EGRESS: &str = "NUCNET-EGRESS";
        let family = chains.family;
        let mut bridges: Vec<&NetworkRecord> = Vec::new();
        for (endpoint, network, address) in self.endpoints(family) {
            if !endpoint.egress.is_in_force() {
                continue;
            }
            if bridges.iter().all(|known| known.number != network.number) {
                bridges.push(network);
            }
            let (id, number) = (endpoint.record.id.as_str(), endpoint.record.number);
            let egress = chains.chain(Table::Filter, EGRESS);
            let matches = format!("-s {} -i {}", host(address), network.bridge);
            egress.rule(matches, id, format!("-g {}", own_chain(number)));
            policy(endpoint, chains);
        }
        for network in bridges {
            let from = format!("-i {}", network.bridge);
            for hook in ["FORWARD", "INPUT"] {
                let hook = chains.hook(Table::Filter, hook);
                hook.rule(&from, &of_network(network), format!("-j {EGRESS}"));
            }
        }
    }

    /// What is forwarded.
    fn passes(&self, chains: &mut Chains) {
        const PEERS: &str = "NUCNET-PEERS";
        let family = chains.family;
        let networks: Vec<_> = self.networks(family).map(|(network, ..)| network).collect();
        for network in &networks {
            let (owner, bridge) = (of_network(network), &network.bridge);
            // What the kernel knows no connection for would leave with its own address.
            let matches = format!("-i {bridge} -m conntrack --ctstate INVALID,UNTRACKED");
            let forward = chains.hook(Table::Filter, "FORWARD");
            forward.rule(matches, &dropped(&owner, Reason::NoFlow), "-j DROP");
        }
        for network in &networks {
            let (owner, bridge) = (of_network(network), &network.bridge);
            let to = |state: &str| format!("-o {bridge} -m conntrack --ctstate {state}");
            if !network.isolate {
                let peers = chains.chain(Table::Filter, PEERS);
                peers.rule(format!("-i {bridge}"), &owner, "-j ACCEPT");
            }
            let forward = chains.hook(Table::Filter, "FORWARD");
            forward.rule(to("RELATED,ESTABLISHED"), &owner, "-j ACCEPT");
            // Published, or mapped.
            forward.rule(to("DNAT"), &owner, "-j ACCEPT");
            let siblings = format!("-i {bridge} -o {bridge}");
            forward.rule(siblings, &owner, "-j ACCEPT");
            if !network.isolate {
                forward.rule(format!("-o {bridge}"), &owner, format!("-j {PEERS}"));
            }
            let reason = match network.isolate {
                true => Reason::Isolated,
                false => Reason::NotPublished,
            };
            forward.rule(format!("-o {bridge}"), &dropped(&owner, reason), "-j DROP");
        }
        for network in &networks {
            let forward = chains.hook(Table::Filter, "FORWARD");
            let from = format!("-i {}", network.bridge);
            forward.rule(from, &of_network(network), "-j ACCEPT");
            let redirect = match family {
                Family::Ipv4 => "-p icmp -m icmp --icmp-type 5",
                Family::Ipv6 => "-p ipv6-icmp -m icmp6 --icmpv6-type 137",
            };
            let matches = format!("-o {} {redirect}", network.bridge);
            let comment = dropped(&of_network(network), Reason::Infrastructure);
            let output = chains.hook(Table::Filter, "OUTPUT");
            output.rule(matches, &comment, "-j DROP");
        }
        for mapping in self
            .mappings
            .iter()
            .filter(|mapping| is_of(mapping, family))
        {
            let owner = of_mapping(mapping);
            let forward = chains.hook(Table::Filter, "FORWARD");
            let (there, back) = match &mapping.spec {
                MappingSpec::Dnat { int_ip, .. } | MappingSpec::Hairpin { int_ip, .. } => {
                    let int = host(*int_ip);
                    (
                        format!("-d {int} -m conntrack --ctstate DNAT"),
                        format!(
                            "-s {int} -m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY"
                        ),
                    )
                }
                MappingSpec::Snat { int, ext_if, .. } => (
                    format!("-s {int}{}", by("-o", ext_if.as_ref())),
                    format!(
                        "-d {int}{} -m conntrack --ctstate RELATED,ESTABLISHED",
                        by("-i", ext_if.as_ref())
                    ),
                ),
            };
            forward.rule(there, &owner, "-j ACCEPT");
            forward.rule(back, &owner, "-j ACCEPT");
        }
    }

    /// Where what asks for the host's addresses goes.
    fn publishes(&self, chains: &mut Chains) {
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

    /// With whose address packets leave.
    fn sources(&self, chains: &mut Chains) {
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
                    hook.rule(matches, &owner, format!("-j SNAT --to-source {ext_ip}"));
                }
                MappingSpec::Hairpin { ext_ip, int_ip, .. } => {
                    let Some(lan) = mapping.lan else { continue };
                    let matches = format!(
                        "-s {lan} -d {} -m conntrack --ctstate DNAT --ctorigdst {}",
                        host(*int_ip),
                        host(*ext_ip)
                    );
                    hook.rule(matches, &owner, "-j MASQUERADE");
                }
            }
        }
        for (network, _, subnet) in self.networks(family) {
            let owner = of_network(network);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            hook.rule("-o lo", &owner, "-j RETURN");
            hook.rule(format!("-s {subnet}"), &owner, "-j MASQUERADE");
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

fn is_of(mapping: &MappingRecord, family: Family) -> bool {
    mapping.spec.ext_ip().is_ipv6() == family.is_v6()
}

fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("{v4}/32"),
        IpAddr::V6(v6) => format!("{v6}/128"),
    }
}

fn by(option: &str, interface: Option<&crate::model::IfName>) -> String {
    interface.map_or_else(String::new, |name| format!(" {option} {name}"))
}

/// `FIRST` or `FIRST:LAST`.
fn ports(range: PortRange) -> String {
    match range.count() {
        1 => range.first().to_string(),
        _ => format!("{}:{}", range.first(), range.last()),
    }
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
fn published(publishes: &[PublishSpec], address: IpAddr) -> Translations {
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

/// The chains of an endpoint's policy.
fn policy(endpoint: &WantedEndpoint<'_>, chains: &mut Chains) {
    let (family, record, policy) = (chains.family, endpoint.record, endpoint.egress);
    let (id, deny) = (record.id.as_str(), deny_chain(record.number));
    let end = chains.chain(Table::Filter, &deny);
    if policy.log_denied() {
        let log = format!("-j NFLOG --nflog-group {LOG_GROUP} --nflog-prefix \"nucnet:{id}\"");
        // One that is logged is not logged again for being sent again.
        end.rule(
            format!("-m limit --limit {LOGGED} --limit-burst 20"),
            id,
            log,
        );
    }
    if policy.rejects() {
        let told = match family {
            Family::Ipv4 => "icmp-admin-prohibited",
            Family::Ipv6 => "icmp6-adm-prohibited",
        };
        let comment = dropped(id, Reason::Policy);
        end.rule("-p tcp", &comment, "-j REJECT --reject-with tcp-reset");
        // An error is never the answer to an error.
        end.rule("", &comment, format!("-j REJECT --reject-with {told}"));
    }
    end.rule("", &dropped(id, Reason::Policy), "-j DROP");

    let chain = chains.chain(Table::Filter, &own_chain(record.number));
    if family.is_v6() {
        for kind in ["135", "136"] {
            let matches = format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}");
            chain.rule(matches, id, "-j RETURN");
        }
    }
    // Answers to what others began, and errors about what passes.
    chain.rule(
        "-m conntrack --ctstate ESTABLISHED --ctdir REPLY",
        id,
        "-j RETURN",
    );
    chain.rule("-m conntrack --ctstate RELATED", id, "-j RETURN");
    if endpoint.keeps_open {
        chain.rule("-m conntrack --ctstate ESTABLISHED", id, "-j RETURN");
    }
    // Nobody can tell what it asked for.
    let deny = format!("-g {deny}");
    chain.rule("-m conntrack --ctstate INVALID,UNTRACKED", id, &deny);
    for action in [Action::Deny, Action::Allow] {
        for (number, _, rule) in policy.rules().filter(|(_, of, _)| *of == action) {
            let comment = format!("{id} rule {number}");
            let target = match action {
                Action::Deny => deny.as_str(),
                Action::Allow => "-j RETURN",
            };
            for matches in asked_for(&rule, family) {
                chain.rule(matches, &comment, target);
            }
            if action == Action::Deny {
                for matches in really(&rule, family) {
                    chain.rule(matches, &comment, target);
                }
            }
        }
    }
    if policy.default_action() == Action::Deny {
        chain.rule("", id, &deny);
    }
}

/// What a rule says of destinations: prefixes, or none for all, or only such as are the host's.
enum Destinations {
    Prefixes(Vec<Option<String>>),
    Host,
}

fn destinations(rule: &EgressRule, family: Family) -> Destinations {
    let cidrs = match rule.target() {
        Target::Any => return Destinations::Prefixes(vec![None]),
        Target::Cidr(cidr) => vec![cidr],
        Target::Preset(Preset::Host) => return Destinations::Host,
        Target::Preset(preset) => preset.prefixes().unwrap_or_default(),
    };
    let of_family = cidrs
        .into_iter()
        .filter(|cidr| cidr.net().addr().is_ipv6() == family.is_v6());
    Destinations::Prefixes(of_family.map(|cidr| Some(cidr.to_string())).collect())
}

/// Protocols and ports of a rule: what of `-p`, and which ports.
fn services(rule: &EgressRule, family: Family) -> Vec<(Option<&'static str>, Option<PortRange>)> {
    let icmp = match family {
        Family::Ipv4 => "icmp",
        Family::Ipv6 => "ipv6-icmp",
    };
    let protocols: &[Option<&'static str>] = match (rule.protocol(), rule.ports().is_empty()) {
        (Some(RuleProtocol::Tcp), _) => &[Some("tcp")],
        (Some(RuleProtocol::Udp), _) => &[Some("udp")],
        (Some(RuleProtocol::Icmp), _) => return vec![(Some(icmp), None)],
        (None, false) => &[Some("tcp"), Some("udp")],
        (None, true) => &[None],
    };
    let mut services = Vec::new();
    for &protocol in protocols {
        match rule.ports() {
            [] => services.push((protocol, None)),
            ranges => services.extend(ranges.iter().map(|&range| (protocol, Some(range)))),
        }
    }
    services
}

/// What a rule matches of the destinations that are asked for.
fn asked_for(rule: &EgressRule, family: Family) -> Vec<String> {
    let mut all = Vec::new();
    for (protocol, range) in services(rule, family) {
        let protocol = protocol.map_or_else(String::new, |protocol| format!("-p {protocol} "));
        let port = range.map_or_else(String::new, |range| {
            format!(" --ctorigdstport {}", ports(range))
        });
        match destinations(rule, family) {
            Destinations::Prefixes(prefixes) => all.extend(prefixes.into_iter().map(|prefix| {
                let prefix =
                    prefix.map_or_else(String::new, |prefix| format!(" --ctorigdst {prefix}"));
                match (prefix.is_empty(), port.is_empty()) {
                    (true, true) => protocol.trim_end().to_owned(),
                    _ => format!("{protocol}-m conntrack{prefix}{port}"),
                }
            })),
            Destinations::Host => {
                let conntrack = match port.is_empty() {
                    true => String::new(),
                    false => format!(" -m conntrack{port}"),
                };
                all.push(format!("{protocol}-m addrtype --dst-type LOCAL{conntrack}"));
                // Only what is the host's is published.
                all.push(format!("{protocol}-m conntrack --ctstate DNAT{port}"));
            }
        }
    }
    all
}

/// What a rule matches of the destinations that publishes and mappings lead to.
fn really(rule: &EgressRule, family: Family) -> Vec<String> {
    let Destinations::Prefixes(prefixes) = destinations(rule, family) else {
        return Vec::new();
    };
    let mut all = Vec::new();
    for (protocol, range) in services(rule, family) {
        let service = match (protocol, range) {
            (Some(protocol), Some(range)) => {
                format!(" -p {protocol} -m {protocol} --dport {}", ports(range))
            }
            (Some(protocol), None) => format!(" -p {protocol}"),
            (None, _) => String::new(),
        };
        for prefix in &prefixes {
            let prefix = prefix
                .as_ref()
                .map_or_else(String::new, |prefix| format!("-d {prefix}"));
            let matches = format!("{prefix}{service} -m conntrack --ctstate DNAT");
            all.push(matches.trim_start().to_owned());
        }
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::netfilter::{Saved, change};
    use serde_json::json;

    fn network(isolate: bool, uplinks: &[&str]) -> NetworkRecord {
        serde_json::from_value(json!({
            "name": "default", "number": 1, "state": "active", "bridge": "nucnet0", "link": 5,
            "mac": "02:00:00:00:00:01", "mtu": 1500, "isolate": isolate,
            "subnets": [
                {"cidr": "10.0.42.0/24", "gateway": "10.0.42.1"},
                {"cidr": "fd00::/64", "gateway": "fd00::1"},
            ],
            "wish": {
                "bridge": null, "subnet4": null, "subnet6": null, "gateways": [],
                "uplinks": uplinks, "mtu": null, "isolate": isolate,
            },
        }))
        .unwrap()
    }

    fn endpoint(publishes: &[&str], egress: serde_json::Value) -> EndpointRecord {
        serde_json::from_value(json!({
            "id": "web", "number": 7, "state": "active", "network": 1, "netns": "/run/netns/web",
            "namespace": {"device": 4, "inode": 5, "cookie": 6}, "host_ifname": "nn00000007",
            "link": 9, "mac": "02:00:00:00:00:07", "host_mac": "02:00:00:00:00:08",
            "addresses": ["10.0.42.7", "fd00::7"], "mtu": 1500, "default_route": true,
            "publishes": publishes, "policy": null, "resolv": null, "egress": egress,
            "datapath": "iptables",
            "wish": {
                "network": "default", "addresses": [], "mac": null, "ifname": "eth0", "mtu": null,
                "publishes": [], "egress": {"default": "allow", "allow": [], "deny": [], "dns": []},
                "rootfs": null,
            },
        }))
        .unwrap()
    }

    fn open() -> serde_json::Value {
        json!({"default": "allow", "allow": [], "deny": [], "dns": []})
    }

    fn wanted<'a>(network: &'a NetworkRecord, record: &'a EndpointRecord) -> Wanted<'a> {
        Wanted {
            networks: vec![network],
            endpoints: vec![WantedEndpoint {
                record,
                publishes: &record.publishes,
                egress: &record.egress,
                keeps_open: false,
            }],
            mappings: Vec::new(),
        }
    }

    /// The rules without comments, each with its table.
    fn rules(wanted: &Wanted<'_>, family: Family) -> Vec<String> {
        let chains = wanted.chains(family);
        let lines = chains.iter().flat_map(|chain| {
            chain.lines(|_| None).into_iter().map(|line| {
                let (before, rest) = line.split_once(" -m comment --comment \"").unwrap();
                let (_, after) = rest.split_once('"').unwrap();
                format!("{} {before}{after}", chain.table.name())
            })
        });
        lines.collect()
    }

    #[test]
    fn a_published_endpoint_without_a_policy() {
        let (network, record) = (network(false, &[]), endpoint(&["8080:80"], open()));
        let expected = "\
mangle -A NUCNET-PREROUTING -i lo -j RETURN
mangle -A NUCNET-PREROUTING -i nucnet0 -g NUCNET-SOURCES
mangle -A NUCNET-PREROUTING -s 10.0.42.0/24 -j DROP
mangle -A NUCNET-SOURCES -s 10.0.42.7/32 -i nucnet0 -m mac --mac-source 02:00:00:00:00:07 -g NUCNET-7
mangle -A NUCNET-SOURCES -i nucnet0 -m mac --mac-source 02:00:00:00:00:07 -j DROP
mangle -A NUCNET-SOURCES -j DROP
mangle -A NUCNET-7 -d 127.0.0.0/8 -j DROP
mangle -A NUCNET-7 -d 224.0.0.0/4 -j DROP
mangle -A NUCNET-7 -m addrtype --dst-type BROADCAST -j DROP
mangle -A NUCNET-7 -d 169.254.0.0/16 -j DROP
mangle -A NUCNET-7 -p udp -m udp --sport 67 --dport 68 -j DROP
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 5 -j DROP
filter -A NUCNET-FORWARD -i nucnet0 -m conntrack --ctstate INVALID,UNTRACKED -j DROP
filter -A NUCNET-FORWARD -o nucnet0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter -A NUCNET-FORWARD -o nucnet0 -m conntrack --ctstate DNAT -j ACCEPT
filter -A NUCNET-FORWARD -i nucnet0 -o nucnet0 -j ACCEPT
filter -A NUCNET-FORWARD -o nucnet0 -j NUCNET-PEERS
filter -A NUCNET-FORWARD -o nucnet0 -j DROP
filter -A NUCNET-FORWARD -i nucnet0 -j ACCEPT
filter -A NUCNET-PEERS -i nucnet0 -j ACCEPT
filter -A NUCNET-OUTPUT -o nucnet0 -p icmp -m icmp --icmp-type 5 -j DROP
nat -A NUCNET-7 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.42.7:80
nat -A NUCNET-PREROUTING -m addrtype ! --dst-type LOCAL -j RETURN
nat -A NUCNET-PREROUTING -d 169.254.0.0/16 -j RETURN
nat -A NUCNET-PREROUTING -j NUCNET-7
nat -A NUCNET-OUTPUT -m addrtype ! --dst-type LOCAL -j RETURN
nat -A NUCNET-OUTPUT -d 169.254.0.0/16 -j RETURN
nat -A NUCNET-OUTPUT -j NUCNET-7
nat -A NUCNET-POSTROUTING -s 10.0.42.7/32 -d 10.0.42.7/32 -o nucnet0 -j SNAT --to-source 10.0.42.1
nat -A NUCNET-POSTROUTING -s 127.0.0.0/8 -o nucnet0 -j SNAT --to-source 10.0.42.1
nat -A NUCNET-POSTROUTING -o nucnet0 -j RETURN
nat -A NUCNET-POSTROUTING -o lo -j RETURN
nat -A NUCNET-POSTROUTING -s 10.0.42.0/24 -j MASQUERADE";
        let mut found = rules(&wanted(&network, &record), Family::Ipv4);
        let mut expected: Vec<String> = expected.lines().map(str::to_owned).collect();
        // Within a chain the order counts; that of the chains does not.
        let chain = |line: &String| line.split(' ').take(3).collect::<Vec<_>>().join(" ");
        found.sort_by_key(chain);
        expected.sort_by_key(chain);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_policy_is_about_what_was_asked_for_and_a_denial_about_both() {
        let egress = json!({
            "default": "deny", "allow": ["192.0.2.0/24:80,443/tcp", "host:53"],
            "deny": ["any:25"], "dns": [],
        });
        let (network, record) = (network(false, &[]), endpoint(&[], egress));
        let found = rules(&wanted(&network, &record), Family::Ipv4);
        let own = found
            .iter()
            .filter_map(|line| line.strip_prefix("filter -A NUCNET-7"));
        let expected = "\
-DENY -m limit --limit 20/sec --limit-burst 20 -j NFLOG --nflog-group 110 --nflog-prefix
-DENY -j DROP
 -m conntrack --ctstate ESTABLISHED --ctdir REPLY -j RETURN
 -m conntrack --ctstate RELATED -j RETURN
 -m conntrack --ctstate INVALID,UNTRACKED -g NUCNET-7-DENY
 -p tcp -m conntrack --ctorigdstport 25 -g NUCNET-7-DENY
 -p udp -m conntrack --ctorigdstport 25 -g NUCNET-7-DENY
 -p tcp -m tcp --dport 25 -m conntrack --ctstate DNAT -g NUCNET-7-DENY
 -p udp -m udp --dport 25 -m conntrack --ctstate DNAT -g NUCNET-7-DENY
 -p tcp -m conntrack --ctorigdst 192.0.2.0/24 --ctorigdstport 80 -j RETURN
 -p tcp -m conntrack --ctorigdst 192.0.2.0/24 --ctorigdstport 443 -j RETURN
 -p tcp -m addrtype --dst-type LOCAL -m conntrack --ctorigdstport 53 -j RETURN
 -p tcp -m conntrack --ctstate DNAT --ctorigdstport 53 -j RETURN
 -p udp -m addrtype --dst-type LOCAL -m conntrack --ctorigdstport 53 -j RETURN
 -p udp -m conntrack --ctstate DNAT --ctorigdstport 53 -j RETURN
 -g NUCNET-7-DENY";
        let own: Vec<&str> = own.map(|line| line.split(" \"").next().unwrap()).collect();
        assert_eq!(own, expected.lines().collect::<Vec<_>>());
    }

    #[test]
    fn rules_of_one_family_say_nothing_of_the_other() {
        let egress = json!({
            "default": "deny", "allow": ["192.0.2.0/24", "[2001:db8::/32]:443/tcp"],
            "deny": [], "dns": [],
        });
        let (network, record) = (network(false, &[]), endpoint(&["192.0.2.2:80:80"], egress));
        let v4 = rules(&wanted(&network, &record), Family::Ipv4).join("\n");
        let v6 = rules(&wanted(&network, &record), Family::Ipv6).join("\n");
        assert!(
            v4.contains("--ctorigdst 192.0.2.0/24") && !v4.contains("2001:db8"),
            "{v4}"
        );
        assert!(
            v6.contains("--ctorigdst 2001:db8::/32") && !v6.contains("192.0.2."),
            "{v6}"
        );
        assert!(
            v4.contains("DNAT --to") && !v6.contains("DNAT --to"),
            "{v6}"
        );
    }

    #[test]
    fn ranges_keep_the_distance_from_their_first_port() {
        let specs: Vec<PublishSpec> = ["9000-9002:80-82", "53:53/udp", "[2001:db8::1]:8080:80"]
            .iter()
            .map(|spec| spec.parse().unwrap())
            .collect();
        let target = |address: &str| -> Vec<String> {
            let rules = published(&specs, address.parse().unwrap());
            rules
                .into_iter()
                .map(|(matches, target)| format!("{matches} {target}"))
                .collect()
        };
        let to = "-j DNAT --to-destination";
        let expected = [
            format!("-p tcp -m tcp --dport 9000:9002 {to} 10.0.42.7:80-82/9000"),
            format!("-p udp -m udp --dport 53 {to} 10.0.42.7"),
        ];
        assert_eq!(target("10.0.42.7"), expected);
        let expected = [
            format!("-d 2001:db8::1/128 -p tcp -m tcp --dport 8080 {to} [fd00::7]:80"),
            format!("-p tcp -m tcp --dport 9000:9002 {to} [fd00::7]:80-82/9000"),
            format!("-p udp -m udp --dport 53 {to} fd00::7"),
        ];
        assert_eq!(target("fd00::7"), expected);
    }

    #[test]
    fn uplinks_that_serve_are_named_and_the_hosts_own_sockets_are_served_anyway() {
        let (network, record) = (network(true, &["eth1"]), endpoint(&["8080:80"], open()));
        let found = rules(&wanted(&network, &record), Family::Ipv4);
        let leads = |hook: &str| -> Vec<&str> {
            let start = format!("nat -A NUCNET-{hook} ");
            let lines = found.iter().filter_map(|line| line.strip_prefix(&start));
            lines.filter(|line| line.ends_with("NUCNET-7")).collect()
        };
        assert_eq!(
            leads("PREROUTING"),
            ["-i eth1 -j NUCNET-7", "-i nucnet0 -j NUCNET-7"]
        );
        assert_eq!(leads("OUTPUT"), ["-j NUCNET-7"]);
        assert!(
            found.iter().all(|line| !line.contains("NUCNET-PEERS")),
            "it is isolated"
        );
    }

    #[test]
    fn names_of_chains_are_short_enough_for_the_largest_number() {
        assert!(deny_chain(u32::MAX).len() <= 28, "{}", deny_chain(u32::MAX));
    }

    #[test]
    fn an_endpoint_that_goes_takes_its_chains_along() {
        let (network, record) = (network(false, &[]), endpoint(&["8080:80"], open()));
        let with = wanted(&network, &record);
        let text = change(&Saved::default(), &with.chains(Family::Ipv4)).text;
        let saved = Saved::parse(&text.replace("-I ", "-A ").replace("G 1 -m", "G -m"));
        let without = Wanted {
            networks: vec![&network],
            ..Wanted::default()
        };
        let text = change(&saved, &without.chains(Family::Ipv4)).text;
        assert_eq!(text.matches("\n-X NUCNET-7\n").count(), 2, "{text}");
        assert!(
            !text.contains("8080") && !text.contains("10.0.42.7"),
            "{text}"
        );
    }
}
