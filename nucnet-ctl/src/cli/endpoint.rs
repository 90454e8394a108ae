//! `list` and `inspect`; how an endpoint is shown.

use std::{
    io::{self, Write},
    net::IpAddr,
};

use clap::Args;
use nucnet_ctl::{
    Error, Host,
    verbs::{Dropped, EndpointDetails, EndpointView, Published},
};

use super::{
    columns::Columns,
    egress,
    global::Global,
    output::{joined, show},
    value::one,
};

/// Show all endpoints
///
/// States: configuring (being made), active, degraded (something that it needs is gone: `status`
/// says what, the same attach again brings it back), removing. What is configuring or removing for
/// long was left by a call that died; `gc` removes it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nucnet-ctl list -o json | jq -r '.[].addresses[]'")]
pub(super) struct ListArgs;

impl ListArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let endpoints = host.list()?;
        show(global, &endpoints, |out| list(out, &endpoints))
    }
}

/// Show one endpoint with its counters
///
/// What came by a publish is the sum of its live flows; those that have ended are not in it.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nucnet-ctl inspect web")]
pub(super) struct InspectArgs {
    /// The endpoint
    #[arg(value_name = "ID")]
    id: String,
}

impl InspectArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let details = host.inspect(&one(&self.id, "ID")?)?;
        show(global, &details, |out| inspected(out, &details))
    }
}

fn list(out: &mut dyn Write, views: &[EndpointView]) -> io::Result<()> {
    let mut columns = Columns::new(["ID", "STATE", "NETWORK", "ADDRESSES", "PUBLISHED"]);
    for view in views {
        columns.line([
            &view.id,
            &view.state,
            &view.network,
            &joined(&view.addresses),
            &joined(published(view)),
        ]);
    }
    columns.print(out)
}

fn inspected(out: &mut dyn Write, details: &EndpointDetails) -> io::Result<()> {
    writeln!(out, "{}", details.endpoint.id)?;
    show_details(out, &details.endpoint)?;
    writeln!(out, "  flows      {}", details.flows)?;
    writeln!(out, "  bindings   {}", details.bindings)?;
    for sum in &details.forwarded {
        writeln!(
            out,
            "  forwarded  {}: {} live flows, {} packets ({} bytes) in, {} ({}) out",
            one_published(&sum.publish),
            sum.flows,
            sum.packets_in,
            sum.bytes_in,
            sum.packets_out,
            sum.bytes_out
        )?;
    }
    for (reason, Dropped { packets, bytes }) in &details.dropped {
        writeln!(
            out,
            "  dropped    {packets} packets ({bytes} bytes): {reason}"
        )?;
    }
    Ok(())
}

/// All of it but the id.
pub(super) fn show_details(out: &mut dyn Write, view: &EndpointView) -> io::Result<()> {
    writeln!(out, "  state      {}", view.state)?;
    writeln!(out, "  network    {}", view.network)?;
    writeln!(out, "  namespace  {}", view.netns.display())?;
    writeln!(
        out,
        "  interface  {}, host side {}, {}, MTU {}",
        view.ifname, view.host_ifname, view.mac, view.mtu
    )?;
    writeln!(out, "  addresses  {}", joined(&view.addresses))?;
    writeln!(out, "  gateways   {}", joined(&view.gateways))?;
    if let Some(guest) = &view.guest {
        writeln!(out, "  TAP        {}, {}", guest.tap, guest.tap_mac)?;
        writeln!(
            out,
            "  guest      {}, mask {}, gateway {}, {}",
            guest.guest_ip, guest.netmask, guest.gateway, guest.guest_mac
        )?;
        writeln!(out, "  resolvers  {}", joined(&guest.dns))?;
    }
    writeln!(out, "  published  {}", joined(published(view)))?;
    egress::show_policy(out, &view.egress)
}

pub(super) fn published(view: &EndpointView) -> Vec<String> {
    view.published.iter().map(one_published).collect()
}

fn one_published(publish: &Published) -> String {
    let ports = |first: u16, last: u16| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let host = match publish.host_ip {
        None => "*".to_owned(),
        Some(IpAddr::V4(v4)) => v4.to_string(),
        Some(IpAddr::V6(v6)) => format!("[{v6}]"),
    };
    let (outside, inside) = (
        ports(publish.host_port, publish.host_port_end),
        ports(publish.port, publish.port_end),
    );
    format!("{host}:{outside}->{inside}/{}", publish.protocol)
}
