//! The frames that are tried.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use etherparse::ArpOperation;
use nucnet_common::{abi::Mac, packet::UDP};
use nucnet_tests::lab::{FAR, Family, HOST, OUTSIDE};
use nucnet_tests::packets::bench::Frame as _;
use nucnet_tests::packets::packet::{
    advertisement, arp, echo_request, icmp, ip, solicitation, tcp, udp,
};

use super::Stage;

/// What may become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum May {
    /// Nobody ever sees it.
    Never,
    /// It is an ordinary packet, however odd: without a policy somebody may get it.
    Go,
}
use May::{Go, Never};

/// In the payload of every frame that has one, and with its number behind it.
const MARK: &[u8] = b"odd frame ";

pub(super) fn payload(number: usize) -> Vec<u8> {
    [MARK, format!("{number:04}").as_bytes()].concat()
}

/// A frame with an IPv6 extension header of that number put in.
fn behind_header(frame: Vec<u8>, number: u8, header: &[u8]) -> Vec<u8> {
    let (start, rest) = frame.split_at(14 + 40);
    let mut start = start.to_vec();
    let length = u16::from_be_bytes([start[18], start[19]]) + header.len() as u16;
    start[18..20].copy_from_slice(&length.to_be_bytes());
    start[20] = number;
    [&start, header, rest].concat()
}

pub(super) const BROADCAST: Mac = [0xff; 6];

pub(super) fn v4(text: &str) -> IpAddr {
    IpAddr::V4(text.parse::<Ipv4Addr>().expect(text))
}

pub(super) fn v6(text: &str) -> IpAddr {
    IpAddr::V6(text.parse::<Ipv6Addr>().expect(text))
}

/// Whether a frame is one whose headers hide where it goes, or what it is; or that of a
/// connection that nobody has seen begin.
pub(super) fn is_header(name: &str) -> bool {
    let kinds = [
        "option: ",
        "extension header: ",
        "routing header ",
        "priority tag",
        "TCP A without",
    ];
    kinds.iter().any(|kind| name.starts_with(kind))
}

/// Everything that is tried: its name, what may become of it without a policy, the frame. Under a
/// policy that does not allow its destination, nothing of it may go anywhere.
pub(super) fn frames(stage: &Stage) -> Vec<(String, May, Vec<u8>)> {
    let mut frames: Vec<(String, May, Vec<u8>)> = Vec::new();
    let Stage { own, gateway, .. } = *stage;
    let (own4, own6) = (stage.v4, stage.v6);
    let (out4, out6): (IpAddr, IpAddr) = (OUTSIDE.of(Family::V4), OUTSIDE.of(Family::V6));
    let (host4, host6): (IpAddr, IpAddr) = (HOST.of(Family::V4), HOST.of(Family::V6));
    let mut add = |name: String, may: May, frame: &dyn Fn(usize) -> Vec<u8>| {
        let bytes = frame(frames.len());
        frames.push((name, may, bytes));
    };

    // Forged link-layer sources.
    for (whose, mac) in [
        ("the gateway's", gateway),
        ("a sibling's", stage.sibling_mac),
        ("nobody's", [2, 0, 0, 0, 0, 0x99]),
        ("a group's", [1, 0, 0x5e, 0, 0, 1]),
        ("zero", [0; 6]),
    ] {
        add(format!("source MAC: {whose}"), Never, &|number| {
            stage.good(number).framed(gateway, mac)
        });
    }
    // An own MAC, to somebody else's: it is for the gateway all the same.
    add("to a sibling's MAC".into(), Go, &|number| {
        stage.good(number).framed(stage.sibling_mac, own)
    });

    // Forged, impossible and foreign IP sources, to the outside, a sibling and the host.
    let mapped = v6("::ffff:192.0.2.9");
    for source in [
        stage.sibling4,
        stage.sibling6,
        stage.gateway4,
        stage.gateway6,
        host4,
        host6,
        out4,
        out6,
        FAR.of(Family::V4),
        FAR.of(Family::V6),
        v4("0.0.0.0"),
        v4("127.0.0.1"),
        v4("169.254.1.1"),
        v4("224.0.0.1"),
        v4("255.255.255.255"),
        v4("10.0.42.255"),
        v6("::"),
        v6("::1"),
        v6("fe80::1"),
        v6("ff02::1"),
        v6("::10.0.42.2"),
        mapped,
    ] {
        let targets = match source {
            IpAddr::V4(_) => [out4, stage.sibling4, host4],
            IpAddr::V6(_) => [out6, stage.sibling6, host6],
        };
        for to in targets {
            add(format!("source {source} to {to}"), Never, &|number| {
                stage.frame(&udp((source, 5000), (to, 7)).payload(payload(number)))
            });
            add(
                format!("source {source} to {to} by TCP"),
                Never,
                &|number| stage.frame(&tcp("S", (source, 5000), (to, 80)).payload(payload(number))),
            );
        }
    }

    // ARP: as somebody else, for somebody else, in a frame of somebody else.
    for (name, operation, sender, target, to) in [
        (
            "reply for the gateway",
            ArpOperation::REPLY,
            (own, stage.gateway4),
            (stage.sibling_mac, stage.sibling4),
            stage.sibling_mac,
        ),
        (
            "reply for a sibling",
            ArpOperation::REPLY,
            (own, stage.sibling4),
            (gateway, stage.gateway4),
            gateway,
        ),
        (
            "reply for the outside",
            ArpOperation::REPLY,
            (own, out4),
            (BROADCAST, host4),
            BROADCAST,
        ),
        (
            "request as the gateway",
            ArpOperation::REQUEST,
            (own, stage.gateway4),
            ([0; 6], stage.sibling4),
            BROADCAST,
        ),
        (
            "request with a sibling's MAC",
            ArpOperation::REQUEST,
            (stage.sibling_mac, own4),
            ([0; 6], stage.gateway4),
            BROADCAST,
        ),
        (
            "gratuitous, of the host's address",
            ArpOperation::REQUEST,
            (own, host4),
            ([0; 6], host4),
            BROADCAST,
        ),
        (
            "announcement of its own address",
            ArpOperation::REPLY,
            (own, own4),
            (BROADCAST, own4),
            BROADCAST,
        ),
    ] {
        add(format!("ARP {name}"), Never, &|_| {
            arp(operation, (to, own), sender, target)
        });
    }

    // Neighbour discovery: advertisements, forged solicitations, routers, redirects.
    let all = v6("ff02::1");
    for (name, packet) in [
        (
            "advertisement for the gateway",
            advertisement(0xa0, own6, all, stage.gateway6, Some(own)),
        ),
        (
            "advertisement for a sibling",
            advertisement(0x60, own6, stage.sibling6, stage.sibling6, Some(own)),
        ),
        (
            "advertisement as a sibling",
            advertisement(0x60, stage.sibling6, all, stage.sibling6, Some(own)),
        ),
        (
            "advertisement for the outside",
            advertisement(0x60, own6, out6, out6, Some(own)),
        ),
        (
            "solicitation as a sibling",
            solicitation(stage.sibling6, stage.gateway6, stage.gateway6, Some(own)),
        ),
        (
            "solicitation with a sibling's MAC",
            solicitation(
                own6,
                stage.gateway6,
                stage.gateway6,
                Some(stage.sibling_mac),
            ),
        ),
        (
            "solicitation for the outside",
            solicitation(own6, out6, out6, Some(own)),
        ),
        (
            "router advertisement to all",
            icmp(v6("fe80::1"), all, [134, 0, 0, 0, 64, 0, 7, 8]).ttl(255),
        ),
        (
            "router advertisement from its own address",
            icmp(own6, stage.sibling6, [134, 0, 0, 0, 64, 0, 7, 8]).ttl(255),
        ),
        (
            "router advertisement to the outside",
            icmp(own6, out6, [134, 0, 0, 0, 64, 0, 7, 8]).ttl(255),
        ),
        (
            "router solicitation",
            icmp(own6, v6("ff02::2"), [133, 0, 0, 0, 0, 0, 0, 0]).ttl(255),
        ),
        (
            "redirect",
            icmp(own6, stage.sibling6, [137, 0, 0, 0, 0, 0, 0, 0]).ttl(255),
        ),
        (
            "redirect to the outside",
            icmp(own6, out6, [137, 0, 0, 0, 0, 0, 0, 0]).ttl(255),
        ),
        (
            "ICMP redirect",
            icmp(own4, stage.sibling4, [5, 1, 0, 0, 10, 0, 42, 1]),
        ),
        (
            "ICMP redirect to the outside",
            icmp(own4, out4, [5, 1, 0, 0, 10, 0, 42, 1]),
        ),
        (
            "ICMP router advertisement",
            icmp(own4, v4("224.0.0.1"), [9, 0, 0, 0, 1, 2, 7, 8]),
        ),
        (
            "ICMP error about nothing",
            icmp(own4, out4, [3, 1, 0, 0, 0, 0, 0, 0]),
        ),
        (
            "ICMPv6 error about nothing",
            icmp(own6, out6, [1, 0, 0, 0, 0, 0, 0, 0]),
        ),
        (
            "ICMP timestamp",
            icmp(own4, out4, [13, 0, 0, 0, 0, 1, 0, 1]),
        ),
        (
            "node information query",
            icmp(own6, out6, [139, 0, 0, 0, 0, 0, 0, 0]),
        ),
    ] {
        add(name.to_owned(), Never, &|_| stage.frame(&packet));
    }

    // DHCP: who answers is the server; who asks, asks everybody.
    for (name, from, to) in [
        ("DHCP reply to a sibling", (own4, 67), (stage.sibling4, 68)),
        ("DHCP reply to all", (own4, 67), (v4("255.255.255.255"), 68)),
        ("DHCP reply to the outside", (own4, 67), (out4, 68)),
        (
            "DHCPv6 reply to a sibling",
            (own6, 547),
            (stage.sibling6, 546),
        ),
        ("DHCPv6 reply to all", (own6, 547), (v6("ff02::1:2"), 546)),
        ("DHCPv6 reply to the outside", (own6, 547), (out6, 546)),
        (
            "DHCP request",
            (v4("0.0.0.0"), 68),
            (v4("255.255.255.255"), 67),
        ),
        (
            "DHCPv6 solicit",
            (v6("fe80::5"), 546),
            (v6("ff02::1:2"), 547),
        ),
    ] {
        add(name.to_owned(), Never, &|number| {
            stage.frame(&udp(from, to).payload(payload(number)))
        });
    }

    // Tags, and EtherTypes that are not IP, with a good packet behind them.
    for (name, header) in [
        ("VLAN 5", vec![0x81, 0, 0, 5, 8, 0]),
        ("priority tag", vec![0x81, 0, 0xe0, 0, 8, 0]),
        ("QinQ", vec![0x88, 0xa8, 0, 5, 0x81, 0, 0, 6, 8, 0]),
        ("two VLANs", vec![0x81, 0, 0, 5, 0x81, 0, 0, 6, 8, 0]),
        ("QinQ of old", vec![0x91, 0, 0, 5, 8, 0]),
        ("MPLS", vec![0x88, 0x47, 0, 1, 1, 64]),
        ("PPPoE", vec![0x88, 0x64, 0x11, 0, 0, 1, 0, 40, 0, 0x21]),
        ("LLDP", vec![0x88, 0xcc]),
        ("EAPOL", vec![0x88, 0x8e]),
        ("MACsec", vec![0x88, 0xe5]),
        ("IPX", vec![0x81, 0x37]),
        ("RARP", vec![0x80, 0x35]),
        ("loopback test", vec![0x90, 0]),
        ("local experiment", vec![0x88, 0xb5]),
        ("802.3 with LLC", vec![0, 60, 0x42, 0x42, 3]),
        ("802.3 with SNAP", vec![0, 60, 0xaa, 0xaa, 3, 0, 0, 0, 8, 0]),
        ("EtherType zero", vec![0, 0]),
        ("IPv6 that is IPv4", vec![0x86, 0xdd]),
    ] {
        add(name.to_owned(), Never, &|number| {
            stage.behind(&header, number)
        });
    }

    // Fragments whose beginning nobody has seen, and such as overlap or say nothing.
    for (from, to) in [(own4, out4), (own6, out6)] {
        for (offset, more) in [(1, false), (2, true), (185, false), (0x1fff, false)] {
            add(format!("fragment {offset} to {to}"), Never, &|number| {
                let packet = udp((from, 5000), (to, 7)).payload(payload(number));
                stage.frame(&packet.fragment(offset, more))
            });
        }
        add(format!("first fragment to {to}"), Go, &|number| {
            let body = [payload(number), vec![0; 24]].concat();
            let body = body[..body.len() / 8 * 8].to_vec();
            stage.frame(&udp((from, 5001), (to, 7)).payload(body).fragment(0, true))
        });
    }

    // Options and extension headers.
    for (name, options) in [
        ("loose source route", vec![131, 7, 4, 198, 51, 100, 1, 0]),
        ("strict source route", vec![137, 7, 4, 198, 51, 100, 1, 0]),
        ("record route", vec![7, 7, 4, 0, 0, 0, 0, 0]),
        ("timestamp", vec![68, 8, 5, 0, 0, 0, 0, 0]),
        ("router alert", vec![148, 4, 0, 0]),
        ("no operation", vec![1; 4]),
        ("forty bytes", vec![1; 40]),
    ] {
        add(format!("option: {name}"), Go, &|number| {
            stage.frame(&stage.good(number).options(&options))
        });
    }
    for (name, number, may) in [
        ("hop-by-hop", 0, Go),
        ("routing of unknown type", 43, Never),
        ("encapsulated", 50, Never),
        ("authenticated", 51, Never),
        ("no next header", 59, Never),
        ("destination options", 60, Go),
        ("mobility", 135, Never),
        ("host identity", 139, Never),
        ("shim6", 140, Never),
        ("experiment", 253, Never),
    ] {
        add(format!("extension header: {name}"), may, &|odd| {
            let packet = udp((own6, 5000), (out6, 7)).payload(payload(odd));
            stage.frame(&packet.extension(number))
        });
    }
    add("routing header type 0".into(), Never, &|number| {
        let packet = udp((own6, 5000), (out6, 7)).payload(payload(number));
        // By way of the outside to elsewhere.
        let mut routing = vec![UDP, 2, 0, 1, 0, 0, 0, 0];
        routing.extend(FAR.v6.octets());
        behind_header(stage.frame(&packet), 43, &routing)
    });

    // Groups, broadcasts, loopback, the link's own addresses.
    for to in [
        "224.0.0.1",
        "224.0.0.251",
        "239.1.2.3",
        "255.255.255.255",
        "127.0.0.1",
        "0.0.0.0",
        "240.0.0.1",
    ] {
        add(format!("to {to}"), Never, &|number| {
            stage.frame(&udp((own4, 5000), (v4(to), 7)).payload(payload(number)))
        });
    }
    for to in [
        "ff02::1",
        "ff02::fb",
        "ff05::2",
        "ff0e::1",
        "::1",
        "::",
        "fe80::1",
        "::ffff:192.0.2.1",
    ] {
        add(format!("to {to}"), Never, &|number| {
            stage.frame(&udp((own6, 5000), (v6(to), 7)).payload(payload(number)))
        });
        add(format!("ping to {to}"), Never, &|number| {
            stage.frame(&echo_request(own6, v6(to), 5).payload(payload(number)))
        });
    }
    // The host takes it for its own, as any router does; nobody else gets it.
    add("to the network's broadcast".into(), Go, &|number| {
        stage.frame(&udp((own4, 5000), (v4("10.0.42.255"), 7)).payload(payload(number)))
    });

    // Tunnels.
    for (name, protocol) in [
        ("IPv4 in IP", 4),
        ("IPv6 in IP", 41),
        ("GRE", 47),
        ("L2TP", 115),
        ("SCTP", 132),
        ("UDP-Lite", 136),
        ("protocol 255", 255),
    ] {
        for (from, to) in [(own4, out4), (own6, out6)] {
            // In a datagram of IPv6, 4 and 41 are as good as in one of IPv4.
            add(format!("{name} to {to}"), Never, &|number| {
                let inner = udp((FAR.of(Family::V4), 5000), (out4, 7)).payload(payload(number));
                stage.frame(&ip(from, to, protocol).payload(inner.bytes()))
            });
        }
    }
    add("VXLAN".into(), Go, &|number| {
        let vxlan = [
            &[8, 0, 0, 0, 0, 0, 5, 0][..],
            &stage.frame(&stage.good(number)),
        ]
        .concat();
        stage.frame(&udp((own4, 5000), (out4, 4789)).payload(vxlan))
    });

    // Headers that end too early, or contradict what follows.
    let whole = stage.frame(&stage.good(0));
    for length in [14, 15, 20, 33, 34, 38, 41] {
        add(format!("cut after {length} bytes"), Never, &|_| {
            whole[..length].to_vec()
        });
    }
    for (name, offset, bytes) in [
        ("version 5", 0, &[0x55][..]),
        ("header of 16 bytes", 0, &[0x44]),
        ("header of 60 bytes", 0, &[0x4f]),
        ("longer than the frame", 2, &[0xff, 0xff]),
        ("shorter than its header", 2, &[0, 12]),
        ("time to live zero", 8, &[0]),
        ("time to live one", 8, &[1]),
    ] {
        add(name.to_owned(), Never, &|number| {
            stage.frame(&stage.good(number).patched(offset, bytes))
        });
    }
    add("TCP header of 4 bytes".into(), Never, &|number| {
        let packet = tcp("S", (own4, 5000), (out4, 80)).payload(payload(number));
        stage.frame(&packet.patched_l4(12, &[0x10]))
    });
    for flags in ["A", "SA", "R", "FA", "F"] {
        add(
            format!("TCP {flags} without a connection"),
            Never,
            &|number| stage.frame(&tcp(flags, (own4, 5000), (out4, 80)).payload(payload(number))),
        );
    }
    add("from itself to itself".into(), Go, &|number| {
        stage.frame(&tcp("S", (own4, 80), (own4, 80)).payload(payload(number)))
    });
    frames
}

/// The number of an odd frame, of which a frame carries the payload.
pub(super) fn mark(frame: &[u8]) -> Option<usize> {
    let at = frame
        .windows(MARK.len())
        .position(|window| window == MARK)?
        + MARK.len();
    let digits = frame.get(at..at + 4)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}
