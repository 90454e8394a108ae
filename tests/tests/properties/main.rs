//! What holds for the packet logic whatever comes: sequences of nearly valid packets, with time
//! passing, policies changing and tables failing.

mod checks;
mod sites;
mod traffic;

use std::env;

use nucnet_common::{abi::Reason, path::Way};
use nucnet_tests::packets::{
    bench::{Frame as _, ROUTER_MAC},
    checksum,
    engine::{Engine as _, Hook, Outcome},
    packet::{self, echo_request, tcp, udp},
    site::{self, BRIDGE, PARTIES, UPLINK, WEB},
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
    test_runner::{RngSeed, TestCaseError},
};

use self::{
    checks::{check_all, check_failures, check_guest, check_state, packet_of},
    sites::{happen, mapped_world, world, world_after},
    traffic::{Event, decorated, events, family, flawed, guests, mapped, sound},
};

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
        check_all(world(), &events)?;
    }

    #[test]
    fn whatever_is_sent_by_mappings_is_untouched_or_translated_whole(
        events in events(mapped()),
    ) {
        check_all(mapped_world(), &events)?;
    }

    #[test]
    fn whatever_is_nearly_valid_by_mappings_is_untouched_or_translated_whole(
        events in events(flawed(mapped())),
    ) {
        check_all(mapped_world(), &events)?;
    }

    #[test]
    fn whatever_is_nearly_valid_is_untouched_or_translated_whole(
        events in events(flawed(sound())),
    ) {
        check_all(world(), &events)?;
    }

    #[test]
    fn what_a_guest_sends_is_itself_again_on_the_way_back(
        sending in prop_oneof![guests(), flawed(guests())],
    ) {
        check_guest(&sending)?;
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
        check_failures(world, &events, &last)?;
    }

    #[test]
    fn change_of_a_table_that_fails_leaves_no_half_flow_of_a_mapping(
        events in events(mapped()),
        last in mapped(),
    ) {
        check_failures(mapped_world, &events, &last)?;
    }

    #[test]
    fn frame_that_the_kernel_refuses_to_change_goes_nowhere(
        events in events(sound()),
        last in sound(),
    ) {
        for number in 0.. {
            let mut world = world_after(world(), &events);
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
