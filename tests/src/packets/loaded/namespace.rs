//! The site in a network namespace.

use std::{
    fs,
    io::Write as _,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, ensure};
use nix::{
    mount::{MsFlags, mount},
    sched::{CloneFlags, unshare},
};

use crate::packets::site::{self, Kind, Via};

/// Gives the calling thread an empty BPF filesystem, which goes with it.
///
/// # Errors
/// Privilege is missing, or `/sys/fs/bpf` is no directory.
pub fn enter_bpffs() -> Result<&'static Path> {
    const BPFFS: &str = "/sys/fs/bpf";
    unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
    let none = None::<&str>;
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    mount(none, "/", none, private, none).context("leaving the mounts of others alone")?;
    mount(Some("bpf"), BPFFS, Some("bpf"), MsFlags::empty(), none).context("mounting bpffs")?;
    Ok(Path::new(BPFFS))
}

/// Gives the calling thread a network namespace of its own, with the site in it.
///
/// # Errors
/// Privilege is missing, or the kernel refuses a link, an address or a route.
pub fn enter_site() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
    let mut lines = vec!["link set lo up".to_owned()];
    for interface in site::INTERFACES {
        let (name, index) = (interface.name, interface.index);
        let mac = interface.mac.map(|byte| format!("{byte:02x}")).join(":");
        match interface.kind {
            // A test run always has an Ethernet header.
            Kind::Tunnel => continue,
            Kind::Bridge => lines.push(format!(
                "link add name {name} index {index} address {mac} type bridge"
            )),
            Kind::Ethernet | Kind::Endpoint => {
                lines.push(format!(
                    "link add name {name} index {index} address {mac} type veth peer name {name}-far"
                ));
                lines.push(format!("link set {name}-far up"));
            }
        }
        lines.push(format!("link set {name} up"));
        for (address, length) in interface.addresses {
            let flags = if address.is_ipv6() { " nodad" } else { "" };
            lines.push(format!("addr add {address}/{length} dev {name}{flags}"));
        }
    }
    for (prefix, length, via) in site::ROUTES {
        lines.push(match via {
            Via::Gateway(gateway, index) => format!(
                "route add {prefix}/{length} via {gateway} dev {}",
                site::interface(*index).name
            ),
            Via::Unreachable => format!("route add unreachable {prefix}/{length}"),
        });
    }
    ip_batch(&lines)?;
    let bridges = site::INTERFACES.iter().filter(|it| it.kind == Kind::Bridge);
    for bridge in bridges {
        for family in ["ipv4", "ipv6"] {
            let path = format!("/proc/sys/net/{family}/conf/{}/forwarding", bridge.name);
            fs::write(&path, "1").with_context(|| format!("writing {path}"))?;
        }
    }
    Ok(())
}

/// Runs lines of `ip`, all in one process.
pub(super) fn ip_batch(lines: &[String]) -> Result<()> {
    let mut ip = Command::new("ip")
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("starting ip")?;
    let mut input = ip.stdin.take().context("no input")?;
    input.write_all(lines.join("\n").as_bytes())?;
    drop(input);
    let status = ip.wait()?;
    ensure!(status.success(), "ip -batch: {status}");
    Ok(())
}
