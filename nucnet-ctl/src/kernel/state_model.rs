//! Store, claims and drawing of addresses under random operations, with deaths at any change of a
//! file and with what others do to records, against a model of maps and sets.

use super::{
    claims::{Claim, Holder, Use, tests::record},
    fault::dying,
    store::Locked,
};
use crate::model::{EndpointId, Subnet, ipam, publish::PublishSpec};
use proptest::prelude::*;
use rand::{SeedableRng, rngs::StdRng};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    net::{IpAddr, Ipv4Addr},
    path::PathBuf,
    time::Duration,
};

const NETWORK: u32 = 1;
const IDS: u8 = 4;
/// Addresses of 10.0.42.0/28 that may be given out: .2 to .14.
const ADDRESSES: std::ops::Range<u8> = 2..15;
const PORTS: std::ops::Range<u16> = 8000..8006;

#[derive(Clone, Debug)]
enum Operation {
    /// An endpoint is recorded: with a new number, or as it is.
    Put { id: u8, anew: bool },
    /// Its record is removed, whatever it still claims.
    Remove { id: u8 },
    /// Somebody damages its record.
    Damage { id: u8 },
    /// It claims an address.
    Claim { id: u8, address: u8 },
    /// It claims one that is drawn.
    Draw { id: u8 },
    /// It gives up an address, whoever has it.
    Release { id: u8, address: u8, usage: bool },
    /// It claims ports, one or some, if nobody has them.
    Publish { id: u8, port: u16, more: u16 },
    /// It gives up ports.
    Unpublish { id: u8, port: u16, more: u16 },
    /// What is stale is removed.
    Collect,
}

fn operations() -> impl Strategy<Value = Operation> {
    let (id, port, more) = (|| 0..IDS, || PORTS, || 0..3u16);
    prop_oneof![
        3 => (id(), any::<bool>()).prop_map(|(id, anew)| Operation::Put { id, anew }),
        1 => id().prop_map(|id| Operation::Remove { id }),
        1 => id().prop_map(|id| Operation::Damage { id }),
        3 => (id(), ADDRESSES).prop_map(|(id, address)| Operation::Claim { id, address }),
        3 => id().prop_map(|id| Operation::Draw { id }),
        2 => (id(), ADDRESSES, any::<bool>())
            .prop_map(|(id, address, usage)| Operation::Release { id, address, usage }),
        3 => (id(), port(), more())
            .prop_map(|(id, port, more)| Operation::Publish { id, port, more }),
        2 => (id(), port(), more())
            .prop_map(|(id, port, more)| Operation::Unpublish { id, port, more }),
        1 => Just(Operation::Collect),
    ]
}

type Ports = (u16, u16);

/// What there should be.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Model {
    /// Numbers of recorded endpoints.
    records: BTreeMap<u8, u32>,
    /// Ids of which a damaged record was set aside.
    damaged: BTreeSet<u8>,
    addresses: BTreeMap<u8, (u8, u32)>,
    ports: BTreeMap<Ports, (u8, u32)>,
}

impl Model {
    fn lives(&self, (id, number): (u8, u32)) -> bool {
        match self.records.get(&id) {
            Some(recorded) => *recorded == number,
            None => self.damaged.contains(&id),
        }
    }

    fn forget_stale(&mut self) {
        let all = self.clone();
        self.addresses.retain(|_, by| all.lives(*by));
        self.ports.retain(|_, by| all.lives(*by));
    }

    fn holder_of(&self, address: u8) -> Option<(u8, u32)> {
        let holder = self.addresses.get(&address).copied();
        holder.filter(|holder| self.lives(*holder))
    }

    fn publisher_of(&self, port: u16) -> Option<(u8, u32)> {
        let covers = |ports: &Ports| (ports.0..=ports.1).contains(&port);
        let mut live = self.ports.iter().filter(|(_, holder)| self.lives(**holder));
        live.find(|(ports, _)| covers(ports))
            .map(|(_, holder)| *holder)
    }
}

fn id(id: u8) -> EndpointId {
    format!("e{id}").parse().unwrap()
}

fn holder((of, number): (u8, u32)) -> Holder {
    Holder { number, id: id(of) }
}

fn address(last: u8) -> IpAddr {
    Ipv4Addr::new(10, 0, 42, last).into()
}

fn spec((first, last): Ports) -> PublishSpec {
    match first == last {
        true => format!("{first}:{first}"),
        false => format!("{first}-{last}:{first}-{last}"),
    }
    .parse()
    .unwrap()
}

struct World {
    place: tempfile::TempDir,
    state: Option<Locked>,
    model: Model,
    next: u32,
}

impl World {
    fn new() -> Self {
        // Every record is synchronised, which takes time on a disk.
        let place = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
        let mut world = Self {
            place: place.unwrap(),
            state: None,
            model: Model::default(),
            next: 1,
        };
        world.reload();
        world
    }

    fn path(&self) -> PathBuf {
        self.place.path().join("state")
    }

    fn reload(&mut self) {
        self.state = None;
        self.state = Some(Locked::open(&self.path(), Duration::from_secs(9)).unwrap());
    }

    fn state(&self) -> &Locked {
        self.state.as_ref().unwrap()
    }

    /// Does it, unless the thread dies over it. Returns what is there if it was done.
    fn apply(&mut self, operation: &Operation) -> Result<Model, super::store::Error> {
        let mut rng = StdRng::seed_from_u64(self.next.into());
        let (state, mut model) = (self.state.as_ref().unwrap(), self.model.clone());
        // Whoever is not recorded does nothing.
        let own = |of: u8| Some((of, *self.model.records.get(&of)?));
        match *operation {
            Operation::Put { id: of, anew } => {
                let number = match model.records.get(&of) {
                    Some(number) if !anew => *number,
                    _ => self.next,
                };
                self.next += 1;
                // As a detach does, which comes before.
                state.remove_set_aside(&id(of))?;
                model.damaged.remove(&of);
                state.put_endpoint(&record(number, id(of).as_str()))?;
                model.records.insert(of, number);
            }
            Operation::Remove { id: of } => {
                state.remove_endpoint(&id(of))?;
                model.records.remove(&of);
            }
            Operation::Damage { id: of } if model.records.contains_key(&of) => {
                // Or what an earlier endpoint of that id had would come to life again.
                state.forget_stale(&[NETWORK])?;
                model.forget_stale();
                let path = self.path().join(format!("endpoints/{}.json", id(of)));
                std::fs::write(path, "{").unwrap();
                model.records.remove(&of);
                model.damaged.insert(of);
                assert_eq!(
                    self.state().endpoint(&id(of)).ok(),
                    None,
                    "never silently empty"
                );
                state.sound_endpoint(&id(of))?;
            }
            Operation::Claim {
                id: of,
                address: last,
            } => {
                if let Some(own) = own(of) {
                    let claim = Claim::Address(address(last));
                    let other = state.claim(NETWORK, claim, &holder(own))?;
                    let expected = model.holder_of(last).filter(|other| *other != own);
                    assert_eq!(other, expected.map(holder));
                    if other.is_none() {
                        model.addresses.insert(last, own);
                    }
                }
            }
            Operation::Draw { id: of } => {
                if let Some(own) = own(of) {
                    let subnet = Subnet::new("10.0.42.0/28".parse().unwrap(), None).unwrap();
                    let leases = state.leases(NETWORK)?;
                    let drawn = ipam::draw(subnet, &HashSet::new(), &leases, &mut rng)?;
                    let is_full = ADDRESSES
                        .clone()
                        .all(|last| model.holder_of(last).is_some());
                    assert_eq!(drawn.is_none(), is_full);
                    let Some(IpAddr::V4(drawn)) = drawn else {
                        return Ok(model);
                    };
                    let last = drawn.octets()[3];
                    assert_eq!(model.holder_of(last), None, "{drawn}");
                    let claim = Claim::Address(drawn.into());
                    assert_eq!(state.claim(NETWORK, claim, &holder(own))?, None);
                    model.addresses.insert(last, own);
                }
            }
            Operation::Release {
                id: of,
                address: last,
                usage,
            } => {
                if let Some(own) = own(of) {
                    let usage = if usage { Use::Used } else { Use::Unused };
                    state.release(NETWORK, Claim::Address(address(last)), own.1, usage)?;
                    model
                        .addresses
                        .retain(|held, by| *held != last || *by != own);
                }
            }
            Operation::Publish { id: of, port, more } => {
                if let Some(own) = own(of) {
                    let ports = (port, port + more);
                    let conflict = state.port_claims()?.conflict(&spec(ports), &[])?;
                    let expected = (ports.0..=ports.1).any(|p| model.publisher_of(p).is_some());
                    assert_eq!(conflict.is_some(), expected, "{ports:?}");
                    if conflict.is_none() {
                        state.claim_publish(&spec(ports), &holder(own))?;
                        model.ports.insert(ports, own);
                    }
                }
            }
            Operation::Unpublish { id: of, port, more } => {
                if let Some(own) = own(of) {
                    let ports = (port, port + more);
                    state.release_publish(&spec(ports), own.1)?;
                    model.ports.retain(|held, by| *held != ports || *by != own);
                }
            }
            Operation::Collect => {
                state.forget_stale(&[NETWORK])?;
                state.forget_unfinished()?;
                model.forget_stale();
            }
            Operation::Damage { .. } => {}
        }
        Ok(model)
    }

    /// Whether what is there is what the model says.
    fn differs(&self, model: &Model) -> Option<String> {
        let state = self.state();
        for of in 0..IDS {
            let found = state.sound_endpoint(&id(of)).unwrap().map(|r| r.number);
            if found != model.records.get(&of).copied() {
                return Some(format!("record of {}: {found:?}", id(of)));
            }
        }
        for last in ADDRESSES {
            let found = state
                .claimed(NETWORK, Claim::Address(address(last)))
                .unwrap();
            if found != model.holder_of(last).map(holder) {
                return Some(format!("holder of .{last}: {found:?}"));
            }
        }
        let claims = state.port_claims().unwrap();
        for port in PORTS.start..PORTS.end + 2 {
            let found = claims.conflict(&spec((port, port)), &[]).unwrap();
            if found.clone().map(|(by, _)| by) != model.publisher_of(port).map(holder) {
                return Some(format!("publisher of {port}: {found:?}"));
            }
        }
        None
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn state_is_what_was_done_and_whatever_dies_did_it_or_did_not(
        steps in prop::collection::vec((operations(), prop::option::weighted(0.3, 0..8usize)), 1..60),
    ) {
        let mut world = World::new();
        for (operation, death) in steps {
            dying::after(death);
            let done = world.apply(&operation);
            dying::after(None);
            match done {
                Ok(after) => world.model = after,
                Err(error) => {
                    prop_assert!(death.is_some(), "{operation:?}: {error}");
                    world.reload();
                    let difference = world.differs(&world.model);
                    let is_collection = matches!(operation, Operation::Collect);
                    // Which of the stale claims went, nobody can see: it is collected again.
                    prop_assert!(!is_collection || difference.is_none(), "{difference:?}");
                    if difference.is_some() || is_collection {
                        // It was over but for the last synchronisation.
                        let after = world.apply(&operation).unwrap();
                        let still = world.differs(&after);
                        prop_assert_eq!(still, None, "{:?}: {:?}", operation, difference);
                        world.model = after;
                    }
                }
            }
            let difference = world.differs(&world.model);
            prop_assert_eq!(difference, None, "{:?}", operation);
        }
        world.state().forget_stale(&[NETWORK]).unwrap();
        world.state().forget_unfinished().unwrap();
        prop_assert_eq!(world.differs(&world.model), None);
        let names = std::fs::read_dir(world.path().join("endpoints")).into_iter().flatten();
        for name in names.map(|entry| entry.unwrap().file_name()) {
            let name = name.to_string_lossy().into_owned();
            prop_assert!(!name.starts_with('.'), "{name}");
        }
    }
}
