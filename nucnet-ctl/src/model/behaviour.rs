//! How a network translates: filtering, mapping, idle times.
//!
//! The words are those of RFC 4787, and so are the defaults where it names any.

use super::{Invalid, Problem};
use nucnet_common::abi;
use serde::{Deserialize, Serialize};
use std::{collections::BTreeMap, fmt, str::FromStr};

/// Longest idle time that may be asked for, in seconds: 30 days.
pub const LONGEST_TIMEOUT: u32 = 2_592_000;

macro_rules! words {
    (
        $(#[$doc:meta])+ $name:ident, $field:literal, $problem:expr;
        $($(#[$word_doc:meta])+ $variant:ident = $text:literal,)+
    ) => {
        $(#[$doc])+
        #[derive(
            Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize,
        )]
        #[serde(rename_all = "kebab-case")]
        pub enum $name { $($(#[$word_doc])+ $variant,)+ }

        impl $name {
            /// The word for it.
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }
        }

        impl FromStr for $name {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                match text {
                    $($text => Ok(Self::$variant),)+
                    _ => Err(Invalid::new($field, text, $problem)),
                }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(self.word())
            }
        }
    };
}

words! {
    /// Whose packets reach an endpoint by an external port that it has.
    Filtering, "--filtering", Problem::Filtering;
    /// Anybody's; for an endpoint with an egress policy as `address-dependent`.
    EndpointIndependent = "endpoint-independent",
    /// Those of addresses that it has sent something to.
    AddressDependent = "address-dependent",
    /// Those of addresses and ports that it has sent something to.
    AddressAndPortDependent = "address-and-port-dependent",
}

words! {
    /// How external ports are chosen.
    Mapping, "--mapping", Problem::Mapping;
    /// One for all peers of an inside port.
    EndpointIndependent = "endpoint-independent",
    /// One for each flow.
    PerFlow = "per-flow",
}

words! {
    /// What an idle time is for.
    TimeoutKind, "--timeout", Problem::Timeout;
    /// An established TCP connection.
    TcpEstablished = "tcp-established",
    /// A half-open or closing TCP connection.
    TcpTransitory = "tcp-transitory",
    /// A UDP flow and its binding.
    Udp = "udp",
    /// The same towards port 53.
    UdpDns = "udp-dns",
    /// An ICMP query.
    Icmp = "icmp",
}

impl TimeoutKind {
    /// In seconds. For TCP a minute more than two hours of keep-alive would not be enough; for
    /// DNS, a resolver that does not answer within this never will.
    fn default_seconds(self) -> u32 {
        match self {
            Self::TcpEstablished => 7_440,
            Self::TcpTransitory => 240,
            Self::Udp => 300,
            Self::UdpDns => 10,
            Self::Icmp => 60,
        }
    }

    /// The least that may be asked for, in seconds, and who says so.
    fn least(self) -> (u32, &'static str) {
        match self {
            Self::TcpEstablished => (7_440, "RFC 5382 REQ-5"),
            Self::TcpTransitory => (240, "RFC 5382 REQ-5"),
            Self::Udp => (120, "RFC 4787 REQ-5"),
            // RFC 4787 REQ-5a allows less than two minutes for well-known ports.
            Self::UdpDns => (1, "a whole second"),
            Self::Icmp => (60, "RFC 5508 REQ-2"),
        }
    }
}

/// An idle time that was asked for: `KIND=SECONDS`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeout {
    /// What it is for.
    pub kind: TimeoutKind,
    /// How long.
    pub seconds: u32,
}

impl FromStr for Timeout {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let invalid = |problem| Invalid::new("--timeout", text, problem);
        let (kind, seconds) = text
            .split_once('=')
            .ok_or_else(|| invalid(Problem::Timeout))?;
        let kind: TimeoutKind = kind.parse().map_err(|_| invalid(Problem::Timeout))?;
        let seconds = seconds
            .parse()
            .ok()
            .filter(|seconds| *seconds <= LONGEST_TIMEOUT)
            .ok_or_else(|| invalid(Problem::Timeout))?;
        let (least, rfc) = kind.least();
        if seconds < least {
            return Err(invalid(Problem::TimeoutTooShort { least, rfc }));
        }
        Ok(Self { kind, seconds })
    }
}

/// What was asked for. Absent: the default.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct BehaviourWish {
    /// Filtering.
    pub filtering: Option<Filtering>,
    /// Mapping of UDP.
    pub udp_mapping: Option<Mapping>,
    /// Mapping of TCP.
    pub tcp_mapping: Option<Mapping>,
    /// Whether source ports are kept where they can be.
    pub keep_ports: bool,
    /// Idle times in seconds.
    pub timeouts: BTreeMap<TimeoutKind, u32>,
}

/// How a network translates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Behaviour {
    /// Filtering.
    pub filtering: Filtering,
    /// Mapping of UDP.
    pub udp_mapping: Mapping,
    /// Mapping of TCP.
    pub tcp_mapping: Mapping,
    /// Whether source ports are kept where they can be.
    pub keep_ports: bool,
    /// Idle times.
    pub timeouts: Timeouts,
}

/// Idle times in seconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct Timeouts {
    /// An established TCP connection.
    pub tcp_established: u32,
    /// A half-open or closing TCP connection.
    pub tcp_transitory: u32,
    /// A UDP flow and its binding.
    pub udp: u32,
    /// The same towards port 53.
    pub udp_dns: u32,
    /// An ICMP query.
    pub icmp: u32,
}

impl BehaviourWish {
    /// What was asked for that netfilter does in its own way, by the flags. It lets in answers of
    /// the very address and port that was asked, maps each flow by itself, and has the host's idle
    /// times.
    pub fn beyond_netfilter(&self) -> Vec<&'static str> {
        let filters = |filtering| filtering != Filtering::AddressAndPortDependent;
        let maps = |mapping| mapping != Mapping::PerFlow;
        let flags = [
            (self.filtering.is_some_and(filters), "--filtering"),
            (self.udp_mapping.is_some_and(maps), "--udp-mapping"),
            (self.tcp_mapping.is_some_and(maps), "--tcp-mapping"),
            (!self.timeouts.is_empty(), "--timeout"),
        ];
        let flags = flags.into_iter().filter(|(is_beyond, _)| *is_beyond);
        flags.map(|(_, flag)| flag).collect()
    }

    /// With the defaults filled in.
    pub fn resolved(&self) -> Behaviour {
        let timeout = |kind: TimeoutKind| {
            let asked = self.timeouts.get(&kind).copied();
            asked.unwrap_or_else(|| kind.default_seconds())
        };
        Behaviour {
            filtering: self.filtering.unwrap_or(Filtering::AddressDependent),
            udp_mapping: self.udp_mapping.unwrap_or(Mapping::EndpointIndependent),
            tcp_mapping: self.tcp_mapping.unwrap_or(Mapping::PerFlow),
            keep_ports: self.keep_ports,
            timeouts: Timeouts {
                tcp_established: timeout(TimeoutKind::TcpEstablished),
                tcp_transitory: timeout(TimeoutKind::TcpTransitory),
                udp: timeout(TimeoutKind::Udp),
                udp_dns: timeout(TimeoutKind::UdpDns),
                icmp: timeout(TimeoutKind::Icmp),
            },
        }
    }
}

impl Behaviour {
    /// The first flag in which two differ.
    pub fn difference(&self, other: &Self) -> Option<&'static str> {
        [
            (self.filtering != other.filtering, "--filtering"),
            (self.udp_mapping != other.udp_mapping, "--udp-mapping"),
            (self.tcp_mapping != other.tcp_mapping, "--tcp-mapping"),
            (self.keep_ports != other.keep_ports, "--keep-ports"),
            (self.timeouts != other.timeouts, "--timeout"),
        ]
        .into_iter()
        .find_map(|(differs, flag)| differs.then_some(flag))
    }

    /// As the programs read it, without uplinks.
    pub fn abi(&self) -> abi::Network {
        let mapping = |mapping| match mapping {
            Mapping::EndpointIndependent => abi::Mapping::EndpointIndependent as u32,
            Mapping::PerFlow => abi::Mapping::PerFlow as u32,
        };
        abi::Network {
            tcp_established_s: self.timeouts.tcp_established,
            tcp_transitory_s: self.timeouts.tcp_transitory,
            udp_s: self.timeouts.udp,
            udp_dns_s: self.timeouts.udp_dns,
            icmp_s: self.timeouts.icmp,
            filtering: match self.filtering {
                Filtering::EndpointIndependent => abi::Filtering::EndpointIndependent,
                Filtering::AddressDependent => abi::Filtering::AddressDependent,
                Filtering::AddressAndPortDependent => abi::Filtering::AddressAndPortDependent,
            } as u32,
            udp_mapping: mapping(self.udp_mapping),
            tcp_mapping: mapping(self.tcp_mapping),
            keeps_ports: self.keep_ports.into(),
            ..abi::Network::default()
        }
    }
}

impl fmt::Display for Behaviour {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            filtering,
            udp_mapping,
            tcp_mapping,
            ..
        } = self;
        write!(
            f,
            "filtering {filtering}, mapping of UDP {udp_mapping}, of TCP {tcp_mapping}"
        )?;
        if self.keep_ports {
            f.write_str(", source ports kept")?;
        }
        let times = &self.timeouts;
        write!(
            f,
            "; idle times: tcp-established {} s, tcp-transitory {} s, udp {} s, udp-dns {} s, \
             icmp {} s",
            times.tcp_established, times.tcp_transitory, times.udp, times.udp_dns, times.icmp
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_those_of_the_rfcs() {
        let network = BehaviourWish::default().resolved().abi();
        assert_eq!(network.tcp_established_s, 7_440);
        assert_eq!(network.tcp_transitory_s, 240);
        assert_eq!(
            (network.udp_s, network.udp_dns_s, network.icmp_s),
            (300, 10, 60)
        );
        // Address-dependent filtering; endpoint-independent mapping of UDP, not of TCP.
        assert_eq!(
            (network.filtering, network.udp_mapping, network.tcp_mapping),
            (0, 0, 1)
        );
        assert_eq!((network.keeps_ports, network.is_restricted), (0, 0));
    }

    #[test]
    fn idle_times_are_not_shorter_than_the_rfcs_allow() {
        for (text, least) in [
            ("tcp-established=7439", 7_440),
            ("tcp-transitory=239", 240),
            ("udp=119", 120),
            ("udp-dns=0", 1),
            ("icmp=59", 60),
        ] {
            let invalid = text.parse::<Timeout>().unwrap_err();
            assert_eq!((invalid.field, invalid.value.as_str()), ("--timeout", text));
            let Problem::TimeoutTooShort { least: found, .. } = invalid.problem else {
                panic!("{invalid}");
            };
            assert_eq!(found, least, "{text}");
            assert!(invalid.hint().contains(&least.to_string()), "{text}");
            let (kind, _) = text.split_once('=').unwrap();
            assert!(format!("{kind}={least}").parse::<Timeout>().is_ok());
        }
    }

    #[test]
    fn idle_time_is_a_kind_and_seconds() {
        for text in [
            "",
            "udp",
            "udp=",
            "udp=5m",
            "udp=-300",
            "udp=2592001",
            "sctp=300",
            "=300",
        ] {
            let invalid = text.parse::<Timeout>().unwrap_err();
            assert_eq!(invalid.problem, Problem::Timeout, "{text}");
        }
    }

    #[test]
    fn default_that_is_spelled_out_is_no_difference() {
        let mut wish = BehaviourWish {
            filtering: Some(Filtering::AddressDependent),
            ..BehaviourWish::default()
        };
        wish.timeouts.insert(TimeoutKind::Udp, 300);
        let default = BehaviourWish::default().resolved();
        assert_eq!(wish.resolved().difference(&default), None);
        wish.timeouts.insert(TimeoutKind::Icmp, 61);
        assert_eq!(wish.resolved().difference(&default), Some("--timeout"));
    }

    #[test]
    fn words_read_back_as_they_are_shown() {
        for filtering in [
            Filtering::EndpointIndependent,
            Filtering::AddressDependent,
            Filtering::AddressAndPortDependent,
        ] {
            assert_eq!(filtering.to_string().parse(), Ok(filtering));
            let json = serde_json::to_string(&filtering).unwrap();
            assert_eq!(json, format!("\"{filtering}\""));
        }
        assert!("address".parse::<Filtering>().is_err());
        assert!("symmetric".parse::<Mapping>().is_err());
    }

    #[test]
    fn only_what_netfilter_does_otherwise_is_beyond_it() {
        let mut wish = BehaviourWish::default();
        assert!(wish.beyond_netfilter().is_empty());
        wish.filtering = Some(Filtering::AddressAndPortDependent);
        wish.tcp_mapping = Some(Mapping::PerFlow);
        wish.keep_ports = true;
        assert!(wish.beyond_netfilter().is_empty());
        wish.filtering = Some(Filtering::EndpointIndependent);
        wish.udp_mapping = Some(Mapping::EndpointIndependent);
        wish.timeouts.insert(TimeoutKind::Udp, 600);
        let beyond = ["--filtering", "--udp-mapping", "--timeout"];
        assert_eq!(wish.beyond_netfilter(), beyond);
    }
}
