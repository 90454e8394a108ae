//! For how long something is watched.

use super::{Invalid, Problem};
use std::time::Duration;

const LONGEST: Duration = Duration::from_secs(60);

/// Parses a length of time of at most a minute: `200ms`, `1s`, `0s`.
pub fn parse_sample(field: &'static str, text: &str) -> Result<Duration, Invalid> {
    humantime::parse_duration(text)
        .ok()
        .filter(|sample| *sample <= LONGEST)
        .ok_or_else(|| Invalid::new(field, text, Problem::Sample))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_of_time_have_units_and_an_end() {
        let millis = |text| parse_sample("--sample", text).map(|sample| sample.as_millis());
        assert_eq!(millis("200ms"), Ok(200));
        assert_eq!(millis("1m"), Ok(60_000));
        assert_eq!(millis("0s"), Ok(0));
        for text in ["", "-1s", "5", "61s", "a"] {
            assert!(millis(text).is_err(), "{text}");
        }
    }
}
