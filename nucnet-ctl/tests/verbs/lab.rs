//! A host of a test's own: a network namespace with an uplink, a mount namespace, a BPF
//! filesystem and a cgroup2 hierarchy.

use std::{
    fs::{self, Permissions},
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Output},
    thread,
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::geteuid,
};
use nucnet_ctl::{
    Host, Options,
    kernel::{
        bpf::{self, Datapath},
        netlink::Netlink,
        netns::{self, NetnsFd, run_in},
    },
};
use serde_json::Value;

/// Where the host's programs are.
const PROGRAMS: &str = "/usr/sbin";
/// Where they are kept while some are taken away.
const KEPT: &str = "/mnt";

/// For how long a host may take to settle.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits for what the kernel does in its own time.
fn until(what: &str, holds: impl Fn() -> bool) {
    let end = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < end, "not in time: {what}");
        thread::yield_now();
    }
}

/// The host: namespaces of the calling thread.
pub(crate) struct Lab {
    pub(crate) place: PathBuf,
}

/// Whether the program heeds `NUCNET_FAULT`.
pub(crate) fn has_faults() -> bool {
    let has = cfg!(any(debug_assertions, feature = "faults"));
    if !has {
        eprintln!("skipped: a release heeds no faults (cargo test --features faults)");
    }
    has
}

/// Runs `test` on a host of its own: the calling thread's, and its children's, namespaces.
pub(crate) fn on_a_host(test: impl FnOnce(&Lab) + Send + 'static) {
    if !geteuid().is_root() {
        eprintln!("skipped: needs root");
        return;
    }
    // Namespaces of this thread, and what is mounted in them, end with it.
    let outcome = thread::spawn(move || {
        let directory = tempfile::tempdir().expect("temporary directory");
        unshare(CloneFlags::CLONE_NEWNET | CloneFlags::CLONE_NEWNS).expect("unshare");
        let lab = Lab {
            place: directory.path().to_owned(),
        };
        lab.build();
        test(&lab);
    })
    .join();
    if let Err(panic) = outcome {
        std::panic::resume_unwind(panic);
    }
}

impl Drop for Lab {
    /// The temporary directory is about to be removed with all that is in it: what is mounted
    /// there must be out of it by then, however the test ends.
    fn drop(&mut self) {
        match umount2(&self.place, MntFlags::MNT_DETACH) {
            // It was not mounted yet.
            Ok(()) | Err(Errno::EINVAL) => {}
            Err(error) => {
                // Leaving the directory behind is the lesser evil.
                eprintln!("{}: {error}", self.place.display());
                std::process::abort();
            }
        }
    }
}

impl Lab {
    fn build(&self) {
        let none = None::<&str>;
        let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
        mount(none, "/", none, private, none).expect("private mounts");
        mounted("tmpfs", &self.place, Some("tmpfs"), MsFlags::empty());
        for (name, kind) in [("bpf", "bpf"), ("cgroup", "cgroup2")] {
            let path = self.place.join(name);
            fs::create_dir(&path).expect("directory");
            mounted(kind, &path, Some(kind), MsFlags::empty());
        }
        ip("link set lo up");
        ip("link add up0 type veth peer name up1");
        // What the kernel does by itself in its own time would differ between snapshots.
        ip("link set up0 addrgenmode none");
        ip("link set up1 addrgenmode none");
        ip("link set up1 up");
        ip("link set up0 mtu 1480 up");
        until("its links are up", || {
            ["up0", "up1"]
                .map(|link| ip(&format!("link show {link}")))
                .iter()
                .all(|it| it.contains("state UP"))
        });
        ip("address add 192.0.2.1/24 dev up0");
        ip("address add 2001:db8::1/64 dev up0 nodad");
        ip("route add default via 192.0.2.254");
        // In its own time as well.
        until("its address is local", || {
            ip("-6 route show table local").contains("2001:db8::1")
        });
    }

    /// Has a container die. The kernel takes its namespace apart in its own time, and the link with
    /// it.
    pub(crate) fn bury(&self, id: &str) {
        netns::remove_named(&self.place.join(id)).expect("namespace");
        let alias = format!("nucnet:{id}");
        until("its link is gone", || {
            // A list that another change interrupts may lack some.
            let links = ip("link show");
            links.contains("up0") && !links.contains(&alias)
        });
    }

    pub(crate) fn options(&self) -> Options {
        Options {
            state_dir: self.place.join("state"),
            bpffs: self.place.join("bpf/nucnet"),
            cgroup: Some(self.place.join("cgroup")),
            ..Options::default()
        }
    }

    pub(crate) fn host(&self) -> Host {
        Host::new(self.options()).expect("host")
    }

    /// A container: a namespace that the file holds.
    pub(crate) fn container(&self, name: &str) -> PathBuf {
        let path = self.place.join(name);
        let netns = netns::create_named(&path).expect("namespace");
        // As runtimes do; a failing attach, which does it as well, lets it be.
        run_in(&netns, || ip("link set lo up")).expect("inside");
        try_addresses(&netns, false);
        path
    }

    pub(crate) fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_nucnet-ctl"));
        let options = self.options();
        command
            .args(arguments.split_whitespace())
            // What fails here is to be seen, and not to be made up for by iptables.
            .env("NUCNET_DATAPATH", "ebpf")
            .env("NUCNET_STATE_DIR", options.state_dir)
            .env("NUCNET_BPFFS", options.bpffs)
            .env("NUCNET_CGROUP", options.cgroup.expect("cgroup"));
        command
    }

    pub(crate) fn run(&self, arguments: &str) -> Output {
        self.command(arguments).output().expect("nucnet-ctl")
    }

    pub(crate) fn ok(&self, arguments: &str) -> String {
        let output = self.run(arguments);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{arguments}: {errors}");
        String::from_utf8(output.stdout).expect("text")
    }

    pub(crate) fn json(&self, arguments: &str) -> Value {
        json(&self.ok(&format!("-o json {arguments}")))
    }

    /// Exit code and error object.
    pub(crate) fn refused(&self, arguments: &str) -> (i32, Value) {
        let output = self.run(&format!("{arguments} -o json"));
        let code = output.status.code().expect("exit code");
        assert_ne!(code, 0, "{arguments}: was done");
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        let error: Value = serde_json::from_str(&text)
            .unwrap_or_else(|error| panic!("{arguments}: {error}: {text:?}"));
        (code, error["error"].clone())
    }

    /// Takes programs away from this host, and from no other, until they are
    /// [given back](Lab::give_back).
    pub(crate) fn take_away(&self, is_meant: impl Fn(&str) -> bool) {
        // Nothing is run from where others than root could put it.
        let (programs, kept) = (Path::new(PROGRAMS), Path::new(KEPT));
        mounted(PROGRAMS, kept, None, MsFlags::MS_BIND);
        mounted("tmpfs", programs, Some("tmpfs"), MsFlags::empty());
        fs::set_permissions(programs, Permissions::from_mode(0o755)).expect("mode");
        for entry in fs::read_dir(kept).expect("programs").flatten() {
            let name = entry.file_name();
            if !is_meant(&name.to_string_lossy()) {
                symlink(entry.path(), programs.join(name)).expect("link");
            }
        }
    }

    /// Gives all programs back.
    pub(crate) fn give_back(&self) {
        for place in [PROGRAMS, KEPT] {
            umount2(place, MntFlags::MNT_DETACH).expect("unmount");
        }
    }

    /// All that there is on the host, and in its containers, that nucnet could have made or
    /// changed.
    pub(crate) fn snapshot(&self) -> String {
        let mut lines = network();
        lines.extend(["iptables-save", "ip6tables-save"].map(firewall));
        lines.extend([
            sysctls(Path::new("/proc/sys/net/ipv4/conf")),
            sysctls(Path::new("/proc/sys/net/ipv6/conf")),
        ]);
        for entry in fs::read_dir(&self.place).expect("place").flatten() {
            if let Ok(netns) = NetnsFd::open(&entry.path()) {
                let inside = run_in(&netns, network).expect("inside").join("\n");
                let name = entry.file_name().to_string_lossy().into_owned();
                lines.extend(inside.lines().map(|line| format!("{name}: {line}")));
            }
        }
        lines.extend(tree(&self.place.join("bpf")));
        lines.extend(self.entries());
        lines.extend(self.state());
        lines.push(format!("state: {}", self.place.join("state").exists()));
        let mounts = fs::read_to_string("/proc/thread-self/mountinfo").expect("mounts");
        let points = mounts.lines().filter_map(|line| line.split(' ').nth(4));
        lines.extend(points.map(|point| format!("mount {point}")));
        // Kernels list in the order of things that come and go.
        let text = lines.join("\n");
        let mut lines: Vec<&str> = text.lines().collect();
        lines.sort_unstable();
        lines.join("\n")
    }

    /// The state directory: paths, whose what is, and what records say. The host's says which
    /// numbers were given, which are not given again.
    fn state(&self) -> Vec<String> {
        tree(&self.place.join("state"))
            .into_iter()
            .map(|path| {
                let text = match fs::read_link(&path) {
                    Ok(text) => text.display().to_string(),
                    Err(_) if path.contains("/state/host.json") => String::new(),
                    Err(_) if path.ends_with(".json") => fs::read_to_string(&path)
                        .expect("record")
                        .replace('\n', " "),
                    Err(_) => String::new(),
                };
                format!("{path} {text}")
            })
            .collect()
    }

    /// How many entries the maps have that attaches and mappings fill.
    pub(crate) fn entries(&self) -> Vec<String> {
        let host = bpf::Host::current().expect("host");
        let datapath = Datapath::open_existing(&self.options().bpffs, &host).expect("open");
        let Some(datapath) = datapath else {
            return Vec::new();
        };
        let counts = [
            ("networks", datapath.networks.count()),
            ("endpoints", datapath.endpoints.count()),
            ("addresses", datapath.addresses.count()),
            ("publishes", datapath.publishes.count()),
            ("usage", datapath.usage.count()),
            ("policy_cidrs", datapath.policy_cidrs.count()),
            ("policy_ports", datapath.policy_ports.count()),
            ("mappings", datapath.mappings.count()),
            ("hairpins", datapath.hairpins.count()),
            ("snats", datapath.snats.count()),
            ("mapping_counts", datapath.mapping_counts.count()),
        ];
        let shown = |(map, count): (&str, Result<usize, _>)| {
            format!("{} entries of map {map}", count.expect("count"))
        };
        counts.into_iter().map(shown).collect()
    }

    /// Compares with a snapshot, and shows the lines that differ.
    pub(crate) fn assert_unchanged(&self, before: &str, when: &str) {
        let now = self.snapshot();
        if now == before {
            return;
        }
        let (old, new): (Vec<&str>, Vec<&str>) = (before.lines().collect(), now.lines().collect());
        let gone = old
            .iter()
            .filter(|line| !new.contains(line))
            .map(|line| format!("- {line}"));
        let come = new
            .iter()
            .filter(|line| !old.contains(line))
            .map(|line| format!("+ {line}"));
        // With an interface come some hundred sysctls.
        let difference: Vec<String> = gone.chain(come).take(40).collect();
        panic!(
            "{when}: the host is not as it was:\n{}",
            difference.join("\n")
        );
    }

    pub(crate) fn datapath(&self) -> Datapath {
        let host = bpf::Host::current().expect("host");
        Datapath::open_existing(&self.options().bpffs, &host)
            .expect("open")
            .expect("datapath")
    }
}

pub(crate) fn mounted(what: &str, at: &Path, kind: Option<&str>, flags: MsFlags) {
    let none = None::<&str>;
    mount(Some(what), at, kind, flags, none).expect("mount");
}

pub(crate) fn command(name: &str, arguments: &str) -> String {
    let output = Command::new(name)
        .args(arguments.split_whitespace())
        .output()
        .expect(name);
    assert!(output.status.success(), "{name} {arguments}: {output:?}");
    String::from_utf8(output.stdout).expect("text")
}

pub(crate) fn ip(arguments: &str) -> String {
    command("ip", arguments)
}

pub(crate) fn inside(netns: &Path, arguments: &str) -> String {
    let netns = NetnsFd::open(netns).expect("namespace");
    run_in(&netns, || ip(arguments)).expect("inside")
}

/// Whether the kernel tries IPv6 addresses before it uses them, on interfaces to come: for a
/// second or more, in its own time, which would differ between snapshots.
pub(crate) fn try_addresses(netns: &NetnsFd, tries: bool) {
    let sysctl = "/proc/sys/net/ipv6/conf/default/accept_dad";
    let text = if tries { "1" } else { "0" };
    let written = run_in(netns, || fs::write(sysctl, text)).expect("inside");
    written.expect("sysctl");
}

pub(crate) fn json(text: &str) -> Value {
    serde_json::from_str(text).expect("JSON")
}

pub(crate) fn text(value: &Value) -> String {
    value.as_str().expect("text").to_owned()
}

pub(crate) fn list(value: &Value) -> &[Value] {
    value.as_array().expect("array")
}

/// Links and all that is on them, in the namespace of the calling thread.
fn network() -> Vec<String> {
    settle();
    vec![
        without_timers(&ip("-details link show")),
        ip("address show"),
        ip("route show table all"),
        ip("-6 route show table all"),
        ip("rule show"),
        ip("-6 rule show"),
        ip("neighbour show nud permanent"),
        command("tc", "qdisc show"),
    ]
}

/// Waits for what the kernel does in its own time: it says up to a second late in a list which
/// links are up, and addresses of IPv6 with their routes come by a work queue.
fn settle() {
    let netlink = Netlink::open().expect("netlink");
    until("every address is proved unique", || {
        // Twice: a bridge is up when one of its ports is.
        for _ in 0..2 {
            for link in netlink.links().expect("links") {
                // Being asked for this one makes the kernel notice now (Linux 6.5).
                netlink.find_link(link.index).expect("link");
            }
        }
        ip("-6 address show tentative").is_empty()
    });
}

/// Rules, without comments, which have the time in them.
pub(crate) fn firewall(tool: &str) -> String {
    let text = command(tool, "");
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines.collect::<Vec<_>>().join("\n")
}

fn without_timers(text: &str) -> String {
    let mut words = text.split(' ').peekable();
    let mut kept = Vec::new();
    while let Some(word) = words.next() {
        if word.ends_with("_timer") {
            while words.next_if(|next| next.is_empty()).is_some() {}
            words.next();
        } else {
            kept.push(word);
        }
    }
    kept.join(" ")
}

fn tree(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory)
        .into_iter()
        .flatten()
        .map(|entry| entry.expect("entry"))
    {
        // The kernel's own, and addresses that rest for a while.
        if entry.path().to_string_lossy().contains("/claims/rested.") {
            continue;
        }
        if entry
            .path()
            .extension()
            .is_some_and(|extension| extension == "debug")
        {
            continue;
        }
        found.push(entry.path().display().to_string());
        if entry.file_type().expect("type").is_dir() {
            found.extend(tree(&entry.path()));
        }
    }
    found.sort();
    found
}

fn sysctls(directory: &Path) -> String {
    let mut found = Vec::new();
    for path in tree(directory) {
        // Some can only be written.
        if let Ok(value) = fs::read_to_string(&path) {
            // Chosen by the kernel at its first use.
            if !path.ends_with("stable_secret") {
                found.push(format!("{path}={}", value.trim()));
            }
        }
    }
    found.join("\n")
}
