//! Ending TCP connections of the host's own (`sock_diag(7)`), those of the calling thread's
//! network namespace. The socket's next call fails with `ECONNABORTED`.

use std::{
    io,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd, OwnedFd},
};

use nix::{
    errno::Errno,
    libc,
    sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket},
};

/// A connection as its socket on the host sees it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// The socket's own address and port.
    pub local: SocketAddr,
    /// Whom it is connected to.
    pub peer: SocketAddr,
}

/// Message types: linux/sock_diag.h.
const SOCK_DIAG_BY_FAMILY: u16 = 20;
const SOCK_DESTROY: u16 = 21;
/// `TCP_LISTEN`: include/net/tcp_states.h.
const LISTEN: u8 = 10;
/// `struct nlmsghdr`.
const HEADER: usize = 16;
/// `struct inet_diag_req_v2` (linux/inet_diag.h): family, protocol, two bytes, states, socket.
const REQUEST: usize = 56;
/// Where the socket's id begins in `struct inet_diag_msg`, after family, state and two bytes.
const ANSWER_ID: usize = 4;
/// `struct inet_diag_sockid`: ports, addresses, interface, cookie.
const ID: usize = 48;
/// Where its cookie begins.
const COOKIE: usize = 40;
/// No cookie: `INET_DIAG_NOCOOKIE`, twice.
const NO_COOKIE: [u8; 8] = [0xff; 8];

/// Ends a connection. `false`: there is none.
///
/// # Errors
/// Those of the kernel: privilege is missing, or it cannot do this
/// (`CONFIG_INET_DIAG_DESTROY`).
pub fn end(connection: &Connection) -> io::Result<bool> {
    let diag = open()?;
    // The kernel looks a socket up as it does for a packet. Where the connection is gone that
    // may be a listener, which must live.
    let found = match ask(&diag, SOCK_DIAG_BY_FAMILY, connection, NO_COOKIE) {
        Ok(found) => found,
        Err(Errno::ENOENT) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    let Some(&[state, ..]) = found.get(1..) else {
        return Ok(false);
    };
    let Some(id) = found.get(ANSWER_ID..ANSWER_ID + ID) else {
        return Ok(false);
    };
    if state == LISTEN || id[..4] != ports(connection) {
        return Ok(false);
    }
    let mut cookie = [0; 8];
    cookie.copy_from_slice(&id[COOKIE..ID]);
    match ask(&diag, SOCK_DESTROY, connection, cookie) {
        Ok(_) => Ok(true),
        // It ended by itself.
        Err(Errno::ENOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

/// Whether the kernel can end connections, and would for the caller.
pub fn can_end() -> bool {
    // Nobody is connected to port 0.
    let nobody = SocketAddr::from(([127, 0, 0, 1], 0));
    let connection = Connection {
        local: nobody,
        peer: nobody,
    };
    open().is_ok_and(|diag| ask(&diag, SOCK_DESTROY, &connection, NO_COOKIE) == Err(Errno::ENOENT))
}

fn open() -> io::Result<OwnedFd> {
    let kind = SockType::Datagram;
    let protocol = SockProtocol::NetlinkSockDiag;
    Ok(socket(
        AddressFamily::Netlink,
        kind,
        SockFlag::SOCK_CLOEXEC,
        protocol,
    )?)
}

/// Source and destination port, as `struct inet_diag_sockid` has them.
fn ports(connection: &Connection) -> [u8; 4] {
    let ([a, b], [c, d]) = (
        connection.local.port().to_be_bytes(),
        connection.peer.port().to_be_bytes(),
    );
    [a, b, c, d]
}

/// Sends a request about one connection, and returns the payload of the answer; empty: it is
/// done.
fn ask(
    diag: &OwnedFd,
    kind: u16,
    connection: &Connection,
    cookie: [u8; 8],
) -> Result<Vec<u8>, Errno> {
    send(
        diag.as_raw_fd(),
        &request(kind, connection, cookie),
        MsgFlags::empty(),
    )?;
    let mut answer = [0; 1024];
    let length = recv(diag.as_raw_fd(), &mut answer, MsgFlags::empty())?;
    let answer = &answer[..length];
    let (Some(kind), Some(payload)) = (answer.get(4..6), answer.get(HEADER..)) else {
        return Err(Errno::EBADMSG);
    };
    if i32::from(u16::from_ne_bytes([kind[0], kind[1]])) != libc::NLMSG_ERROR {
        return Ok(payload.to_vec());
    }
    // `struct nlmsgerr` begins with a negative error number, or 0.
    match payload
        .first_chunk::<4>()
        .map(|code| i32::from_ne_bytes(*code))
    {
        Some(0) => Ok(Vec::new()),
        Some(code) => Err(Errno::from_raw(-code)),
        None => Err(Errno::EBADMSG),
    }
}

fn request(kind: u16, connection: &Connection, cookie: [u8; 8]) -> Vec<u8> {
    let mut flags = libc::NLM_F_REQUEST as u16;
    if kind == SOCK_DESTROY {
        flags |= libc::NLM_F_ACK as u16;
    }
    let mut bytes = Vec::with_capacity(HEADER + REQUEST);
    bytes.extend(((HEADER + REQUEST) as u32).to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    // Sequence number and port of the sender: each request has its answer before the next one.
    bytes.extend([0; 8]);

    let family = match connection.local {
        SocketAddr::V4(_) => libc::AF_INET,
        SocketAddr::V6(_) => libc::AF_INET6,
    };
    bytes.extend([family as u8, libc::IPPROTO_TCP as u8, 0, 0]);
    // Every state.
    bytes.extend([0xff; 4]);
    bytes.extend(ports(connection));
    for address in [connection.local.ip(), connection.peer.ip()] {
        let mut octets = [0; 16];
        match address {
            IpAddr::V4(v4) => octets[..4].copy_from_slice(&v4.octets()),
            IpAddr::V6(v6) => octets = v6.octets(),
        }
        bytes.extend(octets);
    }
    // Any interface.
    bytes.extend([0; 4]);
    bytes.extend(cookie);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::netlink::Netlink;
    use nix::sched::{CloneFlags, unshare};
    use std::{
        io::Read,
        net::{TcpListener, TcpStream},
    };

    #[test]
    fn connection_is_ended_and_its_listener_is_not() {
        let test = std::thread::spawn(|| {
            if unshare(CloneFlags::CLONE_NEWNET).is_err() {
                println!("skipped: network namespaces need root");
                return;
            }
            Netlink::open().unwrap().set_up("lo").unwrap();
            match can_end() {
                true => check(),
                false => println!("skipped: a kernel without CONFIG_INET_DIAG_DESTROY"),
            }
        });
        test.join().unwrap();
    }

    fn check() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let listener = TcpListener::bind(address).unwrap();
            let peer = listener.local_addr().unwrap();
            let mut client = TcpStream::connect(peer).unwrap();
            let local = client.local_addr().unwrap();
            let (mut server, _) = listener.accept().unwrap();
            let connection = Connection { local, peer };
            assert!(end(&connection).unwrap());
            let error = client.read(&mut [0]).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted);
            // The other side hears of it.
            assert!(server.read(&mut [0]).is_err());
            assert!(!end(&connection).unwrap());
            // As the listener sees it, there is a socket for that, which is not the connection.
            let reverse = Connection {
                local: peer,
                peer: local,
            };
            assert!(!end(&reverse).unwrap());
            TcpStream::connect(peer).expect("the listener lives");
        }
    }
}
