//! Static mappings, and the interface from which routes are looked up for them.

use super::World;
use crate::{
    kernel::{
        bpf::{HostInterface, MappingEntries, Prefix},
        claims::Holder,
        netlink::{self, BridgeSpec, Owner},
        sockets::Sockets,
        store,
        sysctl::{self, Family},
    },
    model::{
        Mac, Mtu,
        behaviour::BehaviourWish,
        mapping::MappingSpec,
        record::{MappingRecord, State},
    },
    verbs::{Error, nat},
};

/// The interface from whose point of view routes are looked up for mappings. It carries nothing.
pub(in crate::verbs) const MAPPING_ROUTES: &str = "nucnet-nat";

/// Its alias. No id has a colon in it.
pub(in crate::verbs) fn mapping_routes_alias() -> String {
    format!("{}nat:routes", netlink::ALIAS_PREFIX)
}

/// The entries of a mapping.
pub(in crate::verbs) fn mapping_entries(record: &MappingRecord) -> MappingEntries {
    let ports = record.spec.port_entries(record.number).into_iter();
    let sources = record.spec.source_keys(record.link);
    let prefix = |at: usize| sources.map(|keys| Prefix::new(keys[at].0, keys[at].1));
    MappingEntries {
        number: record.number,
        mapping: record.spec.entry(record.lan, record.link),
        ports: ports
            .map(|(bits, key, value)| (Prefix::new(bits, key), value))
            .collect(),
        is_hairpin: matches!(record.spec, MappingSpec::Hairpin { .. }),
        source: prefix(0),
        shared_source: prefix(1),
    }
}

impl World<'_> {
    pub(super) fn mapping(&self) -> &MappingRecord {
        self.mapping
            .as_ref()
            .expect("steps of a mapping have its record")
    }

    pub(super) fn put_mapping(&mut self, state: State) -> Result<(), Error> {
        if let Some(record) = &mut self.mapping {
            record.state = state;
            self.session.state.put_mapping(record)?;
        }
        Ok(())
    }

    pub(super) fn forget_mapping(&self) -> Result<(), Error> {
        Ok(self.session.state.remove_mapping(&self.mapping().id)?)
    }

    /// The kernel answers route lookups only where it forwards. On an interface of nucnet's own,
    /// which nothing ever comes in by, that changes nothing else.
    pub(super) fn make_mapping_routes(&mut self) -> Result<(), Error> {
        let alias = mapping_routes_alias();
        let (index, _) = self.session.netlink.ensure_bridge(&BridgeSpec {
            name: MAPPING_ROUTES,
            mac: Mac::local(rand::random()).octets(),
            mtu: Mtu::ETHERNET.bytes(),
            alias: &alias,
        })?;
        for family in [Family::Ipv4, Family::Ipv6] {
            match self.session.state.forward(family, MAPPING_ROUTES) {
                // No IPv6.
                Err(store::Error::Sysctl(sysctl::Error::NotFound { .. })) => {}
                result => result?,
            }
        }
        let network = BehaviourWish::default().resolved().abi();
        Ok(self.datapath()?.begin_mapping(index, &network)?)
    }

    /// They go with the last mapping.
    pub(super) fn remove_mapping_routes(&mut self) -> Result<(), Error> {
        let number = self.mapping().number;
        let records = self.session.state.sound_mappings()?;
        if records.iter().any(|record| record.number != number) {
            return Ok(());
        }
        if let Some(datapath) = &mut self.datapath {
            datapath.end_mapping()?;
        }
        let alias = mapping_routes_alias();
        let deleted = self
            .session
            .netlink
            .delete_bridge(MAPPING_ROUTES, Owner::Alias(&alias));
        Ok(deleted.map(drop)?)
    }

    pub(super) fn mapping_holder(&self) -> Holder {
        let record = self.mapping();
        Holder {
            number: record.number,
            id: record.id.clone(),
        }
    }

    pub(super) fn claim_mapping(&self) -> Result<(), Error> {
        let holder = self.mapping_holder();
        for publish in self.mapping().spec.publishes() {
            self.session.state.claim_publish(&publish, &holder)?;
        }
        Ok(())
    }

    pub(super) fn release_mapping(&self) -> Result<(), Error> {
        let number = self.mapping().number;
        for publish in self.mapping().spec.publishes() {
            self.session.state.release_publish(&publish, number)?;
        }
        Ok(())
    }

    pub(super) fn write_mapping(&mut self) -> Result<(), Error> {
        let entries = mapping_entries(self.mapping());
        self.datapath()?.put_mapping(&entries)?;
        // From now on no socket of the host can bind the ports of a dnat; one may have done so
        // since they were looked at. What is repaired was there before whoever listens now came.
        let spec = &self.mapping().spec;
        if self.repairs || !matches!(spec, MappingSpec::Dnat { .. }) {
            return Ok(());
        }
        let sockets = Sockets::default();
        for publish in spec.publishes() {
            if let Some(listener) = sockets.in_the_way(&publish)? {
                return Err(nat::in_use(spec, listener));
            }
        }
        Ok(())
    }

    /// Binds mappings to interfaces that have been made anew under the names of those that they
    /// were bound to.
    pub(super) fn follow_interfaces(&mut self, interfaces: &[HostInterface]) -> Result<(), Error> {
        if self.datapath()?.settings()?.mapping_link == 0 {
            return Ok(());
        }
        for record in self.session.state.sound_mappings()? {
            let Some(name) = record
                .spec
                .ext_if()
                .filter(|_| record.state == State::Active)
            else {
                continue;
            };
            let there = interfaces.iter().find(|there| there.name == name.as_str());
            let Some(interface) = there.filter(|there| there.index != record.link) else {
                continue;
            };
            let moved = MappingRecord {
                link: interface.index,
                ..record.clone()
            };
            self.datapath()?
                .move_mapping(&mapping_entries(&record), &mapping_entries(&moved))?;
            self.session.state.put_mapping(&moved)?;
        }
        Ok(())
    }

    pub(super) fn unwrite_mapping(&mut self) -> Result<(), Error> {
        let record = self.mapping().clone();
        let records = self.session.state.sound_mappings()?;
        let is_last = !records.iter().any(|other| {
            other.number != record.number
                && matches!(
                    (&other.spec, &record.spec),
                    (MappingSpec::Snat { int: theirs, .. }, MappingSpec::Snat { int, .. })
                        if theirs == int
                )
        });
        match &mut self.datapath {
            Some(datapath) => Ok(datapath.remove_mapping(&mapping_entries(&record), is_last)?),
            None => Ok(()),
        }
    }
}
