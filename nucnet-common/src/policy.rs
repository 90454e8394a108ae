//! Egress policy: two lookups, whatever the number of rules.
//!
//! The longest prefix of a destination names a class, which is the union of all rules that
//! cover that prefix; the port in that class names the verdict. Deny already beats allow in
//! what the control plane compiled.
//!
//! Which addresses are the host's own changes by the hour, so rules about them are a class of
//! their own, asked in addition where the kernel's route lookup says that a destination is local.
//! A policy without such rules costs no such lookup.

use crate::{
    abi::{
        Address, Endpoint, FlowKey, PolicyAction, PolicyCidrKey, PolicyPortKey, PolicyProtocol,
        PolicyRule,
    },
    env::{Host, Route, RouteKind, Tables},
    packet::{ICMP, ICMPV6, TCP, UDP},
};

/// What a policy says about a destination.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Judgement {
    /// Whether the packet may leave.
    pub allowed: bool,
    /// Which rule says so; 0: the default.
    pub rule: u32,
}

/// Judges the destination that an endpoint asks for: `key.peer`. Where the policy has rules about
/// the host's own addresses, `route` is overwritten.
#[inline(never)]
pub fn judge<E: Tables + Host>(
    env: &E,
    endpoint: &Endpoint,
    key: &FlowKey,
    route: &mut Route,
) -> Judgement {
    if endpoint.policy == 0 {
        return Judgement {
            allowed: true,
            rule: 0,
        };
    }
    let (protocol, port) = (key.protocol as u8, key.peer_port);
    let mut said = rule(env, endpoint.policy, &key.peer, protocol, port);
    if endpoint.policy_host != 0 {
        env.route(endpoint.bridge, &key.inside, &key.peer, route);
        if route.kind == RouteKind::Local {
            said = stronger(said, verdict(env, endpoint.policy_host, protocol, port));
        }
    }
    if said.action == 0 {
        said.action = endpoint.policy_default;
    }
    Judgement {
        allowed: said.action == PolicyAction::Allow as u32,
        rule: said.rule,
    }
}

/// Judges where a packet really goes, once translated: only a deny counts there. The rule that
/// denies it; 0: none does.
#[inline(never)]
pub fn denied_by<T: Tables>(
    tables: &T,
    endpoint: &Endpoint,
    destination: &Address,
    protocol: u8,
    port: u16,
) -> u32 {
    if endpoint.policy == 0 {
        return 0;
    }
    let said = rule(tables, endpoint.policy, destination, protocol, port);
    if said.action == PolicyAction::Deny as u32 {
        said.rule
    } else {
        0
    }
}

/// An action and the rule that it is by; zeros: no rule says anything.
///
/// Not an option: of one without a value, the verifier would see undefined parts copied.
const SILENT: PolicyRule = PolicyRule { action: 0, rule: 0 };

/// Deny beats allow; of rules that agree, the first is named.
#[inline(always)]
fn stronger(one: PolicyRule, other: PolicyRule) -> PolicyRule {
    let deny = PolicyAction::Deny as u32;
    let yields = if one.action == other.action {
        other.rule < one.rule
    } else {
        one.action == 0 || other.action == deny
    };
    if yields { other } else { one }
}

#[inline(always)]
fn rule<T: Tables>(
    tables: &T,
    policy: u32,
    destination: &Address,
    protocol: u8,
    port: u16,
) -> PolicyRule {
    let class = tables.policy_class(&PolicyCidrKey {
        policy: policy.to_be_bytes(),
        address: *destination,
    });
    match class {
        Some(class) if class.class != 0 => verdict(tables, class.class, protocol, port),
        _ => SILENT,
    }
}

#[inline(always)]
fn verdict<T: Tables>(tables: &T, class: u32, protocol: u8, port: u16) -> PolicyRule {
    let (protocol, port) = match protocol {
        TCP => (PolicyProtocol::Tcp, port),
        UDP => (PolicyProtocol::Udp, port),
        ICMP | ICMPV6 => (PolicyProtocol::Icmp, 0),
        _ => (PolicyProtocol::Other, 0),
    };
    let rule = tables.policy_rule(&PolicyPortKey {
        class: class.to_be_bytes(),
        protocol: protocol as u8,
        pad: 0,
        port: port.to_be_bytes(),
    });
    match rule {
        Some(rule) => *rule,
        None => SILENT,
    }
}
