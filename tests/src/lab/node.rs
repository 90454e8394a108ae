//! One machine of the lab: a network namespace and what runs in it.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use socket2::{Domain, Protocol, Socket, Type};

use super::agent;
use super::programs::peer_program;
use super::wait::{SOON, until};

/// A machine: a process (the agent) in a network namespace of its own. A host has mounts and a
/// cgroup of its own as well. It is gone when this value is.
#[derive(Debug)]
pub struct Node {
    name: String,
    agent: Child,
    control: Mutex<Option<OwnedFd>>,
    net: File,
    mounts: Option<File>,
    cgroup: Option<(String, File)>,
    joins_cgroup: bool,
}

impl Node {
    /// A machine with nothing but a loopback interface that is down, as a container started
    /// with `--network none` has it.
    ///
    /// # Errors
    /// The agent's binary is missing, or the kernel refuses a namespace.
    pub fn bare(name: &str) -> Result<Self> {
        Self::spawn(name, None)
    }

    /// A machine that has mounts and a cgroup of its own too.
    pub(super) fn host(name: &str, cgroup: &str) -> Result<Self> {
        Self::spawn(name, Some(cgroup))
    }

    fn spawn(name: &str, cgroup: Option<&str>) -> Result<Self> {
        let (ours, theirs) = socketpair(
            AddressFamily::Unix,
            SockType::SeqPacket,
            None,
            SockFlag::SOCK_CLOEXEC,
        )?;
        let mut command = Command::new(peer_program()?);
        command.arg("agent").arg(name);
        if let Some(cgroup) = cgroup {
            command.arg("--cgroup").arg(cgroup);
        }
        let agent = command
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .spawn()
            .context("starting an agent")?;
        drop(command);
        let pid = agent.id();
        agent::wait_ready(&ours).with_context(|| format!("starting machine {name}"))?;
        let open = |path: String| File::open(&path).with_context(|| format!("opening {path}"));
        Ok(Self {
            name: name.to_owned(),
            joins_cgroup: true,
            agent,
            control: Mutex::new(Some(ours)),
            net: open(format!("/proc/{pid}/ns/net"))?,
            mounts: cgroup
                .map(|_| open(format!("/proc/{pid}/ns/mnt")))
                .transpose()?,
            cgroup: cgroup
                .map(|cgroup| -> Result<_> {
                    let directory = format!("{}/{cgroup}", agent::CGROUP_ROOT);
                    let procs = format!("/proc/{pid}/root{directory}/cgroup.procs");
                    let file = File::options()
                        .write(true)
                        .open(&procs)
                        .with_context(|| format!("opening {procs}"))?;
                    Ok((directory, file))
                })
                .transpose()?,
        })
    }

    /// What it is called in messages.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The process that lives in it: the container's pid.
    pub fn pid(&self) -> u32 {
        self.agent.id()
    }

    /// A path of the machine as this process can open it.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let relative = path.as_ref().strip_prefix("/").unwrap_or(path.as_ref());
        Path::new(&format!("/proc/{}/root", self.pid())).join(relative)
    }

    /// The directory of its cgroup, as it sees it itself.
    pub fn cgroup(&self) -> Option<&str> {
        self.cgroup
            .as_ref()
            .map(|(directory, _)| directory.as_str())
    }

    /// Has programs that are started from now on stay in this process's own cgroup: moving one
    /// has the kernel wait for RCU, for longer than `nucnet-ctl attach` takes.
    pub fn leave_cgroup(&mut self) {
        self.joins_cgroup = false;
    }

    /// A program that will run in it, with no standard input.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let mut command = Command::new(program);
        command.stdin(Stdio::null());
        let net = self.net.as_raw_fd();
        let mounts = self.mounts.as_ref().map(AsRawFd::as_raw_fd);
        let cgroup = self.cgroup.as_ref().filter(|_| self.joins_cgroup);
        let cgroup = cgroup.map(|(_, procs)| procs.as_raw_fd());
        let enter = move |descriptor, kind| {
            // SAFETY: the descriptors live as long as the node, and a fork has copies of them.
            setns(
                unsafe { std::os::fd::BorrowedFd::borrow_raw(descriptor) },
                kind,
            )
        };
        // SAFETY: between fork and exec there are only system calls, no allocation, no lock.
        unsafe {
            command.pre_exec(move || {
                if let Some(procs) = cgroup {
                    let procs = std::os::fd::BorrowedFd::borrow_raw(procs);
                    nix::unistd::write(procs, b"0")?;
                }
                enter(net, CloneFlags::CLONE_NEWNET)?;
                if let Some(mounts) = mounts {
                    enter(mounts, CloneFlags::CLONE_NEWNS)?;
                }
                Ok(())
            });
        }
        command
    }

    /// Runs a program to its end and returns what it printed.
    ///
    /// # Errors
    /// It cannot start or fails; the message has its standard error.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        let output = self
            .command(program)
            .args(arguments)
            .output()
            .with_context(|| format!("{}: running {program}", self.name))?;
        ensure!(
            output.status.success(),
            "{}: {program} {}: {}: {}",
            self.name,
            arguments.join(" "),
            output.status,
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Runs lines of `ip` as one batch.
    ///
    /// # Errors
    /// A line is refused; the message has `ip`'s own.
    pub fn ip(&self, lines: &str) -> Result<()> {
        self.batch("ip", &["-batch", "-"], lines)
    }

    /// Feeds a program with lines.
    pub(super) fn batch(&self, program: &str, arguments: &[&str], lines: &str) -> Result<()> {
        let mut child = self
            .command(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("{}: running {program}", self.name))?;
        child
            .stdin
            .take()
            .context("no pipe")?
            .write_all(lines.as_bytes())?;
        let output = child.wait_with_output()?;
        ensure!(
            output.status.success(),
            "{}: {program}: {}\n{}",
            self.name,
            String::from_utf8_lossy(&output.stderr).trim(),
            lines.trim()
        );
        Ok(())
    }

    /// Waits until an interface that was just set up takes packets.
    ///
    /// The kernel finishes in the background: it notices the carrier up to a second late, and
    /// routes packets for a new IPv6 address to itself only when its turn in a work queue comes.
    ///
    /// # Errors
    /// It does not come up.
    pub fn settle(&self, ifname: &str, address: Ipv6Addr) -> Result<()> {
        let address: String = address
            .octets()
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        let what = format!("{}: {ifname} is up", self.name);
        until(&what, SOON, || {
            // Being asked for this one link makes the kernel notice now (Linux 6.5).
            self.ip(&format!("link show dev {ifname}"))?;
            self.within(|| {
                let text = fs::read_to_string("/proc/thread-self/net/ipv6_route");
                let text = text.unwrap_or_default();
                let hosts = text.lines().filter(|line| {
                    line.get(32..36) == Some(" 80 ") && line.split(' ').next_back() == Some(ifname)
                });
                let known = |start: &str| hosts.clone().any(|line| line.starts_with(start));
                known("fe80") && known(&address)
            })
        })
    }

    /// Runs a closure on a thread of its own in the machine's network namespace.
    ///
    /// # Errors
    /// The namespace cannot be entered.
    pub fn within<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let worker = scope.spawn(|| {
                setns(&self.net, CloneFlags::CLONE_NEWNET)?;
                Ok(work())
            });
            worker
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// Sets a sysctl of the network namespace: `net.ipv4.ip_forward` has the path
    /// `net/ipv4/ip_forward`.
    ///
    /// # Errors
    /// The kernel has none of that name or refuses the value.
    pub fn sysctl(&self, path: &str, value: &str) -> Result<()> {
        let file = format!("/proc/sys/{path}");
        self.within(|| fs::write(&file, value))?
            .with_context(|| format!("{}: setting {file} to {value}", self.name))
    }

    /// A socket of this machine, made by a process inside of it (and in its cgroup).
    ///
    /// # Errors
    /// The kernel's.
    pub fn socket(
        &self,
        domain: Domain,
        kind: Type,
        protocol: Option<Protocol>,
    ) -> io::Result<Socket> {
        let control = self
            .control
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let control = control.as_ref().ok_or(io::ErrorKind::NotConnected)?;
        agent::request(control, domain, kind, protocol)
    }

    /// A TCP socket that listens, for its own address family only.
    ///
    /// # Errors
    /// The kernel's.
    pub fn listen(&self, address: SocketAddr) -> io::Result<TcpListener> {
        let socket = self.socket(Domain::for_address(address), Type::STREAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        socket.set_reuse_address(true)?;
        bind_patiently(&socket, address)?;
        socket.listen(4096)?;
        Ok(socket.into())
    }

    /// Connects by TCP.
    ///
    /// # Errors
    /// The kernel's; `TimedOut` where nobody answers within the time given.
    pub fn connect(&self, to: SocketAddr, timeout: Duration) -> io::Result<TcpStream> {
        self.connect_from(None, to, timeout)
    }

    /// Connects by TCP from an address and port.
    ///
    /// # Errors
    /// The same.
    pub fn connect_from(
        &self,
        from: Option<SocketAddr>,
        to: SocketAddr,
        timeout: Duration,
    ) -> io::Result<TcpStream> {
        let socket = self.socket(Domain::for_address(to), Type::STREAM, None)?;
        if let Some(from) = from {
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
        }
        socket.connect_timeout(&to.into(), timeout)?;
        // What follows must end too, even if the other side goes silent.
        socket.set_read_timeout(Some(Duration::from_secs(10)))?;
        socket.set_write_timeout(Some(Duration::from_secs(10)))?;
        Ok(socket.into())
    }

    /// A UDP socket for its own address family only.
    ///
    /// # Errors
    /// The kernel's.
    pub fn udp(&self, address: SocketAddr) -> io::Result<UdpSocket> {
        let socket = self.socket(Domain::for_address(address), Type::DGRAM, None)?;
        if address.is_ipv6() {
            socket.set_only_v6(true)?;
        }
        bind_patiently(&socket, address)?;
        Ok(socket.into())
    }
}

/// Binds a socket. One that was closed just now may still be open in a child of this process: a
/// program that another thread has started has copies of all sockets until it is executed.
fn bind_patiently(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    let deadline = std::time::Instant::now() + SOON;
    loop {
        match socket.bind(&address.into()) {
            Err(error)
                if error.kind() == io::ErrorKind::AddrInUse
                    && std::time::Instant::now() < deadline =>
            {
                std::thread::sleep(Duration::from_millis(1));
            }
            bound => return bound,
        }
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.control
            .get_mut()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .take();
        let _ = self.agent.wait();
    }
}

/// Reads all that a child prints, within the time given; ends it otherwise.
///
/// # Errors
/// It took too long.
pub(super) fn finish(mut child: Child, limit: Duration) -> Result<(Option<i32>, String, String)> {
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let read = |pipe: Option<&mut dyn Read>| -> String {
        let mut bytes = Vec::new();
        if let Some(pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        String::from_utf8_lossy(&bytes).into_owned()
    };
    let pid = nix::unistd::Pid::from_raw(i32::try_from(child.id())?);
    let (done, over) = std::sync::mpsc::channel::<()>();
    std::thread::scope(|scope| {
        let watch = scope.spawn(move || {
            let late = over.recv_timeout(limit).is_err();
            if late {
                // Not yet waited for, so the number is still that child's.
                let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
            }
            late
        });
        let errors = scope.spawn(move || read(stderr.as_mut().map(|pipe| pipe as &mut dyn Read)));
        let out = read(stdout.as_mut().map(|pipe| pipe as &mut dyn Read));
        let errors = errors.join().unwrap_or_default();
        let _ = done.send(());
        let late = watch.join().unwrap_or(true);
        let status = child.wait()?;
        ensure!(
            !late,
            "still running after {limit:?} and ended\n{out}{errors}"
        );
        Ok((status.code(), out, errors))
    })
}
