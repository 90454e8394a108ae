//! Debian packages: installed where we may, named with the command to type elsewhere.

use std::{
    env, fs,
    io::{IsTerminal as _, stderr, stdin},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Result, bail};

use crate::run;

/// Whether the user has agreed to installations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Consent {
    /// `--yes`.
    Given,
    /// Ask on a terminal; without one, go ahead.
    Ask,
}

/// A program and the Debian package that has it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Tool {
    /// Name of the program.
    pub(crate) program: &'static str,
    /// Name of the package.
    pub(crate) package: &'static str,
}

/// Every program that nucnet's commands run and that a machine may lack.
#[rustfmt::skip]
pub(crate) mod tool {
    use super::Tool;

    pub(crate) const BPFTOOL: Tool = Tool { program: "bpftool", package: "bpftool" };
    pub(crate) const CURL: Tool = Tool { program: "curl", package: "curl" };
    pub(crate) const DIG: Tool = Tool { program: "dig", package: "bind9-dnsutils" };
    pub(crate) const ETHTOOL: Tool = Tool { program: "ethtool", package: "ethtool" };
    pub(crate) const IP: Tool = Tool { program: "ip", package: "iproute2" };
    pub(crate) const IPTABLES: Tool = Tool { program: "iptables", package: "iptables" };
    pub(crate) const IPERF3: Tool = Tool { program: "iperf3", package: "iperf3" };
    pub(crate) const NFT: Tool = Tool { program: "nft", package: "nftables" };
    pub(crate) const PING: Tool = Tool { program: "ping", package: "iputils-ping" };
    pub(crate) const STRIP: Tool = Tool { program: "strip", package: "binutils" };
    pub(crate) const TRACEROUTE: Tool = Tool { program: "traceroute", package: "traceroute" };
    pub(crate) const XZ: Tool = Tool { program: "xz", package: "xz-utils" };
}

/// The plugins of CNI, which are in no `PATH`.
pub(crate) const CNI_PLUGINS: &str = "containernetworking-plugins";

/// Sees to it that programs are there. `purpose` completes "needed for ...".
pub(crate) fn ensure_tools(tools: &[Tool], purpose: &str, consent: Consent) -> Result<()> {
    let missing = tools
        .iter()
        .filter(|tool| find_program(tool.program).is_none());
    install(
        &missing.map(|tool| tool.package).collect::<Vec<_>>(),
        purpose,
        consent,
    )
}

/// Sees to it that packages are there. `purpose` completes "needed for ...".
pub(crate) fn ensure_packages(packages: &[&str], purpose: &str, consent: Consent) -> Result<()> {
    let missing = packages.iter().filter(|package| !is_installed(package));
    install(&missing.copied().collect::<Vec<_>>(), purpose, consent)
}

/// Whether we are on Debian or a relative of it.
pub(crate) fn is_debian() -> bool {
    find_program("apt-get").is_some() && find_program("dpkg-query").is_some()
}

/// Whether we may install packages.
pub(crate) fn is_root() -> bool {
    nix::unistd::geteuid().is_root()
}

/// Adds the directories of administrators' programs to `PATH`, for us and what we run: `su`
/// keeps that of a user, who does not have them there.
///
/// # Safety
/// No other thread runs.
pub(crate) unsafe fn complete_path() {
    let path = env::var_os("PATH").unwrap_or_default();
    let directories = env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    if let Ok(path) = env::join_paths(directories) {
        // SAFETY: the caller's promise.
        unsafe { env::set_var("PATH", path) };
    }
}

/// Where a program is.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .map(|directory| directory.join(name))
        .find(|path| is_program(path))
}

fn is_program(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt as _;
    fs::metadata(path).is_ok_and(|it| it.is_file() && it.permissions().mode() & 0o111 != 0)
}

fn is_installed(package: &str) -> bool {
    let output = Command::new("dpkg-query")
        .args(["--show", "--showformat=${db:Status-Status}\n", package])
        .stderr(Stdio::null())
        .output();
    output.is_ok_and(|it| {
        it.stdout
            .split(|byte| *byte == b'\n')
            .any(|line| line == b"installed")
    })
}

fn install(packages: &[&str], purpose: &str, consent: Consent) -> Result<()> {
    if packages.is_empty() {
        return Ok(());
    }
    let names = packages.join(" ");
    if !is_debian() {
        bail!("needed for {purpose}: what Debian packages as {names}");
    }
    if !is_root() {
        bail!(
            "needed for {purpose}:\n    sudo apt-get update\n    \
             sudo apt-get install --no-install-recommends {names}"
        );
    }
    if consent == Consent::Ask && stdin().is_terminal() && stderr().is_terminal() {
        eprint!("Needed for {purpose}: {names}. Install by apt? [Y/n] ");
        let mut answer = String::new();
        stdin().read_line(&mut answer)?;
        if !matches!(answer.trim(), "" | "y" | "Y" | "yes") {
            bail!("{names}: needed for {purpose}");
        }
    }
    run::step("apt-get update", apt_get().arg("update"))?;
    // `--no-remove`: what we want never costs the machine what it has.
    run::step(
        &format!("installing {names}"),
        apt_get()
            .args(["install", "--yes", "--no-install-recommends", "--no-remove"])
            .args(packages),
    )
}

/// `apt-get` that asks nothing and waits for another one to finish.
pub(crate) fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command
        .env("DEBIAN_FRONTEND", "noninteractive")
        .args(["-o", "DPkg::Lock::Timeout=300"]);
    command
}
