//! Where things are.

use std::{
    env,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};
use cargo_metadata::{Metadata, MetadataCommand};
use nucnet_tests::lab::{Programs, use_programs};

use crate::run;

/// This checkout and its target directory.
pub(crate) struct Workspace {
    /// Top of the checkout.
    pub(crate) root: PathBuf,
    /// Cargo's target directory.
    pub(crate) target: PathBuf,
    /// What cargo says about the workspace's own crates.
    pub(crate) metadata: Metadata,
}

/// Cargo's own profiles, as far as nucnet uses them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Profile {
    /// `target/debug`.
    Debug,
    /// `target/release`.
    Release,
}

impl Workspace {
    /// Finds the checkout that this program was built from.
    pub(crate) fn locate() -> Result<Self> {
        let manifest = Path::new(env!("CARGO_MANIFEST_DIR")).with_file_name("Cargo.toml");
        let metadata = MetadataCommand::new()
            .cargo_path(cargo())
            .manifest_path(&manifest)
            .no_deps()
            .exec()
            .with_context(|| format!("cannot read {}", manifest.display()))?;
        Ok(Self {
            root: metadata.workspace_root.clone().into(),
            target: metadata.target_directory.clone().into(),
            metadata,
        })
    }

    /// A cargo command at the top of the checkout.
    pub(crate) fn cargo(&self, verb: &str) -> Command {
        let mut command = Command::new(cargo());
        command.current_dir(&self.root).arg(verb);
        command
    }

    /// Builds `nucnet-ctl` and returns its path. It embeds `object`, by default the
    /// committed one.
    pub(crate) fn build_ctl(&self, profile: Profile, object: Option<&Path>) -> Result<PathBuf> {
        let mut command = self.cargo("build");
        command.args(["--locked", "--package", "nucnet-ctl", "--bin", "nucnet-ctl"]);
        if profile == Profile::Release {
            command.arg("--release");
        }
        if let Some(object) = object {
            command.env(OBJECT_VARIABLE, object);
        }
        run::step("building nucnet-ctl", &mut command)?;
        let directory = match profile {
            Profile::Debug => "debug",
            Profile::Release => "release",
        };
        Ok(self.target.join(directory).join("nucnet-ctl"))
    }

    /// Builds what a lab runs, optimised, and has every lab of this process run it.
    pub(crate) fn build_for_lab(&self) -> Result<Programs> {
        let nucnet = self.build_ctl(Profile::Release, None)?;
        let mut peer = self.cargo("build");
        peer.args([
            "--locked",
            "--release",
            "--package",
            "nucnet-tests",
            "--bin",
            "nucnet-peer",
        ]);
        run::step("building the clients and servers", &mut peer)?;
        let programs = Programs {
            peer: nucnet.with_file_name("nucnet-peer"),
            nucnet,
        };
        use_programs(programs.clone());
        Ok(programs)
    }
}

/// Names, for the build script of `nucnet-ctl`, a BPF object to embed in place of the
/// committed one.
pub(crate) const OBJECT_VARIABLE: &str = "NUCNET_BPF_OBJECT";

/// The cargo that runs us.
pub(crate) fn cargo() -> PathBuf {
    env::var_os("CARGO").map_or_else(|| PathBuf::from("cargo"), PathBuf::from)
}
