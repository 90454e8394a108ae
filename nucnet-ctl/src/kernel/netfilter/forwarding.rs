//! What of the host must forward so that its own stack carries endpoints' packets.
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

/// Has everything that comes in by those interfaces forwarded, in the given families. What was
/// changed is added, before the change.
pub fn forward_all(links: &[Link], v6: bool, changed: &mut Changed) -> Result<(), Error> {
    for link in links {
        let forwarding = Sysctl::link(Family::Ipv4, &link.name, LinkKey::Forwarding);
        write(&forwarding, "1", changed)?;
    }
    if !v6 {
        return Ok(());
    }
    let all = Sysctl::link(Family::Ipv6, "all", LinkKey::Forwarding);
    if all.read()? == "1" {
        return Ok(());
    }
    let forced = |link: &Link| Sysctl::link(Family::Ipv6, &link.name, LinkKey::ForceForwarding);
    if links
        .first()
        .is_some_and(|link| forced(link).read().is_ok())
    {
        return links
            .iter()
            .try_for_each(|link| write(&forced(link), "1", changed));
    }
    // A router does not listen to other routers unless it is told to, and forgets what they said.
    for link in links {
        let accept = Sysctl::link(Family::Ipv6, &link.name, LinkKey::AcceptRa);
        if accept.read().is_ok_and(|value| value == "1") {
            write(&accept, "2", changed)?;
        }
    }
    write(&all, "1", changed)
}

fn write(sysctl: &Sysctl, value: &str, changed: &mut Changed) -> Result<(), Error> {
    let before = match sysctl.write(value) {
        // Without IPv6, or gone.
        Err(Error::NotFound { .. }) => return Ok(()),
        before => before?,
    };
    let name = sysctl.to_string();
    if before != value && changed.iter().all(|change| change.name != name) {
        changed.push(SysctlChange {
            name,
            before,
            written: value.to_owned(),
        });
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
