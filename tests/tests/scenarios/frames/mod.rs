//! Frames that no honest container sends, by a packet socket inside of one: what was tried is the
//! list of [`odd::frames`]. Nothing of it is seen anywhere but what may be.

mod odd;

use std::net::{IpAddr, Ipv6Addr};

use anyhow::{Context, Result, ensure};
use etherparse::ArpOperation;
use nucnet_common::abi::Mac;
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{Family, HOST, Node, OUTSIDE};
use nucnet_tests::packets::bench::Frame as _;
use nucnet_tests::packets::packet::{Packet, arp, icmp, solicitation, udp};
use nucnet_tests::packets::wire::Wire;

use crate::case::{Case, Families, Scenario, silent};

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

    let frames = odd::frames(&stage);
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
