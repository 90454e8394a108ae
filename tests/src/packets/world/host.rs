//! The logic's view of the host: its clock, routes and sockets.

use std::net::{IpAddr, SocketAddr};

use nucnet_common::{
    abi::{Address, OutsideKey, Publish, PublishKey, Settings},
    env::{Host, Route, RouteKind, Tables},
    hold,
    packet::{TCP, UDP},
};
use nucnet_ctl::model::to_abi;

use super::World;
use crate::packets::{
    engine::Socket,
    site::{self, Via, covers, from_abi},
};

impl Host for World {
    fn now(&self) -> u64 {
        self.now
    }

    fn random(&self) -> u32 {
        self.draws.set(self.draws.get() + 1);
        if let Some(number) = self.drawn {
            return number;
        }
        // SplitMix64.
        let state = self.random.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.random.set(state);
        let mixed = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed >> 32) as u32
    }

    fn route(&self, from: u32, _: &Address, destination: &Address, route: &mut Route) {
        // The kernel answers "forwarding is off" for any other interface.
        if site::INTERFACES
            .iter()
            .any(|interface| interface.index == from && interface.kind == site::Kind::Bridge)
        {
            find_route(from_abi(destination), route);
            if let Some(mac) = self.neighbours.get(&(route.link, route.next_hop)) {
                route.macs[..6].copy_from_slice(mac);
                route.macs[6..].copy_from_slice(&site::interface(route.link).mac);
            }
            if route.kind == RouteKind::Link {
                route.mtu = self.mtus.get(&route.link).copied().unwrap_or(1500);
            }
            if self.hides_sources {
                route.source = [0; 16];
            }
            if self.hides_mtus {
                route.mtu = 0;
            }
        } else {
            route.kind = RouteKind::None;
        }
    }

    fn has_socket(&self, key: &OutsideKey) -> bool {
        let local = SocketAddr::new(from_abi(&key.external), key.external_port);
        let peer = SocketAddr::new(from_abi(&key.peer), key.peer_port);
        self.sockets.iter().any(|socket| match *socket {
            Socket::Listener(at) => key.protocol == u32::from(TCP) && is_bound_to(at, local),
            Socket::Udp(at) => key.protocol == u32::from(UDP) && is_bound_to(at, local),
            Socket::UdpTo(at, to) => {
                key.protocol == u32::from(UDP) && is_bound_to(at, local) && to == peer
            }
        })
    }

    fn segment(&self) -> u32 {
        self.segment
    }

    fn ingress(&self) -> u32 {
        self.ingress
    }

    fn mark(&self) -> u32 {
        self.mark.get()
    }

    fn set_mark(&self, mark: u32) {
        self.mark.set(mark);
    }
}

fn is_bound_to(at: SocketAddr, local: SocketAddr) -> bool {
    at.port() == local.port()
        && at.is_ipv4() == local.is_ipv4()
        && (at.ip() == local.ip() || at.ip().is_unspecified())
}

/// What the kernel's longest prefix match over the site's routes gives.
fn find_route(destination: IpAddr, route: &mut Route) {
    let link = |link: u32, next_hop: IpAddr| {
        let addresses = site::interface(link).addresses.iter();
        let source = addresses
            .map(|(address, _)| *address)
            .find(|address| address.is_ipv4() == destination.is_ipv4());
        Route {
            kind: RouteKind::Link,
            link,
            next_hop: to_abi(next_hop),
            source: source.map_or([0; 16], to_abi),
            macs: [0; 12],
            mtu: 0,
        }
    };
    let nowhere = |kind| Route {
        kind,
        link: 0,
        next_hop: [0; 16],
        source: [0; 16],
        macs: [0; 12],
        mtu: 0,
    };
    let mut longest: Option<(u8, Route)> = None;
    let mut offer = |length: u8, found: Route| {
        if longest.is_none_or(|(known, _)| length > known) {
            longest = Some((length, found));
        }
    };
    if destination.is_loopback() || site::is_for_host(destination) {
        offer(128, nowhere(RouteKind::Local));
    }
    for interface in site::INTERFACES {
        for (address, length) in interface.addresses {
            if covers((*address, *length), destination) {
                offer(*length, link(interface.index, destination));
            }
        }
    }
    for (prefix, length, via) in site::ROUTES {
        if covers((*prefix, *length), destination) {
            let found = match via {
                Via::Gateway(gateway, index) => link(*index, *gateway),
                Via::Unreachable => nowhere(RouteKind::None),
            };
            offer(*length, found);
        }
    }
    *route = longest.map_or(nowhere(RouteKind::None), |(_, found)| found);
}

/// A socket that is about to be bound.
pub(super) struct Caller<'w> {
    pub(super) world: &'w World,
    pub(super) netns_cookie: u64,
    pub(super) mark: u32,
}

impl hold::Socket for Caller<'_> {
    fn settings(&self) -> Option<&Settings> {
        Some(&self.world.settings)
    }

    fn netns_cookie(&self) -> u64 {
        self.netns_cookie
    }

    fn mark(&self) -> u32 {
        self.mark
    }

    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        Tables::publish(self.world, key)
    }
}
