//! Network namespaces, and the processes in them.

use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nucnet_ctl::kernel::netlink::Netlink;
use nucnet_ctl::kernel::netns::{NetnsFd, run_in};
use nucnet_ctl::kernel::process::{Life, Process};
use nucnet_ctl::kernel::{netns, process};

use super::lab::{namespace, need_root};

#[test]
fn work_in_a_namespace_leaves_the_caller_where_it_was() {
    need_root!();
    let own = NetnsFd::current().unwrap().id();
    let other = namespace();
    assert_ne!(other.id(), own);
    assert_eq!(
        run_in(&other, || NetnsFd::current().unwrap().id()).unwrap(),
        other.id()
    );
    assert_eq!(NetnsFd::current().unwrap().id(), own);
    let error = run_in(&other, || panic!("on purpose"))
        .map(|(): ()| ())
        .unwrap_err();
    assert!(matches!(&error, netns::Error::Panicked { message, .. } if message == "on purpose"));
    assert_eq!(NetnsFd::current().unwrap().id(), own);
}

#[test]
fn cookies_tell_namespaces_apart() {
    need_root!();
    let (first, second) = (namespace(), namespace());
    let Some(cookie) = first.cookie().unwrap() else {
        eprintln!("skipped: needs SO_NETNS_COOKIE (Linux 5.14)");
        return;
    };
    assert_eq!(first.cookie().unwrap(), Some(cookie));
    assert_ne!(second.cookie().unwrap(), Some(cookie));
}

#[test]
fn only_network_namespaces_other_than_our_own_are_taken() {
    for path in ["/proc/self/ns/mnt", "/proc/self/stat", "/dev/null"] {
        let error = NetnsFd::open(Path::new(path)).unwrap_err();
        assert!(
            matches!(error, netns::Error::NotANetns { .. }),
            "{path}: {error}"
        );
    }
    let error = NetnsFd::open(Path::new("/nowhere")).unwrap_err();
    assert!(matches!(error, netns::Error::NotFound { .. }), "{error}");
    let own = NetnsFd::open(Path::new("/proc/self/ns/net")).unwrap();
    assert!(matches!(
        own.other_than_own(),
        Err(netns::Error::Own { .. })
    ));
}

#[test]
fn path_below_a_file_does_not_exist() {
    let error = NetnsFd::open(Path::new("/proc/self/status/net")).unwrap_err();
    assert!(matches!(error, netns::Error::NotFound { .. }), "{error}");
}

#[test]
fn named_namespaces_are_made_once_and_removed_as_often_as_wanted() {
    need_root!();
    // A thread with a mount namespace of its own.
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        let private = MsFlags::MS_PRIVATE | MsFlags::MS_REC;
        mount(None::<&str>, "/", None::<&str>, private, None::<&str>).unwrap();
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("slot-1.net");
        let made = netns::create_named(&path).unwrap();
        assert_ne!(made.id(), NetnsFd::current().unwrap().id());
        assert_eq!(NetnsFd::open(&path).unwrap().id(), made.id());
        netns::create_named(&path).unwrap_err();
        assert_eq!(NetnsFd::open(&path).unwrap().id(), made.id());
        for _ in 0..2 {
            netns::remove_named(&path).unwrap();
            assert!(!path.exists());
        }
        let precious = dir.path().join("precious");
        std::fs::write(&precious, "text").unwrap();
        netns::remove_named(&precious).unwrap_err();
        assert!(precious.exists());
    })
    .join()
    .unwrap();
}

#[test]
fn namespace_of_a_process_outlives_it_and_a_dead_process_is_said_to_be_dead() {
    need_root!();
    let netns = namespace();
    // Any program that waits.
    let mut child = run_in(&netns, || {
        let mut monitor = Command::new("ip");
        monitor
            .arg("monitor")
            .stdout(Stdio::null())
            .spawn()
            .unwrap()
    })
    .unwrap();
    let process = Process::open(child.id()).unwrap();
    assert_eq!(process.life().unwrap(), Life::Running);
    let found = process.netns().unwrap();
    assert_eq!(found.id(), netns.id());
    assert!(
        found.to_string().contains(&child.id().to_string()),
        "{found}"
    );

    child.kill().unwrap();
    // A zombie counts as dead. Its namespace is gone a little earlier.
    while process.life().unwrap() == Life::Running {
        thread::yield_now();
    }
    assert_eq!(
        process.netns().unwrap_err().to_string(),
        format!("process {} has exited", child.id())
    );
    child.wait().unwrap();
    assert!(matches!(
        process.netns(),
        Err(process::Error::Exited { .. })
    ));
    assert!(matches!(
        Process::open(child.id()),
        Err(process::Error::NotFound { .. })
    ));
    Netlink::open_in(&found).unwrap().links().unwrap();
}

#[test]
fn impossible_process_ids_are_not_found() {
    for pid in [0, u32::MAX, 1 << 30] {
        let error = Process::open(pid).unwrap_err();
        assert!(matches!(error, process::Error::NotFound { .. }), "{error}");
    }
}
