//! What was measured, and what follows from it.

use std::{fs, process::Command, time::Duration};

use anyhow::Result;
use nucnet_tests::measure::{Sample, Way, gate::Gate};
use serde_json::{Value, json};

use super::TESTS;
use super::gates::{self, Pass};
use super::slots;

/// All figures of one run.
pub(crate) struct Figures {
    pub(crate) machine: Machine,
    pub(crate) rounds: Vec<Round>,
    pub(crate) passes: Vec<Pass>,
    pub(crate) slots: Vec<slots::Pass>,
}

/// One round: for every test one sample by every way.
#[derive(Default)]
pub(crate) struct Round {
    pub(crate) tests: Vec<Vec<Sample>>,
}

/// What the figures hold for.
pub(crate) struct Machine {
    pub(crate) kernel: String,
    pub(crate) cpus: usize,
    pub(crate) iptables: String,
    pub(crate) clock: Clock,
}

/// Which time tells what a transaction costs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Clock {
    /// CPU run time, which includes the kernel's work for packets.
    Cpu,
    /// Elapsed time: `CONFIG_IRQ_TIME_ACCOUNTING` keeps that work apart.
    Elapsed,
}

impl Machine {
    pub(crate) fn look() -> Result<Self> {
        let uname = nix::sys::utsname::uname()?;
        let kernel = uname.release().to_string_lossy().into_owned();
        let version = Command::new("iptables").arg("--version").output();
        Ok(Self {
            clock: Clock::of(&config(&kernel)),
            kernel,
            cpus: std::thread::available_parallelism()?.get(),
            iptables: version
                .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
                .unwrap_or_default(),
        })
    }
}

/// The kernel's configuration, or nothing where it does not show it.
fn config(kernel: &str) -> String {
    let packed = Command::new("gzip")
        .args(["-dc", "/proc/config.gz"])
        .output();
    match packed {
        Ok(output) if output.status.success() => {
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
        _ => fs::read_to_string(format!("/boot/config-{kernel}")).unwrap_or_default(),
    }
}

impl Clock {
    fn of(config: &str) -> Self {
        match config
            .lines()
            .any(|line| line == "CONFIG_IRQ_TIME_ACCOUNTING=y")
        {
            true => Self::Elapsed,
            false => Self::Cpu,
        }
    }

    /// Microseconds a transaction.
    pub(crate) fn cost(self, sample: &Sample) -> f64 {
        let time = match self {
            Self::Cpu => sample.cpu,
            Self::Elapsed => sample.elapsed,
        };
        time.as_secs_f64() * 1e6 / sample.transactions as f64
    }
}

/// A median and how far single values are from it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Spread {
    pub(crate) median: f64,
    pub(crate) p10: f64,
    pub(crate) p90: f64,
}

impl Spread {
    /// Of at least one value.
    pub(crate) fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<_> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self {
            median: quantile(&values, 0.5),
            p10: quantile(&values, 0.1),
            p90: quantile(&values, 0.9),
        }
    }

    pub(super) fn json(self) -> Value {
        json!({ "median": self.median, "p10": self.p10, "p90": self.p90 })
    }
}

/// A quantile of sorted values, between two of them by proportion.
fn quantile(sorted: &[f64], part: f64) -> f64 {
    let Some(last) = sorted.len().checked_sub(1) else {
        return f64::NAN;
    };
    let place = part * last as f64;
    let (below, above) = (place.floor() as usize, place.ceil() as usize);
    sorted[below] + (sorted[above] - sorted[below]) * place.fract()
}

impl Figures {
    /// Microseconds a transaction, of a test by a way.
    pub(crate) fn cost(&self, test: usize, way: usize) -> Spread {
        let clock = self.machine.clock;
        Spread::of(
            self.rounds
                .iter()
                .map(|round| clock.cost(&round.tests[test][way])),
        )
    }

    /// How many times as much one way costs as another.
    pub(crate) fn ratio(&self, test: usize, way: usize, other: usize) -> Spread {
        let clock = self.machine.clock;
        Spread::of(self.rounds.iter().map(|round| {
            let samples = &round.tests[test];
            clock.cost(&samples[way]) / clock.cost(&samples[other])
        }))
    }

    /// Everything, for programs.
    pub(crate) fn json(&self, ways: &[Way], iptables: Way) -> Result<String> {
        let names: Vec<_> = ways.iter().map(ToString::to_string).collect();
        let mut transactions = serde_json::Map::new();
        for (test, (name, _, _)) in TESTS.iter().enumerate() {
            let mut by_way = serde_json::Map::new();
            for (way, title) in names.iter().enumerate() {
                let samples: Vec<_> = self
                    .rounds
                    .iter()
                    .map(|round| &round.tests[test][way])
                    .map(|sample| {
                        json!({
                            "transactions": sample.transactions,
                            "cpu_ns": nanoseconds(sample.cpu),
                            "elapsed_ns": nanoseconds(sample.elapsed),
                        })
                    })
                    .collect();
                by_way.insert(
                    title.clone(),
                    json!({ "us": self.cost(test, way).json(), "samples": samples }),
                );
            }
            transactions.insert((*name).to_owned(), by_way.into());
        }
        let mut bars = self.bars(ways, iptables);
        bars.extend(gates::bars(&self.passes));
        bars.extend(slots::bars(&self.slots));
        let ratios: Vec<_> = bars
            .iter()
            .map(|bar| {
                json!({
                    "test": bar.test,
                    "ratio": bar.title,
                    "value": bar.value.json(),
                    "to_reach": bar.wanted.map(|wanted| wanted.to_string()),
                    "reached": bar.wanted.map(|wanted| wanted.holds(bar.value.median)),
                })
            })
            .collect();
        let machine = &self.machine;
        let all = json!({
            "kernel": machine.kernel,
            "cpus": machine.cpus,
            "iptables": machine.iptables,
            "clock": match machine.clock {
                Clock::Cpu => "cpu",
                Clock::Elapsed => "elapsed",
            },
            "rounds": self.rounds.len(),
            "transactions": transactions,
            "ratios": ratios,
            "publishes_per_container": Gate::PUBLISHES,
            "containers": gates::json(&self.passes),
            "slots": slots::json(&self.slots),
        });
        Ok(serde_json::to_string_pretty(&all)? + "\n")
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

pub(crate) fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// What a ratio should be.
#[derive(Clone, Copy)]
pub(crate) enum Wanted {
    AtLeast(f64),
    AtMost(f64),
}

impl Wanted {
    pub(crate) fn holds(self, value: f64) -> bool {
        match self {
            Self::AtLeast(bar) => value >= bar,
            Self::AtMost(bar) => value <= bar,
        }
    }
}

impl std::fmt::Display for Wanted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::AtLeast(bar) => write!(f, ">= {bar:.2}"),
            Self::AtMost(bar) => write!(f, "<= {bar:.2}"),
        }
    }
}

/// A ratio and what it should be.
pub(crate) struct Bar {
    pub(crate) test: &'static str,
    pub(crate) title: String,
    pub(crate) value: Spread,
    pub(crate) wanted: Option<Wanted>,
}

impl Figures {
    /// Every ratio that says something about nucnet; without it, about the yardsticks.
    pub(crate) fn bars(&self, ways: &[Way], iptables: Way) -> Vec<Bar> {
        let place = |wanted: Way| ways.iter().position(|&way| way == wanted);
        let routed = Way::Seeds(nucnet_tests::lab::seeds::Rules::Routed);
        let mut bars = Vec::new();
        for (test, (name, _, _)) in TESTS.iter().enumerate() {
            let mut bar = |one: Way, other: Way, wanted| {
                if let (Some(a), Some(b)) = (place(one), place(other)) {
                    bars.push(Bar {
                        test: name,
                        title: format!("{one} / {other}"),
                        value: self.ratio(test, a, b),
                        wanted,
                    });
                }
            };
            let least = if *name == "out-crr" { 1.20 } else { 1.15 };
            bar(iptables, Way::Nucnet, Some(Wanted::AtLeast(least)));
            bar(Way::Nucnet, routed, Some(Wanted::AtMost(1.0)));
            bar(Way::Nucnet, Way::Limit, None);
            bar(iptables, routed, None);
            bar(routed, Way::Limit, None);
        }
        bars
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_and_spread_lie_between_the_values() {
        let spread = Spread::of([5.0, 1.0, 3.0, 2.0, 4.0]);
        assert_eq!(
            spread,
            Spread {
                median: 3.0,
                p10: 1.4,
                p90: 4.6
            }
        );
        assert_eq!(
            Spread::of([7.0]),
            Spread {
                median: 7.0,
                p10: 7.0,
                p90: 7.0
            }
        );
        assert_eq!(Spread::of([1.0, 2.0]).median, 1.5);
    }

    #[test]
    fn kernel_that_accounts_interrupts_apart_is_timed_by_the_clock() {
        let off = "# CONFIG_IRQ_TIME_ACCOUNTING is not set\nCONFIG_HAVE_IRQ_TIME_ACCOUNTING=y\n";
        assert!(Clock::of(off) == Clock::Cpu);
        assert!(Clock::of("CONFIG_IRQ_TIME_ACCOUNTING=y\n") == Clock::Elapsed);
    }
}
