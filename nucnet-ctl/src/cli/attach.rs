//! `attach` and `detach`.

use std::{path::PathBuf, time::Duration};

use clap::Args;
use nucnet_ctl::{
    AttachRequest, Container, Error, Host,
    verbs::{EndpointView, Step},
};
use serde::Serialize;

use super::{
    egress::EgressArgs,
    endpoint,
    global::Global,
    output::{done, report, show_plan, undone},
    value::{addresses, all, one, optional},
};

const ATTACH_EXAMPLES: &str = "\
Publishes: [HOST_IP:]HOST_PORT[-END]:PORT[-END][/tcp|udp]
  Without HOST_IP: every local address of the host. Host port 0: nucnet chooses one. Without a
  protocol: tcp.
Rules: CIDR|any|PRESET[:PORT[-END][,PORT[-END]]...][/tcp|udp|icmp]
  IPv6 with a port in brackets. Deny beats allow; any --allow makes the default deny.
  Presets: metadata, private, host, link-local, internet (`egress set --help` says what they are).
Rootfs: a file that names the resolvers is mounted, read-only, over DIR/etc/resolv.conf until the
  endpoint is detached. Without --dns it names the host's, which are then treated as if given with
  --dns; a local stub (127.0.0.53) is replaced by the resolvers that it asks. search and options
  are the host's. A missing file is made, and removed again; a symbolic link is refused. Who runs
  in another mount namespace sees it only if mounts propagate there: attach before the container
  starts, or share DIR.

Examples:
  nucnet-ctl attach --pid $(podman inspect -f '{{.State.Pid}}' web) --id web -p 8080:80
  nucnet-ctl attach --netns /run/netns/job --id job --allow any:443/tcp --dns 9.9.9.9
  nucnet-ctl attach --netns /run/netns/db --id db --network blue --ip 10.1.0.5 \\
      -p 127.0.0.1:5432:5432 --egress-default deny";

/// Give a container its network
///
/// With only --pid it works: the default network, an address of nucnet's choice, an id that
/// is derived and printed. --ip, -p, --allow, --deny and --dns may be given several times. The same
/// id, namespace and settings again change nothing, and repair what is damaged.
#[derive(Debug, Args)]
#[command(after_help = ATTACH_EXAMPLES)]
#[group(id = "container", required = true, multiple = false, args = ["pid", "netns"])]
pub(super) struct AttachArgs {
    /// A process of the container
    #[arg(long)]
    pid: Option<u32>,
    /// The container's network namespace
    #[arg(long, value_name = "PATH")]
    netns: Option<PathBuf>,
    /// The endpoint's id [default: derived from the namespace]
    #[arg(long)]
    id: Option<String>,
    /// The network
    #[arg(long, value_name = "NAME", default_value = "default")]
    network: String,
    /// An address of the network, one of each family at most [default: a free one]
    #[arg(long = "ip", value_name = "ADDR")]
    ips: Vec<String>,
    /// The link-layer address [default: a random one]
    #[arg(long)]
    mac: Option<String>,
    /// Name of the interface in the container
    #[arg(long, value_name = "NAME", default_value = "eth0")]
    ifname: String,
    /// Largest IP packet in bytes [default: the network's]
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    mtu: Option<String>,
    /// Forward a port of the host to the container
    #[arg(short = 'p', long = "publish", value_name = "SPEC")]
    publishes: Vec<String>,
    #[command(flatten)]
    egress: EgressArgs,
    /// The container's root directory: mount a resolv.conf in it, see below
    #[arg(long, value_name = "DIR")]
    rootfs: Option<PathBuf>,
}

impl AttachArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let container = match (self.pid, self.netns) {
            (Some(pid), _) => Container::Process(pid),
            // clap sees to it that there is one of the two.
            (None, netns) => Container::Netns(netns.unwrap_or_default()),
        };
        let request = AttachRequest {
            id: optional(self.id.as_deref(), "--id")?,
            network: one(&self.network, "--network")?,
            addresses: addresses(&self.ips, "--ip")?,
            mac: optional(self.mac.as_deref(), "--mac")?,
            ifname: one(&self.ifname, "--ifname")?,
            mtu: optional(self.mtu.as_deref(), "--mtu")?,
            publishes: all(&self.publishes, "-p")?,
            egress: self.egress.policy()?,
            rootfs: self.rootfs,
            ..AttachRequest::new(container)
        };
        if global.dry_run {
            return show_plan(global, &done(&host.plan_attach(&request)?));
        }
        let mut attachment = host.attach(&request)?;
        let (took, steps) = (attachment.took, std::mem::take(&mut attachment.steps));
        let what = match (attachment.is_new, steps.is_empty()) {
            (true, _) => "attached",
            (false, true) => "is attached already",
            (false, false) => "was attached, and is repaired",
        };
        let attached = Attached {
            endpoint: attachment.keep(),
            took_ms: milliseconds(took),
            steps: (global.verbose > 0).then(|| {
                let ms = |(step, took): &(Step, Duration)| Timed {
                    step: step.to_string(),
                    ms: milliseconds(*took),
                };
                steps.iter().map(ms).collect()
            }),
        };
        report(global, &attached, |out| {
            writeln!(
                out,
                "{}: {what} ({} ms)",
                attached.endpoint.id, attached.took_ms
            )?;
            endpoint::show_details(out, &attached.endpoint)?;
            for Timed { step, ms } in attached.steps.iter().flatten() {
                writeln!(out, "{ms:>9.3} ms  {step}")?;
            }
            Ok(())
        });
        Ok(())
    }
}

#[derive(Serialize)]
struct Attached {
    #[serde(flatten)]
    endpoint: EndpointView,
    took_ms: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<Vec<Timed>>,
}

#[derive(Serialize)]
struct Timed {
    step: String,
    ms: f64,
}

fn milliseconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e6).round() / 1e3
}

/// Remove everything that endpoints own
///
/// Detaching what is gone succeeds. A container that runs goes on without network.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nucnet-ctl detach web db")]
pub(super) struct DetachArgs {
    /// The endpoints
    #[arg(required = true, value_name = "ID")]
    ids: Vec<String>,
}

impl DetachArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let ids = all(&self.ids, "ID")?;
        if global.dry_run {
            let mut lines = Vec::new();
            for id in &ids {
                lines.extend(undone(&host.plan_detach(id)?));
            }
            return show_plan(global, &lines);
        }
        let detached = host.detach(&ids)?;
        report(
            global,
            &serde_json::json!({
                "detached": detached.removed, "absent": detached.absent
            }),
            |out| {
                detached
                    .removed
                    .iter()
                    .try_for_each(|id| writeln!(out, "{id}: detached"))?;
                detached
                    .absent
                    .iter()
                    .try_for_each(|id| writeln!(out, "{id}: was not there"))
            },
        );
        Ok(())
    }
}
