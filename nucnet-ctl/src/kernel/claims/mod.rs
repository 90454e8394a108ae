//! Claims: who has which address, link-layer address, namespace and host port.
//!
//! The records of endpoints say all this, but to ask them means to read them all. A claim is a
//! symbolic link under `claims/` whose name is what is claimed and whose text is whose it is,
//! so that asking costs the same however many endpoints there are:
//!
//! ```text
//! claims/address.N/10.0.42.7      -> "12 web"   network number N; endpoint number and id
//! claims/rested.N/10.0.42.8       -> "5123456"  released at that time (CLOCK_BOOTTIME, ns)
//! claims/mac.N/02:00:00:00:00:07  -> "12 web"
//! claims/netns.N/4026532281       -> "12 web"
//! claims/port.tcp.8080/127.0.0.1  -> "12 web"   or "any", "0.0.0.0", "::"
//! claims/ranges/tcp.80-89.any     -> "12 web"
//! ```
//!
//! A claim counts only while its owner's record exists: what a crash leaves behind is no
//! obstacle.

mod leases;
mod ports;

pub use leases::NetworkLeases;
pub use ports::PortClaims;

use super::{
    directory::{Directory, FileError},
    store::{Error, Locked},
};
use crate::model::{EndpointId, Mac};
use std::{fmt, net::IpAddr};

/// Whose a claim is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Holder {
    /// Number of the endpoint, or of the static mapping.
    pub number: u32,
    /// Its id.
    pub id: EndpointId,
}

impl Holder {
    fn parse(text: &str) -> Option<Self> {
        let (number, id) = text.split_once(' ')?;
        Some(Self {
            number: number.parse().ok()?,
            id: id.parse().ok()?,
        })
    }
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.number, self.id)
    }
}

/// What one endpoint of a network can have, and no other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Claim {
    /// An address.
    Address(IpAddr),
    /// A link-layer address.
    Mac(Mac),
    /// To be the network's endpoint in that namespace.
    Namespace(u64),
}

impl Claim {
    fn directory(self, network: u32) -> String {
        match self {
            Self::Address(_) => format!("address.{network}"),
            Self::Mac(_) => format!("mac.{network}"),
            Self::Namespace(_) => format!("netns.{network}"),
        }
    }

    fn name(self) -> String {
        match self {
            Self::Address(address) => address.to_string(),
            Self::Mac(mac) => mac.to_string(),
            Self::Namespace(number) => number.to_string(),
        }
    }
}

/// Whether what is given up was in use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Use {
    /// Packets may still come for it.
    Used,
    /// Of a set-up that failed.
    Unused,
}

const CLAIMS: &str = "claims";
const RANGES: &str = "ranges";

impl Locked {
    fn claims(&self) -> Result<Directory, FileError> {
        self.root.make(CLAIMS)
    }

    /// Whether the claim counts: its owner has a record.
    fn is_live(&self, holder: &Holder) -> Result<bool, Error> {
        let endpoint = self.sound_endpoint(&holder.id)?;
        if endpoint
            .as_ref()
            .is_some_and(|record| record.number == holder.number)
        {
            return Ok(true);
        }
        // An id may be that of both; a number is not.
        let mapping = self.sound_mapping(&holder.id)?;
        if mapping.is_some_and(|record| record.number == holder.number) {
            return Ok(true);
        }
        // Nobody knows what it has: it keeps what it claimed.
        Ok(endpoint.is_none() && self.is_set_aside(&holder.id)?)
    }

    /// Takes what is claimed. None: it is the holder's now; else it is somebody else's.
    pub fn claim(
        &self,
        network: u32,
        claim: Claim,
        holder: &Holder,
    ) -> Result<Option<Holder>, Error> {
        let directory = self.claims()?.make(&claim.directory(network))?;
        self.take(&directory, &claim.name(), holder)
    }

    fn take(
        &self,
        directory: &Directory,
        name: &str,
        holder: &Holder,
    ) -> Result<Option<Holder>, Error> {
        if directory.note(name, &holder.to_string())? {
            return Ok(None);
        }
        if let Some(other) = self.live_holder(directory, name)?
            && other.number != holder.number
        {
            return Ok(Some(other));
        }
        directory.remove(name)?;
        directory.note(name, &holder.to_string())?;
        Ok(None)
    }

    fn live_holder(&self, directory: &Directory, name: &str) -> Result<Option<Holder>, Error> {
        match directory.noted(name)?.as_deref().and_then(Holder::parse) {
            Some(holder) if self.is_live(&holder)? => Ok(Some(holder)),
            _ => Ok(None),
        }
    }

    /// Who has it.
    pub fn claimed(&self, network: u32, claim: Claim) -> Result<Option<Holder>, Error> {
        match self.claims()?.enter(&claim.directory(network))? {
            Some(directory) => self.live_holder(&directory, &claim.name()),
            None => Ok(None),
        }
    }

    /// Gives up what is claimed; what is somebody else's, or nobody's, stays so. An address that
    /// was in use rests for a while.
    pub fn release(
        &self,
        network: u32,
        claim: Claim,
        number: u32,
        usage: Use,
    ) -> Result<(), Error> {
        let claims = self.claims()?;
        let Some(directory) = claims.enter(&claim.directory(network))? else {
            return Ok(());
        };
        if give_up(&directory, &claim.name(), number)?
            && let (Claim::Address(_), Use::Used) = (claim, usage)
        {
            let rested = claims.make(&format!("rested.{network}"))?;
            rested.remove(&claim.name())?;
            rested.note(&claim.name(), &leases::now().to_string())?;
        }
        Ok(())
    }

    /// An endpoint of a network, if there is one.
    pub fn endpoint_of(&self, network: u32) -> Result<Option<Holder>, Error> {
        let directory = self
            .claims()?
            .enter(&Claim::Namespace(0).directory(network))?;
        let Some(directory) = directory else {
            return Ok(None);
        };
        for name in directory.names()? {
            if let Some(holder) = self.live_holder(&directory, &name)? {
                return Ok(Some(holder));
            }
        }
        Ok(None)
    }

    /// Removes claims that do not count, and claims on what belongs to none of these networks.
    /// Returns what they were.
    pub fn forget_stale(&self, networks: &[u32]) -> Result<Vec<String>, Error> {
        let mut forgotten = Vec::new();
        let claims = self.claims()?;
        for place in claims.names()? {
            let Some(directory) = claims.enter(&place)? else {
                continue;
            };
            let (kind, rest) = place.split_once('.').unwrap_or((place.as_str(), ""));
            let of_network = ["address", "rested", "mac", "netns"].contains(&kind);
            if of_network && !rest.parse().is_ok_and(|number| networks.contains(&number)) {
                claims.remove_tree(&place)?;
                forgotten.push(place);
                continue;
            }
            for name in directory.names()? {
                let is_stale = match kind {
                    "rested" => false,
                    _ => self.live_holder(&directory, &name)?.is_none(),
                };
                if is_stale && directory.remove(&name)? {
                    forgotten.push(format!("{place}/{name}"));
                }
            }
            if kind == "port" {
                claims.remove_directory(&place)?;
            }
        }
        Ok(forgotten)
    }

    /// Removes all claims on what belongs to a network.
    pub fn forget_network(&self, network: u32) -> Result<(), Error> {
        let claims = self.claims()?;
        for kind in ["address", "rested", "mac", "netns"] {
            claims.remove_tree(&format!("{kind}.{network}"))?;
        }
        Ok(())
    }
}

/// Removes a claim of that endpoint. `false`: it has none.
fn give_up(directory: &Directory, name: &str, number: u32) -> Result<bool, Error> {
    match directory.noted(name)?.as_deref().and_then(Holder::parse) {
        Some(holder) if holder.number == number => Ok(directory.remove(name)?),
        _ => Ok(false),
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{
        ports::tests::{conflict, spec},
        *,
    };
    use crate::model::{
        IfName,
        record::{EndpointRecord, State, fixture},
    };
    use std::time::Duration;

    pub(super) fn state() -> (tempfile::TempDir, Locked) {
        let place = tempfile::tempdir().unwrap();
        let locked = Locked::open(&place.path().join("state"), Duration::from_secs(9)).unwrap();
        (place, locked)
    }

    pub(super) fn endpoint(state: &Locked, number: u32, id: &str) -> Holder {
        let record = record(number, id);
        state.put_endpoint(&record).unwrap();
        Holder {
            number,
            id: record.id,
        }
    }

    pub(in crate::kernel) fn record(number: u32, id: &str) -> EndpointRecord {
        EndpointRecord {
            id: id.parse().unwrap(),
            number,
            state: State::Configuring,
            host_ifname: IfName::host_side(number),
            link: None,
            addresses: vec![],
            ..fixture::endpoint()
        }
    }

    #[test]
    fn what_is_claimed_belongs_to_one_and_names_him() {
        let (_place, state) = state();
        let (web, db) = (endpoint(&state, 1, "web"), endpoint(&state, 2, "db"));
        let claim = Claim::Address("10.0.42.7".parse().unwrap());
        assert_eq!(state.claim(1, claim, &web).unwrap(), None);
        assert_eq!(state.claim(1, claim, &web).unwrap(), None);
        assert_eq!(state.claim(1, claim, &db).unwrap(), Some(web.clone()));
        assert_eq!(state.claim(2, claim, &db).unwrap(), None, "another network");
        state.release(1, claim, db.number, Use::Used).unwrap();
        assert_eq!(state.claimed(1, claim).unwrap(), Some(web.clone()));
        state.release(1, claim, web.number, Use::Used).unwrap();
        assert_eq!(state.claimed(1, claim).unwrap(), None);
    }

    #[test]
    fn a_claim_without_its_endpoint_is_no_obstacle() {
        let (_place, state) = state();
        let (gone, db) = (endpoint(&state, 1, "gone"), endpoint(&state, 2, "db"));
        let claim = Claim::Namespace(77);
        state.claim(1, claim, &gone).unwrap();
        state.claim_publish(&spec("80:80"), &gone).unwrap();
        // Its id has come to mean another endpoint.
        endpoint(&state, 3, "gone");
        assert_eq!(conflict(&state, &spec("80:80"), &db), None);
        assert_eq!(state.claim(1, claim, &db).unwrap(), None);
        assert_eq!(state.claimed(1, claim).unwrap(), Some(db));
    }
}
