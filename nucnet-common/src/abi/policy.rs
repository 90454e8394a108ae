//! Egress policies.

use super::Address;

/// What a policy does with a packet.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyAction {
    /// Goes on.
    Allow = 1,
    /// Is dropped and counted; answered, if the policy says so ([`super::policy_flag::REJECT`]).
    Deny = 2,
}

/// The data of a key of the trie [`super::map::POLICY_CIDRS`]. An IPv4 prefix of length `n` has
/// `32 + 96 + n` bits, an IPv6 prefix `32 + n`. Whoever compiles a policy must give the whole
/// of mapped IPv4 (`::ffff:0:0/96`) an entry of its own, lest `::/0` speak for IPv4.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyCidrKey {
    /// The policy's number, network byte order.
    pub policy: [u8; 4],
    /// Prefix of the destination.
    pub address: Address,
}

/// All the rules that cover a prefix, overlapping shorter prefixes included (union). Map
/// [`super::map::POLICY_CIDRS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyClass {
    /// Number of the set of rules; unique among all policies; 0: no rule, the default decides.
    pub class: u32,
}

/// Which ports of a class a verdict is for.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PolicyProtocol {
    /// Neither of the others; the port is 0.
    Other = 0,
    /// TCP.
    Tcp = 1,
    /// UDP.
    Udp = 2,
    /// ICMP and ICMPv6; the port is 0.
    Icmp = 3,
}

/// The data of a key of the trie [`super::map::POLICY_PORTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyPortKey {
    /// [`PolicyClass::class`], network byte order.
    pub class: [u8; 4],
    /// [`PolicyProtocol`].
    pub protocol: u8,
    /// Zero: keeps the port, which a prefix may end in, at the end.
    pub pad: u8,
    /// Destination port, network byte order.
    pub port: [u8; 2],
}

/// The verdict for some ports of a class. Map [`super::map::POLICY_PORTS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PolicyRule {
    /// [`PolicyAction`].
    pub action: u32,
    /// Which rule of the policy decides: 1 is the first of the policy as shown.
    pub rule: u32,
}
