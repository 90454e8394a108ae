//! A UDP server that tells each client what it sees of it, and a client for it.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{
    ControlMessage, ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, sendmsg, setsockopt,
    sockopt,
};

/// What a server saw of one datagram.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// Source address and port.
    pub peer: SocketAddr,
    /// Time to live or hop limit on arrival.
    pub ttl: i32,
    /// What it said.
    pub text: String,
}

/// Answers every datagram with what it saw, until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Vec<Seen>>>,
    answering: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on a bound socket.
    ///
    /// # Errors
    /// The kernel refuses to tell the time to live.
    pub fn start(socket: UdpSocket) -> Result<Self> {
        if socket.local_addr()?.is_ipv6() {
            setsockopt(&socket, sockopt::Ipv6RecvHopLimit, &true)?;
            setsockopt(&socket, sockopt::Ipv6RecvPacketInfo, &true)?;
        } else {
            setsockopt(&socket, sockopt::Ipv4RecvTtl, &true)?;
            setsockopt(&socket, sockopt::Ipv4PacketInfo, &true)?;
        }
        // Bounds how long the end of the server is overlooked.
        socket.set_read_timeout(Some(Duration::from_millis(50)))?;
        let stop = Arc::new(AtomicBool::new(false));
        let seen = Arc::new(Mutex::new(Vec::new()));
        let (over, list) = (stop.clone(), seen.clone());
        let answering = std::thread::spawn(move || {
            while !over.load(Ordering::Relaxed) {
                // Timeouts, and ICMP errors about earlier answers.
                let Ok((datagram, asked)) = receive(&socket) else {
                    continue;
                };
                let answer = format!("{} {} {}", datagram.peer, datagram.ttl, datagram.text);
                let peer = datagram.peer;
                list.lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .push(datagram);
                let _ = send_as(&socket, asked, peer, answer.as_bytes());
            }
        });
        Ok(Self {
            stop,
            seen,
            answering: Some(answering),
        })
    }

    /// Every datagram so far, in order.
    pub fn seen(&self) -> Vec<Seen> {
        self.seen
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(answering) = self.answering.take() {
            let _ = answering.join();
        }
    }
}

/// One datagram, and the address that it was sent to.
fn receive(socket: &UdpSocket) -> io::Result<(Seen, Asked)> {
    let mut bytes = [0; 2048];
    let mut space = nix::cmsg_space!(i32, libc::in6_pktinfo);
    let mut parts = [IoSliceMut::new(&mut bytes)];
    let message = recvmsg::<SockaddrStorage>(
        socket.as_raw_fd(),
        &mut parts,
        Some(&mut space),
        MsgFlags::empty(),
    )?;
    let (mut ttl, mut asked) = (None, None);
    for message in message.cmsgs()? {
        match message {
            ControlMessageOwned::Ipv4Ttl(limit) | ControlMessageOwned::Ipv6HopLimit(limit) => {
                ttl = Some(limit);
            }
            ControlMessageOwned::Ipv4PacketInfo(info) => {
                asked = Some(Asked::V4(libc::in_pktinfo {
                    ipi_ifindex: 0,
                    ipi_spec_dst: info.ipi_addr,
                    ipi_addr: libc::in_addr { s_addr: 0 },
                }));
            }
            ControlMessageOwned::Ipv6PacketInfo(info) => {
                asked = Some(Asked::V6(libc::in6_pktinfo {
                    ipi6_ifindex: 0,
                    ..info
                }));
            }
            _ => {}
        }
    }
    let peer = message.address.and_then(|address| {
        let v4 = address
            .as_sockaddr_in()
            .map(|v4| SocketAddr::V4((*v4).into()));
        v4.or_else(|| {
            address
                .as_sockaddr_in6()
                .map(|v6| SocketAddr::V6((*v6).into()))
        })
    });
    let length = message.bytes;
    let (Some(ttl), Some(peer), Some(asked)) = (ttl, peer, asked) else {
        return Err(io::ErrorKind::InvalidData.into());
    };
    Ok((
        Seen {
            peer,
            ttl,
            text: String::from_utf8_lossy(&bytes[..length]).into_owned(),
        },
        asked,
    ))
}

/// The address of ours that a client spoke to: a good server answers from there.
enum Asked {
    V4(libc::in_pktinfo),
    V6(libc::in6_pktinfo),
}

fn send_as(socket: &UdpSocket, asked: Asked, to: SocketAddr, bytes: &[u8]) -> io::Result<()> {
    let source = match &asked {
        Asked::V4(info) => ControlMessage::Ipv4PacketInfo(info),
        Asked::V6(info) => ControlMessage::Ipv6PacketInfo(info),
    };
    let to = SockaddrStorage::from(to);
    let parts = [IoSlice::new(bytes)];
    sendmsg(
        socket.as_raw_fd(),
        &parts,
        &[source],
        MsgFlags::empty(),
        Some(&to),
    )?;
    Ok(())
}

/// Sends a text to a server and returns what the server saw of it.
///
/// # Errors
/// No answer within the time given, one from another address, or not the server's.
pub fn exchange(socket: &UdpSocket, to: SocketAddr, text: &str, limit: Duration) -> Result<Seen> {
    socket.set_read_timeout(Some(limit))?;
    socket
        .send_to(text.as_bytes(), to)
        .with_context(|| format!("sending to {to}"))?;
    let mut bytes = [0; 2048];
    let (length, from) = socket
        .recv_from(&mut bytes)
        .with_context(|| format!("waiting for {to} to answer"))?;
    ensure!(from == to, "asked {to}, and {from} answers");
    let answer = String::from_utf8_lossy(&bytes[..length]).into_owned();
    let parse = || {
        let mut words = answer.splitn(3, ' ');
        Some(Seen {
            peer: words.next()?.parse().ok()?,
            ttl: words.next()?.parse().ok()?,
            text: words.next()?.to_owned(),
        })
    };
    parse().with_context(|| format!("not an answer of the server: {answer}"))
}
