//! The lab's helper program: the agent of a machine, and the two sides of a measurement.

use std::net::SocketAddr;

use anyhow::Result;
use clap::Parser;
use nucnet_tests::lab::agent;
use nucnet_tests::measure::worker;

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
    /// Send every byte back, until standard input ends.
    Serve {
        /// Where to listen.
        address: SocketAddr,
        /// The CPU to stay on.
        #[arg(long)]
        cpu: usize,
    },
    /// Do transactions as standard input says.
    Drive {
        /// The server.
        target: SocketAddr,
        /// The CPU to stay on.
        #[arg(long)]
        cpu: usize,
    },
}

fn main() -> Result<()> {
    match Work::parse() {
        Work::Agent { name: _, cgroup } => agent::run(cgroup.as_deref()),
        Work::Serve { address, cpu } => {
            worker::pin(cpu)?;
            worker::serve(address)
        }
        Work::Drive { target, cpu } => {
            worker::pin(cpu)?;
            worker::drive(target)
        }
    }
}
