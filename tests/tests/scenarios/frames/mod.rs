//! Frames that no honest container sends, by a packet socket inside of one: what was tried is the
//! list of [`odd::frames`]. Nothing of it is seen anywhere but what may be.

mod odd;

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result, bail, ensure};
use etherparse::ArpOperation;
use nucnet_common::abi::Mac;
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{Family, HOST, Node, OUTSIDE};
use nucnet_tests::packets::bench::Frame as _;
use nucnet_tests::packets::packet::{Packet, arp, icmp, solicitation, udp};
use nucnet_tests::packets::wire::Wire;

use crate::case::{Case, Families, Scenario, silent, skip};
use crate::differences::counts_arp;

use odd::{
    BROADCAST,
    May::{Go, Never},
    mark, payload, v4, v6,
};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "odd_frames_never_leave_a_container_without_a_policy",
        what: "forged, tagged, tunnelled, cut short: only what is the container's own goes out",
        families: Families::Together,
        run: |case| try_some(case, &Tried::WITHOUT_POLICY, |name| !odd::is_header(name)),
    },
    Scenario {
        name: "odd_frames_never_leave_a_container_under_a_policy",
        what: "a policy has no hole beside it: one port of one address is open, and nothing else",
        families: Families::Together,
        run: |case| try_some(case, &Tried::UNDER_POLICY, |name| !odd::is_header(name)),
    },
    Scenario {
        name: "odd_headers_never_leave_a_container_without_a_policy",
        what: "headers that hide where a packet goes, or what it is",
        families: Families::Together,
        run: |case| try_some(case, &Tried::WITHOUT_POLICY, odd::is_header),
    },
    Scenario {
        name: "odd_headers_never_leave_a_container_under_a_policy",
        what: "the same under a policy, options of IPv4 among them",
        families: Families::Together,
        run: |case| try_some(case, &Tried::UNDER_POLICY, odd::is_header),
    },
    Scenario {
        name: "odd_frames_are_counted_and_never_seen_by_the_host_without_a_policy",
        what: "who looks for a fault finds its reason; and nothing of the host's has to parse them",
        families: Families::Together,
        run: |case| count_all(case, &Tried::WITHOUT_POLICY),
    },
    Scenario {
        name: "odd_frames_are_counted_and_never_seen_by_the_host_under_a_policy",
        what: "the same under a policy",
        families: Families::Together,
        run: |case| count_all(case, &Tried::UNDER_POLICY),
    },
    Scenario {
        name: "address_checks_of_a_container_are_counted_as_what_they_are",
        what: "duplicate address detection, ARP probes and listener reports are no attacks",
        families: Families::Together,
        run: address_checks,
    },
    Scenario {
        name: "address_that_a_container_is_given_anew_is_found_to_be_free",
        what: "who answers for others must not answer a container's check of its own address",
        families: Families::Together,
        run: own_check,
    },
    Scenario {
        name: "headers_that_are_in_pieces_are_translated",
        what: "the kernel need not have more than the link layer's header in one piece",
        families: Families::Each,
        run: in_pieces,
    },
    Scenario {
        name: "root_in_the_container_cannot_lift_its_policy",
        what: "routes, filters, addresses and MAC of its own: the policy is out of its reach (N-46)",
        families: Families::Each,
        run: root_inside,
    },
];

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

const CONTROL: &[u8] = b"an honest datagram";
const CONTROL_PORT: u16 = 9999;

/// Whether some bytes are among others.
fn holds(bytes: &[u8], wanted: &[u8]) -> bool {
    bytes.windows(wanted.len()).any(|window| window == wanted)
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

/// Under which policy frames are tried.
struct Policy {
    /// What is allowed; none: there is no policy.
    allow: Option<fn() -> String>,
}

/// Frames that a container has sent, and who saw what of them.
struct Tried {
    frames: Vec<(String, odd::May, Vec<u8>)>,
    is_free: bool,
    /// What the outside saw of the host.
    outside: Vec<Vec<u8>>,
    host: Vec<Vec<u8>>,
    /// What the sibling saw of others.
    sibling: Vec<Vec<u8>>,
    host_mac: Mac,
}

impl Tried {
    const WITHOUT_POLICY: Policy = Policy { allow: None };
    const UNDER_POLICY: Policy = Policy {
        allow: Some(|| format!("{}:{CONTROL_PORT}/udp", OUTSIDE.v4)),
    };

    /// Sends the frames whose names are meant.
    fn new(case: &Case, policy: &Policy, is_meant: fn(&str) -> bool) -> Result<Self> {
        case.only_nucnet()?;
        let allow = policy.allow.map(|rule| rule());
        let arguments = allow.iter().flat_map(|rule| ["--allow", rule]);
        let stage = Stage::new(case, &arguments.collect::<Vec<_>>())?;
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

        let frames = odd::frames(&stage);
        let mut seen = Vec::new();
        for (name, _, frame) in frames.iter().filter(|(name, ..)| is_meant(name)) {
            wire.send(frame).with_context(|| name.clone())?;
            seen.extend(outside.frames()?);
        }
        honest(&stage, &wire, &mut seen, &outside)?;
        seen.retain(|frame| frame[6..12] != outside_mac);
        let mut others = sibling.frames()?;
        others.retain(|frame| frame[6..12] != stage.sibling_mac);
        Ok(Self {
            frames,
            is_free: allow.is_none(),
            outside: seen,
            host: bridge.frames()?,
            sibling: others,
            host_mac,
        })
    }

    fn odd(&self, frame: &[u8]) -> Option<&(String, odd::May, Vec<u8>)> {
        mark(frame).and_then(|number| self.frames.get(number))
    }

    fn name(&self, frame: &[u8]) -> &str {
        self.odd(frame).map_or("unmarked", |(name, ..)| name)
    }

    fn may_go(&self, frame: &[u8]) -> bool {
        match self.odd(frame) {
            Some((_, Go, _)) => self.is_free,
            Some((_, Never, _)) => false,
            None => true,
        }
    }
}

/// That of the frames whose names are meant nobody gets what is not for them.
fn try_some(case: &Case, policy: &Policy, is_meant: fn(&str) -> bool) -> Result<()> {
    let tried = Tried::new(case, policy, is_meant)?;
    let mut wrong = Vec::new();
    for frame in &tried.outside {
        let name = tried.name(frame);
        if let Some(why) = is_foreign(frame, tried.host_mac) {
            wrong.push(format!("outside saw {name} ({why}): {frame:02x?}"));
        } else if !tried.may_go(frame) {
            wrong.push(format!("outside saw {name}: {frame:02x?}"));
        }
    }
    for frame in tried.sibling.iter().filter(|frame| !tried.may_go(frame)) {
        wrong.push(format!(
            "the sibling saw {}: {frame:02x?}",
            tried.name(frame)
        ));
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    let went: Vec<&str> = tried
        .outside
        .iter()
        .map(|frame| tried.name(frame))
        .collect();
    let ordinary = ["option: no operation", "VXLAN"].into_iter();
    let mut ordinary = ordinary.filter(|name| tried.is_free && is_meant(name));
    ensure!(
        ordinary.all(|name| went.contains(&name)),
        "ordinary ones go: {went:?}"
    );
    Ok(())
}

/// That the host sees nothing of what goes nowhere, and knows why.
fn count_all(case: &Case, policy: &Policy) -> Result<()> {
    let tried = Tried::new(case, policy, |_| true)?;
    for frame in &tried.host {
        let name = tried.name(frame);
        ensure!(tried.may_go(frame), "the host saw {name}: {frame:02x?}");
    }
    if let Some(frame) = tried.sibling.first() {
        bail!("the sibling saw {}: {frame:02x?}", tried.name(frame));
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
    let never = tried
        .frames
        .iter()
        .filter(|(_, may, _)| *may == Never || !tried.is_free);
    ensure!(
        counted >= never.clone().count() as u64,
        "{counted} of {} frames are counted: {drops:?}",
        never.count()
    );
    if !tried.is_free {
        case.counted("policy")?;
        case.counted("ip-options")?;
    }
    Ok(())
}

fn address_checks(case: &Case) -> Result<()> {
    // Of each: more than the container's own stack says of anything meanwhile.
    const EACH: u64 = 20;
    case.only_nucnet()?;
    let stage = Stage::new(case, &["--egress-default", "deny"])?;
    let before = case.lab.drops()?;
    let wire = stage.client.within(|| Wire::of("eth0"))??;
    let (own, none) = (stage.own, [0; 6]);
    let request = |sender| {
        let (to, about) = ((BROADCAST, own), (none, stage.v4));
        arp(ArpOperation::REQUEST, to, sender, about)
    };
    // A listener report (RFC 3810) with the router alert that it must have.
    let report = icmp(v6("fe80::5"), v6("ff02::16"), [143, 0, 0, 0, 0, 0, 0, 1]);
    let group = v6("ff02::1:ff00:5");
    let checks = [
        request((own, v4("0.0.0.0"))),
        request((own, stage.v4)),
        stage.frame(&report.extension(0).ttl(1)),
        stage.frame(&solicitation(v6("::"), group, v6("fe80::5"), None)),
    ];
    for _ in 0..EACH {
        for check in &checks {
            wire.send(check)?;
        }
    }
    let counted = EACH * if counts_arp(case.way) { 4 } else { 2 };
    until("checks are counted as what they are", SOON, || {
        let drops = case.lab.drops()?;
        let count = |drops: &std::collections::BTreeMap<&str, u64>| {
            drops.get("discovery").copied().unwrap_or_default()
        };
        Ok(count(&drops) >= count(&before) + counted)
    })?;
    for (reason, count) in case.lab.drops()? {
        let earlier = before.get(reason).copied().unwrap_or_default();
        ensure!(
            reason == "discovery" || count < earlier + EACH,
            "something is counted as {reason}: {} times",
            count - earlier
        );
    }
    Ok(())
}

/// Bytes of a datagram that is longer than a page.
const LONG: usize = 8000;

fn in_pieces(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    if !case.is_by_programs() {
        return skip("no program reads headers");
    }
    // SAFETY: takes a number.
    if unsafe { libc::sysconf(libc::_SC_PAGESIZE) } > LONG as libc::c_long {
        return skip("the kernel keeps frames of a page in one piece, and pages are longer here");
    }
    let (container, endpoint) = case.attached("container", &["--mtu", "9000"])?;
    let (host, outside) = (&case.lab.host, &case.lab.outside);
    for node in [host, outside] {
        node.ip("link set eth0 mtu 9000")?;
    }
    case.lab.nucnet(&["gc"])?.expect(0)?;
    let server = outside.udp(case.any(53))?;
    let client = container.udp(case.any(5000))?;
    for socket in [&server, &client] {
        socket.set_read_timeout(Some(SOON))?;
    }
    // The neighbours are known then, and the way back.
    client.send_to(b"first", OUTSIDE.port(case.family, 53))?;
    let mut bytes = vec![0; 65536];
    let (_, seen) = server.recv_from(&mut bytes)?;

    let long: Vec<u8> = (0..LONG).map(|at| (at % 251) as u8).collect();
    let inside = endpoint.address(case.family)?;
    let there = udp((inside, 5000), (OUTSIDE.of(case.family), 53)).payload(long.clone());
    let frame = there.framed(mac_of(host, "nucnet0")?, mac_of(&container, "eth0")?);
    container.within(|| Wire::send_in_pieces("eth0", &frame))??;
    let (length, from) = server.recv_from(&mut bytes)?;
    ensure!(from == seen, "it comes from {from}, not {seen}");
    ensure!(bytes[..length] == long, "other bytes come out");

    let back = udp((OUTSIDE.of(case.family), 53), seen).payload(long.clone());
    let frame = back.framed(mac_of(host, "eth0")?, mac_of(outside, "eth0")?);
    outside.within(|| Wire::send_in_pieces("eth0", &frame))??;
    let (length, _) = client.recv_from(&mut bytes)?;
    ensure!(bytes[..length] == long, "other bytes come back");
    Ok(())
}

fn own_check(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let stage = Stage::new(case, &["--egress-default", "deny"])?;
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
