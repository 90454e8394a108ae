//! What a guest reported, and all guests side by side.

use std::{
    collections::{BTreeMap, btree_map},
    fmt, mem,
    time::Duration,
};

use super::{
    features::FeatureTable,
    guest::{BUSY, MARK},
    kernel::Release,
};

/// What one guest reported.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    booted: bool,
    tier: String,
    /// By tier and name of the test.
    tests: BTreeMap<(String, String), Verdict>,
    /// A line that the guest broke into to say that it is at work, until there.
    interrupted: String,
    /// The test whose output is being read.
    speaking: Option<(String, String)>,
    /// The next line of it says why it failed.
    reason_follows: bool,
    /// Instructions that the verifier walked through, by program.
    verified: BTreeMap<String, u32>,
    /// What `nucnet-ctl doctor` finds amiss.
    findings: Vec<String>,
    /// Tests that failed and ran again, and why they failed at first.
    repeated: Vec<String>,
    /// What kept the guest from doing all it should.
    notes: Vec<String>,
    /// How long it was given, if that was not enough.
    limit: Option<Duration>,
}

/// How a test ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    Passed,
    Skipped(String),
    /// With the reason in a line, empty while it is not known.
    Failed(String),
}

/// What comes before it on a line of the console in which the guest says that it is at work: mostly
/// nothing, or else the half of a line that it broke into.
pub(super) fn before_breath(line: &str) -> Option<&str> {
    let (before, ours) = line.split_once(MARK)?;
    ours.starts_with(BUSY).then_some(before)
}

impl Outcome {
    /// Takes a line of the console.
    pub(super) fn line(&mut self, line: &str) {
        if let Some(before) = before_breath(line) {
            self.interrupted.push_str(before);
            return;
        }
        let line = &(mem::take(&mut self.interrupted) + line);
        if let Some((_, ours)) = line.split_once(MARK) {
            self.speaking = None;
            match ours.split_once(' ') {
                Some(("boot", _)) => self.booted = true,
                Some(("tier", name)) => self.tier = name.to_owned(),
                Some(("doctor", finding)) => self.findings.push(finding.to_owned()),
                Some(("error", reason)) => self.note(reason.to_owned()),
                _ => {}
            }
        } else if let Some(name) = line
            .strip_prefix("---- ")
            .and_then(|it| it.strip_suffix(" ----"))
        {
            let name = name.trim_end_matches(" stdout");
            self.speaking = Some((self.tier.clone(), name.to_owned()));
        } else if let Some((name, verdict)) = line
            .strip_prefix("test ")
            .and_then(|it| it.rsplit_once(" ... "))
        {
            let verdict = match verdict.split_once(' ').unwrap_or((verdict, "")) {
                ("ok", _) => Verdict::Passed,
                ("ignored", reason) => {
                    let reason = reason.trim_matches(['(', ')', ',', ' ']);
                    Verdict::Skipped(reason.trim_start_matches("skipped: ").to_owned())
                }
                _ => Verdict::Failed(String::new()),
            };
            let name = name.trim();
            let before = self
                .tests
                .insert((self.tier.clone(), name.to_owned()), verdict);
            if let Some(Verdict::Failed(reason)) = before {
                self.repeated.push(format!("{name} failed once: {reason}"));
            }
        } else if let Some((program, count)) = verified(line) {
            self.verified.insert(program.to_owned(), count);
        } else if let Some(test) = &self.speaking
            && let Some(verdict) = self.tests.get_mut(test)
        {
            spoken(verdict, &mut self.reason_follows, line.trim());
        }
    }

    /// Adds something that went wrong.
    pub(super) fn note(&mut self, note: String) {
        self.notes.push(note);
    }

    /// Reads what a guest has said before.
    pub(super) fn read(log: &str) -> Self {
        let mut outcome = Self::default();
        log.lines().for_each(|line| outcome.line(line));
        outcome
    }

    /// The tests of a tier, by name, and how each ended.
    pub(super) fn of_tier<'a>(
        &'a self,
        tier: &'a str,
    ) -> impl Iterator<Item = (&'a str, &'a Verdict)> {
        let tests = self.tests.iter();
        tests
            .filter(move |((of, _), _)| of == tier)
            .map(|((_, name), verdict)| (name.as_str(), verdict))
    }

    /// Whether the kernel came up.
    pub(super) fn booted(&self) -> bool {
        self.booted
    }

    /// Notes that it was ended at work, for it took longer than it may.
    pub(super) fn run_out(&mut self, limit: Duration) {
        self.limit = Some(limit);
    }

    /// Whether all tests ran, and none failed.
    pub(super) fn passed(&self) -> bool {
        !self.failed() && self.limit.is_none()
    }

    /// Whether anything went wrong but the time.
    pub(super) fn failed(&self) -> bool {
        let mut verdicts = self.tests.values();
        let ran = self.booted && !self.tests.is_empty();
        !self.notes.is_empty()
            || self.limit.is_none() && !ran
            || verdicts.any(|verdict| matches!(verdict, Verdict::Failed(_)))
    }

    /// Whether a test of that tier ran whose name contains `part`, or the time was too short.
    pub(super) fn has_run(&self, tier: &str, part: &str) -> bool {
        let mut tests = self.tests.keys();
        self.limit.is_some() || tests.any(|(of, name)| of == tier && name.contains(part))
    }
}

/// A line in which a test says how many instructions of a program the verifier walked through.
fn verified(line: &str) -> Option<(&str, u32)> {
    let (program, count) = line.strip_prefix("verified: ")?.split_once(' ')?;
    Some((program, count.parse().ok()?))
}

/// Takes a line that a test has printed. Why it failed is what `nucnet-ctl` said on its
/// standard error, or else what the scenario or the panic says went wrong, or else the first
/// line.
fn spoken(verdict: &mut Verdict, reason_follows: &mut bool, line: &str) {
    match verdict {
        Verdict::Passed => {
            if let Some(reason) = line.strip_prefix("skipped: ") {
                *verdict = Verdict::Skipped(reason.to_owned());
            }
        }
        Verdict::Failed(reason) => {
            if line == "what went wrong:" || line.starts_with("thread '") {
                *reason_follows = true;
            } else if !line.is_empty() && (*reason_follows || reason.is_empty()) {
                *reason_follows = false;
                *reason = line.to_owned();
            } else if let Some(complaint) = line.strip_prefix("stderr: ") {
                *reason = complaint.to_owned();
            }
        }
        Verdict::Skipped(_) => {}
    }
}

/// Kernels side by side.
#[derive(Default)]
pub(super) struct Table {
    columns: Vec<(&'static Release, Outcome)>,
}

impl Table {
    /// One kernel alone.
    pub(super) fn of(release: &'static Release, outcome: Outcome) -> Self {
        Self {
            columns: vec![(release, outcome)],
        }
    }

    /// What is seen of each feature.
    pub(super) fn features(&self) -> FeatureTable<'_> {
        FeatureTable(&self.columns)
    }

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

    /// A line for each thing that any kernel has, with what each has of it.
    fn grid<'a, Name: Ord + 'a, Cell: 'a>(
        &'a self,
        f: &mut fmt::Formatter<'_>,
        title: &str,
        things: impl Fn(&'a Outcome) -> btree_map::Iter<'a, Name, Cell>,
        name: impl Fn(&Name) -> String,
        cell: impl Fn(&Cell) -> String,
    ) -> fmt::Result {
        let mut rows: BTreeMap<&Name, Vec<Option<&Cell>>> = BTreeMap::new();
        for (at, (_, outcome)) in self.columns.iter().enumerate() {
            for (thing, value) in things(outcome) {
                let row = rows.entry(thing);
                row.or_insert_with(|| vec![None; self.columns.len()])[at] = Some(value);
            }
        }
        let names = rows.keys().map(|thing| name(thing).len());
        let width = names.chain([title.len()]).max().unwrap_or(0);
        write!(f, "{title:width$}")?;
        for (release, _) in &self.columns {
            write!(f, "  {:>7}", release.name)?;
        }
        writeln!(f)?;
        for (thing, row) in rows {
            write!(f, "{:width$}", name(thing))?;
            for value in row {
                write!(f, "  {:>7}", value.map_or("-".to_owned(), &cell))?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}

impl fmt::Display for Table {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.grid(
            f,
            "test",
            |it| it.tests.iter(),
            |(tier, name)| format!("{tier} {name}"),
            |verdict| match verdict {
                Verdict::Passed => "ok".to_owned(),
                Verdict::Skipped(_) => "skipped".to_owned(),
                Verdict::Failed(_) => "FAILED".to_owned(),
            },
        )?;
        writeln!(f)?;
        self.grid(
            f,
            "instructions verified",
            |it| it.verified.iter(),
            String::clone,
            u32::to_string,
        )?;
        writeln!(f)?;
        for (release, outcome) in &self.columns {
            let mut reasons: BTreeMap<(&str, &str), Vec<&str>> = BTreeMap::new();
            for ((_, name), verdict) in &outcome.tests {
                match verdict {
                    Verdict::Passed => {}
                    Verdict::Skipped(reason) => {
                        reasons.entry(("skipped", reason)).or_default().push(name);
                    }
                    Verdict::Failed(reason) => {
                        reasons.entry(("failed", reason)).or_default().push(name);
                    }
                }
            }
            for ((what, reason), tests) in reasons {
                let first = tests.first().copied().unwrap_or_default();
                let others = match tests.len() {
                    1 => String::new(),
                    count => format!(" and {} more", count - 1),
                };
                writeln!(f, "{}: {first}{others} {what}: {reason}", release.name)?;
            }
            if !outcome.booted {
                writeln!(f, "{}: it did not boot", release.name)?;
            }
            for finding in &outcome.findings {
                writeln!(f, "{}: doctor: {finding}", release.name)?;
            }
            for note in outcome.repeated.iter().chain(&outcome.notes) {
                writeln!(f, "{}: {note}", release.name)?;
            }
            if let Some(limit) = outcome.limit {
                let limit = limit.as_secs();
                writeln!(f, "{}: it was not done within {limit} s", release.name)?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn outcome(console: &str) -> Outcome {
        Outcome::read(console)
    }

    fn verdict(outcome: &Outcome, name: &str) -> Option<Verdict> {
        outcome
            .tests
            .get(&("t".to_owned(), name.to_owned()))
            .cloned()
    }

    #[test]
    fn verdicts_come_with_their_reasons() {
        let outcome = outcome(
            "@@ boot 6.1.0\n@@ tier t\n\
             test a ... ok\n\
             test b ... ok\n\
             test c ... FAILED\n\
             test d        ... ignored (skipped: no program ethtool)\n\
             test e ... FAILED\n\
             ---- b stdout ----\n\
             skipped: not here\n\
             ---- c stdout ----\n\
             thread 'c' (9) panicked at a.rs:1:1:\n\
             left is not right\n\
             note: backtrace\n\
             ---- e ----\n\
             a title\n\
             what went wrong:\n\
             expected exit code 0\n\
             stderr: error: no such program\n",
        );
        assert!(outcome.booted());
        assert!(!outcome.passed());
        assert_eq!(verdict(&outcome, "a"), Some(Verdict::Passed));
        assert_eq!(
            verdict(&outcome, "b"),
            Some(Verdict::Skipped("not here".to_owned()))
        );
        assert_eq!(
            verdict(&outcome, "c"),
            Some(Verdict::Failed("left is not right".to_owned()))
        );
        let skipped = Verdict::Skipped("no program ethtool".to_owned());
        assert_eq!(verdict(&outcome, "d"), Some(skipped));
        let failed = Verdict::Failed("error: no such program".to_owned());
        assert_eq!(verdict(&outcome, "e"), Some(failed));
    }

    #[test]
    fn guest_that_says_it_is_at_work_interrupts_no_test() {
        let outcome = outcome(
            "@@ boot 6.1.0\n@@ tier t\n\
             test a ... FAILED\n\
             ---- a stdout ----\n\
             @@ busy at work for 60 s of processor time\n\
             left is not right\n",
        );
        let failed = Verdict::Failed("left is not right".to_owned());
        assert_eq!(verdict(&outcome, "a"), Some(failed));
    }

    #[test]
    fn verdict_that_the_guest_broke_into_is_read_all_the_same() {
        let outcome = outcome(
            "@@ boot 6.1.0\n@@ tier t\n\
             test a ... @@ busy at work for 60 s of processor time\n\
             ok\n",
        );
        assert_eq!(verdict(&outcome, "a"), Some(Verdict::Passed));
    }

    #[test]
    fn test_that_failed_counts_as_it_ends_the_second_time() {
        let outcome = outcome(
            "@@ boot 6.1.0\n@@ tier t\n\
             test a ... FAILED\n\
             ---- a ----\n\
             not within 5s\n\
             @@ end t a: exit status: 101\n\
             test a ... ok\n",
        );
        assert_eq!(verdict(&outcome, "a"), Some(Verdict::Passed));
        assert_eq!(outcome.repeated, ["a failed once: not within 5s"]);
    }

    #[test]
    fn what_the_verifier_walked_through_stands_beside_what_it_did_elsewhere() {
        let mut table = Table::default();
        for (kernel, console) in [
            (
                "6.1",
                "@@ boot 6.1.0\n@@ tier t\nverified: from_host 23014\n",
            ),
            ("5.10", "@@ boot 5.10.0\n"),
        ] {
            let release = Release::named(kernel).expect("a kernel");
            table.add(release, outcome(console));
        }
        let text = table.to_string();
        let row = text.lines().find(|line| line.starts_with("from_host "));
        let words = row.expect("a row").split_whitespace();
        assert_eq!(words.collect::<Vec<_>>(), ["from_host", "23014", "-"]);
    }

    #[test]
    fn guest_without_tests_has_not_passed() {
        assert!(!outcome("@@ boot 6.1.0\n").passed());
    }
}
