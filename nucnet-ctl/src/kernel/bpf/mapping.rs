//! Static mappings in the maps.

use nucnet_common::abi::{
    MAPPED, Network, Publish, PublishKey, PublishUse, Snat, SnatKey, StaticMapping, Usage,
};

use super::{BpfError, Datapath, Prefix};

/// All entries of one mapping.
pub struct MappingEntries {
    /// Its number.
    pub number: u32,
    /// What it translates.
    pub mapping: StaticMapping,
    /// Its ports.
    pub ports: Vec<(Prefix<PublishKey>, Publish)>,
    /// Whether the ports are those of a hairpin.
    pub is_hairpin: bool,
    /// Its source, and where that holds.
    pub source: Option<Prefix<SnatKey>>,
    /// Its source, as every mapping has it that has the same.
    pub shared_source: Option<Prefix<SnatKey>>,
}

impl Datapath {
    /// Has the programs look for mappings, from the point of view of an interface; `network` is
    /// what holds for hosts that are in no network.
    pub fn begin_mapping(&mut self, link: u32, network: &Network) -> Result<(), BpfError> {
        self.networks.insert(&MAPPED, network)?;
        if self.usage.get(&MAPPED)?.is_none() {
            self.usage.insert(&MAPPED, &Usage::default())?;
        }
        self.set_mapping_link(link)
    }

    /// Has the programs look for mappings no more, and forgets the flows of hosts that are no
    /// endpoints.
    pub fn end_mapping(&mut self) -> Result<(), BpfError> {
        self.set_mapping_link(0)?;
        self.purge_endpoint(MAPPED)?;
        self.networks.remove(&MAPPED)?;
        Ok(())
    }

    /// Makes a mapping known, or changes it.
    pub fn put_mapping(&mut self, entries: &MappingEntries) -> Result<(), BpfError> {
        self.mapping_counts.begin(entries.number)?;
        self.mappings.insert(&entries.number, &entries.mapping)?;
        let ports = match entries.is_hairpin {
            true => &mut self.hairpins,
            false => &mut self.publishes,
        };
        ports.insert_all(&entries.ports)?;
        let snat = Snat {
            mapping: entries.number,
        };
        for key in entries.source.iter().chain(&entries.shared_source) {
            self.snats.insert(key, &snat)?;
        }
        Ok(())
    }

    /// Forgets a mapping, and ends what came by it. The shared source goes if `is_last`: no other
    /// mapping has it.
    pub fn remove_mapping(
        &mut self,
        entries: &MappingEntries,
        is_last: bool,
    ) -> Result<(), BpfError> {
        let number = entries.number;
        let keys: Vec<_> = entries.ports.iter().map(|(key, _)| *key).collect();
        if entries.is_hairpin {
            for key in &keys {
                if (self.hairpins.get(key)?).is_some_and(|port| port.mapping == number) {
                    self.hairpins.remove(key)?;
                }
            }
        } else {
            self.remove_publishes(&keys, |port| port.mapping == number)?;
        }
        self.remove_source(entries)?;
        if let Some(key) = entries.shared_source.as_ref().filter(|_| is_last) {
            self.snats.remove(key)?;
        }
        self.mappings.remove(&number)?;
        self.end_flows(|_, flow| flow.mapping == number)?;
        self.mapping_counts.forget(number)?;
        Ok(())
    }

    /// Binds a mapping to another interface; all else is the same.
    pub fn move_mapping(
        &mut self,
        before: &MappingEntries,
        after: &MappingEntries,
    ) -> Result<(), BpfError> {
        self.remove_source(before)?;
        self.put_mapping(after)
    }

    /// Has a mapping hold for its source no more.
    fn remove_source(&mut self, entries: &MappingEntries) -> Result<(), BpfError> {
        if let Some(key) = &entries.source
            && (self.snats.get(key)?).is_some_and(|snat| snat.mapping == entries.number)
        {
            self.snats.remove(key)?;
        }
        Ok(())
    }

    /// How many entries of a mapping are missing.
    pub fn missing_entries(&self, entries: &MappingEntries) -> Result<usize, BpfError> {
        let number = entries.number;
        let ports = match entries.is_hairpin {
            true => &self.hairpins,
            false => &self.publishes,
        };
        let mut missing = usize::from(self.mappings.get(&number)? != Some(entries.mapping));
        for (key, value) in &entries.ports {
            let entry = ports.get(key)?;
            // Others may say as well that the port is held.
            let is_shared = key.data().kind == PublishUse::Held as u8;
            let is_there = entry.is_some_and(|entry| is_shared || entry == *value);
            missing += usize::from(!is_there);
        }
        if let Some(key) = &entries.source {
            missing += usize::from(self.snats.get(key)? != Some(Snat { mapping: number }));
        }
        if let Some(key) = &entries.shared_source {
            missing += usize::from(self.snats.get(key)?.is_none());
        }
        Ok(missing)
    }
}
