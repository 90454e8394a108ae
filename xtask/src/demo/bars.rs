//! Bars on the terminal.

use std::fmt;

/// Length of the longest bar.
const LENGTH: f64 = 40.0;

/// A value that becomes a bar.
pub(super) struct Bar<'a> {
    /// Whose it is.
    pub(super) name: &'a str,
    /// How long the bar is, compared to the others.
    pub(super) value: f64,
    /// The value as people read it.
    pub(super) text: String,
}

/// Bars on one scale.
pub(super) struct Bars<'a>(pub(super) &'a [Bar<'a>]);

impl fmt::Display for Bars<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(bars) = self;
        let longest = bars.iter().map(|bar| bar.value).fold(0.0, f64::max);
        let width = bars.iter().map(|bar| bar.name.len()).max().unwrap_or(0);
        for bar in *bars {
            // A bar without length is a value that is there all the same.
            let length = (bar.value / longest * LENGTH).round().max(1.0);
            let drawn = "#".repeat(length as usize);
            writeln!(f, "  {:width$}  {drawn:40}  {}", bar.name, bar.text)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bars_are_as_long_as_their_values_compare() {
        let bar = |name, value| Bar {
            name,
            value,
            text: format!("{value}"),
        };
        let text = Bars(&[bar("long", 10.0), bar("half", 5.0), bar("bit", 0.001)]).to_string();
        let lengths: Vec<_> = text.lines().map(|line| line.matches('#').count()).collect();
        assert_eq!(lengths, [40, 20, 1]);
        assert!(text.lines().all(|line| line.len() <= 80), "{text}");
    }
}
