//! Waiting for what must become true.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// How long something may take that takes milliseconds on a quiet machine.
pub const SOON: Duration = Duration::from_secs(20);

/// How long to wait for an answer that must not come. Nothing depends on it being enough: it
/// bounds how long a failure may hide, not what a success needs.
pub const NEVER: Duration = Duration::from_millis(400);

/// Asks again and again until the answer is yes.
///
/// # Errors
/// The time is over; `what` says what did not happen.
pub fn until(what: &str, limit: Duration, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !holds()? {
        if Instant::now() > deadline {
            bail!("not within {limit:?}: {what}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}
