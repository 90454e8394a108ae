//! nucnet's build, test, demo and bench commands: `cargo xtask --help`.

mod apt;
mod archive;
mod bench;
mod build;
mod demo;
mod loops;
mod object;
mod progress;
mod run;
mod stack;
mod test;
mod toolchain;
mod vm;
mod workspace;

use std::{path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};

use crate::{apt::Consent, workspace::Workspace};

/// Builds and tests nucnet. Whatever a command needs and this machine lacks it installs
/// (root on Debian) or names with the exact commands to type.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Arguments {
    /// Install what is missing without asking
    #[arg(long, short, global = true)]
    yes: bool,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Subcommand)]
enum Verb {
    Build(build::Arguments),
    Test(test::Arguments),
    Demo(demo::Arguments),
    Bench(bench::Arguments),
    Vm(vm::Arguments),
    /// Make the microVM that the scenarios boot, as `test` does, for scenarios run by hand
    Microvm,
    /// Check a BPF object: no panic left in it, every map and program there, licence
    VerifyObject {
        /// The object [default: the committed one]
        object: Option<PathBuf>,
    },
}

fn main() -> ExitCode {
    if vm::is_guest() {
        vm::guest::main();
    }
    // SAFETY: this is the only thread yet.
    unsafe { apt::complete_path() };
    match Arguments::parse().run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

impl Arguments {
    fn run(&self) -> Result<()> {
        let consent = if self.yes {
            Consent::Given
        } else {
            Consent::Ask
        };
        let workspace = Workspace::locate()?;
        match &self.verb {
            Verb::Build(build) => build::main(&workspace, consent, build),
            Verb::Test(test) => test::main(&workspace, consent, test),
            Verb::Demo(demo) => demo::main(&workspace, consent, demo),
            Verb::Bench(bench) => bench::main(&workspace, consent, bench),
            Verb::Vm(vm) => vm::main(&workspace, consent, vm),
            Verb::Microvm => {
                println!("{}", vm::prepare_microvm(&workspace, consent)?.display());
                Ok(())
            }
            Verb::VerifyObject { object } => {
                let object = object
                    .clone()
                    .unwrap_or_else(|| object::committed(&workspace));
                object::verify(&workspace, &object)?;
                println!("{}: sound", object.display());
                Ok(())
            }
        }
    }
}
