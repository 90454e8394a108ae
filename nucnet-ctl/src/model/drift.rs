//! Drift: where records and kernel say different things, and what mends it.

use super::record::{DatapathKind, EndpointRecord, MappingRecord, NetworkRecord, State};
use serde::Serialize;
use std::{fmt, net::IpAddr};

/// A difference between records and kernel.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Drift {
    /// Of what: `endpoint ID`, `network NAME`, `uplink IF`...
    pub id: String,
    /// What differs.
    pub problem: String,
    /// What mends it.
    pub remedy: String,
}

impl Drift {
    fn new(id: &impl fmt::Display, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self {
            id: id.to_string(),
            problem: problem.into(),
            remedy: remedy.into(),
        }
    }
}

const GC: &str = "nucnet-ctl gc";

/// What the kernel has under the name of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkSight {
    /// Nothing.
    Absent,
    /// Somebody else's link.
    Foreign,
    /// The one that was made, set down.
    Down,
    /// The one that was made.
    Up,
}

/// What is where an endpoint's namespace was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NetnsSight {
    /// Its namespace.
    Same,
    /// Another one, or nothing.
    Gone,
    /// Nobody may look.
    Unknown,
}

/// What the kernel has of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EndpointSight {
    /// The host side of its link.
    pub link: LinkSight,
    /// Whether that is a port of its network's bridge.
    pub port: bool,
    /// Its namespace; it lives for as long as its link, wherever it was found.
    pub netns: NetnsSight,
    /// Whether its program sits on its link.
    pub program: bool,
    /// Whether the maps have it as recorded.
    pub entry: bool,
    /// Addresses of its own that the maps do not give to it.
    pub addresses: Vec<IpAddr>,
    /// How many entries of its publishes are missing.
    pub publishes: usize,
    /// How many entries of its policy are missing.
    pub policy: usize,
    /// Addresses of its own that its network's bridge has no neighbour for.
    pub neighbours: Vec<IpAddr>,
    /// What is wrong within its namespace, as far as that can be looked into.
    pub inside: Vec<String>,
    /// Whether there is a mount of its `resolv.conf`.
    pub resolv_conf: bool,
}

/// What the kernel lacks of an endpoint.
pub fn of_endpoint(record: &EndpointRecord, sight: &EndpointSight) -> Vec<Drift> {
    let name = Named("endpoint", &record.id);
    if !matches!(record.state, State::Active | State::Degraded) {
        let problem = format!("{}: in progress, or left by a crash", record.state);
        return vec![Drift::new(&name, problem, GC)];
    }
    const AGAIN: &str = "attach it again: that repairs it";
    let link = &record.host_ifname;
    match sight.link {
        LinkSight::Absent | LinkSight::Foreign => {
            let what = match sight.link {
                LinkSight::Foreign => format!("interface {link} is somebody else's"),
                _ => format!("interface {link} is gone"),
            };
            return vec![match sight.netns {
                NetnsSight::Gone => Drift::new(&name, format!("{what}, and so is its netns"), GC),
                _ => Drift::new(&name, what, AGAIN),
            }];
        }
        LinkSight::Down | LinkSight::Up => {}
    }
    let mut found = Vec::new();
    for publish in &record.pending {
        let problem = format!("publish {publish}: in progress, or left by a crash");
        found.push(Drift::new(&name, problem, GC));
    }
    let mut missing = |problem: String| found.push(Drift::new(&name, problem, AGAIN));
    if sight.link == LinkSight::Down {
        missing(format!("interface {link} is down"));
    }
    if !sight.port {
        missing(format!(
            "interface {link} is no port of its network's bridge"
        ));
    }
    if !sight.program {
        missing(format!(
            "no program of nucnet's on {link}: nothing that it sends passes"
        ));
    }
    if !sight.entry {
        missing("the maps do not have it as recorded".to_owned());
    }
    for address in &sight.addresses {
        missing(format!("address {address} is not its own in the maps"));
    }
    for address in &sight.neighbours {
        missing(format!("the host has no neighbour {address}"));
    }
    for problem in &sight.inside {
        missing(format!("within its netns: {problem}"));
    }
    if sight.policy > 0 {
        missing(format!(
            "{} entries of its policy are missing",
            sight.policy
        ));
    }
    if sight.publishes > 0 {
        let entries = sight.publishes;
        missing(format!("{entries} entries of its publishes are missing"));
    }
    if let Some(resolv) = &record.resolv
        && !sight.resolv_conf
    {
        let root = resolv.rootfs.display();
        missing(format!(
            "its resolv.conf is not mounted in {root}, as seen from here"
        ));
    }
    found
}

/// What the kernel has of a static mapping.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappingSight {
    /// How many of its entries are missing.
    pub entries: usize,
    /// Whether routes can be looked up for it.
    pub routes: bool,
    /// Whether the interface that it is bound to is the one that it was bound to.
    pub interface: bool,
}

/// What the kernel lacks of a static mapping.
pub fn of_mapping(record: &MappingRecord, sight: &MappingSight) -> Vec<Drift> {
    let name = Named("mapping", &record.id);
    if record.state != State::Active {
        let problem = format!("{}: in progress, or left by a crash", record.state);
        return vec![Drift::new(&name, problem, GC)];
    }
    let again = || format!("nucnet-ctl nat add {}", record.spec);
    let mut found = Vec::new();
    if sight.entries > 0 {
        let problem = format!("{} of its entries are missing", sight.entries);
        found.push(Drift::new(&name, problem, again()));
    }
    if !sight.routes {
        let problem = "the interface for its route lookups is gone";
        found.push(Drift::new(&name, problem, again()));
    }
    if let Some(interface) = record.spec.ext_if().filter(|_| !sight.interface) {
        let problem = format!("interface {interface} is gone, or another one now");
        found.push(Drift::new(&name, problem, again()));
    }
    found
}

/// What the kernel has of a network.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NetworkSight {
    /// Its bridge.
    pub bridge: LinkSight,
    /// Whether its program sits on the bridge.
    pub program: bool,
    /// Whether the maps have it as recorded.
    pub entry: bool,
    /// Addresses of its own that the bridge lacks.
    pub addresses: Vec<IpAddr>,
    /// Families of which the bridge does not forward: `ipv4`, `ipv6`.
    pub not_forwarding: Vec<String>,
    /// Whether IPv6 comes in by the bridge where no rule is about it.
    pub is_open: bool,
}

/// What the kernel lacks of a network.
pub fn of_network(record: &NetworkRecord, sight: &NetworkSight) -> Vec<Drift> {
    let name = Named("network", &record.name);
    let bridge = &record.bridge;
    if !matches!(record.state, State::Active | State::Degraded) {
        let problem = format!("{}: in progress, or left by a crash", record.state);
        return vec![Drift::new(&name, problem, GC)];
    }
    const ATTACH: &str = "attach any endpoint to it, anew or again: that repairs the bridge";
    let mut found = Vec::new();
    let mut missing = |problem: String| found.push(Drift::new(&name, problem, ATTACH));
    match sight.bridge {
        LinkSight::Absent => {
            missing(format!("bridge {bridge} is gone"));
            return found;
        }
        LinkSight::Foreign => {
            let problem = format!("interface {bridge} is somebody else's");
            let remedy = format!("remove or rename {bridge}, then {ATTACH}");
            return vec![Drift::new(&name, problem, remedy)];
        }
        LinkSight::Down => missing(format!("bridge {bridge} is down")),
        LinkSight::Up => {}
    }
    if !sight.program {
        missing(format!(
            "no program of nucnet's on {bridge}: the host reaches no endpoint"
        ));
    }
    if !sight.entry {
        missing("the maps do not have it as recorded".to_owned());
    }
    for address in &sight.addresses {
        missing(format!("bridge {bridge} lacks address {address}"));
    }
    if sight.is_open {
        missing(format!(
            "bridge {bridge} takes IPv6, which no rule is about"
        ));
    }
    for family in &sight.not_forwarding {
        missing(format!(
            "net.{family}.conf.{bridge}.forwarding is off: no way out is found"
        ));
    }
    found
}

/// A call that was moving everything to a datapath has died.
pub fn moving(to: DatapathKind) -> Drift {
    let problem = format!("not everything has moved to {to} yet");
    Drift::new(&"datapath", problem, GC)
}

/// Whether nucnet's program sits on an interface of the host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Hooked {
    /// It does.
    Yes,
    /// It was put there, and is there no more.
    Lost,
    /// It was never put there.
    Never,
    /// None belongs there, and the host does not forward what comes in by it.
    NotForwarding,
}

/// What an uplink lacks. Without a network there is nothing to serve.
pub fn of_uplink(interface: &str, hooked: Hooked, networks: usize) -> Option<Drift> {
    let name = Named("uplink", &interface);
    let problem = match hooked {
        Hooked::Yes => return None,
        Hooked::Never if networks == 0 => return None,
        Hooked::Never => "it came up after the last attach, and has no program",
        Hooked::NotForwarding if networks == 0 => return None,
        Hooked::NotForwarding => "it does not forward: no answers come in by it",
        Hooked::Lost => "somebody took nucnet's program off",
    };
    Some(Drift::new(&name, problem, GC))
}

/// What the kernel has and no record explains.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Unexplained {
    /// Links that carry nucnet's mark.
    pub links: Vec<String>,
    /// Maps with entries of endpoints that nobody recorded, and how many.
    pub entries: Vec<(&'static str, usize)>,
    /// Interfaces that have a program, and are no uplinks or gone.
    pub programs: Vec<String>,
    /// Records that cannot be read.
    pub damaged: Vec<String>,
    /// Bind hooks that are on no cgroup, although there are endpoints.
    pub bind_hooks: Vec<&'static str>,
    /// The program on the loopback interface is gone, although there are endpoints.
    pub loopback_gone: bool,
    /// There are endpoints, and no datapath.
    pub datapath_gone: bool,
    /// Rules of nucnet's that are not as they should be.
    pub rules: Vec<String>,
    /// Bridges on which IPv6 is off, because no rule can be written for it.
    pub closed_v6: Vec<String>,
}

impl Unexplained {
    /// All of it, each with its remedy.
    pub fn drift(&self) -> Vec<Drift> {
        let mut found = Vec::new();
        for link in &self.links {
            let name = Named("interface", link);
            found.push(Drift::new(&name, "nucnet's own, without a record", GC));
        }
        for (map, entries) in &self.entries {
            let problem = format!("{entries} entries of endpoints without a record");
            found.push(Drift::new(&Named("map", map), problem, GC));
        }
        for interface in &self.programs {
            let name = Named("interface", interface);
            let problem = "has a program, and is no uplink any more";
            found.push(Drift::new(&name, problem, GC));
        }
        for damaged in &self.damaged {
            let remedy = "nucnet-ctl gc sets it aside; then detach the endpoint when it may go";
            found.push(Drift::new(&"record", damaged.as_str(), remedy));
        }
        for hook in &self.bind_hooks {
            let problem = "on no cgroup: sockets of the host can take published ports";
            let remedy = "attach any endpoint";
            found.push(Drift::new(&Named("program", hook), problem, remedy));
        }
        if self.loopback_gone {
            let problem = "without nucnet's program: sockets of the host reach no publish";
            found.push(Drift::new(
                &"loopback interface",
                problem,
                "attach any endpoint",
            ));
        }
        for difference in &self.rules {
            let problem = format!("{difference} is not as it should be");
            found.push(Drift::new(&"rules", problem, "nucnet-ctl gc"));
        }
        for bridge in &self.closed_v6 {
            let problem = format!("closed on bridge {bridge}: there is no ip6tables");
            let remedy = "install ip6tables, then attach again what is to have IPv6";
            found.push(Drift::new(&"IPv6", problem, remedy));
        }
        if self.datapath_gone {
            let problem = "gone, although there are endpoints: nothing passes";
            let remedy = "attach each of them again: that repairs it";
            found.push(Drift::new(&"datapath", problem, remedy));
        }
        found
    }
}

/// Which link of nucnet's it is: `interface`, seen by name.
pub fn link_sight(is_there: bool, is_own: bool, is_up: bool) -> LinkSight {
    match (is_there, is_own, is_up) {
        (false, ..) => LinkSight::Absent,
        (_, false, _) => LinkSight::Foreign,
        (_, _, false) => LinkSight::Down,
        _ => LinkSight::Up,
    }
}

struct Named<'a, T>(&'a str, &'a T);

impl<T: fmt::Display> fmt::Display for Named<'_, T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.0, self.1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::record::{MountPoint, ResolvRecord, fixture::endpoint};

    fn sound() -> EndpointSight {
        EndpointSight {
            link: LinkSight::Up,
            port: true,
            netns: NetnsSight::Same,
            program: true,
            entry: true,
            addresses: Vec::new(),
            publishes: 0,
            policy: 0,
            neighbours: Vec::new(),
            inside: Vec::new(),
            resolv_conf: false,
        }
    }

    fn remedies(record: &EndpointRecord, sight: &EndpointSight) -> Vec<String> {
        let found = of_endpoint(record, sight);
        assert!(found.iter().all(|drift| drift.id == "endpoint web"));
        found.into_iter().map(|drift| drift.remedy).collect()
    }

    #[test]
    fn a_sound_endpoint_has_not_drifted() {
        assert!(of_endpoint(&endpoint(), &sound()).is_empty());
        let elsewhere = EndpointSight {
            netns: NetnsSight::Gone,
            ..sound()
        };
        assert!(of_endpoint(&endpoint(), &elsewhere).is_empty());
    }

    #[test]
    fn what_is_dead_is_collected_and_what_lives_is_attached_again() {
        let mut sight = EndpointSight {
            link: LinkSight::Absent,
            netns: NetnsSight::Gone,
            program: false,
            ..sound()
        };
        assert_eq!(remedies(&endpoint(), &sight), ["nucnet-ctl gc"]);
        sight.netns = NetnsSight::Same;
        let again = "attach it again: that repairs it";
        assert_eq!(remedies(&endpoint(), &sight), [again]);
    }

    #[test]
    fn a_missing_program_and_entry_are_told_apart() {
        let sight = EndpointSight {
            program: false,
            entry: false,
            addresses: vec!["10.0.42.7".parse().unwrap()],
            publishes: 2,
            policy: 3,
            neighbours: vec!["10.0.42.7".parse().unwrap()],
            inside: vec!["interface eth0 is down".to_owned()],
            ..sound()
        };
        let again = "attach it again: that repairs it";
        assert_eq!(remedies(&endpoint(), &sight), [again; 7]);
    }

    #[test]
    fn a_resolv_conf_is_missed_where_one_was_asked_for() {
        let mut record = endpoint();
        record.resolv = Some(ResolvRecord {
            rootfs: "/containers/web".into(),
            device: 1,
            inode: 2,
            made: MountPoint::Found,
        });
        let found = of_endpoint(&record, &sound());
        assert!(found[0].problem.contains("/containers/web"), "{found:?}");
        let sight = EndpointSight {
            resolv_conf: true,
            ..sound()
        };
        assert!(of_endpoint(&record, &sight).is_empty());
    }

    #[test]
    fn a_record_that_is_not_of_something_whole_is_for_gc() {
        let mut record = endpoint();
        record.state = State::Removing;
        assert_eq!(remedies(&record, &sound()), ["nucnet-ctl gc"]);
    }

    #[test]
    fn an_uplink_without_a_program_matters_where_there_is_a_network() {
        assert_eq!(of_uplink("eth0", Hooked::Never, 0), None);
        assert_eq!(of_uplink("eth0", Hooked::Yes, 1), None);
        assert!(of_uplink("eth0", Hooked::Never, 1).is_some());
        assert!(of_uplink("eth0", Hooked::Lost, 0).is_some());
    }

    #[test]
    fn each_unexplained_thing_has_a_remedy() {
        let unexplained = Unexplained {
            links: vec!["nn00000001".into()],
            entries: vec![("endpoints", 2)],
            programs: vec!["eth9".into()],
            damaged: vec!["record x".into()],
            bind_hooks: vec!["host_bind4"],
            loopback_gone: true,
            datapath_gone: true,
            rules: vec!["IPv4: chain NUCNET-FORWARD of table filter".into()],
            closed_v6: vec!["nucnet0".into()],
        };
        let found = unexplained.drift();
        assert_eq!(found.len(), 9);
        assert!(found.iter().all(|drift| !drift.remedy.is_empty()));
        assert!(Unexplained::default().drift().is_empty());
    }
}
