//! The command line: one file a family of verbs, each with its arguments, their way to the
//! library's requests, and what is printed.

mod attach;
mod columns;
mod egress;
mod endpoint;
mod explain;
mod failure;
mod flows;
mod global;
mod host;
mod monitor;
mod nat;
mod network;
mod output;
mod publish;
mod slot;
mod value;

use std::{
    io::{self, Write},
    process::ExitCode,
    sync::LazyLock,
};

use clap::{Args, CommandFactory, Parser, Subcommand};
use nucnet_ctl::{Error, Host, OBJECT_HASH, kernel::capability};

use global::Global;

static VERSION: LazyLock<String> = LazyLock::new(|| {
    let version = env!("CARGO_PKG_VERSION");
    let abi = nucnet_common::abi::VERSION;
    format!("{version}\nmaps: ABI version {abi}\nBPF object: sha256 {OBJECT_HASH}")
});

/// NAT, port forwarding and egress control for containers and microVMs, by eBPF.
#[derive(Debug, Parser)]
#[command(
    name = "nucnet-ctl",
    version = VERSION.as_str(),
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad input, 3 not found, 4 conflict, \
        5 this host cannot do it.",
    after_long_help = AFTER
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

const AFTER: &str = "\
Exit codes:
  0  done
  1  the operation failed: of a set-up nothing stayed, of a teardown what could not go is listed
  2  bad command line or bad input: nothing was touched
  3  not found: endpoint, network, network namespace, process
  4  conflict: address, port, id, name or interface is taken; the message names the owner
  5  this host cannot do it: the message says what is missing and how to mend it

Example:
  # A container with one published port, and out of it again
  podman run -d --name web --network none docker.io/library/nginx
  nucnet-ctl attach --pid $(podman inspect -f '{{.State.Pid}}' web) --id web -p 8080:80
  curl http://localhost:8080/
  nucnet-ctl detach web";

/// What `--help` says of each is with its arguments.
#[derive(Debug, Subcommand)]
enum Verb {
    Attach(Box<attach::AttachArgs>),
    Detach(attach::DetachArgs),
    /// Forward more ports of the host to an endpoint
    ///
    /// All of them or, if one cannot be had, none. What is published already stays.
    #[command(after_help = publish::PUBLISH_HELP)]
    Publish(publish::PublishArgs),
    /// Take ports back, and end what came in by them
    ///
    /// The specs are those of the publish; where nucnet chose the host port, with the one that
    /// `inspect` shows.
    #[command(after_help = "Example:\n  nucnet-ctl unpublish web 8443:443")]
    Unpublish(publish::PublishArgs),
    #[command(subcommand)]
    Egress(egress::EgressVerb),
    List(endpoint::ListArgs),
    Inspect(endpoint::InspectArgs),
    Flows(flows::FlowsArgs),
    Status(host::StatusArgs),
    Monitor(monitor::MonitorArgs),
    Explain(explain::ExplainArgs),
    Doctor(host::DoctorArgs),
    #[command(subcommand)]
    Network(network::NetworkVerb),
    #[command(subcommand)]
    Nat(nat::NatVerb),
    #[command(subcommand)]
    Slot(slot::SlotVerb),
    Gc(host::GcArgs),
    Completions(CompletionsArgs),
    Down(host::DownArgs),
}

/// Print shell completions
#[derive(Debug, Args)]
#[command(
    after_help = "Example:\n  nucnet-ctl completions bash > /etc/bash_completion.d/nucnet-ctl"
)]
struct CompletionsArgs {
    /// The shell
    #[arg(value_name = "SHELL")]
    shell: clap_complete::Shell,
}

impl CompletionsArgs {
    fn call(self) -> Result<(), Error> {
        let mut script = Vec::new();
        clap_complete::generate(self.shell, &mut Cli::command(), "nucnet-ctl", &mut script);
        output::written(io::stdout().write_all(&script))
    }
}

/// Parses, calls, prints.
pub(crate) fn run() -> ExitCode {
    let Cli { global, verb } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    global.start_log();
    // Arguments and environment say which directories are written to: they must be those of
    // whoever has the rights.
    if let Some(user) = capability::caller_behind_set_id() {
        return failure::failed(global.output, &Error::SetId(user));
    }
    // It asks other programs, which may need more.
    if !matches!(verb, Verb::Doctor(_))
        && let Err(error) = capability::drop_others()
    {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot drop the capabilities that are not needed"
        );
    }
    match call(verb, &global) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failure::failed(global.output, &error),
    }
}

fn call(verb: Verb, global: &Global) -> Result<(), Error> {
    let host = Host::new(global.options())?;
    match verb {
        Verb::Attach(arguments) => arguments.call(&host, global),
        Verb::Detach(arguments) => arguments.call(&host, global),
        Verb::Publish(arguments) => arguments.publish(&host, global),
        Verb::Unpublish(arguments) => arguments.unpublish(&host, global),
        Verb::Egress(verb) => verb.call(&host, global),
        Verb::List(arguments) => arguments.call(&host, global),
        Verb::Inspect(arguments) => arguments.call(&host, global),
        Verb::Flows(arguments) => arguments.call(&host, global),
        Verb::Status(arguments) => arguments.call(&host, global),
        Verb::Monitor(arguments) => arguments.call(&host, global),
        Verb::Explain(arguments) => arguments.call(&host, global),
        Verb::Doctor(arguments) => arguments.call(&host, global),
        Verb::Network(verb) => verb.call(&host, global),
        Verb::Nat(verb) => verb.call(&host, global),
        Verb::Slot(verb) => verb.call(&host, global),
        Verb::Gc(arguments) => arguments.call(&host, global),
        Verb::Completions(arguments) => arguments.call(),
        Verb::Down(arguments) => arguments.call(&host, global),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_after_the_verb() {
        for line in ["nucnet-ctl -o json list", "nucnet-ctl list -o json"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.output, global::Output::Json);
        }
    }

    #[test]
    fn a_policy_comes_from_flags_or_a_file_and_not_from_both() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        assert!(parse("nucnet-ctl egress set web --allow any --deny host"));
        assert!(parse(
            "nucnet-ctl egress set web --egress-default deny --keep-established"
        ));
        assert!(parse("nucnet-ctl egress set web --file -"));
        assert!(!parse("nucnet-ctl egress set web"));
        assert!(!parse("nucnet-ctl egress set web --keep-established"));
        assert!(!parse("nucnet-ctl egress set web --file f --allow any"));
        assert!(parse("nucnet-ctl egress set web --file f --reject"));
        assert!(parse("nucnet-ctl egress set web --deny host --reject"));
        // It would take all rules away.
        assert!(!parse("nucnet-ctl egress set web --reject"));
        assert!(!parse("nucnet-ctl egress show"));
    }

    #[test]
    fn an_attach_needs_a_process_or_a_namespace_and_not_both() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        assert!(parse("nucnet-ctl attach --pid 1"));
        assert!(parse(
            "nucnet-ctl attach --netns /run/netns/a -p 80:80 -p 81:81 --allow any"
        ));
        assert!(!parse("nucnet-ctl attach"));
        assert!(!parse("nucnet-ctl attach --pid 1 --netns /run/netns/a"));
        assert!(!parse("nucnet-ctl attach --pid -1"));
    }
}
