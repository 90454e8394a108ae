//! `resolv.conf`: read as resolver libraries read it (resolv.conf(5)), and composed anew for an
//! endpoint.
//!
//! An endpoint's file names resolvers that the endpoint can reach: those of `--dns`, else those
//! of the host, where loopback addresses, behind which a stub of the host listens, are replaced
//! by the resolvers that the stub asks. `search`, `domain`, `options` and `sortlist` are the
//! host's.

use super::{EndpointId, policy::Resolver};
use std::{
    fmt::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
};
use thiserror::Error;

/// What a `resolv.conf` says.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ResolvConf {
    nameservers: Vec<Nameserver>,
    /// Lines of other keywords, as they are.
    settings: Vec<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Nameserver {
    Usable(Resolver),
    Loopback,
    /// Link-local, with or without a zone, and what is no unicast address.
    OutOfReach,
}

impl Nameserver {
    /// None: it is no address, and resolver libraries skip the line.
    fn parse(text: &str) -> Option<Self> {
        let (address, zone) = match text.split_once('%') {
            Some((address, zone)) => (address, Some(zone)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().ok()?;
        if address.to_canonical().is_loopback() || address.is_unspecified() {
            return Some(Self::Loopback);
        }
        Some(match (zone, address.to_string().parse()) {
            (None, Ok(resolver)) => Self::Usable(resolver),
            _ => Self::OutOfReach,
        })
    }
}

impl ResolvConf {
    /// Reads a file. A keyword stands at the beginning of its line; what is not understood is
    /// skipped, as resolver libraries do.
    pub fn parse(text: &str) -> Self {
        let mut file = Self::default();
        for line in text.lines().filter(|line| !line.contains('\0')) {
            let (keyword, rest) = line.split_once([' ', '\t']).unwrap_or((line, ""));
            let rest = rest.trim();
            match keyword {
                "nameserver" => file
                    .nameservers
                    .extend(rest.split_whitespace().next().and_then(Nameserver::parse)),
                "search" | "domain" | "options" | "sortlist" if !rest.is_empty() => {
                    file.settings.push(format!("{keyword} {rest}"));
                }
                _ => {}
            }
        }
        file
    }

    fn asks_a_stub(&self) -> bool {
        // Without any, resolver libraries ask the machine that they run on.
        self.nameservers.is_empty() || self.nameservers.contains(&Nameserver::Loopback)
    }

    fn usable(&self, families: Families) -> impl Iterator<Item = Resolver> {
        self.nameservers
            .iter()
            .filter_map(move |nameserver| match nameserver {
                Nameserver::Usable(resolver) if families.include(resolver.address()) => {
                    Some(*resolver)
                }
                _ => None,
            })
    }
}

/// Which families an endpoint has addresses of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Families {
    /// IPv4.
    pub v4: bool,
    /// IPv6.
    pub v6: bool,
}

impl Families {
    fn include(self, address: IpAddr) -> bool {
        if address.is_ipv6() { self.v6 } else { self.v4 }
    }
}

/// The host's file, and those in which stubs name the resolvers that they ask: each with its
/// path, absent if it is not there.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct HostFiles {
    /// `/etc/resolv.conf`.
    pub own: (PathBuf, Option<ResolvConf>),
    /// The first that names a resolver that can be reached is believed.
    pub upstreams: Vec<(PathBuf, Option<ResolvConf>)>,
}

/// The host's files name no resolver that the endpoint could reach.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{} names no resolver that the endpoint can reach", path.display())]
pub struct NoResolver {
    /// The host's file.
    pub path: PathBuf,
}

impl NoResolver {
    /// What to do about it.
    pub fn hint(&self) -> String {
        "name one with --dns; loopback and link-local addresses, and those of a family that the \
         endpoint lacks, do not serve it"
            .to_owned()
    }
}

/// An endpoint's `resolv.conf`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Composed {
    /// The resolvers, each once.
    pub resolvers: Vec<Resolver>,
    /// Where they are from.
    origin: Origin,
    settings: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Origin {
    CommandLine,
    Files(Vec<PathBuf>),
}

impl Composed {
    /// Of the resolvers given, or else of the host's.
    pub fn new(dns: &[Resolver], host: &HostFiles, families: Families) -> Result<Self, NoResolver> {
        let (path, own) = &host.own;
        let own = own.clone().unwrap_or_default();
        // Whoever sets `trust-ad` trusts the way to a resolver; this one is another.
        let settings = |same_resolvers: bool| {
            let kept = |line: &String| match line.strip_prefix("options ") {
                Some(options) if !same_resolvers => {
                    let kept: Vec<_> = options
                        .split_whitespace()
                        .filter(|option| *option != "trust-ad")
                        .collect();
                    (!kept.is_empty()).then(|| format!("options {}", kept.join(" ")))
                }
                _ => Some(line.clone()),
            };
            own.settings.iter().filter_map(kept).collect()
        };
        if !dns.is_empty() {
            return Ok(Self {
                resolvers: dns.to_vec(),
                origin: Origin::CommandLine,
                settings: settings(false),
            });
        }
        let mut resolvers: Vec<Resolver> = Vec::new();
        let mut files: Vec<PathBuf> = Vec::new();
        let mut add = |path: &Path, found: Vec<Resolver>| {
            if !found.is_empty() {
                files.push(path.to_owned());
            }
            for resolver in found {
                if !resolvers.contains(&resolver) {
                    resolvers.push(resolver);
                }
            }
        };
        // What the stub would ask comes first: it knows more than those beside it.
        let upstream = host
            .upstreams
            .iter()
            .filter(|_| own.asks_a_stub())
            .filter_map(|(path, file)| {
                let found: Vec<_> = file.as_ref()?.usable(families).collect();
                (!found.is_empty()).then_some((path, found))
            })
            .next();
        if let Some((path, found)) = upstream {
            add(path, found);
        }
        add(path, own.usable(families).collect());
        if resolvers.is_empty() {
            return Err(NoResolver { path: path.clone() });
        }
        Ok(Self {
            resolvers,
            origin: Origin::Files(files),
            settings: settings(!own.asks_a_stub()),
        })
    }

    /// The text of the file.
    pub fn text(&self, id: &EndpointId) -> String {
        let mut text = format!(
            "# Written by nucnet-ctl for endpoint {id}; goes when it is detached. The resolvers \
             are from\n# {}.\n",
            self.origin
        );
        for resolver in &self.resolvers {
            // Writing to a string does not fail.
            let _ = writeln!(text, "nameserver {resolver}");
        }
        for line in &self.settings {
            text.push_str(line);
            text.push('\n');
        }
        text
    }
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CommandLine => f.write_str("--dns"),
            Self::Files(paths) => {
                let paths: Vec<_> = paths.iter().map(|p| p.display().to_string()).collect();
                write!(f, "the host's {}", paths.join(" and "))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const BOTH: Families = Families { v4: true, v6: true };
    const STUB: &str = "# man:systemd-resolved\nnameserver 127.0.0.53\noptions edns0 trust-ad\n\
                        search corp.example\n";

    fn host(own: &str, upstreams: &[&str]) -> HostFiles {
        HostFiles {
            own: ("/etc/resolv.conf".into(), Some(ResolvConf::parse(own))),
            upstreams: (0..)
                .zip(upstreams)
                .map(|(n, text)| (format!("/run/{n}").into(), Some(ResolvConf::parse(text))))
                .collect(),
        }
    }

    /// The resolvers as text.
    fn of(dns: &[&str], host: &HostFiles, families: Families) -> Result<Vec<String>, NoResolver> {
        let dns: Vec<Resolver> = dns.iter().map(|text| text.parse().unwrap()).collect();
        let composed = Composed::new(&dns, host, families)?;
        Ok(composed.resolvers.iter().map(ToString::to_string).collect())
    }

    fn text(dns: &[&str], host: &HostFiles) -> String {
        let dns: Vec<Resolver> = dns.iter().map(|text| text.parse().unwrap()).collect();
        let text = Composed::new(&dns, host, BOTH)
            .unwrap()
            .text(&"web".parse().unwrap());
        text.lines()
            .filter(|line| !line.starts_with('#'))
            .map(|line| format!("{line}\n"))
            .collect()
    }

    #[test]
    fn given_resolvers_replace_those_of_the_host_and_its_settings_stay() {
        let host = host(
            "nameserver 192.0.2.1\nsearch a.example\noptions ndots:2\n",
            &[],
        );
        assert_eq!(
            text(&["9.9.9.9", "2620:fe::fe"], &host),
            "nameserver 9.9.9.9\nnameserver 2620:fe::fe\nsearch a.example\noptions ndots:2\n"
        );
        assert_eq!(
            of(&["9.9.9.9"], &HostFiles::default(), BOTH).unwrap(),
            ["9.9.9.9"]
        );
    }

    #[test]
    fn the_host_file_is_taken_as_it_is_where_its_resolvers_can_be_reached() {
        let own = "; comment\nnameserver 192.0.2.1\nnameserver\t2001:db8::1\n\
                   domain a.example\nsortlist 10.0.0.0\noptions trust-ad rotate\n";
        assert_eq!(
            text(&[], &host(own, &["nameserver 198.51.100.1\n"])),
            "nameserver 192.0.2.1\nnameserver 2001:db8::1\ndomain a.example\nsortlist 10.0.0.0\n\
             options trust-ad rotate\n"
        );
    }

    #[test]
    fn a_stub_is_replaced_by_what_it_asks_and_is_trusted_no_more() {
        let host = host(STUB, &["nameserver 192.0.2.53\nnameserver fe80::1%2\n"]);
        assert_eq!(
            text(&[], &host),
            "nameserver 192.0.2.53\noptions edns0\nsearch corp.example\n"
        );
        for own in [
            "nameserver ::1",
            "nameserver 0.0.0.0",
            "nameserver ::ffff:127.0.0.1",
            "",
        ] {
            let host = self::host(own, &["", "nameserver 192.0.2.54\n"]);
            assert_eq!(of(&[], &host, BOTH).unwrap(), ["192.0.2.54"], "{own}");
        }
    }

    #[test]
    fn a_stub_beside_others_leaves_the_others() {
        let own = "nameserver 127.0.0.1\nnameserver 192.0.2.9\n";
        assert_eq!(of(&[], &host(own, &[]), BOTH).unwrap(), ["192.0.2.9"]);
        let upstream = "nameserver 192.0.2.8\nnameserver 192.0.2.9\n";
        let both = of(&[], &host(own, &[upstream]), BOTH).unwrap();
        assert_eq!(both, ["192.0.2.8", "192.0.2.9"]);
    }

    #[test]
    fn without_a_resolver_that_can_be_reached_it_is_refused() {
        let v4 = Families {
            v4: true,
            v6: false,
        };
        for own in [
            STUB,
            "",
            "nameserver fe80::1%eth0",
            "nameserver 169.254.0.1",
            "nameserver x",
        ] {
            let refused = of(&[], &host(own, &["nameserver 127.0.0.1\n"]), BOTH).unwrap_err();
            assert_eq!(refused.path, Path::new("/etc/resolv.conf"), "{own}");
        }
        assert!(of(&[], &host("nameserver 2001:db8::1", &[]), v4).is_err());
        assert!(of(&[], &HostFiles::default(), BOTH).is_err());
    }

    #[test]
    fn lines_are_read_as_resolver_libraries_read_them() {
        let own = " nameserver 192.0.2.1\nnameserver 192.0.2.2 # main\n#nameserver 192.0.2.3\n\
                   nameserver192.0.2.4\nsearch\noptions \n";
        assert_eq!(text(&[], &host(own, &[])), "nameserver 192.0.2.2\n");
    }

    #[test]
    fn the_comment_says_who_wrote_it_and_from_what() {
        let host = host(STUB, &["nameserver 192.0.2.53\n"]);
        let text = Composed::new(&[], &host, BOTH)
            .unwrap()
            .text(&"web".parse().unwrap());
        let comment: Vec<_> = text.lines().filter(|line| line.starts_with('#')).collect();
        assert!(comment[0].contains("nucnet-ctl for endpoint web"), "{text}");
        assert!(comment[1].contains("/run/0"), "{text}");
    }

    proptest! {
        #[test]
        fn whatever_the_host_file_says_the_endpoint_gets_lines_that_read_back(own in "\\PC*(\n(nameserver|search|options|domain) [a-z0-9.:% ]*){0,6}") {
            let host = host(&own, &["nameserver 192.0.2.53"]);
            if let Ok(composed) = Composed::new(&[], &host, BOTH) {
                let text = composed.text(&"web".parse().unwrap());
                let read = ResolvConf::parse(&text);
                let found: Vec<_> = read.usable(BOTH).collect();
                prop_assert_eq!(found, composed.resolvers);
                prop_assert_eq!(read.settings, composed.settings);
                prop_assert!(!read.nameservers.contains(&Nameserver::Loopback));
            }
        }
    }
}
