//! Frames that no honest container sends, by a packet socket inside of one: what was tried is the
//! list of [`odd_frames`]. Nothing of it is seen anywhere but what may be.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use etherparse::ArpOperation;
use nucnet_common::{abi::Mac, packet::UDP};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, Node, OUTSIDE};
use nucnet_tests::packets::bench::Frame as _;
use nucnet_tests::packets::packet::{
    Packet, advertisement, arp, echo_request, icmp, ip, solicitation, tcp, udp,
};
use nucnet_tests::packets::wire::Wire;

use crate::case::{Case, Families, Scenario, silent};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "odd_frames_never_leave_a_container_without_a_policy",
        what: "forged, tagged, tunnelled, cut short: only what is the container's own goes out",
        families: Families::Together,
        run: without_policy,
    },
    Scenario {
        name: "odd_frames_never_leave_a_container_under_a_policy",
        what: "a policy has no hole beside it: one port of one address is open, and nothing else",
        families: Families::Together,
        run: under_policy,
    },
    Scenario {
        name: "address_checks_of_a_container_work",
        what: "duplicate address detection, ARP probes and listener reports are no attacks",
        families: Families::Together,
        run: address_checks,
    },
    Scenario {
        name: "root_in_the_container_cannot_lift_its_policy",
        what: "routes, filters, addresses and MAC of its own: the policy is out of its reach (N-46)",
        families: Families::Each,
        run: root_inside,
    },
];

/// What may become of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum May {
    /// Nobody ever sees it.
    Never,
    /// It is an ordinary packet, however odd: without a policy somebody may get it.
    Go,
}
use May::{Go, Never};

/// In the payload of every frame that has one, and with its number behind it.
const MARK: &[u8] = b"odd frame ";

struct Stage {
    client: Node,
    own: Mac,
    gateway: Mac,
    v4: IpAddr,
    v6: IpAddr,
    gateway4: IpAddr,
    gateway6: IpAddr,
    sibling: Node,
    sibling_mac: Mac,
    sibling4: IpAddr,
    sibling6: IpAddr,
}

fn mac_of(node: &Node, ifname: &str) -> Result<Mac> {
    let shown = node.run("ip", &["-o", "link", "show", ifname])?;
    let mac = shown
        .split_whitespace()
        .skip_while(|word| *word != "link/ether")
        .nth(1)
        .with_context(|| format!("no link-layer address in {shown}"))?;
    parse_mac(mac)
}

fn parse_mac(text: &str) -> Result<Mac> {
    let bytes: Vec<u8> = text
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16))
        .collect::<Result<_, _>>()?;
    bytes.try_into().ok().context("six bytes")
}

impl Stage {
    fn new(case: &Case, arguments: &[&str]) -> Result<Self> {
        let (client, endpoint) = case.attached("client", arguments)?;
        let (sibling, other) = case.attached("sibling", &[])?;
        let mac = |json: &serde_json::Value| parse_mac(json["mac"].as_str().context("no mac")?);
        Ok(Self {
            own: mac(&endpoint.json)?,
            gateway: mac_of(&case.lab.host, "nucnet0")?,
            v4: endpoint.address(Family::V4)?,
            v6: endpoint.address(Family::V6)?,
            gateway4: endpoint.gateway(Family::V4)?,
            gateway6: endpoint.gateway(Family::V6)?,
            sibling_mac: mac(&other.json)?,
            sibling4: other.address(Family::V4)?,
            sibling6: other.address(Family::V6)?,
            client,
            sibling,
        })
    }

    /// In a frame to the gateway, as all that leaves is.
    fn frame(&self, packet: &Packet) -> Vec<u8> {
        packet.framed(self.gateway, self.own)
    }

    /// With another EtherType, or with tags, before a packet that would pass.
    fn behind(&self, header: &[u8], number: usize) -> Vec<u8> {
        let good = self.frame(&self.good(number));
        [&good[..12], header, &good[14..]].concat()
    }

    /// What would pass without a policy, and under the one of [`under_policy`] would not.
    fn good(&self, number: usize) -> Packet {
        udp((self.v4, 5000), (OUTSIDE.of(Family::V4), 7)).payload(payload(number))
    }
}

fn payload(number: usize) -> Vec<u8> {
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

const BROADCAST: Mac = [0xff; 6];

fn v4(text: &str) -> IpAddr {
    IpAddr::V4(text.parse::<Ipv4Addr>().expect(text))
}

fn v6(text: &str) -> IpAddr {
    IpAddr::V6(text.parse::<Ipv6Addr>().expect(text))
}

/// Everything that is tried: its name, what may become of it without a policy, the frame. Under a
/// policy that does not allow its destination, nothing of it may go anywhere.
fn odd_frames(stage: &Stage) -> Vec<(String, May, Vec<u8>)> {
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

const CONTROL: &[u8] = b"an honest datagram";
const CONTROL_PORT: u16 = 9999;

/// Whether some bytes are among others.
fn holds(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
}

/// The number of an odd frame, of which a frame carries the payload.
fn mark(frame: &[u8]) -> Option<usize> {
    let at = frame
        .windows(MARK.len())
        .position(|window| window == MARK)?
        + MARK.len();
    let digits = frame.get(at..at + 4)?;
    std::str::from_utf8(digits).ok()?.parse().ok()
}

/// Why a frame may not be on the uplink, where only the host speaks, as itself.
fn is_foreign(frame: &[u8], host: Mac) -> Option<&'static str> {
    if frame[6..12] != host {
        return Some("not from the host's MAC");
    }
    let source = |at: usize, length: usize| frame.get(at..at + length).unwrap_or_default();
    match frame[12..14] {
        [8, 0] if source(26, 4) == HOST.v4.octets() => None,
        [8, 0] => Some("not from the host's IPv4 address"),
        [8, 6] if source(28, 4) == HOST.v4.octets() && source(22, 6) == host => None,
        [8, 6] => Some("ARP of somebody else"),
        [0x86, 0xdd] => {
            let address: [u8; 16] = source(22, 16).try_into().unwrap_or_default();
            let address = Ipv6Addr::from(address);
            let own = address == HOST.v6
                || address.is_unspecified()
                || address.segments()[0] & 0xffc0 == 0xfe80;
            // Router advertisements and redirects.
            let claims = frame.get(20) == Some(&58) && matches!(frame.get(54), Some(134 | 137));
            match (own, claims) {
                (true, false) => None,
                (true, true) => Some("a router's message"),
                (false, _) => Some("not from the host's IPv6 address"),
            }
        }
        _ => Some("neither IP nor ARP"),
    }
}

/// Sends an honest datagram until it is seen outside: what was sent before has been dealt with.
fn honest(stage: &Stage, wire: &Wire, seen: &mut Vec<Vec<u8>>, outside: &Wire) -> Result<()> {
    let to = (OUTSIDE.of(Family::V4), CONTROL_PORT);
    let frame = stage.frame(&udp((stage.v4, 6000), to).payload(CONTROL));
    until("an honest datagram comes out", SOON, || {
        wire.send(&frame)?;
        seen.extend(outside.frames()?);
        let control = |frame: &Vec<u8>| holds(frame, CONTROL);
        let has_come = seen.iter().any(control);
        seen.retain(|frame| !control(frame));
        Ok(has_come)
    })
}

fn try_all(case: &Case, arguments: &[&str], is_free: bool) -> Result<()> {
    let stage = Stage::new(case, arguments)?;
    let (host, lab_outside) = (&case.lab.host, &case.lab.outside);
    let (host_mac, outside_mac) = (mac_of(host, "eth0")?, mac_of(lab_outside, "eth0")?);
    let wire = stage.client.within(|| Wire::of("eth0"))??;
    let outside = lab_outside.within(|| Wire::of("eth0"))??;
    let sibling = stage.sibling.within(|| Wire::of("eth0"))??;
    let bridge = host.within(|| Wire::of("nucnet0"))??;
    // The host has found out who the outside is before anything is counted on.
    honest(&stage, &wire, &mut Vec::new(), &outside)?;
    sibling.frames()?;
    bridge.frames()?;

    let frames = odd_frames(&stage);
    let mut seen = Vec::new();
    for (name, _, frame) in &frames {
        wire.send(frame).with_context(|| name.clone())?;
        seen.extend(outside.frames()?);
    }
    honest(&stage, &wire, &mut seen, &outside)?;

    let may_go = |frame: &[u8]| match mark(frame).and_then(|number| frames.get(number)) {
        Some((_, Go, _)) => is_free,
        Some((_, Never, _)) => false,
        None => true,
    };
    let name = |frame: &[u8]| {
        let odd = mark(frame).and_then(|number| frames.get(number));
        odd.map_or("unmarked", |(name, ..)| name.as_str())
    };
    seen.retain(|frame| frame[6..12] != outside_mac);
    for frame in &seen {
        let why = is_foreign(frame, host_mac);
        ensure!(
            why.is_none(),
            "outside saw ({why:?}, {}) {frame:02x?}",
            name(frame)
        );
        ensure!(may_go(frame), "outside saw {}: {frame:02x?}", name(frame));
    }
    for frame in bridge.frames()? {
        ensure!(
            may_go(&frame),
            "the host saw {}: {frame:02x?}",
            name(&frame)
        );
    }
    for frame in sibling.frames()? {
        let is_own = frame[6..12] == stage.sibling_mac;
        ensure!(is_own, "the sibling saw {}: {frame:02x?}", name(&frame));
    }
    let went: Vec<&str> = seen.iter().map(|frame| name(frame)).collect();
    if is_free {
        ensure!(
            went.contains(&"option: no operation"),
            "ordinary ones go: {went:?}"
        );
    }
    let drops = case.lab.drops()?;
    for reason in [
        "spoofed-mac",
        "spoofed-address",
        "not-ip",
        "malformed",
        "protocol",
        "multicast",
        "link-local",
        "martian",
        "infrastructure",
        "discovery",
        "no-flow",
    ] {
        ensure!(
            drops.contains_key(reason),
            "nothing is counted as {reason}: {drops:?}"
        );
    }
    let counted: u64 = drops.values().sum();
    let never = frames
        .iter()
        .filter(|(_, may, _)| *may == Never || !is_free);
    ensure!(
        counted >= never.clone().count() as u64,
        "{counted} of {} frames are counted: {drops:?}",
        never.count()
    );
    if !is_free {
        case.counted("policy")?;
        case.counted("ip-options")?;
    }
    Ok(())
}

fn without_policy(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    try_all(case, &[], true)
}

fn under_policy(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let rule = format!("{}:{CONTROL_PORT}/udp", OUTSIDE.v4);
    try_all(case, &["--allow", &rule], false)
}

fn address_checks(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let stage = Stage::new(case, &["--egress-default", "deny"])?;
    let before = case.lab.drops()?;
    let wire = stage.client.within(|| Wire::of("eth0"))??;
    let (own, none) = (stage.own, [0; 6]);
    let probe = (own, v4("0.0.0.0"));
    for (sender, target) in [(probe, stage.v4), ((own, stage.v4), stage.v4)] {
        wire.send(&arp(
            ArpOperation::REQUEST,
            (BROADCAST, own),
            sender,
            (none, target),
        ))?;
    }
    // A listener report (RFC 3810) with the router alert that it must have.
    let report = icmp(v6("fe80::5"), v6("ff02::16"), [143, 0, 0, 0, 0, 0, 0, 1]);
    wire.send(&stage.frame(&report.extension(0).ttl(1)))?;
    let group = v6("ff02::1:ff00:5");
    wire.send(&stage.frame(&solicitation(v6("::"), group, v6("fe80::5"), None)))?;
    until("four checks are counted as what they are", SOON, || {
        let drops = case.lab.drops()?;
        let count = |drops: &std::collections::BTreeMap<&str, u64>| {
            drops.get("discovery").copied().unwrap_or_default()
        };
        Ok(count(&drops) >= count(&before) + 4)
    })?;
    for (reason, count) in case.lab.drops()? {
        let earlier = before.get(reason).copied().unwrap_or_default();
        let sent = wire.frames()?;
        ensure!(
            reason == "discovery" || count == earlier,
            "something is counted as {reason} among {sent:02x?}"
        );
    }

    // The kernel's own check of an address that it is given anew.
    let address = format!("{}/64", stage.v6);
    stage.client.sysctl("net/ipv6/conf/eth0/accept_dad", "1")?;
    stage
        .client
        .run("ip", &["addr", "del", &address, "dev", "eth0"])?;
    stage
        .client
        .run("ip", &["addr", "add", &address, "dev", "eth0"])?;
    until("the address is found to be free", SOON, || {
        let shown = stage.client.run("ip", &["addr", "show", "dev", "eth0"])?;
        ensure!(!shown.contains("dadfailed"), "{shown}");
        Ok(shown.contains(&address) && !shown.contains("tentative"))
    })
}

fn root_inside(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &["--egress-default", "deny"])?;
    let (_, other) = case.attached("sibling", &[])?;
    let server = case.web(&case.lab.outside, 80)?;
    let to = OUTSIDE.port(case.family, 80);
    silent(&client, to)?;
    let address = other.address(case.family)?;
    let length = if address.is_ipv4() { 24 } else { 64 };
    for words in [
        "tc qdisc replace dev eth0 root pfifo".to_owned(),
        "tc qdisc replace dev eth0 clsact".to_owned(),
        "ip link set eth0 promisc on".to_owned(),
        format!("ip addr add {address}/{length} dev eth0"),
        "ip link set eth0 address 02:00:00:00:00:99".to_owned(),
    ] {
        let mut words = words.split(' ');
        let program = words.next().context("a program")?;
        let arguments: Vec<&str> = words.collect();
        client.run(program, &arguments)?;
        silent(&client, to).with_context(|| arguments.join(" "))?;
    }
    let clients = server.clients();
    ensure!(clients.is_empty(), "{clients:?} got out");
    Ok(())
}
