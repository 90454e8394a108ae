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
//!   lent/             see `forwarding`
//!   resolv/ID         see `resolv`
//! ```
//!
//! A record is replaced as a whole or not at all, so that readers need no lock. A damaged one is
//! set aside (`.damaged-N`) by whoever holds the lock, reported, and stops nobody else. State is
//! of one boot: that of an earlier one is cleared.
mod damaged;
mod error;
mod lock;

pub use error::{Error, Unsafe};
pub use lock::Locked;

use super::directory::Directory;
use crate::model::{
    EndpointId, NetworkName,
    record::{self, EndpointRecord, HostRecord, MappingRecord, NetworkRecord, Record},
};
use nix::unistd::geteuid;
use std::path::Path;

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

    /// When records of networks, endpoints and mappings came, changed or went for the last time, in
    /// seconds and nanoseconds.
    pub fn changed(&self) -> Result<Vec<(i64, i64)>, Error> {
        let directories = self.directories()?;
        let stats = directories.iter().map(Directory::stat);
        stats
            .map(|stat| stat.map(|stat| (stat.st_mtime, stat.st_mtime_nsec)))
            .collect::<Result<_, _>>()
            .map_err(Error::from)
    }

    /// Where a kind of record is; none: there was no such record yet.
    fn directory<T: Filed>(&self) -> Result<Option<Directory>, Error> {
        match T::DIRECTORY {
            Some(inner) => Ok(self.root.enter(inner)?),
            None => Ok(None),
        }
    }

    /// The directories of records that are there.
    fn directories(&self) -> Result<Vec<Directory>, Error> {
        let all = [
            self.directory::<NetworkRecord>()?,
            self.directory::<EndpointRecord>()?,
            self.directory::<MappingRecord>()?,
        ];
        Ok(all.into_iter().flatten().collect())
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
        let Some(directory) = self.directory::<T>()? else {
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

impl Locked {
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

    fn remove<T: Filed>(&self, name: &str) -> Result<(), Error> {
        if let Some(inner) = self.directory::<T>()? {
            inner.remove(&file_name(Some(name)))?;
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
        self.directories()?.iter().try_for_each(forget)?;
        Ok(forgotten)
    }

    /// Whether there is no record but that of the host, damaged ones included.
    pub fn is_empty(&self) -> Result<bool, Error> {
        for directory in self.directories()? {
            if !directory.names()?.is_empty() {
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
}

#[cfg(test)]
mod tests {
    use super::{lock::LOCK, *};
    use crate::model::record::{Namespace, Numbers};
    use std::{
        os::unix::fs::{PermissionsExt, symlink},
        path::PathBuf,
        thread,
        time::Duration,
    };

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
