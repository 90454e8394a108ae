//! Why the state cannot be used.

use crate::{
    kernel::{directory::FileError, sysctl},
    model::record,
};
use std::{fmt, path::PathBuf, time::Duration};
use thiserror::Error;

/// Why the state cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// The directory is one that others could meddle with.
    #[error("state directory {}: {problem}", path.display())]
    Unsafe {
        /// The directory.
        path: PathBuf,
        /// What is wrong with it.
        problem: Unsafe,
    },
    /// Another process holds the lock and does not give it up.
    #[error(
        "state directory {}: locked for more than {} s by {holder}", path.display(),
        waited.as_secs()
    )]
    Locked {
        /// The directory.
        path: PathBuf,
        /// Process id and command of the holder.
        holder: String,
        /// For how long this process waited.
        waited: Duration,
    },
    /// A record cannot be used.
    #[error("record {}", path.display())]
    Record {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: record::Error,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// A sysctl could not be changed for a moment, or not given back.
    #[error(transparent)]
    Sysctl(#[from] sysctl::Error),
}

/// What makes a directory unsafe.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unsafe {
    /// It belongs to somebody else.
    Owner(u32),
    /// Others may enter it.
    Mode(u32),
    /// It is a symbolic link, or no directory.
    NotADirectory,
    /// It is not named from the root on.
    Relative,
}

impl fmt::Display for Unsafe {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner(owner) => write!(f, "belongs to user {owner}"),
            Self::Mode(mode) => write!(f, "has mode {mode:04o}, which lets others in"),
            Self::NotADirectory => f.write_str("is a symbolic link or no directory"),
            Self::Relative => f.write_str("is not an absolute path"),
        }
    }
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unsafe {
                path,
                problem: Unsafe::Mode(_),
            } => Some(format!(
                "see what is in it, then: chmod 700 {}",
                path.display()
            )),
            Self::Unsafe { .. } => Some("choose another directory with --state-dir".to_owned()),
            Self::Locked { .. } => Some("wait for it, or see why it does not end".to_owned()),
            Self::Record {
                source: record::Error::Newer(_),
                ..
            } => Some("use the nucnet-ctl that wrote it".to_owned()),
            Self::Record { .. } => Some("any verb that changes something sets it aside".to_owned()),
            Self::File(_) | Self::Sysctl(_) => None,
        }
    }
}
