//! Options that every verb has.

use std::{
    io::{self, IsTerminal},
    path::PathBuf,
};

use clap::{ArgAction, Args, ValueEnum};
use nucnet_ctl::{Options, verbs::DatapathChoice};

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
pub(super) struct Global {
    /// Where the state of this host is kept
    #[arg(
        long,
        global = true,
        env = "NUCNET_STATE_DIR",
        value_name = "DIR",
        default_value = "/run/nucnet"
    )]
    state_dir: PathBuf,
    /// Where programs and maps are pinned, on a BPF filesystem
    #[arg(
        long,
        global = true,
        env = "NUCNET_BPFFS",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/nucnet"
    )]
    bpffs: PathBuf,
    /// Whose processes cannot bind published ports [default: the root of the cgroup2 hierarchy]
    #[arg(long, global = true, env = "NUCNET_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// What carries the packets
    #[arg(
        long,
        global = true,
        env = "NUCNET_DATAPATH",
        value_name = "DATAPATH",
        default_value = "auto"
    )]
    datapath: Datapath,
    /// How results and errors are printed
    #[arg(
        short,
        long,
        global = true,
        env = "NUCNET_OUTPUT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    pub(super) output: Output,
    /// How the log is written to standard error [default: as --output]
    #[arg(long, global = true, env = "NUCNET_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<Output>,
    /// Say more: once for the milliseconds of each step of an attach, more often for the log
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub(super) verbose: u8,
    /// Show what would be done, and do nothing
    #[arg(long, global = true)]
    pub(super) dry_run: bool,
}

impl Global {
    /// What the library is told of it.
    pub(super) fn options(&self) -> Options {
        Options {
            state_dir: self.state_dir.clone(),
            bpffs: self.bpffs.clone(),
            cgroup: self.cgroup.clone(),
            datapath: match self.datapath {
                Datapath::Auto => DatapathChoice::Auto,
                Datapath::Ebpf => DatapathChoice::Ebpf,
                Datapath::Iptables => DatapathChoice::Iptables,
            },
            ..Options::default()
        }
    }

    /// Has the log written as asked for.
    pub(super) fn start_log(&self) {
        let level = match self.verbose {
            0 | 1 => tracing::Level::WARN,
            2 => tracing::Level::INFO,
            3 => tracing::Level::DEBUG,
            _ => tracing::Level::TRACE,
        };
        let log = tracing_subscriber::fmt()
            .with_max_level(level)
            .with_writer(io::stderr)
            .with_target(false)
            .with_ansi(io::stderr().is_terminal());
        // Who reads JSON reads no lines of text in between.
        match self.log_format.unwrap_or(self.output) {
            Output::Text => log.without_time().init(),
            Output::Json => log.json().init(),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Datapath {
    Auto,
    Ebpf,
    Iptables,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Output {
    Text,
    Json,
}
