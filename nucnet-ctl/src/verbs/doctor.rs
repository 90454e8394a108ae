//! `doctor`: what this kernel and this host offer and lack. It needs neither state nor root, and
//! says what it could not look at. Nothing is changed.

use super::{Error, Host, chain, network::DEFAULT_SUBNET};
use crate::{
    OBJECT_HASH,
    kernel::{
        bpf::{self, Datapath},
        capability::{self, Lacks},
        diag, helper,
        netfilter::{self, Netfilter},
        netlink::{Direction, Netlink, Uplink},
        probe,
        sysctl::{Family, LinkKey, Sysctl},
    },
    model::{
        diagnosis::{self, FEATURES, Feature, Finding, Iptables, Severity},
        netfilter as netfilter_model,
        record::{DatapathKind, EndpointRecord, NetworkRecord},
    },
};
use ipnet::IpNet;
use std::collections::{BTreeSet, HashMap};

/// What is said where only root may look.
const AS_ROOT: &str = "run as root";

impl Host {
    /// Looks at everything. Some capabilities let it look at more.
    pub fn doctor(&self) -> Vec<Finding> {
        let lacks = Lacks::of_caller();
        let mut findings = privileges(&lacks);
        findings.extend(features(lacks.is_empty()));
        findings.push(diagnosis::jit(
            probe::line("/proc/sys/net/core/bpf_jit_enable").as_deref(),
        ));
        findings.extend(self.filesystems());
        findings.push(self.programs(&lacks));
        let records = self.records();
        if let Err(error) = &records {
            findings.push(unseen("state", error));
        }
        let (networks, endpoints) = records.unwrap_or_default();
        findings.extend(addresses());
        match Netlink::open().and_then(|netlink| Ok((netlink.uplinks()?, netlink))) {
            Ok((uplinks, netlink)) => {
                findings.push(reverse_path(&uplinks));
                findings.push(match lacks.is_empty() {
                    true => self.foreign_programs(&uplinks, &netlink),
                    false => Finding::unknown(
                        "foreign-programs",
                        "the kernel does not say who else is on the uplinks' hooks",
                        capability::remedy(),
                    ),
                });
                findings.push(overlaps(&networks, &netlink));
            }
            Err(error) => findings.push(Finding::fail(
                "netlink",
                chain(&error),
                "use a kernel with rtnetlink",
            )),
        }
        let by_rules = endpoints
            .iter()
            .any(|it| it.datapath == DatapathKind::Iptables);
        findings.extend(firewalls(&endpoints, by_rules));
        findings.push(iptables(by_rules));
        findings.extend(probe::managers().iter().map(|(manager, configuration)| {
            let is_told = diagnosis::is_told(configuration);
            match manager {
                probe::Manager::NetworkManager => diagnosis::network_manager(is_told),
                probe::Manager::Networkd => diagnosis::networkd(is_told),
            }
        }));
        findings.push(diagnosis::visibility());
        findings
    }

    /// Fails, naming them, if there are findings of something that nucnet needs and that is
    /// missing.
    pub fn fitness(findings: &[Finding]) -> Result<(), Error> {
        let missing: Vec<&'static str> = findings
            .iter()
            .filter(|finding| finding.severity == Severity::Fail)
            .map(|finding| finding.id)
            .collect();
        match missing.is_empty() {
            true => Ok(()),
            false => Err(Error::Unfit(missing)),
        }
    }

    fn records(&self) -> Result<(Vec<NetworkRecord>, Vec<EndpointRecord>), Error> {
        match self.read()? {
            Some(store) => Ok((store.networks()?.0, store.endpoints()?.0)),
            None => Ok((Vec::new(), Vec::new())),
        }
    }

    fn filesystems(&self) -> [Finding; 2] {
        let bpffs = &self.options.bpffs;
        let pins = match bpf::is_place_for_pins(bpffs) {
            true => Finding::ok("bpffs", format!("pins go to {}", bpffs.display())),
            false => {
                let error = bpf::BpfError::NotBpffs {
                    path: bpffs.clone(),
                };
                let hint = error.hint().unwrap_or_default();
                Finding::fail("bpffs", error.to_string(), hint)
            }
        };
        let cgroup = match &self.options.cgroup {
            Some(cgroup) => Ok(cgroup.clone()),
            None => bpf::cgroup_root(),
        };
        let cgroup = match cgroup {
            Ok(path) => Finding::ok("cgroup2", format!("bind hooks go to {}", path.display())),
            Err(error) => Finding::warn(
                "cgroup2",
                format!("{error}: sockets of the host can take published ports"),
                error.hint().unwrap_or_default(),
            ),
        };
        [pins, cgroup]
    }

    /// Whether the kernel takes the programs: the surest sign is that it did.
    fn programs(&self, lacks: &Lacks) -> Finding {
        let id = "programs";
        let pinned = Datapath::pinned(&self.options.bpffs);
        if pinned.is_ok_and(|pinned| pinned.is_some_and(|p| p.object == OBJECT_HASH)) {
            return Finding::ok(id, "loaded");
        }
        if !lacks.is_empty() {
            let text = "not tried whether the kernel takes them";
            return Finding::unknown(id, text, capability::remedy());
        }
        match bpf::load_unpinned() {
            Ok(_) => Finding::ok(id, "the kernel takes them"),
            Err(error) => Finding::fail(
                id,
                chain(&error),
                error
                    .hint()
                    .unwrap_or_else(|| "use Linux 6.1 or later".to_owned()),
            ),
        }
    }

    fn foreign_programs(&self, uplinks: &[Uplink], netlink: &Netlink) -> Finding {
        match self.others_on(uplinks, netlink) {
            Ok(found) => diagnosis::foreign_programs(&found),
            Err(error) => unseen("foreign-programs", &error),
        }
    }

    /// Programs and filters on uplinks that are not nucnet's.
    fn others_on(
        &self,
        uplinks: &[Uplink],
        netlink: &Netlink,
    ) -> Result<Vec<(String, Vec<String>)>, Error> {
        let own: BTreeSet<u32> = match self.open_datapath()? {
            Some(datapath) => {
                let programs = datapath.programs()?;
                programs.iter().map(|program| program.id).collect()
            }
            None => BTreeSet::new(),
        };
        let mut found = Vec::new();
        for Uplink { link, .. } in uplinks {
            let mut others = Vec::new();
            for program in bpf::tcx_ingress(&link.name)?.unwrap_or_default() {
                if !own.contains(&program.id) {
                    others.push(format!("program {} ({})", program.id, program.name));
                }
            }
            let filters = netlink.filters(link.index, Direction::Ingress)?;
            others.extend(
                filters
                    .into_iter()
                    .filter(|f| !f.program.is_some_and(|id| own.contains(&id)))
                    .map(|f| format!("filter {} {}", f.kind, f.name.unwrap_or_default())),
            );
            if !others.is_empty() {
                found.push((link.name.clone(), others));
            }
        }
        Ok(found)
    }
}

/// What could not be looked at, and why.
fn unseen(id: &'static str, error: &Error) -> Finding {
    let hint = error.hint().unwrap_or_else(|| AS_ROOT.to_owned());
    Finding::unknown(id, chain(error), hint)
}

fn privileges(lacks: &Lacks) -> Vec<Finding> {
    let id = "capabilities";
    let mut findings = vec![match lacks.is_empty() {
        true => {
            let names: Vec<&str> = capability::NEEDED.iter().map(|c| c.name).collect();
            Finding::ok(id, format!("needed: {}", names.join(", ")))
        }
        false => Finding::fail(id, lacks.to_string(), capability::remedy()),
    }];
    if !lacks.wanting.is_empty() {
        let missing = lacks
            .wanting
            .iter()
            .map(|c| format!("{} is missing: {}", c.name, c.purpose));
        let text = missing.collect::<Vec<_>>().join("; ");
        findings.push(Finding::warn(
            "capabilities-in-part",
            text,
            capability::remedy(),
        ));
    }
    findings.push(diagnosis::lockdown(
        probe::line("/sys/kernel/security/lockdown").as_deref(),
    ));
    findings
}

/// What differs between kernels: by trying where that is possible, else by the kernel's types,
/// else by its version.
fn features(may_try: bool) -> Vec<Finding> {
    let known = probe::known_names(FEATURES.map(|feature| feature.name));
    let has = |index: usize, feature: &Feature| match known {
        Some(known) => known[index],
        None => probe::is_kernel_at_least(feature.since),
    };
    let mut findings = vec![match known {
        Some(_) => Finding::ok("btf", "the kernel describes its types"),
        None => Finding::warn(
            "btf",
            "the kernel does not describe its types: features are told by its version",
            "use a kernel with CONFIG_DEBUG_INFO_BTF",
        ),
    }];
    for (index, feature) in FEATURES.iter().enumerate() {
        let tried = match feature.id {
            "tcx" => matches!(bpf::tcx_ingress("lo"), Ok(Some(_))).then_some(true),
            "locked-ports" if may_try => match probe::bridge_ports_lock() {
                Ok(locks) => Some(locks),
                Err(error) => {
                    findings.push(Finding::fail(
                        "bridge",
                        format!("no bridge with a veth pair: {}", chain(&error)),
                        "use a kernel with CONFIG_BRIDGE and CONFIG_VETH (modprobe bridge veth)",
                    ));
                    continue;
                }
            },
            _ => None,
        };
        let has = tried.unwrap_or_else(|| has(index, feature));
        findings.push(diagnosis::feature(feature, has));
    }
    findings.push(match (may_try, diag::can_end()) {
        (_, true) => Finding::ok(
            "socket-destroy",
            "connections of the host's sockets end with the publish that they asked for",
        ),
        (false, _) => Finding::unknown(
            "socket-destroy",
            "not tried whether connections of the host's sockets can be ended",
            capability::remedy(),
        ),
        (true, false) => Finding::warn(
            "socket-destroy",
            "connections of the host's sockets to what is unpublished end with their next packet",
            "use a kernel with CONFIG_INET_DIAG_DESTROY (modprobe tcp_diag)",
        ),
    });
    let has_cookie = bpf::Host::current().is_ok_and(|host| host.netns_cookie != 0);
    findings.push(match has_cookie {
        true => Finding::ok("namespace-identity", "namespaces have cookies"),
        false => Finding::warn(
            "namespace-identity",
            "namespaces are told apart by inode numbers, which are used again, and sockets of the \
             host can take published ports",
            "use Linux 5.14 or later",
        ),
    });
    findings
}

/// What the host's own addresses and ports leave to nucnet.
fn addresses() -> Vec<Finding> {
    let mut findings = Vec::new();
    match bpf::HostPorts::read().and_then(|ports| ports.dynamic(None)) {
        Ok((first, mask)) => findings.push(Finding::ok(
            "masquerade-ports",
            format!(
                "{first}-{} are not the host's own",
                first.saturating_add(mask)
            ),
        )),
        Err(error) => findings.push(Finding::fail(
            "masquerade-ports",
            chain(&error),
            error.hint().unwrap_or_else(|| AS_ROOT.to_owned()),
        )),
    }
    findings.push(
        match probe::line("/proc/sys/net/ipv6/conf/all/disable_ipv6") {
            Some(value) if value == "0" => Finding::ok("ipv6", "on"),
            Some(_) => Finding::warn(
                "ipv6",
                "off on all interfaces: endpoints' IPv6 leads nowhere",
                "sysctl -w net.ipv6.conf.all.disable_ipv6=0",
            ),
            None => Finding::warn(
                "ipv6",
                "the kernel has none: networks must be made without it",
                "boot without ipv6.disable=1",
            ),
        },
    );
    findings.push(diagnosis::bridge_netfilter(
        probe::line("/proc/sys/net/bridge/bridge-nf-call-iptables").as_deref(),
    ));
    findings
}

fn reverse_path(uplinks: &[Uplink]) -> Finding {
    let of = |interface: &str| -> u8 {
        let sysctl = Sysctl::link(Family::Ipv4, interface, LinkKey::RpFilter);
        sysctl
            .read()
            .ok()
            .and_then(|value| value.parse().ok())
            .unwrap_or(0)
    };
    // The larger of the two is in force: 1 is strict, 2 is loose.
    let all = of("all");
    let strict: Vec<String> = uplinks
        .iter()
        .map(|uplink| uplink.link.name.clone())
        .filter(|name| of(name).max(all) == 1)
        .collect();
    diagnosis::reverse_path(&strict, uplinks.len())
}

fn overlaps(networks: &[NetworkRecord], netlink: &Netlink) -> Finding {
    let seen = || -> Result<_, crate::kernel::netlink::Error> {
        let links = netlink.links()?;
        let foreign: HashMap<u32, &str> = links
            .iter()
            .filter(|link| !link.is_owned())
            .map(|link| (link.index, link.name.as_str()))
            .collect();
        let mut subnets: Vec<IpNet> = networks
            .iter()
            .flat_map(|network| &network.subnets)
            .map(|subnet| subnet.gateway_net().trunc())
            .collect();
        if subnets.is_empty() {
            let (address, length) = DEFAULT_SUBNET;
            subnets.extend(IpNet::new(address.into(), length));
        }
        let routes: Vec<(IpNet, String)> = netlink
            .routes()?
            .into_iter()
            .flat_map(|route| {
                let hops = route.hops.into_iter();
                hops.map(move |hop| (route.destination, hop.link))
            })
            .filter_map(|(route, link)| Some((route, (*foreign.get(&link)?).to_owned())))
            .collect();
        Ok(diagnosis::overlaps(&subnets, &routes))
    };
    match seen() {
        Ok(found) => diagnosis::address_overlap(&found),
        Err(error) => Finding::unknown("address-overlap", chain(&error), AS_ROOT),
    }
}

/// What the iptables datapath would have to work with, or has.
fn iptables(by_rules: bool) -> Finding {
    let look = || -> Result<Iptables, helper::Error> {
        let backend = netfilter::detect()?;
        Ok(Iptables {
            backend,
            has_v6: Netfilter::open(backend)?.has(netfilter_model::Family::Ipv6),
            is_mixed: netfilter::has_foreign(backend)? && netfilter::has_foreign(backend.other())?,
        })
    };
    match look() {
        Ok(found) => diagnosis::iptables(Some(found), by_rules),
        Err(helper::Error::Missing(_)) => diagnosis::iptables(None, by_rules),
        Err(error) => Finding::unknown("iptables", chain(&error), AS_ROOT),
    }
}

fn firewalls(endpoints: &[EndpointRecord], by_rules: bool) -> [Finding; 2] {
    let rules = probe::firewalls();
    let read: Vec<(&'static str, &str)> = rules
        .iter()
        .filter_map(|rules| Some((rules.tool, rules.text.as_deref()?)))
        .collect();
    let drops: Vec<_> = read
        .iter()
        .flat_map(|(tool, text)| diagnosis::dropping(tool, text))
        .collect();
    let could_look = rules.is_empty() || !read.is_empty();
    let translated: BTreeSet<(String, u16)> = read
        .iter()
        .flat_map(|(_, text)| diagnosis::translated_ports(text))
        .collect();
    let publishes = || endpoints.iter().flat_map(|endpoint| &endpoint.publishes);
    let twice: Vec<String> = translated
        .iter()
        .filter(|(protocol, port)| {
            publishes().any(|publish| {
                publish.protocol().to_string() == *protocol
                    && publish
                        .host_ports()
                        .is_some_and(|range| range.contains(*port))
            })
        })
        .map(|(protocol, port)| format!("{port}/{protocol}"))
        .collect();
    [
        diagnosis::forward(could_look.then_some(&drops[..]), by_rules),
        match could_look {
            true => diagnosis::translated_elsewhere(&twice),
            false => Finding::unknown("foreign-dnat", "no firewall tool could be asked", AS_ROOT),
        },
    ]
}
