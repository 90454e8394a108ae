//! Reading the datapath: what it dropped, and what it still remembers.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use aya::Pod;
use aya::maps::lpm_trie::LpmTrie;
use aya::maps::{HashMap, Map, MapData, PerCpuHashMap};
use nucnet_common::abi::{self, DropCount, DropKey, Reason, map};

use super::Lab;

impl Lab {
    /// Packets dropped so far, by reason, all endpoints together.
    ///
    /// # Errors
    /// The map is not pinned or not of this version.
    pub fn drops(&self) -> Result<BTreeMap<&'static str, u64>> {
        if self.datapath == Some("iptables") {
            return self.drops_of_rules();
        }
        let data = self.pinned(map::DROPS)?;
        let drops: PerCpuHashMap<MapData, DropKey, DropCount> = Map::PerCpuHashMap(data)
            .try_into()
            .context("the map of drops")?;
        let mut total = BTreeMap::new();
        for entry in drops.iter() {
            let (key, counts) = entry?;
            let reason = Reason::from_number(key.reason).map_or("unknown", Reason::name);
            *total.entry(reason).or_default() +=
                counts.iter().map(|count| count.packets).sum::<u64>();
        }
        Ok(total)
    }

    /// The same where rules carry packets: their counters, by the reasons in their comments.
    fn drops_of_rules(&self) -> Result<BTreeMap<&'static str, u64>> {
        let mut total = BTreeMap::new();
        for program in ["iptables-save", "ip6tables-save"] {
            for line in self.host.run(program, &["-c"])?.lines() {
                let count = line.strip_prefix('[').and_then(|line| line.split_once(':'));
                let ends = ["-j DROP", "-j REJECT", "-g NUCNET-DROP-"];
                let drops = ends.iter().any(|end| line.contains(end));
                let Some((packets, rule)) = count.filter(|_| drops) else {
                    continue;
                };
                let is_reason = |reason: &&Reason| {
                    let (name, end) = (reason.name(), [' ', '"']);
                    let mut places = rule.match_indices(name);
                    rule.contains("\"nucnet:")
                        && places.any(|(at, _)| {
                            rule[..at].ends_with(' ') && rule[at + name.len()..].starts_with(end)
                        })
                };
                if let Some(reason) = Reason::ALL.iter().find(is_reason)
                    && packets != "0"
                {
                    *total.entry(reason.name()).or_default() += packets.parse::<u64>()?;
                }
            }
        }
        Ok(total)
    }

    /// How many entries the maps have that belong to endpoints, or how many rules there are.
    ///
    /// # Errors
    /// A map is not pinned or not of this version.
    pub fn entries(&self) -> Result<BTreeMap<&'static str, usize>> {
        let mut entries = BTreeMap::new();
        if self.datapath == Some("iptables") {
            for program in ["iptables-save", "ip6tables-save"] {
                let rules = self.host.run(program, &[])?;
                entries.insert(program, rules.matches("-A NUCNET-").count());
            }
            return Ok(entries);
        }
        for name in [
            map::ENDPOINTS,
            map::ADDRESSES,
            map::FLOWS,
            map::OUTSIDE,
            map::BINDINGS,
        ] {
            let data = self.pinned(name)?;
            let count = match name {
                map::ENDPOINTS => keys::<u32, abi::Endpoint>(data),
                map::ADDRESSES => keys::<abi::Address, abi::Owner>(data),
                map::FLOWS => keys::<abi::FlowKey, abi::Flow>(data),
                map::OUTSIDE => keys::<abi::OutsideKey, abi::FlowKey>(data),
                _ => keys::<abi::FlowKey, abi::Binding>(data),
            };
            entries.insert(name, count.with_context(|| format!("the map {name}"))?);
        }
        for name in [map::PUBLISHES, map::POLICY_CIDRS, map::POLICY_PORTS] {
            let data = self.pinned(name)?;
            let count = match name {
                map::PUBLISHES => prefixes::<abi::PublishKey, abi::Publish>(data),
                map::POLICY_CIDRS => prefixes::<abi::PolicyCidrKey, abi::PolicyClass>(data),
                _ => prefixes::<abi::PolicyPortKey, abi::PolicyRule>(data),
            };
            entries.insert(name, count.with_context(|| format!("the map {name}"))?);
        }
        Ok(entries)
    }

    /// Every flow.
    ///
    /// # Errors
    /// The map is not pinned or not of this version.
    pub fn flows(&self) -> Result<Vec<(abi::FlowKey, abi::Flow)>> {
        let map: HashMap<MapData, abi::FlowKey, abi::Flow> =
            Map::HashMap(self.pinned(map::FLOWS)?).try_into()?;
        Ok(map.iter().collect::<Result<_, _>>()?)
    }

    fn pinned(&self, name: &str) -> Result<MapData> {
        let path = self.bpffs().join("maps").join(name);
        MapData::from_pin(&path).with_context(|| format!("opening {}", path.display()))
    }
}

fn keys<K: Pod, V: Pod>(data: MapData) -> Result<usize> {
    let map: HashMap<MapData, K, V> = Map::HashMap(data).try_into()?;
    Ok(map.keys().collect::<Result<Vec<_>, _>>()?.len())
}

fn prefixes<K: Pod, V: Pod>(data: MapData) -> Result<usize> {
    let map: LpmTrie<MapData, K, V> = Map::LpmTrie(data).try_into()?;
    Ok(map.keys().collect::<Result<Vec<_>, _>>()?.len())
}
