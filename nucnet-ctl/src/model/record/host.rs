//! The record of the host: whose state this is, and the numbers that are never given twice.

use super::{Namespace, Record};
use crate::model::netfilter::Backend;
use serde::{Deserialize, Serialize};
use std::{fmt, path::PathBuf};
use thiserror::Error;

/// The host: whose state this is, and the numbers that are never given twice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostRecord {
    /// `/proc/sys/kernel/random/boot_id` of the boot that the state belongs to.
    pub boot: String,
    /// The host's network namespace.
    pub netns: Namespace,
    /// Where the datapath is pinned.
    pub bpffs: PathBuf,
    /// The next numbers.
    pub next: Numbers,
    /// What carries packets, once something does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub datapath: Option<DatapathRecord>,
}

/// What carries packets.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum DatapathKind {
    /// nucnet's programs.
    #[default]
    Ebpf,
    /// The host's own stack, with rules in its netfilter.
    Iptables,
}

impl DatapathKind {
    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ebpf => "ebpf",
            Self::Iptables => "iptables",
        }
    }
}

impl fmt::Display for DatapathKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What carries packets, why, and what it made of the host.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatapathRecord {
    /// Which.
    pub kind: DatapathKind,
    /// Why not the other one; none: it was asked for, or is the best.
    pub reason: Option<String>,
    /// Not everything has moved to it yet.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub moving: bool,
    /// Whose tables the rules are in; none: there are no rules.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backend: Option<Backend>,
    /// What was changed of the host's own settings.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub sysctls: Vec<SysctlChange>,
}

/// A setting of the host's that nucnet has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct SysctlChange {
    /// Its path below `/proc/sys`.
    pub name: String,
    /// What it was.
    pub before: String,
    /// What was written.
    pub written: String,
    /// Settings of single interfaces that go with it, and had another value before.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub overwrites: Vec<Overwritten>,
    /// It is being given back, and then what it overwrites.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub returning: bool,
}

/// A setting of an interface that another one overwrites.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Overwritten {
    /// Its path below `/proc/sys`.
    pub name: String,
    /// What it was.
    pub before: String,
}

impl Record for HostRecord {
    fn name(&self) -> Option<&str> {
        None
    }
}

/// The next number of each kind. They begin at 1: 0 means none.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Numbers {
    /// Of endpoints and static mappings.
    pub endpoint: u32,
    /// Of networks.
    pub network: u32,
    /// Of policies.
    pub policy: u32,
    /// Of classes of policies.
    pub class: u32,
}

impl Default for Numbers {
    fn default() -> Self {
        Self {
            endpoint: 1,
            network: 1,
            policy: 1,
            class: 1,
        }
    }
}

/// All numbers of a kind were given out; only a reboot or `down` begins anew.
#[derive(Debug, Error)]
#[error("the numbers of {0} are used up")]
pub struct UsedUp(pub &'static str);

impl Numbers {
    /// A number for an endpoint or a static mapping.
    pub fn endpoint(&mut self) -> Result<u32, UsedUp> {
        take(&mut self.endpoint, 1, "endpoints")
    }

    /// A number for a network.
    pub fn network(&mut self) -> Result<u32, UsedUp> {
        take(&mut self.network, 1, "networks")
    }

    /// A number for a policy.
    pub fn policy(&mut self) -> Result<u32, UsedUp> {
        take(&mut self.policy, 1, "policies")
    }

    /// That many successive numbers for classes: the first.
    pub fn classes(&mut self, count: u32) -> Result<u32, UsedUp> {
        take(&mut self.class, count, "classes of policies")
    }
}

fn take(next: &mut u32, count: u32, kind: &'static str) -> Result<u32, UsedUp> {
    let first = *next;
    *next = first.checked_add(count).ok_or(UsedUp(kind))?;
    Ok(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_never_given_twice() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.endpoint().unwrap(), 1);
        assert_eq!(numbers.endpoint().unwrap(), 2);
        assert_eq!(numbers.classes(10).unwrap(), 1);
        assert_eq!(numbers.classes(1).unwrap(), 11);
        numbers.policy = u32::MAX;
        assert!(numbers.policy().is_err());
        assert_eq!(numbers.policy, u32::MAX);
    }
}
