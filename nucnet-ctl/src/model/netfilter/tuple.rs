//! One direction of a connection, as the kernel tells connections apart.

use crate::model::rule::Destination;
use nucnet_common::packet::{ICMP, ICMPV6};
use std::net::IpAddr;

/// One direction of a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple {
    /// Who sends.
    pub source: IpAddr,
    /// To whom.
    pub destination: IpAddr,
    /// IP protocol number.
    pub protocol: u8,
    /// The sender's port; 0: the protocol has none. Of an ICMP query, its identifier.
    pub source_port: u16,
    /// The receiver's port; 0: the protocol has none.
    pub destination_port: u16,
}

impl Tuple {
    /// The direction of its answers, if nothing is translated.
    #[must_use]
    pub fn turned(self) -> Self {
        // Both directions of an ICMP query have its identifier.
        let (source_port, destination_port) = match self.protocol {
            ICMP | ICMPV6 => (self.source_port, self.destination_port),
            _ => (self.destination_port, self.source_port),
        };
        Self {
            source: self.destination,
            destination: self.source,
            source_port,
            destination_port,
            ..self
        }
    }

    /// Where it goes, as rules of policies have it. `is_hosts`: to the host itself.
    pub fn goes_to(&self, is_hosts: bool) -> Destination {
        Destination {
            address: self.destination,
            protocol: self.protocol,
            port: self.destination_port,
            is_hosts,
        }
    }

    /// Who sends, with the port.
    pub fn sender(&self) -> (IpAddr, u16) {
        (self.source, self.source_port)
    }
}
