//! Pins that another version, host or object left.

use std::fs;
use std::os::unix::fs::symlink;

use aya::maps::MapInfo;
use aya::programs::TcAttachType;
use nix::sched::{CloneFlags, unshare};
use nucnet_common::abi::{Endpoint, Usage, program, size};
use nucnet_ctl::kernel::bpf::{BpfError, Datapath, Host};
use nucnet_ctl::model::Kind;

use super::lab::{
    Cgroup, add_veth, in_private_namespaces, ip, load, names, program_id, programs_on, tc, uplink,
};

#[test]
fn pins_of_another_abi_are_refused_and_can_be_removed() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        load(&bpffs);
        let host = Host::current().expect("host");
        for version in ["abi-999:sha256-00", "something else"] {
            fs::remove_file(bpffs.join("version")).expect("remove");
            symlink(version, bpffs.join("version")).expect("symlink");
            let error = Datapath::open_or_load(&bpffs, &host).expect_err("other ABI");
            assert!(matches!(error, BpfError::OtherAbi { .. }), "{error:?}");
            assert_eq!(error.kind(), Kind::Conflict);
            assert!(
                error
                    .hint()
                    .is_some_and(|hint| hint.contains("nucnet-ctl down"))
            );
        }
        assert!(Datapath::remove(&bpffs).is_empty());
        assert!(!bpffs.exists());
    });
}

#[test]
fn map_of_another_size_is_refused() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        load(&bpffs);
        let other: aya::maps::HashMap<_, u32, Usage> =
            aya::maps::HashMap::create(17, 0).expect("create");
        fs::remove_file(bpffs.join("maps/usage")).expect("remove");
        other.pin(bpffs.join("maps/usage")).expect("pin");
        let error = Datapath::open_or_load(&bpffs, &Host::current().expect("host"))
            .expect_err("other size");
        let BpfError::OtherMap {
            dimension,
            found,
            wanted,
            ..
        } = error
        else {
            panic!("{error:?}");
        };
        assert_eq!(
            (dimension, found, wanted),
            ("capacity", 17, size::ENDPOINTS as u32)
        );
    });
}

#[test]
fn pins_of_another_host_are_refused() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        if load(&bpffs).settings().expect("settings").netns_cookie == 0 {
            eprintln!("skipped: this kernel does not tell network namespaces apart");
            return;
        }
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare");
        let error = Datapath::open_or_load(&bpffs, &Host::current().expect("host"))
            .expect_err("other host");
        assert!(matches!(error, BpfError::OtherHost { .. }), "{error:?}");
        assert_eq!(error.kind(), Kind::Conflict);
    });
}

#[test]
fn another_object_takes_over_maps_and_links() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let mut datapath = load(&bpffs);
        let endpoint = add_veth("ep0");
        let up = add_veth("up0");
        ip("link add br0 type bridge");
        datapath
            .endpoints
            .insert(&endpoint, &Endpoint::default())
            .expect("insert");
        datapath.attach_endpoint("ep0").expect("attach");
        datapath.attach_bridge("br0").expect("attach");
        datapath.sync_uplinks(&[uplink("up0", up)]).expect("sync");
        let cgroup = Cgroup::new("upgrade");
        datapath.attach_bind(&cgroup.0).expect("attach");
        let map_id = || {
            MapInfo::from_pin(bpffs.join("maps/endpoints"))
                .expect("map")
                .id()
        };
        let (map_before, program_before) = (map_id(), program_id(&bpffs, program::FROM_ENDPOINT));
        let links_before = names(&bpffs.join("links"));
        drop(datapath);

        // As if another build had pinned it.
        fs::remove_file(bpffs.join("version")).expect("remove");
        let another = format!("abi-{}:sha256-00", nucnet_common::abi::VERSION);
        symlink(another, bpffs.join("version")).expect("symlink");
        let datapath = load(&bpffs);

        assert_eq!(map_id(), map_before);
        assert!(datapath.endpoints.get(&endpoint).expect("get").is_some());
        assert_ne!(program_id(&bpffs, program::FROM_ENDPOINT), program_before);
        assert_eq!(names(&bpffs.join("links")), links_before);
        let id = |name| program_id(&bpffs, name);
        assert_eq!(
            programs_on("up0", TcAttachType::Ingress),
            [id(program::FROM_UPLINK)]
        );
        assert_eq!(
            programs_on("br0", TcAttachType::Egress),
            [id(program::FROM_HOST)]
        );
        let filters = tc("filter show dev ep0 ingress");
        assert!(
            filters.contains(&format!(" id {} ", id(program::FROM_ENDPOINT))),
            "{filters}"
        );
        for name in [program::BIND4, program::BIND6] {
            let link = aya::programs::links::PinnedLink::from_pin(bpffs.join("links").join(name));
            let link = aya::programs::links::FdLink::from(link.expect("link"));
            assert_eq!(link.info().expect("info").program_id(), id(name));
        }
        assert!(
            !names(&bpffs.join("progs"))
                .iter()
                .any(|name| name.contains('+'))
        );
        assert!(Datapath::remove(&bpffs).is_empty());
    });
}
