//! Faults that tests ask for: the process stops, or a step fails, before the n-th step that it
//! takes. Not part of a release, which has neither debug assertions nor the feature `faults`.

use super::Error;
use nix::sys::signal::{Signal, raise};
use std::sync::atomic::{AtomicUsize, Ordering};

/// `stop:N` (the process is killed) or `fail:N` (the step fails); N counts from 0, over all
/// plans of the process.
const VARIABLE: &str = "NUCNET_FAULT";

static STEPS: AtomicUsize = AtomicUsize::new(0);

pub(super) fn strike() -> Result<(), Error> {
    let step = STEPS.fetch_add(1, Ordering::Relaxed);
    let Ok(wanted) = std::env::var(VARIABLE) else {
        return Ok(());
    };
    match wanted.split_once(':') {
        Some(("stop", n)) if n == step.to_string() => {
            // As if by somebody else: nothing is cleaned up.
            let _ = raise(Signal::SIGKILL);
            Ok(())
        }
        Some(("fail", n)) if n == step.to_string() => Err(Error::Injected(step)),
        _ => Ok(()),
    }
}
