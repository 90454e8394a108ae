//! A small HTTP/1.1 server that tells its clients what it sees of them, and a client for it.
//!
//! `GET /who` answers with the client's address and port, `GET /bytes/N` with N bytes of
//! [`payload`], `PUT` of anything with the SHA-256 of what arrived. One request a connection.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, OnceLock};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use sha2::{Digest as _, Sha256};

/// Bytes of [`payload`]; a larger `/bytes/N` repeats it.
pub const LARGEST: usize = 32 << 20;

/// Serves until it is dropped.
#[derive(Debug)]
pub struct Server {
    listener: TcpListener,
    clients: Arc<Mutex<Vec<SocketAddr>>>,
    accepting: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on a listening socket, each client on a thread of its own.
    ///
    /// # Errors
    /// The socket cannot be shared between threads.
    pub fn start(listener: TcpListener) -> Result<Self> {
        let clients = Arc::new(Mutex::new(Vec::new()));
        let (socket, seen) = (listener.try_clone()?, clients.clone());
        let accepting = std::thread::spawn(move || {
            // Ends when the socket is shut down.
            while let Ok((stream, client)) = socket.accept() {
                seen.lock()
                    .unwrap_or_else(|poisoned| poisoned.into_inner())
                    .push(client);
                std::thread::spawn(move || {
                    // A client may go away at any time; that is its business.
                    let _ = answer(stream, client);
                });
            }
        });
        Ok(Self {
            listener,
            clients,
            accepting: Some(accepting),
        })
    }

    /// Every client so far, in order.
    pub fn clients(&self) -> Vec<SocketAddr> {
        self.clients
            .lock()
            .unwrap_or_else(|poisoned| poisoned.into_inner())
            .clone()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = socket2::SockRef::from(&self.listener).shutdown(Shutdown::Both);
        if let Some(accepting) = self.accepting.take() {
            let _ = accepting.join();
        }
    }
}

fn answer(stream: TcpStream, client: SocketAddr) -> io::Result<()> {
    stream.set_read_timeout(Some(Duration::from_secs(20)))?;
    stream.set_nodelay(true)?;
    let mut writer = stream.try_clone()?;
    let mut reader = BufReader::with_capacity(256 << 10, stream);
    let (request, length) = head(&mut reader)?;
    let mut words = request.split_whitespace();
    match (words.next(), words.next()) {
        (Some("PUT"), _) => {
            writer.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
            let mut digest = Sha256::new();
            let mut body = reader.take(length.unwrap_or(0) as u64);
            let mut buffer = vec![0; 256 << 10];
            loop {
                match body.read(&mut buffer)? {
                    0 => break,
                    read => digest.update(&buffer[..read]),
                }
            }
            reply(&mut writer, "200 OK", hex(&digest.finalize()).as_bytes())
        }
        (Some("GET"), Some("/who")) => reply(&mut writer, "200 OK", client.to_string().as_bytes()),
        (Some("GET"), Some(path)) => {
            match path
                .strip_prefix("/bytes/")
                .and_then(|length| length.parse().ok())
            {
                Some(length) => {
                    begin(&mut writer, "200 OK", length)?;
                    let mut left: usize = length;
                    while left > 0 {
                        let part = left.min(LARGEST);
                        writer.write_all(&payload()[..part])?;
                        left -= part;
                    }
                    writer.shutdown(Shutdown::Write)
                }
                None => reply(&mut writer, "404 Not Found", b"/who or /bytes/N\n"),
            }
        }
        _ => reply(&mut writer, "400 Bad Request", b""),
    }
}

fn reply(writer: &mut TcpStream, status: &str, body: &[u8]) -> io::Result<()> {
    begin(writer, status, body.len())?;
    writer.write_all(body)?;
    writer.shutdown(Shutdown::Write)
}

fn begin(writer: &mut TcpStream, status: &str, length: usize) -> io::Result<()> {
    writer.write_all(
        format!("HTTP/1.1 {status}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")
            .as_bytes(),
    )
}

/// First line and content length of a request or a reply.
fn head(reader: &mut impl BufRead) -> io::Result<(String, Option<usize>)> {
    let mut first = String::new();
    reader.read_line(&mut first)?;
    let mut length = None;
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if line.trim().is_empty() {
            return Ok((first, length));
        }
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("content-length")
        {
            length = value.trim().parse().ok();
        }
    }
}

/// Asks a server for a path over a connection.
///
/// # Errors
/// The connection breaks, or the answer is not 200.
pub fn get(stream: TcpStream, path: &str) -> Result<Vec<u8>> {
    exchange(
        stream,
        &format!("GET {path} HTTP/1.1\r\nHost: lab\r\n\r\n"),
        &[],
    )
}

/// Whom the server takes us for.
///
/// # Errors
/// As [`get`].
pub fn who(stream: TcpStream) -> Result<SocketAddr> {
    let body = String::from_utf8(get(stream, "/who")?)?;
    body.parse()
        .with_context(|| format!("{body} is no address"))
}

/// Sends bytes and returns the SHA-256 of what arrived.
///
/// # Errors
/// As [`get`].
pub fn put(stream: TcpStream, body: &[u8]) -> Result<String> {
    let head = format!(
        "PUT / HTTP/1.1\r\nHost: lab\r\nContent-Length: {}\r\n\r\n",
        body.len()
    );
    Ok(String::from_utf8(exchange(stream, &head, body)?)?)
}

fn exchange(mut stream: TcpStream, request: &str, body: &[u8]) -> Result<Vec<u8>> {
    stream.set_nodelay(true)?;
    stream
        .write_all(request.as_bytes())
        .context("sending the request")?;
    stream.write_all(body).context("sending the body")?;
    let mut reader = BufReader::with_capacity(256 << 10, stream);
    let (status, length) = loop {
        let (status, length) = head(&mut reader).context("reading the answer")?;
        if !status.contains(" 100 ") {
            break (status, length);
        }
    };
    ensure!(
        status.contains(" 200 "),
        "the server says {}",
        status.trim()
    );
    let Some(length) = length else {
        bail!("an answer without length")
    };
    let mut bytes = Vec::with_capacity(length);
    reader
        .take(length as u64)
        .read_to_end(&mut bytes)
        .context("reading the answer")?;
    ensure!(
        bytes.len() == length,
        "{} of {length} bytes arrived",
        bytes.len()
    );
    Ok(bytes)
}

/// Bytes that repeat nowhere near each other: a lost, doubled or swapped segment shows.
pub fn payload() -> &'static [u8] {
    static PAYLOAD: OnceLock<Vec<u8>> = OnceLock::new();
    PAYLOAD.get_or_init(|| {
        // Marsaglia's xorshift64. Word by word: byte by byte it takes an emulated machine longer
        // than a client waits.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut bytes = vec![0; LARGEST];
        for word in bytes.chunks_exact_mut(8) {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            word.copy_from_slice(&state.to_le_bytes());
        }
        bytes
    })
}

/// SHA-256, as `sha256sum` prints it.
pub fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

/// SHA-256 of bytes that come in parts.
#[derive(Clone, Debug, Default)]
pub struct Digest(Sha256);

impl Digest {
    /// Takes the next part.
    pub fn update(&mut self, part: &[u8]) {
        self.0.update(part);
    }

    /// What [`sha256`] says of all parts.
    pub fn finish(self) -> String {
        hex(&self.0.finalize())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
