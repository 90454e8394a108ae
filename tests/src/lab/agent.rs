//! The process that is a machine of the lab: it makes the namespaces, lives in them and hands
//! out sockets made in them.
//!
//! The namespaces have no names and last as long as the agent, and the agent as long as the
//! socket on its standard input: however the lab ends (drop, panic, Ctrl-C, SIGKILL), nothing
//! stays behind. Signals of the terminal are ignored for that reason: the end of the socket is
//! the one way out, and it tidies up.

use std::ffi::CStr;
use std::fs;
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SigHandler, Signal, signal};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, UnixAddr, recv, recvmsg, send, sendmsg,
};
use socket2::{Domain, Protocol, Socket, Type};

/// Where the host's agent mounts the cgroup2 hierarchy.
pub(super) const CGROUP_ROOT: &str = "/sys/fs/cgroup";

/// What the agent says when its namespaces stand.
const READY: &[u8] = b"ready";

/// A request for a socket: three integers.
const REQUEST: usize = 12;

/// Runs an agent on standard input until its other end is closed.
///
/// With `cgroup` it is a host: it gets mounts of its own (`/sys` as its network namespace sees
/// it, an empty bpffs, the cgroup2 hierarchy, an empty `/run`) and a child cgroup of that name.
///
/// # Errors
/// Whatever the kernel refuses; the parent then finds the socket closed.
pub fn run(cgroup: Option<&str>) -> Result<()> {
    for terminal in [
        Signal::SIGINT,
        Signal::SIGTERM,
        Signal::SIGHUP,
        Signal::SIGQUIT,
    ] {
        // SAFETY: no handler function is installed, the signal is ignored.
        unsafe { signal(terminal, SigHandler::SigIgn) }.context("ignoring signals")?;
    }
    let stdin = std::io::stdin();
    // SAFETY: standard input stays open for as long as the process lives.
    let control = unsafe { BorrowedFd::borrow_raw(stdin.as_raw_fd()) };

    unshare(CloneFlags::CLONE_NEWNET).context("making a network namespace")?;
    let cgroup = cgroup.map(Cgroup::enter).transpose()?;
    send(control.as_raw_fd(), READY, MsgFlags::empty()).context("reporting readiness")?;

    let served = serve(control);
    if let Some(cgroup) = cgroup {
        cgroup.leave()?;
    }
    served
}

fn serve(control: BorrowedFd<'_>) -> Result<()> {
    loop {
        let mut request = [0; REQUEST];
        match recv(control.as_raw_fd(), &mut request, MsgFlags::empty()) {
            Ok(0) => return Ok(()),
            Ok(REQUEST) => {}
            Ok(length) => bail!("a request of {length} bytes"),
            Err(nix::errno::Errno::EINTR) => continue,
            Err(error) => return Err(error).context("waiting for a request"),
        }
        let [domain, kind, protocol] = [0, 4, 8].map(|at| {
            i32::from_ne_bytes([
                request[at],
                request[at + 1],
                request[at + 2],
                request[at + 3],
            ])
        });
        let protocol = (protocol >= 0).then(|| Protocol::from(protocol));
        let socket = Socket::new(Domain::from(domain), Type::from(kind), protocol);
        let errno = match &socket {
            Ok(_) => 0,
            Err(error) => error.raw_os_error().unwrap_or(-1),
        };
        let bytes = errno.to_ne_bytes();
        let descriptors: Vec<_> = socket.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&descriptors)];
        sendmsg::<UnixAddr>(
            control.as_raw_fd(),
            &[IoSlice::new(&bytes)],
            if descriptors.is_empty() { &[] } else { &rights },
            MsgFlags::MSG_NOSIGNAL,
            None,
        )
        .context("handing out a socket")?;
    }
}

/// Waits until an agent reports that its namespaces stand.
pub(super) fn wait_ready(control: &OwnedFd) -> Result<()> {
    let mut answer = [0; READY.len()];
    let length = recv(control.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    if &answer[..length] != READY {
        bail!("the agent gave up (its reason is above)");
    }
    Ok(())
}

/// Asks an agent for a socket.
pub(super) fn request(
    control: &OwnedFd,
    domain: Domain,
    kind: Type,
    protocol: Option<Protocol>,
) -> std::io::Result<Socket> {
    let mut request = [0; REQUEST];
    let numbers = [domain.into(), kind.into(), protocol.map_or(-1, i32::from)];
    for (bytes, number) in request.chunks_exact_mut(4).zip(numbers) {
        bytes.copy_from_slice(&number.to_ne_bytes());
    }
    send(control.as_raw_fd(), &request, MsgFlags::MSG_NOSIGNAL)?;

    let mut errno = [0; 4];
    let mut space = nix::cmsg_space!(OwnedFd);
    let mut parts = [IoSliceMut::new(&mut errno)];
    let message = recvmsg::<UnixAddr>(
        control.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    let socket = message.cmsgs()?.find_map(|message| match message {
        ControlMessageOwned::ScmRights(descriptors) => descriptors.first().copied(),
        _ => None,
    });
    match socket {
        Some(descriptor) => {
            // SAFETY: the kernel has just made this descriptor for us; nobody else knows it.
            Ok(unsafe { Socket::from_raw_fd(descriptor) })
        }
        None => Err(std::io::Error::from_raw_os_error(i32::from_ne_bytes(errno))),
    }
}

/// The host's mounts and its cgroup.
struct Cgroup {
    directory: PathBuf,
}

impl Cgroup {
    fn enter(name: &str) -> Result<Self> {
        unshare(CloneFlags::CLONE_NEWNS).context("making a mount namespace")?;
        const NOTHING: Option<&CStr> = None;
        mount(
            NOTHING,
            "/",
            NOTHING,
            MsFlags::MS_REC | MsFlags::MS_PRIVATE,
            NOTHING,
        )
        .context("making mounts private")?;
        for (kind, target) in [
            ("sysfs", "/sys"),
            ("bpf", "/sys/fs/bpf"),
            ("cgroup2", CGROUP_ROOT),
            ("tmpfs", "/run"),
        ] {
            mount(Some(kind), target, Some(kind), MsFlags::empty(), NOTHING)
                .with_context(|| format!("mounting {kind} on {target}"))?;
        }
        let directory = Path::new(CGROUP_ROOT).join(name);
        fs::create_dir(&directory).with_context(|| format!("making {}", directory.display()))?;
        let cgroup = Self { directory };
        cgroup.join(&cgroup.directory)?;
        Ok(cgroup)
    }

    fn join(&self, directory: &Path) -> Result<()> {
        fs::write(directory.join("cgroup.procs"), "0")
            .with_context(|| format!("joining {}", directory.display()))
    }

    /// Ends what still runs in the cgroup, which can only be what this lab started there.
    fn leave(self) -> Result<()> {
        self.join(Path::new(CGROUP_ROOT))?;
        // Since Linux 5.14; before, those processes end with their own pipes.
        let _ = fs::write(self.directory.join("cgroup.kill"), "1");
        let deadline = Instant::now() + Duration::from_secs(2);
        loop {
            match fs::remove_dir(&self.directory) {
                Err(error) if Instant::now() > deadline => {
                    return Err(error)
                        .with_context(|| format!("removing {}", self.directory.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
                Ok(()) => return Ok(()),
            }
        }
    }
}
