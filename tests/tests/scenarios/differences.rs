//! What the iptables datapath cannot do, and why. Nothing else may differ.
//!
//! A scenario that is named here is run like any other, and must fail: one that works after all has
//! no place in this list.

use anyhow::{Result, anyhow};
use nucnet_tests::lab::Family;

use crate::case::{Datapath, Skip, Way};

/// For which families a scenario differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Both,
    V4,
    V6,
}

/// Scenarios that differ, and the reason.
const DIFFERENCES: &[(Which, &[&str], &str)] = &[(
    Which::Both,
    &[
        "guest_leaves_with_the_uplinks_address",
        "guest_is_reached_by_its_slots_address_and_by_publishes",
        "two_guests_of_one_address_stay_apart",
        "slot_reaches_neither_neighbours_nor_host_nor_metadata",
        "guest_resumes_in_another_slot",
        "guest_is_told_of_errors_about_what_it_sent",
        "download_of_a_guest_arrives_whole",
        "forged_packets_of_a_guest_stay_in_its_slot",
        "slots_are_endpoints_to_every_other_verb",
        "slot_that_is_damaged_is_repaired_by_creating_it_again",
    ],
    "guests of one address are told apart by programs only: there are no slots",
)];

/// Scenarios that cannot be told by rules, because they look at maps or programs.
const ABOUT_PROGRAMS: &[&str] = &[];

/// A difference that is in the list.
#[derive(Debug)]
pub(crate) struct Difference;

impl std::fmt::Display for Difference {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("an intended difference")
    }
}

impl std::error::Error for Difference {}

fn reason(name: &str, family: Family) -> Option<&'static str> {
    let is_of = |which: Which| match which {
        Which::Both => true,
        Which::V4 => family == Family::V4,
        Which::V6 => family == Family::V6,
    };
    let mut differences = DIFFERENCES.iter();
    let listed = differences.find(|(which, names, _)| is_of(*which) && names.contains(&name));
    listed.map(|(_, _, reason)| *reason)
}

/// What a scenario's outcome is, the list considered.
pub(crate) fn judge(name: &str, way: Way, family: Family, outcome: Result<()>) -> Result<()> {
    if way != Way::Nucnet(Datapath::Iptables) {
        return outcome;
    }
    if ABOUT_PROGRAMS.contains(&name) {
        return Err(anyhow!(Skip("it looks at maps or programs".to_owned())));
    }
    match (reason(name, family), outcome) {
        (None, outcome) => outcome,
        (Some(_), Err(error)) if error.is::<Skip>() => Err(error),
        (Some(reason), Err(_)) => Err(anyhow!(Difference).context(Skip(reason.to_owned()))),
        (Some(reason), Ok(())) => Err(anyhow!(
            "it works, although it is in the list of differences: {reason}"
        )),
    }
}
