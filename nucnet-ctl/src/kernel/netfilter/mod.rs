//! The host's netfilter, by its own programs: `iptables-save` reads, `iptables-restore` changes.
//!
//! There are two of each: those that write nf_tables and those of old. A kernel may have rules of
//! both, which do not see each other, so nucnet's go where the host's are ([`Backend`]).
//!
//! Connections, and what rules log, come by netlink.

mod conntrack;
mod log;
mod nfnetlink;
mod settings;

use std::{fs, time::Duration};

use super::helper::{self, Helper};
use crate::model::netfilter::{Backend, Chain, Change, Family, Saved, Table, change, emptied};

pub use conntrack::{
    Adopted, ConnectionChange, ConnectionEvents, Conntrack, Count, TcpState, Tracked,
};
pub use log::{Log, Logged, readers};
pub use settings::{Changed, announce, count_all, forward_all, make, restore};

/// How long another process may hold the lock of the old tables, in seconds.
const LOCK_WAIT: &str = "5";
/// How long one run of a program may take.
const LIMIT: Duration = Duration::from_secs(30);

/// The programs of one family.
#[derive(Debug)]
struct Programs {
    save: Helper,
    restore: Helper,
}

impl Programs {
    /// Those of a backend: under their own names or, on a host that has one only, under the
    /// common ones. `None`: the host lacks them.
    fn find(family: Family, backend: Backend) -> Result<Option<Self>, helper::Error> {
        let own = format!("{}{}", family.program(), backend.suffix());
        if let Some(programs) = Self::named(&own)? {
            return Ok(Some(programs));
        }
        match default_backend(family)? {
            Some(found) if found == backend => Self::named(family.program()),
            _ => Ok(None),
        }
    }

    fn named(name: &str) -> Result<Option<Self>, helper::Error> {
        let save = Helper::find(&format!("{name}-save"))?;
        let restore = Helper::find(&format!("{name}-restore"))?;
        Ok(save
            .zip(restore)
            .map(|(save, restore)| Self { save, restore }))
    }

    fn text(&self) -> Result<String, helper::Error> {
        self.save.run(&["-c"], "", LIMIT)
    }

    fn change(&self, text: &str) -> Result<(), helper::Error> {
        let arguments = ["--noflush", "--counters", "-w", LOCK_WAIT];
        self.restore.run(&arguments, text, LIMIT).map(drop)
    }
}

/// Which tables `iptables` itself is about. `None`: there is no such program.
fn default_backend(family: Family) -> Result<Option<Backend>, helper::Error> {
    let Some(program) = Helper::find(family.program())? else {
        return Ok(None);
    };
    let version = program.run(&["--version"], "", LIMIT)?;
    // Before 1.8 there was one only.
    Ok(Some(match version.contains("nf_tables") {
        true => Backend::Nft,
        false => Backend::Legacy,
    }))
}

/// Whether the calling thread's namespace has tables of the old kind. To ask their own program
/// would make some.
fn has_legacy_tables(family: Family) -> bool {
    let name = match family {
        Family::Ipv4 => "ip_tables_names",
        Family::Ipv6 => "ip6_tables_names",
    };
    let names = fs::read_to_string(format!("/proc/thread-self/net/{name}"));
    names.is_ok_and(|names| !names.trim().is_empty())
}

/// The tables that the host's own rules are in; where there are none, or of both kinds, those that
/// `iptables` itself is about.
pub fn detect() -> Result<Backend, helper::Error> {
    let Some(default) = default_backend(Family::Ipv4)? else {
        return Err(helper::Error::Missing(Family::Ipv4.program().to_owned()));
    };
    let other = default.other();
    Ok(match !has_foreign(default)? && has_foreign(other)? {
        true => other,
        false => default,
    })
}

/// Whether somebody else has rules in the tables of that kind.
pub fn has_foreign(backend: Backend) -> Result<bool, helper::Error> {
    if backend == Backend::Legacy && !has_legacy_tables(Family::Ipv4) {
        return Ok(false);
    }
    match Programs::find(Family::Ipv4, backend)? {
        Some(programs) => Ok(Saved::has_foreign(&programs.text()?)),
        None => Ok(false),
    }
}

/// All netfilters that there are programs for and, of the old kind, tables.
pub fn all() -> Result<Vec<Netfilter>, helper::Error> {
    let mut all = Vec::new();
    for backend in [Backend::Nft, Backend::Legacy] {
        let has_tables = |family| has_legacy_tables(family);
        if backend == Backend::Legacy && !Family::ALL.into_iter().any(has_tables) {
            continue;
        }
        match Netfilter::open(backend) {
            Ok(netfilter) => all.push(netfilter),
            Err(helper::Error::Missing(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(all)
}

/// The host's netfilter.
#[derive(Debug)]
pub struct Netfilter {
    backend: Backend,
    v4: Programs,
    v6: Option<Programs>,
}

impl Netfilter {
    /// That of the calling thread's namespace, by the programs of a backend.
    pub fn open(backend: Backend) -> Result<Self, helper::Error> {
        let v4 = Programs::find(Family::Ipv4, backend)?
            .ok_or_else(|| helper::Error::Missing(backend.to_string()))?;
        Ok(Self {
            backend,
            v4,
            v6: Programs::find(Family::Ipv6, backend)?,
        })
    }

    /// Whose programs.
    pub fn backend(&self) -> Backend {
        self.backend
    }

    /// Whether there are programs for that family.
    pub fn has(&self, family: Family) -> bool {
        !family.is_v6() || self.v6.is_some()
    }

    fn programs(&self, family: Family) -> Option<&Programs> {
        match family {
            Family::Ipv4 => Some(&self.v4),
            Family::Ipv6 => self.v6.as_ref(),
        }
    }

    /// The rules that are there; none of a family without programs.
    pub fn saved(&self, family: Family) -> Result<Saved, helper::Error> {
        match self.programs(family) {
            Some(programs) => Ok(Saved::parse(&programs.text()?)),
            None => Ok(Saved::default()),
        }
    }

    /// What is not as wanted; of a family without programs: nothing.
    pub fn compare(&self, family: Family, wanted: &[Chain]) -> Result<Change, helper::Error> {
        match self.programs(family) {
            Some(_) => Ok(change(&self.saved(family)?, wanted)),
            None => Ok(Change::default()),
        }
    }

    /// Takes the rules out of nucnet's chain that one of the kernel's leads to, which is there.
    pub fn empty(&self, family: Family, table: Table, hook: &str) -> Result<(), helper::Error> {
        match self.programs(family) {
            Some(programs) => programs.change(&emptied(table, hook)),
            None => Ok(()),
        }
    }

    /// Makes the rules those that are wanted, in one transaction.
    pub fn apply(&self, family: Family, wanted: &[Chain]) -> Result<Change, helper::Error> {
        let Some(programs) = self.programs(family) else {
            return Ok(Change::default());
        };
        let change = self.compare(family, wanted)?;
        if !change.is_none() {
            programs.change(&change.text)?;
        }
        Ok(change)
    }
}
