//! Names: of endpoints, networks and interfaces.

use super::{Invalid, Problem};
use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

macro_rules! name {
    ($(#[$doc:meta])+ $name:ident, $field:literal, $check:path, $problem:expr) => {
        $(#[$doc])+
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name itself.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = Invalid;

            fn from_str(text: &str) -> Result<Self, Invalid> {
                if $check(text) {
                    Ok(Self(text.to_owned()))
                } else {
                    Err(Invalid::new($field, text, $problem))
                }
            }
        }

        impl TryFrom<String> for $name {
            type Error = Invalid;

            fn try_from(text: String) -> Result<Self, Invalid> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// The id of an endpoint: `[A-Za-z0-9][A-Za-z0-9_.-]{0,63}`.
    EndpointId, "ID", is_id, Problem::Name
);
name!(
    /// The name of a network: as an [`EndpointId`].
    NetworkName, "network", is_id, Problem::Name
);
name!(
    /// The name of an interface: what the kernel takes (at most 15 bytes, no '/', ':' or
    /// white space), less what would be mistaken for an option or is a name of sysctls.
    IfName, "interface", is_if_name, Problem::IfName
);

impl NetworkName {
    /// The network that is made on first use.
    pub fn default_network() -> Self {
        Self("default".to_owned())
    }

    /// Whether it is the network that is made on first use.
    pub fn is_default(&self) -> bool {
        self.0 == "default"
    }
}

impl EndpointId {
    /// The id of a container that was given none: a hash of its namespace's identity, so that
    /// a repeated attach means the same endpoint.
    pub fn derived(netns: u64) -> Self {
        Self(format!("c{:012x}", hash(&netns.to_be_bytes()) >> 16))
    }
}

impl IfName {
    /// What most containers call their interface.
    pub fn eth0() -> Self {
        Self("eth0".to_owned())
    }

    /// What virtual machine monitors call their TAP.
    pub fn tap0() -> Self {
        Self("tap0".to_owned())
    }

    /// The host side of an endpoint's link: a name that no other endpoint of this host gets,
    /// since its number is never given twice.
    pub fn host_side(number: u32) -> Self {
        Self(format!("nn{number:08x}"))
    }

    /// The bridge of a network that was given no name: `nn-` and a hash of the network's name.
    pub fn bridge_of(network: &NetworkName) -> Self {
        if network.is_default() {
            return Self("nucnet0".to_owned());
        }
        Self(format!(
            "nn-{:010x}",
            hash(network.as_str().as_bytes()) >> 24
        ))
    }
}

/// FNV-1a: a hash that is written down, so that names survive upgrades. Followed by the
/// finaliser of MurmurHash3, because of FNV's weak high bits.
fn hash(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325u64;
    for &byte in bytes {
        hash = (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3);
    }
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

fn is_id(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=64).contains(&bytes.len())
        && bytes[0].is_ascii_alphanumeric()
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(b))
}

fn is_if_name(text: &str) -> bool {
    let bytes = text.as_bytes();
    (1..=15).contains(&bytes.len())
        && bytes
            .iter()
            .all(|b| b.is_ascii_alphanumeric() || b"_.-".contains(b))
        && !b"-.".contains(&bytes[0])
        && !["all", "default", "lo"].contains(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_follow_the_contract() {
        for good in ["a", "0", "web.1_x-Y", &"a".repeat(64)] {
            assert_eq!(good.parse::<EndpointId>().unwrap().as_str(), good);
        }
        for bad in [
            "",
            ".",
            "..",
            "-a",
            "_a",
            "a/b",
            "a b",
            "ä",
            "a\n",
            &"a".repeat(65),
        ] {
            assert!(bad.parse::<EndpointId>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn interface_names_are_what_the_kernel_and_ip_take() {
        for good in ["eth0", "a", "veth_1.5-x", "abcdefghijklmno"] {
            assert!(good.parse::<IfName>().is_ok(), "{good:?}");
        }
        for bad in [
            "",
            ".",
            "..",
            "-x",
            "a/b",
            "a:1",
            "a b",
            "all",
            "default",
            "lo",
            "abcdefghijklmnop",
        ] {
            assert!(bad.parse::<IfName>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn made_names_are_valid_and_never_change() {
        assert_eq!(IfName::host_side(u32::MAX).as_str(), "nnffffffff");
        let network: NetworkName = "blue".parse().unwrap();
        let bridge = IfName::bridge_of(&network);
        assert!(is_if_name(bridge.as_str()) && bridge.as_str().len() <= 15);
        assert_eq!(bridge.as_str(), "nn-97dad3af10");
        assert_eq!(
            IfName::bridge_of(&NetworkName::default_network()).as_str(),
            "nucnet0"
        );
        assert!(is_id(EndpointId::derived(4_026_531_840).as_str()));
    }

    #[test]
    fn errors_escape_what_was_given_and_say_what_would_do() {
        let error = "a\x1b[31m".parse::<EndpointId>().unwrap_err();
        assert_eq!(
            error.to_string(),
            r#"ID "a\u{1b}[31m": is not a valid id or name"#
        );
        assert!(error.hint().contains("64 letters"));
    }
}
