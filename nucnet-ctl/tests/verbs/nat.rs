//! Static mappings, beside other verbs.

use nucnet_common::abi::MAPPED;
use serde_json::Value;

use crate::lab::{list, on_a_host};

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
fn a_mapping_without_idle_times_is_repaired_by_the_same_add() {
    on_a_host(|lab| {
        lab.ok(ADD);
        lab.datapath().networks.remove(&MAPPED).expect("remove");
        lab.ok(ADD);
        let times = lab.datapath().networks.get(&MAPPED).expect("get");
        assert!(times.is_some());
    });
}
