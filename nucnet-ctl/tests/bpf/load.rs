//! Loading and removing the datapath: what is pinned where, crashes, several at once, missing
//! privilege.

use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;
use std::{fs, thread};

use aya::maps::MapInfo;
use aya::programs::TcAttachType;
use nix::net::if_::if_nametoindex;
use nucnet_common::abi::{Owner, map, program};
use nucnet_ctl::kernel::bpf::{BpfError, Datapath, Host, OBJECT, load_unpinned};
use nucnet_ctl::model::Kind;

use super::lab::{add_veth, in_private_namespaces, load, names, program_id, programs_on, uplink};

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
        let directory = tempfile::tempdir().expect("temporary directory");
        let object = directory.path().join("nucnet.o");
        fs::write(&object, OBJECT).expect("write the object");
        let pins = root.join("by_hand");
        let output = match Command::new("bpftool")
            .args(["prog", "loadall"])
            .args([&object, &pins])
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

/// The first attach after a boot waits for it. What a change may add unseen is a tenth; more wants
/// a new number in `docs/kernels.md`.
#[test]
fn no_program_takes_much_longer_to_verify_than_it_did() {
    in_private_namespaces(|root| {
        let statuses = load(&root.join("nucnet")).programs().expect("programs");
        let counts: BTreeMap<_, _> = statuses
            .into_iter()
            .filter_map(|status| Some((status.name, status.verified_instructions?)))
            .collect();
        for (name, count) in &counts {
            // Read by `cargo xtask vm`.
            println!("verified: {name} {count}");
        }
        let release = fs::read_to_string("/proc/sys/kernel/osrelease").expect("release");
        let Some(known) = known_counts(&release) else {
            return eprintln!(
                "skipped: docs/kernels.md has no counts of {}",
                release.trim()
            );
        };
        let loaded: Vec<_> = counts.keys().map(String::as_str).collect();
        let described: Vec<_> = known.keys().copied().collect();
        assert_eq!(loaded, described, "programs, and those of docs/kernels.md");
        let grown: Vec<_> = counts
            .iter()
            .map(|(name, count)| (name, known[name.as_str()], count))
            .filter(|(_, before, now)| **now > before + before / 10)
            .collect();
        assert!(grown.is_empty(), "before and now: {grown:?}");
    });
}

/// What each program takes on a kernel by the table of `docs/kernels.md`, if that has the kernel.
fn known_counts(release: &str) -> Option<BTreeMap<&'static str, u32>> {
    let cells = |line: &'static str| {
        let cells = line.trim_matches(['|', ' ']).split('|');
        cells.map(str::trim).collect::<Vec<_>>()
    };
    let mut lines = include_str!("../../../docs/kernels.md").lines();
    let head = lines.find(|line| line.starts_with("| program |"));
    let head = cells(head.expect("a table of programs"));
    let is_ours = |kernel: &str| {
        let rest = release.strip_prefix(kernel);
        rest.is_some_and(|rest| rest.starts_with('.'))
    };
    let column = head.iter().position(|kernel| is_ours(kernel))?;
    let rows = lines.skip(1).take_while(|line| line.starts_with('|'));
    let counts = rows.map(|row| {
        let row = cells(row);
        let count = row[column].replace(',', "");
        (row[0], count.parse().expect("a number of instructions"))
    });
    Some(counts.collect())
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

/// Where a child of a test has its pins.
const CHILD_BPFFS: &str = "NUCNET_TEST_BPFFS";

/// Runs one of this file's children in a process of its own.
fn child(test: &str, bpffs: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("own path"));
    command
        .args(["--ignored", "--exact", "--nocapture", test])
        .env(CHILD_BPFFS, bpffs);
    command
}

/// What a child was told; none: it was taken for a test.
fn child_bpffs() -> Option<PathBuf> {
    let bpffs = std::env::var_os(CHILD_BPFFS).map(PathBuf::from);
    if bpffs.is_none() {
        eprintln!("skipped: part of another test, which runs it");
    }
    bpffs
}

/// The child of `load_that_is_killed_at_any_moment_leaves_nothing_half`.
#[test]
#[ignore = "skipped: part of another test, which runs it"]
fn child_that_loads_and_removes() {
    let Some(bpffs) = child_bpffs() else {
        return;
    };
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
            let mut loading = child("load::child_that_loads_and_removes", &bpffs)
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
#[ignore = "skipped: part of another test, which runs it"]
fn child_without_privilege() {
    let Some(bpffs) = child_bpffs() else {
        return;
    };
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
                "load::child_without_privilege",
            ])
            .env(CHILD_BPFFS, &bpffs)
            .output();
        fs::remove_dir_all(&directory).expect("remove");
        let Ok(output) = output else {
            eprintln!("skipped: no setpriv");
            return;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        println!("{text}");
        assert!(
            output.status.success() && text.contains("1 passed"),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
    });
}
