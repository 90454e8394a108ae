//! Egress rules: where an endpoint may or may not send.

use super::{
    Cidr, Invalid, Problem,
    ports::{PortRange, parse_port},
    preset::Preset,
};
use nucnet_common::packet::{ICMP, ICMPV6, TCP, UDP};
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr, str::FromStr};

/// Which destinations.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    /// Both families.
    Any,
    /// One prefix.
    Cidr(Cidr),
    /// Destinations that have a name.
    Preset(Preset),
}

/// Which protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum RuleProtocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// ICMP and ICMPv6.
    Icmp,
}

/// `CIDR|any|PRESET[:PORT[-END][,PORT[-END]]...][/tcp|udp|icmp]`, in its canonical form: host bits
/// masked, ports sorted and merged.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Rule {
    target: Target,
    /// Disjoint and ascending; empty: every port.
    ports: Vec<PortRange>,
    protocol: Option<RuleProtocol>,
}

impl Rule {
    /// The rule of those parts; ICMP has no ports.
    pub(super) fn new(
        target: Target,
        ports: Vec<PortRange>,
        protocol: Option<RuleProtocol>,
    ) -> Self {
        Self {
            target,
            ports: merged(ports),
            protocol,
        }
    }

    /// Which destinations.
    pub fn target(&self) -> Target {
        self.target
    }

    /// Which ports, disjoint and ascending; empty: every port.
    pub fn ports(&self) -> &[PortRange] {
        &self.ports
    }

    /// Which protocol. None: every protocol or, where there are ports, TCP and UDP.
    pub fn protocol(&self) -> Option<RuleProtocol> {
        self.protocol
    }

    /// All ports and protocols of a prefix.
    pub fn of_cidr(cidr: Cidr) -> Self {
        Self::new(Target::Cidr(cidr), Vec::new(), None)
    }

    /// All ports and protocols of what has a name.
    pub fn of_preset(preset: Preset) -> Self {
        Self::new(Target::Preset(preset), Vec::new(), None)
    }

    /// What a resolver needs: port 53, both protocols.
    pub fn resolver(address: IpAddr) -> Self {
        Self {
            target: Target::Cidr(Cidr::host(address.to_canonical())),
            ports: vec![PortRange::one(53)],
            protocol: None,
        }
    }
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Destination {
    /// To whom.
    pub address: IpAddr,
    /// By which protocol, as IP numbers them.
    pub protocol: u8,
    /// To which port; 0: the protocol has none.
    pub port: u16,
    /// Whether the address is the host's own.
    pub is_hosts: bool,
}

impl Rule {
    /// Whether it is about that destination.
    pub fn covers(&self, destination: &Destination) -> bool {
        let covers = |cidr: Cidr| cidr.contains(destination.address);
        let is_there = match self.target {
            Target::Any => true,
            Target::Cidr(cidr) => covers(cidr),
            Target::Preset(preset) => match preset.prefixes() {
                Some(prefixes) => prefixes.into_iter().any(covers),
                None => destination.is_hosts,
            },
        };
        let has_ports = matches!(destination.protocol, TCP | UDP);
        let is_by = match self.protocol {
            Some(RuleProtocol::Tcp) => destination.protocol == TCP,
            Some(RuleProtocol::Udp) => destination.protocol == UDP,
            Some(RuleProtocol::Icmp) => matches!(destination.protocol, ICMP | ICMPV6),
            None => has_ports || self.ports.is_empty(),
        };
        let mut ranges = self.ports.iter();
        let is_port = |range: &PortRange| range.contains(destination.port);
        is_there && is_by && (self.ports.is_empty() || ranges.any(is_port))
    }
}

/// Disjoint and ascending, neighbours joined.
fn merged(mut ports: Vec<PortRange>) -> Vec<PortRange> {
    ports.sort();
    let mut merged: Vec<PortRange> = Vec::with_capacity(ports.len());
    for range in ports {
        match merged.last_mut() {
            Some(last) if u32::from(range.first()) <= u32::from(last.last()) + 1 => {
                let end = last.last().max(range.last());
                *last = PortRange::new(last.first(), end).unwrap_or(*last);
            }
            _ => merged.push(range),
        }
    }
    merged
}

impl FromStr for Rule {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = |problem| Invalid::new("rule", text, problem);
        // What follows the last '/' is a protocol, unless it is a prefix length.
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(RuleProtocol::Tcp)),
            Some((rest, "udp")) => (rest, Some(RuleProtocol::Udp)),
            Some((rest, "icmp")) => (rest, Some(RuleProtocol::Icmp)),
            Some((_, word)) if word.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                return Err(invalid(Problem::RuleProtocol(word.to_owned())));
            }
            _ => (text, None),
        };
        let (target, ports) = if let Some(rest) = rest.strip_prefix('[') {
            let (target, rest) = rest.split_once(']').ok_or_else(|| invalid(Problem::Rule))?;
            let ports = match rest {
                "" => None,
                rest => Some(
                    rest.strip_prefix(':')
                        .ok_or_else(|| invalid(Problem::Rule))?,
                ),
            };
            if !target.contains(':') {
                return Err(invalid(Problem::BracketsAreForV6));
            }
            (target, ports)
        } else if rest.matches(':').count() > 1 {
            // IPv6 without brackets has no ports; "2001:db8::/32:443" is not an address.
            (rest, None)
        } else {
            match rest.split_once(':') {
                Some((target, ports)) => (target, Some(ports)),
                None => (rest, None),
            }
        };
        let target = match target {
            "any" => Target::Any,
            target if let Some(preset) = Preset::named(target) => Target::Preset(preset),
            target => Target::Cidr(target.parse().map_err(|_| {
                // "2001:db8::/32:443": say what is missing.
                let brackets = target.matches(':').count() > 1
                    && target.contains('/')
                    && target
                        .rsplit_once(':')
                        .is_some_and(|(cidr, _)| cidr.parse::<Cidr>().is_ok());
                invalid(if brackets {
                    Problem::NeedsBrackets
                } else {
                    Problem::Rule
                })
            })?),
        };
        let mut ranges = Vec::new();
        if let Some(ports) = ports {
            for item in ports.split(',') {
                let port = |text: &str| {
                    parse_port(text)
                        .filter(|port| *port > 0)
                        .ok_or_else(|| invalid(Problem::RulePort(text.to_owned())))
                };
                ranges.push(match item.split_once('-') {
                    Some((first, last)) => PortRange::new(port(first)?, port(last)?)
                        .ok_or_else(|| invalid(Problem::RangeBackwards))?,
                    None => PortRange::one(port(item)?),
                });
            }
            if protocol == Some(RuleProtocol::Icmp) {
                return Err(invalid(Problem::IcmpPorts));
            }
        }
        Ok(Self::new(target, ranges, protocol))
    }
}

impl TryFrom<String> for Rule {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Rule> for String {
    fn from(rule: Rule) -> Self {
        rule.to_string()
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.target {
            Target::Any => f.write_str("any")?,
            Target::Preset(preset) => preset.fmt(f)?,
            Target::Cidr(cidr) if cidr.net().addr().is_ipv6() && !self.ports.is_empty() => {
                write!(f, "[{cidr}]")?;
            }
            Target::Cidr(cidr) => cidr.fmt(f)?,
        }
        for (index, range) in self.ports.iter().enumerate() {
            write!(f, "{}{range}", if index == 0 { ':' } else { ',' })?;
        }
        match self.protocol {
            Some(RuleProtocol::Tcp) => f.write_str("/tcp"),
            Some(RuleProtocol::Udp) => f.write_str("/udp"),
            Some(RuleProtocol::Icmp) => f.write_str("/icmp"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_grammar_of_the_contract_is_accepted_and_shown_canonically() {
        for (text, shown) in [
            ("any", "any"),
            ("any/icmp", "any/icmp"),
            ("any:53", "any:53"),
            ("any:443,80-90,85-100,101/tcp", "any:80-101,443/tcp"),
            ("10.1.2.3", "10.1.2.3/32"),
            ("10.1.2.3/8", "10.0.0.0/8"),
            ("10.1.2.3/8/udp", "10.0.0.0/8/udp"),
            ("10.1.2.3:443/tcp", "10.1.2.3/32:443/tcp"),
            ("10.0.0.0/8:443", "10.0.0.0/8:443"),
            ("2001:DB8::1", "2001:db8::1/128"),
            ("2001:db8::1/32", "2001:db8::/32"),
            ("2001:db8::/32/icmp", "2001:db8::/32/icmp"),
            ("[2001:db8::/32]:443/tcp", "[2001:db8::/32]:443/tcp"),
            ("[2001:db8::1]:443", "[2001:db8::1/128]:443"),
            ("[2001:db8::/32]/udp", "2001:db8::/32/udp"),
            ("::/0", "::/0"),
            ("metadata", "metadata"),
            ("link-local/icmp", "link-local/icmp"),
            ("host:53,22", "host:22,53"),
            ("internet:443,80/tcp", "internet:80,443/tcp"),
            ("[::ffff:10.0.0.1]:80", "10.0.0.1/32:80"),
        ] {
            let rule: Rule = text.parse().unwrap_or_else(|error| panic!("{error}"));
            assert_eq!(rule.to_string(), shown);
            assert_eq!(shown.parse::<Rule>().unwrap(), rule);
        }
    }

    #[test]
    fn what_is_not_a_rule_is_refused_with_its_reason() {
        for (text, problem) in [
            ("", Problem::Rule),
            ("all", Problem::Rule),
            ("Private", Problem::Rule),
            ("[private]:80", Problem::BracketsAreForV6),
            ("host:80/icmp", Problem::IcmpPorts),
            ("10.0.0.0/33", Problem::Rule),
            ("10.0.0/8", Problem::Rule),
            ("10.0.0.0/8:", Problem::RulePort("".into())),
            ("10.0.0.0/8:0", Problem::RulePort("0".into())),
            ("10.0.0.0/8:1,", Problem::RulePort("".into())),
            ("10.0.0.0/8:65536", Problem::RulePort("65536".into())),
            ("10.0.0.0/8:9-8", Problem::RangeBackwards),
            ("10.0.0.0/8/sctp", Problem::RuleProtocol("sctp".into())),
            ("10.0.0.0/8/TCP", Problem::RuleProtocol("TCP".into())),
            ("any:80/icmp", Problem::IcmpPorts),
            ("2001:db8::/32:443", Problem::NeedsBrackets),
            ("[10.0.0.0/8]:443", Problem::BracketsAreForV6),
            ("[2001:db8::/32", Problem::Rule),
            ("[2001:db8::/32]443", Problem::Rule),
            ("fe80::1%eth0", Problem::Rule),
        ] {
            assert_eq!(
                text.parse::<Rule>().expect_err(text).problem,
                problem,
                "{text:?}"
            );
        }
    }

    proptest! {
        #[test]
        fn no_text_panics_and_what_parses_round_trips(text in "(any|host|private|link-local|[\\[\\]:0-9./,a-f-]{0,30})(/(tcp|udp|icmp))?") {
            if let Ok(rule) = text.parse::<Rule>() {
                prop_assert_eq!(rule.to_string().parse::<Rule>().unwrap(), rule);
            }
        }
    }
}
