//! Static mappings, beside other verbs.

use nucnet_common::abi::MAPPED;
use serde_json::Value;

use crate::lab::{ip, list, on_a_host};

const ADD: &str = "nat add dnat --ext-ip 192.0.2.1 --ports 8080 --int-ip 198.51.100.7";

#[test]
fn gc_takes_nothing_from_a_mapping_that_lives() {
    on_a_host(|lab| {
        lab.ok(ADD);
        let before = lab.snapshot();
        let collected = lab.json("gc");
        assert_eq!(list(&collected["removed"]), [] as [Value; 0]);
        lab.assert_unchanged(&before, "after gc");
    });
}

#[test]
fn whoever_removes_a_mapping_reads_which_one_and_whether_it_was_there() {
    on_a_host(|lab| {
        let added = lab.ok(ADD);
        let (id, spec) = added.trim_end().split_once(": ").expect("id and mapping");
        assert_eq!(
            lab.ok(&format!("nat remove {id}")),
            format!("{id}: removed\n")
        );
        assert_eq!(
            lab.ok(&format!("nat remove {id}")),
            format!("{id}: was not there\n")
        );
        let by_words = lab.ok(&ADD.replace("add", "remove"));
        assert!(
            by_words.starts_with(&format!("{spec}: was not there")),
            "{by_words}"
        );
    });
}

#[test]
fn a_mapping_without_idle_times_is_repaired_by_the_same_add() {
    on_a_host(|lab| {
        lab.ok(ADD);
        lab.datapath().networks.remove(&MAPPED).expect("remove");
        lab.ok(ADD);
        let times = lab.datapath().networks.get(&MAPPED).expect("get");
        assert!(times.is_some());
    });
}

#[test]
fn mappings_follow_the_interface_that_they_are_bound_to() {
    on_a_host(|lab| {
        let make = || {
            ip("link add wan0 type veth peer name wan1");
            ip("address add 203.0.113.1/24 dev wan0");
            ip("link set wan0 up");
        };
        make();
        for words in [
            "dnat --ext-ip 192.0.2.1 --ports 8080 --int-ip 198.51.100.7",
            "snat --int 10.9.0.0/24 --ext-ip 192.0.2.1",
        ] {
            lab.ok(&format!("nat add {words} --ext-if wan0"));
        }
        // With another index: the first one is taken.
        ip("link delete wan0");
        ip("link add other0 type veth peer name other1");
        make();
        let drift = || lab.json("status")["drift"].clone();
        assert_ne!(list(&drift()), [] as [Value; 0]);
        lab.ok("gc");
        assert_eq!(list(&drift()), [] as [Value; 0]);
        let index: u32 = ip("-o link show wan0")
            .split(':')
            .next()
            .and_then(|index| index.parse().ok())
            .expect("index");
        let datapath = lab.datapath();
        let mappings = datapath.mappings.entries().expect("mappings");
        let links: Vec<u32> = mappings.iter().map(|(_, mapping)| mapping.link).collect();
        assert_eq!(links, [index, index]);
        assert_eq!(datapath.snats.entries().expect("sources").len(), 2);
    });
}
