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

use super::{
    directory::{Directory, FileError},
    fault::{self, Operation},
    store::{self, Locked},
};
use crate::model::{
    EndpointId,
    record::{MountPoint, ResolvRecord},
    resolv::{HostFiles, ResolvConf},
};
use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, AtFlags, OFlag, OpenHow, ResolveFlag, openat2},
    libc,
    mount::{MntFlags, umount2},
    sys::stat::{FileStat, Mode, fchmod, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, unlinkat},
};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};
use std::{
    ffi::OsString,
    fs::{self, File},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
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

    fn identity(&self) -> Result<(u64, u64), Error> {
        let stat = fstat(&self.fd).map_err(refused("examine", &self.path))?;
        Ok(identity(&stat))
    }

    fn file_path(&self) -> PathBuf {
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
    fn make(&self, record: &mut ResolvRecord) -> Result<OwnedFd, Error> {
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
    fn unmake(&self, made: MountPoint) -> Result<(), Error> {
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
        let mount = detached(staged.as_fd()).map_err(refused("make a mount of", &path))?;
        let flags =
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
        before_change()
            .and_then(|()| move_mount(&mount, "", &target, "", flags).map_err(errno))
            .map_err(refused("mount over", &root.file_path()))
    }

    /// Removes an endpoint's mounts, its staged file, and what was made to mount on. What is
    /// gone already is fine.
    pub fn unmount_resolv_conf(
        &self,
        id: &EndpointId,
        record: Option<&ResolvRecord>,
    ) -> Result<(), Error> {
        for mount in mounts(self.path())? {
            if mount.id == id.as_str() {
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

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// A mount of a file that is nowhere yet.
fn detached(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH;
    before_change()?;
    let mount = open_tree(file, "", flags).map_err(errno)?;
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_RDONLY
            | libc::MOUNT_ATTR_NOSUID
            | libc::MOUNT_ATTR_NODEV
            | libc::MOUNT_ATTR_NOEXEC,
        attr_clr: 0,
        // Not a peer of the mount that the state directory is on.
        propagation: libc::MS_PRIVATE,
        userns_fd: 0,
    };
    // SAFETY: the descriptor is open, the path is a string with its end, and the kernel reads as
    // many bytes of the attributes as they have.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(result)?;
    Ok(mount)
}

/// A mount of a file under `STATE_DIR/resolv`, in the mount namespace of the calling thread.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    number: u64,
    point: PathBuf,
    id: String,
}

impl Mount {
    /// The id of the endpoint that it was made for.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Where it is.
    pub fn point(&self) -> &Path {
        &self.point
    }

    /// Removes it; one that is gone already is fine. Those who have the file open keep it.
    pub fn remove(&self) -> Result<(), Error> {
        let failed = refused("unmount", &self.point);
        // As the kernel names it, it has no link in it; what has one now is another place.
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_NO_SYMLINKS);
        let opened = openat2(AT_FDCWD, &self.point, how);
        if let Ok(fd) = &opened
            && mount_number(fd.as_fd())? == self.number
        {
            return before_change()
                .and_then(|()| umount2(&*descriptor(fd.as_fd()), MntFlags::MNT_DETACH))
                .map_err(failed);
        }
        match mount_table()?.iter().find(|row| row.number == self.number) {
            None => Ok(()),
            Some(row) => Err(Error::Covered {
                path: row.point.clone(),
            }),
        }
    }
}

/// The mounts of files staged under a state directory, which need not exist any more; the last
/// one made comes first.
pub fn mounts(state_dir: &Path) -> Result<Vec<Mount>, Error> {
    let table = mount_table()?;
    let Some((device, staging)) = within_filesystem(state_dir, &table)? else {
        return Ok(Vec::new());
    };
    let staging = staging.join(STAGING);
    let own = |row: &Row| {
        let name = row.root.strip_prefix(&staging).ok()?.to_str()?;
        // So the kernel marks what was unlinked.
        let name = name.strip_suffix("//deleted").unwrap_or(name);
        (row.device == device && !name.is_empty()).then(|| Mount {
            number: row.number,
            point: row.point.clone(),
            id: name.to_owned(),
        })
    };
    Ok(table.iter().rev().filter_map(own).collect())
}

/// Where a directory is: the device of its filesystem, and its path from that filesystem's root.
/// None: not even its parent exists.
fn within_filesystem(directory: &Path, table: &[Row]) -> Result<Option<(Vec<u8>, PathBuf)>, Error> {
    let open = |path: &Path| {
        let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC);
        match openat2(AT_FDCWD, path, how) {
            Ok(fd) => Ok(Some(fd)),
            Err(Errno::ENOENT | Errno::ENOTDIR) => Ok(None),
            Err(errno) => Err(refused("open", path)(errno)),
        }
    };
    let (fd, rest) = match (open(directory)?, directory.parent(), directory.file_name()) {
        (Some(fd), ..) => (fd, None),
        (None, Some(parent), Some(name)) => match open(parent)? {
            Some(fd) => (fd, Some(name)),
            None => return Ok(None),
        },
        _ => return Ok(None),
    };
    let number = mount_number(fd.as_fd())?;
    let link = descriptor(fd.as_fd());
    let path = fs::read_link(&link).map_err(|source| FileError {
        action: "read",
        path: link,
        source,
    })?;
    let found = table.iter().find_map(|row| {
        let inner = path.strip_prefix(&row.point).ok()?;
        (row.number == number).then(|| (row.device.clone(), row.root.join(inner)))
    });
    Ok(found.map(|(device, path)| match rest {
        Some(name) => (device, path.join(name)),
        None => (device, path),
    }))
}

/// A descriptor's own name, which leads to what it is open on and nowhere else.
fn descriptor(fd: BorrowedFd<'_>) -> PathBuf {
    format!("/proc/thread-self/fd/{}", fd.as_raw_fd()).into()
}

/// Which mount it is open on.
fn mount_number(fd: BorrowedFd<'_>) -> Result<u64, Error> {
    let path = PathBuf::from(format!("/proc/thread-self/fdinfo/{}", fd.as_raw_fd()));
    let text = fs::read_to_string(&path);
    let number = text.and_then(|text| {
        text.lines()
            .find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok())
            .ok_or_else(|| io::ErrorKind::InvalidData.into())
    });
    Ok(number.map_err(|source| FileError {
        action: "read",
        path,
        source,
    })?)
}

/// A line of proc(5)'s `mountinfo`.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    number: u64,
    device: Vec<u8>,
    root: PathBuf,
    point: PathBuf,
}

/// The mounts that the calling thread has, in the order in which they were made.
fn mount_table() -> Result<Vec<Row>, Error> {
    let path = Path::new("/proc/thread-self/mountinfo");
    let bytes = fs::read(path).map_err(|source| FileError {
        action: "read",
        path: path.to_owned(),
        source,
    })?;
    Ok(bytes.split(|byte| *byte == b'\n').filter_map(row).collect())
}

fn row(line: &[u8]) -> Option<Row> {
    let mut fields = line.split(|byte| *byte == b' ');
    let number = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    let device = fields.nth(1)?.to_vec();
    Some(Row {
        number,
        device,
        root: unescaped(fields.next()?),
        point: unescaped(fields.next()?),
    })
}

/// Space, tab, newline and backslash are written as a backslash and three octal digits.
fn unescaped(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((first, after)) = rest.split_first() {
        let octal = after
            .get(..3)
            .filter(|_| *first == b'\\')
            .and_then(|digits| u8::from_str_radix(std::str::from_utf8(digits).ok()?, 8).ok());
        match octal {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(*first);
                rest = after;
            }
        }
    }
    OsString::from_vec(bytes).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mount_is_read_with_what_the_kernel_escapes() {
        let line = br"36 35 0:23 /nucnet/resolv/web//deleted /a\040b\134/etc/resolv.conf ro,nosuid - tmpfs tmpfs rw";
        let expected = Row {
            number: 36,
            device: b"0:23".to_vec(),
            root: "/nucnet/resolv/web//deleted".into(),
            point: "/a b\\/etc/resolv.conf".into(),
        };
        assert_eq!(row(line), Some(expected));
        assert_eq!(row(b""), None);
        assert_eq!(unescaped(br"\0"), Path::new("\\0"));
    }
}
