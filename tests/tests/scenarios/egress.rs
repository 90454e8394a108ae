//! What containers may reach.

use std::collections::HashSet;
use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, SocketAddrV6, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{FAR, Family, HOST, Node, OUTSIDE, Pair, web};

use crate::case::{Case, Datapath, Families, Scenario, Way, silent, silent_udp, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "egress_default_deny_lets_nothing_out",
        what: "not to the outside, not to a sibling, not to the host",
        families: Families::Each,
        run: deny_all,
    },
    Scenario {
        name: "egress_link_local_is_no_way_around_a_policy",
        what: "IPv6 works without being configured, and so must the policy (E10)",
        families: Families::Together,
        run: link_local,
    },
    Scenario {
        name: "egress_allow_opens_one_port_of_one_address",
        what: "a container that may talk to its database and to nothing else",
        families: Families::Each,
        run: allow_port,
    },
    Scenario {
        name: "egress_allow_of_a_network_opens_every_protocol",
        what: "--allow 192.0.2.0/24 is all of it, and nothing beside it",
        families: Families::Each,
        run: allow_network,
    },
    Scenario {
        name: "metadata_services_are_a_matter_of_policy",
        what: "clouds have them at link-local addresses of IPv4, to which hosts have routes",
        families: Families::Together,
        run: metadata,
    },
    Scenario {
        name: "egress_rules_that_overlap_are_a_union",
        what: "a narrower rule does not hide a wider one",
        families: Families::Each,
        run: union,
    },
    Scenario {
        name: "egress_dns_opens_port_53_of_the_resolvers",
        what: "--dns with a rule: names can be looked up, elsewhere they cannot",
        families: Families::Each,
        run: dns,
    },
    Scenario {
        name: "egress_deny_without_rules_denies_dns_too",
        what: "--egress-default deny and no rule at all: DNS neither",
        families: Families::Each,
        run: dns_without_rules,
    },
    Scenario {
        name: "replies_to_inbound_pass_a_deny_all",
        what: "a server that may answer and never call",
        families: Families::Each,
        run: replies,
    },
    Scenario {
        name: "egress_policy_is_judged_on_the_destination_asked_for",
        what: "allowing the sibling does not allow the host's publish that leads to it",
        families: Families::Each,
        run: destination_asked_for,
    },
    Scenario {
        name: "policy_swap_under_load_costs_allowed_flows_nothing_and_ends_the_others",
        what: "policies change while transfers run: no byte, no datagram is lost that may go",
        families: Families::Each,
        run: swap_under_load,
    },
    Scenario {
        name: "policy_that_keeps_established_flows_stops_new_ones_only",
        what: "--keep-established: the transfer ends by itself, the next does not begin",
        families: Families::Each,
        run: keep_established,
    },
    Scenario {
        name: "denials_by_rules_are_counted_and_logged_unless_nobody_wants_it",
        what: "who looks for the reason of a time-out; and who has a log that others fill",
        families: Families::Each,
        run: logged_by_rules,
    },
    Scenario {
        name: "rule_about_the_host_covers_an_address_that_it_gets_later",
        what: "DHCP renewal: no nucnet-ctl call between the change and the next connection",
        families: Families::Each,
        run: host_gets_an_address,
    },
];

/// How many packets a rule of a family has logged; none: there is none that logs.
fn logged(case: &Case, prefix: &str) -> Result<Option<u64>> {
    let program = match case.family {
        Family::V4 => "iptables-save",
        Family::V6 => "ip6tables-save",
    };
    let rules = case.lab.host.run(program, &["-c"])?;
    // The groups after it are monitors'.
    let mut lines = rules
        .lines()
        .filter(|line| line.contains("--nflog-group 110"));
    let Some(line) = lines.next() else {
        return Ok(None);
    };
    ensure!(lines.next().is_none(), "more than one: {rules}");
    ensure!(line.contains(prefix), "{line}");
    let count = line.trim_start_matches('[').split(':').next();
    Ok(Some(count.unwrap_or_default().parse()?))
}

fn logged_by_rules(case: &Case) -> Result<()> {
    if case.way != Way::Nucnet(Datapath::Iptables) {
        return skip(
            "programs keep no log: they tell monitors, as the scenarios about events show",
        );
    }
    let (client, _) = case.attached("client", &["--deny", "any:81/tcp"])?;
    let _allowed = case.web(&case.lab.outside, 80)?;
    case.who(&client, OUTSIDE.port(case.family, 80))?;
    ensure!(logged(case, "nucnet:client")? == Some(0), "it logs more");
    silent(&client, OUTSIDE.port(case.family, 81))?;
    let denied = || -> Result<u64> {
        let shown = case.lab.nucnet(&["-o", "json", "inspect", "client"])?;
        let shown = shown.expect(0)?.json()?;
        let policy = &shown["dropped"]["policy"];
        if policy.is_null() {
            return Ok(0);
        }
        policy["packets"].as_u64().context("no number")
    };
    let first = denied()?;
    let told = logged(case, "nucnet:client")?;
    ensure!(first >= 1 && told == Some(first), "{first}, {told:?}");
    // No more than 20 at once, and 20 a second.
    let flood = client.udp(case.any(0))?;
    case.lab
        .nucnet(&["egress", "set", "client", "--deny", "any:81"])?
        .expect(0)?;
    for _ in 0..200 {
        flood.send_to(b"x", OUTSIDE.port(case.family, 81))?;
    }
    until("all are denied", SOON, || Ok(denied()? >= first + 200))?;
    let told = logged(case, "nucnet:client")?.context("no log")?;
    ensure!((20..150).contains(&told), "{told} of 200 were logged");

    let mut file = tempfile::Builder::new().suffix(".json").tempfile()?;
    let policy = r#"{"default": "allow", "deny": ["any:81"], "log_denied": false}"#;
    file.write_all(policy.as_bytes())?;
    let file = file.path().to_str().context("a path that is no text")?;
    case.lab
        .nucnet(&["egress", "set", "client", "--file", file])?
        .expect(0)?;
    // ip6tables-nft (1.8.9) takes no counters with rules: those of a chain that changes are lost.
    let before = denied()?;
    let kept = if case.family == Family::V4 {
        first + 200
    } else {
        0
    };
    ensure!(before >= kept, "{before} of {kept} are left");
    silent(&client, OUTSIDE.port(case.family, 81))?;
    ensure!(denied()? > before, "it is not counted");
    ensure!(logged(case, "")?.is_none(), "it is logged");
    Ok(())
}

fn target(pair: Pair, case: &Case, suffix: &str) -> String {
    format!(
        "{}{suffix}",
        SocketAddr::new(pair.of(case.family), 0)
            .to_string()
            .replace(":0", "")
    )
}

/// That neither TCP nor UDP on a port nor a ping gets through.
fn closed(case: &Case, client: &Node, to: SocketAddr) -> Result<()> {
    silent(client, to)?;
    silent_udp(case, client, to)?;
    ensure!(!case.pings(client, to.ip())?, "{} answers pings", to.ip());
    Ok(())
}

fn metadata(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let service = SocketAddr::from(([169, 254, 169, 254], 80));
    let (address, router) = (service.ip().to_string(), OUTSIDE.of(Family::V4).to_string());
    let outside = &case.lab.outside;
    outside.ip(&format!("addr add {address}/32 dev lo"))?;
    case.lab
        .host
        .ip(&format!("route add {address} via {router}"))?;
    let _service = case.web_at(outside, service)?;
    for (id, policy) in [
        ("open", &[][..]),
        ("allowed", &["--allow", "metadata"]),
        ("another", &["--deny", "any:81"]),
    ] {
        let (client, _) = case.attached(id, policy)?;
        let (seen, _) = case.who(&client, service)?;
        ensure!(seen.ip() == HOST.of(Family::V4), "{id} is {seen}");
    }
    for (id, policy) in [
        ("denied", ["--deny", "metadata"]),
        ("else", ["--allow", "internet"]),
    ] {
        let (client, _) = case.attached(id, &policy)?;
        silent(&client, service)?;
    }
    case.counted("policy")
}

fn deny_all(case: &Case) -> Result<()> {
    let (client, endpoint) = case.attached("client", &["--egress-default", "deny"])?;
    let (sibling, other) = case.attached("sibling", &[])?;
    let outside = (
        case.web(&case.lab.outside, 80)?,
        case.udp(&case.lab.outside, 80)?,
    );
    let inside = (case.web(&sibling, 80)?, case.udp(&sibling, 80)?);
    let host = (case.web(&case.lab.host, 80)?, case.udp(&case.lab.host, 80)?);
    for address in [
        OUTSIDE.of(case.family),
        FAR.of(case.family),
        HOST.of(case.family),
        endpoint.gateway(case.family)?,
        other.address(case.family)?,
    ] {
        closed(case, &client, SocketAddr::new(address, 80))?;
    }
    for (web, udp) in [outside, inside, host] {
        ensure!(
            web.clients().is_empty() && udp.seen().is_empty(),
            "something got out"
        );
    }
    case.counted("policy")
}

fn link_local(case: &Case) -> Result<()> {
    let (client, _) = case.attached("client", &["--egress-default", "deny"])?;
    let any = SocketAddr::new(Family::V6.any(), 80);
    let server = web::Server::start(case.lab.host.listen(any)?)?;
    let text = case
        .lab
        .host
        .run("ip", &["-6", "-o", "addr", "show", "scope", "link"])?;
    let words = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let bridge = words.filter(|words| words.get(1).is_some_and(|name| !name.starts_with("eth")));
    let link = client.within(|| nix::net::if_::if_nametoindex("eth0"))??;
    let mut tried = 0;
    for words in bridge {
        let address = words.get(3).and_then(|address| address.split('/').next());
        let address = address
            .with_context(|| format!("no address in {words:?}"))?
            .parse()?;
        silent(&client, SocketAddrV6::new(address, 80, 0, link).into())?;
        tried += 1;
    }
    ensure!(
        server.clients().is_empty(),
        "{:?} got through",
        server.clients()
    );
    if tried == 0 {
        return skip("the bridge has no link-local address");
    }
    Ok(())
}

fn allow_port(case: &Case) -> Result<()> {
    let rule = target(OUTSIDE, case, ":8080/tcp");
    let (client, _) = case.attached("client", &["--allow", &rule])?;
    let _allowed = case.web(&case.lab.outside, 8080)?;
    let denied = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 8080)?;
    case.who(&client, OUTSIDE.port(case.family, 8080))?;
    silent(&client, FAR.port(case.family, 8080))?;
    closed(case, &client, OUTSIDE.port(case.family, 80))?;
    silent_udp(case, &client, OUTSIDE.port(case.family, 8080))?;
    ensure!(
        denied.clients().is_empty(),
        "{:?} got out",
        denied.clients()
    );
    case.counted("policy")
}

fn allow_network(case: &Case) -> Result<()> {
    let prefix = if OUTSIDE.of(case.family).is_ipv4() {
        "192.0.2.0/24"
    } else {
        "2001:db8:1::/64"
    };
    let (client, _) = case.attached("client", &["--allow", prefix])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    case.who(&client, OUTSIDE.port(case.family, 80))?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    ensure!(
        case.pings(&client, OUTSIDE.of(case.family))?,
        "pings are denied"
    );
    closed(case, &client, FAR.port(case.family, 80))
}

fn union(case: &Case) -> Result<()> {
    let prefix = if OUTSIDE.of(case.family).is_ipv4() {
        "192.0.2.0/24"
    } else {
        "[2001:db8:1::/64]"
    };
    let wide = format!("{prefix}:80/tcp");
    let narrow = target(OUTSIDE, case, ":53/udp");
    let (client, _) = case.attached("client", &["--allow", &wide, "--allow", &narrow])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    case.who(&client, OUTSIDE.port(case.family, 80))?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    silent(&client, OUTSIDE.port(case.family, 53))
}

fn dns(case: &Case) -> Result<()> {
    let resolver = OUTSIDE.of(case.family).to_string();
    let (client, _) = case.attached("client", &["--dns", &resolver, "--allow", "any:443/tcp"])?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    let _tcp = case.web(&case.lab.outside, 53)?;
    let _web = case.web(&case.lab.outside, 443)?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    case.who(&client, OUTSIDE.port(case.family, 53))?;
    case.who(&client, FAR.port(case.family, 443))?;
    silent_udp(case, &client, FAR.port(case.family, 53))?;
    silent(&client, FAR.port(case.family, 53))
}

fn dns_without_rules(case: &Case) -> Result<()> {
    let resolver = OUTSIDE.of(case.family).to_string();
    let (client, _) = case.attached("client", &["--dns", &resolver, "--egress-default", "deny"])?;
    let server = case.udp(&case.lab.outside, 53)?;
    silent_udp(case, &client, OUTSIDE.port(case.family, 53))?;
    ensure!(server.seen().is_empty(), "it asked: {:?}", server.seen());
    Ok(())
}

fn replies(case: &Case) -> Result<()> {
    let words = [
        "--egress-default",
        "deny",
        "-p",
        "8080:80",
        "-p",
        "5300:53/udp",
    ];
    let (server, endpoint) = case.attached("server", &words)?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let _web = case.web(&server, 80)?;
    let _udp = case.udp(&server, 53)?;
    let outside = case.web(&case.lab.outside, 80)?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    case.who_udp(&case.lab.outside, HOST.port(case.family, 5300))?;
    if case.serves_loopback(case.family) {
        case.who(
            &case.lab.host,
            SocketAddr::new(case.family.loopback(), 8080),
        )?;
    }
    let address = endpoint.address(case.family)?;
    case.who(&case.lab.host, SocketAddr::new(address, 80))?;
    case.who(&sibling, SocketAddr::new(address, 80))?;
    silent(&server, OUTSIDE.port(case.family, 80))?;
    ensure!(
        outside.clients().is_empty(),
        "{:?} got out",
        outside.clients()
    );
    Ok(())
}

fn destination_asked_for(case: &Case) -> Result<()> {
    let (web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let address = endpoint.address(case.family)?.to_string();
    let (client, _) = case.attached("client", &["--allow", &address])?;
    case.who(&client, SocketAddr::new(endpoint.address(case.family)?, 80))?;
    silent(&client, HOST.port(case.family, 8080))?;
    let host = HOST.of(case.family).to_string();
    let (other, _) = case.attached("other", &["--allow", &host])?;
    case.who(&other, HOST.port(case.family, 8080))?;
    silent(&other, SocketAddr::new(endpoint.address(case.family)?, 80))
}

/// Bytes that flow from a server to a client, and what became of them.
struct Stream {
    bytes: Arc<AtomicU64>,
    is_damaged: Arc<AtomicBool>,
    server: TcpStream,
    client: TcpStream,
}

/// The byte at a place of every stream; the period is no power of two.
fn byte_at(place: u64) -> u8 {
    (place % 251) as u8
}

impl Stream {
    fn start(case: &Case, client: &Node, to: SocketAddr) -> Result<Self> {
        let listener = case.lab.outside.listen(case.any(to.port()))?;
        let client = client.connect(to, SOON)?;
        let (server, _) = listener.accept()?;
        let (bytes, is_damaged) = (Arc::default(), Arc::default());
        let stream = Self {
            bytes: Arc::clone(&bytes),
            is_damaged: Arc::clone(&is_damaged),
            server: server.try_clone()?,
            client: client.try_clone()?,
        };
        let mut server = server;
        std::thread::spawn(move || {
            let block: Vec<u8> = (0..251 * 64).map(byte_at).collect();
            while server.write_all(&block).is_ok() {}
        });
        let mut client = client;
        std::thread::spawn(move || {
            let (mut buffer, mut place) = ([0; 65_536], 0);
            while let Ok(length @ 1..) = client.read(&mut buffer) {
                let read = buffer[..length].iter();
                if !(place..)
                    .zip(read)
                    .all(|(place, byte)| byte_at(place) == *byte)
                {
                    is_damaged.store(true, Ordering::Relaxed);
                }
                place += length as u64;
                bytes.store(place, Ordering::Relaxed);
            }
        });
        Ok(stream)
    }

    fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// That another megabyte comes, and all is as it was sent.
    fn goes_on(&self) -> Result<()> {
        let before = self.bytes();
        until("another megabyte comes", SOON, || {
            Ok(self.bytes() > before + 1_000_000)
        })?;
        ensure!(!self.is_damaged.load(Ordering::Relaxed), "it is damaged");
        Ok(())
    }

    /// That nothing comes any more, once the client has read what it had received.
    fn has_ended(&self) -> Result<()> {
        let (mut before, mut since) = (self.bytes(), Instant::now());
        until("nothing more comes", SOON, || {
            let now = self.bytes();
            if now != before {
                (before, since) = (now, Instant::now());
            }
            Ok(since.elapsed() > NEVER)
        })
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        for socket in [&self.server, &self.client] {
            // It may have ended already.
            let _ = socket.shutdown(Shutdown::Both);
        }
    }
}

fn set_egress(case: &Case, words: &[&str]) -> Result<()> {
    let all = [&["egress", "set", "client"], words].concat();
    case.lab.nucnet(&all)?.expect(0)?;
    Ok(())
}

fn swap_under_load(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let staying = Stream::start(case, &client, OUTSIDE.port(case.family, 80))?;
    let ending = Stream::start(case, &client, OUTSIDE.port(case.family, 8080))?;
    let receiver = case.lab.outside.udp(case.any(9))?;
    receiver.set_read_timeout(Some(NEVER))?;
    let sender = client.udp(case.any(0))?;
    sender.connect(OUTSIDE.port(case.family, 9))?;
    let is_over = AtomicBool::new(false);

    let (sent, received) = std::thread::scope(|scope| -> Result<_> {
        let sending = scope.spawn(|| {
            let mut number = 0_u32;
            while !is_over.load(Ordering::Relaxed) {
                if sender.send(&number.to_be_bytes()).is_ok() {
                    number += 1;
                }
                // A rate, not a wait for anything.
                std::thread::sleep(Duration::from_micros(500));
            }
            number
        });
        let receiving = scope.spawn(|| {
            let mut numbers = HashSet::new();
            let mut buffer = [0; 4];
            loop {
                match receiver.recv(&mut buffer) {
                    Ok(4) => drop(numbers.insert(u32::from_be_bytes(buffer))),
                    Ok(_) => {}
                    Err(_) if is_over.load(Ordering::Relaxed) => return numbers,
                    Err(_) => {}
                }
            }
        });
        let swaps = || -> Result<()> {
            let stays = [
                target(OUTSIDE, case, ":80/tcp"),
                target(OUTSIDE, case, ":9/udp"),
            ];
            let also = target(OUTSIDE, case, ":8080/tcp");
            for round in 0..10 {
                let other = format!("any:{}/tcp", 20_000 + round);
                set_egress(
                    case,
                    &[
                        "--allow", &stays[0], "--allow", &stays[1], "--allow", &also, "--allow",
                        &other,
                    ],
                )?;
                if round % 3 == 2 {
                    case.lab.nucnet(&["egress", "clear", "client"])?.expect(0)?;
                }
                staying.goes_on()?;
                ending.goes_on()?;
            }
            set_egress(case, &["--allow", &stays[0], "--allow", &stays[1]])?;
            ending.has_ended().context("the flow that is denied now")?;
            staying.goes_on()
        };
        let swapped = swaps();
        is_over.store(true, Ordering::Relaxed);
        let sent = sending.join().expect("sender");
        let received = receiving.join().expect("receiver");
        swapped.map(|()| (sent, received))
    })?;
    ensure!(
        received.len() == sent as usize,
        "{} of {sent} datagrams were lost",
        sent as usize - received.len()
    );
    case.counted("policy")
}

fn keep_established(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let server = case.web(&case.lab.outside, 443)?;
    let stream = Stream::start(case, &client, OUTSIDE.port(case.family, 80))?;
    stream.goes_on()?;
    set_egress(case, &["--egress-default", "deny", "--keep-established"])?;
    stream.goes_on().context("the flow that is kept")?;
    silent(&client, OUTSIDE.port(case.family, 443))?;
    ensure!(server.clients().is_empty(), "{:?}", server.clients());
    stream.goes_on().context("the flow that is kept")?;
    set_egress(case, &["--egress-default", "deny"])?;
    stream.has_ended()
}

fn host_gets_an_address(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let new: IpAddr = match case.family {
        Family::V4 => "192.0.2.77".parse()?,
        Family::V6 => "2001:db8:1::77".parse()?,
    };
    let words = ["--egress-default", "allow", "--deny", "host"];
    let (client, _) = case.attached("client", &words)?;
    let _outside = case.web(&case.lab.outside, 80)?;
    let server = case.web(&case.lab.host, 80)?;
    silent(&client, HOST.port(case.family, 80))?;
    let length = if new.is_ipv4() { 24 } else { 64 };
    let flags = if new.is_ipv4() { "" } else { " nodad" };
    let address = format!("addr add {new}/{length} dev eth0{flags}");
    case.lab.host.ip(&address)?;
    silent(&client, SocketAddr::new(new, 80))?;
    case.who(&client, OUTSIDE.port(case.family, 80))?;
    ensure!(server.clients().is_empty(), "{:?}", server.clients());
    case.counted("policy")
}
