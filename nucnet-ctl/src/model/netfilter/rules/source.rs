//! With whose address packets leave.

use super::{Chains, Wanted, by, host, is_of, of_mapping, of_network, publish::published};
use crate::model::{
    mapping::MappingSpec,
    netfilter::{Family, Table},
};

impl Wanted<'_> {
    /// With whose address packets leave.
    pub(super) fn sources(&self, chains: &mut Chains) {
        let family = chains.family;
        for (endpoint, network, address) in self.endpoints(family) {
            if published(endpoint.publishes, address).is_empty() {
                continue;
            }
            let Some(subnet) = network.subnet(family.is_v6()) else {
                continue;
            };
            // It would take a packet from its own address for a forged one.
            let (own, id) = (host(address), endpoint.record.id.as_str());
            let matches = format!("-s {own} -d {own} -o {}", network.bridge);
            let target = format!("-j SNAT --to-source {}", subnet.gateway());
            chains
                .hook(Table::Nat, "POSTROUTING")
                .rule(matches, id, target);
        }
        for (network, gateway, _) in self.networks(family) {
            let (owner, bridge) = (of_network(network), &network.bridge);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            if family == Family::Ipv4 {
                let matches = format!("-s 127.0.0.0/8 -o {bridge}");
                hook.rule(matches, &owner, format!("-j SNAT --to-source {gateway}"));
            }
            hook.rule(format!("-o {bridge}"), &owner, "-j RETURN");
        }
        for mapping in self
            .mappings
            .iter()
            .filter(|mapping| is_of(mapping, family))
        {
            let owner = of_mapping(mapping);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            match &mapping.spec {
                MappingSpec::Dnat { .. } => {}
                MappingSpec::Snat {
                    int,
                    ext_ip,
                    ext_if,
                } => {
                    hook.rule("-o lo", &owner, "-j RETURN");
                    let matches = format!("-s {int}{}", by("-o", ext_if.as_ref()));
                    hook.rule(matches, &owner, format!("-j SNAT --to-source {ext_ip}"));
                }
                MappingSpec::Hairpin { ext_ip, int_ip, .. } => {
                    let Some(lan) = mapping.lan else { continue };
                    let matches = format!(
                        "-s {lan} -d {} -m conntrack --ctstate DNAT --ctorigdst {}",
                        host(*int_ip),
                        host(*ext_ip)
                    );
                    hook.rule(matches, &owner, "-j MASQUERADE");
                }
            }
        }
        for (network, _, subnet) in self.networks(family) {
            let owner = of_network(network);
            let hook = chains.hook(Table::Nat, "POSTROUTING");
            hook.rule("-o lo", &owner, "-j RETURN");
            hook.rule(format!("-s {subnet}"), &owner, "-j MASQUERADE");
        }
    }
}
