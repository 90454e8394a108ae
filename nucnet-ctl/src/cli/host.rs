//! `status`, `doctor`, `gc` and `down`: the host as a whole.

use std::io::{self, Write};

use clap::Args;
use nucnet_ctl::{
    Error, Host,
    model::parse_sample,
    verbs::{Removal, Status},
};

use super::{
    columns::{Columns, Or},
    global::Global,
    output::{joined, report, show, show_plan},
};

/// Show the host: datapath, uplinks, networks, programs, maps, and what has drifted
///
/// Drift is where nucnet's records and the kernel say different things; each comes with its
/// remedy, and none of it makes this fail. Nothing is locked: what another call is changing
/// just now may show as drift.
///
/// Nanoseconds a packet are the mean over the runs of a program during the sample. While it
/// lasts, the kernel times every BPF program of the machine, which costs each some tens of
/// nanoseconds a run.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  nucnet-ctl status\n  nucnet-ctl status --sample 5s\n  \
    nucnet-ctl status -o json | jq '.drift'"
)]
pub(super) struct StatusArgs {
    /// For how long the programs' runs are timed; 0s: not at all
    #[arg(long, value_name = "TIME", default_value = "200ms")]
    sample: String,
}

impl StatusArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let status = host.status(parse_sample("--sample", &self.sample)?)?;
        show(global, &status, |out| status_text(out, &status))
    }
}

/// Show what this kernel and this host offer and lack, and what mends it
///
/// Works before anything is attached, and without root as far as it can. Each line is ok,
/// warn (it works, but somebody may be surprised), fail (something that nucnet needs is
/// missing) or unknown (it could not be looked at). Exit code 5 if a line fails.
///
/// Features of the kernel are found by trying, as far as that changes nothing: the programs
/// are loaded and dropped again, and a bridge is made in a network namespace of its own.
///
/// Capabilities needed: CAP_NET_ADMIN for interfaces, routes and sysctls; CAP_SYS_ADMIN to
/// enter namespaces; CAP_BPF and CAP_PERFMON (CAP_SYS_ADMIN stands for both) for programs and
/// maps; CAP_SYS_PTRACE for `attach --pid` of processes with another user or more
/// capabilities; CAP_DAC_OVERRIDE for paths that only another user may enter.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  nucnet-ctl doctor\n  \
    nucnet-ctl doctor -o json | jq '.[] | select(.severity != \"ok\")'")]
pub(super) struct DoctorArgs;

impl DoctorArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let findings = host.doctor();
        show(global, &findings, |out| {
            findings.iter().try_for_each(|finding| {
                let (severity, id, text) = (finding.severity, finding.id, &finding.text);
                writeln!(out, "{severity:<8}{id}: {text}")?;
                match &finding.remedy {
                    Some(remedy) => writeln!(out, "        remedy: {remedy}"),
                    None => Ok(()),
                }
            })
        })?;
        Host::fitness(&findings)
    }
}

/// Remove what dead endpoints and crashes left
///
/// Nothing foreign is touched, and nothing of an endpoint that lives. Uplinks that have come since
/// the last call get their programs. When nothing of nucnet's is left, datapath and state go, too.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nucnet-ctl gc --dry-run")]
pub(super) struct GcArgs;

impl GcArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let (removal, removed) = match global.dry_run {
            true => (Removal::Planned, "would remove"),
            false => (Removal::Done, "removed"),
        };
        let found = host.gc(removal)?;
        let text = |out: &mut dyn Write| {
            found
                .removed
                .iter()
                .try_for_each(|what| writeln!(out, "{removed} {what}"))?;
            found.unrecorded.iter().try_for_each(|id| {
                writeln!(
                    out,
                    "endpoint {id} has no sound record: detach it when it may go"
                )
            })
        };
        if global.dry_run {
            return show(global, &found, text);
        }
        report(global, &found, text);
        Ok(())
    }
}

/// Remove every trace of nucnet from this host
///
/// Containers that run lose their network.
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  nucnet-ctl down")]
pub(super) struct DownArgs;

impl DownArgs {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        if global.dry_run {
            return show_plan(global, &host.plan_down()?);
        }
        host.down()?;
        report(global, &serde_json::json!({}), |_| Ok(()));
        Ok(())
    }
}

fn status_text(out: &mut dyn Write, status: &Status) -> io::Result<()> {
    let (host, object) = (&status.host, &status.object);
    let none = || "none".to_owned();
    writeln!(
        out,
        "datapath   {}: {}",
        status.datapath.unwrap_or("none"),
        status.reason
    )?;
    writeln!(out, "host       {}", host.netns)?;
    let state = if host.has_state { "" } else { " (empty)" };
    writeln!(out, "state      {}{state}", host.state_dir.display())?;
    writeln!(out, "bpffs      {}", host.bpffs.display())?;
    let cgroup = host.cgroup.as_ref().map(|path| path.display().to_string());
    writeln!(out, "cgroup     {}", cgroup.unwrap_or_else(none))?;
    let loaded = match (object.current, &object.loaded_sha256) {
        (Some(true), _) => "loaded".to_owned(),
        (_, Some(other)) => {
            format!("another is loaded ({other:.12}): the next attach exchanges it")
        }
        _ => "not loaded".to_owned(),
    };
    writeln!(
        out,
        "object     {:.12}, ABI version {}: {loaded}",
        object.sha256, object.abi
    )?;
    writeln!(out, "endpoints  {}", status.endpoints)?;
    writeln!(out, "mappings   {}", status.mappings)?;

    let program = |hook: Option<&str>, name: &str, present: bool| match (hook, present) {
        (Some(hook), true) => format!("{name} ({hook})"),
        (Some(hook), false) => format!("{name} ({hook}) is MISSING"),
        (None, _) => "-".to_owned(),
    };
    writeln!(out)?;
    let mut columns = Columns::new(["UPLINK", "PROGRAM", "PUBLISHES", "ADDRESSES"]);
    for uplink in &status.uplinks {
        columns.line([
            &uplink.id,
            &program(uplink.hook, uplink.program, uplink.present),
            if uplink.serves { &"yes" } else { &"no" },
            &joined(&uplink.addresses),
        ]);
    }
    columns.print(out)?;
    writeln!(out)?;
    let mut columns = Columns::new(["NETWORK", "BRIDGE", "PROGRAM", "ENDPOINTS", "SUBNETS"]);
    for status in &status.networks {
        columns.line([
            &status.network.id,
            &status.network.bridge,
            &program(status.hook, "from_host", status.present),
            &status.endpoints,
            &joined(&status.network.subnets),
        ]);
    }
    columns.print(out)?;
    writeln!(out)?;
    if !status.programs.is_empty() {
        let mut columns =
            Columns::new(["PROGRAM", "NS/PACKET", "PACKETS", "VERIFIED INSTRUCTIONS"]);
        for program in &status.programs {
            let time = program.ns_per_run.map(|time| format!("{time:.0}"));
            columns.line([
                &program.id,
                &Or(time, "-"),
                &program.runs,
                &Or(program.verified_instructions, "-"),
            ]);
        }
        columns.print(out)?;
        writeln!(out)?;
        let mut columns = Columns::new(["MAP", "ENTRIES", "CAPACITY", "FULL"]);
        for map in &status.maps {
            if let Some(entries) = map.entries {
                let percent = 100.0 * entries as f64 / map.capacity as f64;
                columns.line([
                    &map.id,
                    &entries,
                    &map.capacity,
                    &format_args!("{percent:.1} %"),
                ]);
            }
        }
        columns.print(out)?;
        writeln!(out)?;
    }
    if status.drift.is_empty() {
        return writeln!(out, "no drift: records and kernel agree");
    }
    writeln!(out, "drift:")?;
    status.drift.iter().try_for_each(|drift| {
        writeln!(
            out,
            "  {}: {}\n    remedy: {}",
            drift.id, drift.problem, drift.remedy
        )
    })
}
