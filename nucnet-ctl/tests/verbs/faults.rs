//! The n-th request to netlink, change of files or change of maps fails, for every n: a set-up
//! is then done or never was, and a teardown can be repeated. Or the process is killed there.
//!
//! By default a sample is tried, another one each time; `--include-ignored` tries everything.

use std::{fs, process::Output};

use nix::errno::Errno;

use crate::lab::{Lab, has_faults, list, on_a_host};

/// Kinds of operations, and what they plausibly fail with. Not `EEXIST`: an operation that takes
/// it for success would be lied to; names that are taken have tests of their own.
const KINDS: [(&str, &[Errno]); 3] = [
    (
        "netlink",
        &[Errno::ENOMEM, Errno::EBUSY, Errno::EPERM, Errno::ENOBUFS],
    ),
    (
        "file",
        &[Errno::ENOSPC, Errno::EIO, Errno::EPERM, Errno::EROFS],
    ),
    ("map", &[Errno::ENOMEM, Errno::E2BIG, Errno::EPERM]),
];

/// How much is tried.
#[derive(Clone, Copy)]
enum Extent {
    /// One in so many operations, each in one way, in turn.
    OneIn(usize),
    /// Every errno of every operation, and death before it.
    Everything,
}

impl Extent {
    /// Which is the first, as far as that is a choice.
    fn first(self) -> usize {
        match self {
            Self::OneIn(many) => std::process::id() as usize % many,
            Self::Everything => 0,
        }
    }

    /// What the operation fails with: an errno, or `kill`.
    fn faults(self, number: usize, errnos: &[Errno]) -> Vec<String> {
        let all = errnos.iter().map(|errno| (*errno as i32).to_string());
        let mut all: Vec<String> = all.chain(["kill".to_owned()]).collect();
        match self {
            Self::Everything => all,
            Self::OneIn(many) if number % many != self.first() => Vec::new(),
            Self::OneIn(many) => vec![all.swap_remove(number / many % all.len())],
        }
    }
}

/// How a call ended that met a fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    /// It went on, and succeeded.
    Done,
    /// It failed, and said why.
    Failed,
    /// It was killed.
    Killed,
}

fn end(output: &Output) -> End {
    match output.status.code() {
        Some(0) => End::Done,
        Some(_) => End::Failed,
        None => End::Killed,
    }
}

/// Calls with one fault after another, until there is none to be had any more. `check` gets how
/// each call ended, and leaves everything as it was before it.
fn with_each_fault(extent: Extent, lab: &Lab, call: &str, mut check: impl FnMut(End, &str)) {
    for (kind, errnos) in KINDS {
        let mut number = 0;
        let mut is_over = false;
        while !is_over {
            let faults = extent.faults(number, errnos);
            // A call may do a little more than the one before: none may have met its fault.
            is_over = !faults.is_empty();
            for errno in faults {
                let fault = format!("{kind}:{number}:{errno}");
                let mut command = lab.command(call);
                let output = command.env("NUCNET_FAULT", &fault).output();
                let output = output.expect("nucnet-ctl");
                let errors = String::from_utf8_lossy(&output.stderr);
                let when = format!("{call}, {fault}: {errors}");
                let is_met = errors.contains("injected: ");
                is_over &= !is_met;
                if end(&output) == End::Failed {
                    let says = errors.lines().any(|line| line.starts_with("error: "));
                    assert!(says && is_met, "{when}");
                }
                check(end(&output), &when);
            }
            number += 1;
        }
        assert!(number > 1 || call.contains("publish"), "{call}: no {kind}");
    }
}

fn assert_no_drift(lab: &Lab, when: &str) {
    let status = lab.json("status --sample 0s");
    assert_eq!(list(&status["drift"]).len(), 0, "{when}: {status}");
}

/// A call that sets something up, and the one that undoes it.
fn set_up(extent: Extent, lab: &Lab, call: &str, undo: &str) {
    lab.ok(call);
    lab.ok(undo);
    let before = lab.snapshot();
    let undo_whole = |when: &str| {
        assert_no_drift(lab, when);
        let done = lab.snapshot();
        lab.ok(call);
        lab.assert_unchanged(&done, when);
        lab.ok(undo);
    };
    let mut repeated = false;
    with_each_fault(extent, lab, call, |end, when| {
        match end {
            // What went on without is not needed, or was done in another way.
            End::Done => undo_whole(when),
            End::Failed => {}
            End::Killed => {
                repeated = !repeated;
                lab.ok(if repeated { call } else { "gc" });
                // It may have been over but for the report.
                if repeated || lab.snapshot() != before {
                    undo_whole(when);
                }
            }
        }
        lab.assert_unchanged(&before, when);
    });
}

/// A call that takes something down, and the one that makes it.
fn take_down(extent: Extent, lab: &Lab, call: &str, make: &str) {
    lab.ok(make);
    lab.ok(call);
    let after = lab.snapshot();
    lab.ok(make);
    let mut collected = false;
    with_each_fault(extent, lab, call, |end, when| {
        match end {
            End::Done => {}
            End::Failed => drop(lab.ok(call)),
            End::Killed => {
                collected = !collected;
                lab.ok(if collected { "gc" } else { call });
                // It may have been killed before anybody could know what it was about.
                if collected && lab.snapshot() != after {
                    assert_no_drift(lab, when);
                    lab.ok(call);
                }
            }
        }
        lab.assert_unchanged(&after, when);
        lab.ok(make);
    });
}

/// A container with a root directory, and what attaches it.
fn attach(lab: &Lab, id: &str) -> String {
    let netns = lab.container(id);
    let root = lab.place.join(format!("{id}-root"));
    fs::create_dir_all(root.join("etc")).expect("root directory");
    format!(
        "attach --netns {} --id {id} -p 8080:80 -p 53:53/udp --allow 10.0.0.0/8:443 --deny any:25 \
         --dns 192.0.2.53 --rootfs {}",
        netns.display(),
        root.display()
    )
}

/// An endpoint that is there meanwhile: the datapath is loaded, the network made.
fn another(lab: &Lab) {
    let netns = lab.container("another");
    lab.ok(&format!(
        "attach --netns {} --id another -p 9090:90",
        netns.display()
    ));
}

/// Stops a call before each of its steps; then what is left is collected, and the call repeated.
fn stopped_at_every_step(lab: &Lab, call: &str, undo: &str) {
    // Directories that the first one makes stay.
    lab.ok(call);
    lab.ok(undo);
    let before = lab.snapshot();
    lab.ok(call);
    let after = lab.snapshot();
    lab.ok(undo);
    lab.assert_unchanged(&before, undo);
    let mut steps = 0;
    let stop = |step| {
        let mut command = lab.command(call);
        let output = command.env("NUCNET_FAULT", format!("stop:{step}")).output();
        output.expect("nucnet-ctl").status.code().is_none()
    };
    while stop(steps) {
        let when = format!("{call}, stopped at step {steps}");
        lab.ok("gc");
        // Not begun, or over but for the report.
        let collected = lab.snapshot();
        if collected != after {
            lab.assert_unchanged(&before, &when);
            lab.ok(call);
        }
        lab.assert_unchanged(&after, &when);
        lab.ok(undo);
        lab.assert_unchanged(&before, &when);
        steps += 1;
    }
    assert!(steps > 3, "{call}: {steps}");
    lab.ok(undo);
}

#[test]
fn verbs_about_ports_and_networks_can_be_stopped_at_every_step() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        lab.ok(&attach(lab, "web"));
        let (publish, unpublish) = (
            "publish web 90:90 91-99:91-99/udp",
            "unpublish web 90:90 91-99:91-99/udp",
        );
        stopped_at_every_step(lab, publish, unpublish);
        // Two subnets that are the same each time.
        stopped_or_collected(
            lab,
            "network create blue --subnet 10.9.0.0/24 --subnet6 fd09::/64",
            "network remove blue",
        );
    });
}

/// Stops what makes something, and what removes it, before each step; then what is left is
/// collected, and both are repeated.
fn stopped_or_collected(lab: &Lab, create: &str, remove: &str) {
    lab.ok(create);
    lab.ok(remove);
    let before = lab.snapshot();
    for call in [create, remove] {
        for step in 0.. {
            if call == remove {
                lab.ok(create);
            }
            let mut command = lab.command(call);
            let output = command.env("NUCNET_FAULT", format!("stop:{step}")).output();
            let is_over = output.expect("nucnet-ctl").status.code().is_some();
            lab.ok("gc");
            // What was begun is taken down; what was not, or is over, is whole.
            if lab.snapshot() != before {
                assert_no_drift(lab, &format!("{call}, stopped at step {step}"));
                lab.ok(create);
                lab.ok(remove);
            }
            lab.assert_unchanged(&before, &format!("{call}, stopped at step {step}"));
            if is_over {
                assert!(step > 4, "{call}: {step}");
                break;
            }
        }
    }
}

/// Mappings of each kind, without the verb.
const MAPPINGS: [&str; 3] = [
    "dnat --ext-ip 192.0.2.1 --ports 8010-8017 --int-ip 198.51.100.7 --int-port 80",
    "snat --int 10.5.0.0/24 --ext-ip 192.0.2.1",
    "hairpin --ext-ip 192.0.2.1 --ports 8000,8010-8017 --int-ip 192.0.2.7",
];

#[test]
fn verbs_about_mappings_can_be_stopped_at_every_step() {
    if !has_faults() {
        return;
    }
    on_a_host(|lab| {
        another(lab);
        for words in MAPPINGS {
            let (add, remove) = (format!("nat add {words}"), format!("nat remove {words}"));
            stopped_or_collected(lab, &add, &remove);
        }
    });
}

type Test = fn(Extent, &Lab);

fn run(extent: Extent, test: Test) {
    if has_faults() {
        on_a_host(move |lab| test(extent, lab));
    }
}

const FIRST_ATTACH: Test = |extent, lab| set_up(extent, lab, &attach(lab, "web"), "down");

const ATTACH: Test = |extent, lab| {
    another(lab);
    set_up(extent, lab, &attach(lab, "web"), "detach web");
};

const PUBLISH: Test = |extent, lab| {
    lab.ok(&attach(lab, "web"));
    let (call, undo) = (
        "publish web 90:90 91-99:91-99/udp",
        "unpublish web 90:90 91-99:91-99/udp",
    );
    set_up(extent, lab, call, undo);
};

const NETWORK: Test = |extent, lab| {
    another(lab);
    set_up(extent, lab, "network create blue", "network remove blue");
    take_down(extent, lab, "network remove blue", "network create blue");
};

const DETACH: Test = |extent, lab| {
    another(lab);
    take_down(extent, lab, "detach web", &attach(lab, "web"));
};

const FIRST_MAPPING: Test = |extent, lab| {
    set_up(extent, lab, &format!("nat add {}", MAPPINGS[0]), "down");
};

const MAPPING: Test = |extent, lab| {
    another(lab);
    for words in MAPPINGS {
        let (add, remove) = (format!("nat add {words}"), format!("nat remove {words}"));
        set_up(extent, lab, &add, &remove);
        take_down(extent, lab, &remove, &add);
        lab.ok(&remove);
    }
};

const CLEAR_MAPPINGS: Test = |extent, lab| {
    another(lab);
    take_down(
        extent,
        lab,
        "nat clear",
        &format!("nat add {}", MAPPINGS[2]),
    );
};

/// A mapping that has lost an entry stays on record, whatever happens while it is brought back.
const MAPPING_REPAIR: Test = |extent, lab| {
    another(lab);
    let add = format!("nat add {}", MAPPINGS[2]);
    let damage = || {
        let mut datapath = lab.datapath();
        let (key, _) = datapath.hairpins.entries().expect("entries")[0];
        datapath.hairpins.remove(&key).expect("remove");
    };
    lab.ok(&add);
    // Not the snapshot: the bridge that routes are looked up from gets another MAC.
    let shown = || (lab.json("nat list"), lab.entries());
    let whole = shown();
    damage();
    let mut collected = false;
    with_each_fault(extent, lab, &add, |end, when| {
        collected = !collected;
        if collected {
            lab.ok("gc");
        }
        if end != End::Done {
            lab.ok(&add);
        }
        assert_eq!(shown(), whole, "{when}");
        damage();
    });
};

/// One policy takes the place of another, or of none: whatever happens, one of them is in force
/// whole, and the call can be repeated.
const EGRESS: Test = |extent, lab| {
    lab.ok(&attach(lab, "web"));
    let some = "egress set web --allow 10.0.0.0/8:443 --deny any:25,26";
    let other = "egress set web --allow 172.16.0.0/12:80/tcp --allow [fd00::/8]:53/udp";
    for (call, back) in [(other, some), ("egress clear web", some)] {
        let of = |call: &str| {
            lab.ok(call);
            (lab.json("egress show web"), lab.entries())
        };
        let (new, old) = (of(call), of(back));
        assert_ne!(new, old, "{call}");
        let mut before = lab.snapshot();
        let mut collected = false;
        with_each_fault(extent, lab, call, |end, when| {
            let shown = lab.json("egress show web");
            assert!(
                shown == new.0 || end != End::Done && shown == old.0,
                "{when}: {shown}"
            );
            if end == End::Failed && shown == old.0 {
                lab.assert_unchanged(&before, when);
            }
            if end == End::Killed {
                collected = !collected;
                if collected {
                    lab.ok("gc");
                    assert_eq!(lab.json("egress show web"), shown, "{when}");
                    let entries = if shown == new.0 { &new.1 } else { &old.1 };
                    assert_eq!(lab.entries(), *entries, "{when}");
                }
            }
            assert_eq!(of(call), new, "{when}");
            assert_no_drift(lab, when);
            assert_eq!(of(back), old, "{when}");
            before = lab.snapshot();
        });
    }
};

/// What fails in the second takes the first along; who is killed then leaves the first whole.
const FIRST_SLOTS: Test = |extent, lab| {
    let create = "slot create 1-2 -p 0:80 --allow 10.0.0.0/8:443";
    lab.ok(create);
    lab.ok("down");
    let before = lab.snapshot();
    with_each_fault(extent, lab, create, |end, when| {
        if end == End::Killed {
            lab.ok("gc");
            assert_no_drift(lab, when);
            lab.ok(create);
        }
        if end != End::Failed {
            assert_no_drift(lab, when);
            lab.ok("down");
        }
        lab.assert_unchanged(&before, when);
    });
};

const ANOTHER_SLOT: Test = |extent, lab| {
    lab.ok("slot create 9 -p 9090:90");
    let (create, remove) = (
        "slot create 1 -p 8080:80 --allow 10.0.0.0/8:443 --deny any:25",
        "slot remove 1",
    );
    set_up(extent, lab, create, remove);
    take_down(extent, lab, remove, create);
};

const DOWN: Test = |extent, lab| take_down(extent, lab, "down", &attach(lab, "web"));

#[test]
fn a_fault_in_the_first_attach_leaves_nothing() {
    run(Extent::OneIn(7), FIRST_ATTACH);
}

#[test]
fn a_fault_in_an_attach_leaves_everything_as_it_was() {
    run(Extent::OneIn(2), ATTACH);
}

#[test]
fn a_fault_in_a_publish_leaves_everything_as_it_was() {
    run(Extent::OneIn(1), PUBLISH);
}

#[test]
fn a_fault_in_the_making_or_removal_of_a_network_is_undone_or_made_up_for() {
    run(Extent::OneIn(2), NETWORK);
}

#[test]
fn a_detach_that_met_a_fault_can_be_repeated() {
    run(Extent::OneIn(3), DETACH);
}

#[test]
fn a_down_that_met_a_fault_can_be_repeated() {
    run(Extent::OneIn(9), DOWN);
}

#[test]
fn a_fault_in_the_first_mapping_leaves_nothing() {
    run(Extent::OneIn(15), FIRST_MAPPING);
}

#[test]
fn a_fault_in_the_making_or_removal_of_a_mapping_is_undone_or_made_up_for() {
    run(Extent::OneIn(9), MAPPING);
}

#[test]
fn a_mapping_whose_repair_met_a_fault_stays_and_can_be_repaired() {
    run(Extent::OneIn(3), MAPPING_REPAIR);
}

#[test]
fn a_nat_clear_that_met_a_fault_can_be_repeated() {
    run(Extent::OneIn(3), CLEAR_MAPPINGS);
}

#[test]
fn a_fault_in_a_change_of_policy_leaves_one_policy_in_force() {
    run(Extent::OneIn(3), EGRESS);
}

#[test]
fn a_fault_in_the_first_slots_leaves_nothing() {
    run(Extent::OneIn(17), FIRST_SLOTS);
}

#[test]
fn a_fault_in_the_making_or_removal_of_a_slot_is_undone_or_made_up_for() {
    run(Extent::OneIn(7), ANOTHER_SLOT);
}

#[test]
#[ignore = "slow: takes minutes"]
fn no_fault_whatsoever_in_the_first_slots_leaves_anything() {
    run(Extent::Everything, FIRST_SLOTS);
}

#[test]
#[ignore = "slow: takes minutes"]
fn no_fault_whatsoever_in_the_making_or_removal_of_a_slot_leaves_anything() {
    run(Extent::Everything, ANOTHER_SLOT);
}

#[test]
#[ignore = "slow: takes a minute"]
fn no_fault_whatsoever_in_the_first_mapping_leaves_anything() {
    run(Extent::Everything, FIRST_MAPPING);
}

#[test]
#[ignore = "slow: takes minutes"]
fn no_fault_whatsoever_in_the_making_or_removal_of_a_mapping_leaves_anything() {
    run(Extent::Everything, MAPPING);
}

#[test]
#[ignore = "slow: takes a minute"]
fn a_mapping_whose_repair_met_any_fault_whatsoever_stays() {
    run(Extent::Everything, MAPPING_REPAIR);
}

#[test]
#[ignore = "slow: takes a minute"]
fn a_nat_clear_that_met_any_fault_whatsoever_can_be_repeated() {
    run(Extent::Everything, CLEAR_MAPPINGS);
}

#[test]
#[ignore = "slow: takes a minute"]
fn no_fault_whatsoever_in_a_change_of_policy_leaves_two_or_none() {
    run(Extent::Everything, EGRESS);
}

#[test]
#[ignore = "slow: takes a minute"]
fn no_fault_whatsoever_in_the_first_attach_leaves_anything() {
    run(Extent::Everything, FIRST_ATTACH);
}

#[test]
#[ignore = "slow: takes a minute"]
fn no_fault_whatsoever_in_an_attach_leaves_anything() {
    run(Extent::Everything, ATTACH);
}

#[test]
#[ignore = "slow: takes a minute"]
fn no_fault_whatsoever_in_a_publish_leaves_anything() {
    run(Extent::Everything, PUBLISH);
}

#[test]
#[ignore = "slow: takes a minute"]
fn no_fault_whatsoever_in_the_making_or_removal_of_a_network_leaves_anything() {
    run(Extent::Everything, NETWORK);
}

#[test]
#[ignore = "slow: takes a minute"]
fn a_detach_that_met_any_fault_whatsoever_can_be_repeated() {
    run(Extent::Everything, DETACH);
}

#[test]
#[ignore = "slow: takes minutes"]
fn a_down_that_met_any_fault_whatsoever_can_be_repeated() {
    run(Extent::Everything, DOWN);
}
