//! `cargo xtask vm`: the tests of the loaded programs on Debian's kernels.
//!
//! Each kernel is booted under QEMU, emulated: it needs no `/dev/kvm`, no root and no image,
//! and takes seconds. The guest is an initramfs with this very program as init ([`guest`]),
//! the test programs, and what they run. QEMU and the kernels are unpacked into
//! `target/vm`; nothing is installed. Of the same parts is the microVM that scenarios boot
//! ([`microvm`]).

pub(crate) mod guest;
mod initramfs;
mod kernel;
mod microvm;
mod outcome;
mod qemu;

use std::{env, path::PathBuf};

use anyhow::{Context as _, Result, bail, ensure};

use crate::{
    apt::{self, Consent, tool},
    object, run,
    workspace::{OBJECT_VARIABLE, Workspace},
};
use kernel::Kernel;
pub(crate) use microvm::prepare as prepare_microvm;
use outcome::Table;
use qemu::Qemu;

/// Test programs that depend on the kernel: package and target.
const TIERS: [(&str, &str); 4] = [
    ("nucnet-ctl", "bpf"),
    ("nucnet-ctl", "netlink"),
    ("nucnet-tests", "programs"),
    ("nucnet-tests", "scenarios"),
];

/// Run the tests of the loaded programs on other kernels, under QEMU
#[derive(clap::Args)]
pub(crate) struct Arguments {
    /// Kernels of Debian: 5.10, 6.1, 6.12
    #[arg(default_values = DEFAULT)]
    kernels: Vec<String>,
    /// Run only tests whose name contains this
    #[arg(long)]
    filter: Option<String>,
    /// Run only these tiers of tests: bpf, netlink, programs, scenarios [default: all]
    #[arg(long = "tier")]
    tiers: Vec<String>,
}

/// The kernels that are run unless others are named.
const DEFAULT: [&str; 2] = ["6.1", "5.10"];

impl Default for Arguments {
    fn default() -> Self {
        Self {
            kernels: DEFAULT.map(str::to_owned).to_vec(),
            filter: None,
            tiers: Vec::new(),
        }
    }
}

/// Runs the verb.
pub(crate) fn main(workspace: &Workspace, consent: Consent, arguments: &Arguments) -> Result<()> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "the guests are x86-64 and this machine is not"
    );
    ensure!(
        apt::is_debian(),
        "needs apt and dpkg to fetch Debian's kernels"
    );
    let wanted = arguments
        .kernels
        .iter()
        .map(|name| kernel::Release::named(name));
    let wanted = wanted.collect::<Result<Vec<_>>>()?;
    let tiers = tiers(&arguments.tiers)?;
    apt::ensure_tools(&[tool::IP, tool::XZ], "the guests", consent)?;

    let cache = workspace.target.join("vm");
    let qemu = Qemu::ensure(&cache)?;
    let programs = programs(workspace, &tiers)?;
    let mut table = Table::default();
    for release in wanted {
        let kernel = Kernel::ensure(&cache, release)?;
        let image = cache.join(format!("{}.cpio", release.name));
        initramfs::write(&image, &kernel, &programs, arguments.filter.as_deref())
            .with_context(|| format!("cannot write {}", image.display()))?;
        let log = cache.join(format!("{}.log", release.name));
        table.add(release, qemu.boot(&kernel, &image, &log)?);
        eprintln!("       all that the guest said: {}", log.display());
    }
    println!("\n{table}");
    let failed = table.unmet();
    if !failed.is_empty() {
        bail!("failed on {}, which must pass", failed.join(", "));
    }
    Ok(())
}

/// Those of [`TIERS`] that are named; all if none is.
fn tiers(names: &[String]) -> Result<Vec<(&'static str, &'static str)>> {
    let known = TIERS.map(|(_, target)| target);
    if let Some(unknown) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no tier {unknown}: there are {}", known.join(", "));
    }
    let is_wanted = |target: &str| names.is_empty() || names.iter().any(|name| name == target);
    Ok(TIERS
        .into_iter()
        .filter(|(_, target)| is_wanted(target))
        .collect())
}

/// What runs in the guest.
struct Programs {
    /// `nucnet-ctl` and the lab's helper, by name.
    helpers: Vec<(String, PathBuf)>,
    /// Test programs, by name.
    tiers: Vec<(String, PathBuf)>,
}

/// Builds them, with the object of these sources if it has been built.
fn programs(workspace: &Workspace, tiers: &[(&str, &str)]) -> Result<Programs> {
    let mut build = workspace.cargo("build");
    build.args([
        "--locked",
        "--bins",
        "--message-format=json-render-diagnostics",
    ]);
    // Every tier runs `nucnet-ctl`.
    let mut packages = vec!["nucnet-ctl"];
    packages.extend(tiers.iter().map(|(package, _)| *package));
    packages.dedup();
    build.args(packages.iter().flat_map(|package| ["--package", *package]));
    build.args(tiers.iter().flat_map(|(_, target)| ["--test", *target]));
    let object = object::built(workspace);
    if object.exists() {
        build.env(OBJECT_VARIABLE, object);
    }
    let mut messages = String::new();
    run::step_reading("building the tests", &mut build, |line| {
        let for_people = !line.starts_with('{');
        if !for_people {
            messages.push_str(line);
            messages.push('\n');
        }
        for_people
    })?;

    let mut programs = Programs {
        helpers: Vec::new(),
        tiers: Vec::new(),
    };
    for message in cargo_metadata::Message::parse_stream(messages.as_bytes()) {
        let cargo_metadata::Message::CompilerArtifact(artifact) = message? else {
            continue;
        };
        let Some(program) = artifact.executable else {
            continue;
        };
        if artifact.target.is_test() {
            programs.tiers.push((artifact.target.name, program.into()));
        } else if artifact.target.is_bin() && !artifact.profile.test {
            programs
                .helpers
                .push((artifact.target.name, program.into()));
        }
    }
    ensure!(
        programs.tiers.len() == tiers.len(),
        "cargo has not built every tier of tests"
    );
    Ok(programs)
}

/// Whether this process is the init of a guest.
pub(crate) fn is_guest() -> bool {
    std::process::id() == 1 && env::var_os("CARGO").is_none()
}
