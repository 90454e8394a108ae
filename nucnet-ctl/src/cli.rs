//! Arguments, output and exit codes.

use crate::columns::Columns;
use clap::{
    ArgAction, ArgGroup, Args, CommandFactory, Parser, Subcommand, ValueEnum, error::ErrorKind,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nucnet_ctl::{
    AttachRequest, Container, Error, Host, Kind, OBJECT_HASH, Options,
    kernel::capability,
    model::{
        Cidr, EndpointId, IfName, Invalid, Mac, Mtu, NetworkName, Problem,
        behaviour::{BehaviourWish, Filtering, Mapping, Timeout},
        flow::FlowView,
        mapping::MappingSpec,
        parse_ip, parse_sample,
        plan::Plan,
        policy::{Action, Policy},
        probe::Payload,
        publish::{Protocol, PublishSpec},
        record::NetworkWish,
        rule::Rule,
    },
    verbs::{
        DatapathChoice, Dropped, EgressView, EndpointDetails, EndpointView, ExplainRequest, Flows,
        MappingChoice, MappingView, NetworkView, OpenFlows, Origin, Removal, Status, Step, chain,
        read_policy,
    },
};
use serde::Serialize;
use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    io::{self, IsTerminal, Write},
    net::{IpAddr, SocketAddr},
    os::fd::AsFd,
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

static VERSION: LazyLock<String> = LazyLock::new(|| {
    let version = env!("CARGO_PKG_VERSION");
    let abi = nucnet_common::abi::VERSION;
    format!("{version}\nmaps: ABI version {abi}\nBPF object: sha256 {OBJECT_HASH}")
});

/// NAT, port forwarding and egress control for containers and microVMs, by eBPF.
#[derive(Debug, Parser)]
#[command(
    name = "nucnet-ctl",
    version = VERSION.as_str(),
    subcommand_required = true,
    arg_required_else_help = true,
    after_help = "Exit codes: 0 done, 1 failed, 2 bad input, 3 not found, 4 conflict, \
        5 this host cannot do it.",
    after_long_help = AFTER
)]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

const AFTER: &str = "\
Exit codes:
  0  done
  1  the operation failed: of a set-up nothing stayed, of a teardown everything else went
  2  bad command line or bad input: nothing was touched
  3  not found: endpoint, network, network namespace, process
  4  conflict: address, port, id, name or interface is taken; the message names the owner
  5  this host cannot do it: the message says what is missing and how to mend it

Example:
  # A container with one published port, and out of it again
  podman run -d --name web --network none docker.io/library/nginx
  nucnet-ctl attach --pid $(podman inspect -f '{{.State.Pid}}' web) --id web -p 8080:80
  curl http://localhost:8080/
  nucnet-ctl detach web";

#[derive(Debug, Args)]
#[command(next_help_heading = "Global options")]
struct Global {
    /// Where the state of this host is kept
    #[arg(
        long,
        global = true,
        env = "NUCNET_STATE_DIR",
        value_name = "DIR",
        default_value = "/run/nucnet"
    )]
    state_dir: PathBuf,
    /// Where programs and maps are pinned, on a BPF filesystem
    #[arg(
        long,
        global = true,
        env = "NUCNET_BPFFS",
        value_name = "DIR",
        default_value = "/sys/fs/bpf/nucnet"
    )]
    bpffs: PathBuf,
    /// Whose processes cannot bind published ports [default: the root of the cgroup2 hierarchy]
    #[arg(long, global = true, env = "NUCNET_CGROUP", value_name = "DIR")]
    cgroup: Option<PathBuf>,
    /// What carries the packets
    #[arg(
        long,
        global = true,
        env = "NUCNET_DATAPATH",
        value_name = "DATAPATH",
        default_value = "auto"
    )]
    datapath: Datapath,
    /// How results and errors are printed
    #[arg(
        short,
        long,
        global = true,
        env = "NUCNET_OUTPUT",
        value_name = "FORMAT",
        default_value = "text"
    )]
    output: Output,
    /// How the log is written to standard error [default: as --output]
    #[arg(long, global = true, env = "NUCNET_LOG_FORMAT", value_name = "FORMAT")]
    log_format: Option<Output>,
    /// Say more: once for the milliseconds of each step, more often for the log
    #[arg(short, long, global = true, action = ArgAction::Count)]
    verbose: u8,
    /// Show what would be done, and do nothing
    #[arg(long, global = true)]
    dry_run: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Datapath {
    Auto,
    Ebpf,
    Iptables,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    Text,
    Json,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Give a container its network
    ///
    /// With only --pid it works: the default network, an address of nucnet's choice, an id that
    /// is derived and printed. The same id, namespace and settings again change nothing.
    Attach(Box<AttachArgs>),
    /// Remove everything that endpoints own
    ///
    /// Detaching what is gone succeeds.
    #[command(after_help = "Example:\n  nucnet-ctl detach web db")]
    Detach {
        /// The endpoints
        #[arg(required = true, value_name = "ID")]
        ids: Vec<String>,
    },
    /// Forward more ports of the host to an endpoint
    #[command(after_help = "Example:\n  nucnet-ctl publish web 8443:443 127.0.0.1:5353:53/udp")]
    Publish(PublishArgs),
    /// Take ports back, and end what came in by them
    #[command(after_help = "Example:\n  nucnet-ctl unpublish web 8443:443")]
    Unpublish(PublishArgs),
    /// Replace, show and remove the egress policy of an endpoint
    #[command(subcommand)]
    Egress(EgressVerb),
    /// Show all endpoints
    #[command(after_help = "Example:\n  nucnet-ctl list -o json | jq -r '.[].addresses[]'")]
    List,
    /// Show one endpoint with its counters
    #[command(after_help = "Example:\n  nucnet-ctl inspect web")]
    Inspect {
        /// The endpoint
        #[arg(value_name = "ID")]
        id: String,
    },
    /// Show live flows with their translation, state, age and counters; or end them
    ///
    /// A flow is told as conntrack does: source and destination of the packet that opened it, as
    /// it was sent, and the same as it was delivered ("=": unchanged). Counters and ages are the
    /// flow's own; nothing is locked, and flows come and go meanwhile. An endpoint's flows are
    /// those that it opened and those that were opened to it, by siblings too.
    #[command(args_conflicts_with_subcommands = true)]
    #[command(after_help = "Examples:\n  nucnet-ctl flows --endpoint web\n  \
        nucnet-ctl flows -o json | jq '.[] | select(.dport == 443)'\n  \
        nucnet-ctl flows flush --endpoint web")]
    Flows {
        #[command(subcommand)]
        verb: Option<FlowsVerb>,
        #[command(flatten)]
        which: FlowsArgs,
    },
    /// Show the host: datapath, uplinks, networks, programs, maps, and what has drifted
    ///
    /// Drift is where nucnet's records and the kernel say different things; each comes with its
    /// remedy, and none of it makes this fail. Nothing is locked: what another call is changing
    /// just now may show as drift.
    ///
    /// Nanoseconds a packet are the mean over the runs of a program during the sample. While it
    /// lasts, the kernel times every BPF program of the machine, which costs each some tens of
    /// nanoseconds a run.
    #[command(
        after_help = "Examples:\n  nucnet-ctl status\n  nucnet-ctl status --sample 5s\n  \
        nucnet-ctl status -o json | jq '.drift'"
    )]
    Status {
        /// For how long the programs' runs are timed; 0s: not at all
        #[arg(long, value_name = "TIME", default_value = "200ms")]
        sample: String,
    },
    /// Show refused packets, and flows as they come and go, until interrupted
    ///
    /// A packet that is refused is shown once, however often its sender repeats it, with the rule
    /// of the egress policy that denies it, or "default". Of an endpoint, at most 20 refusals and
    /// 200 flows a second are shown; how many were left out is shown with the next one, and
    /// `inspect` counts each packet, also those of discovery that each start sends, which are not
    /// shown. A flow that falls silent is shown as closed when its place is taken. With -o json,
    /// each event is an object on a line of its own. Up to four monitors can run at once.
    #[command(after_help = "Examples:\n  nucnet-ctl monitor --endpoint web\n  \
        nucnet-ctl monitor -o json | jq -c 'select(.event == \"denied\")'")]
    Monitor {
        /// Of this endpoint only
        #[arg(long, value_name = "ID")]
        endpoint: Option<String>,
    },
    /// Show what would become of a packet, and which rule decides
    ///
    /// The programs themselves are asked, in a form that changes nothing: routes, flows, publishes
    /// and policy are those of this moment. Exit code 0 whatever the answer is.
    #[command(
        after_help = "Examples:\n  nucnet-ctl explain --from web --to 192.0.2.1:443\n  \
        nucnet-ctl explain --from uplink --to 203.0.113.5:8080 --source 198.51.100.7\n  \
        nucnet-ctl explain --from web --to 2001:db8::1 --proto icmp -o json | jq .rule"
    )]
    Explain {
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
    },
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
    #[command(after_help = "Examples:\n  nucnet-ctl doctor\n  \
        nucnet-ctl doctor -o json | jq '.[] | select(.severity != \"ok\")'")]
    Doctor,
    /// Create, show and remove networks
    ///
    /// The network "default" (bridge nucnet0, 10.0.42.0/24 and a local IPv6 /64) is made on
    /// first use and goes with its last endpoint.
    #[command(subcommand)]
    Network(NetworkVerb),
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
    #[command(subcommand)]
    Nat(NatVerb),
    /// Remove what dead endpoints and crashes left
    ///
    /// Nothing foreign is touched, and nothing of an endpoint that lives.
    #[command(after_help = "Example:\n  nucnet-ctl gc --dry-run")]
    Gc,
    /// Print shell completions
    #[command(
        after_help = "Example:\n  nucnet-ctl completions bash > /etc/bash_completion.d/nucnet-ctl"
    )]
    Completions {
        /// The shell
        #[arg(value_name = "SHELL")]
        shell: clap_complete::Shell,
    },
    /// Remove every trace of nucnet from this host
    #[command(after_help = "Example:\n  nucnet-ctl down")]
    Down,
}

#[derive(Debug, Args)]
struct PublishArgs {
    /// The endpoint
    #[arg(value_name = "ID")]
    id: String,
    /// [HOST_IP:]HOST_PORT[-END]:PORT[-END][/tcp|udp]
    #[arg(required = true, value_name = "SPEC")]
    specs: Vec<String>,
}

const ATTACH_EXAMPLES: &str = "\
Publishes: [HOST_IP:]HOST_PORT[-END]:PORT[-END][/tcp|udp]
  Without HOST_IP: every local address of the host. Host port 0: nucnet chooses one.
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

#[derive(Debug, Args)]
#[command(after_help = ATTACH_EXAMPLES)]
#[group(id = "container", required = true, multiple = false, args = ["pid", "netns"])]
struct AttachArgs {
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

#[derive(Debug, Subcommand)]
enum EgressVerb {
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
Presets:
  metadata    where clouds hand out credentials: 169.254.169.254, 169.254.170.2, fd00:ec2::254
  private     RFC 1918, 100.64.0.0/10, fc00::/7, fec0::/10
  host        the host's own addresses, whichever it has when a flow is opened
  link-local  169.254.0.0/16, fe80::/10
  internet    all unicast addresses that no registry of special purpose addresses holds
Files: default, allow, deny, dns (as shown); or a container runtime's allowed_cidrs,
  allowed_tcp_ports, allowed_udp_ports; with either, allow_dns and log_denied.

Examples:
  nucnet-ctl egress set job --allow internet:443/tcp --dns 9.9.9.9
  nucnet-ctl egress set job --egress-default allow --deny private --deny metadata --deny host
  nucnet-ctl egress set job --file policy.json --keep-established";

#[derive(Debug, Args)]
struct EgressArgs {
    /// What the container may send to
    #[arg(long = "allow", value_name = "RULE")]
    allow: Vec<String>,
    /// What it may not send to
    #[arg(long = "deny", value_name = "RULE")]
    deny: Vec<String>,
    /// What holds where no rule does [default: deny if anything is allowed, else allow]
    #[arg(long, value_name = "ACTION")]
    egress_default: Option<EgressDefault>,
    /// A resolver: allowed on port 53 where there is a rule, written with --rootfs
    #[arg(long = "dns", value_name = "ADDR")]
    dns: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum EgressDefault {
    Allow,
    Deny,
}

#[derive(Debug, Args)]
struct FlowsArgs {
    /// Those in which this endpoint takes part [default: all]
    #[arg(long, value_name = "ID")]
    endpoint: Option<String>,
}

#[derive(Debug, Subcommand)]
enum FlowsVerb {
    /// End live flows
    ///
    /// Safe while packets pass. A conversation that goes on is a new flow, if its next packet may
    /// open one: a TCP connection is cut off, UDP gets another external port.
    #[command(after_help = "Example:\n  nucnet-ctl flows flush --endpoint web")]
    Flush(FlowsArgs),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum ProbeProtocol {
    Tcp,
    Udp,
    Icmp,
}

#[derive(Debug, Subcommand)]
enum NetworkVerb {
    /// Create a network
    ///
    /// Without a subnet it gets a free one of each family. The same again changes nothing.
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
struct CreateArgs {
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
        let mapping = |text: &Option<String>, field| match text {
            Some(text) => one::<Mapping>(text, field).map(Some),
            None => Ok(None),
        };
        let filtering = self.filtering.as_ref();
        Ok(BehaviourWish {
            filtering: filtering
                .map(|text| one::<Filtering>(text, "--filtering"))
                .transpose()?,
            udp_mapping: mapping(&self.udp_mapping, "--udp-mapping")?,
            tcp_mapping: mapping(&self.tcp_mapping, "--tcp-mapping")?,
            keep_ports: self.keep_ports,
            timeouts,
        })
    }
}

#[derive(Debug, Subcommand)]
enum NatVerb {
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
enum MappingArgs {
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
enum MappedProtocol {
    Tcp,
    Udp,
}

/// Parses, calls, prints.
pub(crate) fn run() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return usage(&error),
    };
    log(&cli.global);
    let output = cli.global.output;
    // It asks other programs, which may need more.
    if !matches!(cli.verb, Verb::Doctor)
        && let Err(error) = capability::drop_others()
    {
        tracing::warn!(
            error = &error as &dyn std::error::Error,
            "cannot drop the capabilities that are not needed"
        );
    }
    match call(cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            complain(
                output,
                error.kind(),
                &chain(&error),
                error.hint().as_deref(),
            );
            ExitCode::from(error.kind().exit_code())
        }
    }
}

/// What clap has to say: help and version to standard output, errors as everybody's.
fn usage(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        // Nobody reads it any more.
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    if wants_json() && error.kind() != ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        let text = error.render().to_string();
        let mut lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let message = lines
            .next()
            .unwrap_or_default()
            .trim_start_matches("error: ")
            .to_owned();
        let rest: Vec<&str> = lines.filter(|line| !line.starts_with("Usage:")).collect();
        complain(Output::Json, Kind::Usage, &message, Some(&rest.join(" ")));
    } else {
        let _ = error.print();
    }
    ExitCode::from(Kind::Usage.exit_code())
}

/// Whether JSON was asked for, told without clap, which has failed.
fn wants_json() -> bool {
    let arguments: Vec<String> = std::env::args().collect();
    let by_flag = arguments
        .iter()
        .enumerate()
        .any(|(index, argument)| match argument.as_str() {
            "-o" | "--output" => arguments.get(index + 1).is_some_and(|next| next == "json"),
            other => matches!(other, "-ojson" | "-o=json" | "--output=json"),
        });
    by_flag || std::env::var("NUCNET_OUTPUT").is_ok_and(|output| output == "json")
}

fn complain(output: Output, kind: Kind, message: &str, hint: Option<&str>) {
    let hint = hint.filter(|hint| !hint.is_empty());
    match output {
        Output::Json => {
            let error = serde_json::json!({
                "error": { "kind": kind, "message": message, "hint": hint }
            });
            eprintln!("{error}");
        }
        Output::Text => {
            eprintln!("error: {message}");
            if let Some(hint) = hint {
                eprintln!("hint: {hint}");
            }
        }
    }
}

fn log(global: &Global) {
    let level = match global.verbose {
        0 | 1 => tracing::Level::WARN,
        2 => tracing::Level::INFO,
        3 => tracing::Level::DEBUG,
        _ => tracing::Level::TRACE,
    };
    let log = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_writer(io::stderr)
        .with_target(false)
        .with_ansi(io::stderr().is_terminal());
    // Who reads JSON reads no lines of text in between.
    match global.log_format.unwrap_or(global.output) {
        Output::Text => log.without_time().init(),
        Output::Json => log.json().init(),
    }
}

fn call(cli: Cli) -> Result<(), Error> {
    let global = cli.global;
    let host = Host::new(Options {
        state_dir: global.state_dir.clone(),
        bpffs: global.bpffs.clone(),
        cgroup: global.cgroup.clone(),
        datapath: match global.datapath {
            Datapath::Auto => DatapathChoice::Auto,
            Datapath::Ebpf => DatapathChoice::Ebpf,
            Datapath::Iptables => DatapathChoice::Iptables,
        },
        ..Options::default()
    })?;
    match cli.verb {
        Verb::Attach(arguments) => attach(&host, &global, *arguments),
        Verb::Detach { ids } => {
            let ids = all(&ids, "ID")?;
            if global.dry_run {
                let mut lines = Vec::new();
                for id in &ids {
                    lines.extend(undone(&host.plan_detach(id)?));
                }
                return show_plan(&global, &lines);
            }
            let detached = host.detach(&ids)?;
            show(
                &global,
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
            )
        }
        Verb::Publish(arguments) => {
            let (id, specs) = publish(&arguments)?;
            if global.dry_run {
                return show_plan(&global, &done(&host.plan_publish(&id, &specs)?));
            }
            show_publishes(&global, &host.publish(&id, &specs)?)
        }
        Verb::Unpublish(arguments) => {
            let (id, specs) = publish(&arguments)?;
            if global.dry_run {
                return show_plan(&global, &undone(&host.plan_unpublish(&id, &specs)?));
            }
            show_publishes(&global, &host.unpublish(&id, &specs)?)
        }
        Verb::Egress(verb) => egress(&host, &global, verb),
        Verb::Gc => {
            let removal = if global.dry_run {
                Removal::Planned
            } else {
                Removal::Done
            };
            let found = host.gc(removal)?;
            show(&global, &found, |out| {
                let removed = if global.dry_run {
                    "would remove"
                } else {
                    "removed"
                };
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
            })
        }
        Verb::Completions { shell } => {
            let mut script = Vec::new();
            clap_complete::generate(shell, &mut Cli::command(), "nucnet-ctl", &mut script);
            // Nobody reads it any more.
            let _ = io::stdout().write_all(&script);
            Ok(())
        }
        Verb::List => {
            let endpoints = host.list()?;
            show(&global, &endpoints, |out| list(out, &endpoints))
        }
        Verb::Inspect { id } => {
            let details = host.inspect(&one(&id, "ID")?)?;
            show(&global, &details, |out| inspected(out, &details))
        }
        Verb::Status { sample } => {
            let status = host.status(parse_sample("--sample", &sample)?)?;
            show(&global, &status, |out| status_text(out, &status))
        }
        Verb::Monitor { endpoint } => {
            let only = endpoint.map(|id| one(&id, "--endpoint")).transpose()?;
            monitor(&host, &global, only)
        }
        Verb::Explain {
            from,
            to,
            proto,
            source,
        } => {
            let request = ExplainRequest {
                from: match from.as_str() {
                    "uplink" => Origin::Uplink,
                    id => Origin::Endpoint(one(id, "--from")?),
                },
                to: one(&to, "--to")?,
                payload: proto.map(|proto| match proto {
                    ProbeProtocol::Tcp => Payload::Tcp,
                    ProbeProtocol::Udp => Payload::Udp,
                    ProbeProtocol::Icmp => Payload::Icmp,
                }),
                source: source.map(|side| one(&side, "--source")).transpose()?,
            };
            let explanation = host.explain(&request)?;
            show(&global, &explanation, |out| writeln!(out, "{explanation}"))
        }
        Verb::Doctor => {
            let findings = host.doctor();
            show(&global, &findings, |out| {
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
        Verb::Flows { verb, which } => flows(&host, &global, verb, &which),
        Verb::Network(verb) => network(&host, &global, verb),
        Verb::Nat(verb) => nat(&host, &global, verb),
        Verb::Down if global.dry_run => show_plan(&global, &host.plan_down()?),
        Verb::Down => {
            host.down()?;
            show(&global, &serde_json::json!({}), |_| Ok(()))
        }
    }
}

fn publish(arguments: &PublishArgs) -> Result<(EndpointId, Vec<PublishSpec>), Error> {
    Ok((one(&arguments.id, "ID")?, all(&arguments.specs, "SPEC")?))
}

fn show_publishes(global: &Global, view: &EndpointView) -> Result<(), Error> {
    show(global, view, |out| {
        writeln!(out, "{}: {}", view.id, joined(published(view)))
    })
}

fn one<T: FromStr<Err = Invalid>>(text: &str, field: &'static str) -> Result<T, Error> {
    Ok(text.parse::<T>().map_err(|invalid| invalid.of(field))?)
}

fn all<T: FromStr<Err = Invalid>>(texts: &[String], field: &'static str) -> Result<Vec<T>, Error> {
    texts.iter().map(|text| one(text, field)).collect()
}

fn addresses(texts: &[String], field: &'static str) -> Result<Vec<IpAddr>, Error> {
    Ok(texts
        .iter()
        .map(|text| parse_ip(field, text))
        .collect::<Result<_, _>>()?)
}

fn policy(egress: &EgressArgs) -> Result<Policy, Error> {
    let default = egress.egress_default.map(|default| match default {
        EgressDefault::Allow => Action::Allow,
        EgressDefault::Deny => Action::Deny,
    });
    Ok(Policy::new(
        default,
        all::<Rule>(&egress.allow, "--allow")?,
        all::<Rule>(&egress.deny, "--deny")?,
        all(&egress.dns, "--dns")?,
    ))
}

/// Prints events until a signal comes, or nobody reads them any more.
fn monitor(host: &Host, global: &Global, only: Option<EndpointId>) -> Result<(), Error> {
    /// How long it takes at most to see that nobody reads.
    const PATIENCE: Duration = Duration::from_millis(200);
    let stop = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, Arc::clone(&stop)).map_err(Error::Signals)?;
    }
    let mut monitor = host.monitor(only)?;
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

fn egress(host: &Host, global: &Global, verb: EgressVerb) -> Result<(), Error> {
    let (id, policy, open_flows) = match verb {
        EgressVerb::Show { id } => return show_egress(global, &host.egress(&one(&id, "ID")?)?),
        EgressVerb::Set {
            id,
            file,
            rules,
            keep_established,
        } => {
            let policy = match file {
                Some(path) => read_policy(&path)?,
                None => policy(&rules)?,
            };
            let open_flows = match keep_established {
                true => OpenFlows::Kept,
                false => OpenFlows::Judged,
            };
            (id, policy, open_flows)
        }
        EgressVerb::Clear { id } => (id, Policy::default(), OpenFlows::Judged),
    };
    let id = one(&id, "ID")?;
    if global.dry_run {
        let (set_up, former) = host.plan_egress(&id, policy, open_flows)?;
        let lines = [done(&set_up), undone(&former)].concat();
        return show_plan(global, &lines);
    }
    show_egress(global, &host.set_egress(&id, policy, open_flows)?)
}

fn show_egress(global: &Global, view: &EgressView) -> Result<(), Error> {
    show(global, view, |out| {
        writeln!(out, "{}", view.id)?;
        egress_text(out, &view.policy)
    })
}

fn egress_text(out: &mut dyn Write, egress: &Policy) -> io::Result<()> {
    writeln!(out, "  egress     {} by default", egress.default_action())?;
    for (name, rules) in [("allow", egress.allow()), ("deny", egress.deny())] {
        if !rules.is_empty() {
            writeln!(out, "    {name:<8} {}", joined(rules))?;
        }
    }
    if !egress.dns().is_empty() {
        let note = match egress.allow_dns() {
            Some(true) => " (allowed)",
            Some(false) => " (not allowed)",
            None => "",
        };
        writeln!(out, "    dns      {}{note}", joined(egress.dns()))?;
    }
    if !egress.log_denied() {
        writeln!(out, "    denials are not told")?;
    }
    Ok(())
}

fn attach(host: &Host, global: &Global, arguments: AttachArgs) -> Result<(), Error> {
    let container = match (arguments.pid, arguments.netns) {
        (Some(pid), _) => Container::Process(pid),
        // clap sees to it that there is one of the two.
        (None, netns) => Container::Netns(netns.unwrap_or_default()),
    };
    let request = AttachRequest {
        id: arguments
            .id
            .map(|id| one::<EndpointId>(&id, "--id"))
            .transpose()?,
        network: one::<NetworkName>(&arguments.network, "--network")?,
        addresses: addresses(&arguments.ips, "--ip")?,
        mac: arguments
            .mac
            .map(|mac| one::<Mac>(&mac, "--mac"))
            .transpose()?,
        ifname: one::<IfName>(&arguments.ifname, "--ifname")?,
        mtu: arguments
            .mtu
            .map(|mtu| one::<Mtu>(&mtu, "--mtu"))
            .transpose()?,
        publishes: all::<PublishSpec>(&arguments.publishes, "-p")?,
        egress: policy(&arguments.egress)?,
        rootfs: arguments.rootfs,
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
    show(global, &attached, |out| {
        writeln!(
            out,
            "{}: {what} ({} ms)",
            attached.endpoint.id, attached.took_ms
        )?;
        endpoint(out, &attached.endpoint)?;
        for Timed { step, ms } in attached.steps.iter().flatten() {
            writeln!(out, "{ms:>9.3} ms  {step}")?;
        }
        Ok(())
    })
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

fn network(host: &Host, global: &Global, verb: NetworkVerb) -> Result<(), Error> {
    match verb {
        NetworkVerb::Create(arguments) => {
            let name = one::<NetworkName>(&arguments.name, "NAME")?;
            let optional = |text: &Option<String>, field| {
                text.as_ref()
                    .map(|text| one::<Cidr>(text, field))
                    .transpose()
            };
            let interface = |name: &String, field| one::<IfName>(name, field);
            let wish = NetworkWish {
                bridge: arguments
                    .bridge
                    .map(|b| interface(&b, "--bridge"))
                    .transpose()?,
                subnet4: optional(&arguments.subnet, "--subnet")?,
                subnet6: optional(&arguments.subnet6, "--subnet6")?,
                gateways: addresses(&arguments.gateways, "--gateway")?,
                uplinks: all(&arguments.uplinks, "--uplink")?,
                mtu: arguments
                    .mtu
                    .map(|mtu| one::<Mtu>(&mtu, "--mtu"))
                    .transpose()?,
                isolate: arguments.isolate,
                behaviour: arguments.behaviour.wish()?,
            };
            if global.dry_run {
                return show_plan(global, &done(&host.plan_network(&name, wish)?));
            }
            let view = host.create_network(&name, wish)?;
            show(global, &view, |out| {
                networks(out, std::slice::from_ref(&view))
            })
        }
        NetworkVerb::List => {
            let views = host.networks()?;
            show(global, &views, |out| networks(out, &views))
        }
        NetworkVerb::Remove { name } => {
            let name = one::<NetworkName>(&name, "NAME")?;
            if global.dry_run {
                return show_plan(global, &[format!("remove network {name}")]);
            }
            host.remove_network(&name)?;
            show(global, &serde_json::json!({ "id": name }), |_| Ok(()))
        }
    }
}

fn flows(
    host: &Host,
    global: &Global,
    verb: Option<FlowsVerb>,
    which: &FlowsArgs,
) -> Result<(), Error> {
    let endpoint = |arguments: &FlowsArgs| {
        let id = arguments.endpoint.as_ref();
        id.map(|id| one::<EndpointId>(id, "--endpoint")).transpose()
    };
    let Some(FlowsVerb::Flush(which)) = verb else {
        return show_flows(global, &host.flows(endpoint(which)?.as_ref())?);
    };
    let endpoint = endpoint(&which)?;
    if global.dry_run {
        let mut count = 0;
        let flows = host.flows(endpoint.as_ref())?;
        flows.for_each(|_| count += 1)?;
        return show_plan(global, &[format!("end {count} flows")]);
    }
    let ended = host.flush_flows(endpoint.as_ref())?;
    show(global, &serde_json::json!({ "ended": ended }), |out| {
        writeln!(out, "{ended} flows ended")
    })
}

/// As JSON they are printed while they are read, an object a line.
fn show_flows(global: &Global, flows: &Flows) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    if global.output == Output::Text {
        let mut views = Vec::new();
        flows.for_each(|flow| views.push(flow))?;
        views.sort_by(|a, b| (a.endpoint, b.age_ms).cmp(&(b.endpoint, a.age_ms)));
        // Nobody listening is no error.
        let _ = flows_text(&mut out, &views).and_then(|()| out.flush());
        return Ok(());
    }
    let mut written = out.write_all(b"[");
    let mut separator = "\n";
    flows.for_each(|flow| {
        if written.is_ok() {
            written = out
                .write_all(separator.as_bytes())
                .and_then(|()| Ok(serde_json::to_writer(&mut out, &flow)?));
            separator = ",\n";
        }
    })?;
    let _ = written
        .and_then(|()| out.write_all(b"\n]\n"))
        .and_then(|()| out.flush());
    Ok(())
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
            &Seconds(flow.age_ms),
            &Seconds(flow.idle_ms),
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

/// Something, or what stands for nothing.
struct Or(Option<SocketAddr>, &'static str);

impl Display for Or {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(address) => write!(f, "{address}"),
            None => f.write_str(self.1),
        }
    }
}

/// A count each way.
struct Both(u64, u64);

impl Display for Both {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.0, self.1)
    }
}

fn mapping(arguments: MappingArgs) -> Result<MappingSpec, Error> {
    let protocol = |proto| match proto {
        MappedProtocol::Tcp => Protocol::Tcp,
        MappedProtocol::Udp => Protocol::Udp,
    };
    let interface = |name: Option<String>| {
        name.map(|name| one::<IfName>(&name, "--ext-if"))
            .transpose()
    };
    Ok(match arguments {
        MappingArgs::Dnat {
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
        MappingArgs::Snat {
            int,
            ext_ip,
            ext_if,
        } => MappingSpec::snat(
            one(&int, "--int")?,
            parse_ip("--ext-ip", &ext_ip)?,
            interface(ext_if)?,
        )?,
        MappingArgs::Hairpin {
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
            lan.map(|lan| one::<Cidr>(&lan, "--lan")).transpose()?,
        )?,
    })
}

fn nat(host: &Host, global: &Global, verb: NatVerb) -> Result<(), Error> {
    match verb {
        NatVerb::Add(arguments) => {
            let spec = mapping(arguments)?;
            if global.dry_run {
                return show_plan(global, &done(&host.plan_add_mapping(&spec)?));
            }
            let view = host.add_mapping(&spec)?;
            show(global, &view, |out| {
                writeln!(out, "{}: {}", view.id, view.spec)?;
                match view.local {
                    true => Ok(()),
                    false => {
                        let address = view.spec.ext_ip();
                        writeln!(out, "  inert until this host has address {address}")
                    }
                }
            })
        }
        NatVerb::List => {
            let views = host.mappings()?;
            show(global, &views, |out| mappings(out, &views))
        }
        NatVerb::Remove { id, words } => {
            let choice = match words {
                Some(words) => MappingChoice::Spec(mapping(words)?),
                // clap sees to it that there is one of the two.
                None => MappingChoice::Id(one(&id.unwrap_or_default(), "ID")?),
            };
            if global.dry_run {
                return show_plan(global, &undone(&host.plan_remove_mappings(Some(&choice))?));
            }
            let removed = host.remove_mapping(&choice)?;
            show(
                global,
                &serde_json::json!({ "removed": removed }),
                |out| match &removed {
                    Some(id) => writeln!(out, "{id}: removed"),
                    None => writeln!(out, "was not there"),
                },
            )
        }
        NatVerb::Clear => {
            if global.dry_run {
                return show_plan(global, &undone(&host.plan_remove_mappings(None)?));
            }
            let removed = host.clear_mappings()?;
            show(global, &serde_json::json!({ "removed": removed }), |out| {
                removed
                    .iter()
                    .try_for_each(|id| writeln!(out, "{id}: removed"))
            })
        }
    }
}

fn mappings(out: &mut dyn Write, views: &[MappingView]) -> io::Result<()> {
    let row = |view: &MappingView| {
        let mut words = view.spec.to_string();
        if let (MappingSpec::Hairpin { lan: None, .. }, Some(clients)) = (&view.spec, view.clients)
        {
            words = format!("{words} (clients in {clients})");
        }
        let state = match view.local {
            true => view.state.to_string(),
            false => format!("{}, inert", view.state),
        };
        [
            view.id.to_string(),
            state,
            view.flows.to_string(),
            view.packets.to_string(),
            view.bytes.to_string(),
            words,
        ]
    };
    table(
        out,
        ["ID", "STATE", "FLOWS", "PACKETS", "BYTES", "MAPPING"],
        views.iter().map(row),
    )
}

fn done(plan: &Plan<Step>) -> Vec<String> {
    plan.steps().iter().map(ToString::to_string).collect()
}

fn undone(plan: &Plan<Step>) -> Vec<String> {
    plan.steps()
        .iter()
        .rev()
        .map(|step| format!("undo: {step}"))
        .collect()
}

fn show_plan(global: &Global, lines: &[String]) -> Result<(), Error> {
    show(global, &serde_json::json!({ "plan": lines }), |out| {
        if lines.is_empty() {
            return writeln!(out, "nothing to do");
        }
        lines
            .iter()
            .enumerate()
            .try_for_each(|(n, line)| writeln!(out, "{:3}. {line}", n + 1))
    })
}

/// Prints a result. Nobody listening is no error.
fn show(
    global: &Global,
    value: &impl Serialize,
    text: impl FnOnce(&mut dyn Write) -> io::Result<()>,
) -> Result<(), Error> {
    let mut out = io::BufWriter::new(io::stdout().lock());
    let _ = match global.output {
        Output::Text => text(&mut out),
        Output::Json => serde_json::to_writer_pretty(&mut out, value)
            .map_err(io::Error::from)
            .and_then(|()| writeln!(out)),
    }
    .and_then(|()| out.flush());
    Ok(())
}

fn joined<T: Display>(items: impl IntoIterator<Item = T>) -> String {
    let items: Vec<String> = items.into_iter().map(|item| item.to_string()).collect();
    if items.is_empty() {
        "-".to_owned()
    } else {
        items.join(", ")
    }
}

fn published(view: &EndpointView) -> Vec<String> {
    let ports = |first: u16, last: u16| match first == last {
        true => first.to_string(),
        false => format!("{first}-{last}"),
    };
    let one = |p: &nucnet_ctl::model::record::Published| {
        let host = match p.host_ip {
            None => "*".to_owned(),
            Some(IpAddr::V4(v4)) => v4.to_string(),
            Some(IpAddr::V6(v6)) => format!("[{v6}]"),
        };
        let (outside, inside) = (
            ports(p.host_port, p.host_port_end),
            ports(p.port, p.port_end),
        );
        format!("{host}:{outside}->{inside}/{}", p.protocol)
    };
    view.published.iter().map(one).collect()
}

fn endpoint(out: &mut dyn Write, view: &EndpointView) -> io::Result<()> {
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
    writeln!(out, "  published  {}", joined(published(view)))?;
    egress_text(out, &view.egress)
}

fn inspected(out: &mut dyn Write, details: &EndpointDetails) -> io::Result<()> {
    writeln!(out, "{}", details.endpoint.id)?;
    endpoint(out, &details.endpoint)?;
    writeln!(out, "  flows      {}", details.flows)?;
    writeln!(out, "  bindings   {}", details.bindings)?;
    for (reason, Dropped { packets, bytes }) in &details.dropped {
        writeln!(
            out,
            "  dropped    {packets} packets ({bytes} bytes): {reason}"
        )?;
    }
    Ok(())
}

fn list(out: &mut dyn Write, views: &[EndpointView]) -> io::Result<()> {
    let row = |view: &EndpointView| {
        [
            view.id.to_string(),
            view.state.to_string(),
            view.network.to_string(),
            joined(&view.addresses),
            joined(published(view)),
        ]
    };
    table(
        out,
        ["ID", "STATE", "NETWORK", "ADDRESSES", "PUBLISHED"],
        views.iter().map(row),
    )
}

fn networks(out: &mut dyn Write, views: &[NetworkView]) -> io::Result<()> {
    let row = |view: &NetworkView| {
        [
            view.id.to_string(),
            view.state.to_string(),
            view.bridge.to_string(),
            joined(&view.subnets),
            joined(&view.gateways),
            view.mtu.to_string(),
        ]
    };
    table(
        out,
        ["NAME", "STATE", "BRIDGE", "SUBNETS", "GATEWAYS", "MTU"],
        views.iter().map(row),
    )?;
    let mut views = views.iter();
    views.try_for_each(|view| writeln!(out, "{}: {}", view.id, view.behaviour))
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
    let uplinks = status.uplinks.iter().map(|uplink| {
        [
            uplink.id.clone(),
            program(uplink.hook, uplink.program, uplink.present),
            if uplink.serves { "yes" } else { "no" }.to_owned(),
            joined(&uplink.addresses),
        ]
    });
    table(
        out,
        ["UPLINK", "PROGRAM", "PUBLISHES", "ADDRESSES"],
        uplinks,
    )?;
    writeln!(out)?;
    let networks = status.networks.iter().map(|status| {
        [
            status.network.id.to_string(),
            status.network.bridge.to_string(),
            program(status.hook, "from_host", status.present),
            status.endpoints.to_string(),
            joined(&status.network.subnets),
        ]
    });
    table(
        out,
        ["NETWORK", "BRIDGE", "PROGRAM", "ENDPOINTS", "SUBNETS"],
        networks,
    )?;
    if !status.programs.is_empty() {
        writeln!(out)?;
    }
    let programs = status.programs.iter().map(|program| {
        let verified = program.verified_instructions.map(|count| count.to_string());
        let time = program.ns_per_run.map(|time| format!("{time:.0}"));
        [
            program.id.clone(),
            time.unwrap_or_else(|| "-".to_owned()),
            program.runs.to_string(),
            verified.unwrap_or_else(|| "-".to_owned()),
        ]
    });
    if !status.programs.is_empty() {
        table(
            out,
            ["PROGRAM", "NS/PACKET", "PACKETS", "VERIFIED INSTRUCTIONS"],
            programs,
        )?;
        writeln!(out)?;
        let maps = status.maps.iter().filter_map(|map| {
            let entries = map.entries?;
            let percent = 100.0 * entries as f64 / map.capacity as f64;
            Some([
                map.id.to_owned(),
                entries.to_string(),
                map.capacity.to_string(),
                format!("{percent:.1} %"),
            ])
        });
        table(out, ["MAP", "ENTRIES", "CAPACITY", "FULL"], maps)?;
    }
    writeln!(out)?;
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

fn table<const N: usize>(
    out: &mut dyn Write,
    head: [&str; N],
    rows: impl Iterator<Item = [String; N]>,
) -> io::Result<()> {
    let mut lines = vec![head.map(str::to_owned)];
    lines.extend(rows);
    let width = |column: usize| {
        lines
            .iter()
            .map(|line| line[column].len())
            .max()
            .unwrap_or(0)
    };
    let widths: [usize; N] = std::array::from_fn(width);
    for line in &lines {
        let cells = line
            .iter()
            .zip(widths)
            .map(|(cell, width)| format!("{cell:<width$}"));
        writeln!(out, "{}", cells.collect::<Vec<_>>().join("  ").trim_end())?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_flags_stand_before_or_after_the_verb() {
        for line in ["nucnet-ctl -o json list", "nucnet-ctl list -o json"] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.global.output, Output::Json);
        }
    }

    #[test]
    fn a_policy_comes_from_flags_or_a_file_and_not_from_both() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        assert!(parse("nucnet-ctl egress set web --allow any --deny host"));
        assert!(parse(
            "nucnet-ctl egress set web --egress-default deny --keep-established"
        ));
        assert!(parse("nucnet-ctl egress set web --file -"));
        assert!(!parse("nucnet-ctl egress set web"));
        assert!(!parse("nucnet-ctl egress set web --keep-established"));
        assert!(!parse("nucnet-ctl egress set web --file f --allow any"));
        assert!(!parse("nucnet-ctl egress show"));
    }

    #[test]
    fn an_attach_needs_a_process_or_a_namespace_and_not_both() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).is_ok();
        assert!(parse("nucnet-ctl attach --pid 1"));
        assert!(parse(
            "nucnet-ctl attach --netns /run/netns/a -p 80:80 -p 81:81 --allow any"
        ));
        assert!(!parse("nucnet-ctl attach"));
        assert!(!parse("nucnet-ctl attach --pid 1 --netns /run/netns/a"));
        assert!(!parse("nucnet-ctl attach --pid -1"));
    }
}
