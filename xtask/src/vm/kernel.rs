//! Debian's kernels, with the modules that a guest needs.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, bail, ensure};
use object::{Object as _, ObjectSection as _};

use crate::archive::Archive;

/// A kernel that can be asked for.
#[derive(Debug)]
pub(super) struct Release {
    /// As it is asked for.
    pub(super) name: &'static str,
    /// The release of Debian whose kernel it is.
    codename: &'static str,
    /// Whether everything must pass on it.
    pub(super) must_pass: bool,
}

const RELEASES: [Release; 3] = [
    Release {
        name: "5.10",
        codename: "bullseye",
        must_pass: false,
    },
    Release {
        name: "6.1",
        codename: "bookworm",
        must_pass: true,
    },
    Release {
        name: "6.12",
        codename: "trixie",
        must_pass: true,
    },
];

/// Modules that the tests use, but for those that these depend on.
pub(super) const MODULES: [&str; 10] = [
    "veth",
    "bridge",
    "tun",
    "dummy",
    "sch_ingress",
    "cls_bpf",
    "act_bpf",
    "nf_tables",
    "nft_compat",
    "nft_chain_nat",
];

/// Modules of netfilter that rules name and conversations with it need, loaded where a release has
/// them: no program in the guest loads any.
pub(super) const EXTENSIONS: [&str; 23] = [
    "ip6_tables",
    "ip6t_REJECT",
    "ip_tables",
    "ipt_REJECT",
    "nf_conntrack_netlink",
    "nfnetlink_log",
    "nft_counter",
    "nft_ct",
    "nft_limit",
    "nft_log",
    "nft_masq",
    "nft_nat",
    "xt_MASQUERADE",
    "xt_NFLOG",
    "xt_addrtype",
    "xt_comment",
    "xt_conntrack",
    "xt_limit",
    "xt_mac",
    "xt_mark",
    "xt_multiport",
    "xt_nat",
    "xt_tcpudp",
];

impl Release {
    pub(super) fn named(name: &str) -> Result<&'static Self> {
        match RELEASES.iter().find(|release| release.name == name) {
            Some(release) => Ok(release),
            None => {
                let names = RELEASES.map(|release| release.name);
                bail!("no kernel {name}: there are {}", names.join(", "))
            }
        }
    }
}

/// A kernel in the cache.
pub(super) struct Kernel {
    /// As `uname -r` says.
    pub(super) version: String,
    /// What QEMU boots.
    pub(super) image: PathBuf,
    /// Every module of it, by name.
    modules: HashMap<String, PathBuf>,
}

impl Kernel {
    /// Fetches a kernel unless the cache has it.
    pub(super) fn ensure(cache: &Path, release: &Release) -> Result<Self> {
        let home = cache.join(format!("linux-{}", release.name));
        if !home.exists() {
            let archive = Archive::open(
                &cache.join(format!("apt-{}", release.codename)),
                &[format!(
                    "http://deb.debian.org/debian-security {}-security main",
                    release.codename
                )],
            )?;
            let dependencies = archive.dependencies("linux-image-cloud-amd64")?;
            let package = dependencies
                .iter()
                .find(|name| name.starts_with("linux-image-"))
                .context("linux-image-cloud-amd64 depends on no kernel")?;
            let unpacked = cache.join(format!("linux-{}.new", release.name));
            archive.unpack(&[package], &unpacked)?;
            fs::rename(&unpacked, &home)?;
        }
        let boot = fs::read_dir(home.join("boot"))?.collect::<Result<Vec<_>, _>>()?;
        let version = boot
            .iter()
            .find_map(|file| {
                file.file_name()
                    .to_str()?
                    .strip_prefix("vmlinuz-")
                    .map(str::to_owned)
            })
            .with_context(|| format!("no kernel in {}", home.display()))?;
        let image = home.join("boot").join(format!("vmlinuz-{version}"));
        let mut modules = HashMap::new();
        let library = ["usr/lib/modules", "lib/modules"]
            .map(|directory| home.join(directory).join(&version))
            .into_iter()
            .find(|directory| directory.exists())
            .with_context(|| format!("no modules in {}", home.display()))?;
        collect(&library.join("kernel"), &mut modules)?;
        Ok(Self {
            version,
            image,
            modules,
        })
    }

    /// Modules with all that they depend on, in the order in which a guest loads them: name and
    /// content. What is no module is built in.
    pub(super) fn modules<'a>(
        &self,
        names: impl IntoIterator<Item = &'a str>,
    ) -> Result<Vec<(String, Vec<u8>)>> {
        let mut loaded = Vec::new();
        for name in names {
            self.add(name, &mut loaded)?;
        }
        Ok(loaded)
    }

    fn add(&self, name: &str, loaded: &mut Vec<(String, Vec<u8>)>) -> Result<()> {
        let Some(path) = self.modules.get(name) else {
            return Ok(());
        };
        if loaded.iter().any(|(present, _)| present == name) {
            return Ok(());
        }
        let module = read(path).with_context(|| format!("cannot read {}", path.display()))?;
        for dependency in dependencies(&module)? {
            self.add(&dependency, loaded)?;
        }
        loaded.push((name.to_owned(), module));
        Ok(())
    }
}

fn collect(directory: &Path, modules: &mut HashMap<String, PathBuf>) -> Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            collect(&path, modules)?;
        } else if let Some(name) = path.file_name().and_then(|name| name.to_str())
            && let Some((name, _)) = name.split_once(".ko")
        {
            // A file may have a dash where the module has an underscore.
            modules.insert(name.replace('-', "_"), path);
        }
    }
    Ok(())
}

fn read(path: &Path) -> Result<Vec<u8>> {
    if path.extension().is_none_or(|extension| extension != "xz") {
        return Ok(fs::read(path)?);
    }
    let output = Command::new("xz")
        .args(["--decompress", "--stdout"])
        .arg(path)
        .output()?;
    ensure!(
        output.status.success(),
        "xz: {}",
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Ok(output.stdout)
}

/// Names of the modules that a module needs: `depends=a,b` in its section `.modinfo`.
fn dependencies(module: &[u8]) -> Result<Vec<String>> {
    let elf = object::File::parse(module)?;
    let information = elf
        .section_by_name(".modinfo")
        .context("it has no .modinfo")?
        .data()?;
    Ok(information
        .split(|byte| *byte == 0)
        .filter_map(|field| str::from_utf8(field).ok()?.strip_prefix("depends="))
        .flat_map(|names| names.split(','))
        .filter(|name| !name.is_empty())
        .map(|name| name.replace('-', "_"))
        .collect())
}
