//! What the programs have written, to see whether something changed it.

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
    /// drops (but of what interfaces say by themselves).
    ///
    /// # Errors
    /// Nothing is pinned.
    pub fn tables(&self) -> Result<Vec<String>> {
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
