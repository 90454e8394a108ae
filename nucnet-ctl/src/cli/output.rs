//! Results and plans, as text or as JSON, to standard output.

use std::{
    fmt::Display,
    io::{self, Write},
};

use nucnet_ctl::{Error, model::plan::Plan, verbs::Step};
use serde::Serialize;

use super::global::{Global, Output};

/// Prints an answer.
pub(super) fn show(
    global: &Global,
    value: &impl Serialize,
    text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let shown = match global.output {
        Output::Text => text(&mut out),
        Output::Json => serde_json::to_writer_pretty(&mut out, value)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out)),
    }
    .and_then(|()| out.flush());
    written(shown)
}

/// Prints what was done. It is done, whether that can be printed or not.
pub(super) fn report(
    global: &Global,
    value: &impl Serialize,
    text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) {
    if let Err(error) = show(global, value, text) {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "it is done, but cannot be shown"
        );
    }
}

/// What writing to standard output came to. Nobody listening is no error.
pub(super) fn written(result: io::Result<()>) -> Result<(), Error> {
    match result {
        Err(error) if error.kind() != io::ErrorKind::BrokenPipe => Err(Error::Output(error)),
        _ => Ok(()),
    }
}

pub(super) fn show_plan(global: &Global, lines: &[String]) -> Result<(), Error> {
    show(global, &serde_json::json!({ "plan": lines }), |out| {
        if lines.is_empty() {
            return writeln!(out, "nothing to do");
        }
        lines
            .iter()
            .enumerate()
            .try_for_each(|(n, line)| writeln!(out, "{:3}. {line}", n + 1))
    })
}

pub(super) fn done(plan: &Plan<Step>) -> Vec<String> {
    plan.steps().iter().map(ToString::to_string).collect()
}

pub(super) fn undone(plan: &Plan<Step>) -> Vec<String> {
    plan.steps()
        .iter()
        .rev()
        .map(|step| format!("undo: {step}"))
        .collect()
}

pub(super) fn joined<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        "-".to_owned()
    } else {
        items.join(", ")
    }
}
