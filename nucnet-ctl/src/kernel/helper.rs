//! Programs of the host that nucnet runs as root: which file is run, and how, is nobody else's to
//! say.
//!
//! A program is looked for in fixed places, never along `PATH`. Every symbolic link on the way to
//! it, the file itself and all directories must be root's, and writable by nobody else; the file is
//! judged once opened, and the opened file is run, so there is no moment between the two. The name
//! that it is called by stays (`argv[0]`), since one binary may be many programs. It gets an
//! environment of nucnet's, no shell, and a limit of time.

use std::{
    fmt,
    fs::{self, File},
    io::{self, Read, Write},
    os::{
        fd::AsRawFd,
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use nix::{
    libc,
    sys::signal::{Signal, killpg},
    unistd::Pid,
};

use super::fault::{self, Operation};

/// Where programs are looked for.
const PLACES: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/bin", "/bin"];

/// Symbolic links that may lead to a program, one after the other.
const MOST_LINKS: usize = 8;

/// What a program may print at most.
const MOST_OUTPUT: u64 = 256 << 20;

/// Why a file is not run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Distrust {
    /// Its owner is not root.
    Owner(u32),
    /// Others than root may write to it.
    Writable(u32),
    /// It is not a regular file, or not executable.
    NotAProgram,
    /// Too many symbolic links.
    Links,
}

impl fmt::Display for Distrust {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Owner(uid) => write!(f, "it belongs to user {uid}, not to root"),
            Self::Writable(mode) => write!(f, "others than root may write to it (mode {mode:o})"),
            Self::NotAProgram => f.write_str("it is no program"),
            Self::Links => f.write_str("it is behind too many symbolic links"),
        }
    }
}

/// Why a program did not do what it was to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is none of that name.
    #[error("there is no program {0} in /usr/sbin, /sbin, /usr/bin and /bin")]
    Missing(String),
    /// It is there, and cannot be trusted.
    #[error("{} is not run: {why}", path.display())]
    Distrusted {
        /// The file or directory at fault.
        path: PathBuf,
        /// Why.
        why: Distrust,
    },
    /// It cannot be opened, started or spoken to.
    #[error("cannot {action} {}", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// Which program.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// It said no.
    #[error("{command} failed ({status}): {stderr}")]
    Failed {
        /// The command line.
        command: String,
        /// How it ended.
        status: ExitStatus,
        /// What it said.
        stderr: String,
    },
    /// It took too long and was ended.
    #[error("{command} was ended after {} s: {stderr}", limit.as_secs())]
    TimedOut {
        /// The command line.
        command: String,
        /// The limit.
        limit: Duration,
        /// What it said until then.
        stderr: String,
    },
}

/// A program that may be run.
#[derive(Debug)]
pub struct Helper {
    name: String,
    path: PathBuf,
    file: File,
}

impl Helper {
    /// The program of that name. `None`: there is none.
    pub fn find(name: &str) -> Result<Option<Self>, Error> {
        Self::find_in(&PLACES.map(Path::new), name)
    }

    /// The same where it is needed.
    pub fn of(name: &str) -> Result<Self, Error> {
        Self::find(name)?.ok_or_else(|| Error::Missing(name.to_owned()))
    }

    fn find_in(places: &[&Path], name: &str) -> Result<Option<Self>, Error> {
        for place in places {
            let path = place.join(name);
            match fs::symlink_metadata(&path) {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(file_error(&path, "look at")(error)),
            }
            let (path, file) = follow(path)?;
            let name = name.to_owned();
            return Ok(Some(Self { name, path, file }));
        }
        Ok(None)
    }

    /// Runs it to its end. What it printed.
    pub fn run(&self, arguments: &[&str], input: &str, limit: Duration) -> Result<String, Error> {
        fault::before(Operation::File)
            .map_err(io::Error::from)
            .map_err(file_error(&self.path, "run"))?;
        // The descriptor is closed by the execution itself, after the file was found by it.
        let mut command = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()));
        command
            .arg0(&self.name)
            .args(arguments)
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0);
        let child = command.spawn().map_err(file_error(&self.path, "run"))?;
        let (status, stdout, stderr) =
            finish(child, input, limit).map_err(file_error(&self.path, "speak to"))?;
        let command = || format!("{} {}", self.name, arguments.join(" "));
        let stderr = stderr.trim().to_owned();
        match status {
            Some(status) if status.success() => Ok(stdout),
            Some(status) => Err(Error::Failed {
                command: command(),
                status,
                stderr,
            }),
            None => Err(Error::TimedOut {
                command: command(),
                limit,
                stderr,
            }),
        }
    }
}

/// Follows symbolic links, each in a directory that is only root's, to a program that is only
/// root's.
fn follow(mut path: PathBuf) -> Result<(PathBuf, File), Error> {
    for _ in 0..=MOST_LINKS {
        let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
            let why = Distrust::NotAProgram;
            return Err(Error::Distrusted { path, why });
        };
        let directory = directory
            .canonicalize()
            .map_err(file_error(directory, "look at"))?;
        for ancestor in directory.ancestors() {
            let found = fs::symlink_metadata(ancestor).map_err(file_error(ancestor, "look at"))?;
            trust(&found, ancestor)?;
        }
        let here = directory.join(name);
        let found = fs::symlink_metadata(&here).map_err(file_error(&here, "look at"))?;
        if found.is_symlink() {
            let target = fs::read_link(&here).map_err(file_error(&here, "read"))?;
            path = directory.join(target);
            continue;
        }
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC)
            .open(&here)
            .map_err(file_error(&here, "open"))?;
        let opened = file.metadata().map_err(file_error(&here, "look at"))?;
        trust(&opened, &here)?;
        if !opened.is_file() || opened.mode() & 0o111 == 0 {
            let why = Distrust::NotAProgram;
            return Err(Error::Distrusted { path: here, why });
        }
        return Ok((here, file));
    }
    let why = Distrust::Links;
    Err(Error::Distrusted { path, why })
}

/// Whether only root can change what is there.
fn trust(found: &fs::Metadata, path: &Path) -> Result<(), Error> {
    let why = if found.uid() != 0 {
        Distrust::Owner(found.uid())
    } else if found.mode() & 0o022 != 0 {
        Distrust::Writable(found.mode() & 0o7777)
    } else {
        return Ok(());
    };
    Err(Error::Distrusted {
        path: path.to_owned(),
        why,
    })
}

fn file_error<'a>(
    path: &'a Path,
    action: &'static str,
) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::File {
        action,
        path: path.to_owned(),
        source,
    }
}

/// Waits for a program to end, and ends it when it takes too long: then there is no status.
fn finish(
    mut child: Child,
    input: &str,
    limit: Duration,
) -> io::Result<(Option<ExitStatus>, String, String)> {
    let deadline = Instant::now() + limit;
    let (stdin, stdout, stderr) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    thread::scope(|scope| {
        scope.spawn(move || {
            if let Some(mut stdin) = stdin {
                // Whoever does not read all of it says why.
                let _ = stdin.write_all(input.as_bytes());
            }
        });
        let (done, ended) = mpsc::channel();
        let reader = |pipe: Option<Box<dyn Read + Send>>, done: mpsc::Sender<()>| {
            scope.spawn(move || {
                let mut bytes = Vec::new();
                if let Some(pipe) = pipe {
                    // What was read until then is what there is.
                    let _ = pipe.take(MOST_OUTPUT).read_to_end(&mut bytes);
                }
                // Nobody waits any more for one that was ended.
                let _ = done.send(());
                String::from_utf8_lossy(&bytes).into_owned()
            })
        };
        let stdout = reader(stdout.map(|pipe| Box::new(pipe) as _), done.clone());
        let stderr = reader(stderr.map(|pipe| Box::new(pipe) as _), done);
        let in_time = (0..2).all(|_| {
            let left = deadline.saturating_duration_since(Instant::now());
            ended.recv_timeout(left).is_ok()
        });
        if !in_time {
            // With what it has begun, which may hold its pipes open. It was not waited for yet, so
            // that its id is nobody else's.
            let group = Pid::from_raw(child.id().cast_signed());
            killpg(group, Signal::SIGKILL)?;
        }
        // Its pipes are closed, so it has ended or is about to.
        let status = child.wait()?;
        let text = |reader: thread::ScopedJoinHandle<'_, String>| reader.join().unwrap_or_default();
        Ok((in_time.then_some(status), text(stdout), text(stderr)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const LONG: Duration = Duration::from_secs(20);

    fn is_root() -> bool {
        let is_root = nix::unistd::geteuid().is_root();
        if !is_root {
            eprintln!("skipped: only root owns what root runs");
        }
        is_root
    }

    /// A directory that only root can change, up to the root: not `/tmp`.
    fn place() -> tempfile::TempDir {
        let place = tempfile::tempdir_in("/root").expect("a directory");
        fs::set_permissions(place.path(), fs::Permissions::from_mode(0o755)).expect("mode");
        place
    }

    fn shell_in(place: &Path, name: &str) -> PathBuf {
        let path = place.join(name);
        fs::copy("/bin/sh", &path).expect("a copy");
        path
    }

    fn distrust(place: &Path, name: &str) -> Distrust {
        match Helper::find_in(&[place], name) {
            Err(Error::Distrusted { why, .. }) => why,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_program_keeps_its_name_and_gets_a_fixed_environment() {
        if !is_root() {
            return;
        }
        let place = place();
        shell_in(place.path(), "real");
        symlink("real", place.path().join("applet")).unwrap();
        let helper = Helper::find_in(&[place.path()], "applet").unwrap().unwrap();
        let said = helper.run(&["-c", "echo $0; cat; env | sort"], "input\n", LONG);
        let said = said.unwrap();
        assert!(said.starts_with("applet\ninput\n"), "{said}");
        let names = said
            .lines()
            .skip(2)
            .map(|line| line.split('=').next().unwrap());
        let names: Vec<&str> = names
            .filter(|name| !["_", "PWD", "OLDPWD", "SHLVL"].contains(name))
            .collect();
        assert_eq!(names, ["LC_ALL", "PATH"]);
    }

    #[test]
    fn the_first_place_that_has_a_program_decides() {
        if !is_root() {
            return;
        }
        let (first, second) = (place(), place());
        let places = [first.path(), second.path()];
        let found = |name: &str| Helper::find_in(&places, name);
        shell_in(second.path(), "one");
        let one = found("one").unwrap().expect("a program");
        assert_eq!(one.path, second.path().join("one"));
        shell_in(first.path(), "both");
        shell_in(second.path(), "both");
        let both = found("both").unwrap().expect("a program");
        assert_eq!(both.path, first.path().join("both"));
        // Not another one in place of one that cannot be trusted.
        let path = first.path().join("both");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o757)).unwrap();
        let refused = found("both").unwrap_err().to_string();
        assert!(refused.contains(path.to_str().unwrap()), "{refused}");
        // Nor what a link leads to that leads nowhere.
        symlink("nowhere", first.path().join("one")).unwrap();
        assert!(matches!(found("one"), Err(Error::File { .. })));
    }

    #[test]
    fn what_others_can_change_is_not_run() {
        if !is_root() {
            return;
        }
        let place = place();
        let path = shell_in(place.path(), "writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o775)).unwrap();
        assert_eq!(
            distrust(place.path(), "writable"),
            Distrust::Writable(0o775)
        );
        let path = shell_in(place.path(), "foreign");
        std::os::unix::fs::chown(&path, Some(12_345), None).unwrap();
        assert_eq!(distrust(place.path(), "foreign"), Distrust::Owner(12_345));
        fs::create_dir(place.path().join("open")).unwrap();
        let open = place.path().join("open");
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).unwrap();
        shell_in(&open, "inside");
        assert_eq!(distrust(&open, "inside"), Distrust::Writable(0o777));
        // Nor what a link of root's leads to there.
        symlink("open/inside", place.path().join("link")).unwrap();
        assert_eq!(distrust(place.path(), "link"), Distrust::Writable(0o777));
        symlink("loop", place.path().join("loop")).unwrap();
        assert_eq!(distrust(place.path(), "loop"), Distrust::Links);
        fs::write(place.path().join("text"), "no program").unwrap();
        assert_eq!(distrust(place.path(), "text"), Distrust::NotAProgram);
        assert!(
            Helper::find_in(&[place.path()], "absent")
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn a_failure_says_what_the_program_said() {
        if !is_root() {
            return;
        }
        let helper = Helper::of("sh").unwrap();
        let error = helper.run(&["-c", "echo no such chain >&2; exit 3"], "", LONG);
        let error = error.unwrap_err().to_string();
        assert!(
            error.contains("sh -c") && error.contains("exit status: 3"),
            "{error}"
        );
        assert!(error.ends_with("no such chain"), "{error}");
    }

    #[test]
    fn one_that_does_not_end_is_ended() {
        if !is_root() {
            return;
        }
        let helper = Helper::of("sleep").unwrap();
        let start = Instant::now();
        let error = helper
            .run(&["600"], "", Duration::from_millis(50))
            .unwrap_err();
        assert!(matches!(error, Error::TimedOut { .. }), "{error}");
        assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    }

    #[test]
    fn what_it_has_begun_is_ended_with_it() {
        if !is_root() {
            return;
        }
        let start = Instant::now();
        let began = Helper::of("sh").unwrap().run(
            &["-c", "sleep 600 & wait"],
            "",
            Duration::from_millis(50),
        );
        assert!(matches!(began, Err(Error::TimedOut { .. })), "{began:?}");
        assert!(start.elapsed() < LONG, "{:?}", start.elapsed());
    }
}
