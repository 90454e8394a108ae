//! The two processes of a measurement: a server and a client of single bytes, on one CPU.
//!
//! Both end with their standard input, so that neither outlives whoever started it.

use std::io::{BufRead, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::unistd::Pid;

use super::Kind;

/// What a server says once it can be connected to.
pub(super) const READY: &str = "ready";

/// Seconds that a measurement may take longer than it should.
const PATIENCE: u32 = 10;

/// Keeps this thread on one CPU.
///
/// # Errors
/// There is no such CPU for it.
pub fn pin(cpu: usize) -> Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu)?;
    sched_setaffinity(Pid::from_raw(0), &set).with_context(|| format!("staying on CPU {cpu}"))
}

/// Sends every byte back, one client at a time.
///
/// # Errors
/// The port cannot be had.
pub fn serve(address: SocketAddr) -> Result<()> {
    let listener = TcpListener::bind(address).with_context(|| format!("listening on {address}"))?;
    std::thread::spawn(|| {
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        std::process::exit(0);
    });
    println!("{READY}");
    loop {
        let (mut stream, _) = listener.accept()?;
        let mut byte = [0];
        while matches!(stream.read(&mut byte), Ok(1)) {
            if stream.write_all(&byte).is_err() {
                break;
            }
        }
    }
}

/// Does what standard input says, line by line (`rr 300`: kind and milliseconds), and answers
/// with the number of transactions and the nanoseconds that they took.
///
/// # Errors
/// A transaction fails.
pub fn drive(target: SocketAddr) -> Result<()> {
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let order = line.split_once(' ').and_then(|(kind, milliseconds)| {
            Some((Kind::from_name(kind)?, milliseconds.parse().ok()?))
        });
        let Some((kind, milliseconds)) = order else {
            bail!("not an order: {line}")
        };
        // Ends this process if an answer never comes; a timeout on every socket would cost as
        // much as what is measured.
        nix::unistd::alarm::set(u32::try_from(milliseconds / 1000)?.saturating_add(PATIENCE));
        let start = Instant::now();
        let transactions = run(kind, target, start + Duration::from_millis(milliseconds))
            .with_context(|| format!("{kind} to {target}"))?;
        nix::unistd::alarm::cancel();
        println!("{transactions} {}", start.elapsed().as_nanos());
    }
    Ok(())
}

/// One transaction at least, however short the time.
fn run(kind: Kind, target: SocketAddr, end: Instant) -> std::io::Result<u64> {
    let mut transactions = 0;
    let mut open = match kind {
        Kind::Rr => Some(TcpStream::connect(target)?),
        Kind::Crr => None,
    };
    loop {
        let mut once;
        let stream = match &mut open {
            Some(stream) => stream,
            None => {
                once = TcpStream::connect(target)?;
                &mut once
            }
        };
        let mut byte = [b'x'];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        transactions += 1;
        if Instant::now() >= end {
            return Ok(transactions);
        }
    }
}
