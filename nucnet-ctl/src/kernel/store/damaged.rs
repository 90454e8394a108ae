//! Records that are damaged: set aside, counted, and forgotten.

use super::{Error, Filed, Locked, file_name};
use crate::model::{
    EndpointId, NetworkName,
    record::{self, EndpointRecord, HostRecord, MappingRecord, NetworkRecord},
};
use std::path::{Path, PathBuf};

/// How the names begin that a file gets when it is set aside; a number follows.
fn aside(file: &str) -> String {
    format!("{file}.damaged-")
}

impl Locked {
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
        self.sound_all()
    }

    /// All networks; damaged records are set aside.
    pub fn sound_networks(&self) -> Result<Vec<NetworkRecord>, Error> {
        self.sound_all()
    }

    /// All endpoints; damaged records are set aside.
    pub fn sound_endpoints(&self) -> Result<Vec<EndpointRecord>, Error> {
        self.sound_all()
    }

    fn sound_all<T: Filed>(&self) -> Result<Vec<T>, Error> {
        let (records, unreadable) = self.read_all()?;
        for error in unreadable {
            self.sound::<T>(Err(error))?;
        }
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
    pub(in crate::kernel) fn is_set_aside(&self, id: &EndpointId) -> Result<bool, Error> {
        let aside = format!("{}1", aside(&file_name(Some(id.as_str()))));
        match self.directory::<EndpointRecord>()? {
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
            let aside = format!("{}{number}", aside(&name));
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
        let begin = aside(&file_name(None));
        Ok(self
            .root
            .names()?
            .iter()
            .filter(|name| name.starts_with(&begin))
            .count())
    }

    /// The ids of endpoints whose records were damaged and set aside.
    pub fn set_aside_endpoints(&self) -> Result<Vec<String>, Error> {
        let names = match self.directory::<EndpointRecord>()? {
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
        let Some(directory) = self.directory::<EndpointRecord>()? else {
            return Ok(());
        };
        let prefix = aside(&file_name(Some(id.as_str())));
        for name in directory.names()? {
            if name.starts_with(&prefix) {
                directory.remove(&name)?;
            }
        }
        Ok(())
    }

    /// Removes what was set aside of static mappings: nothing else of them has their ids. Returns
    /// the names of the files.
    pub fn forget_damaged_mappings(&self) -> Result<Vec<String>, Error> {
        let Some(directory) = self.directory::<MappingRecord>()? else {
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
}
