//! What must be true whatever came.

use std::{collections::HashSet, net::IpAddr, time::Duration};

use nucnet_common::{
    abi::{Reason, flow_flag},
    env::Host as _,
    flow::{Standing, is_unbound, outside_key},
    path::Way,
};
use nucnet_ctl::model::to_abi;
use nucnet_tests::packets::{
    checksum,
    engine::{Engine as _, Hook, Outcome, State},
    rows::subnet,
    site::{self, GUEST, PARTIES},
    world::World,
};
use proptest::{prelude::*, test_runner::TestCaseError};

use crate::{
    sites::{happen, world, world_after},
    traffic::{Event, Sending, family},
};

/// TCP, as keys have it.
const TCP: u32 = nucnet_common::packet::TCP as u32;

/// The IP packet of a frame without tag.
pub(crate) fn packet_of(frame: &[u8]) -> &[u8] {
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
    let is_beyond = |address| {
        let mut lans = [true, false].map(family).into_iter().map(subnet);
        lans.any(|lan| lan.net().contains(&address))
    };
    let party = |link| PARTIES.into_iter().find(|party| party.link == link);
    match way {
        Way::Pass => prop_assert!(false, "passing is no redirect"),
        // To a mapped host, clients come as themselves.
        Way::Uplink { .. } => prop_assert!(
            hosts.contains(&source) || is_beyond(destination),
            "{source} left"
        ),
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
pub(crate) fn check_state(world: &World, state: &State) -> Result<(), TestCaseError> {
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
pub(crate) fn check_all(mut world: World, events: &[Event]) -> Result<(), TestCaseError> {
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

/// Fails each change of a table in turn, while the last packet is carried.
pub(crate) fn check_failures(
    site: impl Fn() -> World,
    events: &[Event],
    last: &Sending,
) -> Result<(), TestCaseError> {
    for number in 0.. {
        let mut world = world_after(site(), events);
        let before = world.state();
        world.fail_change(number);
        let (outcome, output) = world.run(last.hook, &last.frame);
        let never_came = world.call_off_failure();
        let after = world.state();
        check_outcome(last, outcome, &output)?;
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
                Outcome::Dropped {
                    reason: Reason::FlowTableFull,
                    ..
                } | Outcome::Refused {
                    reason: Reason::FlowTableFull,
                    ..
                }
            ),
            "{:?} after {:?}",
            again,
            outcome
        );
        check_state(&world, &world.state())?;
        prop_assert!(number < 16, "a packet changes tables without end");
    }
    Ok(())
}

/// That a guest's packet is either as it was, or valid as it was valid, and comes back as it was.
pub(crate) fn check_guest(sending: &Sending) -> Result<(), TestCaseError> {
    let mut world = world();
    let (outcome, outside) = world.run(sending.hook, &sending.frame);
    let Outcome::Redirected(Some(way)) = outcome else {
        let spoofed = Outcome::Dropped {
            endpoint: GUEST.number,
            reason: Reason::SpoofedAddress,
        };
        prop_assert_eq!(outcome, spoofed);
        return Ok(());
    };
    prop_assert_eq!(way, Way::Peer { link: site::WIRE });
    if outside == sending.frame {
        return Ok(());
    }
    prop_assert_eq!(
        checksum::wrong(packet_of(&sending.frame)),
        checksum::wrong(packet_of(&outside))
    );
    // What it cannot know is what else it is called: that becomes its own name on the way back.
    let outer = [GUEST.v4, site::GATEWAY4].map(to_abi);
    let mut parts = sending.frame.windows(4);
    prop_assume!(!parts.any(|part| outer.iter().any(|name| name[12..] == *part)));
    // Zero, to a checksum, and may come back as that.
    prop_assume!(!sending.frame.windows(2).any(|part| part == [0xff; 2]));
    let (outcome, back) = world.run(Hook::ToGuest { link: site::WIRE }, &outside);
    let way = Way::Link { link: site::TAP };
    prop_assert_eq!(outcome, Outcome::Redirected(Some(way)));
    prop_assert_eq!(back, &sending.frame[..]);
    Ok(())
}
