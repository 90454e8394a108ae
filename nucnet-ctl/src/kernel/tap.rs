//! TAP interfaces: what virtual machine monitors open.

use std::{
    fs::{File, OpenOptions},
    io,
    os::fd::{AsFd, AsRawFd},
};

use nix::{errno::Errno, libc};

use super::fault::{self, Operation};

/// Why a TAP cannot be made.
#[derive(Debug, thiserror::Error)]
#[error("cannot {operation} TAP {name}")]
pub struct Error {
    /// What was tried.
    operation: &'static str,
    /// Its name.
    name: String,
    /// Why it failed.
    #[source]
    source: io::Error,
}

impl Error {
    /// Why it failed.
    pub fn cause(&self) -> &io::Error {
        &self.source
    }
}

/// A TAP as a slot wants it.
#[derive(Clone, Copy, Debug)]
pub struct TapSpec<'a> {
    /// Interface name.
    pub name: &'a str,
    /// Interface index; none: of the kernel's choice.
    pub index: Option<u32>,
    /// Who may open it without being root: a user's number.
    pub owner: Option<u32>,
    /// A group's number.
    pub group: Option<u32>,
    /// Whether it may be opened more than once, for a queue each.
    pub multi_queue: bool,
}

const DEVICE: &str = "/dev/net/tun";

impl TapSpec<'_> {
    fn failed(&self, operation: &'static str) -> impl Fn(io::Error) -> Error + use<> {
        let name = self.name.to_owned();
        move |source| Error {
            operation,
            name: name.clone(),
            source,
        }
    }
}

/// Makes a TAP in the network namespace of the calling thread, down. It stays when nobody has it
/// open. One that is there with these properties is taken as it is.
///
/// # Errors
/// Those of the kernel.
pub fn create(spec: &TapSpec<'_>) -> Result<(), Error> {
    let device = open(spec)?;
    let settings = [
        ("choose the owner of", libc::TUNSETOWNER, spec.owner),
        ("choose the group of", libc::TUNSETGROUP, spec.group),
        ("keep", libc::TUNSETPERSIST, Some(1)),
    ];
    for (operation, request, value) in settings {
        if let Some(value) = value {
            change()
                .and_then(|()| set(&device, request, value))
                .map_err(spec.failed(operation))?;
        }
    }
    Ok(())
}

/// Opens a TAP in the network namespace of the calling thread as a virtual machine monitor does:
/// what is read was sent by the host, what is written is sent by the guest, each frame after a
/// `struct virtio_net_hdr`. One that is not there is made, for as long as it is open.
///
/// # Errors
/// Those of the kernel.
pub fn open(spec: &TapSpec<'_>) -> Result<File, Error> {
    join(device(spec)?, spec)
}

/// The driver's device, which is no TAP yet.
///
/// # Errors
/// Those of the kernel.
pub fn device(spec: &TapSpec<'_>) -> Result<File, Error> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .open(DEVICE)
        .map_err(spec.failed("open /dev/net/tun for"))
}

/// Makes the driver's device a queue of a TAP, as [`open`] does. Who has no privileges may do it
/// for the TAPs of its user or group.
///
/// # Errors
/// Those of the kernel.
pub fn join(device: File, spec: &TapSpec<'_>) -> Result<File, Error> {
    change().map_err(spec.failed("make"))?;
    if let Some(index) = &spec.index {
        // For a new one; one that is there keeps what it has.
        give(&device, TUNSETIFINDEX, index).map_err(spec.failed("choose the index of"))?;
    }
    give(&device, libc::TUNSETIFF, &Request::of(spec)).map_err(spec.failed("make"))?;
    Ok(device)
}

fn change() -> io::Result<()> {
    Ok(fault::before(Operation::Netlink)?)
}

/// include/uapi/linux/if_tun.h.
const TUNSETIFINDEX: libc::Ioctl = nix::request_code_write!(b'T', 218, size_of::<libc::c_uint>());

/// `struct ifreq` as `TUNSETIFF` reads it.
#[repr(C)]
struct Request {
    name: [u8; libc::IFNAMSIZ],
    flags: libc::c_short,
    rest: [u8; 22],
}

impl Request {
    fn of(spec: &TapSpec<'_>) -> Self {
        let mut name = [0; libc::IFNAMSIZ];
        // Names of interfaces are shorter than this; the last byte stays zero.
        for (byte, given) in name[..libc::IFNAMSIZ - 1].iter_mut().zip(spec.name.bytes()) {
            *byte = given;
        }
        // Frames with the header of virtio-net before them, which carries segmentation and
        // checksum offload.
        let mut flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
        if spec.multi_queue {
            flags |= libc::IFF_MULTI_QUEUE;
        }
        Self {
            name,
            flags: flags as libc::c_short,
            rest: [0; 22],
        }
    }
}

/// An ioctl that reads what it is given a pointer to.
fn give<T>(device: &File, request: libc::Ioctl, value: &T) -> io::Result<()> {
    // SAFETY: the descriptor is open, and each caller gives the type that the request reads.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), request, value) };
    Ok(Errno::result(result).map(drop)?)
}

/// An ioctl that takes a number.
fn set(device: &File, request: libc::Ioctl, value: u32) -> io::Result<()> {
    let value = libc::c_ulong::from(value);
    // SAFETY: the descriptor is open, and the request takes an integer.
    let result = unsafe { libc::ioctl(device.as_fd().as_raw_fd(), request, value) };
    Ok(Errno::result(result).map(drop)?)
}
