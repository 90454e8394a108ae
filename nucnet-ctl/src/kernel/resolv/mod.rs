//! `resolv.conf` for endpoints: a file staged under `STATE_DIR/resolv/ID`, mounted over
//! `etc/resolv.conf` of the container's root directory.
//!
//! The root directory is the container's to change, at any moment. Everything in it is reached
//! by descriptor, below the directory that was opened once, and no symbolic link in it is
//! followed: openat2(2), Linux 5.6. Where `etc` or `resolv.conf` is a link, or is something
//! else than directory and file, that is refused: what such a link means is up to what else the
//! container mounts, and nucnet does not guess.
//!
//! The mount is read-only, nosuid, nodev and noexec before it is anywhere (mount_setattr(2),
//! Linux 5.12), and is put on the file by descriptor. It is made in the mount namespace of the
//! calling thread, and seen where that namespace's mounts are. To remove it, mounts are found by
//! what they show, a file under `STATE_DIR/resolv`, wherever in the root directory they may have
//! been moved to: also those of which no record is left.

mod mount;
mod root;

pub use mount::{Mount, mounts};
pub use root::Root;

use super::{
    directory::{Directory, FileError},
    fault::{self, Operation},
    store::{self, Locked},
};
use crate::model::{
    EndpointId,
    record::ResolvRecord,
    resolv::{HostFiles, ResolvConf},
};
use nix::{
    errno::Errno,
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{FileStat, Mode, fchmod, fstat},
};
use std::{
    fs::File,
    io::{self, Read},
    os::fd::{AsFd, BorrowedFd},
    path::{Path, PathBuf},
};
use thiserror::Error;

/// Why an endpoint cannot have its `resolv.conf`.
#[derive(Debug, Error)]
pub enum Error {
    /// The root directory cannot be opened.
    #[error("--rootfs {}", path.display())]
    Root {
        /// The directory.
        path: PathBuf,
        /// Why.
        #[source]
        source: Errno,
    },
    /// The root directory is the host's own.
    #[error("--rootfs {} is the root directory of the host", path.display())]
    HostRoot {
        /// The directory.
        path: PathBuf,
    },
    /// There is something that nothing is mounted over.
    #[error("{} is {found}", path.display())]
    Unusable {
        /// What is in the way.
        path: PathBuf,
        /// What it is.
        found: &'static str,
    },
    /// The file is another endpoint's already.
    #[error("{} is that of endpoint {owner} already", path.display())]
    Taken {
        /// The file.
        path: PathBuf,
        /// The endpoint.
        owner: EndpointId,
    },
    /// The mount is there, and another mount hides it.
    #[error("{} is covered by another mount", path.display())]
    Covered {
        /// Where it is mounted.
        path: PathBuf,
    },
    /// The kernel refused.
    #[error("cannot {action} {}", path.display())]
    Refused {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: Errno,
    },
    /// A file operation failed.
    #[error(transparent)]
    File(#[from] FileError),
    /// The state cannot be used.
    #[error(transparent)]
    Store(#[from] store::Error),
}

impl Error {
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Root { .. } | Self::HostRoot { .. } => {
                "give the container's root directory, or leave --rootfs out".to_owned()
            }
            Self::Unusable { path, .. } if path.ends_with(ETC) => {
                "make it a directory, or leave --rootfs out".to_owned()
            }
            Self::Unusable { .. } => {
                "remove it, or put an empty file in its place, or leave --rootfs out".to_owned()
            }
            Self::Taken { owner, .. } => {
                format!("leave --rootfs out, or: nucnet-ctl detach {owner}")
            }
            Self::Covered { .. } => "unmount that first".to_owned(),
            Self::Refused {
                action: "create",
                path,
                source: Errno::EROFS,
            } => format!("have {} in it from the beginning", path.display()),
            Self::Refused {
                source: Errno::EINVAL,
                ..
            } => "run it in the mount namespace that the directory is mounted in".to_owned(),
            Self::Refused {
                source: Errno::ENOSYS,
                ..
            } => "--rootfs needs Linux 5.12 or later".to_owned(),
            Self::Refused { .. } | Self::File(_) => return None,
            Self::Store(error) => return error.hint(),
        })
    }
}
const ETC: &str = "etc";
const FILE: &str = "resolv.conf";
const STAGING: &str = "resolv";

/// For everybody in the container, whatever the mode of its own file was.
const MODE: Mode = Mode::S_IRUSR
    .union(Mode::S_IWUSR)
    .union(Mode::S_IRGRP)
    .union(Mode::S_IROTH);

/// Longest part of a host's file that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// Reads the host's files.
pub fn host_files() -> Result<HostFiles, Error> {
    let read = |path: &str| -> Result<_, Error> {
        let failed = |source| FileError {
            action: "read",
            path: path.into(),
            source,
        };
        let file = match File::open(path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return Ok((path.into(), None));
            }
            Err(error) => return Err(failed(error).into()),
        };
        let mut bytes = Vec::new();
        file.take(LONGEST).read_to_end(&mut bytes).map_err(failed)?;
        let text = String::from_utf8_lossy(&bytes);
        Ok((path.into(), Some(ResolvConf::parse(&text))))
    };
    Ok(HostFiles {
        own: read("/etc/resolv.conf")?,
        upstreams: vec![
            read("/run/systemd/resolve/resolv.conf")?,
            read("/run/NetworkManager/no-stub-resolv.conf")?,
        ],
    })
}
fn before_change() -> Result<(), Errno> {
    fault::before(Operation::File)
}

/// Nothing leads out of the directory, and no link is followed.
fn beneath(flags: OFlag) -> OpenHow {
    OpenHow::new().flags(flags | OFlag::O_CLOEXEC).resolve(
        ResolveFlag::RESOLVE_IN_ROOT
            | ResolveFlag::RESOLVE_NO_SYMLINKS
            | ResolveFlag::RESOLVE_NO_MAGICLINKS,
    )
}

fn identity(stat: &FileStat) -> (u64, u64) {
    (stat.st_dev, stat.st_ino)
}

fn refused(action: &'static str, path: &Path) -> impl Fn(Errno) -> Error + use<> {
    let path = path.to_owned();
    move |source| Error::Refused {
        action,
        path: path.clone(),
        source,
    }
}
impl store::Store {
    fn staging(&self) -> Result<Option<Directory>, Error> {
        Ok(self.root.enter(STAGING)?)
    }

    /// The endpoint whose staged file this is.
    fn staged_as(&self, file: &BorrowedFd<'_>) -> Result<Option<EndpointId>, Error> {
        let Some(staging) = self.staging()? else {
            return Ok(None);
        };
        let examine = refused("examine", staging.path());
        let stat = fstat(file).map_err(&examine)?;
        if stat.st_dev != staging.stat()?.st_dev {
            return Ok(None);
        }
        for name in staging.names()? {
            let staged = staging.stat_of(&name)?;
            if staged.is_some_and(|staged| identity(&staged) == identity(&stat)) {
                return Ok(name.parse().ok());
            }
        }
        Ok(None)
    }

    /// The names of all staged files: ids, and what a crash left of one being written.
    pub fn staged_resolv_confs(&self) -> Result<Vec<String>, Error> {
        match self.staging()? {
            Some(staging) => Ok(staging.names()?),
            None => Ok(Vec::new()),
        }
    }
}

impl Locked {
    /// Stages an endpoint's file and mounts it, unless it is mounted already. `record` is what
    /// [`Root::examine`] said, and is written; it is brought up to what was made.
    pub fn mount_resolv_conf(
        &self,
        id: &EndpointId,
        root: &Root,
        text: &str,
        record: &mut ResolvRecord,
    ) -> Result<(), Error> {
        let made = record.made;
        let target = root.make(record)?;
        if self.staged_as(&target.as_fd())?.as_ref() == Some(id) {
            record.made = made;
            return Ok(());
        }
        let staging = self.root.make(STAGING)?;
        staging.write(id.as_str(), text.as_bytes())?;
        let path = staging.path().join(id.as_str());
        let how = beneath(OFlag::O_RDONLY | OFlag::O_NOFOLLOW);
        let staged = openat2(&staging, id.as_str(), how).map_err(refused("open", &path))?;
        // Unlike that of the directory that it is in, its mode is for the container.
        before_change()
            .and_then(|()| fchmod(&staged, MODE))
            .map_err(refused("set the mode of", &path))?;
        let mount = mount::detached(staged.as_fd()).map_err(refused("make a mount of", &path))?;
        mount::put(mount.as_fd(), target.as_fd()).map_err(refused("mount over", &root.file_path()))
    }

    /// Removes an endpoint's mounts, its staged file, and what was made to mount on. What is
    /// gone already is fine.
    pub fn unmount_resolv_conf(
        &self,
        id: &EndpointId,
        record: Option<&ResolvRecord>,
    ) -> Result<(), Error> {
        for mount in mounts(self.path())? {
            if mount.id() == id.as_str() {
                mount.remove()?;
            }
        }
        if let Some(record) = record {
            match Root::open(&record.rootfs) {
                // Another directory has come in its place, or none.
                Ok(root) if root.identity()? != (record.device, record.inode) => {}
                Ok(root) => root.unmake(record.made)?,
                Err(Error::Root { .. } | Error::HostRoot { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        self.remove_staged(id.as_str())
    }

    /// Removes a staged file; one that is gone is fine.
    pub fn remove_staged(&self, name: &str) -> Result<(), Error> {
        if let Some(staging) = self.staging()? {
            staging.remove(name)?;
            self.root.remove_directory(STAGING)?;
        }
        Ok(())
    }
}
