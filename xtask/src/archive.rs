//! Debian's archive without the machine's own apt: packages of any release, unpacked into a
//! directory. Nothing is installed, and nothing of the machine changes.

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

use crate::run;

/// The lists of one choice of sources.
pub(crate) struct Archive {
    directory: PathBuf,
}

impl Archive {
    /// Fetches the lists of `sources` (lines as in `sources.list`, without `deb`) into a
    /// directory.
    pub(crate) fn open(directory: &Path, sources: &[String]) -> Result<Self> {
        for part in ["lists/partial", "cache/archives/partial", "state"] {
            fs::create_dir_all(directory.join(part))?;
        }
        let lines: String = sources
            .iter()
            .map(|source| format!("deb {source}\n"))
            .collect();
        fs::write(directory.join("sources.list"), lines)?;
        let archive = Self {
            directory: directory.to_owned(),
        };
        run::step(
            &format!("lists of {}", sources.join(", ")),
            archive.apt("apt-get").arg("update"),
        )?;
        Ok(archive)
    }

    /// The same for the release that this machine runs.
    pub(crate) fn of_this_release(directory: &Path) -> Result<Self> {
        let codename = fs::read_to_string("/etc/os-release")?
            .lines()
            .find_map(|line| line.strip_prefix("VERSION_CODENAME=").map(str::to_owned))
            .context("/etc/os-release names no release")?;
        Self::open(
            directory,
            &[
                format!("http://deb.debian.org/debian {codename} main"),
                format!("http://deb.debian.org/debian-security {codename}-security main"),
            ],
        )
    }

    /// What a package depends on directly.
    pub(crate) fn dependencies(&self, package: &str) -> Result<Vec<String>> {
        let mut depends = self.apt("apt-cache");
        let depends = run::output(depends.args(["depends", "--important", package]))?;
        let names = depends
            .lines()
            .filter_map(|line| line.trim().strip_prefix("Depends: "));
        Ok(names.map(str::to_owned).collect())
    }

    /// Unpacks packages into `target`.
    pub(crate) fn unpack(&self, packages: &[&str], target: &Path) -> Result<()> {
        let downloads = self.directory.join("downloads");
        fs::create_dir_all(&downloads)?;
        let mut download = self.apt("apt-get");
        download
            .current_dir(&downloads)
            .arg("download")
            .args(packages);
        run::step(
            &format!("downloading {}", packages.join(" ")),
            &mut download,
        )?;
        unpack_all(&downloads, target)
    }

    /// Unpacks a package and whatever of its dependencies this machine does not have.
    pub(crate) fn unpack_with_dependencies(&self, package: &str, target: &Path) -> Result<()> {
        let mut download = self.apt("apt-get");
        download.args([
            "install",
            "--download-only",
            "--yes",
            "--no-install-recommends",
            package,
        ]);
        run::step(
            &format!("downloading {package} and what it needs"),
            &mut download,
        )?;
        unpack_all(&self.directory.join("cache/archives"), target)
    }

    fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        let directory = self.directory.display();
        for option in [
            format!("Dir::Etc::SourceList={directory}/sources.list"),
            "Dir::Etc::SourceParts=-".to_owned(),
            format!("Dir::State={directory}/state"),
            format!("Dir::State::Lists={directory}/lists"),
            // What the machine has need not be downloaded.
            "Dir::State::Status=/var/lib/dpkg/status".to_owned(),
            format!("Dir::Cache={directory}/cache"),
            format!("Dir::Cache::Archives={directory}/cache/archives"),
            // Nothing of apt's own is touched: no lock of its own, no user of its own, and
            // no hook that tidies up its cache.
            "Debug::NoLocking=true".to_owned(),
            "APT::Sandbox::User=root".to_owned(),
            "APT::Keep-Downloaded-Packages=true".to_owned(),
            // A mirror that does not answer costs its users no more than this.
            "Acquire::http::Timeout=60".to_owned(),
            "Acquire::Retries=1".to_owned(),
        ] {
            command.args(["-o", &option]);
        }
        command
    }
}

fn unpack_all(downloads: &Path, target: &Path) -> Result<()> {
    let files = fs::read_dir(downloads)?.collect::<Result<Vec<_>, _>>()?;
    let packages: Vec<_> = files
        .iter()
        .map(|file| file.path())
        .filter(|path| path.extension().is_some_and(|it| it == "deb"))
        .collect();
    ensure!(
        !packages.is_empty(),
        "apt has left no package in {}",
        downloads.display()
    );
    fs::create_dir_all(target)?;
    for package in packages {
        run::output(Command::new("dpkg").arg("-x").arg(&package).arg(target))?;
        fs::remove_file(&package)
            .with_context(|| format!("cannot remove {}", package.display()))?;
    }
    Ok(())
}
