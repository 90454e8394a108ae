//! Users and groups of the host, by name or number.

use nix::unistd::{Group, User};

/// The number of a user; none: there is no such user.
pub fn user(text: &str) -> Option<u32> {
    // Of a name that nobody has, some databases make an error (getpwnam(3)).
    let named = || User::from_name(text).ok().flatten();
    let number = text.parse().ok();
    number.or_else(|| named().map(|user| user.uid.as_raw()))
}

/// The number of a group; none: there is no such group.
pub fn group(text: &str) -> Option<u32> {
    let named = || Group::from_name(text).ok().flatten();
    let number = text.parse().ok();
    number.or_else(|| named().map(|group| group.gid.as_raw()))
}
