//! What may pass between interfaces.

use super::{Chains, Wanted, by, dropped, host, is_of, of_mapping, of_network, ports};
use crate::model::{
    mapping::MappingSpec,
    netfilter::{Family, Table},
};
use nucnet_common::abi::Reason;

impl Wanted<'_> {
    /// What is counted of mappings, whoever lets it pass; rules without a target. The first packet
    /// by an snat is not among it: what it leaves as is settled later.
    fn counts(&self, chains: &mut Chains) {
        let family = chains.family;
        for mapping in self.mappings.iter().filter(|it| is_of(it, family)) {
            let ext = host(mapping.spec.ext_ip());
            let matches = match (&mapping.spec, mapping.spec.ports()) {
                (MappingSpec::Snat { int, .. }, _) => {
                    vec![format!("-m conntrack --ctorigsrc {int} --ctrepldst {ext}")]
                }
                (_, Some((protocol, list))) => {
                    let ranges = list.ranges().iter().map(|&range| {
                        let asked = format!("--ctorigdst {ext} --ctorigdstport {}", ports(range));
                        format!("-p {protocol} -m conntrack --ctstate DNAT {asked}")
                    });
                    ranges.collect()
                }
                (_, None) => Vec::new(),
            };
            for matches in matches {
                let forward = chains.hook(Table::Filter, "FORWARD");
                forward.rule(matches, &of_mapping(mapping), "");
            }
        }
    }

    /// What is forwarded.
    pub(super) fn passes(&self, chains: &mut Chains) {
        const PEERS: &str = "NUCNET-PEERS";
        let family = chains.family;
        let networks: Vec<_> = self.networks(family).map(|(network, ..)| network).collect();
        self.counts(chains);
        for network in &networks {
            let (owner, bridge) = (of_network(network), &network.bridge);
            // What the kernel knows no connection for would leave with its own address.
            let matches = format!("-i {bridge} -m conntrack --ctstate INVALID,UNTRACKED");
            let target = chains.drop(Table::Filter, Reason::NoFlow);
            let forward = chains.hook(Table::Filter, "FORWARD");
            forward.rule(matches, &dropped(&owner, Reason::NoFlow), target);
        }
        for network in &networks {
            let (owner, bridge) = (of_network(network), &network.bridge);
            let to = |state: &str| format!("-o {bridge} -m conntrack --ctstate {state}");
            if !network.isolate {
                let peers = chains.chain(Table::Filter, PEERS);
                peers.rule(format!("-i {bridge}"), &owner, "-j ACCEPT");
            }
            let reason = match network.isolate {
                true => Reason::Isolated,
                false => Reason::NotPublished,
            };
            let target = chains.drop(Table::Filter, reason);
            let forward = chains.hook(Table::Filter, "FORWARD");
            forward.rule(to("RELATED,ESTABLISHED"), &owner, "-j ACCEPT");
            // Published, or mapped.
            forward.rule(to("DNAT"), &owner, "-j ACCEPT");
            let siblings = format!("-i {bridge} -o {bridge}");
            forward.rule(siblings, &owner, "-j ACCEPT");
            if !network.isolate {
                forward.rule(format!("-o {bridge}"), &owner, format!("-j {PEERS}"));
            }
            forward.rule(format!("-o {bridge}"), &dropped(&owner, reason), target);
        }
        for network in &networks {
            let forward = chains.hook(Table::Filter, "FORWARD");
            let from = format!("-i {}", network.bridge);
            forward.rule(from, &of_network(network), "-j ACCEPT");
            let redirect = match family {
                Family::Ipv4 => "-p icmp -m icmp --icmp-type 5",
                Family::Ipv6 => "-p ipv6-icmp -m icmp6 --icmpv6-type 137",
            };
            let matches = format!("-o {} {redirect}", network.bridge);
            let comment = dropped(&of_network(network), Reason::Infrastructure);
            let output = chains.hook(Table::Filter, "OUTPUT");
            output.rule(matches, &comment, "-j DROP");
        }
        for mapping in self
            .mappings
            .iter()
            .filter(|mapping| is_of(mapping, family))
        {
            let owner = of_mapping(mapping);
            let forward = chains.hook(Table::Filter, "FORWARD");
            let (there, back) = match &mapping.spec {
                MappingSpec::Dnat { int_ip, .. } | MappingSpec::Hairpin { int_ip, .. } => {
                    let int = host(*int_ip);
                    (
                        format!("-d {int} -m conntrack --ctstate DNAT"),
                        format!(
                            "-s {int} -m conntrack --ctstate RELATED,ESTABLISHED --ctdir REPLY"
                        ),
                    )
                }
                MappingSpec::Snat { int, ext_if, .. } => (
                    format!("-s {int}{}", by("-o", ext_if.as_ref())),
                    format!(
                        "-d {int}{} -m conntrack --ctstate RELATED,ESTABLISHED",
                        by("-i", ext_if.as_ref())
                    ),
                ),
            };
            forward.rule(there, &owner, "-j ACCEPT");
            forward.rule(back, &owner, "-j ACCEPT");
        }
    }
}
