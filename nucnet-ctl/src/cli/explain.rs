//! `explain`.

use clap::{Args, ValueEnum};
use nucnet_ctl::{
    Error, Host,
    model::probe::Payload,
    verbs::{ExplainRequest, Origin},
};

use super::{
    global::Global,
    output::show,
    value::{one, optional},
};

/// Show what would become of a packet, and which rule decides
///
/// The programs themselves are asked, in a form that changes nothing: routes, flows, publishes
/// and policy are those of this moment. Where iptables carries packets, nucnet's rules are
/// followed instead, if they are in place; what rules of others do is not looked at. Exit code 0
/// whatever the answer is.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  nucnet-ctl explain --from web --to 192.0.2.1:443\n  \
    nucnet-ctl explain --from uplink --to 203.0.113.5:8080 --source 198.51.100.7\n  \
    nucnet-ctl explain --from web --to 2001:db8::1 --proto icmp -o json | jq .rule"
)]
pub(super) struct ExplainArgs {
    /// Who sends it: an endpoint, or "uplink" for somebody outside the host
    #[arg(long, value_name = "ID|uplink")]
    from: String,
    /// Where it goes
    #[arg(long, value_name = "ADDR[:PORT]")]
    to: String,
    /// What it is [default: tcp where there is a port, else icmp]
    #[arg(long, value_name = "PROTOCOL")]
    proto: Option<ProbeProtocol>,
    /// Its source [default: the endpoint's address, or that of a neighbour on the uplink]
    #[arg(long, value_name = "ADDR[:PORT]")]
    source: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProbeProtocol {
    Tcp,
    Udp,
    Icmp,
}

impl ExplainArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let request = ExplainRequest {
            from: match self.from.as_str() {
                "uplink" => Origin::Uplink,
                id => Origin::Endpoint(one(id, "--from")?),
            },
            to: one(&self.to, "--to")?,
            payload: self.proto.map(|proto| match proto {
                ProbeProtocol::Tcp => Payload::Tcp,
                ProbeProtocol::Udp => Payload::Udp,
                ProbeProtocol::Icmp => Payload::Icmp,
            }),
            source: optional(self.source.as_deref(), "--source")?,
        };
        let explanation = host.explain(&request)?;
        show(global, &explanation, |out| writeln!(out, "{explanation}"))
    }
}
