//! Forwarding for nucnet's own bridges, at no cost to the host's own routes.
//!
//! Whenever forwarding is turned on for IPv6, whichever the interface, the kernel forgets what
//! routers have advertised to the host, its default route among it (`rt6_purge_dflt_routers`),
//! unless it came by an interface that accepts advertisements even where it forwards
//! (`accept_ra` 2). So the interfaces that have such routes are of that kind while it is written.
//! Those are the host's: which they are is noted before, so that a process which dies in between
//! leaves a note, and whoever changes something next gives them back.

use std::{collections::BTreeSet, fs, io};

use super::{
    store::{Error, Locked},
    sysctl::{self, Family, LinkKey, Sysctl},
};

/// The directory of notes: interfaces, and the value that was theirs.
const LENT: &str = "lent";

/// `accept_ra` of interfaces that listen to routers as long as they do not forward.
const LISTENS: &str = "1";

/// Of those that always do.
const ALWAYS_LISTENS: &str = "2";

impl Locked {
    /// Turns forwarding on for one interface.
    pub fn forward(&self, family: Family, interface: &str) -> Result<(), Error> {
        let forwarding = Sysctl::link(family, interface, LinkKey::Forwarding);
        if forwarding.read()? == "1" {
            return Ok(());
        }
        let mut listening = Vec::new();
        if family == Family::Ipv6 {
            for link in advertised_links()? {
                match accept_ra(&link).read() {
                    Ok(value) if value == LISTENS => listening.push(link),
                    // The interface went meanwhile, and its routes.
                    Ok(_) | Err(sysctl::Error::NotFound { .. }) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        if listening.is_empty() {
            forwarding.write("1")?;
            return Ok(());
        }
        let lent = self.root.make(LENT)?;
        let written = listening.iter().try_for_each(|link| {
            lent.note(link, LISTENS)?;
            accept_ra(link).write(ALWAYS_LISTENS)?;
            Ok(())
        });
        let written = written.and_then(|()| Ok(forwarding.write("1").map(drop)?));
        written.and(self.give_back())
    }

    /// Gives the host's interfaces back what was theirs, unless somebody else has changed it
    /// since.
    pub fn give_back(&self) -> Result<(), Error> {
        let Some(lent) = self.root.enter(LENT)? else {
            return Ok(());
        };
        let mut given = Ok(());
        for interface in lent.names()? {
            let accept = accept_ra(&interface);
            let back = match accept.read() {
                Ok(value) if value == ALWAYS_LISTENS => accept.write(LISTENS).map(drop),
                // Gone.
                Ok(_) | Err(sysctl::Error::NotFound { .. }) => Ok(()),
                Err(error) => Err(error),
            };
            let back = back.map_err(Error::from);
            given = given.and(back.and_then(|()| Ok(lent.remove(&interface).map(drop)?)));
        }
        given.and_then(|()| Ok(self.root.remove_directory(LENT).map(drop)?))
    }
}

fn accept_ra(interface: &str) -> Sysctl {
    Sysctl::link(Family::Ipv6, interface, LinkKey::AcceptRa)
}

/// Interfaces by which the host has routes that a router advertised.
fn advertised_links() -> Result<BTreeSet<String>, sysctl::Error> {
    /// Made by an advertisement: `RTF_DEFAULT` and `RTF_ADDRCONF` (`linux/ipv6_route.h`).
    const ADVERTISED: u32 = 0x0001_0000 | 0x0004_0000;
    // Of the calling thread's namespace.
    let routes = match fs::read_to_string("/proc/thread-self/net/ipv6_route") {
        Ok(routes) => routes,
        // Without IPv6 there is no such file, and no such route.
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(BTreeSet::new()),
        Err(error) => return Err(sysctl::Error::Routes(error)),
    };
    Ok(routes
        .lines()
        .filter_map(|line| {
            let mut fields = line.split_ascii_whitespace().skip(8);
            let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
            (flags & ADVERTISED != 0).then_some(fields.next()?.to_owned())
        })
        .collect())
}
