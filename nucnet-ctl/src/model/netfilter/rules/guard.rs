//! Guards: an endpoint may only send as itself, and nobody else as one.

use super::{Chains, Wanted, dropped, host, of_network, own_chain};
use crate::model::netfilter::{Family, Table};
use nucnet_common::abi::Reason;

impl Wanted<'_> {
    /// Who may send as whom.
    pub(super) fn guards(&self, chains: &mut Chains) {
        const SOURCES: &str = "NUCNET-SOURCES";
        let family = chains.family;
        for (network, _, _) in self.networks(family) {
            let owner = of_network(network);
            let hook = chains.hook(Table::Mangle, "PREROUTING");
            if hook.is_empty() {
                hook.rule("-i lo", "host", "-j RETURN");
            }
            hook.rule(
                format!("-i {}", network.bridge),
                &owner,
                format!("-g {SOURCES}"),
            );
        }
        for (network, _, subnet) in self.networks(family) {
            let comment = dropped(&of_network(network), Reason::MartianSource);
            let target = chains.drop(Table::Mangle, Reason::MartianSource);
            let hook = chains.hook(Table::Mangle, "PREROUTING");
            hook.rule(format!("-s {subnet}"), &comment, target);
        }
        if self.networks(family).next().is_none() {
            return;
        }
        if family.is_v6() {
            let sources = chains.chain(Table::Mangle, SOURCES);
            // Who asks whether an address is taken means its own, for which the host answers others.
            let matches = "-s ::/128 -p ipv6-icmp -m icmp6 --icmpv6-type 135";
            sources.rule(matches, &dropped("host", Reason::Discovery), "-j DROP");
            // Their answers change nothing: endpoints are permanent neighbours of the host's.
            for kind in ["135", "136"] {
                let matches = format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}");
                sources.rule(matches, "host", "-j RETURN");
            }
            for kind in ["133", "143"] {
                let matches = format!("-p ipv6-icmp -m icmp6 --icmpv6-type {kind}");
                sources.rule(matches, &dropped("host", Reason::Discovery), "-j DROP");
            }
        }
        for (endpoint, network, address) in self.endpoints(family) {
            let record = endpoint.record;
            let (id, chain) = (record.id.as_str(), own_chain(record.number));
            let own = format!(
                "-s {} -i {} -m mac --mac-source {}",
                host(address),
                network.bridge,
                record.mac
            );
            let sources = chains.chain(Table::Mangle, SOURCES);
            sources.rule(own, id, format!("-g {chain}"));
            let forbidden: &[(&str, Reason)] = match family {
                // Not its link-local range, which services are routed to: a matter of policy.
                Family::Ipv4 => &[
                    ("-d 127.0.0.0/8", Reason::Martian),
                    ("-d 224.0.0.0/4", Reason::Multicast),
                    ("-m addrtype --dst-type BROADCAST", Reason::Multicast),
                    ("-d 240.0.0.0/4", Reason::Martian),
                    (
                        "-p udp -m udp --sport 67 --dport 68",
                        Reason::Infrastructure,
                    ),
                    ("-p icmp -m icmp --icmp-type 5", Reason::Infrastructure),
                ],
                Family::Ipv6 => &[
                    ("-d ::/127", Reason::Martian),
                    ("-d ::ffff:0:0/96", Reason::Martian),
                    ("-d ff00::/8", Reason::Multicast),
                    ("-d fe80::/10", Reason::LinkLocal),
                    (
                        "-p udp -m udp --sport 547 --dport 546",
                        Reason::Infrastructure,
                    ),
                    (
                        "-p ipv6-icmp -m icmp6 --icmpv6-type 134",
                        Reason::Infrastructure,
                    ),
                    (
                        "-p ipv6-icmp -m icmp6 --icmpv6-type 137",
                        Reason::Infrastructure,
                    ),
                ],
            };
            for (matches, reason) in forbidden {
                let target = chains.drop(Table::Mangle, *reason);
                let guard = chains.chain(Table::Mangle, &chain);
                guard.rule(*matches, &dropped(id, *reason), target);
            }
            let target = chains.drop(Table::Mangle, Reason::Protocol);
            let guard = chains.chain(Table::Mangle, &chain);
            for matches in carried(family) {
                guard.rule(matches, id, "-j RETURN");
            }
            guard.rule("", &dropped(id, Reason::Protocol), target);
        }
        for (endpoint, network, _) in self.endpoints(family) {
            let record = endpoint.record;
            let matches = format!("-i {} -m mac --mac-source {}", network.bridge, record.mac);
            let comment = dropped(record.id.as_str(), Reason::SpoofedAddress);
            let target = chains.drop(Table::Mangle, Reason::SpoofedAddress);
            let sources = chains.chain(Table::Mangle, SOURCES);
            sources.rule(matches, &comment, target);
        }
        let comment = dropped("host", Reason::SpoofedMac);
        let target = chains.drop(Table::Mangle, Reason::SpoofedMac);
        chains
            .chain(Table::Mangle, SOURCES)
            .rule("", &comment, target);
    }
}

/// What is carried at all: TCP, UDP, echoes, and errors about them.
fn carried(family: Family) -> Vec<String> {
    let (icmp, kind, kinds): (_, _, &[u8]) = match family {
        Family::Ipv4 => ("-p icmp -m icmp", "--icmp-type", &[8, 0, 3, 11, 12]),
        Family::Ipv6 => (
            "-p ipv6-icmp -m icmp6",
            "--icmpv6-type",
            &[128, 129, 1, 2, 3, 4],
        ),
    };
    let ported = ["-p tcp", "-p udp"].map(str::to_owned).into_iter();
    let kinds = kinds.iter().map(|number| format!("{icmp} {kind} {number}"));
    ported.chain(kinds).collect()
}
