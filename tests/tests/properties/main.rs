//! What holds for the packet logic whatever comes: sequences of nearly valid packets, with time
//! passing, policies changing and tables failing.

mod traffic;

use std::{collections::HashSet, env, net::IpAddr, time::Duration};

use nucnet_common::{
    abi::{Reason, flow_flag},
    env::Host as _,
    flow::{Standing, is_unbound, outside_key},
    path::Way,
};
use nucnet_ctl::model::policy::Action;
use nucnet_tests::packets::{
    bench::{Bench, Egress, Frame as _, ROUTER_MAC},
    checksum,
    engine::{Engine as _, Hook, Outcome, State},
    packet::{self, echo_request, tcp, udp},
    site::{self, BRIDGE, PARTIES, SECOND_UPLINK, UPLINK, WEB},
    world::World,
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{RngSeed, TestCaseError},
};

use self::traffic::{Event, Sending, decorated, events, family, flawed, sound};

/// TCP, as keys have it.
const TCP: u32 = nucnet_common::packet::TCP as u32;

/// The site with publishes for everything that the packets ask for.
fn world() -> World {
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

/// The same after all that.
fn world_after(events: &[Event]) -> World {
    let mut world = world();
    for event in events {
        happen(&mut world, event);
    }
    world
}

fn happen(world: &mut World, event: &Event) {
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

/// The IP packet of a frame without tag.
fn packet_of(frame: &[u8]) -> &[u8] {
    &frame[14..]
}

fn addresses(packet: &[u8]) -> (IpAddr, IpAddr) {
    let four = |at: usize| <[u8; 4]>::try_from(&packet[at..at + 4]).expect("address");
    let sixteen = |at: usize| <[u8; 16]>::try_from(&packet[at..at + 16]).expect("address");
    if packet[0] >> 4 == 4 {
        (four(12).into(), four(16).into())
    } else {
        (sixteen(8).into(), sixteen(24).into())
    }
}

/// What must be true of one frame, whatever it was.
fn check_outcome(sending: &Sending, outcome: Outcome, output: &[u8]) -> Result<(), TestCaseError> {
    if let Outcome::Refused { .. } = outcome {
        // The whole of such answers is what the rows are about.
        let wrong = checksum::wrong(packet_of(output));
        prop_assert_eq!(wrong, None, "the answer is at fault");
        return Ok(());
    }
    let Outcome::Redirected(Some(way)) = outcome else {
        prop_assert_eq!(
            output,
            &sending.frame[..],
            "{:?} changed the frame",
            outcome
        );
        return Ok(());
    };
    prop_assert_eq!(output.len(), sending.frame.len());
    if output[12..14] == [8, 6] {
        return Ok(());
    }
    let (before, after) = (packet_of(&sending.frame), packet_of(output));
    prop_assert_eq!(
        checksum::wrong(before),
        checksum::wrong(after),
        "a checksum was changed for the worse or the better"
    );
    let (source, destination) = addresses(after);
    let hosts: Vec<IpAddr> = site::INTERFACES
        .iter()
        .flat_map(|interface| interface.addresses)
        .map(|(address, _)| *address)
        .collect();
    let party = |link| PARTIES.into_iter().find(|party| party.link == link);
    match way {
        Way::Pass => prop_assert!(false, "passing is no redirect"),
        Way::Uplink { .. } => prop_assert!(hosts.contains(&source), "{source} left"),
        Way::Host { .. } => prop_assert!(site::is_for_host(destination), "{destination} got in"),
        Way::Loopback { .. } => prop_assert!(false, "no socket of the host's asked for anything"),
        Way::Peer { link } | Way::Link { link } => match party(link) {
            // Answers to its own questions go to its link-local address, too.
            Some(party) => prop_assert!(
                [party.v4, party.v6].contains(&destination) || after[40] == 136,
                "{destination} reached {}",
                party.number
            ),
            None => prop_assert!(hosts.contains(&source), "{source} left"),
        },
    }
    Ok(())
}

/// What must be true of the tables at any time.
fn check_state(world: &World, state: &State) -> Result<(), TestCaseError> {
    let problems = state.problems();
    prop_assert!(problems.is_empty(), "{}", problems.join("\n"));
    let now = world.now();
    let mut views = HashSet::new();
    for (key, flow) in &state.flows {
        prop_assert!(
            views.insert(outside_key(key.protocol, flow)),
            "two flows share an external view"
        );
        let is_live = Standing::of(key.protocol, flow, now) == Standing::Live;
        if flow.flags & flow_flag::BOUND != 0 && key.protocol != TCP && is_live {
            let binding = state.binding_of(key, flow);
            let holds = binding.is_some_and(|binding| {
                !is_unbound(binding, now)
                    && (binding.external, binding.external_port)
                        == (flow.external, flow.external_port)
            });
            prop_assert!(
                holds,
                "a live flow has lost its binding: {flow:?}, {binding:?}"
            );
        }
    }
    let mut ports = HashSet::new();
    for (key, binding) in &state.bindings {
        prop_assert!(
            ports.insert((key.protocol, binding.external, binding.external_port)),
            "two bindings share an external port"
        );
    }
    Ok(())
}

/// Whoever was alive still is, unless a policy ended it.
fn check_survival(
    world: &World,
    before: &State,
    after: &State,
    outcome: Outcome,
) -> Result<(), TestCaseError> {
    let is_denied = matches!(
        outcome,
        Outcome::Dropped {
            reason: Reason::Policy,
            ..
        }
    );
    let live = before
        .flows
        .iter()
        .filter(|(key, flow)| Standing::of(key.protocol, flow, world.now()) == Standing::Live);
    let mut lost = live.filter(|(key, _)| !after.flows.contains_key(key));
    let first = lost.next();
    prop_assert!(
        first.is_none() || is_denied,
        "a live flow is gone: {first:?}"
    );
    prop_assert!(lost.next().is_none(), "more than one live flow is gone");
    Ok(())
}

/// Lets everything happen, and checks after each packet.
fn check_all(events: &[Event]) -> Result<(), TestCaseError> {
    let mut world = world();
    let mut before = world.state();
    for event in events {
        if let Event::Sent(sending) = event {
            let (outcome, output) = world.run(sending.hook, &sending.frame);
            check_outcome(sending, outcome, &output)?;
            let after = world.state();
            check_survival(&world, &before, &after, outcome)?;
            check_state(&world, &after)?;
            before = after;
        } else {
            happen(&mut world, event);
        }
    }
    // Everybody falls silent: after the longest idle time nothing is left.
    world.pass(Duration::from_secs(100));
    world.reclaim();
    let state = world.state();
    check_state(&world, &state)?;
    prop_assert!(state.flows.is_empty() && state.bindings.is_empty());
    prop_assert!(state.outside.is_empty() && state.slots.is_empty());
    for (endpoint, usage) in &state.usage {
        prop_assert_eq!(
            (usage.flows, usage.bindings),
            (0, 0),
            "endpoint {}",
            endpoint
        );
    }
    Ok(())
}

/// A packet that goes back where another came from: addresses and ports exchanged, an echo
/// request become a reply.
fn reply_to(packet: &[u8]) -> Vec<u8> {
    let mut reply = packet.to_vec();
    let (header, protocol) = if packet[0] >> 4 == 4 {
        reply[12..20].rotate_left(4);
        (usize::from(packet[0] & 0x0f) * 4, packet[9])
    } else {
        reply[8..40].rotate_left(16);
        (40, packet[6])
    };
    match protocol {
        6 | 17 => reply[header..header + 4].rotate_left(2),
        _ => {
            // The types are a reply's one or eight apart; so are the sums.
            let (old, new): (u16, u8) = match packet[header] {
                8 => (8, 0),
                0 => (0, 8),
                128 => (128, 129),
                _ => (129, 128),
            };
            reply[header] = new;
            let check = u16::from_be_bytes([reply[header + 2], reply[header + 3]]);
            let sum = u32::from(!check) + u32::from(!(old << 8)) + (u32::from(new) << 8);
            let sum = (sum & 0xffff) + (sum >> 16);
            let sum = (sum & 0xffff) + (sum >> 16);
            reply[header + 2..header + 4].copy_from_slice(&(!(sum as u16)).to_be_bytes());
        }
    }
    reply
}

/// A packet without what each hop changes: time to live, and the IPv4 header checksum with it.
fn timeless(packet: &[u8]) -> Vec<u8> {
    let mut packet = packet.to_vec();
    if packet[0] >> 4 == 4 {
        packet[8] = 0;
        packet[10..12].fill(0);
    } else {
        packet[7] = 0;
    }
    packet
}

/// The same cases in each run, so that no change is blamed for what it has not done. Others where
/// `PROPTEST_CASES` says how many.
fn config() -> ProptestConfig {
    let mut config = ProptestConfig {
        failure_persistence: None,
        ..ProptestConfig::default()
    };
    if env::var_os("PROPTEST_CASES").is_none() {
        (config.cases, config.rng_seed) = (2_000, RngSeed::Fixed(1));
    }
    config
}

proptest! {
    #![proptest_config(config())]

    #[test]
    fn whatever_is_sent_is_untouched_or_translated_whole(events in events(sound())) {
        check_all(&events)?;
    }

    #[test]
    fn whatever_is_nearly_valid_is_untouched_or_translated_whole(events in events(flawed())) {
        check_all(&events)?;
    }

    #[test]
    fn random_bytes_are_survived(
        frames in vec((0..4_u8, vec(any::<u8>(), 0..120)), 1..20),
    ) {
        let mut world = world();
        for (hook, mut frame) in frames {
            let hook = match hook {
                0 => Hook::FromEndpoint { link: WEB.link },
                1 => Hook::FromUplink { link: UPLINK },
                2 => Hook::FromUplinkL3 { link: site::TUNNEL },
                _ => Hook::FromHost { link: BRIDGE, ingress: 0 },
            };
            // Half of the frames get past the first look at their addresses.
            if frame.len() > 13 && frame[13] & 1 == 0 {
                let (to, from) = match hook {
                    Hook::FromUplink { .. } => (site::interface(UPLINK).mac, ROUTER_MAC),
                    _ => (WEB.gateway_mac(), WEB.mac),
                };
                let ethertype = if frame[13] & 2 == 0 { 0x0800 } else { 0x86dd };
                frame[..14].copy_from_slice(&packet::ethernet(to, from, ethertype));
            }
            world.run(hook, &frame);
            prop_assert!(world.state().problems().is_empty());
        }
    }

    #[test]
    fn reply_to_a_translated_packet_comes_back_as_a_reply_to_the_original(
        is_v4 in any::<bool>(),
        party in any::<Index>(),
        to in any::<Index>(),
        kind in 0..3_u8,
        ports in (1..=u16::MAX, 1..=u16::MAX),
        choice in select(&[0_u8, 1, 7, 11][..]),
        payload in vec(any::<u8>(), 0..40),
        others in events(sound()),
    ) {
        let ip = family(is_v4);
        let party = *party.get(&PARTIES);
        let own = if is_v4 { party.v4 } else { party.v6 };
        let to = *to.get(&[ip.server, ip.client, ip.router]);
        let packet = match kind {
            0 => tcp("S", (own, ports.0), (to, ports.1)),
            1 => udp((own, ports.0), (to, ports.1)),
            _ => echo_request(own, to, ports.0),
        };
        // Neither end may be one that only a DHCP server has.
        prop_assume!(![67, 547].contains(&ports.0));
        let packet = decorated(packet.payload(payload), choice).ttl(64);
        let frame = packet.framed(party.gateway_mac(), party.mac);

        let mut world = world();
        let (outcome, out) = world.run(Hook::FromEndpoint { link: party.link }, &frame);
        let Outcome::Redirected(Some(Way::Uplink { link, .. })) = outcome else {
            return Err(TestCaseError::fail(format!("{outcome:?}")));
        };
        for event in others {
            // Time, resets and policies aside: the connection is alive.
            if let Event::Sent(sending) = &event
                && sending.frame != frame
            {
                let was = world.state();
                happen(&mut world, &event);
                let is = world.state();
                let changed = was.flows.iter().any(|(key, flow)| {
                    is.flows.get(key).is_none_or(|now| now.state != flow.state)
                });
                prop_assume!(!changed);
            }
        }
        let mut reply = packet::ethernet(site::interface(link).mac, ROUTER_MAC, 0).to_vec();
        reply[12..].copy_from_slice(&out[12..14]);
        reply.extend(reply_to(packet_of(&out)));
        prop_assert_eq!(checksum::wrong(packet_of(&reply)), None, "the reply is at fault");
        let (outcome, back) = world.run(Hook::FromUplink { link }, &reply);
        prop_assert!(
            matches!(
                outcome,
                Outcome::Redirected(Some(Way::Peer { link } | Way::Link { link }))
                    if link == party.link
            ),
            "{:?}", outcome
        );
        prop_assert_eq!(
            timeless(&reply_to(packet_of(&back))),
            timeless(packet_of(&frame))
        );
    }

    #[test]
    fn change_of_a_table_that_fails_leaves_no_half_flow(
        events in events(sound()),
        last in sound(),
    ) {
        for number in 0.. {
            let mut world = world_after(&events);
            let before = world.state();
            world.fail_change(number);
            let (outcome, output) = world.run(last.hook, &last.frame);
            let never_came = world.call_off_failure();
            let after = world.state();
            check_outcome(&last, outcome, &output)?;
            check_state(&world, &after)?;
            check_survival(&world, &before, &after, outcome)?;
            if never_came {
                // Nothing failed: this is what becomes of the packet.
                break;
            }
            let is_new = |(key, _): &(&_, &_)| !before.flows.contains_key(*key);
            // A packet on its last hop opens its flow before it is dropped.
            if matches!(
                outcome,
                Outcome::Dropped { reason, .. } | Outcome::Refused { reason, .. }
                    if reason != Reason::TtlExceeded
            ) {
                prop_assert!(after.flows.iter().find(is_new).is_none(), "half a flow");
            }
            // The sender tries again, and nothing is in the way.
            let (again, _) = world.run(last.hook, &last.frame);
            prop_assert!(
                !matches!(
                    again,
                    Outcome::Dropped { reason: Reason::FlowTableFull, .. }
                        | Outcome::Refused { reason: Reason::FlowTableFull, .. }
                ),
                "{:?} after {:?}", again, outcome
            );
            check_state(&world, &world.state())?;
            prop_assert!(number < 16, "a packet changes tables without end");
        }
    }

    #[test]
    fn frame_that_the_kernel_refuses_to_change_goes_nowhere(
        events in events(sound()),
        last in sound(),
    ) {
        for number in 0.. {
            let mut world = world_after(&events);
            world.fail_write(number);
            let (outcome, _) = world.run(last.hook, &last.frame);
            let never_came = world.call_off_refusal();
            check_state(&world, &world.state())?;
            if never_came {
                break;
            }
            // It was dropped in any case where only its answer is refused.
            prop_assert!(
                matches!(
                    outcome,
                    Outcome::Dropped { reason, .. }
                        if reason == Reason::Helper || reason == Reason::TtlExceeded
                ),
                "{:?}", outcome
            );
        }
    }
}
