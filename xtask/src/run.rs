//! Runs other programs. A failure names the program with its arguments.

use std::{
    collections::VecDeque,
    io::{self, BufRead as _, BufReader},
    process::{Command, ExitStatus, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::progress::Step;

/// Lines of a failed step's output that are shown.
const TAIL: usize = 60;

/// Runs a long command as a step of its own: its last line of output beside the time, and
/// the end of its output when it fails.
pub(crate) fn step(title: &str, command: &mut Command) -> Result<()> {
    step_reading(title, command, |_| true)
}

/// The same, for a command whose output matters: `shown` gets each line and says whether it
/// is for people.
pub(crate) fn step_reading(
    title: &str,
    command: &mut Command,
    mut shown: impl FnMut(&str) -> bool,
) -> Result<()> {
    let step = Step::start(title);
    let mut tail = VecDeque::new();
    let status = lines(command, |line| {
        if !shown(line) {
            return;
        }
        step.note(line);
        if tail.len() == TAIL {
            tail.pop_front();
        }
        tail.push_back(line.to_owned());
    })?;
    if !status.success() {
        drop(step);
        for line in tail {
            eprintln!("  | {line}");
        }
        return check(command, status);
    }
    step.done();
    Ok(())
}

/// Runs a command and hands on each line of its output and errors as it comes.
pub(crate) fn lines(command: &mut Command, mut each: impl FnMut(&str)) -> Result<ExitStatus> {
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = command.spawn().with_context(|| cannot_run(command))?;
    // The command keeps its ends of the pipe, which would never end otherwise.
    command.stdout(Stdio::null()).stderr(Stdio::null());
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    while reader.read_until(b'\n', &mut line)? > 0 {
        each(String::from_utf8_lossy(&line).trim_end());
        line.clear();
    }
    Ok(child.wait()?)
}

/// What a command prints.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .with_context(|| cannot_run(command))?;
    check(command, output.status)?;
    String::from_utf8(output.stdout)
        .with_context(|| format!("`{}` printed what is no text", shown(command)))
}

/// The command as one would type it.
pub(crate) fn shown(command: &Command) -> String {
    let words = [command.get_program()]
        .into_iter()
        .chain(command.get_args());
    let words = words.map(|word| {
        let word = word.to_string_lossy();
        if word.is_empty()
            || word.contains(|c: char| c.is_whitespace() || "'\"$*|&;<>()".contains(c))
        {
            format!("'{}'", word.replace('\'', r"'\''"))
        } else {
            word.into_owned()
        }
    });
    words.collect::<Vec<_>>().join(" ")
}

fn check(command: &Command, status: ExitStatus) -> Result<()> {
    if !status.success() {
        bail!("`{}` failed ({status})", shown(command));
    }
    Ok(())
}

fn cannot_run(command: &Command) -> String {
    format!("cannot run `{}`", shown(command))
}
