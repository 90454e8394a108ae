//! Ctrl-C: the story stops where it is, its machines go, then the process ends as the signal
//! wants it. A second signal ends it at once; the machines' own processes tidy up even then.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering},
};

use anyhow::{Result, bail};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    flag,
    low_level::emulate_default_handler,
};

/// Whether a signal wants us to end.
#[derive(Clone, Debug)]
pub(super) struct Interrupt(Arc<AtomicUsize>);

impl Interrupt {
    /// Takes the signals over.
    pub(super) fn watch() -> Result<Self> {
        let signal = Arc::new(AtomicUsize::new(0));
        let again = Arc::new(AtomicBool::new(false));
        for kind in [SIGINT, SIGTERM, SIGHUP] {
            // In this order: the first signal finds `again` unset.
            flag::register_conditional_default(kind, again.clone())?;
            flag::register(kind, again.clone())?;
            flag::register_usize(kind, signal.clone(), usize::try_from(kind)?)?;
        }
        Ok(Self(signal))
    }

    /// Fails once a signal has come.
    pub(super) fn check(&self) -> Result<()> {
        if self.0.load(Ordering::Relaxed) != 0 {
            bail!("interrupted");
        }
        Ok(())
    }

    /// Ends the process as the signal that has come would have.
    pub(super) fn obey(&self) {
        if let Ok(signal @ 1..) = i32::try_from(self.0.load(Ordering::Relaxed)) {
            eprintln!("\ninterrupted; all machines of the demo are gone");
            // It returns only for signals that nobody registered.
            let _ = emulate_default_handler(signal);
        }
    }
}
