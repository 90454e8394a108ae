//! Real interfaces to send frames by and receive them from, for what a test run leaves out.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    os::fd::{AsFd, AsRawFd as _, OwnedFd},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use nix::{
    errno::Errno,
    ifaddrs::getifaddrs,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, bind, recv, send, socket,
    },
};

/// How long a frame may take.
const PATIENCE: Duration = Duration::from_secs(5);

/// An interface: all that it receives, and a way to send.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
}

impl Wire {
    /// That of a name in the calling thread's network namespace.
    ///
    /// # Errors
    /// There is none, or privilege is missing.
    pub fn of(interface: &str) -> Result<Self> {
        let address = getifaddrs()?
            .filter(|found| found.interface_name == interface)
            .find_map(|found| found.address?.as_link_addr().copied())
            .with_context(|| format!("no interface {interface}"))?;
        let socket = socket(
            AddressFamily::Packet,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::EthAll,
        )?;
        bind(socket.as_raw_fd(), &address)?;
        Ok(Self { socket })
    }

    /// Sends a frame.
    ///
    /// # Errors
    /// The interface is down, or the frame too large.
    pub fn send(&self, frame: &[u8]) -> Result<()> {
        let sent = send(self.socket.as_raw_fd(), frame, MsgFlags::empty())?;
        ensure!(sent == frame.len(), "{sent} bytes were sent");
        Ok(())
    }

    /// Sends a frame of which the kernel has its Ethernet header in one piece, and the rest in
    /// others: it must be longer than a page.
    ///
    /// # Errors
    /// As of [`Wire::of`] and [`Wire::send`].
    pub fn send_in_pieces(interface: &str, frame: &[u8]) -> Result<()> {
        let wire = Self::of(interface)?;
        let yes: libc::c_int = 1;
        // SAFETY: the option is an integer, and as long as it is said to be.
        let result = unsafe {
            libc::setsockopt(
                wire.socket.as_raw_fd(),
                libc::SOL_PACKET,
                libc::PACKET_VNET_HDR,
                (&raw const yes).cast(),
                size_of_val(&yes) as libc::socklen_t,
            )
        };
        Errno::result(result)?;
        // `struct virtio_net_hdr`: nothing to be done to it, and how much is a header.
        let mut header = [0; 10];
        header[2..4].copy_from_slice(&14_u16.to_ne_bytes());
        wire.send(&[&header, frame].concat())
    }

    /// All frames that have come, or have been sent, since the last call. Each is cut to its
    /// first 2,048 bytes.
    ///
    /// # Errors
    /// The interface is gone.
    pub fn frames(&self) -> Result<Vec<Vec<u8>>> {
        let mut frames = Vec::new();
        loop {
            let mut buffer = vec![0; 2048];
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(length) => buffer.truncate(length),
                Err(Errno::EAGAIN) => return Ok(frames),
                Err(error) => return Err(error.into()),
            }
            frames.push(buffer);
        }
    }

    /// Waits until a frame comes, among any others.
    ///
    /// # Errors
    /// It does not; the others are listed.
    pub fn wait_for(&self, frame: &[u8]) -> Result<()> {
        wait_for(&self.socket, frame, |buffer| {
            Ok(recv(self.socket.as_raw_fd(), buffer, MsgFlags::empty())?)
        })
    }
}

/// An interface without link-layer header, and what is beyond it. It is gone when this value is.
#[derive(Debug)]
pub struct Tunnel {
    device: File,
}

/// `TUNSETIFF` (linux/if_tun.h).
const TUNSETIFF: libc::Ioctl = 0x4004_54ca;

impl Tunnel {
    /// Makes one in the calling thread's network namespace.
    ///
    /// # Errors
    /// The kernel has no TUN devices, or privilege is missing.
    pub fn new(name: &str) -> Result<Self> {
        let path = "/dev/net/tun";
        let device = File::options().read(true).write(true).open(path);
        let device = device.with_context(|| format!("opening {path}"))?;
        // SAFETY: an all-zero `ifreq` is a valid one.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
        // SAFETY: the request is an `ifreq` whose name ends with a zero byte.
        let result = unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw const request) };
        if result != 0 {
            bail!("making {name}: {}", std::io::Error::last_os_error());
        }
        let status = Command::new("ip")
            .args(["link", "set", name, "up"])
            .status()?;
        ensure!(status.success(), "ip link set {name} up: {status}");
        Ok(Self { device })
    }

    /// Has the interface receive a packet.
    ///
    /// # Errors
    /// The interface is down.
    pub fn send(&self, packet: &[u8]) -> Result<()> {
        Ok((&self.device).write_all(packet)?)
    }

    /// Waits until a packet leaves by the interface, among any others.
    ///
    /// # Errors
    /// It does not; the others are listed.
    pub fn wait_for(&self, packet: &[u8]) -> Result<()> {
        wait_for(&self.device, packet, |buffer| {
            Ok((&self.device).read(buffer)?)
        })
    }
}

fn wait_for(
    source: &impl AsFd,
    wanted: &[u8],
    mut receive: impl FnMut(&mut [u8]) -> Result<usize>,
) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    let mut others = Vec::new();
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let mut polled = [PollFd::new(source.as_fd(), PollFlags::POLLIN)];
        if poll(&mut polled, PollTimeout::try_from(left)?)? == 0 {
            bail!("{wanted:02x?} did not come, but {others:02x?}");
        }
        let mut buffer = vec![0; 2048];
        let length = receive(&mut buffer)?;
        buffer.truncate(length);
        if buffer == wanted {
            return Ok(());
        }
        others.push(buffer);
    }
}
