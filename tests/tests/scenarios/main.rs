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
//! taken), `NUCNET_DATAPATH` its datapath (else both are held to the list; what netfilter cannot do
//! is in `differences.rs`, with the reason). `NUCNET_LAB_WAY=iptables` or `routed` holds the tools
//! before nucnet to the same list, which checks the list rather than them.

mod attach;
mod carried;
mod case;
mod collisions;
mod conversation;
mod detach;
mod differences;
mod egress;
mod errors;
mod events;
mod explain;
mod flood;
mod flows;
mod frames;
mod hold;
mod input;
mod load;
mod microvms;
mod mtu;
mod nat;
mod neighbours;
mod network;
mod outbound;
mod publish;
mod reject;
mod robustness;
mod slots;
mod switch;
mod transfers;
mod unchanged;
mod vantage;

use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, ExitCode};
use std::sync::{Arc, Mutex};

use case::{Case, Datapath, Families, Scenario, Skip, Way};
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nucnet_tests::lab::{Family, nucnet_program};

fn main() -> ExitCode {
    let mut arguments = Arguments::from_args();
    // They wait more than they compute.
    arguments.test_threads.get_or_insert(4);

    let ways = match Way::chosen() {
        Ok(ways) => ways,
        Err(error) => {
            eprintln!("{error:#}");
            return ExitCode::from(2);
        }
    };
    if !arguments.list {
        match (&ways[..], nucnet_program()) {
            ([Way::Seeds(rules)], _) => println!("not nucnet: {rules:?}"),
            (_, Some(program)) if !runs(&program) => {
                eprintln!("{} cannot be run", program.display());
                return ExitCode::from(2);
            }
            (_, Some(program)) => println!("nucnet-ctl: {}", program.display()),
            (_, None) => println!("nucnet-ctl: none"),
        }
    }

    let skipped = Arc::new(Mutex::new(Vec::new()));
    let matrix = Arc::new(Mutex::new(Matrix::default()));
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
        slots::SCENARIOS,
        microvms::SCENARIOS,
        frames::SCENARIOS,
        errors::SCENARIOS,
        events::SCENARIOS,
        explain::SCENARIOS,
        mtu::SCENARIOS,
        load::SCENARIOS,
        attach::SCENARIOS,
        detach::SCENARIOS,
        input::SCENARIOS,
        robustness::SCENARIOS,
        vantage::SCENARIOS,
        hold::SCENARIOS,
        transfers::SCENARIOS,
        switch::SCENARIOS,
        carried::SCENARIOS,
    ];
    let slow = [(transfers::SLOW, true), (flood::SLOW, true)];
    let modules = modules.into_iter().map(|module| (module, false));
    for (module, is_slow) in modules.chain(slow) {
        for scenario in module {
            let families = match scenario.families {
                Families::Each => &Family::ALL[..],
                Families::Together => &[Family::V4],
            };
            for &family in families {
                let base = match scenario.families {
                    Families::Each => format!("{}::{family}", scenario.name),
                    Families::Together => scenario.name.to_owned(),
                };
                for &way in &ways {
                    let name = match way {
                        Way::Nucnet(Datapath::Iptables) => format!("{base}::iptables"),
                        _ => base.clone(),
                    };
                    let (title, obstacle, base) = (name.clone(), obstacle(way), base.clone());
                    let (skipped, matrix) = (skipped.clone(), matrix.clone());
                    let trial = Trial::ignorable_test(name, move || {
                        let outcome = match &obstacle {
                            Some(reason) => Err(Skip(reason.clone()).into()),
                            None => run(scenario, way, family),
                        };
                        let mut matrix = matrix.lock().unwrap_or_else(|e| e.into_inner());
                        matrix.note(base, way, &outcome);
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
    print!("{}", matrix.lock().unwrap_or_else(|e| e.into_inner()));
    conclusion.exit_code()
}

/// What came of each scenario by each datapath.
#[derive(Default)]
struct Matrix(BTreeMap<String, BTreeMap<&'static str, &'static str>>);

impl Matrix {
    fn note(&mut self, scenario: String, way: Way, outcome: &anyhow::Result<()>) {
        let Way::Nucnet(datapath) = way else { return };
        let word = match outcome {
            Ok(()) => "ok",
            Err(error) if error.is::<differences::Difference>() => "differs",
            Err(error) if error.is::<Skip>() => "skipped",
            Err(_) => "FAILED",
        };
        let row = self.0.entry(scenario).or_default();
        row.insert(datapath.name(), word);
    }
}

impl std::fmt::Display for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let names: Vec<&str> = Datapath::ALL
            .iter()
            .map(|datapath| datapath.name())
            .collect();
        if self.0.values().all(|row| row.len() < names.len()) {
            return Ok(());
        }
        writeln!(f, "| scenario | {} |\n|---|---|---|", names.join(" | "))?;
        for (scenario, row) in &self.0 {
            let words = names
                .iter()
                .map(|name| row.get(name).copied().unwrap_or("-"));
            writeln!(
                f,
                "| {scenario} | {} |",
                words.collect::<Vec<_>>().join(" | ")
            )?;
        }
        Ok(())
    }
}

/// An error and its causes, without the backtrace of whoever asked for backtraces.
fn chain(error: &anyhow::Error) -> String {
    error.chain().map(|cause| format!("{cause}\n")).collect()
}

fn run(scenario: &Scenario, way: Way, family: Family) -> anyhow::Result<()> {
    let case = Case::new(way, family)?;
    let outcome = (scenario.run)(&case).map_err(|error| {
        if error.is::<Skip>() {
            return error;
        }
        let report = case.report();
        error.context(format!("{}\n\n{report}\nwhat went wrong:", scenario.what))
    });
    // A lab that could not be made is no difference.
    differences::judge(scenario.name, way, family, outcome)
}

/// Whether a program can be run: one that cannot would fail each scenario, those that have to, too.
fn runs(program: &Path) -> bool {
    let output = Command::new(program).arg("--version").output();
    output.is_ok_and(|output| output.status.success())
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
    if way == Way::Nucnet(Datapath::Iptables) && !case::has("iptables-restore") {
        return Some("there is no program iptables-restore here".to_owned());
    }
    if matches!(way, Way::Nucnet(_)) && nucnet_program().is_none() {
        return Some("nucnet-ctl is not built".to_owned());
    }
    None
}
