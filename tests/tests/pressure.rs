//! More new sockets than there are ports and places, with the defaults, on the packet logic's own
//! clock: nobody is refused, and what is old and alive stays.

use std::time::Duration;

use nucnet_common::{
    abi::{Flow, FlowKey, FlowState, Reason, Settings},
    env,
    flow::Standing,
    packet::{TCP, UDP},
    path::Way,
};
use nucnet_ctl::model::behaviour::BehaviourWish;
use nucnet_tests::packets::{
    bench::{Bench, Frame as _, ROUTER_MAC},
    engine::{Engine as _, Hook, Outcome},
    packet::{self, Packet, tcp, udp},
    site::{self, APP, CLIENT4, HOST4, SERVER4, UPLINK, WEB},
    world::World,
};

/// New sockets a second.
const RATE: u32 = 5_000;
/// For so many seconds: ports and places run out after four already.
const SHORT: u32 = 12;
const LONG: u32 = 120;

const PACE: Duration = Duration::from_micros(1_000_000 / RATE as u64);

const OUT: Hook = Hook::FromEndpoint { link: WEB.link };
const IN: Hook = Hook::FromUplink { link: UPLINK };

/// Offsets in a frame with an IPv4 header without options.
const ADDRESS: usize = 26;
const SOURCE: usize = 34;
const DESTINATION: usize = 36;
const UDP_CHECKSUM: usize = 40;

/// The site as `nucnet-ctl` sets it up.
fn world() -> World {
    let mut world = World::new();
    let mut bench = Bench::new(&mut world);
    bench.publish(&WEB, "8080:80");
    world.settings(&Settings {
        flows_per_endpoint: 32_768,
        ..site::SETTINGS
    });
    for network in site::NETWORKS {
        world.network(network, &BehaviourWish::default().resolved().abi());
    }
    world
}

fn out(packet: &Packet) -> Vec<u8> {
    packet.framed(WEB.gateway_mac(), WEB.mac)
}

fn back(packet: &Packet) -> Vec<u8> {
    packet.framed(site::interface(UPLINK).mac, ROUTER_MAC)
}

fn port(frame: &[u8], at: usize) -> u16 {
    u16::from_be_bytes([frame[at], frame[at + 1]])
}

fn set_port(frame: &mut [u8], at: usize, port: u16) {
    frame[at..at + 2].copy_from_slice(&port.to_be_bytes());
}

/// Sends a frame, which must go on.
#[track_caller]
fn carried(world: &mut World, hook: Hook, frame: &[u8]) -> Vec<u8> {
    let (outcome, frame) = world.run(hook, frame);
    assert!(
        matches!(outcome, Outcome::Redirected(Some(way)) if way != Way::Pass),
        "{hook:?}: {outcome:?}"
    );
    frame
}

/// A connection of WEB's that is older than the flood.
struct Old {
    out: Vec<u8>,
    back: Vec<u8>,
}

impl Old {
    fn establish(world: &mut World) -> Self {
        let (web, server) = ((WEB.v4, 50_000), (SERVER4, 443));
        let syn = carried(world, OUT, &out(&tcp("S", web, server)));
        let host = (HOST4, port(&syn, SOURCE));
        carried(world, IN, &back(&tcp("SA", server, host)));
        let old = Self {
            out: out(&tcp("A", web, server)),
            back: back(&tcp("A", server, host)),
        };
        carried(world, OUT, &old.out);
        old
    }

    #[track_caller]
    fn is_alive(&self, world: &mut World) {
        carried(world, IN, &self.back);
        carried(world, OUT, &self.out);
    }
}

/// Asks for so many seconds; whether somebody answers.
fn ask(is_answered: bool, seconds: u32) {
    let mut world = world();
    let old = Old::establish(&mut world);
    let mut question = out(&udp((WEB.v4, 0), (SERVER4, 53)));
    let mut answer = back(&udp((SERVER4, 53), (HOST4, 0)));
    for frame in [&mut question, &mut answer] {
        set_port(frame, UDP_CHECKSUM, 0);
    }
    for number in 0..RATE * seconds {
        // Every port of the range from which Linux takes them.
        set_port(&mut question, SOURCE, 32_768 + (number % 28_232) as u16);
        let asked = carried(&mut world, OUT, &question);
        if is_answered {
            set_port(&mut answer, DESTINATION, port(&asked, SOURCE));
            let answered = carried(&mut world, IN, &answer);
            assert_eq!(port(&answered, DESTINATION), port(&question, SOURCE));
        }
        world.pass(PACE);
    }
    old.is_alive(&mut world);
    assert_eq!(world.state().problems(), Vec::<String>::new());
}

#[test]
fn five_thousand_answered_questions_a_second_are_all_carried() {
    ask(true, SHORT);
}

#[test]
#[ignore = "slow: takes a minute"]
fn two_minutes_of_answered_questions_are_all_carried() {
    ask(true, LONG);
}

#[test]
fn five_thousand_unanswered_questions_a_second_are_all_carried() {
    ask(false, SHORT);
}

#[test]
#[ignore = "slow: takes a minute"]
fn two_minutes_of_unanswered_questions_are_all_carried() {
    ask(false, LONG);
}

#[test]
fn five_thousand_connections_a_second_from_distinct_clients_are_all_carried() {
    connect(SHORT);
}

#[test]
#[ignore = "slow: takes a minute"]
fn two_minutes_of_connections_from_distinct_clients_are_all_carried() {
    connect(LONG);
}

/// Opens and closes connections for so many seconds.
fn connect(seconds: u32) {
    let mut world = world();
    let old = Old::establish(&mut world);
    let (client, host, web) = ((CLIENT4, 0), (HOST4, 8080), (WEB.v4, 80));
    let mut conversation: Vec<(Hook, Vec<u8>)> = [
        (IN, "S"),
        (OUT, "SA"),
        (IN, "A"),
        (IN, "FA"),
        (OUT, "FA"),
        (IN, "A"),
    ]
    .into_iter()
    .map(|(hook, flags)| match hook {
        IN => (hook, back(&tcp(flags, client, host))),
        _ => (hook, out(&tcp(flags, web, client))),
    })
    .collect();
    for number in 0..RATE * seconds {
        // 198.51.100.x from every port of a client's.
        let (last, client_port) = ((number % 200) as u8 + 1, 1024 + (number / 200) as u16);
        for (hook, frame) in &mut conversation {
            let (address, at) = match *hook {
                IN => (ADDRESS, SOURCE),
                _ => (ADDRESS + 4, DESTINATION),
            };
            frame[address + 3] = last;
            set_port(frame, at, client_port);
            carried(&mut world, *hook, frame);
        }
        world.pass(PACE);
    }
    old.is_alive(&mut world);
    assert_eq!(world.state().problems(), Vec::<String>::new());
}

#[test]
fn flood_of_half_open_connections_keeps_nobody_out() {
    let mut world = world();
    let old = Old::establish(&mut world);
    let mut syn = back(&tcp("S", (CLIENT4, 0), (HOST4, 8080)));
    for number in 0..RATE * SHORT {
        syn[ADDRESS + 3] = (number % 200) as u8 + 1;
        set_port(&mut syn, SOURCE, 1024 + (number / 200) as u16);
        carried(&mut world, IN, &syn);
        world.pass(PACE);
    }
    old.is_alive(&mut world);
}

/// What one finds another may take first. Once it cost the one its packet.
#[test]
fn newcomer_that_another_processor_outruns_finds_another_port_and_place() {
    let (client, host) = ((CLIENT4, 40_000), (HOST4, 8080));
    let (web, server) = ((WEB.v4, 5_000), (SERVER4, 443));
    for (hook, frame, entries) in [
        (OUT, out(&tcp("S", web, server)), 1),
        (OUT, out(&udp(web, server)), 2),
        (IN, back(&tcp("S", client, host)), 1),
    ] {
        for (ports, places) in [(1, 0), (0, 1), (0, 3), (1, 3)] {
            let mut world = world();
            world.outrun(ports, places);
            carried(&mut world, hook, &frame);
            let state = world.state();
            assert_eq!(state.problems(), Vec::<String>::new());
            let usage = state.usage[&WEB.number];
            assert_eq!(usage.flows + usage.bindings, entries, "{hook:?} {usage:?}");
        }
        // It does not try for ever.
        let mut world = world();
        world.outrun(0, 4);
        let (outcome, _) = world.run(hook, &frame);
        let (Outcome::Dropped { reason, .. } | Outcome::Refused { reason, .. }) = outcome else {
            panic!("{hook:?}: {outcome:?}");
        };
        assert_eq!(reason, Reason::FlowTableFull);
        let state = world.state();
        assert_eq!(state.problems(), Vec::<String>::new());
        assert_eq!((state.flows.len(), state.bindings.len()), (0, 0));
        assert!(state.outside.is_empty(), "{:?}", state.outside);
    }
}

/// Another processor may give the place of a note to another packet's while it is read.
#[test]
fn fragment_that_reads_the_note_of_another_reaches_nobody() {
    let from_app = |packet: &Packet| packet.framed(APP.gateway_mac(), APP.mac);
    let app_out = Hook::FromEndpoint { link: APP.link };
    let first = |from, to| udp(from, to).fragment(0, true);
    let later = |from, to| {
        let rest = packet::ip(from, to, UDP).payload(vec![7; 24]);
        rest.fragment(6, false)
    };
    let (web, app, server) = ((WEB.v4, 5_000), (APP.v4, 5_001), (SERVER4, 53));
    let mut world = world();
    carried(&mut world, OUT, &out(&first(web, server)));
    carried(&mut world, app_out, &from_app(&first(app, server)));
    let sent = [
        (OUT, out(&later(WEB.v4, SERVER4))),
        (app_out, from_app(&later(APP.v4, SERVER4))),
    ];
    let sees = |world: &mut World, (hook, frame): &(Hook, Vec<u8>)| world.run(*hook, frame).0;
    let is_lost = |outcome: Outcome| {
        let (Outcome::Dropped { reason, .. } | Outcome::Refused { reason, .. }) = outcome else {
            panic!("{outcome:?}");
        };
        assert_eq!(reason, Reason::Fragment);
    };
    world.exchange_fragments();
    sent.iter().for_each(|one| is_lost(sees(&mut world, one)));
    // Its own again.
    world.exchange_fragments();
    for (hook, frame) in &sent {
        carried(&mut world, *hook, frame);
    }

    // The same from outside: a second server answers the second container.
    let mut world = self::world();
    let mut answers = Vec::new();
    for (party, peer) in [(&WEB, SERVER4), (&APP, CLIENT4)] {
        let hook = Hook::FromEndpoint { link: party.link };
        let question = udp((party.v4, 5_000), (peer, 53)).framed(party.gateway_mac(), party.mac);
        let seen = carried(&mut world, hook, &question);
        let port = port(&seen, SOURCE);
        carried(&mut world, IN, &back(&first((peer, 53), (HOST4, port))));
        answers.push((IN, back(&later(peer, HOST4))));
    }
    world.exchange_fragments();
    answers
        .iter()
        .for_each(|one| is_lost(sees(&mut world, one)));
}

/// Another processor may meet it between its entry and its first packet.
#[test]
fn flow_that_is_being_opened_has_not_served_its_purpose() {
    let flow = Flow {
        state: FlowState::Opening as u32,
        timeout_s: 5,
        ..Flow::default()
    };
    for protocol in [TCP, UDP].map(u32::from) {
        assert_eq!(Standing::of(protocol, &flow, 0), Standing::Live);
    }
}

/// Where every port and place is a closed connection's, all of which are as good.
#[test]
fn connection_after_many_closed_ones_is_not_looked_for_a_place_for_long() {
    let mut world = world();
    let (web, server) = ((WEB.v4, 0), (SERVER4, 443));
    let mut syn = out(&tcp("S", web, server));
    let mut reset = back(&tcp("RA", server, (HOST4, 0)));
    let mut most = 0;
    for number in 0..50_000 {
        set_port(&mut syn, SOURCE, 1_024 + number);
        let before = world.draws();
        let opened = carried(&mut world, OUT, &syn);
        most = most.max(world.draws() - before);
        set_port(&mut reset, DESTINATION, port(&opened, SOURCE));
        carried(&mut world, IN, &reset);
        world.pass(PACE);
    }
    // A port that is kept, four others, four places.
    assert!(most <= 9, "{most} draws");
    // Those that are closed now are so for a while then, and its own: one other, two places.
    world.pass(Duration::from_secs(5));
    for number in 50_000..51_000 {
        set_port(&mut syn, SOURCE, 1_024 + number);
        let before = world.draws();
        carried(&mut world, OUT, &syn);
        let draws = world.draws() - before;
        assert!(draws <= 4, "{draws} draws after a while");
    }
}

/// The peer may take a connection of another host for one that it remembers.
#[test]
fn port_that_its_own_host_has_done_with_is_taken_at_once_and_anothers_after_a_second_look() {
    let server = (SERVER4, 443);
    for (newcomer, draws) in [(WEB, 1), (APP, 2)] {
        let mut world = world();
        world.settings(&Settings {
            dynamic_port_mask: 0,
            ..site::SETTINGS
        });
        // Ports that are not kept: they are among the host's own.
        let opened = carried(&mut world, OUT, &out(&tcp("S", (WEB.v4, 40_000), server)));
        let host = (HOST4, port(&opened, SOURCE));
        carried(&mut world, IN, &back(&tcp("RA", server, host)));
        world.pass(Duration::from_secs(5));
        let before = world.draws();
        let syn = tcp("S", (newcomer.v4, 40_001), server);
        let syn = syn.framed(newcomer.gateway_mac(), newcomer.mac);
        carried(
            &mut world,
            Hook::FromEndpoint {
                link: newcomer.link,
            },
            &syn,
        );
        assert_eq!(world.draws() - before, draws);
        assert_eq!(world.state().flows.len(), 1);
    }
}

/// The flow of such a view is in no table yet.
#[test]
fn view_of_a_flow_that_another_processor_is_making_is_left_alone() {
    let syn = back(&tcp("S", (CLIENT4, 40_000), (HOST4, 8080)));
    let mut world = world();
    carried(&mut world, IN, &syn);
    let outside = world.state().outside;
    let (view, key) = outside.iter().next().expect("view");

    // The first processor has come as far as this when the second has the same packet.
    let mut world = self::world();
    assert!(env::Tables::insert_outside(&world, view, key));
    let (outcome, _) = world.run(IN, &syn);
    let reason = Reason::PortsExhausted;
    assert!(
        matches!(outcome, Outcome::Dropped { reason: why, .. } if why == reason),
        "{outcome:?}"
    );
    let state = world.state();
    assert_eq!(state.outside, outside);
    assert!(state.flows.is_empty());

    // What an endpoint left behind that is gone stands in nobody's way.
    let mut world = self::world();
    let gone = FlowKey {
        endpoint: WEB.number + 1_000,
        ..*key
    };
    assert!(env::Tables::insert_outside(&world, view, &gone));
    carried(&mut world, IN, &syn);
    assert_eq!(world.state().outside, outside);
}

#[test]
fn endpoint_with_live_flows_up_to_its_quota_is_refused_more_and_loses_none() {
    let mut world = world();
    world.settings(&Settings {
        flows_per_endpoint: 2_000,
        ..site::SETTINGS
    });
    let old = Old::establish(&mut world);
    let mut datagram = out(&udp((WEB.v4, 0), (SERVER4, 443)));
    set_port(&mut datagram, UDP_CHECKSUM, 0);
    let mut refused = 0;
    for number in 0..5_000 {
        set_port(&mut datagram, SOURCE, 32_768 + number);
        let (outcome, _) = world.run(OUT, &datagram);
        let is_refused = matches!(
            outcome,
            Outcome::Refused {
                reason: Reason::FlowQuota | Reason::FlowTableFull,
                ..
            } | Outcome::Dropped {
                reason: Reason::FlowQuota | Reason::FlowTableFull,
                ..
            }
        );
        refused += u32::from(is_refused);
    }
    let usage = world.state().usage[&WEB.number];
    let used = usage.flows + usage.bindings;
    assert!(used <= 2_000, "{used} places of 2,000");
    assert!(used > 1_900, "{used} places of 2,000");
    assert!(refused > 3_900);
    old.is_alive(&mut world);
    // Their time comes: what is dead is found again, though by chance: the last ones would need
    // luck.
    world.pass(Duration::from_secs(400));
    for number in 0..400 {
        set_port(&mut datagram, SOURCE, 40_000 + number);
        carried(&mut world, OUT, &datagram);
    }
}
