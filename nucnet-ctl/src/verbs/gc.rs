//! `gc`: finds and removes what dead endpoints, and crashes, left. It touches nothing foreign,
//! and nothing of an endpoint that lives.
//!
//! Whoever holds the lock knows that nobody is in the middle of anything: a record that is not
//! of something whole is left over. What carries nucnet's mark, or a number of nucnet's, and has
//! no record at all, is left over as well. An endpoint whose record was damaged lives on: it is
//! reported, and `detach` removes it.

use super::{
    DatapathChoice, Error, Host, Step, detach,
    egress::settle_recorded,
    error::Left,
    host::Session,
    nat, netfilter, network, publish, slot,
    step::{MAPPING_ROUTES, World, endpoint_alias, mapping_routes_alias, network_alias},
};
use crate::{
    kernel::{
        bpf::{Datapath, Prefix},
        claims::Claim,
        netlink::{self, Link, Owner},
        netns, resolv,
    },
    model::{
        EndpointId,
        plan::Executor,
        record::{DatapathKind, EndpointRecord, NetworkRecord, OtherPolicy, State},
    },
};
use nucnet_common::abi;
use std::collections::{HashMap, HashSet};

/// What a collection found.
#[derive(Clone, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Collected {
    /// What was removed, or would be.
    pub removed: Vec<String>,
    /// Endpoints without a sound record, which stay until they are detached.
    pub unrecorded: Vec<String>,
}

/// Whether to remove what is found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Removal {
    /// It is removed.
    Done,
    /// It is only named.
    Planned,
}

/// Puts programs on uplinks that came up since the last call that did.
fn manage_uplinks(session: &Session) -> Result<(), Error> {
    let mut world = World::new(session);
    world.datapath = session.open_datapath()?;
    match world.datapath {
        Some(_) => world.apply(&Step::Uplinks),
        None if session.kind() == DatapathKind::Iptables => world.apply(&Step::Uplinks),
        None => Ok(()),
    }
}

impl Host {
    /// Removes what is left over, or says what that is. What cannot be removed stops nothing
    /// else and is listed in the error. When nothing is left of nucnet's, datapath and state go
    /// as well.
    pub fn gc(&self, removal: Removal) -> Result<Collected, Error> {
        let Some(mut session) = self.open_existing()? else {
            return self.without_state(removal);
        };
        let is_asked_for = self.options.datapath != DatapathChoice::Auto;
        if removal == Removal::Done && (is_asked_for || session.is_moving()) {
            session.settle_datapath()?;
            session.put_host()?;
        }
        let session = session;
        let mut collection = Collection {
            session: &session,
            removal,
            found: Collected::default(),
            left: Left::default(),
        };
        collection.endpoints()?;
        collection.policies()?;
        collection.mappings()?;
        collection.networks()?;
        collection.slot_namespaces()?;
        collection.links()?;
        collection.neighbours()?;
        collection.entries()?;
        collection.rules()?;
        collection.resolv_confs()?;
        collection.files()?;
        let Collection {
            mut found, left, ..
        } = collection;
        left.or("gc", ())?;
        let is_over = session.state.is_empty()? && found.unrecorded.is_empty();
        if is_over && self.options.bpffs.exists() {
            found
                .removed
                .push(format!("datapath under {}", self.options.bpffs.display()));
        }
        if is_over && removal == Removal::Done {
            // It waits for no lock but its own, which is held.
            leave(self, session)?;
        } else if removal == Removal::Done {
            manage_uplinks(&session)?;
        }
        Ok(found)
    }

    fn without_state(&self, removal: Removal) -> Result<Collected, Error> {
        let owned = netlink::Netlink::open()?
            .links()?
            .into_iter()
            .filter(Link::is_owned);
        let mut removed: Vec<String> = owned
            .map(|link| format!("interface {}", link.name))
            .collect();
        removed.extend(resolv::mounts(&self.options.state_dir)?.iter().map(shown));
        if self.options.bpffs.exists() {
            removed.push(format!("datapath under {}", self.options.bpffs.display()));
        }
        if removal == Removal::Done && !removed.is_empty() {
            self.down()?;
        }
        Ok(Collected {
            removed,
            unrecorded: Vec::new(),
        })
    }
}

fn shown(mount: &resolv::Mount) -> String {
    format!("mount {} ({})", mount.point().display(), mount.id())
}

/// Removes datapath and state, which nothing is recorded in any more.
pub(super) fn leave(host: &Host, session: Session) -> Result<(), Error> {
    if session.kind() == DatapathKind::Iptables {
        netfilter::leave(&session)?;
    }
    // Only this host's: another one's is a conflict, and stays.
    drop(session.open_datapath()?);
    if let Some(error) = Datapath::remove(&host.options.bpffs).pop() {
        return Err(error.into());
    }
    Ok(session.state.remove_all()?)
}

struct Collection<'a> {
    session: &'a Session,
    removal: Removal,
    found: Collected,
    left: Left,
}

impl Collection<'_> {
    /// Removes something, if it is to be removed.
    fn remove(&mut self, what: String, removal: impl FnOnce(&Session) -> Result<(), Error>) {
        let result = match self.removal {
            Removal::Done => removal(self.session),
            Removal::Planned => Ok(()),
        };
        self.note(what, result);
    }

    fn note(&mut self, what: String, result: Result<(), Error>) {
        match result {
            Ok(()) => self.found.removed.push(what),
            Err(error) => self.left.note(what, error),
        }
    }

    fn endpoints(&mut self) -> Result<(), Error> {
        let (mut dead, mut names) = (Vec::new(), Vec::new());
        for endpoint in self.session.state.sound_endpoints()? {
            let is_whole = matches!(endpoint.state, State::Active | State::Degraded);
            if !is_whole || self.session.is_dead(&endpoint)? {
                names.push(format!("endpoint {} ({})", endpoint.id, endpoint.state));
                dead.push(endpoint);
            } else if !endpoint.pending.is_empty() {
                let specs: Vec<String> = endpoint.pending.iter().map(|s| s.to_string()).collect();
                let what = format!("publishes {} of endpoint {}", specs.join(", "), endpoint.id);
                self.remove(what, |session| {
                    publish::take_back_pending(session, endpoint).map(drop)
                });
            }
        }
        match self.removal {
            Removal::Planned => self.found.removed.append(&mut names),
            Removal::Done => {
                let results = detach::remove_all(self.session, dead);
                for (what, (_, result)) in names.into_iter().zip(results) {
                    self.note(what, result);
                }
            }
        }
        Ok(())
    }

    /// Policies that a change has left behind.
    fn policies(&mut self) -> Result<(), Error> {
        for endpoint in self.session.state.sound_endpoints()? {
            if endpoint.other_policy.is_some() {
                let what = format!("an egress policy of {} that is not in force", endpoint.id);
                self.remove(what, |session| settle_recorded(session, endpoint));
            }
        }
        Ok(())
    }

    fn networks(&mut self) -> Result<(), Error> {
        for network in self.session.state.sound_networks()? {
            let is_whole = matches!(network.state, State::Active | State::Degraded);
            let is_wanted = network.wish.is_some() && is_whole;
            if !is_wanted && network::is_unused(self.session, &network)? {
                let what = format!("network {} ({})", network.name, network.state);
                self.remove(what, |session| {
                    let mut world = World::new(session);
                    world.datapath = session.open_datapath()?;
                    network::tear_down(&mut world, network)
                });
            }
        }
        Ok(())
    }

    /// Namespaces that a call made which died before it recorded the slot.
    fn slot_namespaces(&mut self) -> Result<(), Error> {
        let path = self.session.state.path().to_owned();
        let recorded = self.session.state.sound_endpoints()?;
        for unrecorded in slot::unrecorded(&path, &recorded)? {
            let what = format!("network namespace {}", unrecorded.display());
            self.remove(what, |_| Ok(netns::remove_named(&unrecorded)?));
        }
        Ok(())
    }

    /// Static mappings that a call which died was making or removing.
    fn mappings(&mut self) -> Result<(), Error> {
        for mapping in self.session.state.sound_mappings()? {
            if mapping.state != State::Active {
                let what = format!("mapping {} ({})", mapping.id, mapping.state);
                self.remove(what, |session| nat::remove(session, mapping));
            }
        }
        Ok(())
    }

    fn records(&self) -> Result<(Vec<EndpointRecord>, Vec<NetworkRecord>), Error> {
        let state = &self.session.state;
        Ok((state.sound_endpoints()?, state.sound_networks()?))
    }

    /// Links that carry nucnet's mark, and have no record.
    fn links(&mut self) -> Result<(), Error> {
        let (endpoints, networks) = self.records()?;
        let has_mappings = !self.session.state.sound_mappings()?.is_empty();
        let set_aside = self.session.state.set_aside_endpoints()?;
        let mut recorded: HashMap<&str, String> = HashMap::new();
        recorded.extend(
            endpoints
                .iter()
                .map(|e| (e.host_ifname.as_str(), endpoint_alias(e))),
        );
        recorded.extend(
            networks
                .iter()
                .map(|n| (n.bridge.as_str(), network_alias(n))),
        );
        recorded.extend(has_mappings.then(|| (MAPPING_ROUTES, mapping_routes_alias())));
        let is_recorded = |link: &Link| {
            let alias = recorded.get(link.name.as_str());
            alias.is_some_and(|alias| link.has_alias(alias))
        };
        let mut links: Vec<Link> = self.session.netlink.links()?;
        links.retain(|link| link.is_owned() && !is_recorded(link));
        // Bridges after their ports.
        links.sort_by_key(|link| link.kind.as_deref() == Some("bridge"));
        for link in links {
            let owner = link.owner().unwrap_or_default();
            if set_aside.iter().any(|id| id == owner) {
                self.found.unrecorded.push(owner.to_owned());
                continue;
            }
            let what = format!(
                "interface {} ({})",
                link.name,
                link.alias.as_deref().unwrap_or("-")
            );
            self.remove(what, |session| {
                Ok(session
                    .netlink
                    .delete_link(link.index, Owner::Nucnet)
                    .map(drop)?)
            });
        }
        Ok(())
    }

    /// Rules that are not as the records want them.
    fn rules(&mut self) -> Result<(), Error> {
        let session = self.session;
        let Some(netfilter) = netfilter::of_host(&session.record)? else {
            return Ok(());
        };
        let recorded = netfilter::Recorded::of(session)?;
        let differences = netfilter::differences(&netfilter, &recorded.wanted())?;
        if differences.is_empty() {
            return Ok(());
        }
        let what = format!("{} differences of the rules", differences.len());
        self.remove(what, |session| World::new(session).write_recorded_rules());
        Ok(())
    }

    /// Neighbours on nucnet's bridges for addresses of its networks that nobody has.
    fn neighbours(&mut self) -> Result<(), Error> {
        let session = self.session;
        for network in session.state.sound_networks()? {
            let Some(bridge) = session.netlink.find_link(network.bridge.as_str())? else {
                continue;
            };
            for neighbour in session.netlink.neighbours(bridge.index)? {
                let address = neighbour.address;
                if network
                    .subnet_of(address)
                    .is_some_and(|s| s.cidr().contains(address))
                    && session
                        .state
                        .claimed(network.number, Claim::Address(address))?
                        .is_none()
                {
                    self.remove(
                        format!("neighbour {address} on {}", bridge.name),
                        |session| {
                            let removed = session.netlink.remove_neighbour(bridge.index, address);
                            Ok(removed.map(drop)?)
                        },
                    );
                }
            }
        }
        Ok(())
    }

    /// Entries of the maps with numbers that nobody has.
    fn entries(&mut self) -> Result<(), Error> {
        let session = self.session;
        let datapath = session.open_datapath()?;
        let Some(mut datapath) = datapath else {
            return Ok(());
        };
        let (endpoints, networks) = self.records()?;
        let mappings = session.state.sound_mappings()?;
        let mut numbers: HashSet<u32> = endpoints.iter().map(|e| e.number).collect();
        if !mappings.is_empty() {
            numbers.insert(abi::MAPPED);
        }
        let mut policies: HashSet<u32> = endpoints
            .iter()
            .flat_map(|e| {
                [
                    Some(e.policy_in_force().number()),
                    e.other_policy.as_ref().map(OtherPolicy::number),
                ]
            })
            .flatten()
            .collect();
        // Those without a sound record are known by their links.
        for id in &self.found.unrecorded {
            let alias = format!("{}{id}", netlink::ALIAS_PREFIX);
            let links = session.netlink.links()?;
            let own = links.iter().filter(|link| link.has_alias(&alias));
            for link in own {
                if let Some(entry) = datapath.endpoints.get(&link.index)? {
                    numbers.insert(entry.number);
                    policies.insert(entry.policy);
                }
            }
        }
        let is_removed = self.removal == Removal::Done;
        let mut count = |name: &str, entries: usize| {
            if entries > 0 {
                self.found
                    .removed
                    .push(format!("{entries} entries of map {name}"));
            }
        };

        let mut stale = datapath.endpoints.entries()?;
        stale.retain(|(_, entry)| !numbers.contains(&entry.number));
        count(abi::map::ENDPOINTS, stale.len());
        for (link, _) in stale.iter().filter(|_| is_removed) {
            datapath.remove_endpoint(*link)?;
        }
        let mut stale = datapath.guests.entries()?;
        stale.retain(|(_, guest)| !numbers.contains(&guest.endpoint));
        count(abi::map::GUESTS, stale.len());
        for (link, _) in stale.iter().filter(|_| is_removed) {
            datapath.guests.remove(link)?;
        }
        let mut known: HashSet<u32> = networks.iter().map(|n| n.number).collect();
        if !mappings.is_empty() {
            known.insert(abi::MAPPED);
        }
        let mut stale = datapath.networks.entries()?;
        stale.retain(|(number, _)| !known.contains(number));
        count(abi::map::NETWORKS, stale.len());
        for (number, _) in stale.iter().filter(|_| is_removed) {
            datapath.networks.remove(number)?;
        }
        let mut stale = datapath.addresses.entries()?;
        stale.retain(|(_, owner)| !numbers.contains(&owner.endpoint));
        count(abi::map::ADDRESSES, stale.len());
        for (address, _) in stale.iter().filter(|_| is_removed) {
            datapath.addresses.remove(address)?;
        }
        let mut stale = datapath.publishes.entries()?;
        let mapped: HashSet<u32> = mappings.iter().map(|mapping| mapping.number).collect();
        let is_gone = |publish: &abi::Publish| match publish.mapping {
            0 => !numbers.contains(&publish.endpoint),
            mapping => !mapped.contains(&mapping),
        };
        stale.retain(|(_, publish)| is_gone(publish));
        count(abi::map::PUBLISHES, stale.len());
        if is_removed {
            let keys: Vec<_> = stale.into_iter().map(|(key, _)| key).collect();
            datapath.remove_publishes(&keys, is_gone)?;
        }
        let mut stale = datapath.hairpins.entries()?;
        stale.retain(|(_, port)| !mapped.contains(&port.mapping));
        count(abi::map::HAIRPINS, stale.len());
        for (key, _) in stale.iter().filter(|_| is_removed) {
            datapath.hairpins.remove(key)?;
        }
        let sources: HashSet<_> = mappings
            .iter()
            .filter_map(|mapping| mapping.spec.source_keys(mapping.link))
            .flatten()
            .map(|(bits, key)| (bits, key.link, key.source))
            .collect();
        let mut stale = datapath.snats.entries()?;
        stale.retain(|(key, _)| {
            let data = key.data();
            !sources.contains(&(key.prefix_len(), data.link, data.source))
        });
        count(abi::map::SNATS, stale.len());
        for (key, _) in stale.iter().filter(|_| is_removed) {
            datapath.snats.remove(key)?;
        }
        let mut stale = datapath.mappings.entries()?;
        stale.retain(|(number, _)| !mapped.contains(number));
        count(abi::map::MAPPINGS, stale.len());
        for (number, _) in stale.iter().filter(|_| is_removed) {
            datapath.mappings.remove(number)?;
            datapath.end_flows(|_, flow| flow.mapping == *number)?;
        }
        let mut stale = datapath.mapping_counts.mappings()?;
        stale.retain(|number| !mapped.contains(number));
        count(abi::map::MAPPING_COUNTS, stale.len());
        for number in stale.iter().filter(|_| is_removed) {
            datapath.mapping_counts.forget(*number)?;
        }
        if mappings.is_empty() && is_removed && datapath.settings()?.mapping_link != 0 {
            datapath.end_mapping()?;
        }
        let mut stale = datapath.usage.entries()?;
        stale.retain(|(number, _)| !numbers.contains(number));
        count(abi::map::USAGE, stale.len());
        for (number, _) in stale.iter().filter(|_| is_removed) {
            datapath.purge_endpoint(*number)?;
        }

        let policy = |key: &Prefix<abi::PolicyCidrKey>| u32::from_be_bytes(key.data().policy);
        let (kept, stale): (Vec<_>, Vec<_>) = datapath
            .policy_cidrs
            .entries()?
            .into_iter()
            .partition(|(key, _)| policies.contains(&policy(key)));
        count(abi::map::POLICY_CIDRS, stale.len());
        for (key, _) in stale.iter().filter(|_| is_removed) {
            datapath.policy_cidrs.remove(key)?;
        }
        let about_host = datapath.endpoints.entries()?;
        let about_host = about_host.iter().map(|(_, entry)| entry.policy_host);
        let classes: HashSet<u32> = kept
            .iter()
            .map(|(_, class)| class.class)
            .chain(about_host)
            .collect();
        let mut stale = datapath.policy_ports.entries()?;
        stale.retain(|(key, _)| !classes.contains(&u32::from_be_bytes(key.data().class)));
        count(abi::map::POLICY_PORTS, stale.len());
        for (key, _) in stale.iter().filter(|_| is_removed) {
            datapath.policy_ports.remove(key)?;
        }

        if is_removed && !(endpoints.is_empty() && networks.is_empty() && mappings.is_empty()) {
            let mut world = World::new(session);
            world.datapath = Some(datapath);
            world.apply(&Step::Uplinks)?;
        }
        Ok(())
    }

    /// Files for `resolv.conf`, and their mounts, of endpoints that have no record.
    fn resolv_confs(&mut self) -> Result<(), Error> {
        let state = &self.session.state;
        let (endpoints, _) = self.records()?;
        let set_aside = state.set_aside_endpoints()?;
        let is_kept = |id: &str| {
            set_aside.iter().any(|aside| aside == id)
                || endpoints.iter().any(|endpoint| endpoint.id.as_str() == id)
        };
        for mount in resolv::mounts(state.path())? {
            if !is_kept(mount.id()) {
                self.remove(shown(&mount), |_| Ok(mount.remove()?));
            }
        }
        for name in state.staged_resolv_confs()? {
            if !is_kept(&name) {
                self.remove(format!("resolv.conf of {name}"), |session| {
                    Ok(session.state.remove_staged(&name)?)
                });
            }
        }
        Ok(())
    }

    fn files(&mut self) -> Result<(), Error> {
        if self.removal == Removal::Done {
            let (_, networks) = self.records()?;
            let numbers: Vec<u32> = networks.iter().map(|network| network.number).collect();
            let claims = self.session.state.forget_stale(&numbers)?;
            self.found
                .removed
                .extend(claims.into_iter().map(|claim| format!("claim {claim}")));
            let damaged = self.session.state.forget_damaged_mappings()?;
            self.found
                .removed
                .extend(damaged.into_iter().map(|name| format!("record {name}")));
            let unfinished = self.session.state.forget_unfinished()?;
            self.found
                .removed
                .extend(unfinished.into_iter().map(|name| format!("file {name}")));
        }
        Ok(())
    }
}

/// Removes what is left of an endpoint whose record was damaged: what carries its id, or the
/// number that its link has in the maps. `false`: there is nothing of it.
pub(super) fn remove_unrecorded(session: &Session, id: &EndpointId) -> Result<bool, Error> {
    let set_aside = session.state.set_aside_endpoints()?;
    if !set_aside.iter().any(|aside| aside == id.as_str()) {
        return Ok(false);
    }
    let alias = format!("{}{id}", netlink::ALIAS_PREFIX);
    let links = session.netlink.links()?;
    for link in links.iter().filter(|link| link.has_alias(&alias)) {
        let datapath = session.open_datapath()?;
        if let Some(mut datapath) = datapath {
            datapath.remove_endpoint(link.index)?;
        }
        session
            .netlink
            .delete_link(link.index, Owner::Alias(&alias))?;
    }
    session.state.remove_set_aside(id)?;
    // The rest has numbers that nobody has any more.
    let mut collection = Collection {
        session,
        removal: Removal::Done,
        found: Collected::default(),
        left: Left::default(),
    };
    collection.links()?;
    collection.neighbours()?;
    collection.entries()?;
    collection.resolv_confs()?;
    collection.files()?;
    Ok(true)
}
