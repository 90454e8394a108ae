//! The command line of nucnet: parse, call, print, exit.

mod cli;
mod columns;

use std::process::ExitCode;

fn main() -> ExitCode {
    cli::run()
}
