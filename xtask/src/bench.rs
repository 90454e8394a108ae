//! `cargo xtask bench`: what a transaction costs by nucnet, beside no NAT at all, plain routing
//! and iptables, in one interleaved run; and what attach and detach cost, beside `ip` and
//! iptables and beside CNI's plugins; and what slots cost, beside `ip` and iptables.
//!
//! Figures of different minutes do not compare (the same path moves by a third on a shared
//! machine), so every ratio is taken inside a round, and the median of those counts.

pub(crate) mod figures;
pub(crate) mod gates;
mod report;
mod slots;

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use nucnet_tests::lab::{Family, cni, seeds::Rules};
use nucnet_tests::measure::{
    Direction, Kind, Sample, Track, Way,
    gate::{Gate, Means},
    slots::Slots,
};

use crate::{
    apt::{self, Consent, tool},
    bench::figures::{Figures, Round},
    progress::Step,
    workspace::Workspace,
};

/// What is measured, in the order of the tables.
pub(crate) const TESTS: [(&str, Direction, Kind); 4] = [
    ("rr", Direction::In, Kind::Rr),
    ("crr", Direction::In, Kind::Crr),
    ("out-rr", Direction::Out, Kind::Rr),
    ("out-crr", Direction::Out, Kind::Crr),
];

/// Measure nucnet against no NAT, plain routing and iptables
///
/// Everything happens in network namespaces of its own. Needs root.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// How often everything is measured; at least 5 for figures to quote
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Milliseconds of one measurement
    #[arg(long, default_value_t = 300, value_parser = clap::value_parser!(u64).range(10..))]
    time: u64,
    /// Measure IPv6
    #[arg(long)]
    ipv6: bool,
    /// Use iptables with its legacy backend instead of nftables
    #[arg(long)]
    legacy: bool,
    /// How many containers are there when one more is attached in a crowd
    #[arg(long, default_value_t = 500, value_parser = clap::value_parser!(u16).range(..=i64::from(Gate::MOST)))]
    crowd: u16,
    /// How many slots come and go
    #[arg(long, default_value_t = 50, value_parser = clap::value_parser!(u16).range(1..=i64::from(Slots::MOST)))]
    slots: u16,
    /// Measure this alone
    #[arg(long, value_enum)]
    only: Option<Part>,
    /// Leave nucnet out: the machine and the yardsticks alone
    #[arg(long)]
    without_nucnet: bool,
    /// The CPU that clients and servers share
    #[arg(long, default_value_t = 0)]
    cpu: usize,
}

/// A part of the benchmark.
#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    /// What a transaction costs
    Transactions,
    /// What attach and detach cost
    Attach,
    /// What slots of microVMs cost
    Slots,
}

/// Runs the verb.
pub(crate) fn main(workspace: &Workspace, consent: Consent, arguments: &Arguments) -> Result<()> {
    ensure!(apt::is_root(), "network namespaces need root");
    apt::ensure_tools(&[tool::IP, tool::IPTABLES], "the benchmark", consent)?;
    if cni::plugins().is_none() {
        apt::ensure_packages(&[apt::CNI_PLUGINS], "the benchmark", consent)?;
    }
    workspace.build_for_lab()?;

    let machine = figures::Machine::look()?;
    leave(arguments.cpu)?;
    let rules = match arguments.legacy {
        true => Rules::IptablesLegacy,
        false => Rules::IptablesNft,
    };
    let iptables = Way::Seeds(rules);
    let mut means = vec![Means::Seeds(rules), Means::Cni(rules)];
    let mut ways = vec![Way::Limit, Way::Seeds(Rules::Routed), iptables];
    if !arguments.without_nucnet {
        ways.push(Way::Nucnet);
        means.push(Means::Nucnet);
    }
    let is_wanted = |part| arguments.only.is_none_or(|only| only == part);
    let figures = Figures {
        machine,
        rounds: match is_wanted(Part::Transactions) {
            true => transactions(arguments, &ways)?,
            false => Vec::new(),
        },
        passes: match is_wanted(Part::Attach) {
            true => gates::measure(&means, arguments.crowd, arguments.rounds)?,
            false => Vec::new(),
        },
        slots: match is_wanted(Part::Slots) {
            true => slots::measure(&means, arguments.slots, arguments.rounds)?,
            false => Vec::new(),
        },
    };
    report::print(&figures, &ways, iptables);
    let path = workspace.target.join("bench.json");
    fs::write(&path, figures.json(&ways, iptables)?)
        .with_context(|| format!("cannot write {}", path.display()))?;
    println!("\n{}", path.display());
    Ok(())
}

/// Keeps this process and what it starts off the CPU on which is measured, if there is another.
pub(crate) fn leave(cpu: usize) -> Result<()> {
    let this = Pid::from_raw(0);
    let mut set = sched_getaffinity(this)?;
    ensure!(
        set.is_set(cpu).unwrap_or(false),
        "there is no CPU {cpu} for this process"
    );
    set.unset(cpu)?;
    if (0..CpuSet::count()).any(|cpu| set.is_set(cpu).unwrap_or(false)) {
        sched_setaffinity(this, &set)?;
    }
    Ok(())
}

/// Every test by every way, round by round.
fn transactions(arguments: &Arguments, ways: &[Way]) -> Result<Vec<Round>> {
    let family = if arguments.ipv6 {
        Family::V6
    } else {
        Family::V4
    };
    let step = Step::start("measuring transactions");
    let mut tracks = Vec::new();
    for &way in ways {
        step.note(&format!("building the lab for {way}"));
        let track = Track::new(way, family, arguments.cpu);
        tracks.push(track.with_context(|| format!("the lab for {way}"))?);
    }
    let mut rounds = Vec::new();
    // Round 0 warms caches and neighbours up and does not count.
    for number in 0..=arguments.rounds {
        let time = Duration::from_millis(if number == 0 { 20 } else { arguments.time });
        let mut round = Round::default();
        for (test, direction, kind) in TESTS {
            step.note(&format!("round {number} of {}: {test}", arguments.rounds));
            let mut samples: Vec<Option<Sample>> = vec![None; ways.len()];
            for turn in 0..ways.len() {
                // Each way comes first, second ... equally often.
                let which = (turn + number as usize) % ways.len();
                let sample = tracks[which].sample(direction, kind, time);
                samples[which] =
                    Some(sample.with_context(|| format!("{test} by {}", ways[which]))?);
            }
            round.tests.push(samples.into_iter().flatten().collect());
        }
        if number > 0 {
            rounds.push(round);
        }
    }
    step.done();
    Ok(rounds)
}
