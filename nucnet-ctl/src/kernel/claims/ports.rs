//! Host ports: which publishes of whom have them.

use super::{Holder, RANGES, give_up};
use crate::{
    kernel::{
        directory::Directory,
        store::{Error, Locked},
    },
    model::{
        ports::PortRange,
        publish::{HostAddress, PublishSpec},
    },
};

/// A range of more ports than this is compared with the list of all claimed ports.
const FEW_PORTS: u32 = 256;

impl Locked {
    /// Who has which host ports, for several questions while nobody claims any.
    pub fn port_claims(&self) -> Result<PortClaims<'_>, Error> {
        let claims = self.claims()?;
        let ranges = match claims.enter(RANGES)? {
            Some(directory) => Some((directory.names()?, directory)),
            None => None,
        };
        Ok(PortClaims {
            state: self,
            claims,
            ranges,
        })
    }

    /// Takes the host ports of a publish, which nobody else has.
    pub fn claim_publish(&self, spec: &PublishSpec, holder: &Holder) -> Result<(), Error> {
        if let Some((directory, name)) = self.publish_claim(spec)? {
            let directory = self.claims()?.make(&directory)?;
            self.take(&directory, &name, holder)?;
        }
        Ok(())
    }

    /// Gives up the host ports of a publish.
    pub fn release_publish(&self, spec: &PublishSpec, number: u32) -> Result<(), Error> {
        if let Some((place, name)) = self.publish_claim(spec)? {
            let claims = self.claims()?;
            if let Some(directory) = claims.enter(&place)? {
                give_up(&directory, &name, number)?;
                if place != RANGES {
                    claims.remove_directory(&place)?;
                }
            }
        }
        Ok(())
    }

    fn publish_claim(&self, spec: &PublishSpec) -> Result<Option<(String, String)>, Error> {
        let (host, protocol) = (host_name(spec.host()), spec.protocol());
        Ok(spec.host_ports().map(|ports| match ports.count() {
            1 => (format!("port.{protocol}.{}", ports.first()), host),
            _ => {
                let (first, last) = (ports.first(), ports.last());
                (
                    RANGES.to_owned(),
                    format!("{protocol}.{first}-{last}.{host}"),
                )
            }
        }))
    }
}

/// The claims on host ports.
#[derive(Debug)]
pub struct PortClaims<'a> {
    state: &'a Locked,
    claims: Directory,
    /// Those on several ports at once: their names, and where they are.
    ranges: Option<(Vec<String>, Directory)>,
}

impl PortClaims<'_> {
    /// Who has a host port that the publish wants, and for which publish; but for the holders of
    /// those numbers.
    pub fn conflict(
        &self,
        spec: &PublishSpec,
        numbers: &[u32],
    ) -> Result<Option<(Holder, String)>, Error> {
        let Some(ports) = spec.host_ports() else {
            return Ok(None);
        };
        let protocol = spec.protocol();
        let other = |directory: &Directory, name: &str, host: HostAddress, ports: PortRange| {
            if !host.overlaps(spec.host()) {
                return Ok(None);
            }
            let holder = self.state.live_holder(directory, name)?;
            let shown = format!("{host}:{ports}/{protocol}");
            Ok::<_, Error>(
                holder
                    .filter(|h| !numbers.contains(&h.number))
                    .map(|holder| (holder, shown)),
            )
        };
        let mut single: Vec<u16> = Vec::new();
        if ports.count() <= FEW_PORTS {
            single.extend(ports.iter());
        } else {
            let prefix = format!("port.{protocol}.");
            let named = self.claims.names()?;
            let claimed = named
                .iter()
                .filter_map(|name| name.strip_prefix(&prefix)?.parse().ok());
            single.extend(claimed.filter(|port| ports.overlaps(PortRange::one(*port))));
        }
        for port in single {
            let place = format!("port.{protocol}.{port}");
            let Some(directory) = self.claims.enter(&place)? else {
                continue;
            };
            for name in directory.names()? {
                let Some(host) = host_address(&name) else {
                    continue;
                };
                if let Some(found) = other(&directory, &name, host, PortRange::one(port))? {
                    return Ok(Some(found));
                }
            }
        }
        let Some((names, ranges)) = &self.ranges else {
            return Ok(None);
        };
        for name in names {
            let Some((theirs, host)) = range_claim(name, &format!("{protocol}.")) else {
                continue;
            };
            if theirs.overlaps(ports)
                && let Some(found) = other(ranges, name, host, theirs)?
            {
                return Ok(Some(found));
            }
        }
        Ok(None)
    }
}

fn host_name(host: HostAddress) -> String {
    host.shown()
        .map_or_else(|| "any".to_owned(), |address| address.to_string())
}

fn host_address(name: &str) -> Option<HostAddress> {
    Some(match name {
        "any" => HostAddress::Any,
        "0.0.0.0" => HostAddress::AnyV4,
        "::" => HostAddress::AnyV6,
        address => HostAddress::One(address.parse().ok()?),
    })
}

fn range_claim(name: &str, protocol: &str) -> Option<(PortRange, HostAddress)> {
    let (ports, host) = name.strip_prefix(protocol)?.split_once('.')?;
    let (first, last) = ports.split_once('-')?;
    Some((
        PortRange::new(first.parse().ok()?, last.parse().ok()?)?,
        host_address(host)?,
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::tests::{endpoint, state};
    use super::*;

    pub(in super::super) fn spec(text: &str) -> PublishSpec {
        text.parse().unwrap()
    }

    /// Who has what the publish wants, but for the one who asks.
    pub(in super::super) fn conflict(
        state: &Locked,
        spec: &PublishSpec,
        asks: &Holder,
    ) -> Option<(Holder, String)> {
        let claims = state.port_claims().unwrap();
        claims.conflict(spec, &[asks.number]).unwrap()
    }

    #[test]
    fn host_ports_are_taken_once() {
        let (_place, state) = state();
        let (web, db) = (endpoint(&state, 1, "web"), endpoint(&state, 2, "db"));
        for taken in [
            "8080:80",
            "127.0.0.1:53:53/udp",
            "9000-9099:1000-1099",
            "[::]:443:443",
        ] {
            assert_eq!(conflict(&state, &spec(taken), &web), None);
            state.claim_publish(&spec(taken), &web).unwrap();
        }
        for (wanted, owner) in [
            ("8080:81", Some("*:8080/tcp")),
            ("10.0.0.1:8080:81", Some("*:8080/tcp")),
            ("8080:81/udp", None),
            ("53:53/udp", Some("127.0.0.1:53/udp")),
            ("127.0.0.2:53:53/udp", None),
            ("9050:1", Some("*:9000-9099/tcp")),
            ("9100:1", None),
            ("9090-9190:90-190", Some("*:9000-9099/tcp")),
            ("8000-8100:8000-8100", Some("*:8080/tcp")),
            ("1-65535:1-65535/udp", Some("127.0.0.1:53/udp")),
            ("443:443", Some("[::]:443/tcp")),
            ("0.0.0.0:443:443", None),
            ("0:80", None),
        ] {
            let found = conflict(&state, &spec(wanted), &db);
            assert_eq!(
                found,
                owner.map(|shown| (web.clone(), shown.to_owned())),
                "{wanted}"
            );
            assert_eq!(conflict(&state, &spec(wanted), &web), None);
        }
        for given_up in [
            "8080:80",
            "127.0.0.1:53:53/udp",
            "9000-9099:1000-1099",
            "[::]:443:443",
        ] {
            state.release_publish(&spec(given_up), web.number).unwrap();
            assert_eq!(conflict(&state, &spec(given_up), &db), None);
        }
        assert_eq!(state.claims().unwrap().names().unwrap(), [RANGES]);
    }
}
