//! Which address an endpoint gets: one drawn at random from exactly those that are free.
//!
//! An address just released rests for [`REUSE_DELAY`], so that packets of its former owner's
//! peers do not reach the next one. When nothing else is free, the one that has rested longest
//! is given out early: a full network is worth more than the delay.

use super::Subnet;
use ipnet::IpNet;
use rand::Rng;
use std::{
    collections::HashSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    time::Duration,
};

/// How long a released address rests.
pub const REUSE_DELAY: Duration = Duration::from_secs(3);

/// Draws before all leases are listed. With at most half of a network leased, fewer than one
/// draw in 10^19 misses as often.
const DRAWS: usize = 64;

/// What is known of an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// Nobody has it.
    Free,
    /// Somebody has it.
    Leased,
    /// Released at that time, not longer than [`REUSE_DELAY`] ago; any unit that ascends.
    Resting(u64),
}

/// Where the leases of a network are kept.
pub trait Leases {
    /// Why they cannot be read.
    type Error;

    /// The standing of one address.
    fn standing(&self, address: IpAddr) -> Result<Standing, Self::Error>;

    /// All addresses that are not free.
    fn all(&self) -> Result<Vec<(IpAddr, Standing)>, Self::Error>;
}

/// Draws a free address of the subnet, never one of `excluded` (those that interfaces of the
/// host carry). None: the subnet is full. Does not depend on how many are leased, as long as
/// some are free.
pub fn draw<L: Leases>(
    subnet: Subnet,
    excluded: &HashSet<IpAddr>,
    leases: &L,
    rng: &mut impl Rng,
) -> Result<Option<IpAddr>, L::Error> {
    let space = Space::of(subnet);
    for _ in 0..DRAWS {
        let address = space.address(rng.random_range(0..space.size));
        if subnet.check(address).is_ok()
            && !excluded.contains(&address)
            && leases.standing(address)? == Standing::Free
        {
            return Ok(Some(address));
        }
    }
    let all = leases.all()?;
    let mut taken: Vec<u128> = excluded
        .iter()
        .chain(all.iter().map(|(address, _)| address))
        .filter_map(|address| space.offset(*address))
        .chain(space.unusable(subnet))
        .collect();
    taken.sort_unstable();
    taken.dedup();
    let free = space.size - taken.len() as u128;
    if free > 0 {
        // The n-th free one: each taken one at or before it moves it up by one.
        let mut nth = rng.random_range(0..free);
        for offset in taken {
            if offset > nth {
                break;
            }
            nth += 1;
        }
        return Ok(Some(space.address(nth)));
    }
    let rested = all
        .into_iter()
        .filter_map(|(address, standing)| match standing {
            Standing::Resting(since)
                if !excluded.contains(&address) && subnet.check(address).is_ok() =>
            {
                Some((since, address))
            }
            _ => None,
        });
    Ok(rested.min().map(|(_, address)| address))
}

/// The addresses of a subnet, counted from its first.
struct Space {
    net: IpNet,
    size: u128,
}

impl Space {
    fn of(subnet: Subnet) -> Self {
        let net = subnet.cidr().net();
        // A subnet has at least 16 bits of prefix if it is IPv6 and 8 if IPv4: no overflow.
        Self {
            net,
            size: 1 << (net.max_prefix_len() - net.prefix_len()),
        }
    }

    fn address(&self, offset: u128) -> IpAddr {
        match self.net {
            IpNet::V4(net) => Ipv4Addr::from(u32::from(net.network()) + offset as u32).into(),
            IpNet::V6(net) => Ipv6Addr::from(u128::from(net.network()) + offset).into(),
        }
    }

    fn offset(&self, address: IpAddr) -> Option<u128> {
        match (self.net, address) {
            (IpNet::V4(net), IpAddr::V4(v4)) if net.contains(&v4) => {
                Some(u128::from(u32::from(v4) - u32::from(net.network())))
            }
            (IpNet::V6(net), IpAddr::V6(v6)) if net.contains(&v6) => {
                Some(u128::from(v6) - u128::from(net.network()))
            }
            _ => None,
        }
    }

    fn unusable(&self, subnet: Subnet) -> impl Iterator<Item = u128> {
        [self.net.network(), self.net.broadcast(), subnet.gateway()]
            .into_iter()
            .filter(move |address| subnet.check(*address).is_err())
            .filter_map(|address| self.offset(address))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::StdRng};
    use std::{collections::HashMap, convert::Infallible};

    #[derive(Default)]
    struct Model(HashMap<IpAddr, Standing>);

    impl Leases for Model {
        type Error = Infallible;

        fn standing(&self, address: IpAddr) -> Result<Standing, Infallible> {
            Ok(self.0.get(&address).copied().unwrap_or(Standing::Free))
        }

        fn all(&self) -> Result<Vec<(IpAddr, Standing)>, Infallible> {
            Ok(self
                .0
                .iter()
                .map(|(address, standing)| (*address, *standing))
                .collect())
        }
    }

    fn subnet(text: &str) -> Subnet {
        Subnet::new(text.parse().unwrap(), None).unwrap()
    }

    fn draw_from(
        subnet: Subnet,
        excluded: &HashSet<IpAddr>,
        model: &Model,
        rng: &mut StdRng,
    ) -> Option<IpAddr> {
        let Ok(drawn) = draw(subnet, excluded, model, rng);
        drawn
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(500))]
        /// Random leases and releases in small subnets, against the list of all addresses.
        #[test]
        fn draws_are_free_and_fail_only_when_nothing_is(
            (text, seed) in (
                prop::sample::select(vec![
                    "10.0.42.0/30", "10.0.42.8/29", "10.255.255.240/28", "10.0.42.0/26",
                    "fd00::/126", "fd00::8/125", "fd00:ffff:ffff:ffff:ffff:ffff:ffff:ffc0/122",
                ]),
                any::<u64>(),
            ),
            steps in prop::collection::vec((0u8..4, any::<prop::sample::Index>()), 1..120),
        ) {
            let subnet = subnet(text);
            let usable: Vec<IpAddr> = match subnet.cidr().net() {
                IpNet::V4(net) => net.hosts().map(IpAddr::from).collect(),
                IpNet::V6(net) => net.hosts().map(IpAddr::from).collect(),
            };
            let usable: Vec<IpAddr> = usable.into_iter().filter(|a| subnet.check(*a).is_ok()).collect();
            let mut rng = StdRng::seed_from_u64(seed);
            let mut model = Model::default();
            let mut excluded = HashSet::new();
            let mut clock = 0;
            for (what, which) in steps {
                clock += 1;
                match what {
                    0 | 1 => {
                        let free = |a: &&IpAddr| !excluded.contains(*a) && !model.0.contains_key(*a);
                        let drawn = draw_from(subnet, &excluded, &model, &mut rng);
                        if usable.iter().any(|a| free(&a)) {
                            let drawn = drawn.unwrap();
                            prop_assert!(usable.iter().filter(free).any(|a| *a == drawn));
                        } else {
                            let oldest = model.0.iter().filter_map(|(a, s)| match s {
                                Standing::Resting(since) if !excluded.contains(a) => Some((*since, *a)),
                                _ => None,
                            }).min().map(|(_, a)| a);
                            prop_assert_eq!(drawn, oldest);
                        }
                        if let Some(drawn) = drawn {
                            model.0.insert(drawn, Standing::Leased);
                        }
                    }
                    2 if !model.0.is_empty() => {
                        let mut held: Vec<IpAddr> = model.0.keys().copied().collect();
                        held.sort();
                        model.0.insert(*which.get(&held), Standing::Resting(clock));
                    }
                    _ => {
                        excluded.insert(*which.get(&usable));
                    }
                }
            }
        }
    }

    #[test]
    fn every_usable_address_is_given_out_once() {
        for (text, usable) in [
            ("10.0.42.0/30", 1),
            ("10.0.42.0/24", 253),
            ("fd00::/120", 254),
            ("fd00::/126", 2),
        ] {
            let subnet = subnet(text);
            let mut model = Model::default();
            let mut rng = StdRng::seed_from_u64(1);
            for _ in 0..usable {
                let drawn = draw_from(subnet, &HashSet::new(), &model, &mut rng).expect(text);
                assert!(model.0.insert(drawn, Standing::Leased).is_none());
            }
            assert_eq!(
                draw_from(subnet, &HashSet::new(), &model, &mut rng),
                None,
                "{text}"
            );
        }
    }

    #[test]
    fn one_free_address_among_many_is_found() {
        let subnet = subnet("10.0.0.0/16");
        let mut model = Model::default();
        for n in 2..65_535u32 {
            let address = Ipv4Addr::from(0x0a00_0000 + n);
            if n != 777 {
                model.0.insert(address.into(), Standing::Leased);
            }
        }
        let drawn = draw_from(
            subnet,
            &HashSet::new(),
            &model,
            &mut StdRng::seed_from_u64(2),
        );
        assert_eq!(drawn, Some("10.0.3.9".parse().unwrap()));
    }

    #[test]
    fn sixty_five_thousand_leases_do_not_slow_the_draw() {
        /// Counts the questions, and is never asked for the whole list.
        struct Counting<'a>(&'a Model, std::cell::Cell<usize>);

        impl Leases for Counting<'_> {
            type Error = Infallible;

            fn standing(&self, address: IpAddr) -> Result<Standing, Infallible> {
                self.1.set(self.1.get() + 1);
                self.0.standing(address)
            }

            fn all(&self) -> Result<Vec<(IpAddr, Standing)>, Infallible> {
                panic!("half of the network is free")
            }
        }

        let subnet = subnet("10.0.0.0/15");
        let mut model = Model::default();
        let mut rng = StdRng::seed_from_u64(3);
        let mut questions = 0;
        for _ in 0..65_000 {
            let counting = Counting(&model, 0.into());
            let Ok(drawn) = draw(subnet, &HashSet::new(), &counting, &mut rng);
            questions += counting.1.get();
            model.0.insert(drawn.unwrap(), Standing::Leased);
        }
        assert!(questions < 2 * 65_000, "{questions}");
    }

    #[test]
    fn draws_are_spread_over_the_whole_prefix() {
        let subnet = subnet("fd00::/64");
        let mut rng = StdRng::seed_from_u64(4);
        let drawn: HashSet<_> = (0..1_000)
            .filter_map(|_| draw_from(subnet, &HashSet::new(), &Model::default(), &mut rng))
            .collect();
        assert_eq!(drawn.len(), 1_000);
    }
}
