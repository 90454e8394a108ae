//! `flows` and `flows flush`.

use std::{
    fmt::{self, Display},
    io::{self, Write},
    net::SocketAddr,
};

use clap::{Args, Subcommand};
use nucnet_ctl::{
    Error, Host,
    model::{EndpointId, flow::FlowView},
    verbs::Flows,
};

use super::{
    columns::{Columns, Or},
    global::{Global, Output},
    output::{report, show_plan, written},
    value::optional,
};

/// Show live flows with their translation, state, age and counters; or end them
///
/// A flow is told as conntrack does: source and destination of the packet that opened it, as
/// it was sent, and the same as it was delivered ("=": unchanged). Counters and ages are the
/// flow's own; nothing is locked, and flows come and go meanwhile. An endpoint's flows are
/// those that it opened and those that were opened to it, by siblings too.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
#[command(after_help = "Examples:\n  nucnet-ctl flows --endpoint web\n  \
    nucnet-ctl flows -o json | jq '.[] | select(.dport == 443)'\n  \
    nucnet-ctl flows flush --endpoint web")]
pub(super) struct FlowsArgs {
    #[command(subcommand)]
    verb: Option<FlowsVerb>,
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Subcommand)]
enum FlowsVerb {
    /// End live flows
    ///
    /// Safe while packets pass. A conversation that goes on is a new flow, if its next packet may
    /// open one: a TCP connection is cut off, UDP gets another external port.
    #[command(after_help = "Example:\n  nucnet-ctl flows flush --endpoint web")]
    Flush(Which),
}

#[derive(Debug, Args)]
struct Which {
    /// Those in which this endpoint takes part [default: all]
    #[arg(long, value_name = "ID")]
    endpoint: Option<String>,
}

impl Which {
    fn endpoint(&self) -> Result<Option<EndpointId>, Error> {
        optional(self.endpoint.as_deref(), "--endpoint")
    }
}

impl FlowsArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let Some(FlowsVerb::Flush(which)) = self.verb else {
            let endpoint = self.which.endpoint()?;
            return show_flows(global, &host.flows(endpoint.as_ref())?);
        };
        let endpoint = which.endpoint()?;
        if global.dry_run {
            let mut count = 0;
            let flows = host.flows(endpoint.as_ref())?;
            flows.for_each(|_| count += 1)?;
            return show_plan(global, &[format!("end {count} flows")]);
        }
        let ended = host.flush_flows(endpoint.as_ref())?;
        report(global, &serde_json::json!({ "ended": ended }), |out| {
            writeln!(out, "{ended} flows ended")
        });
        Ok(())
    }
}

/// As JSON they are printed while they are read, an object a line.
fn show_flows(global: &Global, flows: &Flows) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    if global.output == Output::Text {
        let mut views = Vec::new();
        flows.for_each(|flow| views.push(flow))?;
        views.sort_by(|a, b| (a.endpoint, b.age_ms).cmp(&(b.endpoint, a.age_ms)));
        return written(flows_text(&mut out, &views).and_then(|()| out.flush()));
    }
    let mut shown = out.write_all(b"[");
    let mut separator = "\n";
    flows.for_each(|flow| {
        if shown.is_ok() {
            shown = out
                .write_all(separator.as_bytes())
                .and_then(|()| Ok(serde_json::to_writer(&mut out, &flow)?));
            separator = ",\n";
        }
    })?;
    written(
        shown
            .and_then(|()| out.write_all(b"\n]\n"))
            .and_then(|()| out.flush()),
    )
}

fn flows_text(out: &mut dyn Write, views: &[FlowView<'_>]) -> io::Result<()> {
    let mut columns = Columns::new([
        "ENDPOINT",
        "PROTO",
        "STATE",
        "AGE",
        "IDLE",
        "SOURCE",
        "DESTINATION",
        "NAT SOURCE",
        "NAT DESTINATION",
        "PACKETS OUT/IN",
        "BYTES OUT/IN",
    ]);
    for flow in views {
        let [src, dst, nat_src, nat_dst] = [
            (flow.src, flow.sport),
            (flow.dst, flow.dport),
            (flow.nat_src, flow.nat_sport),
            (flow.nat_dst, flow.nat_dport),
        ]
        .map(SocketAddr::from);
        let delivered = |sent: SocketAddr, delivered| Some(delivered).filter(|&it| it != sent);
        columns.line([
            &flow.endpoint.map_or("-", EndpointId::as_str),
            &flow.protocol,
            &flow.state,
            &Or(flow.age_ms.map(Seconds), "-"),
            &Or(flow.idle_ms.map(Seconds), "-"),
            &src,
            &dst,
            &Or(delivered(src, nat_src), "="),
            &Or(delivered(dst, nat_dst), "="),
            &Both(flow.packets_out, flow.packets_in),
            &Both(flow.bytes_out, flow.bytes_in),
        ]);
    }
    columns.print(out)
}

/// Milliseconds, shown as seconds.
struct Seconds(u64);

impl Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}s", self.0 / 1000, self.0 % 1000 / 100)
    }
}

/// A count each way.
struct Both(u64, u64);

impl Display for Both {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}
