//! The rows of packets through the packet logic alone: no kernel, no root.

use std::process::ExitCode;

use libtest_mimic::{Arguments, Failed, Trial};
use nucnet_tests::packets::{rows, world::World};

fn main() -> ExitCode {
    rows::keep_panics();
    let trials = rows::cases().into_iter().map(|case| {
        Trial::test(case.name(), move || {
            case.run(&mut World::new()).map_err(Failed::from)
        })
    });
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
