//! Processes by pidfd: a process id may be given to another process at any time, a pidfd is not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::PathBuf;

use nix::errno::Errno;
use nix::libc;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use super::netns::{self, NetnsFd};

/// Why a process cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No process has that id.
    #[error("no process has the id {pid}")]
    NotFound {
        /// The id.
        pid: u32,
    },
    /// It ended in the meantime.
    #[error("process {pid} has exited")]
    Exited {
        /// The id that it had.
        pid: u32,
    },
    /// The kernel refused.
    #[error("cannot {operation} process {pid}")]
    Refused {
        /// What was tried.
        operation: &'static str,
        /// On which process.
        pid: u32,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// Its network namespace cannot be used.
    #[error(transparent)]
    Netns(#[from] netns::Error),
}

/// One certain process, alive or dead.
#[derive(Debug)]
pub struct Process {
    pid: u32,
    fd: OwnedFd,
}

/// Whether a process still runs. A zombie does not.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// It runs.
    Running,
    /// It has ended.
    Exited,
}

/// include/uapi/linux/pidfd.h: returns a descriptor; the argument must be 0. Linux 6.11.
const PIDFD_GET_NET_NAMESPACE: libc::Ioctl = nix::request_code_none!(0xff, 4);

impl Process {
    /// Takes hold of the process that has the id now.
    pub fn open(pid: u32) -> Result<Self, Error> {
        let number = libc::pid_t::try_from(pid).map_err(|_| Error::NotFound { pid })?;
        // SAFETY: pidfd_open takes two integers and touches no memory of ours.
        let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, number, 0) };
        match Errno::result(fd) {
            Ok(fd) => {
                // SAFETY: the kernel has just given us this descriptor; nobody else has it. It
                // fits: descriptors are ints.
                let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
                Ok(Self { pid, fd })
            }
            // EINVAL: an id of 0, or of a thread that leads no process.
            Err(Errno::ESRCH | Errno::EINVAL) => Err(Error::NotFound { pid }),
            Err(source) => Err(Error::Refused {
                operation: "open",
                pid,
                source,
            }),
        }
    }

    /// The id that it has or had.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Whether it still runs.
    pub fn life(&self) -> Result<Life, Error> {
        let mut fds = [PollFd::new(self.fd.as_fd(), PollFlags::POLLIN)];
        // A pidfd becomes readable when its process ends.
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(0) => Ok(Life::Running),
            Ok(_) => Ok(Life::Exited),
            Err(source) => Err(Error::Refused {
                operation: "examine",
                pid: self.pid,
                source,
            }),
        }
    }

    /// Its network namespace. That it is this process's and not that of a later one with the
    /// same id is certain: the process still runs when the namespace is open.
    pub fn netns(&self) -> Result<NetnsFd, Error> {
        let path = PathBuf::from(format!("/proc/{}/ns/net", self.pid));
        // SAFETY: the descriptor is open, and the request takes an integer and writes no memory.
        let fd = unsafe { libc::ioctl(self.fd.as_raw_fd(), PIDFD_GET_NET_NAMESPACE, 0) };
        let opened = match Errno::result(fd) {
            // SAFETY: the kernel has just given us this descriptor; nobody else has it.
            Ok(fd) => Ok(unsafe { OwnedFd::from_raw_fd(fd) }),
            Err(Errno::ESRCH) => return Err(Error::Exited { pid: self.pid }),
            // Kernels before 6.11 know the request not (ENOTTY, EINVAL).
            Err(_) => File::open(&path).map(OwnedFd::from),
        };
        if self.life()? == Life::Exited {
            return Err(Error::Exited { pid: self.pid });
        }
        let fd = opened.map_err(|source| match source.kind() {
            io::ErrorKind::NotFound => Error::Exited { pid: self.pid },
            _ => Error::Refused {
                operation: "open the network namespace of",
                pid: self.pid,
                source: Errno::from_raw(source.raw_os_error().unwrap_or(libc::EIO)),
            },
        })?;
        Ok(NetnsFd::from_fd(fd, &path)?)
    }
}
