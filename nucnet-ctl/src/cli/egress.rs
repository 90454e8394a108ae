//! `egress`, and the flags of a policy.

use std::{
    io::{self, Write},
    path::PathBuf,
};

use clap::{ArgGroup, Args, Subcommand, ValueEnum};
use nucnet_ctl::{
    Error, Host,
    model::{
        policy::{Action, Policy},
        rule::Rule,
    },
    verbs::{EgressView, OpenFlows, read_policy},
};

use super::{
    global::Global,
    output::{done, joined, report, show, show_plan, undone},
    value::{all, one},
};

/// Replace, show and remove the egress policy of an endpoint
#[derive(Debug, Subcommand)]
pub(super) enum EgressVerb {
    /// Replace the policy of an endpoint, by flags or by a file
    ///
    /// One policy is in force until the other is, with nothing in between. Flows that the
    /// endpoint opened are judged again: those that are allowed lose nothing, the others end.
    /// The resolvers given before stay unless --dns or the file names others.
    #[command(after_help = EGRESS_EXAMPLES)]
    #[command(group(ArgGroup::new("policy").required(true).multiple(true)
        .args(["allow", "deny", "egress_default", "dns", "file"])))]
    Set {
        /// The endpoint
        #[arg(value_name = "ID")]
        id: String,
        /// The policy, in JSON or (.toml) TOML; - is standard input
        #[arg(long, value_name = "F",
            conflicts_with_all = ["allow", "deny", "egress_default", "dns"])]
        file: Option<PathBuf>,
        #[command(flatten)]
        rules: EgressArgs,
        /// Leave flows alone that are open now
        #[arg(long)]
        keep_established: bool,
    },
    /// Show the policy of an endpoint
    #[command(after_help = "Example:\n  nucnet-ctl egress show web")]
    Show {
        /// The endpoint
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Remove the policy of an endpoint: everything may leave
    #[command(after_help = "Example:\n  nucnet-ctl egress clear web")]
    Clear {
        /// The endpoint
        #[arg(value_name = "ID")]
        id: String,
    },
}

const EGRESS_EXAMPLES: &str = "\
Rules: CIDR|any|PRESET[:PORT[-END][,PORT[-END]]...][/tcp|udp|icmp]
  IPv6 with a port in brackets. Deny beats allow; any --allow makes the default deny.
  --allow, --deny and --dns may be given several times.
Presets:
  metadata    where clouds hand out credentials: 169.254.169.254, 169.254.170.2, fd00:ec2::254
  private     RFC 1918, 100.64.0.0/10, fc00::/7, fec0::/10
  host        the host's own addresses, whichever it has when a flow is opened
  link-local  169.254.0.0/16, fe80::/10
  internet    all unicast addresses that no registry of special purpose addresses holds
Files: default, allow, deny, dns (as shown); or a container runtime's allowed_cidrs,
  allowed_tcp_ports, allowed_udp_ports; with either, allow_dns, log_denied and reject.

Examples:
  nucnet-ctl egress set job --allow internet:443/tcp --dns 9.9.9.9
  nucnet-ctl egress set job --egress-default allow --deny private --deny metadata --deny host
  nucnet-ctl egress set job --egress-default deny --reject
  nucnet-ctl egress set job --file policy.json --keep-established";

#[derive(Debug, Args)]
pub(super) struct EgressArgs {
    /// What the endpoint may send to
    #[arg(long = "allow", value_name = "RULE")]
    allow: Vec<String>,
    /// What it may not send to
    #[arg(long = "deny", value_name = "RULE")]
    deny: Vec<String>,
    /// What holds where no rule does [default: deny if anything is allowed, else allow]
    #[arg(long, value_name = "ACTION")]
    egress_default: Option<EgressDefault>,
    /// A resolver: allowed on port 53 where there is a rule
    #[arg(long = "dns", value_name = "ADDR")]
    dns: Vec<String>,
    /// Answer what is denied (TCP by a reset, else an ICMP error) instead of dropping it silently
    #[arg(long)]
    reject: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EgressDefault {
    Allow,
    Deny,
}

impl EgressArgs {
    pub(super) fn policy(&self) -> Result<Policy, Error> {
        let default = self.egress_default.map(|default| match default {
            EgressDefault::Allow => Action::Allow,
            EgressDefault::Deny => Action::Deny,
        });
        Ok(Policy::new(
            default,
            all::<Rule>(&self.allow, "--allow")?,
            all::<Rule>(&self.deny, "--deny")?,
            all(&self.dns, "--dns")?,
        )
        .with_denied_rejected(self.reject))
    }
}

impl EgressVerb {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        let (id, policy, open_flows) = match self {
            Self::Show { id } => {
                let view = host.egress(&one(&id, "ID")?)?;
                return show(global, &view, |out| egress(out, &view));
            }
            Self::Set {
                id,
                file,
                rules,
                keep_established,
            } => {
                let policy = match file {
                    Some(path) => {
                        let policy = read_policy(&path)?;
                        let rejects = policy.rejects() || rules.reject;
                        policy.with_denied_rejected(rejects)
                    }
                    None => rules.policy()?,
                };
                let open_flows = match keep_established {
                    true => OpenFlows::Kept,
                    false => OpenFlows::Judged,
                };
                (id, policy, open_flows)
            }
            Self::Clear { id } => (id, Policy::default(), OpenFlows::Judged),
        };
        let id = one(&id, "ID")?;
        if global.dry_run {
            let (set_up, former) = host.plan_egress(&id, policy, open_flows)?;
            let lines = [done(&set_up), undone(&former)].concat();
            return show_plan(global, &lines);
        }
        let view = host.set_egress(&id, policy, open_flows)?;
        report(global, &view, |out| egress(out, &view));
        Ok(())
    }
}

fn egress(out: &mut dyn Write, view: &EgressView) -> io::Result<()> {
    writeln!(out, "{}", view.id)?;
    show_policy(out, &view.policy)
}

pub(super) fn show_policy(out: &mut dyn Write, egress: &Policy) -> io::Result<()> {
    writeln!(out, "  egress     {} by default", egress.default_action())?;
    for (name, rules) in [("allow", egress.allow()), ("deny", egress.deny())] {
        if !rules.is_empty() {
            writeln!(out, "    {name:<8} {}", joined(rules))?;
        }
    }
    if !egress.guard().is_empty() {
        writeln!(out, "    guard    {}", joined(egress.guard()))?;
    }
    if !egress.dns().is_empty() {
        let note = match egress.allow_dns() {
            Some(true) => " (allowed)",
            Some(false) => " (not allowed)",
            None => "",
        };
        writeln!(out, "    dns      {}{note}", joined(egress.dns()))?;
    }
    if egress.rejects() {
        writeln!(out, "    denials are answered")?;
    }
    if !egress.log_denied() {
        writeln!(out, "    denials are not told")?;
    }
    Ok(())
}
