//! Connections that are open while the host goes over to the other datapath, and keep their
//! translation.
//!
//! A flow and an entry of the kernel's table of connections say the same: who asked whom, and how
//! the answer comes back. What a policy says of it is judged anew.

use super::{
    Error,
    host::Session,
    netfilter::{came_by, end_asker, local},
};
use crate::{
    kernel::{
        bpf::{Datapath, LOOPBACK, monotonic},
        netfilter::{self, Adopted, Conntrack, Netfilter, TcpState, Tracked, Tuple},
    },
    model::{
        behaviour::BehaviourWish,
        from_abi,
        netfilter::{Family, Table},
        record::{EndpointRecord, MappingRecord, NetworkRecord},
        to_abi,
    },
};
use nucnet_common::{
    abi::{Flow, FlowKey, FlowState, PeerKind, UNJUDGED, flow_flag},
    flow::SECOND,
    packet::{TCP, UDP},
};
use std::{
    collections::HashSet,
    io,
    net::IpAddr,
    time::{SystemTime, UNIX_EPOCH},
};

/// The chain of the kernel's for what sockets of the host send.
const OUTPUT: &str = "OUTPUT";

/// Has the kernel know the connections of the host's own sockets with publishes as the programs
/// have them pass it by, untranslated, before there are rules that would translate what the sockets
/// send: the programs send the answers past the kernel's table, which would take them for other
/// connections of the same sockets, and give them other ports.
pub(super) fn shield_host(datapath: &Datapath) -> Result<(), Error> {
    let conntrack = Conntrack::open().map_err(Error::Conntrack)?;
    let mut open = Vec::new();
    datapath.for_each_live_flow(|key, flow, now| {
        let is_open = connection(key, flow, now).filter(|_| is_hosts(flow));
        open.extend(is_open.map(Adopted::untranslated));
    })?;
    for adopted in open {
        if let Err(error) = conntrack.adopt(&adopted) {
            not_carried(&adopted, &error);
        }
    }
    Ok(())
}

/// Has the kernel track what the programs carry, before they are taken away: for a moment nothing
/// passes then. What fails is not carried over; everything else is.
pub(super) fn to_connections(datapath: &mut Datapath, has_v6: bool) -> Result<(), Error> {
    let mut handover = Handover {
        conntrack: Conntrack::open().map_err(Error::Conntrack)?,
        has_v6,
        done: HashSet::new(),
        lost: 0,
    };
    handover.pass(datapath, |flow| !is_hosts(flow))?;
    let mut links = Vec::new();
    datapath.endpoints.for_each(|link, _| links.push(*link))?;
    for link in links {
        datapath.endpoints.remove(&link)?;
    }
    handover.pass(datapath, |_| true)?;
    report(handover.done.len() as u64 - handover.lost, handover.lost);
    Ok(())
}

/// Whether a socket of the host's has asked for a publish.
fn is_hosts(flow: &Flow) -> bool {
    flow.peer_kind == PeerKind::Loopback as u32
}

fn not_carried(adopted: &Adopted, error: &io::Error) {
    tracing::debug!(
        connection = ?adopted.original,
        error = error as &dyn std::error::Error,
        "a connection is not carried over"
    );
}

/// Flows on their way to the kernel's table.
struct Handover {
    conntrack: Conntrack,
    has_v6: bool,
    done: HashSet<FlowKey>,
    lost: u64,
}

impl Handover {
    fn pass(&mut self, datapath: &Datapath, is_meant: impl Fn(&Flow) -> bool) -> Result<(), Error> {
        let mut open = Vec::new();
        datapath.for_each_live_flow(|key, flow, now| {
            if is_meant(flow)
                && !self.done.contains(key)
                && let Some(adopted) = connection(key, flow, now)
            {
                open.push((*key, adopted));
            }
        })?;
        for (key, adopted) in open {
            self.done.insert(key);
            if is_unserved(&adopted, self.has_v6) {
                end_asker(&adopted.original);
                self.lost += 1;
            } else if let Err(error) = self.conntrack.adopt(&adopted) {
                not_carried(&adopted, &error);
                self.lost += 1;
            }
        }
        Ok(())
    }
}

fn report(carried: u64, lost: u64) {
    tracing::info!(carried, "carried open connections over");
    if lost > 0 {
        tracing::warn!(
            lost,
            "some open connections cannot be carried over, and end"
        );
    }
}

/// What the kernel carries nowhere, or has no rules for.
fn is_unserved(adopted: &Adopted, has_v6: bool) -> bool {
    let asked = adopted.original.destination;
    asked.is_ipv6() && (!has_v6 || asked.is_loopback())
}

/// A flow as the kernel is to track it. `None`: it is over, or a query of ICMP, which begins
/// anew with the next one.
fn connection(key: &FlowKey, flow: &Flow, now: u64) -> Option<Adopted> {
    let protocol = u8::try_from(key.protocol).ok()?;
    let tcp = match protocol {
        TCP => Some(tcp_state(flow)?),
        UDP => None,
        _ => return None,
    };
    let (own, seen) = (
        (from_abi(&key.inside), key.inside_port),
        (from_abi(&flow.external), flow.external_port),
    );
    let (peer, addressed) = (
        (from_abi(&flow.peer), flow.peer_port),
        (from_abi(&key.peer), key.peer_port),
    );
    let between = |(source, source_port), (destination, destination_port)| Tuple {
        source,
        destination,
        protocol,
        source_port,
        destination_port,
    };
    let (original, reply) = match flow.flags & flow_flag::INBOUND {
        0 => (between(own, addressed), between(peer, seen)),
        _ => (between(peer, seen), between(own, addressed)),
    };
    let idle = now.saturating_sub(flow.last_seen) / SECOND;
    Some(Adopted {
        original,
        reply,
        is_answered: match tcp {
            Some(_) => flow.flags & flow_flag::ANSWERED != 0,
            None => flow.state != FlowState::Opening as u32,
        },
        tcp,
        expires: flow
            .timeout_s
            .saturating_sub(u32::try_from(idle).unwrap_or(u32::MAX))
            .max(1),
    })
}

fn tcp_state(flow: &Flow) -> Option<TcpState> {
    Some(match flow.state {
        state if state == FlowState::Opening as u32 => TcpState::Opening,
        state if state == FlowState::Established as u32 => TcpState::Established,
        state if state == FlowState::Closing as u32 => TcpState::Closing,
        _ => return None,
    })
}

/// Has the programs know of the connections that the kernel tracks, before any of them sits
/// anywhere. `datapath` has just been loaded.
pub(super) fn to_flows(
    session: &Session,
    datapath: &mut Datapath,
    endpoints: &[EndpointRecord],
    networks: &[NetworkRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    let tracked = Conntrack::open().and_then(|conntrack| conntrack.list());
    let tracked = tracked.map_err(Error::Conntrack)?;
    let clock = SystemTime::now().duration_since(UNIX_EPOCH);
    let parties = Parties {
        endpoints,
        networks,
        mappings,
        local: local(&session.netlink)?,
        now: monotonic()?,
        clock: clock.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
    };
    let mut adoption = datapath.adoption()?;
    let (mut carried, mut lost) = (0, 0);
    for tracked in &tracked {
        let Some((key, flow)) = parties.flow(tracked) else {
            continue;
        };
        let network = parties.network_of(key.endpoint);
        let behaviour = match network {
            Some(network) => network.behaviour(),
            None => BehaviourWish::default().resolved(),
        };
        match adoption.add(&behaviour.abi(), key, flow) {
            true => carried += 1,
            false => lost += 1,
        }
    }
    datapath.adopt(&adoption)?;
    report(carried, lost);
    Ok(())
}

/// Who may take part in a connection.
struct Parties<'a> {
    endpoints: &'a [EndpointRecord],
    networks: &'a [NetworkRecord],
    mappings: &'a [MappingRecord],
    /// The host's own addresses.
    local: Vec<IpAddr>,
    /// CLOCK_MONOTONIC in nanoseconds.
    now: u64,
    /// Nanoseconds since 1970.
    clock: u64,
}

impl Parties<'_> {
    fn endpoint(&self, address: IpAddr) -> Option<&EndpointRecord> {
        let mut endpoints = self.endpoints.iter();
        endpoints.find(|endpoint| endpoint.addresses.contains(&address))
    }

    fn network_of(&self, endpoint: u32) -> Option<&NetworkRecord> {
        let endpoint = self.endpoints.iter().find(|it| it.number == endpoint)?;
        let mut networks = self.networks.iter();
        networks.find(|network| network.number == endpoint.network)
    }

    fn is_host(&self, address: IpAddr) -> bool {
        address.is_loopback() || self.local.contains(&address)
    }

    /// A connection as the programs keep it, but for the way to a peer beyond an uplink, which
    /// they look up with the next packet of the endpoint's. `None`: it is over, or none of theirs.
    fn flow(&self, tracked: &Tracked) -> Option<(FlowKey, Flow)> {
        let (asked, answer) = (&tracked.original, &tracked.reply);
        let (state, mut flags) = match (asked.protocol, tracked.tcp) {
            (TCP, Some(state)) => tcp_flags(state, tracked.is_answered)?,
            (UDP, _) if tracked.is_answered => (FlowState::Established, 0),
            (UDP, _) => (FlowState::Opening, 0),
            _ => return None,
        };
        let (opener, opened_to) = (self.endpoint(asked.source), self.endpoint(answer.source));
        let owner = opener.or(opened_to)?;
        let bridge = self.network_of(owner.number)?.link?;
        let is_translated = tracked.is_translated();
        let peer = match opener {
            Some(_) => answer.source,
            None => asked.source,
        };
        let (peer_kind, peer_link) = match (opener.and(opened_to), self.is_host(peer)) {
            (Some(sibling), _) => (PeerKind::Endpoint, sibling.link?),
            (None, true) if opener.is_none() && is_translated => (PeerKind::Loopback, LOOPBACK),
            (None, true) => (PeerKind::Host, bridge),
            // Whatever comes in or goes out is translated.
            (None, false) if !is_translated => return None,
            (None, false) => (PeerKind::Uplink, 0),
        };
        // The endpoint's own side, as it sees it, and the other one, as it is.
        let (inside, view) = match opener {
            Some(_) => (asked, answer),
            None => (answer, asked),
        };
        let (out, back) = match opener {
            Some(_) => (tracked.sent, tracked.answered),
            None => (tracked.answered, tracked.sent),
        };
        if opener.is_none() {
            flags |= flow_flag::INBOUND;
        }
        let closing = match opener {
            Some(_) => flow_flag::FIN_INSIDE,
            None => flow_flag::FIN_PEER,
        };
        if state == FlowState::Closing {
            // Who opens is who closes, as a rule.
            flags |= closing;
        }
        let age = tracked
            .start
            .map_or(0, |start| self.clock.saturating_sub(start));
        let mapping = self.mappings.iter().find(|it| came_by(&it.spec, tracked));
        let key = FlowKey {
            endpoint: owner.number,
            protocol: asked.protocol.into(),
            inside: to_abi(inside.source),
            peer: to_abi(inside.destination),
            inside_port: inside.source_port,
            peer_port: inside.destination_port,
        };
        let flow = Flow {
            created: self.now.saturating_sub(age),
            last_seen: self.now,
            packets_out: out.packets,
            bytes_out: out.bytes,
            packets_in: back.packets,
            bytes_in: back.bytes,
            external: to_abi(view.destination),
            external_port: view.destination_port,
            peer: to_abi(view.source),
            peer_port: view.source_port,
            state: state as u32,
            flags,
            peer_kind: peer_kind as u32,
            policy: UNJUDGED,
            link: owner.link?,
            peer_link,
            mapping: mapping.map_or(0, |mapping| mapping.number),
            ..Flow::default()
        };
        Some((key, flow))
    }
}

/// State and flags of a TCP connection. `None`: it is over.
fn tcp_flags(state: TcpState, is_answered: bool) -> Option<(FlowState, u32)> {
    let answered = match is_answered {
        true => flow_flag::ANSWERED,
        false => 0,
    };
    let connected = flow_flag::ANSWERED | flow_flag::CONNECTED;
    Some(match state {
        TcpState::Opening => (FlowState::Opening, answered),
        TcpState::Established => (FlowState::Established, connected),
        TcpState::Closing => (FlowState::Closing, connected),
        TcpState::Closed => return None,
    })
}

/// The rules for the host's own sockets, wherever there are any: found while all still works, for
/// nothing passes while they go.
pub(super) struct HostRules(Vec<(Netfilter, Vec<Family>)>);

impl HostRules {
    pub(super) fn find() -> Result<Self, Error> {
        let mut found = Vec::new();
        for netfilter in netfilter::all()? {
            let mut families = Vec::new();
            for family in Family::ALL {
                if netfilter.saved(family)?.has_hook(Table::Nat, OUTPUT) {
                    families.push(family);
                }
            }
            found.push((netfilter, families));
        }
        Ok(Self(found))
    }

    /// Leaves publishes to the programs for the host's own sockets, too. Until then, what these
    /// send is translated by what the kernel tracks, and what the programs answer is past it: the
    /// caller sees to it that they answer nothing yet.
    pub(super) fn leave(
        &self,
        session: &Session,
        endpoints: &[EndpointRecord],
    ) -> Result<(), Error> {
        for (netfilter, families) in &self.0 {
            for family in families {
                netfilter.empty(*family, Table::Nat, OUTPUT)?;
            }
        }
        let local = local(&session.netlink)?;
        forget(|tracked| {
            let asker = tracked.original.source;
            let mut endpoints = endpoints.iter();
            tracked.is_translated()
                && (asker.is_loopback() || local.contains(&asker))
                && endpoints.any(|it| it.addresses.contains(&tracked.reply.source))
        })
    }
}

/// Has the kernel forget the connections that programs carry now. Those between the host and an
/// endpoint of which nothing is translated are known to the host's own rules, and stay.
pub(super) fn forget_carried(
    session: &Session,
    endpoints: &[EndpointRecord],
    mappings: &[MappingRecord],
) -> Result<(), Error> {
    let addresses: Vec<_> = endpoints.iter().flat_map(|e| e.addresses.clone()).collect();
    let local = local(&session.netlink)?;
    let is_hosts = |tracked: &Tracked| {
        let parties = [tracked.original.source, tracked.original.destination];
        !tracked.is_translated() && parties.iter().any(|party| local.contains(party))
    };
    forget(|tracked| {
        tracked.is_of(&addresses) && !is_hosts(tracked)
            || mappings.iter().any(|it| came_by(&it.spec, tracked))
    })
}

fn forget(is_meant: impl Fn(&Tracked) -> bool) -> Result<(), Error> {
    let forgotten = Conntrack::open().and_then(|conntrack| conntrack.forget_all(is_meant));
    forgotten.map(drop).map_err(Error::Conntrack)
}
