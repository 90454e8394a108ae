//! The guest's init: mounts, loads modules, runs the tests, reports on the console, ends.

use std::{
    env,
    fs::{self, File, Permissions},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use nix::{
    kmod::{ModuleInitFlags, finit_module},
    mount::{MsFlags, mount},
    sys::{
        reboot::{RebootMode, reboot},
        resource::{Resource, setrlimit},
    },
};

/// Where the guest has programs.
pub(super) const PROGRAMS: &str = "/usr/bin";
/// Where it has our own, beside the tests, which look for them there.
pub(super) const OWN_PROGRAMS: &str = "/nucnet";
/// Where it has the tiers of tests.
pub(super) const TESTS: &str = "/nucnet/tests";
/// Where it has the modules to be loaded, in order.
pub(super) const MODULES: &str = "/modules";
/// What the names of the tests to run contain: for each tier a file, with a line for each.
pub(super) const FILTERS: &str = "/etc/filters";

/// How many files a process of the guest may open.
const DESCRIPTORS: u64 = 524_288;

/// Starts every line of ours on the console.
pub(super) const MARK: &str = "@@ ";

/// What follows the mark when the guest says that it is at work.
pub(super) const BUSY: &str = "busy";

/// `USER_HZ`, which `/proc/stat` counts in.
const TICKS_A_SECOND: f64 = 100.0;

/// How often the guest says that it is at work, as long as it is.
const BREATH: Duration = Duration::from_secs(60);

/// A filesystem of the guest.
pub(super) struct Mount {
    kind: &'static str,
    pub(super) target: &'static str,
}

pub(super) const MOUNTS: [Mount; 7] = [
    Mount {
        kind: "proc",
        target: "/proc",
    },
    Mount {
        kind: "sysfs",
        target: "/sys",
    },
    Mount {
        kind: "devtmpfs",
        target: "/dev",
    },
    Mount {
        kind: "tmpfs",
        target: "/run",
    },
    Mount {
        kind: "tmpfs",
        target: "/tmp",
    },
    Mount {
        kind: "bpf",
        target: "/sys/fs/bpf",
    },
    Mount {
        kind: "cgroup2",
        target: "/sys/fs/cgroup",
    },
];

/// Runs the guest.
pub(crate) fn main() -> ! {
    if let Err(error) = run() {
        println!("{MARK}error {error:#}");
    }
    // Init must not end: what the kernel says to that would hide what went wrong.
    loop {
        let Err(error) = reboot(RebootMode::RB_POWER_OFF);
        println!("{MARK}error cannot power off: {error}");
    }
}

fn run() -> Result<()> {
    for Mount { kind, target } in MOUNTS {
        mount(
            Some(kind),
            target,
            Some(kind),
            MsFlags::empty(),
            None::<&str>,
        )
        .with_context(|| format!("cannot mount {target}"))?;
    }
    // A filesystem in memory begins as everybody's; nucnet runs no program from such a place.
    fs::set_permissions("/", Permissions::from_mode(0o755))?;
    println!(
        "{MARK}boot {}",
        fs::read_to_string("/proc/sys/kernel/osrelease")?.trim()
    );
    for path in files(Path::new(MODULES))? {
        finit_module(File::open(&path)?, c"", ModuleInitFlags::empty())
            .with_context(|| format!("cannot load {}", path.display()))?;
    }
    // SAFETY: init has one thread.
    unsafe {
        env::set_var("PATH", PROGRAMS);
        env::set_var("HOME", "/root");
        env::set_var("NUCNET_CTL", format!("{OWN_PROGRAMS}/nucnet-ctl"));
    }
    // As an init system gives it to services.
    setrlimit(Resource::RLIMIT_NOFILE, DESCRIPTORS, DESCRIPTORS)?;
    let findings = Command::new(env::var_os("NUCNET_CTL").unwrap_or_default())
        .arg("doctor")
        .output()?;
    for finding in String::from_utf8_lossy(&findings.stdout).lines() {
        // What is well, and remedies, are of no interest here.
        if !finding.starts_with(['o', ' ']) {
            println!(
                "{MARK}doctor {}",
                finding.split_whitespace().collect::<Vec<_>>().join(" ")
            );
        }
    }
    thread::spawn(|| {
        if let Err(error) = tell_work() {
            println!("{MARK}error cannot tell whether the guest is at work: {error:#}");
        }
    });
    for tier in files(Path::new(TESTS))? {
        let name = tier.file_name().unwrap_or_default().to_string_lossy();
        println!("{MARK}tier {name}");
        let filters = fs::read_to_string(Path::new(FILTERS).join(&*name))?;
        // Not every harness takes several at once.
        let mut filters: Vec<_> = filters.lines().map(Some).collect();
        if filters.is_empty() {
            filters.push(None);
        }
        for filter in filters {
            // Tests wait as long as is generous for a processor, not for an emulated one that
            // shares its own with whatever else runs: what counts against the kernel happens
            // again.
            for _ in 0..2 {
                let status = Command::new(&tier)
                    .args(["--test-threads=2", "--show-output", "--color=never"])
                    .args(filter)
                    .status()
                    .with_context(|| format!("cannot run {}", tier.display()))?;
                println!("{MARK}end {name} {}: {status}", filter.unwrap_or_default());
                if status.success() {
                    break;
                }
            }
        }
    }
    Ok(())
}

/// Says again and again that the processors are at work, as long as they are: emulated, the
/// verifier takes minutes for the programs, and a test that waits for it prints nothing.
fn tell_work() -> Result<()> {
    let mut before = busy_ticks()?;
    loop {
        thread::sleep(BREATH);
        let now = busy_ticks()?;
        // A guest that hangs still has a timer and this thread.
        let seconds = (now - before) as f64 / TICKS_A_SECOND;
        if seconds > BREATH.as_secs_f64() / 10.0 {
            println!("{MARK}{BUSY} at work for {seconds:.0} s of processor time");
        }
        before = now;
    }
}

/// How long the processors were at work since the boot, in ticks.
fn busy_ticks() -> Result<u64> {
    let text = fs::read_to_string("/proc/stat")?;
    let first = text.lines().next().context("/proc/stat is empty")?;
    let fields = first.split_whitespace().skip(1).map(str::parse);
    let ticks = fields.collect::<Result<Vec<u64>, _>>()?;
    // The fourth and fifth are idle, and idle for input and output (proc_stat(5)).
    let idle = [3, 4];
    let busy = ticks
        .iter()
        .enumerate()
        .filter(|(at, _)| !idle.contains(at));
    Ok(busy.map(|(_, ticks)| ticks).sum())
}

fn files(directory: &Path) -> Result<Vec<std::path::PathBuf>> {
    let Ok(entries) = fs::read_dir(directory) else {
        return Ok(Vec::new());
    };
    let mut files = entries
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<Vec<_>>>()?;
    files.sort();
    Ok(files)
}
