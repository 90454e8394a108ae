//! `network`.

use std::{
    collections::BTreeMap,
    io::{self, Write},
    slice,
};

use clap::{Args, Subcommand};
use nucnet_ctl::{
    Error, Host,
    model::{
        Invalid, NetworkName, Problem,
        behaviour::{BehaviourWish, Timeout},
        record::NetworkWish,
    },
    verbs::NetworkView,
};

use super::{
    columns::Columns,
    global::Global,
    output::{done, joined, report, show, show_plan, undone},
    value::{addresses, all, one, optional},
};

/// Create, show and remove networks
///
/// The network "default" (bridge nucnet0, 10.0.42.0/24 and a local IPv6 /64) is made on
/// first use and goes with its last endpoint.
#[derive(Debug, Subcommand)]
pub(super) enum NetworkVerb {
    /// Create a network
    ///
    /// Without a subnet it gets a free one of each family. --gateway, --uplink and --timeout may be
    /// given several times. The same again changes nothing.
    #[command(
        after_help = "Examples:\n  nucnet-ctl network create blue --subnet 10.1.0.0/24 \
        --subnet6 fd00:1::/64 --isolate\n  \
        nucnet-ctl network create games --filtering endpoint-independent --timeout udp=600"
    )]
    Create(Box<CreateArgs>),
    /// Show all networks
    #[command(after_help = "Example:\n  nucnet-ctl network list")]
    List,
    /// Remove a network that has no endpoints
    #[command(after_help = "Example:\n  nucnet-ctl network remove blue")]
    Remove {
        /// Its name
        #[arg(value_name = "NAME")]
        name: String,
    },
}

#[derive(Debug, Args)]
pub(super) struct CreateArgs {
    /// Its name
    #[arg(value_name = "NAME")]
    name: String,
    /// Name of its bridge [default: derived from the network's name]
    #[arg(long, value_name = "IF")]
    bridge: Option<String>,
    /// IPv4 subnet
    #[arg(long, value_name = "CIDR")]
    subnet: Option<String>,
    /// IPv6 subnet
    #[arg(long, value_name = "CIDR")]
    subnet6: Option<String>,
    /// The network's own address in a subnet [default: the first one]
    #[arg(long = "gateway", value_name = "ADDR")]
    gateways: Vec<String>,
    /// Serve publishes at this host interface only
    #[arg(long = "uplink", value_name = "IF")]
    uplinks: Vec<String>,
    /// Largest IP packet in bytes [default: the smallest of the uplinks']
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    mtu: Option<String>,
    /// No direct traffic to or from other networks
    #[arg(long)]
    isolate: bool,
    #[command(flatten)]
    behaviour: BehaviourArgs,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Masquerade (the words are those of RFC 4787)")]
struct BehaviourArgs {
    /// Whose packets come in by an external port that an endpoint has
    ///
    /// endpoint-independent: anybody's, but for an endpoint with an egress policy those of
    /// addresses that it has sent something to; address-dependent: those of such addresses, from
    /// any port; address-and-port-dependent: those of such addresses and ports. Where ports are
    /// chosen per flow (TCP, by default) it is always the last.
    /// [default: address-dependent]
    #[arg(long, value_name = "KIND")]
    filtering: Option<String>,
    /// endpoint-independent: a UDP source port has one external port; per-flow: one for each peer
    /// [default: endpoint-independent]
    #[arg(long, value_name = "KIND")]
    udp_mapping: Option<String>,
    /// The same for TCP [default: per-flow]
    #[arg(long, value_name = "KIND")]
    tcp_mapping: Option<String>,
    /// Keep source ports outside the host's own range, where they are free
    ///
    /// Other masquerade on this host keeps them, too, and the two do not know of each other: give
    /// this only where nobody else on the host translates.
    #[arg(long)]
    keep_ports: bool,
    /// How long something may be idle: tcp-established, tcp-transitory, udp, udp-dns, icmp
    /// [default: 7440, 240, 300, 10, 60]
    #[arg(long = "timeout", value_name = "KIND=SECONDS")]
    timeouts: Vec<String>,
}

impl BehaviourArgs {
    fn wish(&self) -> Result<BehaviourWish, Error> {
        let mut timeouts = BTreeMap::new();
        for text in &self.timeouts {
            let timeout: Timeout = text.parse()?;
            if timeouts.insert(timeout.kind, timeout.seconds).is_some() {
                let invalid = Invalid {
                    field: "--timeout",
                    value: text.clone(),
                    problem: Problem::Twice,
                };
                return Err(invalid.into());
            }
        }
        Ok(BehaviourWish {
            filtering: optional(self.filtering.as_deref(), "--filtering")?,
            udp_mapping: optional(self.udp_mapping.as_deref(), "--udp-mapping")?,
            tcp_mapping: optional(self.tcp_mapping.as_deref(), "--tcp-mapping")?,
            keep_ports: self.keep_ports,
            timeouts,
        })
    }
}

impl CreateArgs {
    fn wish(&self) -> Result<NetworkWish, Error> {
        Ok(NetworkWish {
            bridge: optional(self.bridge.as_deref(), "--bridge")?,
            subnet4: optional(self.subnet.as_deref(), "--subnet")?,
            subnet6: optional(self.subnet6.as_deref(), "--subnet6")?,
            gateways: addresses(&self.gateways, "--gateway")?,
            uplinks: all(&self.uplinks, "--uplink")?,
            mtu: optional(self.mtu.as_deref(), "--mtu")?,
            isolate: self.isolate,
            behaviour: self.behaviour.wish()?,
        })
    }
}

impl NetworkVerb {
    pub(super) fn call(self, host: &Host, global: &Global) -> Result<(), Error> {
        match self {
            Self::Create(arguments) => {
                let name = one::<NetworkName>(&arguments.name, "NAME")?;
                let wish = arguments.wish()?;
                if global.dry_run {
                    return show_plan(global, &done(&host.plan_network(&name, wish)?));
                }
                let view = host.create_network(&name, wish)?;
                report(global, &view, |out| networks(out, slice::from_ref(&view)));
                Ok(())
            }
            Self::List => {
                let views = host.networks()?;
                show(global, &views, |out| networks(out, &views))
            }
            Self::Remove { name } => {
                let name = one::<NetworkName>(&name, "NAME")?;
                if global.dry_run {
                    return show_plan(global, &undone(&host.plan_remove_network(&name)?));
                }
                host.remove_network(&name)?;
                report(global, &serde_json::json!({ "id": name }), |out| {
                    writeln!(out, "{name}: removed")
                });
                Ok(())
            }
        }
    }
}

fn networks(out: &mut dyn Write, views: &[NetworkView]) -> io::Result<()> {
    let mut columns = Columns::new(["NAME", "STATE", "BRIDGE", "SUBNETS", "GATEWAYS", "MTU"]);
    for view in views {
        columns.line([
            &view.id,
            &view.state,
            &view.bridge,
            &joined(&view.subnets),
            &joined(&view.gateways),
            &view.mtu,
        ]);
    }
    columns.print(out)?;
    let mut views = views.iter();
    views.try_for_each(|view| writeln!(out, "{}: {}", view.id, view.behaviour))
}
