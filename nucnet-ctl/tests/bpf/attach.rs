//! Programs on interfaces and control groups.

use std::os::unix::fs::symlink;
use std::process::Command;

use aya::programs::{SchedClassifier, TcAttachType};
use nix::net::if_::if_nametoindex;
use nucnet_common::abi::{Endpoint, program};
use nucnet_ctl::kernel::bpf::{AttachKind, Datapath, HostInterface, LinkLayer, load_unpinned};

use super::lab::{
    Cgroup, add_veth, attach_kind, in_private_namespaces, ip, load, names, program_id, programs_on,
    tc, tcx_programs, uplink,
};

#[test]
fn endpoint_program_attaches_and_detaches_as_often_as_one_likes() {
    in_private_namespaces(|root| {
        let datapath = load(&root.join("nucnet"));
        add_veth("ep0");
        for _ in 0..2 {
            datapath.attach_endpoint("ep0").expect("attach");
            let filters = tc("filter show dev ep0 ingress");
            assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
        }
        assert!(datapath.detach_endpoint("ep0").expect("detach"));
        assert!(!datapath.detach_endpoint("ep0").expect("detach"));
        assert!(!datapath.detach_endpoint("nobody").expect("detach"));
        assert_eq!(tc("filter show dev ep0 ingress"), "");
        assert!(datapath.attach_endpoint("nobody").is_err());
    });
}

#[test]
fn uplinks_follow_the_interfaces_of_the_host() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let mut datapath = load(&bpffs);
        let (a, b) = (add_veth("a"), add_veth("b.1"));
        let changes = datapath
            .sync_uplinks(&[uplink("a", a), uplink("b.1", b)])
            .expect("sync");
        assert_eq!(
            changes.attached,
            [("a".into(), attach_kind()), ("b.1".into(), attach_kind())]
        );
        assert_eq!(
            names(&bpffs.join("links")),
            ["from_uplink@a", "from_uplink@b%2E1"]
        );
        assert_eq!(
            datapath
                .uplinks
                .get(&b)
                .expect("get")
                .expect("entry")
                .header,
            14
        );
        let again = datapath
            .sync_uplinks(&[uplink("a", a), uplink("b.1", b)])
            .expect("sync");
        assert_eq!(again, Default::default());

        // Names swapped: every interface keeps its link.
        for change in ["dev a name c", "dev b.1 name a", "dev c name b.1"] {
            ip(&format!("link set {change}"));
        }
        let swapped = datapath
            .sync_uplinks(&[uplink("b.1", a), uplink("a", b)])
            .expect("sync");
        assert_eq!(swapped, Default::default());
        assert_eq!(programs_on("a", TcAttachType::Ingress).len(), 1);

        // One vanishes and another takes its name.
        ip("link del dev a");
        ip("link add name a type veth peer name other");
        let new = if_nametoindex("a").expect("index");
        let changes = datapath
            .sync_uplinks(&[uplink("b.1", a), uplink("a", new)])
            .expect("sync");
        assert_eq!(changes.detached, ["a"]);
        assert_eq!(changes.attached, [("a".into(), attach_kind())]);
        assert_eq!(programs_on("a", TcAttachType::Ingress).len(), 1);
        assert!(datapath.uplinks.get(&b).expect("get").is_none());

        let changes = datapath.sync_uplinks(&[]).expect("sync");
        assert_eq!(changes.detached, ["a", "b.1"]);
        assert!(programs_on("a", TcAttachType::Ingress).is_empty());
        assert_eq!(names(&bpffs.join("links")), Vec::<String>::new());
        assert_eq!(datapath.uplinks.count().expect("count"), 0);
    });
}

#[test]
fn uplink_program_is_the_first_on_its_interface() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let mut datapath = load(&bpffs);
        if attach_kind() == AttachKind::Clsact {
            eprintln!("skipped: this kernel has no TCX");
            return;
        }
        let up = add_veth("up0");
        let mut foreign = load_unpinned().expect("load");
        let other: &mut SchedClassifier = foreign
            .program_mut(program::FROM_HOST)
            .expect("program")
            .try_into()
            .expect("classifier");
        other.attach("up0", TcAttachType::Ingress).expect("attach");
        let theirs = other.info().expect("info").id();
        datapath.sync_uplinks(&[uplink("up0", up)]).expect("sync");
        let ours = program_id(&bpffs, program::FROM_UPLINK);
        assert_eq!(programs_on("up0", TcAttachType::Ingress), [ours, theirs]);
        assert!(Datapath::remove(&bpffs).is_empty());
        assert_eq!(programs_on("up0", TcAttachType::Ingress), [theirs]);
    });
}

#[test]
fn interface_without_link_layer_gets_its_own_program() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let mut datapath = load(&bpffs);
        ip("tuntap add dev t0 mode tun");
        let index = if_nametoindex("t0").expect("index");
        let tun = HostInterface {
            link_layer: LinkLayer::None,
            ..uplink("t0", index)
        };
        datapath.sync_uplinks(&[tun]).expect("sync");
        let ours = program_id(&bpffs, program::FROM_UPLINK_L3);
        assert_eq!(programs_on("t0", TcAttachType::Ingress), [ours]);
        assert_eq!(
            datapath
                .uplinks
                .get(&index)
                .expect("get")
                .expect("entry")
                .header,
            0
        );
    });
}

#[test]
fn filter_of_a_kernel_without_tcx_is_kept_and_removed_with_its_qdisc() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let mut datapath = load(&bpffs);
        let (own, foreign) = (add_veth("own"), add_veth("foreign"));
        tc("qdisc add dev foreign clsact");
        // What attaching notes where there is no TCX; repeating it then goes the same way.
        for (name, index, qdisc) in [("own", own, "added"), ("foreign", foreign, "found")] {
            let record = format!("clsact:interface-{index}:qdisc-{qdisc}");
            symlink(record, bpffs.join(format!("links/from_uplink@{name}"))).expect("symlink");
        }
        let both = [uplink("own", own), uplink("foreign", foreign)];
        for _ in 0..2 {
            assert_eq!(
                datapath.sync_uplinks(&both).expect("sync"),
                Default::default()
            );
            for name in ["own", "foreign"] {
                let filters = tc(&format!("filter show dev {name} ingress"));
                assert_eq!(filters.matches("direct-action").count(), 1, "{filters}");
                assert!(tcx_programs(name, TcAttachType::Ingress).is_empty());
            }
        }
        let changes = datapath.sync_uplinks(&[]).expect("sync");
        assert_eq!(changes.detached, ["foreign", "own"]);
        assert!(!tc("qdisc show dev own").contains("clsact"));
        assert!(tc("qdisc show dev foreign").contains("clsact"));
        assert_eq!(tc("filter show dev foreign ingress"), "");
    });
}

#[test]
fn bind_hooks_move_to_the_cgroup_that_is_asked_for() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let datapath = load(&bpffs);
        let (first, second) = (Cgroup::new("first"), Cgroup::new("second"));
        // bpftool knows no way to ask Linux 5.10.
        let attached = |cgroup: &Cgroup| {
            let output = Command::new("bpftool")
                .args(["cgroup", "show"])
                .arg(&cgroup.0)
                .output()
                .ok()
                .filter(|output| output.status.success())?;
            let text = String::from_utf8(output.stdout).expect("text");
            Some(text.matches("host_bind").count())
        };
        for _ in 0..2 {
            datapath.attach_bind(&first.0).expect("attach");
            assert_eq!(names(&bpffs.join("links")), ["host_bind4", "host_bind6"]);
        }
        datapath.attach_bind(&second.0).expect("attach");
        assert_eq!(names(&bpffs.join("links")), ["host_bind4", "host_bind6"]);
        match (attached(&first), attached(&second)) {
            (Some(first), Some(second)) => assert_eq!((first, second), (0, 2)),
            _ => eprintln!("skipped in part: no bpftool that tells"),
        }
        datapath.detach_bind().expect("detach");
        datapath.detach_bind().expect("detach");
        assert_eq!(names(&bpffs.join("links")), Vec::<String>::new());
    });
}

#[test]
fn removal_leaves_nothing_and_can_be_repeated() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        assert!(Datapath::remove(&bpffs).is_empty());
        let mut datapath = load(&bpffs);
        let (endpoint, up) = (add_veth("ep0"), add_veth("up0"));
        datapath
            .endpoints
            .insert(&endpoint, &Endpoint::default())
            .expect("insert");
        datapath.attach_endpoint("ep0").expect("attach");
        datapath.sync_uplinks(&[uplink("up0", up)]).expect("sync");
        let cgroup = Cgroup::new("removal");
        datapath.attach_bind(&cgroup.0).expect("attach");
        for _ in 0..2 {
            let problems = Datapath::remove(&bpffs);
            assert!(problems.is_empty(), "{problems:?}");
            assert!(!bpffs.exists());
        }
        assert_eq!(tc("filter show dev ep0 ingress"), "");
        assert!(programs_on("up0", TcAttachType::Ingress).is_empty());
    });
}
