//! The programs' maps, as tables that can be emptied.

use std::{hash::Hash, io::ErrorKind};

use aya::{
    Pod,
    maps::{
        HashMap, Map, MapData, MapError,
        lpm_trie::{Key, LpmTrie},
    },
};

pub(super) type Table<K, V> = HashMap<MapData, K, V>;

/// A trie, and what is in it.
pub(super) struct Prefixes<K: Pod, V: Pod> {
    trie: LpmTrie<MapData, K, V>,
    keys: Vec<Key<K>>,
}

impl<K: Pod, V: Pod> TryFrom<Map> for Prefixes<K, V> {
    type Error = MapError;

    fn try_from(map: Map) -> Result<Self, MapError> {
        Ok(Self {
            trie: map.try_into()?,
            keys: Vec::new(),
        })
    }
}

impl<K: Pod, V: Pod> Prefixes<K, V> {
    pub(super) fn insert(&mut self, bits: u32, key: K, value: V) {
        let key = Key::new(bits, key);
        self.trie.insert(&key, value, 0).expect("insert");
        self.keys.push(key);
    }

    pub(super) fn clear(&mut self) {
        for key in self.keys.drain(..) {
            match self.trie.remove(&key) {
                Ok(()) => {}
                // The same prefix may have been written twice.
                Err(MapError::SyscallError(error))
                    if error.io_error.kind() == ErrorKind::NotFound => {}
                Err(error) => panic!("remove: {error}"),
            }
        }
    }
}

pub(super) fn keys<K: Pod, V: Pod>(table: &Table<K, V>) -> Vec<K> {
    table.keys().map(|key| key.expect("key")).collect()
}

pub(super) fn clear<K: Pod, V: Pod>(table: &mut Table<K, V>) {
    for key in keys(table) {
        table.remove(&key).expect("remove");
    }
}

pub(super) fn entries<K: Pod + Eq + Hash, V: Pod>(
    table: &Table<K, V>,
) -> std::collections::HashMap<K, V> {
    table.iter().map(|entry| entry.expect("entry")).collect()
}

pub(super) fn set<K: Pod, V: Pod>(table: &mut Table<K, V>, key: K, value: Option<&V>) {
    match value {
        Some(value) => table.insert(key, value, 0).expect("insert"),
        None => table.remove(&key).expect("remove"),
    }
}
