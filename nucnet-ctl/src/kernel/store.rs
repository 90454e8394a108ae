//! The state directory: records of the host, its networks and its endpoints, and the lock.
//!
//! ```text
//! STATE_DIR/          mode 0700
//!   lock              held by whoever changes something; says who that is
//!   host.json         HostRecord
//!   networks/NAME.json
//!   endpoints/ID.json
//!   mappings/ID.json
//!   claims/           see `claims`
//!   resolv/ID         see `resolv`
//! ```
//!
//! A record is replaced as a whole or not at all, so that readers need no lock. A damaged one is
//! set aside (`.damaged-N`) by whoever holds the lock, reported, and stops nobody else. State is
//! of one boot: that of an earlier one is cleared.

use super::{
    directory::{Directory, FileError},
    fault::{self, Operation},
};
use crate::model::{
    EndpointId, NetworkName,
    record::{self, EndpointRecord, HostRecord, MappingRecord, NetworkRecord, Record},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, openat},
    sys::stat::{Mode, fstat},
    unistd::geteuid,
};
use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    ops::Deref,
    path::{Path, PathBuf},
    sync::mpsc,
    thread,
    time::Duration,
};
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
            Self::File(_) => None,
        }
    }
}

/// Where a kind of record is filed.
trait Filed: Record {
    const DIRECTORY: Option<&'static str>;
}

impl Filed for HostRecord {
    const DIRECTORY: Option<&'static str> = None;
}

impl Filed for NetworkRecord {
    const DIRECTORY: Option<&'static str> = Some("networks");
}

impl Filed for EndpointRecord {
    const DIRECTORY: Option<&'static str> = Some("endpoints");
}

impl Filed for MappingRecord {
    const DIRECTORY: Option<&'static str> = Some("mappings");
}

fn file_name(name: Option<&str>) -> String {
    format!("{}.json", name.unwrap_or("host"))
}

const LOCK: &str = "lock";

/// The state of a host, for reading.
#[derive(Debug)]
pub struct Store {
    pub(super) root: Directory,
}

impl Store {
    /// The state in a directory; none if there is none.
    pub fn open(path: &Path) -> Result<Option<Self>, Error> {
        let unsafe_because = |problem| Error::Unsafe {
            path: path.to_owned(),
            problem,
        };
        if !path.is_absolute() {
            return Err(unsafe_because(Unsafe::Relative));
        }
        let root = match Directory::open(path) {
            Ok(Some(root)) => root,
            Ok(None) => return Ok(None),
            Err(error)
                if matches!(
                    error.source.raw_os_error(),
                    Some(nix::libc::ELOOP | nix::libc::ENOTDIR)
                ) =>
            {
                return Err(unsafe_because(Unsafe::NotADirectory));
            }
            Err(error) => return Err(error.into()),
        };
        let stat = root.stat()?;
        if stat.st_uid != geteuid().as_raw() {
            return Err(unsafe_because(Unsafe::Owner(stat.st_uid)));
        }
        if stat.st_mode & 0o077 != 0 {
            return Err(unsafe_because(Unsafe::Mode(stat.st_mode & 0o7777)));
        }
        Ok(Some(Self { root }))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        self.root.path()
    }

    /// The record of the host; none: there is no state.
    pub fn host(&self) -> Result<Option<HostRecord>, Error> {
        self.read(None)
    }

    /// The record of a network.
    pub fn network(&self, name: &NetworkName) -> Result<Option<NetworkRecord>, Error> {
        self.read(Some(name.as_str()))
    }

    /// The record of an endpoint.
    pub fn endpoint(&self, id: &EndpointId) -> Result<Option<EndpointRecord>, Error> {
        self.read(Some(id.as_str()))
    }

    /// All networks in the order of their names, and what cannot be read.
    pub fn networks(&self) -> Result<(Vec<NetworkRecord>, Vec<Error>), Error> {
        self.read_all()
    }

    /// All endpoints in the order of their ids, and what cannot be read.
    pub fn endpoints(&self) -> Result<(Vec<EndpointRecord>, Vec<Error>), Error> {
        self.read_all()
    }

    /// All static mappings in the order of their ids, and what cannot be read.
    pub fn mappings(&self) -> Result<(Vec<MappingRecord>, Vec<Error>), Error> {
        self.read_all()
    }

    fn read<T: Filed>(&self, name: Option<&str>) -> Result<Option<T>, Error> {
        match T::DIRECTORY {
            None => read_in(&self.root, name),
            Some(inner) => match self.root.enter(inner)? {
                Some(inner) => read_in(&inner, name),
                None => Ok(None),
            },
        }
    }

    fn read_all<T: Filed>(&self) -> Result<(Vec<T>, Vec<Error>), Error> {
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        let Some(directory) = T::DIRECTORY
            .map(|inner| self.root.enter(inner))
            .transpose()?
            .flatten()
        else {
            return Ok((records, unreadable));
        };
        let mut names = directory.names()?;
        names.sort_unstable();
        for name in names {
            // Neither what is being written nor what was set aside.
            let Some(name) = name
                .strip_suffix(".json")
                .filter(|name| !name.starts_with('.'))
            else {
                continue;
            };
            match read_in(&directory, Some(name)) {
                Ok(record) => records.extend(record),
                Err(error) => unreadable.push(error),
            }
        }
        Ok((records, unreadable))
    }
}

fn read_in<T: Record>(directory: &Directory, name: Option<&str>) -> Result<Option<T>, Error> {
    let file = file_name(name);
    let Some(bytes) = directory.read(&file)? else {
        return Ok(None);
    };
    record::decode(&bytes, name)
        .map(Some)
        .map_err(|source| Error::Record {
            path: directory.path().join(file),
            source,
        })
}

/// The state of a host, for changing: while this exists nobody else does.
#[derive(Debug)]
pub struct Locked {
    store: Store,
    _lock: Flock<File>,
}

impl Deref for Locked {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

impl Locked {
    /// Locks the state in a directory, which is made if there is none; waits for others, but
    /// not for longer than `patience`.
    pub fn open(path: &Path, patience: Duration) -> Result<Self, Error> {
        loop {
            let is_new = make(path)?;
            let locked = match Store::open(path)? {
                Some(store) => Self::lock(store, patience),
                None => Ok(None),
            };
            if let Some(locked) = locked.inspect_err(|_| {
                // The error that led here is the one to report; nor does it go if it is in use.
                if is_new {
                    let _ = std::fs::remove_dir(path);
                }
            })? {
                return Ok(locked);
            }
            // Removed meanwhile.
        }
    }

    /// The same for a directory that exists; none if it does not.
    pub fn open_existing(path: &Path, patience: Duration) -> Result<Option<Self>, Error> {
        while let Some(store) = Store::open(path)? {
            if let Some(locked) = Self::lock(store, patience)? {
                return Ok(Some(locked));
            }
        }
        Ok(None)
    }

    /// None: the directory was removed while this waited.
    fn lock(store: Store, patience: Duration) -> Result<Option<Self>, Error> {
        let path = store.root.path().join(LOCK);
        let failed = |action: &'static str| {
            let path = path.clone();
            move |errno: Errno| {
                Error::File(FileError {
                    action,
                    path,
                    source: errno.into(),
                })
            }
        };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let opened =
            fault::before(Operation::File).and_then(|()| openat(&store.root, LOCK, flags, mode));
        let file: File = match opened {
            Ok(fd) => fd.into(),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(failed("open")(errno)),
        };
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, Errno::EWOULDBLOCK)) => match wait(file, patience) {
                Ok(Some(lock)) => lock,
                Ok(None) => {
                    return Err(Error::Locked {
                        path: store.root.path().to_owned(),
                        holder: holder(&store.root),
                        waited: patience,
                    });
                }
                Err(errno) => return Err(failed("lock")(errno)),
            },
            Err((_, errno)) => return Err(failed("lock")(errno)),
        };
        let held = fstat(&*lock).map_err(failed("examine"))?;
        match store.root.stat_of(LOCK)? {
            Some(there) if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino) => {}
            _ => return Ok(None),
        }
        // Without, it is a lock all the same.
        if let Err(error) = sign(&mut lock) {
            tracing::warn!(
                file = %path.display(),
                error = &error as &dyn std::error::Error,
                "cannot write who holds the lock"
            );
        }
        Ok(Some(Self { store, _lock: lock }))
    }

    /// Writes the record of the host.
    pub fn put_host(&self, record: &HostRecord) -> Result<(), Error> {
        self.put(record)
    }

    /// Writes the record of a network.
    pub fn put_network(&self, record: &NetworkRecord) -> Result<(), Error> {
        self.put(record)
    }

    /// Writes the record of an endpoint.
    pub fn put_endpoint(&self, record: &EndpointRecord) -> Result<(), Error> {
        self.put(record)
    }

    /// Writes the record of a static mapping.
    pub fn put_mapping(&self, record: &MappingRecord) -> Result<(), Error> {
        self.put(record)
    }

    fn put<T: Filed>(&self, record: &T) -> Result<(), Error> {
        let file = file_name(record.name());
        let bytes = record::encode(record).map_err(|source| Error::Record {
            path: self.root.path().join(&file),
            source,
        })?;
        match T::DIRECTORY {
            Some(inner) => self.root.make(inner)?.write(&file, &bytes)?,
            None => self.root.write(&file, &bytes)?,
        }
        Ok(())
    }

    /// Removes the record of a network; one that is gone is fine.
    pub fn remove_network(&self, name: &NetworkName) -> Result<(), Error> {
        self.remove::<NetworkRecord>(name.as_str())
    }

    /// Removes the record of an endpoint; one that is gone is fine.
    pub fn remove_endpoint(&self, id: &EndpointId) -> Result<(), Error> {
        self.remove::<EndpointRecord>(id.as_str())
    }

    /// Removes the record of a static mapping; one that is gone is fine.
    pub fn remove_mapping(&self, id: &EndpointId) -> Result<(), Error> {
        self.remove::<MappingRecord>(id.as_str())
    }

    /// Removes what was set aside of static mappings: nothing else of them has their ids. Returns
    /// the names of the files.
    pub fn forget_damaged_mappings(&self) -> Result<Vec<String>, Error> {
        let directory = MappingRecord::DIRECTORY
            .map(|inner| self.root.enter(inner))
            .transpose()?;
        let Some(directory) = directory.flatten() else {
            return Ok(Vec::new());
        };
        let mut forgotten = Vec::new();
        for name in directory.names()? {
            if name.contains(".json.damaged-") && directory.remove(&name)? {
                forgotten.push(name);
            }
        }
        Ok(forgotten)
    }

    fn remove<T: Filed>(&self, name: &str) -> Result<(), Error> {
        if let Some(inner) = T::DIRECTORY
            .map(|inner| self.root.enter(inner))
            .transpose()?
            .flatten()
        {
            inner.remove(&file_name(Some(name)))?;
        }
        Ok(())
    }

    /// The record of the host. A damaged one is set aside: none.
    pub fn sound_host(&self) -> Result<Option<HostRecord>, Error> {
        self.sound(self.host())
    }

    /// The record of a network. A damaged one is set aside: none.
    pub fn sound_network(&self, name: &NetworkName) -> Result<Option<NetworkRecord>, Error> {
        self.sound(self.network(name))
    }

    /// The record of an endpoint. A damaged one is set aside: none.
    pub fn sound_endpoint(&self, id: &EndpointId) -> Result<Option<EndpointRecord>, Error> {
        self.sound(self.endpoint(id))
    }

    /// The record of a static mapping. A damaged one is set aside: none.
    pub fn sound_mapping(&self, id: &EndpointId) -> Result<Option<MappingRecord>, Error> {
        self.sound(self.read(Some(id.as_str())))
    }

    /// All static mappings; damaged records are set aside.
    pub fn sound_mappings(&self) -> Result<Vec<MappingRecord>, Error> {
        let (records, unreadable) = self.mappings()?;
        unreadable
            .into_iter()
            .try_for_each(|error| self.sound::<()>(Err(error)).map(drop))?;
        Ok(records)
    }

    /// All networks; damaged records are set aside.
    pub fn sound_networks(&self) -> Result<Vec<NetworkRecord>, Error> {
        let (records, unreadable) = self.networks()?;
        unreadable
            .into_iter()
            .try_for_each(|error| self.sound::<()>(Err(error)).map(drop))?;
        Ok(records)
    }

    /// All endpoints; damaged records are set aside.
    pub fn sound_endpoints(&self) -> Result<Vec<EndpointRecord>, Error> {
        let (records, unreadable) = self.endpoints()?;
        unreadable
            .into_iter()
            .try_for_each(|error| self.sound::<()>(Err(error)).map(drop))?;
        Ok(records)
    }

    fn sound<T>(&self, read: Result<Option<T>, Error>) -> Result<Option<T>, Error> {
        match read {
            Err(Error::Record {
                path,
                source: source @ (record::Error::Damaged(_) | record::Error::Misplaced(_)),
            }) => {
                let aside = self.set_aside(&path)?;
                tracing::warn!(
                    record = %path.display(),
                    kept_as = %aside.display(),
                    error = &source as &dyn std::error::Error,
                    "a damaged record was set aside"
                );
                Ok(None)
            }
            read => read,
        }
    }

    /// Whether a damaged record of the endpoint was set aside.
    pub(super) fn is_set_aside(&self, id: &EndpointId) -> Result<bool, Error> {
        let aside = format!("{}.damaged-1", file_name(Some(id.as_str())));
        match EndpointRecord::DIRECTORY
            .map(|inner| self.root.enter(inner))
            .transpose()?
            .flatten()
        {
            Some(directory) => Ok(directory.stat_of(&aside)?.is_some()),
            None => Ok(false),
        }
    }

    fn set_aside(&self, path: &Path) -> Result<PathBuf, Error> {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let parent = path.parent().unwrap_or(Path::new("/"));
        let inner = match parent == self.root.path() {
            true => None,
            false => self
                .root
                .enter(&parent.file_name().unwrap_or_default().to_string_lossy())?,
        };
        let directory = inner.as_ref().unwrap_or(&self.root);
        let mut number = 1;
        let aside = loop {
            let aside = format!("{name}.damaged-{number}");
            if directory.stat_of(&aside)?.is_none() {
                break aside;
            }
            number += 1;
        };
        directory.rename(&name, &aside)?;
        Ok(parent.join(aside))
    }

    /// How many damaged records of the host were set aside.
    pub fn set_aside_hosts(&self) -> Result<usize, Error> {
        let begin = format!("{}.damaged-", file_name(None));
        Ok(self
            .root
            .names()?
            .iter()
            .filter(|name| name.starts_with(&begin))
            .count())
    }

    /// The ids of endpoints whose records were damaged and set aside.
    pub fn set_aside_endpoints(&self) -> Result<Vec<String>, Error> {
        let directory = EndpointRecord::DIRECTORY
            .map(|inner| self.root.enter(inner))
            .transpose()?;
        let names = match directory.flatten() {
            Some(directory) => directory.names()?,
            None => Vec::new(),
        };
        let mut ids: Vec<String> = names
            .iter()
            .filter_map(|name| Some(name.split_once(".json.damaged-")?.0.to_owned()))
            .collect();
        ids.sort();
        ids.dedup();
        Ok(ids)
    }

    /// Removes what was set aside of an endpoint.
    pub fn remove_set_aside(&self, id: &EndpointId) -> Result<(), Error> {
        let directory = EndpointRecord::DIRECTORY
            .map(|inner| self.root.enter(inner))
            .transpose()?;
        let Some(directory) = directory.flatten() else {
            return Ok(());
        };
        let prefix = format!("{}.damaged-", file_name(Some(id.as_str())));
        for name in directory.names()? {
            if name.starts_with(&prefix) {
                directory.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Removes files that a process began to write and died. Returns their names.
    pub fn forget_unfinished(&self) -> Result<Vec<String>, Error> {
        let mut forgotten = Vec::new();
        let mut forget = |directory: &Directory| -> Result<(), Error> {
            for name in directory.names()? {
                if Directory::is_unfinished(&name) && directory.remove(&name)? {
                    forgotten.push(name);
                }
            }
            Ok(())
        };
        forget(&self.root)?;
        for inner in [
            NetworkRecord::DIRECTORY,
            EndpointRecord::DIRECTORY,
            MappingRecord::DIRECTORY,
        ]
        .into_iter()
        .flatten()
        {
            self.root
                .enter(inner)?
                .as_ref()
                .map_or(Ok(()), &mut forget)?;
        }
        Ok(forgotten)
    }

    /// Whether there is no record but that of the host, damaged ones included.
    pub fn is_empty(&self) -> Result<bool, Error> {
        for inner in [
            NetworkRecord::DIRECTORY,
            EndpointRecord::DIRECTORY,
            MappingRecord::DIRECTORY,
        ]
        .into_iter()
        .flatten()
        {
            if let Some(directory) = self.root.enter(inner)?
                && !directory.names()?.is_empty()
            {
                return Ok(false);
            }
        }
        let host = file_name(None);
        Ok(!self
            .root
            .names()?
            .iter()
            .any(|name| name.starts_with(&host) && *name != host))
    }

    /// Clears all state, but for the lock.
    pub fn clear(&self) -> Result<(), Error> {
        for name in self.root.names()? {
            if name == LOCK {
                continue;
            }
            match self.root.stat_of(&name)? {
                Some(stat) if stat.st_mode & nix::libc::S_IFMT == nix::libc::S_IFDIR => {
                    self.root.remove_tree(&name)?;
                }
                Some(_) => drop(self.root.remove(&name)?),
                None => {}
            }
        }
        Ok(())
    }

    /// Removes the directory with all that is in it.
    pub fn remove_all(self) -> Result<(), Error> {
        self.clear()?;
        let path = self.root.path().to_owned();
        // Whoever waits for the lock finds it gone, and begins anew.
        self.root.remove(LOCK)?;
        let removed = fault::before(Operation::File)
            .map_err(io::Error::from)
            .and_then(|()| std::fs::remove_dir(&path));
        match removed {
            Ok(()) => Ok(()),
            Err(source) => match source.kind() {
                // Somebody who found the lock gone has begun anew in the same directory.
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty => Ok(()),
                _ => Err(FileError {
                    action: "remove",
                    path,
                    source,
                }
                .into()),
            },
        }
    }
}

/// Makes the directory; its parents, if need be, as everybody's are made. `false`: it was there.
fn make(path: &Path) -> Result<bool, Error> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |source| {
        Error::File(FileError {
            action: "create",
            path: path.to_owned(),
            source,
        })
    };
    if !path.is_absolute() {
        return Err(Error::Unsafe {
            path: path.to_owned(),
            problem: Unsafe::Relative,
        });
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let made = fault::before(Operation::File)
        .map_err(io::Error::from)
        .and_then(|()| std::fs::DirBuilder::new().mode(0o700).create(path));
    match made {
        Ok(()) => Ok(true),
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(failed(source)),
    }
}

/// Waits for a lock in a thread of its own: the kernel hands locks on in order, but knows no
/// time limit. None: it took too long; the thread gives the lock up as soon as it gets it.
fn wait(file: File, patience: Duration) -> Result<Option<Flock<File>>, Errno> {
    let (sender, receiver) = mpsc::sync_channel(0);
    let waiting = thread::Builder::new()
        .name("lock".to_owned())
        .spawn(move || {
            let mut file = file;
            let result = loop {
                match Flock::lock(file, FlockArg::LockExclusive) {
                    Err((again, Errno::EINTR)) => file = again,
                    Err((_, errno)) => break Err(errno),
                    Ok(lock) => break Ok(lock),
                }
            };
            // Nobody may be waiting any more.
            let _ = sender.send(result);
        });
    match waiting {
        Ok(_) => receiver.recv_timeout(patience).ok().transpose(),
        Err(_) => Err(Errno::EAGAIN),
    }
}

/// Writes who holds the lock into it.
fn sign(lock: &mut Flock<File>) -> io::Result<()> {
    let command = std::env::args_os().next().unwrap_or_default();
    let command = Path::new(&command)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let verb: Vec<String> = std::env::args().skip(1).take(4).collect();
    fault::before(Operation::File)?;
    lock.set_len(0)?;
    write!(
        &mut **lock,
        "{} {command} {}",
        std::process::id(),
        verb.join(" ")
    )
}

fn holder(root: &Directory) -> String {
    let mut text = String::new();
    if let Ok(Some(bytes)) = root.read(LOCK) {
        // A reader of a file that is being written; whatever it is, it is only shown.
        let _ = bytes.take(200).read_to_string(&mut text);
    }
    match text.trim().split_once(' ') {
        Some((pid, command)) => format!("process {pid} ({})", command.escape_debug()),
        None => "an unknown process".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::{Namespace, Numbers};
    use std::os::unix::fs::{PermissionsExt, symlink};

    const PATIENCE: Duration = Duration::from_secs(10);

    fn host() -> HostRecord {
        HostRecord {
            boot: "boot".into(),
            netns: Namespace {
                device: 1,
                inode: 2,
                cookie: None,
            },
            bpffs: "/sys/fs/bpf/nucnet".into(),
            next: Numbers::default(),
            datapath: None,
        }
    }

    fn place() -> (tempfile::TempDir, PathBuf) {
        let place = tempfile::tempdir().unwrap();
        let path = place.path().join("deep/state");
        (place, path)
    }

    #[test]
    fn state_is_private_and_reads_back() {
        let (_place, path) = place();
        assert!(Store::open(&path).unwrap().is_none());
        let locked = Locked::open(&path, PATIENCE).unwrap();
        assert_eq!(
            std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777,
            0o700
        );
        assert_eq!(locked.sound_host().unwrap(), None);
        locked.put_host(&host()).unwrap();
        let store = Store::open(&path).unwrap().unwrap();
        assert_eq!(store.host().unwrap(), Some(host()), "readers need no lock");
        locked.remove_all().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn a_directory_that_others_could_meddle_with_is_refused() {
        let (_place, path) = place();
        std::fs::create_dir_all(&path).unwrap();
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o755)).unwrap();
        let problem = |path: &Path| match Locked::open(path, PATIENCE) {
            Err(Error::Unsafe { problem, .. }) => problem,
            other => panic!("{other:?}"),
        };
        assert_eq!(problem(&path), Unsafe::Mode(0o755));
        std::fs::set_permissions(&path, PermissionsExt::from_mode(0o700)).unwrap();
        let link = path.with_file_name("link");
        symlink(&path, &link).unwrap();
        assert_eq!(problem(&link), Unsafe::NotADirectory);
        assert_eq!(problem(Path::new("state")), Unsafe::Relative);
        if geteuid().is_root() {
            std::os::unix::fs::chown(&path, Some(65_534), None).unwrap();
            assert_eq!(problem(&path), Unsafe::Owner(65_534));
        }
    }

    #[test]
    fn a_damaged_record_is_set_aside_and_stops_nobody() {
        let (_place, path) = place();
        let locked = Locked::open(&path, PATIENCE).unwrap();
        locked.put_host(&host()).unwrap();
        for number in 1..=2 {
            std::fs::write(path.join("host.json"), b"{\"version\": 1, \"rec").unwrap();
            assert!(locked.host().is_err(), "never silently empty");
            assert_eq!(locked.sound_host().unwrap(), None);
            assert!(path.join(format!("host.json.damaged-{number}")).exists());
        }
        locked.put_host(&host()).unwrap();
        assert_eq!(locked.sound_host().unwrap(), Some(host()));
        std::fs::create_dir_all(path.join("networks")).unwrap();
        std::fs::write(path.join("networks/blue.json"), b"").unwrap();
        assert_eq!(locked.sound_networks().unwrap(), []);
        assert!(path.join("networks/blue.json.damaged-1").exists());
    }

    #[test]
    fn a_record_of_a_later_version_stays_as_it_is() {
        let (_place, path) = place();
        let locked = Locked::open(&path, PATIENCE).unwrap();
        let bytes = br#"{"version": 99, "record": {}}"#;
        std::fs::write(path.join("host.json"), bytes).unwrap();
        assert!(locked.sound_host().is_err());
        assert_eq!(std::fs::read(path.join("host.json")).unwrap(), bytes);
    }

    #[test]
    fn the_lock_is_waited_for_and_names_its_holder() {
        let (_place, path) = place();
        let first = Locked::open(&path, PATIENCE).unwrap();
        match Locked::open(&path, Duration::from_millis(20)) {
            Err(Error::Locked { holder, .. }) => {
                assert!(holder.contains(&std::process::id().to_string()), "{holder}");
            }
            other => panic!("{other:?}"),
        }
        let second = thread::spawn({
            let path = path.clone();
            move || Locked::open(&path, PATIENCE).map(drop)
        });
        drop(first);
        second.join().unwrap().unwrap();
    }

    #[test]
    fn whoever_waits_while_all_is_removed_begins_anew() {
        let (_place, path) = place();
        let first = Locked::open(&path, PATIENCE).unwrap();
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let path = path.clone();
                thread::spawn(move || {
                    let locked = Locked::open(&path, PATIENCE).unwrap();
                    locked.put_host(&host()).unwrap();
                    assert!(path.join("host.json").exists());
                    locked.remove_all().unwrap();
                })
            })
            .collect();
        first.remove_all().unwrap();
        waiters
            .into_iter()
            .for_each(|waiter| waiter.join().unwrap());
        assert!(!path.exists());
    }

    #[test]
    fn clearing_leaves_the_lock_alone() {
        let (_place, path) = place();
        let locked = Locked::open(&path, PATIENCE).unwrap();
        locked.put_host(&host()).unwrap();
        std::fs::create_dir_all(path.join("claims/address")).unwrap();
        locked.clear().unwrap();
        assert_eq!(locked.root.names().unwrap(), [LOCK]);
    }
}
