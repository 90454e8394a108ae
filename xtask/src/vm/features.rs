//! What is seen of each feature on each kernel: one or two scenarios for each, and the table of
//! `docs/kernels.md` that they make.

use std::{collections::BTreeMap, fmt};

use super::{
    kernel::Release,
    outcome::{Outcome, Verdict},
};

/// The tier that the features are seen in.
pub(super) const TIER: &str = "scenarios";

/// Something that nucnet does for people, and the scenarios that show it: what their names contain.
/// Where nothing of a kernel tells the families apart, one of them will do.
struct Feature {
    title: &'static str,
    scenarios: &'static [&'static str],
}

const fn feature(title: &'static str, scenarios: &'static [&'static str]) -> Feature {
    Feature { title, scenarios }
}

/// In the order of the table and of the run: what kernels differ in is early.
const FEATURES: [Feature; 24] = [
    feature(
        "publish: remote clients",
        &["remote_client_reaches_a_publish_and_keeps_its_address"],
    ),
    feature("masquerade", &["outside_sees_the_uplinks_address"]),
    feature(
        "egress policy",
        &[
            "egress_allow_opens_one_port_of_one_address::v4",
            "egress_default_deny_lets_nothing_out::v6",
        ],
    ),
    feature(
        "explain",
        &["explain_follows_a_packet_from_outside_to_a_publish::v6"],
    ),
    feature("path MTU", &["upload_over_a_smaller_uplink_completes::v6"]),
    feature(
        "slots of microVMs",
        &[
            "guest_leaves_with_the_uplinks_address",
            "slot_that_is_damaged_is_repaired_by_creating_it_again",
        ],
    ),
    feature(
        "publish: the host by loopback",
        &["host_reaches_a_publish_by_loopback::v4"],
    ),
    feature(
        "mappings: hairpin",
        &["hairpin_is_for_neighbours_and_the_dnat_beside_it_for_others::v4"],
    ),
    feature(
        "published ports held against sockets of the host",
        &["host_socket_cannot_bind_a_published_port::v4"],
    ),
    feature(
        "attach, detach, gc, down",
        &[
            "down_leaves_no_trace",
            "detach_leaves_the_others_alone::v4",
            "uplink_that_comes_up_later_is_used_after_gc::v6",
        ],
    ),
    feature(
        "exchange of the datapath under connections",
        &["switching_the_datapath_and_back_keeps_everything_and_leaves_nothing::v4"],
    ),
    feature(
        "errors of ICMP, traceroute",
        &[
            "closed_port_is_reported_to_whoever_asked::v6",
            "traceroute_shows_the_host_from_both_sides::v4",
        ],
    ),
    feature(
        "publish: other containers",
        &["sibling_reaches_a_publish_by_the_hosts_address::v6"],
    ),
    feature(
        "publish: the host by its own address",
        &["host_reaches_a_publish_by_its_own_address::v6"],
    ),
    feature(
        "publish: from everywhere, by TCP and UDP",
        &["publish_is_reached_from_every_vantage_point::v4"],
    ),
    feature(
        "masquerade by two uplinks",
        &["each_uplink_masquerades_with_its_own_address::v4"],
    ),
    feature(
        "mappings: dnat",
        &["dnat_maps_lists_and_ranges_and_another_port_inside::v6"],
    ),
    feature(
        "mappings: snat",
        &["snat_of_endpoints_takes_precedence_over_masquerade::v4"],
    ),
    feature(
        "egress policy changed under connections",
        &["policy_that_keeps_established_flows_stops_new_ones_only::v4"],
    ),
    feature(
        "egress policy that rejects",
        &["curl_is_refused_at_once_with_reject_and_times_out_without::v4"],
    ),
    feature(
        "monitor",
        &["monitor_names_the_rule_that_denies_a_connection::v4"],
    ),
    feature(
        "spoofed sources dropped",
        &["spoofed_source_never_leaves::v6"],
    ),
    feature(
        "fragments",
        &["datagrams_in_fragments_arrive_whole_in_every_direction::v4"],
    ),
    feature(
        "flows and flush",
        &["flush_of_one_endpoint_costs_another_nothing::v4"],
    ),
];

/// What the names of the scenarios of the table contain.
pub(super) fn scenarios() -> impl Iterator<Item = &'static str> {
    let all = FEATURES.iter();
    all.flat_map(|feature| feature.scenarios.iter().copied())
}

/// The datapaths, and how the names of scenarios by them end.
const DATAPATHS: [(&str, &str); 2] = [("eBPF", ""), ("iptables", "::iptables")];

/// What came of a feature on one kernel by one datapath.
#[derive(Default)]
struct Seen<'a> {
    passed: Vec<&'a str>,
    failed: Vec<&'a str>,
    skipped: Vec<&'a str>,
}

impl<'a> Seen<'a> {
    fn of(feature: &Feature, ending: &str, outcome: &'a Outcome) -> Self {
        let mut seen = Self::default();
        for (name, verdict) in outcome.of_tier(TIER) {
            let is_by_rules = name.ends_with(DATAPATHS[1].1);
            let mut scenarios = feature.scenarios.iter();
            if is_by_rules == ending.is_empty() || !scenarios.any(|part| name.contains(part)) {
                continue;
            }
            match verdict {
                Verdict::Passed => seen.passed.push(name),
                Verdict::Failed(_) => seen.failed.push(name),
                Verdict::Skipped(_) => seen.skipped.push(name),
            }
        }
        seen
    }
}

impl fmt::Display for Seen<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (passed, failed) = (self.passed.len(), self.failed.len());
        let all = passed + failed + self.skipped.len();
        match (passed, failed, self.skipped.len()) {
            (0, 0, 0) => f.write_str("not run"),
            (0, 0, _) => f.write_str("no"),
            (_, 0, 0) => f.write_str("ok"),
            (_, 0, _) if self.passed.iter().all(|name| name.contains("::v4")) => f.write_str("v4"),
            (_, 0, _) => write!(f, "{passed} of {all}"),
            _ => write!(f, "FAILED: {failed} of {all}"),
        }
    }
}

/// Features by kernel, as `docs/kernels.md` has them.
pub(super) struct FeatureTable<'a>(pub(super) &'a [(&'static Release, Outcome)]);

impl fmt::Display for FeatureTable<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let columns = self.0.iter().flat_map(|(release, outcome)| {
            DATAPATHS.map(|(datapath, ending)| (release.name, datapath, ending, outcome))
        });
        let columns: Vec<_> = columns.collect();
        write!(f, "| feature |")?;
        for (kernel, datapath, ..) in &columns {
            write!(f, " {kernel} {datapath} |")?;
        }
        writeln!(f, "\n|---|{}", "---|".repeat(columns.len()))?;
        for feature in &FEATURES {
            write!(f, "| {} |", feature.title)?;
            for (.., ending, outcome) in &columns {
                write!(f, " {} |", Seen::of(feature, ending, outcome))?;
            }
            writeln!(f)?;
        }
        // Each reason once, however many scenarios gave it.
        let mut reasons = BTreeMap::new();
        for (release, outcome) in self.0 {
            for (_, verdict) in outcome.of_tier(TIER) {
                if let Verdict::Skipped(reason) = verdict {
                    let kernels: &mut Vec<_> = reasons.entry(reason).or_default();
                    if !kernels.contains(&release.name) {
                        kernels.push(release.name);
                    }
                }
            }
        }
        writeln!(f)?;
        for (reason, kernels) in reasons {
            writeln!(f, "* {reason} ({})", kernels.join(", "))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn feature_is_told_by_datapath() {
        let scenario = "remote_client_reaches_a_publish_and_keeps_its_address";
        let outcome = Outcome::read(&format!(
            "@@ boot 6.1.0\n@@ tier scenarios\n\
             test {scenario}::v4           ... ok\n\
             test {scenario}::v6           ... FAILED\n\
             test {scenario}::v4::iptables ... ok\n\
             test {scenario}::v6::iptables ... ignored (skipped: ::1 goes nowhere)\n"
        ));
        let columns = [(Release::named("6.1").expect("a kernel"), outcome)];
        let text = FeatureTable(&columns).to_string();
        let row = text.lines().find(|line| line.contains("remote clients"));
        assert_eq!(
            row,
            Some("| publish: remote clients | FAILED: 1 of 2 | v4 |")
        );
        assert!(
            text.contains("| masquerade | not run | not run |"),
            "{text}"
        );
        assert!(text.ends_with("* ::1 goes nowhere (6.1)\n"), "{text}");
    }
}
