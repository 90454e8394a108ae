//! Directories that are opened once and then used by descriptor: no path is resolved twice, and
//! no symbolic link is followed.

use super::fault::{self, Operation};
use nix::{
    dir,
    errno::Errno,
    fcntl::{AtFlags, OFlag, openat, readlinkat, renameat},
    sys::stat::{FileStat, Mode, fstat, fstatat, mkdirat},
    unistd::{UnlinkatFlags, fsync, symlinkat, unlinkat},
};
use std::{
    fs::File,
    io::{self, Read, Write},
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};
use thiserror::Error;

/// A file operation that failed.
#[derive(Debug, Error)]
#[error("cannot {action} {}", path.display())]
pub struct FileError {
    /// What was tried.
    pub action: &'static str,
    /// On what.
    pub path: PathBuf,
    /// Why it failed.
    #[source]
    pub source: io::Error,
}

/// Not even a damaged record is larger, in bytes: what is, is not read.
const LARGEST: u64 = 64 << 20;

/// What a file is called while it is being written. One name for all of a directory, which has
/// one writer at a time: what a process began and died over is overwritten by the next one,
/// whatever that writes.
const UNFINISHED: &str = ".new";

/// An open directory. Names are single components.
#[derive(Debug)]
pub(crate) struct Directory {
    fd: OwnedFd,
    path: PathBuf,
}

impl Directory {
    /// Opens a directory that is no symbolic link.
    pub(crate) fn open(path: &Path) -> Result<Option<Self>, FileError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match nix::fcntl::open(path, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self {
                fd,
                path: path.to_owned(),
            })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(failed("open", path)(errno)),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    pub(crate) fn stat(&self) -> Result<FileStat, FileError> {
        fstat(&self.fd).map_err(failed("examine", &self.path))
    }

    /// Of an entry; a symbolic link is not followed.
    pub(crate) fn stat_of(&self, name: &str) -> Result<Option<FileStat>, FileError> {
        match fstatat(&self.fd, name, AtFlags::AT_SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.failed("examine", name)(errno)),
        }
    }

    /// A directory inside; none if there is none.
    pub(crate) fn enter(&self, name: &str) -> Result<Option<Self>, FileError> {
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => Ok(Some(Self {
                fd,
                path: self.path.join(name),
            })),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.failed("open", name)(errno)),
        }
    }

    /// A directory inside, made if there is none.
    pub(crate) fn make(&self, name: &str) -> Result<Self, FileError> {
        if let Some(found) = self.enter(name)? {
            return Ok(found);
        }
        match before_change().and_then(|()| mkdirat(&self.fd, name, Mode::S_IRWXU)) {
            Ok(()) | Err(Errno::EEXIST) => {}
            Err(errno) => return Err(self.failed("create", name)(errno)),
        }
        let gone = || self.failed("open", name)(Errno::ENOENT);
        self.enter(name)?.ok_or_else(gone)
    }

    /// The whole of a file; none if there is none.
    pub(crate) fn read(&self, name: &str) -> Result<Option<Vec<u8>>, FileError> {
        let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let file: File = match openat(&self.fd, name, flags, Mode::empty()) {
            Ok(fd) => fd.into(),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(self.failed("open", name)(errno)),
        };
        // What most records fit into.
        let mut bytes = Vec::with_capacity(4096);
        file.take(LARGEST)
            .read_to_end(&mut bytes)
            .map_err(|source| FileError {
                action: "read",
                path: self.path.join(name),
                source,
            })?;
        Ok(Some(bytes))
    }

    /// Replaces a file as a whole: whoever reads it, and whatever happens meanwhile, finds the
    /// old bytes or the new ones. One writer at a time.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), FileError> {
        let flags = OFlag::O_WRONLY
            | OFlag::O_CREAT
            | OFlag::O_TRUNC
            | OFlag::O_NOFOLLOW
            | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let mut file: File = before_change()
            .and_then(|()| openat(&self.fd, UNFINISHED, flags, mode))
            .map_err(self.failed("create", UNFINISHED))?
            .into();
        let written = before_change()
            .map_err(io::Error::from)
            .and_then(|()| file.write_all(bytes))
            .and_then(|()| file.sync_all());
        let placed = written
            .map_err(|source| FileError {
                action: "write",
                path: self.path.join(name),
                source,
            })
            .and_then(|()| {
                before_change()
                    .and_then(|()| renameat(&self.fd, UNFINISHED, &self.fd, name))
                    .map_err(self.failed("replace", name))
            });
        if placed.is_err() {
            // The error that led here is the one to report.
            let _ = self.remove(UNFINISHED);
        }
        placed.and_then(|()| self.sync())
    }

    /// Whether a name is that of a file which is being written, or was left by that.
    pub(crate) fn is_unfinished(name: &str) -> bool {
        name == UNFINISHED
    }

    fn sync(&self) -> Result<(), FileError> {
        before_change()
            .and_then(|()| fsync(&self.fd))
            .map_err(failed("synchronise", &self.path))
    }

    /// Renames an entry.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), FileError> {
        before_change()
            .and_then(|()| renameat(&self.fd, from, &self.fd, to))
            .map_err(self.failed("rename", from))?;
        self.sync()
    }

    /// Removes a file. `false`: there was none.
    pub(crate) fn remove(&self, name: &str) -> Result<bool, FileError> {
        self.unlink(name, UnlinkatFlags::NoRemoveDir)
    }

    /// Removes an empty directory. `false`: there was none, or it is not empty.
    pub(crate) fn remove_directory(&self, name: &str) -> Result<bool, FileError> {
        match before_change().and_then(|()| unlinkat(&self.fd, name, UnlinkatFlags::RemoveDir)) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT | Errno::ENOTEMPTY | Errno::EEXIST) => Ok(false),
            Err(errno) => Err(self.failed("remove", name)(errno)),
        }
    }

    /// Removes a directory and all that is in it.
    pub(crate) fn remove_tree(&self, name: &str) -> Result<(), FileError> {
        let Some(inner) = self.enter(name)? else {
            return Ok(());
        };
        for entry in inner.names()? {
            let flags = UnlinkatFlags::NoRemoveDir;
            match before_change().and_then(|()| unlinkat(&inner.fd, entry.as_str(), flags)) {
                Ok(()) | Err(Errno::ENOENT) => {}
                Err(Errno::EISDIR) => inner.remove_tree(&entry)?,
                Err(errno) => return Err(inner.failed("remove", &entry)(errno)),
            }
        }
        self.unlink(name, UnlinkatFlags::RemoveDir).map(drop)
    }

    fn unlink(&self, name: &str, what: UnlinkatFlags) -> Result<bool, FileError> {
        match before_change().and_then(|()| unlinkat(&self.fd, name, what)) {
            Ok(()) => Ok(true),
            Err(Errno::ENOENT) => Ok(false),
            Err(errno) => Err(self.failed("remove", name)(errno)),
        }
    }

    /// Makes a symbolic link that holds a text and leads nowhere: one call makes it, whole.
    /// `false`: the name is taken.
    pub(crate) fn note(&self, name: &str, text: &str) -> Result<bool, FileError> {
        match before_change().and_then(|()| symlinkat(text, &self.fd, name)) {
            Ok(()) => Ok(true),
            Err(Errno::EEXIST) => Ok(false),
            Err(errno) => Err(self.failed("create", name)(errno)),
        }
    }

    /// The text of a [`note`](Self::note); none if there is none.
    pub(crate) fn noted(&self, name: &str) -> Result<Option<String>, FileError> {
        match readlinkat(&self.fd, name) {
            Ok(text) => Ok(Some(text.to_string_lossy().into_owned())),
            Err(Errno::ENOENT) => Ok(None),
            Err(errno) => Err(self.failed("read", name)(errno)),
        }
    }

    /// The names of all entries, in no order.
    pub(crate) fn names(&self) -> Result<Vec<String>, FileError> {
        // A listing moves the position of its descriptor: it gets one of its own.
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut listing = dir::Dir::openat(&self.fd, ".", flags, Mode::empty())
            .map_err(failed("list", &self.path))?;
        let mut names = Vec::new();
        for entry in listing.iter() {
            let entry = entry.map_err(failed("list", &self.path))?;
            match entry.file_name().to_str() {
                Ok("." | "..") | Err(_) => {}
                Ok(name) => names.push(name.to_owned()),
            }
        }
        Ok(names)
    }

    fn failed(&self, action: &'static str, name: &str) -> impl Fn(Errno) -> FileError + use<> {
        failed(action, &self.path.join(name))
    }
}

impl AsFd for Directory {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

fn before_change() -> Result<(), Errno> {
    fault::before(Operation::File)
}

fn failed(action: &'static str, path: &Path) -> impl Fn(Errno) -> FileError + use<> {
    let path = path.to_owned();
    move |errno| FileError {
        action,
        path: path.clone(),
        source: errno.into(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_as_a_whole_and_leaves_nothing_beside_it() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap().unwrap();
        assert_eq!(directory.read("a").unwrap(), None);
        directory.write("a", b"one").unwrap();
        directory.write("a", b"2").unwrap();
        assert_eq!(directory.read("a").unwrap().unwrap(), b"2");
        assert_eq!(directory.names().unwrap(), ["a"]);
        assert!(directory.remove("a").unwrap());
        assert!(!directory.remove("a").unwrap());
    }

    /// A mapping that is added again gets another number, and its record another name.
    #[test]
    fn what_somebody_died_over_is_overwritten_by_whatever_is_written_next() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap().unwrap();
        // Made, and neither written nor put in its place.
        fault::dying::after(Some(1));
        directory.write("a", b"much").unwrap_err();
        fault::dying::after(None);
        let left = directory.names().unwrap();
        assert!(left.iter().all(|name| Directory::is_unfinished(name)));
        assert_eq!(left.len(), 1);
        directory.write("b", b"2").unwrap();
        assert_eq!(directory.names().unwrap(), ["b"]);
        assert_eq!(directory.read("b").unwrap().unwrap(), b"2");
    }

    #[test]
    fn symbolic_links_are_not_followed() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap().unwrap();
        directory.write("target", b"kept").unwrap();
        directory.note("link", "target").unwrap();
        assert!(directory.read("link").is_err());
        directory.write("link", b"other").unwrap();
        assert_eq!(directory.read("target").unwrap().unwrap(), b"kept");
        directory.make("inner").unwrap();
        directory.note("way", "inner").unwrap();
        assert!(directory.enter("way").is_err());
        assert!(Directory::open(&place.path().join("way")).is_err());
    }

    #[test]
    fn a_tree_is_removed_and_what_its_links_lead_to_is_not() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap().unwrap();
        directory.write("kept", b"").unwrap();
        let tree = directory.make("tree").unwrap();
        tree.make("deeper").unwrap().write("file", b"").unwrap();
        tree.note("out", "../kept").unwrap();
        directory.remove_tree("tree").unwrap();
        directory.remove_tree("tree").unwrap();
        assert_eq!(directory.names().unwrap(), ["kept"]);
    }

    #[test]
    fn notes_are_taken_by_one() {
        let place = tempfile::tempdir().unwrap();
        let directory = Directory::open(place.path()).unwrap().unwrap();
        assert!(directory.note("n", "12 web").unwrap());
        assert!(!directory.note("n", "13 db").unwrap());
        assert_eq!(directory.noted("n").unwrap().as_deref(), Some("12 web"));
        assert_eq!(directory.noted("m").unwrap(), None);
    }
}
