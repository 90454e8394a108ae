//! `nat`: static mappings.

use std::io::{self, Write};

use clap::{Subcommand, ValueEnum};
use nucnet_ctl::{
    Error, Host,
    model::{mapping::MappingSpec, parse_ip, publish::Protocol},
    verbs::{MappingChoice, MappingView},
};

use super::{
    columns::Columns,
    global::Global,
    output::{done, report, show, show_plan, undone},
    value::{one, optional},
};

/// Map addresses and ports that belong to no endpoint
///
/// A dnat leads ports of an external address to an internal one, be that an endpoint's or
/// that of any host which this one can reach; clients keep their addresses. A snat has
/// internal addresses leave as an external one. A hairpin has clients in the network of the
/// internal address reach it by the external one: they are seen as this host there, so that
/// the replies come back this way. A dnat and a hairpin of the same ports go together: the
/// one for everybody else, the other for the neighbours.
///
/// An external address that the host does not have now is accepted; the mapping begins to
/// work when the address comes. Adding twice is adding once, and removing what is gone
/// succeeds.
#[derive(Debug, Subcommand)]
pub(super) enum NatVerb {
    /// Add a mapping
    #[command(
        subcommand,
        after_help = "Examples:\n  nucnet-ctl nat add dnat --ext-ip 192.0.2.1 --ports 80,443 --int-ip 10.0.0.5\n  \
        nucnet-ctl nat add hairpin --ext-ip 192.0.2.1 --ports 80,443 --int-ip 10.0.0.5\n  \
        nucnet-ctl nat add snat --int 10.0.0.0/24 --ext-ip 192.0.2.1"
    )]
    Add(MappingArgs),
    /// Show all mappings with their counters
    #[command(after_help = "Example:\n  nucnet-ctl nat list -o json | jq '.[].packets'")]
    List,
    /// Remove a mapping, by its id or by the words of the add, and end what came by it
    #[command(
        args_conflicts_with_subcommands = true,
        subcommand_negates_reqs = true,
        after_help = "Examples:\n  nucnet-ctl nat remove dnat-3\n  \
        nucnet-ctl nat remove snat --int 10.0.0.0/24 --ext-ip 192.0.2.1"
    )]
    Remove {
        /// Its id
        #[arg(value_name = "ID", required = true)]
        id: Option<String>,
        /// The words of the add
        #[command(subcommand)]
        words: Option<MappingArgs>,
    },
    /// Remove all mappings
    #[command(after_help = "Example:\n  nucnet-ctl nat clear")]
    Clear,
}

#[derive(Debug, Subcommand)]
pub(super) enum MappingArgs {
    /// Ports of an external address lead to an internal one
    Dnat {
        /// The external address
        #[arg(long, value_name = "ADDR")]
        ext_ip: String,
        /// Its ports: PORT[-END][,PORT[-END]]...
        #[arg(long, value_name = "LIST")]
        ports: String,
        /// The protocol
        #[arg(long, value_name = "PROTO", default_value = "tcp")]
        proto: MappedProtocol,
        /// The internal address
        #[arg(long, value_name = "ADDR")]
        int_ip: String,
        /// The internal port for the first of the ports [default: the same ports]
        #[arg(long, value_name = "PORT")]
        int_port: Option<u16>,
        /// Only what comes in by this interface
        #[arg(long, value_name = "IF")]
        ext_if: Option<String>,
    },
    /// Internal addresses leave as an external one
    Snat {
        /// The internal addresses
        #[arg(long, value_name = "CIDR")]
        int: String,
        /// The external address
        #[arg(long, value_name = "ADDR")]
        ext_ip: String,
        /// Only what leaves by this interface
        #[arg(long, value_name = "IF")]
        ext_if: Option<String>,
    },
    /// Clients near the internal address reach it by the external one
    Hairpin {
        /// The external address
        #[arg(long, value_name = "ADDR")]
        ext_ip: String,
        /// The internal address
        #[arg(long, value_name = "ADDR")]
        int_ip: String,
        /// The ports: PORT[-END][,PORT[-END]]...
        #[arg(long, value_name = "LIST")]
        ports: String,
        /// The protocol
        #[arg(long, value_name = "PROTO", default_value = "tcp")]
        proto: MappedProtocol,
        /// Where the clients are [default: the subnet of this host with the internal address]
        #[arg(long, value_name = "CIDR")]
        lan: Option<String>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum MappedProtocol {
    Tcp,
    Udp,
}

impl NatVerb {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        match self {
            Self::Add(arguments) => {
                let spec = arguments.spec()?;
                if global.dry_run {
                    return show_plan(global, &done(&host.plan_add_mapping(&spec)?));
                }
                let view = host.add_mapping(&spec)?;
                report(global, &view, |out| {
                    writeln!(out, "{}: {}", view.id, view.spec)?;
                    match view.local {
                        true => Ok(()),
                        false => {
                            let address = view.spec.ext_ip();
                            writeln!(out, "  inert until this host has address {address}")
                        }
                    }
                });
                Ok(())
            }
            Self::List => {
                let views = host.mappings()?;
                show(global, &views, |out| mappings(out, &views))
            }
            Self::Remove { id, words } => {
                let choice = match words {
                    Some(words) => MappingChoice::Spec(words.spec()?),
                    // clap sees to it that there is one of the two.
                    None => MappingChoice::Id(one(&id.unwrap_or_default(), "ID")?),
                };
                if global.dry_run {
                    return show_plan(global, &undone(&host.plan_remove_mappings(Some(&choice))?));
                }
                let removed = host.remove_mapping(&choice)?;
                report(
                    global,
                    &serde_json::json!({ "removed": removed }),
                    |out| match &removed {
                        Some(id) => writeln!(out, "{id}: removed"),
                        None => writeln!(out, "{choice}: was not there"),
                    },
                );
                Ok(())
            }
            Self::Clear => {
                if global.dry_run {
                    return show_plan(global, &undone(&host.plan_remove_mappings(None)?));
                }
                let removed = host.clear_mappings()?;
                report(global, &serde_json::json!({ "removed": removed }), |out| {
                    removed
                        .iter()
                        .try_for_each(|id| writeln!(out, "{id}: removed"))
                });
                Ok(())
            }
        }
    }
}

impl MappingArgs {
    fn spec(self) -> Result<MappingSpec, Error> {
        let protocol = |proto| match proto {
            MappedProtocol::Tcp => Protocol::Tcp,
            MappedProtocol::Udp => Protocol::Udp,
        };
        let interface = |name: Option<String>| optional(name.as_deref(), "--ext-if");
        Ok(match self {
            Self::Dnat {
                ext_ip,
                ports,
                proto,
                int_ip,
                int_port,
                ext_if,
            } => MappingSpec::dnat(
                parse_ip("--ext-ip", &ext_ip)?,
                one(&ports, "--ports")?,
                protocol(proto),
                parse_ip("--int-ip", &int_ip)?,
                int_port,
                interface(ext_if)?,
            )?,
            Self::Snat {
                int,
                ext_ip,
                ext_if,
            } => MappingSpec::snat(
                one(&int, "--int")?,
                parse_ip("--ext-ip", &ext_ip)?,
                interface(ext_if)?,
            )?,
            Self::Hairpin {
                ext_ip,
                int_ip,
                ports,
                proto,
                lan,
            } => MappingSpec::hairpin(
                parse_ip("--ext-ip", &ext_ip)?,
                parse_ip("--int-ip", &int_ip)?,
                one(&ports, "--ports")?,
                protocol(proto),
                optional(lan.as_deref(), "--lan")?,
            )?,
        })
    }
}

fn mappings(out: &mut dyn Write, views: &[MappingView]) -> io::Result<()> {
    let mut columns = Columns::new(["ID", "STATE", "FLOWS", "PACKETS", "BYTES", "MAPPING"]);
    for view in views {
        let mut words = view.spec.to_string();
        if let (MappingSpec::Hairpin { lan: None, .. }, Some(clients)) = (&view.spec, view.clients)
        {
            words = format!("{words} (clients in {clients})");
        }
        let state = match view.local {
            true => view.state.to_string(),
            false => format!("{}, inert", view.state),
        };
        columns.line([
            &view.id,
            &state,
            &view.flows,
            &view.packets,
            &view.bytes,
            &words,
        ]);
    }
    columns.print(out)
}
