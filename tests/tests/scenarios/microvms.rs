//! A real machine in a slot: its kernel's stack, and its driver's offloads, in place of the relay
//! that the scenarios about slots have for one.

use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::{HOST, Lab, Microvm, Node, OUTSIDE, Said, Slot, microvm_program, web};

use crate::case::{Case, Families, Scenario, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[Scenario {
    name: "two_machines_boot_in_slots_and_serve_and_fetch_apart_from_each_other",
    what: "clones of one snapshot: published, addressed, held to their policies, offloads and all",
    families: Families::Together,
    run: machines,
}];

/// Of what is downloaded.
const SIZE: usize = 64 << 20;

/// What clouds tell their machines about themselves.
const METADATA: [u8; 4] = [169, 254, 169, 254];

/// Status of what `timeout` has ended.
const TERMINATED: i32 = 128 + 15;

struct Machine {
    slot: Slot,
    published: SocketAddr,
    /// How everybody else knows it.
    address: SocketAddr,
    guest: Microvm,
}

impl Machine {
    fn start(lab: &Lab, number: u32) -> Result<Self> {
        let port = 8080 + u16::try_from(number)?;
        let slot = lab.slot(number, &["-p", &format!("{port}:80")])?;
        Ok(Self {
            published: SocketAddr::new(HOST.v4.into(), port),
            address: SocketAddr::new(slot.address("host_ip")?, 80),
            guest: lab.microvm(&format!("machine {number}"), &slot)?,
            slot,
        })
    }

    fn name(&self) -> &str {
        self.slot.json["id"].as_str().unwrap_or_default()
    }

    /// Runs a command in the guest that must succeed.
    fn run(&mut self, command: &str) -> Result<String> {
        let said = self.guest.run(command)?;
        said.ok()
            .with_context(|| format!("{}: `{command}`", self.name()))
    }

    /// What the guest gets from a server within so many seconds.
    fn fetch(&mut self, from: SocketAddr, path: &str, seconds: u32) -> Result<Said> {
        // Debian's wget of busybox dies of its own -T.
        let command = format!("timeout {seconds} wget -q -O - http://{from}{path}");
        self.guest.run(&command)
    }

    /// That a server is beyond its reach.
    fn misses(&mut self, server: SocketAddr) -> Result<()> {
        let said = self.fetch(server, "/name", 1)?;
        ensure!(
            said.status == TERMINATED,
            "{} and {server}: {said:?}",
            self.name()
        );
        Ok(())
    }

    /// Frames and bytes that its driver has counted in one direction.
    fn counted(&mut self, direction: &str) -> Result<[u64; 2]> {
        let mut counts = [0; 2];
        for (count, what) in counts.iter_mut().zip(["packets", "bytes"]) {
            let file = format!("/sys/class/net/eth0/statistics/{direction}_{what}");
            *count = self.run(&format!("cat {file}"))?.trim().parse()?;
        }
        Ok(counts)
    }

    /// How long a frame was on average, of those since then.
    fn mean_frame(&mut self, direction: &str, before: [u64; 2]) -> Result<u64> {
        let now = self.counted(direction)?;
        Ok((now[1] - before[1]) / (now[0] - before[0]).max(1))
    }
}

fn machines(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    if microvm_program().is_none() {
        return skip("nothing to boot: `cargo xtask microvm` makes it");
    }
    let lab = &case.lab;
    let _server = web::Server::start(lab.outside.listen(([0, 0, 0, 0], 80).into())?)?;
    let mut one = Machine::start(lab, 1)?;
    let mut two = Machine::start(lab, 2)?;
    for machine in [&mut one, &mut two] {
        machine.guest.booted()?;
        let name = machine.name().to_owned();
        machine.run(&format!("echo {name} >/www/name; httpd -h /www"))?;
    }
    for key in ["guest_ip", "guest_mac", "gateway"] {
        ensure!(one.slot.json[key] == two.slot.json[key], "not of one {key}");
    }
    reached(lab, &mut one)?;
    reached(lab, &mut two)?;
    apart(lab, &mut one, &two)?;
    apart(lab, &mut two, &one)?;
    case.counted("policy")?;
    guarded(lab, &mut one)?;
    under_policy(lab, &mut two)?;
    whole(lab, &mut one)
}

/// What a guest serves. It may be slow: it is emulated, where others are at work.
fn got(client: &Node, from: SocketAddr, path: &str) -> Result<Vec<u8>> {
    const PATIENCE: Duration = Duration::from_secs(60);
    let stream = client
        .connect(from, PATIENCE)
        .with_context(|| format!("connecting from {} to {from}", client.name()))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    web::get(stream, path)
}

fn outside() -> SocketAddr {
    SocketAddr::new(OUTSIDE.v4.into(), 80)
}

/// By its slot's address from the host, by its publish from outside, and back out.
fn reached(lab: &Lab, machine: &mut Machine) -> Result<()> {
    let name = format!("{}\n", machine.name());
    for (client, to) in [
        (&lab.host, machine.address),
        (&lab.outside, machine.published),
    ] {
        let found = got(client, to, "/name")?;
        ensure!(
            found == name.as_bytes(),
            "{} answers at {to}",
            String::from_utf8_lossy(&found)
        );
    }
    let seen: SocketAddr = machine.fetch(outside(), "/who", 60)?.ok()?.parse()?;
    ensure!(seen.ip() == IpAddr::V4(HOST.v4), "it leaves as {seen}");
    Ok(())
}

/// Not even what the other one publishes: that is a neighbour's, too.
fn apart(lab: &Lab, machine: &mut Machine, other: &Machine) -> Result<()> {
    for to in [other.address, other.published] {
        machine.misses(to)?;
    }
    // It was there to be reached.
    got(&lab.host, other.address, "/name").map(drop)
}

/// A metadata service is closed until somebody opens it by name.
fn guarded(lab: &Lab, machine: &mut Machine) -> Result<()> {
    let metadata = SocketAddr::from((METADATA, 80));
    let address = metadata.ip();
    lab.outside.ip(&format!("addr add {address}/32 dev lo"))?;
    lab.host
        .ip(&format!("route add {address} via {}", OUTSIDE.v4))?;
    machine.misses(metadata)?;
    let allow = ["--egress-default", "allow", "--allow", &address.to_string()];
    let name = machine.name().to_owned();
    lab.nucnet(&[&["egress", "set", &name][..], &allow].concat())?
        .expect(0)?;
    machine.fetch(metadata, "/who", 60)?.ok().map(drop)
}

/// A policy that is set while the guest runs holds for it, and is told to it.
fn under_policy(lab: &Lab, machine: &mut Machine) -> Result<()> {
    let name = machine.name().to_owned();
    let deny = ["--egress-default", "deny", "--reject"];
    lab.nucnet(&[&["egress", "set", &name][..], &deny].concat())?
        .expect(0)?;
    let said = machine.fetch(outside(), "/who", 60)?;
    ensure!(
        said.status != 0 && said.text.contains("Connection refused"),
        "what is denied: {said:?}"
    );
    lab.nucnet(&["egress", "set", &name, "--egress-default", "allow"])?
        .expect(0)?;
    machine.fetch(outside(), "/who", 60)?.ok().map(drop)
}

/// 64 MB in, and the same out again. Whole segments of a transfer pass the TAP in one frame, which
/// only a header of virtio-net can say of it.
fn whole(lab: &Lab, machine: &mut Machine) -> Result<()> {
    let mut expected = web::Digest::default();
    for _ in 0..SIZE / web::LARGEST {
        expected.update(web::payload());
    }
    let expected = expected.finish();
    let (start, before) = (Instant::now(), machine.counted("rx")?);
    let url = format!("http://{}/bytes/{SIZE}", outside());
    machine.run(&format!("wget -q -O /www/whole {url}"))?;
    let (took_in, frame_in) = (start.elapsed(), machine.mean_frame("rx", before)?);
    let digest = machine.run("sha256sum /www/whole")?;
    ensure!(
        digest.split(' ').next() == Some(&expected),
        "the guest got {digest}, not {expected}"
    );
    let (start, before) = (Instant::now(), machine.counted("tx")?);
    let body = got(&lab.outside, machine.published, "/whole")?;
    let (took_out, frame_out) = (start.elapsed(), machine.mean_frame("tx", before)?);
    ensure!(web::sha256(&body) == expected, "it came out another one");
    println!(
        "64 MB into an emulated machine in {took_in:.1?}, frames of {frame_in} bytes on average; \
         out of it in {took_out:.1?}, of {frame_out}"
    );
    let mtu = machine.slot.json["mtu"].as_u64().context("no MTU")?;
    for (direction, frame) in [("in", frame_in), ("out", frame_out)] {
        ensure!(
            frame > mtu + 14,
            "{direction}: frames of {frame} bytes, cut to the MTU of {mtu}"
        );
    }
    Ok(())
}
