//! The bind hooks: programs on a cgroup, which keep published ports from sockets of the host.

use std::{
    fs::{self, File},
    io,
    os::{fd::AsFd, unix::fs::MetadataExt},
    path::{Path, PathBuf},
};

use aya::programs::{CgroupAttachMode, CgroupSockAddr, CgroupSockAddrAttachType, links::FdLink};
use nucnet_common::abi::program;

use super::{
    Datapath,
    error::{AttachCause, BpfError},
    links::{exchange, open_link, open_program, unlink},
    object::program_error,
    pins::{aside, before_change, file_error, remove, rename},
    sys::{self, LinkTarget},
};

pub(super) const BIND_HOOKS: [(&str, CgroupSockAddrAttachType); 2] = [
    (program::BIND4, CgroupSockAddrAttachType::Bind4),
    (program::BIND6, CgroupSockAddrAttachType::Bind6),
];

impl Datapath {
    /// Puts the bind hooks, which keep published ports from sockets of the host, on a cgroup: the
    /// root of the cgroup2 hierarchy as a rule ([`cgroup_root`]), in place of any cgroup that they
    /// were on.
    pub fn attach_bind(&self, cgroup: &Path) -> Result<(), BpfError> {
        let directory = File::open(cgroup).map_err(file_error(cgroup, "open"))?;
        // The id of a cgroup is the inode number of its directory.
        let id = directory
            .metadata()
            .map_err(file_error(cgroup, "read"))?
            .ino();
        for (name, kind) in BIND_HOOKS {
            let pin = self.pins.links().join(name);
            let error = |source: AttachCause| BpfError::Attach {
                program: name,
                target: cgroup.display().to_string(),
                action: "attach",
                source: Box::new(source),
            };
            if let Some(link) = open_link(&pin)? {
                let info = sys::link_info(link.as_fd()).map_err(|e| error(e.into()))?;
                if info.target == LinkTarget::Cgroup(id) {
                    let program = open_program(&self.pins, name)?;
                    exchange(&link, info.program, &program).map_err(|e| error(e.into()))?;
                    continue;
                }
            }
            let mut program = CgroupSockAddr::from_pin(self.pins.program(name), kind)
                .map_err(|source| program_error(name, "opened", source))?;
            sys::before_change().map_err(|e| error(e.into()))?;
            let attached = program
                .attach(&directory, CgroupAttachMode::default())
                .and_then(|id| program.take_link(id))
                .map_err(|e| error(e.into()))?;
            let link = FdLink::try_from(attached)
                .map_err(|e| error(io::Error::new(io::ErrorKind::Unsupported, e).into()))?;
            let new = aside(&pin);
            remove(&new)?;
            before_change().map_err(|e| error(e.into()))?;
            link.pin(&new).map_err(|e| error(e.into()))?;
            unlink(&pin)?;
            rename(&new, &pin).map_err(file_error(&pin, "create"))?;
        }
        Ok(())
    }

    /// Takes the bind hooks off.
    pub fn detach_bind(&self) -> Result<(), BpfError> {
        BIND_HOOKS
            .iter()
            .try_for_each(|(name, _)| unlink(&self.pins.links().join(name)))
    }
}

/// Where the root of the cgroup2 hierarchy is mounted, alone or beside version 1.
///
/// # Errors
/// [`BpfError::NoCgroup2`], and those of reading `/proc`.
pub fn cgroup_root() -> Result<PathBuf, BpfError> {
    let path = Path::new("/proc/self/mountinfo");
    let mounts = fs::read_to_string(path).map_err(file_error(path, "read"))?;
    cgroup_mount(&mounts).ok_or(BpfError::NoCgroup2)
}

/// proc_pid_mountinfo(5): `ID PARENT MAJOR:MINOR ROOT MOUNTPOINT OPTIONS [TAGS] - TYPE ...`.
fn cgroup_mount(mounts: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, point) = (fields.next()?, fields.next()?);
        let whole = filesystem.starts_with("cgroup2 ") && root == "/";
        whole.then(|| PathBuf::from(point.replace("\\040", " ")))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cgroup2_is_found_beside_version_1() {
        let mounts = "\
            25 1 0:23 / /sys rw - sysfs sysfs rw\n\
            30 25 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:4 - cgroup cgroup rw,cpu\n\
            40 25 0:27 /below /mnt rw - cgroup2 none rw\n\
            41 25 0:27 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw\n";
        assert_eq!(cgroup_mount(mounts), Some("/sys/fs/cgroup/unified".into()));
        assert_eq!(cgroup_mount("25 1 0:23 / /sys rw - sysfs sysfs rw\n"), None);
    }
}
