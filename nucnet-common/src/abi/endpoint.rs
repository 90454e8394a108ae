//! Endpoints, the guests of microVMs, and who has which address.

use super::{Address, Mac};

/// How packets reach an endpoint.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delivery {
    /// Through the peer of a veth pair (`bpf_redirect_peer`).
    Peer = 1,
    /// Out of the interface itself (`bpf_redirect`): a TAP.
    Link = 2,
}

/// Flags of an endpoint's policy, [`Endpoint::policy_flags`].
pub mod policy_flag {
    /// Denials are counted, and told to nobody.
    pub const QUIET: u32 = 1;
    /// What is denied is answered, so that whoever sent it need not wait.
    pub const REJECT: u32 = 2;
}

/// A container or microVM. Map [`super::map::ENDPOINTS`], key: the index of its host side
/// interface.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Endpoint {
    /// Identity and generation in one: never given twice while the maps live.
    pub number: u32,
    /// Number of its network.
    pub network: u32,
    /// Interface index of its network's bridge: the point of view for route lookups, for which
    /// forwarding must be on there.
    pub bridge: u32,
    /// [`Delivery`].
    pub delivery: u32,
    /// Policy in force; 0: none, everything may leave. Never given twice.
    pub policy: u32,
    /// What the policy says where no rule does: [`super::PolicyAction`].
    pub policy_default: u32,
    /// Flows that were judged under this policy, or a later one, are not judged again.
    pub policy_since: u32,
    /// Class of the policy's rules about the host's own addresses; 0: there is none.
    pub policy_host: u32,
    /// [`policy_flag`] bits.
    pub policy_flags: u32,
    /// IPv4 address, or zero bytes: none.
    pub address4: Address,
    /// IPv6 address, or zero bytes: none.
    pub address6: Address,
    /// The network's own IPv4 address, or zero bytes.
    pub gateway4: Address,
    /// The network's own IPv6 address, or zero bytes.
    pub gateway6: Address,
    /// Its link-layer address.
    pub mac: Mac,
    /// The link-layer address of its network's bridge.
    pub gateway_mac: Mac,
    /// 1: no direct traffic to or from other networks.
    pub isolated: u32,
    /// Largest IP packet that it takes, in bytes.
    pub mtu: u32,
    /// Zero; for later versions.
    pub reserved: [u8; 16],
}

/// A microVM's guest, at either end of its slot. Map [`super::map::GUESTS`].
///
/// The two interfaces of a slot have indexes that no other slot's have, although each slot is a
/// network namespace of its own.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Guest {
    /// The endpoint's number.
    pub endpoint: u32,
    /// The interface at the other end: the slot's side of its veth pair from the TAP, and the TAP
    /// from there.
    pub across: u32,
    /// The address that the guest has itself.
    pub address: Address,
    /// Its gateway, as it has it.
    pub gateway: Address,
    /// The address that everybody else knows the guest by: the endpoint's.
    pub outer_address: Address,
    /// The host's address on the link to the slot, which the guest knows as its gateway: the
    /// endpoint's gateway.
    pub outer_gateway: Address,
    /// Zero; for later versions.
    pub reserved: [u8; 8],
}

/// Whose address it is. Map [`super::map::ADDRESSES`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Owner {
    /// Index of the endpoint's host side interface: the key of [`super::map::ENDPOINTS`].
    pub link: u32,
    /// The endpoint's number.
    pub endpoint: u32,
}

/// What an endpoint uses. Map [`super::map::USAGE`], key: the endpoint's number. Exact: changed by
/// whoever's map operation succeeded, never guessed.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Flows in the table, live and not yet reclaimed.
    pub flows: u64,
    /// Bindings in the table.
    pub bindings: u64,
}
