//! Sysctls below `/proc/sys/net`, named by the pieces of their path: an interface name with dots
//! (`eth0.5`) stays one piece.
//!
//! They are those of the calling thread's network namespace; inside another one call from
//! [`run_in`](super::netns::run_in).

use std::fmt;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::fault::{self, Operation};

/// Why a sysctl cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The interface does not exist, or this kernel lacks the sysctl.
    #[error("sysctl {sysctl} does not exist")]
    NotFound {
        /// Which one.
        sysctl: Sysctl,
    },
    /// The kernel refused.
    #[error("cannot {operation} sysctl {sysctl}")]
    Refused {
        /// `read`, or `write VALUE to`.
        operation: String,
        /// Which one.
        sysctl: Sysctl,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It cannot be told which interfaces have routes that routers advertised.
    #[error("cannot read the IPv6 routes of this network namespace")]
    Routes(#[source] io::Error),
    /// It cannot be told which interfaces there are.
    #[error("cannot list the interfaces that have sysctls of {family}")]
    Interfaces {
        /// Of which family.
        family: Family,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The name would leave the directory of interfaces.
    #[error("{interface:?} is not an interface name")]
    Interface {
        /// The name.
        interface: String,
    },
}

/// Address family of a per-interface sysctl.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `net/ipv4`.
    Ipv4,
    /// `net/ipv6`.
    Ipv6,
}

/// A sysctl that each interface has.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LinkKey {
    /// Packets that arrive here may be forwarded; route lookups from here see routes.
    Forwarding,
    /// IPv6 is off (IPv6 only).
    DisableIpv6,
    /// Router advertisements are accepted (IPv6 only).
    AcceptRa,
    /// Duplicate addresses are looked for (IPv6 only).
    AcceptDad,
    /// Addresses are made from router advertisements (IPv6 only).
    Autoconf,
    /// How the link-local address is made (IPv6 only); 1: not at all.
    AddrGenMode,
    /// Source validation by reverse path (IPv4 only).
    RpFilter,
    /// Loopback addresses may be reached from here, and have packets leave here (IPv4 only).
    RouteLocalnet,
    /// Who asks here for an address that is here as well is answered by the host (IPv4 only).
    ProxyArpPvlan,
    /// Who asks here for an address of the host's list gets its answer (IPv6 only).
    ProxyNdp,
    /// Packets that arrive here are forwarded, whatever holds for the host (IPv6 only, Linux 6.17).
    ForceForwarding,
}

impl LinkKey {
    /// The name of its file.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forwarding => "forwarding",
            Self::DisableIpv6 => "disable_ipv6",
            Self::AcceptRa => "accept_ra",
            Self::AcceptDad => "accept_dad",
            Self::Autoconf => "autoconf",
            Self::AddrGenMode => "addr_gen_mode",
            Self::RpFilter => "rp_filter",
            Self::RouteLocalnet => "route_localnet",
            Self::ProxyArpPvlan => "proxy_arp_pvlan",
            Self::ProxyNdp => "proxy_ndp",
            Self::ForceForwarding => "force_forwarding",
        }
    }
}

/// One sysctl: whom a change belongs to can be recorded by this value.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sysctl {
    /// `net/FAMILY/conf/INTERFACE/KEY`.
    Link {
        /// Address family.
        family: Family,
        /// Interface name, or `all` or `default`.
        interface: String,
        /// Which of the interface's sysctls.
        key: LinkKey,
    },
    /// `net/ipv4/ip_local_port_range`: the host's ephemeral ports, first and last.
    IpLocalPortRange,
    /// `net/FAMILY/ip_nonlocal_bind`.
    IpNonlocalBind(Family),
    /// `net/FAMILY/neigh/INTERFACE/proxy_delay`: how long answers for others wait at most.
    ProxyDelay(Family, String),
    /// That of a record: what [`fmt::Display`] had shown of another one.
    Recorded(String),
}

impl Sysctl {
    /// A per-interface sysctl.
    pub fn link(family: Family, interface: &str, key: LinkKey) -> Self {
        Self::Link {
            family,
            interface: interface.to_owned(),
            key,
        }
    }

    fn path(&self) -> Result<PathBuf, Error> {
        let strange = match self {
            Self::Link { interface, .. } | Self::ProxyDelay(_, interface) => {
                interface.contains('/') || matches!(interface.as_str(), "" | "." | "..")
            }
            Self::Recorded(name) => !name.starts_with("net/") || name.contains(".."),
            Self::IpLocalPortRange | Self::IpNonlocalBind(_) => false,
        };
        if strange {
            return Err(Error::Interface {
                interface: self.to_string(),
            });
        }
        Ok(PathBuf::from(format!("/proc/sys/{self}")))
    }

    /// Its value, without white space around it.
    pub fn read(&self) -> Result<String, Error> {
        match fs::read_to_string(self.path()?) {
            Ok(text) => Ok(text.trim().to_owned()),
            Err(source) => Err(self.refused("read".to_owned(), source)),
        }
    }

    /// Sets it and returns the value that it had. Nothing is written when it has the value
    /// already.
    pub fn write(&self, value: &str) -> Result<String, Error> {
        let previous = self.read()?;
        if previous != value {
            let path = self.path()?;
            fault::before(Operation::File)
                .map_err(io::Error::from)
                .and_then(|()| OpenOptions::new().write(true).open(path))
                .and_then(|mut file| file.write_all(value.as_bytes()))
                .map_err(|source| self.refused(format!("write {value} to"), source))?;
        }
        Ok(previous)
    }

    fn refused(&self, operation: String, source: io::Error) -> Error {
        let sysctl = self.clone();
        match source.kind() {
            io::ErrorKind::NotFound => Error::NotFound { sysctl },
            _ => Error::Refused {
                operation,
                sysctl,
                source,
            },
        }
    }
}

/// The interfaces that have sysctls of a family, with `default` for those to come; none: the
/// kernel is without it.
pub fn interfaces(family: Family) -> Result<Vec<String>, Error> {
    let failed = |source| Error::Interfaces { family, source };
    let entries = match fs::read_dir(format!("/proc/sys/net/{family}/conf")) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(failed(error)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let name = entry.map_err(failed)?.file_name();
        // Interfaces whose names are no text have none that could be written here.
        names.extend(name.into_string().ok().filter(|name| name != "all"));
    }
    Ok(names)
}

/// The path below `/proc/sys`.
impl fmt::Display for Sysctl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Link {
                family,
                interface,
                key,
            } => {
                write!(f, "net/{family}/conf/{interface}/{}", key.name())
            }
            Self::IpLocalPortRange => f.write_str("net/ipv4/ip_local_port_range"),
            Self::IpNonlocalBind(family) => write!(f, "net/{family}/ip_nonlocal_bind"),
            Self::ProxyDelay(family, interface) => {
                write!(f, "net/{family}/neigh/{interface}/proxy_delay")
            }
            Self::Recorded(name) => f.write_str(name),
        }
    }
}

/// The directory's name.
impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "ipv4",
            Self::Ipv6 => "ipv6",
        })
    }
}
