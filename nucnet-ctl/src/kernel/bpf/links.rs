//! Pinned links: opening, exchanging the program, detaching.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use nix::libc;

use super::{
    error::BpfError,
    object::program_error,
    pins::{Pins, file_error, remove},
    sys,
};

pub(super) fn open_link(pin: &Path) -> Result<Option<OwnedFd>, BpfError> {
    match sys::open_pin(pin) {
        Ok(link) => Ok(Some(link)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(file_error(pin, "open")(error)),
    }
}

/// Detaches a pinned link, now, and removes its pin; one that is not there is fine.
pub(super) fn unlink(pin: &Path) -> Result<(), BpfError> {
    if let Some(link) = open_link(pin)? {
        // One whose interface or cgroup is gone is detached already.
        match sys::link_detach(link.as_fd()) {
            Err(error) if error.raw_os_error() != Some(libc::ENOLINK) => {
                return Err(file_error(pin, "detach")(error));
            }
            _ => {}
        }
    }
    remove(pin)
}

/// Puts a program in the place of the one that a link has, unless that is it.
pub(super) fn exchange(link: &OwnedFd, has: u32, program: &OwnedFd) -> io::Result<()> {
    match sys::program_id(program.as_fd())? {
        id if id == has => Ok(()),
        _ => sys::link_update(link.as_fd(), program.as_fd()),
    }
}

/// A pinned program. Not aya's, which looks at all that the kernel offers before it tells which
/// program it is: a tenth of what an attach costs.
pub(super) fn open_program(pins: &Pins, name: &'static str) -> Result<OwnedFd, BpfError> {
    sys::open_pin(&pins.program(name))
        .map_err(|source| program_error(name, "opened", source.into()))
}
