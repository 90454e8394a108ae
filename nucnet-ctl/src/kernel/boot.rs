//! Which boot of the machine this is.

use super::FileError;
use std::path::Path;

/// `/proc/sys/kernel/random/boot_id`: another after every boot.
pub fn id() -> Result<String, FileError> {
    let path = Path::new("/proc/sys/kernel/random/boot_id");
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(text.trim().to_owned()),
        Err(source) => Err(FileError {
            action: "read",
            path: path.to_owned(),
            source,
        }),
    }
}
