//! `down`: removes every trace of nucnet from this host.

use super::{
    Error, Host, detach,
    error::Left,
    host::Session,
    nat, netfilter, network, slot,
    step::{World, network_alias},
};
use crate::{
    kernel::{
        bpf::{self, Datapath},
        netlink::{Link, Netlink},
        netns, resolv,
    },
    model::record::{DatapathKind, NetworkRecord, State},
};
use std::collections::HashMap;

impl Host {
    /// Removes all endpoints and networks, the datapath and the state. What cannot be removed
    /// stops nothing else and is listed in the error.
    pub fn down(&self) -> Result<(), Error> {
        let mut left = Left::default();
        let session = self.open_existing()?;
        if let Some(session) = &session {
            let endpoints = session.state.sound_endpoints()?;
            for (id, result) in detach::remove_all(session, endpoints) {
                collect(&mut left, format!("endpoint {id}"), result);
            }
        }
        if let Some(session) = &session {
            for mapping in session.state.sound_mappings()? {
                let what = format!("mapping {}", mapping.id);
                // Its entries go with the datapath, whatever is wrong with that.
                collect(&mut left, what, nat::remove(session, mapping));
            }
        }
        for mount in resolv::mounts(&self.options.state_dir)? {
            let what = format!("mount {}", mount.point().display());
            collect(&mut left, what, mount.remove().map_err(Error::from));
        }
        for path in slot::namespaces(&self.options.state_dir)? {
            let what = format!("network namespace {}", path.display());
            collect(
                &mut left,
                what,
                netns::remove_named(&path).map_err(Error::from),
            );
        }
        // Bridges after their ports.
        remove_unrecorded(|link| link.kind.as_deref() != Some("bridge"), &mut left)?;
        if let Some(session) = &session {
            remove_networks(session, &mut left)?;
        }
        remove_unrecorded(|_| true, &mut left)?;
        // Only this host's: another one's is a conflict.
        match Datapath::open_existing(&self.options.bpffs, &bpf::Host::current()?) {
            Err(error @ bpf::BpfError::OtherHost { .. }) => return Err(error.into()),
            // Whatever else is wrong with it, it goes.
            _ => {
                let problems = Datapath::remove(&self.options.bpffs);
                let what = || format!("the datapath under {}", self.options.bpffs.display());
                left.0
                    .extend(problems.into_iter().map(|error| (what(), error.into())));
            }
        }
        let rules = match &session {
            Some(session) if !session.fresh => match session.kind() {
                DatapathKind::Ebpf => Ok(()),
                DatapathKind::Iptables => netfilter::leave(session),
            },
            _ => Ok(()),
        };
        collect(&mut left, "iptables rules".to_owned(), rules);
        if session.as_ref().is_none_or(|session| session.fresh) {
            // Whatever became of the state, what is nucnet's says so itself.
            collect(
                &mut left,
                "iptables rules".to_owned(),
                netfilter::clear_left_over(),
            );
        }
        left.or("down", ())?;
        match session {
            Some(session) => Ok(session.state.remove_all()?),
            None => Ok(()),
        }
    }

    /// What `down` would remove, in order.
    pub fn plan_down(&self) -> Result<Vec<String>, Error> {
        let mut plan = Vec::new();
        if let Some(store) = self.read()? {
            let (endpoints, _) = store.endpoints()?;
            plan.extend(
                endpoints
                    .iter()
                    .map(|endpoint| format!("detach endpoint {}", endpoint.id)),
            );
            let (mappings, _) = store.mappings()?;
            plan.extend(
                mappings
                    .iter()
                    .map(|mapping| format!("remove mapping {}", mapping.id)),
            );
            let (networks, _) = store.networks()?;
            plan.extend(
                networks
                    .iter()
                    .map(|network| format!("remove network {}", network.name)),
            );
            plan.push(format!("remove the state under {}", store.path().display()));
        }
        if self.options.bpffs.exists() {
            plan.push(format!(
                "remove the datapath under {}",
                self.options.bpffs.display()
            ));
        }
        Ok(plan)
    }
}

fn remove_networks(session: &Session, left: &mut Left) -> Result<(), Error> {
    let mut networks = session.state.sound_networks()?;
    if networks.len() > 1 {
        delete_bridges(session, &mut networks);
    }
    for network in networks {
        let what = format!("network {}", network.name);
        let mut world = World::new(session);
        match session.open_datapath() {
            Ok(datapath) => world.datapath = datapath,
            Err(error @ bpf::BpfError::OtherHost { .. }) => return Err(error.into()),
            // It goes altogether, below.
            Err(_) => {}
        }
        collect(left, what, network::tear_down(&mut world, network));
    }
    Ok(())
}

/// Deletes bridges together, which for many takes little longer than for one: those without
/// ports, once it is on record that their networks go. What stays is tried again on its own, and
/// is reported then.
fn delete_bridges(session: &Session, networks: &mut [NetworkRecord]) {
    let mut bridges = HashMap::new();
    for network in networks {
        network.state = State::Removing;
        let bridge = network.bridge.as_str();
        if session.state.put_network(network).is_ok()
            && session
                .netlink
                .port_count(bridge)
                .is_ok_and(|ports| ports == 0)
        {
            bridges.insert(bridge.to_owned(), network_alias(network));
        }
    }
    let is_theirs = |link: &Link| {
        let alias = bridges.get(&link.name);
        alias.is_some_and(|alias| link.has_alias(alias))
    };
    if let Err(error) = session.netlink.delete_links(is_theirs) {
        tracing::debug!(error = &error as &dyn std::error::Error, "one by one");
    }
}

/// Removes links that carry nucnet's mark, whatever became of their records.
fn remove_unrecorded(which: impl Fn(&Link) -> bool, left: &mut Left) -> Result<(), Error> {
    for (link, error) in Netlink::open()?.delete_links(which)? {
        left.0
            .push((format!("interface {}", link.name), error.into()));
    }
    Ok(())
}

fn collect(left: &mut Left, what: String, result: Result<(), Error>) {
    if let Err(error) = result {
        left.note(what, error);
    }
}
