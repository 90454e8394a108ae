//! What the maps hold of a policy.
//!
//! Rules are a set: a packet is judged by all the rules that cover its destination, however
//! long their prefixes; deny beats allow, allow beats the default. A longest-prefix-match trie
//! finds one prefix only, so each prefix gets a *class*: the union of the rules of all the
//! prefixes of its family that cover it. A class is held as verdicts for disjoint intervals of
//! ports, cut into prefixes. The rules about the host's own addresses, which no prefix can name,
//! are one more class.

use super::{Action, Policy, Said};
use crate::model::{
    Invalid, Problem,
    address::{Cidr, to_abi},
    ports::PortRange,
    rule::{Rule, RuleProtocol, Target},
};
use ipnet::IpNet;
use nucnet_common::abi::{
    self, PolicyAction, PolicyCidrKey, PolicyClass, PolicyPortKey, PolicyProtocol, PolicyRule,
    policy_flag,
};
use std::{
    cmp::Reverse,
    collections::{BTreeMap, BinaryHeap, HashMap, hash_map},
    rc::Rc,
};

impl Policy {
    /// The policy as the maps hold it. `first_class` and those after it must be numbers that
    /// no class had before. The same arguments give the same entries.
    pub fn compile(&self, policy: u32, first_class: u32) -> Result<Compiled, Invalid> {
        let mut compiled = Compiler::new(policy, first_class).run(self)?;
        compiled.number = policy;
        compiled.default = self.default;
        compiled.is_quiet = !self.log_denied;
        compiled.rejects = self.reject;
        Ok(compiled)
    }
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
    /// Whether what is denied is answered.
    pub rejects: bool,
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
        // Where there is none, the entry is that of an endpoint which never had one.
        endpoint.policy_default = match self.number {
            0 => 0,
            _ => self.default.abi() as u32,
        };
        endpoint.policy_since = since;
        endpoint.policy_host = self.host_class;
        let flag = |set, flag| if set { flag } else { 0 };
        endpoint.policy_flags =
            flag(self.is_quiet, policy_flag::QUIET) | flag(self.rejects, policy_flag::REJECT);
    }
}

/// A verdict for some ports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Interval {
    ports: PortRange,
    verdict: Verdict,
}

/// Which action, and by which rule. The smallest is the one that counts: deny beats allow,
/// and of rules that agree the first is named. A guard is stronger than the allows that it is
/// within, and weaker than those within it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
struct Verdict {
    tier: u16,
    rule: u32,
}

impl Verdict {
    /// `guards`: how many guards the rule's destination is within; a guard is within itself.
    fn new(said: Said, rule: u32, guards: u16) -> Self {
        let depth = 2 * (u16::MAX / 2 - guards);
        let tier = match said {
            Said::Deny => 0,
            Said::Allow => depth,
            Said::Guard => depth + 1,
        };
        Self { tier, rule }
    }

    fn action(self) -> PolicyAction {
        match self.tier != 0 && self.tier.is_multiple_of(2) {
            true => PolicyAction::Allow,
            false => PolicyAction::Deny,
        }
    }
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
        let guards: Vec<Cidr> = policy.guard.iter().filter_map(prefixes).flatten().collect();
        for (number, said, rule) in policy.ranked() {
            let Some(nets) = prefixes(&rule) else {
                // Nothing is within the host's own addresses but they themselves.
                add(&mut host, &rule, Verdict::new(said, number, 1));
                continue;
            };
            for cidr in nets {
                let within = guards.iter().filter(|guard| guard.covers(cidr)).count();
                let within = u16::try_from(within).unwrap_or(u16::MAX / 2);
                let verdict = Verdict::new(said, number, within);
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
                let value = PolicyRule {
                    action: interval.verdict.action() as u32,
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

/// The prefixes that a rule is about; none: the host's own addresses.
fn prefixes(rule: &Rule) -> Option<Vec<Cidr>> {
    match rule.target() {
        Target::Any => Some(vec![Cidr::ALL_V4, Cidr::ALL_V6]),
        Target::Cidr(cidr) => Some(vec![cidr]),
        Target::Preset(preset) => preset.prefixes(),
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
    use super::*;

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    /// What the maps say about TCP to a destination; none: nothing.
    fn said(compiled: &Compiled, to: &str, port: u16) -> Option<Action> {
        let to = u128::from_be_bytes(to_abi(to.parse().unwrap()));
        let within = |bits: u32, address: u128| bits == 0 || (address ^ to) >> (128 - bits) == 0;
        let (_, _, class) = compiled
            .cidrs
            .iter()
            .filter(|(bits, key, _)| within(bits - 32, u128::from_be_bytes(key.address)))
            .max_by_key(|(bits, ..)| *bits)?;
        in_class(compiled, class.class, port)
    }

    fn in_class(compiled: &Compiled, class: u32, port: u16) -> Option<Action> {
        let (_, _, rule) = compiled.ports.iter().find(|(bits, key, _)| {
            let differing = u16::from_be_bytes(key.port) ^ port;
            key.class == class.to_be_bytes()
                && key.protocol == PolicyProtocol::Tcp as u8
                && u32::from(differing).leading_zeros() >= 16 + bits - 48
        })?;
        Some(match rule.action == PolicyAction::Allow as u32 {
            true => Action::Allow,
            false => Action::Deny,
        })
    }

    #[test]
    fn a_guard_yields_to_what_is_allowed_within_it_only() {
        let (allow, deny) = (Some(Action::Allow), Some(Action::Deny));
        let guarded = |policy: Policy| {
            let guard = rules(&["metadata", "10.11.0.0/16", "host"]);
            policy.with_guard(guard).compile(1, 1).unwrap()
        };
        let open = guarded(Policy::default());
        assert_eq!(said(&open, "10.11.3.4", 80), deny);
        assert_eq!(said(&open, "169.254.169.254", 80), deny);
        assert_eq!(said(&open, "fd00:ec2::254", 80), deny);
        assert_eq!(said(&open, "10.12.0.1", 80), None);
        assert_eq!(in_class(&open, open.host_class, 80), deny);

        let texts = [
            "any",
            "10.0.0.0/8",
            "10.11.0.5:80",
            "host:8080",
            "169.254.0.0/16",
        ];
        let policy = |denied: &[&str]| Policy::new(None, rules(&texts), rules(denied), vec![]);
        let some = guarded(policy(&[]));
        assert_eq!(said(&some, "10.11.3.4", 80), deny);
        assert_eq!(said(&some, "10.11.0.5", 80), allow);
        assert_eq!(said(&some, "10.11.0.5", 81), deny);
        assert_eq!(said(&some, "10.12.0.1", 80), allow);
        assert_eq!(said(&some, "169.254.1.1", 80), allow);
        assert_eq!(said(&some, "169.254.169.254", 80), deny);
        assert_eq!(in_class(&some, some.host_class, 8080), allow);
        assert_eq!(in_class(&some, some.host_class, 80), deny);
        // A deny is one, wherever it stands.
        let denied = guarded(policy(&["10.11.0.0/24:80", "host:8080"]));
        assert_eq!(said(&denied, "10.11.0.5", 80), deny);
        assert_eq!(in_class(&denied, denied.host_class, 8080), deny);
        // The guard's own prefix may be allowed.
        let whole = guarded(Policy::new(None, rules(&["10.11.0.0/16"]), vec![], vec![]));
        assert_eq!(said(&whole, "10.11.3.4", 80), allow);
    }

    #[test]
    fn the_entry_says_whether_denials_are_told_and_answered() {
        let policy = Policy::new(Some(Action::Deny), vec![], vec![], vec![]);
        let flags = |logged, rejected| {
            let policy = policy.clone().with_denied_logged(logged);
            let compiled = policy.with_denied_rejected(rejected).compile(1, 1).unwrap();
            let mut endpoint = abi::Endpoint::default();
            compiled.enforce(1, &mut endpoint);
            endpoint.policy_flags
        };
        assert_eq!(flags(true, false), 0);
        assert_eq!(flags(false, false), policy_flag::QUIET);
        assert_eq!(flags(true, true), policy_flag::REJECT);
        assert_eq!(flags(false, true), policy_flag::QUIET | policy_flag::REJECT);
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
}
