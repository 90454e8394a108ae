//! Errors, as text or as JSON, to standard error.

use std::process::ExitCode;

use clap::error::ErrorKind;
use nucnet_ctl::{Error, Kind, verbs::chain};

use super::global::Output;

/// Of a verb.
pub(super) fn failed(output: Output, error: &Error) -> ExitCode {
    let (kind, hint) = (error.kind(), error.hint());
    complain(output, kind, &chain(error), hint.as_deref());
    ExitCode::from(kind.exit_code())
}

/// What clap has to say: help and version to standard output, errors as everybody's.
pub(super) fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Nobody reads it any more.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if wants_json() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let message = lines
            .next()
            .unwrap_or_default()
            .trim_start_matches("error: ")
            .to_owned();
        let rest: Vec<&str> = lines.filter(|line| !line.starts_with("Usage:")).collect();
        complain(Output::Json, Kind::Usage, &message, Some(&rest.join(" ")));
    } else {
        let _ = error.print();
    }
    ExitCode::from(Kind::Usage.exit_code())
}

/// Whether JSON was asked for, told without clap, which has failed.
fn wants_json() -> bool {
    let arguments: Vec<String> = std::env::args().collect();
    let by_flag = arguments
        .iter()
        .enumerate()
        .any(|(index, argument)| match argument.as_str() {
            "-o" | "--output" => arguments.get(index + 1).is_some_and(|next| next == "json"),
            other => matches!(other, "-ojson" | "-o=json" | "--output=json"),
        });
    by_flag || std::env::var("NUCNET_OUTPUT").is_ok_and(|output| output == "json")
}

fn complain(output: Output, kind: Kind, message: &str, hint: Option<&str>) {
    let hint = hint.filter(|hint| !hint.is_empty());
    match output {
        Output::Json => {
            let error = serde_json::json!({
                "error": { "kind": kind, "message": message, "hint": hint }
            });
            eprintln!("{error}");
        }
        Output::Text => {
            eprintln!("error: {message}");
            if let Some(hint) = hint {
                eprintln!("hint: {hint}");
            }
        }
    }
}
