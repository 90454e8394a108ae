//! Sockets of the host that connect to a publish.

use crate::{
    abi::{ANY_V4, ANY_V6, Address, Endpoint, Publish, PublishKey, Settings},
    guard::{is_link_local, is_multicast, own_address},
    nat::published_port,
    packet::{Family, TCP, same},
};

/// Where an address is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Destination {
    /// It is the host's own.
    Local,
    /// It is somebody else's.
    Remote,
}

/// What the decision needs of the kernel.
pub trait Sockets {
    /// What the control plane says.
    fn settings(&self) -> Option<&Settings>;
    /// Cookie of the network namespace of the socket.
    fn netns_cookie(&self) -> u64;
    /// The publish with the longest prefix that covers a key.
    fn publish(&self, key: &PublishKey) -> Option<&Publish>;
    /// The endpoint behind a host side interface.
    fn endpoint(&self, link: u32) -> Option<&Endpoint>;
    /// Binds the socket to the address that it connects to, which tells whose that is.
    fn bind(&self, to: &Address) -> Destination;
}

/// Where a socket is to connect instead.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The endpoint's address.
    pub address: Address,
    /// The endpoint's port.
    pub port: u16,
}

/// Whether the kernel takes an address for the loopback interface: 127.0.0.0/8, `::1`, and the
/// unspecified addresses, which connect to it.
#[inline(always)]
fn is_loopback(address: &Address, family: Family) -> bool {
    match family {
        Family::V4 => address[12] == 127 || same(address, &ANY_V4),
        Family::V6 => {
            let mut loopback = ANY_V6;
            loopback[15] = 1;
            same(address, &loopback) || same(address, &ANY_V6)
        }
    }
}

/// Where a socket that connects to `asked` and `port` is to connect instead, if anywhere.
#[inline(always)]
pub fn redirect<S: Sockets>(
    sockets: &S,
    asked: &Address,
    port: u16,
    protocol: u8,
) -> Option<Target> {
    if protocol != TCP {
        return None;
    }
    let settings = sockets.settings()?;
    if sockets.netns_cookie() != settings.netns_cookie {
        return None;
    }
    let family = Family::of(asked);
    // No publish covers these. Binding would say nothing about them: it takes a group for any
    // host's own, and wants an interface with a link-local address.
    if is_link_local(asked, family) || is_multicast(asked, family) {
        return None;
    }
    // Connecting to "any" is connecting to loopback.
    let mut address = *asked;
    match family {
        Family::V4 if same(asked, &ANY_V4) => {
            address[12] = 127;
            address[15] = 1;
        }
        Family::V6 if same(asked, &ANY_V6) => address[15] = 1,
        _ => {}
    }
    let mut key = PublishKey {
        address,
        protocol,
        pad: 0,
        port: port.to_be_bytes(),
    };
    let mut publish = sockets.publish(&key);
    if publish.is_none() {
        key.address = match family {
            Family::V4 => ANY_V4,
            Family::V6 => ANY_V6,
        };
        publish = sockets.publish(&key);
    }
    let publish = publish?;
    let endpoint = sockets.endpoint(publish.link)?;
    if endpoint.number != publish.endpoint {
        return None;
    }
    let is_local = is_loopback(asked, family)
        || settings.nonlocal_bind == 0 && sockets.bind(asked) == Destination::Local;
    if !is_local {
        return None;
    }
    Some(Target {
        address: *own_address(endpoint, family),
        port: published_port(publish, port),
    })
}
