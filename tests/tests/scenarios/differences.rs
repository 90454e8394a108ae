//! What the iptables datapath cannot do, and why. Nothing else may differ: scenarios of which only a
//! part does ask here.
//!
//! A scenario that is named here is run like any other, and must fail: one that works after all has
//! no place in this list.

use std::path::Path;

use anyhow::{Error, Result, anyhow};
use nucnet_tests::lab::Family;

use crate::case::{Datapath, Skip, Way};

/// For which families a scenario differs.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Which {
    Both,
    V6,
}

/// Scenarios that differ, and the reason.
const DIFFERENCES: &[(Which, &[&str], &str)] = &[
    (
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
            "slots_come_and_go_together_without_a_trace",
            "tap_of_a_slot_is_opened_by_its_owner_or_group_alone",
            "tap_of_several_queues_is_opened_several_times",
            "slot_that_is_damaged_is_repaired_by_creating_it_again",
            "two_machines_boot_in_slots_and_serve_and_fetch_apart_from_each_other",
        ],
        "guests of one address are told apart by programs only: there are no slots",
    ),
    (
        Which::V6,
        &[
            "host_reaches_a_publish_by_loopback",
            "loopback_publish_is_for_the_host_only",
            "publish_of_loopback_is_reached_by_the_host_alone",
            "clients_bound_to_an_address_reach_a_publish",
            "publish_is_reached_from_every_vantage_point",
            "host_reaches_a_publish_behind_its_own_firewall",
            "one_socket_hears_each_server_from_the_address_that_it_asked",
            "connections_of_the_host_end_with_their_publish",
            "large_answers_reach_clients_of_the_host",
            "host_client_of_an_old_publish_never_reaches_the_next_owner",
            "curl_moves_10_mb_each_way_through_every_path_with_offloads",
            "curl_moves_10_mb_each_way_through_every_path_without_offloads",
            "curl_moves_100_mb_each_way_through_every_path_with_offloads",
            "curl_moves_100_mb_each_way_through_every_path_without_offloads",
        ],
        "the kernel carries packets with the address ::1 nowhere",
    ),
    (
        Which::Both,
        &["publish_answers_by_the_uplink_that_the_client_came_in_on"],
        "answers follow the host's routes, not the way that the question came",
    ),
    (
        Which::Both,
        &[
            "host_socket_cannot_bind_a_mapped_port",
            "host_socket_cannot_bind_a_published_port",
            "host_socket_cannot_bind_a_port_published_on_one_of_its_addresses",
            "port_held_for_two_containers_is_free_after_both",
        ],
        "only a program is asked before a socket binds a port",
    ),
    (
        Which::Both,
        &["monitor_shows_what_the_programs_say_to_one_who_debugs"],
        "rules do not say how they read a packet",
    ),
    (
        Which::Both,
        &["connections_that_a_rejecting_policy_ends_are_reset_at_once"],
        "rules see a connection again with its next packet only",
    ),
    (
        Which::Both,
        &["masquerade_draws_around_the_sockets_that_the_host_holds"],
        "netfilter asks no sockets: it knows of a port once a packet has left by it",
    ),
    (
        Which::Both,
        &["host_takes_the_port_of_a_binding_and_gives_it_back"],
        "netfilter gives a flow that would collide a port of its own, where a binding has to wait",
    ),
    (
        Which::Both,
        &["failing_attach_leaves_host_and_container_as_before"],
        "no BPF filesystem is needed, so that none is there is no failure",
    ),
    (
        Which::Both,
        &["resolver_may_answer_from_another_port"],
        "netfilter lets in answers from the very address and port that was asked",
    ),
    (
        Which::Both,
        &[
            "datagram_too_long_for_the_container_is_reported",
            "upload_to_a_smaller_container_completes",
        ],
        "the host's stack knows the MTU of the bridge, not that of an endpoint on it",
    ),
    (
        Which::Both,
        &["odd_headers_never_leave_a_container_without_a_policy"],
        "the host's stack looks past routing and authentication headers and the tag of no VLAN, and \
         takes up connections that it has not seen begin",
    ),
    (
        Which::Both,
        &[
            "odd_frames_are_counted_and_never_seen_by_the_host_under_a_policy",
            "odd_frames_are_counted_and_never_seen_by_the_host_without_a_policy",
        ],
        "a bridge sees what it is handed before any rule does, and the host's stack drops what it \
         cannot read without telling the rules",
    ),
];

/// Reasons of drops that the host's own stack does not tell the rules.
const UNCOUNTED: &[&str] = &[
    "ttl-exceeded",
    "too-big",
    "uplink-unmanaged",
    "no-route",
    "no-such-address",
];

/// Whether nothing is counted for a reason where rules carry packets.
pub(crate) fn is_uncounted(reason: &str) -> bool {
    UNCOUNTED.contains(&reason)
}

/// Whether drops of ARP are counted: iptables sees none.
pub(crate) fn counts_arp(way: Way) -> bool {
    way != Way::Nucnet(Datapath::Iptables)
}

/// Whether interfaces that nobody has told nucnet of stay closed: before Linux 6.17 rules need the
/// switch of IPv6 forwarding that all have in common.
pub(crate) fn closes_unmanaged(way: Way, family: Family) -> bool {
    let one_by_one = Path::new("/proc/sys/net/ipv6/conf/lo/force_forwarding").exists();
    one_by_one || way != Way::Nucnet(Datapath::Iptables) || family == Family::V4
}

/// Whether the host's own connection that would collide with an endpoint's gets another port:
/// netfilter translates what the host sends, too.
pub(crate) fn gives_another_port(way: Way) -> bool {
    way == Way::Nucnet(Datapath::Iptables)
}

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
    let is_of = |which: Which| which == Which::Both || family == Family::V6;
    let mut differences = DIFFERENCES.iter();
    let listed = differences.find(|(which, names, _)| is_of(*which) && names.contains(&name));
    listed.map(|(_, _, reason)| *reason)
}

/// What a scenario's outcome is, the list considered.
pub(crate) fn judge(name: &str, way: Way, family: Family, outcome: Result<()>) -> Result<()> {
    if way != Way::Nucnet(Datapath::Iptables) {
        return outcome;
    }
    match (reason(name, family), outcome) {
        (None, outcome) => outcome,
        (Some(_), Err(error)) if error.is::<Skip>() => Err(error),
        (Some(reason), Err(_)) => Err(Error::new(Difference).context(Skip(reason.to_owned()))),
        (Some(reason), Ok(())) => Err(anyhow!(
            "it works, although it is in the list of differences: {reason}"
        )),
    }
}
