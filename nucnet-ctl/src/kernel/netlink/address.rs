//! Addresses of links.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use nix::errno::Errno;
use nix::sys::utsname::uname;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage, AddressProtocol,
    AddressScope as KernelScope,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Change, Error, Netlink, PROTOCOL};

/// An address that a link has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkAddress {
    /// Interface index.
    pub link: u32,
    /// The address with the length of its prefix.
    pub address: IpNet,
    /// How far it means something.
    pub scope: AddressScope,
    /// Who made it (`IFA_PROTO`, Linux 5.18): [`PROTOCOL`] for nucnet.
    pub protocol: Option<u8>,
    /// Whether another address of the link's subnet comes first (IPv4).
    pub is_secondary: bool,
}

/// How far an address means something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AddressScope {
    /// Beyond the link.
    Global,
    /// On its link only.
    Link,
    /// On this host only.
    Host,
}

impl Netlink {
    /// The addresses of all links.
    pub fn addresses(&self) -> Result<Vec<LinkAddress>, Error> {
        self.dump_addresses(0)
    }

    /// The addresses of one link.
    pub fn addresses_of(&self, link: u32) -> Result<Vec<LinkAddress>, Error> {
        self.dump_addresses(link)
    }

    fn dump_addresses(&self, link: u32) -> Result<Vec<LinkAddress>, Error> {
        let mut message = AddressMessage::default();
        message.header.index = link;
        let replies = self
            .dump(&RouteNetlinkMessage::GetAddress(message))
            .map_err(|failure| match (failure.errno(), link) {
                (Some(Errno::ENODEV), _) => Error::NoLink {
                    link: link.to_string(),
                },
                (_, 0) => failure.to("list", "addresses"),
                _ => failure.to("list the addresses of interface", link),
            })?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewAddress(message) => shown(&message),
                _ => None,
            })
            .filter(|address| link == 0 || address.link == link)
            .collect())
    }

    /// Makes sure that the link has the address. An IPv6 address is used at once, without looking
    /// for duplicates: nucnet alone gives out the addresses of its networks.
    pub fn ensure_address(&self, link: u32, address: IpNet) -> Result<Change, Error> {
        let mut message = about(link, address);
        if let IpNet::V6(_) = address {
            message.header.flags = AddressHeaderFlags::Nodad;
            message
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        if let IpNet::V4(net) = address
            && net.prefix_len() < 31
        {
            message
                .attributes
                .push(AddressAttribute::Broadcast(net.broadcast()));
        }
        message
            .attributes
            .push(AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)));
        let flags = NLM_F_CREATE | NLM_F_EXCL;
        match self.execute(RouteNetlinkMessage::NewAddress(message.clone()), flags) {
            Ok(()) => return Ok(Change::Made),
            Err(failure) if failure.errno() == Some(Errno::EEXIST) => {}
            Err(failure) => return Err(failure.to("add address", address)),
        }
        // IPv6 has an address once, whatever its prefix; that is not changed in place.
        let present = self.addresses_of(link)?;
        if present.iter().any(|present| present.address == address) {
            return Ok(Change::Unchanged);
        }
        for other in present
            .iter()
            .filter(|other| other.address.addr() == address.addr())
        {
            self.remove_address(link, other.address)?;
        }
        self.execute(RouteNetlinkMessage::NewAddress(message), flags)
            .map_err(|failure| failure.to("add address", address))?;
        Ok(Change::Made)
    }

    /// Takes an address off a link; one that is gone, or whose link is, is no error.
    pub fn remove_address(&self, link: u32, address: IpNet) -> Result<Change, Error> {
        match self.execute(RouteNetlinkMessage::DelAddress(about(link, address)), 0) {
            Ok(()) => Ok(Change::Made),
            Err(failure) => match failure.errno() {
                Some(Errno::EADDRNOTAVAIL | Errno::ENODEV) => Ok(Change::Unchanged),
                _ => Err(failure.to("remove address", address)),
            },
        }
    }

    /// Brings the addresses of a link of nucnet's to the wanted ones: first adds what is missing,
    /// then removes nucnet's own that are not wanted. Link-local addresses and, where the kernel
    /// tells them apart (Linux 5.18), those that somebody else added stay.
    pub fn converge_addresses(&self, link: u32, wanted: &[IpNet]) -> Result<Change, Error> {
        let wanted: BTreeSet<IpNet> = wanted.iter().copied().collect();
        let mut change = Change::Unchanged;
        for &address in &wanted {
            if self.ensure_address(link, address)? == Change::Made {
                change = Change::Made;
            }
        }
        let present = self.addresses_of(link)?;
        let marked = kernel_marks_addresses();
        let mut removed = false;
        for stale in present.iter().filter(|present| {
            !wanted.contains(&present.address)
                && present.scope == AddressScope::Global
                && (!marked || present.protocol == Some(PROTOCOL))
        }) {
            self.remove_address(link, stale.address)?;
            removed = true;
        }
        if removed {
            // With an IPv4 address go those that were secondary to it.
            for &address in &wanted {
                self.ensure_address(link, address)?;
            }
            change = Change::Made;
        }
        Ok(change)
    }
}

/// Whether this kernel notes who made an address (`IFA_PROTO`, Linux 5.18). It cannot be asked:
/// older ones ignore the attribute.
fn kernel_marks_addresses() -> bool {
    // A call that always succeeds; if it did not, removing too little is the safe side.
    let Ok(system) = uname() else { return true };
    let release = system.release().to_string_lossy();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= (5, 18),
        _ => true,
    }
}

fn about(link: u32, address: IpNet) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = match address {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    };
    message.header.prefix_len = address.prefix_len();
    message.header.index = link;
    message.attributes = vec![
        AddressAttribute::Local(address.addr()),
        AddressAttribute::Address(address.addr()),
    ];
    message
}

fn shown(message: &AddressMessage) -> Option<LinkAddress> {
    let mut local = None;
    let mut address = None;
    let mut protocol = None;
    for attribute in &message.attributes {
        match attribute {
            // With a peer, this is ours and the other the peer's.
            AddressAttribute::Local(ip) => local = Some(*ip),
            AddressAttribute::Address(ip) => address = Some(*ip),
            AddressAttribute::Protocol(number) => protocol = Some(u8::from(*number)),
            _ => {}
        }
    }
    let address: IpAddr = local.or(address)?;
    Some(LinkAddress {
        link: message.header.index,
        address: IpNet::new(address, message.header.prefix_len).ok()?,
        scope: match message.header.scope {
            KernelScope::Link => AddressScope::Link,
            KernelScope::Host | KernelScope::Nowhere => AddressScope::Host,
            _ => AddressScope::Global,
        },
        protocol,
        is_secondary: message.header.flags.contains(AddressHeaderFlags::Secondary),
    })
}
