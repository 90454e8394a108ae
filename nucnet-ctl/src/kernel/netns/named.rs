//! Namespaces that have names: files that hold them.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::statfs::{NSFS_MAGIC, statfs};

use super::{Error, NetnsFd};
use crate::kernel::fault::{self, Operation};

fn change() -> io::Result<()> {
    Ok(fault::before(Operation::File)?)
}

fn unusable(directory: &Path) -> impl Fn(io::Error) -> Error + '_ {
    |source| Error::Directory {
        path: directory.to_owned(),
        source,
    }
}

/// Makes a directory for names of namespaces, which only its owner may enter, unless it is there.
pub fn make_directory(path: &Path) -> Result<(), Error> {
    change()
        .and_then(|()| DirBuilder::new().mode(0o700).recursive(true).create(path))
        .map_err(unusable(path))
}

/// What is in a directory of names; of one that is not there, nothing.
pub fn named_in(directory: &Path) -> Result<Vec<PathBuf>, Error> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(unusable(directory)(error)),
    };
    entries
        .map(|entry| Ok(entry.map_err(unusable(directory))?.path()))
        .collect()
}

/// Makes a new namespace and holds it at `path` (a bind mount), in an existing directory. What
/// exists at `path` already is an error and stays as it is.
pub fn create_named(path: &Path) -> Result<NetnsFd, Error> {
    let failed = |operation| {
        move |source: io::Error| Error::File {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    change()
        .and_then(|()| OpenOptions::new().write(true).create_new(true).open(path))
        .map_err(failed("create"))?;
    let mounted = thread::scope(|scope| {
        thread::Builder::new()
            .name("netns".to_owned())
            .spawn_scoped(scope, || {
                unshare(CloneFlags::CLONE_NEWNET)?;
                fault::before(Operation::File)?;
                mount(
                    Some("/proc/thread-self/ns/net"),
                    path,
                    None::<&str>,
                    MsFlags::MS_BIND,
                    None::<&str>,
                )
            })?
            .join()
            .unwrap_or(Err(Errno::EIO))
            .map_err(io::Error::from)
    });
    mounted
        .map_err(failed("create"))
        .and_then(|()| NetnsFd::open(path))
        .inspect_err(|_| {
            // The error that led here is the one to report.
            let _ = remove_named(path);
        })
}

/// Takes away the name that [`create_named`] gave; the namespace goes with its last user. What
/// is gone is no error; what is not a namespace or an empty file stays and is one.
pub fn remove_named(path: &Path) -> Result<(), Error> {
    let failed = |operation| {
        move |source: io::Error| Error::File {
            operation,
            path: path.to_owned(),
            source,
        }
    };
    loop {
        match statfs(path) {
            Ok(found) if found.filesystem_type() == NSFS_MAGIC => {
                change()
                    .and_then(|()| Ok(umount2(path, MntFlags::MNT_DETACH)?))
                    .map_err(failed("unmount"))?;
            }
            Ok(_) => break,
            Err(Errno::ENOENT) => return Ok(()),
            Err(errno) => return Err(failed("examine")(errno.into())),
        }
    }
    let file = fs::symlink_metadata(path).map_err(failed("examine"))?;
    if !file.is_file() || file.len() != 0 {
        return Err(Error::NotANetns {
            path: path.to_owned(),
        });
    }
    match change().and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(failed("remove")(error)),
        _ => Ok(()),
    }
}
