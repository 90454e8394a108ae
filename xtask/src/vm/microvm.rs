//! The microVM that the scenarios boot on the TAP of a slot: Debian's kernel, busybox, and a shell
//! on the console that does as it is told.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use anyhow::{Context as _, Result, ensure};

use super::{
    guest,
    initramfs::Image,
    kernel::{Kernel, Release},
    qemu::Qemu,
};
use crate::{
    apt::{self, Consent, tool},
    archive::Archive,
    run,
    workspace::Workspace,
};

/// The kernel that it boots.
const RELEASE: &str = "6.1";

/// Drivers of the devices that it has.
const MODULES: [&str; 2] = ["virtio_pci", "virtio_net"];

/// Programs of busybox that its init and the scenarios use.
const PROGRAMS: [&str; 13] = [
    "cat",
    "httpd",
    "insmod",
    "ip",
    "mkdir",
    "mount",
    "poweroff",
    "printf",
    "sh",
    "sha256sum",
    "stty",
    "timeout",
    "wget",
];

/// Configures the one interface from the kernel's command line, whose words of this form an init
/// has in its environment. Then each line of the console is a command; its output is followed by
/// a line with its status, as that of the last step of all this is.
const INIT: &str = r#"#!/bin/sh
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mount -t tmpfs tmpfs /www
stty -echo
for module in MODULES/*; do insmod "$module"; done
ip link set lo up
ip address add "$nucnet_address" dev eth0
ip link set eth0 mtu "$nucnet_mtu" up
ip route add default via "$nucnet_gateway"
while
    printf '\n@@ %d\n' $?
    read -r line
do
    eval "$line"
done
poweroff -f
"#;

/// Makes one, unless it is there. Returns a program that boots it: what further arguments it gets
/// are QEMU's.
pub(crate) fn prepare(workspace: &Workspace, consent: Consent) -> Result<PathBuf> {
    ensure!(
        cfg!(target_arch = "x86_64"),
        "it is x86-64 and this machine is not"
    );
    ensure!(
        apt::is_debian(),
        "needs apt and dpkg to fetch Debian's kernel"
    );
    apt::ensure_tools(&[tool::XZ], "the microVM of a slot", consent)?;
    let cache = super::cache(workspace);
    let qemu = Qemu::ensure(&cache)?;
    let kernel = Kernel::ensure(&cache, Release::named(RELEASE)?)?;
    let busybox = busybox(&cache)?;
    let image = cache.join("microvm.cpio");
    write(&image, &kernel, &busybox)
        .with_context(|| format!("cannot write {}", image.display()))?;

    // It gives way to everything else: emulation takes all the time that it gets.
    let mut command = qemu.command();
    command.args(["-smp", "1", "-m", "256"]);
    command.arg("-kernel").arg(&kernel.image);
    command.arg("-initrd").arg(&image);
    let libraries = command
        .get_envs()
        .filter_map(|(name, value)| Some(format!("{}='{}' ", name.display(), value?.display())))
        .collect::<String>();
    let script = format!(
        "#!/bin/sh\n{libraries}exec nice -n 10 {} \"$@\"\n",
        run::shown(&command)
    );
    let program = cache.join("microvm");
    fs::write(&program, script)?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    Ok(program)
}

/// One that is linked statically.
fn busybox(cache: &Path) -> Result<PathBuf> {
    let home = cache.join("busybox");
    if !home.exists() {
        let archive = Archive::of_this_release(&cache.join("apt"))?;
        let unpacked = cache.join("busybox.new");
        archive.unpack(&["busybox-static"], &unpacked)?;
        fs::rename(&unpacked, &home)?;
    }
    let places = ["bin", "usr/bin"].map(|directory| home.join(directory).join("busybox"));
    let mut places = places.into_iter().filter(|path| path.is_file());
    places.next().context("busybox-static has no busybox")
}

fn write(path: &Path, kernel: &Kernel, busybox: &Path) -> Result<()> {
    let mut image = Image::create(path)?;
    image.file(busybox, Path::new("/bin/busybox"))?;
    for program in PROGRAMS {
        image.symlink(&format!("/bin/{program}"), "busybox")?;
    }
    image.modules(kernel, MODULES)?;
    let init = INIT.replace("MODULES", guest::MODULES);
    image.add(Path::new("/init"), 0o100_755, init.as_bytes())?;
    for directory in ["/proc", "/sys", "/dev", "/www"] {
        image.directory(Path::new(directory))?;
    }
    image.finish()
}
