//! Which steps make what, in their order.

use super::{Step, mapping::MAPPING_ROUTES};
use crate::model::{
    mapping::MappingSpec,
    policy::Compiled,
    publish::PublishSpec,
    record::{EndpointRecord, MappingRecord, NetworkRecord},
};

/// The steps that make a network.
pub(in crate::verbs) fn network_steps(network: &NetworkRecord) -> Vec<Step> {
    let (name, bridge) = (network.name.to_string(), network.bridge.to_string());
    let addresses: Vec<String> = network
        .subnets
        .iter()
        .map(|subnet| subnet.gateway_net().to_string())
        .collect();
    vec![
        Step::NetworkIntent(name.clone()),
        Step::Bridge(bridge.clone()),
        Step::BridgeSysctls(bridge.clone()),
        Step::BridgeAddresses(format!("{bridge}: {}", addresses.join(", "))),
        Step::NetworkEntry(name.clone()),
        Step::BridgeProgram(bridge.clone()),
        Step::BridgeUp(bridge),
        Step::NetworkRecord(name),
    ]
}

/// The steps that make an endpoint.
pub(in crate::verbs) fn endpoint_steps(
    endpoint: &EndpointRecord,
    bridge: &str,
    policy: Option<&Compiled>,
) -> Vec<Step> {
    let (id, host) = (endpoint.id.to_string(), endpoint.host_ifname.to_string());
    let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
    let addresses = list(&mut endpoint.addresses.iter().map(ToString::to_string));
    let publishes = list(&mut endpoint.publishes.iter().map(|spec| format!("-p {spec}")));
    let claimed = match publishes.is_empty() {
        true => addresses.clone(),
        false => format!("{addresses}, {publishes}"),
    };
    let mut steps = vec![Step::EndpointIntent(id.clone())];
    if endpoint.slot().is_some() {
        let path = endpoint.netns.display().to_string();
        steps.push(Step::SlotNamespace(path));
    }
    steps.extend([
        Step::Claims(claimed),
        Step::Veth(format!(
            "veth pair {host}, {} in {}",
            endpoint.wish.ifname,
            endpoint.netns.display()
        )),
        Step::Program(host.clone()),
    ]);
    if endpoint.policy.is_some() || policy.is_some() {
        steps.push(Step::Policy(policy.map_or(0, Compiled::entries)));
    }
    steps.extend([
        Step::Entries(format!("endpoint {id}")),
        Step::Neighbours(bridge.to_owned()),
        Step::HostSide(host),
        match endpoint.slot() {
            None => Step::ContainerSide(endpoint.wish.ifname.to_string()),
            Some(slot) => Step::Guest(format!("TAP {}", slot.tap.name)),
        },
    ]);
    if let Some(resolv) = &endpoint.resolv {
        let resolvers = list(&mut endpoint.egress.dns().iter().map(ToString::to_string));
        let path = resolv.rootfs.join("etc/resolv.conf");
        steps.push(Step::ResolvConf(format!(
            "{} ({resolvers})",
            path.display()
        )));
    }
    if !publishes.is_empty() {
        steps.push(Step::Publishes(publishes));
    }
    steps.push(Step::EndpointRecord(id));
    steps
}

/// The steps that publish more ports of an endpoint.
pub(in crate::verbs) fn publish_steps(publishes: &[PublishSpec]) -> Vec<Step> {
    let list: Vec<String> = publishes.iter().map(|spec| format!("-p {spec}")).collect();
    let what = list.join(", ");
    vec![
        Step::PublishIntent(what.clone()),
        Step::PublishClaims(what.clone()),
        Step::Publishes(what.clone()),
        Step::PublishRecord(what),
    ]
}

/// The steps that replace an endpoint's policy. Afterwards the former one is superseded.
pub(in crate::verbs) fn egress_steps(
    endpoint: &EndpointRecord,
    policy: Option<&Compiled>,
) -> Vec<Step> {
    let id = endpoint.id.to_string();
    // Nothing to enforce, before and after: there is only something to remember.
    if endpoint.policy.is_none() && policy.is_none() {
        return vec![
            Step::EgressIntent(COMING.to_owned()),
            Step::EgressRecord(id),
        ];
    }
    let mut steps = superseded_steps(policy);
    steps.extend([Step::EgressSwitch(id.clone()), Step::EgressRecord(id)]);
    steps
}

/// The steps that have made a policy what it is, once it is not in force any more.
pub(in crate::verbs) fn superseded_steps(policy: Option<&Compiled>) -> Vec<Step> {
    let mut steps = vec![Step::EgressIntent(COMING.to_owned())];
    steps.extend(policy.map(|policy| Step::Policy(policy.entries())));
    steps
}

const COMING: &str = "another egress policy";

/// The steps that make a mapping.
pub(in crate::verbs) fn mapping_steps(record: &MappingRecord) -> Vec<Step> {
    let words = record.spec.to_string();
    let mut steps = vec![
        Step::MappingIntent(record.id.to_string()),
        Step::MappingRoutes(MAPPING_ROUTES.to_owned()),
        Step::Uplinks,
    ];
    if let MappingSpec::Dnat { ext_ip, .. } = &record.spec
        && let Some((protocol, ports)) = record.spec.ports()
    {
        steps.push(Step::MappingClaims(format!("{ext_ip}, {ports}/{protocol}")));
    }
    steps.extend([
        Step::Mapping(words),
        Step::MappingRecord(record.id.to_string()),
    ]);
    steps
}
