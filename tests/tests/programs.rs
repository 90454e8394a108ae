//! The rows of packets through the loaded programs, and the tables compared afterwards with
//! those that the packet logic alone leaves.

use std::{
    collections::BTreeMap,
    process::ExitCode,
    sync::{Arc, Barrier, Mutex},
    time::{Duration, Instant},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::{
    net::if_::if_nametoindex,
    sched::{CpuSet, sched_getaffinity},
    unistd::{Pid, geteuid},
};
use nucnet_common::abi::{Reason, program};
use nucnet_tests::measure::worker::pin;
use nucnet_tests::packets::{
    bench::{Bench, Egress, Frame as _},
    engine::{Engine as _, Hook, Outcome},
    loaded::{self, Loaded},
    packet::{tcp, udp},
    rows::{self, Case, V4, V6},
    site::{self, SERVER4, SLOT, WEB},
    wire::{Tunnel, Wire},
    world::World,
};

fn main() -> ExitCode {
    rows::keep_panics();
    let mut arguments = Arguments::from_args();
    // One set of tables, and one thread that is in the site's network namespace.
    arguments.test_threads = Some(1);
    let loaded = if arguments.list || !geteuid().is_root() {
        None
    } else {
        match loaded::enter_site().and_then(|()| Loaded::new()) {
            Ok(loaded) => Some(Arc::new(Mutex::new(loaded))),
            Err(error) => {
                eprintln!("{error:#}");
                return ExitCode::FAILURE;
            }
        }
    };
    if loaded.as_ref().is_some_and(|it| !lock(it).knows_sums()) {
        eprintln!("this kernel cannot check the sums of frames (Linux 6.11 can)");
    }

    let mut trials: Vec<Trial> = rows::cases()
        .into_iter()
        .map(|case| {
            trial(case.name(), loaded.clone(), move |loaded| {
                run(&case, loaded)
            })
        })
        .collect();
    trials.push(trial(
        "tag_that_the_kernel_took_out_of_a_frame_is_seen".to_owned(),
        loaded.clone(),
        tag_that_the_kernel_took_out_of_a_frame_is_seen,
    ));
    trials.push(trial(
        "packet_of_an_uplink_without_link_layer_header_goes_in_and_out".to_owned(),
        loaded.clone(),
        packet_of_an_uplink_without_link_layer_header_goes_in_and_out,
    ));
    trials.push(trial(
        "full_ring_of_a_monitor_stops_no_packet_and_each_event_is_counted".to_owned(),
        loaded.clone(),
        full_ring_of_a_monitor_stops_no_packet_and_each_event_is_counted,
    ));
    trials.push(trial(
        "programs_log_refusals_for_who_debugs_and_for_nobody_else".to_owned(),
        loaded.clone(),
        programs_log_refusals_for_who_debugs_and_for_nobody_else,
    ));
    trials.push(trial(
        "packet_that_a_monitor_is_told_about_fares_like_any".to_owned(),
        loaded.clone(),
        packet_that_a_monitor_is_told_about_fares_like_any,
    ));
    trials.push(trial(
        "newcomers_on_two_processors_cost_each_other_no_packet".to_owned(),
        loaded.clone(),
        newcomers_on_two_processors_cost_each_other_no_packet,
    ));
    trials.push(trial(
        "no_place_is_left_taken_when_all_tables_are_empty".to_owned(),
        loaded,
        |loaded| {
            loaded.reset();
            match loaded.taken_places()[..] {
                [] => Ok(Completion::Completed),
                ref places => Err(format!("{places:?}").into()),
            }
        },
    ));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn lock(loaded: &Mutex<Loaded>) -> std::sync::MutexGuard<'_, Loaded> {
    // A row that failed leaves nothing that the next one does not clear.
    loaded.lock().unwrap_or_else(|poison| poison.into_inner())
}

fn trial(
    name: String,
    loaded: Option<Arc<Mutex<Loaded>>>,
    test: impl FnOnce(&mut Loaded) -> Result<Completion, Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match loaded {
        Some(loaded) => test(&mut lock(&loaded)),
        None => Ok(Completion::ignored_with(
            "skipped: loading programs needs root",
        )),
    })
}

fn run(case: &Case, loaded: &mut Loaded) -> Result<Completion, Failed> {
    if let Some(why) = case.logic_only() {
        return Ok(Completion::ignored_with(format!("skipped: {why}")));
    }
    let outcome = run_within_a_second(case, loaded);
    if let Some(why) = loaded.unfit() {
        return Ok(Completion::ignored_with(format!("skipped: {why}")));
    }
    outcome?;
    let mut world = World::new();
    case.run(&mut world)?;
    let (programs, logic) = (loaded.state().comparable(), world.state().comparable());
    if programs != logic {
        return Err(format!(
            "the programs leave other tables than the logic alone:\n  {}\nagainst\n  {}",
            programs.join("\n  "),
            logic.join("\n  ")
        )
        .into());
    }
    Ok(Completion::Completed)
}

/// Rows say themselves when time passes; what they send otherwise comes within a second, of which
/// the programs have a clock of their own. Where a row that failed took longer, for the machine has
/// other things to do, it says nothing, and runs again.
fn run_within_a_second(case: &Case, loaded: &mut Loaded) -> Result<(), String> {
    const TRIES: u32 = 5;
    let mut tries = 0;
    loop {
        tries += 1;
        loaded.reset();
        let begun = Instant::now();
        let outcome = case.run(loaded);
        if outcome.is_ok() || begun.elapsed() < Duration::from_secs(1) || tries == TRIES {
            return outcome;
        }
    }
}

/// With a test run the tag is still in the frame.
fn tag_that_the_kernel_took_out_of_a_frame_is_seen(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    loaded.reset();
    let _ = Bench::new(loaded);
    let packet = udp((WEB.v4, 5000), (SERVER4, 443)).vlan(42);
    let frame = packet.framed(WEB.gateway_mac(), WEB.mac);
    loaded.with_attached(&[(program::FROM_ENDPOINT, "web")], |loaded| {
        Wire::of("web-far")?.send(&frame)?;
        loaded.wait_for_drop(&WEB, Reason::NotIp)
    })?;
    Ok(Completion::Completed)
}

/// A test run always has an Ethernet header: this takes a TUN device.
fn packet_of_an_uplink_without_link_layer_header_goes_in_and_out(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    loaded.reset();
    let tunnel = Tunnel::new("tunnel")?;
    let mut bench = Bench::new(loaded);
    bench.publish(&SLOT, "8080:80");
    let (_, entry) = site::uplinks()[2];
    loaded.uplink(if_nametoindex("tunnel")?, Some(&entry));
    let programs = [
        (program::FROM_UPLINK_L3, "tunnel"),
        (program::FROM_ENDPOINT, "slot"),
    ];
    loaded.with_attached(&programs, |_| {
        let wire = Wire::of("slot-far")?;
        for ip in [&V4, &V6] {
            let (client, host, slot) = ((ip.client, 40_000), (ip.host, 8080), (ip.slot, 80));
            tunnel.send(&tcp("S", client, host).bytes())?;
            let arriving = tcp("S", client, slot).ttl(63);
            wire.wait_for(&arriving.framed(SLOT.mac, SLOT.gateway_mac()))?;
            let reply = tcp("SA", slot, client);
            wire.send(&reply.framed(SLOT.gateway_mac(), SLOT.mac))?;
            tunnel.wait_for(&tcp("SA", host, client).ttl(63).bytes())?;
        }
        Ok(())
    })?;
    Ok(Completion::Completed)
}

/// A monitor that was stopped, or that writes to a slow terminal, reads nothing.
fn full_ring_of_a_monitor_stops_no_packet_and_each_event_is_counted(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    loaded.reset();
    Bench::new(loaded).set(|settings| settings.flows_per_endpoint = 20_000);
    let hook = Hook::FromEndpoint { link: WEB.link };
    let send = |loaded: &mut Loaded, port| {
        // An endpoint's own limit is not what this is about.
        loaded.forget_limits();
        let packet = udp((WEB.v4, port), (SERVER4, 443));
        let (outcome, _) = loaded.run(hook, &packet.framed(WEB.gateway_mac(), WEB.mac));
        assert_eq!(outcome, Outcome::Redirected(None));
    };
    loaded.watch();
    let lost_before = loaded.lost_events();
    let mut opened = 0;
    while loaded.lost_events() < lost_before + 100 {
        send(loaded, 10_000 + opened);
        opened += 1;
        assert!(opened < 10_000, "the ring takes everything");
    }
    let lost = loaded.lost_events() - lost_before;
    let told = loaded.events().len();
    assert_eq!(told as u64 + lost, u64::from(opened));
    // There is room again.
    send(loaded, 9_999);
    assert_eq!(loaded.events().len(), 1);
    Ok(Completion::Completed)
}

fn programs_log_refusals_for_who_debugs_and_for_nobody_else(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    loaded.reset();
    let _ = Bench::new(loaded);
    let hook = Hook::FromEndpoint { link: WEB.link };
    // Of another's address.
    let packet = udp((SERVER4, 5000), (SERVER4, 443));
    let frame = packet.framed(WEB.gateway_mac(), WEB.mac);
    let lines = |loaded: &mut Loaded| {
        loaded.forget_limits();
        let _ = loaded.run(hook, &frame);
        (loaded.events().len(), loaded.log_lines())
    };
    assert_eq!(lines(loaded), (0, 0));
    loaded.watch();
    assert_eq!(lines(loaded), (1, 0));
    loaded.debug();
    assert_eq!(lines(loaded), (1, 1));
    Ok(Completion::Completed)
}

/// And what being told about costs it.
fn packet_that_a_monitor_is_told_about_fares_like_any(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    const PACKETS: u16 = 1000;
    let hook = Hook::FromEndpoint { link: WEB.link };
    let mut measure = |is_watched: bool, port| {
        loaded.reset();
        let mut bench = Bench::new(loaded);
        bench.set(|settings| settings.flows_per_endpoint = 20_000);
        bench.egress(&WEB, Egress::deny(&["any:25"]));
        if is_watched {
            bench.watch();
        }
        let mut told = 0;
        let mut times: Vec<u32> = (0..PACKETS)
            .map(|number| {
                let packet = tcp("S", (WEB.v4, 10_000 + number), (SERVER4, port));
                let frame = packet.framed(WEB.gateway_mac(), WEB.mac);
                loaded.forget_limits();
                let time = loaded.nanoseconds(hook, &frame, 1).expect("run");
                told += loaded.events().len();
                time
            })
            .collect();
        assert_eq!(told, if is_watched { usize::from(PACKETS) } else { 0 });
        let flows = loaded.state().flows.len();
        assert_eq!(flows, if port == 25 { 0 } else { usize::from(PACKETS) });
        times.sort_unstable();
        times[times.len() / 2]
    };
    for (what, port) in [("denied", 25), ("opening a flow", 443)] {
        let (alone, told) = (measure(false, port), measure(true, port));
        println!("ns a packet {what}: {alone}, {told} with a monitor that is told");
    }
    Ok(Completion::Completed)
}

/// Both draw from few places, of which they may take nearly every one: now and then both find the
/// same.
fn newcomers_on_two_processors_cost_each_other_no_packet(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let mut processors = (0..CpuSet::count()).filter(|it| allowed.is_set(*it) == Ok(true));
    let (Some(one), Some(other)) = (processors.next(), processors.next()) else {
        return Ok(Completion::ignored_with("skipped: there is one processor"));
    };
    loaded.reset();
    let mut bench = Bench::new(loaded);
    bench.set(|settings| settings.flows_per_endpoint = 1_024);
    let runner = loaded.runner(Hook::FromEndpoint { link: WEB.link })?;
    let both = Barrier::new(2);
    let send = |processor, peer_port| -> Result<(), Failed> {
        // One that was reset may be spared at once.
        let frames: Vec<Vec<u8>> = (1_024..21_024)
            .flat_map(|port| ["S", "R"].map(|flags| (flags, port)))
            .map(|(flags, port)| tcp(flags, (WEB.v4, port), (SERVER4, peer_port)))
            .map(|packet| packet.framed(WEB.gateway_mac(), WEB.mac))
            .collect();
        pin(processor)?;
        both.wait();
        for _ in 0..5 {
            frames.iter().try_for_each(|frame| runner.send(frame))?;
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let send = &send;
        [(one, 443), (other, 444)]
            .map(|(processor, peer_port)| scope.spawn(move || send(processor, peer_port)))
            .into_iter()
            .try_for_each(|thread| thread.join().expect("a thread that sends"))
    })?;
    assert_eq!(loaded.dropped(), BTreeMap::new());
    assert_eq!(loaded.state().problems(), Vec::<String>::new());
    Ok(Completion::Completed)
}
