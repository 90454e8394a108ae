//! The figures as people read them.

use nucnet_tests::measure::{Cost, Gate, Way};

use super::TESTS;
use super::figures::{Clock, Figures, Spread, milliseconds};

/// Prints all tables.
pub(crate) fn print(figures: &Figures, ways: &[Way], iptables: Way) {
    let machine = &figures.machine;
    println!(
        "\nLinux {}, {} CPUs, {}",
        machine.kernel, machine.cpus, machine.iptables
    );
    let what = match machine.clock {
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

    println!("\nratios inside a round, median (p10..p90)\n");
    for bar in figures.bars(ways, iptables) {
        let Spread { median, p10, p90 } = bar.value;
        let verdict = match bar.wanted {
            None => String::new(),
            Some(wanted) if wanted.holds(median) => format!("  {wanted}  reached"),
            Some(wanted) => format!("  {wanted}  MISSED"),
        };
        println!(
            "{:8}  {:24}  {median:5.2}  ({p10:.2}..{p90:.2}){verdict}",
            bar.test, bar.title
        );
    }

    println!(
        "\na container with {} published ports: milliseconds, median\n",
        Gate::PUBLISHES
    );
    println!(
        "{:16}  {:>16}  {:>16}  {:>16}",
        "wall (CPU)", "first attach", "attach", "detach"
    );
    for pass in &figures.passes {
        println!(
            "{:16}  {:>16}  {:>16}  {:>16}",
            pass.way,
            cost(&[pass.first]),
            cost(&pass.attach),
            cost(&pass.detach)
        );
    }
}

fn microseconds(spread: Spread) -> String {
    format!(
        "{:.2} ({:.2}..{:.2})",
        spread.median, spread.p10, spread.p90
    )
}

fn cost(costs: &[Cost]) -> String {
    let wall = Spread::of(costs.iter().map(|cost| milliseconds(cost.wall)));
    let cpu = Spread::of(costs.iter().map(|cost| milliseconds(cost.cpu)));
    format!("{:.1} ({:.1})", wall.median, cpu.median)
}
