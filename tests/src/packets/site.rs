//! The host that all rows are about: its interfaces, addresses, routes and endpoints.
//!
//! ```text
//!   the Internet          198.51.100.0/24 2001:db8:f::/64
//!        | default route
//!   .254 | 192.0.2.0/24 2001:db8:1::/64
//!      uplink    second            stray               tunnel      host interfaces
//!                198.18.0.0/24     203.0.113.0/24                  (no program on stray)
//!                2001:db8:2::/64   2001:db8:3::/64
//!
//!      bridge 10.0.42.1/24 fd42::1/64        other bridge 10.0.43.1/24 fd43::1/64
//!        |        |        |                      |
//!       web      app      slot                  other              endpoints
//! ```
//!
//! [`World`](super::world::World) answers route lookups from these lists, and the tier of the
//! loaded programs makes a network namespace of them.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use nucnet_common::{
    abi::{self, Address, Delivery, Filtering, Mac, Mapping, Network, Settings},
    packet::mapped,
};
use nucnet_ctl::model::to_abi;

const fn v4(a: u8, b: u8, c: u8, d: u8) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(a, b, c, d))
}

const fn v6(a: u16, b: u16, c: u16, last: u16) -> IpAddr {
    IpAddr::V6(Ipv6Addr::new(a, b, c, 0, 0, 0, 0, last))
}

/// The loopback interface.
pub const LOOPBACK: u32 = 1;
/// The uplink with the default route.
pub const UPLINK: u32 = 10;
/// Another uplink.
pub const SECOND_UPLINK: u32 = 11;
/// A host interface on which no program of nucnet's sits.
pub const STRAY: u32 = 12;
/// An uplink without link-layer header.
pub const TUNNEL: u32 = 13;
/// The bridge of the endpoints' network.
pub const BRIDGE: u32 = 20;
/// The bridge of another network.
pub const OTHER_BRIDGE: u32 = 21;

/// The host's addresses.
pub const HOST4: IpAddr = v4(192, 0, 2, 1);
/// The same, IPv6.
pub const HOST6: IpAddr = v6(0x2001, 0xdb8, 1, 1);
/// The host's address at the second uplink.
pub const SECOND4: IpAddr = v4(198, 18, 0, 1);
/// The gateway beyond the uplink.
pub const ROUTER4: IpAddr = v4(192, 0, 2, 254);
/// The same, IPv6.
pub const ROUTER6: IpAddr = v6(0x2001, 0xdb8, 1, 0xfe);
/// The network's own address.
pub const GATEWAY4: IpAddr = v4(10, 0, 42, 1);
/// The same, IPv6.
pub const GATEWAY6: IpAddr = v6(0xfd42, 0, 0, 1);
/// Someone on the Internet.
pub const CLIENT4: IpAddr = v4(198, 51, 100, 7);
/// The same, IPv6.
pub const CLIENT6: IpAddr = v6(0x2001, 0xdb8, 0xf, 7);
/// A server on the Internet.
pub const SERVER4: IpAddr = v4(198, 51, 100, 80);
/// The same, IPv6.
pub const SERVER6: IpAddr = v6(0x2001, 0xdb8, 0xf, 0x80);
/// Someone beyond the stray interface.
pub const STRANGER4: IpAddr = v4(203, 0, 113, 7);
/// The same, IPv6.
pub const STRANGER6: IpAddr = v6(0x2001, 0xdb8, 3, 7);
/// Nobody: the routes say so.
pub const NOWHERE4: IpAddr = v4(198, 19, 0, 1);
/// The same, IPv6.
pub const NOWHERE6: IpAddr = v6(0x2001, 0xdb8, 0xdead, 1);
/// Nobody in the network of the endpoints.
pub const NOBODY4: IpAddr = v4(10, 0, 42, 99);
/// The same, IPv6.
pub const NOBODY6: IpAddr = v6(0xfd42, 0, 0, 0x99);

/// What an interface is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Leads outside, with Ethernet headers.
    Ethernet,
    /// Leads outside, without.
    Tunnel,
    /// Carries a network.
    Bridge,
    /// Leads to an endpoint.
    Endpoint,
}

/// An interface of the host.
#[derive(Debug)]
pub struct Interface {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: &'static str,
    /// What it is.
    pub kind: Kind,
    /// Its link-layer address.
    pub mac: Mac,
    /// The host's addresses there, each with the length of its prefix.
    pub addresses: &'static [(IpAddr, u8)],
}

const fn mac(last: u8) -> Mac {
    [0x02, 0, 0, 0, 0, last]
}

/// Every interface of the host.
pub const INTERFACES: &[Interface] = &[
    Interface {
        index: UPLINK,
        name: "uplink",
        kind: Kind::Ethernet,
        mac: mac(10),
        addresses: &[(HOST4, 24), (HOST6, 64)],
    },
    Interface {
        index: SECOND_UPLINK,
        name: "second",
        kind: Kind::Ethernet,
        mac: mac(11),
        addresses: &[(SECOND4, 24), (v6(0x2001, 0xdb8, 2, 1), 64)],
    },
    Interface {
        index: STRAY,
        name: "stray",
        kind: Kind::Ethernet,
        mac: mac(12),
        addresses: &[(v4(203, 0, 113, 1), 24), (v6(0x2001, 0xdb8, 3, 1), 64)],
    },
    Interface {
        index: TUNNEL,
        name: "tunnel",
        kind: Kind::Tunnel,
        mac: [0; 6],
        addresses: &[],
    },
    Interface {
        index: BRIDGE,
        name: "bridge",
        kind: Kind::Bridge,
        mac: mac(20),
        addresses: &[(GATEWAY4, 24), (GATEWAY6, 64)],
    },
    Interface {
        index: OTHER_BRIDGE,
        name: "other-bridge",
        kind: Kind::Bridge,
        mac: mac(21),
        addresses: &[(v4(10, 0, 43, 1), 24), (v6(0xfd43, 0, 0, 1), 64)],
    },
    Interface {
        index: WEB.link,
        name: "web",
        kind: Kind::Endpoint,
        mac: mac(131),
        addresses: &[],
    },
    Interface {
        index: APP.link,
        name: "app",
        kind: Kind::Endpoint,
        mac: mac(132),
        addresses: &[],
    },
    Interface {
        index: SLOT.link,
        name: "slot",
        kind: Kind::Endpoint,
        mac: mac(133),
        addresses: &[],
    },
    Interface {
        index: OTHER.link,
        name: "other",
        kind: Kind::Endpoint,
        mac: mac(134),
        addresses: &[],
    },
];

/// The interface of that index.
pub fn interface(index: u32) -> &'static Interface {
    INTERFACES
        .iter()
        .find(|interface| interface.index == index)
        .unwrap_or_else(|| panic!("the site has no interface {index}"))
}

/// Whether the host itself takes what is sent to an address: one of its own, or the broadcast
/// address that comes with it (`fib_add_ifaddr` of the kernel).
pub fn is_for_host(destination: IpAddr) -> bool {
    let mut all = INTERFACES.iter().flat_map(|it| it.addresses);
    all.any(|(address, length)| {
        let broadcast = match address {
            IpAddr::V4(v4) => {
                let host_bits = u32::MAX.checked_shr((*length).into()).unwrap_or(0);
                Some(IpAddr::V4((v4.to_bits() | host_bits).into()))
            }
            IpAddr::V6(_) => None,
        };
        destination == *address || Some(destination) == broadcast
    })
}

/// Where a route leads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Via {
    /// To a gateway beyond an interface.
    Gateway(IpAddr, u32),
    /// Nowhere.
    Unreachable,
}

/// Routes besides those of the addresses: prefix and its length, and where it leads.
pub const ROUTES: &[(IpAddr, u8, Via)] = &[
    (v4(0, 0, 0, 0), 0, Via::Gateway(ROUTER4, UPLINK)),
    (v6(0, 0, 0, 0), 0, Via::Gateway(ROUTER6, UPLINK)),
    (v4(198, 19, 0, 0), 16, Via::Unreachable),
    (v6(0x2001, 0xdb8, 0xdead, 0), 48, Via::Unreachable),
];

/// An endpoint of the site.
#[derive(Debug)]
pub struct Party {
    /// Its host side interface.
    pub link: u32,
    /// Its number.
    pub number: u32,
    /// Its network.
    pub network: u32,
    /// The network's bridge.
    pub bridge: u32,
    /// How packets reach it.
    pub delivery: Delivery,
    /// Its link-layer address.
    pub mac: Mac,
    /// Its IPv4 address.
    pub v4: IpAddr,
    /// Its IPv6 address.
    pub v6: IpAddr,
}

/// A container with a server.
pub const WEB: Party = Party {
    link: 31,
    number: 1001,
    network: 1,
    bridge: BRIDGE,
    delivery: Delivery::Peer,
    mac: mac(31),
    v4: v4(10, 0, 42, 2),
    v6: v6(0xfd42, 0, 0, 2),
};

/// A container of the same network.
pub const APP: Party = Party {
    link: 32,
    number: 1002,
    network: 1,
    bridge: BRIDGE,
    delivery: Delivery::Peer,
    mac: mac(32),
    v4: v4(10, 0, 42, 3),
    v6: v6(0xfd42, 0, 0, 3),
};

/// A microVM of the same network, behind a TAP.
pub const SLOT: Party = Party {
    link: 33,
    number: 1003,
    network: 1,
    bridge: BRIDGE,
    delivery: Delivery::Link,
    mac: mac(33),
    v4: v4(10, 0, 42, 4),
    v6: v6(0xfd42, 0, 0, 4),
};

/// A container of another network.
pub const OTHER: Party = Party {
    link: 34,
    number: 1004,
    network: 2,
    bridge: OTHER_BRIDGE,
    delivery: Delivery::Peer,
    mac: mac(34),
    v4: v4(10, 0, 43, 2),
    v6: v6(0xfd43, 0, 0, 2),
};

/// Every endpoint.
pub const PARTIES: [&Party; 4] = [&WEB, &APP, &SLOT, &OTHER];

impl Party {
    /// The link-layer address of its bridge.
    pub fn gateway_mac(&self) -> Mac {
        interface(self.bridge).mac
    }

    /// Its entry in the table of endpoints, without policy.
    pub fn entry(&self) -> abi::Endpoint {
        let gateways = interface(self.bridge).addresses;
        abi::Endpoint {
            number: self.number,
            network: self.network,
            bridge: self.bridge,
            delivery: self.delivery as u32,
            address4: to_abi(self.v4),
            address6: to_abi(self.v6),
            gateway4: to_abi(gateways[0].0),
            gateway6: to_abi(gateways[1].0),
            mac: self.mac,
            gateway_mac: self.gateway_mac(),
            mtu: 1500,
            ..abi::Endpoint::default()
        }
    }

    /// Who owns its addresses.
    pub fn owner(&self) -> abi::Owner {
        abi::Owner {
            link: self.link,
            endpoint: self.number,
        }
    }
}

/// The endpoint that is the guest of a microVM: its slot is on these two interfaces.
pub const GUEST: Party = WEB;
/// The guest's TAP: a test run only needs an interface of that index.
pub const TAP: u32 = APP.link;
/// The slot's side of its veth pair.
pub const WIRE: u32 = OTHER.link;
/// The address that the guest has itself.
pub const GUEST4: IpAddr = v4(169, 254, 0, 21);
/// Its gateway, as it has it.
pub const GUEST_GATEWAY4: IpAddr = v4(169, 254, 0, 22);

/// The guest's entries: index and entry.
pub fn guests() -> [(u32, abi::Guest); 2] {
    [(TAP, WIRE), (WIRE, TAP)].map(|(link, across)| {
        let guest = abi::Guest {
            endpoint: GUEST.number,
            across,
            address: to_abi(GUEST4),
            gateway: to_abi(GUEST_GATEWAY4),
            outer_address: to_abi(GUEST.v4),
            outer_gateway: to_abi(GATEWAY4),
            ..abi::Guest::default()
        };
        (link, guest)
    })
}

/// The uplinks with programs: index and entry.
pub fn uplinks() -> [(u32, abi::Uplink); 3] {
    [UPLINK, SECOND_UPLINK, TUNNEL].map(|index| {
        let interface = interface(index);
        let address = |at: usize| {
            let address = interface.addresses.get(at);
            address.map_or([0; 16], |(address, _)| to_abi(*address))
        };
        let uplink = abi::Uplink {
            header: if interface.kind == Kind::Tunnel {
                0
            } else {
                14
            },
            mtu: 1500,
            address4: address(0),
            address6: address(1),
        };
        (index, uplink)
    })
}

/// First port of the dynamic range.
pub const DYNAMIC_FIRST: u16 = 16_384;
/// Last port of it.
pub const DYNAMIC_LAST: u16 = 32_767;

/// The settings of the host.
pub const SETTINGS: Settings = Settings {
    netns_cookie: 1,
    dynamic_port_first: DYNAMIC_FIRST,
    dynamic_port_mask: DYNAMIC_LAST - DYNAMIC_FIRST,
    host_port_first: 32_768,
    host_port_last: 60_999,
    flows_per_endpoint: 1_000,
    mapping_link: 0,
};

/// What both networks chose. Idle times are shorter than in earnest and still well apart from
/// the time that a row takes: a row lets time pass by making entries older, and nothing can be
/// older than the boot of the machine. Ports are kept, so that rows can foresee them.
pub const NETWORK: Network = Network {
    tcp_established_s: 60,
    tcp_transitory_s: 40,
    udp_s: 50,
    udp_dns_s: 20,
    icmp_s: 30,
    filtering: Filtering::AddressDependent as u32,
    udp_mapping: Mapping::EndpointIndependent as u32,
    tcp_mapping: Mapping::PerFlow as u32,
    keeps_ports: 1,
    is_restricted: 0,
    uplinks: [0; abi::NETWORK_UPLINKS],
    reserved: [0; 8],
};

/// The networks' numbers.
pub const NETWORKS: [u32; 2] = [WEB.network, OTHER.network];

/// Whether an address is in a prefix.
pub fn covers((prefix, length): (IpAddr, u8), address: IpAddr) -> bool {
    match (prefix, address) {
        (IpAddr::V4(prefix), IpAddr::V4(address)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            (prefix.to_bits() ^ address.to_bits()) & mask == 0
        }
        (IpAddr::V6(prefix), IpAddr::V6(address)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            (prefix.to_bits() ^ address.to_bits()) & mask == 0
        }
        _ => false,
    }
}

/// An address as people write it.
pub fn address(text: &str) -> IpAddr {
    text.parse().expect("address")
}

/// An address of the maps, for people.
pub fn from_abi(address: &Address) -> IpAddr {
    let v6 = Ipv6Addr::from(*address);
    match v6.to_ipv4_mapped() {
        Some(v4) if *address == mapped(v4.octets()) => v4.into(),
        _ => v6.into(),
    }
}
