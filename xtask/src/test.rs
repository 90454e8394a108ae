//! `cargo xtask test`: everything that must hold before a change goes in.
//!
//! A stage that fails does not keep the next ones from running; what failed is printed at
//! once, all output is kept in `target/test-logs`.

use std::{
    fs::{self, File},
    io::{BufWriter, Write as _},
    path::PathBuf,
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::{self, Consent, Tool, tool},
    object::{self, Agreement},
    progress::{Seconds, Step},
    run,
    toolchain::Toolchain,
    vm::{self, Compact},
    workspace::{OBJECT_VARIABLE, Profile, Workspace},
};

/// What the tests of the loaded programs run.
const TOOLS: [Tool; 10] = [
    tool::BPFTOOL,
    tool::CURL,
    tool::DIG,
    tool::ETHTOOL,
    tool::IP,
    tool::IPERF3,
    tool::IPTABLES,
    tool::NFT,
    tool::PING,
    tool::TRACEROUTE,
];

/// The package with the lab, the packet tables and the scenarios.
const TESTS: &str = "nucnet-tests";

/// All packages that are tested by themselves.
const UNIT_TESTS: [&str; 5] = [
    "--workspace",
    "--exclude",
    "nucnet-ebpf",
    "--exclude",
    TESTS,
];

/// Which packages are built together when that one is tested: cargo builds their dependencies
/// again for every other choice.
pub(crate) fn packages(package: &'static str) -> Vec<&'static str> {
    match package {
        TESTS => vec!["--package", TESTS],
        _ => UNIT_TESTS.to_vec(),
    }
}

/// Run all checks and tests
///
/// As root, everything. Otherwise what needs no root; the rest says that it is skipped.
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Run the slow tests too
    #[arg(long)]
    full: bool,
    /// Run only tests whose name contains this, and no other checks
    filter: Option<String>,
}

/// Runs the verb.
pub(crate) fn main(workspace: &Workspace, consent: Consent, arguments: &Arguments) -> Result<()> {
    if apt::is_root() {
        apt::ensure_tools(&TOOLS, "the tests", consent)?;
    }
    let toolchain = Toolchain::ensure(workspace, consent)?;
    let record = object::build(workspace, &toolchain)?;
    let agreement = object::compare(workspace, &record)?;
    // What is under test is the object of these sources, whatever is committed.
    let rebuilt = (agreement != Agreement::Same).then(|| object::built(workspace));
    let ctl = workspace.build_ctl(Profile::Debug, rebuilt.as_deref())?;
    let microvm = match apt::is_root() {
        true => vm::prepare_microvm(workspace, consent)
            .inspect_err(|error| eprintln!("no microVM to test with: {error:#}"))
            .ok(),
        false => None,
    };

    let mut session = Session {
        workspace,
        rebuilt,
        ctl,
        microvm,
        arguments,
        stages: Vec::new(),
    };
    if arguments.filter.is_none() {
        session.check(
            "format",
            workspace
                .cargo("fmt")
                .args(["--all", "--", "--check", "--color", "never"]),
        )?;
        let mut clippy = session.cargo("clippy");
        clippy.args([
            "--workspace",
            "--exclude",
            "nucnet-ebpf",
            "--all-targets",
            "--locked",
        ]);
        session.check("clippy", clippy.args(["--", "--deny", "warnings"]))?;
        let mut clippy = toolchain.clippy(workspace, consent)?;
        session.check(
            "clippy, BPF programs",
            clippy.args(["--", "--deny", "warnings"]),
        )?;
        session.agreement(agreement, &record.rustc);
    }
    session.tests()?;
    if arguments.filter.is_none() {
        match arguments.full {
            true => session.kernels(consent),
            false => session.old_kernel(consent),
        }
    }
    session.summary()
}

/// One run of the verb.
struct Session<'a> {
    workspace: &'a Workspace,
    /// The object under test, unless it is the committed one.
    rebuilt: Option<PathBuf>,
    /// The `nucnet-ctl` under test.
    ctl: PathBuf,
    /// What boots a microVM, if anything can.
    microvm: Option<PathBuf>,
    arguments: &'a Arguments,
    stages: Vec<Stage>,
}

/// A stage that is over.
struct Stage {
    title: String,
    took: Duration,
    count: Count,
}

/// Outcomes of single tests; a check is one.
#[derive(Clone, Copy, Default)]
struct Count {
    passed: usize,
    failed: usize,
    skipped: usize,
}

impl Session<'_> {
    fn cargo(&self, verb: &str) -> Command {
        let mut command = self.workspace.cargo(verb);
        // The same for every verb, or each would build all over again.
        if let Some(object) = &self.rebuilt {
            command.env(OBJECT_VARIABLE, object);
        }
        command
    }

    /// A stage that passes or fails as a whole.
    fn check(&mut self, title: &str, command: &mut Command) -> Result<()> {
        let mut output = Vec::new();
        let step = Step::start(title);
        let status = run::lines(command, |line| {
            step.note(line);
            if !is_uneventful(line) {
                output.push(line.to_owned());
            }
        })?;
        self.end(title, step, Count::of(status.success()), &output);
        Ok(())
    }

    fn agreement(&mut self, agreement: Agreement, rustc: &str) {
        let title = "committed BPF object is that of its sources";
        let step = Step::start(title);
        let (count, explanation) = match agreement {
            Agreement::Same => (Count::of(true), Vec::new()),
            Agreement::Stale => (
                Count::of(false),
                vec!["It is older than they are: cargo xtask build --update-object".to_owned()],
            ),
            Agreement::OtherTools => {
                eprintln!(
                    "skipped: the committed object comes from another compiler than {rustc};\n\
                     the tests run on the object that this one has built"
                );
                (
                    Count {
                        skipped: 1,
                        ..Count::default()
                    },
                    Vec::new(),
                )
            }
        };
        self.end(title, step, count, &explanation);
    }

    fn tests(&mut self) -> Result<()> {
        let mut unit = self.cargo("test");
        unit.args(UNIT_TESTS);
        self.test("unit tests", unit)?;

        let packages = &self.workspace.metadata.packages;
        let package = packages
            .iter()
            .find(|package| package.name.as_str() == TESTS)
            .with_context(|| format!("no package {TESTS} in the workspace"))?;
        let tiers = package.targets.iter().filter(|target| target.is_test());
        let tiers: Vec<_> = tiers.map(|target| target.name.clone()).collect();
        // Building one test builds the package's programs too, which the lab starts.
        for tier in &tiers {
            let mut command = self.cargo("test");
            command.args(["--package", TESTS]).args(["--test", tier]);
            self.test(tier, command)?;
        }
        Ok(())
    }

    /// A few tests on an old kernel.
    fn old_kernel(&mut self, consent: Consent) {
        let title = "an old kernel, emulated";
        let step = Step::start(title);
        let mut output = Vec::new();
        let skipped = |reason: String| {
            eprintln!("skipped: {title}: {reason}");
            Count {
                skipped: 1,
                ..Count::default()
            }
        };
        let count = match vm::compact(self.workspace, consent, self.rebuilt.as_deref()) {
            Ok(Compact::Passed(_)) => Count::of(true),
            Ok(Compact::Skipped(reason)) => skipped(reason),
            Ok(Compact::Failed(report)) => {
                output.push(report);
                Count::of(false)
            }
            Err(error) => skipped(format!("{error:#}")),
        };
        self.end(title, step, count, &output);
    }

    /// The kernels that must pass.
    fn kernels(&mut self, consent: Consent) {
        let title = "Debian's kernels";
        let step = Step::start(title);
        let outcome = vm::main(self.workspace, consent, &vm::Arguments::default());
        let failure = outcome.as_ref().err().map(|error| format!("{error:#}"));
        self.end(title, step, Count::of(outcome.is_ok()), failure.as_slice());
    }

    /// A stage of tests: those of one `cargo test`.
    fn test(&mut self, title: &str, mut command: Command) -> Result<()> {
        command
            .args(["--locked", "--no-fail-fast", "--", "--show-output"])
            .args(self.arguments.full.then_some("--include-ignored"))
            .args(&self.arguments.filter)
            .env("NUCNET_CTL", &self.ctl)
            .envs(self.microvm.iter().map(|path| ("NUCNET_MICROVM", path)));
        let log = self
            .workspace
            .target
            .join("test-logs")
            .join(title.replace(' ', "-") + ".log");
        fs::create_dir_all(log.parent().context("the log has no directory")?)?;
        let mut log = BufWriter::new(File::create(&log)?);

        let step = Step::start(title);
        let mut report = Report::default();
        let status = run::lines(&mut command, |line| {
            step.note(line);
            report.line(line);
            // The log is a convenience: a full disk shows in the tests soon enough.
            let _ = writeln!(log, "{line}");
        })?;
        let mut count = report.count();
        if !status.success() && count.failed == 0 {
            // It did not build, or died of a signal.
            count.failed = 1;
        }
        for line in report.skipped.iter().chain(&report.partly) {
            eprintln!("  {line}");
        }
        self.end(title, step, count, &report.failures);
        Ok(())
    }

    fn end(&mut self, title: &str, step: Step, count: Count, output: &[String]) {
        let took = if count.failed == 0 {
            step.done()
        } else {
            for line in output {
                eprintln!("{line}");
            }
            step.failed()
        };
        self.stages.push(Stage {
            title: title.to_owned(),
            took,
            count,
        });
    }

    fn summary(&self) -> Result<()> {
        println!();
        let mut total = Count::default();
        for Stage { title, took, count } in &self.stages {
            println!("{}  {title}: {count}", Seconds(*took));
            total.passed += count.passed;
            total.failed += count.failed;
            total.skipped += count.skipped;
        }
        println!(
            "{} passed, {} failed, {} skipped",
            total.passed, total.failed, total.skipped
        );
        if total.failed > 0 {
            bail!("{} failed", total.failed);
        }
        Ok(())
    }
}

impl Count {
    fn of(passed: bool) -> Self {
        Self {
            passed: passed.into(),
            failed: (!passed).into(),
            skipped: 0,
        }
    }
}

impl std::fmt::Display for Count {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} passed", self.passed)?;
        if self.failed > 0 {
            write!(f, ", {} failed", self.failed)?;
        }
        if self.skipped > 0 {
            write!(f, ", {} skipped", self.skipped)?;
        }
        Ok(())
    }
}

/// What is read out of the output of `cargo test`, one line at a time.
#[derive(Default)]
struct Report {
    counted: Count,
    /// What did not run, with the reason, whether the harness knows or only the test said so.
    skipped: Vec<String>,
    /// Tests that said so. The harness takes them for passed.
    taken_for_passed: usize,
    /// The test whose output is being read, unless that was noted as skipped.
    title: Option<String>,
    /// Lines in which a test that ran says what of it could not.
    partly: Vec<String>,
    /// What failed and how.
    failures: Vec<String>,
    part: Part,
}

/// Parts of a harness's output.
#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum Part {
    /// Building, or one line a test.
    #[default]
    Running,
    /// Output of tests that passed.
    Successes,
    /// Output of tests that failed.
    Failures,
}

impl Report {
    fn line(&mut self, line: &str) {
        if self.part == Part::Successes {
            self.line_of_success(line);
        }
        if let Some((name, reason)) = ignored(line) {
            self.skipped.push(format!("skipped: {name}: {reason}"));
        }
        match line {
            "successes:" => self.part = Part::Successes,
            "failures:" => self.part = Part::Failures,
            _ => {}
        }
        if let Some(result) = line.strip_prefix("test result: ") {
            self.part = Part::Running;
            let number = |what: &str| -> usize {
                let mut fields = result.split(['.', ';']);
                let field = fields.find_map(|field| field.trim().strip_suffix(what));
                field
                    .and_then(|number| number.trim().parse().ok())
                    .unwrap_or(0)
            };
            self.counted.passed += number("passed");
            self.counted.failed += number("failed");
            self.counted.skipped += number("ignored");
        }
        let wanted = match self.part {
            Part::Running => !is_uneventful(line),
            Part::Successes => false,
            Part::Failures => true,
        };
        if wanted {
            self.failures.push(line.to_owned());
        }
    }

    /// What a test says that the harness takes for passed.
    fn line_of_success(&mut self, line: &str) {
        if let Some(title) = line.strip_prefix("---- ") {
            self.title = title.strip_suffix(" stdout ----").map(str::to_owned);
        }
        if let Some(reason) = line.strip_prefix("skipped: ")
            && let Some(title) = self.title.take()
        {
            self.skipped.push(format!("skipped: {title}: {reason}"));
            self.taken_for_passed += 1;
        }
        if line.starts_with("skipped in part: ") {
            self.partly.push(line.to_owned());
        }
    }

    fn count(&self) -> Count {
        Count {
            passed: self.counted.passed.saturating_sub(self.taken_for_passed),
            skipped: self.counted.skipped + self.taken_for_passed,
            ..self.counted
        }
    }
}

/// The test that a harness says it ignores, and why. Rust's own gives the reason behind a comma,
/// that of the scenarios in brackets, and none where slow ones were not asked for.
fn ignored(line: &str) -> Option<(&str, &str)> {
    let (name, reason) = line.strip_prefix("test ")?.split_once(" ... ignored")?;
    let reason = match reason.strip_prefix(", ") {
        Some(reason) => reason,
        None if reason.is_empty() => "slow: --full runs it",
        None => reason.strip_prefix(" (")?.strip_suffix(')')?,
    };
    let reason = reason.strip_prefix("skipped: ").unwrap_or(reason);
    Some((name.trim_end(), reason))
}

/// Whether a line only says that things go their way.
fn is_uneventful(line: &str) -> bool {
    const STARTS: [&str; 7] = [
        "test ",
        "running ",
        "     Running ",
        "   Doc-tests ",
        "   Compiling ",
        "    Checking ",
        "    Finished ",
    ];
    line.is_empty() || STARTS.iter().any(|start| line.starts_with(start))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report(output: &str) -> Report {
        let mut report = Report::default();
        output.lines().for_each(|line| report.line(line));
        report
    }

    /// The report of a test `b` that says that, beside one that passes and says nothing.
    fn report_of_one_that_says(lines: &str) -> Report {
        report(&format!(
            "running 2 tests\ntest a ... ok\ntest b ... ok\n\n\
             successes:\n\n---- b stdout ----\n{lines}\n\nsuccesses:\n    a\n    b\n\n\
             test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        ))
    }

    #[test]
    fn test_that_says_skipped_does_not_count_as_passed() {
        let report = report_of_one_that_says("skipped: not root\nskipped: nor anything else\n");
        let count = report.count();
        assert_eq!((count.passed, count.failed, count.skipped), (1, 0, 1));
        assert_eq!(report.skipped, ["skipped: b: not root"]);
        assert!(report.failures.is_empty(), "{:?}", report.failures);
    }

    #[test]
    fn test_that_says_skipped_in_part_counts_and_is_told() {
        let report = report_of_one_that_says("skipped in part: no bpftool\n");
        assert_eq!((report.count().passed, report.count().skipped), (2, 0));
        assert_eq!(report.partly, ["skipped in part: no bpftool"]);
    }

    #[test]
    fn test_that_its_harness_ignores_is_told_with_the_reason() {
        let report = report(
            "running 4 tests\n\
             test a ... ignored, slow: takes a minute\n\
             test b ... ignored, skipped: part of another test\n\
             test c ... ignored (skipped: no IPv6)\n\
             test d ... ignored\n\
             \n\
             test result: ok. 0 passed; 0 failed; 4 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        assert_eq!((report.count().passed, report.count().skipped), (0, 4));
        assert_eq!(
            report.skipped,
            [
                "skipped: a: slow: takes a minute",
                "skipped: b: part of another test",
                "skipped: c: no IPv6",
                "skipped: d: slow: --full runs it",
            ]
        );
        assert!(report.failures.is_empty(), "{:?}", report.failures);
    }

    #[test]
    fn failures_are_kept_with_their_output() {
        let report = report(
            "running 1 test\n\
             test a ... FAILED\n\
             \n\
             failures:\n\
             \n\
             ---- a stdout ----\n\
             left is not right\n\
             \n\
             test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s\n",
        );
        assert_eq!(report.count().failed, 1);
        assert!(
            report
                .failures
                .iter()
                .any(|line| line == "left is not right")
        );
    }

    #[test]
    fn compiler_errors_are_kept() {
        let report = report("   Compiling a v0.1.0\nerror[E0425]: cannot find value `b`\n");
        assert_eq!(report.failures, ["error[E0425]: cannot find value `b`"]);
    }
}
