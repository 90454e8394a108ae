//! How the story is told: numbered chapters, commands as one would type them, what they print.

use std::{
    env,
    ffi::OsString,
    fmt,
    io::{Read, Stdout, Write as _},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    process::{ExitStatus, Stdio},
    thread,
    time::{Duration, Instant},
};

use anstream::AutoStream;
use anstyle::{AnsiColor, Style};
use anyhow::{Context as _, Result, ensure};
use nix::{
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use nucnet_tests::lab::{Node, Programs};

use super::interrupt::Interrupt;

/// Width of a line. Not the terminal's: the story looks the same everywhere.
pub(super) const WIDTH: usize = 80;
/// Where short results stand beside their command.
const RESULTS: usize = 54;
/// No command takes this long.
const LIMIT: Duration = Duration::from_secs(20);

const TITLE: Style = Style::new().bold();
const COMMAND: Style = AnsiColor::Cyan.on_default();
const RESULT: Style = AnsiColor::Green.on_default();
const FAILURE: Style = AnsiColor::Red.on_default().bold();

/// The teller. It prints no escape codes where there is no terminal or `NO_COLOR` is set.
pub(super) struct Story {
    out: AutoStream<Stdout>,
    interrupt: Interrupt,
    path: OsString,
    chapters: usize,
    title: String,
}

/// A command that is over.
pub(super) struct Ran {
    pub(super) status: ExitStatus,
    pub(super) stdout: String,
    pub(super) stderr: String,
    pub(super) took: Duration,
}

impl Story {
    /// A story in which `nucnet-ctl` is found without its path.
    pub(super) fn new(interrupt: Interrupt, programs: &Programs) -> Self {
        let path = env::var_os("PATH").unwrap_or_default();
        let directories = programs.nucnet.parent().map(Into::into).into_iter();
        let path = env::join_paths(directories.chain(env::split_paths(&path))).unwrap_or(path);
        Self {
            out: anstream::stdout(),
            interrupt,
            path,
            chapters: 0,
            title: String::new(),
        }
    }

    /// Where the story is, for whoever asks why it went no further.
    pub(super) fn place(&self) -> String {
        match self.chapters {
            0 => "the demo stopped at its start".to_owned(),
            number => format!("the demo stopped at step {number}, {:?}", self.title),
        }
    }

    /// Text as it is, indented.
    pub(super) fn say(&mut self, text: &str) -> Result<()> {
        for line in text.lines() {
            writeln!(self.out, "{}", format!("   {line}").trim_end())?;
        }
        Ok(self.out.flush()?)
    }

    /// A title without a number.
    pub(super) fn title(&mut self, title: &str) -> Result<()> {
        Ok(writeln!(self.out, "\n{TITLE}{title}{TITLE:#}")?)
    }

    /// Begins the next chapter.
    pub(super) fn chapter(&mut self, title: &str) -> Result<()> {
        self.chapters += 1;
        title.clone_into(&mut self.title);
        let number = self.chapters;
        Ok(writeln!(self.out, "\n{TITLE}{number}. {title}{TITLE:#}")?)
    }

    /// Ends the story unless it may go on.
    pub(super) fn check(&self) -> Result<()> {
        self.interrupt.check()
    }

    /// A command, typed at a machine, and what `judge` makes of it: what is shown, or an error.
    pub(super) fn types(
        &mut self,
        node: &Node,
        line: &str,
        judge: impl FnOnce(&Ran) -> Result<String>,
    ) -> Result<()> {
        let name = node.name();
        write!(self.out, "   {name}$ {COMMAND}{line}{COMMAND:#}")?;
        self.out.flush()?;
        let width = 3 + name.len() + 2 + line.len();
        let judged = self.run(node, line).and_then(|ran| {
            let judged = judge(&ran);
            judged.with_context(|| format!("{name}$ {line}\n{ran}"))
        });
        match judged {
            Ok(result) if result.is_empty() => writeln!(self.out)?,
            Ok(result) => {
                let beside = (width + 2).max(RESULTS);
                if result.lines().count() == 1 && beside + result.len() <= WIDTH {
                    let gap = beside - width;
                    writeln!(self.out, "{:gap$}{RESULT}{result}{RESULT:#}", "")?;
                } else {
                    writeln!(self.out)?;
                    for line in result.lines() {
                        writeln!(self.out, "     {RESULT}{line}{RESULT:#}")?;
                    }
                }
            }
            Err(error) => {
                // What was interrupted has not failed.
                match self.check() {
                    Ok(()) => writeln!(self.out, "  {FAILURE}FAILED{FAILURE:#}")?,
                    Err(_) => writeln!(self.out)?,
                }
                return Err(error);
            }
        }
        Ok(())
    }

    /// Runs a shell's line on a machine.
    pub(super) fn run(&self, node: &Node, line: &str) -> Result<Ran> {
        self.check()?;
        let mut command = node.command("sh");
        // What the person who runs the demo has set for tools does not count on these machines.
        for (name, _) in env::vars_os() {
            let lower = name.to_string_lossy().to_lowercase();
            if lower.starts_with("nucnet_") || lower.ends_with("_proxy") {
                command.env_remove(name);
            }
        }
        if let Some(cgroup) = node.cgroup() {
            command.env("NUCNET_CGROUP", cgroup);
        }
        command
            .args(["-c", line])
            .env("PATH", &self.path)
            // A group of its own: Ctrl-C reaches us alone, and we end the whole pipeline.
            .process_group(0)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let start = Instant::now();
        let mut child = command.spawn().context("cannot run a shell")?;
        let group = Pid::from_raw(i32::try_from(child.id())?);
        let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
        thread::scope(|scope| {
            let stdout = scope.spawn(move || read(stdout.as_mut()));
            let stderr = scope.spawn(move || read(stderr.as_mut()));
            let status = loop {
                if let Some(status) = child.try_wait()? {
                    break status;
                }
                let late = start.elapsed() > LIMIT;
                if late || self.check().is_err() {
                    // Not waited for yet, so the number is still that group's.
                    let _ = killpg(group, Signal::SIGKILL);
                    child.wait()?;
                    self.check()?;
                    ensure!(!late, "still running after {LIMIT:?}");
                }
                thread::sleep(Duration::from_millis(1));
            };
            Ok(Ran {
                status,
                stdout: stdout.join().unwrap_or_default(),
                stderr: stderr.join().unwrap_or_default(),
                took: start.elapsed(),
            })
        })
    }
}

impl Ran {
    /// That it succeeded.
    pub(super) fn succeeded(&self) -> Result<()> {
        ensure!(self.status.success(), "it failed");
        Ok(())
    }

    /// The first line of its output that contains a text.
    pub(super) fn line_with(&self, text: &str) -> Result<&str> {
        let mut lines = self.stdout.lines();
        let found = lines.find(|line| line.contains(text));
        Ok(found
            .with_context(|| format!("no {text:?} in what it printed"))?
            .trim())
    }
}

impl fmt::Display for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(0), _) => write!(f, "it ended well")?,
            (Some(code), _) => write!(f, "exit code {code}")?,
            (_, signal) => write!(f, "ended by signal {}", signal.unwrap_or_default())?,
        }
        write!(f, " after {:.1?}", self.took)?;
        for line in self.stdout.lines().chain(self.stderr.lines()) {
            write!(f, "\n  | {line}")?;
        }
        Ok(())
    }
}

fn read(pipe: Option<&mut impl Read>) -> String {
    let mut bytes = Vec::new();
    if let Some(pipe) = pipe {
        // What came before an error is shown; the command's status tells the rest.
        let _ = pipe.read_to_end(&mut bytes);
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
