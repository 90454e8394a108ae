//! Settings of the host's that its own stack needs to carry endpoints' packets: what of its own
//! interfaces forwards, and what is counted. Those of nucnet's bridges are
//! [`Locked::forward`](crate::kernel::store::Locked::forward)'s.
//!
//! For IPv4 each interface says for itself whether what comes in by it is forwarded. IPv6 has a
//! switch for all of the host, which makes a router of it; since Linux 6.17 an interface can
//! forward without (`force_forwarding`). What is changed of the host's own interfaces is noted, and
//! given back where nobody else has written to it since.

use crate::{
    kernel::{
        netlink::Link,
        sysctl::{Error, Family, LinkKey, Sysctl},
    },
    model::record::SysctlChange,
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
    plan(&all, "1", &mut changes)?;
    Ok(changes)
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
        });
    }
    Ok(())
}

/// Makes changes that are noted.
pub fn make(changes: &[SysctlChange]) -> Result<(), Error> {
    for change in changes {
        match Sysctl::Recorded(change.name.clone()).write(&change.written) {
            Err(Error::NotFound { .. }) => {}
            written => drop(written?),
        }
    }
    Ok(())
}

/// Gives back what was changed, the last first. What others have written since stays.
pub fn restore(changed: &[SysctlChange]) -> Result<(), Error> {
    for change in changed.iter().rev() {
        let sysctl = Sysctl::Recorded(change.name.clone());
        match sysctl.read() {
            Ok(value) if value == change.written => drop(sysctl.write(&change.before)?),
            Ok(_) | Err(Error::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}
