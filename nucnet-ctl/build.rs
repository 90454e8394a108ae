//! Says which BPF object `nucnet-ctl` embeds: the committed one, unless the environment
//! names another (`cargo xtask build` and `cargo xtask test` do after a change of the
//! programs).
//!
//! For the crate: `env!("NUCNET_BPF_OBJECT")`, its absolute path, and
//! `env!("NUCNET_BPF_SHA256")`, its hash in hexadecimal.

use std::{env, fs, path::PathBuf};

use sha2::{Digest as _, Sha256};

const VARIABLE: &str = "NUCNET_BPF_OBJECT";

fn main() {
    // Asked for when this runs: a checkout that was moved is not built anew.
    let package = || env::var_os("CARGO_MANIFEST_DIR").expect("cargo says where the package is");
    let object = env::var_os(VARIABLE).map_or_else(
        || PathBuf::from(package()).join("bpf/nucnet.o"),
        PathBuf::from,
    );
    let bytes = fs::read(&object)
        .unwrap_or_else(|error| panic!("cannot read the BPF object {}: {error}", object.display()));
    let hash: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    println!("cargo::rerun-if-env-changed={VARIABLE}");
    println!("cargo::rerun-if-changed={}", object.display());
    println!("cargo::rustc-env={VARIABLE}={}", object.display());
    println!("cargo::rustc-env=NUCNET_BPF_SHA256={hash}");
}
