//! Policies that answer what they deny: what real clients make of the answers.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, TcpStream};
use std::process::{Output, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use anyhow::{Context, Result, bail, ensure};
use nucnet_tests::lab::wait::{SOON, until};
use nucnet_tests::lab::{Family, Node, OUTSIDE};
use serde_json::json;

use crate::case::{Case, Families, Scenario, refused, silent};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "curl_is_refused_at_once_with_reject_and_times_out_without",
        what: "a build that asks for what it must not have fails in no time, and says why",
        families: Families::Each,
        run: curl,
    },
    Scenario {
        name: "rejected_ping_and_datagram_are_told_that_it_is_forbidden",
        what: "ping prints it, a socket gets the error",
        families: Families::Each,
        run: ping_and_datagram,
    },
    Scenario {
        name: "connections_that_a_rejecting_policy_ends_are_reset_at_once",
        what: "an upload in full swing, and a client whose server is the first to speak",
        families: Families::Each,
        run: swap,
    },
    Scenario {
        name: "explain_says_reject_where_the_sender_is_told",
        what: "drop and reject are different answers to a complaint",
        families: Families::Each,
        run: explain,
    },
];

/// curl's exit codes.
const COULD_NOT_CONNECT: i32 = 7;
const TIMED_OUT: i32 = 28;

fn set_egress(case: &Case, words: &[&str]) -> Result<()> {
    let all = [&["egress", "set", "client"], words].concat();
    case.lab.nucnet(&all)?.expect(0)?;
    Ok(())
}

fn ask(client: &Node, url: &str, limit: &str) -> Result<Output> {
    let arguments = ["-sS", "--noproxy", "*", "--connect-timeout", limit, url];
    client
        .command("curl")
        .args(arguments)
        .output()
        .context("running curl")
}

fn curl(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let to = OUTSIDE.port(case.family, 443);
    let server = case.web(&case.lab.outside, 443)?;
    let rules = ["--deny", "private", "--deny", "any:443/tcp"];
    let rejecting = [&rules[..], &["--reject"]].concat();
    let (client, endpoint) = case.attached("client", &rejecting)?;
    ensure!(
        endpoint.json["egress"]["reject"] == json!(true),
        "{endpoint:?}"
    );
    let monitor = case.lab.monitor(&["--endpoint", "client"])?;
    let url = format!("http://{to}/who");

    // It could wait for a minute, and does not.
    let output = ask(&client, &url, "60")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(COULD_NOT_CONNECT),
        "{}: {said}",
        output.status
    );
    refused(&client, to)?;
    let event = monitor.wait_for("a denial", |event| event["event"] == "denied")?;
    for (key, value) in [
        ("reason", json!("policy")),
        ("rule", json!("any:443/tcp")),
        ("dst", json!(to.ip().to_string())),
        ("dport", json!(443)),
    ] {
        ensure!(event[key] == value, "{key} is not {value}: {event}");
    }
    case.counted("policy")?;

    set_egress(case, &rules)?;
    let output = ask(&client, &url, "1")?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(TIMED_OUT),
        "{}: {said}",
        output.status
    );
    silent(&client, to)?;
    ensure!(server.clients().is_empty(), "{:?}", server.clients());
    Ok(())
}

fn ping_and_datagram(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let words = ["--egress-default", "deny", "--reject"];
    let (client, _) = case.attached("client", &words)?;
    let to = OUTSIDE.port(case.family, 53);
    let server = case.udp(&case.lab.outside, 53)?;
    let output = client
        .command("ping")
        .args(["-n", "-c", "1", "-W", "5", &to.ip().to_string()])
        .stderr(Stdio::inherit())
        .output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    // What iputils calls the code of the error.
    let (name, error) = match case.family {
        Family::V4 => ("Packet filtered", libc::EHOSTUNREACH),
        Family::V6 => ("Administratively prohibited", libc::EACCES),
    };
    ensure!(said.contains(name), "no word of {name:?}: {said}");

    let socket = client.udp(case.any(0))?;
    socket.connect(to)?;
    socket.set_read_timeout(Some(SOON))?;
    socket.send(b"is anybody there")?;
    match socket.recv(&mut [0; 100]) {
        Err(found) if found.raw_os_error() == Some(error) => {}
        found => bail!("not error {error} but: {found:?}"),
    }
    ensure!(server.seen().is_empty(), "{:?} got out", server.seen());
    Ok(())
}

/// That the next that a client does with a connection tells it that it was reset.
fn is_reset(mut stream: TcpStream) -> Result<()> {
    stream.set_write_timeout(Some(SOON))?;
    let block = vec![0xa5; 1 << 20];
    let ended = loop {
        // Whichever comes first: the socket is full, or the reset is there.
        if let Err(error) = stream.write_all(&block) {
            break error;
        }
    };
    let is_reset = matches!(
        ended.kind(),
        ErrorKind::ConnectionReset | ErrorKind::BrokenPipe
    );
    ensure!(is_reset, "not reset but: {ended}");
    Ok(())
}

fn swap(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &[])?;
    let connect = |port| -> Result<(TcpStream, TcpStream)> {
        let listener = case.lab.outside.listen(case.any(port))?;
        let stream = client.connect(OUTSIDE.port(case.family, port), SOON)?;
        Ok((stream, listener.accept()?.0))
    };
    let (upload, mut reader) = connect(80)?;
    let (waiting, mut speaker) = connect(81)?;
    let (bytes, ending) = (AtomicU64::new(0), reader.try_clone()?);
    thread::scope(|scope| -> Result<()> {
        scope.spawn(|| {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length @ 1..) = reader.read(&mut buffer) {
                bytes.fetch_add(length as u64, Ordering::Relaxed);
            }
        });
        let uploading = scope.spawn(|| is_reset(upload));
        let swapped = until("some megabytes are uploaded", SOON, || {
            Ok(bytes.load(Ordering::Relaxed) > 3_000_000)
        })
        .and_then(|()| set_egress(case, &["--egress-default", "deny", "--reject"]));
        let reset = uploading.join().expect("upload").context("the upload");
        // The reset was the client's alone. The host may have ended this side since.
        let _ = ending.shutdown(Shutdown::Both);
        swapped.and(reset)
    })?;

    // The server's packet is the one that ends this flow.
    speaker.write_all(b"hello")?;
    let flows = || -> Result<_> {
        let flows = case.lab.nucnet(&["-o", "json", "flows"])?.expect(0)?;
        flows.json()
    };
    until("the flow ends", SOON, || {
        Ok(flows()?.as_array().is_some_and(Vec::is_empty))
    })?;
    is_reset(waiting).context("the client whose server spoke")?;
    case.counted("policy")?;
    case.counted("no-flow")
}

fn explain(case: &Case) -> Result<()> {
    case.only_nucnet()?;
    let (client, _) = case.attached("client", &["--deny", "any:443", "--reject"])?;
    let verdict = |port: u16, proto: &str| -> Result<String> {
        let to = OUTSIDE.port(case.family, port).to_string();
        let words = ["-o", "json", "explain", "--from", "client", "--to"];
        let all = [&words[..], &[&to, "--proto", proto]].concat();
        let answer = case.lab.nucnet(&all)?.expect(0)?.json()?;
        let word = |key: &str| answer[key].as_str().unwrap_or("-").to_owned();
        Ok([word("verdict"), word("reason"), word("rule")].join(" "))
    };
    for proto in ["tcp", "udp"] {
        let denied = verdict(443, proto)?;
        ensure!(denied == "reject policy any:443", "{proto}: {denied}");
        let allowed = verdict(80, proto)?;
        ensure!(allowed == "pass policy default", "{proto}: {allowed}");
    }
    let to = OUTSIDE.port(case.family, 443).to_string();
    let text = case
        .lab
        .nucnet(&["explain", "--from", "client", "--to", &to])?
        .expect(0)?;
    ensure!(text.stdout.starts_with("reject: tcp "), "{text}");
    // And that is what happens.
    refused(&client, OUTSIDE.port(case.family, 443))?;
    set_egress(case, &["--deny", "any:443"])?;
    let denied = verdict(443, "tcp")?;
    ensure!(denied == "drop policy any:443", "{denied}");
    silent(&client, OUTSIDE.port(case.family, 443))
}
