//! Resolvers that an endpoint may ask.

use crate::model::{Invalid, Problem, address::parse_ip};
use serde::{Deserialize, Serialize};
use std::{fmt, net::IpAddr, str::FromStr};

/// The address of a resolver: unicast, and not a loopback address, which would be the
/// endpoint's own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Resolver(IpAddr);

impl Resolver {
    /// The address.
    pub fn address(self) -> IpAddr {
        self.0
    }
}

impl FromStr for Resolver {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let address = parse_ip("--dns", text)?;
        let link_local = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        // 169.254.169.253 and the like are resolvers of clouds, but the datapath carries no
        // link-local packets.
        if address.is_unspecified() || address.is_loopback() || address.is_multicast() || link_local
        {
            return Err(Invalid::new("--dns", text, Problem::Resolver));
        }
        Ok(Self(address))
    }
}

impl TryFrom<String> for Resolver {
    type Error = Invalid;

    fn try_from(text: String) -> Result<Self, Invalid> {
        text.parse()
    }
}

impl From<Resolver> for String {
    fn from(resolver: Resolver) -> Self {
        resolver.0.to_string()
    }
}

impl fmt::Display for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn resolvers_are_unicast_and_not_loopback() {
        assert!("2620:fe::fe".parse::<Resolver>().is_ok());
        for bad in [
            "",
            "127.0.0.53",
            "::1",
            "0.0.0.0",
            "224.0.0.1",
            "fe80::1",
            "example.org",
        ] {
            assert!(bad.parse::<Resolver>().is_err(), "{bad:?}");
        }
    }
}
