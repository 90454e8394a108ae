//! What this kernel and this host are like, as far as `doctor` wants to know. Nothing is
//! changed; what cannot be looked at is absent.

use std::{fs, io, path::Path, thread, time::Duration};

use aya::util::KernelVersion;
use nix::{
    errno::Errno,
    sched::{CloneFlags, unshare},
};

use super::{
    helper::Helper,
    netlink::{self, BridgeSpec, Netlink, Port, VethSpec},
};
use crate::model::Mac;

/// The first line of a file of the kernel's; none: it is not there, or not readable.
pub fn line(path: &str) -> Option<String> {
    let text = fs::read_to_string(path).ok()?;
    Some(text.lines().next().unwrap_or_default().trim().to_owned())
}

/// Which of these names the running kernel's type information (BTF) has: some megabytes, for
/// everybody to read. None: this kernel has none.
pub fn known_names<const N: usize>(names: [&str; N]) -> Option<[bool; N]> {
    let types = fs::read("/sys/kernel/btf/vmlinux").ok()?;
    let mut known = [false; N];
    // Its strings end with a zero byte each.
    for text in types.split(|byte| *byte == 0).filter(|text| text.len() > 8) {
        if let Some(index) = names.iter().position(|name| name.as_bytes() == text) {
            known[index] = true;
        }
    }
    Some(known)
}

/// Whether the running kernel says of itself that it is that old, or newer.
pub fn is_kernel_at_least((major, minor): (u8, u8)) -> bool {
    KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(major, minor, 0))
}

/// Why something could not be tried.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No namespace to try it in.
    #[error("cannot make a network namespace")]
    Namespace(#[source] Errno),
    /// No thread to try it on.
    #[error("cannot start a thread")]
    Thread(#[source] io::Error),
    /// The kernel refused.
    #[error(transparent)]
    Netlink(#[from] netlink::Error),
}

/// Whether a port of a bridge can be locked, found by making both in a namespace of their own,
/// which goes again. It fails where interfaces of these kinds cannot be made.
pub fn bridge_ports_lock() -> Result<bool, Error> {
    thread::scope(|scope| {
        thread::Builder::new()
            .name("probe".to_owned())
            .spawn_scoped(scope, try_bridge_port)
            .map_err(Error::Thread)?
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn try_bridge_port() -> Result<bool, Error> {
    unshare(CloneFlags::CLONE_NEWNET).map_err(Error::Namespace)?;
    let netlink = Netlink::open()?;
    let alias = "nucnet:probe";
    let (bridge, _) = netlink.ensure_bridge(&BridgeSpec {
        name: "bridge",
        mac: Mac::local([1; 6]).octets(),
        mtu: 1500,
        alias,
    })?;
    let veth = netlink.create_veth(&VethSpec {
        name: "host",
        mac: Mac::local([2; 6]).octets(),
        alias,
        port: Some((bridge, Port::ENDPOINT)),
        netns: netlink.netns(),
        peer_name: "peer",
        peer_mac: Mac::local([3; 6]).octets(),
        mtu: 1500,
        tx_queue_len: 0,
        index: None,
    })?;
    Ok(veth.port.is_some_and(|port| port.locked == Some(true)))
}

/// What a firewall has, as its own tool lists it: without making anything.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rules {
    /// The tool.
    pub tool: &'static str,
    /// What it said; none: it is there, and could not be asked.
    pub text: Option<String>,
}

/// The rules of the host's firewalls, of each tool that is installed.
pub fn firewalls() -> Vec<Rules> {
    /// For as many rules as there may be.
    const PATIENCE: Duration = Duration::from_secs(20);
    // Without a table's name, `iptables-save` shows those that exist, and loads none.
    [
        ("iptables-save", &[][..]),
        ("ip6tables-save", &[]),
        ("nft", &["list", "chains"]),
    ]
    .into_iter()
    .filter_map(|(tool, arguments)| {
        let said = Helper::find(tool)
            .transpose()?
            .and_then(|helper| helper.run(arguments, "", PATIENCE));
        let text = said
            .inspect_err(|error| {
                tracing::warn!(error = error as &dyn std::error::Error, "cannot ask {tool}");
            })
            .ok();
        Some(Rules { tool, text })
    })
    .collect()
}

/// A service that configures interfaces of its own accord.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manager {
    /// NetworkManager.
    NetworkManager,
    /// systemd-networkd.
    Networkd,
}

/// The managers of interfaces that run, with their configuration.
pub fn managers() -> Vec<(Manager, String)> {
    let mut running = Vec::new();
    if Path::new("/run/NetworkManager/devices").exists() {
        let directories = [
            "/etc/NetworkManager/conf.d",
            "/run/NetworkManager/conf.d",
            "/usr/lib/NetworkManager/conf.d",
        ];
        let mut text = texts(&directories, "conf");
        text += &fs::read_to_string("/etc/NetworkManager/NetworkManager.conf").unwrap_or_default();
        running.push((Manager::NetworkManager, text));
    }
    if Path::new("/run/systemd/netif/state").exists() {
        let directories = [
            "/etc/systemd/network",
            "/run/systemd/network",
            "/usr/lib/systemd/network",
        ];
        running.push((Manager::Networkd, texts(&directories, "network")));
    }
    running
}

/// All files of that kind in some directories.
fn texts(directories: &[&str], extension: &str) -> String {
    let files = directories
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|found| found == extension));
    let contents = files.filter_map(|path| fs::read_to_string(path).ok());
    contents.collect::<Vec<_>>().join("\n")
}
