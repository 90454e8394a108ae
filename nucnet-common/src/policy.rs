//! Egress policy: two lookups, whatever the number of rules.
//!
//! The longest prefix of a destination names a class, which is the union of all rules that
//! cover that prefix; the port in that class names the verdict. Deny already beats allow in
//! what the control plane compiled.

use crate::{
    abi::{Address, Endpoint, PolicyAction, PolicyCidrKey, PolicyPortKey, PolicyProtocol},
    env::Tables,
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

/// Judges the destination that an endpoint asked for.
#[inline(never)]
pub fn judge<T: Tables>(
    tables: &T,
    endpoint: &Endpoint,
    destination: &Address,
    protocol: u8,
    port: u16,
) -> Judgement {
    if endpoint.policy == 0 {
        return Judgement {
            allowed: true,
            rule: 0,
        };
    }
    match rule(tables, endpoint.policy, destination, protocol, port) {
        Some((action, rule)) => Judgement {
            allowed: action == PolicyAction::Allow as u32,
            rule,
        },
        None => Judgement {
            allowed: endpoint.policy_default == PolicyAction::Allow as u32,
            rule: 0,
        },
    }
}

/// Judges where a packet really goes, once translated: only a deny counts there.
#[inline(never)]
pub fn is_denied<T: Tables>(
    tables: &T,
    endpoint: &Endpoint,
    destination: &Address,
    protocol: u8,
    port: u16,
) -> bool {
    endpoint.policy != 0
        && matches!(
            rule(tables, endpoint.policy, destination, protocol, port),
            Some((action, _)) if action == PolicyAction::Deny as u32
        )
}

#[inline(always)]
fn rule<T: Tables>(
    tables: &T,
    policy: u32,
    destination: &Address,
    protocol: u8,
    port: u16,
) -> Option<(u32, u32)> {
    let class = tables
        .policy_class(&PolicyCidrKey {
            policy: policy.to_be_bytes(),
            address: *destination,
        })?
        .class;
    if class == 0 {
        return None;
    }
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
    })?;
    Some((rule.action, rule.rule))
}
