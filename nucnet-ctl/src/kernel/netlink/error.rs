//! What can go wrong between us and rtnetlink. Errors are told apart by errno, never by text.

use std::fmt;
use std::io;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;

use super::super::netns;

/// Why a netlink operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The kernel said no.
    #[error("cannot {operation} {object}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// What the kernel said.
        #[source]
        cause: Refusal,
    },
    /// There is no such interface.
    #[error("interface {link} does not exist")]
    NoLink {
        /// Name or index.
        link: String,
    },
    /// The name belongs to an interface that is not (or not that) of nucnet's.
    #[error("interface {name} exists already and is {found}")]
    Taken {
        /// The interface's name.
        name: String,
        /// What it is.
        found: Holder,
    },
    /// What was to be used as a bridge is something else.
    #[error("interface {name} is not a bridge but {found}")]
    NotABridge {
        /// The interface's name.
        name: String,
        /// What it is.
        found: Holder,
    },
    /// The container has an interface of that name.
    #[error("the container has an interface {name} already")]
    PeerTaken {
        /// The name that was wanted in the container.
        name: String,
    },
    /// A bridge has as many ports as it can have.
    #[error("bridge {bridge} is full: a bridge takes at most 1023 ports")]
    BridgeFull {
        /// The bridge.
        bridge: String,
    },
    /// A bridge that still has ports is not deleted.
    #[error("bridge {bridge} still has {ports} ports")]
    HasPorts {
        /// The bridge.
        bridge: String,
        /// How many.
        ports: usize,
    },
    /// Somebody else's route is in the way.
    #[error(
        "a route to {destination} exists already and is not nucnet's (rtnetlink protocol {protocol})"
    )]
    ForeignRoute {
        /// Where it leads.
        destination: IpNet,
        /// Whose it is: an rtnetlink protocol number.
        protocol: u8,
    },
    /// An IPv4 and an IPv6 address do not go together.
    #[error("route to {destination} cannot use {address}: another address family")]
    FamilyMismatch {
        /// The route.
        destination: IpNet,
        /// The gateway or source that does not fit.
        address: IpAddr,
    },
    /// No interface can have that name.
    #[error("{name:?} is not an interface name: {problem}")]
    Name {
        /// The name.
        name: String,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Things kept changing while the kernel listed them.
    #[error("cannot {operation} {object}: the list changed during each of {attempts} attempts")]
    Interrupted {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
        /// How often.
        attempts: usize,
    },
    /// The kernel's answer did not come, or could not be understood.
    #[error("cannot {operation} {object}: no usable answer from the kernel")]
    NoAnswer {
        /// What was tried.
        operation: &'static str,
        /// On what.
        object: String,
    },
    /// There is no way to the kernel.
    #[error("cannot open a netlink socket")]
    Open {
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The namespace cannot be entered.
    #[error(transparent)]
    Netns(#[from] netns::Error),
}

impl Error {
    /// The kernel's errno, where it was the kernel that said no.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused { cause, .. } => Some(cause.errno),
            _ => None,
        }
    }
}

/// The kernel's answer to a request that it refuses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refusal {
    /// The error number.
    pub errno: Errno,
    /// The kernel's own explanation (extended acknowledgement).
    pub message: Option<String>,
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.errno)?;
        match &self.message {
            Some(message) => write!(f, ": {message}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Refusal {}

/// Who has a name that was wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// The kind of link (`veth`, `bridge`), where the kernel has a name for it.
    pub kind: Option<String>,
    /// Its alias.
    pub alias: Option<String>,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "a {}",
            self.kind.as_deref().unwrap_or("physical interface")
        )?;
        match &self.alias {
            Some(alias) => write!(f, " with alias {alias}"),
            None => f.write_str(" without alias"),
        }
    }
}
