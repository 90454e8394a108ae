//! New addresses and ports for a packet, written into its frame.

use core::mem::offset_of;

use network_types::ip::{Ipv4Hdr, Ipv6Hdr};

use super::{
    Balance, Covered, Delta, Family, Frame, Kind, Packet,
    address::{quarter, same},
};
use crate::abi::{Address, Flow, FlowKey, Reason};

/// Where the part of an IPv4 header begins that is rewritten, up to its end.
const REST: u32 = offset_of!(Ipv4Hdr, ttl) as u32;

/// New addresses and ports for a packet. For an echo message both ports are its identifier.
#[repr(C, align(4))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rewrite {
    /// New source address.
    pub source: Address,
    /// New destination address.
    pub destination: Address,
    /// New source port.
    pub source_port: u16,
    /// New destination port.
    pub destination_port: u16,
    /// Whether it crosses a router: time to live or hop limit less one.
    pub hop: bool,
}

impl Rewrite {
    /// Leaves everything as it is.
    #[inline(always)]
    pub fn none(packet: &Packet) -> Self {
        Self {
            source: packet.source,
            destination: packet.destination,
            source_port: packet.source_port,
            destination_port: packet.destination_port,
            hop: false,
        }
    }

    /// What a packet of a flow's endpoint has on its way to the peer.
    #[inline(always)]
    pub fn to_peer(flow: &Flow, packet: &Packet, hop: bool) -> Self {
        Self {
            source: flow.external,
            destination: flow.peer,
            source_port: flow.external_port,
            destination_port: if packet.is_echo() {
                flow.external_port
            } else {
                flow.peer_port
            },
            hop,
        }
    }

    /// What a packet of a flow's peer has on its way to the endpoint.
    #[inline(always)]
    pub fn to_inside(key: &FlowKey, packet: &Packet, hop: bool) -> Self {
        Self {
            source: key.peer,
            destination: key.inside,
            source_port: if packet.is_echo() {
                key.inside_port
            } else {
                key.peer_port
            },
            destination_port: key.inside_port,
            hop,
        }
    }

    /// Writes the changes into the frame and mends its checksums.
    ///
    /// # Errors
    /// [`Reason::Helper`] if the kernel refuses a write to bytes that it gave out before. The
    /// packet is then dropped, never sent on.
    #[inline(always)]
    pub fn apply<F: Frame>(&self, frame: &F, packet: &Packet) -> Result<(), Reason> {
        let family = packet.family;
        let addresses = Delta::NONE
            .address(family, &packet.source, &self.source)
            .address(family, &packet.destination, &self.destination);
        let moved =
            !same(&packet.source, &self.source) || !same(&packet.destination, &self.destination);

        let covered = Covered {
            pseudo_header: true,
            may_be_absent: packet.kind == Kind::Udp,
        };
        if moved && packet.covers_addresses() {
            frame.fix_checksum(packet.checksum(), addresses, covered)?;
        }
        let ports = self.fix_ports(frame, packet, covered)?;
        match (family, ports) {
            // Right behind a header without options, they are written along with it.
            (Family::V4, Some(ports)) if packet.l4 - packet.l3 == Ipv4Hdr::LEN as u32 => {
                return frame.store(
                    packet.l3 + REST,
                    &join(self.rest_of_v4(packet, addresses), ports),
                    Balance::Balanced,
                );
            }
            (_, Some(ports)) => frame.store(packet.l4, &ports, Balance::Balanced)?,
            (_, None) => {}
        }
        match family {
            Family::V4 if moved || self.hop => frame.store(
                packet.l3 + REST,
                &self.rest_of_v4(packet, addresses),
                Balance::Balanced,
            ),
            Family::V4 => Ok(()),
            Family::V6 => self.apply_v6(frame, packet, moved),
        }
    }

    /// Mends the layer 4 checksum for new ports, which are then still to be written: `Some`. The
    /// identifier of an echo message, which is elsewhere, is written at once.
    #[inline(always)]
    fn fix_ports<F: Frame>(
        &self,
        frame: &F,
        packet: &Packet,
        covered: Covered,
    ) -> Result<Option<[u8; 4]>, Reason> {
        if !packet.is_trackable()
            || packet.source_port == self.source_port
                && packet.destination_port == self.destination_port
        {
            return Ok(None);
        }
        let covered = Covered {
            pseudo_header: false,
            ..covered
        };
        if packet.is_echo() {
            let old = packet.source_port.to_be_bytes();
            let new = self.source_port.to_be_bytes();
            let delta = Delta::NONE.word([old[0], old[1], 0, 0], [new[0], new[1], 0, 0]);
            frame.fix_checksum(packet.checksum(), delta, covered)?;
            frame.store(packet.l4 + 4, &new, Balance::Balanced)?;
            return Ok(None);
        }
        let old = ports(packet.source_port, packet.destination_port);
        let new = ports(self.source_port, self.destination_port);
        frame.fix_checksum(packet.checksum(), Delta::NONE.word(old, new), covered)?;
        Ok(Some(new))
    }

    /// The rest of an IPv4 header from the time to live on: protocol, checksum, addresses.
    #[inline(always)]
    fn rest_of_v4(&self, packet: &Packet, addresses: Delta) -> [u8; 12] {
        let mut delta = addresses;
        let mut ttl = packet.ttl;
        if self.hop {
            ttl = ttl.wrapping_sub(1);
            delta = delta.word(
                [packet.ttl, packet.protocol, 0, 0],
                [ttl, packet.protocol, 0, 0],
            );
        }
        let check = delta.applied(packet.header_checksum);
        let (source, destination) = (quarter(&self.source, 12), quarter(&self.destination, 12));
        [
            ttl,
            packet.protocol,
            check[0],
            check[1],
            source[0],
            source[1],
            source[2],
            source[3],
            destination[0],
            destination[1],
            destination[2],
            destination[3],
        ]
    }

    #[inline(always)]
    fn apply_v6<F: Frame>(&self, frame: &F, packet: &Packet, moved: bool) -> Result<(), Reason> {
        if self.hop {
            const HOP_LIMIT: u32 = offset_of!(Ipv6Hdr, hop_limit) as u32;
            let hop_limit = [packet.ttl.wrapping_sub(1)];
            frame.store(packet.l3 + HOP_LIMIT, &hop_limit, Balance::Unbalanced)?;
        }
        if moved {
            const SOURCE: u32 = offset_of!(Ipv6Hdr, src_addr) as u32;
            let mut addresses = [0; 32];
            addresses[..16].copy_from_slice(&self.source);
            addresses[16..].copy_from_slice(&self.destination);
            frame.store(packet.l3 + SOURCE, &addresses, Balance::Unbalanced)?;
        }
        Ok(())
    }
}

#[inline(always)]
pub(crate) fn ports(source: u16, destination: u16) -> [u8; 4] {
    let (source, destination) = (source.to_be_bytes(), destination.to_be_bytes());
    [source[0], source[1], destination[0], destination[1]]
}

#[inline(always)]
fn join(header: [u8; 12], ports: [u8; 4]) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..12].copy_from_slice(&header);
    bytes[12..].copy_from_slice(&ports);
    bytes
}
