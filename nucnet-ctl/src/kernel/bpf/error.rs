use std::{fmt, fs, io, path::PathBuf};

use aya::{
    EbpfError,
    maps::MapError,
    pin::PinError,
    programs::{ProgramError, tc::TcError},
};
use nix::libc;
use nucnet_common::abi::{map, size};
use thiserror::Error;

use crate::{
    kernel::capability::{self, Lacks},
    model::Kind,
};

/// What can go wrong with programs, maps, links and their pins.
#[derive(Debug, Error)]
pub enum BpfError {
    /// `--bpffs` is not on a BPF filesystem.
    #[error("{}: not on a BPF filesystem", path.display())]
    NotBpffs {
        /// The directory that was asked for.
        path: PathBuf,
    },
    /// The directory cannot be used as it is.
    #[error("{}: {problem}", path.display())]
    UnusableDirectory {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: DirectoryProblem,
    },
    /// The pins are those of another nucnet, whose maps mean something else.
    #[error("{}: made by a nucnet whose maps have {found}, this one has ABI version {wanted}", path.display())]
    OtherAbi {
        /// The directory of pins.
        path: PathBuf,
        /// What its `version` says.
        found: String,
        /// [`nucnet_common::abi::VERSION`].
        wanted: u32,
    },
    /// A pinned map has other dimensions than this version's.
    #[error(
        "{}: {dimension} is {found}, this version of nucnet has {wanted}", path.display()
    )]
    OtherMap {
        /// The pin.
        path: PathBuf,
        /// "key size", "value size", "capacity".
        dimension: &'static str,
        /// The pinned map's.
        found: u32,
        /// The embedded object's.
        wanted: u32,
    },
    /// The pins belong to another host (network namespace).
    #[error(
        "{}: belongs to the host with network namespace cookie {found}, this one has {wanted}",
        path.display()
    )]
    OtherHost {
        /// The directory of pins.
        path: PathBuf,
        /// Cookie in the `settings` map.
        found: u64,
        /// Cookie of the calling thread's network namespace.
        wanted: u64,
    },
    /// The kernel did not let us.
    #[error("{object}: not permitted{reasons}")]
    NotPermitted {
        /// What was being made or opened.
        object: String,
        /// What is missing, as far as it can be told.
        reasons: Reasons,
        /// The refusal.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// The embedded object does not load.
    #[error("BPF object {hash:.12}: cannot be loaded")]
    Object {
        /// SHA-256 of the object.
        hash: &'static str,
        /// Why.
        #[source]
        source: Box<EbpfError>,
    },
    /// The object, or the directory of pins, lacks a program or has one of another kind.
    #[error("program {name}: missing, or of an unexpected kind")]
    NoProgram {
        /// Its name.
        name: String,
    },
    /// The verifier or the kernel refuses a program, or the program cannot be opened.
    #[error("program {name}: cannot be {action}")]
    Program {
        /// Its name.
        name: String,
        /// "loaded", "opened", ...
        action: &'static str,
        /// Why.
        #[source]
        source: Box<ProgramError>,
    },
    /// A pin cannot be made.
    #[error("{}: cannot be pinned", path.display())]
    Pin {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<PinError>,
    },
    /// A map cannot be opened.
    #[error("map {name}: cannot be opened")]
    OpenMap {
        /// Its name.
        name: &'static str,
        /// Why.
        #[source]
        source: Box<MapError>,
    },
    /// An operation on a map's entries failed.
    #[error("map {name}: cannot {action}{}", FullHint(name, source))]
    Map {
        /// Its name.
        name: &'static str,
        /// "insert", "remove", ...
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A program cannot be attached or detached.
    #[error("{program} on {target}: cannot {action}")]
    Attach {
        /// The program.
        program: &'static str,
        /// Interface or cgroup.
        target: String,
        /// "attach", "detach", "replace", "list".
        action: &'static str,
        /// Why.
        #[source]
        source: Box<AttachCause>,
    },
    /// A file or directory of the kernel's cannot be read or changed.
    #[error("{}: cannot {action}", path.display())]
    File {
        /// Which.
        path: PathBuf,
        /// "read", "create", "remove", ...
        action: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A sysctl says something that nobody expected.
    #[error("{}: cannot make sense of {text:?}", path.display())]
    Sysctl {
        /// Which.
        path: PathBuf,
        /// What it says.
        text: String,
    },
    /// The clock cannot be read.
    #[error("cannot tell the time")]
    Clock {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// As many monitors run as may run at once.
    #[error("{} monitors are running already: processes {}", holders.len(), Listed(holders))]
    MonitorsBusy {
        /// Their process ids.
        holders: Vec<u32>,
    },
    /// Somebody reads the programs' debug output, which has one reader.
    #[error(
        "another monitor shows the programs' debug output: process {}",
        Listed(holders)
    )]
    LogBusy {
        /// Its process id.
        holders: Vec<u32>,
    },
    /// The programs' debug output cannot be read.
    #[error("the programs' debug output cannot be read")]
    Log {
        /// Why.
        #[source]
        source: Box<aya_log::Error>,
    },
    /// There is no cgroup2 hierarchy.
    #[error("no cgroup2 hierarchy is mounted")]
    NoCgroup2,
    /// Every port is the host's own.
    #[error(
        "net.ipv4.ip_local_port_range is {first}-{last}: it leaves no block of 1024 ports for \
         masquerade"
    )]
    NoDynamicPorts {
        /// First ephemeral port of the host.
        first: u16,
        /// Last.
        last: u16,
    },
    /// The network namespace's cookie cannot be read.
    #[error("network namespace cookie: cannot be read")]
    NetnsCookie {
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Why a program could not be attached.
#[derive(Debug, Error)]
pub enum AttachCause {
    /// By the loader.
    #[error(transparent)]
    Program(#[from] ProgramError),
    /// By traffic control.
    #[error(transparent)]
    Tc(#[from] TcError),
    /// By the kernel.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Its link could not be pinned.
    #[error(transparent)]
    Pin(#[from] PinError),
}

/// Why a directory cannot hold the pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DirectoryProblem {
    /// Not an absolute path.
    Relative,
    /// The last name has a dot in it.
    Dot,
    /// It is a link or a file.
    NotADirectory,
    /// Somebody else owns it, and could put his own objects in.
    Owner(u32),
}

impl fmt::Display for DirectoryProblem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Relative => write!(f, "must be an absolute path"),
            Self::Dot => write!(f, "a name on a BPF filesystem cannot have a dot in it"),
            Self::NotADirectory => write!(f, "is not a directory"),
            Self::Owner(user) => {
                write!(f, "belongs to user {user}, who could change what is in it")
            }
        }
    }
}

/// What a refusal for lack of privilege is probably due to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Reasons(Vec<String>);

impl fmt::Display for Reasons {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, reason) in self.0.iter().enumerate() {
            write!(f, "{}{reason}", if n == 0 { ": " } else { "; " })?;
        }
        Ok(())
    }
}

impl Reasons {
    /// Looks at what the caller lacks.
    pub(super) fn gather() -> Self {
        let mut reasons = Vec::new();
        let lacks = Lacks::of_caller();
        if !lacks.is_empty() {
            reasons.push(lacks.to_string());
        }
        let lockdown = fs::read_to_string("/sys/kernel/security/lockdown").unwrap_or_default();
        if lockdown.contains("[confidentiality]") {
            reasons.push("the kernel is locked down (confidentiality)".into());
        }
        Self(reasons)
    }
}

/// Numbers in a message.
struct Listed<'a>(&'a [u32]);

impl fmt::Display for Listed<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (n, number) in self.0.iter().enumerate() {
            write!(f, "{}{number}", if n == 0 { "" } else { ", " })?;
        }
        Ok(())
    }
}

/// Says in a message what `E2BIG` and `ENOSPC` mean for a map.
struct FullHint<'a>(&'a str, &'a io::Error);

impl fmt::Display for FullHint<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !matches!(self.1.raw_os_error(), Some(libc::E2BIG | libc::ENOSPC)) {
            return Ok(());
        }
        write!(f, ": it is full")?;
        let capacity = match self.0 {
            map::ENDPOINTS | map::USAGE => size::ENDPOINTS,
            map::ADDRESSES => size::ADDRESSES,
            map::PUBLISHES => size::PUBLISHES,
            map::UPLINKS => size::UPLINKS,
            map::POLICY_CIDRS => size::POLICY_CIDRS,
            map::POLICY_PORTS => size::POLICY_PORTS,
            _ => return Ok(()),
        };
        write!(f, " ({capacity} entries)")
    }
}

impl BpfError {
    /// What it means to the caller.
    pub fn kind(&self) -> Kind {
        match self {
            Self::NotBpffs { .. }
            | Self::UnusableDirectory { .. }
            | Self::Object { .. }
            | Self::Program { .. }
            | Self::NoCgroup2
            | Self::NoDynamicPorts { .. } => Kind::Unsupported,
            Self::OtherAbi { .. }
            | Self::OtherMap { .. }
            | Self::OtherHost { .. }
            | Self::MonitorsBusy { .. }
            | Self::LogBusy { .. } => Kind::Conflict,
            refused if refused.is_refusal() => Kind::Unsupported,
            _ => Kind::Operation,
        }
    }

    /// Whether the kernel did not let us.
    fn is_refusal(&self) -> bool {
        match self {
            Self::NotPermitted { .. } => true,
            // `EACCES` is what the verifier says of a program that it rejects.
            Self::Program { .. } => false,
            other => matches!(errno(other), Some(libc::EPERM | libc::EACCES)),
        }
    }

    /// Whether something is in the way that belongs to another nucnet.
    pub fn is_conflict(&self) -> bool {
        matches!(
            self,
            Self::OtherAbi { .. } | Self::OtherMap { .. } | Self::OtherHost { .. }
        )
    }

    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::NotBpffs { path } => {
                let mount = match path.parent() {
                    Some(parent) if parent.ends_with("sys/fs/bpf") => parent,
                    _ => path,
                };
                format!("mount -t bpf bpf {}", mount.display())
            }
            Self::UnusableDirectory {
                problem: DirectoryProblem::Owner(_),
                path,
            } => {
                format!("see what is in it, and remove it: rm -r {}", path.display())
            }
            Self::UnusableDirectory { .. } => "choose another directory with --bpffs".into(),
            Self::OtherAbi { .. } | Self::OtherMap { .. } => {
                "run `nucnet-ctl down`, then attach again; or use the version that made it".into()
            }
            Self::OtherHost { .. } => {
                "give each host its own --bpffs, or run `nucnet-ctl down` in the other one".into()
            }
            Self::MonitorsBusy { .. } => "end one of them".into(),
            Self::LogBusy { .. } => "end it, or monitor without --debug".into(),
            Self::NoCgroup2 => "mount -t cgroup2 none /sys/fs/cgroup/unified".into(),
            Self::NoDynamicPorts { .. } => "narrow net.ipv4.ip_local_port_range, or take a block \
                 of ports out of it: sysctl -w net.ipv4.ip_local_reserved_ports=16384-32767"
                .into(),
            refused if refused.is_refusal() => capability::remedy(),
            _ => return None,
        })
    }
}

/// The error number inside an error of aya's, however deep.
pub(super) fn errno(error: &(dyn std::error::Error + 'static)) -> Option<i32> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(errno) = error
            .downcast_ref::<io::Error>()
            .and_then(io::Error::raw_os_error)
        {
            return Some(errno);
        }
        if let Some(errno) = error
            .downcast_ref::<aya::sys::NetlinkError>()
            .and_then(|e| e.raw_os_error())
        {
            return Some(errno);
        }
        next = error.source();
    }
    None
}
