//! Users and groups of the host, by name or number.

use nix::unistd::{Group, User};

use crate::model::{Invalid, Problem};

/// The number of a user.
///
/// # Errors
/// There is no such user.
pub fn user(field: &'static str, text: &str) -> Result<u32, Invalid> {
    let named = || User::from_name(text).ok().flatten();
    let number = text.parse().ok();
    number
        .or_else(|| named().map(|user| user.uid.as_raw()))
        .ok_or_else(|| Invalid::new(field, text, Problem::User))
}

/// The number of a group.
///
/// # Errors
/// There is no such group.
pub fn group(field: &'static str, text: &str) -> Result<u32, Invalid> {
    let named = || Group::from_name(text).ok().flatten();
    let number = text.parse().ok();
    number
        .or_else(|| named().map(|group| group.gid.as_raw()))
        .ok_or_else(|| Invalid::new(field, text, Problem::Group))
}
