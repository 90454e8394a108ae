//! `status`: the host as nucnet sees it. Reads without a lock: what others are changing just now
//! may show as drift.

use super::{
    DatapathChoice, Error, Host, NetworkView, netfilter as rules,
    sight::View,
    step::{MAPPING_ROUTES, endpoint_alias, mapping_entries, mapping_routes_alias, network_alias},
};
use crate::{
    OBJECT_HASH,
    kernel::{
        bpf::{self, AttachKind, Datapath, Pinned, RunTimeStatistics},
        netlink::{Direction, Netlink},
        netns::NetnsFd,
        resolv,
    },
    model::{
        drift::{self, Drift, Hooked, MappingSight, Unexplained},
        record::{DatapathKind, DatapathRecord, EndpointRecord, MappingRecord, NetworkRecord},
    },
};
use ipnet::IpNet;
use nucnet_common::abi::{self, program};
use serde::Serialize;
use std::{collections::HashSet, path::PathBuf, thread, time::Duration};

/// The host as nucnet sees it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Status {
    /// What carries packets; none: nothing is loaded.
    pub datapath: Option<&'static str>,
    /// Why.
    pub reason: String,
    /// Which host it is, and where it keeps what.
    pub host: HostStatus,
    /// The programs' version.
    pub object: ObjectStatus,
    /// Interfaces by which packets come and go.
    pub uplinks: Vec<UplinkStatus>,
    /// Networks.
    pub networks: Vec<NetworkStatus>,
    /// How many endpoints are recorded.
    pub endpoints: usize,
    /// How many static mappings are recorded.
    pub mappings: usize,
    /// The loaded programs.
    pub programs: Vec<ProgramReport>,
    /// For how many seconds their runs were timed; none: they were not.
    pub sampled_s: Option<f64>,
    /// The maps.
    pub maps: Vec<MapReport>,
    /// Where records and kernel say different things.
    pub drift: Vec<Drift>,
}

/// Which host it is, and where it keeps what.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct HostStatus {
    /// Its network namespace.
    pub netns: String,
    /// That namespace's cookie (Linux 5.14).
    pub netns_cookie: Option<u64>,
    /// Where its state is kept.
    pub state_dir: PathBuf,
    /// Whether there is state of this boot.
    pub has_state: bool,
    /// Where programs and maps are pinned.
    pub bpffs: PathBuf,
    /// Whose processes cannot bind published ports.
    pub cgroup: Option<PathBuf>,
}

/// Versions of this program's object and of the loaded one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ObjectStatus {
    /// ABI version of this program's maps.
    pub abi: u32,
    /// SHA-256 of this program's object.
    pub sha256: &'static str,
    /// ABI version of the pinned maps.
    pub loaded_abi: Option<u32>,
    /// SHA-256 of the loaded object.
    pub loaded_sha256: Option<String>,
    /// Whether the loaded object is this program's.
    pub current: Option<bool>,
}

/// An interface by which packets come and go.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct UplinkStatus {
    /// Its name.
    pub id: String,
    /// Its index.
    pub index: u32,
    /// Its addresses.
    pub addresses: Vec<IpNet>,
    /// How the program sits there: `tcx` or `clsact`.
    pub hook: Option<&'static str>,
    /// The program that belongs there.
    pub program: &'static str,
    /// Whether it sits there.
    pub present: bool,
    /// Whether publishes of any network are served there.
    pub serves: bool,
}

/// A network.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct NetworkStatus {
    /// The network.
    #[serde(flatten)]
    pub network: NetworkView,
    /// How the program sits on its bridge: `tcx` or `clsact`.
    pub hook: Option<&'static str>,
    /// Whether it sits there.
    pub present: bool,
    /// How many endpoints it has.
    pub endpoints: usize,
}

/// A program.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ProgramReport {
    /// Its name.
    pub id: String,
    /// The kernel's number for it.
    pub kernel_id: u32,
    /// Instructions that the verifier walked through (Linux 5.16).
    pub verified_instructions: Option<u32>,
    /// Bytes of machine code; 0: it is interpreted.
    pub machine_code_bytes: u32,
    /// Runs during the sample.
    pub runs: u64,
    /// Mean time of a run in nanoseconds; none: it did not run.
    pub ns_per_run: Option<f64>,
}

/// A map.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct MapReport {
    /// Its name.
    pub id: &'static str,
    /// Its entries; none: an array.
    pub entries: Option<usize>,
    /// How many it takes.
    pub capacity: usize,
}

impl Host {
    /// Looks at everything. Programs' runs are timed for as long as `sample`, which costs every
    /// BPF program of the machine some tens of nanoseconds a run; zero: not at all.
    pub fn status(&self, sample: Duration) -> Result<Status, Error> {
        let store = self.read()?;
        let has_state = store.is_some();
        let record = store.as_ref().map(|store| store.host()).transpose()?;
        let record = record.flatten();
        let carrier = record.as_ref().and_then(|record| record.datapath.clone());
        let kind = carrier
            .as_ref()
            .map_or(DatapathKind::Ebpf, |carrier| carrier.kind);
        let (mut networks, mut endpoints, mut damaged) = (Vec::new(), Vec::new(), Vec::new());
        let mut mappings = Vec::new();
        if let Some(store) = store {
            let (found, unreadable) = store.networks()?;
            networks = found;
            damaged.extend(unreadable.iter().map(|error| super::chain(error)));
            let (found, unreadable) = store.endpoints()?;
            endpoints = found;
            damaged.extend(unreadable.iter().map(|error| super::chain(error)));
            let (found, unreadable) = store.mappings()?;
            mappings = found;
            damaged.extend(unreadable.iter().map(|error| super::chain(error)));
        }
        let pinned = Datapath::pinned(&self.options.bpffs)?;
        let datapath = self.open_datapath()?;
        let netlink = Netlink::open()?;
        let mounts = resolv::mounts(&self.options.state_dir)?;
        let mut view = View::new(&netlink, netlink.links()?, datapath.as_ref(), mounts)?;
        let serves_v6 = rules::serves_v6(record.as_ref())?;
        view.carried_by(kind, serves_v6);
        let mut found = Vec::new();
        let uplinks = view.uplinks_of(&networks, &mut found)?;
        let network_views = view.networks(&networks, &endpoints, &mut found)?;
        for endpoint in &endpoints {
            let network = networks.iter().find(|n| n.number == endpoint.network);
            found.extend(drift::of_endpoint(
                endpoint,
                &view.endpoint(endpoint, network, None)?,
            ));
        }
        if let Some(netfilter) = record.as_ref().map(rules::of_host).transpose()?.flatten() {
            let recorded = rules::Recorded {
                networks: networks.clone(),
                endpoints: endpoints.clone(),
                mappings: mappings.clone(),
                local: rules::local(&netlink)?,
                ports: rules::source_ports()?,
            };
            let recorded = recorded.in_use();
            let rules = rules::differences(&netfilter, &recorded.wanted())?;
            found.extend(
                Unexplained {
                    rules,
                    closed_v6: match serves_v6 {
                        true => Vec::new(),
                        false => closed_v6(&networks),
                    },
                    ..Unexplained::default()
                }
                .drift(),
            );
        }
        if carrier.as_ref().is_some_and(|carrier| carrier.moving) {
            found.push(drift::moving(kind));
        }
        for mapping in &mappings {
            found.extend(drift::of_mapping(mapping, &view.mapping(mapping)?));
        }
        found.extend(
            view.unexplained(&networks, &endpoints, &mappings, &uplinks, damaged)?
                .drift(),
        );
        let (programs, sampled) = view.timed(sample)?;
        let maps = match &datapath {
            Some(datapath) => datapath.fill()?,
            None => Vec::new(),
        };
        Ok(Status {
            datapath: match kind {
                DatapathKind::Ebpf => datapath.is_some().then_some(kind.name()),
                DatapathKind::Iptables => Some(kind.name()),
            },
            reason: reason(self.options.datapath, carrier.as_ref(), datapath.is_some()),
            host: self.described(has_state)?,
            object: object(pinned),
            uplinks,
            networks: network_views,
            endpoints: endpoints.len(),
            mappings: mappings.len(),
            programs,
            sampled_s: sampled.map(|time| time.as_secs_f64()),
            maps: maps
                .into_iter()
                .map(|map| MapReport {
                    id: map.name,
                    entries: map.entries,
                    capacity: map.capacity,
                })
                .collect(),
            drift: found,
        })
    }

    fn described(&self, has_state: bool) -> Result<HostStatus, Error> {
        let netns = NetnsFd::current()?;
        let cgroup = self.options.cgroup.clone();
        Ok(HostStatus {
            netns: netns.id().to_string(),
            // Asked of a socket: whoever only looks may lack the right to enter a namespace.
            netns_cookie: Some(bpf::Host::current()?.netns_cookie).filter(|&cookie| cookie != 0),
            state_dir: self.options.state_dir.clone(),
            has_state,
            bpffs: self.options.bpffs.clone(),
            cgroup: cgroup.or_else(|| bpf::cgroup_root().ok()),
        })
    }
}

fn reason(choice: DatapathChoice, carrier: Option<&DatapathRecord>, is_loaded: bool) -> String {
    match (carrier, choice) {
        (Some(carrier), _) if carrier.kind == DatapathKind::Iptables => {
            let backend = carrier.backend.map(|backend| format!(", by {backend}"));
            let why = carrier
                .reason
                .as_deref()
                .unwrap_or("asked for by --datapath");
            format!("{why}{}", backend.unwrap_or_default())
        }
        _ if !is_loaded => "nothing is attached: the first attach loads it".to_owned(),
        (_, DatapathChoice::Auto) => "this kernel runs it, and it is the best there is".to_owned(),
        _ => "asked for by --datapath".to_owned(),
    }
}

/// The bridges on which IPv6 would be served.
fn closed_v6(networks: &[NetworkRecord]) -> Vec<String> {
    let served = networks
        .iter()
        .filter(|network| network.subnet(true).is_some());
    served.map(|network| network.bridge.to_string()).collect()
}

fn object(pinned: Option<Pinned>) -> ObjectStatus {
    ObjectStatus {
        abi: abi::VERSION,
        sha256: OBJECT_HASH,
        loaded_abi: pinned.as_ref().map(|pinned| pinned.abi),
        current: pinned.as_ref().map(|pinned| pinned.object == OBJECT_HASH),
        loaded_sha256: pinned.map(|pinned| pinned.object),
    }
}

fn hook_name(kind: AttachKind) -> &'static str {
    match kind {
        AttachKind::Tcx => "tcx",
        AttachKind::Clsact => "clsact",
    }
}

impl View<'_> {
    fn uplinks_of(
        &self,
        networks: &[NetworkRecord],
        found: &mut Vec<Drift>,
    ) -> Result<Vec<UplinkStatus>, Error> {
        let mut uplinks = Vec::new();
        for seen in self.uplinks()? {
            let link = seen.uplink.link;
            found.extend(drift::of_uplink(&link.name, seen.hooked, networks.len()));
            let serves = networks
                .iter()
                .map(NetworkRecord::uplinks)
                .any(|listed| listed.is_empty() || listed.iter().any(|n| n.as_str() == link.name));
            uplinks.push(UplinkStatus {
                id: link.name,
                index: link.index,
                addresses: seen.uplink.addresses,
                hook: seen.kind.map(hook_name),
                program: seen.layer.program(),
                present: seen.hooked == Hooked::Yes,
                serves,
            });
        }
        Ok(uplinks)
    }

    fn networks(
        &self,
        networks: &[NetworkRecord],
        endpoints: &[EndpointRecord],
        found: &mut Vec<Drift>,
    ) -> Result<Vec<NetworkStatus>, Error> {
        let mut views = Vec::new();
        for network in networks {
            let index = network.link.unwrap_or_default();
            let (kind, hooked) = self.hooked(index, program::FROM_HOST, Direction::Egress)?;
            found.extend(drift::of_network(network, &self.network(network)?));
            views.push(NetworkStatus {
                network: NetworkView::new(network),
                hook: kind.map(hook_name),
                present: hooked == Hooked::Yes,
                endpoints: endpoints
                    .iter()
                    .filter(|endpoint| endpoint.network == network.number)
                    .count(),
            });
        }
        Ok(views)
    }

    fn mapping(&self, record: &MappingRecord) -> Result<MappingSight, Error> {
        let missing = match self.datapath {
            Some(datapath) => datapath.missing_entries(&mapping_entries(record))?,
            None => 0,
        };
        let routes = self
            .links
            .get(MAPPING_ROUTES)
            .filter(|link| link.has_alias(&mapping_routes_alias()));
        let told = match self.datapath {
            Some(datapath) => datapath.settings()?.mapping_link,
            None => 0,
        };
        let bound = record.spec.ext_if().map(|name| {
            let link = self.links.get(name.as_str());
            link.is_some_and(|link| link.index == record.link)
        });
        Ok(MappingSight {
            entries: missing,
            routes: self.datapath.is_none() || routes.is_some_and(|link| link.index == told),
            interface: bound.unwrap_or(true),
        })
    }

    fn unexplained(
        &self,
        networks: &[NetworkRecord],
        endpoints: &[EndpointRecord],
        mappings: &[MappingRecord],
        uplinks: &[UplinkStatus],
        damaged: Vec<String>,
    ) -> Result<Unexplained, Error> {
        let mut aliases: HashSet<String> = endpoints.iter().map(endpoint_alias).collect();
        aliases.extend(networks.iter().map(network_alias));
        aliases.extend((!mappings.is_empty()).then(mapping_routes_alias));
        let mut links: Vec<String> = self
            .links
            .values()
            .filter(|link| link.is_owned())
            .filter(|link| !link.alias.as_ref().is_some_and(|a| aliases.contains(a)))
            .map(|link| link.name.clone())
            .collect();
        links.sort();
        let programs = self
            .attachments
            .iter()
            .filter(|noted| match noted.program {
                program::FROM_HOST | program::FROM_LOOPBACK => noted.index == 0,
                _ => !uplinks.iter().any(|uplink| uplink.index == noted.index),
            })
            .map(|noted| noted.interface.clone())
            .collect();
        let mut unexplained = Unexplained {
            links,
            programs,
            damaged,
            datapath_gone: self.kind == DatapathKind::Ebpf
                && self.datapath.is_none()
                && !(endpoints.is_empty() && mappings.is_empty()),
            ..Unexplained::default()
        };
        let Some(datapath) = self.datapath else {
            return Ok(unexplained);
        };
        if !endpoints.is_empty() {
            unexplained.bind_hooks = datapath.missing_bind_hooks()?;
            let (name, direction) = (program::FROM_LOOPBACK, Direction::Egress);
            unexplained.loopback_gone =
                self.hooked(bpf::LOOPBACK, name, direction)?.1 != Hooked::Yes;
        }
        let mut numbers: HashSet<u32> = endpoints.iter().map(|e| e.number).collect();
        numbers.extend(mappings.iter().map(|mapping| mapping.number));
        numbers.extend((!mappings.is_empty()).then_some(abi::MAPPED));
        let mut note = |name, entries: Vec<u32>| {
            let strange = entries.iter().filter(|n| !numbers.contains(n)).count();
            if strange > 0 {
                unexplained.entries.push((name, strange));
            }
        };
        let mut of = Vec::new();
        datapath
            .endpoints
            .for_each(|_, entry| of.push(entry.number))?;
        note(abi::map::ENDPOINTS, std::mem::take(&mut of));
        datapath
            .addresses
            .for_each(|_, owner| of.push(owner.endpoint))?;
        note(abi::map::ADDRESSES, std::mem::take(&mut of));
        datapath.publishes.for_each(|_, publish| {
            of.push(match publish.mapping {
                0 => publish.endpoint,
                mapping => mapping,
            });
        })?;
        note(abi::map::PUBLISHES, std::mem::take(&mut of));
        datapath
            .hairpins
            .for_each(|_, port| of.push(port.mapping))?;
        note(abi::map::HAIRPINS, std::mem::take(&mut of));
        datapath.mappings.for_each(|number, _| of.push(*number))?;
        note(abi::map::MAPPINGS, std::mem::take(&mut of));
        datapath.usage.for_each(|number, _| of.push(*number))?;
        note(abi::map::USAGE, of);
        Ok(unexplained)
    }

    /// The programs with the mean time of their runs during a sample.
    fn timed(&self, sample: Duration) -> Result<(Vec<ProgramReport>, Option<Duration>), Error> {
        let Some(datapath) = self.datapath else {
            return Ok((Vec::new(), None));
        };
        let statistics = match sample.is_zero() {
            true => None,
            false => RunTimeStatistics::enable()
                .inspect_err(|error| {
                    tracing::warn!(
                        error = error as &dyn std::error::Error,
                        "cannot time the programs"
                    );
                })
                .ok(),
        };
        let before = datapath.programs()?;
        if statistics.is_some() {
            thread::sleep(sample);
        }
        let reports = datapath
            .programs()?
            .into_iter()
            .map(|now| {
                let then = before.iter().find(|then| then.id == now.id);
                let (runs, time) = then.map_or((0, Duration::ZERO), |then| {
                    (
                        now.run_count.saturating_sub(then.run_count),
                        now.run_time.saturating_sub(then.run_time),
                    )
                });
                ProgramReport {
                    id: now.name,
                    kernel_id: now.id,
                    verified_instructions: now.verified_instructions,
                    machine_code_bytes: now.machine_code,
                    runs,
                    ns_per_run: (runs > 0).then(|| time.as_nanos() as f64 / runs as f64),
                }
            })
            .collect();
        Ok((reports, statistics.map(|_| sample)))
    }
}
