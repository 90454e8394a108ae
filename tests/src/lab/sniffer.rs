//! Looking at every IP packet that a machine receives.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Mutex;

use anyhow::{Result, ensure};
use socket2::{Domain, Protocol, Socket, Type};

use super::Node;

/// What matters of one packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Source address.
    pub source: IpAddr,
    /// Destination address.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// Destination port, of TCP and UDP without IP options.
    pub port: Option<u16>,
}

/// Sees what a machine receives and sends, from its making on.
#[derive(Debug)]
pub struct Sniffer {
    socket: Socket,
    packets: Mutex<Vec<Packet>>,
}

impl Sniffer {
    /// Starts on all interfaces of a machine.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn on(node: &Node) -> Result<Self> {
        let every = Protocol::from(i32::from((libc::ETH_P_ALL as u16).to_be()));
        let socket = node.socket(Domain::PACKET, Type::RAW, Some(every))?;
        socket.set_nonblocking(true)?;
        Ok(Self {
            socket,
            packets: Mutex::default(),
        })
    }

    /// How many packets so far are such as asked for.
    pub fn count(&self, mut matches: impl FnMut(&Packet) -> bool) -> usize {
        let mut packets = self
            .packets
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner());
        let mut frame = [0; 128];
        // A frame longer than the buffer is cut to it.
        while let Ok(length) = std::io::Read::read(&mut &self.socket, &mut frame) {
            packets.extend(parse(&frame[..length.min(frame.len())]));
        }
        packets.iter().filter(|packet| matches(packet)).count()
    }

    /// That no packet so far has this source address.
    ///
    /// # Errors
    /// One has.
    pub fn never_saw(&self, source: IpAddr) -> Result<()> {
        let count = self.count(|packet| packet.source == source);
        ensure!(
            count == 0,
            "{count} packets on the wire have the source {source}"
        );
        Ok(())
    }
}

fn parse(frame: &[u8]) -> Option<Packet> {
    let (header, packet) = frame.split_at_checked(14)?;
    let port = |at: usize| Some(u16::from_be_bytes(packet.get(at..at + 2)?.try_into().ok()?));
    match (header[12], header[13]) {
        (0x08, 0x00) => {
            let address =
                |at: usize| -> Option<[u8; 4]> { packet.get(at..at + 4)?.try_into().ok() };
            Some(Packet {
                source: Ipv4Addr::from(address(12)?).into(),
                destination: Ipv4Addr::from(address(16)?).into(),
                protocol: packet[9],
                port: port(22),
            })
        }
        (0x86, 0xdd) => {
            let address =
                |at: usize| -> Option<[u8; 16]> { packet.get(at..at + 16)?.try_into().ok() };
            Some(Packet {
                source: Ipv6Addr::from(address(8)?).into(),
                destination: Ipv6Addr::from(address(24)?).into(),
                protocol: packet[6],
                port: port(42),
            })
        }
        _ => None,
    }
}
