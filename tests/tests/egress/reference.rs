//! Egress policies as the contract has them, read aloud: slow, and obviously right.

use std::net::IpAddr;

use nucnet_common::packet::{ICMP, ICMPV6, TCP, UDP};
use nucnet_ctl::model::{
    policy::{Action, Policy},
    preset::Preset,
    rule::{Rule, RuleProtocol, Target},
};
use nucnet_tests::packets::site;

/// A destination that is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) to: IpAddr,
    pub(crate) protocol: u8,
    /// Of TCP and UDP.
    pub(crate) port: u16,
}

/// What becomes of it, and by which rule: 0 is the default.
pub(crate) fn verdict(policy: &Policy, asked: Asked) -> (Action, u32) {
    let first = |wanted: Action| {
        let mut rules = policy.rules();
        rules.find(|(_, action, rule)| *action == wanted && covers(rule, asked))
    };
    if let Some((number, ..)) = first(Action::Deny) {
        return (Action::Deny, number);
    }
    if let Some((number, ..)) = first(Action::Allow) {
        return (Action::Allow, number);
    }
    (policy.default_action(), 0)
}

fn covers(rule: &Rule, asked: Asked) -> bool {
    let is_target = match rule.target() {
        Target::Any => true,
        Target::Cidr(cidr) => {
            let net = cidr.net();
            site::covers((net.addr(), net.prefix_len()), asked.to)
        }
        Target::Preset(preset) => holds(preset, asked.to),
    };
    let is_port = rule.ports().is_empty()
        || rule
            .ports()
            .iter()
            .any(|range| range.first() <= asked.port && asked.port <= range.last());
    let is_protocol = match (rule.protocol(), asked.protocol) {
        (Some(RuleProtocol::Tcp), TCP) | (Some(RuleProtocol::Udp), UDP) => is_port,
        (Some(RuleProtocol::Icmp), ICMP | ICMPV6) => true,
        (Some(_), _) => false,
        (None, TCP | UDP) => is_port,
        // Only TCP and UDP have ports.
        (None, _) => rule.ports().is_empty(),
    };
    is_target && is_protocol
}

/// Whether an address is the site's host's own.
pub(crate) fn is_host(address: IpAddr) -> bool {
    let interfaces = site::INTERFACES.iter();
    interfaces
        .flat_map(|interface| interface.addresses)
        .any(|(own, _)| *own == address)
}

/// What a preset stands for, byte by byte.
pub(crate) fn holds(preset: Preset, to: IpAddr) -> bool {
    match (preset, to) {
        (Preset::Host, to) => is_host(to),
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
