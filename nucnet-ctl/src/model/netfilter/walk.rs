//! What a chain of nucnet's does with a packet: its rules, read as netfilter reads them.
//!
//! Rules are walked in the very words that `iptables-restore` is given. What of those is not known
//! here is an error, never a guess.

use super::{CHAIN_PREFIX, Chain, Rule, Table, Tuple, owner_and_remark};
use crate::model::ports::PortRange;
use ipnet::IpNet;
use nucnet_common::{
    abi::{self, Reason},
    packet::{ICMP, ICMPV6, TCP, UDP},
};
use std::net::IpAddr;
use thiserror::Error;

/// A rule of which it cannot be said what it does.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error("nobody knows here what the rule {0:?} does")]
pub struct Unknown(String);

/// Whose an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressKind {
    /// The host's.
    Local,
    /// That of everybody in a subnet of the host's.
    Broadcast,
    /// Somebody else's.
    Other,
}

/// A packet that is at one of the kernel's chains.
#[derive(Clone, Copy, Debug)]
pub(super) struct Packet<'a> {
    /// As it is there.
    pub(super) now: Tuple,
    /// Whose its destination is.
    pub(super) destination_kind: AddressKind,
    /// Who made its frame.
    pub(super) mac: abi::Mac,
    /// By what it came in.
    pub(super) in_link: &'a str,
    /// By what it is to leave; empty: that is not known yet, or it stays.
    pub(super) out_link: &'a str,
    /// What its connection was asked for.
    pub(super) original: Tuple,
    /// How answers come back, as far as that is settled.
    pub(super) reply: Tuple,
    /// Whether it is an answer itself.
    pub(super) is_reply: bool,
    /// Whether there were packets in both directions.
    pub(super) is_established: bool,
}

impl Packet<'_> {
    fn is_aimed_elsewhere(&self) -> bool {
        let answered = self.reply.turned();
        (answered.destination, answered.destination_port)
            != (self.original.destination, self.original.destination_port)
    }
}

/// What becomes of a packet in a chain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// No rule decides.
    Passed,
    /// It may go on, whatever others say.
    Accepted,
    /// It is dropped.
    Dropped {
        reason: Reason,
        /// Whether its sender is told.
        is_told: bool,
    },
    /// It goes to another address.
    To(IpAddr, Option<u16>),
    /// It comes from another address, or that of the interface that it leaves by, and from one of
    /// those ports; none: its own, if nobody has it.
    From(Option<IpAddr>, Option<PortRange>),
}

/// A packet's way through a chain.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Walk {
    pub(super) outcome: Outcome,
    /// The number of the rule of a policy that decided; none: none did.
    pub(super) policy_rule: Option<u32>,
}

/// Walks the chain of nucnet's that one of the kernel's leads to.
pub(super) fn walk(
    chains: &[Chain],
    table: Table,
    hook: &str,
    packet: &Packet<'_>,
) -> Result<Walk, Unknown> {
    let mut walker = Walker {
        chains,
        table,
        packet,
        policy_rule: None,
        reason: None,
    };
    let outcome = walker.chain(&format!("{CHAIN_PREFIX}{hook}"))?;
    Ok(Walk {
        outcome: outcome.unwrap_or(Outcome::Passed),
        policy_rule: walker.policy_rule,
    })
}

struct Walker<'a> {
    chains: &'a [Chain],
    table: Table,
    packet: &'a Packet<'a>,
    policy_rule: Option<u32>,
    /// Why it is dropped, if it is: rules that drop, or lead where all is dropped, say so.
    reason: Option<Reason>,
}

impl Walker<'_> {
    /// What a chain makes of the packet; none: it returns to where it was led there from.
    fn chain(&mut self, name: &str) -> Result<Option<Outcome>, Unknown> {
        let is_meant = |chain: &&Chain| chain.table == self.table && chain.name == name;
        let Some(chain) = self.chains.iter().find(is_meant) else {
            return Ok(None);
        };
        for rule in &chain.rules {
            if !is_matched(rule, self.packet)? {
                continue;
            }
            self.policy_rule = rule.policy_rule().or(self.policy_rule);
            self.reason = rule.reason().or(self.reason);
            match target(rule, self.packet)? {
                Target::None => {}
                Target::Return => return Ok(None),
                Target::Jump(to) => {
                    if let Some(outcome) = self.chain(to)? {
                        return Ok(Some(outcome));
                    }
                }
                Target::Goto(to) => return self.chain(to),
                Target::Drop(is_told) => {
                    let reason = self.reason.ok_or_else(|| rule.unknown())?;
                    return Ok(Some(Outcome::Dropped { reason, is_told }));
                }
                Target::End(outcome) => return Ok(Some(outcome)),
            }
        }
        Ok(None)
    }
}

impl Rule {
    fn unknown(&self) -> Unknown {
        let words = [self.matches.as_str(), self.target.as_str()];
        Unknown(words.join(" ").trim().to_owned())
    }

    /// What its comment says beside whose it is.
    fn remark(&self) -> Option<&str> {
        owner_and_remark(&self.comment).map(|(_, remark)| remark)
    }

    /// The number of the rule of a policy that it is made of.
    fn policy_rule(&self) -> Option<u32> {
        self.remark()?.strip_prefix("rule ")?.parse().ok()
    }

    /// Why it drops.
    fn reason(&self) -> Option<Reason> {
        Reason::named(self.remark()?)
    }
}

/// Whether a rule is about a packet.
fn is_matched(rule: &Rule, packet: &Packet<'_>) -> Result<bool, Unknown> {
    let mut words = rule.matches.split_ascii_whitespace();
    let mut is_matched = true;
    while let Some(word) = words.next() {
        let (is_wanted, option) = match word {
            "!" => (false, words.next()),
            _ => (true, Some(word)),
        };
        let said = option.zip(words.next());
        let said = said.and_then(|(option, value)| holds(option, value, packet));
        is_matched &= said.ok_or_else(|| rule.unknown())? == is_wanted;
    }
    Ok(is_matched)
}

/// Whether one of the things that a rule asks for holds. `None`: nobody knows here what it asks.
fn holds(option: &str, value: &str, packet: &Packet<'_>) -> Option<bool> {
    let within = |address: IpAddr| Some(value.parse::<IpNet>().ok()?.contains(&address));
    let among = |port: u16| {
        let (first, last) = value.split_once(':').unwrap_or((value, value));
        Some((first.parse().ok()?..=last.parse().ok()?).contains(&port))
    };
    let now = &packet.now;
    match option {
        "-m" => [
            "addrtype",
            "conntrack",
            "icmp",
            "icmp6",
            "limit",
            "mac",
            "tcp",
            "udp",
        ]
        .contains(&value)
        .then_some(true),
        // A packet that is asked about is the first one in a long time.
        "--limit" | "--limit-burst" => Some(true),
        "-s" => within(now.source),
        "-d" => within(now.destination),
        "-i" => Some(value == packet.in_link),
        "-o" => Some(value == packet.out_link),
        "-p" => Some(now.protocol == protocol(value)?),
        "--sport" => among(now.source_port),
        "--dport" => among(now.destination_port),
        // Of all that ICMP has, only echo requests are asked about.
        "--icmp-type" => Some(now.protocol == ICMP && value == "8"),
        "--icmpv6-type" => Some(now.protocol == ICMPV6 && value == "128"),
        "--ctorigsrc" => within(packet.original.source),
        "--ctorigdst" => within(packet.original.destination),
        "--ctorigdstport" => among(packet.original.destination_port),
        "--ctrepldst" => within(packet.reply.destination),
        "--ctdir" => match value {
            "REPLY" => Some(packet.is_reply),
            _ => None,
        },
        "--ctstate" => {
            let mut states = value.split(',').map(|state| is_in_state(state, packet));
            states.try_fold(false, |any, state| Some(any | state?))
        }
        "--mac-source" => {
            let mac: crate::model::Mac = value.parse().ok()?;
            Some(mac.octets() == packet.mac)
        }
        "--dst-type" => match value {
            "LOCAL" => Some(packet.destination_kind == AddressKind::Local),
            "BROADCAST" => Some(packet.destination_kind == AddressKind::Broadcast),
            _ => None,
        },
        _ => None,
    }
}

fn protocol(name: &str) -> Option<u8> {
    match name {
        "tcp" => Some(TCP),
        "udp" => Some(UDP),
        "icmp" => Some(ICMP),
        "ipv6-icmp" => Some(ICMPV6),
        _ => None,
    }
}

fn is_in_state(state: &str, packet: &Packet<'_>) -> Option<bool> {
    match state {
        "ESTABLISHED" => Some(packet.is_established || packet.is_reply),
        "DNAT" => Some(packet.is_aimed_elsewhere()),
        // What is asked about belongs to a connection of its own, which it begins if need be.
        "RELATED" | "INVALID" | "UNTRACKED" => Some(false),
        _ => None,
    }
}

/// What a rule does with what it is about.
enum Target<'a> {
    None,
    Return,
    Jump(&'a str),
    Goto(&'a str),
    /// Whether the sender is told.
    Drop(bool),
    End(Outcome),
}

fn target<'a>(rule: &'a Rule, packet: &Packet<'_>) -> Result<Target<'a>, Unknown> {
    let words: Vec<&str> = rule.target.split_ascii_whitespace().collect();
    let known = || {
        Some(match words.as_slice() {
            [] => Target::None,
            ["-j", "NFLOG", ..] => Target::None,
            ["-j", "RETURN"] => Target::Return,
            ["-j", "ACCEPT"] => Target::End(Outcome::Accepted),
            ["-j", "DROP"] => Target::Drop(false),
            ["-j", "REJECT", "--reject-with", _] => Target::Drop(true),
            ["-j", "DNAT", "--to-destination", to] => {
                let (address, ports) = destination(to)?;
                let port = match ports {
                    Some(ports) => Some(ports.of(packet.now.destination_port)?),
                    None => None,
                };
                Target::End(Outcome::To(address, port))
            }
            ["-j", "SNAT", "--to-source", to] => {
                let (address, ports) = destination(to)?;
                Target::End(Outcome::From(Some(address), ports.map(|ports| ports.range)))
            }
            ["-j", "MASQUERADE"] => Target::End(Outcome::From(None, None)),
            ["-j", "MASQUERADE", "--to-ports", ports] => {
                Target::End(Outcome::From(None, Some(range(ports)?)))
            }
            ["-j", chain] if chain.starts_with(CHAIN_PREFIX) => Target::Jump(chain),
            ["-g", chain] if chain.starts_with(CHAIN_PREFIX) => Target::Goto(chain),
            _ => return None,
        })
    };
    known().ok_or_else(|| rule.unknown())
}

/// Ports of a translation.
#[derive(Clone, Copy)]
struct Ports {
    range: PortRange,
    /// The port that leads to the first one; none: any does.
    base: Option<u16>,
}

impl Ports {
    /// Where a port leads.
    fn of(self, asked: u16) -> Option<u16> {
        let first = self.range.first();
        let port = match self.base {
            Some(base) => first.checked_add(asked.checked_sub(base)?)?,
            None => first,
        };
        self.range.contains(port).then_some(port)
    }
}

/// `ADDRESS`, `ADDRESS:PORT`, `ADDRESS:FIRST-LAST` or, with the port that leads to the first one,
/// `ADDRESS:FIRST-LAST/PORT`; IPv6 in brackets where there is a port.
fn destination(text: &str) -> Option<(IpAddr, Option<Ports>)> {
    if let Ok(address) = text.parse() {
        return Some((address, None));
    }
    let (address, ports) = text.rsplit_once(':')?;
    let address = address.trim_start_matches('[').trim_end_matches(']');
    let (ports, base) = match ports.split_once('/') {
        Some((ports, base)) => (ports, Some(base.parse().ok()?)),
        None => (ports, None),
    };
    let range = range(ports)?;
    Some((address.parse().ok()?, Some(Ports { range, base })))
}

/// `PORT` or `FIRST-LAST`.
fn range(text: &str) -> Option<PortRange> {
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    PortRange::new(first.parse().ok()?, last.parse().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{
        netfilter::{DROP_PREFIX, Family, rules::fixture},
        record::MappingRecord,
    };
    use serde_json::json;

    fn mapping(number: u32, spec: serde_json::Value) -> MappingRecord {
        serde_json::from_value(json!({
            "id": format!("m{number}"), "number": number, "state": "active", "spec": spec,
            "lan": "192.168.0.0/24", "link": 0,
        }))
        .unwrap()
    }

    #[test]
    fn every_rule_that_nucnet_writes_is_understood() {
        let egress = json!({
            "default": "deny", "dns": ["9.9.9.9"], "reject": true,
            "allow": [
                "any:80,8000-8010/tcp", "10.0.0.0/8", "host:53", "metadata", "internet:443",
                "[2001:db8::/32]:443", "any/icmp", "private/udp",
            ],
            "deny": ["any:25", "host", "link-local", "192.0.2.0/24:1-9"],
        });
        let publishes = [
            "8080:80",
            "192.0.2.2:9000-9010:9000-9010",
            "[2001:db8::2]:53:5353/udp",
            "7000-7009:17000-17009",
        ];
        let mappings = [
            mapping(
                20,
                json!({
                    "kind": "dnat", "ext_ip": "192.0.2.2", "ports": "22,80-90", "protocol": "tcp",
                    "int_ip": "10.0.42.9", "int_port": 8080, "ext_if": "eth1",
                }),
            ),
            mapping(
                21,
                json!({
                    "kind": "hairpin", "ext_ip": "192.0.2.2", "int_ip": "192.168.0.9",
                    "ports": "443", "protocol": "tcp", "lan": null,
                }),
            ),
            mapping(
                22,
                json!({
                    "kind": "snat", "int": "192.168.0.0/24", "ext_ip": "192.0.2.3", "ext_if": null,
                }),
            ),
            mapping(
                23,
                json!({
                    "kind": "snat", "int": "fd01::/64", "ext_ip": "2001:db8::3", "ext_if": "eth1",
                }),
            ),
        ];
        let mut seen = 0;
        for (isolate, keeps_open) in [(false, false), (true, true)] {
            let (mut network, record) = (
                fixture::network(isolate, &["eth0"]),
                fixture::endpoint(&publishes, egress.clone()),
            );
            let wish = network.wish.as_mut().expect("a network that was asked for");
            wish.behaviour.keep_ports = isolate;
            let mut wanted = fixture::wanted(&network, &record);
            wanted.endpoints[0].keeps_open = keeps_open;
            wanted.mappings = mappings.iter().collect();
            for family in Family::ALL {
                let (source, destination) = match family {
                    Family::Ipv4 => ("10.0.42.7", "192.0.2.2"),
                    Family::Ipv6 => ("fd00::7", "2001:db8::2"),
                };
                let now = Tuple {
                    source: source.parse().unwrap(),
                    destination: destination.parse().unwrap(),
                    protocol: TCP,
                    source_port: 40_000,
                    destination_port: 8080,
                };
                let packet = Packet {
                    now,
                    destination_kind: AddressKind::Local,
                    mac: [2, 0, 0, 0, 0, 7],
                    in_link: "nucnet0",
                    out_link: "",
                    original: now,
                    reply: now.turned(),
                    is_reply: false,
                    is_established: false,
                };
                for chain in wanted.chains(family) {
                    for rule in &chain.rules {
                        let matched = is_matched(rule, &packet);
                        assert!(matched.is_ok(), "{matched:?}");
                        // A range that does not lead the port anywhere says so, where it matched.
                        if matched == Ok(true) || !rule.target.contains('/') {
                            let target = target(rule, &packet);
                            assert!(target.is_ok(), "{:?}", target.err());
                        }
                        let leads_to_a_drop = rule.target.contains(DROP_PREFIX)
                            || rule.target.contains("REJECT")
                            || rule.target == "-j DROP" && !chain.name.starts_with(DROP_PREFIX);
                        assert_eq!(rule.reason().is_some(), leads_to_a_drop, "{rule:?}");
                        seen += 1;
                    }
                }
            }
        }
        assert!(seen > 200, "{seen}");
    }

    #[test]
    fn what_is_not_known_is_said_to_be_unknown() {
        let packet = |rule: &Rule| {
            let address = IpAddr::from([10, 0, 42, 7]);
            let now = Tuple {
                source: address,
                destination: address,
                protocol: UDP,
                source_port: 1,
                destination_port: 2,
            };
            let packet = Packet {
                now,
                destination_kind: AddressKind::Other,
                mac: [0; 6],
                in_link: "eth0",
                out_link: "",
                original: now,
                reply: now.turned(),
                is_reply: false,
                is_established: false,
            };
            let chain = Chain {
                table: Table::Filter,
                name: "NUCNET-INPUT".to_owned(),
                rules: vec![rule.clone()],
            };
            walk(&[chain], Table::Filter, "INPUT", &packet)
        };
        for (matches, target) in [
            ("-m owner --uid-owner 0", "-j DROP"),
            ("-p sctp", "-j ACCEPT"),
            ("-m conntrack --ctstate SNAT", "-j ACCEPT"),
            ("-s", "-j ACCEPT"),
            ("-s 10.0.0.0", "-j ACCEPT"),
            ("", "-j MARK --set-mark 1"),
            ("", "-j LOG"),
            ("", "-j DROP"),
        ] {
            let rule = Rule {
                matches: matches.to_owned(),
                comment: "nucnet:web of no reason".to_owned(),
                target: target.to_owned(),
            };
            assert!(packet(&rule).is_err(), "{rule:?}");
        }
    }
}
