//! Attach and detach by every means, beside no other container and beside many.

use std::time::Duration;

use anyhow::{Context as _, Result};
use nucnet_tests::measure::gate::{Cost, Gate, Means};
use serde_json::{Value, json};

use super::figures::{Bar, Spread, Wanted, milliseconds};
use crate::progress::Step;

/// All that was measured in one lab.
pub(crate) struct Pass {
    pub(crate) means: Means,
    /// How many containers are there.
    pub(crate) crowd: u16,
    /// The first attach on the host.
    pub(crate) first: Cost,
    pub(crate) attach: Vec<Cost>,
    pub(crate) detach: Vec<Cost>,
}

impl Pass {
    /// Of that lab, without any round yet.
    pub(crate) fn new(means: Means, crowd: u16, first: Cost) -> Self {
        Self {
            means,
            crowd,
            first,
            attach: Vec::new(),
            detach: Vec::new(),
        }
    }
}

/// Measures: in each round every means, alone and in a crowd.
pub(crate) fn measure(means: &[Means], crowd: u16, rounds: u32) -> Result<Vec<Pass>> {
    let step = Step::start("measuring attach and detach");
    let mut gates = Vec::new();
    let mut passes = Vec::new();
    let mut crowds = vec![0];
    crowds.extend(Some(crowd).filter(|&crowd| crowd > 0));
    for &means in means {
        for &crowd in &crowds {
            step.note(&format!("attaching {crowd} containers by {means}"));
            let (gate, first) = Gate::new(means, crowd)
                .with_context(|| format!("the lab with {crowd} containers by {means}"))?;
            gates.push(gate);
            passes.push(Pass::new(means, crowd, first));
        }
    }
    // Round 0 warms caches up and does not count.
    for number in 0..=rounds {
        step.note(&format!("round {number} of {rounds}"));
        for (gate, pass) in gates.iter_mut().zip(&mut passes) {
            let costs = gate.pass();
            let [attach, detach] = costs
                .with_context(|| format!("beside {} containers, by {}", pass.crowd, pass.means))?;
            if number > 0 {
                pass.attach.push(attach);
                pass.detach.push(detach);
            }
        }
    }
    step.note("taking the labs down");
    drop(gates);
    step.done();
    Ok(passes)
}

/// What is compared, of one round.
type Work = fn(&Pass, usize) -> Cost;
const WORK: [(&str, Work); 3] = [
    ("attach", |pass, round| pass.attach[round]),
    ("detach", |pass, round| pass.detach[round]),
    ("both", |pass, round| {
        pass.attach[round] + pass.detach[round]
    }),
];
pub(super) type Measure = fn(&Cost) -> Duration;
pub(super) const MEASURES: [(&str, Measure); 2] =
    [("time", |cost| cost.wall), ("CPU", |cost| cost.cpu)];

/// How many times as much one pass costs as another, round by round.
fn ratio(one: &Pass, other: &Pass, work: Work, measure: Measure) -> Spread {
    let seconds = |pass: &Pass, round| measure(&work(pass, round)).as_secs_f64();
    let rounds = 0..one.attach.len().min(other.attach.len());
    Spread::of(rounds.map(|round| seconds(one, round) / seconds(other, round)))
}

/// Every ratio that says something about nucnet.
pub(crate) fn bars(passes: &[Pass]) -> Vec<Bar> {
    let mut bars = Vec::new();
    let nucnet = || passes.iter().filter(|pass| pass.means == Means::Nucnet);
    for (name, work) in WORK {
        for (what, measure) in MEASURES {
            for own in nucnet() {
                for other in passes.iter().filter(|other| other.crowd == own.crowd) {
                    let least = match (other.means, what) {
                        (Means::Nucnet, _) => continue,
                        (_, "CPU") => 5.0,
                        (Means::Seeds(_), _) => 3.0,
                        (Means::Cni(_), _) => 10.0,
                    };
                    bars.push(Bar {
                        test: name,
                        title: format!("{what}, {} there: {} / nucnet", own.crowd, other.means),
                        value: ratio(other, own, work, measure),
                        wanted: Some(Wanted::AtLeast(least)),
                    });
                }
            }
            if let (Some(alone), Some(crowd)) = (nucnet().next(), nucnet().nth(1)) {
                bars.push(Bar {
                    test: name,
                    title: format!("{what}: nucnet beside {} / alone", crowd.crowd),
                    value: ratio(crowd, alone, work, measure),
                    wanted: Some(Wanted::AtMost(1.5)),
                });
            }
        }
    }
    bars
}

/// Prints the table.
pub(crate) fn print(passes: &[Pass]) {
    println!(
        "\na container with {} published ports: milliseconds, median; CPU in brackets\n",
        Gate::PUBLISHES
    );
    println!(
        "{:14}  {:>9}  {:>16}  {:>16}  {:>16}  {:>14}",
        "", "there are", "first ever", "attach", "detach", "CPU in kernel"
    );
    for pass in passes {
        println!(
            "{:14}  {:>9}  {:>16}  {:>16}  {:>16}  {:>12.0} %",
            pass.means,
            pass.crowd,
            shown(&[pass.first]),
            shown(&pass.attach),
            shown(&pass.detach),
            100.0 * kernel_share(pass)
        );
    }
}

pub(super) fn milliseconds_of(cost: &Cost, measure: Measure) -> f64 {
    milliseconds(measure(cost))
}

fn spread(costs: &[Cost], measure: Measure) -> Spread {
    Spread::of(costs.iter().map(|cost| milliseconds_of(cost, measure)))
}

fn shown(costs: &[Cost]) -> String {
    let [wall, cpu] = MEASURES.map(|(_, measure)| spread(costs, measure).median);
    format!("{wall:.1} ({cpu:.1})")
}

/// How much of the CPU time was spent in the kernel, all rounds together: many kernels look
/// only once a clock tick where a process is, which says nothing about a few milliseconds.
fn kernel_share(pass: &Pass) -> f64 {
    let costs = || pass.attach.iter().chain(&pass.detach);
    let kernel: Duration = costs().map(|cost| cost.kernel).sum();
    let cpu: Duration = costs().map(|cost| cost.cpu).sum();
    kernel.as_secs_f64() / cpu.as_secs_f64()
}

/// Everything, for programs.
pub(crate) fn json(passes: &[Pass]) -> Value {
    let costs = |costs: &[Cost]| {
        json!({
            "wall_ms": spread(costs, |cost| cost.wall).json(),
            "cpu_ms": spread(costs, |cost| cost.cpu).json(),
        })
    };
    passes
        .iter()
        .map(|pass| {
            json!({
                "means": pass.means.to_string(),
                "containers_there": pass.crowd,
                "first_attach": costs(&[pass.first]),
                "attach": costs(&pass.attach),
                "detach": costs(&pass.detach),
                "kernel_share_of_cpu": kernel_share(pass),
            })
        })
        .collect()
}
