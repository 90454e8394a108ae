//! Sockets of the host that own a port: TCP listeners, and UDP sockets that hear everybody.
//!
//! They are those of the calling thread's network namespace. `/proc/net` lists them, but to read
//! it costs some 20 ms, because the kernel walks its table of connections: it is asked only if a
//! port cannot be bound, which may have other reasons too (a connection of the host's own).

use super::FileError;
use crate::model::publish::{HostAddress, Protocol, PublishSpec};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrStorage, bind, setsockopt, socket,
        sockopt::{Ipv6V6Only, Mark, ReuseAddr},
    },
};
use nucnet_common::hold::PROBE_MARK;
use std::{
    cell::OnceCell,
    fmt, fs,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::fd::AsRawFd,
    path::Path,
};

/// A socket that owns a port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listener {
    /// The protocol.
    pub protocol: Protocol,
    /// Its address; unspecified: every one.
    pub address: IpAddr,
    /// Its port.
    pub port: u16,
    /// Number of its inode, by which its process is found.
    pub inode: u64,
}

impl fmt::Display for Listener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            IpAddr::V4(v4) => write!(f, "{v4}:{}/{}", self.port, self.protocol),
            IpAddr::V6(v6) => write!(f, "[{v6}]:{}/{}", self.port, self.protocol),
        }
    }
}

/// States in `/proc/net`: include/net/tcp_states.h.
const LISTEN: u8 = 0x0a;
const CLOSE: u8 = 0x07;

/// All sockets that own a port of the protocol, as `/proc/net` lists them.
fn listeners(protocol: Protocol) -> Result<Vec<Listener>, FileError> {
    let mut found = Vec::new();
    for family in ["", "6"] {
        let path = format!("/proc/thread-self/net/{protocol}{family}");
        let failed = |source| FileError {
            action: "read",
            path: path.clone().into(),
            source,
        };
        let file = match fs::File::open(&path) {
            Ok(file) => file,
            // No IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            Err(error) => return Err(failed(error)),
        };
        for line in BufReader::new(file).lines().skip(1) {
            let line = line.map_err(failed)?;
            let Some((listener, state)) = parse(&line, protocol) else {
                continue;
            };
            match (protocol, state) {
                (Protocol::Tcp, LISTEN) | (Protocol::Udp, CLOSE) => found.push(listener),
                // The kernel lists listeners first; of the others there may be very many.
                (Protocol::Tcp, _) => break,
                (Protocol::Udp, _) => {}
            }
        }
    }
    Ok(found)
}

/// `sl local_address rem_address st queues timer retrnsmt uid timeout inode ...`
fn parse(line: &str, protocol: Protocol) -> Option<(Listener, u8)> {
    let mut fields = line.split_ascii_whitespace().skip(1);
    let (address, port) = fields.next()?.split_once(':')?;
    let state = u8::from_str_radix(fields.nth(1)?, 16).ok()?;
    let inode = fields.nth(5)?.parse().ok()?;
    let address = match address.len() {
        // Words of 32 bits, each in the byte order of the machine.
        8 => IpAddr::V4(u32::from_str_radix(address, 16).ok()?.to_ne_bytes().into()),
        32 => {
            let mut octets = [0; 16];
            for (index, word) in octets.chunks_exact_mut(4).enumerate() {
                let text = address.get(8 * index..8 * index + 8)?;
                word.copy_from_slice(&u32::from_str_radix(text, 16).ok()?.to_ne_bytes());
            }
            Ipv6Addr::from(octets).to_canonical()
        }
        _ => return None,
    };
    let port = u16::from_str_radix(port, 16).ok()?;
    Some((
        Listener {
            protocol,
            address,
            port,
            inode,
        },
        state,
    ))
}

/// The sockets of the host, looked at when needed.
#[derive(Debug, Default)]
pub struct Sockets {
    tcp: OnceCell<Vec<Listener>>,
    udp: OnceCell<Vec<Listener>>,
}

/// Of more ports than this the list is asked at once.
const FEW_PORTS: u32 = 64;

impl Sockets {
    /// A socket that has a port which the publish wants.
    pub fn in_the_way(&self, spec: &PublishSpec) -> Result<Option<&Listener>, FileError> {
        let Some(ports) = spec.host_ports() else {
            return Ok(None);
        };
        if ports.count() <= FEW_PORTS
            && ports
                .iter()
                .all(|port| can_bind(spec.host(), port, spec.protocol()))
        {
            return Ok(None);
        }
        let list = match spec.protocol() {
            Protocol::Tcp => &self.tcp,
            Protocol::Udp => &self.udp,
        };
        if list.get().is_none() {
            let found = listeners(spec.protocol())?;
            return Ok(in_the_way(spec, list.get_or_init(|| found)));
        }
        Ok(list.get().and_then(|listeners| in_the_way(spec, listeners)))
    }
}

/// Whether nobody has the port on those addresses. One that the host does not have is nobody's.
fn can_bind(host: HostAddress, port: u16, protocol: Protocol) -> bool {
    let v4 = match host {
        HostAddress::One(IpAddr::V4(address)) => address,
        _ => Ipv4Addr::UNSPECIFIED,
    };
    let v6 = match host {
        HostAddress::One(IpAddr::V6(address)) => address,
        _ => Ipv6Addr::UNSPECIFIED,
    };
    // One socket for both families tells of most ports that they are free.
    if host.v4() && host.v6() && probe(SocketAddr::from((v6, port)), protocol, Hears::Both).is_ok()
    {
        return true;
    }
    let free_v4 = || is_free((v4, port).into(), protocol);
    let free_v6 = || is_free((v6, port).into(), protocol);
    (!host.v4() || free_v4()) && (!host.v6() || free_v6())
}

/// Whether nobody has a port at an address.
fn is_free(address: SocketAddr, protocol: Protocol) -> bool {
    probe(address, protocol, Hears::ItsFamily) != Err(Errno::EADDRINUSE)
}

/// What a socket that is bound to every IPv6 address hears.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hears {
    ItsFamily,
    Both,
}

/// Binds a socket and closes it.
fn probe(address: SocketAddr, protocol: Protocol, hears: Hears) -> Result<(), Errno> {
    let family = match address {
        SocketAddr::V4(_) => AddressFamily::Inet,
        SocketAddr::V6(_) => AddressFamily::Inet6,
    };
    let kind = match protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let probe = socket(family, kind, SockFlag::SOCK_CLOEXEC, None)?;
    // Ports that are being published are held already, and not from this one. Who may not mark
    // sockets may not load programs either.
    let _ = setsockopt(&probe, Mark, &PROBE_MARK);
    // Of TCP only listeners are to be in the way, not what is left of connections.
    setsockopt(&probe, ReuseAddr, &(protocol == Protocol::Tcp))?;
    if address.is_ipv6() {
        setsockopt(&probe, Ipv6V6Only, &(hears == Hears::ItsFamily))?;
    }
    bind(probe.as_raw_fd(), &SockaddrStorage::from(address))
}

/// Which of the listeners has a port that the publish wants.
fn in_the_way<'a>(spec: &PublishSpec, listeners: &'a [Listener]) -> Option<&'a Listener> {
    let ports = spec.host_ports()?;
    listeners.iter().find(|listener| {
        listener.protocol == spec.protocol()
            && ports.contains(listener.port)
            && match listener.address {
                // Whether it hears IPv4 too, `/proc/net` does not tell.
                IpAddr::V6(any) if any.is_unspecified() => {
                    let v4 = (Ipv4Addr::UNSPECIFIED, listener.port).into();
                    let is_taken = || !is_free(v4, listener.protocol);
                    spec.host().v6() || (spec.host().v4() && is_taken())
                }
                IpAddr::V4(any) if any.is_unspecified() => spec.host().v4(),
                address => spec.host().overlaps(HostAddress::One(address)),
            }
    })
}

/// The process that has the socket: id and command. It looks at every process: for messages.
pub fn process_of(listener: &Listener) -> Option<(u32, String)> {
    let wanted = format!("socket:[{}]", listener.inode);
    fs::read_dir("/proc")
        .ok()?
        .filter_map(Result::ok)
        .find_map(|entry| {
            let pid: u32 = entry.file_name().to_str()?.parse().ok()?;
            let holds = |path: &Path| {
                fs::read_dir(path).ok().is_some_and(|fds| {
                    fds.filter_map(Result::ok)
                        .filter_map(|fd| fs::read_link(fd.path()).ok())
                        .any(|target| target.as_os_str() == wanted.as_str())
                })
            };
            holds(&entry.path().join("fd")).then(|| {
                let command = fs::read_to_string(entry.path().join("comm")).unwrap_or_default();
                (pid, command.trim().to_owned())
            })
        })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::{TcpListener, TcpStream, UdpSocket};

    #[test]
    fn lines_of_proc_net_are_understood() {
        let line = "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000  \
                    1000        0 12345 1 0000000000000000 100 0 0 10 0";
        let (listener, state) = parse(line, Protocol::Tcp).unwrap();
        assert_eq!(
            (listener.to_string().as_str(), state),
            ("127.0.0.1:8080/tcp", LISTEN)
        );
        assert_eq!(listener.inode, 12_345);
        let line = "  1: 00000000000000000000000001000000:0035 \
                    00000000000000000000000000000000:0000 07 00000000:00000000 00:00000000 \
                    00000000 0 0 77 2 0000000000000000 0";
        let (listener, state) = parse(line, Protocol::Udp).unwrap();
        assert_eq!(
            (listener.to_string().as_str(), state),
            ("[::1]:53/udp", CLOSE)
        );
        assert_eq!(parse("garbage", Protocol::Tcp), None);
    }

    fn found(spec: &str) -> Option<Listener> {
        let sockets = Sockets::default();
        sockets.in_the_way(&spec.parse().unwrap()).unwrap().cloned()
    }

    #[test]
    fn a_listener_is_in_the_way_and_its_process_is_named() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let port = tcp.local_addr().unwrap().port();
        let listener = found(&format!("{port}:80")).expect("TCP listener");
        assert_eq!(
            process_of(&listener).expect("process").0,
            std::process::id()
        );
        assert!(found(&format!("127.0.0.1:{port}:80")).is_some());
        assert_eq!(found(&format!("127.0.0.2:{port}:80")), None);
        assert_eq!(found(&format!("[::]:{port}:80")), None);
        assert_eq!(
            found(&format!("192.0.2.77:{port}:80")),
            None,
            "the host has no such address"
        );
        let port = udp.local_addr().unwrap().port();
        assert!(found(&format!("{port}:53/udp")).is_some());
        assert!(found(&format!("{}-{port}:{}-{port}/udp", port - 99, port - 99)).is_some());
    }

    #[test]
    fn a_connection_is_not_in_the_way() {
        let server = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(server.local_addr().unwrap()).unwrap();
        let port = client.local_addr().unwrap().port();
        assert!(
            !can_bind(HostAddress::Any, port, Protocol::Tcp),
            "or this shows nothing"
        );
        assert_eq!(found(&format!("{port}:80")), None);
    }

    #[test]
    fn a_socket_for_ipv6_only_is_not_in_the_way_of_ipv4() {
        let Ok(both) = TcpListener::bind("[::]:0") else {
            println!("skipped: no IPv6");
            return;
        };
        let port = both.local_addr().unwrap().port();
        let spec: PublishSpec = format!("0.0.0.0:{port}:80").parse().unwrap();
        let list = listeners(Protocol::Tcp).unwrap();
        assert!(in_the_way(&spec, &list).is_some(), "it hears IPv4 too");
        drop(both);
        assert_eq!(
            in_the_way(&spec, &list),
            None,
            "a probe decides, not the list"
        );
    }
}
