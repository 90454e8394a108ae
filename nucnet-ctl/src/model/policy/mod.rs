//! Egress policies as users give them.

mod compile;
mod resolver;

pub use compile::Compiled;
pub use resolver::Resolver;

use super::rule::{Destination, Rule};
use nucnet_common::abi::PolicyAction;
use serde::{Deserialize, Serialize};
use std::{collections::HashSet, fmt, hash::Hash};

/// What happens where no rule says otherwise.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Action {
    /// Goes on.
    #[default]
    Allow,
    /// Is dropped, and answered if the policy says so.
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

/// An egress policy as the user gave it, each rule once.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    default: Action,
    allow: Vec<Rule>,
    deny: Vec<Rule>,
    dns: Vec<Resolver>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    guard: Vec<Rule>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    allow_dns: Option<bool>,
    #[serde(default = "yes", skip_serializing_if = "is_yes")]
    log_denied: bool,
    #[serde(default)]
    reject: bool,
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
            guard: Vec::new(),
            allow_dns: None,
            log_denied: true,
            reject: false,
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

    /// What may not leave unless it is allowed by a rule about nothing else.
    pub fn guard(&self) -> &[Rule] {
        &self.guard
    }

    /// The same with destinations that no rule about a larger prefix opens, nor the default: only
    /// an allow of something within them does. A guard is whole: its rules have no ports.
    #[must_use]
    pub fn with_guard(mut self, guard: Vec<Rule>) -> Self {
        self.guard = once(guard);
        self
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

    /// Whether what is denied is answered; without that, it is as if lost.
    pub fn rejects(&self) -> bool {
        self.reject
    }

    /// The same with what is denied answered, or not.
    #[must_use]
    pub fn with_denied_rejected(mut self, rejected: bool) -> Self {
        self.reject = rejected;
        self
    }

    /// Whether there is anything to enforce.
    pub fn is_in_force(&self) -> bool {
        self.has_rules() || !self.guard.is_empty() || self.default == Action::Deny
    }

    fn has_rules(&self) -> bool {
        !(self.allow.is_empty() && self.deny.is_empty())
    }

    /// The rules as numbered from 1 on: allows, denies, resolvers, guards. Resolvers count where
    /// there is another rule, unless the policy says otherwise.
    pub fn rules(&self) -> impl Iterator<Item = (u32, Action, Rule)> {
        self.ranked().map(|(number, said, rule)| {
            let action = match said {
                Said::Allow => Action::Allow,
                Said::Deny | Said::Guard => Action::Deny,
            };
            (number, action, rule)
        })
    }

    /// The rule that denies a packet, by its number; 0: the default does. None: it may leave.
    /// `asked`: where it was sent; `really`: where publishes and mappings have it go. The programs
    /// name the same one.
    pub fn denied_by(&self, asked: &Destination, really: &Destination) -> Option<u32> {
        let first = |action, to: &Destination| {
            let mut rules = self.rules();
            let found = rules.find(|(_, of, rule)| *of == action && rule.covers(to));
            found.map(|(number, ..)| number)
        };
        if let Some(number) = first(Action::Deny, asked) {
            return Some(number);
        }
        if self.default == Action::Deny && first(Action::Allow, asked).is_none() {
            return Some(0);
        }
        first(Action::Deny, really)
    }

    fn ranked(&self) -> impl Iterator<Item = (u32, Said, Rule)> {
        let resolvers = match self.allow_dns.unwrap_or_else(|| self.has_rules()) {
            true => self.dns.as_slice(),
            false => &[],
        };
        let allow = self.allow.iter().map(|rule| (Said::Allow, rule.clone()));
        let deny = self.deny.iter().map(|rule| (Said::Deny, rule.clone()));
        let dns = resolvers
            .iter()
            .map(|dns| (Said::Allow, Rule::resolver(dns.address())));
        let guard = self.guard.iter().map(|rule| (Said::Guard, rule.clone()));
        (1..)
            .zip(allow.chain(deny).chain(dns).chain(guard))
            .map(|(number, (said, rule))| (number, said, rule))
    }
}

/// What a rule says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Said {
    Allow,
    Deny,
    Guard,
}

fn once<T: Eq + Hash + Clone>(values: Vec<T>) -> Vec<T> {
    let mut seen = HashSet::with_capacity(values.len());
    values
        .into_iter()
        .filter(|value| seen.insert(value.clone()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(texts: &[&str]) -> Vec<Rule> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn resolvers_are_a_rule_where_there_is_another_unless_stated() {
        let dns: Vec<Resolver> = vec!["9.9.9.9".parse().unwrap()];
        let policy =
            |allow: &[&str]| Policy::new(Some(Action::Deny), rules(allow), vec![], dns.clone());
        let last = |policy: Policy| {
            let last = policy.rules().last();
            last.map(|(number, _, rule)| (number, rule.to_string()))
        };
        let resolver = |number| Some((number, "9.9.9.9/32:53".to_owned()));
        assert_eq!(last(policy(&["10.0.0.0/8"])), resolver(2));
        assert_eq!(last(policy(&[])), None, "DNS neither");
        assert_eq!(last(policy(&[]).with_dns_allowed(true)), resolver(1));
        let without = policy(&["10.0.0.0/8"]).with_dns_allowed(false);
        assert_eq!(last(without), Some((1, "10.0.0.0/8".to_owned())));
    }

    #[test]
    fn what_denies_a_packet_is_named() {
        let to = |address: &str, protocol, port| Destination {
            address: address.parse().unwrap(),
            protocol,
            port,
            is_hosts: address.ends_with(".2"),
        };
        let allow = rules(&["10.0.0.0/8", "any:443/tcp"]);
        let deny = rules(&["10.1.0.0/16:22", "host:22", "10.9.0.0/16/icmp"]);
        let policy = Policy::new(None, allow, deny, vec![]);
        let said = |to: Destination| policy.denied_by(&to, &to);
        assert_eq!(said(to("10.1.0.1", 6, 22)), Some(3));
        assert_eq!(said(to("10.1.0.1", 17, 22)), Some(3));
        assert_eq!(said(to("10.1.0.1", 6, 23)), None);
        // Of two that agree, the first.
        assert_eq!(said(to("10.1.0.2", 6, 22)), Some(3));
        assert_eq!(said(to("10.2.0.2", 6, 22)), Some(4));
        assert_eq!(said(to("10.9.0.1", 1, 0)), Some(5));
        assert_eq!(said(to("10.9.0.1", 6, 80)), None);
        assert_eq!(said(to("192.0.2.1", 6, 443)), None);
        assert_eq!(said(to("192.0.2.1", 17, 443)), Some(0));
        // Where it really goes, only a deny counts.
        let (asked, really) = (to("192.0.2.1", 6, 443), to("10.1.0.1", 6, 22));
        assert_eq!(policy.denied_by(&asked, &really), Some(3));
        assert_eq!(policy.denied_by(&asked, &to("172.16.0.1", 6, 80)), None);
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
    fn a_record_from_before_there_were_answers_has_none() {
        let record = r#"{"default": "deny", "allow": [], "deny": [], "dns": []}"#;
        let policy: Policy = serde_json::from_str(record).unwrap();
        assert!(!policy.rejects() && policy.log_denied());
        let shown = serde_json::to_value(&policy).unwrap();
        assert_eq!(shown["reject"], false);
    }
}
