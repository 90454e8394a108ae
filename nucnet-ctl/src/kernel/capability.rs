//! What this process must be allowed: the one list, what is missing of it, and how to do without
//! the rest.
//!
//! The list was found by taking away one capability at a time; tests hold it. Since
//! `CAP_SYS_ADMIN` is on it, which stands for the two that Linux 5.8 split off, those two are
//! never missing alone.

use nix::unistd::{getegid, geteuid, getgid, getuid};
use rustix::thread::{
    CapabilitySet, capabilities, remove_capability_from_bounding_set, set_capabilities,
};
use std::{fmt, fs, io};

/// What is needed, by the kernel's numbers (include/uapi/linux/capability.h).
pub const NEEDED: [Capability; 6] = [
    Capability {
        number: 1,
        name: "CAP_DAC_OVERRIDE",
        always: false,
        purpose: "`--netns` and `--rootfs` in directories that only another user may enter",
    },
    Capability {
        number: 12,
        name: "CAP_NET_ADMIN",
        always: true,
        purpose: "interfaces, addresses, routes, sysctls and programs on interfaces",
    },
    Capability {
        number: 19,
        name: "CAP_SYS_PTRACE",
        always: false,
        purpose: "`attach --pid` of a process of another user, or with more capabilities",
    },
    Capability {
        number: 21,
        name: "CAP_SYS_ADMIN",
        always: true,
        purpose: "to enter network namespaces of containers, to mount resolv.conf, to time programs",
    },
    Capability {
        number: 38,
        name: "CAP_PERFMON",
        always: true,
        purpose: "programs: the verifier takes these from nobody without",
    },
    Capability {
        number: 39,
        name: "CAP_BPF",
        always: true,
        purpose: "programs and maps",
    },
];

/// What is not needed, but kept: `CAP_NET_BIND_SERVICE`, for without it whether a port below 1024
/// is free has to be read from the kernel's list of sockets, `CAP_NET_RAW`, for iptables-legacy asks
/// about its tables by a raw socket, and `CAP_SYS_RESOURCE`, for before Linux 5.11 the memory of maps
/// counts as locked.
const USEFUL: [u32; 3] = [10, 13, 24];

/// `CAP_SYS_ADMIN`, which stands for the two that Linux 5.8 split off.
const SYS_ADMIN: u32 = 21;

/// One right of a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capability {
    /// The kernel's number.
    pub number: u32,
    /// Its name.
    pub name: &'static str,
    /// Whether nothing works without.
    pub always: bool,
    /// What nucnet needs it for.
    pub purpose: &'static str,
}

/// What a process lacks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Lacks {
    /// Capabilities without which nothing works.
    pub capabilities: Vec<Capability>,
    /// Capabilities without which something does not.
    pub wanting: Vec<Capability>,
    /// It is in a user namespace: its capabilities count nothing for programs and maps.
    pub user_namespace: bool,
}

impl Lacks {
    /// What the calling thread lacks. Where it cannot be told, nothing: the kernel will say.
    pub fn of_caller() -> Self {
        let user_namespace = fs::read_to_string("/proc/self/uid_map")
            .is_ok_and(|map| map.split_whitespace().nth(2) != Some("4294967295"));
        let (capabilities, wanting) = capabilities(None)
            .map(|sets| missing(sets.effective))
            .unwrap_or_default()
            .into_iter()
            .partition(|capability| capability.always);
        Self {
            capabilities,
            wanting,
            user_namespace,
        }
    }

    /// Whether it lacks nothing that is always needed.
    pub fn is_empty(&self) -> bool {
        self.capabilities.is_empty() && !self.user_namespace
    }
}

/// `CAP_BPF, CAP_NET_ADMIN; it is in a user namespace`.
impl fmt::Display for Lacks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self.capabilities.iter().map(|c| c.name).collect();
        let mut parts = Vec::new();
        if !names.is_empty() {
            parts.push(format!("this process lacks {}", names.join(", ")));
        }
        if self.user_namespace {
            parts.push("this process is in a user namespace".to_owned());
        }
        f.write_str(&parts.join("; "))
    }
}

/// The user who called, where this process has another's rights from the file that it runs
/// (set-user-ID, set-group-ID).
pub fn caller_behind_set_id() -> Option<u32> {
    let is_lent = getuid() != geteuid() || getgid() != getegid();
    is_lent.then(|| getuid().as_raw())
}

/// Gives up all capabilities of the calling thread, and of threads and processes that it begins
/// from now on, but for those that are [`NEEDED`] or useful.
///
/// # Errors
/// The kernel refuses, which it has no reason for.
pub fn drop_others() -> io::Result<()> {
    let needed = NEEDED.iter().map(|capability| capability.number);
    let kept: Vec<u32> = needed.chain(USEFUL).collect();
    limit_to(&kept)
}

/// Gives up all capabilities of the calling thread but those with these numbers.
///
/// # Errors
/// As [`drop_others`].
pub fn limit_to(numbers: &[u32]) -> io::Result<()> {
    let kept = numbers.iter().map(|number| 1 << number).sum();
    let kept = CapabilitySet::from_bits_retain(kept);
    for capability in CapabilitySet::all().difference(kept).iter() {
        // Of what programs get that are executed. This takes a capability that nothing else
        // here needs; whoever lacks it goes without.
        if remove_capability_from_bounding_set(capability).is_err() {
            break;
        }
    }
    let mut sets = capabilities(None)?;
    sets.effective &= kept;
    sets.permitted &= kept;
    sets.inheritable &= kept;
    Ok(set_capabilities(None, sets)?)
}

/// How to get what is needed.
pub fn remedy() -> String {
    let names: Vec<&str> = NEEDED.iter().map(|capability| capability.name).collect();
    format!(
        "run as root on the host itself, or with {}",
        names.join(", ")
    )
}

fn missing(have: CapabilitySet) -> Vec<Capability> {
    let has = |number: u32| have.bits() & (1 << number) != 0;
    NEEDED
        .into_iter()
        .filter(|c| !(has(c.number) || c.number > 37 && has(SYS_ADMIN)))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(have: u64) -> Vec<&'static str> {
        let have = CapabilitySet::from_bits_retain(have);
        missing(have).iter().map(|c| c.name).collect()
    }

    #[test]
    fn nothing_is_missing_of_everything() {
        assert!(names(u64::MAX).is_empty());
    }

    #[test]
    fn sys_admin_stands_for_what_was_split_off_it() {
        assert_eq!(
            names(1 << 12 | 1 << 21),
            ["CAP_DAC_OVERRIDE", "CAP_SYS_PTRACE"]
        );
        let wanting = 1 << 1 | 1 << 19;
        assert_eq!(
            names(1 << 12 | wanting),
            ["CAP_SYS_ADMIN", "CAP_PERFMON", "CAP_BPF"]
        );
        assert_eq!(
            names(1 << 12 | 1 << 38 | 1 << 39 | wanting),
            ["CAP_SYS_ADMIN"]
        );
    }
}
