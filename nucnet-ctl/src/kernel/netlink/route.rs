//! Routes of the main table.

use std::{
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    thread,
    time::{Duration, Instant},
};

use ipnet::{IpNet, Ipv4Net, Ipv6Net};
use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope,
    RouteType, RouteVia,
};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{AddressScope, Change, Error, Netlink, PROTOCOL};

/// A route of nucnet's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Where it leads.
    pub destination: IpNet,
    /// Interface index.
    pub link: u32,
    /// Next hop; none: the destination is on the link itself.
    pub gateway: Option<IpAddr>,
    /// Source address of the host's own packets.
    pub source: Option<IpAddr>,
    /// The gateway is taken to be on the link although no prefix of the link covers it.
    pub onlink: bool,
}

impl Route {
    /// The default route of the gateway's family through it. `prefixes` are the addresses of the
    /// link: a gateway outside of all of them is taken to be on the link all the same.
    pub fn default_via_gateway(link: u32, gateway: IpAddr, prefixes: &[IpNet]) -> Self {
        let link_local = matches!(gateway, IpAddr::V6(v6) if v6.is_unicast_link_local());
        Self {
            destination: everything(gateway),
            link,
            gateway: Some(gateway),
            source: None,
            onlink: !link_local && !prefixes.iter().any(|prefix| prefix.contains(&gateway)),
        }
    }

    /// The default route of a family through a link without gateway; `family` is any address of
    /// that family.
    pub fn default_via_link(link: u32, family: IpAddr) -> Self {
        Self {
            destination: everything(family),
            link,
            gateway: None,
            source: None,
            onlink: false,
        }
    }

    /// The route to one address on a link.
    pub fn host(link: u32, address: IpAddr, source: Option<IpAddr>) -> Self {
        Self {
            destination: address.into(),
            link,
            gateway: None,
            source,
            onlink: false,
        }
    }

    fn check(&self) -> Result<(), Error> {
        let v4 = self.destination.addr().is_ipv4();
        match self
            .gateway
            .into_iter()
            .chain(self.source)
            .find(|ip| ip.is_ipv4() != v4)
        {
            Some(address) => Err(Error::FamilyMismatch {
                destination: self.destination,
                address,
            }),
            None => Ok(()),
        }
    }

    fn message(&self) -> RouteMessage {
        let destination = self.destination.trunc();
        let mut message = RouteMessage::default();
        message.header = RouteHeader {
            address_family: family(&destination),
            destination_prefix_length: destination.prefix_len(),
            table: RouteHeader::RT_TABLE_MAIN,
            protocol: RouteProtocol::from(PROTOCOL),
            scope: match (self.gateway, destination) {
                (None, IpNet::V4(_)) => RouteScope::Link,
                _ => RouteScope::Universe,
            },
            kind: RouteType::Unicast,
            flags: if self.onlink {
                RouteFlags::Onlink
            } else {
                RouteFlags::empty()
            },
            ..RouteHeader::default()
        };
        let attributes = &mut message.attributes;
        if destination.prefix_len() > 0 {
            attributes.push(RouteAttribute::Destination(destination.addr().into()));
        }
        attributes.push(RouteAttribute::Oif(self.link));
        attributes.extend(self.gateway.map(|ip| RouteAttribute::Gateway(ip.into())));
        attributes.extend(self.source.map(|ip| RouteAttribute::PrefSource(ip.into())));
        message
    }
}

/// A unicast route of the main table as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct KernelRoute {
    /// Where it leads.
    pub destination: IpNet,
    /// The ways; more than one for a multipath route.
    pub hops: Vec<Hop>,
    /// Source address of the host's own packets.
    pub source: Option<IpAddr>,
    /// Metric: the lowest wins.
    pub metric: u32,
    /// Who made it: an rtnetlink protocol number, [`PROTOCOL`] for nucnet.
    pub protocol: u8,
}

/// One way of a route.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hop {
    /// Interface index.
    pub link: u32,
    /// Next hop.
    pub gateway: Option<IpAddr>,
}

/// Where a packet goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// To the host.
    Local,
    /// To everybody in a subnet of the host's, the host among them.
    Broadcast,
    /// To a group that the host may be of (multicast, anycast).
    Group,
    /// Out of an interface.
    Way(Hop),
    /// Nowhere.
    None,
    /// Nowhere: by the interface that it came in, nothing comes from there.
    Refused,
}

/// How often the kernel is asked again.
const POLL: Duration = Duration::from_micros(200);

/// Metric of IPv6 routes that are made without one (`IP6_RT_PRIO_USER`).
const IPV6_METRIC: u32 = 1024;

impl Netlink {
    /// The unicast routes of the main table, both families.
    pub fn routes(&self) -> Result<Vec<KernelRoute>, Error> {
        let mut routes = self.routes_of(AddressFamily::Inet)?;
        routes.extend(self.routes_of(AddressFamily::Inet6)?);
        Ok(routes)
    }

    fn routes_of(&self, family: AddressFamily) -> Result<Vec<KernelRoute>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = family;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.attributes = vec![RouteAttribute::Table(RouteHeader::RT_TABLE_MAIN.into())];
        let replies = match self.dump(&RouteNetlinkMessage::GetRoute(message)) {
            Ok(replies) => replies,
            // No table yet: no routes.
            Err(failure) if failure.errno() == Some(Errno::ENOENT) => Vec::new(),
            Err(failure) => return Err(failure.to("list", "routes")),
        };
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                // Without IPv6 the kernel answers for all families.
                RouteNetlinkMessage::NewRoute(message)
                    if message.header.address_family == family =>
                {
                    shown(&message)
                }
                _ => None,
            })
            .collect())
    }

    /// Waits until the kernel takes packets to an address of its own: the route behind an IPv6
    /// address is made by a worker (`addrconf_dad_work`), some time after the address is there
    /// and its link is up. False: it does not within `patience`.
    pub fn await_local(&self, address: IpAddr, patience: Duration) -> Result<bool, Error> {
        let start = Instant::now();
        loop {
            if self.is_local(address)? {
                return Ok(true);
            }
            if start.elapsed() >= patience {
                return Ok(false);
            }
            thread::sleep(POLL);
        }
    }

    fn is_local(&self, address: IpAddr) -> Result<bool, Error> {
        Ok(self.find_way(address, None)? == Found::Local)
    }

    /// Where the kernel sends a packet: one of the host's own or, with its source and the index of
    /// an interface, one that came in there.
    pub fn find_way(
        &self,
        destination: IpAddr,
        arrival: Option<(IpAddr, u32)>,
    ) -> Result<Found, Error> {
        let mut message = question(destination);
        if let Some((source, link)) = arrival {
            message.header.source_prefix_length = IpNet::from(source).prefix_len();
            let attributes = [
                RouteAttribute::Source(as_kernel(source)),
                RouteAttribute::Iif(link),
            ];
            message.attributes.extend(attributes);
        }
        match self.get(RouteNetlinkMessage::GetRoute(message)) {
            Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(found(&message)),
            Ok(_) => Ok(Found::None),
            Err(failure) => match failure.errno() {
                Some(Errno::EXDEV | Errno::EINVAL) if arrival.is_some() => Ok(Found::Refused),
                Some(_) => Ok(Found::None),
                None => Err(failure.to("look up", destination)),
            },
        }
    }

    /// The host's address that the kernel gives to what leaves by an interface for another one's
    /// sake (`MASQUERADE`): of IPv4, one of the interface's, if possible in the next hop's subnet
    /// (`inet_select_addr`); of IPv6, what its rules for sources say (`ipv6_dev_get_saddr`).
    pub fn masquerade_source(
        &self,
        destination: IpAddr,
        link: u32,
        next_hop: IpAddr,
    ) -> Result<Option<IpAddr>, Error> {
        if destination.is_ipv6() {
            let mut message = question(destination);
            message.attributes.push(RouteAttribute::Oif(link));
            return match self.get(RouteNetlinkMessage::GetRoute(message)) {
                Ok(RouteNetlinkMessage::NewRoute(message)) => Ok(preferred_source(&message)),
                Ok(_) => Ok(None),
                Err(failure) if failure.errno().is_some() => Ok(None),
                Err(failure) => Err(failure.to("look up", destination)),
            };
        }
        let mut all = self.addresses()?;
        all.retain(|held| {
            held.address.addr().is_ipv4()
                && held.scope == AddressScope::Global
                && !held.is_secondary
        });
        let own = || all.iter().filter(|held| held.link == link);
        let near = own().find(|held| held.address.contains(&next_hop));
        let chosen = near.or_else(|| own().next()).or_else(|| all.first());
        Ok(chosen.map(|held| held.address.addr()))
    }

    /// The default routes of the main table, both families, best first.
    pub fn default_routes(&self) -> Result<Vec<KernelRoute>, Error> {
        let mut routes = self.routes()?;
        routes.retain(|route| route.destination.prefix_len() == 0);
        routes.sort_by_key(|route| (route.destination, route.metric));
        Ok(routes)
    }

    /// Makes sure that the route exists, in place of an older one of nucnet's to the same
    /// destination. One of somebody else's is [`Error::ForeignRoute`] and stays.
    pub fn ensure_route(&self, route: &Route) -> Result<Change, Error> {
        route.check()?;
        let failed = |failure: super::Failure| failure.to("add the route to", route.destination);
        let message = route.message();
        let attempt = |flags| {
            self.execute(
                RouteNetlinkMessage::NewRoute(message.clone()),
                NLM_F_CREATE | flags,
            )
        };
        match attempt(NLM_F_EXCL) {
            Ok(()) => return Ok(Change::Made),
            Err(failure) if failure.errno() == Some(Errno::EEXIST) => {}
            Err(failure) => return Err(failed(failure)),
        }
        let destination = route.destination.trunc();
        let metric = if destination.addr().is_ipv4() {
            0
        } else {
            IPV6_METRIC
        };
        let hop = Hop {
            link: route.link,
            gateway: route.gateway,
        };
        let present = self
            .routes_of(family(&destination))?
            .into_iter()
            .find(|present| present.destination == destination && present.metric == metric);
        match present {
            Some(foreign) if foreign.protocol != PROTOCOL => Err(Error::ForeignRoute {
                destination,
                protocol: foreign.protocol,
            }),
            Some(same) if same.hops == [hop] && same.source == route.source => {
                Ok(Change::Unchanged)
            }
            // Another of ours, or one that has gone meanwhile.
            _ => attempt(NLM_F_REPLACE)
                .map(|()| Change::Made)
                .map_err(failed),
        }
    }

    /// Deletes nucnet's route to the destination on the link, whatever its gateway; one that is
    /// gone, or whose link is, is no error, and somebody else's stays.
    pub fn delete_route(&self, destination: IpNet, link: u32) -> Result<Change, Error> {
        let route = Route {
            destination,
            link,
            gateway: None,
            source: None,
            onlink: false,
        };
        let mut message = route.message();
        message.header.scope = RouteScope::NoWhere;
        match self.execute(RouteNetlinkMessage::DelRoute(message), 0) {
            Ok(()) => Ok(Change::Made),
            Err(failure) => match failure.errno() {
                Some(Errno::ESRCH | Errno::ENODEV) => Ok(Change::Unchanged),
                _ => Err(failure.to("delete the route to", destination)),
            },
        }
    }
}

fn family(net: &IpNet) -> AddressFamily {
    match net {
        IpNet::V4(_) => AddressFamily::Inet,
        IpNet::V6(_) => AddressFamily::Inet6,
    }
}

/// Destination of the default route of an address's family.
fn everything(family: IpAddr) -> IpNet {
    match family {
        IpAddr::V4(_) => Ipv4Net::default().into(),
        IpAddr::V6(_) => Ipv6Net::default().into(),
    }
}

fn as_kernel(address: IpAddr) -> RouteAddress {
    match address {
        IpAddr::V4(address) => RouteAddress::Inet(address),
        IpAddr::V6(address) => RouteAddress::Inet6(address),
    }
}

/// Asks for the way to one address.
fn question(address: IpAddr) -> RouteMessage {
    let destination = IpNet::from(address);
    let mut message = RouteMessage::default();
    message.header.address_family = family(&destination);
    message.header.destination_prefix_length = destination.prefix_len();
    message.attributes = vec![RouteAttribute::Destination(as_kernel(address))];
    message
}

fn found(message: &RouteMessage) -> Found {
    let link = message
        .attributes
        .iter()
        .find_map(|attribute| match attribute {
            RouteAttribute::Oif(link) => Some(*link),
            _ => None,
        });
    match (message.header.kind, link) {
        (RouteType::Local, _) => Found::Local,
        (RouteType::Broadcast, _) => Found::Broadcast,
        (RouteType::Anycast | RouteType::Multicast, _) => Found::Group,
        (RouteType::Unicast, Some(link)) => Found::Way(Hop {
            link,
            gateway: gateway(&message.attributes),
        }),
        _ => Found::None,
    }
}

fn preferred_source(message: &RouteMessage) -> Option<IpAddr> {
    let mut attributes = message.attributes.iter();
    attributes.find_map(|attribute| match attribute {
        RouteAttribute::PrefSource(address) => ip(address),
        _ => None,
    })
}

fn shown(message: &RouteMessage) -> Option<KernelRoute> {
    let header = &message.header;
    if header.kind != RouteType::Unicast || header.table != RouteHeader::RT_TABLE_MAIN {
        return None;
    }
    let any: IpAddr = match header.address_family {
        AddressFamily::Inet => Ipv4Addr::UNSPECIFIED.into(),
        _ => Ipv6Addr::UNSPECIFIED.into(),
    };
    let mut destination = any;
    let mut source = None;
    let mut metric = 0;
    let mut hops = Vec::new();
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip(address)?,
            RouteAttribute::PrefSource(address) => source = ip(address),
            RouteAttribute::Priority(value) => metric = *value,
            RouteAttribute::MultiPath(ways) => hops.extend(ways.iter().map(|way| Hop {
                link: way.interface_index,
                gateway: gateway(&way.attributes),
            })),
            RouteAttribute::Oif(link) => {
                hops.push(Hop {
                    link: *link,
                    gateway: gateway(&message.attributes),
                });
            }
            _ => {}
        }
    }
    Some(KernelRoute {
        destination: IpNet::new(destination, header.destination_prefix_length).ok()?,
        hops,
        source,
        metric,
        protocol: header.protocol.into(),
    })
}

fn gateway(attributes: &[RouteAttribute]) -> Option<IpAddr> {
    attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(address) => ip(address),
        RouteAttribute::Via(RouteVia::Inet(v4)) => Some((*v4).into()),
        RouteAttribute::Via(RouteVia::Inet6(v6)) => Some((*v6).into()),
        _ => None,
    })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some((*v4).into()),
        RouteAddress::Inet6(v6) => Some((*v6).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn gateway_outside_of_every_prefix_is_taken_to_be_on_the_link() {
        let prefixes = [
            "10.0.0.5/24".parse().unwrap(),
            "fd00::5/64".parse().unwrap(),
        ];
        for (gateway, onlink) in [
            ("10.0.0.1", false),
            ("10.0.1.1", true),
            ("fd00::1", false),
            ("fd01::1", true),
            ("fe80::1", false),
        ] {
            let route = Route::default_via_gateway(1, gateway.parse().unwrap(), &prefixes);
            assert_eq!(route.onlink, onlink, "{gateway}");
        }
    }
}
