//! Why a verb failed, what that means to the caller, and what to do about it.

use crate::{
    kernel::{
        FileError,
        bpf::BpfError,
        capability::{self, Lacks},
        helper, netlink, netns, process, resolv, store, sysctl, tap,
    },
    model::{
        EndpointId, IfName, Invalid, Kind, Mac, NetworkName, drift::Drift, netfilter,
        policy_file::PolicyFileError, record, resolv::NoResolver,
    },
};
use nix::{errno::Errno, libc};
use std::{error, fmt, io, net::IpAddr, path::PathBuf};
use thiserror::Error;

/// Why a verb failed.
#[derive(Debug, Error)]
pub enum Error {
    /// A value that is not acceptable.
    #[error(transparent)]
    Invalid(#[from] Invalid),
    /// The file holds no policy.
    #[error("{}", path.display())]
    PolicyFile {
        /// The file.
        path: PathBuf,
        /// Why.
        source: PolicyFileError,
    },
    /// The file with the policy cannot be read.
    #[error("{}: cannot be read", path.display())]
    ReadPolicy {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The id is a container's.
    #[error("endpoint {id} exists already, and is no slot")]
    IdTaken {
        /// The id.
        id: EndpointId,
    },
    /// The datapath carries no slots.
    #[error("slots need the eBPF datapath")]
    NoSlots,
    /// A TAP cannot be made.
    #[error(transparent)]
    Tap(#[from] tap::Error),
    /// There is no such endpoint.
    #[error("there is no endpoint {0}")]
    NoEndpoint(EndpointId),
    /// The endpoint does not publish that.
    #[error("endpoint {id} does not publish {spec}")]
    NoPublish {
        /// The endpoint.
        id: EndpointId,
        /// What was to be taken back.
        spec: String,
    },
    /// The endpoint is there only in part.
    #[error("endpoint {0} is not active")]
    NotActive(EndpointId),
    /// There is no such network.
    #[error("there is no network {0}")]
    NoNetwork(NetworkName),
    /// The id belongs to an endpoint with other settings.
    #[error("endpoint {id} exists already, with another {difference}")]
    EndpointExists {
        /// The id.
        id: EndpointId,
        /// What differs.
        difference: &'static str,
    },
    /// The namespace has an endpoint of that network.
    #[error("{netns} has an endpoint of network {network} already: {owner}")]
    NamespaceTaken {
        /// The namespace.
        netns: String,
        /// The network.
        network: NetworkName,
        /// That endpoint.
        owner: EndpointId,
    },
    /// Another endpoint has the address.
    #[error("address {address} belongs to endpoint {owner}")]
    AddressTaken {
        /// The address.
        address: IpAddr,
        /// Whose it is.
        owner: EndpointId,
    },
    /// The host has the address.
    #[error("address {address} belongs to the host's interface {interface}")]
    AddressOnHost {
        /// The address.
        address: IpAddr,
        /// The interface.
        interface: String,
    },
    /// Another endpoint has the link-layer address.
    #[error("link-layer address {mac} belongs to endpoint {owner}")]
    MacTaken {
        /// The link-layer address.
        mac: Mac,
        /// Whose it is.
        owner: EndpointId,
    },
    /// No address of the network is free.
    #[error("network {network}: no address of {subnet} is free")]
    SubnetFull {
        /// The network.
        network: NetworkName,
        /// Its subnet.
        subnet: String,
    },
    /// Another endpoint has the port.
    #[error("-p {spec}: {taken} is published by endpoint {owner}")]
    PortPublished {
        /// What was wanted.
        spec: String,
        /// What is in the way.
        taken: String,
        /// Whose it is.
        owner: EndpointId,
    },
    /// A socket of the host has the port.
    #[error("-p {spec}: {taken} is in use by {owner}")]
    PortInUse {
        /// What was wanted.
        spec: String,
        /// What is in the way.
        taken: String,
        /// Process id and command, as far as they can be told.
        owner: String,
    },
    /// A static mapping has the port.
    #[error("-p {spec}: {taken} belongs to mapping {owner}")]
    PortMapped {
        /// What was wanted.
        spec: String,
        /// What is in the way.
        taken: String,
        /// Whose it is.
        owner: EndpointId,
    },
    /// Somebody has what a static mapping wants.
    #[error("{spec}: {taken} belongs to {owner}")]
    MappingTaken {
        /// What was wanted.
        spec: String,
        /// What is in the way.
        taken: String,
        /// Whose it is.
        owner: String,
    },
    /// There is no such interface.
    #[error("--ext-if {0}: there is no such interface")]
    NoInterface(IfName),
    /// No host port is left to choose.
    #[error("-p {spec}: no host port is free")]
    NoFreePort {
        /// What was wanted.
        spec: String,
    },
    /// The name belongs to a network with other settings.
    #[error("network {name} exists already, with another {difference}")]
    NetworkExists {
        /// The name.
        name: NetworkName,
        /// What differs.
        difference: &'static str,
    },
    /// The subnet is not free.
    #[error("subnet {subnet} overlaps {other}")]
    SubnetTaken {
        /// The subnet.
        subnet: String,
        /// What it overlaps.
        other: String,
    },
    /// No subnet is left to choose.
    #[error("network {0}: no subnet is free to choose")]
    NoFreeSubnet(NetworkName),
    /// The bridge belongs to another network.
    #[error("bridge {bridge} belongs to network {owner}")]
    BridgeTaken {
        /// The bridge.
        bridge: String,
        /// Its network.
        owner: NetworkName,
    },
    /// The network still has endpoints.
    #[error("network {name} is in use by endpoint {endpoint}")]
    NetworkInUse {
        /// The network.
        name: NetworkName,
        /// One of its endpoints.
        endpoint: EndpointId,
    },
    /// The state belongs to another host.
    #[error("{} belongs to the host with network namespace {found}, this one is {here}", path.display())]
    OtherHost {
        /// The state directory.
        path: PathBuf,
        /// Whose it is.
        found: record::Namespace,
        /// The caller's.
        here: record::Namespace,
    },
    /// The state belongs to another directory of pins.
    #[error("{} goes with --bpffs {}, not with {}", path.display(), found.display(), here.display())]
    OtherBpffs {
        /// The state directory.
        path: PathBuf,
        /// What it goes with.
        found: PathBuf,
        /// What was asked for.
        here: PathBuf,
    },
    /// The program has rights from its file that its caller has not.
    #[error("nucnet-ctl is set-user-ID or set-group-ID, and called by user {0}")]
    SetId(u32),
    /// The process may not do it.
    #[error("not permitted: {0}")]
    NotPermitted(Lacks),
    /// Something that nucnet needs is missing here.
    #[error("this host lacks what nucnet needs: {}", .0.join(", "))]
    Unfit(Vec<&'static str>),
    /// Only programs can do it.
    #[error("{0} is not possible where iptables carries packets")]
    OtherDatapath(&'static str),
    /// What carries packets is not as recorded, so that nobody knows what becomes of them.
    #[error("what carries packets is not as it should be: {}", listed(.0))]
    NotInPlace(Vec<Drift>),
    /// A rule of nucnet's says what nobody here understands.
    #[error(transparent)]
    UnknownRule(#[from] netfilter::Unknown),
    /// No rule can be written for IPv6.
    #[error("{0}: IPv6 is closed where iptables carries packets and there is no ip6tables")]
    NoIp6tables(String),
    /// A program of the host's did not do what it was to do.
    #[error(transparent)]
    Helper(#[from] helper::Error),
    /// The kernel's table of connections cannot be read or changed.
    #[error("cannot use the kernel's table of connections")]
    Conntrack(#[source] io::Error),
    /// What rules log cannot be read.
    #[error("cannot read what the rules log")]
    Log(#[source] io::Error),
    /// Nobody has settled whose tables the rules are in.
    #[error("the state does not say which iptables the rules belong to")]
    NoRules,
    /// The host has no resolver to give.
    #[error("--rootfs: {0}")]
    NoResolver(NoResolver),
    /// `resolv.conf` cannot be mounted or unmounted.
    #[error(transparent)]
    Resolv(resolv::Error),
    /// Numbers ran out.
    #[error(transparent)]
    UsedUp(#[from] record::UsedUp),
    /// The datapath is gone although endpoints are there.
    #[error("the datapath under {} is gone", .0.display())]
    DatapathGone(PathBuf),
    /// A set-up failed at some step.
    #[error("cannot {step}{left}")]
    SetUp {
        /// The step.
        step: String,
        /// Why.
        #[source]
        source: Box<Error>,
        /// What could not be undone.
        left: Left,
    },
    /// A teardown could not remove everything. The rest is gone.
    #[error("{what}: could not remove everything{left}")]
    Teardown {
        /// Of what.
        what: String,
        /// What is left.
        left: Left,
    },
    /// The namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] netns::Error),
    /// The process cannot be used.
    #[error(transparent)]
    Process(#[from] process::Error),
    /// The kernel's network refused.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
    /// A sysctl cannot be set.
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
    /// The BPF side failed.
    #[error(transparent)]
    Bpf(#[from] BpfError),
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] store::Error),
    /// No program sits on any interface that leads out of the host.
    #[error("this host has no uplink")]
    NoUplink,
    /// Signals cannot be taken over.
    #[error("cannot wait for signals")]
    Signals(#[source] io::Error),
    /// Standard output cannot be written to.
    #[error("cannot write to standard output")]
    Output(#[source] io::Error),
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A test asked for it.
    #[cfg(any(debug_assertions, feature = "faults"))]
    #[error("injected before step {0}")]
    Injected(usize),
}

/// What could not be removed, with the reasons.
#[derive(Debug, Default)]
pub struct Left(pub Vec<(String, Error)>);

impl Left {
    /// Notes what could not be removed of something: `what`, unless the error knows better.
    pub(super) fn note(&mut self, what: impl Into<String>, error: Error) {
        match error {
            Error::Teardown { left, .. } => self.0.extend(left.0),
            error => self.0.push((what.into(), error)),
        }
    }

    /// `done` if nothing is left of `what` was to be.
    pub(super) fn or<T>(self, what: impl Into<String>, done: T) -> Result<T, Error> {
        match self.0.is_empty() {
            true => Ok(done),
            false => Err(Error::Teardown {
                what: what.into(),
                left: self,
            }),
        }
    }
}

impl fmt::Display for Left {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0
            .iter()
            .enumerate()
            .try_for_each(|(index, (step, error))| {
                let begin = if index == 0 { "; not undone: " } else { "; " };
                write!(f, "{begin}{step} ({})", chain(error))
            })
    }
}

fn listed(drift: &[Drift]) -> String {
    let each = drift
        .iter()
        .map(|drift| format!("{}: {}", drift.id, drift.problem));
    each.collect::<Vec<_>>().join("; ")
}

/// An error and its causes in one line.
pub fn chain(error: &(dyn error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

impl Error {
    /// What it means to the caller.
    pub fn kind(&self) -> Kind {
        match self {
            Self::Invalid(_) | Self::PolicyFile { .. } | Self::ReadPolicy { .. } => Kind::Usage,
            Self::NoUplink
            | Self::NoEndpoint(_)
            | Self::NoPublish { .. }
            | Self::NoNetwork(_)
            | Self::NoInterface(_) => Kind::NotFound,
            Self::EndpointExists { .. }
            | Self::IdTaken { .. }
            | Self::NamespaceTaken { .. }
            | Self::AddressTaken { .. }
            | Self::AddressOnHost { .. }
            | Self::MacTaken { .. }
            | Self::PortPublished { .. }
            | Self::PortInUse { .. }
            | Self::PortMapped { .. }
            | Self::MappingTaken { .. }
            | Self::NetworkExists { .. }
            | Self::SubnetTaken { .. }
            | Self::BridgeTaken { .. }
            | Self::NetworkInUse { .. }
            | Self::OtherHost { .. }
            | Self::OtherBpffs { .. } => Kind::Conflict,
            Self::NotActive(_)
            | Self::SubnetFull { .. }
            | Self::NoFreePort { .. }
            | Self::NoFreeSubnet(_)
            | Self::UsedUp(_)
            | Self::DatapathGone(_)
            | Self::NoRules
            | Self::NotInPlace(_)
            | Self::UnknownRule(_)
            | Self::Signals(_)
            | Self::Output(_)
            | Self::Teardown { .. } => Kind::Operation,
            Self::OtherDatapath(_)
            | Self::NoIp6tables(_)
            | Self::NoSlots
            | Self::NoResolver(_)
            | Self::NotPermitted(_)
            | Self::SetId(_)
            | Self::Unfit(_) => Kind::Unsupported,
            Self::Resolv(error) => resolv_kind(error),
            Self::SetUp { source, .. } => source.kind(),
            Self::Netns(error) => netns_kind(error),
            Self::Process(error) => match error {
                process::Error::NotFound { .. } | process::Error::Exited { .. } => Kind::NotFound,
                process::Error::Netns(error) => netns_kind(error),
                process::Error::Refused { source, .. } => errno_kind(*source),
            },
            Self::Netlink(error) => match error {
                netlink::Error::Taken { .. }
                | netlink::Error::PeerTaken { .. }
                | netlink::Error::ForeignRoute { .. } => Kind::Conflict,
                netlink::Error::Open { source } => io_kind(source),
                netlink::Error::Netns(error) => netns_kind(error),
                error => error.errno().map_or(Kind::Operation, errno_kind),
            },
            Self::Helper(helper::Error::Missing(_) | helper::Error::Distrusted { .. }) => {
                Kind::Unsupported
            }
            Self::Helper(helper::Error::File { source, .. }) => io_kind(source),
            Self::Helper(_) => Kind::Operation,
            Self::Conntrack(error) | Self::Log(error) => io_kind(error),
            Self::Sysctl(error) => sysctl_kind(error),
            Self::Tap(error) => match error.cause().raw_os_error() {
                // The driver is a module, and not there.
                Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => Kind::Unsupported,
                _ => io_kind(error.cause()),
            },
            Self::Bpf(error) => error.kind(),
            Self::Store(error) => store_kind(error),
            Self::File(error) => io_kind(&error.source),
            #[cfg(any(debug_assertions, feature = "faults"))]
            Self::Injected(_) => Kind::Operation,
        }
    }

    /// The endpoint that has what was wanted.
    pub fn owner(&self) -> Option<&EndpointId> {
        match self {
            Self::NamespaceTaken { owner, .. }
            | Self::AddressTaken { owner, .. }
            | Self::MacTaken { owner, .. }
            | Self::PortPublished { owner, .. }
            | Self::Resolv(resolv::Error::Taken { owner, .. }) => Some(owner),
            _ => None,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        if let Self::SetUp { source, .. } = self {
            return source.hint();
        }
        let own = match self {
            Self::Invalid(invalid) => return Some(invalid.hint()),
            Self::PolicyFile { source, .. } => return Some(source.hint()),
            Self::Store(error) => error.hint(),
            Self::Bpf(error) => error.hint(),
            Self::NoEndpoint(_) => Some("see `nucnet-ctl list`".to_owned()),
            Self::NoPublish { id, .. } => Some(format!("see `nucnet-ctl inspect {id}`")),
            Self::NotActive(_) => Some("attach it again".to_owned()),
            Self::SetId(_) => Some("take the bit off it, and call it as root".to_owned()),
            Self::NoNetwork(name) => Some(format!(
                "see `nucnet-ctl network list`, or: nucnet-ctl network create {name}"
            )),
            Self::EndpointExists { id, .. } => {
                Some(format!("nucnet-ctl detach {id}, or choose another --id"))
            }
            Self::NoSlots => Some("use --datapath ebpf, where the kernel can".to_owned()),
            Self::IdTaken { id } => Some(format!("nucnet-ctl detach {id}")),
            Self::Tap(_) => {
                Some("load the kernel module tun, and see that /dev/net/tun exists".to_owned())
            }
            Self::NamespaceTaken { owner, .. } => Some(format!(
                "attach it to another network, or: nucnet-ctl detach {owner}"
            )),
            Self::AddressTaken { .. } | Self::AddressOnHost { .. } => {
                Some("choose another --ip, or leave it out".to_owned())
            }
            Self::MacTaken { .. } => Some("choose another --mac, or leave it out".to_owned()),
            Self::SubnetFull { .. } => {
                Some("detach what is not needed, or create a larger network".to_owned())
            }
            Self::PortPublished { .. } | Self::PortInUse { .. } => Some(
                "choose another host port or address; 0 has nucnet choose a free port".to_owned(),
            ),
            Self::PortMapped { owner, .. } => Some(format!(
                "choose another host port or address, or: nucnet-ctl nat remove {owner}"
            )),
            Self::MappingTaken { .. } => {
                Some("see `nucnet-ctl nat list` and `nucnet-ctl list`".to_owned())
            }
            Self::NoInterface(_) => Some("see `ip link`".to_owned()),
            Self::NoFreePort { .. } => Some("name a host port".to_owned()),
            Self::NetworkExists { name, .. } => Some(format!(
                "nucnet-ctl network remove {name}, or choose another name"
            )),
            Self::SubnetTaken { .. } | Self::NoFreeSubnet(_) => Some(
                "create a network with --subnet and --subnet6 of free addresses and attach to it \
                 with --network"
                    .to_owned(),
            ),
            Self::BridgeTaken { .. } => Some("choose another --bridge".to_owned()),
            Self::NetworkInUse { endpoint, .. } => Some(format!("nucnet-ctl detach {endpoint}")),
            Self::OtherHost { .. } => {
                Some("give each host its own --state-dir and --bpffs".to_owned())
            }
            Self::OtherBpffs { found, .. } => Some(format!(
                "use --bpffs {}, or another --state-dir",
                found.display()
            )),
            Self::Unfit(_) => Some("mend what `nucnet-ctl doctor` says".to_owned()),
            Self::OtherDatapath(_) => {
                Some("use --datapath ebpf on a kernel that can load it".to_owned())
            }
            Self::NotInPlace(drift) => drift.first().map(|first| first.remedy.clone()),
            Self::NoIp6tables(_) => Some("install ip6tables, or use --datapath ebpf".to_owned()),
            Self::Helper(helper::Error::Missing(_)) => {
                Some("install iptables, or use --datapath ebpf".to_owned())
            }
            Self::Helper(helper::Error::Distrusted { path, .. }) => {
                Some(format!("chown root {0} && chmod go-w {0}", path.display()))
            }
            Self::NoResolver(error) => Some(error.hint()),
            Self::Resolv(error) => error.hint(),
            Self::UsedUp(_) | Self::DatapathGone(_) | Self::NoRules => {
                Some("nucnet-ctl down, then attach again".to_owned())
            }
            Self::Teardown { .. } => Some("repeat it when the cause is mended".to_owned()),
            Self::Netns(netns::Error::Own { .. })
            | Self::Process(process::Error::Netns(netns::Error::Own { .. })) => {
                Some("give the namespace or a process of a container".to_owned())
            }
            Self::Netlink(netlink::Error::PeerTaken { .. }) => {
                Some("choose another --ifname".to_owned())
            }
            Self::Netlink(netlink::Error::Taken { .. }) => {
                Some("remove that interface, or choose another name".to_owned())
            }
            _ => None,
        };
        own.or_else(|| (self.kind() == Kind::Unsupported).then(capability::remedy))
    }
}

impl From<NoResolver> for Error {
    fn from(error: NoResolver) -> Self {
        Self::NoResolver(error)
    }
}

impl From<resolv::Error> for Error {
    fn from(error: resolv::Error) -> Self {
        match error {
            resolv::Error::File(error) => Self::File(error),
            resolv::Error::Store(error) => Self::Store(error),
            error => Self::Resolv(error),
        }
    }
}

fn store_kind(error: &store::Error) -> Kind {
    match error {
        store::Error::Unsafe { .. } => Kind::Unsupported,
        store::Error::Record {
            source: record::Error::Newer(_),
            ..
        } => Kind::Unsupported,
        store::Error::File(error) => io_kind(&error.source),
        store::Error::Sysctl(error) => sysctl_kind(error),
        _ => Kind::Operation,
    }
}

fn sysctl_kind(error: &sysctl::Error) -> Kind {
    match error {
        sysctl::Error::Refused { source, .. } => io_kind(source),
        _ => Kind::Operation,
    }
}

fn resolv_kind(error: &resolv::Error) -> Kind {
    match error {
        resolv::Error::Root {
            source: Errno::ENOENT | Errno::ENOTDIR | Errno::ELOOP | Errno::ENAMETOOLONG,
            ..
        }
        | resolv::Error::HostRoot { .. }
        | resolv::Error::Unusable { .. } => Kind::Usage,
        resolv::Error::Taken { .. } => Kind::Conflict,
        resolv::Error::Covered { .. } => Kind::Operation,
        resolv::Error::Root { source, .. } | resolv::Error::Refused { source, .. } => {
            match source {
                Errno::ENOSYS => Kind::Unsupported,
                errno => errno_kind(*errno),
            }
        }
        resolv::Error::File(error) => io_kind(&error.source),
        resolv::Error::Store(error) => store_kind(error),
    }
}

fn netns_kind(error: &netns::Error) -> Kind {
    match error {
        netns::Error::NotFound { .. } => Kind::NotFound,
        netns::Error::NotANetns { .. } | netns::Error::Own { .. } => Kind::Usage,
        netns::Error::File { source, .. }
        | netns::Error::Directory { source, .. }
        | netns::Error::Thread { source, .. } => io_kind(source),
        netns::Error::Enter { source, .. } | netns::Error::Cookie { source, .. } => {
            errno_kind(*source)
        }
        netns::Error::Panicked { .. } => Kind::Operation,
    }
}

fn errno_kind(errno: Errno) -> Kind {
    match errno {
        Errno::EPERM | Errno::EACCES | Errno::EOPNOTSUPP | Errno::EROFS => Kind::Unsupported,
        _ => Kind::Operation,
    }
}

fn io_kind(error: &io::Error) -> Kind {
    error
        .raw_os_error()
        .map_or(Kind::Operation, |errno| errno_kind(Errno::from_raw(errno)))
}
