//! Sockets of the host that own a port: TCP listeners, and UDP sockets that hear everybody.
//!
//! They are those of the calling thread's network namespace.

use super::FileError;
use crate::model::publish::{HostAddress, Protocol, PublishSpec};
use nix::{
    errno::Errno,
    sys::socket::{
        AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt::ReuseAddr,
    },
};
use std::{
    fmt, fs,
    io::{self, BufRead, BufReader},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddrV4},
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
pub fn listeners(protocol: Protocol) -> Result<Vec<Listener>, FileError> {
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

/// Which of the listeners has a port that the publish wants.
pub fn in_the_way<'a>(spec: &PublishSpec, listeners: &'a [Listener]) -> Option<&'a Listener> {
    let ports = spec.host_ports()?;
    listeners.iter().find(|listener| {
        listener.protocol == spec.protocol()
            && (ports.first()..=ports.last()).contains(&listener.port)
            && match listener.address {
                IpAddr::V6(any) if any.is_unspecified() => {
                    spec.host().v6() || (spec.host().v4() && is_taken_v4(listener))
                }
                IpAddr::V4(any) if any.is_unspecified() => spec.host().v4(),
                address => spec.host().overlaps(HostAddress::One(address)),
            }
    })
}

/// Whether a socket that hears all of IPv6 hears IPv4 too, which `/proc/net` does not tell.
fn is_taken_v4(listener: &Listener) -> bool {
    let kind = match listener.protocol {
        Protocol::Tcp => SockType::Stream,
        Protocol::Udp => SockType::Datagram,
    };
    let Ok(probe) = socket(AddressFamily::Inet, kind, SockFlag::SOCK_CLOEXEC, None) else {
        return true;
    };
    // Of TCP only listeners are to be in the way, not what is left of connections.
    if listener.protocol == Protocol::Tcp && setsockopt(&probe, ReuseAddr, &true).is_err() {
        return true;
    }
    use std::os::fd::AsRawFd;
    let address = SockaddrIn::from(SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, listener.port));
    bind(probe.as_raw_fd(), &address) == Err(Errno::EADDRINUSE)
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
    use std::net::{TcpListener, UdpSocket};

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

    #[test]
    fn a_socket_for_ipv6_only_is_not_in_the_way_of_ipv4() {
        let Ok(both) = TcpListener::bind("[::]:0") else {
            println!("skipped: no IPv6");
            return;
        };
        let port = both.local_addr().unwrap().port();
        let all = listeners(Protocol::Tcp).unwrap();
        let spec = format!("0.0.0.0:{port}:80").parse().unwrap();
        assert!(in_the_way(&spec, &all).is_some(), "it hears IPv4 too");
        drop(both);
        assert_eq!(
            in_the_way(&spec, &all),
            None,
            "a probe decides, not the list"
        );
    }

    #[test]
    fn a_listener_is_in_the_way_and_its_process_is_named() {
        let tcp = TcpListener::bind("127.0.0.1:0").unwrap();
        let udp = UdpSocket::bind("127.0.0.1:0").unwrap();
        let ports = (
            tcp.local_addr().unwrap().port(),
            udp.local_addr().unwrap().port(),
        );
        let all = [
            listeners(Protocol::Tcp).unwrap(),
            listeners(Protocol::Udp).unwrap(),
        ]
        .concat();
        let found = |spec: String| in_the_way(&spec.parse().unwrap(), &all).cloned();
        let (tcp_port, udp_port) = ports;
        let listener = found(format!("{tcp_port}:80")).expect("TCP listener");
        assert_eq!(
            process_of(&listener).expect("process").0,
            std::process::id()
        );
        assert!(found(format!("127.0.0.1:{tcp_port}:80")).is_some());
        assert_eq!(found(format!("127.0.0.2:{tcp_port}:80")), None);
        assert_eq!(found(format!("[::]:{tcp_port}:80")), None);
        assert!(found(format!("{udp_port}:53/udp")).is_some());
        drop((tcp, udp));
    }
}
