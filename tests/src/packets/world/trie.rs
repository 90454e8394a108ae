//! Longest prefix match, as the kernel's tries do it.

use nucnet_common::abi::{PolicyCidrKey, PolicyPortKey, PublishKey, SnatKey};

#[derive(Debug)]
pub(super) struct Trie<K, V>(Vec<(u32, K, V)>);

impl<K, V> Default for Trie<K, V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<K: PartialEq, V> Trie<K, V> {
    pub(super) fn insert(&mut self, bits: u32, key: K, value: V) {
        self.0
            .retain(|(other_bits, other, _)| (*other_bits, other) != (bits, &key));
        self.0.push((bits, key, value));
    }

    /// The value of the longest prefix that covers a key.
    pub(super) fn find(&self, key: &K, bytes: impl Fn(&K) -> Vec<u8>) -> Option<&V> {
        let wanted = bytes(key);
        self.0
            .iter()
            .filter(|(bits, key, _)| starts_equal(&bytes(key), &wanted, *bits))
            .max_by_key(|(bits, ..)| *bits)
            .map(|(.., value)| value)
    }
}

fn starts_equal(one: &[u8], other: &[u8], bits: u32) -> bool {
    one.iter().zip(other).enumerate().all(|(at, (one, other))| {
        let bits = bits.saturating_sub(8 * at as u32).min(8);
        let mask = !(0xff_u8.checked_shr(bits).unwrap_or(0));
        (one ^ other) & mask == 0
    })
}

pub(super) fn publish_bytes(key: &PublishKey) -> Vec<u8> {
    let mut bytes = key.address.to_vec();
    bytes.extend([key.protocol, key.kind]);
    bytes.extend(key.port);
    bytes
}

pub(super) fn snat_bytes(key: &SnatKey) -> Vec<u8> {
    [key.link.as_slice(), &key.source].concat()
}

pub(super) fn cidr_bytes(key: &PolicyCidrKey) -> Vec<u8> {
    [key.policy.as_slice(), &key.address].concat()
}

pub(super) fn port_bytes(key: &PolicyPortKey) -> Vec<u8> {
    let mut bytes = key.class.to_vec();
    bytes.extend([key.protocol, key.pad]);
    bytes.extend(key.port);
    bytes
}
