//! Netlink to netfilter (`nfnetlink`): sockets, and what its messages are made of.

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{
        AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, send,
        setsockopt, socket, sockopt,
    },
};

/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct nfgenmsg`, after it.
const GENERAL: usize = 4;
/// An attribute that has attributes.
const NESTED: u16 = 0x8000;
/// Nested, or in network order: not part of the type.
const TYPE_MASK: u16 = 0x3fff;
/// What a socket that is told things keeps until they are read.
const KEPT: usize = 8 << 20;

/// What the kernel is asked.
#[derive(Default)]
pub(super) struct Request<'a> {
    /// Subsystem and type, as [`kind`] makes it.
    pub(super) kind: u16,
    /// `NLM_F_*`.
    pub(super) flags: i32,
    pub(super) family: u8,
    /// What it is about, where a subsystem has several of something.
    pub(super) resource: u16,
    pub(super) attributes: &'a [u8],
}

/// What the kernel says.
pub(super) struct Message<'a> {
    pub(super) kind: u16,
    pub(super) flags: u16,
    pub(super) family: u8,
    /// The attributes.
    pub(super) contents: &'a [u8],
}

/// The type of a message, with its subsystem.
pub(super) const fn kind(subsystem: u16, number: u16) -> u16 {
    subsystem << 8 | number
}

/// A socket in the calling thread's network namespace.
#[derive(Debug)]
pub(super) struct Socket(OwnedFd);

impl Socket {
    /// One for requests.
    pub(super) fn open() -> io::Result<Self> {
        let (kind, protocol) = (SockType::Raw, SockProtocol::NetlinkNetFilter);
        let flags = SockFlag::SOCK_CLOEXEC;
        let fd = socket(AddressFamily::Netlink, kind, flags, protocol)?;
        Ok(Self(fd))
    }

    /// One that is told what those groups are, bits of them, from now on.
    pub(super) fn told(groups: u32) -> io::Result<Self> {
        let socket = Self::open()?;
        setsockopt(&socket.0, sockopt::RcvBufForce, &KEPT)?;
        bind(socket.0.as_raw_fd(), &NetlinkAddr::new(0, groups))?;
        Ok(socket)
    }

    pub(super) fn send(&self, request: &Request<'_>) -> io::Result<()> {
        let flags = (libc::NLM_F_REQUEST | request.flags) as u16;
        let length = HEADER + GENERAL + request.attributes.len();
        let mut bytes = Vec::with_capacity(length);
        bytes.extend((length as u32).to_ne_bytes());
        bytes.extend(request.kind.to_ne_bytes());
        bytes.extend(flags.to_ne_bytes());
        // Sequence number and port of the sender: each request has its answer before the next one.
        bytes.extend([0; 8]);
        // Version 0.
        bytes.extend([request.family, 0]);
        bytes.extend(request.resource.to_be_bytes());
        bytes.extend(request.attributes);
        send(self.0.as_raw_fd(), &bytes, MsgFlags::empty())?;
        Ok(())
    }

    /// Sends a request, and gives `each` what the kernel says until it says that this was all.
    pub(super) fn ask(
        &self,
        request: &Request<'_>,
        mut each: impl FnMut(&Message<'_>),
    ) -> io::Result<()> {
        self.send(request)?;
        while !self.receive(MsgFlags::empty(), &mut each)? {}
        Ok(())
    }

    /// Sends a request and reads whether it was done.
    pub(super) fn change(&self, request: Request<'_>) -> io::Result<()> {
        let flags = request.flags | libc::NLM_F_ACK;
        self.ask(&Request { flags, ..request }, |_| {})
    }

    /// Gives `each` what there is, and does not wait. `false`: something was lost, for nobody read.
    pub(super) fn drain(&self, mut each: impl FnMut(&Message<'_>)) -> io::Result<bool> {
        let mut is_whole = true;
        loop {
            match self.receive(MsgFlags::MSG_DONTWAIT, &mut each) {
                Ok(_) => {}
                Err(error) => match error.raw_os_error().map(Errno::from_raw) {
                    Some(Errno::EAGAIN) => return Ok(is_whole),
                    Some(Errno::ENOBUFS) => is_whole = false,
                    Some(Errno::EINTR) => {}
                    _ => return Err(error),
                },
            }
        }
    }

    /// Whether that was the end of what was asked for.
    fn receive(&self, flags: MsgFlags, each: impl FnMut(&Message<'_>)) -> io::Result<bool> {
        let mut buffer = vec![0; 1 << 16];
        let length = recv(self.0.as_raw_fd(), &mut buffer, flags)?;
        messages(&buffer[..length], each)
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Calls `each` with each message. Whether that was the end.
fn messages(mut bytes: &[u8], mut each: impl FnMut(&Message<'_>)) -> io::Result<bool> {
    while let Some(header) = bytes.get(..HEADER) {
        let length = u32::from_ne_bytes([header[0], header[1], header[2], header[3]]) as usize;
        let kind = u16::from_ne_bytes([header[4], header[5]]);
        let Some(payload) = bytes.get(HEADER..length) else {
            return Err(Errno::EBADMSG.into());
        };
        match i32::from(kind) {
            libc::NLMSG_DONE => return Ok(true),
            libc::NLMSG_ERROR => {
                let code = payload
                    .first_chunk::<4>()
                    .map(|code| i32::from_ne_bytes(*code));
                return match code {
                    Some(0) => Ok(true),
                    Some(code) => Err(io::Error::from_raw_os_error(-code)),
                    None => Err(Errno::EBADMSG.into()),
                };
            }
            _ => {
                if let Some((general, contents)) = payload.split_at_checked(GENERAL) {
                    each(&Message {
                        kind,
                        flags: u16::from_ne_bytes([header[6], header[7]]),
                        family: general[0],
                        contents,
                    });
                }
            }
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    Ok(false)
}

/// The attributes in some bytes: type, contents, and both with their header.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8], &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(*bytes.first_chunk()?));
        let kind = u16::from_ne_bytes([*bytes.get(2)?, *bytes.get(3)?]) & TYPE_MASK;
        let (whole, contents) = (bytes.get(..length)?, bytes.get(4..length)?);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, contents, whole))
    })
}

/// The contents of the first attribute of that type.
pub(super) fn inner(bytes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut found = attributes(bytes).filter(|(kind, ..)| *kind == wanted);
    found.next().map(|(_, contents, _)| contents)
}

/// A number of two bytes.
pub(super) fn short(bytes: &[u8]) -> Option<u16> {
    Some(u16::from_be_bytes(*bytes.first_chunk()?))
}

/// A number of four bytes.
pub(super) fn number(bytes: &[u8]) -> Option<u32> {
    Some(u32::from_be_bytes(*bytes.first_chunk()?))
}

/// A number of eight bytes.
pub(super) fn long(bytes: &[u8]) -> Option<u64> {
    Some(u64::from_be_bytes(*bytes.first_chunk()?))
}

/// Adds an attribute.
pub(super) fn write(bytes: &mut Vec<u8>, kind: u16, contents: impl FnOnce(&mut Vec<u8>)) {
    let start = bytes.len();
    bytes.extend([0; 2]);
    bytes.extend(kind.to_ne_bytes());
    contents(bytes);
    let length = (bytes.len() - start) as u16;
    bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    bytes.resize(bytes.len().next_multiple_of(4), 0);
}

/// Adds an attribute that has attributes.
pub(super) fn write_nested(bytes: &mut Vec<u8>, kind: u16, contents: impl FnOnce(&mut Vec<u8>)) {
    write(bytes, NESTED | kind, contents);
}
