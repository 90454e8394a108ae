//! A guest of a microVM without the machine: a network namespace whose only interface is a TAP,
//! and a relay that does what a virtual machine monitor does with frames. Segmentation and
//! checksum offload pass between the two in virtio-net headers, as they would by a real one.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use nix::fcntl::OFlag;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::unistd::pipe2;
use nucnet_ctl::kernel::netns::{NetnsFd, run_in};
use nucnet_ctl::kernel::tap::{self, TapSpec};
use serde_json::Value;

use super::{Lab, Node};

/// A frame of a whole segmentation offload, and its header.
const LARGEST: usize = 68 * 1024;

/// What a TAP may leave undone in frames that are read from it (linux/if_tun.h): checksums, and
/// the segmentation of TCP, also with ECN.
const OFFLOADS: libc::c_ulong = 0x01 | 0x02 | 0x04 | 0x08;

/// A guest. It is the same in whichever slot it runs.
#[derive(Debug)]
pub struct Guest {
    /// The guest itself.
    pub node: Node,
    tap: File,
    relay: Option<Relay>,
}

/// A slot, by what `nucnet-ctl slot create` printed.
#[derive(Clone, Debug)]
pub struct Slot {
    /// All of it.
    pub json: Value,
}

impl Slot {
    pub(super) fn text(&self, key: &str) -> Result<&str> {
        let value = self.json[key].as_str();
        value.with_context(|| format!("no `{key}` in {}", self.json))
    }

    /// An address.
    ///
    /// # Errors
    /// It has none of that name.
    pub fn address(&self, key: &str) -> Result<IpAddr> {
        Ok(self.text(key)?.parse()?)
    }
}

impl Lab {
    /// Creates a slot.
    ///
    /// # Errors
    /// `nucnet-ctl` fails, or prints no JSON.
    pub fn slot(&self, number: u32, arguments: &[&str]) -> Result<Slot> {
        let number = number.to_string();
        let mut all = vec!["-o", "json", "slot", "create", &number];
        all.extend(arguments);
        let json = self.nucnet(&all)?.expect(0)?.json()?;
        Ok(Slot { json })
    }

    /// Boots a guest in a slot.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn guest(&self, name: &str, slot: &Slot) -> Result<Guest> {
        let node = Node::bare(name)?;
        let tap = open_tap(format!("/proc/{}/ns/net", node.pid()).as_ref(), "eth0")?;
        let prefix = slot.text("netmask")?.parse::<Ipv4Addr>()?.to_bits();
        node.sysctl("net/ipv6/conf/eth0/accept_dad", "0")?;
        node.ip(&format!(
            "link set lo up\n\
             link set eth0 address {} up\n\
             addr add {}/{} dev eth0\n\
             route add default via {}",
            slot.text("guest_mac")?,
            slot.text("guest_ip")?,
            prefix.count_ones(),
            slot.text("gateway")?,
        ))?;
        let mut guest = Guest {
            node,
            tap,
            relay: None,
        };
        guest.resume(self, slot)?;
        Ok(guest)
    }
}

impl Lab {
    /// Has a user and group without privileges open the TAP of a slot, once for each queue, as a
    /// virtual machine monitor does that is put into the namespace and then jailed.
    ///
    /// # Errors
    /// The kernel refuses.
    pub fn opens_tap(&self, slot: &Slot, who: (u32, u32), queues: usize) -> Result<()> {
        let netns = NetnsFd::open(&self.host.path(slot.text("netns")?))?;
        let name = slot.text("tap")?.to_owned();
        let spec = TapSpec {
            multi_queue: queues > 1,
            ..tap_named(&name)
        };
        // The thread ends with what it has become.
        run_in(&netns, || -> Result<()> {
            // The device's own mode is the host's business: many let everybody open it.
            let devices = (0..queues).map(|_| tap::device(&spec));
            let devices: Vec<File> = devices.collect::<Result<_, _>>()?;
            become_user(who)?;
            let joined = devices.into_iter().map(|device| tap::join(device, &spec));
            // All are open at once.
            Ok(joined.collect::<Result<Vec<File>, _>>().map(drop)?)
        })?
    }
}

/// Gives up all privileges of the calling thread. Only system calls do that for a thread alone:
/// the functions of the C library do it for the whole process.
fn become_user((user, group): (u32, u32)) -> io::Result<()> {
    let none = std::ptr::null::<libc::gid_t>();
    // SAFETY: an empty list is not read, and the others take numbers.
    let results = unsafe {
        [
            libc::syscall(libc::SYS_setgroups, 0, none),
            libc::syscall(libc::SYS_setresgid, group, group, group),
            libc::syscall(libc::SYS_setresuid, user, user, user),
        ]
    };
    match results {
        [0, 0, 0] => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// A TAP as a virtual machine monitor asks for it.
fn tap_named(name: &str) -> TapSpec<'_> {
    TapSpec {
        name,
        index: None,
        owner: None,
        group: None,
        multi_queue: false,
    }
}

fn open_tap(netns: &Path, name: &str) -> Result<File> {
    let netns = NetnsFd::open(netns)?;
    let tap = run_in(&netns, || tap::open(&tap_named(name)))??;
    // SAFETY: the descriptor is open, and TUNSETOFFLOAD takes an integer.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETOFFLOAD, OFFLOADS) };
    ensure!(result == 0, "TUNSETOFFLOAD: {}", io::Error::last_os_error());
    Ok(tap)
}

impl Guest {
    /// Stops the machine: its guest stays as it is, and hears nothing.
    pub fn pause(&mut self) {
        self.relay = None;
    }

    /// Lets it go on, in this slot.
    ///
    /// # Errors
    /// The TAP cannot be opened.
    pub fn resume(&mut self, lab: &Lab, slot: &Slot) -> Result<()> {
        self.pause();
        let netns = lab.host.path(slot.text("netns")?);
        let far = open_tap(&netns, slot.text("tap")?)?;
        self.relay = Some(Relay::start(self.tap.try_clone()?, far)?);
        Ok(())
    }
}

/// Carries frames between two TAPs until it is dropped.
#[derive(Debug)]
struct Relay {
    stop: Option<std::os::fd::OwnedFd>,
    carriers: Vec<JoinHandle<io::Result<()>>>,
}

impl Relay {
    fn start(one: File, other: File) -> Result<Self> {
        let (stopped, stop) = pipe2(OFlag::O_CLOEXEC)?;
        let stopped = std::sync::Arc::new(stopped);
        let mut carriers = Vec::new();
        for (from, to) in [
            (one.try_clone()?, other.try_clone()?),
            (other.try_clone()?, one.try_clone()?),
        ] {
            let stopped = stopped.clone();
            carriers.push(std::thread::spawn(move || carry(from, to, stopped.as_fd())));
        }
        Ok(Self {
            stop: Some(stop),
            carriers,
        })
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        // Those who poll see the other end of the pipe go.
        self.stop = None;
        for carrier in self.carriers.drain(..) {
            let _ = carrier.join();
        }
    }
}

fn carry(mut from: File, mut to: File, stopped: std::os::fd::BorrowedFd<'_>) -> io::Result<()> {
    let mut frame = vec![0; LARGEST];
    loop {
        let mut polled = [
            PollFd::new(from.as_fd(), PollFlags::POLLIN),
            PollFd::new(stopped, PollFlags::POLLIN),
        ];
        poll(&mut polled, PollTimeout::NONE)?;
        if polled[1].any() == Some(true) {
            return Ok(());
        }
        let length = from.read(&mut frame)?;
        // A TAP that is down takes nothing; a machine's guest loses the frame as well.
        let _ = to.write(&frame[..length]);
    }
}
