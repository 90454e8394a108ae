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

use super::{
    directory::{Directory, FileError},
    store::{Error, Locked},
};
use crate::model::{
    EndpointId, Mac,
    ipam::{self, Leases, Standing},
    ports::PortRange,
    publish::{HostAddress, PublishSpec},
};
use nix::time::{ClockId, clock_gettime};
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

/// A range of more ports than this is compared with the list of all claimed ports.
const FEW_PORTS: u32 = 256;

/// CLOCK_BOOTTIME in nanoseconds.
fn now() -> u64 {
    // The clock exists since Linux 2.6.39; without one, nothing rests.
    clock_gettime(ClockId::CLOCK_BOOTTIME).map_or(0, |time| {
        time.tv_sec() as u64 * 1_000_000_000 + time.tv_nsec() as u64
    })
}

fn rests(since: u64, now: u64) -> bool {
    u128::from(now.saturating_sub(since)) < ipam::REUSE_DELAY.as_nanos()
}

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
            rested.note(&claim.name(), &now().to_string())?;
        }
        Ok(())
    }

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

    /// Who has which host ports, for several questions while nobody claims any.
    pub fn port_claims(&self) -> Result<PortClaims<'_>, Error> {
        let claims = self.claims()?;
        let ranges = match claims.enter(RANGES)? {
            Some(directory) => Some((directory.names()?, directory)),
            None => None,
        };
        Ok(PortClaims {
            state: self,
            claims,
            ranges,
        })
    }

    /// Takes the host ports of a publish, which nobody else has.
    pub fn claim_publish(&self, spec: &PublishSpec, holder: &Holder) -> Result<(), Error> {
        if let Some((directory, name)) = self.publish_claim(spec)? {
            let directory = self.claims()?.make(&directory)?;
            self.take(&directory, &name, holder)?;
        }
        Ok(())
    }

    /// Gives up the host ports of a publish.
    pub fn release_publish(&self, spec: &PublishSpec, number: u32) -> Result<(), Error> {
        if let Some((place, name)) = self.publish_claim(spec)? {
            let claims = self.claims()?;
            if let Some(directory) = claims.enter(&place)? {
                give_up(&directory, &name, number)?;
                if place != RANGES {
                    claims.remove_directory(&place)?;
                }
            }
        }
        Ok(())
    }

    fn publish_claim(&self, spec: &PublishSpec) -> Result<Option<(String, String)>, Error> {
        let (host, protocol) = (host_name(spec.host()), spec.protocol());
        Ok(spec.host_ports().map(|ports| match ports.count() {
            1 => (format!("port.{protocol}.{}", ports.first()), host),
            _ => {
                let (first, last) = (ports.first(), ports.last());
                (
                    RANGES.to_owned(),
                    format!("{protocol}.{first}-{last}.{host}"),
                )
            }
        }))
    }
}

/// The claims on host ports.
#[derive(Debug)]
pub struct PortClaims<'a> {
    state: &'a Locked,
    claims: Directory,
    /// Those on several ports at once: their names, and where they are.
    ranges: Option<(Vec<String>, Directory)>,
}

impl PortClaims<'_> {
    /// Who has a host port that the publish wants, and for which publish; but for the holders of
    /// those numbers.
    pub fn conflict(
        &self,
        spec: &PublishSpec,
        numbers: &[u32],
    ) -> Result<Option<(Holder, String)>, Error> {
        let Some(ports) = spec.host_ports() else {
            return Ok(None);
        };
        let protocol = spec.protocol();
        let other = |directory: &Directory, name: &str, host: HostAddress, ports: PortRange| {
            if !host.overlaps(spec.host()) {
                return Ok(None);
            }
            let holder = self.state.live_holder(directory, name)?;
            let shown = format!("{host}:{ports}/{protocol}");
            Ok::<_, Error>(
                holder
                    .filter(|h| !numbers.contains(&h.number))
                    .map(|holder| (holder, shown)),
            )
        };
        let mut single: Vec<u16> = Vec::new();
        if ports.count() <= FEW_PORTS {
            single.extend(ports.iter());
        } else {
            let prefix = format!("port.{protocol}.");
            let named = self.claims.names()?;
            let claimed = named
                .iter()
                .filter_map(|name| name.strip_prefix(&prefix)?.parse().ok());
            single.extend(claimed.filter(|port| ports.overlaps(PortRange::one(*port))));
        }
        for port in single {
            let place = format!("port.{protocol}.{port}");
            let Some(directory) = self.claims.enter(&place)? else {
                continue;
            };
            for name in directory.names()? {
                let Some(host) = host_address(&name) else {
                    continue;
                };
                if let Some(found) = other(&directory, &name, host, PortRange::one(port))? {
                    return Ok(Some(found));
                }
            }
        }
        let Some((names, ranges)) = &self.ranges else {
            return Ok(None);
        };
        for name in names {
            let Some((theirs, host)) = range_claim(name, &format!("{protocol}.")) else {
                continue;
            };
            if theirs.overlaps(ports)
                && let Some(found) = other(ranges, name, host, theirs)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

/// Removes a claim of that endpoint. `false`: it has none.
fn give_up(directory: &Directory, name: &str, number: u32) -> Result<bool, Error> {
    match directory.noted(name)?.as_deref().and_then(Holder::parse) {
        Some(holder) if holder.number == number => Ok(directory.remove(name)?),
        _ => Ok(false),
    }
}

fn host_name(host: HostAddress) -> String {
    host.shown()
        .map_or_else(|| "any".to_owned(), |address| address.to_string())
}

fn host_address(name: &str) -> Option<HostAddress> {
    Some(match name {
        "any" => HostAddress::Any,
        "0.0.0.0" => HostAddress::AnyV4,
        "::" => HostAddress::AnyV6,
        address => HostAddress::One(address.parse().ok()?),
    })
}

fn range_claim(name: &str, protocol: &str) -> Option<(PortRange, HostAddress)> {
    let (ports, host) = name.strip_prefix(protocol)?.split_once('.')?;
    let (first, last) = ports.split_once('-')?;
    Some((
        PortRange::new(first.parse().ok()?, last.parse().ok()?)?,
        host_address(host)?,
    ))
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
pub(super) mod tests {
    use super::*;
    use crate::model::{
        IfName, Mtu, NetworkName, Subnet,
        policy::Policy,
        record::{AttachWish, EndpointRecord, Namespace, State},
    };
    use std::{collections::HashSet, time::Duration};

    fn state() -> (tempfile::TempDir, Locked) {
        let place = tempfile::tempdir().unwrap();
        let locked = Locked::open(&place.path().join("state"), Duration::from_secs(9)).unwrap();
        (place, locked)
    }

    fn endpoint(state: &Locked, number: u32, id: &str) -> Holder {
        let record = record(number, id);
        state.put_endpoint(&record).unwrap();
        Holder {
            number,
            id: record.id,
        }
    }

    pub(in crate::kernel) fn record(number: u32, id: &str) -> EndpointRecord {
        let namespace = Namespace {
            device: 1,
            inode: 2,
            cookie: None,
        };
        let mac: Mac = "02:00:00:00:00:01".parse().unwrap();
        EndpointRecord {
            id: id.parse().unwrap(),
            number,
            state: State::Configuring,
            wish: AttachWish {
                network: NetworkName::default_network(),
                addresses: vec![],
                mac: None,
                ifname: "eth0".parse().unwrap(),
                mtu: None,
                publishes: vec![],
                egress: Policy::default(),
                rootfs: None,
                slot: None,
            },
            network: 1,
            netns: "/proc/1/ns/net".into(),
            namespace,
            host_ifname: IfName::host_side(number),
            link: None,
            mac,
            host_mac: mac,
            addresses: vec![],
            mtu: Mtu::ETHERNET,
            default_route: true,
            publishes: vec![],
            pending: vec![],
            policy: None,
            egress: Policy::default(),
            other_policy: None,
            resolv: None,
            datapath: crate::model::record::DatapathKind::Ebpf,
            keeps_open: false,
        }
    }

    fn spec(text: &str) -> PublishSpec {
        text.parse().unwrap()
    }

    /// Who has what the publish wants, but for the one who asks.
    fn conflict(state: &Locked, spec: &PublishSpec, asks: &Holder) -> Option<(Holder, String)> {
        let claims = state.port_claims().unwrap();
        claims.conflict(spec, &[asks.number]).unwrap()
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

    #[test]
    fn host_ports_are_taken_once() {
        let (_place, state) = state();
        let (web, db) = (endpoint(&state, 1, "web"), endpoint(&state, 2, "db"));
        for taken in [
            "8080:80",
            "127.0.0.1:53:53/udp",
            "9000-9099:1000-1099",
            "[::]:443:443",
        ] {
            assert_eq!(conflict(&state, &spec(taken), &web), None);
            state.claim_publish(&spec(taken), &web).unwrap();
        }
        for (wanted, owner) in [
            ("8080:81", Some("*:8080/tcp")),
            ("10.0.0.1:8080:81", Some("*:8080/tcp")),
            ("8080:81/udp", None),
            ("53:53/udp", Some("127.0.0.1:53/udp")),
            ("127.0.0.2:53:53/udp", None),
            ("9050:1", Some("*:9000-9099/tcp")),
            ("9100:1", None),
            ("9090-9190:90-190", Some("*:9000-9099/tcp")),
            ("8000-8100:8000-8100", Some("*:8080/tcp")),
            ("1-65535:1-65535/udp", Some("127.0.0.1:53/udp")),
            ("443:443", Some("[::]:443/tcp")),
            ("0.0.0.0:443:443", None),
            ("0:80", None),
        ] {
            let found = conflict(&state, &spec(wanted), &db);
            assert_eq!(
                found,
                owner.map(|shown| (web.clone(), shown.to_owned())),
                "{wanted}"
            );
            assert_eq!(conflict(&state, &spec(wanted), &web), None);
        }
        for given_up in [
            "8080:80",
            "127.0.0.1:53:53/udp",
            "9000-9099:1000-1099",
            "[::]:443:443",
        ] {
            state.release_publish(&spec(given_up), web.number).unwrap();
            assert_eq!(conflict(&state, &spec(given_up), &db), None);
        }
        assert_eq!(state.claims().unwrap().names().unwrap(), [RANGES]);
    }

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
