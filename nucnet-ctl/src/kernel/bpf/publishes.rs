//! Published ports in the maps.

use nucnet_common::abi::{ANY_V4, ANY_V6, Publish, PublishKey, PublishUse};

use super::{BpfError, Datapath, Prefix};

impl Datapath {
    /// Removes entries of publishes and mappings, if they are still those of one that is `gone`.
    /// That a port is held may be said for several: it is, as long as one of them has it.
    pub fn remove_publishes(
        &mut self,
        keys: &[Prefix<PublishKey>],
        gone: impl Fn(&Publish) -> bool,
    ) -> Result<(), BpfError> {
        let (held, packets): (Vec<_>, Vec<_>) = keys
            .iter()
            .partition(|key| key.data().kind == PublishUse::Held as u8);
        for key in packets {
            if self.publishes.get(key)?.is_some_and(|p| gone(&p)) {
                self.publishes.remove(key)?;
            }
        }
        if held.is_empty() {
            return Ok(());
        }
        let left = self.publishes.entries()?;
        for key in held {
            if !self.publishes.get(key)?.is_some_and(|p| gone(&p)) {
                continue;
            }
            match left.iter().find(|(other, _)| holds(other, key)) {
                Some((_, publish)) => self.publishes.insert(key, publish)?,
                None => drop(self.publishes.remove(key)?),
            }
        }
        Ok(())
    }
}

/// Whether an entry for packets to one address is a reason for an entry that holds a port.
fn holds(entry: &Prefix<PublishKey>, held: &Prefix<PublishKey>) -> bool {
    let (data, held_data) = (entry.data(), held.data());
    let is_v4 = |key: &PublishKey| key.address[..12] == ANY_V4[..12];
    data.kind == PublishUse::Packets as u8
        && ![ANY_V4, ANY_V6].contains(&data.address)
        && is_v4(&data) == is_v4(&held_data)
        && (entry.prefix_len(), data.protocol, data.port)
            == (held.prefix_len(), held_data.protocol, held_data.port)
}
