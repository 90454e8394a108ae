//! The lab's helper program: the agent of a machine.

use anyhow::Result;
use clap::Parser;

/// What the lab starts in its namespaces. Of no use to people.
#[derive(Parser)]
enum Work {
    /// Is a machine of the lab until standard input ends.
    Agent {
        /// The machine's name, for `ps`.
        name: String,
        /// Be a host, with a child cgroup of this name.
        #[arg(long)]
        cgroup: Option<String>,
    },
}

fn main() -> Result<()> {
    match Work::parse() {
        Work::Agent { name: _, cgroup } => nucnet_tests::lab::agent::run(cgroup.as_deref()),
    }
}
