//! The emulator.

use std::{
    fs::{self, File},
    io::{BufRead as _, BufReader, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

use super::{
    kernel::Kernel,
    outcome::{self, Outcome},
};
use crate::{apt, archive::Archive, progress::Step, run};

/// A guest that says nothing for so long is ended: it hangs, for while it is at work it says so.
const SILENCE: Duration = Duration::from_secs(600);

/// A guest whose tests say nothing for so long is ended even if it is at work. They are rightly
/// silent while they load the programs, which takes an emulated verifier minutes.
const PATIENCE: Duration = Duration::from_secs(1800);

/// An emulator: the machine's own, or one in the cache.
pub(super) struct Qemu {
    program: PathBuf,
    libraries: Option<String>,
}

impl Qemu {
    /// Fetches one unless the machine or the cache has it.
    pub(super) fn ensure(cache: &Path) -> Result<Self> {
        const PROGRAM: &str = "qemu-system-x86_64";
        if let Some(program) = apt::find_program(PROGRAM) {
            return Ok(Self {
                program,
                libraries: None,
            });
        }
        let home = cache.join("qemu");
        let program = home.join("usr/bin").join(PROGRAM);
        if !program.exists() {
            let archive = Archive::of_this_release(&cache.join("apt"))?;
            let unpacked = cache.join("qemu.new");
            archive.unpack_with_dependencies("qemu-system-x86", &unpacked)?;
            fs::rename(&unpacked, &home)?;
        }
        let libraries = ["usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu"]
            .map(|directory| home.join(directory).display().to_string());
        Ok(Self {
            program,
            libraries: Some(libraries.join(":")),
        })
    }

    /// Emulates a machine that has nothing but what more is given, and a console: its own input and
    /// output.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.program);
        if let Some(libraries) = &self.libraries {
            command.env("LD_LIBRARY_PATH", libraries);
        }
        command
            // Moves byte by byte are emulated byte by byte: kernels that are told that they are
            // not fast move eight at a time.
            .args(["-accel", "tcg", "-cpu", "max,-erms,-fsrm"])
            .args(["-nodefaults", "-display", "none", "-serial", "stdio"])
            .arg("-no-reboot");
        command
    }

    /// Boots a kernel and returns what the guest reports until it ends, or until `limit`.
    pub(super) fn boot(
        &self,
        kernel: &Kernel,
        image: &Path,
        log: &Path,
        limit: Duration,
    ) -> Result<Outcome> {
        let mut log = File::create(log)?;
        let mut command = self.command();
        command
            // One processor: two spend a fifth of their time on waiting for each other to answer
            // an interrupt, and more where the real ones are taken.
            .args(["-smp", "1", "-m", "1024"])
            .arg("-kernel")
            .arg(&kernel.image)
            .arg("-initrd")
            .arg(image)
            // Grace periods, which netlink waits for all the time, are long when emulated; where
            // others are at work, a timer may not tick while the kernel looks whether it does.
            // Nobody attacks the guest: its memory need not be cleared, nor its branches guarded.
            // A processor that gets no time is stuck, in the eyes of a watchdog, which says so in
            // the midst of what tests say.
            .args([
                "-append",
                "console=ttyS0 panic=-1 loglevel=1 rcupdate.rcu_expedited=1 no_timer_check \
                 init_on_alloc=0 mitigations=off nowatchdog",
            ])
            .stdin(Stdio::null())
            .stdout(Stdio::piped());
        let step = Step::start(format!("Linux {}", kernel.version));
        let mut child = command
            .spawn()
            .with_context(|| format!("cannot run `{}`", run::shown(&command)))?;
        let output = child.stdout.take().context("QEMU has no output")?;
        let (sender, lines) = mpsc::channel();
        let reader = thread::spawn(move || {
            for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
                let line = String::from_utf8_lossy(&line).replace('\r', "");
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        let mut outcome = Outcome::default();
        let started = Instant::now();
        let mut tests_spoke = started;
        loop {
            let fault = match lines.recv_timeout(SILENCE) {
                Ok(_) if started.elapsed() > limit => {
                    outcome.run_out(limit);
                    child.kill()?;
                    break;
                }
                Ok(line) => {
                    step.note(&line);
                    writeln!(log, "{line}")?;
                    outcome.line(&line);
                    if outcome::before_breath(&line).is_none() {
                        tests_spoke = Instant::now();
                    }
                    if tests_spoke.elapsed() < PATIENCE {
                        continue;
                    }
                    format!("was at work for {} s without a word", PATIENCE.as_secs())
                }
                Err(mpsc::RecvTimeoutError::Disconnected) => break,
                Err(mpsc::RecvTimeoutError::Timeout) => {
                    format!("said nothing for {} s", SILENCE.as_secs())
                }
            };
            outcome.note(fault + " and was ended");
            child.kill()?;
            break;
        }
        child.wait()?;
        drop(lines);
        // The reader ends with QEMU.
        let _ = reader.join();
        if outcome.booted() {
            step.done()
        } else {
            step.failed()
        };
        Ok(outcome)
    }
}
