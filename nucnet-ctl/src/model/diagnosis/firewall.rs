//! What `doctor` makes of the host's firewalls.

use super::Finding;
use crate::model::netfilter::{Backend, CHAIN_PREFIX};
use std::fmt;

/// A chain that drops by default what the host forwards.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Dropping {
    /// `FORWARD` of iptables, as the tool of that name lists it: rules before its end may accept.
    Iptables(&'static str),
    /// One of a table that is no business of iptables': what other tables accept it still drops.
    Native(String),
}

impl fmt::Display for Dropping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Iptables(tool) => write!(f, "FORWARD ({tool})"),
            Self::Native(chain) => write!(f, "{chain} (nft)"),
        }
    }
}

/// Whether a firewall drops by default what is forwarded. `None`: nobody could say.
pub fn forward(drops: Option<&[Dropping]>, by_rules: bool) -> Finding {
    let id = "forward-policy";
    let Some(drops) = drops else {
        return Finding::unknown(id, "no firewall tool could be asked", "run as root");
    };
    let named = |drops: &mut dyn Iterator<Item = &Dropping>| {
        let names: Vec<_> = drops.map(ToString::to_string).collect();
        names.join(", ")
    };
    let is_native = |drop: &&Dropping| matches!(drop, Dropping::Native(_));
    let all = named(&mut drops.iter());
    let native = named(&mut drops.iter().filter(is_native));
    match (drops, by_rules) {
        ([], _) => Finding::ok(id, "no firewall drops by default what is forwarded"),
        (_, false) => Finding::ok(
            id,
            format!(
                "drops by default: {all}; nucnet's packets are not forwarded by the host, and do \
                 not pass it"
            ),
        ),
        (_, true) if native.is_empty() => Finding::ok(
            id,
            format!("drops by default: {all}; nucnet's rules accept its packets before"),
        ),
        (_, true) => Finding::fail(
            id,
            format!("drops by default what nucnet's rules accept, too: {native}"),
            "accept there what comes from and goes to nucnet's bridges (nft add rule ... iifname \
             nucnet0 accept, and oifname nucnet0 accept), or go over to --datapath ebpf, whose \
             packets do not pass it",
        ),
    }
}

/// The programs by which rules are written, and the tables that they are about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Iptables {
    /// Where nucnet's rules go.
    pub backend: Backend,
    /// Whether there is `ip6tables`.
    pub has_v6: bool,
    /// Whether others have rules in tables of both kinds.
    pub is_mixed: bool,
}

/// What there is for the iptables datapath. `None`: there are no programs.
pub fn iptables(found: Option<Iptables>, by_rules: bool) -> Finding {
    let id = "iptables";
    let Some(found) = found else {
        return match by_rules {
            true => Finding::fail(
                id,
                "there is no iptables, and endpoints need it: no rule can be changed",
                "install iptables, or: nucnet-ctl --datapath ebpf gc",
            ),
            false => Finding::ok(id, "not there; programs carry packets without"),
        };
    };
    let backend = found.backend;
    match (found.has_v6, found.is_mixed) {
        (false, _) => Finding::warn(
            id,
            format!("{backend} without ip6tables: where rules carry packets, IPv6 is closed"),
            "install ip6tables",
        ),
        (true, true) => Finding::warn(
            id,
            format!(
                "there are rules of iptables-nft and of iptables-legacy, which do not see each \
                 other; nucnet's go to {backend}"
            ),
            "move all rules to one of the two (update-alternatives --config iptables)",
        ),
        (true, false) => Finding::ok(id, format!("{backend}, for both families")),
    }
}

/// The chains in a tool's listing that drop by default what is forwarded.
pub fn dropping(tool: &'static str, listing: &str) -> Vec<Dropping> {
    let (mut table, mut chain) = ("", "");
    let mut found = Vec::new();
    for line in listing.lines().map(str::trim) {
        let named = |kind| line.strip_prefix(kind)?.strip_suffix(" {");
        table = named("table ").unwrap_or(table);
        chain = named("chain ").unwrap_or(chain);
        let is_iptables = matches!(table, "ip filter" | "ip6 filter") && chain == "FORWARD";
        if line.starts_with(":FORWARD DROP") {
            found.push(Dropping::Iptables(tool));
        } else if line.contains("hook forward") && line.contains("policy drop") && !is_iptables {
            found.push(Dropping::Native(format!("{table} {chain}")));
        }
    }
    found
}

/// The destination ports that others' rules of `iptables-save` translate: protocol and port.
pub fn translated_ports(listing: &str) -> Vec<(String, u16)> {
    let rules = listing.lines().filter(|line| {
        line.strip_prefix("-A ")
            .is_some_and(|rule| !rule.starts_with(CHAIN_PREFIX))
            && (line.contains("-j DNAT") || line.contains("-j REDIRECT"))
    });
    rules
        .filter_map(|rule| {
            let after = |flag| {
                let mut words = rule.split(' ').skip_while(|word| *word != flag);
                words.nth(1)
            };
            Some((after("-p")?.to_owned(), after("--dport")?.parse().ok()?))
        })
        .collect()
}

/// Published ports that somebody else's rules translate as well.
pub fn translated_elsewhere(ports: &[String]) -> Finding {
    let id = "foreign-dnat";
    match ports {
        [] => Finding::ok(
            id,
            "no published port is translated by somebody else's rules",
        ),
        ports => Finding::warn(
            id,
            format!(
                "iptables translates published ports as well: {}; from outside nucnet's publish \
                 is first",
                ports.join(", ")
            ),
            "take one of the two away: nucnet-ctl unpublish, or the rule (iptables-save -t nat)",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Severity, tests::severity},
        *,
    };
    use std::slice;

    #[test]
    fn a_forward_policy_of_drop_is_seen_in_each_tools_words() {
        let saved = "*filter\n:INPUT DROP [0:0]\n:FORWARD DROP [0:0]\n";
        let iptables = Dropping::Iptables("iptables-save");
        assert_eq!(dropping("iptables-save", saved), slice::from_ref(&iptables));
        let listed = "table ip filter {\n\tchain FORWARD {\n\t\ttype filter hook forward priority \
            filter; policy drop;\n\t}\n}\ntable inet strict {\n\tchain entry {\n\t\ttype filter \
            hook input priority filter; policy drop;\n\t}\n\tchain through {\n\t\ttype filter hook \
            forward priority filter; policy drop;\n\t}\n\tchain after {\n\t}\n}\n";
        let native = Dropping::Native("inet strict through".to_owned());
        assert_eq!(dropping("nft", listed), slice::from_ref(&native));
        assert_eq!(dropping("nft", ":FORWARD ACCEPT [0:0]\n"), []);
    }

    #[test]
    fn only_what_drops_after_nucnets_rules_is_in_their_way() {
        let iptables = Dropping::Iptables("iptables-save");
        let both = [
            iptables.clone(),
            Dropping::Native("inet strict through".to_owned()),
        ];
        assert_eq!(severity(forward(None, false)), Severity::Unknown);
        assert_eq!(severity(forward(Some(&both), false)), Severity::Ok);
        assert_eq!(severity(forward(Some(&[iptables]), true)), Severity::Ok);
        let finding = forward(Some(&both), true);
        assert_eq!(finding.severity, Severity::Fail);
        assert!(
            finding.text.ends_with(": inet strict through (nft)"),
            "{}",
            finding.text
        );
    }

    #[test]
    fn translated_ports_are_read_from_rules() {
        let listing = "*nat\n:DOCKER - [0:0]\n\
            -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 172.17.0.2:80\n\
            -A DOCKER -p udp -m udp --dport 53 -j ACCEPT\n\
            -A PREROUTING -p tcp -m tcp --dport 25 -j REDIRECT --to-ports 2525\n\
            -A NUCNET-1 -p tcp -m tcp --dport 90 -j DNAT --to-destination 10.0.42.2:80\n";
        let wanted = [("tcp".to_owned(), 8080), ("tcp".to_owned(), 25)];
        assert_eq!(translated_ports(listing), wanted);
    }

    #[test]
    fn what_iptables_lacks_matters_where_rules_carry_packets() {
        let found = |has_v6, is_mixed| {
            Some(Iptables {
                backend: Backend::Nft,
                has_v6,
                is_mixed,
            })
        };
        let severity = |found, by_rules| iptables(found, by_rules).severity;
        assert_eq!(severity(None, false), Severity::Ok);
        assert_eq!(severity(None, true), Severity::Fail);
        assert_eq!(severity(found(true, false), true), Severity::Ok);
        assert_eq!(severity(found(true, true), true), Severity::Warn);
        let finding = iptables(found(false, false), true);
        assert_eq!(finding.severity, Severity::Warn);
        assert!(finding.text.contains("IPv6 is closed"), "{}", finding.text);
    }
}
