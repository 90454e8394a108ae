//! `monitor`.

use std::{
    io::{self, Write},
    os::fd::AsFd,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use clap::Args;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nucnet_ctl::{Error, Host};
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use super::{
    global::{Global, Output},
    value::optional,
};

/// Show refused packets, and flows as they come and go, until interrupted
///
/// A packet that is refused is shown once, however often its sender repeats it, with the rule
/// of the egress policy that denies it, or "default". Of an endpoint, at most 20 refusals and
/// 200 flows a second are shown; how many were left out is shown with the next one, and
/// `inspect` counts each packet, also those of discovery that each start sends, which are not
/// shown. A flow that falls silent is shown as closed when its place is taken. With -o json,
/// each event is an object on a line of its own. Up to four monitors can run at once.
///
/// Where iptables carries packets, it is the rules that tell: of up to 1000 refusals a second for
/// each reason. What the host's own stack drops they do not see. A flow that falls silent is
/// shown as closed when its time is over.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nucnet-ctl monitor --endpoint web\n  \
    nucnet-ctl monitor -o json | jq -c 'select(.event == \"denied\")'")]
pub(super) struct MonitorArgs {
    /// Of this endpoint only
    #[arg(long, value_name = "ID")]
    endpoint: Option<String>,
    /// With what the programs say about each packet that is shown as refused: how they read it,
    /// and the route that they asked for last (0: to the host, 1: by an interface, 2: none); by
    /// iptables there are none
    #[arg(long, conflicts_with = "endpoint")]
    debug: bool,
}

impl MonitorArgs {
    /// Prints events until a signal comes, or nobody reads them any more.
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        /// How long it takes at most to see that nobody reads.
        const PATIENCE: Duration = Duration::from_millis(200);
        let only = optional(self.endpoint.as_deref(), "--endpoint")?;
        let stop = Arc::new(AtomicBool::new(false));
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(Error::Signals)?;
        }
        let mut monitor = if self.debug {
            host.monitor_debug()?
        } else {
            host.monitor(only)?
        };
        if !monitor.is_reading() {
            tracing::warn!("nothing is attached yet: waiting");
        }
        let mut out = io::stdout().lock();
        while !stop.load(Ordering::Relaxed) {
            let events = monitor.wait(PATIENCE)?;
            let mut text = Vec::new();
            for event in &events {
                let written = match global.output {
                    Output::Text => writeln!(text, "{event}"),
                    Output::Json => serde_json::to_writer(&mut text, event)
                        .map_err(io::Error::from)
                        .and_then(|()| writeln!(text)),
                };
                written.map_err(Error::Output)?;
            }
            let mut reader = [PollFd::new(out.as_fd(), PollFlags::empty())];
            let is_gone = poll(&mut reader, PollTimeout::ZERO).is_ok()
                && reader[0]
                    .revents()
                    .is_some_and(|events| events.contains(PollFlags::POLLERR));
            if is_gone {
                break;
            }
            match out.write_all(&text).and_then(|()| out.flush()) {
                Err(error) if error.kind() == io::ErrorKind::BrokenPipe => break,
                written => written.map_err(Error::Output)?,
            }
        }
        Ok(())
    }
}
