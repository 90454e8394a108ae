//! Nothing foreign is touched, and live endpoints go on, whatever happens around them.

use std::collections::HashMap;
use std::io::Write;
use std::net::{IpAddr, SocketAddr};
use std::process::Stdio;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::{NEVER, SOON, until};
use nucnet_tests::lab::{Endpoint, FAR, Family, HOST, Node, OUTSIDE, Pair, Snapshot, udp, web};
use serde_json::Value;

use crate::case::{Case, Families, Scenario, has, skip};
use crate::conversation::{Conversation, go_on};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "docker_like_host_is_untouched_and_endpoints_are_reachable",
        what: "its chains, FORWARD DROP, its bridge with a container that goes on working",
        families: Families::Together,
        run: docker,
    },
    Scenario {
        name: "native_firewall_that_drops_what_is_forwarded_is_passed_by_or_named",
        what: "its table drops what iptables' accepts: by rules doctor says so, and its remedy helps",
        families: Families::Each,
        run: native_firewall,
    },
    Scenario {
        name: "transfers_go_on_while_others_attach_and_detach_and_gc_runs",
        what: "not a byte is lost by publish or masquerade",
        families: Families::Together,
        run: transfers,
    },
    Scenario {
        name: "two_hundred_attaches_and_detaches_by_sixteen_at_once",
        what: "unique addresses, no error, nothing left",
        families: Families::Together,
        run: two_hundred,
    },
    Scenario {
        name: "connections_go_on_when_the_router_fails_over",
        what: "the next hop's link-layer address changes in the middle of transfers",
        families: Families::Each,
        run: fail_over,
    },
    Scenario {
        name: "router_that_says_nothing_is_probed",
        what: "one-way traffic finds the router that took over the next hop's address",
        families: Families::Each,
        run: silent_fail_over,
    },
    Scenario {
        name: "killed_at_random_moments_everything_converges",
        what: "SIGKILL in attach, publish, detach, network remove, down; then gc",
        families: Families::Together,
        run: killed,
    },
];

/// As dockerd sets the IPv4 tables up, with one container that publishes port 80 as 9090.
const DOCKER_RULES: &str = "\
*nat
:DOCKER - [0:0]
-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER
-A OUTPUT ! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL -j DOCKER
-A POSTROUTING -s 172.17.0.0/16 ! -o docker0 -j MASQUERADE
-A POSTROUTING -s 172.17.0.2/32 -d 172.17.0.2/32 -p tcp -m tcp --dport 80 -j MASQUERADE
-A DOCKER -i docker0 -j RETURN
-A DOCKER ! -i docker0 -p tcp -m tcp --dport 9090 -j DNAT --to-destination 172.17.0.2:80
COMMIT
*filter
:FORWARD DROP [0:0]
:DOCKER - [0:0]
:DOCKER-ISOLATION-STAGE-1 - [0:0]
:DOCKER-ISOLATION-STAGE-2 - [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A FORWARD -i docker0 -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j DOCKER-ISOLATION-STAGE-2
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-ISOLATION-STAGE-2 -o docker0 -j DROP
-A DOCKER-ISOLATION-STAGE-2 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
";

/// And the IPv6 ones.
const DOCKER_RULES6: &str = "\
*filter
:FORWARD DROP [0:0]
:DOCKER-USER - [0:0]
-A FORWARD -j DOCKER-USER
-A DOCKER-USER -j RETURN
COMMIT
";

/// Feeds a program with lines. `false`: this kernel cannot do it.
fn feed(node: &Node, program: &[&str], lines: &str) -> Result<bool> {
    let (program, arguments) = program.split_first().context("no program")?;
    let mut child = node
        .command(program)
        .args(arguments)
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()?;
    let mut pipe = child.stdin.take().context("no pipe")?;
    pipe.write_all(lines.as_bytes())?;
    drop(pipe);
    Ok(child.wait()?.success())
}

/// All rules of both families in their order, without the counters, nucnet's own, and chains of
/// the kernel's that accept everything.
fn rules(host: &Node) -> Result<String> {
    let saved = host.run("iptables-save", &[])? + &host.run("ip6tables-save", &[])?;
    let is_foreign = |line: &&str| {
        let is_empty = line.starts_with(['#', '*']) || *line == "COMMIT";
        let is_open = line.starts_with(':') && line.contains(" ACCEPT [");
        !(is_empty || is_open || line.contains("NUCNET-"))
    };
    let lines = saved.lines().filter(is_foreign);
    Ok(lines
        .map(|line| line.split(" [").next().unwrap_or_default().to_owned() + "\n")
        .collect())
}

/// Makes the host one that Docker runs on, and returns Docker's container.
fn with_docker(case: &Case) -> Result<Node> {
    for program in ["iptables-save", "ip6tables-save", "iptables-restore"] {
        if !has(program) {
            return skip(&format!("there is no program {program} here"));
        }
    }
    let host = &case.lab.host;
    if !feed(host, &["iptables-restore"], DOCKER_RULES)?
        || !feed(host, &["ip6tables-restore"], DOCKER_RULES6)?
    {
        return skip("this kernel has no netfilter, or lacks a match of Docker's");
    }
    host.sysctl("net/ipv4/ip_forward", "1")?;
    for family in ["iptables", "ip6tables"] {
        // Only where the module is loaded.
        let _ = host.sysctl(&format!("net/bridge/bridge-nf-call-{family}"), "1");
    }
    let container = case.lab.container("docker-container")?;
    container.ip("link set lo up")?;
    host.ip(&format!(
        "link add docker0 type bridge\n\
         addr add 172.17.0.1/16 dev docker0\n\
         link set docker0 up\n\
         link add veth0 type veth peer name eth0 netns {}\n\
         link set veth0 master docker0 up",
        container.pid()
    ))?;
    container.ip("addr add 172.17.0.2/16 dev eth0\n\
                  link set eth0 up\n\
                  route add default via 172.17.0.1")?;
    until("docker0 is up", SOON, || {
        Ok(host
            .run("ip", &["link", "show", "dev", "docker0"])?
            .contains("state UP"))
    })?;
    Ok(container)
}

fn docker(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let theirs = with_docker(case)?;
    let v4_any = |port| SocketAddr::new(Family::V4.any(), port);
    let _theirs = web::Server::start(theirs.listen(v4_any(80))?)?;
    let docker_works = |when: &str| -> Result<()> {
        case.who(&case.lab.outside, HOST.port(Family::V4, 9090))
            .with_context(|| format!("Docker's publish {when}"))?;
        ensure!(
            case.pings(&theirs, OUTSIDE.of(Family::V4))?,
            "Docker's container has no way out {when}"
        );
        Ok(())
    };
    docker_works("before")?;
    let (before, rules_before) = (Snapshot::of(&case.lab.host)?, rules(&case.lab.host)?);

    let (container, _) = case.attached("web", &["-p", "8080:80", "-p", "5300:53/udp"])?;
    let (sibling, _) = case.attached("sibling", &[])?;
    for family in Family::ALL {
        let any = |port| SocketAddr::new(family.any(), port);
        let _web = web::Server::start(container.listen(any(80))?)?;
        let _udp = udp::Server::start(container.udp(any(53))?)?;
        let _remote = web::Server::start(case.lab.outside.listen(any(80))?)?;
        case.who(&case.lab.outside, HOST.port(family, 8080))?;
        if case.serves_loopback(family) {
            case.who(&case.lab.host, SocketAddr::new(family.loopback(), 8080))?;
        }
        case.who(&sibling, HOST.port(family, 8080))?;
        case.who(&container, OUTSIDE.port(family, 80))?;
        let socket = case.lab.outside.udp(any(0))?;
        udp::exchange(&socket, HOST.port(family, 5300), "who", SOON)?;
        ensure!(case.pings(&container, OUTSIDE.of(family))?, "IP{family}");
    }
    docker_works("meanwhile")?;
    ensure!(
        rules(&case.lab.host)? == rules_before,
        "the rules are others while endpoints are attached"
    );
    let meanwhile = before.difference(&Snapshot::of(&case.lab.host)?);
    let gone: Vec<&str> = meanwhile
        .lines()
        .filter(|line| line.starts_with("gone"))
        // By netfilter, the host's interfaces forward for as long as there are endpoints.
        .filter(|line| case.is_by_programs() || !line.contains("forwarding = "))
        .collect();
    ensure!(gone.is_empty(), "changed meanwhile:\n{}", gone.join("\n"));

    case.lab.nucnet(&["detach", "web"])?.expect(0)?;
    docker_works("after the detach")?;
    case.lab.nucnet(&["down"])?.expect(0)?;
    let difference = before.difference(&Snapshot::of(&case.lab.host)?);
    ensure!(difference.is_empty(), "down leaves:\n{difference}");
    ensure!(rules(&case.lab.host)? == rules_before, "down leaves rules");
    docker_works("after down")
}

/// One conversation by publish and one by masquerade, to that address of the outside.
fn conversations(
    case: &Case,
    family: Family,
    container: &Node,
    remote: Pair,
) -> Result<Vec<Conversation>> {
    let any = |port| SocketAddr::new(family.any(), port);
    let inside = container.listen(any(80))?;
    let outside = case.lab.outside.listen(any(80))?;
    let names = ["publish", "masquerade"].map(|way| format!("by {way} over IP{family}"));
    Ok(vec![
        Conversation::start(
            &names[0],
            &case.lab.outside,
            HOST.port(family, 8080),
            &inside,
        )?,
        Conversation::start(&names[1], container, remote.port(family, 80), &outside)?,
    ])
}

fn native_firewall(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    if !has("nft") {
        return skip("there is no program nft here");
    }
    let host = &case.lab.host;
    let table = "table inet strict {\n\
                 chain through {\n\
                 type filter hook forward priority 0; policy drop;\n\
                 }\n\
                 }\n";
    if !feed(host, &["nft", "-f", "-"], table)? {
        return skip("this kernel has no nf_tables");
    }
    let (container, _) = case.attached("web", &["-p", "8080:80"])?;
    let _web = web::Server::start(container.listen(case.any(80))?)?;
    let _remote = web::Server::start(case.lab.outside.listen(case.any(80))?)?;
    let outside = &case.lab.outside;
    if !case.is_by_programs() {
        let lost = outside.connect(HOST.port(case.family, 8080), NEVER);
        ensure!(lost.is_err(), "the table drops nothing");
        let findings = case
            .lab
            .nucnet(&["doctor", "-o", "json"])?
            .expect(5)?
            .json()?;
        let findings = findings.as_array().context("no findings")?;
        let policy = findings.iter().find(|it| it["id"] == "forward-policy");
        let said = policy.map_or(String::new(), Value::to_string);
        ensure!(said.contains("inet strict through"), "{findings:?}");
        for way in ["iifname", "oifname"] {
            let accepted = format!("{way} nucnet0 accept");
            ensure!(said.contains(&accepted), "{said}");
            let rule = format!("inet strict through {accepted}");
            let words: Vec<&str> = ["add", "rule"].into_iter().chain(rule.split(' ')).collect();
            host.run("nft", &words)?;
        }
    }
    case.who(outside, HOST.port(case.family, 8080))?;
    case.who(&container, OUTSIDE.port(case.family, 80))?;
    Ok(())
}

fn transfers(case: &Case) -> Result<()> {
    const ROUNDS: usize = 12;
    case.only_nucnet()?;
    let (container, _) = case.attached("web", &["-p", "8080:80", "--deny", "192.0.2.77"])?;
    let mut open = Vec::new();
    for family in Family::ALL {
        open.extend(conversations(case, family, &container, FAR)?);
    }
    let others = [case.lab.container("one")?, case.lab.container("two")?];
    let over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let collecting = scope.spawn(|| -> Result<usize> {
            let mut runs = 0;
            while !over.load(Ordering::Relaxed) {
                case.lab.nucnet(&["gc"])?.expect(0)?;
                runs += 1;
            }
            Ok(runs)
        });
        let churn = || -> Result<()> {
            for round in 0..ROUNDS {
                for (number, other) in others.iter().enumerate() {
                    let port = format!("{}:80", 9000 + 2 * round + number);
                    case.attach(other, &["-p", &port, "--deny", "192.0.2.77"])?;
                }
                case.lab.nucnet(&["detach", "one", "two"])?.expect(0)?;
                go_on("all go on", &open, 0, SOON)?;
            }
            Ok(())
        };
        let churned = churn();
        over.store(true, Ordering::Relaxed);
        let runs = collecting
            .join()
            .map_err(|_| anyhow::anyhow!("a panic"))??;
        churned?;
        ensure!(runs > 0, "gc never ran");
        anyhow::Ok(())
    })?;
    open.into_iter().try_for_each(Conversation::close)
}

fn two_hundred(case: &Case) -> Result<()> {
    const WORKERS: usize = 16;
    const ROUNDS: usize = 13;
    case.only_nucnet()?;
    // The state directory and the datapath stay until `down`.
    let before = Snapshot::of(&case.lab.host)?;
    let containers = (0..2 * WORKERS)
        .map(|number| case.lab.container(&format!("c{number}")))
        .collect::<Result<Vec<_>>>()?;
    let held: Mutex<HashMap<IpAddr, String>> = Mutex::default();
    let holders = || held.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    // Each worker has one container attached while it attaches the other.
    let work = |pair: &[Node]| -> Result<()> {
        let mut last: Option<Endpoint> = None;
        let detach = |endpoint: Endpoint| -> Result<()> {
            holders().retain(|_, holder| *holder != endpoint.id);
            case.lab.nucnet(&["detach", &endpoint.id])?.expect(0)?;
            Ok(())
        };
        for round in 0..ROUNDS {
            let endpoint = case.attach(&pair[round % 2], &["-p", "0:80"])?;
            for address in &endpoint.addresses {
                let other = holders().insert(*address, endpoint.id.clone());
                ensure!(other.is_none(), "{address}: {} and {other:?}", endpoint.id);
            }
            last.replace(endpoint).map_or(Ok(()), detach)?;
        }
        last.map_or(Ok(()), detach)
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = containers
            .chunks(2)
            .map(|pair| scope.spawn(|| work(pair)))
            .collect();
        workers
            .into_iter()
            .try_for_each(|worker| worker.join().map_err(|_| anyhow::anyhow!("a panic"))?)
    })?;
    let list = case.lab.nucnet(&["-o", "json", "list"])?.expect(0)?;
    ensure!(list.json()? == Value::Array(Vec::new()), "{list}");
    for (map, entries) in case.lab.entries()? {
        ensure!(entries == 0, "{entries} entries stay in the map {map}");
    }
    let after = Snapshot::of(&case.lab.host)?.without_pins();
    let difference = before.without_pins().difference(&after);
    ensure!(difference.is_empty(), "they leave:\n{difference}");
    case.lab.nucnet(&["down"])?.expect(0)?;
    let difference = before.difference(&Snapshot::of(&case.lab.host)?);
    ensure!(difference.is_empty(), "down leaves:\n{difference}");
    Ok(())
}

/// Another machine takes the outside's place: same addresses, another link-layer address, and
/// nobody is told.
fn take_over(case: &Case) -> Result<()> {
    let outside = &case.lab.outside;
    outside.sysctl("net/ipv4/conf/eth0/arp_notify", "0")?;
    outside.sysctl("net/ipv6/conf/eth0/ndisc_notify", "0")?;
    outside.ip("link set eth0 address 02:00:00:00:0f:01")
}

fn fail_over(case: &Case) -> Result<()> {
    case.translates()?;
    let (container, _) = case.attached("web", &["-p", "8080:80"])?;
    // The other router speaks for itself and so makes itself known; one that only sends others'
    // packets is in the next scenario.
    let open = conversations(case, case.family, &container, OUTSIDE)?;
    // More than what could still have been on its way.
    const MORE: u64 = 1 << 20;
    go_on("they go on before", &open, MORE, SOON)?;
    take_over(case)?;
    let limit = Duration::from_secs(8);
    go_on("they go on with the other router", &open, MORE, limit)?;
    open.into_iter().try_for_each(Conversation::close)
}

/// Makes the host doubt its neighbours after a second, so that a test need not wait for long.
fn doubt_soon(case: &Case) -> Result<()> {
    let family = match case.family {
        Family::V4 => "ipv4",
        Family::V6 => "ipv6",
    };
    for (key, value) in [
        ("base_reachable_time_ms", "1000"),
        ("delay_first_probe_time", "1"),
        ("retrans_time_ms", "200"),
    ] {
        let path = format!("net/{family}/neigh/eth0/{key}");
        case.lab.host.sysctl(&path, value)?;
    }
    Ok(())
}

fn silent_fail_over(case: &Case) -> Result<()> {
    case.translates()?;
    doubt_soon(case)?;
    let (container, _) = case.attached("web", &[])?;
    let to = FAR.port(case.family, 5300);
    let socket = container.udp(case.any(0))?;
    let sink = case.lab.outside.udp(to)?;
    sink.set_read_timeout(Some(SOON))?;
    socket.set_read_timeout(Some(SOON))?;
    // One answer, or it would be a conversation that has not begun.
    let mut bytes = [0; 8];
    socket.send_to(&0_u64.to_be_bytes(), to)?;
    let (_, client) = sink.recv_from(&mut bytes)?;
    sink.send_to(b"answer", client)?;
    socket.recv_from(&mut bytes)?;
    sink.set_nonblocking(true)?;
    one_way(case, &socket, &sink, to)
}

fn one_way(
    case: &Case,
    socket: &std::net::UdpSocket,
    sink: &std::net::UdpSocket,
    to: SocketAddr,
) -> Result<()> {
    let mut number = 0_u64;
    let mut arrives = |what: &str, limit: Duration| {
        // Only what is sent from now on counts.
        let (first, mut bytes) = (number + 1, [0; 8]);
        until(what, limit, || {
            number += 1;
            socket.send_to(&number.to_be_bytes(), to)?;
            while sink.recv_from(&mut bytes).is_ok() {
                if u64::from_be_bytes(bytes) >= first {
                    return Ok(true);
                }
            }
            Ok(false)
        })
    };
    arrives("datagrams arrive before", SOON)?;
    take_over(case)?;
    arrives(
        "datagrams arrive at the other router",
        Duration::from_secs(10),
    )
}

/// Marsaglia's xorshift64: which verb is killed when can be had again, if not at which instruction.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % limit
    }
}

fn killed(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let time = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = time.as_secs() | 1;
    kill_at_random(case, Random(seed)).with_context(|| format!("seed {seed}"))
}

fn kill_at_random(case: &Case, mut random: Random) -> Result<()> {
    const LIMIT: Duration = Duration::from_secs(20);
    const AT_ONCE: u64 = 6;
    let start = Instant::now();
    let containers = (0..3)
        .map(|number| case.lab.container(&format!("c{number}")))
        .collect::<Result<Vec<_>>>()?;
    let pids: Vec<String> = containers.iter().map(|c| c.pid().to_string()).collect();
    let before = Snapshot::of(&case.lab.host)?;
    let mut ended = 0;
    let mut rounds = 0;
    while rounds == 0 || start.elapsed() < LIMIT {
        case.lab.forget();
        for _ in 0..AT_ONCE {
            let number = random.below(3) as usize;
            let (id, pid) = (format!("c{number}"), &pids[number]);
            let (port, other) = (
                format!("{}:80", 8080 + number),
                format!("{}:81", 9080 + number),
            );
            let words: &[&str] = match random.below(12) {
                0..4 if number == 0 => &["attach", "--pid", pid, "--id", &id, "--network", "red"],
                0..4 => &[
                    "attach", "--pid", pid, "--id", &id, "-p", &port, "--allow", "any",
                ],
                4 => &["network", "create", "red", "--bridge", "red0"],
                5 => &["network", "remove", "red"],
                6 => &["publish", &id, &other],
                7 => &["unpublish", &id, &other],
                8 => &["detach", &id],
                9 => &["detach", "c0", "c1", "c2"],
                10 => &["gc"],
                _ => &["down"],
            };
            let delay = Duration::from_micros(random.below(80_000));
            ended += usize::from(case.lab.nucnet_killed(words, delay)?);
        }
        case.lab.nucnet(&["gc"])?.expect(0)?;
        let list = case
            .lab
            .nucnet(&["-o", "json", "list"])?
            .expect(0)?
            .json()?;
        for endpoint in list.as_array().context("no array")? {
            ensure!(endpoint["state"] == "active", "after gc: {endpoint}");
        }
        case.lab.nucnet(&["detach", "c0", "c1", "c2"])?.expect(0)?;
        let removed = case.lab.nucnet(&["network", "remove", "red"])?;
        ensure!(matches!(removed.code, Some(0 | 3)), "{removed}");
        let after = Snapshot::of(&case.lab.host)?.without_pins();
        let difference = before.without_pins().difference(&after);
        ensure!(
            difference.is_empty(),
            "round {rounds} leaves:\n{difference}"
        );

        let _server = case.web(&containers[1], 80)?;
        case.attach(&containers[1], &["-p", "8080:80"])?;
        case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
        case.lab.nucnet(&["down"])?.expect(0)?;
        let difference = before.difference(&Snapshot::of(&case.lab.host)?);
        ensure!(
            difference.is_empty(),
            "round {rounds}: down leaves:\n{difference}"
        );
        rounds += 1;
    }
    ensure!(ended > 0, "nothing was killed in {rounds} rounds");
    Ok(())
}
