//! Connections as they come and go, told by the kernel while somebody listens.

use std::{
    io,
    os::fd::{AsFd, BorrowedFd},
};

use nix::libc;

use super::{Tracked, abi, tracked};
use crate::kernel::netfilter::nfnetlink::{Socket, kind};

/// What became of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ConnectionChange {
    /// Its first packet has passed.
    New(Tracked),
    /// It goes on otherwise than before. What it has counted is not told.
    Other(Tracked),
    /// The kernel has forgotten it.
    Gone(Tracked),
}

/// A socket that is told of changes of the calling thread's namespace's connections.
#[derive(Debug)]
pub struct ConnectionEvents(Socket);

impl ConnectionEvents {
    /// Listens from now on.
    pub fn open() -> io::Result<Self> {
        // NFNLGRP_CONNTRACK_NEW, _UPDATE and _DESTROY, which are numbered from 1.
        Socket::told(0b111).map(Self)
    }

    /// What there is already. With `false`: some was lost, for nobody read it in time.
    pub fn read(&self) -> io::Result<(Vec<ConnectionChange>, bool)> {
        const NEW: u16 = kind(abi::SUBSYSTEM, abi::NEW);
        const DELETE: u16 = kind(abi::SUBSYSTEM, abi::DELETE);
        let mut changes = Vec::new();
        let is_whole = self.0.drain(|message| {
            let Some(tracked) = tracked(message.family, message.contents) else {
                return;
            };
            let is_new = i32::from(message.flags) & libc::NLM_F_CREATE != 0;
            changes.extend(match message.kind {
                NEW if is_new => Some(ConnectionChange::New(tracked)),
                NEW => Some(ConnectionChange::Other(tracked)),
                DELETE => Some(ConnectionChange::Gone(tracked)),
                _ => None,
            });
        })?;
        Ok((changes, is_whole))
    }
}

impl AsFd for ConnectionEvents {
    /// Readable when there is something.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
