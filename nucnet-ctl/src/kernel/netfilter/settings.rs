//! Settings of the host's that its own stack needs to carry endpoints' packets: what of its own
//! interfaces forwards, and what is counted. Those of nucnet's bridges are
//! [`Locked::forward`](crate::kernel::store::Locked::forward)'s.
//!
//! For IPv4 each interface says for itself whether what comes in by it is forwarded. IPv6 has a
//! switch for all of the host, which makes a router of it; since Linux 6.17 an interface can
//! forward without (`force_forwarding`). What is changed of the host's own interfaces is noted, and
//! given back where nobody else has written to it since.
//!
//! The switch writes the same to each interface, so what single ones had is noted with it, and
//! given back after it. Whether somebody has changed one of them meanwhile can be told only before
//! that, so that it begins is noted, too ([`announce`]).

use crate::{
    kernel::{
        netlink::Link,
        sysctl::{Error, Family, LinkKey, Sysctl, interfaces},
    },
    model::record::{Overwritten, SysctlChange},
};

/// What was changed, to be given back.
pub type Changed = Vec<SysctlChange>;

/// What must change so that everything which comes in by those interfaces is forwarded, in the
/// given families, in that order. Whoever makes the changes notes them first: a process that dies
/// in between is not to leave the host a router.
pub fn forward_all(links: &[Link], v6: bool) -> Result<Changed, Error> {
    let mut changes = Changed::new();
    for link in links {
        let forwarding = Sysctl::link(Family::Ipv4, &link.name, LinkKey::Forwarding);
        plan(&forwarding, "1", &mut changes)?;
    }
    if !v6 {
        return Ok(changes);
    }
    let all = Sysctl::link(Family::Ipv6, "all", LinkKey::Forwarding);
    if all.read()? == "1" {
        return Ok(changes);
    }
    let forced = |link: &Link| Sysctl::link(Family::Ipv6, &link.name, LinkKey::ForceForwarding);
    if links
        .first()
        .is_some_and(|link| forced(link).read().is_ok())
    {
        for link in links {
            plan(&forced(link), "1", &mut changes)?;
        }
        return Ok(changes);
    }
    // A router does not listen to other routers unless it is told to, and forgets what they said.
    for link in links {
        let accept = Sysctl::link(Family::Ipv6, &link.name, LinkKey::AcceptRa);
        if accept.read().is_ok_and(|value| value == "1") {
            plan(&accept, "2", &mut changes)?;
        }
    }
    let switch = changes.len();
    plan(&all, "1", &mut changes)?;
    for change in &mut changes[switch..] {
        change.overwrites = overwritten(&change.before)?;
    }
    Ok(changes)
}

/// Whether interfaces forward IPv6, for those of which it is something else than the host's switch
/// says.
fn overwritten(switch: &str) -> Result<Vec<Overwritten>, Error> {
    let mut overwritten = Vec::new();
    for interface in interfaces(Family::Ipv6)? {
        let forwarding = Sysctl::link(Family::Ipv6, &interface, LinkKey::Forwarding);
        let before = match forwarding.read() {
            // It went meanwhile.
            Err(Error::NotFound { .. }) => continue,
            before => before?,
        };
        if before != switch {
            overwritten.push(Overwritten {
                name: forwarding.to_string(),
                before,
            });
        }
    }
    Ok(overwritten)
}

/// What must change so that packets and bytes of connections are counted, when they began is noted,
/// and who listens is told of their end even if he came after they had begun. Not of connections
/// that are open already.
pub fn count_all() -> Result<Changed, Error> {
    let mut changes = Changed::new();
    for name in [
        "nf_conntrack_acct",
        "nf_conntrack_timestamp",
        "nf_conntrack_events",
    ] {
        let sysctl = Sysctl::Recorded(format!("net/netfilter/{name}"));
        plan(&sysctl, "1", &mut changes)?;
    }
    Ok(changes)
}

fn plan(sysctl: &Sysctl, value: &str, changes: &mut Changed) -> Result<(), Error> {
    let before = match sysctl.read() {
        // Without IPv6, or gone.
        Err(Error::NotFound { .. }) => return Ok(()),
        before => before?,
    };
    if before != value {
        changes.push(SysctlChange {
            name: sysctl.to_string(),
            before,
            written: value.to_owned(),
            overwrites: Vec::new(),
            returning: false,
        });
    }
    Ok(())
}

/// Makes changes that are noted.
pub fn make(changes: &[SysctlChange]) -> Result<(), Error> {
    changes
        .iter()
        .try_for_each(|change| write(&change.name, &change.written))
}

/// Has what is about to be given back say so, where it overwrites other settings: of these, those
/// stay that somebody else has written to since. Whether there is something new to be noted.
pub fn announce(changed: &mut [SysctlChange]) -> Result<bool, Error> {
    let mut is_new = false;
    for change in changed {
        if change.overwrites.is_empty() || change.returning {
            continue;
        }
        let has_written = |name: &str| is(name, &change.written);
        let mut kept = Vec::new();
        if has_written(&change.name)? {
            for other in &change.overwrites {
                if has_written(&other.name)? {
                    kept.push(other.clone());
                }
            }
        }
        change.overwrites = kept;
        change.returning = true;
        is_new = true;
    }
    Ok(is_new)
}

/// Gives back what was changed, the last first, and [announced](announce). What others have written
/// since stays.
pub fn restore(changed: &[SysctlChange]) -> Result<(), Error> {
    for change in changed.iter().rev() {
        if is(&change.name, &change.written)? {
            write(&change.name, &change.before)?;
        }
        for other in &change.overwrites {
            if is(&change.name, &change.before)? && is(&other.name, &change.before)? {
                write(&other.name, &other.before)?;
            }
        }
    }
    Ok(())
}

/// Whether a setting is there and has a value.
fn is(name: &str, value: &str) -> Result<bool, Error> {
    match Sysctl::Recorded(name.to_owned()).read() {
        Ok(found) => Ok(found == value),
        Err(Error::NotFound { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Writes a setting, unless it is gone.
fn write(name: &str, value: &str) -> Result<(), Error> {
    match Sysctl::Recorded(name.to_owned()).write(value) {
        Ok(_) | Err(Error::NotFound { .. }) => Ok(()),
        Err(error) => Err(error),
    }
}
