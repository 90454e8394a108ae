//! Mounts of staged files: how one is made, and how they are found again.

use std::{
    ffi::OsString,
    fs, io,
    os::{
        fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
        unix::ffi::OsStringExt,
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2},
    libc,
    mount::{MntFlags, umount2},
};
use rustix::mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::{Error, STAGING, before_change, refused};
use crate::kernel::FileError;

fn errno(error: rustix::io::Errno) -> Errno {
    Errno::from_raw(error.raw_os_error())
}

/// A mount of a file that is nowhere yet.
pub(super) fn detached(file: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
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

/// Puts such a mount over a file.
pub(super) fn put(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), Errno> {
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    before_change()?;
    move_mount(mount, "", target, "", flags).map_err(errno)
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
