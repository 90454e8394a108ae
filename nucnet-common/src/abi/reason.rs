//! Why packets are dropped, and how many were.

/// Key of [`super::map::DROPS`].
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct DropKey {
    /// The endpoint's number; 0: none is known.
    pub endpoint: u32,
    /// [`Reason`].
    pub reason: u32,
}

/// Value of [`super::map::DROPS`], per CPU.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DropCount {
    /// Packets.
    pub packets: u64,
    /// Bytes, link-layer header included.
    pub bytes: u64,
}

macro_rules! reasons {
    ($($(#[doc = $doc:literal])+ $name:ident = $number:literal, $text:literal;)+) => {
        /// Why a packet was dropped: verdict, counter and display text in one.
        #[repr(u32)]
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Reason { $($(#[doc = $doc])+ $name = $number,)+ }

        impl Reason {
            /// Every reason.
            pub const ALL: &'static [Self] = &[$(Self::$name,)+];

            /// The name that people and programs read; stable.
            pub const fn name(self) -> &'static str {
                match self { $(Self::$name => $text,)+ }
            }

            /// The reason with that name.
            pub fn named(name: &str) -> Option<Self> {
                Self::ALL.iter().copied().find(|reason| reason.name() == name)
            }

            /// The reason with that number.
            pub const fn from_number(number: u32) -> Option<Self> {
                match number { $($number => Some(Self::$name),)+ _ => None }
            }
        }
    };
}

reasons! {
    /// The frame came from an interface without an endpoint.
    NoEndpoint = 1, "no-endpoint";
    /// The source link-layer address is not the endpoint's.
    SpoofedMac = 2, "spoofed-mac";
    /// The source IP address, or an address inside ARP or neighbour discovery, is not the endpoint's.
    SpoofedAddress = 3, "spoofed-address";
    /// Neither IPv4, IPv6 nor ARP: VLAN tags, for instance.
    NotIp = 4, "not-ip";
    /// Cut short or malformed.
    Malformed = 5, "malformed";
    /// A fragment other than the first, and the first one has not been seen, or too long ago.
    Fragment = 6, "fragment";
    /// An IP protocol that is not translated.
    Protocol = 7, "protocol";
    /// IPv6 extension headers that hide what follows.
    ExtensionHeader = 8, "extension-header";
    /// Multicast or broadcast; nucnet carries neither.
    Multicast = 9, "multicast";
    /// Link-local source or destination, neighbour discovery aside.
    LinkLocal = 10, "link-local";
    /// A loopback, unspecified or otherwise impossible address.
    Martian = 11, "martian";
    /// Only routers and servers send this: router advertisement, redirect, DHCP reply.
    Infrastructure = 12, "infrastructure";
    /// The time to live or hop limit is used up.
    TtlExceeded = 13, "ttl-exceeded";
    /// An egress rule, or the default of the policy, denies it.
    Policy = 14, "policy";
    /// Not the first packet of a connection, and no flow is known.
    NoFlow = 15, "no-flow";
    /// The endpoint has as many flows as one may have.
    FlowQuota = 16, "flow-quota";
    /// The table of flows has no place that is free or dead.
    FlowTableFull = 17, "flow-table-full";
    /// No external port is free.
    PortsExhausted = 18, "ports-exhausted";
    /// No route to the destination.
    NoRoute = 19, "no-route";
    /// The route leads out of an interface on which nucnet has no program yet.
    UplinkUnmanaged = 20, "uplink-unmanaged";
    /// The destination is in a managed network, and nobody has the address.
    NoSuchAddress = 21, "no-such-address";
    /// One of the two networks is isolated.
    Isolated = 22, "isolated";
    /// From outside, to what is not published.
    NotPublished = 23, "not-published";
    /// From outside, with a source that only the host or an endpoint has.
    MartianSource = 24, "martian-source";
    /// From outside, to a dynamic port, by a peer that the endpoint never spoke to.
    Filtered = 25, "filtered";
    /// An address in the packet has no owner who could answer for it (ARP, neighbour solicitation).
    NoNeighbour = 26, "no-neighbour";
    /// A helper of the kernel refused what should always work.
    Helper = 27, "helper";
    /// Router solicitations, duplicate address detection and listener reports of an endpoint:
    /// every start sends some, and nobody has to hear them; monitors are not told.
    Discovery = 28, "discovery";
    /// Longer than the link takes that it is to leave by, or the endpoint that it is for.
    TooBig = 29, "too-big";
    /// IPv4 options, from an endpoint with a policy: they may lead a packet elsewhere.
    IpOptions = 30, "ip-options";
}
