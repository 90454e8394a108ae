//! What `doctor` makes of what it saw: how bad it is, and what mends it.

mod firewall;

pub use firewall::{
    Dropping, Iptables, dropping, forward, iptables, translated_elsewhere, translated_ports,
};

use ipnet::IpNet;
use serde::Serialize;
use std::fmt;

/// How bad a finding is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// As it should be.
    Ok,
    /// It could not be looked at.
    Unknown,
    /// It works, but somebody may be surprised.
    Warn,
    /// Something that nucnet needs is missing.
    Fail,
}

impl fmt::Display for Severity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "ok",
            Self::Unknown => "unknown",
            Self::Warn => "warn",
            Self::Fail => "fail",
        })
    }
}

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What was looked at; stable.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// What was found.
    pub text: String,
    /// What mends it.
    pub remedy: Option<String>,
}

impl Finding {
    /// As it should be.
    pub fn ok(id: &'static str, text: impl Into<String>) -> Self {
        Self::new(id, Severity::Ok, text, None)
    }

    /// It could not be looked at; `remedy` is what lets somebody look.
    pub fn unknown(id: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(id, Severity::Unknown, text, Some(remedy.into()))
    }

    /// It works, but somebody may be surprised.
    pub fn warn(id: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(id, Severity::Warn, text, Some(remedy.into()))
    }

    /// Something that nucnet needs is missing.
    pub fn fail(id: &'static str, text: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self::new(id, Severity::Fail, text, Some(remedy.into()))
    }

    fn new(
        id: &'static str,
        severity: Severity,
        text: impl Into<String>,
        remedy: Option<String>,
    ) -> Self {
        Self {
            id,
            severity,
            text: text.into(),
            remedy,
        }
    }
}

/// Something that kernels have from some version on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Feature {
    /// What it is called here.
    pub id: &'static str,
    /// A name that the kernel's type information has where it has the feature.
    pub name: &'static str,
    /// First version of Linux with it.
    pub since: (u8, u8),
    /// What it is for.
    pub purpose: &'static str,
    /// What is done without; none: nothing works.
    pub without: Option<&'static str>,
}

/// All that differs between the kernels that nucnet may meet.
pub const FEATURES: [Feature; 9] = [
    Feature {
        id: "redirect-peer",
        name: "BPF_FUNC_redirect_peer",
        since: (5, 10),
        purpose: "packets go straight into containers",
        without: None,
    },
    Feature {
        id: "redirect-neigh",
        name: "BPF_FUNC_redirect_neigh",
        since: (5, 10),
        purpose: "packets go straight out of uplinks",
        without: None,
    },
    Feature {
        id: "netns-cookie",
        name: "BPF_FUNC_get_netns_cookie",
        since: (5, 7),
        purpose: "bind hooks act on this host's sockets only",
        without: None,
    },
    Feature {
        id: "bind-errors",
        name: "BPF_FUNC_set_retval",
        since: (5, 18),
        purpose: "a socket that wants a published port hears that it is in use",
        without: Some("it hears that the operation is not permitted"),
    },
    Feature {
        id: "route-mtu",
        name: "mtu_result",
        since: (5, 12),
        purpose: "the route says how long a packet may be",
        without: Some(
            "the uplink's MTU counts, as it was at the last attach or gc, whatever the route says",
        ),
    },
    Feature {
        id: "mount-setattr",
        name: "mount_kattr",
        since: (5, 12),
        purpose: "a container never gets a resolv.conf that it could write to",
        without: Some("attach --rootfs fails"),
    },
    Feature {
        id: "locked-ports",
        name: "IFLA_BRPORT_LOCKED",
        since: (5, 18),
        purpose: "the bridge takes nothing from a container by itself",
        without: Some("only the program keeps what a container sends off the bridge"),
    },
    Feature {
        id: "tcx",
        name: "BPF_TCX_INGRESS",
        since: (6, 6),
        purpose: "programs on uplinks and bridges are held by links",
        without: Some(
            "clsact filters are used, which anybody can delete (see `nucnet-ctl status`)",
        ),
    },
    Feature {
        id: "fib-source",
        name: "BPF_FIB_LOOKUP_SRC",
        since: (6, 7),
        purpose: "the route names the address that masquerade uses",
        without: Some("masquerade uses the first address of the uplink, whatever the route says"),
    },
];

/// Whether the kernel has a feature.
pub fn feature(feature: &Feature, has: bool) -> Finding {
    let Feature {
        id, since, purpose, ..
    } = *feature;
    let remedy = format!("use Linux {}.{} or later", since.0, since.1);
    match (has, feature.without) {
        (true, _) => Finding::ok(id, purpose),
        (false, Some(without)) => Finding::warn(id, format!("not there: {without}"), remedy),
        (false, None) => Finding::fail(id, format!("not there; it is needed: {purpose}"), remedy),
    }
}

/// What the kernel's lockdown forbids. `/sys/kernel/security/lockdown` marks the mode in force.
pub fn lockdown(modes: Option<&str>) -> Finding {
    let id = "lockdown";
    match modes {
        Some(modes) if modes.contains("[confidentiality]") => Finding::fail(
            id,
            "the kernel is locked down (confidentiality): no program may read packets",
            "boot with lockdown=integrity, or without lockdown",
        ),
        Some(_) => Finding::ok(id, "it forbids nothing that nucnet does"),
        None => Finding::ok(id, "this kernel has none, or does not tell"),
    }
}

/// Whether programs are compiled (`net.core.bpf_jit_enable`).
pub fn jit(value: Option<&str>) -> Finding {
    let id = "jit";
    match value {
        Some("0") => Finding::warn(
            id,
            "programs are interpreted, which is several times slower",
            "sysctl -w net.core.bpf_jit_enable=1",
        ),
        // A kernel without the sysctl's choice compiles always, or lets nobody read it.
        _ => Finding::ok(id, "programs are compiled"),
    }
}

/// Strict source validation: on which uplinks. It is not asked about nucnet's packets.
pub fn reverse_path(strict: &[String], uplinks: usize) -> Finding {
    let id = "rp-filter";
    match strict {
        [] => Finding::ok(id, "no uplink validates sources strictly"),
        _ if uplinks < 2 => Finding::ok(
            id,
            "strict, with one uplink: whatever comes in goes out the same way",
        ),
        _ => Finding::warn(
            id,
            format!(
                "strict on {}: the host itself drops what arrives by another uplink than the \
                 answer takes; endpoints and publishes do not",
                strict.join(", ")
            ),
            "sysctl -w net.ipv4.conf.all.rp_filter=2",
        ),
    }
}

/// Whether bridged frames pass iptables (`net.bridge.bridge-nf-call-iptables`).
pub fn bridge_netfilter(value: Option<&str>) -> Finding {
    let text = match value {
        Some("1") => "on, and of no effect: nucnet's bridges forward no frames",
        _ => "off",
    };
    Finding::ok("bridge-nf", text)
}

/// Other programs on the hooks of uplinks, by interface.
pub fn foreign_programs(found: &[(String, Vec<String>)]) -> Finding {
    let id = "foreign-programs";
    if found.is_empty() {
        return Finding::ok(id, "no other programs or filters on the uplinks' ingress");
    }
    let each = found
        .iter()
        .map(|(interface, programs)| format!("{} on {interface}", programs.join(", ")));
    Finding::warn(
        id,
        format!(
            "others look at what uplinks take in: {}. Those before nucnet's may take packets \
             away; those after it do not see what is nucnet's",
            each.collect::<Vec<_>>().join("; ")
        ),
        "see `bpftool net` and `tc filter show dev IF ingress` whether both are wanted",
    )
}

/// What a manager of interfaces is told about nucnet's.
pub fn network_manager(is_told: bool) -> Finding {
    let id = "NetworkManager";
    match is_told {
        true => Finding::ok(id, "it is told to leave nucnet's interfaces alone"),
        false => Finding::warn(
            id,
            "it runs, and may take over nucnet's interfaces",
            "printf '[keyfile]\\nunmanaged-devices=interface-name:nn*;interface-name:nucnet*\\n' > \
             /etc/NetworkManager/conf.d/nucnet.conf && nmcli general reload",
        ),
    }
}

/// The same for systemd-networkd.
pub fn networkd(is_told: bool) -> Finding {
    let id = "systemd-networkd";
    match is_told {
        true => Finding::ok(id, "it is told to leave nucnet's interfaces alone"),
        false => Finding::warn(
            id,
            "it runs, and may take over nucnet's interfaces",
            "printf '[Match]\\nName=nn* nucnet*\\n[Link]\\nUnmanaged=yes\\n' > \
             /etc/systemd/network/05-nucnet.network && networkctl reload",
        ),
    }
}

/// Whether a configuration speaks of the interfaces of endpoints.
pub fn is_told(configuration: &str) -> bool {
    let speaks = |line: &&str| !line.trim_start().starts_with('#') && line.contains("nn*");
    configuration.lines().any(|line| speaks(&line))
}

/// A route or address of the host's that lies in, or around, a subnet of nucnet's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Overlap {
    /// Nucnet's.
    pub subnet: String,
    /// The host's.
    pub route: IpNet,
    /// Where it leads.
    pub interface: String,
}

/// Which subnets overlap which routes. Default routes lead everywhere and count for nothing.
pub fn overlaps(subnets: &[IpNet], routes: &[(IpNet, String)]) -> Vec<Overlap> {
    let mut found = Vec::new();
    for subnet in subnets {
        for (route, interface) in routes.iter().filter(|(route, _)| route.prefix_len() > 0) {
            if subnet.contains(route) || route.contains(subnet) {
                found.push(Overlap {
                    subnet: subnet.to_string(),
                    route: *route,
                    interface: interface.clone(),
                });
            }
        }
    }
    found
}

/// What overlaps mean.
pub fn address_overlap(found: &[Overlap]) -> Finding {
    let id = "address-overlap";
    if found.is_empty() {
        return Finding::ok(id, "no route of the host's leads into nucnet's subnets");
    }
    let each = found.iter().map(
        |Overlap {
             subnet,
             route,
             interface,
         }| format!("{subnet} and the route {route} by {interface}"),
    );
    Finding::warn(
        id,
        format!(
            "addresses are in two places: {}",
            each.collect::<Vec<_>>().join("; ")
        ),
        "nucnet-ctl network create NAME --subnet CIDR --subnet6 CIDR with free addresses, and \
         attach with --network NAME",
    )
}

/// What of nucnet's traffic other tools see: always the same.
pub fn visibility() -> Finding {
    Finding::ok(
        "visibility",
        "the host's firewall and tcpdump on a bridge see only what the host itself sends to or \
         gets from endpoints; capture at an uplink (tcpdump -i UPLINK) for packets as the \
         outside sees them, in the container (nsenter --net=NETNS tcpdump -i eth0) as it does",
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn severity(finding: Finding) -> Severity {
        assert_eq!(
            finding.remedy.is_none(),
            finding.severity == Severity::Ok,
            "{finding:?}"
        );
        finding.severity
    }

    #[test]
    fn only_features_without_a_substitute_fail() {
        for it in &FEATURES {
            assert_eq!(severity(feature(it, true)), Severity::Ok);
            let worst = match it.without {
                Some(_) => Severity::Warn,
                None => Severity::Fail,
            };
            assert_eq!(severity(feature(it, false)), worst);
        }
    }

    #[test]
    fn only_confidentiality_forbids_programs() {
        let modes = |text| severity(lockdown(text));
        assert_eq!(modes(None), Severity::Ok);
        assert_eq!(
            modes(Some("[none] integrity confidentiality")),
            Severity::Ok
        );
        assert_eq!(
            modes(Some("none [integrity] confidentiality")),
            Severity::Ok
        );
        assert_eq!(
            modes(Some("none integrity [confidentiality]")),
            Severity::Fail
        );
    }

    #[test]
    fn strict_validation_matters_with_several_uplinks() {
        let strict = ["eth0".to_owned()];
        assert_eq!(severity(reverse_path(&strict, 1)), Severity::Ok);
        assert_eq!(severity(reverse_path(&strict, 2)), Severity::Warn);
        assert_eq!(severity(reverse_path(&[], 2)), Severity::Ok);
    }

    #[test]
    fn managers_are_told_by_the_prefix_of_endpoints() {
        assert!(is_told("[Match]\nName=nn* nucnet*\n"));
        assert!(!is_told("# Name=nn*\n[Match]\nName=en*\n"));
        assert_eq!(severity(network_manager(false)), Severity::Warn);
        assert_eq!(severity(networkd(true)), Severity::Ok);
    }

    #[test]
    fn routes_into_a_subnet_overlap_it_and_default_routes_do_not() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let routes = ["0.0.0.0/0", "10.0.0.0/8", "10.0.42.128/25", "192.0.2.0/24"]
            .map(|route| (net(route), "eth0".to_owned()));
        let found = overlaps(&[net("10.0.42.0/24"), net("fd00::/64")], &routes);
        let routes: Vec<String> = found.iter().map(|o| o.route.to_string()).collect();
        assert_eq!(routes, ["10.0.0.0/8", "10.0.42.128/25"]);
        assert_eq!(severity(address_overlap(&found)), Severity::Warn);
    }
}
