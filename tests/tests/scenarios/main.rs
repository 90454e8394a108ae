//! What nucnet does for people, seen through real sockets: a list of scenarios that any datapath
//! can be held to.
//!
//! ```text
//! cargo test -p nucnet-tests --test scenarios                 all
//! cargo test -p nucnet-tests --test scenarios hairpin         those whose names contain it
//! cargo test -p nucnet-tests --test scenarios -- --list
//! cargo test -p nucnet-tests --test scenarios -- --include-ignored   the slow ones too
//! ```
//!
//! `NUCNET_CTL` names the binary under test (else the newest one in the target directory is
//! taken), `NUCNET_DATAPATH` its datapath. `NUCNET_LAB_WAY=iptables` or `routed` holds the tools
//! before nucnet to the same list, which checks the list rather than them.

mod case;
mod collisions;
mod conversation;
mod egress;
mod errors;
mod events;
mod explain;
mod flows;
mod frames;
mod hold;
mod input;
mod lifecycle;
mod load;
mod mtu;
mod nat;
mod neighbours;
mod network;
mod outbound;
mod publish;
mod reject;
mod robustness;
mod transfers;
mod vantage;

use std::process::ExitCode;
use std::sync::{Arc, Mutex};

use case::{Case, Families, Scenario, Skip, Way};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nucnet_tests::lab::{Family, nucnet_program};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They wait more than they compute.
    arguments.test_threads.get_or_insert(4);

    let way = match Way::chosen() {
        Ok(way) => way,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::from(2);
        }
    };
    let obstacle = obstacle(way);
    if !arguments.list {
        match (way, nucnet_program()) {
            (Way::Nucnet, Some(program)) => println!("nucnet-ctl: {}", program.display()),
            (Way::Nucnet, None) => println!("nucnet-ctl: none"),
            (Way::Seeds(rules), _) => println!("not nucnet: {rules:?}"),
        }
    }

    let skipped = Arc::new(Mutex::new(Vec::new()));
    let mut trials = Vec::new();
    let modules = [
        publish::SCENARIOS,
        nat::SCENARIOS,
        outbound::SCENARIOS,
        collisions::SCENARIOS,
        neighbours::SCENARIOS,
        network::SCENARIOS,
        egress::SCENARIOS,
        reject::SCENARIOS,
        flows::SCENARIOS,
        frames::SCENARIOS,
        errors::SCENARIOS,
        events::SCENARIOS,
        explain::SCENARIOS,
        mtu::SCENARIOS,
        load::SCENARIOS,
        lifecycle::SCENARIOS,
        input::SCENARIOS,
        robustness::SCENARIOS,
        vantage::SCENARIOS,
        hold::SCENARIOS,
        transfers::SCENARIOS,
    ];
    let slow = [(transfers::SLOW, true)];
    let modules = modules.into_iter().map(|module| (module, false));
    for (module, is_slow) in modules.chain(slow) {
        for scenario in module {
            let families = match scenario.families {
                Families::Each => &Family::ALL[..],
                Families::Together => &[Family::V4],
            };
            for &family in families {
                let (obstacle, skipped) = (obstacle.clone(), skipped.clone());
                let name = match scenario.families {
                    Families::Each => format!("{}::{family}", scenario.name),
                    Families::Together => scenario.name.to_owned(),
                };
                let title = name.clone();
                let trial = Trial::ignorable_test(name, move || {
                    let outcome = match &obstacle {
                        Some(reason) => Err(Skip(reason.clone()).into()),
                        None => run(scenario, way, family),
                    };
                    match outcome {
                        Ok(()) => Ok(Completion::Completed),
                        Err(error) => match error.downcast::<Skip>() {
                            Ok(Skip(reason)) => {
                                // Not at the start of the line: there it would mean a
                                // test that the harness takes for passed.
                                let line = format!("  {title} is skipped: {reason}");
                                skipped.lock().unwrap_or_else(|e| e.into_inner()).push(line);
                                Ok(Completion::ignored_with(format!("skipped: {reason}")))
                            }
                            Err(error) => Err(Failed::from(chain(&error))),
                        },
                    }
                });
                trials.push(trial.with_ignored_flag(is_slow));
            }
        }
    }
    let conclusion = libtest_mimic::run(&arguments, trials);
    let skipped = skipped.lock().unwrap_or_else(|e| e.into_inner());
    for line in skipped.iter() {
        println!("{line}");
    }
    if !skipped.is_empty() {
        println!(
            "{} scenarios were skipped: they show nothing\n",
            skipped.len()
        );
    }
    conclusion.exit_code()
}

/// An error and its causes, without the backtrace of whoever asked for backtraces.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(|cause| format!("{cause}\n")).collect()
}

fn run(scenario: &Scenario, way: Way, family: Family) -> anyhow::Result<()> {
    let case = Case::new(way, family)?;
    (scenario.run)(&case).map_err(|error| {
        if error.is::<Skip>() {
            return error;
        }
        let report = case.report();
        error.context(format!("{}\n\n{report}\nwhat went wrong:", scenario.what))
    })
}

/// Why nothing at all can run here.
fn obstacle(way: Way) -> Option<String> {
    if !nix::unistd::geteuid().is_root() {
        return Some("network namespaces need root".to_owned());
    }
    for program in ["ip", "tc", "curl", "ping"] {
        if !case::has(program) {
            return Some(format!("there is no program {program} here"));
        }
    }
    if way == Way::Nucnet && nucnet_program().is_none() {
        return Some("nucnet-ctl is not built".to_owned());
    }
    None
}
