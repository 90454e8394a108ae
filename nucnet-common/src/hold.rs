//! Published ports are taken, and so are those of a dnat: no socket of the host's may bind one.
//!
//! As with a real socket in the way, a port that is published on one address is taken there and
//! for "any address", and one that is published on any address is taken everywhere. Other than
//! with a real socket, `SO_REUSEADDR` and `SO_REUSEPORT` change nothing. A socket that lets the
//! kernel choose its port is left alone: a socket of the host that owns a tuple wins.

use crate::{
    abi::{ANY_V4, ANY_V6, Address, Publish, PublishKey, PublishUse, Settings},
    guard::{is_link_local, is_multicast},
    packet::{Family, TCP, UDP, same},
};

/// `SO_MARK` of sockets that may bind all the same: those with which the control plane finds out
/// whether a port is free. To set it takes the privilege to administer the network.
pub const PROBE_MARK: u32 = 0x6e75_6300;

/// A socket that is about to be bound, and what the decision needs of the kernel.
pub trait Socket {
    /// What the control plane says.
    fn settings(&self) -> Option<&Settings>;
    /// Cookie of its network namespace.
    fn netns_cookie(&self) -> u64;
    /// Its mark.
    fn mark(&self) -> u32;
    /// The publish with the longest prefix that covers a key.
    fn publish(&self, key: &PublishKey) -> Option<&Publish>;
}

/// Whether a port is published, so that the socket must not bind it. An unspecified IPv6 address
/// stands for IPv4 as well: which sockets hear IPv6 only, the kernel does not tell.
#[inline(always)]
pub fn is_published<S: Socket>(socket: &S, address: &Address, port: u16, protocol: u8) -> bool {
    if port == 0 || protocol != TCP && protocol != UDP || socket.mark() == PROBE_MARK {
        return false;
    }
    let Some(settings) = socket.settings() else {
        return false;
    };
    // 0: nobody could tell the control plane which namespace is the host's.
    if settings.netns_cookie == 0 || socket.netns_cookie() != settings.netns_cookie {
        return false;
    }
    let family = Family::of(address);
    // No publish covers these.
    if is_link_local(address, family) || is_multicast(address, family) {
        return false;
    }
    let mut key = PublishKey {
        address: *address,
        protocol,
        kind: PublishUse::Packets as u8,
        port: port.to_be_bytes(),
    };
    if has(socket, &key) {
        return true;
    }
    let any = match family {
        Family::V4 => ANY_V4,
        Family::V6 => ANY_V6,
    };
    if !same(address, &any) {
        key.address = any;
        return has(socket, &key);
    }
    key.kind = PublishUse::Held as u8;
    if has(socket, &key) {
        return true;
    }
    if family == Family::V4 {
        return false;
    }
    key.address = ANY_V4;
    if has(socket, &key) {
        return true;
    }
    key.kind = PublishUse::Packets as u8;
    has(socket, &key)
}

/// Whether a publish or a static mapping covers a key.
#[inline(always)]
fn has<S: Socket>(socket: &S, key: &PublishKey) -> bool {
    socket.publish(key).is_some()
}
