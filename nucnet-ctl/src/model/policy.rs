//! Egress policies, and what the maps hold of them.
//!
//! Rules are a set: a packet is judged by all the rules that cover its destination, however
//! long their prefixes; deny beats allow, allow beats the default. A longest-prefix-match trie
//! finds one prefix only, so each prefix gets a *class*: the union of the rules of all the
//! prefixes of its family that cover it. A class is held as verdicts for disjoint intervals of
//! ports, cut into prefixes. The rules about the host's own addresses, which no prefix can name,
//! are one more class.

use super::{
    Invalid, Problem,
    address::{Cidr, parse_ip, to_abi},
    ports::PortRange,
    rule::{Rule, RuleProtocol, Target},
};
use ipnet::IpNet;
use nucnet_common::abi::{
    self, PolicyAction, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyProtocol, PolicyRule,
    policy_flag,
};
use serde::{Deserialize, Serialize};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, hash_map},
    fmt,
    net::IpAddr,
    rc::Rc,
    str::FromStr,
};

/// What happens where no rule says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Goes on.
    #[default]
    Allow,
    /// Is dropped.
    Deny,
}

impl Action {
    /// As the maps hold it.
    pub fn abi(self) -> PolicyAction {
        match self {
            Self::Allow => PolicyAction::Allow,
            Self::Deny => PolicyAction::Deny,
        }
    }
}

impl fmt::Display for Action {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Allow => "allow",
            Self::Deny => "deny",
        })
    }
}

/// The address of a resolver: unicast, and not a loopback address, which would be the
/// endpoint's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Resolver(IpAddr);

impl Resolver {
    /// The address.
    pub fn address(self) -> IpAddr {
        self.0
    }
}

impl FromStr for Resolver {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let address = parse_ip("--dns", text)?;
        let link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        // 169.254.169.253 and the like are resolvers of clouds, but the datapath carries no
        // link-local packets.
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local
        {
            return Err(Invalid::new("--dns", text, Problem::Resolver));
        }
        Ok(Self(address))
    }
}

impl TryFrom<String> for Resolver {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Resolver> for String {
    fn from(resolver: Resolver) -> Self {
        resolver.0.to_string()
    }
}

impl fmt::Display for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An egress policy as the user gave it, each rule once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    default: Action,
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    dns: Vec<Resolver>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allow_dns: Option<bool>,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    log_denied: bool,
}

fn yes() -> bool {
    true
}

fn is_yes(flag: &bool) -> bool {
    *flag
}

impl Default for Policy {
    /// No policy: everything may leave.
    fn default() -> Self {
        Self::new(None, Vec::new(), Vec::new(), Vec::new())
    }
}

impl Policy {
    /// The policy of a command line. Without a stated default, any allow makes it deny.
    pub fn new(
        default: Option<Action>,
        allow: Vec<Rule>,
        deny: Vec<Rule>,
        dns: Vec<Resolver>,
    ) -> Self {
        let (allow, deny, dns) = (once(allow), once(deny), once(dns));
        let implied = if allow.is_empty() {
            Action::Allow
        } else {
            Action::Deny
        };
        Self {
            default: default.unwrap_or(implied),
            allow,
            deny,
            dns,
            allow_dns: None,
            log_denied: true,
        }
    }

    /// What happens where no rule says otherwise.
    pub fn default_action(&self) -> Action {
        self.default
    }

    /// What may leave.
    pub fn allow(&self) -> &[Rule] {
        &self.allow
    }

    /// What may not.
    pub fn deny(&self) -> &[Rule] {
        &self.deny
    }

    /// The resolvers.
    pub fn dns(&self) -> &[Resolver] {
        &self.dns
    }

    /// The same with those resolvers in place of its own.
    #[must_use]
    pub fn with_resolvers(mut self, resolvers: Vec<Resolver>) -> Self {
        self.dns = once(resolvers);
        self
    }

    /// The same with the resolvers allowed on port 53 or not, whether there are rules or not.
    #[must_use]
    pub fn with_dns_allowed(mut self, allowed: bool) -> Self {
        self.allow_dns = Some(allowed);
        self
    }

    /// Whether the resolvers are allowed whatever rules there are; none: where there are rules.
    pub fn allow_dns(&self) -> Option<bool> {
        self.allow_dns
    }

    /// Whether denials are told to those who watch; they are counted in any case.
    pub fn log_denied(&self) -> bool {
        self.log_denied
    }

    /// The same with denials told, or only counted.
    #[must_use]
    pub fn with_denied_logged(mut self, logged: bool) -> Self {
        self.log_denied = logged;
        self
    }

    /// Whether there is anything to enforce.
    pub fn is_in_force(&self) -> bool {
        self.has_rules() || self.default == Action::Deny
    }

    fn has_rules(&self) -> bool {
        !(self.allow.is_empty() && self.deny.is_empty())
    }

    /// The rules as numbered from 1 on: allows, denies, resolvers. Resolvers count where there is
    /// another rule, unless the policy says otherwise.
    pub fn rules(&self) -> impl Iterator<Item = (u32, Action, Rule)> {
        let resolvers = match self.allow_dns.unwrap_or_else(|| self.has_rules()) {
            true => self.dns.as_slice(),
            false => &[],
        };
        let allow = self.allow.iter().map(|rule| (Action::Allow, rule.clone()));
        let deny = self.deny.iter().map(|rule| (Action::Deny, rule.clone()));
        let dns = resolvers
            .iter()
            .map(|dns| (Action::Allow, Rule::resolver(dns.0)));
        (1..)
            .zip(allow.chain(deny).chain(dns))
            .map(|(number, (action, rule))| (number, action, rule))
    }

    /// The policy as the maps hold it. `first_class` and those after it must be numbers that
    /// no class had before. The same arguments give the same entries.
    pub fn compile(&self, policy: u32, first_class: u32) -> Result<Compiled, Invalid> {
        let mut compiled = Compiler::new(policy, first_class).run(self)?;
        compiled.number = policy;
        compiled.default = self.default;
        compiled.is_quiet = !self.log_denied;
        Ok(compiled)
    }
}

fn once<T: PartialEq + Eq + std::hash::Hash + Clone>(values: Vec<T>) -> Vec<T> {
    let mut seen = std::collections::HashSet::with_capacity(values.len());
    values
        .into_iter()
        .filter(|value| seen.insert(value.clone()))
        .collect()
}

/// One policy as the maps have it: entries of `policy_cidrs` and `policy_ports` (length of the key
/// in bits, key, value), and what the endpoint's own entry says. The default is no policy.
#[derive(Clone, Debug, Default)]
pub struct Compiled {
    /// Number of the policy; 0: none.
    pub number: u32,
    /// What happens where no rule says otherwise.
    pub default: Action,
    /// Class of the rules about the host's own addresses; 0: there is none.
    pub host_class: u32,
    /// Whether denials are only counted.
    pub is_quiet: bool,
    /// Of `policy_cidrs`.
    pub cidrs: Vec<(u32, PolicyCidrKey, PolicyClass)>,
    /// Of `policy_ports`.
    pub ports: Vec<(u32, PolicyPortKey, PolicyRule)>,
    /// How many numbers of classes it takes.
    pub classes: u32,
}

impl Compiled {
    /// How many entries it has.
    pub fn entries(&self) -> usize {
        self.cidrs.len() + self.ports.len()
    }

    /// Puts it in force in an endpoint's entry. Flows that were judged under policy `since` or a
    /// later one are not judged again.
    pub fn enforce(&self, since: u32, endpoint: &mut abi::Endpoint) {
        endpoint.policy = self.number;
        endpoint.policy_default = self.default.abi() as u32;
        endpoint.policy_since = since;
        endpoint.policy_host = self.host_class;
        endpoint.policy_flags = match self.is_quiet {
            true => policy_flag::QUIET,
            false => 0,
        };
    }
}

/// A verdict for some ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Interval {
    ports: PortRange,
    verdict: Verdict,
}

/// Which action, and by which rule. The smallest is the one that counts: deny beats allow,
/// and of rules that agree the first is named.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Verdict {
    allow: bool,
    rule: u32,
}

const PROTOCOLS: [PolicyProtocol; 4] = [
    PolicyProtocol::Other,
    PolicyProtocol::Tcp,
    PolicyProtocol::Udp,
    PolicyProtocol::Icmp,
];

/// Disjoint, ascending intervals for each of [`PROTOCOLS`].
type Content = [Vec<Interval>; 4];

struct Compiler {
    policy: u32,
    next_class: u32,
    classes: HashMap<Rc<Content>, u32>,
    compiled: Compiled,
}

impl Compiler {
    fn new(policy: u32, first_class: u32) -> Self {
        Self {
            policy,
            next_class: first_class,
            classes: HashMap::new(),
            compiled: Compiled::default(),
        }
    }

    fn run(mut self, policy: &Policy) -> Result<Compiled, Invalid> {
        // By first address, then length: a prefix comes after all those that cover it, and
        // right after them those that it covers.
        let mut v4: BTreeMap<(u128, u8), Content> = BTreeMap::new();
        let mut v6: BTreeMap<(u128, u8), Content> = BTreeMap::new();
        let mut host = Content::default();
        for (number, action, rule) in policy.rules() {
            let verdict = Verdict {
                allow: action == Action::Allow,
                rule: number,
            };
            let nets = match rule.target() {
                Target::Any => vec![Cidr::ALL_V4, Cidr::ALL_V6],
                Target::Cidr(cidr) => vec![cidr],
                Target::Preset(preset) => match preset.prefixes() {
                    Some(prefixes) => prefixes,
                    None => {
                        add(&mut host, &rule, verdict);
                        continue;
                    }
                },
            };
            for cidr in nets {
                let address = u128::from_be_bytes(to_abi(cidr.net().addr()));
                let content = match cidr.net() {
                    IpNet::V4(net) => v4.entry((address, 96 + net.prefix_len())).or_default(),
                    IpNet::V6(net) => v6.entry((address, net.prefix_len())).or_default(),
                };
                add(content, &rule, verdict);
            }
        }
        // No IPv6 prefix may speak for IPv4: mapped IPv4 gets an entry of its own.
        let mapped = (u128::from_be_bytes(abi::ANY_V4), 96);
        let covered = v6.keys().any(|prefix| covers(*prefix, mapped));
        if covered {
            v4.entry(mapped).or_default();
        }
        self.family(v4, covered)?;
        self.family(v6, false)?;
        self.compiled.host_class = self.class(&Rc::new(union(None, host)))?;
        self.compiled.classes = self.classes.len() as u32;
        Ok(self.compiled)
    }

    /// The prefixes of one family. `root_needed`: the first is needed even if it says nothing.
    fn family(
        &mut self,
        prefixes: BTreeMap<(u128, u8), Content>,
        mut root_needed: bool,
    ) -> Result<(), Invalid> {
        let mut covering: Vec<((u128, u8), Rc<Content>, u32)> = Vec::new();
        for (prefix, own) in prefixes {
            while covering
                .last()
                .is_some_and(|(other, ..)| !covers(*other, prefix))
            {
                covering.pop();
            }
            let (inherited, inherited_class) = match covering.last() {
                Some((_, content, class)) => (Some(Rc::clone(content)), *class),
                None => (None, 0),
            };
            let content = Rc::new(union(inherited.as_deref(), own));
            let class = self.class(&content)?;
            if class != inherited_class || root_needed {
                self.cidr(prefix, class)?;
            }
            root_needed = false;
            covering.push((prefix, content, class));
        }
        Ok(())
    }

    fn cidr(&mut self, (address, length): (u128, u8), class: u32) -> Result<(), Invalid> {
        if self.compiled.cidrs.len() == abi::size::POLICY_CIDRS {
            return Err(too_large(abi::map::POLICY_CIDRS, abi::size::POLICY_CIDRS));
        }
        let key = PolicyCidrKey {
            policy: self.policy.to_be_bytes(),
            address: address.to_be_bytes(),
        };
        self.compiled
            .cidrs
            .push((32 + u32::from(length), key, PolicyClass { class }));
        Ok(())
    }

    fn class(&mut self, content: &Rc<Content>) -> Result<u32, Invalid> {
        if content.iter().all(Vec::is_empty) {
            return Ok(0);
        }
        let class = match self.classes.entry(Rc::clone(content)) {
            hash_map::Entry::Occupied(known) => return Ok(*known.get()),
            hash_map::Entry::Vacant(new) => *new.insert(self.next_class),
        };
        // Each class has an entry: there are fewer than numbers.
        self.next_class = self
            .next_class
            .checked_add(1)
            .ok_or_else(|| too_large(abi::map::POLICY_PORTS, abi::size::POLICY_PORTS))?;
        for (protocol, intervals) in PROTOCOLS.into_iter().zip(content.iter()) {
            let by_port = matches!(protocol, PolicyProtocol::Tcp | PolicyProtocol::Udp);
            for interval in intervals {
                let action = if interval.verdict.allow {
                    PolicyAction::Allow
                } else {
                    PolicyAction::Deny
                };
                let value = PolicyRule {
                    action: action as u32,
                    rule: interval.verdict.rule,
                };
                for prefix in interval.ports.prefixes() {
                    if self.compiled.ports.len() == abi::size::POLICY_PORTS {
                        return Err(too_large(abi::map::POLICY_PORTS, abi::size::POLICY_PORTS));
                    }
                    let key = PolicyPortKey {
                        class: class.to_be_bytes(),
                        protocol: protocol as u8,
                        pad: 0,
                        port: prefix.first.to_be_bytes(),
                    };
                    let length = if by_port {
                        48 + u32::from(prefix.length)
                    } else {
                        64
                    };
                    self.compiled.ports.push((length, key, value));
                }
            }
        }
        Ok(class)
    }
}

fn too_large(map: &'static str, limit: usize) -> Invalid {
    let problem = Problem::PolicyTooLarge { map, limit };
    Invalid::new("egress policy", "of this size", problem)
}

fn covers((outer, length): (u128, u8), (inner, inner_length): (u128, u8)) -> bool {
    let differing = outer ^ inner;
    length <= inner_length && (length == 0 || differing >> (128 - u32::from(length)) == 0)
}

/// Adds what one rule says; intervals may overlap until [`union`].
fn add(content: &mut Content, rule: &Rule, verdict: Verdict) {
    let [other, tcp, udp, icmp] = content;
    // Neither other protocols nor ICMP have ports: they are held as port 0.
    let portless = [PortRange::one(0)];
    let every_port = [PortRange::ALL];
    let ports = if rule.ports().is_empty() {
        &every_port
    } else {
        rule.ports()
    };
    let say = |intervals: &mut Vec<Interval>, ports: &[PortRange]| {
        intervals.extend(ports.iter().map(|&ports| Interval { ports, verdict }));
    };
    match rule.protocol() {
        Some(RuleProtocol::Tcp) => say(tcp, ports),
        Some(RuleProtocol::Udp) => say(udp, ports),
        Some(RuleProtocol::Icmp) => say(icmp, &portless),
        None => {
            say(tcp, ports);
            say(udp, ports);
            if rule.ports().is_empty() {
                say(other, &portless);
                say(icmp, &portless);
            }
        }
    }
}

/// What a prefix inherits and what its own rules say, as disjoint intervals.
fn union(inherited: Option<&Content>, own: Content) -> Content {
    let mut content = own;
    for (index, intervals) in content.iter_mut().enumerate() {
        if let Some(inherited) = inherited {
            intervals.extend(&inherited[index]);
        }
        *intervals = disjoint(std::mem::take(intervals));
    }
    content
}

/// Sweeps over the ports; of the intervals at a port, the smallest verdict counts.
fn disjoint(mut intervals: Vec<Interval>) -> Vec<Interval> {
    if intervals.len() < 2 {
        return intervals;
    }
    intervals.sort_by_key(|interval| interval.ports);
    let mut points: Vec<u32> = intervals
        .iter()
        .flat_map(|i| [u32::from(i.ports.first()), u32::from(i.ports.last()) + 1])
        .collect();
    points.sort_unstable();
    points.dedup();

    let mut result: Vec<Interval> = Vec::new();
    let mut open: BinaryHeap<Reverse<(Verdict, u16)>> = BinaryHeap::new();
    let mut coming = intervals.into_iter().peekable();
    for pair in points.windows(2) {
        let (first, last) = (pair[0], pair[1] - 1);
        while let Some(interval) = coming.next_if(|i| u32::from(i.ports.first()) <= first) {
            open.push(Reverse((interval.verdict, interval.ports.last())));
        }
        while open
            .peek()
            .is_some_and(|Reverse((_, end))| u32::from(*end) < first)
        {
            open.pop();
        }
        let Some(&Reverse((verdict, _))) = open.peek() else {
            continue;
        };
        let begin = match result.last() {
            Some(before)
                if before.verdict == verdict && u32::from(before.ports.last()) + 1 == first =>
            {
                let begin = before.ports.first();
                result.pop();
                begin
            }
            _ => first as u16,
        };
        // Points ascend, so the range is never backwards.
        result.extend(PortRange::new(begin, last as u16).map(|ports| Interval { ports, verdict }));
    }
    result
}

#[cfg(test)]
mod tests {
    use super::super::preset::Preset;
    use super::*;
    use proptest::prelude::*;

    /// The addresses of the host.
    const HOST: [IpAddr; 2] = [
        IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1)),
        IpAddr::V6(std::net::Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1)),
    ];

    /// What the datapath does with the entries: two lookups of longest prefixes.
    struct Tries(Compiled);

    fn matches<const N: usize>(key: [u8; N], data: [u8; N], bits: u32) -> bool {
        (0..bits as usize).all(|bit| (key[bit / 8] ^ data[bit / 8]) >> (7 - bit % 8) & 1 == 0)
    }

    impl Tries {
        fn class(&self, policy: u32, address: IpAddr) -> u32 {
            let data = |policy: [u8; 4], address: [u8; 16]| -> [u8; 20] {
                [policy.as_slice(), address.as_slice()]
                    .concat()
                    .try_into()
                    .unwrap()
            };
            let wanted = data(policy.to_be_bytes(), to_abi(address));
            self.0
                .cidrs
                .iter()
                .filter(|(bits, key, _)| matches(data(key.policy, key.address), wanted, *bits))
                .max_by_key(|(bits, ..)| *bits)
                .map_or(0, |(.., value)| value.class)
        }

        fn verdict(
            &self,
            policy: u32,
            to: IpAddr,
            protocol: PolicyProtocol,
            port: u16,
        ) -> (u32, u32) {
            let class = self.class(policy, to);
            let said = self.said(class, protocol, port);
            if !HOST.contains(&to) || policy != self.0.number {
                return said;
            }
            let about_host = self.said(self.0.host_class, protocol, port);
            let strength = |(action, rule)| match action {
                0 => (2, rule),
                action if action == PolicyAction::Allow as u32 => (1, rule),
                _ => (0, rule),
            };
            [said, about_host]
                .into_iter()
                .min_by_key(|said| strength(*said))
                .unwrap()
        }

        fn said(&self, class: u32, protocol: PolicyProtocol, port: u16) -> (u32, u32) {
            let data = |key: &PolicyPortKey| -> [u8; 8] {
                [key.class.as_slice(), &[key.protocol, key.pad], &key.port]
                    .concat()
                    .try_into()
                    .unwrap()
            };
            if class == 0 {
                return (0, 0);
            }
            let port = match protocol {
                PolicyProtocol::Tcp | PolicyProtocol::Udp => port,
                _ => 0,
            };
            let wanted = PolicyPortKey {
                class: class.to_be_bytes(),
                protocol: protocol as u8,
                pad: 0,
                port: port.to_be_bytes(),
            };
            self.0
                .ports
                .iter()
                .filter(|(bits, key, _)| matches(data(key), data(&wanted), *bits))
                .max_by_key(|(bits, ..)| *bits)
                .map_or((0, 0), |(.., value)| (value.action, value.rule))
        }
    }

    /// What a preset stands for, byte by byte.
    fn holds(preset: Preset, to: IpAddr) -> bool {
        match (preset, to) {
            (Preset::Host, to) => HOST.contains(&to),
            (Preset::Metadata, to) => ["169.254.169.254", "169.254.170.2", "fd00:ec2::254"]
                .iter()
                .any(|text| text.parse() == Ok(to)),
            (Preset::LinkLocal, IpAddr::V4(v4)) => v4.octets()[..2] == [169, 254],
            (Preset::LinkLocal, IpAddr::V6(v6)) => v6.segments()[0] & 0xffc0 == 0xfe80,
            (Preset::Private, IpAddr::V4(v4)) => matches!(
                v4.octets(),
                [10, ..] | [172, 16..=31, ..] | [192, 168, ..] | [100, 64..=127, ..]
            ),
            (Preset::Private, IpAddr::V6(v6)) => {
                matches!(v6.segments()[0], 0xfc00..=0xfdff | 0xfec0..=0xfeff)
            }
            (Preset::Internet, IpAddr::V4(v4)) => !matches!(
                v4.octets(),
                [0 | 10 | 127 | 224..=255, ..]
                    | [100, 64..=127, ..]
                    | [169, 254, ..]
                    | [172, 16..=31, ..]
                    | [192, 168, ..]
                    | [192, 0, 0 | 2, _]
                    | [192, 31, 196, _]
                    | [192, 52, 193, _]
                    | [192, 88, 99, _]
                    | [192, 175, 48, _]
                    | [198, 18..=19, ..]
                    | [198, 51, 100, _]
                    | [203, 0, 113, _]
            ),
            (Preset::Internet, IpAddr::V6(v6)) => {
                matches!(v6.segments()[0], 0x2000..=0x3fff)
                    && !matches!(
                        v6.segments(),
                        [0x2001, 0..=0x1ff | 0xdb8, ..]
                            | [0x2002, ..]
                            | [0x2620, 0x4f, 0x8000, ..]
                            | [0x3fff, 0..=0xfff, ..]
                    )
            }
        }
    }

    /// The contract, read aloud.
    fn naive(policy: &Policy, to: IpAddr, protocol: PolicyProtocol, port: u16) -> (u32, u32) {
        let covers = |rule: &Rule| {
            let target = match rule.target() {
                Target::Any => true,
                Target::Cidr(cidr) => cidr.contains(to),
                Target::Preset(preset) => holds(preset, to),
            };
            let ports = rule.ports().is_empty()
                || rule
                    .ports()
                    .iter()
                    .any(|r| (r.first()..=r.last()).contains(&port));
            target
                && match (rule.protocol(), protocol) {
                    (Some(RuleProtocol::Tcp), PolicyProtocol::Tcp)
                    | (Some(RuleProtocol::Udp), PolicyProtocol::Udp)
                    | (None, PolicyProtocol::Tcp | PolicyProtocol::Udp) => ports,
                    (Some(RuleProtocol::Icmp), PolicyProtocol::Icmp) => true,
                    (None, PolicyProtocol::Icmp | PolicyProtocol::Other) => rule.ports().is_empty(),
                    _ => false,
                }
        };
        let first = |wanted: Action| {
            policy
                .rules()
                .find(|(_, action, rule)| *action == wanted && covers(rule))
        };
        match (first(Action::Deny), first(Action::Allow)) {
            (Some((number, ..)), _) => (PolicyAction::Deny as u32, number),
            (None, Some((number, ..))) => (PolicyAction::Allow as u32, number),
            (None, None) => (0, 0),
        }
    }

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn arbitrary_rule() -> impl Strategy<Value = Rule> {
        // Few addresses, so that prefixes nest; few ports, so that ranges overlap.
        let v4 = (
            0u8..3,
            0u8..2,
            prop::sample::select(vec![0u8, 1, 7, 8, 9, 16, 24, 31, 32]),
        )
            .prop_map(|(a, b, n)| format!("{}.{b}.0.1/{n}", 10 + a));
        let v6 = (
            prop::sample::select(vec![
                "2001:db8::1",
                "2001:db8:1::1",
                "::1",
                "::fffe:0:1",
                "fd00::1",
            ]),
            prop::sample::select(vec![0u8, 1, 8, 32, 47, 48, 64, 80, 95, 96, 127, 128]),
        )
            .prop_map(|(a, n)| format!("[{a}/{n}]"));
        let preset = prop::sample::select(Preset::ALL.map(|preset| preset.to_string()).to_vec());
        let target = prop_oneof![1 => Just("any".to_owned()), 3 => v4, 3 => v6, 2 => preset];
        let port = prop::sample::select(vec![1u16, 22, 53, 80, 443, 1000, 65_535]);
        let range = (port.clone(), port, any::<bool>()).prop_map(|(a, b, single)| {
            if single {
                a.to_string()
            } else {
                format!("{}-{}", a.min(b), a.max(b))
            }
        });
        let ports = prop::collection::vec(range, 0..3).prop_map(|ranges| ranges.join(","));
        let protocol = prop::sample::select(vec!["", "/tcp", "/udp", "/icmp"]);
        (target, ports, protocol).prop_map(|(target, ports, protocol)| {
            let ports = if ports.is_empty() || protocol == "/icmp" {
                String::new()
            } else {
                format!(":{ports}")
            };
            format!("{target}{ports}{protocol}").parse().unwrap()
        })
    }

    fn arbitrary_destination() -> impl Strategy<Value = IpAddr> {
        prop_oneof![
            (9u8..14, 0u8..3, 0u8..2).prop_map(|(a, b, c)| IpAddr::from([a, b, 0, c])),
            prop::sample::select(vec![
                "2001:db8::1",
                "2001:db8::2",
                "2001:db8:1::1",
                "::1",
                "::2",
                "::fffe:0:1",
                "fd00::1",
                "fc00::1",
                "8000::1",
                "169.254.169.254",
                "169.254.169.253",
                "192.168.0.1",
                "1.1.1.1",
                "fd00:ec2::254",
                "fe80::1",
                "2606:4700::1111",
                "2002:a00:1::1",
            ])
            .prop_map(|text| text.parse().unwrap()),
        ]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(10_000))]
        #[test]
        fn the_tries_say_what_the_rules_say(
            allow in prop::collection::vec(arbitrary_rule(), 0..6),
            deny in prop::collection::vec(arbitrary_rule(), 0..4),
            dns in prop::collection::vec(arbitrary_destination(), 0..2),
            probes in prop::collection::vec(
                (arbitrary_destination(), 0usize..4,
                 prop::sample::select(vec![0u16, 1, 2, 22, 53, 79, 80, 81, 443, 999, 1000, 1001, 65_534, 65_535])),
                12,
            ),
        ) {
            let dns = dns.into_iter().filter_map(|ip| ip.to_string().parse().ok()).collect();
            let policy = Policy::new(None, allow, deny, dns);
            let tries = Tries(policy.compile(7, 100).unwrap());
            for (to, protocol, port) in probes {
                let protocol = PROTOCOLS[protocol];
                prop_assert_eq!(
                    tries.verdict(7, to, protocol, port), naive(&policy, to, protocol, port),
                    "{:?} to {} {:?} {}", policy, to, protocol, port
                );
                prop_assert_eq!(tries.class(8, to), 0, "another policy");
            }
            // No key twice, no class unused.
            let keys: std::collections::HashSet<_> = tries.0.ports.iter()
                .map(|(bits, key, _)| (*bits, key.class, key.protocol, key.port)).collect();
            prop_assert_eq!(keys.len(), tries.0.ports.len());
            let used: std::collections::HashSet<_> =
                tries.0.cidrs.iter().map(|c| c.2.class).chain([tries.0.host_class])
                .filter(|class| *class != 0).collect();
            prop_assert_eq!(used.len() as u32, tries.0.classes);
        }
    }

    #[test]
    fn a_longer_prefix_with_fewer_ports_hides_nothing_of_a_shorter_one() {
        let policy = Policy::new(
            None,
            rules(&["10.0.0.0/8", "10.1.0.0/16:443/tcp"]),
            vec![],
            vec![],
        );
        let tries = Tries(policy.compile(1, 1).unwrap());
        let to = "10.1.2.3".parse().unwrap();
        assert_eq!(tries.verdict(1, to, PolicyProtocol::Udp, 53), (1, 1));
        assert_eq!(tries.0.classes, 1, "the longer prefix adds nothing");
    }

    #[test]
    fn everything_of_ipv6_says_nothing_about_ipv4() {
        let policy = Policy::new(None, rules(&["::/0"]), vec![], vec![]);
        let tries = Tries(policy.compile(1, 1).unwrap());
        assert_eq!(
            tries.verdict(1, "10.0.0.1".parse().unwrap(), PolicyProtocol::Tcp, 80),
            (0, 0)
        );
        assert_eq!(
            tries.verdict(1, "fd00::1".parse().unwrap(), PolicyProtocol::Tcp, 80),
            (1, 1)
        );
    }

    #[test]
    fn resolvers_are_allowed_where_there_is_a_rule_and_no_deny_covers_them() {
        let dns: Vec<Resolver> = vec!["9.9.9.9".parse().unwrap()];
        let to = dns[0].address();
        let verdict = |default, allow: &[&str], deny: &[&str], port| {
            let policy = Policy::new(default, rules(allow), rules(deny), dns.clone());
            Tries(policy.compile(1, 1).unwrap())
                .verdict(1, to, PolicyProtocol::Udp, port)
                .0
        };
        let (allow, deny) = (PolicyAction::Allow as u32, PolicyAction::Deny as u32);
        assert_eq!(verdict(None, &["10.0.0.0/8"], &[], 53), allow);
        assert_eq!(verdict(None, &["10.0.0.0/8"], &[], 54), 0);
        assert_eq!(verdict(None, &[], &["any:53"], 53), deny);
        assert_eq!(
            verdict(Some(Action::Deny), &[], &[], 53),
            0,
            "no rule: DNS neither"
        );
    }

    #[test]
    fn any_allow_makes_the_default_deny_unless_stated() {
        let policy = |default, allow: &[&str]| Policy::new(default, rules(allow), vec![], vec![]);
        assert_eq!(policy(None, &[]).default_action(), Action::Allow);
        assert!(!policy(None, &[]).is_in_force());
        assert_eq!(policy(None, &["any"]).default_action(), Action::Deny);
        assert_eq!(
            policy(Some(Action::Allow), &["any"]).default_action(),
            Action::Allow
        );
        assert!(policy(Some(Action::Deny), &[]).is_in_force());
    }

    #[test]
    fn ten_thousand_prefixes_take_well_under_a_second() {
        let allow: Vec<Rule> = (0..10_000u32)
            .map(|n| {
                format!("10.{}.{}.0/24:{}", n / 256, n % 256, 1000 + n)
                    .parse()
                    .unwrap()
            })
            .collect();
        let policy = Policy::new(None, allow, rules(&["any:25"]), vec![]);
        use nix::sys::time::TimeValLike;
        // Of this thread, whatever else the machine does.
        let clock = || nix::time::clock_gettime(nix::time::ClockId::CLOCK_THREAD_CPUTIME_ID);
        let start = clock().unwrap();
        let compiled = policy.compile(1, 1).unwrap();
        let took = clock().unwrap() - start;
        assert_eq!(compiled.cidrs.len(), 10_002);
        let slower = if cfg!(debug_assertions) { 10 } else { 1 };
        assert!(took.num_milliseconds() < 300 * slower, "{took:?}");
        println!(
            "{took:?} for {} entries",
            compiled.cidrs.len() + compiled.ports.len()
        );
    }

    #[test]
    fn a_policy_larger_than_the_maps_is_refused() {
        // Each of 200 prefixes inherits 10,000 ports.
        let ports: Vec<String> = (0..10_000).map(|n| (n * 6 + 1).to_string()).collect();
        let mut allow = rules(&[&format!("any:{}/tcp", ports.join(","))]);
        allow.extend((0..200).map(|n| format!("10.{n}.0.0/16/icmp").parse::<Rule>().unwrap()));
        let error = Policy::new(None, allow, vec![], vec![])
            .compile(1, 1)
            .unwrap_err();
        let problem = Problem::PolicyTooLarge {
            map: abi::map::POLICY_PORTS,
            limit: abi::size::POLICY_PORTS,
        };
        assert_eq!(error.problem, problem);
    }

    #[test]
    fn resolvers_are_unicast_and_not_loopback() {
        assert!("2620:fe::fe".parse::<Resolver>().is_ok());
        for bad in [
            "",
            "127.0.0.53",
            "::1",
            "0.0.0.0",
            "224.0.0.1",
            "fe80::1",
            "example.org",
        ] {
            assert!(bad.parse::<Resolver>().is_err(), "{bad:?}");
        }
    }
}
