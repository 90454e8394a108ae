//! Namespaces and a BPF filesystem of a test's own, and what is seen in them.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::{fs, thread};

use aya::programs::{ProgramInfo, SchedClassifier, TcAttachType};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::net::if_::if_nametoindex;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use nucnet_ctl::kernel::bpf::{AttachKind, Datapath, Host, HostInterface, LinkLayer};

/// Runs `test` in namespaces of its own, with the directory of a fresh BPF filesystem.
pub(crate) fn in_private_namespaces(test: impl FnOnce(&Path) + Send + 'static) {
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

pub(crate) fn mount_private(path: &Path) {
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none).expect("private mounts");
    mount(Some("bpf"), path, Some("bpf"), MsFlags::empty(), none).expect("mount bpf");
}

pub(crate) fn ip(arguments: &str) {
    let words = arguments.split_whitespace();
    let output = Command::new("ip").args(words).output().expect("ip");
    assert!(output.status.success(), "ip {arguments}: {output:?}");
}

pub(crate) fn tc(arguments: &str) -> String {
    let words = arguments.split_whitespace();
    let output = Command::new("tc").args(words).output().expect("tc");
    assert!(output.status.success(), "tc {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

/// A veth pair; the index of its first end.
pub(crate) fn add_veth(name: &str) -> u32 {
    ip(&format!(
        "link add name {name} type veth peer name p-{name}"
    ));
    if_nametoindex(name).expect("index")
}

pub(crate) fn load(bpffs: &Path) -> Datapath {
    let host = Host::current().expect("host");
    let (datapath, _) = Datapath::open_or_load(bpffs, &host).expect("load");
    datapath
}

/// What is in a directory; the root of every BPF filesystem has two files of the kernel's.
pub(crate) fn names(directory: &Path) -> Vec<String> {
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

pub(crate) fn program_id(bpffs: &Path, name: &str) -> u32 {
    ProgramInfo::from_pin(bpffs.join("progs").join(name))
        .expect("program")
        .id()
}

pub(crate) fn uplink(name: &str, index: u32) -> HostInterface {
    HostInterface {
        index,
        name: name.into(),
        link_layer: LinkLayer::Ethernet,
        mtu: 1500,
        addresses: vec![IpAddr::from([192, 0, 2, 1])],
    }
}

/// Programs that TCX links put on an interface; none on a kernel without TCX.
pub(crate) fn tcx_programs(interface: &str, direction: TcAttachType) -> Vec<u32> {
    match SchedClassifier::query_tcx(interface, direction) {
        Ok((_, programs)) => programs.iter().map(ProgramInfo::id).collect(),
        Err(_) => Vec::new(),
    }
}

/// Programs on an interface in their order, however they were put there.
pub(crate) fn programs_on(interface: &str, direction: TcAttachType) -> Vec<u32> {
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
pub(crate) fn attach_kind() -> AttachKind {
    match SchedClassifier::query_tcx("lo", TcAttachType::Ingress) {
        Ok(_) => AttachKind::Tcx,
        Err(_) => AttachKind::Clsact,
    }
}

/// A cgroup of this test's own.
pub(crate) struct Cgroup(pub(crate) PathBuf);

impl Cgroup {
    pub(crate) fn new(name: &str) -> Self {
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
