//! `cargo xtask vm`: the tests of the loaded programs on Debian's kernels.
//!
//! Each kernel is booted under QEMU, emulated: it needs no `/dev/kvm`, no root and no image,
//! and takes seconds. The guest is an initramfs with this very program as init ([`guest`]),
//! the test programs, and what they run. QEMU and the kernels are unpacked into
//! `target/vm`; nothing is installed. Of the same parts is the microVM that scenarios boot
//! ([`microvm`]).

mod features;
pub(crate) mod guest;
mod initramfs;
mod kernel;
mod microvm;
mod outcome;
mod qemu;

use std::{
    env, fs,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    apt::{self, Consent, tool},
    run, test,
    workspace::{OBJECT_VARIABLE, Profile, Workspace},
};
use kernel::Kernel;
pub(crate) use microvm::prepare as prepare_microvm;
use outcome::{Outcome, Table};
use qemu::Qemu;

/// Test programs that depend on the kernel: package and target.
const TIERS: [(&str, &str); 4] = [
    ("nucnet-ctl", "bpf"),
    ("nucnet-ctl", "netlink"),
    ("nucnet-tests", "programs"),
    ("nucnet-tests", "scenarios"),
];

/// What `cargo xtask test` runs on [`OLD`]: of these tiers, the tests whose names contain these.
/// Every test loads the programs, which takes an emulated verifier seconds, but for those of the
/// tier `programs`, which all have the same.
const COMPACT: [(&str, &[&str]); 3] = [
    (
        "bpf",
        &[
            "first_use_pins_every_map_and_program",
            "endpoint_program_attaches_and_detaches_as_often_as_one_likes",
            "filter_of_a_kernel_without_tcx_is_kept_and_removed_with_its_qdisc",
        ],
    ),
    ("programs", &["published"]),
    // Each by both datapaths.
    (
        "scenarios",
        &[
            "remote_client_reaches_a_publish_and_keeps_its_address::v4",
            "outside_sees_the_uplinks_address::v4",
            "explain_follows_a_packet_from_outside_to_a_publish::v6",
        ],
    ),
];

/// The test of `bpf` that tells what the verifier walks through.
const VERIFIED: &str = "no_program_takes_much_longer_to_verify_than_it_did";

/// The kernel that `cargo xtask test` boots.
const OLD: &str = "5.10";

/// How long the guest of `cargo xtask test` may take, which is done in two minutes or three if
/// nobody else wants the processors.
const COMPACT_LIMIT: Duration = Duration::from_secs(600);

/// How long any other guest may take.
const LIMIT: Duration = Duration::from_secs(6 * 3600);

/// Run the tests of the loaded programs on other kernels, under QEMU
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Kernels of Debian: 5.10, 6.1, 6.12
    #[arg(default_values = DEFAULT)]
    kernels: Vec<String>,
    /// Run only tests whose name contains this; may be given several times
    #[arg(long = "filter")]
    filters: Vec<String>,
    /// Run only these tiers of tests: bpf, netlink, programs, scenarios [default: all]
    #[arg(long = "tier")]
    tiers: Vec<String>,
    /// Run what `cargo xtask test` runs: a few tests on one old kernel
    #[arg(long, exclusive = true)]
    compact: bool,
    /// Run one or two scenarios of every feature; what comes of them is a table
    #[arg(long, conflicts_with_all = ["filters", "tiers"])]
    features: bool,
    /// Boot nothing: read what the guests said the last time
    #[arg(long)]
    again: bool,
}

/// The kernels that are run unless others are named.
const DEFAULT: [&str; 2] = ["6.1", "5.10"];

impl Default for Arguments {
    fn default() -> Self {
        Self {
            kernels: DEFAULT.map(str::to_owned).to_vec(),
            filters: Vec::new(),
            tiers: Vec::new(),
            compact: false,
            features: false,
            again: false,
        }
    }
}

/// Runs the verb, on the committed object.
pub(crate) fn main(workspace: &Workspace, consent: Consent, arguments: &Arguments) -> Result<()> {
    if arguments.compact {
        match compact(workspace, consent, None)? {
            Compact::Passed(report) => println!("\n{report}"),
            Compact::Skipped(reason) => println!("skipped: {reason}"),
            Compact::Failed(report) => bail!("failed on {OLD}\n{report}"),
        }
        return Ok(());
    }
    let wanted = arguments
        .kernels
        .iter()
        .map(|name| kernel::Release::named(name));
    let wanted = wanted.collect::<Result<Vec<_>>>()?;
    let mut table = Table::default();
    if arguments.again {
        for release in wanted {
            let log = log_of(&cache(workspace), release);
            let said = fs::read_to_string(&log)
                .with_context(|| format!("cannot read {}", log.display()))?;
            table.add(release, Outcome::read(&said));
        }
    } else {
        let tiers = match arguments.features {
            true => {
                let scenarios: Vec<_> = features::scenarios().collect();
                vec![
                    Tier::named("bpf", &[VERIFIED])?,
                    Tier::named(features::TIER, &scenarios)?,
                ]
            }
            false => tiers(&arguments.tiers, &arguments.filters)?,
        };
        let machine = Machine::ensure(workspace, consent)?;
        let programs = programs(workspace, &tiers, None)?;
        for release in wanted {
            let kernel = Kernel::ensure(&machine.cache, release)?;
            let mut outcome = machine.boot(release, &kernel, &programs, LIMIT)?;
            note_missing(&mut outcome, &tiers);
            table.add(release, outcome);
        }
    }
    println!("\n{table}");
    if arguments.features {
        println!("{}", table.features());
    }
    let failed = table.unmet();
    if !failed.is_empty() {
        bail!("failed on {}, which must pass", failed.join(", "));
    }
    Ok(())
}

/// How the tests on an old kernel ended.
pub(crate) enum Compact {
    /// All passed; with what the guest reported.
    Passed(String),
    /// The same.
    Failed(String),
    /// They did not run, or not to their end, and why.
    Skipped(String),
}

/// Runs a few tests on an old kernel; `object` is the one under test, by default the committed
/// one.
pub(crate) fn compact(
    workspace: &Workspace,
    consent: Consent,
    object: Option<&Path>,
) -> Result<Compact> {
    let release = kernel::Release::named(OLD)?;
    // A mirror that is away says nothing about the tests.
    let fetched = Machine::ensure(workspace, consent).and_then(|machine| {
        let kernel = Kernel::ensure(&machine.cache, release)?;
        Ok((machine, kernel))
    });
    let (machine, kernel) = match fetched {
        Ok(fetched) => fetched,
        Err(error) => return Ok(Compact::Skipped(format!("{error:#}"))),
    };
    let tiers = COMPACT.map(|(name, filters)| Tier::named(name, filters));
    let tiers = tiers.into_iter().collect::<Result<Vec<_>>>()?;
    let programs = programs(workspace, &tiers, object)?;
    let mut outcome = machine.boot(release, &kernel, &programs, COMPACT_LIMIT)?;
    if !outcome.booted() {
        // Nor does an emulator that cannot boot it.
        return Ok(Compact::Skipped(Table::of(release, outcome).to_string()));
    }
    note_missing(&mut outcome, &tiers);
    Ok(if outcome.passed() {
        Compact::Passed(Table::of(release, outcome).to_string())
    } else if outcome.failed() {
        Compact::Failed(Table::of(release, outcome).to_string())
    } else {
        let limit = COMPACT_LIMIT.as_secs();
        Compact::Skipped(format!("the guest was not done within {limit} s"))
    })
}

/// Notes what was to run and is not there: a test that got another name, say.
fn note_missing(outcome: &mut Outcome, tiers: &[Tier]) {
    for tier in tiers {
        for filter in &tier.filters {
            if !outcome.has_run(tier.target, filter) {
                outcome.note(format!("no test of {} is called {filter}", tier.target));
            }
        }
    }
}

/// Those of [`TIERS`] that are named; all if none is.
fn tiers(names: &[String], filters: &[String]) -> Result<Vec<Tier>> {
    let filters: Vec<_> = filters.iter().map(String::as_str).collect();
    if names.is_empty() {
        let all = TIERS.into_iter();
        return all
            .map(|(_, target)| Tier::named(target, &filters))
            .collect();
    }
    let named = names.iter();
    named.map(|name| Tier::named(name, &filters)).collect()
}

/// Tests that run in a guest.
struct Tier {
    package: &'static str,
    target: &'static str,
    /// What their names contain, one of these; all if there are none.
    filters: Vec<String>,
}

impl Tier {
    fn named(name: &str, filters: &[&str]) -> Result<Self> {
        let known = TIERS.into_iter().find(|(_, target)| *target == name);
        let (package, target) = known.with_context(|| {
            let known = TIERS.map(|(_, target)| target);
            format!("no tier {name}: there are {}", known.join(", "))
        })?;
        Ok(Self {
            package,
            target,
            filters: filters.iter().map(|&filter| filter.to_owned()).collect(),
        })
    }
}

/// What runs in the guest.
struct Programs {
    /// `nucnet-ctl` and the lab's helper, by name.
    helpers: Vec<(String, PathBuf)>,
    /// Test programs, by name, with what the names of the tests contain that they run.
    tiers: Vec<(String, PathBuf, Vec<String>)>,
}

/// Builds them, with `object` or else the committed one. The same packages together as
/// `cargo xtask test` builds, which has then built them already.
fn programs(workspace: &Workspace, tiers: &[Tier], object: Option<&Path>) -> Result<Programs> {
    let ctl = workspace.build_ctl(Profile::Debug, object)?;
    let mut programs = Programs {
        helpers: vec![("nucnet-ctl".to_owned(), ctl)],
        tiers: Vec::new(),
    };
    for tier in tiers {
        let mut build = workspace.cargo("test");
        build.args([
            "--no-run",
            "--locked",
            "--message-format=json-render-diagnostics",
        ]);
        build.args(test::packages(tier.package));
        build.args(["--test", tier.target]);
        if let Some(object) = object {
            build.env(OBJECT_VARIABLE, object);
        }
        let mut messages = String::new();
        let title = format!("building the tests ({})", tier.target);
        run::step_reading(&title, &mut build, |line| {
            let for_people = !line.starts_with('{');
            if !for_people {
                messages.push_str(line);
                messages.push('\n');
            }
            for_people
        })?;
        for message in cargo_metadata::Message::parse_stream(messages.as_bytes()) {
            let cargo_metadata::Message::CompilerArtifact(artifact) = message? else {
                continue;
            };
            let (Some(program), name) = (artifact.executable, artifact.target.name) else {
                continue;
            };
            if artifact.profile.test {
                if name == tier.target {
                    let filters = tier.filters.clone();
                    programs.tiers.push((name, program.into(), filters));
                }
            } else if programs.helpers.iter().all(|(known, _)| *known != name) {
                programs.helpers.push((name, program.into()));
            }
        }
    }
    ensure!(
        programs.tiers.len() == tiers.len(),
        "cargo has not built every tier of tests"
    );
    Ok(programs)
}

/// What guests run on.
struct Machine {
    cache: PathBuf,
    qemu: Qemu,
}

impl Machine {
    fn ensure(workspace: &Workspace, consent: Consent) -> Result<Self> {
        ensure!(
            cfg!(target_arch = "x86_64"),
            "the guests are x86-64 and this machine is not"
        );
        ensure!(
            apt::is_debian(),
            "needs apt and dpkg to fetch Debian's kernels"
        );
        apt::ensure_tools(&[tool::IP, tool::STRIP, tool::XZ], "the guests", consent)?;
        let cache = cache(workspace);
        let qemu = Qemu::ensure(&cache)?;
        Ok(Self { cache, qemu })
    }

    /// Boots a kernel and has it run the tests.
    fn boot(
        &self,
        release: &kernel::Release,
        kernel: &Kernel,
        programs: &Programs,
        limit: Duration,
    ) -> Result<Outcome> {
        let image = self.cache.join(format!("{}.cpio", release.name));
        initramfs::write(&image, kernel, programs)
            .with_context(|| format!("cannot write {}", image.display()))?;
        let log = log_of(&self.cache, release);
        let outcome = self.qemu.boot(kernel, &image, &log, limit)?;
        eprintln!("       all that the guest said: {}", log.display());
        Ok(outcome)
    }
}

/// Where emulator, kernels and what guests said are kept.
fn cache(workspace: &Workspace) -> PathBuf {
    workspace.target.join("vm")
}

/// All that the guest of that kernel said.
fn log_of(cache: &Path, release: &kernel::Release) -> PathBuf {
    cache.join(format!("{}.log", release.name))
}

/// Whether this process is the init of a guest.
pub(crate) fn is_guest() -> bool {
    std::process::id() == 1 && env::var_os("CARGO").is_none()
}
