//! Random egress policies and packets, of both families: what the rules say, read aloud, against
//! the compiled tables and against the loaded programs.

mod arbitrary;
mod reference;
mod rules;

use std::{cell::RefCell, collections::HashSet, net::IpAddr};

use nix::unistd::geteuid;
use nucnet_common::{
    abi::{Endpoint, Event, EventKind, Explained, FlowKey, Reason, WayKind, program},
    env::{Route, RouteKind},
    packet::{TCP, UDP},
    policy,
};
use nucnet_ctl::{
    kernel::bpf::DryRun,
    model::{
        from_abi,
        policy::{Action, Compiled, Policy},
        rule::{Destination, Rule},
        to_abi,
    },
};
use nucnet_tests::packets::{
    bench::{Bench, Frame as _, ROUTER_MAC},
    engine::{Engine, Hook, Outcome},
    loaded::{self, Loaded},
    packet::{Packet, echo_reply, echo_request, tcp, udp},
    site::{self, APP, CLIENT4, CLIENT6, UPLINK, WEB},
    world::World,
};
use proptest::{
    prelude::*,
    test_runner::{Config, TestCaseError, TestRng, TestRunner},
};

use arbitrary::PUBLISHED;
use reference::{Asked, is_host, verdict};

/// The site with a published port, and WEB under a policy.
fn put_in_force(engine: &mut dyn Engine, policy: &Policy) -> (Endpoint, Compiled) {
    let mut bench = Bench::new(engine);
    bench.publish(&APP, &format!("{PUBLISHED}:80"));
    let compiled = policy.compile(7, 100).expect("policy");
    for (bits, key, class) in &compiled.cidrs {
        engine.policy_class(*bits, key, class);
    }
    for (bits, key, rule) in &compiled.ports {
        engine.policy_rule(*bits, key, rule);
    }
    let mut endpoint = WEB.entry();
    if policy.is_in_force() {
        compiled.enforce(7, &mut endpoint);
    }
    engine.endpoint(WEB.link, Some(&endpoint));
    (endpoint, compiled)
}

fn own(to: IpAddr) -> IpAddr {
    match to {
        IpAddr::V4(_) => WEB.v4,
        IpAddr::V6(_) => WEB.v6,
    }
}

/// Rule and verdict as the packet logic finds them in the tables.
fn judged(world: &World, endpoint: &Endpoint, asked: Asked) -> (Action, u32) {
    let key = FlowKey {
        endpoint: WEB.number,
        protocol: u32::from(asked.protocol),
        inside: to_abi(own(asked.to)),
        peer: to_abi(asked.to),
        inside_port: 5000,
        peer_port: asked.port,
    };
    let mut route = Route {
        next_hop: [0; 16],
        source: [0; 16],
        macs: [0; 12],
        mtu: 0,
        link: 0,
        kind: RouteKind::None,
    };
    let judgement = policy::judge(world, endpoint, &key, &mut route);
    match judgement.allowed {
        true => (Action::Allow, judgement.rule),
        false => (Action::Deny, judgement.rule),
    }
}

/// The first packet of a flow from a port that no other flow has.
fn packet(asked: Asked, number: u16) -> Packet {
    let (from, to) = ((own(asked.to), 10_000 + number), (asked.to, asked.port));
    match asked.protocol {
        TCP => tcp("S", from, to),
        UDP => udp(from, to),
        _ => echo_request(from.0, to.0, from.1),
    }
}

/// What the policy makes of a packet, and by which rule, where it really goes considered.
fn expected(policy: &Policy, asked: Asked) -> (Action, u32) {
    let (action, rule) = verdict(policy, asked);
    let really = really(asked);
    if action == Action::Deny || really == asked {
        return (action, rule);
    }
    match verdict(policy, really) {
        (Action::Deny, by) if by != 0 => (Action::Deny, by),
        _ => (action, rule),
    }
}

/// Where a packet goes once the site's publish has been looked at.
fn really(asked: Asked) -> Asked {
    let is_translated = asked.protocol == TCP && asked.port == PUBLISHED && is_host(asked.to);
    if !is_translated {
        return asked;
    }
    let to = match asked.to {
        IpAddr::V4(_) => APP.v4,
        IpAddr::V6(_) => APP.v6,
    };
    let port = 80;
    Asked { to, port, ..asked }
}

/// The rule that denies a packet, as it is worked out for who monitors rules.
fn denied_by(policy: &Policy, asked: Asked) -> Option<u32> {
    let destination = |asked: Asked| Destination {
        address: asked.to,
        protocol: asked.protocol,
        port: asked.port,
        is_hosts: is_host(asked.to),
    };
    policy.denied_by(&destination(asked), &destination(really(asked)))
}

/// Whether the sender of what a policy denies is told as the policy wants it. Of ICMP errors there
/// are only so many.
fn is_told_as_wanted(policy: &Policy, asked: Asked, outcome: Outcome) -> bool {
    let is_told = matches!(outcome, Outcome::Refused { .. });
    match asked.protocol {
        TCP => is_told == policy.rejects(),
        _ => !is_told || policy.rejects(),
    }
}

/// The frames of WEB's that open a flow to each destination.
fn sent(destinations: &[Asked]) -> impl Iterator<Item = Vec<u8>> {
    let numbered = (0..).zip(destinations);
    numbered.map(|(number, asked)| packet(*asked, number).framed(WEB.gateway_mac(), WEB.mac))
}

/// Sends a packet for each destination and compares.
fn packets_fare_as_expected(
    engine: &mut dyn Engine,
    policy: &Policy,
    destinations: &[Asked],
) -> Result<(), TestCaseError> {
    for (asked, frame) in destinations.iter().zip(sent(destinations)) {
        let (outcome, _) = engine.run(Hook::FromEndpoint { link: WEB.link }, &frame);
        let reason = match outcome {
            Outcome::Dropped { reason, .. } | Outcome::Refused { reason, .. } => Some(reason),
            Outcome::Passed | Outcome::Redirected(_) => None,
        };
        let found = match reason {
            Some(Reason::Policy) => Action::Deny,
            _ => Action::Allow,
        };
        prop_assert_eq!(
            found,
            expected(policy, *asked).0,
            "{:?}: {:?} is {:?}",
            policy,
            asked,
            outcome
        );
        prop_assert!(
            found == Action::Allow || is_told_as_wanted(policy, *asked, outcome),
            "{:?}: {:?} is {:?}",
            policy,
            asked,
            outcome
        );
    }
    Ok(())
}

/// The same cases in each run, and no files that remember those that failed.
fn cases(cases: u32, test: impl Fn(Policy, Vec<Asked>) -> Result<(), TestCaseError>, each: usize) {
    let config = Config {
        cases,
        failure_persistence: None,
        ..Config::default()
    };
    let random = TestRng::deterministic_rng(config.rng_algorithm);
    let mut runner = TestRunner::new_with_rng(config, random);
    let destinations = prop::collection::vec(arbitrary::asked(), each);
    let strategy = (arbitrary::policy(), destinations);
    if let Err(error) = runner.run(&strategy, |(policy, asked)| test(policy, asked)) {
        panic!("{error}");
    }
}

#[test]
fn compiled_tables_say_what_the_rules_say() {
    let test = |policy: Policy, destinations: Vec<Asked>| {
        let mut world = World::new();
        let (endpoint, compiled) = put_in_force(&mut world, &policy);
        for asked in &destinations {
            let (action, rule) = verdict(&policy, *asked);
            // Of a policy with nothing to deny, the maps have not even the rules.
            let rule = if endpoint.policy == 0 { 0 } else { rule };
            prop_assert_eq!(
                judged(&world, &endpoint, *asked),
                (action, rule),
                "{:?}: {:?}",
                policy,
                asked
            );
            let (action, rule) = expected(&policy, *asked);
            prop_assert_eq!(
                denied_by(&policy, *asked),
                (action == Action::Deny).then_some(rule),
                "{:?}: {:?}",
                policy,
                asked
            );
        }
        packets_fare_as_expected(&mut world, &policy, &destinations)?;

        // No key twice, no class unused.
        let keys: HashSet<_> = compiled
            .ports
            .iter()
            .map(|(bits, key, _)| (*bits, key.class, key.protocol, key.port))
            .collect();
        prop_assert_eq!(keys.len(), compiled.ports.len());
        let classes = compiled.cidrs.iter().map(|(.., value)| value.class);
        let used: HashSet<u32> = classes.chain([compiled.host_class]).collect();
        let used = used.into_iter().filter(|class| *class != 0).count();
        prop_assert_eq!(used, compiled.classes as usize);
        Ok(())
    };
    cases(800, test, 25);
}

/// The programs, loaded in a site that is this thread's, or `None` with a word about why not.
fn programs() -> Option<Loaded> {
    if !geteuid().is_root() {
        eprintln!("skipped: loading programs needs root");
        return None;
    }
    loaded::enter_site().expect("site");
    Some(Loaded::new().expect("programs"))
}

#[test]
fn loaded_programs_do_what_the_rules_say() {
    let Some(loaded) = programs() else { return };
    let loaded = RefCell::new(loaded);
    let test = |policy: Policy, destinations: Vec<Asked>| {
        let mut loaded = loaded.borrow_mut();
        loaded.reset();
        put_in_force(&mut *loaded, &policy);
        packets_fare_as_expected(&mut *loaded, &policy, &destinations)
    };
    cases(150, test, 80);
}

/// Tables that a dry run of the programs of a hook shares with the live ones, or `None` with a word
/// about why not.
fn explained(program: &'static str) -> Option<(Loaded, DryRun)> {
    if !geteuid().is_root() {
        eprintln!("skipped: loading programs needs root");
        return None;
    }
    loaded::enter_site().expect("site");
    let pins = loaded::enter_bpffs().expect("bpffs");
    let loaded = Loaded::pinned(pins).expect("programs");
    Some((loaded, DryRun::load(pins, program).expect("dry run")))
}

/// What the dry run says of each frame. It changes nothing.
fn ask(
    loaded: &mut Loaded,
    dry_run: &mut DryRun,
    link: u32,
    frames: &[Vec<u8>],
) -> Result<Vec<Explained>, TestCaseError> {
    loaded.watch();
    let before = loaded.changeable();
    let explain = |frame: &Vec<u8>| dry_run.run(link, frame).expect("dry run");
    let explained = frames.iter().map(explain).collect();
    prop_assert_eq!(&loaded.changeable(), &before);
    prop_assert_eq!(loaded.events(), []);
    Ok(explained)
}

/// Compares what was said of a frame with what becomes of it; the event of its denial, if there is
/// one.
fn fares_as_explained(
    loaded: &mut Loaded,
    hook: Hook,
    frame: &[u8],
    explained: &Explained,
) -> Result<(Outcome, Option<Event>), TestCaseError> {
    loaded.forget_limits();
    let flow_before = loaded.flow(&explained.key).is_some();
    let (outcome, _) = loaded.run(hook, frame);
    let said = format!("{outcome:?}, explained {explained:?}");
    match outcome {
        Outcome::Dropped { endpoint, reason }
        | Outcome::Refused {
            endpoint, reason, ..
        } => {
            prop_assert_eq!(explained.way, WayKind::Dropped as u32, "{}", said);
            prop_assert_eq!(explained.reason, reason as u32, "{}", said);
            prop_assert_eq!(explained.endpoint, endpoint, "{}", said);
        }
        Outcome::Redirected(_) => {
            let is_new = u32::from(!flow_before);
            prop_assert_eq!(
                (explained.reason, explained.is_new),
                (0, is_new),
                "{}",
                said
            );
            let flow = loaded.flow(&explained.key);
            let made = flow.map(|it| (it.external, it.peer, it.peer_port, it.next_hop));
            let it = explained.flow;
            let foretold = (it.external, it.peer, it.peer_port, it.next_hop);
            prop_assert_eq!(made, Some(foretold), "{}", said);
        }
        Outcome::Passed => prop_assert_eq!(explained.way, WayKind::Pass as u32, "{}", said),
    }
    let mut told = loaded.events().into_iter();
    Ok((outcome, told.find(|it| it.kind == EventKind::Denied as u32)))
}

#[test]
fn explain_agrees_with_the_live_programs_and_changes_nothing() {
    let Some(both) = explained(program::FROM_ENDPOINT) else {
        return;
    };
    let both = RefCell::new(both);
    let hook = Hook::FromEndpoint { link: WEB.link };
    let test = |policy: Policy, destinations: Vec<Asked>| {
        let (loaded, dry_run) = &mut *both.borrow_mut();
        loaded.reset();
        let (endpoint, _) = put_in_force(loaded, &policy);
        let frames: Vec<_> = sent(&destinations).collect();
        let explained = ask(loaded, dry_run, WEB.link, &frames)?;

        for ((asked, frame), explained) in destinations.iter().zip(&frames).zip(&explained) {
            let (outcome, denied) = fares_as_explained(loaded, hook, frame, explained)?;
            let said = format!("{policy:?}: {asked:?} is {outcome:?}, explained {explained:?}");
            let is_by_policy = explained.reason == Reason::Policy as u32;
            if let Some(denied) = denied {
                prop_assert_eq!(explained.rule, denied.rule, "{}", said);
            }
            prop_assert_eq!(denied.is_some(), is_by_policy, "{}", said);
            let is_rejected = is_by_policy && policy.rejects();
            prop_assert_eq!(explained.is_rejected == 1, is_rejected, "{}", said);
            if (explained.reason == 0 || is_by_policy) && endpoint.policy != 0 {
                prop_assert_eq!(explained.rule, expected(&policy, *asked).1, "{}", said);
            }
        }
        Ok(())
    };
    cases(50, test, 60);
}

#[test]
fn explain_from_the_uplink_agrees_with_the_live_programs() {
    let Some(both) = explained(program::FROM_UPLINK) else {
        return;
    };
    let both = RefCell::new(both);
    let hook = Hook::FromUplink { link: UPLINK };
    let ways = RefCell::new(HashSet::new());
    let test = |policy: Policy, places: Vec<Asked>| {
        let (loaded, dry_run) = &mut *both.borrow_mut();
        loaded.reset();
        put_in_force(loaded, &policy);
        // Half of them ask WEB, which has talked to them as its policy lets it, or its host.
        let (talks, others) = places.split_at(places.len() / 2);
        for frame in sent(talks) {
            loaded.forget_limits();
            let _ = loaded.run(Hook::FromEndpoint { link: WEB.link }, &frame);
        }
        let answers = loaded.state().flows.into_iter().map(|(key, flow)| {
            let (peer, external) = (from_abi(&key.peer), from_abi(&flow.external));
            let (from, to) = ((peer, key.peer_port), (external, flow.external_port));
            match key.protocol as u8 {
                TCP => tcp("SA", from, to),
                UDP => udp(from, to),
                _ => echo_reply(peer, external, flow.external_port),
            }
        });
        let questions = others.iter().flat_map(|asked| {
            let host = site::interface(UPLINK).addresses.iter();
            let host = host
                .map(|it| it.0)
                .filter(|it| it.is_ipv4() == asked.to.is_ipv4());
            // To the host from there, and to there from a client.
            let client = if asked.to.is_ipv4() { CLIENT4 } else { CLIENT6 };
            host.map(|host| (asked.to, Asked { to: host, ..*asked }))
                .chain([(client, *asked)])
        });
        let questions = questions
            .zip(20_000..)
            .map(|((from, asked), port)| match asked.protocol {
                TCP => tcp("S", (from, port), (asked.to, asked.port)),
                UDP => udp((from, port), (asked.to, asked.port)),
                _ => echo_request(from, asked.to, port),
            });
        let frames = answers.chain(questions);
        let mac = site::interface(UPLINK).mac;
        let frames: Vec<_> = frames.map(|it| it.framed(mac, ROUTER_MAC)).collect();
        let explained = ask(loaded, dry_run, UPLINK, &frames)?;
        for (frame, explained) in frames.iter().zip(&explained) {
            fares_as_explained(loaded, hook, frame, explained)?;
            ways.borrow_mut()
                .insert((explained.way, explained.reason, explained.is_new));
        }
        Ok(())
    };
    cases(50, test, 60);
    println!(
        "ways, reasons, whether the flow is new: {:?}",
        ways.borrow()
    );
}

/// A policy with that many prefixes, with different ports, two packets that it denies (one that no
/// prefix covers, and one to a port that the last prefix does not have), and two of a connection
/// that it allows, the first and a later one.
fn large(prefixes: u32) -> (Policy, [Packet; 2], [Packet; 2]) {
    let rule = |n: u32| {
        format!(
            "11.{}.{}.0/24:{}-{}/tcp",
            n >> 8,
            n & 0xff,
            1000 + n,
            2000 + n
        )
    };
    let allow = (0..prefixes).map(|n| rule(n).parse::<Rule>().expect("rule"));
    let policy = Policy::new(None, allow.collect(), Vec::new(), Vec::new());
    let last = prefixes - 1;
    let covered = IpAddr::from([11, (last >> 8) as u8, last as u8, 1]);
    let denied = [CLIENT4, covered].map(|to| tcp("S", (WEB.v4, 5000), (to, 80)));
    let port = 1000 + last as u16;
    let allowed = ["S", "A"].map(|flags| tcp(flags, (WEB.v4, 5000), (covered, port)));
    (policy.with_denied_logged(false), denied, allowed)
}

#[test]
fn ten_thousand_prefixes_cost_a_packet_no_more_than_ten() {
    let Some(mut loaded) = programs() else {
        return;
    };
    let hook = Hook::FromEndpoint { link: WEB.link };
    let mut measure = |prefixes| {
        let (policy, denied, [first, later]) = large(prefixes);
        loaded.reset();
        put_in_force(&mut loaded, &policy);
        let denied = denied.map(|packet| {
            let frame = packet.framed(WEB.gateway_mac(), WEB.mac);
            let (outcome, _) = loaded.run(hook, &frame);
            let denied = Outcome::Dropped {
                endpoint: WEB.number,
                reason: Reason::Policy,
            };
            assert_eq!(outcome, denied);
            let runs = (0..5).map(|_| loaded.nanoseconds(hook, &frame, 100_000));
            runs.map(|time| time.expect("run")).min().expect("some")
        });
        let [first, later] = [first, later].map(|it| it.framed(WEB.gateway_mac(), WEB.mac));
        for frame in [&first, &later] {
            let (outcome, _) = loaded.run(hook, frame);
            assert_eq!(outcome, Outcome::Redirected(None));
        }
        let runs = (0..200).map(|_| loaded.nanoseconds_anew(hook, &later, 200));
        let open = runs.map(|time| time.expect("run")).min().expect("some");
        (denied, open)
    };
    let ((few, few_open), (many, many_open)) = (measure(10), measure(10_000));
    println!(
        "ns a denied packet (uncovered, covered): 10 prefixes {few:?}, 10,000 {many:?}\n\
         ns a packet of an open connection: 10 prefixes {few_open}, 10,000 {many_open}"
    );
    // A trie is as deep as its prefixes differ: it is no list. Packets of a flow ask it nothing.
    for (few, many) in few.into_iter().zip(many) {
        assert!(many < 3 * few, "{many} ns, not {few}");
    }
}

fn said(allow: &[&str], to: &str, protocol: u8, port: u16) -> (Action, u32) {
    let rules = allow.iter().map(|text| text.parse::<Rule>().expect(text));
    let policy = Policy::new(None, rules.collect(), Vec::new(), Vec::new());
    let mut world = World::new();
    let (endpoint, _) = put_in_force(&mut world, &policy);
    let to = to.parse().expect(to);
    judged(&world, &endpoint, Asked { to, protocol, port })
}

#[test]
fn a_longer_prefix_with_fewer_ports_hides_nothing_of_a_shorter_one() {
    let rules = ["10.0.0.0/8", "10.1.0.0/16:443/tcp"];
    assert_eq!(said(&rules, "10.1.2.3", UDP, 53), (Action::Allow, 1));
}

#[test]
fn everything_of_ipv6_says_nothing_about_ipv4() {
    assert_eq!(said(&["::/0"], "10.0.0.1", TCP, 80), (Action::Deny, 0));
    assert_eq!(said(&["::/0"], "fd00::1", TCP, 80), (Action::Allow, 1));
}

#[test]
fn ranges_reach_to_the_last_address_of_each_family() {
    for (rule, last, before) in [
        ("223.255.255.254/31", "223.255.255.255", "223.255.255.253"),
        ("128.0.0.0/1", "223.255.255.255", "127.255.255.255"),
        ("255.255.255.255/0", "223.255.255.255", "fd00::1"),
        (
            "8000::/1",
            "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "7fff::1",
        ),
        (
            "ffff::/0",
            "feff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
            "1.1.1.1",
        ),
    ] {
        assert_eq!(
            said(&[rule], last, TCP, 65_535),
            (Action::Allow, 1),
            "{rule}"
        );
        assert_eq!(
            said(&[rule], before, TCP, 65_535),
            (Action::Deny, 0),
            "{rule}"
        );
    }
}

#[test]
fn the_hosts_addresses_are_both_prefixes_and_the_host() {
    let rules = ["192.0.2.0/24:80", "host:443"];
    assert_eq!(said(&rules, "192.0.2.1", TCP, 80), (Action::Allow, 1));
    assert_eq!(said(&rules, "192.0.2.1", TCP, 443), (Action::Allow, 2));
    assert_eq!(said(&rules, "192.0.2.254", TCP, 443), (Action::Deny, 0));
    assert_eq!(said(&rules, "fd42::1", UDP, 443), (Action::Allow, 2));
}

#[test]
fn resolvers_that_are_all_there_is_are_no_policy() {
    let resolver = "fd42::2".parse().expect("resolver");
    let policy = Policy::new(None, Vec::new(), Vec::new(), vec![resolver]).with_dns_allowed(true);
    let mut world = World::new();
    let (endpoint, _) = put_in_force(&mut world, &policy);
    assert_eq!(endpoint.policy, 0);
    let (to, protocol, port) = ("fd42::2".parse().expect("address"), TCP, 53);
    let asked = Asked { to, protocol, port };
    assert_eq!(judged(&world, &endpoint, asked), (Action::Allow, 0));
}
