//! Slots of microVMs, created and removed by nucnet and by the way before it.

use anyhow::{Context as _, Result};
use nucnet_tests::measure::{
    gate::{Cost, Means},
    slots::Slots,
};
use serde_json::{Value, json};

use super::figures::{Bar, Spread, Wanted};
use super::gates::{MEASURES, Measure, milliseconds_of};
use crate::progress::Step;

/// All that was measured in one lab.
pub(crate) struct Pass {
    means: Means,
    /// How many slots come and go together.
    count: u16,
    create: Vec<Cost>,
    remove: Vec<Cost>,
}

/// Measures: in each round every means.
pub(crate) fn measure(means: &[Means], count: u16, rounds: u32) -> Result<Vec<Pass>> {
    let step = Step::start("measuring slots");
    let known = |means: &&Means| !matches!(means, Means::Cni(_));
    let mut passes = Vec::new();
    let mut labs = Vec::new();
    for &means in means.iter().filter(known) {
        let lab = Slots::new(means, count);
        labs.push(lab.with_context(|| format!("the lab for slots by {means}"))?);
        passes.push(Pass {
            means,
            count,
            create: Vec::new(),
            remove: Vec::new(),
        });
    }
    for number in 1..=rounds {
        for (lab, pass) in labs.iter_mut().zip(&mut passes) {
            step.note(&format!("round {number} of {rounds}: by {}", pass.means));
            let costs = lab.pass();
            let [create, remove] =
                costs.with_context(|| format!("{count} slots by {}", pass.means))?;
            pass.create.push(create);
            pass.remove.push(remove);
        }
    }
    drop(labs);
    step.done();
    Ok(passes)
}

type Work = fn(&Pass, usize) -> Cost;
const WORK: [(&str, Work); 3] = [
    ("create", |pass, round| pass.create[round]),
    ("remove", |pass, round| pass.remove[round]),
    ("both", |pass, round| {
        pass.create[round] + pass.remove[round]
    }),
];

/// How many times as much the other way costs, round by round.
pub(crate) fn bars(passes: &[Pass]) -> Vec<Bar> {
    let Some(own) = passes.iter().find(|pass| pass.means == Means::Nucnet) else {
        return Vec::new();
    };
    let mut bars = Vec::new();
    for other in passes.iter().filter(|pass| pass.means != Means::Nucnet) {
        for (name, work) in WORK {
            for (what, measure) in MEASURES {
                let seconds = |pass, round| measure(&work(pass, round)).as_secs_f64();
                let rounds = 0..own.create.len();
                bars.push(Bar {
                    test: name,
                    title: format!("{what}, {} slots: {} / nucnet", own.count, other.means),
                    value: Spread::of(
                        rounds.map(|round| seconds(other, round) / seconds(own, round)),
                    ),
                    wanted: (name == "both").then_some(Wanted::AtLeast(5.0)),
                });
            }
        }
    }
    bars
}

/// Prints the table.
pub(crate) fn print(passes: &[Pass]) {
    println!("\nslots: milliseconds each, median; CPU in brackets\n");
    println!(
        "{:14}  {:>8}  {:>16}  {:>16}",
        "", "together", "create", "remove"
    );
    for pass in passes {
        let shown = |costs: &[Cost]| {
            let each = |measure| spread(pass, costs, measure).median;
            let [wall, cpu] = MEASURES.map(|(_, measure)| each(measure));
            format!("{wall:.2} ({cpu:.2})")
        };
        println!(
            "{:14}  {:>8}  {:>16}  {:>16}",
            pass.means,
            pass.count,
            shown(&pass.create),
            shown(&pass.remove)
        );
    }
}

/// Milliseconds a slot.
fn spread(pass: &Pass, costs: &[Cost], measure: Measure) -> Spread {
    let count = f64::from(pass.count);
    Spread::of(
        costs
            .iter()
            .map(|cost| milliseconds_of(cost, measure) / count),
    )
}

/// Everything, for programs.
pub(crate) fn json(passes: &[Pass]) -> Value {
    passes
        .iter()
        .map(|pass| {
            let costs = |costs: &[Cost]| {
                let [wall, cpu] = MEASURES.map(|(_, measure)| spread(pass, costs, measure).json());
                json!({ "wall_ms": wall, "cpu_ms": cpu })
            };
            json!({
                "means": pass.means.to_string(),
                "slots": pass.count,
                "create": costs(&pass.create),
                "remove": costs(&pass.remove),
            })
        })
        .collect()
}
