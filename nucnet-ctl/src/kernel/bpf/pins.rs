//! The directory of pins.
//!
//! ```text
//! BPFFS/           0700, on a BPF filesystem
//!   version        symbolic link to nothing: its text is ABI version and hash of the object
//!   maps/NAME      the maps
//!   progs/NAME     the programs
//!   links/PROGRAM@INTERFACE, links/PROGRAM
//!                  what is attached: a pinned link, or (where the kernel has no TCX) a symbolic
//!                  link to nothing whose text describes the filter
//! ```
//!
//! A BPF filesystem holds no files with contents, and no name with a dot; a symbolic link is
//! what it has for a few bytes of text, and is made and exchanged atomically. `version` is made
//! last and removed first: without it, the rest is the remains of a crash. (Building aside and
//! renaming the whole, as tubular does, would leave such remains under a name that nobody looks
//! for, and cannot be done where the directory is a mount point.)

use std::{
    fmt, fs,
    fs::File,
    io,
    os::unix::fs::{DirBuilderExt, MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
};

use nix::{
    fcntl::{Flock, FlockArg},
    sys::statfs::{BPF_FS_MAGIC, statfs},
    unistd::geteuid,
};
use nucnet_common::abi;

use crate::kernel::fault::{self, Operation};

use super::{
    error::{BpfError, DirectoryProblem},
    object::OBJECT_HASH,
};

/// Paths of pins.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Pins {
    root: PathBuf,
}

/// What `version` says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Version {
    pub(super) abi: u32,
    pub(super) object: String,
}

impl Version {
    pub(super) fn ours() -> Self {
        Self {
            abi: abi::VERSION,
            object: OBJECT_HASH.into(),
        }
    }

    fn parse(text: &str) -> Option<Self> {
        let (abi, object) = text.strip_prefix("abi-")?.split_once(":sha256-")?;
        Some(Self {
            abi: abi.parse().ok()?,
            object: object.into(),
        })
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "abi-{}:sha256-{}", self.abi, self.object)
    }
}

/// Excludes others from changing the directory of pins, as long as it lives.
pub(super) struct Lock(#[expect(dead_code, reason = "held for its drop")] Flock<File>);

impl Pins {
    /// The pins in a directory that may or may not exist.
    pub(super) fn at(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// Makes the directory, if only its parent exists, and checks that nobody else can put
    /// objects of his own in.
    pub(super) fn prepare(root: &Path) -> Result<Self, BpfError> {
        let path = || root.to_path_buf();
        let problem = |problem| BpfError::UnusableDirectory {
            path: path(),
            problem,
        };
        if !root.is_absolute() {
            return Err(problem(DirectoryProblem::Relative));
        }
        let in_bpffs = root.parent().is_some_and(is_bpffs);
        // The kernel would only say that it is not permitted.
        if in_bpffs
            && root
                .file_name()
                .is_some_and(|name| name.to_string_lossy().contains('.'))
        {
            return Err(problem(DirectoryProblem::Dot));
        }
        let found = match fs::symlink_metadata(root) {
            Ok(found) => found,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                if !in_bpffs {
                    return Err(BpfError::NotBpffs { path: path() });
                }
                let made =
                    before_change().and_then(|()| fs::DirBuilder::new().mode(0o700).create(root));
                match made {
                    Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                        return Err(file_error(root, "create")(error));
                    }
                    _ => fs::symlink_metadata(root).map_err(file_error(root, "read"))?,
                }
            }
            Err(error) => return Err(file_error(root, "read")(error)),
        };
        if !found.is_dir() {
            return Err(problem(DirectoryProblem::NotADirectory));
        }
        if !is_bpffs(root) {
            return Err(BpfError::NotBpffs { path: path() });
        }
        let own = geteuid().as_raw();
        // Root may, and what he lets this user do shows later.
        if found.uid() != own && found.uid() != 0 {
            return Err(problem(DirectoryProblem::Owner(found.uid())));
        }
        if found.uid() == own && found.mode() & 0o777 != 0o700 {
            before_change()
                .and_then(|()| fs::set_permissions(root, fs::Permissions::from_mode(0o700)))
                .map_err(file_error(root, "change the mode of"))?;
        }
        Ok(Self::at(root))
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn maps(&self) -> PathBuf {
        self.root.join("maps")
    }

    pub(super) fn map(&self, name: &str) -> PathBuf {
        self.maps().join(name)
    }

    pub(super) fn programs(&self) -> PathBuf {
        self.root.join("progs")
    }

    pub(super) fn program(&self, name: &str) -> PathBuf {
        self.programs().join(name)
    }

    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    fn version_path(&self) -> PathBuf {
        self.root.join("version")
    }

    pub(super) fn lock(&self) -> Result<Lock, BpfError> {
        let directory = File::open(&self.root).map_err(file_error(&self.root, "open"))?;
        Flock::lock(directory, FlockArg::LockExclusive)
            .map(Lock)
            .map_err(|(_, errno)| file_error(&self.root, "lock")(errno.into()))
    }

    /// Version of what is pinned. `None`: nothing is, or not all of it.
    pub(super) fn version(&self) -> Result<Option<Version>, BpfError> {
        let path = self.version_path();
        match fs::read_link(&path) {
            Ok(text) => {
                let text = text.to_string_lossy();
                match Version::parse(&text) {
                    Some(version) => Ok(Some(version)),
                    None => Err(BpfError::OtherAbi {
                        path: self.root.clone(),
                        found: format!("the unknown version {text:?}"),
                        wanted: abi::VERSION,
                    }),
                }
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(file_error(&path, "read")(error)),
        }
    }

    /// Says that all is pinned, and of which version.
    pub(super) fn set_version(&self, version: &Version) -> Result<(), BpfError> {
        replace_text(&self.version_path(), &version.to_string())
    }

    /// Says that what is pinned is not to be used.
    pub(super) fn clear_version(&self) -> Result<(), BpfError> {
        remove(&aside(&self.version_path()))?;
        remove(&self.version_path())
    }

    pub(super) fn make_directories(&self) -> Result<(), BpfError> {
        for directory in [self.maps(), self.programs(), self.links()] {
            before_change()
                .and_then(|()| fs::DirBuilder::new().mode(0o700).create(&directory))
                .map_err(file_error(&directory, "create"))?;
        }
        Ok(())
    }
}

/// Whether a directory for pins, which may still be to be made, is on a BPF filesystem.
pub fn is_place_for_pins(root: &Path) -> bool {
    is_bpffs(root) || !root.exists() && root.parent().is_some_and(is_bpffs)
}

/// Whether a path is on a BPF filesystem.
fn is_bpffs(path: &Path) -> bool {
    statfs(path).is_ok_and(|found| found.filesystem_type() == BPF_FS_MAGIC)
}

/// Names in a directory; none if it does not exist.
pub(super) fn names(directory: &Path) -> Result<Vec<String>, BpfError> {
    let entries = match fs::read_dir(directory) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(file_error(directory, "read")(error)),
    };
    let mut names = entries
        .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
        .collect::<Result<Vec<_>, _>>()
        .map_err(file_error(directory, "read"))?;
    names.sort();
    Ok(names)
}

/// Removes a pin or a symbolic link; one that is not there is fine.
pub(super) fn remove(path: &Path) -> Result<(), BpfError> {
    match before_change().and_then(|()| fs::remove_file(path)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            Err(file_error(path, "remove")(error))
        }
        _ => Ok(()),
    }
}

/// Renames a pin or a symbolic link, over any of the other name.
pub(super) fn rename(from: &Path, to: &Path) -> io::Result<()> {
    before_change().and_then(|()| fs::rename(from, to))
}

/// Removes an empty directory.
pub(super) fn remove_directory(path: &Path) -> io::Result<()> {
    before_change().and_then(|()| fs::remove_dir(path))
}

/// Called before every change under the directory of pins.
pub(super) fn before_change() -> io::Result<()> {
    Ok(fault::before(Operation::File)?)
}

/// Makes a symbolic link to nothing with that text, or exchanges the one that is there.
pub(super) fn replace_text(path: &Path, text: &str) -> Result<(), BpfError> {
    let new = aside(path);
    remove(&new)?;
    before_change()
        .and_then(|()| symlink(text, &new))
        .map_err(file_error(&new, "create"))?;
    rename(&new, path).map_err(|error| {
        // The error that led here is the one to report.
        let _ = remove(&new);
        file_error(path, "replace")(error)
    })
}

/// Where a new pin is made before it takes the place of an old one. No name of nucnet's has a
/// `+` in it, so that remains of a crash are told from the rest.
pub(super) fn aside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push("+");
    name.into()
}

pub(super) fn file_error(
    path: &Path,
    action: &'static str,
) -> impl FnOnce(io::Error) -> BpfError + use<> {
    let path = path.to_path_buf();
    move |source| BpfError::File {
        path,
        action,
        source,
    }
}
