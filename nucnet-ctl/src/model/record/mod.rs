//! What the control plane remembers: of the host, of each network, of each endpoint.
//!
//! A record holds what is wanted, as it was asked for, and what was made to fulfil it. It is
//! written before the first step of a change and removed after the last step of a teardown, so
//! that whoever comes next knows what may exist. State is of one boot.

mod endpoint;
#[cfg(test)]
pub(crate) mod fixture;
mod host;
mod network;

pub use endpoint::{
    AttachWish, EndpointRecord, MountPoint, OtherPolicy, PolicyNumbers, ResolvRecord,
};
pub use host::{
    DatapathKind, DatapathRecord, HostRecord, Numbers, Overwritten, SysctlChange, UsedUp,
};
pub use network::{NetworkRecord, NetworkWish};

use super::{Cidr, EndpointId, mapping::MappingSpec};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use std::fmt;
use thiserror::Error;

/// Rises with every change of a record that older versions cannot read.
pub const VERSION: u32 = 1;

/// Why a record cannot be used.
#[derive(Debug, Error)]
pub enum Error {
    /// It is no record, or not a whole one.
    #[error("the record is damaged")]
    Damaged(#[source] serde_json::Error),
    /// It was written by a later version.
    #[error("the record has version {0}, which this nucnet-ctl does not know")]
    Newer(u32),
    /// It is of another object than its name says.
    #[error("the record is of {0:?}")]
    Misplaced(String),
}

/// A record: versioned, and known by a name.
pub trait Record: Serialize + DeserializeOwned {
    /// The name that it is filed under; none if there is only one.
    fn name(&self) -> Option<&str>;
}

#[derive(Serialize)]
struct Outgoing<'a, T> {
    version: u32,
    record: &'a T,
}

#[derive(Deserialize)]
struct Version {
    version: u32,
}

#[derive(Deserialize)]
struct Incoming<T> {
    record: T,
}

/// The bytes of a record.
pub fn encode<T: Record>(record: &T) -> Result<Vec<u8>, Error> {
    let mut bytes = serde_json::to_vec_pretty(&Outgoing {
        version: VERSION,
        record,
    })
    .map_err(Error::Damaged)?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// The record of those bytes, filed under that name.
pub fn decode<T: Record>(bytes: &[u8], name: Option<&str>) -> Result<T, Error> {
    let Version { version } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if version > VERSION {
        return Err(Error::Newer(version));
    }
    let Incoming::<T> { record } = serde_json::from_slice(bytes).map_err(Error::Damaged)?;
    if record.name() != name {
        return Err(Error::Misplaced(
            record.name().unwrap_or_default().to_owned(),
        ));
    }
    Ok(record)
}

/// Which network namespace it is. Device and inode are unique while it lives; the cookie
/// (`SO_NETNS_COOKIE`, Linux 5.14) for as long as the kernel runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Namespace {
    /// Device number of the nsfs.
    pub device: u64,
    /// Inode number.
    pub inode: u64,
    /// The cookie.
    pub cookie: Option<u64>,
}

impl Namespace {
    /// A number for names that are derived from the namespace, and for files that stand for it.
    pub fn number(&self) -> u64 {
        self.cookie.unwrap_or(self.inode)
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "net:[{}]", self.inode)
    }
}

/// How far an object is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// Being made, or left behind while being made.
    Configuring,
    /// Whole.
    Active,
    /// Something that it needs is missing.
    Degraded,
    /// Being removed, or left behind while being removed.
    Removing,
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Configuring => "configuring",
            Self::Active => "active",
            Self::Degraded => "degraded",
            Self::Removing => "removing",
        })
    }
}

/// A static mapping.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappingRecord {
    /// Its id.
    pub id: EndpointId,
    /// Its number: of the same sequence as those of endpoints, never given twice.
    pub number: u32,
    /// How far it is.
    pub state: State,
    /// What was asked for.
    pub spec: MappingSpec,
    /// Where the clients of a hairpin are.
    pub lan: Option<Cidr>,
    /// Index of the interface that it is bound to; 0: it is bound to none.
    pub link: u32,
}

impl Record for MappingRecord {
    fn name(&self) -> Option<&str> {
        Some(self.id.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn host() -> HostRecord {
        HostRecord {
            boot: "b".into(),
            netns: Namespace {
                device: 4,
                inode: 4_026_531_840,
                cookie: Some(1),
            },
            bpffs: "/sys/fs/bpf/nucnet".into(),
            next: Numbers::default(),
            datapath: None,
        }
    }

    #[test]
    fn a_record_reads_back_as_it_was_written() {
        let bytes = encode(&host()).unwrap();
        assert_eq!(decode::<HostRecord>(&bytes, None).unwrap(), host());
    }

    #[test]
    fn a_record_cut_short_anywhere_is_damaged() {
        let bytes = encode(&host()).unwrap();
        for end in 0..bytes.len() - 2 {
            let read = decode::<HostRecord>(&bytes[..end], None);
            assert!(matches!(read, Err(Error::Damaged(_))), "{end}");
        }
    }

    #[test]
    fn a_record_of_a_later_version_is_refused_untouched() {
        let bytes = br#"{"version": 2, "record": {"what": "ever"}}"#;
        assert!(matches!(
            decode::<HostRecord>(bytes, None),
            Err(Error::Newer(2))
        ));
    }

    #[test]
    fn a_record_under_the_wrong_name_is_refused() {
        let bytes = encode(&host()).unwrap();
        assert!(matches!(
            decode::<HostRecord>(&bytes, Some("x")),
            Err(Error::Misplaced(_))
        ));
    }
}
