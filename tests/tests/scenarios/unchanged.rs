//! Host and container, before and after.

use anyhow::{Result, ensure};
use nucnet_tests::lab::{Node, Snapshot};

use crate::case::Case;

/// Host and container in one.
pub(crate) fn both(case: &Case, container: &Node) -> Result<[Snapshot; 2]> {
    Ok([Snapshot::of(&case.lab.host)?, Snapshot::of(container)?])
}

pub(crate) fn unchanged(before: &[Snapshot; 2], after: &[Snapshot; 2], what: &str) -> Result<()> {
    for ((before, after), name) in before.iter().zip(after).zip(["host", "container"]) {
        let difference = before.difference(after);
        ensure!(
            difference.is_empty(),
            "{what} changed the {name}:\n{difference}"
        );
    }
    Ok(())
}

/// Programs and maps may stay loaded; the rest may not.
pub(crate) fn unchanged_but_for_pins(before: &[Snapshot; 2], after: &[Snapshot; 2]) -> Result<()> {
    for (before, after) in before.iter().zip(after) {
        let difference = before.without_pins().difference(&after.without_pins());
        ensure!(difference.is_empty(), "something changed:\n{difference}");
    }
    Ok(())
}
