//! What rules of iptables make of the same: their lines, followed as the kernel follows them.

use std::net::IpAddr;

use nucnet_common::abi::Reason;
use nucnet_ctl::model::{
    netfilter::{
        AddressKind, End, Family, Journey, Surroundings, Tuple, Unknown, Wanted, WantedEndpoint,
        Way, WayIn,
    },
    policy::{Action, Policy},
    record::{EndpointRecord, NetworkRecord},
};
use nucnet_tests::packets::site::{APP, GATEWAY4, GATEWAY6, Party, WEB};
use proptest::prelude::*;
use serde_json::{from_value, json};

use crate::{
    arbitrary::PUBLISHED,
    cases, expected, own,
    reference::{Asked, is_host},
};

const BRIDGE: &str = "nucnet0";
const UPLINK: &str = "uplink";

fn mac(party: &Party) -> String {
    party.mac.map(|octet| format!("{octet:02x}")).join(":")
}

fn network() -> NetworkRecord {
    let record = json!({
        "name": "default", "number": 1, "state": "active", "bridge": BRIDGE, "link": 20,
        "mac": "02:00:00:00:00:01", "mtu": 1500, "isolate": false, "wish": null,
        "subnets": [
            {"cidr": "10.0.42.0/24", "gateway": GATEWAY4},
            {"cidr": "fd42::/64", "gateway": GATEWAY6},
        ],
    });
    from_value(record).expect("a network")
}

fn endpoint(id: &str, party: &Party, publishes: &[String]) -> EndpointRecord {
    let open = json!({"default": "allow", "allow": [], "deny": [], "dns": []});
    let record = json!({
        "id": id, "number": party.number, "state": "active", "network": 1,
        "netns": format!("/run/netns/{id}"), "namespace": {"device": 4, "inode": 5, "cookie": 6},
        "host_ifname": format!("nn-{id}"), "link": party.link, "mac": mac(party),
        "host_mac": "02:00:00:00:00:01", "addresses": [party.v4, party.v6], "mtu": 1500,
        "default_route": true, "publishes": publishes, "policy": null, "resolv": null,
        "egress": open, "datapath": "iptables",
        "wish": {
            "network": "default", "addresses": [], "mac": null, "ifname": "eth0", "mtu": null,
            "publishes": [], "egress": open, "rootfs": null,
        },
    });
    from_value(record).expect("an endpoint")
}

/// The site's host, whose network is one bridge.
struct Site;

impl Surroundings for Site {
    type Error = Unknown;

    fn kind(&self, address: IpAddr) -> Result<AddressKind, Unknown> {
        Ok(match is_host(address) {
            true => AddressKind::Local,
            false => AddressKind::Other,
        })
    }

    fn way(&self, packet: &Tuple, _: &str) -> Result<Way, Unknown> {
        let to = packet.destination;
        let is_near = [WEB.v4, WEB.v6, APP.v4, APP.v6].contains(&to);
        Ok(match (is_host(to), is_near) {
            (true, _) => Way::Local,
            (_, is_near) => Way::Link {
                link: if is_near { BRIDGE } else { UPLINK }.to_owned(),
                next_hop: to,
            },
        })
    }

    fn source(&self, packet: &Tuple, _: &str, _: IpAddr) -> Result<Option<IpAddr>, Unknown> {
        Ok(Some(match packet.destination {
            IpAddr::V4(_) => GATEWAY4,
            IpAddr::V6(_) => GATEWAY6,
        }))
    }
}

/// Verdict and rule as the lines have them, and whether the sender is told. Of a denial, the rule
/// that `explain` names: where two deny, lines come in another order.
fn followed(wanted: &Wanted<'_>, policy: &Policy, asked: Asked) -> (Action, Option<u32>, bool) {
    let family = match asked.to {
        IpAddr::V4(_) => Family::Ipv4,
        IpAddr::V6(_) => Family::Ipv6,
    };
    let sent = Tuple {
        source: own(asked.to),
        destination: asked.to,
        protocol: asked.protocol,
        source_port: 10_000,
        destination_port: asked.port,
    };
    let way_in = WayIn {
        link: BRIDGE,
        mac: WEB.mac,
    };
    let journey = Journey::follow(&wanted.chains(family), way_in, sent, &[], &Site);
    let journey = journey.expect("rules that are understood");
    let goes_to = |packet: Tuple| packet.goes_to(is_host(packet.destination));
    match journey.end {
        End::Dropped { reason, is_told } => {
            assert_eq!(reason, Reason::Policy, "{asked:?}");
            let rule = policy.denied_by(&goes_to(sent), &goes_to(journey.arrival));
            (Action::Deny, rule, is_told)
        }
        End::Host | End::Link { .. } => (Action::Allow, journey.policy_rule, false),
    }
}

#[test]
fn rules_of_iptables_say_what_the_policy_says() {
    let network = network();
    let web = endpoint("web", &WEB, &[]);
    let app = endpoint("app", &APP, &[format!("{PUBLISHED}:80")]);
    let test = |policy: Policy, destinations: Vec<Asked>| {
        let serve = |record, egress| WantedEndpoint {
            record,
            publishes: &record.publishes,
            egress,
            keeps_open: false,
        };
        let wanted = Wanted {
            networks: vec![&network],
            endpoints: vec![serve(&web, &policy), serve(&app, &app.egress)],
            ..Wanted::default()
        };
        for asked in destinations {
            let (action, rule) = expected(&policy, asked);
            let (found, by, is_told) = followed(&wanted, &policy, asked);
            prop_assert_eq!(found, action, "{:?}: {:?}", policy, asked);
            match action {
                Action::Deny => {
                    prop_assert_eq!(is_told, policy.rejects());
                    prop_assert_eq!(by, Some(rule));
                }
                Action::Allow if policy.is_in_force() => prop_assert_eq!(by.unwrap_or(0), rule),
                Action::Allow => prop_assert_eq!(by, None),
            }
        }
        Ok(())
    };
    cases(400, test, 10);
}
