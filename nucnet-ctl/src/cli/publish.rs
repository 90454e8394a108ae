//! `publish` and `unpublish`.

use clap::Args;
use nucnet_ctl::{
    Error, Host,
    model::{EndpointId, publish::PublishSpec},
    verbs::EndpointView,
};

use super::{
    endpoint::published,
    global::Global,
    output::{done, joined, report, show_plan, undone},
    value::{all, one},
};

pub(super) const PUBLISH_HELP: &str = "\
Without HOST_IP: every local address of the host. Host port 0: nucnet chooses one. Without a
protocol: tcp.

Example:
  nucnet-ctl publish web 8443:443 127.0.0.1:5353:53/udp";

#[derive(Debug, Args)]
pub(super) struct PublishArgs {
    /// The endpoint
    #[arg(value_name = "ID")]
    id: String,
    /// [HOST_IP:]HOST_PORT[-END]:PORT[-END][/tcp|udp]
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<String>,
}

impl PublishArgs {
    pub(super) fn publish(self, host: &Host, global: &Global) -> Result<(), Error> {
        let (id, specs) = self.values()?;
        if global.dry_run {
            return show_plan(global, &done(&host.plan_publish(&id, &specs)?));
        }
        report_publishes(global, &host.publish(&id, &specs)?);
        Ok(())
    }

    pub(super) fn unpublish(self, host: &Host, global: &Global) -> Result<(), Error> {
        let (id, specs) = self.values()?;
        if global.dry_run {
            return show_plan(global, &undone(&host.plan_unpublish(&id, &specs)?));
        }
        report_publishes(global, &host.unpublish(&id, &specs)?);
        Ok(())
    }

    fn values(&self) -> Result<(EndpointId, Vec<PublishSpec>), Error> {
        Ok((one(&self.id, "ID")?, all(&self.specs, "SPEC")?))
    }
}

fn report_publishes(global: &Global, view: &EndpointView) {
    report(global, view, |out| {
        writeln!(out, "{}: {}", view.id, joined(published(view)))
    });
}
