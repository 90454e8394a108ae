//! Everything about a machine's network that a careless tool could leave behind.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Context, Result};
use nucnet_ctl::kernel::netlink::{self, Netlink};

use super::{Node, wait};

/// Lines by section: what there is, in words that compare.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Snapshot {
    sections: BTreeMap<&'static str, Vec<String>>,
}

/// Commands whose output is part of a snapshot.
const COMMANDS: [(&str, &[&str]); 13] = [
    ("links", &["ip", "-d", "-o", "link", "show"]),
    ("addresses", &["ip", "-o", "addr", "show"]),
    (
        "routes",
        &["ip", "-d", "-4", "route", "show", "table", "all"],
    ),
    (
        "routes6",
        &["ip", "-d", "-6", "route", "show", "table", "all"],
    ),
    ("rules", &["ip", "-4", "rule", "show"]),
    ("rules6", &["ip", "-6", "rule", "show"]),
    ("neighbours", &["ip", "neigh", "show", "nud", "permanent"]),
    ("proxies", &["ip", "neigh", "show", "proxy"]),
    ("tunnels", &["ip", "tunnel", "show"]),
    ("qdiscs", &["tc", "qdisc", "show"]),
    ("bridges", &["bridge", "-d", "-o", "link", "show"]),
    ("firewall", &["iptables-save"]),
    ("firewall6", &["ip6tables-save"]),
];

/// What `iptables-save` prints, without tables that have neither rules, nor chains of somebody's,
/// nor another policy than to accept: once somebody has looked at them there is no way to remove
/// them, and they change nothing.
fn without_empty_tables(text: &str) -> String {
    let tables = text.split_inclusive("COMMIT\n");
    let is_empty = |table: &str| {
        let mut lines = table.lines().filter(|line| !line.starts_with(['#', '*']));
        lines.all(|line| line.contains(" ACCEPT [") || line == "COMMIT")
    };
    tables.filter(|table| !is_empty(table)).collect()
}

impl Snapshot {
    /// Looks at a machine. What only a host has (mounts, pins, a cgroup) counts for a host only.
    ///
    /// # Errors
    /// It cannot be looked at.
    pub fn of(node: &Node) -> Result<Self> {
        let mut sections = BTreeMap::new();
        wait::until("every address is proved unique", wait::SOON, || {
            node.within(notice_links)??;
            Ok(node
                .run("ip", &["-6", "-o", "addr", "show", "tentative"])?
                .is_empty())
        })?;
        for (section, command) in COMMANDS {
            // A tool that this machine does not have shows nothing, before and after.
            let output = match node.command(command[0]).args(&command[1..]).output() {
                Ok(output) => String::from_utf8_lossy(&output.stdout).into_owned(),
                Err(_) => String::new(),
            };
            let output = match section.starts_with("firewall") {
                true => without_empty_tables(&output),
                false => output,
            };
            let mut lines: Vec<_> = output.lines().filter_map(steady).collect();
            lines.sort();
            sections.insert(section, lines);
        }
        let (sysctls, programs) = node.within(|| (sysctls(), programs_on_links()))?;
        sections.insert("sysctls", sysctls);
        sections.insert("programs", programs?);
        if let Some(cgroup) = node.cgroup() {
            let directory = node.path(cgroup);
            let file = fs::File::open(&directory)
                .with_context(|| format!("opening {}", directory.display()))?;
            let target = u32::try_from(file.as_raw_fd())?;
            let mut programs = Vec::new();
            // From BPF_CGROUP_INET4_BIND on: every kind for sockets that there is.
            for kind in 0..=bpf::LAST_KIND {
                programs.extend(bpf::query(target, kind).map(|n| format!("kind {kind}: {n}")));
            }
            sections.insert("cgroup", programs);
            for (section, path) in [("bpffs", "/sys/fs/bpf"), ("run", "/run")] {
                let mut files = Vec::new();
                let root = node.path(path);
                tree(&root, &root, &mut files);
                sections.insert(section, files);
            }
        }
        Ok(Self { sections })
    }

    /// The same without what belongs to no endpoint and may stay until `down`: pinned programs
    /// and maps, programs on the host's own interfaces and on its cgroup, the state directory.
    pub fn without_pins(&self) -> Self {
        let mut sections = self.sections.clone();
        for section in ["bpffs", "run", "programs", "cgroup", "qdiscs"] {
            sections.remove(section);
        }
        Self { sections }
    }

    /// What is in one of them only; empty: they are equal.
    pub fn difference(&self, after: &Self) -> String {
        let mut text = String::new();
        for (section, lines) in &self.sections {
            let none = Vec::new();
            let later = after.sections.get(section).unwrap_or(&none);
            for line in lines.iter().filter(|line| !later.contains(line)) {
                text += &format!("gone from {section}: {line}\n");
            }
            for line in later.iter().filter(|line| !lines.contains(line)) {
                text += &format!("new in {section}: {line}\n");
            }
        }
        text
    }
}

/// Has the kernel notice which links of this thread's network namespace are up: in a list it says
/// so up to a second late, for one that is asked for at once (Linux 6.5).
fn notice_links() -> Result<(), netlink::Error> {
    let netlink = Netlink::open()?;
    // Twice: a bridge is up when one of its ports is.
    for _ in 0..2 {
        for link in netlink.links()? {
            netlink.find_link(link.index)?;
        }
    }
    Ok(())
}

/// A line without what changes by itself.
fn steady(line: &str) -> Option<String> {
    // Comments of iptables-save have the time in them, chains their counters.
    if line.starts_with('#') {
        return None;
    }
    let mut kept = Vec::new();
    let mut words = line.split_whitespace();
    while let Some(word) = words.next() {
        if word.ends_with("_timer") {
            words.next();
        } else if word == "UNKNOWN" {
            // An interface that is up, before the kernel has noticed it (Linux before 6.5).
            kept.push("UP");
        } else if !word.starts_with('[') {
            kept.push(word);
        }
    }
    Some(kept.join(" "))
}

/// Every sysctl of the network namespace that this thread is in.
fn sysctls() -> Vec<String> {
    let mut lines = Vec::new();
    for directory in [
        "/proc/sys/net/ipv4",
        "/proc/sys/net/ipv6",
        "/proc/sys/net/bridge",
    ] {
        values(Path::new(directory), &mut lines);
    }
    lines.sort();
    lines
}

fn values(directory: &Path, lines: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        if path.is_dir() {
            values(&path, lines);
        } else if let Ok(value) = fs::read_to_string(&path) {
            lines.push(format!("{} = {}", path.display(), value.trim()));
        }
    }
}

/// TCX programs and filters on every link of the namespace that this thread is in.
fn programs_on_links() -> Result<Vec<String>> {
    let mut lines = Vec::new();
    for link in nix::net::if_::if_nameindex()?.iter() {
        let name = link.name().to_string_lossy();
        for (side, kind) in [("ingress", bpf::TCX_INGRESS), ("egress", bpf::TCX_EGRESS)] {
            if let Some(count) = bpf::query(link.index(), kind) {
                lines.push(format!("{name} {side}: {count} programs"));
            }
            let filters = std::process::Command::new("tc")
                .args(["filter", "show", "dev", &name, side])
                .output();
            if let Ok(filters) = filters {
                let text = String::from_utf8_lossy(&filters.stdout);
                lines.extend(text.lines().map(|line| format!("{name} {side}: {line}")));
            }
        }
    }
    lines.sort();
    Ok(lines)
}

/// Paths and sizes below a directory.
fn tree(root: &Path, directory: &Path, lines: &mut Vec<String>) {
    let Ok(entries) = fs::read_dir(directory) else {
        return;
    };
    for entry in entries.flatten() {
        let path = entry.path();
        // iptables makes this one when it is asked what rules there are.
        if path.file_name() == Some(OsStr::new("xtables.lock")) {
            continue;
        }
        let data = entry.metadata().ok().filter(|data| data.is_file());
        // A lock says who had it last.
        let data = data.filter(|_| entry.file_name() != "lock");
        let size = data.map_or(0, |data| data.len());
        let relative = path.strip_prefix(root).unwrap_or(&path);
        lines.push(format!("{} {size}", relative.display()));
        if path.is_dir() && !path.is_symlink() {
            tree(root, &path, lines);
        }
    }
    lines.sort();
}

/// `bpf(BPF_PROG_QUERY)`: how many programs sit on a hook.
mod bpf {
    /// `BPF_TCX_INGRESS` of `enum bpf_attach_type`.
    pub(super) const TCX_INGRESS: u32 = 46;
    /// `BPF_TCX_EGRESS`.
    pub(super) const TCX_EGRESS: u32 = 47;
    /// Kinds from 0 to this one include all of cgroup v2 (`BPF_CGROUP_UNIX_GETSOCKNAME`).
    pub(super) const LAST_KIND: u32 = 53;

    const PROG_QUERY: libc::c_int = 16;

    /// The members of `union bpf_attr` for the command, as far as they are used.
    #[repr(C)]
    #[derive(Default)]
    struct Query {
        target: u32,
        attach_type: u32,
        query_flags: u32,
        attach_flags: u32,
        prog_ids: u64,
        prog_cnt: u32,
        pad: u32,
        prog_attach_flags: u64,
        link_ids: u64,
        link_attach_flags: u64,
        revision: u64,
    }

    /// How many there are; `None`: none, or no such hook.
    pub(super) fn query(target: u32, attach_type: u32) -> Option<u32> {
        let mut query = Query {
            target,
            attach_type,
            ..Query::default()
        };
        // SAFETY: the kernel reads and writes `query` within its size; it holds no pointers.
        let result = unsafe {
            libc::syscall(
                libc::SYS_bpf,
                PROG_QUERY,
                &raw mut query,
                size_of::<Query>(),
            )
        };
        (result == 0 && query.prog_cnt > 0).then_some(query.prog_cnt)
    }
}
