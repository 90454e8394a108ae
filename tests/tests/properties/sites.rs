//! Where everything happens: sites with publishes and mappings, and what becomes of them.

use std::time::Duration;

use nucnet_ctl::model::{mapping::MappingSpec, policy::Action, publish::Protocol};
use nucnet_tests::packets::{
    bench::{Bench, Egress},
    engine::Engine as _,
    rows::{lan, subnet},
    site::{self, SECOND_UPLINK, WEB},
    world::World,
};

use crate::traffic::{Event, Sending, family};

/// The site with publishes for everything that the packets ask for.
pub(crate) fn world() -> World {
    let mut world = World::new();
    let mut bench = Bench::new(&mut world);
    bench.publish(&WEB, "8080:80");
    bench.publish(&WEB, "5001:80");
    bench.publish(&WEB, "8080:53/udp");
    bench.publish(&site::APP, "9001-9006:7001-7006");
    bench.publish(&site::SLOT, "16400-16407:80-87/udp");
    bench.publish(&site::OTHER, "53:53/udp");
    world
}

/// The same with static mappings of each kind.
pub(crate) fn mapped_world() -> World {
    let mut world = world();
    let mut bench = Bench::new(&mut world);
    let ports = |text: &str| text.parse().expect("ports");
    let (tcp, udp) = (Protocol::Tcp, Protocol::Udp);
    let mut number = 0;
    for is_v4 in [true, false] {
        let ip = family(is_v4);
        let (_, server, _) = lan(ip);
        for (spec, clients) in [
            (
                MappingSpec::dnat(ip.host, ports("443"), tcp, server, Some(80), None),
                None,
            ),
            (
                MappingSpec::dnat(ip.host, ports("5000-5001"), udp, server, None, None),
                None,
            ),
            (
                MappingSpec::dnat(ip.host, ports("80"), tcp, ip.web, Some(80), None),
                None,
            ),
            (
                MappingSpec::hairpin(ip.host, server, ports("443"), tcp, None),
                Some(subnet(ip)),
            ),
            (MappingSpec::snat(subnet(ip), ip.host, None), None),
        ] {
            number += 1;
            bench.map(number, &spec.expect("mapping"), clients, 0);
        }
    }
    world
}

/// A site after all that.
pub(crate) fn world_after(mut world: World, events: &[Event]) -> World {
    for event in events {
        happen(&mut world, event);
    }
    world
}

pub(crate) fn happen(world: &mut World, event: &Event) {
    let number = u32::from(matches!(event, Event::Policy(2))) + 1;
    match event {
        Event::Sent(Sending { hook, frame }) => {
            world.run(*hook, frame);
        }
        Event::Seconds(seconds) => world.pass(Duration::from_secs_f64(*seconds)),
        Event::Policy(0) => world.endpoint(WEB.link, Some(&WEB.entry())),
        Event::Policy(choice) => {
            let egress = Egress {
                default: Some(Action::Deny),
                allow: if *choice == 1 {
                    &[]
                } else {
                    &["198.51.100.0/24", "2001:db8:f::/64"]
                },
                ..Egress::default()
            };
            let (endpoint, compiled) = egress.compile(&WEB, number);
            for (bits, key, class) in &compiled.cidrs {
                world.policy_class(*bits, key, class);
            }
            for (bits, key, rule) in &compiled.ports {
                world.policy_rule(*bits, key, rule);
            }
            world.endpoint(WEB.link, Some(&endpoint));
        }
        Event::SecondUplink(is_there) => {
            let uplinks = site::uplinks();
            let (_, entry) = uplinks
                .iter()
                .find(|(link, _)| *link == SECOND_UPLINK)
                .expect("uplink");
            world.uplink(SECOND_UPLINK, is_there.then_some(entry));
        }
    }
}
