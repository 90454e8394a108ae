//! The rows of packets through the loaded programs, and the tables compared afterwards with
//! those that the packet logic alone leaves.

use std::{
    process::ExitCode,
    sync::{Arc, Mutex},
};

use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::unistd::geteuid;
use nucnet_common::abi::Reason;
use nucnet_tests::packets::{
    bench::{Bench, Frame as _},
    engine::Engine as _,
    loaded::{self, Loaded},
    packet::udp,
    rows::{self, Case},
    site::{SERVER4, WEB},
    world::World,
};

fn main() -> ExitCode {
    rows::keep_panics();
    let mut arguments = Arguments::from_args();
    // One set of tables, and one thread that is in the site's network namespace.
    arguments.test_threads = Some(1);
    let loaded = if arguments.list || !geteuid().is_root() {
        None
    } else {
        match loaded::enter_site().and_then(|()| Loaded::new()) {
            Ok(loaded) => Some(Arc::new(Mutex::new(loaded))),
            Err(error) => {
                eprintln!("{error:#}");
                return ExitCode::FAILURE;
            }
        }
    };
    if loaded.as_ref().is_some_and(|it| !lock(it).knows_sums()) {
        eprintln!("this kernel cannot check the sums of frames (Linux 6.11 can)");
    }

    let mut trials: Vec<Trial> = rows::cases()
        .into_iter()
        .map(|case| {
            trial(case.name(), loaded.clone(), move |loaded| {
                run(&case, loaded)
            })
        })
        .collect();
    trials.push(trial(
        "tag_that_the_kernel_took_out_of_a_frame_is_seen".to_owned(),
        loaded.clone(),
        tag_that_the_kernel_took_out_of_a_frame_is_seen,
    ));
    trials.push(trial(
        "no_place_is_left_taken_when_all_tables_are_empty".to_owned(),
        loaded,
        |loaded| {
            loaded.reset();
            match loaded.taken_places()[..] {
                [] => Ok(Completion::Completed),
                ref places => Err(format!("{places:?}").into()),
            }
        },
    ));
    libtest_mimic::run(&arguments, trials).exit_code()
}

fn lock(loaded: &Mutex<Loaded>) -> std::sync::MutexGuard<'_, Loaded> {
    // A row that failed leaves nothing that the next one does not clear.
    loaded.lock().unwrap_or_else(|poison| poison.into_inner())
}

fn trial(
    name: String,
    loaded: Option<Arc<Mutex<Loaded>>>,
    test: impl FnOnce(&mut Loaded) -> Result<Completion, Failed> + Send + 'static,
) -> Trial {
    Trial::ignorable_test(name, move || match loaded {
        Some(loaded) => test(&mut lock(&loaded)),
        None => Ok(Completion::ignored_with(
            "skipped: loading programs needs root",
        )),
    })
}

fn run(case: &Case, loaded: &mut Loaded) -> Result<Completion, Failed> {
    if let Some(why) = case.logic_only() {
        return Ok(Completion::ignored_with(format!("skipped: {why}")));
    }
    loaded.reset();
    case.run(loaded)?;
    let mut world = World::new();
    case.run(&mut world)?;
    let (programs, logic) = (loaded.state().comparable(), world.state().comparable());
    if programs != logic {
        return Err(format!(
            "the programs leave other tables than the logic alone:\n  {}\nagainst\n  {}",
            programs.join("\n  "),
            logic.join("\n  ")
        )
        .into());
    }
    Ok(Completion::Completed)
}

/// With a test run the tag is still in the frame.
fn tag_that_the_kernel_took_out_of_a_frame_is_seen(
    loaded: &mut Loaded,
) -> Result<Completion, Failed> {
    loaded.reset();
    let _ = Bench::new(loaded);
    let packet = udp((WEB.v4, 5000), (SERVER4, 443)).vlan(42);
    let frame = packet.framed(WEB.gateway_mac(), WEB.mac);
    loaded.drops_for_real(&WEB, &frame, Reason::NotIp)?;
    Ok(Completion::Completed)
}
