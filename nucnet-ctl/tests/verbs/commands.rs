//! The command line: what is refused, what a dry run shows, and what cannot be printed.

use std::{fs, process::Command};

use serde_json::Value;

use crate::lab::on_a_host;

#[test]
fn bad_input_is_refused_with_the_exit_code_of_the_contract_and_nothing_is_touched() {
    on_a_host(|lab| {
        let web = lab.container("web");
        fs::write(lab.place.join("file"), "").expect("write");
        let place = lab.place.display();
        let before = lab.snapshot();
        let netns = format!("attach --netns {}", web.display());
        for (arguments, code, says) in [
            ("attach", 2, "--pid"),
            ("attach --pid x", 2, "--pid"),
            ("attach --pid 1 --netns /x", 2, "--pid"),
            ("frobnicate", 2, "frobnicate"),
            (&format!("{netns} --id a/b"), 2, "a/b"),
            (&format!("{netns} --id {}", "a".repeat(65)), 2, "--id"),
            (&format!("{netns} --ip 10.0.43.1"), 2, "10.0.42.0/24"),
            (&format!("{netns} --ip 10.0.42.1"), 2, "gateway"),
            (&format!("{netns} --ip 10.0.42.0"), 2, "10.0.42.0"),
            (&format!("{netns} --ip 10.0.42.255"), 2, "broadcast"),
            (&format!("{netns} --ip 10.0.42.256"), 2, "--ip"),
            (
                &format!("{netns} --ip 10.0.42.2 --ip 10.0.42.3"),
                2,
                "10.0.42.3",
            ),
            (&format!("{netns} --mac 01:00:00:00:00:01"), 2, "--mac"),
            (&format!("{netns} --mtu 67"), 2, "--mtu"),
            (&format!("{netns} --mtu 65536"), 2, "--mtu"),
            (&format!("{netns} --mtu 1000"), 2, "IPv6"),
            (&format!("{netns} --ifname a/b"), 2, "--ifname"),
            (&format!("{netns} --ifname sixteen-bytes-xx"), 2, "--ifname"),
            (&format!("{netns} -p 80"), 2, "80"),
            (&format!("{netns} -p 80:80/sctp"), 2, "sctp"),
            (&format!("{netns} -p 80:80 -p 80:81"), 2, "80:81"),
            (&format!("{netns} --allow 10.0.0.0/33"), 2, "--allow"),
            (&format!("{netns} --deny any:80/icmp"), 2, "--deny"),
            (&format!("{netns} --dns 127.0.0.53"), 2, "--dns"),
            (&format!("{netns} --egress-default maybe"), 2, "maybe"),
            (&format!("{netns} --network a/b"), 2, "--network"),
            (&format!("{netns} --network blue"), 3, "blue"),
            (&format!("{netns} --rootfs /"), 2, "--rootfs /"),
            (&format!("attach --netns {place}/none"), 3, "none"),
            (&format!("attach --netns {place}/file"), 2, "file"),
            ("attach --netns /proc/self/ns/net", 2, "host"),
            ("attach --netns /proc/self/ns/mnt", 2, "mnt"),
            ("attach --pid 4194304", 3, "4194304"),
            ("attach --pid 0", 3, "0"),
            ("inspect web", 3, "web"),
            ("network remove blue", 3, "blue"),
            ("network remove blue --dry-run", 3, "blue"),
            ("network create blue --subnet 10.1.0.0/31", 2, "--subnet"),
            ("network create blue --subnet fd00::/64", 2, "--subnet6"),
            (
                "network create blue --subnet 10.1.0.0/24 --gateway 10.2.0.1",
                2,
                "--gateway",
            ),
            ("network create blue --gateway 10.2.0.1", 2, "--gateway"),
            (
                "network create blue --subnet6 fd00::/64 --mtu 1000",
                2,
                "--mtu",
            ),
            ("network create blue --subnet 192.0.2.128/25", 4, "up0"),
            (
                "network create blue --bridge up0 --subnet 10.1.0.0/24",
                4,
                "up0",
            ),
        ] {
            let (found, error) = lab.refused(arguments);
            assert_eq!(found, code, "{arguments}: {error}");
            let text = error.to_string();
            assert!(text.contains(says), "{arguments}: {text}");
            assert!(!error["message"].as_str().expect("text").is_empty());
        }
        lab.assert_unchanged(&before, "afterwards");
    });
}

#[test]
fn a_dry_run_shows_the_plan_and_touches_nothing() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let before = lab.snapshot();
        let attach = format!("attach --netns {} --id web -p 8080:80", web.display());
        let plan = lab.json(&format!("{attach} --dry-run"));
        assert!(plan["plan"].as_array().expect("list").len() > 10, "{plan}");
        lab.json("network create blue --dry-run");
        lab.assert_unchanged(&before, "afterwards");
        lab.ok(&attach);
        let before = lab.snapshot();
        assert!(
            !lab.json("detach web --dry-run")["plan"]
                .as_array()
                .expect("list")
                .is_empty()
        );
        assert!(
            !lab.json("down --dry-run")["plan"]
                .as_array()
                .expect("list")
                .is_empty()
        );
        assert_eq!(
            lab.json(&format!("{attach} --dry-run"))["plan"],
            Value::Array(vec![])
        );
        lab.assert_unchanged(&before, "afterwards");
    });
}

#[test]
fn completions_are_printed_without_a_host() {
    let output = Command::new(env!("CARGO_BIN_EXE_nucnet-ctl"))
        .args(["completions", "bash"])
        .output();
    let output = output.expect("nucnet-ctl");
    assert!(output.status.success());
    assert!(String::from_utf8_lossy(&output.stdout).contains("unpublish"));
}

#[test]
fn what_cannot_be_written_is_an_error_unless_it_tells_of_something_done() {
    on_a_host(|lab| {
        let full = |arguments: &str| {
            let full = fs::File::options().write(true).open("/dev/full");
            let mut command = lab.command(arguments);
            let output = command.stdout(full.expect("/dev/full")).output();
            let output = output.expect("nucnet-ctl");
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            (output.status.code(), said)
        };
        let (code, said) = full("network create blue");
        assert_eq!(code, Some(0), "{said}");
        assert!(said.contains("it is done, but cannot be shown"), "{said}");
        assert_eq!(lab.json("network list")[0]["id"], "blue");
        for answer in [
            "network list",
            "-o json list",
            "flows",
            "-o json flows",
            "-o json gc --dry-run",
        ] {
            let (code, said) = full(answer);
            assert_eq!(code, Some(1), "{answer}: {said}");
            assert!(said.contains("cannot write to standard output"), "{said}");
        }

        let (reader, writer) = std::io::pipe().expect("pipe");
        drop(reader);
        let mut unheard = lab.command("network list");
        let status = unheard.stdout(writer).status().expect("nucnet-ctl");
        assert!(status.success(), "nobody listening is no error: {status}");
    });
}
