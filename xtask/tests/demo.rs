//! However `cargo xtask demo` ends, nothing of it stays.

use std::{
    collections::HashSet,
    fs,
    io::{BufRead as _, BufReader, Read as _},
    os::unix::{
        fs::PermissionsExt as _,
        process::{CommandExt as _, ExitStatusExt as _},
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use nix::{
    sys::signal::{Signal, kill},
    unistd::{Pid, geteuid},
};

#[test]
#[ignore = "slow: builds nucnet-ctl optimised"]
fn interrupted_demo_leaves_nothing() {
    // In the middle of the story, and in the middle of the race.
    for (chapter, namespaces) in [("5. ", 5), ("10. ", 12)] {
        for signal in [Signal::SIGINT, Signal::SIGTERM] {
            let Some(mut demo) = Demo::start(None) else {
                return;
            };
            demo.read_until(chapter);
            let traces = demo.traces(namespaces);
            kill(demo.pid(), signal).unwrap();
            let status = demo.child.wait().unwrap();
            assert_eq!(status.signal(), Some(signal as i32), "{status}");
            traces.assert_gone();
        }
    }
}

#[test]
#[ignore = "slow: builds nucnet-ctl optimised"]
fn killed_demo_leaves_nothing() {
    let Some(mut demo) = Demo::start(None) else {
        return;
    };
    demo.read_until("5. ");
    let traces = demo.traces(5);
    demo.child.kill().unwrap();
    demo.child.wait().unwrap();
    // Its machines notice on their own.
    traces.assert_gone();
}

#[test]
#[ignore = "slow: builds nucnet-ctl optimised"]
fn failed_demo_leaves_nothing_and_names_the_step() {
    let directory = tempfile::tempdir().unwrap();
    let curl = directory.path().join("curl");
    // Slow enough for us to look at the machines.
    fs::write(&curl, "#!/bin/sh\nsleep 1\nexit 7\n").unwrap();
    fs::set_permissions(&curl, fs::Permissions::from_mode(0o755)).unwrap();
    let Some(mut demo) = Demo::start(Some(directory.path())) else {
        return;
    };
    demo.read_until("2. ");
    let traces = demo.traces(5);
    let mut errors = String::new();
    let mut stderr = demo.child.stderr.take().unwrap();
    stderr.read_to_string(&mut errors).unwrap();
    let status = demo.child.wait().unwrap();
    assert_eq!(status.code(), Some(1), "{errors}");
    for part in [
        "step 2",
        "outside$ curl -s http://192.0.2.2:8080/who",
        "exit code 7",
    ] {
        assert!(errors.contains(part), "no {part:?} in {errors}");
    }
    traces.assert_gone();
}

/// A demo under way.
struct Demo {
    child: Child,
}

impl Demo {
    /// Starts one, with the programs of a directory in place of those that have their names.
    fn start(programs: Option<&Path>) -> Option<Self> {
        if !geteuid().is_root() {
            println!("skipped: network namespaces need root");
            return None;
        }
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories = programs.map(Path::to_owned).into_iter();
        let path = std::env::join_paths(directories.chain(std::env::split_paths(&path))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_xtask"))
            .arg("demo")
            .env("PATH", path)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(if programs.is_some() {
                Stdio::piped()
            } else {
                Stdio::inherit()
            })
            .process_group(0)
            .spawn()
            .unwrap();
        Some(Self { child })
    }

    fn pid(&self) -> Pid {
        Pid::from_raw(self.child.id().try_into().unwrap())
    }

    /// Reads the story up to a line that starts that way, and then whatever comes.
    fn read_until(&mut self, start: &str) {
        let mut lines = BufReader::new(self.child.stdout.take().unwrap()).lines();
        let found = lines.any(|line| line.unwrap().starts_with(start));
        assert!(found, "the demo ended before its chapter {start}");
        thread::spawn(move || lines.for_each(drop));
    }

    /// What there is of it once it has so many namespaces.
    fn traces(&self, namespaces: usize) -> Traces {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let traces = self.look();
            if traces.namespaces.len() >= namespaces {
                return traces;
            }
            assert!(Instant::now() < deadline, "{traces:#?}");
            thread::sleep(Duration::from_millis(10));
        }
    }

    fn look(&self) -> Traces {
        let all = Process::all();
        let mut family: HashSet<_> = [self.child.id()].into();
        // Generation by generation.
        loop {
            let children = all
                .iter()
                .filter(|process| family.contains(&process.parent));
            let added = children.map(|process| process.pid).collect::<HashSet<_>>();
            if added.is_subset(&family) {
                break;
            }
            family.extend(added);
        }
        let processes: Vec<_> = all
            .into_iter()
            .filter(|process| family.contains(&process.pid))
            .collect();
        let ours = namespaces(std::process::id());
        let theirs = processes.iter().flat_map(|process| namespaces(process.pid));
        let namespaces = theirs.filter(|it| !ours.contains(it)).collect();
        Traces {
            demo: self.child.id(),
            processes,
            namespaces,
        }
    }
}

impl Drop for Demo {
    fn drop(&mut self) {
        // A test that fails leaves it running.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What a demo is made of.
#[derive(Debug)]
struct Traces {
    demo: u32,
    processes: Vec<Process>,
    namespaces: HashSet<PathBuf>,
}

impl Traces {
    fn assert_gone(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            let left = self.left();
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "still there: {left:#?}");
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn left(&self) -> Vec<String> {
        let mut left = Vec::new();
        for process in Process::all() {
            if self.processes.iter().any(|known| known.is(&process)) {
                left.push(format!("{process:?}"));
            }
            let inside = namespaces(process.pid);
            let inside = inside.iter().filter(|it| self.namespaces.contains(*it));
            left.extend(inside.map(|namespace| format!("{process:?} in {namespace:?}")));
        }
        let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
        for mount in mounts.lines() {
            let mut words = mount.split(' ');
            let (Some(_), Some(directory), Some("cgroup2")) =
                (words.next(), words.next(), words.next())
            else {
                continue;
            };
            for entry in fs::read_dir(directory).unwrap().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                if name.starts_with(&format!("nucnet-lab-{}-", self.demo)) {
                    left.push(format!("{directory}/{name}"));
                }
            }
        }
        left
    }
}

/// A process.
#[derive(Debug)]
struct Process {
    pid: u32,
    parent: u32,
    started: u64,
}

impl Process {
    /// Whether it is the same, and not a later one of that number. Orphans change parents.
    fn is(&self, other: &Self) -> bool {
        (self.pid, self.started) == (other.pid, other.started)
    }

    fn all() -> Vec<Self> {
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter_map(Self::look).collect()
    }

    fn look(pid: u32) -> Option<Self> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The name, in parentheses, may contain anything. See proc_pid_stat(5).
        let fields: Vec<_> = stat.rsplit_once(')')?.1.split_whitespace().collect();
        if fields[0] == "Z" {
            return None;
        }
        Some(Self {
            pid,
            parent: fields[1].parse().ok()?,
            started: fields[19].parse().ok()?,
        })
    }
}

/// A process's namespaces of the kinds that a demo makes.
fn namespaces(pid: u32) -> Vec<PathBuf> {
    let links = ["net", "mnt"].map(|kind| fs::read_link(format!("/proc/{pid}/ns/{kind}")));
    links.into_iter().flatten().collect()
}
