//! A container's root directory, and the file in it that is mounted over.

use std::{
    os::fd::{AsFd, BorrowedFd, OwnedFd},
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, openat2},
    libc,
    sys::stat::{Mode, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};

use super::{ETC, Error, FILE, MODE, before_change, beneath, identity, refused};
use crate::{
    kernel::store,
    model::{
        EndpointId,
        record::{MountPoint, ResolvRecord},
    },
};

/// A container's root directory, opened once.
#[derive(Debug)]
pub struct Root {
    fd: OwnedFd,
    path: PathBuf,
}

impl Root {
    /// Opens it. The path is the caller's own, and its links are followed.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let failed = |source| Error::Root {
            path: path.to_owned(),
            source,
        };
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        let fd = openat2(AT_FDCWD, path, how).map_err(failed)?;
        // For messages and the record; nobody opens it again to mount on it.
        let shown = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let root = Self { fd, path: shown };
        let host = openat2(AT_FDCWD, "/", how).map_err(failed)?;
        let host = fstat(&host).map_err(failed)?;
        if identity(&host) == root.identity()? {
            return Err(Error::HostRoot { path: root.path });
        }
        Ok(root)
    }

    /// The record of what is to be made in it: what is missing. Refuses what cannot be mounted
    /// on, and what another endpoint has. Nothing is changed.
    pub fn examine(&self, state: &store::Store, id: &EndpointId) -> Result<ResolvRecord, Error> {
        let made = match self.etc()? {
            None => MountPoint::DirectoryAndFile,
            Some(etc) => match self.file(etc.as_fd())? {
                None => MountPoint::File,
                Some(file) => {
                    let owner = state.staged_as(&file.as_fd())?;
                    if let Some(owner) = owner.filter(|owner| owner != id) {
                        let path = self.file_path();
                        return Err(Error::Taken { path, owner });
                    }
                    MountPoint::Found
                }
            },
        };
        let (device, inode) = self.identity()?;
        Ok(ResolvRecord {
            rootfs: self.path.clone(),
            device,
            inode,
            made,
        })
    }

    pub(super) fn identity(&self) -> Result<(u64, u64), Error> {
        let stat = fstat(&self.fd).map_err(refused("examine", &self.path))?;
        Ok(identity(&stat))
    }

    pub(super) fn file_path(&self) -> PathBuf {
        self.path.join(ETC).join(FILE)
    }

    /// `etc`, if there is one.
    fn etc(&self) -> Result<Option<OwnedFd>, Error> {
        let path = self.path.join(ETC);
        self.inside(self.fd.as_fd(), ETC, &path, libc::S_IFDIR)
    }

    fn file(&self, etc: BorrowedFd<'_>) -> Result<Option<OwnedFd>, Error> {
        self.inside(etc, FILE, &self.file_path(), libc::S_IFREG)
    }

    /// A directory entry of the wanted type, neither followed nor opened for use.
    fn inside(
        &self,
        directory: BorrowedFd<'_>,
        name: &str,
        path: &Path,
        wanted: libc::mode_t,
    ) -> Result<Option<OwnedFd>, Error> {
        let how = beneath(OFlag::O_PATH | OFlag::O_NOFOLLOW);
        let fd = match openat2(directory, name, how) {
            Ok(fd) => fd,
            Err(Errno::ENOENT) => return Ok(None),
            Err(Errno::ELOOP) => return Err(unusable(path, libc::S_IFLNK)),
            Err(errno) => return Err(refused("open", path)(errno)),
        };
        let stat = fstat(&fd).map_err(refused("examine", path))?;
        match stat.st_mode & libc::S_IFMT {
            found if found == wanted => Ok(Some(fd)),
            found => Err(unusable(path, found)),
        }
    }

    /// Makes what is missing, but no more than what the record says may be missing, and says in
    /// the record what it was. What somebody else made meanwhile is theirs.
    pub(super) fn make(&self, record: &mut ResolvRecord) -> Result<OwnedFd, Error> {
        let etc = match self.etc()? {
            Some(etc) => {
                record.made = record.made.min(MountPoint::File);
                etc
            }
            None => {
                let path = self.path.join(ETC);
                let mode = Mode::from_bits_truncate(0o755);
                match before_change().and_then(|()| mkdirat(&self.fd, ETC, mode)) {
                    Ok(()) | Err(Errno::EEXIST) => {}
                    Err(errno) => return Err(refused("create", &path)(errno)),
                }
                let gone = || refused("open", &path)(Errno::ENOENT);
                self.etc()?.ok_or_else(gone)?
            }
        };
        if let Some(file) = self.file(etc.as_fd())? {
            record.made = MountPoint::Found;
            return Ok(file);
        }
        let path = self.file_path();
        let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_NOFOLLOW;
        let made = before_change().and_then(|()| openat2(&etc, FILE, beneath(flags).mode(MODE)));
        match made {
            Ok(_) => {}
            Err(Errno::EEXIST) => record.made = MountPoint::Found,
            Err(errno) => return Err(refused("create", &path)(errno)),
        }
        let gone = || refused("open", &path)(Errno::ENOENT);
        self.file(etc.as_fd())?.ok_or_else(gone)
    }

    /// Removes what was made, if it is still as it was made.
    pub(super) fn unmake(&self, made: MountPoint) -> Result<(), Error> {
        if made == MountPoint::Found {
            return Ok(());
        }
        // What the container has put in place of it is its own.
        let etc = match self.etc() {
            Ok(Some(etc)) => etc,
            Ok(None) | Err(Error::Unusable { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        let path = self.file_path();
        match fstatat(&etc, FILE, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) if stat.st_mode & libc::S_IFMT == libc::S_IFREG && stat.st_size == 0 => {
                let flags = UnlinkatFlags::NoRemoveDir;
                match before_change().and_then(|()| unlinkat(&etc, FILE, flags)) {
                    Ok(()) | Err(Errno::ENOENT) => {}
                    Err(errno) => return Err(refused("remove", &path)(errno)),
                }
            }
            Ok(_) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(refused("examine", &path)(errno)),
        }
        if made == MountPoint::DirectoryAndFile {
            let flags = UnlinkatFlags::RemoveDir;
            match before_change().and_then(|()| unlinkat(&self.fd, ETC, flags)) {
                Ok(()) | Err(Errno::ENOENT | Errno::ENOTEMPTY | Errno::EEXIST | Errno::ENOTDIR) => {
                }
                Err(errno) => return Err(refused("remove", &self.path.join(ETC))(errno)),
            }
        }
        Ok(())
    }
}

fn unusable(path: &Path, mode: libc::mode_t) -> Error {
    Error::Unusable {
        path: path.to_owned(),
        found: match mode {
            libc::S_IFLNK => "a symbolic link",
            libc::S_IFDIR => "a directory",
            libc::S_IFREG => "a file",
            _ => "neither file nor directory",
        },
    }
}
