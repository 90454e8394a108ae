//! The state directory: how it is made, locked and removed.

use super::{Error, Store, Unsafe};
use crate::kernel::{
    directory::{Directory, FileError},
    fault::{self, Operation},
};
use nix::{
    errno::Errno,
    fcntl::{Flock, FlockArg, OFlag, openat},
    sys::stat::{Mode, fstat},
};
use std::{
    fs::File,
    io::{self, Read, Write},
    ops::Deref,
    path::Path,
    sync::mpsc,
    thread,
    time::Duration,
};

pub(super) const LOCK: &str = "lock";

/// The state of a host, for changing: while this exists nobody else does.
#[derive(Debug)]
pub struct Locked {
    store: Store,
    _lock: Flock<File>,
}

impl Deref for Locked {
    type Target = Store;

    fn deref(&self) -> &Store {
        &self.store
    }
}

impl Locked {
    /// Locks the state in a directory, which is made if there is none; waits for others, but
    /// not for longer than `patience`.
    pub fn open(path: &Path, patience: Duration) -> Result<Self, Error> {
        loop {
            let is_new = make(path)?;
            let locked = match Store::open(path)? {
                Some(store) => Self::lock(store, patience),
                None => Ok(None),
            };
            if let Some(locked) = locked.inspect_err(|_| {
                // The error that led here is the one to report; nor does it go if it is in use.
                if is_new {
                    let _ = std::fs::remove_dir(path);
                }
            })? {
                return Ok(locked);
            }
            // Removed meanwhile.
        }
    }

    /// The same for a directory that exists; none if it does not.
    pub fn open_existing(path: &Path, patience: Duration) -> Result<Option<Self>, Error> {
        while let Some(store) = Store::open(path)? {
            if let Some(locked) = Self::lock(store, patience)? {
                return Ok(Some(locked));
            }
        }
        Ok(None)
    }

    /// None: the directory was removed while this waited.
    fn lock(store: Store, patience: Duration) -> Result<Option<Self>, Error> {
        let path = store.root.path().join(LOCK);
        let failed = |action: &'static str| {
            let path = path.clone();
            move |errno: Errno| {
                Error::File(FileError {
                    action,
                    path,
                    source: errno.into(),
                })
            }
        };
        let flags = OFlag::O_RDWR | OFlag::O_CREAT | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
        let mode = Mode::S_IRUSR | Mode::S_IWUSR;
        let opened =
            fault::before(Operation::File).and_then(|()| openat(&store.root, LOCK, flags, mode));
        let file: File = match opened {
            Ok(fd) => fd.into(),
            Err(Errno::ENOENT) => return Ok(None),
            Err(errno) => return Err(failed("open")(errno)),
        };
        let mut lock = match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => lock,
            Err((file, Errno::EWOULDBLOCK)) => match wait(file, patience) {
                Ok(Some(lock)) => lock,
                Ok(None) => {
                    return Err(Error::Locked {
                        path: store.root.path().to_owned(),
                        holder: holder(&store.root),
                        waited: patience,
                    });
                }
                Err(errno) => return Err(failed("lock")(errno)),
            },
            Err((_, errno)) => return Err(failed("lock")(errno)),
        };
        let held = fstat(&*lock).map_err(failed("examine"))?;
        match store.root.stat_of(LOCK)? {
            Some(there) if (there.st_dev, there.st_ino) == (held.st_dev, held.st_ino) => {}
            _ => return Ok(None),
        }
        // Without, it is a lock all the same.
        if let Err(error) = sign(&mut lock) {
            tracing::warn!(
                file = %path.display(),
                error = &error as &dyn std::error::Error,
                "cannot write who holds the lock"
            );
        }
        Ok(Some(Self { store, _lock: lock }))
    }

    /// Clears all state, but for the lock.
    pub fn clear(&self) -> Result<(), Error> {
        for name in self.root.names()? {
            if name == LOCK {
                continue;
            }
            match self.root.stat_of(&name)? {
                Some(stat) if stat.st_mode & nix::libc::S_IFMT == nix::libc::S_IFDIR => {
                    self.root.remove_tree(&name)?;
                }
                Some(_) => drop(self.root.remove(&name)?),
                None => {}
            }
        }
        Ok(())
    }

    /// Removes the directory with all that is in it.
    pub fn remove_all(self) -> Result<(), Error> {
        self.clear()?;
        let path = self.root.path().to_owned();
        // Whoever waits for the lock finds it gone, and begins anew.
        self.root.remove(LOCK)?;
        let removed = fault::before(Operation::File)
            .map_err(io::Error::from)
            .and_then(|()| std::fs::remove_dir(&path));
        match removed {
            Ok(()) => Ok(()),
            Err(source) => match source.kind() {
                // Somebody who found the lock gone has begun anew in the same directory.
                io::ErrorKind::NotFound | io::ErrorKind::DirectoryNotEmpty => Ok(()),
                _ => Err(FileError {
                    action: "remove",
                    path,
                    source,
                }
                .into()),
            },
        }
    }
}

/// Makes the directory; its parents, if need be, as everybody's are made. `false`: it was there.
fn make(path: &Path) -> Result<bool, Error> {
    use std::os::unix::fs::DirBuilderExt;
    let failed = |source| {
        Error::File(FileError {
            action: "create",
            path: path.to_owned(),
            source,
        })
    };
    if !path.is_absolute() {
        return Err(Error::Unsafe {
            path: path.to_owned(),
            problem: Unsafe::Relative,
        });
    }
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    let made = fault::before(Operation::File)
        .map_err(io::Error::from)
        .and_then(|()| std::fs::DirBuilder::new().mode(0o700).create(path));
    match made {
        Ok(()) => Ok(true),
        Err(source) if source.kind() == io::ErrorKind::AlreadyExists => Ok(false),
        Err(source) => Err(failed(source)),
    }
}

/// Waits for a lock in a thread of its own: the kernel hands locks on in order, but knows no
/// time limit. None: it took too long; the thread gives the lock up as soon as it gets it.
fn wait(file: File, patience: Duration) -> Result<Option<Flock<File>>, Errno> {
    let (sender, receiver) = mpsc::sync_channel(0);
    let waiting = thread::Builder::new()
        .name("lock".to_owned())
        .spawn(move || {
            let mut file = file;
            let result = loop {
                match Flock::lock(file, FlockArg::LockExclusive) {
                    Err((again, Errno::EINTR)) => file = again,
                    Err((_, errno)) => break Err(errno),
                    Ok(lock) => break Ok(lock),
                }
            };
            // Nobody may be waiting any more.
            let _ = sender.send(result);
        });
    match waiting {
        Ok(_) => receiver.recv_timeout(patience).ok().transpose(),
        Err(_) => Err(Errno::EAGAIN),
    }
}

/// Writes who holds the lock into it.
fn sign(lock: &mut Flock<File>) -> io::Result<()> {
    let command = std::env::args_os().next().unwrap_or_default();
    let command = Path::new(&command)
        .file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    let verb: Vec<String> = std::env::args().skip(1).take(4).collect();
    fault::before(Operation::File)?;
    lock.set_len(0)?;
    write!(
        &mut **lock,
        "{} {command} {}",
        std::process::id(),
        verb.join(" ")
    )
}

fn holder(root: &Directory) -> String {
    let mut text = String::new();
    if let Ok(Some(bytes)) = root.read(LOCK) {
        // A reader of a file that is being written; whatever it is, it is only shown.
        let _ = bytes.take(200).read_to_string(&mut text);
    }
    match text.trim().split_once(' ') {
        Some((pid, command)) => format!("process {pid} ({})", command.escape_debug()),
        None => "an unknown process".to_owned(),
    }
}
