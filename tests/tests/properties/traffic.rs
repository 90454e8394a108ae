//! What happens to a site: packets that are valid, or nearly so, time that passes, policies that
//! change.

use std::{fmt, net::IpAddr};

use nucnet_tests::packets::{
    bench::ROUTER_MAC,
    engine::Hook,
    packet::{self, Packet, echo_reply, echo_request, icmp, tcp, udp},
    rows::{Family, V4, V6, lan},
    site::{
        self, APP, BRIDGE, CLIENT4, GUEST, GUEST_GATEWAY4, GUEST4, HOST4, Party, ROUTER4,
        SECOND_UPLINK, SERVER4, TAP, UPLINK, WEB,
    },
};
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
};

/// A frame and where it is seen.
#[derive(Clone)]
pub(crate) struct Sending {
    pub(crate) hook: Hook,
    pub(crate) frame: Vec<u8>,
}

impl fmt::Debug for Sending {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ", self.hook)?;
        self.frame
            .iter()
            .try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

/// What makes a valid packet nearly valid.
#[derive(Clone, Debug)]
enum Flaw {
    /// Cut short before a byte.
    Cut(Index),
    /// A bit turned over in the headers.
    Flip(Index, u8),
    /// A byte set in the headers.
    Set(Index, u8),
}

/// What happens to a site.
#[derive(Clone, Debug)]
pub(crate) enum Event {
    Sent(Sending),
    Seconds(f64),
    /// WEB's policy: none, deny all, allow the Internet only.
    Policy(u8),
    /// Whether the second uplink is there.
    SecondUplink(bool),
}

/// What decorates a packet without making it invalid.
pub(crate) fn decorated(packet: Packet, choice: u8) -> Packet {
    match choice {
        0 => packet.options(&[1, 1, 1, 0]),
        1 => packet.options(&[1; 40]),
        2 => packet.fragment(0, true),
        3 => packet.fragment(3, false),
        4 => packet.extension(0),
        5 => packet.extension(60).fragment(0, true),
        6 => packet.vlan(42),
        7 => packet.padded(9),
        8 => packet.without_checksum(),
        9 => packet.ttl(1),
        10 => packet.ttl(2),
        _ => packet,
    }
}

const PORTS: [u16; 9] = [53, 80, 443, 5000, 5001, 8080, 9003, 16_400, 40_000];

/// A valid packet of some kind between two addresses.
fn valid(from: IpAddr, to: IpAddr) -> impl Strategy<Value = Packet> {
    let ports = (select(&PORTS[..]), select(&PORTS[..]));
    let flags = select(&["S", "S", "SA", "A", "A", "FA", "R"][..]);
    (0..12_u8, ports, flags, vec(any::<u8>(), 0..24)).prop_map(
        move |(kind, (source, destination), flags, payload)| {
            // Few sockets and several peers: bindings are shared.
            let few = if source < 5000 { 5000 } else { 40_000 };
            let packet = match kind {
                0..=3 => tcp(flags, (from, source), (to, destination)),
                4..=6 => udp((from, few), (to, destination)),
                7 => udp((from, source), (to, few)),
                8 | 9 => echo_request(from, to, source),
                10 => echo_reply(from, to, source),
                _ if source == 53 => icmp(from, to, [3, 3, 0, 0, 0, 0, 0, 0]),
                _ => packet::ip(from, to, source as u8),
            };
            packet.payload(payload)
        },
    )
}

pub(crate) fn family(is_v4: bool) -> &'static Family {
    if is_v4 { &V4 } else { &V6 }
}

/// Where a packet is seen, and its frame: three in four come from endpoints or go to them in
/// earnest.
fn whole() -> impl Strategy<Value = (Hook, Packet)> {
    let busy: [&'static Party; 6] = [&WEB, &WEB, &WEB, &site::APP, &site::SLOT, &site::OTHER];
    (
        prop::bool::weighted(0.7),
        0..8_u8,
        select(busy.to_vec()),
        any::<Index>(),
    )
        .prop_flat_map(|(is_v4, direction, party, other)| {
            let ip = family(is_v4);
            let own = if is_v4 { party.v4 } else { party.v6 };
            let odd = |v4: &str, v6: &str| site::address(if is_v4 { v4 } else { v6 });
            let (hook, from, to, macs) = match direction {
                0..=3 => {
                    let destinations = [
                        ip.server,
                        ip.server,
                        ip.client,
                        ip.host,
                        ip.host,
                        ip.gateway,
                        ip.web,
                        ip.app,
                        ip.slot,
                        ip.other,
                        ip.stranger,
                        ip.nowhere,
                        odd("10.0.42.99", "fd42::99"),
                        odd("224.0.0.251", "ff02::fb"),
                        odd("127.0.0.1", "::1"),
                    ];
                    let hook = Hook::FromEndpoint { link: party.link };
                    let macs = (party.gateway_mac(), party.mac);
                    (hook, own, *other.get(&destinations), macs)
                }
                4..=6 => {
                    let link = if direction == 6 {
                        SECOND_UPLINK
                    } else {
                        UPLINK
                    };
                    let sources = [ip.server, ip.server, ip.client, ip.stranger, ip.app];
                    let to = if direction == 4 { ip.host } else { ip.gateway };
                    let macs = (site::interface(link).mac, ROUTER_MAC);
                    (Hook::FromUplink { link }, *other.get(&sources), to, macs)
                }
                _ => {
                    let hook = Hook::FromHost {
                        link: BRIDGE,
                        ingress: 0,
                    };
                    let macs = (party.mac, party.gateway_mac());
                    (hook, ip.gateway, own, macs)
                }
            };
            (Just(hook), valid(from, to), Just(macs))
                .prop_map(|(hook, packet, (to, from))| (hook, packet.macs(to, from)))
        })
}

/// A packet that is valid.
pub(crate) fn sound() -> impl Strategy<Value = Sending> {
    (whole(), 0..40_u8).prop_map(|((hook, packet), choice)| Sending {
        hook,
        frame: decorated(packet, choice).bytes(),
    })
}

/// A packet that is valid, three in four between hosts that mappings are about and who asks for
/// them.
pub(crate) fn mapped() -> impl Strategy<Value = Sending> {
    let theirs = (
        any::<bool>(),
        any::<bool>(),
        any::<Index>(),
        any::<Index>(),
        0..40_u8,
    )
        .prop_flat_map(|(is_v4, is_inside, from, to, choice)| {
            let ip = family(is_v4);
            let (host, server, client) = lan(ip);
            let (link, from, to) = if is_inside {
                let destinations = [ip.host, ip.host, ip.client, ip.server, host, server, ip.web];
                let from = *from.get(&[server, server, client]);
                (SECOND_UPLINK, from, *to.get(&destinations))
            } else {
                let from = *from.get(&[ip.client, ip.server, ip.stranger]);
                (UPLINK, from, *to.get(&[ip.host, ip.host, host, server]))
            };
            let to_mac = site::interface(link).mac;
            valid(from, to).prop_map(move |packet| Sending {
                hook: Hook::FromUplink { link },
                frame: decorated(packet.macs(to_mac, ROUTER_MAC), choice).bytes(),
            })
        });
    prop_oneof![3 => theirs, 1 => sound()]
}

/// What a guest sends: packets of its own, errors about what it got, some under other names.
pub(crate) fn guests() -> impl Strategy<Value = Sending> {
    let sources = [GUEST4, GUEST4, GUEST4, GUEST_GATEWAY4, APP.v4];
    let destinations = [SERVER4, CLIENT4, GUEST_GATEWAY4, ROUTER4, HOST4];
    (select(sources.to_vec()), select(destinations.to_vec()))
        .prop_flat_map(|(from, to)| {
            let error = valid(to, from).prop_map(move |quoted| {
                icmp(from, to, [3, 3, 0, 0, 0, 0, 0, 0]).payload(quoted.bytes())
            });
            (prop_oneof![2 => valid(from, to), 1 => error], 0..40_u8)
        })
        .prop_map(|(packet, choice)| Sending {
            hook: Hook::FromGuest { link: TAP },
            frame: decorated(packet.macs(GUEST.gateway_mac(), GUEST.mac), choice).bytes(),
        })
}

/// A packet that is valid but for a flaw or two.
pub(crate) fn flawed(sending: impl Strategy<Value = Sending>) -> impl Strategy<Value = Sending> {
    let flaw = prop_oneof![
        any::<Index>().prop_map(Flaw::Cut),
        (any::<Index>(), 0..8_u8).prop_map(|(at, bit)| Flaw::Flip(at, bit)),
        (any::<Index>(), any::<u8>()).prop_map(|(at, byte)| Flaw::Set(at, byte)),
    ];
    (sending, vec(flaw, 1..3)).prop_map(|(mut sending, flaws)| {
        let frame = &mut sending.frame;
        for flaw in flaws {
            // Link-layer addresses are a matter of their own.
            let headers = 12..frame.len().clamp(13, 80);
            match flaw {
                Flaw::Cut(at) => frame.truncate(at.index(frame.len() + 1)),
                Flaw::Flip(at, bit) => {
                    if let Some(byte) = frame.get_mut(headers.start + at.index(headers.len())) {
                        *byte ^= 1 << bit;
                    }
                }
                Flaw::Set(at, value) => {
                    if let Some(byte) = frame.get_mut(headers.start + at.index(headers.len())) {
                        *byte = value;
                    }
                }
            }
        }
        sending
    })
}

pub(crate) fn events(sending: impl Strategy<Value = Sending>) -> impl Strategy<Value = Vec<Event>> {
    vec(
        prop_oneof![
            20 => sending.prop_map(Event::Sent),
            2 => (0.0..70.0).prop_map(Event::Seconds),
            1 => (0..3_u8).prop_map(Event::Policy),
            1 => any::<bool>().prop_map(Event::SecondUplink),
        ],
        1..40,
    )
}
