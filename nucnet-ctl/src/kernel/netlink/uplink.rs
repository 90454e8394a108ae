//! Interfaces of the host by which packets may come and go.

use std::collections::BTreeMap;

use ipnet::IpNet;

use super::{Error, Link, LinkType, Netlink, PROTOCOL};

/// An interface that is not nucnet's own and leads somewhere.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uplink {
    /// The interface.
    pub link: Link,
    /// Its addresses; none where a default route uses an interface without.
    pub addresses: Vec<IpNet>,
}

impl Netlink {
    /// All interfaces that have an address or a default route, are not nucnet's own and not
    /// loopback, in the order of their indices. There may be none.
    pub fn uplinks(&self) -> Result<Vec<Uplink>, Error> {
        let mut addresses = BTreeMap::<u32, Vec<IpNet>>::new();
        for address in self.addresses()? {
            // Where the kernel notes who made an address (Linux 5.18), that spares a question about
            // the link of every slot.
            if address.protocol == Some(PROTOCOL) {
                continue;
            }
            addresses
                .entry(address.link)
                .or_default()
                .push(address.address);
        }
        for route in self.default_routes()? {
            for hop in route.hops {
                addresses.entry(hop.link).or_default();
            }
        }
        let mut uplinks = Vec::new();
        for (index, addresses) in addresses {
            // It may have gone since.
            let Some(link) = self.find_link(index)? else {
                continue;
            };
            if !link.is_owned() && link.link_type != LinkType::Loopback {
                uplinks.push(Uplink { link, addresses });
            }
        }
        Ok(uplinks)
    }
}
