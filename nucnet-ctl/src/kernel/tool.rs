//! Programs that the host has and nucnet asks something: firewall tools. Each is found where only
//! root puts programs, checked, run by the descriptor that was checked, and neither waited for
//! nor listened to without end.

use std::{
    fs::{self, File, Metadata},
    io::{self, Read},
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::{
            fs::{MetadataExt, OpenOptionsExt},
            process::CommandExt,
        },
    },
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use nix::{
    errno::Errno,
    libc,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::signal::{Signal, killpg},
    unistd::{Pid, geteuid},
};

use super::process::{Life, Process};

/// Where tools are. `PATH` is the choice of whoever calls as root, and not always his own.
const DIRECTORIES: [&str; 5] = [
    "/usr/sbin",
    "/sbin",
    "/usr/bin",
    "/bin",
    "/run/current-system/sw/bin",
];

/// Most that a tool may say, in bytes: some hundred thousand rules.
const MOST_OUTPUT: usize = 64 << 20;

/// Why a tool was not run, or did not do what it was told.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It cannot be looked at.
    #[error("cannot read {}", path.display())]
    Unreadable {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// Others than root decide what it is.
    #[error("{} is not run: {problem}", path.display())]
    Unsafe {
        /// The file, or a directory that it is in.
        path: PathBuf,
        /// What is wrong with it.
        problem: Problem,
    },
    /// It could not be begun, or not be listened to.
    #[error("cannot run {command}")]
    Run {
        /// With its arguments.
        command: String,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It said that it failed.
    #[error("{command} failed: {said}")]
    Failed {
        /// With its arguments.
        command: String,
        /// Its last words.
        said: String,
    },
    /// It took too long, and was killed.
    #[error("{command} has not ended within {} s", limit.as_secs_f32())]
    TooSlow {
        /// With its arguments.
        command: String,
        /// How long it was given.
        limit: Duration,
    },
    /// It said too much, and was killed.
    #[error("{command} says more than {MOST_OUTPUT} bytes")]
    TooMuch {
        /// With its arguments.
        command: String,
    },
}

/// What is wrong with a program's file, or with a directory that it is in.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Problem {
    /// Not root's, nor the caller's.
    #[error("it belongs to user {0}")]
    Owner(u32),
    /// Its group, or everybody, may change it.
    #[error("others may write to it")]
    Writable,
    /// No program.
    #[error("it is no program")]
    NoProgram,
}

/// A program that was found and checked.
#[derive(Debug)]
pub struct Tool {
    name: String,
    file: File,
}

impl Tool {
    /// Looks for a tool. None: it is not installed.
    ///
    /// # Errors
    /// [`Error::Unsafe`], and [`Error::Unreadable`].
    pub fn find(name: &str) -> Result<Option<Self>, Error> {
        for directory in DIRECTORIES {
            if let Some(tool) = Self::in_directory(Path::new(directory), name)? {
                return Ok(Some(tool));
            }
        }
        Ok(None)
    }

    fn in_directory(directory: &Path, name: &str) -> Result<Option<Self>, Error> {
        // Links are followed here, once: what is behind one may be a program of many names.
        let path = match fs::canonicalize(directory.join(name)) {
            Ok(path) => path,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => {
                let path = directory.join(name);
                return Err(Error::Unreadable { path, source });
            }
        };
        let unreadable = |path: &Path| {
            let path = path.to_owned();
            move |source| Error::Unreadable { path, source }
        };
        for directory in path.ancestors().skip(1) {
            let found = fs::symlink_metadata(directory).map_err(unreadable(directory))?;
            check(directory, &found, Entry::Directory)?;
        }
        let file = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_NOFOLLOW)
            .open(&path)
            .map_err(unreadable(&path))?;
        let found = file.metadata().map_err(unreadable(&path))?;
        check(&path, &found, Entry::Program)?;
        Ok(Some(Self {
            name: name.to_owned(),
            file,
        }))
    }

    /// Runs the tool with these arguments: nothing to read, an environment of nucnet's, no longer
    /// than the limit. Returns what it says.
    ///
    /// # Errors
    /// All but [`Error::Unsafe`] and [`Error::Unreadable`].
    pub fn run(&self, arguments: &[&str], limit: Duration) -> Result<String, Error> {
        let deadline = Instant::now() + limit;
        let command = || [&[self.name.as_str()], arguments].concat().join(" ");
        let failed = |source| Error::Run {
            command: command(),
            source,
        };
        // By the descriptor, so that what runs is what was checked; by the name that it was
        // found by, which says which of a program's many parts is meant.
        let mut child = Command::new(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
            .arg0(&self.name)
            .args(arguments)
            .env_clear()
            .env("PATH", DIRECTORIES.join(":"))
            .env("LC_ALL", "C")
            .current_dir("/")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .spawn()
            .map_err(failed)?;
        let heard = listen(&mut child, deadline);
        if !matches!(heard, Ok(Heard::All { .. })) {
            // With whatever it has begun; as a child that was not waited for, it has its id still.
            let group = Pid::from_raw(child.id().cast_signed());
            let _ = killpg(group, Signal::SIGKILL);
        }
        let status = child.wait().map_err(failed)?;
        match heard.map_err(failed)? {
            Heard::All { output, errors } if status.success() => {
                if !errors.is_empty() {
                    tracing::debug!(tool = self.name, "{}", last_words(&errors));
                }
                Ok(String::from_utf8_lossy(&output).into_owned())
            }
            Heard::All { errors, .. } => Err(Error::Failed {
                command: command(),
                said: match errors.is_empty() {
                    true => status.to_string(),
                    false => last_words(&errors),
                },
            }),
            Heard::TooMuch => Err(Error::TooMuch { command: command() }),
            Heard::TooSlow => Err(Error::TooSlow {
                command: command(),
                limit,
            }),
        }
    }
}

/// The end of what somebody else wrote, for people to read.
fn last_words(errors: &[u8]) -> String {
    const MOST: usize = 400;
    let text = String::from_utf8_lossy(&errors[errors.len().saturating_sub(MOST)..]);
    text.trim().escape_debug().to_string()
}

/// What is looked at.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Entry {
    Directory,
    Program,
}

/// Whether nobody but root, or the caller, can put something else there.
fn check(path: &Path, found: &Metadata, entry: Entry) -> Result<(), Error> {
    let refused = |problem| Error::Unsafe {
        path: path.to_owned(),
        problem,
    };
    if found.uid() != 0 && found.uid() != geteuid().as_raw() {
        return Err(refused(Problem::Owner(found.uid())));
    }
    // In a sticky directory only a file's owner can put another in its place.
    let is_sticky = entry == Entry::Directory && found.mode() & 0o1000 != 0;
    if found.mode() & 0o022 != 0 && !is_sticky {
        return Err(refused(Problem::Writable));
    }
    if entry == Entry::Program && !(found.is_file() && found.mode() & 0o111 != 0) {
        return Err(refused(Problem::NoProgram));
    }
    Ok(())
}

/// What was heard of a tool until it ended.
enum Heard {
    All { output: Vec<u8>, errors: Vec<u8> },
    TooMuch,
    TooSlow,
}

/// One of the two ways in which a tool speaks.
struct Stream {
    /// None: it is at its end.
    pipe: Option<File>,
    heard: Vec<u8>,
}

impl Stream {
    fn new(pipe: Option<OwnedFd>) -> Self {
        Self {
            pipe: pipe.map(File::from),
            heard: Vec::new(),
        }
    }

    /// Takes what there is.
    fn hear(&mut self) -> io::Result<()> {
        let mut some = [0; 1 << 16];
        let Some(pipe) = &mut self.pipe else {
            return Ok(());
        };
        match pipe.read(&mut some) {
            Ok(0) => self.pipe = None,
            Ok(count) => self.heard.extend_from_slice(&some[..count]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }
}

/// Listens until the tool has ended, but not without end.
fn listen(child: &mut Child, deadline: Instant) -> io::Result<Heard> {
    let left = || deadline.saturating_duration_since(Instant::now());
    let process = Process::open(child.id()).map_err(io::Error::other)?;
    let mut streams = [
        Stream::new(child.stdout.take().map(OwnedFd::from)),
        Stream::new(child.stderr.take().map(OwnedFd::from)),
    ];
    while streams.iter().any(|stream| stream.pipe.is_some()) {
        let pipes = streams.iter().filter_map(|stream| stream.pipe.as_ref());
        let mut fds: Vec<PollFd<'_>> = pipes
            .map(|pipe| PollFd::new(pipe.as_fd(), PollFlags::POLLIN))
            .collect();
        let timeout = PollTimeout::try_from(left()).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(0) => return Ok(Heard::TooSlow),
            Err(errno) if errno != Errno::EINTR => return Err(errno.into()),
            _ => {}
        }
        let is_ready: Vec<bool> = fds.iter().map(|fd| fd.any() == Some(true)).collect();
        let open = streams.iter_mut().filter(|stream| stream.pipe.is_some());
        for (stream, _) in open.zip(is_ready).filter(|(_, is_ready)| *is_ready) {
            stream.hear()?;
        }
        if streams
            .iter()
            .any(|stream| stream.heard.len() > MOST_OUTPUT)
        {
            return Ok(Heard::TooMuch);
        }
    }
    if process.life_within(left()).map_err(io::Error::other)? == Life::Running {
        return Ok(Heard::TooSlow);
    }
    let [output, errors] = streams.map(|stream| stream.heard);
    Ok(Heard::All { output, errors })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const LONG: Duration = Duration::from_secs(60);

    fn shell() -> Tool {
        Tool::find("sh").unwrap().expect("a shell")
    }

    #[test]
    fn a_tool_says_what_it_says_and_knows_its_name_and_little_else() {
        let said = shell().run(&["-c", "echo $0; cat; env | sort | grep -v ^PWD"], LONG);
        let path = DIRECTORIES.join(":");
        assert_eq!(said.unwrap(), format!("sh\nLC_ALL=C\nPATH={path}\n"));
    }

    #[test]
    fn what_is_not_installed_is_no_error() {
        assert!(Tool::find("no-such-tool").unwrap().is_none());
    }

    #[test]
    fn a_failure_names_arguments_and_last_words() {
        let failed = shell().run(&["-c", "echo out; echo no >&2; exit 3"], LONG);
        let text = failed.unwrap_err().to_string();
        assert_eq!(text, "sh -c echo out; echo no >&2; exit 3 failed: no");
        let failed = shell().run(&["-c", "exit 3"], LONG);
        let text = failed.unwrap_err().to_string();
        assert_eq!(text, "sh -c exit 3 failed: exit status: 3");
    }

    /// What it began holds its output open.
    #[test]
    fn a_tool_that_does_not_end_is_killed_with_all_that_it_began() {
        let directory = tempfile::tempdir().unwrap();
        let file = directory.path().join("pid");
        let script = format!("sleep 1000 & echo $! >{}; wait", file.display());
        let start = Instant::now();
        let limit = Duration::from_millis(300);
        let slow = shell().run(&["-c", &script], limit);
        assert!(matches!(slow, Err(Error::TooSlow { .. })), "{slow:?}");
        assert!(start.elapsed() < LONG);
        let pid: u32 = fs::read_to_string(file).unwrap().trim().parse().unwrap();
        let life = match Process::open(pid) {
            Ok(process) => process.life_within(LONG).unwrap(),
            Err(_) => Life::Exited,
        };
        assert_eq!(life, Life::Exited);
    }

    #[test]
    fn a_tool_that_talks_without_end_is_killed() {
        let endless = shell().run(&["-c", "yes"], LONG);
        assert!(matches!(endless, Err(Error::TooMuch { .. })));
    }

    #[test]
    fn what_others_could_have_put_there_is_not_run() {
        let place = tempfile::tempdir_in("/run").or_else(|_| tempfile::tempdir());
        let place = place.unwrap();
        let file = place.path().join("true");
        let real = fs::canonicalize("/bin/true").unwrap();
        fs::copy(real, &file).unwrap();
        let mode = |path: &Path, mode| {
            fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        let found = || Tool::in_directory(place.path(), "true");
        let problem = || match found() {
            Err(Error::Unsafe { problem, .. }) => problem,
            found => panic!("{found:?}"),
        };
        mode(&file, 0o755);
        assert_eq!(found().unwrap().unwrap().run(&[], LONG).unwrap(), "");
        mode(&file, 0o775);
        assert_eq!(problem(), Problem::Writable);
        mode(&file, 0o644);
        assert_eq!(problem(), Problem::NoProgram);
        mode(&file, 0o755);
        mode(place.path(), 0o777);
        assert_eq!(problem(), Problem::Writable);
        mode(place.path(), 0o700);
        if geteuid().is_root() {
            std::os::unix::fs::chown(&file, Some(65_534), None).unwrap();
            assert_eq!(problem(), Problem::Owner(65_534));
            fs::remove_file(&file).unwrap();
            // What is behind a link counts, and where that is.
            let elsewhere = place.path().join("elsewhere");
            fs::create_dir(&elsewhere).unwrap();
            fs::copy("/bin/true", elsewhere.join("true")).unwrap();
            std::os::unix::fs::chown(&elsewhere, Some(65_534), None).unwrap();
            symlink(elsewhere.join("true"), &file).unwrap();
            assert_eq!(problem(), Problem::Owner(65_534));
        }
    }

    #[test]
    fn what_runs_is_what_was_checked() {
        let place = tempfile::tempdir().unwrap();
        let file = place.path().join("tool");
        fs::copy("/bin/true", &file).unwrap();
        fs::set_permissions(place.path(), PermissionsExt::from_mode(0o700)).unwrap();
        let tool = Tool::in_directory(place.path(), "tool").unwrap().unwrap();
        fs::remove_file(&file).unwrap();
        fs::copy("/bin/false", &file).unwrap();
        tool.run(&[], LONG).unwrap();
    }
}
