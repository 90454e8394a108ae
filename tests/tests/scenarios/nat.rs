//! Static mappings: from outside to hosts behind this one, from them out, and back in again.

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{
    FAR, Family, HOST, LAN_CLIENT, LAN_HOST, LAN_SERVER, OUTSIDE, Outcome, Snapshot, udp, web,
};

use crate::case::{Case, Families, Scenario, connect, refused, silent_udp};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "dnat_leads_to_a_host_behind_this_one_and_keeps_the_clients_address",
        what: "a server that is no container is reached from outside, and knows by whom",
        families: Families::Each,
        run: dnat_to_lan,
    },
    Scenario {
        name: "dnat_to_the_address_of_an_endpoint_is_a_publish",
        what: "a mapping and a publish are one thing to the container",
        families: Families::Each,
        run: dnat_to_endpoint,
    },
    Scenario {
        name: "dnat_maps_lists_and_ranges_and_another_port_inside",
        what: "the ports of a server are seldom one, and seldom the same on both sides",
        families: Families::Each,
        run: ports,
    },
    Scenario {
        name: "dnat_bound_to_an_interface_takes_nothing_from_another",
        what: "what is opened to the uplink is not opened to everybody",
        families: Families::Each,
        run: bound,
    },
    Scenario {
        name: "dnat_of_an_address_that_is_not_there_yet_works_when_it_comes",
        what: "floating addresses and DHCP: rules are set before the address is",
        families: Families::Each,
        run: inert,
    },
    Scenario {
        name: "endpoint_reaches_a_mapped_host_by_the_external_address",
        what: "a name leads to the same server from inside and outside",
        families: Families::Each,
        run: from_endpoint,
    },
    Scenario {
        name: "snat_has_a_network_leave_as_one_address",
        what: "hosts behind this one reach the world, which sees one address",
        families: Families::Each,
        run: snat,
    },
    Scenario {
        name: "snat_of_endpoints_takes_precedence_over_masquerade",
        what: "a container that must be seen as a certain address",
        families: Families::Each,
        run: snat_of_endpoint,
    },
    Scenario {
        name: "snat_to_an_address_that_is_not_the_hosts_is_inert",
        what: "a floating address: nothing may leave with it from a host that does not have it",
        families: Families::Each,
        run: inert_snat,
    },
    Scenario {
        name: "hairpin_is_for_neighbours_and_the_dnat_beside_it_for_others",
        what: "clients near the server use its public address, and clients beyond keep theirs",
        families: Families::Each,
        run: hairpin,
    },
    Scenario {
        name: "mappings_that_are_gone_let_nothing_in_and_leave_nothing",
        what: "what was opened must be closed again, and the host be as before",
        families: Families::Each,
        run: gone,
    },
    Scenario {
        name: "ports_of_mappings_and_publishes_are_taken_once",
        what: "two owners of a port would each believe that it is theirs",
        families: Families::Together,
        run: conflicts,
    },
    Scenario {
        name: "bad_mappings_are_refused_with_field_value_and_remedy",
        what: "a typing error costs a minute, not an afternoon",
        families: Families::Together,
        run: refusals,
    },
];

/// `nucnet-ctl nat` with words that are separated by blanks.
fn nat(case: &Case, words: &str) -> Result<Outcome> {
    let mut arguments = vec!["-o", "json", "nat"];
    arguments.extend(words.split_whitespace());
    case.lab.nucnet(&arguments)
}

fn added(case: &Case, words: &str) -> Result<String> {
    let outcome = nat(case, &format!("add {words}"))?.expect(0)?;
    let id = outcome.json()?["id"].as_str().map(str::to_owned);
    id.context("no id")
}

fn dnat_to_lan(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let family = case.family;
    let _web = case.web(&lan.server, 80)?;
    let _udp = case.udp(&lan.server, 53)?;
    let (ext, int) = (HOST.of(family), LAN_SERVER.of(family));
    let words = format!("dnat --ext-ip {ext} --ports 8080 --int-ip {int} --int-port 80");
    let id = added(case, &words)?;
    ensure!(added(case, &words)? == id, "the same again is the same");
    added(
        case,
        &format!("dnat --ext-ip {ext} --ports 8080 --proto udp --int-ip {int} --int-port 53"),
    )?;
    let to = HOST.port(family, 8080);
    let (seen, local) = case.who(&case.lab.outside, to)?;
    ensure!(seen == local, "the server saw {seen}, not {local}");
    let far = SocketAddr::new(FAR.of(family), 0);
    let stream = case.lab.outside.connect_from(Some(far), to, SOON)?;
    ensure!(web::who(stream)?.ip() == far.ip());
    let seen = case.who_udp(&case.lab.outside, to)?;
    ensure!(seen.peer.ip() == OUTSIDE.of(family), "{seen:?}");

    // 32 MB each way, whatever the offloads of the wire.
    let stream = connect(&case.lab.outside, to)?;
    let body = web::payload();
    ensure!(
        web::put(stream, body)? == web::sha256(body),
        "damaged on its way in"
    );
    let stream = connect(&case.lab.outside, to)?;
    ensure!(
        web::get(stream, "/bytes/8000000")? == body[..8_000_000],
        "damaged on its way out"
    );

    refused(&case.lab.outside, HOST.port(family, 80))?;
    refused(&case.lab.outside, HOST.port(family, 8081))?;
    let list = nat(case, "list")?.expect(0)?.json()?;
    let mapping = list
        .as_array()
        .and_then(|list| list.iter().find(|mapping| mapping["id"] == id.as_str()))
        .context("not listed")?;
    ensure!(
        mapping["flows"] == 4 && mapping["local"] == true,
        "{mapping}"
    );
    ensure!(mapping["bytes"].as_u64() > Some(40_000_000), "{mapping}");
    let status = case
        .lab
        .nucnet(&["-o", "json", "status"])?
        .expect(0)?
        .json()?;
    ensure!(
        status["mappings"] == 2 && status["drift"] == serde_json::json!([]),
        "{status}"
    );

    nat(case, &format!("remove {words}"))?.expect(0)?;
    refused(&case.lab.outside, to)?;
    nat(case, &format!("remove {id}"))?.expect(0)?;
    case.who_udp(&case.lab.outside, to)?;
    nat(case, "clear")?.expect(0)?;
    silent_udp(case, &case.lab.outside, to)
}

fn dnat_to_endpoint(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (container, endpoint) = case.attached("web", &[])?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let _web = case.web(&container, 80)?;
    let _udp = case.udp(&container, 80)?;
    let int = endpoint.address(family)?;
    for proto in ["tcp", "udp"] {
        let words = format!(
            "dnat --ext-ip {ext} --ports 8080 --int-ip {int} --int-port 80 --proto {proto}"
        );
        added(case, &words)?;
    }
    let to = HOST.port(family, 8080);
    let (seen, local) = case.who(&case.lab.outside, to)?;
    ensure!(seen == local, "the container saw {seen}, not {local}");
    case.who_udp(&case.lab.outside, to)?;
    let (sibling, _) = case.attached("app", &[])?;
    case.who(&sibling, to)?;
    case.who(&case.lab.host, to)?;
    let list = nat(case, "list")?.expect(0)?.json()?;
    ensure!(list[0]["flows"] == 3, "{list}");
    nat(case, "clear")?.expect(0)?;
    refused(&case.lab.outside, to)
}

fn ports(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let int = LAN_SERVER.of(family);
    added(
        case,
        &format!("dnat --ext-ip {ext} --ports 80,443,8000-8010 --int-ip {int}"),
    )?;
    added(
        case,
        &format!("dnat --ext-ip {ext} --ports 9000-9009 --int-ip {int} --int-port 7000"),
    )?;
    for (outside, inside) in [
        (80, 80),
        (443, 443),
        (8005, 8005),
        (9000, 7000),
        (9009, 7009),
    ] {
        let _web = case.web(&lan.server, inside)?;
        case.who(&case.lab.outside, HOST.port(family, outside))?;
    }
    for beside in [81, 7999, 8011, 9010] {
        refused(&case.lab.outside, HOST.port(family, beside))?;
    }
    Ok(())
}

fn bound(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let _web = case.web(&lan.server, 80)?;
    let int = LAN_SERVER.of(family);
    added(
        case,
        &format!("dnat --ext-ip {ext} --ports 80 --int-ip {int} --ext-if eth0"),
    )?;
    case.who(&case.lab.outside, HOST.port(family, 80))?;
    refused(&lan.client, HOST.port(family, 80))
}

fn inert(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let family = case.family;
    let _web = case.web(&lan.server, 80)?;
    let int = LAN_SERVER.of(family);
    let (floating, length): (std::net::IpAddr, u8) = match int.is_ipv4() {
        true => ("192.0.2.77".parse()?, 32),
        false => ("2001:db8:1::77".parse()?, 128),
    };
    let words = format!("dnat --ext-ip {floating} --ports 80 --int-ip {int}");
    let outcome = nat(case, &format!("add {words}"))?.expect(0)?.json()?;
    ensure!(outcome["local"] == false, "{outcome}");
    case.lab.host.ip(&format!(
        "addr add {floating}/{length} dev eth0 {}",
        nodad(floating)
    ))?;
    let to = SocketAddr::new(floating, 80);
    until("the address serves", SOON, || {
        Ok(case.lab.outside.connect(to, SOON).is_ok())
    })?;
    let (seen, local) = case.who(&case.lab.outside, to)?;
    ensure!(seen == local);
    Ok(())
}

/// Without duplicate address detection, and never the host's own choice of a source.
fn nodad(address: std::net::IpAddr) -> &'static str {
    match address.is_ipv6() {
        true => "nodad preferred_lft 0",
        false => "",
    }
}

fn from_endpoint(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let _web = case.web(&lan.server, 80)?;
    let _udp = case.udp(&lan.server, 80)?;
    let int = LAN_SERVER.of(family);
    let (container, _) = case.attached("app", &[])?;
    for proto in ["tcp", "udp"] {
        let words = format!("dnat --ext-ip {ext} --ports 8080 --int-ip {int} --int-port 80");
        added(case, &format!("{words} --proto {proto}"))?;
    }
    let to = HOST.port(family, 8080);
    let (seen, _) = case.who(&container, to)?;
    ensure!(seen.ip() == LAN_HOST.of(family), "the server saw {seen}");
    case.who_udp(&container, to)?;
    Ok(())
}

fn snat(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 80)?;
    let int = match LAN_HOST.of(family).is_ipv4() {
        true => "10.77.0.0/24",
        false => "fd77::/64",
    };
    let to = FAR.port(family, 80);
    ensure!(lan.client.connect(to, SOON).is_err(), "nobody forwards");
    added(case, &format!("snat --int {int} --ext-ip {ext}"))?;
    for client in [&lan.client, &lan.server] {
        let (seen, _) = case.who(client, to)?;
        ensure!(seen.ip() == ext, "the world saw {seen}");
        let seen = case.who_udp(client, to)?;
        ensure!(seen.peer.ip() == ext, "the world saw {seen:?}");
        ensure!(case.pings(client, FAR.of(family))?, "no answer to a ping");
    }
    // UDP keeps its port for another peer (RFC 4787 REQ-1).
    let socket = lan.client.udp(case.any(0))?;
    let first = udp::exchange(&socket, to, "who", SOON)?;
    let second = udp::exchange(&socket, OUTSIDE.port(family, 80), "who", SOON)?;
    ensure!(first.peer == second.peer, "{first:?} {second:?}");

    // Neither what is for the host, nor what stays behind it.
    let _host = case.web(&case.lab.host, 81)?;
    let _near = case.web(&lan.server, 82)?;
    let (seen, local) = case.who(&lan.client, LAN_HOST.port(family, 81))?;
    ensure!(seen == local, "{seen}");
    let (seen, local) = case.who(&lan.client, LAN_SERVER.port(family, 82))?;
    ensure!(seen == local, "{seen}");
    let stream = connect(&lan.client, to)?;
    let body = web::payload();
    ensure!(web::put(stream, body)? == web::sha256(body), "damaged");
    nat(case, "clear")?.expect(0)?;
    ensure!(lan.client.connect(to, SOON).is_err(), "it still forwards");
    Ok(())
}

fn snat_of_endpoint(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let family = case.family;
    let (container, endpoint) = case.attached("app", &[])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let int = endpoint.address(family)?;
    let (own, length): (std::net::IpAddr, u8) = match int.is_ipv4() {
        true => ("192.0.2.88".parse()?, 32),
        false => ("2001:db8:1::88".parse()?, 128),
    };
    case.lab
        .host
        .ip(&format!("addr add {own}/{length} dev eth0 {}", nodad(own)))?;
    let to = FAR.port(family, 80);
    until("masquerade is as before", SOON, || {
        Ok(case.who(&container, to)?.0.ip() == HOST.of(family))
    })?;
    added(
        case,
        &format!("snat --int {int} --ext-ip {own} --ext-if eth0"),
    )?;
    until("the address is in use", SOON, || {
        Ok(case.who(&container, to)?.0.ip() == own)
    })?;
    ensure!(
        case.pings(&container, FAR.of(family))?,
        "no answer to a ping"
    );
    nat(case, "clear")?.expect(0)?;
    ensure!(case.who(&container, to)?.0.ip() == HOST.of(family));
    Ok(())
}

fn inert_snat(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let family = case.family;
    let _web = case.web(&case.lab.outside, 80)?;
    let (int, floating, length): (_, std::net::IpAddr, u8) = match family {
        Family::V4 => ("10.77.0.0/24", "192.0.2.77".parse()?, 32),
        Family::V6 => ("fd77::/64", "2001:db8:1::77".parse()?, 128),
    };
    let to = FAR.port(family, 80);
    let words = format!("add snat --int {int} --ext-ip {floating}");
    let added = nat(case, &words)?.expect(0)?.json()?;
    ensure!(added["local"] == false, "{added}");
    ensure!(lan.client.connect(to, SOON).is_err(), "it left");
    case.lab.host.ip(&format!(
        "addr add {floating}/{length} dev eth0 {}",
        nodad(floating)
    ))?;
    case.lab.nucnet(&["gc"])?.expect(0)?;
    until("the address is in use", SOON, || {
        Ok(lan.client.connect(to, SOON).is_ok())
    })?;
    let (seen, _) = case.who(&lan.client, to)?;
    ensure!(seen.ip() == floating, "the world saw {seen}");
    Ok(())
}

fn hairpin(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let _web = case.web(&lan.server, 80)?;
    let _udp = case.udp(&lan.server, 80)?;
    let (int, to) = (LAN_SERVER.of(family), HOST.port(family, 80));
    for proto in ["tcp", "udp"] {
        let words = format!("hairpin --ext-ip {ext} --int-ip {int} --ports 80 --proto {proto}");
        added(case, &words)?;
    }
    let (seen, _) = case.who(&lan.client, to)?;
    ensure!(seen.ip() == LAN_HOST.of(family), "the server saw {seen}");
    let seen = case.who_udp(&lan.client, to)?;
    ensure!(
        seen.peer.ip() == LAN_HOST.of(family),
        "the server saw {seen:?}"
    );
    // The server itself.
    let (seen, _) = case.who(&lan.server, to)?;
    ensure!(seen.ip() == LAN_HOST.of(family), "the server saw {seen}");
    refused(&case.lab.outside, to)?;

    added(
        case,
        &format!("dnat --ext-ip {ext} --ports 80 --int-ip {int}"),
    )?;
    let (seen, local) = case.who(&case.lab.outside, to)?;
    ensure!(seen == local, "the server saw {seen}, not {local}");
    let (seen, _) = case.who(&lan.client, to)?;
    ensure!(seen.ip() == LAN_HOST.of(family), "the server saw {seen}");
    let stream = connect(&lan.client, to)?;
    let body = web::payload();
    ensure!(web::put(stream, body)? == web::sha256(body), "damaged");

    // Limited to somebody else, it is nobody's.
    nat(case, "clear")?.expect(0)?;
    let host = match LAN_CLIENT.of(family).is_ipv4() {
        true => "10.77.0.99/32",
        false => "fd77::99/128",
    };
    added(
        case,
        &format!("hairpin --ext-ip {ext} --int-ip {int} --ports 80 --lan {host}"),
    )?;
    refused(&lan.client, to)
}

fn gone(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let lan = case.lab.lan()?;
    let (family, ext) = (case.family, HOST.of(case.family));
    let rule = "INPUT -p tcp --dport 9 -m comment --comment foreign -j DROP";
    for program in ["iptables", "ip6tables"] {
        let mut arguments = vec!["-A"];
        arguments.extend(rule.split(' '));
        case.lab.host.run(program, &arguments)?;
    }
    let before = Snapshot::of(&case.lab.host)?;
    let _web = case.web(&lan.server, 80)?;
    let int = LAN_SERVER.of(family);
    let net = match int.is_ipv4() {
        true => "10.77.0.0/24",
        false => "fd77::/64",
    };
    let add = || -> Result<()> {
        added(
            case,
            &format!("dnat --ext-ip {ext} --ports 80,100-1000 --int-ip {int}"),
        )?;
        added(
            case,
            &format!("hairpin --ext-ip {ext} --ports 80 --int-ip {int}"),
        )?;
        added(case, &format!("snat --int {net} --ext-ip {ext}"))?;
        case.who(&case.lab.outside, HOST.port(family, 80))?;
        case.who(&lan.client, HOST.port(family, 80))?;
        Ok(())
    };
    add()?;
    let stream = connect(&case.lab.outside, HOST.port(family, 80))?;
    nat(case, "clear")?.expect(0)?;
    ensure!(
        web::who(stream).is_err(),
        "a connection outlived its mapping"
    );
    let entries = case.lab.entries()?;
    for map in [
        "mappings",
        "mapping_counts",
        "hairpins",
        "snats",
        "publishes",
        "flows",
        "outside",
    ] {
        ensure!(
            entries.get(map).copied().unwrap_or(0) == 0,
            "{map}: {entries:?}"
        );
    }
    case.lab.nucnet(&["gc"])?.expect(0)?;
    let after = Snapshot::of(&case.lab.host)?;
    ensure!(
        before == after,
        "after clear and gc:\n{}",
        before.difference(&after)
    );
    add()?;
    case.lab.nucnet(&["down"])?.expect(0)?;
    let after = Snapshot::of(&case.lab.host)?;
    ensure!(
        before == after,
        "after down:\n{}",
        before.difference(&after)
    );
    refused(&case.lab.outside, HOST.port(family, 80))
}

fn conflicts(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let _lan = case.lab.lan()?;
    let (ext, int) = (HOST.v4, LAN_SERVER.v4);
    let (_container, _) = case.attached("web", &["-p", "8080:80", "-p", "9000-9009:9000-9009"])?;
    let refused = |words: &str, owner: &str| -> Result<()> {
        let outcome = nat(case, &format!("add {words}"))?.expect(4)?;
        ensure!(
            outcome.stderr.contains(owner),
            "{owner} is not named: {outcome}"
        );
        Ok(())
    };
    refused(
        &format!("dnat --ext-ip {ext} --ports 80,8080 --int-ip {int}"),
        "endpoint web",
    )?;
    refused(
        &format!("dnat --ext-ip {ext} --ports 9005 --int-ip {int}"),
        "endpoint web",
    )?;
    refused(
        &format!("hairpin --ext-ip {ext} --ports 8080 --int-ip {int}"),
        "endpoint web",
    )?;
    let id = added(
        case,
        &format!("dnat --ext-ip {ext} --ports 80-89 --int-ip {int}"),
    )?;
    refused(
        &format!("dnat --ext-ip {ext} --ports 85 --int-ip 10.77.0.9"),
        &id,
    )?;
    refused(
        &format!("hairpin --ext-ip {ext} --ports 85 --int-ip 10.77.0.9"),
        &id,
    )?;
    added(
        case,
        &format!("dnat --ext-ip {ext} --ports 85 --int-ip {int} --proto udp"),
    )?;
    let hairpin = added(
        case,
        &format!("hairpin --ext-ip {ext} --ports 80-99 --int-ip {int}"),
    )?;
    let publish = |spec: &str, owner: &str| -> Result<()> {
        let outcome = case.lab.nucnet(&["publish", "web", spec])?.expect(4)?;
        ensure!(
            outcome.stderr.contains(owner),
            "{owner} is not named: {outcome}"
        );
        Ok(())
    };
    publish("85:80", &id)?;
    publish("95:80", &hairpin)?;
    publish(&format!("{ext}:80:80"), &id)?;
    case.lab
        .nucnet(&["publish", "web", "127.0.0.1:85:80"])?
        .expect(0)?;
    let snat = added(case, &format!("snat --int 10.77.0.0/24 --ext-ip {ext}"))?;
    refused("snat --int 10.77.0.9/24 --ext-ip 192.0.2.9", &snat)?;
    added(
        case,
        "snat --int 10.77.0.0/24 --ext-ip 192.0.2.9 --ext-if lan0",
    )?;

    let _taken = case.lab.host.listen(SocketAddr::new(ext.into(), 7000))?;
    refused(
        &format!("dnat --ext-ip {ext} --ports 7000 --int-ip {int}"),
        "7000",
    )
}

fn refusals(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let _lan = case.lab.lan()?;
    for (words, field) in [
        (
            "dnat --ext-ip 192.0.2.2 --ports 80 --int-ip fd00::1",
            "--int-ip",
        ),
        (
            "dnat --ext-ip 192.0.2.2 --ports 0 --int-ip 10.77.0.5",
            "--ports",
        ),
        (
            "dnat --ext-ip 192.0.2.2 --ports 80,80 --int-ip 10.77.0.5",
            "--ports",
        ),
        (
            "dnat --ext-ip 192.0.2.2 --ports 80,443 --int-ip 10.77.0.5 --int-port 1",
            "--int-port",
        ),
        (
            "dnat --ext-ip 127.0.0.1 --ports 80 --int-ip 10.77.0.5",
            "--ext-ip",
        ),
        (
            "dnat --ext-ip 192.0.2.2 --ports 80 --int-ip 10.77.0.1",
            "--int-ip",
        ),
        ("snat --int fd00::/64 --ext-ip 192.0.2.2", "--int"),
        ("snat --int 10.0.0.0/33 --ext-ip 192.0.2.2", "--int"),
        (
            "hairpin --ext-ip 192.0.2.2 --ports 80 --int-ip 10.99.0.5",
            "--int-ip",
        ),
    ] {
        let outcome = nat(case, &format!("add {words}"))?.expect(2)?;
        ensure!(
            outcome.stderr.contains(field),
            "{field} is not named: {outcome}"
        );
        ensure!(outcome.stderr.contains("\"hint\""), "{outcome}");
    }
    let words = "dnat --ext-ip 192.0.2.2 --ports 80 --int-ip 10.77.0.5 --ext-if nope";
    nat(case, &format!("add {words}"))?.expect(3)?;
    nat(case, "remove dnat-99")?.expect(0)?;
    nat(case, "clear")?.expect(0)?;
    ensure!(!case.lab.bpffs().exists(), "a refusal left something");
    Ok(())
}
