//! What is published: by whom a port of the host's is taken.

use crate::{
    abi::{Address, Publish, PublishKey, PublishUse},
    env::Tables,
    packet::Family,
};

/// The publish that takes packets for a local address and port of the host.
#[inline(never)]
pub fn find_publish<'t, T: Tables>(
    tables: &'t T,
    protocol: u8,
    address: &Address,
    port: u16,
) -> Option<&'t Publish> {
    let mut key = PublishKey {
        address: *address,
        protocol,
        kind: PublishUse::Packets as u8,
        port: port.to_be_bytes(),
    };
    if let Some(publish) = tables.publish(&key) {
        return Some(publish);
    }
    key.address = Family::of(address).any();
    tables.publish(&key)
}

/// The endpoint's port behind a host port of a publish.
#[inline(always)]
pub fn published_port(publish: &Publish, host_port: u16) -> u16 {
    host_port
        .wrapping_sub(publish.host_port)
        .wrapping_add(publish.port)
}
