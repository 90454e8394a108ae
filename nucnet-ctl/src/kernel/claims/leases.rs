//! Leases: the addresses of a network that are somebody's, or were a moment ago.

use super::{CLAIMS, Holder};
use crate::{
    kernel::{
        directory::Directory,
        store::{Error, Locked},
    },
    model::ipam::{self, Leases, Standing},
};
use nix::time::{ClockId, clock_gettime};
use std::net::IpAddr;

/// CLOCK_BOOTTIME in nanoseconds.
pub(super) fn now() -> u64 {
    // The clock exists since Linux 2.6.39; without one, nothing rests.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

fn rests(since: u64, now: u64) -> bool {
    u128::from(now.saturating_sub(since)) < ipam::REUSE_DELAY.as_nanos()
}

impl Locked {
    /// The leases of a network, for drawing addresses.
    pub fn leases(&self, network: u32) -> Result<NetworkLeases<'_>, Error> {
        // Nothing is made: the network may be one that does not exist yet.
        let enter = |kind: &str| match self.root.enter(CLAIMS)? {
            Some(claims) => claims.enter(&format!("{kind}.{network}")),
            None => Ok(None),
        };
        let leases = NetworkLeases {
            state: self,
            leased: enter("address")?,
            rested: enter("rested")?,
            now: now(),
        };
        leases.forget_rested()?;
        Ok(leases)
    }
}

/// The leases of one network.
#[derive(Debug)]
pub struct NetworkLeases<'a> {
    state: &'a Locked,
    leased: Option<Directory>,
    rested: Option<Directory>,
    now: u64,
}

impl NetworkLeases<'_> {
    fn holder(&self, name: &str) -> Result<Option<Holder>, Error> {
        match &self.leased {
            Some(leased) => self.state.live_holder(leased, name),
            None => Ok(None),
        }
    }

    fn resting_since(&self, name: &str) -> Result<Option<u64>, Error> {
        let Some(rested) = &self.rested else {
            return Ok(None);
        };
        Ok(rested.noted(name)?.and_then(|text| text.parse().ok()))
    }

    /// Removes the notes of addresses that have rested long enough.
    fn forget_rested(&self) -> Result<(), Error> {
        let Some(rested) = &self.rested else {
            return Ok(());
        };
        for name in rested.names()? {
            if !self
                .resting_since(&name)?
                .is_some_and(|since| rests(since, self.now))
            {
                rested.remove(&name)?;
            }
        }
        Ok(())
    }
}

impl Leases for NetworkLeases<'_> {
    type Error = Error;

    fn standing(&self, address: IpAddr) -> Result<Standing, Error> {
        let name = address.to_string();
        if self.holder(&name)?.is_some() {
            return Ok(Standing::Leased);
        }
        Ok(self
            .resting_since(&name)?
            .map_or(Standing::Free, Standing::Resting))
    }

    fn all(&self) -> Result<Vec<(IpAddr, Standing)>, Error> {
        let names = |directory: &Option<Directory>| match directory {
            Some(directory) => directory.names(),
            None => Ok(Vec::new()),
        };
        let mut all = Vec::new();
        for name in names(&self.leased)?.into_iter().chain(names(&self.rested)?) {
            if let Ok(address) = name.parse() {
                match self.standing(address)? {
                    Standing::Free => {}
                    standing => all.push((address, standing)),
                }
            }
        }
        Ok(all)
    }
}

#[cfg(test)]
mod tests {
    use super::super::{
        Claim, Use,
        tests::{endpoint, state},
    };
    use super::*;
    use crate::model::Subnet;
    use std::collections::HashSet;

    #[test]
    fn a_released_address_rests_unless_nothing_else_is_free() {
        let (_place, state) = state();
        let web = endpoint(&state, 1, "web");
        let subnet = Subnet::new("10.0.42.0/29".parse().unwrap(), None).unwrap();
        let draw = || {
            let leases = state.leases(1).unwrap();
            ipam::draw(subnet, &HashSet::new(), &leases, &mut rand::rng()).unwrap()
        };
        let first = draw().unwrap();
        state.claim(1, Claim::Address(first), &web).unwrap();
        state
            .release(1, Claim::Address(first), web.number, Use::Used)
            .unwrap();
        let mut drawn = HashSet::new();
        while let Some(address) = draw() {
            if !drawn.insert(address) {
                panic!("{address} twice");
            }
            state.claim(1, Claim::Address(address), &web).unwrap();
            if drawn.len() < 5 {
                assert_ne!(address, first);
            }
        }
        assert_eq!(drawn.len(), 5, "10.0.42.2 to 10.0.42.6");
        state.forget_network(1).unwrap();
        assert!(draw().is_some());
    }

    #[test]
    fn rest_is_over_after_the_delay() {
        let delay = ipam::REUSE_DELAY.as_nanos() as u64;
        assert!(rests(1_000, 1_000 + delay - 1));
        assert!(!rests(1_000, 1_000 + delay));
    }
}
