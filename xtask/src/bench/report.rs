//! The figures as people read them.

use nucnet_tests::measure::Way;

use super::figures::{Bar, Clock, Figures, Spread};
use super::{TESTS, gates, slots};

/// Prints all tables.
pub(crate) fn print(figures: &Figures, ways: &[Way], iptables: Way) {
    let machine = &figures.machine;
    println!(
        "\nLinux {}, {} CPUs, {}",
        machine.kernel, machine.cpus, machine.iptables
    );
    if !figures.rounds.is_empty() {
        transactions(figures, ways);
        ratios(&figures.bars(ways, iptables));
    }
    if !figures.passes.is_empty() {
        gates::print(&figures.passes);
        ratios(&gates::bars(&figures.passes));
    }
    if !figures.slots.is_empty() {
        slots::print(&figures.slots);
        ratios(&slots::bars(&figures.slots));
    }
}

fn transactions(figures: &Figures, ways: &[Way]) {
    let what = match figures.machine.clock {
        Clock::Cpu => "CPU time a transaction, client and server on one CPU",
        Clock::Elapsed => "time a transaction, client and server on one CPU",
    };
    let rounds = figures.rounds.len();
    println!("\n{what}: microseconds, median of {rounds} rounds (p10..p90)\n");
    print!("{:8}", "");
    for way in ways {
        print!("  {way:>22}");
    }
    println!();
    for (test, (name, _, _)) in TESTS.iter().enumerate() {
        print!("{name:8}");
        for way in 0..ways.len() {
            print!("  {:>22}", microseconds(figures.cost(test, way)));
        }
        println!();
    }
}

fn ratios(bars: &[Bar]) {
    println!("\nratios inside a round, median (p10..p90)\n");
    let width = bars.iter().map(|bar| bar.title.len()).max().unwrap_or(0);
    for bar in bars {
        let Spread { median, p10, p90 } = bar.value;
        let verdict = match bar.wanted {
            None => String::new(),
            Some(wanted) if wanted.holds(median) => format!("  {wanted}  reached"),
            Some(wanted) => format!("  {wanted}  MISSED"),
        };
        println!(
            "{:8}  {:width$}  {median:6.2}  ({p10:.2}..{p90:.2}){verdict}",
            bar.test, bar.title
        );
    }
}

fn microseconds(spread: Spread) -> String {
    format!(
        "{:.2} ({:.2}..{:.2})",
        spread.median, spread.p10, spread.p90
    )
}
