//! Where drops end: whoever monitors is told, and the packet is gone. The rule that leads there has
//! counted it, for its owner.

use super::Chains;
use crate::model::netfilter::{DROP_PREFIX, MONITOR_GROUPS, Table};
use nucnet_common::abi::Reason;

/// The chains that log to monitors begin so; the rest is the reason.
const TOLD_PREFIX: &str = "NUCNET-TOLD-";
/// How many packets monitors are told of. They leave out what is no news, and say how many there
/// were.
const MONITORED: &str = "-m limit --limit 1000/sec --limit-burst 1000";

impl Chains {
    /// What tells monitors of a drop, in a table: what a rule matches for that, and its target.
    pub(super) fn told(&mut self, table: Table, reason: Reason) -> (&'static str, String) {
        let name = format!("{TOLD_PREFIX}{}", reason.name());
        let chain = self.chain(table, &name);
        if chain.is_empty() {
            for group in MONITOR_GROUPS {
                let log = format!(
                    "-j NFLOG --nflog-group {group} --nflog-prefix {}",
                    reason.name()
                );
                chain.rule("", "host", log);
            }
        }
        (MONITORED, format!("-j {name}"))
    }

    /// The target of rules of a table that drop for a reason.
    pub(super) fn drop(&mut self, table: Table, reason: Reason) -> String {
        let name = format!("{DROP_PREFIX}{}", reason.name());
        if self.chain(table, &name).is_empty() {
            let (matches, told) = self.told(table, reason);
            let chain = self.chain(table, &name);
            chain.rule(matches, "host", told);
            chain.rule("", "host", "-j DROP");
        }
        format!("-g {name}")
    }
}
