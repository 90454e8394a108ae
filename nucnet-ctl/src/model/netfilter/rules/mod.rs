//! Which rules are wanted, from what is on record.
//!
//! ```text
//! mangle PREROUTING   who sends: an endpoint may only send as itself, and nobody else as one
//! nat    PREROUTING   publishes and mappings, for what comes in
//! nat    OUTPUT       the same for the host's own sockets
//! filter FORWARD      policies, on the destination that was asked for; then what may pass
//! filter INPUT        policies, for what endpoints send to the host
//! filter OUTPUT       redirects, which would lead endpoints round the host
//! nat    POSTROUTING  whose address a packet leaves with
//! ```
//!
//! Policies come after the translation, because only there can a packet be refused with a word:
//! what was asked for is in the kernel's entry of the connection (`--ctorigdst`).

mod drop;
mod egress;
#[cfg(test)]
pub(super) mod fixture;
mod forward;
mod guard;
mod publish;
mod source;

use super::{CHAIN_PREFIX, Chain, Family, Table};
use crate::model::{
    IfName,
    policy::Policy,
    ports::PortRange,
    publish::PublishSpec,
    record::{EndpointRecord, MappingRecord, NetworkRecord},
};
use nucnet_common::abi::Reason;
use std::net::IpAddr;

/// An endpoint as it is to be served.
#[derive(Clone, Copy, Debug)]
pub struct WantedEndpoint<'a> {
    /// Its record.
    pub record: &'a EndpointRecord,
    /// What it publishes.
    pub publishes: &'a [PublishSpec],
    /// What it may reach.
    pub egress: &'a Policy,
    /// Whether connections that are open go on, whatever the policy says of them.
    pub keeps_open: bool,
}

/// Whose ports masquerade takes, and whose it leaves alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SourcePorts {
    /// Those that it draws from: the host never takes them by itself.
    pub drawn: PortRange,
    /// Those that the host takes for connections of its own.
    pub host: PortRange,
}

/// All that is to be served.
#[derive(Clone, Debug, Default)]
pub struct Wanted<'a> {
    /// The networks.
    pub networks: Vec<&'a NetworkRecord>,
    /// The endpoints.
    pub endpoints: Vec<WantedEndpoint<'a>>,
    /// The static mappings.
    pub mappings: Vec<&'a MappingRecord>,
    /// Ports for masquerade; none: the host leaves none, so that ports are kept where they can be.
    pub ports: Option<SourcePorts>,
}

/// The chain of an endpoint or a mapping; both have numbers of the same sequence.
fn own_chain(number: u32) -> String {
    format!("{CHAIN_PREFIX}{number}")
}

fn dropped(owner: &str, reason: Reason) -> String {
    format!("{owner} {}", reason.name())
}

fn of_network(network: &NetworkRecord) -> String {
    format!("network:{}", network.name)
}

/// Whose the rules of a mapping are, as their comments say.
pub fn of_mapping(mapping: &MappingRecord) -> String {
    format!("mapping:{}", mapping.id)
}

/// Chains in the order in which they are written.
struct Chains {
    family: Family,
    chains: Vec<Chain>,
}

impl Chains {
    fn chain(&mut self, table: Table, name: &str) -> &mut Chain {
        let found = self
            .chains
            .iter()
            .position(|chain| chain.table == table && chain.name == name);
        let at = found.unwrap_or_else(|| {
            self.chains.push(Chain::new(table, name));
            self.chains.len() - 1
        });
        &mut self.chains[at]
    }

    /// The chain that one of the kernel's leads to.
    fn hook(&mut self, table: Table, hook: &str) -> &mut Chain {
        self.chain(table, &format!("{CHAIN_PREFIX}{hook}"))
    }
}

impl Wanted<'_> {
    /// The chains of one family. None of a family that nothing here has.
    pub fn chains(&self, family: Family) -> Vec<Chain> {
        let mut chains = Chains {
            family,
            chains: Vec::new(),
        };
        self.guards(&mut chains);
        self.policies(&mut chains);
        self.passes(&mut chains);
        self.publishes(&mut chains);
        self.sources(&mut chains);
        chains.chains
    }

    fn networks(&self, family: Family) -> impl Iterator<Item = (&NetworkRecord, IpAddr, String)> {
        self.networks.iter().filter_map(move |network| {
            let subnet = network.subnet(family.is_v6())?;
            Some((*network, subnet.gateway(), subnet.cidr().to_string()))
        })
    }

    fn endpoints(
        &self,
        family: Family,
    ) -> impl Iterator<Item = (&WantedEndpoint<'_>, &NetworkRecord, IpAddr)> {
        self.endpoints.iter().filter_map(move |endpoint| {
            let network = self.network_of(endpoint.record)?;
            Some((endpoint, network, endpoint.record.address(family.is_v6())?))
        })
    }

    fn network_of(&self, endpoint: &EndpointRecord) -> Option<&NetworkRecord> {
        let mut networks = self.networks.iter();
        networks
            .find(|network| network.number == endpoint.network)
            .copied()
    }
}

fn is_of(mapping: &MappingRecord, family: Family) -> bool {
    mapping.spec.ext_ip().is_ipv6() == family.is_v6()
}

fn host(address: IpAddr) -> String {
    match address {
        IpAddr::V4(v4) => format!("{v4}/32"),
        IpAddr::V6(v6) => format!("{v6}/128"),
    }
}

fn by(option: &str, interface: Option<&IfName>) -> String {
    interface.map_or_else(String::new, |name| format!(" {option} {name}"))
}

/// `FIRST` or `FIRST:LAST`.
fn ports(range: PortRange) -> String {
    match range.count() {
        1 => range.first().to_string(),
        _ => format!("{}:{}", range.first(), range.last()),
    }
}

#[cfg(test)]
mod tests {
    use super::{
        egress::deny_chain,
        fixture::{endpoint, network, open, wanted},
        publish::published,
        *,
    };
    use crate::model::netfilter::{Saved, change};
    use serde_json::json;

    /// The rules without comments, each with its table.
    fn rules(wanted: &Wanted<'_>, family: Family) -> Vec<String> {
        let chains = wanted.chains(family);
        let lines = chains.iter().flat_map(|chain| {
            chain.lines(|_| None).into_iter().map(|line| {
                let (before, rest) = line.split_once(" -m comment --comment \"").unwrap();
                let (_, after) = rest.split_once('"').unwrap();
                format!("{} {before}{after}", chain.table.name())
            })
        });
        lines.collect()
    }

    /// Whether a rule is of a chain that drops lead to.
    fn is_end_of_drops(line: &str) -> bool {
        let ends = ["-A NUCNET-DROP-", "-A NUCNET-TOLD-"];
        ends.iter().any(|end| line.contains(end))
    }

    #[test]
    fn drops_end_where_monitors_are_told() {
        let (network, record) = (network(false, &[]), endpoint(&[], open()));
        let found = rules(&wanted(&network, &record), Family::Ipv4);
        let is_meant = |line: &&String| line.split(' ').nth(2).unwrap().ends_with("-martian");
        let of_reason = found.iter().filter(is_meant);
        let log = |group| {
            format!(
                "mangle -A NUCNET-TOLD-martian -j NFLOG --nflog-group {group} --nflog-prefix martian"
            )
        };
        let expected = [
            "mangle -A NUCNET-DROP-martian -m limit --limit 1000/sec --limit-burst 1000 -j NUCNET-TOLD-martian".to_owned(),
            "mangle -A NUCNET-DROP-martian -j DROP".to_owned(),
            log(111), log(112), log(113), log(114),
        ];
        assert_eq!(
            of_reason.collect::<Vec<_>>(),
            expected.iter().collect::<Vec<_>>()
        );
    }

    #[test]
    fn a_published_endpoint_without_a_policy() {
        let (network, record) = (network(false, &[]), endpoint(&["8080:80"], open()));
        // Where drops end is the same for each reason.
        let expected = "\
mangle -A NUCNET-PREROUTING -i lo -j RETURN
mangle -A NUCNET-PREROUTING -i nucnet0 -g NUCNET-SOURCES
mangle -A NUCNET-PREROUTING -s 10.0.42.0/24 -g NUCNET-DROP-martian-source
mangle -A NUCNET-SOURCES -s 10.0.42.7/32 -i nucnet0 -m mac --mac-source 02:00:00:00:00:07 -g NUCNET-7
mangle -A NUCNET-SOURCES -i nucnet0 -m mac --mac-source 02:00:00:00:00:07 -g NUCNET-DROP-spoofed-address
mangle -A NUCNET-SOURCES -g NUCNET-DROP-spoofed-mac
mangle -A NUCNET-7 -d 127.0.0.0/8 -g NUCNET-DROP-martian
mangle -A NUCNET-7 -d 224.0.0.0/4 -g NUCNET-DROP-multicast
mangle -A NUCNET-7 -m addrtype --dst-type BROADCAST -g NUCNET-DROP-multicast
mangle -A NUCNET-7 -d 240.0.0.0/4 -g NUCNET-DROP-martian
mangle -A NUCNET-7 -p udp -m udp --sport 67 --dport 68 -g NUCNET-DROP-infrastructure
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 5 -g NUCNET-DROP-infrastructure
mangle -A NUCNET-7 -p tcp -j RETURN
mangle -A NUCNET-7 -p udp -j RETURN
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 8 -j RETURN
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 0 -j RETURN
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 3 -j RETURN
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 11 -j RETURN
mangle -A NUCNET-7 -p icmp -m icmp --icmp-type 12 -j RETURN
mangle -A NUCNET-7 -g NUCNET-DROP-protocol
filter -A NUCNET-FORWARD -i nucnet0 -m conntrack --ctstate INVALID,UNTRACKED -g NUCNET-DROP-no-flow
filter -A NUCNET-FORWARD -o nucnet0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
filter -A NUCNET-FORWARD -o nucnet0 -m conntrack --ctstate DNAT -j ACCEPT
filter -A NUCNET-FORWARD -i nucnet0 -o nucnet0 -j ACCEPT
filter -A NUCNET-FORWARD -o nucnet0 -j NUCNET-PEERS
filter -A NUCNET-FORWARD -o nucnet0 -g NUCNET-DROP-not-published
filter -A NUCNET-FORWARD -i nucnet0 -j ACCEPT
filter -A NUCNET-PEERS -i nucnet0 -j ACCEPT
filter -A NUCNET-OUTPUT -o nucnet0 -p icmp -m icmp --icmp-type 5 -j DROP
nat -A NUCNET-7 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.0.42.7:80
nat -A NUCNET-PREROUTING -m addrtype ! --dst-type LOCAL -j RETURN
nat -A NUCNET-PREROUTING -d 169.254.0.0/16 -j RETURN
nat -A NUCNET-PREROUTING -j NUCNET-7
nat -A NUCNET-OUTPUT -m addrtype ! --dst-type LOCAL -j RETURN
nat -A NUCNET-OUTPUT -d 169.254.0.0/16 -j RETURN
nat -A NUCNET-OUTPUT -j NUCNET-7
nat -A NUCNET-POSTROUTING -s 10.0.42.7/32 -d 10.0.42.7/32 -o nucnet0 -j SNAT --to-source 10.0.42.1
nat -A NUCNET-POSTROUTING -s 127.0.0.0/8 -o nucnet0 -j SNAT --to-source 10.0.42.1
nat -A NUCNET-POSTROUTING -o nucnet0 -j RETURN
nat -A NUCNET-POSTROUTING -o lo -j RETURN
nat -A NUCNET-POSTROUTING -s 10.0.42.0/24 -p tcp -j MASQUERADE --to-ports 16384-32767
nat -A NUCNET-POSTROUTING -s 10.0.42.0/24 -p udp -j MASQUERADE --to-ports 16384-32767
nat -A NUCNET-POSTROUTING -s 10.0.42.0/24 -j MASQUERADE";
        let mut found = rules(&wanted(&network, &record), Family::Ipv4);
        found.retain(|line| !is_end_of_drops(line));
        let mut expected: Vec<String> = expected.lines().map(str::to_owned).collect();
        // Within a chain the order counts; that of the chains does not.
        let chain = |line: &String| line.split(' ').take(3).collect::<Vec<_>>().join(" ");
        found.sort_by_key(chain);
        expected.sort_by_key(chain);
        assert_eq!(found, expected);
    }

    #[test]
    fn a_policy_is_about_what_was_asked_for_and_a_denial_about_both() {
        let egress = json!({
            "default": "deny", "allow": ["192.0.2.0/24:80,443/tcp", "host:53"],
            "deny": ["any:25"], "dns": [],
        });
        let (network, record) = (network(false, &[]), endpoint(&[], egress));
        let found = rules(&wanted(&network, &record), Family::Ipv4);
        let own = found
            .iter()
            .filter_map(|line| line.strip_prefix("filter -A NUCNET-7"));
        let expected = "\
-DENY -m limit --limit 20/sec --limit-burst 20 -j NFLOG --nflog-group 110 --nflog-prefix
-DENY -m limit --limit 1000/sec --limit-burst 1000 -j NUCNET-TOLD-policy
-DENY -j DROP
 -m conntrack --ctstate ESTABLISHED --ctdir REPLY -j RETURN
 -m conntrack --ctstate RELATED -j RETURN
 -m conntrack --ctstate INVALID,UNTRACKED -g NUCNET-7-DENY
 -p tcp -m conntrack --ctorigdstport 25 -g NUCNET-7-DENY
 -p udp -m conntrack --ctorigdstport 25 -g NUCNET-7-DENY
 -p tcp -m tcp --dport 25 -m conntrack --ctstate DNAT -g NUCNET-7-DENY
 -p udp -m udp --dport 25 -m conntrack --ctstate DNAT -g NUCNET-7-DENY
 -p tcp -m conntrack --ctorigdst 192.0.2.0/24 --ctorigdstport 80 -j RETURN
 -p tcp -m conntrack --ctorigdst 192.0.2.0/24 --ctorigdstport 443 -j RETURN
 -p tcp -m addrtype --dst-type LOCAL -m conntrack --ctorigdstport 53 -j RETURN
 -p tcp -m conntrack --ctstate DNAT --ctorigdstport 53 -j RETURN
 -p udp -m addrtype --dst-type LOCAL -m conntrack --ctorigdstport 53 -j RETURN
 -p udp -m conntrack --ctstate DNAT --ctorigdstport 53 -j RETURN
 -g NUCNET-7-DENY";
        let own: Vec<&str> = own.map(|line| line.split(" \"").next().unwrap()).collect();
        assert_eq!(own, expected.lines().collect::<Vec<_>>());
    }

    #[test]
    fn rules_of_one_family_say_nothing_of_the_other() {
        let egress = json!({
            "default": "deny", "allow": ["192.0.2.0/24", "[2001:db8::/32]:443/tcp"],
            "deny": [], "dns": [],
        });
        let (network, record) = (network(false, &[]), endpoint(&["192.0.2.2:80:80"], egress));
        let v4 = rules(&wanted(&network, &record), Family::Ipv4).join("\n");
        let v6 = rules(&wanted(&network, &record), Family::Ipv6).join("\n");
        assert!(
            v4.contains("--ctorigdst 192.0.2.0/24") && !v4.contains("2001:db8"),
            "{v4}"
        );
        assert!(
            v6.contains("--ctorigdst 2001:db8::/32") && !v6.contains("192.0.2."),
            "{v6}"
        );
        assert!(
            v4.contains("DNAT --to") && !v6.contains("DNAT --to"),
            "{v6}"
        );
    }

    #[test]
    fn ranges_keep_the_distance_from_their_first_port() {
        let specs: Vec<PublishSpec> = ["9000-9002:80-82", "53:53/udp", "[2001:db8::1]:8080:80"]
            .iter()
            .map(|spec| spec.parse().unwrap())
            .collect();
        let target = |address: &str| -> Vec<String> {
            let rules = published(&specs, address.parse().unwrap());
            rules
                .into_iter()
                .map(|(matches, target)| format!("{matches} {target}"))
                .collect()
        };
        let to = "-j DNAT --to-destination";
        let expected = [
            format!("-p tcp -m tcp --dport 9000:9002 {to} 10.0.42.7:80-82/9000"),
            format!("-p udp -m udp --dport 53 {to} 10.0.42.7"),
        ];
        assert_eq!(target("10.0.42.7"), expected);
        let expected = [
            format!("-d 2001:db8::1/128 -p tcp -m tcp --dport 8080 {to} [fd00::7]:80"),
            format!("-p tcp -m tcp --dport 9000:9002 {to} [fd00::7]:80-82/9000"),
            format!("-p udp -m udp --dport 53 {to} fd00::7"),
        ];
        assert_eq!(target("fd00::7"), expected);
    }

    #[test]
    fn uplinks_that_serve_are_named_and_the_hosts_own_sockets_are_served_anyway() {
        let (network, record) = (network(true, &["eth1"]), endpoint(&["8080:80"], open()));
        let found = rules(&wanted(&network, &record), Family::Ipv4);
        let leads = |hook: &str| -> Vec<&str> {
            let start = format!("nat -A NUCNET-{hook} ");
            let lines = found.iter().filter_map(|line| line.strip_prefix(&start));
            lines.filter(|line| line.ends_with("NUCNET-7")).collect()
        };
        assert_eq!(
            leads("PREROUTING"),
            ["-i eth1 -j NUCNET-7", "-i nucnet0 -j NUCNET-7"]
        );
        assert_eq!(leads("OUTPUT"), ["-j NUCNET-7"]);
        assert!(
            found.iter().all(|line| !line.contains("NUCNET-PEERS")),
            "it is isolated"
        );
    }

    #[test]
    fn ports_that_a_network_keeps_are_kept_unless_they_may_be_the_hosts() {
        let (mut network, record) = (network(false, &[]), endpoint(&[], open()));
        if let Some(wish) = &mut network.wish {
            wish.behaviour.keep_ports = true;
        }
        let found = rules(&wanted(&network, &record), Family::Ipv4).join("\n");
        let source = "nat -A NUCNET-POSTROUTING -s 10.0.42.0/24";
        let expected = ["0:1023", "32768:60999"].map(|range| {
            format!("{source} -p udp -m udp --sport {range} -j MASQUERADE --to-ports 16384-32767\n")
        });
        let expected = format!("{}{source} -j MASQUERADE", expected.concat());
        assert!(found.contains(&expected), "{found}");
    }

    #[test]
    fn names_of_chains_are_short_enough_for_the_largest_number() {
        assert!(deny_chain(u32::MAX).len() <= 28, "{}", deny_chain(u32::MAX));
    }

    #[test]
    fn an_endpoint_that_goes_takes_its_chains_along() {
        let (network, record) = (network(false, &[]), endpoint(&["8080:80"], open()));
        let with = wanted(&network, &record);
        let text = change(&Saved::default(), &with.chains(Family::Ipv4)).text;
        let saved = Saved::parse(&text.replace("-I ", "-A ").replace("G 1 -m", "G -m"));
        let without = Wanted {
            networks: vec![&network],
            ..Wanted::default()
        };
        let text = change(&saved, &without.chains(Family::Ipv4)).text;
        assert_eq!(text.matches("\n-X NUCNET-7\n").count(), 2, "{text}");
        assert!(
            !text.contains("8080") && !text.contains("10.0.42.7"),
            "{text}"
        );
    }
}
