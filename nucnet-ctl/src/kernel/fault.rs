//! Faults that tests ask for: the n-th operation of a kind fails with an errno, or the process is
//! killed before it. Not part of a release, which has neither debug assertions nor the feature
//! `faults`: there [`before`] says that all is well, and is optimised away.

use nix::errno::Errno;

/// What can be made to fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operation {
    /// A request to rtnetlink, questions included.
    Netlink,
    /// A change of a file system: files, directories, links, mounts, sysctls, pins.
    File,
    /// A change by bpf(2): entries of maps, links, the loading of programs.
    Map,
}

/// Called before every operation.
#[cfg(any(debug_assertions, feature = "faults"))]
pub(crate) fn before(operation: Operation) -> Result<(), Errno> {
    #[cfg(test)]
    dying::strike(operation)?;
    injected::strike(operation)
}

/// Called before every operation.
#[cfg(not(any(debug_assertions, feature = "faults")))]
pub(crate) fn before(_: Operation) -> Result<(), Errno> {
    Ok(())
}

/// A process that dies, for tests within one: from some moment on, the thread changes no files.
#[cfg(test)]
pub(crate) mod dying {
    use super::Operation;
    use nix::errno::Errno;
    use std::cell::Cell;

    thread_local! {
        static CHANGES_LEFT: Cell<Option<usize>> = const { Cell::new(None) };
    }

    /// The calling thread dies after so many changes of files; none: it lives.
    pub(crate) fn after(changes: Option<usize>) {
        CHANGES_LEFT.set(changes);
    }

    pub(super) fn strike(operation: Operation) -> Result<(), Errno> {
        match CHANGES_LEFT.get() {
            Some(0) if operation == Operation::File => Err(Errno::EIO),
            Some(left) if operation == Operation::File => {
                CHANGES_LEFT.set(Some(left - 1));
                Ok(())
            }
            _ => Ok(()),
        }
    }
}

#[cfg(any(debug_assertions, feature = "faults"))]
mod injected {
    use super::Operation;
    use nix::{
        errno::Errno,
        sys::signal::{Signal, raise},
    };
    use std::sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    };

    /// `netlink:N:ERRNO`, `file:N:ERRNO` or `map:N:ERRNO`: the N-th operation of the kind, from 0
    /// on, fails with that errno (a number). With `kill` instead, the process is killed.
    const VARIABLE: &str = "NUCNET_FAULT";

    static OPERATIONS: [AtomicUsize; 3] = [const { AtomicUsize::new(0) }; 3];

    #[derive(Debug)]
    struct Fault {
        operation: Operation,
        number: usize,
        /// None: the process is killed.
        errno: Option<Errno>,
    }

    fn parse(text: &str) -> Option<Fault> {
        let mut words = text.split(':');
        let operation = match words.next()? {
            "netlink" => Operation::Netlink,
            "file" => Operation::File,
            "map" => Operation::Map,
            _ => return None,
        };
        let number = words.next()?.parse().ok()?;
        let errno = match words.next()? {
            "kill" => None,
            errno => Some(Errno::from_raw(errno.parse().ok()?)),
        };
        Some(Fault {
            operation,
            number,
            errno,
        })
    }

    pub(super) fn strike(operation: Operation) -> Result<(), Errno> {
        static FAULT: OnceLock<Option<Fault>> = OnceLock::new();
        let number = OPERATIONS[operation as usize].fetch_add(1, Ordering::Relaxed);
        let fault = FAULT.get_or_init(|| parse(&std::env::var(VARIABLE).ok()?));
        match fault {
            Some(fault) if (fault.operation, fault.number) == (operation, number) => {
                // So that a test knows, whatever comes of it.
                eprintln!("injected: {fault:?}");
                match fault.errno {
                    Some(errno) => Err(errno),
                    None => {
                        // As if by somebody else: nothing is cleaned up.
                        let _ = raise(Signal::SIGKILL);
                        Ok(())
                    }
                }
            }
            _ => Ok(()),
        }
    }
}
