//! The guest's whole filesystem, as the kernel unpacks it from a cpio archive.

use std::{
    collections::BTreeSet,
    fs,
    fs::File,
    io::{BufWriter, Write as _},
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result};

use super::{
    Programs, guest,
    kernel::{self, Kernel},
};
use crate::{apt, run};

/// Programs of this machine that the tests run in the guest, where it has them.
const TOOLS: [&str; 21] = [
    "bpftool",
    "bridge",
    "cat",
    "curl",
    "ethtool",
    "ip",
    "ip6tables",
    "ip6tables-restore",
    "ip6tables-save",
    "iptables",
    "iptables-restore",
    "iptables-save",
    "mount",
    "ping",
    "setpriv",
    "sh",
    "sleep",
    "tc",
    "touch",
    "traceroute",
    "true",
];

/// Plugins of iptables, which it opens by name.
const PLUGINS: &str = "/usr/lib/x86_64-linux-gnu/xtables";

/// Writes the archive.
pub(super) fn write(path: &Path, kernel: &Kernel, programs: &Programs) -> Result<()> {
    let mut image = Image::create(path)?;
    // By the process: a build meanwhile may have replaced the file.
    let own = format!("/proc/{}/exe", std::process::id());
    image.own_program(Path::new(&own), Path::new("/init"))?;
    for (name, program) in &programs.helpers {
        image.own_program(program, &Path::new(guest::OWN_PROGRAMS).join(name))?;
    }
    for (name, program, filters) in &programs.tiers {
        image.own_program(program, &Path::new(guest::TESTS).join(name))?;
        let path = Path::new(guest::FILTERS).join(name);
        image.add(&path, 0o100_644, filters.join("\n").as_bytes())?;
    }
    for tool in TOOLS {
        if let Some(program) = apt::find_program(tool) {
            image.program(&program, &Path::new(guest::PROGRAMS).join(tool))?;
        }
    }
    image.symlink("/bin", "usr/bin")?;
    image.symlink("/sbin", "usr/bin")?;
    if let Ok(plugins) = fs::read_dir(PLUGINS) {
        for plugin in plugins.flatten() {
            image.file(&plugin.path(), &plugin.path())?;
        }
    }
    image.modules(
        kernel,
        kernel::MODULES.into_iter().chain(kernel::EXTENSIONS),
    )?;
    image.add(Path::new("/etc/hostname"), 0o100_644, b"guest\n")?;
    for directory in guest::MOUNTS
        .map(|mount| mount.target)
        .into_iter()
        .chain(["/root"])
    {
        image.directory(Path::new(directory))?;
    }
    image.finish()
}

/// An archive being written.
pub(super) struct Image<'a> {
    path: &'a Path,
    file: BufWriter<File>,
    present: BTreeSet<PathBuf>,
}

impl<'a> Image<'a> {
    /// Begins one.
    pub(super) fn create(path: &'a Path) -> Result<Self> {
        Ok(Self {
            path,
            file: BufWriter::new(File::create(path)?),
            present: BTreeSet::new(),
        })
    }

    /// Modules, named so that they sort as they must be loaded.
    pub(super) fn modules<'b>(
        &mut self,
        kernel: &Kernel,
        names: impl IntoIterator<Item = &'b str>,
    ) -> Result<()> {
        for (number, (name, module)) in kernel.modules(names)?.iter().enumerate() {
            let path = Path::new(guest::MODULES).join(format!("{number:03}-{name}"));
            self.add(&path, 0o100_644, module)?;
        }
        Ok(())
    }

    /// A program that we have built: without names and debug information, most of its size.
    fn own_program(&mut self, from: &Path, to: &Path) -> Result<()> {
        let stripped = self.path.with_extension("stripped");
        let mut strip = Command::new("strip");
        run::output(strip.arg("--strip-all").arg("-o").arg(&stripped).arg(from))?;
        self.program(&stripped, to)?;
        Ok(fs::remove_file(&stripped)?)
    }

    /// A program, under another name, with its libraries.
    fn program(&mut self, from: &Path, to: &Path) -> Result<()> {
        self.file(from, to)?;
        // Fails for what is linked statically, which needs nothing more.
        let output = Command::new("ldd")
            .arg(from)
            .output()
            .context("cannot run ldd")?;
        let libraries = String::from_utf8_lossy(&output.stdout).into_owned();
        for library in libraries
            .split_whitespace()
            .filter(|word| word.starts_with('/'))
        {
            self.file(Path::new(library), Path::new(library))?;
        }
        Ok(())
    }

    pub(super) fn file(&mut self, from: &Path, to: &Path) -> Result<()> {
        if self.present.contains(to) {
            return Ok(());
        }
        let content = fs::read(from).with_context(|| format!("cannot read {}", from.display()))?;
        self.add(to, 0o100_755, &content)
    }

    pub(super) fn symlink(&mut self, path: &str, target: &str) -> Result<()> {
        self.add(Path::new(path), 0o120_777, target.as_bytes())
    }

    pub(super) fn directory(&mut self, path: &Path) -> Result<()> {
        self.add(path, 0o040_755, &[])
    }

    pub(super) fn add(&mut self, path: &Path, mode: u32, content: &[u8]) -> Result<()> {
        if let Some(parent) = path.parent().filter(|parent| *parent != Path::new("/")) {
            self.directory(parent)?;
        }
        if !self.present.insert(path.to_owned()) {
            return Ok(());
        }
        let name = path
            .strip_prefix("/")?
            .to_str()
            .context("a path that is no text")?;
        let size = u32::try_from(content.len())?;
        let mut entry = cpio::newc::Builder::new(name)
            .ino(u32::try_from(self.present.len())?)
            .mode(mode)
            .write(&mut self.file, size);
        entry.write_all(content)?;
        entry.finish()?;
        Ok(())
    }

    pub(super) fn finish(self) -> Result<()> {
        cpio::newc::trailer(self.file)?.flush()?;
        Ok(())
    }
}
