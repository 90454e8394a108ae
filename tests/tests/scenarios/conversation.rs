//! A connection over which both sides send without end, and check each byte that arrives.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::wait::until;
use nucnet_tests::lab::{Node, web};

use crate::case::connect;

/// How much is sent at once, in bytes, and how often: 8 MB/s each way leave the machine time
/// for what happens meanwhile.
const CHUNK: usize = 16 << 10;
const PACE: Duration = Duration::from_millis(2);

/// How long nothing may arrive. TCP asks again after 0.2, 0.6, 1.4, 3, 6.2 seconds.
const PATIENCE: Duration = Duration::from_secs(10);

/// Waits until more than `bytes` more have arrived at each side of each conversation.
pub(crate) fn go_on(when: &str, open: &[Conversation], bytes: u64, limit: Duration) -> Result<()> {
    let arrived = || open.iter().map(Conversation::arrived);
    let before: Vec<_> = arrived().collect();
    let rest = || {
        let pairs = arrived().zip(&before);
        let sides = pairs.flat_map(|(now, then)| [now[0] - then[0], now[1] - then[1]]);
        sides.collect::<Vec<_>>()
    };
    let went_on = until(when, limit, || Ok(rest().iter().all(|&more| more > bytes)));
    went_on.with_context(|| format!("bytes that arrived at client and server: {:?}", rest()))
}

/// Goes on until it is [closed](Self::close).
pub(crate) struct Conversation {
    name: String,
    stop: Arc<AtomicBool>,
    /// Bytes that arrived at the client and at the server.
    arrived: [Arc<AtomicU64>; 2],
    senders: Vec<JoinHandle<Result<u64>>>,
    receivers: Vec<JoinHandle<Result<u64>>>,
}

impl Conversation {
    /// Connects a client with a listening server.
    pub(crate) fn start(
        name: &str,
        client: &Node,
        to: SocketAddr,
        server: &TcpListener,
    ) -> Result<Self> {
        // Made at its first use, for longer than anybody waits on a machine that is busy.
        web::payload();
        let client = connect(client, to).with_context(|| name.to_owned())?;
        let (server, _) = server.accept()?;
        let mut conversation = Self {
            name: name.to_owned(),
            stop: Arc::default(),
            arrived: Default::default(),
            senders: Vec::new(),
            receivers: Vec::new(),
        };
        for (side, stream) in [client, server].into_iter().enumerate() {
            stream.set_read_timeout(Some(PATIENCE))?;
            stream.set_write_timeout(Some(PATIENCE))?;
            let (stop, writer) = (conversation.stop.clone(), stream.try_clone()?);
            let sender = std::thread::spawn(move || send(writer, &stop));
            conversation.senders.push(sender);
            let arrived = conversation.arrived[side].clone();
            let receiver = std::thread::spawn(move || receive(stream, &arrived));
            conversation.receivers.push(receiver);
        }
        Ok(conversation)
    }

    /// Bytes that have arrived so far at the client and at the server.
    pub(crate) fn arrived(&self) -> [u64; 2] {
        [0, 1].map(|side| self.arrived[side].load(Ordering::Relaxed))
    }

    /// Ends it. All that was sent must have arrived as it was sent.
    pub(crate) fn close(mut self) -> Result<()> {
        self.stop.store(true, Ordering::Relaxed);
        let end = |threads: &mut Vec<JoinHandle<Result<u64>>>| -> Result<Vec<u64>> {
            threads
                .drain(..)
                .map(|thread| thread.join().map_err(|_| anyhow::anyhow!("a panic"))?)
                .collect()
        };
        let context = || format!("the conversation {}", self.name);
        let sent = end(&mut self.senders).with_context(context)?;
        let mut received = end(&mut self.receivers).with_context(context)?;
        received.reverse();
        ensure!(sent == received, "{}: {sent:?} {received:?}", context());
        Ok(())
    }
}

impl Drop for Conversation {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Sends the payload over and over, and returns how many bytes that was.
fn send(mut stream: TcpStream, stop: &AtomicBool) -> Result<u64> {
    let mut sent = 0;
    for chunk in web::payload().chunks_exact(CHUNK).cycle() {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        stream.write_all(chunk).context("sending")?;
        sent += CHUNK as u64;
        std::thread::sleep(PACE);
    }
    stream.shutdown(std::net::Shutdown::Write)?;
    Ok(sent)
}

/// Compares what arrives with the payload until the other side has sent all.
fn receive(mut stream: TcpStream, arrived: &AtomicU64) -> Result<u64> {
    let mut buffer = vec![0; 256 << 10];
    let mut rest: &[u8] = &[];
    loop {
        let length = stream.read(&mut buffer).context("receiving")?;
        if length == 0 {
            return Ok(arrived.load(Ordering::Relaxed));
        }
        let mut bytes = &buffer[..length];
        while !bytes.is_empty() {
            if rest.is_empty() {
                rest = web::payload();
            }
            let length = bytes.len().min(rest.len());
            ensure!(
                bytes[..length] == rest[..length],
                "damaged after {} bytes",
                arrived.load(Ordering::Relaxed)
            );
            arrived.fetch_add(length as u64, Ordering::Relaxed);
            (bytes, rest) = (&bytes[length..], &rest[length..]);
        }
    }
}
