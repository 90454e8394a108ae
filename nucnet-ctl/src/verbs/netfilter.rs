//! The iptables datapath: which rules the records ask for.

use super::{Error, host::Session};
use crate::{
    kernel::{
        bpf::{BpfError, HostPorts},
        diag::{self, Connection},
        netfilter::{self, Netfilter, Tracked},
        netlink::Netlink,
        sysctl::{self, LinkKey, Sysctl},
    },
    model::{
        behaviour::BehaviourWish,
        mapping::MappingSpec,
        netfilter::{Family, SourcePorts, Tuple, Wanted, WantedEndpoint},
        ports::PortRange,
        record::{DatapathKind, EndpointRecord, HostRecord, MappingRecord, NetworkRecord, State},
    },
};
use nucnet_common::packet::TCP;
use std::net::IpAddr;

/// Whether something is in use, by its record.
fn is_in_use(state: State) -> bool {
    matches!(state, State::Active | State::Degraded)
}

/// What is on record to be carried by rules.
#[derive(Debug, Default)]
pub(super) struct Recorded {
    pub(super) networks: Vec<NetworkRecord>,
    pub(super) endpoints: Vec<EndpointRecord>,
    pub(super) mappings: Vec<MappingRecord>,
    /// The host's own addresses.
    pub(super) local: Vec<IpAddr>,
    /// Ports for masquerade.
    pub(super) ports: Option<SourcePorts>,
}

impl Recorded {
    pub(super) fn of(session: &Session) -> Result<Self, Error> {
        Ok(Self {
            networks: session.state.sound_networks()?,
            endpoints: session.state.sound_endpoints()?,
            mappings: session.state.sound_mappings()?,
            local: local(&session.netlink)?,
            ports: source_ports()?,
        }
        .in_use())
    }

    /// Without what is being made, removed, or carried by programs, and in the order in which rules
    /// are written.
    pub(super) fn in_use(mut self) -> Self {
        self.networks.retain(|network| is_in_use(network.state));
        self.endpoints.retain(|endpoint| {
            is_in_use(endpoint.state) && endpoint.datapath == DatapathKind::Iptables
        });
        self.mappings.retain(|mapping| is_in_use(mapping.state));
        self.sort();
        self
    }

    /// By number, whatever the names: who comes later comes last.
    pub(super) fn sort(&mut self) {
        self.networks.sort_by_key(|network| network.number);
        self.endpoints.sort_by_key(|endpoint| endpoint.number);
        self.mappings.sort_by_key(|mapping| mapping.number);
    }

    /// Whether a mapping may have an effect. What comes in is for an address of the host's or not
    /// with each packet; what leaves would leave with any address.
    fn serves(&self, mapping: &MappingRecord) -> bool {
        match &mapping.spec {
            MappingSpec::Snat { ext_ip, .. } => self.local.contains(ext_ip),
            MappingSpec::Dnat { .. } | MappingSpec::Hairpin { .. } => true,
        }
    }

    /// What is wanted of all that.
    pub(super) fn wanted(&self) -> Wanted<'_> {
        Wanted {
            networks: self.networks.iter().collect(),
            endpoints: self
                .endpoints
                .iter()
                .map(|record| WantedEndpoint {
                    record,
                    publishes: &record.publishes,
                    egress: &record.egress,
                    keeps_open: record.keeps_open,
                })
                .collect(),
            mappings: self.mappings.iter().filter(|it| self.serves(it)).collect(),
            ports: self.ports,
        }
    }
}

/// The host's own addresses.
pub(super) fn local(netlink: &Netlink) -> Result<Vec<IpAddr>, Error> {
    let held = netlink.addresses()?;
    Ok(held.iter().map(|held| held.address.addr()).collect())
}

/// The ports for masquerade. Where the host takes all for itself there are none.
pub(super) fn source_ports() -> Result<Option<SourcePorts>, Error> {
    let host = HostPorts::read()?;
    let drawn = match host.dynamic(None) {
        Ok((first, mask)) => PortRange::new(first, first + mask),
        Err(BpfError::NoDynamicPorts { .. }) => None,
        Err(error) => return Err(error.into()),
    };
    let own = PortRange::new(*host.ephemeral.start(), *host.ephemeral.end());
    Ok(drawn
        .zip(own)
        .map(|(drawn, host)| SourcePorts { drawn, host }))
}

/// What differs from the rules that are wanted.
pub(super) fn differences(
    netfilter: &Netfilter,
    wanted: &Wanted<'_>,
) -> Result<Vec<String>, Error> {
    let mut differences = Vec::new();
    for family in Family::ALL {
        let change = netfilter.compare(family, &wanted.chains(family))?;
        let of_family = change.differences.into_iter();
        differences.extend(of_family.map(|what| format!("{family}: {what}")));
    }
    Ok(differences)
}

/// Takes all rules away, and gives back what was changed of the host for them.
pub(super) fn leave(session: &Session) -> Result<(), Error> {
    if let Some(netfilter) = of_host(&session.record)? {
        clear(&netfilter)?;
    }
    if netfilter::announce(&mut session.sysctls.borrow_mut())? {
        session.put_host()?;
    }
    netfilter::restore(&session.sysctls.borrow())?;
    session.sysctls.take();
    Ok(())
}

/// The same once there is nothing left to carry packets for.
pub(super) fn leave_unused(session: &Session) -> Result<(), Error> {
    if session.kind() == DatapathKind::Ebpf || session.is_in_use()? {
        return Ok(());
    }
    leave(session)?;
    session.put_host()
}

fn clear(netfilter: &Netfilter) -> Result<(), Error> {
    for family in Family::ALL {
        netfilter.apply(family, &[])?;
    }
    Ok(())
}

/// The netfilters that have rules of nucnet's in them, whatever became of the records.
pub(super) fn left_over() -> Result<Vec<Netfilter>, Error> {
    let mut found = Vec::new();
    for netfilter in netfilter::all()? {
        for family in Family::ALL {
            if netfilter.saved(family)?.has_own() {
                found.push(netfilter);
                break;
            }
        }
    }
    Ok(found)
}

/// Takes away rules that nobody has on record.
pub(super) fn clear_left_over() -> Result<(), Error> {
    left_over()?.iter().try_for_each(clear)
}

/// The netfilter of a host that has rules in it. `None`: it has none.
pub(super) fn of_host(record: &HostRecord) -> Result<Option<Netfilter>, Error> {
    match &record.datapath {
        Some(datapath) if datapath.kind == DatapathKind::Iptables => match datapath.backend {
            Some(backend) => Ok(Some(Netfilter::open(backend)?)),
            None => Ok(None),
        },
        _ => Ok(None),
    }
}

/// Ends the host's side of a connection that one of its sockets has opened, so that nobody waits
/// for what will not come.
pub(super) fn end_asker(asked: &Tuple) {
    if asked.protocol != TCP {
        return;
    }
    let connection = Connection {
        local: (asked.source, asked.source_port).into(),
        peer: (asked.destination, asked.destination_port).into(),
    };
    if let Err(error) = diag::end(&connection) {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "a connection of the host ends with its next packet only"
        );
    }
}

/// Whether a connection came by a mapping.
pub(super) fn came_by(spec: &MappingSpec, tracked: &Tracked) -> bool {
    let (asked, answer) = (&tracked.original, &tracked.reply);
    match (spec, spec.ports()) {
        (MappingSpec::Snat { int, ext_ip, .. }, _) => {
            int.contains(asked.source) && answer.destination == *ext_ip
        }
        (_, Some((protocol, ports))) => {
            let mut ranges = ports.ranges().iter();
            asked.protocol == protocol.number()
                && asked.destination == spec.ext_ip()
                && Some(answer.source) == spec.int_ip()
                && ranges.any(|range| range.contains(asked.destination_port))
        }
        (_, None) => false,
    }
}

/// Whether IPv6 is served. Nobody knows which rules of it there are where rules carry packets and
/// there is no `ip6tables`, so it is off on nucnet's bridges there.
pub(super) fn serves_v6(record: Option<&HostRecord>) -> Result<bool, Error> {
    let netfilter = record.map(of_host).transpose()?.flatten();
    Ok(netfilter.is_none_or(|netfilter| netfilter.has(Family::Ipv6)))
}

/// The same of what is going to carry packets once the verb has settled it.
pub(super) fn will_serve_v6(session: &Session) -> Result<bool, Error> {
    if session.coming_kind() == DatapathKind::Ebpf {
        return Ok(true);
    }
    match of_host(&session.record)? {
        Some(netfilter) => Ok(netfilter.has(Family::Ipv6)),
        None => Ok(Netfilter::open(netfilter::detect()?)?.has(Family::Ipv6)),
    }
}

/// Says of a network that it lacks IPv6 for want of a program, if it does.
pub(super) fn report_closed_v6(record: &HostRecord, network: &NetworkRecord) -> Result<(), Error> {
    if network.subnet(true).is_some() && !serves_v6(Some(record))? {
        tracing::warn!(
            network = %network.name,
            "there is no ip6tables, so IPv6 is closed: nothing of it passes, and endpoints get no \
             address of it"
        );
    }
    Ok(())
}

/// Says what was asked for of a network that has no effect where rules carry packets.
pub(super) fn report_ineffective(network: &NetworkRecord) {
    let asked = network.wish.as_ref().map(|wish| &wish.behaviour);
    let flags = asked
        .map(BehaviourWish::beyond_netfilter)
        .unwrap_or_default();
    if !flags.is_empty() {
        tracing::warn!(
            network = %network.name,
            "of no effect where iptables carries packets, which has its own ways: {}",
            flags.join(", ")
        );
    }
}

/// Has nothing of IPv6 come in by a bridge, nor leave by it.
pub(super) fn close_v6(network: &NetworkRecord) -> Result<(), Error> {
    let bridge = network.bridge.as_str();
    match Sysctl::link(sysctl::Family::Ipv6, bridge, LinkKey::DisableIpv6).write("1") {
        // The bridge is gone, or not there yet, or there is no IPv6.
        Err(sysctl::Error::NotFound { .. }) => Ok(()),
        result => Ok(result.map(drop)?),
    }
}

/// Lets what the host sends from 127.0.0.1 leave by a bridge, and the answers come back. Whatever
/// else asks there for such an address is dropped by the guards.
pub(super) fn route_loopback(network: &NetworkRecord, value: &str) -> Result<(), Error> {
    let bridge = network.bridge.as_str();
    let sysctl = Sysctl::link(sysctl::Family::Ipv4, bridge, LinkKey::RouteLocalnet);
    match sysctl.write(value) {
        // The bridge is gone, or not there yet.
        Err(sysctl::Error::NotFound { .. }) => Ok(()),
        result => Ok(result.map(drop)?),
    }
}
