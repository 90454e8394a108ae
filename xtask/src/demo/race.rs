//! Twenty seconds of iptables against nucnet, by the means of `cargo xtask bench`.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use nix::sched::{CpuSet, sched_getaffinity};
use nix::unistd::Pid;
use nucnet_tests::{
    lab::{Family, seeds::Rules},
    measure::{
        Direction, Kind, Sample, Track, Way,
        gate::{Gate, Means},
    },
};

use super::{
    bars::{Bar, Bars},
    story::Story,
};
use crate::{
    bench::{
        self,
        figures::{Figures, Machine, Round, Spread, milliseconds},
        gates::Pass,
    },
    progress::Step,
};

/// How long the race is.
const TIME: Duration = Duration::from_secs(20);
/// How long one measurement is.
const SLICE: Duration = Duration::from_millis(200);
/// Who takes part.
const WAYS: [Way; 2] = [Way::Seeds(Rules::IptablesNft), Way::Nucnet];
/// How they attach containers.
const MEANS: [Means; 2] = [Means::Seeds(Rules::IptablesNft), Means::Nucnet];
/// How many other containers there are meanwhile.
const CROWD: u16 = 1;
/// Places in [`WAYS`] and [`MEANS`].
const IPTABLES: usize = 0;
const NUCNET: usize = 1;
/// What they do, client outside and server in the container.
const KINDS: [Kind; 2] = [Kind::Rr, Kind::Crr];
/// Places in [`KINDS`].
const RR: usize = 0;
const CRR: usize = 1;

/// Chapter: the race.
pub(super) fn run(story: &mut Story) -> Result<()> {
    story.chapter("A race of 20 seconds: iptables against nucnet, in turns.")?;
    let machine = Machine::look()?;
    let cpu = first_cpu()?;
    bench::leave(cpu)?;
    let figures = measure(story, machine, cpu)?;

    let name = |way: usize| match WAYS[way] {
        Way::Nucnet => "nucnet",
        _ => "iptables",
    };
    let mut show = |what: &str, values: [f64; 2], digits: usize, ratio: f64| -> Result<()> {
        let bar = |way: usize, note: &str| Bar {
            name: name(way),
            value: values[way],
            text: format!("{:.digits$}{note}", values[way]),
        };
        let note = format!("  ({ratio:.2}x)");
        story.say(&format!("\n{what}"))?;
        story.say(&Bars(&[bar(IPTABLES, ""), bar(NUCNET, &note)]).to_string())
    };
    let cost = |test: usize| [IPTABLES, NUCNET].map(|way| figures.cost(test, way).median);
    let ratio = |test: usize| figures.ratio(test, IPTABLES, NUCNET).median;
    show(
        "One request and its answer: microseconds, less is better",
        cost(RR),
        1,
        ratio(RR),
    )?;
    show(
        "Connect, request, answer, close: times a second, more is better",
        cost(CRR).map(|us| 1e6 / us),
        0,
        ratio(CRR),
    )?;
    let attach = [IPTABLES, NUCNET].map(|way| {
        let costs = figures.passes[way].attach.iter();
        Spread::of(costs.map(|cost| milliseconds(cost.wall))).median
    });
    show(
        &format!(
            "Attach of a container that publishes {} ports: milliseconds, less is better",
            Gate::PUBLISHES
        ),
        attach,
        0,
        attach[IPTABLES] / attach[NUCNET],
    )?;
    story.say(&format!(
        "\nMedians of {} rounds; one CPU for client, server and kernel, its run time\n\
         counted. With all paths, spreads and yardsticks: cargo xtask bench",
        figures.rounds.len()
    ))
}

/// The first CPU that we may run on.
fn first_cpu() -> Result<usize> {
    let set = sched_getaffinity(Pid::from_raw(0))?;
    (0..CpuSet::count())
        .find(|&cpu| set.is_set(cpu).unwrap_or(false))
        .context("no CPU to run on")
}

/// Both ways in turns until the time is over.
fn measure(story: &Story, machine: Machine, cpu: usize) -> Result<Figures> {
    let start = Instant::now();
    let step = Step::start("racing");
    let mut tracks = Vec::new();
    let mut gates = Vec::new();
    let mut passes = Vec::new();
    for (way, means) in WAYS.into_iter().zip(MEANS) {
        story.check()?;
        let mut track = Track::new(way, Family::V4, cpu)?;
        for kind in KINDS {
            // Warms caches and neighbours up and does not count.
            track.sample(Direction::In, kind, SLICE / 10)?;
        }
        tracks.push(track);
        let (gate, first) = Gate::new(means, CROWD)?;
        gates.push(gate);
        passes.push(Pass::new(means, CROWD, first));
    }
    let mut rounds: Vec<Round> = Vec::new();
    while rounds.is_empty() || start.elapsed() < TIME {
        let order = match rounds.len() % 2 {
            0 => [IPTABLES, NUCNET],
            _ => [NUCNET, IPTABLES],
        };
        let mut round = Round::default();
        for kind in KINDS {
            let mut samples: [Option<Sample>; 2] = [None; 2];
            for way in order {
                story.check()?;
                step.note(&format!("{kind} by {}", WAYS[way]));
                let sample = tracks[way].sample(Direction::In, kind, SLICE);
                samples[way] = Some(sample.with_context(|| format!("{kind} by {}", WAYS[way]))?);
            }
            round.tests.push(samples.into_iter().flatten().collect());
        }
        rounds.push(round);
        for way in order {
            story.check()?;
            step.note(&format!("attach by {}", WAYS[way]));
            let passed = gates[way].pass();
            let [attach, detach] = passed.with_context(|| format!("attach by {}", WAYS[way]))?;
            passes[way].attach.push(attach);
            passes[way].detach.push(detach);
        }
    }
    step.done();
    Ok(Figures {
        machine,
        rounds,
        passes,
        slots: Vec::new(),
    })
}
