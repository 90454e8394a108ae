//! Permanent neighbours: who has an address, without asking; and whom the host answers for.

use std::net::IpAddr;

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use rtnetlink::packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use rtnetlink::packet_route::route::RouteProtocol;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Change, Error, Failure, Mac, Netlink, PROTOCOL};

/// A permanent neighbour.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Neighbour {
    /// Interface index.
    pub link: u32,
    /// IP address.
    pub address: IpAddr,
    /// Link-layer address.
    pub mac: Mac,
}

impl Netlink {
    /// Makes the neighbour permanent, in place of what may be known about the address.
    pub fn ensure_neighbour(&self, neighbour: &Neighbour) -> Result<(), Error> {
        let mut message = about(neighbour.link, neighbour.address);
        message.header.state = NeighbourState::Permanent;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(neighbour.mac.to_vec()));
        message
            .attributes
            .push(NeighbourAttribute::Protocol(RouteProtocol::from(PROTOCOL)));
        self.execute(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(|failure| failure.to("add neighbour", neighbour.address))
    }

    /// Forgets a neighbour; one that is gone, or whose interface is, is no error.
    pub fn remove_neighbour(&self, link: u32, address: IpAddr) -> Result<Change, Error> {
        self.forget(about(link, address))
            .map_err(|failure| failure.to("remove neighbour", address))
    }

    /// Has the host answer for an address on a link, where that link does so (`proxy_ndp`).
    pub fn ensure_proxy(&self, link: u32, address: IpAddr) -> Result<(), Error> {
        let mut message = proxy(link, address);
        message
            .attributes
            .push(NeighbourAttribute::Protocol(RouteProtocol::from(PROTOCOL)));
        self.execute(
            RouteNetlinkMessage::NewNeighbour(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(|failure| failure.to("answer for", address))
    }

    /// Has the host answer for an address no more; where it did not, that is no error.
    pub fn remove_proxy(&self, link: u32, address: IpAddr) -> Result<Change, Error> {
        self.forget(proxy(link, address))
            .map_err(|failure| failure.to("stop answering for", address))
    }

    /// Says which port of a bridge a link-layer address is at, for good.
    pub fn ensure_station(&self, port: u32, mac: Mac) -> Result<(), Error> {
        self.execute(
            RouteNetlinkMessage::NewNeighbour(station(port, mac)),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
        .map_err(|failure| failure.to("add a station to interface", port))
    }

    /// Forgets what was said of a link-layer address; where nothing was, that is no error.
    pub fn remove_station(&self, port: u32, mac: Mac) -> Result<Change, Error> {
        self.forget(station(port, mac))
            .map_err(|failure| failure.to("remove a station from interface", port))
    }

    /// Removes an entry, unless it or its interface is gone.
    fn forget(&self, entry: NeighbourMessage) -> Result<Change, Failure> {
        match self.execute(RouteNetlinkMessage::DelNeighbour(entry), 0) {
            Ok(()) => Ok(Change::Made),
            Err(failure) => match failure.errno() {
                Some(Errno::ENOENT | Errno::ENODEV | Errno::ENXIO) => Ok(Change::Unchanged),
                _ => Err(failure),
            },
        }
    }

    /// The permanent neighbours of a link.
    pub fn neighbours(&self, link: u32) -> Result<Vec<Neighbour>, Error> {
        let mut message = NeighbourMessage::default();
        message.attributes = vec![NeighbourAttribute::IfIndex(link)];
        let replies = self
            .dump(&RouteNetlinkMessage::GetNeighbour(message))
            .map_err(|failure| failure.to("list the neighbours of interface", link))?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewNeighbour(message) => permanent(&message),
                _ => None,
            })
            .filter(|neighbour| neighbour.link == link)
            .collect())
    }
}

fn about(link: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    };
    message.header.ifindex = link;
    message.attributes = vec![NeighbourAttribute::Destination(address.into())];
    message
}

fn proxy(link: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = about(link, address);
    message.header.flags = NeighbourFlags::Proxy;
    message
}

fn station(port: u32, mac: Mac) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = port;
    message.header.flags = NeighbourFlags::Controller;
    message.header.state = NeighbourState::Noarp;
    message.attributes = vec![NeighbourAttribute::LinkLayerAddress(mac.to_vec())];
    message
}

fn permanent(message: &NeighbourMessage) -> Option<Neighbour> {
    if message.header.state != NeighbourState::Permanent {
        return None;
    }
    let mut address = None;
    let mut mac = None;
    for attribute in &message.attributes {
        match attribute {
            NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => {
                address = Some(IpAddr::V4(*v4));
            }
            NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => {
                address = Some(IpAddr::V6(*v6));
            }
            NeighbourAttribute::LinkLayerAddress(bytes) => mac = bytes.as_slice().try_into().ok(),
            _ => {}
        }
    }
    Some(Neighbour {
        link: message.header.ifindex,
        address: address?,
        mac: mac?,
    })
}
