//! The rules of the iptables datapath, as values: which are wanted, which are there, and the text
//! for `iptables-restore --noflush` that makes the one of the other.
//!
//! All that is nucnet's is in chains of its own, and each chain is always written whole. Its first
//! rule carries a fingerprint of it in the comment, so that what is there is compared without
//! knowing how this or that version of iptables spells a rule: a chain with another fingerprint or
//! another number of rules is written anew. What changes is one file for `iptables-restore`, and
//! taking back is nothing but wanting what was wanted before.

mod change;
mod journey;
mod rules;
mod saved;
mod tuple;
mod walk;

use nucnet_common::abi::size;
use serde::{Deserialize, Serialize};
use std::{fmt, ops::RangeInclusive};

pub use change::{Change, change, emptied};
pub use journey::{Connection, End, Journey, Surroundings, Way, WayIn};
pub use rules::{SourcePorts, Wanted, WantedEndpoint, of_mapping};
pub use saved::{Dropped, Saved};
pub use tuple::Tuple;
pub use walk::{AddressKind, Unknown};

/// Chains of nucnet's begin so.
pub const CHAIN_PREFIX: &str = "NUCNET-";
/// Chains of nucnet's that only drop begin so.
const DROP_PREFIX: &str = "NUCNET-DROP-";
/// Comments of nucnet's rules begin so.
pub const COMMENT_PREFIX: &str = "nucnet:";
/// The comment of rules that lead from the kernel's chains to nucnet's.
pub const JUMP_COMMENT: &str = "nucnet:jump";
/// The group that denials are logged to for whoever keeps a log (`NFLOG`).
pub const LOG_GROUP: u16 = 110;
/// The groups that they are logged to for monitors, since a group has one reader.
pub const MONITOR_GROUPS: RangeInclusive<u16> = LOG_GROUP + 1..=LOG_GROUP + size::MONITORS as u16;

/// What a comment of nucnet's says: whose the rule is, and what more there is to it.
fn owner_and_remark(comment: &str) -> Option<(&str, &str)> {
    comment.strip_prefix(COMMENT_PREFIX)?.split_once(' ')
}

/// An address family, with a program and rules of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// `iptables`.
    Ipv4,
    /// `ip6tables`.
    Ipv6,
}

impl Family {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Ipv4, Self::Ipv6];

    /// Whether it is IPv6.
    pub fn is_v6(self) -> bool {
        self == Self::Ipv6
    }

    /// The program.
    pub fn program(self) -> &'static str {
        match self {
            Self::Ipv4 => "iptables",
            Self::Ipv6 => "ip6tables",
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ipv4 => "IPv4",
            Self::Ipv6 => "IPv6",
        })
    }
}

/// Which of the kernel's two sets of tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Backend {
    /// nf_tables.
    Nft,
    /// ip_tables.
    Legacy,
}

impl Backend {
    /// The end of its programs' own names.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::Nft => "-nft",
            Self::Legacy => "-legacy",
        }
    }

    /// The other one.
    pub fn other(self) -> Self {
        match self {
            Self::Nft => Self::Legacy,
            Self::Legacy => Self::Nft,
        }
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Nft => "iptables-nft",
            Self::Legacy => "iptables-legacy",
        })
    }
}

/// A table of the kernel's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Guards, before anything is translated.
    Mangle,
    /// Policies and what may pass.
    Filter,
    /// Translation.
    Nat,
}

impl Table {
    /// In the order in which they are written: nothing is translated before it is guarded.
    pub const ALL: [Self; 3] = [Self::Mangle, Self::Filter, Self::Nat];

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Mangle => "mangle",
            Self::Filter => "filter",
            Self::Nat => "nat",
        }
    }

    /// The kernel's chains that lead to one of nucnet's, named after it.
    pub fn hooks(self) -> &'static [&'static str] {
        match self {
            Self::Mangle => &["PREROUTING"],
            Self::Filter => &["INPUT", "FORWARD", "OUTPUT"],
            Self::Nat => &["PREROUTING", "OUTPUT", "POSTROUTING"],
        }
    }
}

/// A rule: what it matches, whose it is, and what it does.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    matches: String,
    comment: String,
    target: String,
}

/// A chain of nucnet's, with at least one rule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chain {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: String,
    rules: Vec<Rule>,
}

impl Chain {
    fn new(table: Table, name: impl Into<String>) -> Self {
        Self {
            table,
            name: name.into(),
            rules: Vec::new(),
        }
    }

    /// Adds a rule. `comment` says whose it is and, of one that drops, why, after a space.
    fn rule(&mut self, matches: impl Into<String>, comment: &str, target: impl Into<String>) {
        self.rules.push(Rule {
            matches: matches.into(),
            comment: format!("{COMMENT_PREFIX}{comment}"),
            target: target.into(),
        });
    }

    /// How many rules it has.
    pub fn len(&self) -> usize {
        self.rules.len()
    }

    /// Whether it has no rules; then it is not wanted.
    pub fn is_empty(&self) -> bool {
        self.rules.is_empty()
    }

    /// What tells it from any other contents.
    pub fn fingerprint(&self) -> String {
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        for rule in &self.rules {
            for part in [&rule.matches, &rule.comment, &rule.target] {
                // FNV-1a; a byte that no text has ends each part.
                for byte in part.bytes().chain([0xff]) {
                    hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
                }
            }
        }
        format!("{hash:016x}")
    }

    /// Its rules as `iptables-restore` reads them. `counts` are those that rules with the same
    /// comment had before.
    fn lines(&self, mut counts: impl FnMut(&str) -> Option<Dropped>) -> Vec<String> {
        let mut lines = Vec::with_capacity(self.rules.len());
        for (index, rule) in self.rules.iter().enumerate() {
            let mut comment = rule.comment.clone();
            if index == 0 {
                comment += &format!(" ={}", self.fingerprint());
            }
            let mut line = match counts(&rule.comment) {
                Some(count) => format!("[{}:{}] ", count.packets, count.bytes),
                None => String::new(),
            };
            line += &format!("-A {}", self.name);
            if !rule.matches.is_empty() {
                line += &format!(" {}", rule.matches);
            }
            line += &format!(" -m comment --comment \"{comment}\"");
            if !rule.target.is_empty() {
                line += &format!(" {}", rule.target);
            }
            lines.push(line);
        }
        lines
    }
}

/// The arguments of the rule that leads from one of the kernel's chains to nucnet's.
fn jump(hook: &str) -> String {
    format!("{hook} -m comment --comment \"{JUMP_COMMENT}\" -j {CHAIN_PREFIX}{hook}")
}
