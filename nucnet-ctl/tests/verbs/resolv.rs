//! `attach --rootfs`, in root directories as containers leave them. Each host has resolver files
//! of the test's.

use std::{
    fs,
    io::{BufRead, BufReader, ErrorKind},
    ops::Deref,
    os::unix::fs::{PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use nix::{
    errno::Errno,
    mount::{MntFlags, MsFlags, umount2},
    unistd::mkfifo,
};
use serde_json::Value;

use crate::lab::{self, has_faults, mounted};

/// A host with a container and its root directory.
struct Lab<'a>(&'a lab::Lab);

impl Deref for Lab<'_> {
    type Target = lab::Lab;

    fn deref(&self) -> &lab::Lab {
        self.0
    }
}

fn on_a_host(test: impl FnOnce(&Lab<'_>) + Send + 'static) {
    lab::on_a_host(|host| {
        let lab = Lab(host);
        mounted("tmpfs", Path::new("/run"), Some("tmpfs"), MsFlags::empty());
        lab.host_file("nameserver 192.0.2.53\nsearch corp.example\noptions ndots:2\n");
        lab.container("netns");
        fs::create_dir_all(lab.root().join("etc")).expect("root directory");
        test(&lab);
    });
}

impl Lab<'_> {
    /// What the host's `/etc/resolv.conf` says.
    fn host_file(&self, text: &str) {
        let file = self.place.join("host-resolv.conf");
        let first = !file.exists();
        fs::write(&file, text).expect("write");
        if first {
            let target = fs::canonicalize("/etc/resolv.conf").expect("the host's resolv.conf");
            let file = file.to_str().expect("text");
            mounted(file, &target, None, MsFlags::MS_BIND);
        }
    }

    fn root(&self) -> PathBuf {
        self.place.join("root")
    }

    fn file(&self) -> PathBuf {
        self.root().join("etc/resolv.conf")
    }

    fn text(&self) -> String {
        fs::read_to_string(self.file()).expect("resolv.conf")
    }

    /// Its lines without comments.
    fn lines(&self) -> Vec<String> {
        let text = self.text();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        lines.map(str::to_owned).collect()
    }

    fn attach(&self) -> String {
        format!(
            "attach --netns {place}/netns --id web --rootfs {place}/root",
            place = self.place.display()
        )
    }

    /// Exit code, message with causes, and hint.
    fn refused(&self, arguments: &str) -> (i32, String) {
        let output = self.run(arguments);
        let code = output.status.code().expect("exit code");
        assert_ne!(code, 0, "{arguments}: was done");
        (code, String::from_utf8_lossy(&output.stderr).into_owned())
    }

    /// Mounts over anything in the root directory: options, as mountinfo has them.
    fn mounts(&self) -> Vec<String> {
        let root = format!("{}/", self.root().display());
        fs::read_to_string("/proc/thread-self/mountinfo")
            .expect("mounts")
            .lines()
            .filter(|line| {
                line.split(' ')
                    .nth(4)
                    .is_some_and(|at| at.starts_with(&root))
            })
            .map(|line| line.split(' ').nth(5).expect("options").to_owned())
            .collect()
    }

    /// All that the root directory holds, what is staged, and what is mounted.
    fn tree(&self) -> Vec<String> {
        let mut found = tree(&self.root());
        found.extend(tree(&self.place.join("state/resolv")));
        found.extend(self.mounts());
        found
    }
}

fn tree(directory: &Path) -> Vec<String> {
    let mut found = Vec::new();
    for entry in fs::read_dir(directory).into_iter().flatten() {
        let entry = entry.expect("entry");
        let stat = fs::symlink_metadata(entry.path()).expect("stat");
        found.push(format!(
            "{} {:o}",
            entry.path().display(),
            stat.permissions().mode()
        ));
        if stat.is_dir() {
            found.extend(tree(&entry.path()));
        }
    }
    found.sort();
    found
}

#[test]
fn the_file_is_there_while_the_endpoint_is_and_the_containers_own_is_untouched() {
    on_a_host(|lab| {
        fs::write(lab.file(), "own\n").expect("write");
        let before = lab.tree();
        lab.ok(&lab.attach());
        assert_eq!(
            lab.lines(),
            [
                "nameserver 192.0.2.53",
                "search corp.example",
                "options ndots:2"
            ]
        );
        let text = lab.text();
        assert!(
            text.starts_with("# Written by nucnet-ctl for endpoint web"),
            "{text}"
        );
        // Whoever the container's processes are, they can read it.
        let mode = fs::metadata(lab.file()).expect("stat").permissions().mode();
        assert_eq!(mode & 0o777, 0o644);
        lab.ok("detach web");
        assert_eq!(lab.text(), "own\n");
        assert_eq!(lab.tree(), before);
    });
}

#[test]
fn the_mount_is_read_only_and_so_are_the_attempts_to_change_it() {
    on_a_host(|lab| {
        lab.ok(&lab.attach());
        let mounts = lab.mounts();
        let options: Vec<&str> = mounts[0].split(',').collect();
        for option in ["ro", "nosuid", "nodev", "noexec"] {
            assert!(options.contains(&option), "{mounts:?}");
        }
        let refused = |error: std::io::Error| error.raw_os_error().map(Errno::from_raw);
        let written = fs::write(lab.file(), "nameserver 203.0.113.1\n");
        assert_eq!(written.map_err(refused), Err(Some(Errno::EROFS)));
        let changed = fs::set_permissions(lab.file(), fs::Permissions::from_mode(0o4777));
        assert_eq!(changed.map_err(refused), Err(Some(Errno::EROFS)));
        let removed = fs::remove_file(lab.file());
        assert_eq!(removed.map_err(refused), Err(Some(Errno::EBUSY)));
    });
}

#[test]
fn the_same_attach_again_does_not_stack_mounts_and_another_root_is_a_conflict() {
    on_a_host(|lab| {
        for _ in 0..3 {
            // The same directory, written otherwise.
            lab.ok(&format!("{}/", lab.attach()));
            assert_eq!(lab.mounts().len(), 1);
        }
        let without = lab.attach().replace("--rootfs", "--ifname eth0 #");
        let without = without.split(" #").next().expect("text").to_owned();
        let (code, errors) = lab.refused(&without);
        assert!(code == 4 && errors.contains("--rootfs"), "{code} {errors}");
        lab.ok("detach web");
        lab.ok("detach web");
        assert_eq!(lab.mounts().len(), 0);
    });
}

#[test]
fn what_is_missing_is_made_and_removed_again() {
    on_a_host(|lab| {
        let with_etc = lab.tree();
        lab.ok(&lab.attach());
        assert_eq!(lab.lines().len(), 3);
        lab.ok("detach web");
        assert_eq!(lab.tree(), with_etc);

        fs::remove_dir(lab.root().join("etc")).expect("remove");
        let without_etc = lab.tree();
        lab.ok(&lab.attach());
        assert_eq!(lab.lines().len(), 3);
        lab.ok("detach web");
        assert_eq!(lab.tree(), without_etc);

        // What the container came to keep there stays.
        lab.ok(&lab.attach());
        fs::write(lab.root().join("etc/hostname"), "web\n").expect("write");
        lab.ok("detach web");
        assert_eq!(tree(&lab.root()).len(), 2);
    });
}

#[test]
fn links_in_the_root_directory_lead_nowhere() {
    on_a_host(|lab| {
        let victim = lab.place.join("victim");
        fs::create_dir(&victim).expect("directory");
        fs::write(victim.join("resolv.conf"), "kept\n").expect("write");
        let victims_file = victim.join("resolv.conf");
        let (etc, file) = (lab.root().join("etc"), lab.file());
        let before_host = fs::read_to_string("/etc/resolv.conf").expect("host");
        let links: [(&Path, &Path); 8] = [
            (&etc, Path::new("/")),
            (&etc, Path::new("/etc")),
            (&etc, Path::new("../victim")),
            (&etc, &victim),
            (&file, Path::new("../../../etc/shadow")),
            (&file, Path::new("../../victim/resolv.conf")),
            (&file, &victims_file),
            (&file, Path::new("/proc/self/root/etc/resolv.conf")),
        ];
        for (link, target) in links {
            fs::remove_dir_all(lab.root()).expect("remove");
            fs::create_dir(lab.root()).expect("root directory");
            if link == file {
                fs::create_dir(&etc).expect("etc");
            }
            symlink(target, link).expect("link");
            let before = lab.tree();
            let (code, errors) = lab.refused(&lab.attach());
            let what = format!("{} -> {}: {errors}", link.display(), target.display());
            assert!(code == 2 && errors.contains("symbolic link"), "{what}");
            assert_eq!(lab.tree(), before, "{what}");
        }
        assert_eq!(fs::read_to_string(&victims_file).expect("victim"), "kept\n");
        assert_eq!(
            fs::read_to_string("/etc/resolv.conf").expect("host"),
            before_host
        );
        assert_eq!(tree(&victim).len(), 1);
    });
}

#[test]
fn what_is_no_file_is_not_mounted_on() {
    on_a_host(|lab| {
        let file = lab.file();
        let attempt = |what: &str| {
            let before = lab.tree();
            let (code, errors) = lab.refused(&lab.attach());
            assert!(code == 2 && errors.contains(what), "{code} {errors}");
            assert_eq!(lab.tree(), before);
        };
        mkfifo(&file, nix::sys::stat::Mode::S_IRWXU).expect("fifo");
        attempt("neither file nor directory");
        fs::remove_file(&file).expect("remove");
        fs::create_dir(&file).expect("directory");
        attempt("a directory");
        fs::remove_dir_all(lab.root().join("etc")).expect("remove");
        fs::write(lab.root().join("etc"), "").expect("write");
        attempt("a file");
        fs::remove_file(lab.root().join("etc")).expect("remove");
        fs::remove_dir(lab.root()).expect("remove");
        attempt("No such file");
    });
}

#[test]
fn a_mount_is_removed_wherever_the_container_has_moved_it() {
    on_a_host(|lab| {
        lab.ok(&lab.attach());
        // So that what is in the way of its path leads elsewhere.
        let (etc, moved) = (lab.root().join("etc"), lab.root().join("moved here"));
        fs::rename(&etc, &moved).expect("move");
        symlink("/etc", &etc).expect("link");
        assert_eq!(lab.mounts().len(), 1);
        lab.ok("detach web");
        assert_eq!(lab.mounts().len(), 0);
        assert!(fs::symlink_metadata(&etc).expect("link").is_symlink());
        assert!(fs::read_to_string("/etc/resolv.conf").is_ok());
    });
}

#[test]
fn an_attach_that_fails_at_any_step_leaves_nothing_mounted() {
    on_a_host(|lab| {
        if !has_faults() {
            return;
        }
        let steps: Value =
            serde_json::from_str(&lab.ok(&format!("{} -o json --dry-run", lab.attach())))
                .expect("JSON");
        let plan = steps.to_string();
        assert!(plan.contains("etc/resolv.conf (192.0.2.53)"), "{plan}");
        let before = lab.tree();
        let mut failures = 0;
        loop {
            let fault = format!("fail:{failures}");
            let mut command = lab.command(&lab.attach());
            let output = command
                .env("NUCNET_FAULT", fault)
                .output()
                .expect("nucnet-ctl");
            if output.status.success() {
                break;
            }
            failures += 1;
            assert_eq!(lab.tree(), before, "after {failures} steps");
        }
        assert!(failures > 15, "{failures}");
        lab.ok("detach web");
    });
}

#[test]
fn what_a_killed_attach_has_mounted_is_collected_or_taken_over() {
    on_a_host(|lab| {
        if !has_faults() {
            return;
        }
        let before = lab.tree();
        let plan = lab.ok(&format!("{} --dry-run", lab.attach()));
        let mount = plan.lines().find(|line| line.contains(". mount "));
        let number = mount.and_then(|line| line.trim().split('.').next());
        let stop = format!("stop:{}", number.expect("number of the step"));
        for after in ["gc", "down", "attach"] {
            let mut command = lab.command(&lab.attach());
            command.env("NUCNET_FAULT", &stop);
            assert!(!command.status().expect("nucnet-ctl").success());
            assert_eq!(lab.mounts().len(), 1);
            match after {
                "attach" => {
                    lab.ok(&lab.attach());
                    assert_eq!(lab.mounts().len(), 1);
                    lab.ok("detach web");
                }
                verb => drop(lab.ok(verb)),
            }
            assert_eq!(lab.tree(), before, "{after}");
        }
    });
}

#[test]
fn mounts_that_no_record_tells_of_are_collected() {
    on_a_host(|lab| {
        let network = "network create blue --subnet 10.9.0.0/24";
        for verb in ["gc", "down"] {
            lab.ok(network);
            lab.ok(&lab.attach());
            // As if the record were lost.
            fs::remove_file(lab.place.join("state/endpoints/web.json")).expect("remove");
            if verb == "gc" {
                let planned = lab.ok("gc --dry-run");
                assert!(planned.contains("etc/resolv.conf (web)"), "{planned}");
            }
            lab.ok(verb);
            assert_eq!(lab.mounts().len(), 0, "{verb}");
            assert!(!lab.place.join("state/resolv").exists(), "{verb}");
        }
        // And as if all state were.
        for verb in ["gc", "down"] {
            lab.ok(&lab.attach());
            fs::remove_dir_all(lab.place.join("state")).expect("remove");
            lab.ok(verb);
            assert_eq!(lab.mounts().len(), 0, "{verb}");
        }
    });
}

#[test]
fn foreign_mounts_on_the_file_stay() {
    on_a_host(|lab| {
        fs::write(lab.file(), "own\n").expect("write");
        let foreign = lab.place.join("foreign");
        fs::write(&foreign, "foreign\n").expect("write");
        let bind = || {
            mounted(
                foreign.to_str().expect("text"),
                &lab.file(),
                None,
                MsFlags::MS_BIND,
            )
        };
        bind();
        lab.ok(&lab.attach());
        assert_eq!(lab.lines().len(), 3);
        lab.ok("detach web");
        assert_eq!(lab.text(), "foreign\n");

        // One that covers nucnet's is named, and stays.
        lab.ok(&lab.attach());
        bind();
        let (code, errors) = lab.refused("detach web");
        assert!(code == 1 && errors.contains("covered"), "{code} {errors}");
        assert_eq!(lab.text(), "foreign\n");
        umount2(&lab.file(), MntFlags::empty()).expect("unmount");
        lab.ok("detach web");
        assert_eq!(lab.mounts().len(), 1);
        lab.ok("gc");
        assert_eq!(lab.text(), "foreign\n");
    });
}

#[test]
fn a_mount_that_somebody_took_away_shows_as_drift() {
    on_a_host(|lab| {
        lab.ok(&lab.attach());
        assert!(!lab.ok("status").contains("resolv.conf"));
        umount2(&lab.file(), MntFlags::empty()).expect("unmount");
        let status = lab.ok("status");
        assert!(status.contains("resolv.conf is not mounted"), "{status}");
        lab.ok("detach web");
        lab.ok(&lab.attach());
        assert_eq!(lab.mounts().len(), 1);
    });
}

/// A process in a mount namespace of its own, a copy of this one's.
struct Inside(std::process::Child);

impl Inside {
    fn start(script: &str) -> Self {
        let script = format!("{script}; echo ready; exec sleep 600");
        let mut child = Command::new("unshare")
            .args(["--mount", "--propagation", "private", "sh", "-ec", &script])
            .stdout(Stdio::piped())
            .spawn()
            .expect("unshare");
        let mut line = String::new();
        let mut reader = BufReader::new(child.stdout.take().expect("stdout"));
        reader.read_line(&mut line).expect("ready");
        assert_eq!(line, "ready\n");
        Self(child)
    }

    /// What is at that path for the process.
    fn path(&self, path: &Path) -> PathBuf {
        let root = PathBuf::from(format!("/proc/{}/root", self.0.id()));
        root.join(path.strip_prefix("/").expect("absolute"))
    }
}

impl Drop for Inside {
    fn drop(&mut self) {
        self.0.kill().expect("kill");
        self.0.wait().expect("wait");
    }
}

#[test]
fn a_container_that_has_its_own_mounts_already_is_not_reached() {
    on_a_host(|lab| {
        fs::write(lab.file(), "own\n").expect("write");
        let root = lab.root().display().to_string();
        let inside = Inside::start(&format!("mount --bind {root} {root}"));
        // By the way into its mounts: refused, with what to do instead.
        let there = inside.path(&lab.root());
        let before = lab.tree();
        let attach = lab.attach().replace(&root, &there.display().to_string());
        let (code, errors) = lab.refused(&attach);
        assert!(errors.contains("mount namespace"), "{code} {errors}");
        assert_eq!(lab.tree(), before);
        let text = |path: PathBuf| fs::read_to_string(path).expect("read");
        assert_eq!(text(there.join("etc/resolv.conf")), "own\n");
        // By the host's: what the container copied earlier does not change.
        lab.ok(&lab.attach());
        assert_ne!(lab.text(), "own\n");
        assert_eq!(text(there.join("etc/resolv.conf")), "own\n");
        lab.ok("detach web");
        assert_eq!(lab.tree(), before);
    });
}

#[test]
fn a_container_that_copies_the_mounts_afterwards_keeps_the_file_until_it_ends() {
    on_a_host(|lab| {
        fs::write(lab.file(), "own\n").expect("write");
        lab.ok(&lab.attach());
        let inside = Inside::start("true");
        let there = inside.path(&lab.file());
        let given = fs::read_to_string(&there).expect("read");
        assert_eq!(given, lab.text());
        lab.ok("detach web");
        assert_eq!(lab.text(), "own\n");
        // Nobody takes it from under a process that reads it; nothing of it is the host's.
        assert_eq!(fs::read_to_string(&there).expect("read"), given);
        assert!(!lab.place.join("state/resolv").exists());
    });
}

#[test]
fn a_root_directory_has_the_file_of_one_endpoint() {
    on_a_host(|lab| {
        lab.ok(&lab.attach());
        lab.ok("network create blue --subnet 10.9.0.0/24");
        let second = lab
            .attach()
            .replace("web", "two --network blue --ifname eth1");
        let (code, errors) = lab.refused(&second);
        assert!(
            code == 4 && errors.contains("endpoint web"),
            "{code} {errors}"
        );
        assert_eq!(lab.mounts().len(), 1);
        lab.ok("detach web");
        lab.ok(&second);
        assert_eq!(lab.mounts().len(), 1);
    });
}

#[test]
fn given_resolvers_are_written_and_a_stub_of_the_host_is_looked_through() {
    on_a_host(|lab| {
        lab.ok(&format!("{} --dns 9.9.9.9 --dns 2620:fe::fe", lab.attach()));
        let lines = lab.lines();
        assert_eq!(lines[..2], ["nameserver 9.9.9.9", "nameserver 2620:fe::fe"]);
        assert_eq!(lines[2..], ["search corp.example", "options ndots:2"]);
        lab.ok("detach web");

        lab.host_file("nameserver 127.0.0.53\noptions edns0 trust-ad\n");
        let before = lab.tree();
        let (code, errors) = lab.refused(&lab.attach());
        assert!(code == 5 && errors.contains("--dns"), "{code} {errors}");
        assert_eq!(lab.tree(), before);

        fs::create_dir_all("/run/systemd/resolve").expect("directory");
        fs::write(
            "/run/systemd/resolve/resolv.conf",
            "nameserver 192.0.2.54\n",
        )
        .expect("write");
        lab.ok(&lab.attach());
        assert_eq!(lab.lines(), ["nameserver 192.0.2.54", "options edns0"]);
    });
}

#[test]
fn the_hosts_resolvers_are_allowed_like_given_ones() {
    on_a_host(|lab| {
        let allow = format!("{} --allow 198.51.100.0/24:443/tcp -o json", lab.attach());
        for _ in 0..2 {
            let view: Value = serde_json::from_str(&lab.ok(&allow)).expect("JSON");
            assert_eq!(view["egress"]["default"], "deny");
            assert_eq!(view["egress"]["dns"][0], "192.0.2.53");
        }
        // The host's file may change meanwhile: what was asked for is still the same.
        lab.host_file("nameserver 192.0.2.99\n");
        lab.ok(&allow);
        assert_eq!(lab.lines()[0], "nameserver 192.0.2.53");
        lab.ok("detach web");
        lab.ok("down");
    });
}

#[test]
fn the_hosts_own_root_is_refused_under_any_name() {
    on_a_host(|lab| {
        let other = lab.place.join("other");
        fs::create_dir(&other).expect("directory");
        mounted("/", &other, None, MsFlags::MS_BIND);
        let read_only = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
        mounted("none", &other, None, read_only);
        for root in ["/", "/proc/self/root", other.to_str().expect("text")] {
            let attach = format!(
                "attach --netns {}/netns --rootfs {root}",
                lab.place.display()
            );
            let (code, errors) = lab.refused(&attach);
            assert!(code == 2 && errors.contains("the host"), "{code} {errors}");
        }
        let error = fs::metadata(lab.place.join("state")).expect_err("state");
        assert_eq!(error.kind(), ErrorKind::NotFound);
    });
}
