//! What is wrong with a value, and what each kind of error means to the caller.

use serde::{Serialize, Serializer};
use thiserror::Error;

/// The kind of an error: the exit code of the program and the `kind` of the JSON error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// The operation failed. Of a set-up nothing stayed; of a teardown all else went.
    Operation = 1,
    /// Bad command line or bad input. Nothing was touched.
    Usage = 2,
    /// There is no such endpoint, network, namespace or process.
    NotFound = 3,
    /// Taken by somebody else.
    Conflict = 4,
    /// This host cannot do it: privilege, kernel feature, bpffs.
    Unsupported = 5,
}

impl Kind {
    /// The exit code.
    pub fn exit_code(self) -> u8 {
        self as u8
    }

    /// The word in the JSON error.
    pub fn name(self) -> &'static str {
        match self {
            Self::Operation => "operation",
            Self::Usage => "usage",
            Self::NotFound => "not-found",
            Self::Conflict => "conflict",
            Self::Unsupported => "unsupported",
        }
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// A value that is not acceptable: which field, which value, why, and (see [`Invalid::hint`])
/// what would be.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{field} {value:?}: {problem}")]
pub struct Invalid {
    /// The field as the user knows it: `--ip`, `ID`, `-p`.
    pub field: &'static str,
    /// What was given. Displayed with escapes.
    pub value: String,
    /// What is wrong with it.
    pub problem: Problem,
}

impl Invalid {
    pub(crate) fn new(field: &'static str, value: impl ToString, problem: Problem) -> Self {
        Self {
            field,
            value: value.to_string(),
            problem,
        }
    }

    /// The same fault under the name that the caller knows the field by.
    #[must_use]
    pub fn of(mut self, field: &'static str) -> Self {
        self.field = field;
        self
    }

    /// What would be acceptable.
    pub fn hint(&self) -> String {
        self.problem.hint()
    }
}

/// What is wrong with a value.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[allow(missing_docs)] // The messages are the documentation.
pub enum Problem {
    #[error("is not a valid id or name")]
    Name,
    #[error("is not a valid interface name")]
    IfName,
    #[error("is not an address")]
    Address,
    #[error("is not an address with a prefix length")]
    Cidr,
    #[error("is not an IPv4 subnet")]
    NotV4,
    #[error("is not an IPv6 subnet")]
    NotV6,
    #[error("leaves no room for endpoints, or is too large to be meant")]
    SubnetSize,
    #[error("is not unicast address space")]
    SubnetRange,
    #[error("is not a unicast link-layer address")]
    Mac,
    #[error("is not a valid MTU")]
    Mtu,
    #[error("is too small for IPv6")]
    MtuForV6,
    #[error("is outside the subnet {0}")]
    OutsideSubnet(Subnets),
    #[error("is the network's own address")]
    IsNetwork,
    #[error("is the broadcast address of the subnet")]
    IsBroadcast,
    #[error("is the gateway of the network")]
    IsGateway,
    #[error("is the second address of its family")]
    SecondOfFamily,
    #[error("the network has no subnet of that family")]
    NoSubnetOfFamily,
    #[error("is not a publish")]
    Publish,
    #[error("{0:?} is not a port")]
    Port(String),
    #[error("{0:?} is not a port, and 0 may not be published")]
    ContainerPort(String),
    #[error("the range ends before it begins")]
    RangeBackwards,
    #[error("the ranges differ in length: {0} and {1} ports")]
    RangesDiffer(u32, u32),
    #[error("{0:?} is not a protocol that can be published")]
    PublishProtocol(String),
    #[error("an IPv6 address must be in brackets here")]
    NeedsBrackets,
    #[error("only an IPv6 address is written in brackets")]
    BracketsAreForV6,
    #[error("a host address must be unicast and not link-local")]
    HostAddress,
    #[error("overlaps {0}")]
    Overlaps(String),
    #[error("{0:?} is not a port that can be mapped")]
    MappedPort(String),
    #[error("{0} is listed twice")]
    PortsOverlap(String),
    #[error("has more than {0} ports and ranges")]
    TooManyRanges(usize),
    #[error("would have to stand for several ports or ranges")]
    SeveralRanges,
    #[error("the range of {0} ports would end beyond port 65535")]
    RangeTooHigh(u32),
    #[error("nobody can be reached by this address from elsewhere")]
    MappedAddress,
    #[error("is not of the same family as {0}")]
    OtherFamily(std::net::IpAddr),
    #[error("is the external address itself")]
    MappedToItself,
    #[error("is the host's own address")]
    MappedToHost,
    #[error("is in no subnet of this host")]
    NoLan,
    #[error("the endpoint has no address of that family")]
    NoAddressOfFamily,
    #[error("{0:?} is not a port that a rule can name")]
    RulePort(String),
    #[error("is not an egress rule")]
    Rule,
    #[error("{0:?} is not a protocol of egress rules")]
    RuleProtocol(String),
    #[error("icmp has no ports")]
    IcmpPorts,
    #[error("needs more than the {limit} entries that map {map} takes for all policies together")]
    PolicyTooLarge { map: &'static str, limit: usize },
    #[error("cannot be a resolver's address")]
    Resolver,
    #[error("is given twice")]
    Twice,
    #[error("is not a length of time of at most a minute")]
    Sample,
    #[error("has a port, which icmp does not have")]
    NoPort,
    #[error("has no port, which tcp and udp need")]
    NeedsPort,
    #[error("is of a family of which no uplink has an address")]
    NoUplinkOfFamily,
    #[error("is not a kind of filtering")]
    Filtering,
    #[error("is not a kind of mapping")]
    Mapping,
    #[error("is not an idle time")]
    Timeout,
    #[error("is shorter than {rfc} allows")]
    TimeoutTooShort { least: u32, rfc: &'static str },
    #[error("is not the number of a slot")]
    SlotNumber,
    #[error("is beyond slot {limit}, the last one for which {hosts} and {links} have addresses")]
    SlotBeyond {
        limit: u32,
        hosts: String,
        links: String,
    },
    #[error("is no user of this host")]
    User,
    #[error("is no group of this host")]
    Group,
    #[error("is not a guest's address and prefix")]
    GuestNet,
    #[error("is not beside the guest's address {0}")]
    GuestGateway(String),
    #[error("is one more than the {0} that a network can be restricted to")]
    TooManyUplinks(usize),
}

/// Subnets in a message.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subnets(pub Vec<super::Subnet>);

impl std::fmt::Display for Subnets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for (index, subnet) in self.0.iter().enumerate() {
            write!(f, "{}{subnet}", if index > 0 { " or " } else { "" })?;
        }
        Ok(())
    }
}

impl Problem {
    fn hint(&self) -> String {
        let hint = match self {
            Self::Name => "1 to 64 letters, digits, '_', '.' or '-', the first a letter or digit",
            Self::IfName => {
                "1 to 15 letters, digits, '_', '.' or '-', not beginning with '-' or '.', and \
                 neither 'all', 'default' nor 'lo'"
            }
            Self::NoUplinkOfFamily => "name a --source of that family",
            Self::NoPort => "leave the port or --proto out",
            Self::NeedsPort => "write ADDR:PORT, IPv6 in brackets, or --proto icmp",
            Self::SlotNumber => "slots are numbered from 1 on; write N, or A-B for several",
            Self::SlotBeyond { .. } => {
                "take a lower number, or larger ranges by --hosts and --links with the first slot"
            }
            Self::User => "write the name of a user, or a number; see `getent passwd`",
            Self::Group => "write the name of a group, or a number; see `getent group`",
            Self::GuestNet => "write ADDRESS/LENGTH of IPv4, for instance 169.254.0.21/30",
            Self::GuestGateway(_) => "name another address of the guest's subnet",
            Self::Address => "write an IPv4 or IPv6 address, for instance 10.0.42.7 or fd00::7",
            Self::Cidr => "write ADDRESS/LENGTH, for instance 10.0.42.0/24 or fd00::/64",
            Self::NotV4 => "give an IPv4 subnet here and an IPv6 one with --subnet6",
            Self::NotV6 => "give an IPv6 subnet here and an IPv4 one with --subnet",
            Self::SubnetSize => "an IPv4 prefix has 8 to 30 bits, an IPv6 prefix 16 to 126",
            Self::SubnetRange => {
                "not loopback, link-local, multicast or reserved; take private addresses, for \
                 instance 10.0.42.0/24 or fd00::/64"
            }
            Self::Mac => {
                "write six pairs of hexadecimal digits, the first pair even and not all zero, for \
                 instance 02:00:00:00:00:07"
            }
            Self::Mtu => "68 to 65535 bytes",
            Self::MtuForV6 => "1280 bytes or more where there is IPv6",
            Self::OutsideSubnet(_) => "choose an address of the network, or leave it out",
            Self::IsNetwork | Self::IsBroadcast | Self::IsGateway => {
                "choose another address of the network, or leave it out"
            }
            Self::SecondOfFamily => "one IPv4 and one IPv6 address at most",
            Self::NoSubnetOfFamily => "give the network a subnet of that family",
            Self::Publish => {
                "write [HOST_IP:]HOST_PORT[-END]:PORT[-END][/tcp|udp], for instance 8080:80 or \
                 [::1]:5353:53/udp"
            }
            Self::Port(_) => "a port is a number from 0 to 65535",
            Self::ContainerPort(_) => "a port of the endpoint is a number from 1 to 65535",
            Self::RulePort(_) => "a port is a number from 1 to 65535; leave it out for every port",
            Self::RangeBackwards => "write the smaller port first",
            Self::RangesDiffer(..) => "give both ranges the same number of ports",
            Self::PublishProtocol(_) => "tcp or udp",
            Self::NeedsBrackets => "write [ADDRESS]:PORT",
            Self::BracketsAreForV6 => "leave the brackets out",
            Self::HostAddress => {
                "give an address of the host, or leave it out to publish on all of them"
            }
            Self::Overlaps(_) => "publish each port once",
            Self::MappedPort(_) => "write ports from 1 to 65535 and ranges, as in 80,443,8000-8010",
            Self::PortsOverlap(_) => "list each port once",
            Self::TooManyRanges(_) => {
                "write neighbouring ports as a range, or use several mappings"
            }
            Self::SeveralRanges => "give one port or one range, or leave the internal port out",
            Self::RangeTooHigh(_) => "choose a smaller internal port",
            Self::MappedAddress => {
                "give a unicast address that is not loopback, link-local or unspecified"
            }
            Self::OtherFamily(_) => "IPv4 is mapped to IPv4, and IPv6 to IPv6",
            Self::MappedToItself | Self::MappedToHost => {
                "give the address of an endpoint, or of another host"
            }
            Self::NoLan => "say where the clients are with --lan",
            Self::NoAddressOfFamily => "attach to a network of that family, or leave it out",
            Self::Rule => {
                "write CIDR|any|PRESET[:PORT[-END][,PORT[-END]]...][/tcp|udp|icmp], for instance \
                 10.0.0.0/8:443/tcp, [2001:db8::/32]:443, any:53 or private; presets are metadata, \
                 private, host, link-local and internet"
            }
            Self::RuleProtocol(_) => "tcp, udp or icmp",
            Self::IcmpPorts => "leave the ports or the protocol out",
            Self::PolicyTooLarge { .. } => "use fewer or wider rules",
            Self::Resolver => "give a unicast address that the endpoint can reach",
            Self::Twice => "give it once",
            Self::Filtering => {
                "endpoint-independent, address-dependent or address-and-port-dependent"
            }
            Self::Mapping => "endpoint-independent or per-flow",
            Self::Timeout => {
                "write KIND=SECONDS, 30 days at most; KIND is tcp-established, tcp-transitory, \
                 udp, udp-dns or icmp"
            }
            Self::TimeoutTooShort { least, .. } => return format!("{least} seconds or more"),
            Self::TooManyUplinks(_) => "leave --uplink out to serve publishes at all of them",
            Self::Sample => "write 200ms, 1s or 1m, or 0s for none",
        };
        hint.to_owned()
    }
}
