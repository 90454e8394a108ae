//! Loading, pinning, attaching and map access, in the running kernel. Every test has a network
//! namespace, a mount namespace and a BPF filesystem of its own.

use std::{
    fs,
    net::IpAddr,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::Instant,
};

use aya::{
    maps::MapInfo,
    programs::{ProgramInfo, SchedClassifier, TcAttachType},
};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    net::if_::if_nametoindex,
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use nucnet_common::abi::{
    Binding, DropCount, DropKey, Endpoint, Flow, FlowKey, OutsideKey, Owner, PolicyCidrKey,
    PolicyClass, Publish, PublishKey, Usage, map, program, size,
};
use nucnet_ctl::{
    kernel::bpf::{
        AttachKind, BpfError, Datapath, Host, HostInterface, LinkLayer, Prefix, load_unpinned,
    },
    model::Kind,
};

/// Runs `test` in namespaces of its own, with the directory of a fresh BPF filesystem.
fn in_private_namespaces(test: impl FnOnce(&Path) + Send + 'static) {
    if !geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    let directory = tempfile::tempdir().expect("temporary directory");
    let path = directory.path().to_path_buf();
    // Namespaces of this thread end with it.
    let outcome = thread::spawn(move || {
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare");
        mount_private(&path);
        test(&path);
        umount2(&path, MntFlags::MNT_DETACH).expect("umount");
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

fn mount_private(path: &Path) {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none).expect("mount bpf");
}

fn ip(arguments: &str) {
    let words = arguments.split_whitespace();
    let output = Command::new("ip").args(words).output().expect("ip");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

fn tc(arguments: &str) -> String {
    let words = arguments.split_whitespace();
    let output = Command::new("tc").args(words).output().expect("tc");
    assert!(output.status.success(), "tc {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// A veth pair; the index of its first end.
fn add_veth(name: &str) -> u32 {
    ip(&format!(
        "link add name {name} type veth peer name p-{name}"
    ));
    if_nametoindex(name).expect("index")
}

fn load(bpffs: &Path) -> Datapath {
    Datapath::open_or_load(bpffs, &Host::current().expect("host")).expect("load")
}

/// What is in a directory; the root of every BPF filesystem has two files of the kernel's.
fn names(directory: &Path) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(directory)
        .expect("read directory")
        .map(|entry| {
            entry
                .expect("entry")
                .file_name()
                .into_string()
                .expect("text")
        })
        .filter(|name| !name.ends_with(".debug"))
        .collect();
    names.sort();
    names
}

fn program_id(bpffs: &Path, name: &str) -> u32 {
    ProgramInfo::from_pin(bpffs.join("progs").join(name))
        .expect("program")
        .id()
}

fn uplink(name: &str, index: u32) -> HostInterface {
    HostInterface {
        index,
        name: name.into(),
        link_layer: LinkLayer::Ethernet,
        mtu: 1500,
        addresses: vec![IpAddr::from([192, 0, 2, 1])],
    }
}

/// Programs that TCX links put on an interface; none on a kernel without TCX.
fn tcx_programs(interface: &str, direction: TcAttachType) -> Vec<u32> {
    match SchedClassifier::query_tcx(interface, direction) {
        Ok((_, programs)) => programs.iter().map(ProgramInfo::id).collect(),
        Err(_) => Vec::new(),
    }
}

/// Programs on an interface in their order, however they were put there.
fn programs_on(interface: &str, direction: TcAttachType) -> Vec<u32> {
    let hook = match direction {
        TcAttachType::Egress => "egress",
        _ => "ingress",
    };
    let filters = tc(&format!("filter show dev {interface} {hook}"));
    let words: Vec<&str> = filters.split_whitespace().collect();
    let of_filters = words
        .windows(2)
        .filter(|pair| pair[0] == "id")
        .map(|pair| pair[1].parse::<u32>().expect("id"));
    let mut programs = tcx_programs(interface, direction);
    programs.extend(of_filters);
    programs
}

/// How this kernel attaches to host interfaces.
fn attach_kind() -> AttachKind {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => AttachKind::Tcx,
        Err(_) => AttachKind::Clsact,
    }
}

#[test]
fn object_loads_without_pins() {
    in_private_namespaces(|_| {
        let object = load_unpinned().expect("load");
        assert!(object.program(program::FROM_ENDPOINT).is_some());
    });
}

/// The reader of ELF objects that bpftool uses is stricter than ours.
#[test]
fn bpftool_loads_the_object() {
    in_private_namespaces(|root| {
        let object = concat!(env!("CARGO_MANIFEST_DIR"), "/bpf/nucnet.o");
        let pins = root.join("by_hand");
        let output = match Command::new("bpftool")
            .args(["prog", "loadall", object])
            .arg(&pins)
            .output()
        {
            Ok(output) => output,
            Err(error) => return eprintln!("skipped: no bpftool here: {error}"),
        };
        let told = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{told}");
        assert!(names(&pins).contains(&"from_endpoint".to_owned()));
    });
}

#[test]
fn first_use_pins_every_map_and_program() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let datapath = load(&bpffs);
        assert_eq!(
            fs::metadata(&bpffs).expect("metadata").mode() & 0o777,
            0o700
        );
        let mut maps = map::ALL.to_vec();
        maps.sort_unstable();
        assert_eq!(names(&bpffs.join("maps")), maps);
        let programs = names(&bpffs.join("progs"));
        for name in [
            program::FROM_ENDPOINT,
            program::FROM_UPLINK,
            program::FROM_UPLINK_L3,
            program::FROM_HOST,
            program::BIND4,
            program::BIND6,
        ] {
            assert!(
                programs.iter().any(|found| found == name),
                "{name} in {programs:?}"
            );
        }
        assert_eq!(names(&bpffs), ["links", "maps", "progs", "version"]);
        assert_eq!(names(&bpffs.join("links")), Vec::<String>::new());
        for status in datapath.programs().expect("programs") {
            assert_ne!(status.id, 0, "{status:?}");
            assert_ne!(status.verified_instructions, Some(0), "{status:?}");
        }
    });
}

#[test]
fn second_use_opens_what_the_first_pinned() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let id = |name| {
            MapInfo::from_pin(bpffs.join("maps").join(name))
                .expect("map")
                .id()
        };
        let host = Host::current().expect("host");
        assert!(
            Datapath::open_existing(&bpffs, &host)
                .expect("open")
                .is_none()
        );
        load(&bpffs)
            .addresses
            .insert(
                &[7; 16],
                &Owner {
                    link: 3,
                    endpoint: 9,
                },
            )
            .expect("insert");
        let before = (id(map::FLOWS), program_id(&bpffs, program::FROM_HOST));
        let again = load(&bpffs);
        assert_eq!(
            (id(map::FLOWS), program_id(&bpffs, program::FROM_HOST)),
            before
        );
        let owner = again.addresses.get(&[7; 16]).expect("get");
        assert_eq!(
            owner,
            Some(Owner {
                link: 3,
                endpoint: 9
            })
        );
        assert!(
            Datapath::open_existing(&bpffs, &host)
                .expect("open")
                .is_some()
        );
    });
}

#[test]
fn mount_point_itself_can_hold_the_pins() {
    in_private_namespaces(|root| {
        load(root);
        assert_eq!(names(root), ["links", "maps", "progs", "version"]);
        assert!(Datapath::remove(root).is_empty());
        assert_eq!(names(root), Vec::<String>::new());
    });
}

#[test]
fn directory_that_is_no_bpf_filesystem_is_refused_with_the_remedy() {
    in_private_namespaces(|_| {
        let directory = tempfile::tempdir().expect("temporary directory");
        let host = Host::current().expect("host");
        for path in [
            directory.path().to_path_buf(),
            directory.path().join("nucnet"),
        ] {
            let error = Datapath::open_or_load(&path, &host).expect_err("no bpffs");
            assert!(matches!(error, BpfError::NotBpffs { .. }), "{error:?}");
            assert_eq!(error.kind(), Kind::Unsupported);
            assert_eq!(
                error.hint(),
                Some(format!("mount -t bpf bpf {}", path.display()))
            );
        }
    });
}

#[test]
fn directory_with_a_dot_or_another_owner_is_refused() {
    in_private_namespaces(|root| {
        let host = Host::current().expect("host");
        let error = Datapath::open_or_load(&root.join("a.b"), &host).expect_err("dot");
        assert!(error.to_string().contains("dot"), "{error}");
        let foreign = root.join("foreign");
        fs::create_dir(&foreign).expect("mkdir");
        std::os::unix::fs::chown(&foreign, Some(65534), None).expect("chown");
        let error = Datapath::open_or_load(&foreign, &host).expect_err("owner");
        assert!(
            error.to_string().contains("belongs to user 65534"),
            "{error}"
        );
    });
}

#[test]
fn directory_open_to_others_is_closed() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        fs::create_dir(&bpffs).expect("mkdir");
        fs::set_permissions(&bpffs, fs::Permissions::from_mode(0o777)).expect("chmod");
        load(&bpffs);
        assert_eq!(
            fs::metadata(&bpffs).expect("metadata").mode() & 0o777,
            0o700
        );
    });
}

#[test]
fn remains_of_a_crash_are_replaced() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let datapath = load(&bpffs);
        let index = add_veth("up0");
        datapath.attach_bridge("up0").expect("attach");
        let before = program_id(&bpffs, program::FROM_HOST);
        // A crash while pinning, and one while taking away, leave this.
        fs::remove_file(bpffs.join("version")).expect("remove");
        fs::remove_file(bpffs.join("maps/flows")).expect("remove");
        assert!(
            Datapath::open_existing(&bpffs, &Host::current().expect("host"))
                .expect("open")
                .is_none()
        );
        let mut datapath = load(&bpffs);
        assert_ne!(program_id(&bpffs, program::FROM_HOST), before);
        assert!(programs_on("up0", TcAttachType::Egress).is_empty());
        datapath
            .sync_uplinks(&[uplink("up0", index)])
            .expect("usable");
    });
}

#[test]
fn many_first_uses_at_once_make_one_datapath() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        // Threads have the namespaces of the thread that makes them.
        let all: Vec<_> = (0..16)
            .map(|_| {
                let bpffs = bpffs.clone();
                thread::spawn(move || load(&bpffs).programs().expect("programs"))
            })
            .collect();
        let mut programs = all.into_iter().map(|thread| thread.join().expect("thread"));
        let first = programs.next().expect("one at least");
        assert!(programs.all(|programs| programs == first));
    });
}

/// Runs one of this file's ignored tests in a process of its own.
fn child(test: &str, bpffs: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--ignored", "--exact", "--nocapture", test])
        .env("NUCNET_TEST_BPFFS", bpffs);
    command
}

/// The child of `load_that_is_killed_at_any_moment_leaves_nothing_half`.
#[test]
#[ignore]
fn child_that_loads_and_removes() {
    let bpffs = PathBuf::from(std::env::var_os("NUCNET_TEST_BPFFS").expect("variable"));
    loop {
        let mut datapath = load(&bpffs);
        let index = if_nametoindex("up0").expect("index");
        datapath
            .sync_uplinks(&[uplink("up0", index)])
            .expect("sync");
        assert!(Datapath::remove(&bpffs).is_empty());
    }
}

#[test]
fn load_that_is_killed_at_any_moment_leaves_nothing_half() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let index = add_veth("up0");
        let start = Instant::now();
        load(&bpffs);
        assert!(Datapath::remove(&bpffs).is_empty());
        let cycle = start.elapsed();
        const ROUNDS: u32 = 20;
        for round in 0..ROUNDS {
            let mut loading = child("child_that_loads_and_removes", &bpffs)
                .stdout(std::process::Stdio::null())
                .spawn()
                .expect("child");
            // Spread over a load, an attach and a removal.
            thread::sleep(cycle * 3 / 2 * round / ROUNDS);
            assert!(
                loading.try_wait().expect("wait").is_none(),
                "it failed by itself"
            );
            loading.kill().expect("kill");
            loading.wait().expect("wait");

            let mut datapath = load(&bpffs);
            datapath
                .sync_uplinks(&[uplink("up0", index)])
                .expect("sync");
            let ours = program_id(&bpffs, program::FROM_UPLINK);
            assert_eq!(programs_on("up0", TcAttachType::Ingress), [ours]);
            let problems = Datapath::remove(&bpffs);
            assert!(problems.is_empty(), "{problems:?}");
            assert_eq!(names(root), Vec::<String>::new());
            assert!(programs_on("up0", TcAttachType::Ingress).is_empty());
        }
    });
}

/// The child of `user_without_privilege_is_told_what_is_missing`.
#[test]
#[ignore]
fn child_without_privilege() {
    let bpffs = PathBuf::from(std::env::var_os("NUCNET_TEST_BPFFS").expect("variable"));
    let Err(error) = load_unpinned() else {
        panic!("loaded")
    };
    assert!(matches!(error, BpfError::NotPermitted { .. }), "{error:?}");
    assert_eq!(error.kind(), Kind::Unsupported);
    assert!(error.to_string().contains("CAP_BPF"), "{error}");
    println!("{error}");
    let error =
        Datapath::open_or_load(&bpffs, &Host::current().expect("host")).expect_err("no privilege");
    assert_eq!(error.kind(), Kind::Unsupported, "{error:?}");
    assert!(
        error
            .hint()
            .is_some_and(|hint| hint.contains("run as root")),
        "{error:?}"
    );
    println!("{error}");
}

#[test]
fn user_without_privilege_is_told_what_is_missing() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        load(&bpffs);
        // Where somebody without privilege can run it.
        let directory = Path::new("/run").join(format!("nucnet-test-{}", std::process::id()));
        fs::create_dir(&directory).expect("mkdir");
        let program = directory.join("test");
        fs::copy(std::env::current_exe().expect("own path"), &program).expect("copy");
        let output = Command::new("setpriv")
            .args(["--reuid=65534", "--regid=65534", "--clear-groups", "--"])
            .arg(&program)
            .args([
                "--ignored",
                "--exact",
                "--nocapture",
                "child_without_privilege",
            ])
            .env("NUCNET_TEST_BPFFS", &bpffs)
            .output();
        fs::remove_dir_all(&directory).expect("remove");
        let Ok(output) = output else {
            eprintln!("skipped: no setpriv");
            return;
        };
        println!("{}", String::from_utf8_lossy(&output.stdout));
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    });
}

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

/// A cgroup of this test's own.
struct Cgroup(PathBuf);

impl Cgroup {
    fn new(name: &str) -> Self {
        let root = nucnet_ctl::kernel::bpf::cgroup_root().expect("cgroup2");
        let path = root.join(format!("nucnet-test-{}-{name}", std::process::id()));
        fs::create_dir(&path).expect("mkdir");
        Self(path)
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
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

#[test]
fn settings_follow_the_sysctls_of_the_host() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let host = Host::current().expect("host");
        let settings = datapath.settings().expect("settings");
        assert_eq!(settings.netns_cookie, host.netns_cookie);
        assert_eq!(
            (settings.dynamic_port_first, settings.dynamic_port_mask),
            (16384, 0x3fff)
        );
        assert_eq!(
            (settings.host_port_first, settings.host_port_last),
            (32768, 60999)
        );
        fs::write("/proc/sys/net/ipv4/ip_local_port_range", "20000 40001").expect("write");
        let settings = datapath.refresh_settings(&host).expect("refresh");
        assert_eq!(
            (settings.dynamic_port_first, settings.dynamic_port_mask),
            (49152, 0x3fff)
        );
        assert_eq!(datapath.settings().expect("settings"), settings);
    });
}

#[test]
fn entries_are_written_listed_and_removed_in_bulk() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let policies: Vec<_> = (0..10_000u32)
            .map(|n| {
                let mut address = [0; 16];
                address[..4].copy_from_slice(&n.to_be_bytes());
                let key = PolicyCidrKey {
                    policy: 7u32.to_be_bytes(),
                    address,
                };
                (Prefix::new(32 + 32, key), PolicyClass { class: n + 1 })
            })
            .collect();
        datapath.policy_cidrs.insert_all(&policies).expect("insert");
        assert_eq!(
            datapath.policy_cidrs.count().expect("count"),
            policies.len()
        );
        let longer = Prefix::new(160, policies[1234].0.data());
        let class = datapath.policy_cidrs.get(&longer).expect("get");
        assert_eq!(class, Some(PolicyClass { class: 1235 }));
        let keys: Vec<_> = policies.iter().map(|(key, _)| *key).collect();
        // One that is not there is passed over.
        datapath.policy_cidrs.remove(&keys[5000]).expect("remove");
        let mut removed = Vec::new();
        datapath
            .policy_cidrs
            .remove_all(&keys, |index| removed.push(index))
            .expect("remove");
        assert_eq!(removed.len(), policies.len() - 1);
        assert!(!removed.contains(&5000));
        assert_eq!(datapath.policy_cidrs.entries().expect("entries").len(), 0);

        let key = PublishKey {
            address: [0; 16],
            protocol: 6,
            kind: 0,
            port: 80u16.to_be_bytes(),
        };
        let key = Prefix::new(PublishKey::BITS, key);
        let publish = Publish {
            link: 1,
            endpoint: 2,
            host_port: 80,
            port: 8080,
            mapping: 0,
        };
        datapath.publishes.insert(&key, &publish).expect("insert");
        assert_eq!(datapath.publishes.get(&key).expect("get"), Some(publish));
        assert!(datapath.publishes.remove(&key).expect("remove"));
        assert!(!datapath.publishes.remove(&key).expect("remove"));
    });
}

/// Flow number `n` of an endpoint, as it stands in the tables.
fn flow(endpoint: u32, n: u32) -> (FlowKey, Flow, OutsideKey) {
    let mut peer = [0; 16];
    peer[..4].copy_from_slice(&n.to_be_bytes());
    let key = FlowKey {
        endpoint,
        protocol: 6,
        peer,
        peer_port: 443,
        ..FlowKey::default()
    };
    let external_port = n as u16;
    let flow = Flow {
        external: [9; 16],
        external_port,
        peer,
        peer_port: 443,
        ..Flow::default()
    };
    let outside = OutsideKey {
        protocol: 6,
        external: [9; 16],
        peer,
        external_port,
        peer_port: 443,
    };
    (key, flow, outside)
}

/// As many flows as make a host busy.
const FLOWS: u32 = 262_144;

#[test]
fn purge_removes_one_endpoint_among_many_flows_and_nobody_else() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let (victim, other) = (7, 8);
        let all: Vec<_> = (0..FLOWS)
            .map(|n| flow(if n % 4 == 0 { victim } else { other }, n))
            .collect();
        let entries: Vec<_> = all.iter().map(|(key, flow, _)| (*key, *flow)).collect();
        datapath.flows.insert_all(&entries).expect("insert");
        let entries: Vec<_> = all
            .iter()
            .map(|(key, _, outside)| (*outside, *key))
            .collect();
        datapath.outside.insert_all(&entries).expect("insert");
        let bound = FlowKey {
            endpoint: victim,
            protocol: 17,
            ..FlowKey::default()
        };
        let binding = Binding {
            external: [9; 16],
            external_port: 20_000,
            ..Binding::default()
        };
        datapath.bindings.insert(&bound, &binding).expect("insert");
        let bound_outside = OutsideKey {
            protocol: 17,
            external: [9; 16],
            external_port: 20_000,
            ..OutsideKey::default()
        };
        datapath
            .outside
            .insert(&bound_outside, &bound)
            .expect("insert");
        let count = u64::from(FLOWS) / 4;
        let usage = Usage {
            flows: count,
            bindings: 1,
        };
        datapath.usage.insert(&victim, &usage).expect("insert");

        let start = Instant::now();
        let purged = datapath.purge_endpoint(victim).expect("purge");
        println!("{count} of {} flows purged in {:?}", FLOWS, start.elapsed());
        assert_eq!((purged.flows, purged.bindings), (count, 1));

        let rest = 3 * count as usize;
        assert_eq!(datapath.flows.count().expect("count"), rest);
        assert_eq!(datapath.outside.count().expect("count"), rest);
        assert_eq!(datapath.bindings.count().expect("count"), 0);
        assert!(datapath.usage.get(&victim).expect("get").is_none());
        let again = datapath.purge_endpoint(victim).expect("again");
        assert_eq!(again, Default::default());
    });
}

#[test]
fn purge_without_a_count_looks_for_itself() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let (key, flow, outside) = flow(7, 1);
        datapath.flows.insert(&key, &flow).expect("insert");
        datapath.outside.insert(&outside, &key).expect("insert");
        assert_eq!(datapath.purge_endpoint(7).expect("purge").flows, 1);
        assert_eq!(datapath.outside.count().expect("count"), 0);
    });
}

#[test]
fn removed_endpoint_leaves_nothing_but_what_others_have_now() {
    in_private_namespaces(|root| {
        let mut datapath = load(&root.join("nucnet"));
        let endpoint = |number, last| Endpoint {
            number,
            address4: [last; 16],
            address6: [last + 1; 16],
            ..Endpoint::default()
        };
        datapath.put_endpoint(3, &endpoint(7, 40)).expect("put");
        let usage = Usage {
            flows: 1,
            bindings: 0,
        };
        datapath.usage.insert(&7, &usage).expect("insert");
        let (key, flow, outside) = flow(7, 1);
        datapath.flows.insert(&key, &flow).expect("insert");
        datapath.outside.insert(&outside, &key).expect("insert");
        // A change keeps the count.
        datapath.put_endpoint(3, &endpoint(7, 40)).expect("put");
        assert_eq!(datapath.usage.get(&7).expect("get"), Some(usage));
        // Its second address goes to somebody else.
        datapath.put_endpoint(4, &endpoint(8, 41)).expect("put");

        let purged = datapath.remove_endpoint(3).expect("remove");
        assert_eq!(purged.expect("was there").flows, 1);
        assert_eq!(datapath.remove_endpoint(3).expect("again"), None);
        assert_eq!(datapath.endpoints.count().expect("count"), 1);
        assert_eq!(datapath.usage.count().expect("count"), 1);
        assert_eq!(datapath.flows.count().expect("count"), 0);
        let owner = |address| datapath.addresses.get(&[address; 16]).expect("get");
        assert_eq!(owner(40), None);
        assert_eq!(owner(41).map(|owner| owner.endpoint), Some(8));
    });
}

#[test]
fn drops_are_summed_over_cpus() {
    in_private_namespaces(|root| {
        let bpffs = root.join("nucnet");
        let datapath = load(&bpffs);
        let key = DropKey {
            endpoint: 3,
            reason: 14,
        };
        let mut raw: aya::maps::PerCpuHashMap<_, DropKey, DropCount> =
            aya::maps::Map::PerCpuHashMap(
                aya::maps::MapData::from_pin(bpffs.join("maps/drops")).expect("map"),
            )
            .try_into()
            .expect("per-CPU map");
        let cpus = aya::util::nr_cpus().expect("CPUs");
        let counts = vec![
            DropCount {
                packets: 2,
                bytes: 100
            };
            cpus
        ];
        raw.insert(key, counts.try_into().expect("values"), 0)
            .expect("insert");
        let sum = DropCount {
            packets: 2 * cpus as u64,
            bytes: 100 * cpus as u64,
        };
        assert_eq!(datapath.drops.entries().expect("entries"), [(key, sum)]);
        let mut datapath = datapath;
        datapath.purge_endpoint(3).expect("purge");
        assert_eq!(datapath.drops.get(&key).expect("get"), DropCount::default());
    });
}
