//! Slots of microVMs: guests of one snapshot, each in a place of its own.

use std::net::{IpAddr, SocketAddr};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use nucnet_ctl::kernel::netns::{NetnsFd, run_in};
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{FAR, HOST, Lab, Node, OUTSIDE, Slot, Snapshot, web};

use crate::case::{Case, Families, Scenario, silent};
use crate::transfers::downloaded;

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "guest_leaves_with_the_uplinks_address",
        what: "the seed masqueraded an address that no packet had",
        families: Families::Together,
        run: leaves,
    },
    Scenario {
        name: "guest_is_reached_by_its_slots_address_and_by_publishes",
        what: "1:1 from the host, and host ports from outside, as for containers",
        families: Families::Together,
        run: reached,
    },
    Scenario {
        name: "two_guests_of_one_address_stay_apart",
        what: "clones of one snapshot on one host",
        families: Families::Together,
        run: clones,
    },
    Scenario {
        name: "slot_reaches_neither_neighbours_nor_host_nor_metadata",
        what: "a sandbox is closed unless somebody says otherwise in so many words",
        families: Families::Together,
        run: guarded,
    },
    Scenario {
        name: "guest_resumes_in_another_slot",
        what: "its neighbours, address and routes go on; nothing of the old slot reaches it",
        families: Families::Together,
        run: resumed,
    },
    Scenario {
        name: "guest_is_told_of_errors_about_what_it_sent",
        what: "traceroute and path MTU discovery from inside of a microVM",
        families: Families::Together,
        run: told,
    },
    Scenario {
        name: "download_of_a_guest_arrives_whole",
        what: "segmentation and checksum offload by the TAP",
        families: Families::Together,
        run: download,
    },
    Scenario {
        name: "forged_packets_of_a_guest_stay_in_its_slot",
        what: "root in a guest can send whatever it likes",
        families: Families::Together,
        run: forged,
    },
    Scenario {
        name: "slots_are_endpoints_to_every_other_verb",
        what: "list, inspect, publish, egress, flows, explain, gc and down know slot-N",
        families: Families::Together,
        run: verbs,
    },
    Scenario {
        name: "slots_come_and_go_together_without_a_trace",
        what: "a host that starts many microVMs from one snapshot",
        families: Families::Together,
        run: together,
    },
    Scenario {
        name: "tap_of_a_slot_is_opened_by_its_owner_or_group_alone",
        what: "a jailed virtual machine monitor has no privileges",
        families: Families::Together,
        run: owned,
    },
    Scenario {
        name: "tap_of_several_queues_is_opened_several_times",
        what: "a machine of several processors has a queue for each",
        families: Families::Together,
        run: queues,
    },
    Scenario {
        name: "slot_that_is_damaged_is_repaired_by_creating_it_again",
        what: "somebody deleted the TAP, or a program",
        families: Families::Together,
        run: repaired,
    },
];

/// The lab, where there can be slots.
fn with_slots(case: &Case) -> Result<&Lab> {
    case.only_nucnet()?;
    Ok(&case.lab)
}

fn server(node: &Node, port: u16) -> Result<web::Server> {
    web::Server::start(node.listen(([0, 0, 0, 0], port).into())?)
}

fn at(address: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(address.into(), port)
}

fn host_ip(slot: &Slot) -> Result<IpAddr> {
    slot.address("host_ip")
}

fn leaves(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let slot = lab.slot(1, &[])?;
    let guest = lab.guest("guest", &slot)?;
    let _server = server(&lab.outside, 80)?;
    for to in [at(OUTSIDE.v4, 80), at(FAR.v4, 80)] {
        let (seen, _) = case.who(&guest.node, to)?;
        ensure!(seen.ip() == IpAddr::V4(HOST.v4), "{to} sees {seen}");
    }
    let _udp = case.udp(&lab.outside, 53)?;
    let seen = case.who_udp(&guest.node, at(OUTSIDE.v4, 53))?;
    ensure!(seen.peer.ip() == IpAddr::V4(HOST.v4), "{seen:?}");
    ensure!(
        case.pings(&guest.node, FAR.v4.into())?,
        "no answer to a ping"
    );
    Ok(())
}

fn reached(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let slot = lab.slot(1, &["-p", "8080:80"])?;
    let guest = lab.guest("guest", &slot)?;
    let _server = server(&guest.node, 80)?;
    let (seen, local) = case.who(&lab.outside, at(HOST.v4, 8080))?;
    ensure!(seen == local, "the guest sees {seen} for {local}");
    let direct = at(host_ip(&slot)?, 80);
    case.who(&lab.host, direct)?;
    ensure!(
        case.pings(&lab.host, direct.ip())?,
        "the host cannot ping the guest"
    );
    for to in [at([127, 0, 0, 1], 8080), at(HOST.v4, 8080)] {
        case.who(&lab.host, to)?;
    }
    // Its address is for the host alone.
    lab.outside.ip("route add 10.11.0.0/16 via 192.0.2.2")?;
    silent(&lab.outside, direct)
}

fn clones(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let mut guests = Vec::new();
    for (number, port) in [(1, 8081), (2, 8082)] {
        let slot = lab.slot(number, &["-p", &format!("{port}:80")])?;
        let guest = lab.guest(&format!("guest{number}"), &slot)?;
        let server = server(&guest.node, 80)?;
        guests.push((slot, port, guest, server));
    }
    let _server = server(&lab.outside, 80)?;
    for (slot, port, _, server) in &guests {
        let before = server.clients().len();
        case.who(&lab.outside, at(HOST.v4, *port))?;
        case.who(&lab.host, at(host_ip(slot)?, 80))?;
        ensure!(
            server.clients().len() == before + 2,
            "the wrong guest answered"
        );
    }
    // Connections from one and the same address and port, both open before either is used.
    let mut streams = Vec::new();
    for (slot, _, guest, _) in &guests {
        let from = SocketAddr::new(slot.address("guest_ip")?, 5000);
        let to = at(OUTSIDE.v4, 80);
        streams.push(guest.node.connect_from(Some(from), to, SOON)?);
    }
    let seen: Vec<_> = streams.into_iter().map(web::who).collect::<Result<_>>()?;
    ensure!(
        seen[0] != seen[1] && seen.iter().all(|seen| seen.ip() == IpAddr::V4(HOST.v4)),
        "the server sees {seen:?}"
    );
    Ok(())
}

fn guarded(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let one = lab.slot(1, &[])?;
    let two = lab.slot(2, &[])?;
    let (first, second) = (lab.guest("first", &one)?, lab.guest("second", &two)?);
    let _neighbour = server(&second.node, 80)?;
    let _host = server(&lab.host, 22)?;
    lab.outside.ip("addr add 169.254.169.254/32 dev lo")?;
    let _metadata = server(&lab.outside, 80)?;
    lab.host.ip("route add 169.254.169.254 via 192.0.2.1")?;
    let metadata = at([169, 254, 169, 254], 80);
    let gateway = one.address("gateway")?;
    for closed in [
        at(host_ip(&two)?, 80),
        at(HOST.v4, 22),
        at(gateway, 22),
        at(one.address("link_ip")?, 22),
        metadata,
    ] {
        silent(&first.node, closed)?;
    }
    case.counted("policy")?;
    let allow = format!("{}:80", host_ip(&two)?);
    lab.nucnet(&[
        "egress",
        "set",
        "slot-1",
        "--egress-default",
        "allow",
        "--allow",
        &allow,
        "--allow",
        "host:22",
        "--allow",
        "169.254.169.254",
    ])?
    .expect(0)?;
    for open in [at(host_ip(&two)?, 80), at(gateway, 22), metadata] {
        case.who(&first.node, open)?;
    }
    silent(&first.node, at(host_ip(&two)?, 81))
}

fn resumed(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let one = lab.slot(1, &["-p", "8080:80"])?;
    let mut guest = lab.guest("guest", &one)?;
    let _server = server(&guest.node, 80)?;
    let _outside = server(&lab.outside, 80)?;
    case.who(&lab.outside, at(HOST.v4, 8080))?;
    case.who(&guest.node, at(OUTSIDE.v4, 80))?;
    let neighbours = guest.node.run("ip", &["neigh", "show", "dev", "eth0"])?;
    guest.pause();
    lab.nucnet(&["slot", "remove", "1"])?.expect(0)?;
    let two = lab.slot(2, &["-p", "8080:80"])?;
    guest.resume(lab, &two)?;
    case.who(&lab.outside, at(HOST.v4, 8080))?;
    case.who(&lab.host, at(host_ip(&two)?, 80))?;
    case.who(&guest.node, at(OUTSIDE.v4, 80))?;
    let old = lab.host.connect(at(host_ip(&one)?, 80), NEVER);
    ensure!(
        old.is_err(),
        "the old slot's address still leads to a guest"
    );
    let mac = |text: &str| -> Option<String> {
        let words: Vec<&str> = text.split_whitespace().collect();
        let at = words.iter().position(|word| *word == "lladdr")?;
        Some(words.get(at + 1)?.to_string())
    };
    let after = guest.node.run("ip", &["neigh", "show", "dev", "eth0"])?;
    ensure!(
        mac(&neighbours).is_some() && mac(&neighbours) == mac(&after),
        "{neighbours}, then {after}"
    );
    let flows = lab.nucnet(&["-o", "json", "flows"])?.expect(0)?.json()?;
    let flows = flows.as_array().context("no list")?;
    ensure!(
        !flows.is_empty() && flows.iter().all(|flow| flow["endpoint"] == "slot-2"),
        "not the flows of slot-2 alone: {flows:?}"
    );
    // The place is free for another.
    lab.slot(1, &[])?;
    Ok(())
}

fn told(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let slot = lab.slot(1, &[])?;
    let guest = lab.guest("guest", &slot)?;
    // Nobody listens there: the answer is an error that quotes what was sent.
    let socket = guest.node.udp(([0, 0, 0, 0], 0).into())?;
    socket.connect(at(OUTSIDE.v4, 9))?;
    socket.set_read_timeout(Some(SOON))?;
    socket.send(b"anybody?")?;
    let error = socket.recv(&mut [0; 16]);
    ensure!(
        error
            .as_ref()
            .is_err_and(|error| error.kind() == std::io::ErrorKind::ConnectionRefused),
        "{error:?}"
    );
    // The first hop answers with the name that the guest has for it, about what lives too short
    // and about what is too long for the way.
    lab.host.ip(&format!(
        "route add {} via {} mtu lock 1300",
        FAR.v4, OUTSIDE.v4
    ))?;
    let gateway = slot.address("gateway")?;
    for (arguments, told) in [
        (&["-t", "1"][..], "Time to live exceeded"),
        (&["-M", "do", "-s", "1400"], "mtu = 1300"),
    ] {
        let mut ping = guest.node.command("ping");
        ping.args(["-n", "-c", "1", "-W", "2"]).args(arguments);
        let output = ping.arg(FAR.v4.to_string()).output()?;
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        let from_gateway = format!("From {gateway} ");
        ensure!(
            text.lines()
                .any(|line| line.starts_with(&from_gateway) && line.contains(told)),
            "{arguments:?}: {text}"
        );
    }
    Ok(())
}

fn download(case: &Case) -> Result<()> {
    const SIZE: usize = 64 << 20;
    let lab = with_slots(case)?;
    let slot = lab.slot(1, &["-p", "8080:80"])?;
    let guest = lab.guest("guest", &slot)?;
    let (_inside, _outside) = (server(&guest.node, 80)?, server(&lab.outside, 80)?);
    let mut digest = web::Digest::default();
    let payload = web::payload();
    for _ in 0..SIZE / payload.len() {
        digest.update(payload);
    }
    let expected = digest.finish();
    for (client, to) in [
        (&guest.node, at(OUTSIDE.v4, 80)),
        (&lab.outside, at(HOST.v4, 8080)),
    ] {
        let arrived = downloaded(client, &format!("http://{to}/bytes/{SIZE}"))?;
        ensure!(arrived == expected, "{}: damaged", client.name());
    }
    Ok(())
}

fn forged(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let slot = lab.slot(1, &[])?;
    let guest = lab.guest("guest", &slot)?;
    let _server = case.udp(&lab.outside, 53)?;
    guest
        .node
        .ip("addr add 10.11.0.1/32 dev eth0\naddr add 10.9.8.7/32 dev eth0")?;
    for source in [host_ip(&slot)?, [10, 9, 8, 7].into()] {
        let counted = || {
            let drops = lab.drops()?;
            Ok::<_, anyhow::Error>(drops.get("spoofed-address").copied().unwrap_or_default())
        };
        let before = counted()?;
        let socket = guest.node.udp(at(source, 0))?;
        until("the forged datagram is dropped", SOON, || {
            socket.send_to(b"who", at(OUTSIDE.v4, 53))?;
            Ok(counted()? > before)
        })?;
        socket.set_read_timeout(Some(NEVER))?;
        ensure!(socket.recv(&mut [0; 64]).is_err(), "{source} has an answer");
    }
    // Under another link-layer address.
    guest.node.ip("link set eth0 address 02:00:00:00:00:99")?;
    ensure!(
        !case.pings(&guest.node, OUTSIDE.v4.into())?,
        "a forged MAC passes"
    );
    case.counted("spoofed-mac")
}

fn verbs(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let slot = lab.slot(7, &[])?;
    ensure!(
        slot.json["id"] == "slot-7" && slot.json["slot"] == 7,
        "{}",
        slot.json
    );
    ensure!(slot.json["guest_ip"] == "169.254.0.21", "{}", slot.json);
    ensure!(slot.json["host_ip"] == "10.11.0.7", "{}", slot.json);
    let again = lab.slot(7, &[])?;
    ensure!(
        again.json == slot.json,
        "{} after {}",
        again.json,
        slot.json
    );
    let guest = lab.guest("guest", &slot)?;
    let _server = server(&guest.node, 80)?;
    lab.nucnet(&["publish", "slot-7", "8080:80"])?.expect(0)?;
    case.who(&lab.outside, at(HOST.v4, 8080))?;
    let flows = lab
        .nucnet(&["-o", "json", "flows", "--endpoint", "slot-7"])?
        .expect(0)?
        .json()?;
    ensure!(
        flows.as_array().is_some_and(|flows| flows.len() == 1),
        "{flows}"
    );
    let to = format!("{}:80", OUTSIDE.v4);
    let said = lab.nucnet(&["-o", "json", "explain", "--from", "slot-7", "--to", &to])?;
    let said = said.expect(0)?.json()?;
    ensure!(said["verdict"] == "pass", "{said}");
    let to = "169.254.169.254:80";
    let said = lab.nucnet(&["-o", "json", "explain", "--from", "slot-7", "--to", to])?;
    let said = said.expect(0)?.json()?;
    ensure!(said["verdict"] == "drop", "{said}");
    for verb in [&["list"][..], &["slot", "list"], &["inspect", "slot-7"]] {
        let printed = lab.nucnet(verb)?.expect(0)?.stdout;
        ensure!(printed.contains("slot-7"), "{verb:?}: {printed}");
    }
    let status = lab
        .nucnet(&["-o", "json", "status", "--sample", "0s"])?
        .expect(0)?
        .json()?;
    ensure!(
        status["drift"] == serde_json::json!([]),
        "{}",
        status["drift"]
    );
    lab.nucnet(&["slot", "create", "32768"])?.expect(2)?;
    lab.nucnet(&["slot", "create", "8", "--hosts", "10.99.0.0/16"])?
        .expect(4)?;
    lab.nucnet(&["slot", "create", "7", "-p", "81:81"])?
        .expect(4)?;
    lab.nucnet(&["gc"])?.expect(0)?;
    ensure!(
        lab.host.path("/run/nucnet/netns/slot-7").exists(),
        "gc took a slot that lives"
    );
    lab.nucnet(&["slot", "remove", "7", "8"])?.expect(0)?;
    ensure!(
        !lab.host.path("/run/nucnet/netns/slot-7").exists(),
        "its namespace is still named"
    );
    lab.slot(9, &[])?;
    lab.nucnet(&["down"])?.expect(0)?;
    let left = lab.host.run("ip", &["-br", "link"])?;
    ensure!(!left.contains("nn0") && !left.contains("nucnet"), "{left}");
    Ok(())
}

fn repaired(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let slot = lab.slot(1, &[])?;
    let netns = lab.host.path(slot.json["netns"].as_str().context("netns")?);
    let drift = || -> Result<Vec<serde_json::Value>> {
        let status = lab.nucnet(&["-o", "json", "status", "--sample", "0s"])?;
        let status = status.expect(0)?.json()?;
        Ok(status["drift"].as_array().context("no drift")?.clone())
    };
    let _server = case.udp(&lab.outside, 53)?;
    for damage in [
        "ip link del tap0",
        "tc qdisc del dev eth0 clsact",
        "ip link set eth0 down",
    ] {
        let mut words = damage.split(' ');
        let mut command = Command::new(words.next().context("a program")?);
        let inside = NetnsFd::open(&netns)?;
        let status = run_in(&inside, || command.args(words).status())??;
        ensure!(status.success(), "{damage}: {status}");
        let found = drift()?;
        ensure!(
            !found.is_empty() && found.iter().all(|drift| drift["id"] == "endpoint slot-1"),
            "after {damage}: {found:?}"
        );
        lab.slot(1, &[])?;
        let left = drift()?;
        ensure!(left.is_empty(), "{damage} is not mended: {left:?}");
        let guest = lab.guest("guest", &slot)?;
        case.who_udp(&guest.node, at(OUTSIDE.v4, 53))
            .with_context(|| format!("after {damage}"))?;
    }
    Ok(())
}

fn together(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    // Of a slot that stays, programs and the network of slots are there.
    lab.slot(40, &["-p", "8080:80"])?;
    let before = Snapshot::of(&lab.host)?.without_pins();
    let number = |slots: &serde_json::Value| slots.as_array().map_or(0, Vec::len);
    let created = lab.nucnet(&["-o", "json", "slot", "create", "1-24"])?;
    let created = created.expect(0)?.json()?;
    ensure!(number(&created) == 24, "{created}");
    let guest = lab.guest("guest", &lab.slot(24, &[])?)?;
    let _server = server(&lab.outside, 80)?;
    case.who(&guest.node, at(OUTSIDE.v4, 80))?;
    // One of them is another slot already: those that are new go again, the others stay.
    lab.nucnet(&["slot", "create", "20-40"])?.expect(4)?;
    let there = lab.nucnet(&["-o", "json", "slot", "list"])?;
    let there = there.expect(0)?.json()?;
    ensure!(number(&there) == 25, "{there}");
    case.who(&guest.node, at(OUTSIDE.v4, 80))?;
    drop(guest);
    let status = lab.nucnet(&["-o", "json", "status", "--sample", "0s"])?;
    let drift = &status.expect(0)?.json()?["drift"];
    ensure!(*drift == serde_json::json!([]), "{drift}");
    lab.nucnet(&["slot", "remove", "1-24"])?.expect(0)?;
    let left = before.difference(&Snapshot::of(&lab.host)?.without_pins());
    ensure!(left.is_empty(), "{left}");
    Ok(())
}

/// A user and a group that nobody is.
const STRANGER: u32 = 64_001;

fn owned(case: &Case) -> Result<()> {
    const OWNER: u32 = 64_000;
    let lab = with_slots(case)?;
    let owner = OWNER.to_string();
    for (number, option) in [(1, "--tap-owner"), (2, "--tap-group")] {
        let slot = lab.slot(number, &[option, &owner])?;
        let (by_owner, by_group) = match option {
            "--tap-owner" => ((OWNER, STRANGER), (STRANGER, OWNER)),
            _ => ((STRANGER, OWNER), (OWNER, STRANGER)),
        };
        lab.opens_tap(&slot, by_owner, 1)
            .with_context(|| format!("{option}: its own"))?;
        for (user, group) in [by_group, (STRANGER, STRANGER)] {
            let error = lab.opens_tap(&slot, (user, group), 1);
            ensure!(
                error
                    .as_ref()
                    .is_err_and(|error| format!("{error:#}").contains("Operation not permitted")),
                "{option}: user {user} of group {group}: {error:?}"
            );
        }
    }
    Ok(())
}

fn queues(case: &Case) -> Result<()> {
    let lab = with_slots(case)?;
    let owner = STRANGER.to_string();
    let one = lab.slot(1, &["--tap-owner", &owner])?;
    let several = lab.slot(2, &["--tap-owner", &owner, "--tap-multi-queue"])?;
    lab.opens_tap(&several, (STRANGER, STRANGER), 4)?;
    let error = lab.opens_tap(&one, (STRANGER, STRANGER), 4);
    ensure!(error.is_err(), "four queues of a TAP that has one");
    Ok(())
}
