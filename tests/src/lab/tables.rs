//! What packets leave behind, to see whether something changed it.

use anyhow::Result;
use aya::{
    Pod,
    maps::{Array, HashMap, Map, MapData, PerCpuHashMap},
};
use nucnet_common::abi::{
    Binding, DropCount, DropKey, Flow, FlowKey, OutsideKey, Reason, Slot, SlotUse, Usage, map,
};

use super::Lab;

impl Lab {
    /// Every entry that only programs write: flows, external views, bindings, places, usage,
    /// drops (but of what interfaces say by themselves). Where rules carry packets: connections,
    /// and the counters of rules that drop or translate.
    ///
    /// # Errors
    /// Nothing is pinned.
    pub fn tables(&self) -> Result<Vec<String>> {
        if self.datapath == Some("iptables") {
            return self.counts_and_connections();
        }
        let mut lines = self.table::<FlowKey, Flow>(map::FLOWS)?;
        lines.extend(self.table::<OutsideKey, FlowKey>(map::OUTSIDE)?);
        lines.extend(self.table::<FlowKey, Binding>(map::BINDINGS)?);
        lines.extend(self.table::<u32, Usage>(map::USAGE)?);
        let drops: PerCpuHashMap<_, DropKey, DropCount> =
            Map::PerCpuHashMap(self.map(map::DROPS)?).try_into()?;
        for entry in drops.iter() {
            let (key, counts) = entry?;
            // What containers and host say to their link by themselves, after they came up.
            if key.endpoint == 0 || key.reason == Reason::Discovery as u32 {
                continue;
            }
            lines.push(format!("{} {key:?}: {:?}", map::DROPS, &*counts));
        }
        let slots: Array<_, Slot> = Map::Array(self.map(map::SLOTS)?).try_into()?;
        for (index, slot) in slots.iter().enumerate() {
            let slot = slot?;
            if slot.holds != SlotUse::Free as u32 || slot.version != 0 {
                lines.push(format!("{} {index}: {slot:?}", map::SLOTS));
            }
        }
        lines.sort();
        Ok(lines)
    }

    fn counts_and_connections(&self) -> Result<Vec<String>> {
        let mut lines = Vec::new();
        for program in ["iptables-save", "ip6tables-save"] {
            let rules = self.host.run(program, &["-c"])?;
            // Rules that lead to a drop count it, for their owner.
            let decides = |line: &&str| {
                let targets = [
                    "-g NUCNET-DROP-",
                    "-j DROP",
                    "-j REJECT",
                    "-j DNAT",
                    "-j SNAT",
                    "-j MASQ",
                ];
                targets.iter().any(|target| line.contains(target))
                    && !line.contains(Reason::Discovery.name())
            };
            lines.extend(rules.lines().filter(decides).map(str::to_owned));
        }
        let flows = self.nucnet(&["-o", "json", "flows"])?.expect(0)?.json()?;
        for flow in flows.as_array().into_iter().flatten() {
            let of = |key: &str| format!("{key} {}", flow[key]);
            let known = ["id", "protocol", "nat_sport", "state", "packets", "bytes"];
            lines.push(known.map(of).join(" "));
        }
        lines.sort();
        Ok(lines)
    }

    fn map(&self, name: &str) -> Result<MapData> {
        Ok(MapData::from_pin(self.bpffs().join("maps").join(name))?)
    }

    fn table<K: Pod + std::fmt::Debug, V: Pod + std::fmt::Debug>(
        &self,
        name: &str,
    ) -> Result<Vec<String>> {
        let table: HashMap<_, K, V> = Map::HashMap(self.map(name)?).try_into()?;
        let line = |entry: Result<(K, V), _>| {
            let (key, value) = entry?;
            Ok(format!("{name} {key:?}: {value:?}"))
        };
        table.iter().map(line).collect()
    }
}
