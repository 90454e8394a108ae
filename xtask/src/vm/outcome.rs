//! What a guest reported, and all guests side by side.

use std::{collections::BTreeMap, fmt};

use super::{guest::MARK, kernel::Release};

/// What one guest reported.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    booted: bool,
    tier: String,
    /// By tier and name of the test.
    tests: BTreeMap<(String, String), Verdict>,
    /// The test whose output is being read, among the failures.
    failing: Option<(String, String)>,
    /// What kept the guest from doing all it should.
    notes: Vec<String>,
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    Skipped,
    /// With the first line of the reason, empty while it is not known.
    Failed(String),
}

impl Outcome {
    /// Takes a line of the console.
    pub(super) fn line(&mut self, line: &str) {
        if let Some((_, ours)) = line.split_once(MARK) {
            self.failing = None;
            match ours.split_once(' ') {
                Some(("boot", _)) => self.booted = true,
                Some(("tier", name)) => self.tier = name.to_owned(),
                Some(("error", reason)) => self.note(reason.to_owned()),
                _ => {}
            }
        } else if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|it| it.strip_suffix(" ----"))
        {
            let name = name.trim_end_matches(" stdout");
            self.failing = Some((self.tier.clone(), name.to_owned()));
        } else if let Some((name, verdict)) = line
            .strip_prefix("test ")
            .and_then(|it| it.rsplit_once(" ... "))
        {
            let verdict = match verdict.split(' ').next() {
                Some("ok") => Verdict::Passed,
                Some("ignored") => Verdict::Skipped,
                _ => Verdict::Failed(String::new()),
            };
            self.tests
                .insert((self.tier.clone(), name.trim().to_owned()), verdict);
        } else if let Some(test) = &self.failing
            && let Some(Verdict::Failed(reason)) = self.tests.get_mut(test)
            && reason.is_empty()
            && !line.trim().is_empty()
            && !line.starts_with("thread '")
        {
            *reason = line.trim().to_owned();
        }
    }

    /// Adds something that went wrong.
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Whether the kernel came up.
    pub(super) fn booted(&self) -> bool {
        self.booted
    }

    fn passed(&self) -> bool {
        let failed = self
            .tests
            .values()
            .any(|verdict| matches!(verdict, Verdict::Failed(_)));
        self.booted && self.notes.is_empty() && !self.tests.is_empty() && !failed
    }
}

/// Kernels side by side.
#[derive(Default)]
pub(super) struct Table {
    columns: Vec<(&'static Release, Outcome)>,
}

impl Table {
    /// Adds a kernel.
    pub(super) fn add(&mut self, release: &'static Release, outcome: Outcome) {
        self.columns.push((release, outcome));
    }

    /// Kernels that must pass and have not.
    pub(super) fn unmet(&self) -> Vec<&'static str> {
        let unmet = self
            .columns
            .iter()
            .filter(|(release, it)| release.must_pass && !it.passed());
        unmet.map(|(release, _)| release.name).collect()
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut tests: Vec<_> = self
            .columns
            .iter()
            .flat_map(|(_, it)| it.tests.keys())
            .collect();
        tests.sort();
        tests.dedup();
        let width = tests
            .iter()
            .map(|(tier, name)| tier.len() + name.len() + 1)
            .max()
            .unwrap_or(0);
        write!(f, "{:width$}", "test")?;
        for (release, _) in &self.columns {
            write!(f, "  {:>7}", release.name)?;
        }
        writeln!(f)?;
        for test @ (tier, name) in &tests {
            write!(f, "{:width$}", format!("{tier} {name}"))?;
            for (_, outcome) in &self.columns {
                let cell = match outcome.tests.get(test) {
                    Some(Verdict::Passed) => "ok",
                    Some(Verdict::Skipped) => "skipped",
                    Some(Verdict::Failed(_)) => "FAILED",
                    None => "-",
                };
                write!(f, "  {cell:>7}")?;
            }
            writeln!(f)?;
        }
        for (release, outcome) in &self.columns {
            let mut reasons: BTreeMap<&str, usize> = BTreeMap::new();
            for verdict in outcome.tests.values() {
                if let Verdict::Failed(reason) = verdict {
                    *reasons.entry(reason).or_default() += 1;
                }
            }
            for (reason, tests) in reasons {
                writeln!(f, "{}: {tests} failed: {reason}", release.name)?;
            }
            if !outcome.booted {
                writeln!(f, "{}: it did not boot", release.name)?;
            }
            for note in &outcome.notes {
                writeln!(f, "{}: {note}", release.name)?;
            }
        }
        Ok(())
    }
}
