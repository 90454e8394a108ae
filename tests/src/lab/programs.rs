//! Where the programs are that the lab starts.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use anyhow::{Result, bail};

/// Programs of this workspace.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The lab's helper program.
    pub peer: PathBuf,
    /// The program under test.
    pub nucnet: PathBuf,
}

static CHOSEN: OnceLock<Programs> = OnceLock::new();

/// Chooses the programs of every lab of this process. Without that, they are looked for.
/// The first choice stays.
pub fn use_programs(programs: Programs) {
    let _ = CHOSEN.set(programs);
}

/// The lab's helper program: as chosen, or beside the running program.
///
/// # Errors
/// It is not there.
pub fn peer_program() -> Result<PathBuf> {
    if let Some(programs) = CHOSEN.get() {
        return Ok(programs.peer.clone());
    }
    let own = std::env::current_exe()?;
    // Tests are one directory below.
    let mut paths = above(&own, 2).map(|directory| directory.join("nucnet-peer"));
    match paths.find(|path| path.is_file()) {
        Some(path) => Ok(path),
        None => bail!(
            "no nucnet-peer near {}: build it with `cargo build -p nucnet-tests`",
            own.display()
        ),
    }
}

/// `nucnet-ctl`: as chosen, or as `NUCNET_CTL` says, or the newest one built in this target
/// directory.
pub fn nucnet_program() -> Option<PathBuf> {
    if let Some(programs) = CHOSEN.get() {
        return Some(programs.nucnet.clone());
    }
    if let Some(path) = std::env::var_os("NUCNET_CTL") {
        return Some(path.into());
    }
    let own = std::env::current_exe().ok()?;
    above(&own, 3)
        .flat_map(|directory| ["", "release", "debug"].map(|profile| directory.join(profile)))
        .map(|directory| directory.join("nucnet-ctl"))
        .filter_map(|path| Some((path.metadata().ok()?.modified().ok()?, path)))
        .max()
        .map(|(_, path)| path)
}

/// What boots a microVM, with further arguments for QEMU: as `NUCNET_MICROVM` says, or as
/// `cargo xtask test` has left it in this target directory.
pub fn microvm_program() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os("NUCNET_MICROVM") {
        return Some(path.into());
    }
    let own = std::env::current_exe().ok()?;
    let mut paths = above(&own, 3).map(|directory| directory.join("vm/microvm"));
    paths.find(|path| path.is_file())
}

/// The directories that a file is in, from the nearest on.
fn above(path: &Path, count: usize) -> impl Iterator<Item = &Path> {
    path.ancestors().skip(1).take(count)
}
