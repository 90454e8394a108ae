//! Two minutes of new sockets at a rate that fills every table many times over, with the defaults,
//! beside old connections that go on.

use std::collections::{BTreeMap, VecDeque};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{setsockopt, sockopt};
use nix::time::{ClockId, clock_gettime};
use nucnet_common::abi::Reason;
use nucnet_common::flow::Standing;
use nucnet_tests::lab::wait::SOON;
use nucnet_tests::lab::{Family, HOST, Node, OUTSIDE};
use socket2::{Domain, Socket, Type};

use crate::case::{Case, Families, Scenario, skip};

pub(crate) const SLOW: &[Scenario] = &[Scenario {
    name: "flood_of_new_sockets_is_carried_and_takes_nothing_from_old_connections",
    what: "5,000 questions to a resolver from one container, each by a socket of its own, and \
           5,000 connections to it from distinct clients, each second for two minutes, half of \
           them by IPv6",
    families: Families::Together,
    run: flood,
}];

/// New sockets a second, of either kind.
const RATE: u32 = 5_000;
const LASTS: Duration = Duration::from_secs(120);

/// Questions whose answers nobody has looked at yet.
const AHEAD: usize = 500;

/// What one side of the flood has seen.
#[derive(Debug, Default)]
struct Tally {
    carried: u32,
    /// No answer came, or an error in its place.
    lost: u32,
}

impl Tally {
    fn note(&mut self, is_carried: bool) {
        match is_carried {
            true => self.carried += 1,
            false => self.lost += 1,
        }
    }

    fn rate(&self) -> u64 {
        u64::from(self.carried + self.lost) / LASTS.as_secs()
    }
}

/// Does something at [`RATE`], or as often as the machine allows, for as long as the flood
/// [`LASTS`]. What it had no time for is not made up for: that would be another rate.
fn paced(mut act: impl FnMut(u32) -> Result<()>) -> Result<()> {
    const LATE: Duration = Duration::from_millis(100);
    let (begin, each) = (Instant::now(), Duration::from_secs(1) / RATE);
    let (mut due, mut done) = (begin, 0);
    loop {
        let now = Instant::now();
        if now - begin >= LASTS {
            return Ok(());
        }
        if due > now {
            std::thread::sleep(Duration::from_millis(1));
            continue;
        }
        act(done)?;
        done += 1;
        due = (due + each).max(now - LATE);
    }
}

/// A question that was asked.
struct Question {
    socket: UdpSocket,
    number: u32,
    asked: Instant,
}

impl Question {
    fn ask(family: Family, resolver: SocketAddr, number: u32) -> Result<Self> {
        let socket = UdpSocket::bind((family.any(), 0))?;
        socket.connect(resolver)?;
        socket.send(&number.to_be_bytes())?;
        Ok(Self {
            socket,
            number,
            asked: Instant::now(),
        })
    }

    /// Waits for the answer, if it is not there yet.
    fn answered(self) -> Result<bool> {
        let left = SOON.saturating_sub(self.asked.elapsed());
        let least = Duration::from_millis(1);
        self.socket.set_read_timeout(Some(left.max(least)))?;
        let mut answer = [0; 8];
        let length = self.socket.recv(&mut answer);
        Ok(matches!(length, Ok(4)) && answer[..4] == self.number.to_be_bytes())
    }
}

/// Asks a resolver, each time by a new socket.
fn ask(resolvers: [(Family, SocketAddr); 2]) -> Result<Tally> {
    let (mut tally, mut open) = (Tally::default(), VecDeque::new());
    paced(|number| {
        let (family, resolver) = resolvers[number as usize % 2];
        open.push_back(Question::ask(family, resolver, number)?);
        if open.len() > AHEAD
            && let Some(question) = open.pop_front()
        {
            tally.note(question.answered()?);
        }
        Ok(())
    })?;
    for question in open {
        tally.note(question.answered()?);
    }
    Ok(tally)
}

/// Connects and closes, each time from another client's address.
fn connect(servers: [(Family, SocketAddr); 2]) -> Result<Tally> {
    let mut tally = Tally::default();
    paced(|number| {
        let (family, server) = servers[number as usize % 2];
        let socket = Socket::new(Domain::for_address(server), Type::STREAM, None)?;
        socket.bind(&SocketAddr::new(client(family, number), 0).into())?;
        tally.note(socket.connect_timeout(&server.into(), SOON).is_ok());
        Ok(())
    })?;
    Ok(tally)
}

/// A client of many beyond the uplink: 198.18.0.0/15 or 2001:db8:c::/64.
fn client(family: Family, number: u32) -> IpAddr {
    match family {
        Family::V4 => Ipv4Addr::from_bits(0xc612_0001 + number % 0x1_ffff).into(),
        Family::V6 => Ipv6Addr::from_bits(0x2001_0db8_000c << 80 | u128::from(number + 1)).into(),
    }
}

/// Gives every question back until the flood is over.
fn resolve(socket: &UdpSocket, is_over: &AtomicBool) {
    let mut question = [0; 8];
    while !is_over.load(Ordering::Relaxed) {
        // Timeouts, and errors about answers that came too late.
        if let Ok((length, from)) = socket.recv_from(&mut question) {
            let _ = socket.send_to(&question[..length], from);
        }
    }
}

/// Takes connections and closes them until the flood is over.
fn serve(listener: &TcpListener, is_over: &AtomicBool) {
    while !is_over.load(Ordering::Relaxed) {
        if listener.accept().is_err() {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

/// Both ends of a connection.
struct Old(TcpStream, TcpStream);

impl Old {
    fn new(client: TcpStream, listener: &TcpListener) -> Result<Self> {
        let (server, _) = listener.accept()?;
        server.set_read_timeout(client.read_timeout()?)?;
        Ok(Self(client, server))
    }

    fn talk(&mut self) -> Result<()> {
        let mut byte = [0];
        self.0.write_all(b"?")?;
        self.1.read_exact(&mut byte).context("to the server")?;
        self.1.write_all(b"!")?;
        self.0.read_exact(&mut byte).context("to the client")
    }
}

/// What one family needs for its half of the flood.
struct Half {
    resolver: UdpSocket,
    server: TcpListener,
    old: [Old; 2],
}

impl Half {
    fn new(case: &Case, container: &Node, family: Family) -> Result<Self> {
        let (outside, any) = (&case.lab.outside, |port| {
            SocketAddr::new(family.any(), port)
        });
        let (clients, version) = match family {
            Family::V4 => ("198.18.0.0/15", "-4"),
            Family::V6 => ("2001:db8:c::/64", "-6"),
        };
        outside.run(
            "ip",
            &[version, "route", "add", "local", clients, "dev", "lo"],
        )?;
        let beyond = outside.listen(any(443))?;
        let beside = container.listen(any(81))?;
        let resolver = outside.udp(any(53))?;
        resolver.set_read_timeout(Some(Duration::from_millis(50)))?;
        // What it has no time for now, it answers later.
        setsockopt(&resolver, sockopt::RcvBufForce, &(32 << 20))?;
        let server = container.listen(any(80))?;
        server.set_nonblocking(true)?;
        let out = container.connect(OUTSIDE.port(family, 443), SOON)?;
        let back = outside.connect(HOST.port(family, 8081), SOON)?;
        Ok(Self {
            resolver,
            server,
            old: [Old::new(out, &beyond)?, Old::new(back, &beside)?],
        })
    }
}

/// How many flows of each protocol have which standing.
fn standings(case: &Case) -> Result<BTreeMap<String, usize>> {
    let now = Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC)?).as_nanos() as u64;
    let mut standings = BTreeMap::new();
    for (key, flow) in case.lab.flows()? {
        let standing = Standing::of(key.protocol, &flow, now);
        let name = format!("{} {standing:?} in state {}", key.protocol, flow.state);
        *standings.entry(name).or_default() += 1;
    }
    Ok(standings)
}

fn flood(case: &Case) -> Result<()> {
    if !case.is_by_programs() {
        return skip("the tables that it fills are those of the programs");
    }
    let outside = &case.lab.outside;
    let (container, _) = case.attached("container", &["-p", "8080:80", "-p", "8081:81"])?;
    let container = &container;
    for path in ["net/ipv4/ip_nonlocal_bind", "net/ipv6/ip_nonlocal_bind"] {
        outside.sysctl(path, "1")?;
    }
    let half = |family| Half::new(case, container, family);
    let mut halves = [half(Family::V4)?, half(Family::V6)?];

    let (is_over, begin) = (&AtomicBool::new(false), Instant::now());
    let (asked, connected) = std::thread::scope(|scope| {
        let mut old = Vec::new();
        for half in &mut halves {
            let (resolver, server) = (&half.resolver, &half.server);
            scope.spawn(move || resolve(resolver, is_over));
            scope.spawn(move || serve(server, is_over));
            old.extend(&mut half.old);
        }
        let asking = scope.spawn(|| {
            let resolver = |family| (family, OUTSIDE.port(family, 53));
            container.within(|| ask(Family::ALL.map(resolver)))
        });
        let connecting = scope.spawn(|| {
            let server = |family| (family, HOST.port(family, 8080));
            outside.within(|| connect(Family::ALL.map(server)))
        });
        let mut alive = Ok(());
        while alive.is_ok() && !(asking.is_finished() && connecting.is_finished()) {
            alive = old.iter_mut().try_for_each(|old| old.talk());
            std::thread::sleep(Duration::from_millis(200));
        }
        let late = begin.elapsed();
        let tallies = (asking.join(), connecting.join());
        is_over.store(true, Ordering::Relaxed);
        alive.with_context(|| format!("an old connection, {late:?} after the beginning"))?;
        let done = |tally: std::thread::Result<Result<Result<Tally>>>| {
            tally.unwrap_or_else(|panic| std::panic::resume_unwind(panic))?
        };
        Ok::<_, anyhow::Error>((done(tallies.0)?, done(tallies.1)?))
    })?;
    let rates = format!(
        "{} questions and {} connections a second for {} s",
        asked.rate(),
        connected.rate(),
        LASTS.as_secs()
    );
    println!("  {rates}: {asked:?}, {connected:?}");
    let drops = case.lab.drops()?;
    let full = [
        Reason::FlowQuota,
        Reason::FlowTableFull,
        Reason::PortsExhausted,
        Reason::Filtered,
    ];
    let refused: u64 = full
        .iter()
        .filter_map(|reason| drops.get(reason.name()))
        .sum();
    ensure!(
        refused == 0 && asked.lost + connected.lost == 0,
        "{rates}: {asked:?}, {connected:?}, {drops:?}, {:?}",
        standings(case)?
    );
    for half in &mut halves {
        half.old.iter_mut().try_for_each(Old::talk)?;
    }
    if asked.rate().min(connected.rate()) < u64::from(RATE) * 9 / 10 {
        return skip(&format!("all was carried, but this machine gave {rates}"));
    }
    Ok(())
}
