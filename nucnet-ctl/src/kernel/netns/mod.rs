//! Network namespaces: opened once, named by identity and entered on threads of their own.
//!
//! A [`NetnsFd`] keeps its namespace alive and can be used after the process or file that it came
//! from is gone (a container's init may exit, or make itself undumpable so that its `/proc`
//! entries can no longer be opened). Work inside a namespace is done by [`run_in`] on a fresh
//! thread that ends afterwards: a thread that has joined a foreign namespace never returns to a
//! pool.

mod named;

pub use named::{create_named, make_directory, named_in, remove_named};

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::thread;

use nix::errno::Errno;
use nix::libc;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, getsockopt, socket};
use nix::sys::stat::fstat;
use nix::sys::statfs::{NSFS_MAGIC, fstatfs};
use serde::{Deserialize, Serialize};

/// Why a network namespace cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no such file.
    #[error("network namespace {} does not exist", path.display())]
    NotFound {
        /// What was to be opened.
        path: PathBuf,
    },
    /// A file operation failed.
    #[error("cannot {operation} network namespace {}", path.display())]
    File {
        /// What was tried.
        operation: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The directory of namespaces that have names cannot be used.
    #[error("{}: cannot hold network namespaces", path.display())]
    Directory {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The file is something else than a network namespace.
    #[error("{} is not a network namespace", path.display())]
    NotANetns {
        /// What was opened.
        path: PathBuf,
    },
    /// The namespace is the one in which the caller runs.
    #[error("{netns} is the network namespace of the host itself")]
    Own {
        /// Where it was found.
        netns: String,
    },
    /// The calling thread could not be given a helper.
    #[error("cannot start a thread for {netns}")]
    Thread {
        /// The namespace to work in.
        netns: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The thread could not join.
    #[error("cannot enter {netns}")]
    Enter {
        /// The namespace to work in.
        netns: String,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The work that was done inside panicked.
    #[error("work in {netns} panicked: {message}")]
    Panicked {
        /// The namespace worked in.
        netns: String,
        /// What the panic said.
        message: String,
    },
    /// The namespace's cookie could not be read.
    #[error("cannot read the cookie of {netns}")]
    Cookie {
        /// The namespace.
        netns: String,
        /// Why.
        #[source]
        source: Errno,
    },
}

/// Which namespace it is, while it lives: the inode number may be used again afterwards (the
/// cookie, [`NetnsFd::cookie`], is not).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct NetnsId {
    /// Device number of the nsfs.
    pub dev: u64,
    /// Inode number in it, the one in `net:[...]`.
    pub inode: u64,
}

impl fmt::Display for NetnsId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// An open network namespace.
#[derive(Debug)]
pub struct NetnsFd {
    fd: OwnedFd,
    id: NetnsId,
    origin: String,
    /// Once asked for: it takes a thread inside.
    cookie: OnceLock<Option<u64>>,
}

impl AsFd for NetnsFd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// The namespace's identity and where it was found.
impl fmt::Display for NetnsFd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} ({})", self.origin, self.id)
    }
}

impl NetnsFd {
    /// Opens the namespace that a file stands for: `/proc/PID/ns/net` or a bind mount of it.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let file = File::open(path).map_err(|source| match source.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => Error::NotFound {
                path: path.to_owned(),
            },
            _ => Error::File {
                operation: "open",
                path: path.to_owned(),
                source,
            },
        })?;
        Self::from_fd(file.into(), path)
    }

    /// The namespace of the calling thread.
    pub fn current() -> Result<Self, Error> {
        Self::open(Path::new("/proc/thread-self/ns/net"))
    }

    /// Takes over an open namespace; `origin` is for messages.
    pub(crate) fn from_fd(fd: OwnedFd, origin: &Path) -> Result<Self, Error> {
        let failed = |operation| {
            move |errno: Errno| Error::File {
                operation,
                path: origin.to_owned(),
                source: errno.into(),
            }
        };
        let filesystem = fstatfs(&fd).map_err(failed("examine"))?;
        if filesystem.filesystem_type() != NSFS_MAGIC || !is_network(&fd) {
            return Err(Error::NotANetns {
                path: origin.to_owned(),
            });
        }
        let stat = fstat(&fd).map_err(failed("examine"))?;
        let id = NetnsId {
            dev: stat.st_dev,
            inode: stat.st_ino,
        };
        Ok(Self {
            fd,
            id,
            origin: origin.display().to_string(),
            cookie: OnceLock::new(),
        })
    }

    /// Itself, unless it is the namespace of the calling thread.
    pub fn other_than_own(self) -> Result<Self, Error> {
        if self.id == Self::current()?.id {
            return Err(Error::Own { netns: self.origin });
        }
        Ok(self)
    }

    /// Another descriptor of the same namespace.
    pub fn try_clone(&self) -> Result<Self, Error> {
        let fd = self.fd.try_clone().map_err(|source| Error::File {
            operation: "hold on to",
            path: PathBuf::from(&self.origin),
            source,
        })?;
        Ok(Self {
            fd,
            id: self.id,
            origin: self.origin.clone(),
            cookie: self.cookie.clone(),
        })
    }

    /// Its identity.
    pub fn id(&self) -> NetnsId {
        self.id
    }

    /// Its cookie (`SO_NETNS_COOKIE`): never given twice while the kernel runs. `None` before
    /// Linux 5.14.
    pub fn cookie(&self) -> Result<Option<u64>, Error> {
        if let Some(known) = self.cookie.get() {
            return Ok(*known);
        }
        // One's own is known without a thread.
        let cookie = match Self::current()?.id == self.id {
            true => cookie_of_thread(),
            false => run_in(self, cookie_of_thread)?,
        };
        let cookie = cookie.map_err(|source| Error::Cookie {
            netns: self.to_string(),
            source,
        })?;
        Ok(*self.cookie.get_or_init(|| cookie))
    }
}

/// The socket option `SO_NETNS_COOKIE`.
#[derive(Clone, Copy, Debug)]
struct NetnsCookie;

nix::getsockopt_impl!(
    NetnsCookie,
    libc::SOL_SOCKET,
    libc::SO_NETNS_COOKIE,
    u64,
    nix::sys::socket::sockopt::GetStruct<u64>
);

/// Cookie of the calling thread's namespace; `None` where the kernel has none.
fn cookie_of_thread() -> Result<Option<u64>, Errno> {
    let probe = socket(
        AddressFamily::Unix,
        SockType::Datagram,
        SockFlag::SOCK_CLOEXEC,
        None,
    )?;
    match getsockopt(&probe, NetnsCookie) {
        Ok(cookie) => Ok(Some(cookie)),
        Err(Errno::ENOPROTOOPT) => Ok(None),
        Err(errno) => Err(errno),
    }
}

/// include/uapi/linux/nsfs.h: returns a `CLONE_NEW*` value.
const NS_GET_NSTYPE: libc::Ioctl = nix::request_code_none!(0xb7, 3);

fn is_network(fd: &OwnedFd) -> bool {
    // SAFETY: NS_GET_NSTYPE takes no argument and writes no memory; the descriptor is open.
    (unsafe { libc::ioctl(fd.as_raw_fd(), NS_GET_NSTYPE) }) == libc::CLONE_NEWNET
}

/// Runs `work` inside a namespace, on a fresh thread that ends afterwards, and waits for it.
pub fn run_in<T: Send>(netns: &NetnsFd, work: impl FnOnce() -> T + Send) -> Result<T, Error> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, || {
                setns(netns, CloneFlags::CLONE_NEWNET).map_err(|source| Error::Enter {
                    netns: netns.to_string(),
                    source,
                })?;
                Ok(work())
            })
            .map_err(|source| Error::Thread {
                netns: netns.to_string(),
                source,
            })?
            .join()
            .unwrap_or_else(|panic| {
                Err(Error::Panicked {
                    netns: netns.to_string(),
                    message: said(&*panic),
                })
            })
    })
}

fn said(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    text.or_else(|| panic.downcast_ref::<String>().map(String::as_str))
        .unwrap_or("no message")
        .to_owned()
}

/// Makes a new namespace that has no name: it goes with its last descriptor.
pub fn anonymous() -> Result<NetnsFd, Error> {
    let netns = "a new network namespace".to_owned();
    thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET).map_err(|source| Error::Enter {
                    netns: netns.clone(),
                    source,
                })?;
                NetnsFd::current()
            })
            .map_err(|source| Error::Thread {
                netns: netns.clone(),
                source,
            })?
            .join()
            .unwrap_or_else(|panic| {
                Err(Error::Panicked {
                    netns: netns.clone(),
                    message: said(&*panic),
                })
            })
    })
}
