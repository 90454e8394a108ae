//! Entries of pinned maps, with errors that name the map.

use std::{
    io,
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use aya::{
    Pod,
    maps::{Array, HashMap, IterableMap, Map, MapData, MapError, PerCpuHashMap, PerCpuValues},
    util::nr_cpus,
};
use aya_obj::generated::{BPF_EXIST, BPF_NOEXIST};
use nucnet_common::abi;

use super::{error::BpfError, sys};

/// Key of a longest-prefix-match table: how many bits of the data count, and the data.
pub use aya::maps::lpm_trie::Key as Prefix;

/// Most entries that one system call writes or removes.
const BATCH: usize = 4096;

/// A pinned map: hash map, or longest-prefix-match trie (with [`Prefix`] as key).
pub struct Table<K, V> {
    name: &'static str,
    inner: HashMap<MapData, K, V>,
}

impl<K: Pod, V: Pod> Table<K, V> {
    pub(super) fn open((pin, name): Pin, capacity: usize) -> Result<Self, BpfError> {
        let map = open::<K, V>(&pin, name, capacity)?;
        // The calls for the entries of tries are the same as those for hash maps.
        let inner = HashMap::try_from(Map::HashMap(map)).map_err(open_error(name))?;
        Ok(Self { name, inner })
    }

    fn error(&self, action: &'static str) -> impl Fn(io::Error) -> BpfError + use<K, V> {
        let name = self.name;
        move |source| BpfError::Map {
            name,
            action,
            source,
        }
    }

    /// The value of a key. Of a trie: that of the longest prefix that covers the key's.
    pub fn get(&self, key: &K) -> Result<Option<V>, BpfError> {
        match self.inner.get(key, 0) {
            Ok(value) => Ok(Some(value)),
            Err(MapError::KeyNotFound) => Ok(None),
            Err(error) => Err(self.error("look up")(cause(error))),
        }
    }

    /// Writes an entry, in place of any with the same key.
    pub fn insert(&mut self, key: &K, value: &V) -> Result<(), BpfError> {
        let error = self.error("insert");
        sys::before_change()
            .and_then(|()| self.inner.insert(key, value, 0).map_err(cause))
            .map_err(error)
    }

    /// Changes an entry that exists. `false`: there is none, and none is made.
    pub fn replace(&mut self, key: &K, value: &V) -> Result<bool, BpfError> {
        let error = self.error("replace");
        let replaced = sys::before_change().and_then(|()| {
            let inserted = self.inner.insert(key, value, BPF_EXIST.into());
            inserted.map_err(cause)
        });
        match replaced {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(error(e)),
        }
    }

    /// Writes entries; those before one that fails stay.
    pub fn insert_all(&mut self, entries: &[(K, V)]) -> Result<(), BpfError> {
        // One entry needs no batch, and a kernel without them must do with single calls.
        let mut batches = entries.len() > 1;
        let mut rest = entries;
        while let [(key, value), ..] = rest {
            if batches {
                let chunk = &rest[..rest.len().min(BATCH)];
                let (keys, values): (Vec<K>, Vec<V>) = chunk.iter().copied().unzip();
                let fd = self.inner.map().fd().as_fd();
                let (done, result) = sys::update_entries(fd, &keys, &values);
                rest = &rest[done..];
                match result {
                    Ok(()) => {}
                    Err(error) if sys::is_unsupported_batch(&error) => batches = false,
                    Err(error) => return Err(self.error("insert")(error)),
                }
            } else {
                self.insert(key, value)?;
                rest = &rest[1..];
            }
        }
        Ok(())
    }

    /// Removes an entry. `false`: there is none. Of a trie: exactly that prefix.
    pub fn remove(&mut self, key: &K) -> Result<bool, BpfError> {
        let error = self.error("remove");
        match sys::before_change().and_then(|()| self.inner.remove(key).map_err(cause)) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(error(e)),
        }
    }

    /// Removes entries, and calls `removed` with the index of each that was there: an entry is
    /// removed by exactly one of those who try.
    pub fn remove_all(
        &mut self,
        keys: &[K],
        mut removed: impl FnMut(usize),
    ) -> Result<(), BpfError> {
        let mut batches = keys.len() > 1;
        let mut next = 0;
        while next < keys.len() {
            if batches {
                let chunk = &keys[next..keys.len().min(next + BATCH)];
                let (done, result) = sys::delete_entries(self.inner.map().fd().as_fd(), chunk);
                (next..next + done).for_each(&mut removed);
                next += done;
                match result {
                    Ok(()) => {}
                    Err(error) if error.kind() == io::ErrorKind::NotFound => next += 1,
                    Err(error) if sys::is_unsupported_batch(&error) => batches = false,
                    Err(error) => return Err(self.error("remove")(error)),
                }
            } else {
                if self.remove(&keys[next])? {
                    removed(next);
                }
                next += 1;
            }
        }
        Ok(())
    }

    /// Calls `visit` with every entry. One that comes or goes meanwhile may be missed; in a
    /// table that others change, one may be seen twice.
    pub fn for_each(&self, mut visit: impl FnMut(&K, &V)) -> Result<(), BpfError> {
        let mut visited = false;
        let batches = sys::for_each_entry(self.inner.map().fd().as_fd(), |key, value| {
            visited = true;
            visit(key, value);
        });
        match batches {
            Ok(()) => Ok(()),
            Err(error) if sys::is_unsupported_batch(&error) && !visited => {
                for key in self.inner.keys() {
                    let key = key.map_err(|e| self.error("list")(cause(e)))?;
                    if let Some(value) = self.get(&key)? {
                        visit(&key, &value);
                    }
                }
                Ok(())
            }
            Err(error) => Err(self.error("list")(error)),
        }
    }

    /// Every entry, in no order.
    pub fn entries(&self) -> Result<Vec<(K, V)>, BpfError> {
        let mut entries = Vec::new();
        self.for_each(|key, value| entries.push((*key, *value)))?;
        Ok(entries)
    }

    /// How many entries there are; the kernel keeps no count.
    pub fn count(&self) -> Result<usize, BpfError> {
        let mut count = 0;
        self.for_each(|_, _| count += 1)?;
        Ok(count)
    }
}

/// A pinned array.
pub struct Cells<V: Pod> {
    name: &'static str,
    inner: Array<MapData, V>,
    /// Flag for every access: values with a lock in them are read and written under it.
    flags: u64,
}

impl<V: Pod> Cells<V> {
    pub(super) fn open((pin, name): Pin, cells: usize, flags: u64) -> Result<Self, BpfError> {
        let map = open::<u32, V>(&pin, name, cells)?;
        let inner = Array::try_from(Map::Array(map)).map_err(open_error(name))?;
        Ok(Self { name, inner, flags })
    }

    /// The value of a cell.
    pub fn get(&self, index: u32) -> Result<V, BpfError> {
        self.inner
            .get(&index, self.flags)
            .map_err(|error| BpfError::Map {
                name: self.name,
                action: "look up",
                source: cause(error),
            })
    }

    /// Changes the value of a cell.
    pub fn set(&mut self, index: u32, value: &V) -> Result<(), BpfError> {
        sys::before_change()
            .and_then(|()| self.inner.set(index, value, self.flags).map_err(cause))
            .map_err(|source| BpfError::Map {
                name: self.name,
                action: "write",
                source,
            })
    }
}

/// The pinned table of drops, with one count a CPU.
pub struct Drops {
    inner: PerCpuHashMap<MapData, abi::DropKey, abi::DropCount>,
}

impl Drops {
    const NAME: &'static str = abi::map::DROPS;

    pub(super) fn open((pin, name): Pin, capacity: usize) -> Result<Self, BpfError> {
        let map = open::<abi::DropKey, abi::DropCount>(&pin, name, capacity)?;
        let inner = PerCpuHashMap::try_from(Map::PerCpuHashMap(map)).map_err(open_error(name))?;
        Ok(Self { inner })
    }

    fn error(action: &'static str) -> impl Fn(MapError) -> BpfError {
        move |error| BpfError::Map {
            name: Self::NAME,
            action,
            source: cause(error),
        }
    }

    /// What was dropped for one endpoint (0: for none in particular) and reason, on all CPUs.
    pub fn get(&self, key: &abi::DropKey) -> Result<abi::DropCount, BpfError> {
        match self.inner.get(key, 0) {
            Ok(counts) => Ok(sum(&counts)),
            Err(MapError::KeyNotFound) => Ok(abi::DropCount::default()),
            Err(error) => Err(Self::error("look up")(error)),
        }
    }

    /// Every count there is, summed over the CPUs.
    pub fn entries(&self) -> Result<Vec<(abi::DropKey, abi::DropCount)>, BpfError> {
        let keys: Result<Vec<_>, _> = self.inner.keys().collect();
        keys.map_err(Self::error("list"))?
            .into_iter()
            .map(|key| Ok((key, self.get(&key)?)))
            .collect()
    }

    /// How many entries there are, each with a count for every CPU.
    pub fn count(&self) -> Result<usize, BpfError> {
        let mut count = 0;
        for key in self.inner.keys() {
            key.map_err(Self::error("list"))?;
            count += 1;
        }
        Ok(count)
    }

    /// Forgets what was dropped for one endpoint.
    pub fn forget(&mut self, endpoint: u32) -> Result<(), BpfError> {
        for &reason in abi::Reason::ALL {
            let key = abi::DropKey {
                endpoint,
                reason: reason as u32,
            };
            let removed =
                sys::before_change().and_then(|()| self.inner.remove(&key).map_err(cause));
            match removed {
                Err(source) if source.kind() != io::ErrorKind::NotFound => {
                    return Err(BpfError::Map {
                        name: Self::NAME,
                        action: "remove",
                        source,
                    });
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn sum(counts: &[abi::DropCount]) -> abi::DropCount {
    counts
        .iter()
        .fold(abi::DropCount::default(), |sum, count| abi::DropCount {
            packets: sum.packets + count.packets,
            bytes: sum.bytes + count.bytes,
        })
}

/// The pinned table of what came by mappings, with one count a CPU.
pub struct MappingCounts {
    inner: PerCpuHashMap<MapData, u32, abi::MappingCount>,
}

impl MappingCounts {
    const NAME: &'static str = abi::map::MAPPING_COUNTS;

    pub(super) fn open((pin, name): Pin, capacity: usize) -> Result<Self, BpfError> {
        let map = open::<u32, abi::MappingCount>(&pin, name, capacity)?;
        let inner = PerCpuHashMap::try_from(Map::PerCpuHashMap(map)).map_err(open_error(name))?;
        Ok(Self { inner })
    }

    fn error(action: &'static str) -> impl Fn(io::Error) -> BpfError {
        move |source| BpfError::Map {
            name: Self::NAME,
            action,
            source,
        }
    }

    /// What came by a mapping, on all CPUs.
    pub fn get(&self, mapping: u32) -> Result<abi::MappingCount, BpfError> {
        let counts = match self.inner.get(&mapping, 0) {
            Ok(counts) => counts,
            Err(MapError::KeyNotFound) => return Ok(abi::MappingCount::default()),
            Err(error) => return Err(Self::error("look up")(cause(error))),
        };
        let sum = counts
            .iter()
            .fold(abi::MappingCount::default(), |sum, count| {
                abi::MappingCount {
                    flows: sum.flows + count.flows,
                    packets: sum.packets + count.packets,
                    bytes: sum.bytes + count.bytes,
                }
            });
        Ok(sum)
    }

    /// Begins to count for a mapping; where counts exist, they go on.
    pub fn begin(&mut self, mapping: u32) -> Result<(), BpfError> {
        let zeros = nr_cpus()
            .map_err(|(_, error)| error)
            .and_then(|cpus| PerCpuValues::try_from(vec![abi::MappingCount::default(); cpus]))
            .map_err(Self::error("insert"))?;
        let begun = sys::before_change().and_then(|()| {
            self.inner
                .insert(mapping, zeros, BPF_NOEXIST.into())
                .map_err(cause)
        });
        match begun {
            Err(source) if source.kind() != io::ErrorKind::AlreadyExists => {
                Err(Self::error("insert")(source))
            }
            _ => Ok(()),
        }
    }

    /// Forgets what came by a mapping. `false`: nothing was counted for it.
    pub fn forget(&mut self, mapping: u32) -> Result<bool, BpfError> {
        let removed =
            sys::before_change().and_then(|()| self.inner.remove(&mapping).map_err(cause));
        match removed {
            Ok(()) => Ok(true),
            Err(source) if source.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(source) => Err(Self::error("remove")(source)),
        }
    }

    /// The mappings that there are counts for.
    pub fn mappings(&self) -> Result<Vec<u32>, BpfError> {
        let keys: Result<Vec<_>, _> = self.inner.keys().collect();
        keys.map_err(|error| Self::error("list")(cause(error)))
    }

    /// How many entries there are, each with a count for every CPU.
    pub fn count(&self) -> Result<usize, BpfError> {
        Ok(self.mappings()?.len())
    }
}

/// Where a map is pinned, and its name.
type Pin = (PathBuf, &'static str);

/// Opens a map, if it has the dimensions that this version gives it.
fn open<K, V>(pin: &Path, name: &'static str, capacity: usize) -> Result<MapData, BpfError> {
    let error = || open_error(name);
    let map = MapData::from_pin(pin).map_err(error())?;
    let info = map.info().map_err(error())?;
    for (dimension, found, wanted) in [
        ("key size", info.key_size(), size_of::<K>() as u32),
        ("value size", info.value_size(), size_of::<V>() as u32),
        ("capacity", info.max_entries(), capacity as u32),
    ] {
        if found != wanted {
            return Err(BpfError::OtherMap {
                path: pin.into(),
                dimension,
                found,
                wanted,
            });
        }
    }
    Ok(map)
}

pub(super) fn open_error(name: &'static str) -> impl FnOnce(MapError) -> BpfError {
    move |source| BpfError::OpenMap {
        name,
        source: Box::new(source),
    }
}

/// The system's error behind one of aya's, which has no other for these calls.
fn cause(error: MapError) -> io::Error {
    match error {
        MapError::SyscallError(error) => error.io_error,
        MapError::IoError(error) => error,
        other => io::Error::other(other),
    }
}
