//! The eBPF toolchain: a Rust compiler with a `core` for BPF, and `bpf-linker`.
//!
//! Compilers, in the order in which they are taken:
//! 1. a nightly of rustup with the component `rust-src`, which builds `core` itself;
//! 2. Debian's `rustc-web`, for which `libstd-rust-web-dev-bpf` is a `core` ready made.
//!
//! `bpf-linker` is built against the compiler's own LLVM, so that it reads its bitcode, once,
//! into the target directory. Of LLVM it needs the shared library and nothing else.

use std::{
    env, fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context as _, Result, bail};

use crate::{
    apt::{self, Consent},
    run,
    workspace::{self, Workspace},
};

/// The target that the programs are compiled for: BPF, little endian.
pub(crate) const TARGET: &str = "bpfel-unknown-none";

/// Version of `bpf-linker`; exact, because the object's bytes depend on it.
pub(crate) const LINKER_VERSION: &str = "0.13.0";

/// LLVM versions that this `bpf-linker` has a feature for.
const LINKER_LLVM: [&str; 3] = ["21", "22", "23"];

/// Debian's compiler.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";

/// What Debian packages it as.
const DEBIAN_PACKAGES: [&str; 2] = ["rustc-web", "libstd-rust-web-dev-bpf"];

/// Everything that compiles a BPF object.
pub(crate) struct Toolchain {
    compiler: Compiler,
    linker: PathBuf,
}

/// A compiler that can target BPF.
struct Compiler {
    rustc: PathBuf,
    cargo: PathBuf,
    origin: Origin,
    sysroot: PathBuf,
    /// As `rustc --version` says.
    version: String,
    /// Version of LLVM, as in `22.1.8`.
    llvm: String,
    libllvm: PathBuf,
}

enum Origin {
    /// A toolchain of rustup, by name.
    Rustup(String),
    Debian,
}

impl Toolchain {
    /// Finds the toolchain; installs and builds what is missing of it.
    pub(crate) fn ensure(workspace: &Workspace, consent: Consent) -> Result<Self> {
        let compiler = match Compiler::find() {
            Some(compiler) => compiler,
            None => Compiler::install(consent)?,
        };
        let linker = build_linker(workspace, &compiler)?;
        Ok(Self { compiler, linker })
    }

    /// `rustc --version`.
    pub(crate) fn rustc_version(&self) -> &str {
        &self.compiler.version
    }

    /// Version of LLVM, as in `22.1.8`.
    pub(crate) fn llvm_version(&self) -> &str {
        &self.compiler.llvm
    }

    /// `cargo VERB` for the BPF target, release profile, in a target directory of its own.
    /// No path of this machine gets into what it compiles.
    pub(crate) fn cargo(&self, workspace: &Workspace, verb: &str) -> Command {
        let mut command = Command::new(&self.compiler.cargo);
        command.arg(verb);
        self.target_bpf(workspace, &mut command);
        command
    }

    /// `cargo clippy` for the BPF target, of the same version as the compiler.
    pub(crate) fn clippy(&self, workspace: &Workspace, consent: Consent) -> Result<Command> {
        let clippy = self.compiler.rustc.with_file_name("cargo-clippy");
        if !clippy.exists() {
            match &self.compiler.origin {
                Origin::Debian => {
                    apt::ensure_packages(
                        &["rust-web-clippy"],
                        "linting the BPF programs",
                        consent,
                    )?;
                }
                Origin::Rustup(name) => {
                    bail!("clippy is missing:\n    rustup component add clippy --toolchain {name}")
                }
            }
        }
        let mut command = Command::new(clippy);
        command.env("CARGO", &self.compiler.cargo).arg("clippy");
        self.target_bpf(workspace, &mut command);
        Ok(command)
    }

    fn target_bpf(&self, workspace: &Workspace, command: &mut Command) {
        // What a user has set for other builds would change the object's bytes.
        for (name, _) in env::vars_os() {
            let name = name.to_string_lossy();
            let foreign = [
                "CARGO_BUILD_",
                "CARGO_PROFILE_",
                "CARGO_TARGET_",
                "RUSTC",
                "RUSTFLAGS",
            ];
            if foreign.iter().any(|prefix| name.starts_with(prefix)) {
                command.env_remove(&*name);
            }
        }
        let cargo_home = env::var_os("CARGO_HOME").map_or_else(
            || env::home_dir().unwrap_or_default().join(".cargo"),
            PathBuf::from,
        );
        // DWARF is what BTF is made of; the object loses it afterwards.
        let flags = [
            "-Cdebuginfo=2".to_owned(),
            "-Clink-arg=--btf".to_owned(),
            // Else every copy of a struct becomes a call to a global `memmove`, which kernels
            // refuse under a spin lock and libbpf refuses altogether.
            "-Clink-arg=--disable-expand-memcpy-in-order".to_owned(),
            // Laid out for speed, a loop may be entered from above by its own end, which
            // older kernels (6.1) take for a loop without end (`object::verify` looks for it).
            "-Clink-arg=--llvm-args=-disable-block-placement".to_owned(),
            format!("-Clinker={}", self.linker.display()),
            format!(
                "--remap-path-prefix={}=/rust",
                self.compiler.sysroot.display()
            ),
            format!("--remap-path-prefix={}=/nucnet", workspace.root.display()),
            format!("--remap-path-prefix={}=/cargo", cargo_home.display()),
        ];
        command
            .current_dir(&workspace.root)
            .env("RUSTC", &self.compiler.rustc)
            // aya-ebpf's inline assembly is unstable (`asm_experimental_arch`).
            .env("RUSTC_BOOTSTRAP", "1")
            .env("CARGO_ENCODED_RUSTFLAGS", flags.join("\x1f"))
            .env("CARGO_TARGET_DIR", workspace.target.join("bpf-build"))
            .args([
                "--release",
                "--locked",
                "--package",
                "nucnet-ebpf",
                "--target",
                TARGET,
            ]);
        if let Origin::Rustup(_) = self.compiler.origin {
            command.args(["-Z", "build-std=core"]);
        }
    }
}

impl Compiler {
    fn find() -> Option<Self> {
        nightlies()
            .into_iter()
            .find_map(Self::rustup)
            .or_else(Self::debian)
    }

    fn install(consent: Consent) -> Result<Self> {
        if apt::is_debian() && apt::is_root() {
            apt::ensure_packages(&DEBIAN_PACKAGES, "compiling the BPF programs", consent)?;
            if let Some(compiler) = Self::debian() {
                return Ok(compiler);
            }
        }
        bail!(
            "no Rust compiler with a core library for BPF. Either of these mends it:\n    \
             rustup toolchain install nightly --component rust-src --component clippy\n    \
             sudo apt-get install --no-install-recommends {}      (Debian)\n\
             `cargo build --release` alone needs neither: it takes the committed object.",
            DEBIAN_PACKAGES.join(" ")
        )
    }

    fn rustup(name: String) -> Option<Self> {
        let mut which = Command::new("rustup");
        which.args(["which", "--toolchain", &name, "rustc"]);
        let rustc = PathBuf::from(run::output(&mut which).ok()?.trim());
        let sysroot = rustc.parent()?.parent()?.to_owned();
        if !sysroot
            .join("lib/rustlib/src/rust/library/core/Cargo.toml")
            .exists()
        {
            return None;
        }
        let (version, llvm) = versions(&rustc)?;
        // A file of this name without a number is a linker script.
        let libllvm = file_in(&sysroot.join("lib"), "libLLVM.so.")?;
        let cargo = rustc.with_file_name("cargo");
        Some(Self {
            rustc,
            cargo,
            origin: Origin::Rustup(name),
            sysroot,
            version,
            llvm,
            libllvm,
        })
    }

    fn debian() -> Option<Self> {
        let rustc = PathBuf::from(DEBIAN_RUSTC);
        let (version, llvm) = versions(&rustc)?;
        let mut print = Command::new(&rustc);
        let libraries =
            run::output(print.args(["--print=target-libdir", "--target", TARGET])).ok()?;
        file_in(Path::new(libraries.trim()), "libcore-")?;
        let mut print = Command::new(&rustc);
        let sysroot = PathBuf::from(run::output(print.arg("--print=sysroot")).ok()?.trim());
        let mut release = llvm.splitn(3, '.');
        let name = format!("libLLVM.so.{}.{}", release.next()?, release.next()?);
        let libllvm = fs::read_dir("/usr/lib")
            .ok()?
            .flatten()
            .map(|directory| directory.path().join(&name))
            .find(|path| path.exists())?;
        let cargo = workspace::cargo();
        Some(Self {
            rustc,
            cargo,
            origin: Origin::Debian,
            sysroot,
            version,
            llvm,
            libllvm,
        })
    }
}

/// Nightlies of rustup, by name.
fn nightlies() -> Vec<String> {
    let mut list = Command::new("rustup");
    let Ok(output) = list
        .args(["toolchain", "list"])
        .stderr(Stdio::null())
        .output()
    else {
        return Vec::new();
    };
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| name.starts_with("nightly"))
        .map(str::to_owned)
        .collect()
}

/// Version of a compiler and of its LLVM; none if `bpf-linker` does not know that LLVM.
fn versions(rustc: &Path) -> Option<(String, String)> {
    if !rustc.exists() {
        return None;
    }
    let output = run::output(Command::new(rustc).arg("-vV")).ok()?;
    let llvm = output
        .lines()
        .find_map(|line| line.strip_prefix("LLVM version: "))?;
    let supported = LINKER_LLVM.contains(&llvm.split('.').next()?);
    supported.then(|| {
        (
            output.lines().next().unwrap_or_default().to_owned(),
            llvm.to_owned(),
        )
    })
}

fn file_in(directory: &Path, prefix: &str) -> Option<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .ok()?
        .flatten()
        .filter(|file| file.file_name().to_string_lossy().starts_with(prefix))
        .map(|file| file.path())
        .collect();
    files.sort();
    files.into_iter().next()
}

/// Builds `bpf-linker` unless it is there and runs.
fn build_linker(workspace: &Workspace, compiler: &Compiler) -> Result<PathBuf> {
    let libllvm = compiler
        .libllvm
        .file_name()
        .context("libLLVM has no name")?;
    let home = workspace.target.join("toolchain").join(format!(
        "bpf-linker-{LINKER_VERSION}-{}",
        libllvm.to_string_lossy()
    ));
    fs::create_dir_all(&home)?;
    // Two of us at once would build it twice into one place.
    let lock = fs::File::create(home.join("lock"))?;
    lock.lock()?;

    let linker = home.join("bin/bpf-linker");
    // It is found under the name that the linker asks for and under that in the program.
    let libraries = home.join("llvm/lib");
    fs::create_dir_all(&libraries)?;
    for name in [libllvm, "libLLVM.so".as_ref()] {
        let link = libraries.join(name);
        if fs::read_link(&link).ok().as_ref() != Some(&compiler.libllvm) {
            let _ = fs::remove_file(&link);
            symlink(&compiler.libllvm, &link)?;
        }
    }
    let runs = Command::new(&linker)
        .arg("--version")
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success());
    if runs {
        return Ok(linker);
    }
    let major = compiler.llvm.split('.').next().unwrap_or_default();
    let mut install = Command::new(workspace::cargo());
    install
        .current_dir(&home)
        .env_remove("RUSTFLAGS")
        .env_remove("CARGO_ENCODED_RUSTFLAGS")
        .env("CARGO_TARGET_DIR", home.join("build"))
        .env("CARGO_PROFILE_RELEASE_DEBUG", "0")
        .env("CARGO_PROFILE_RELEASE_STRIP", "symbols")
        .env("LLVM_PREFIX", home.join("llvm"))
        .args([
            "install",
            "bpf-linker",
            "--version",
            LINKER_VERSION,
            "--locked",
            "--force",
        ])
        .args([
            "--no-default-features",
            "--features",
            &format!("llvm-{major}"),
        ])
        .arg("--root")
        .arg(&home);
    run::step(
        &format!("building bpf-linker {LINKER_VERSION} (once, about a minute)"),
        &mut install,
    )?;
    fs::remove_dir_all(home.join("build"))?;
    Ok(linker)
}
