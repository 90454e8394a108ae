//! Policies: what endpoints may reach.

use super::{Chains, Wanted, WantedEndpoint, dropped, host, of_network, own_chain, ports};
use crate::model::{
    netfilter::{CHAIN_PREFIX, Family, LOG_GROUP, Table},
    policy::Action,
    ports::PortRange,
    preset::Preset,
    record::NetworkRecord,
    rule::{Rule, RuleProtocol, Target},
};
use nucnet_common::abi::Reason;

/// How many denials of an endpoint are logged in a second; the rest is only counted.
const LOGGED: &str = "20/sec";

/// Where what an endpoint's policy denies ends.
pub(super) fn deny_chain(number: u32) -> String {
    format!("{CHAIN_PREFIX}{number}-DENY")
}

impl Wanted<'_> {
    /// What endpoints may reach.
    pub(super) fn policies(&self, chains: &mut Chains) {
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
}

/// The chains of an endpoint's policy.
fn policy(endpoint: &WantedEndpoint<'_>, chains: &mut Chains) {
    let (family, record, policy) = (chains.family, endpoint.record, endpoint.egress);
    let (id, deny) = (record.id.as_str(), deny_chain(record.number));
    let told = policy
        .log_denied()
        .then(|| chains.told(Table::Filter, Reason::Policy));
    let end = chains.chain(Table::Filter, &deny);
    if let Some((matches, target)) = told {
        let log = format!("-j NFLOG --nflog-group {LOG_GROUP} --nflog-prefix \"nucnet:{id}\"");
        // One that is logged is not logged again for being sent again.
        end.rule(
            format!("-m limit --limit {LOGGED} --limit-burst 20"),
            id,
            log,
        );
        end.rule(matches, id, target);
    }
    if policy.rejects() {
        let error = match family {
            Family::Ipv4 => "icmp-admin-prohibited",
            Family::Ipv6 => "icmp6-adm-prohibited",
        };
        let comment = dropped(id, Reason::Policy);
        end.rule("-p tcp", &comment, "-j REJECT --reject-with tcp-reset");
        // An error is never the answer to an error.
        end.rule("", &comment, format!("-j REJECT --reject-with {error}"));
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

fn destinations(rule: &Rule, family: Family) -> Destinations {
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
fn services(rule: &Rule, family: Family) -> Vec<(Option<&'static str>, Option<PortRange>)> {
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
fn asked_for(rule: &Rule, family: Family) -> Vec<String> {
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
fn really(rule: &Rule, family: Family) -> Vec<String> {
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
