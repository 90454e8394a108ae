//! Long steps say what they do and for how long they have been at it: a spinner on a
//! terminal, plain lines elsewhere.

use std::{
    cell::Cell,
    fmt,
    io::{IsTerminal as _, stderr},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};

/// How often a step without a terminal says that it is still alive.
const HEARTBEAT: Duration = Duration::from_secs(30);

/// A step under way. Dropping it says that it failed.
pub(crate) struct Step {
    title: String,
    started: Instant,
    spinner: Option<ProgressBar>,
    spoke: Cell<Instant>,
    finished: bool,
}

impl Step {
    /// Shows that the step begins.
    pub(crate) fn start(title: impl Into<String>) -> Self {
        let title = title.into();
        let spinner = if stderr().is_terminal() {
            let style =
                ProgressStyle::with_template("{spinner} {prefix} {elapsed} {wide_msg:.dim}")
                    .unwrap_or_else(|_| ProgressStyle::default_spinner());
            let spinner = ProgressBar::new_spinner()
                .with_style(style)
                .with_prefix(title.clone());
            spinner.enable_steady_tick(Duration::from_millis(100));
            Some(spinner)
        } else {
            eprintln!("{title} ...");
            None
        };
        let started = Instant::now();
        Self {
            title,
            started,
            spinner,
            spoke: Cell::new(started),
            finished: false,
        }
    }

    /// Shows what the step is doing just now.
    pub(crate) fn note(&self, detail: &str) {
        if let Some(spinner) = &self.spinner {
            spinner.set_message(detail.trim().to_owned());
        } else if self.spoke.get().elapsed() >= HEARTBEAT {
            self.spoke.set(Instant::now());
            eprintln!("  {} {}", Seconds(self.started.elapsed()), detail.trim());
        }
    }

    /// Ends the step well.
    pub(crate) fn done(mut self) -> Duration {
        self.finish("ok  ");
        self.started.elapsed()
    }

    /// Ends the step badly.
    pub(crate) fn failed(mut self) -> Duration {
        self.finish("FAIL");
        self.started.elapsed()
    }

    fn finish(&mut self, outcome: &str) {
        self.finished = true;
        if let Some(spinner) = &self.spinner {
            spinner.finish_and_clear();
        }
        eprintln!(
            "{outcome} {}  {}",
            Seconds(self.started.elapsed()),
            self.title
        );
    }
}

impl Drop for Step {
    fn drop(&mut self) {
        if !self.finished {
            self.finish("FAIL");
        }
    }
}

/// A time as people read it.
pub(crate) struct Seconds(pub Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:6.1} s", self.0.as_secs_f64())
    }
}
