//! What rules do: nucnet's own are followed, as they are in place.
//!
//! They follow from the records, so they are made anew; that those of the kernel are the same is
//! looked at first, and the answer is refused where they are not.

use super::{ExplainRequest, Explanation, NEIGHBOUR, Origin, Verdict, beside, probe};
use crate::{
    kernel::{
        netfilter::{Conntrack, Netfilter, TcpState, Tracked},
        netlink::{Found, Netlink, Uplink},
        store::Store,
    },
    model::{
        drift::{self, Drift, Unexplained},
        netfilter::{
            AddressKind, Connection, End, Family, Journey, Surroundings, Tuple, Way, WayIn,
        },
        policy::Policy,
        probe::{Payload, Probe},
        record::{EndpointRecord, HostRecord},
        rule::Destination,
    },
    verbs::{
        Error, Host,
        list::readable,
        naming::DEFAULT,
        netfilter::{self as rules, Recorded},
        sight::View,
    },
};
use nucnet_common::{
    abi::{Mac, Reason},
    packet::{ICMP, ICMPV6, TCP, UDP},
};
use std::net::IpAddr;

impl Host {
    pub(super) fn explain_rules(
        &self,
        request: &ExplainRequest,
        payload: Payload,
        store: &Store,
        record: &HostRecord,
    ) -> Result<Explanation, Error> {
        let netlink = Netlink::open()?;
        let netfilter = rules::of_host(record)?.ok_or(Error::NoRules)?;
        let recorded = recorded(store, &netlink)?;
        let (sender, own) = match &request.from {
            Origin::Endpoint(id) => {
                let (_, endpoint) = self.read_endpoint(id)?;
                let known = recorded.endpoints.iter().find(|other| other.id == *id);
                let endpoint = known.ok_or(Error::NotActive(endpoint.id))?;
                let own = endpoint.address(request.to.address.is_ipv6());
                (Sender::endpoint(&recorded, endpoint)?, own)
            }
            Origin::Uplink => {
                let (uplink, own) = uplink(&netlink, request.to.address)?;
                (Sender::outside(uplink), own.map(beside))
            }
        };
        let probe = probe(request, payload, own)?;
        let drift = drift(&netlink, &netfilter, record, &recorded)?;
        if !drift.is_empty() {
            return Err(Error::NotInPlace(drift));
        }

        let family = match probe.destination.ip() {
            IpAddr::V4(_) => Family::Ipv4,
            IpAddr::V6(_) => Family::Ipv6,
        };
        if !netfilter.has(family) {
            return Err(Error::NoIp6tables(format!("--to {}", request.to.address)));
        }
        let kernel = Kernel {
            netlink: &netlink,
            sender: &sender,
        };
        let journey = Journey::follow(
            &recorded.wanted().chains(family),
            WayIn {
                link: &sender.link,
                mac: sender.mac,
            },
            sent(&probe),
            &connections()?,
            &kernel,
        )?;
        let rule = match sender.endpoint {
            Some(endpoint) => Some(kernel.rule(&endpoint.egress, &probe, &journey)?),
            None => None,
        };
        Ok(view(&probe, &sender, &recorded, journey, rule))
    }
}

/// Who sends a packet, and by what it comes in.
struct Sender<'a> {
    endpoint: Option<&'a EndpointRecord>,
    link: String,
    index: u32,
    mac: Mac,
}

impl<'a> Sender<'a> {
    fn endpoint(recorded: &Recorded, endpoint: &'a EndpointRecord) -> Result<Self, Error> {
        let mut networks = recorded.networks.iter();
        let network = networks.find(|network| network.number == endpoint.network);
        let bridge = network.and_then(|network| Some((network.bridge.to_string(), network.link?)));
        let (link, index) = bridge.ok_or_else(|| Error::NotActive(endpoint.id.clone()))?;
        Ok(Self {
            endpoint: Some(endpoint),
            link,
            index,
            mac: endpoint.mac.octets(),
        })
    }

    fn outside(uplink: Uplink) -> Self {
        Self {
            endpoint: None,
            link: uplink.link.name,
            index: uplink.link.index,
            mac: NEIGHBOUR,
        }
    }
}

fn recorded(store: &Store, netlink: &Netlink) -> Result<Recorded, Error> {
    let networks = readable(store.networks()?);
    let endpoints = readable(store.endpoints()?);
    let mappings = readable(store.mappings()?);
    let recorded = Recorded {
        networks,
        endpoints,
        mappings,
        local: rules::local(netlink)?,
        ports: rules::source_ports()?,
    };
    Ok(recorded.in_use())
}

/// The uplink that has an address, or else one that has one of its family, and which it has.
fn uplink(netlink: &Netlink, to: IpAddr) -> Result<(Uplink, Option<IpAddr>), Error> {
    let own = |uplink: &Uplink| {
        let addresses = uplink.addresses.iter().map(ipnet::IpNet::addr);
        let is_meant = |own: &IpAddr| match own {
            IpAddr::V4(_) => to.is_ipv4(),
            IpAddr::V6(v6) => to.is_ipv6() && !v6.is_unicast_link_local(),
        };
        let mut own: Vec<IpAddr> = addresses.filter(is_meant).collect();
        own.sort_by_key(|own| *own != to);
        own.first().copied()
    };
    let uplinks = netlink.uplinks()?.into_iter().map(|uplink| {
        let own = own(&uplink);
        (uplink, own)
    });
    let best =
        uplinks.min_by_key(|(uplink, own)| (*own != Some(to), own.is_none(), uplink.link.index));
    best.ok_or(Error::NoUplink)
}

/// What of rules and networks is not as recorded, so that packets may fare otherwise.
fn drift(
    netlink: &Netlink,
    netfilter: &Netfilter,
    record: &HostRecord,
    recorded: &Recorded,
) -> Result<Vec<Drift>, Error> {
    let carrier = record.datapath.as_ref();
    let mut found = Vec::new();
    found.extend(
        carrier
            .filter(|carrier| carrier.moving)
            .map(|carrier| drift::moving(carrier.kind)),
    );
    let rules = rules::differences(netfilter, &recorded.wanted())?;
    let rules = Unexplained {
        rules,
        ..Unexplained::default()
    };
    found.extend(rules.drift());
    let mut view = View::new(netlink, netlink.links()?, None, Vec::new())?;
    if let Some(carrier) = carrier {
        view.carried_by(carrier.kind, netfilter.has(Family::Ipv6));
    }
    for network in &recorded.networks {
        found.extend(drift::of_network(network, &view.network(network)?));
    }
    Ok(found)
}

/// What the kernel knows, without the connections that are over: their next packet begins anew.
fn connections() -> Result<Vec<Connection>, Error> {
    let tracked = Conntrack::open().and_then(|conntrack| conntrack.list());
    let tracked = tracked.map_err(Error::Conntrack)?;
    let is_live = |tracked: &&Tracked| tracked.tcp != Some(TcpState::Closed);
    let connection = |tracked: &Tracked| Connection {
        original: tracked.original,
        reply: tracked.reply,
        is_answered: tracked.is_answered,
    };
    Ok(tracked.iter().filter(is_live).map(connection).collect())
}

fn sent(probe: &Probe) -> Tuple {
    let protocol = match (probe.payload, probe.destination.ip()) {
        (Payload::Tcp, _) => TCP,
        (Payload::Udp, _) => UDP,
        (Payload::Icmp, IpAddr::V4(_)) => ICMP,
        (Payload::Icmp, IpAddr::V6(_)) => ICMPV6,
    };
    Tuple {
        source: probe.source.ip(),
        destination: probe.destination.ip(),
        protocol,
        source_port: probe.source.port(),
        destination_port: probe.destination.port(),
    }
}

/// What the kernel tells of a packet on its way.
struct Kernel<'a> {
    netlink: &'a Netlink,
    sender: &'a Sender<'a>,
}

impl Kernel<'_> {
    /// The rule of a policy that decided, or "default". Of several that deny a packet, the one that
    /// programs would name, too.
    fn rule(&self, policy: &Policy, probe: &Probe, journey: &Journey) -> Result<String, Error> {
        let goes_to = |tuple: Tuple| -> Result<Destination, Error> {
            Ok(tuple.goes_to(self.kind(tuple.destination)? == AddressKind::Local))
        };
        let number = match journey.end {
            End::Dropped { .. } => {
                policy.denied_by(&goes_to(sent(probe))?, &goes_to(journey.arrival)?)
            }
            _ => journey.policy_rule,
        };
        let mut rules = policy.rules();
        let found = rules.find(|(other, ..)| Some(*other) == number);
        Ok(found.map_or_else(|| DEFAULT.to_owned(), |(_, _, rule)| rule.to_string()))
    }
}

impl Surroundings for Kernel<'_> {
    type Error = Error;

    fn kind(&self, address: IpAddr) -> Result<AddressKind, Error> {
        Ok(match self.netlink.find_way(address, None)? {
            Found::Local => AddressKind::Local,
            Found::Broadcast => AddressKind::Broadcast,
            _ => AddressKind::Other,
        })
    }

    fn way(&self, packet: &Tuple, _: &str) -> Result<Way, Error> {
        let arrival = (packet.source, self.sender.index);
        let found = self.netlink.find_way(packet.destination, Some(arrival))?;
        let hop = match found {
            Found::Local | Found::Broadcast | Found::Group => return Ok(Way::Local),
            // Endpoints are where they are: it is the destination that is refused.
            Found::Refused if self.sender.endpoint.is_none() => return Ok(Way::Martian),
            Found::None | Found::Refused => return Ok(Way::None),
            Found::Way(hop) => hop,
        };
        let Some(link) = self.netlink.find_link(hop.link)? else {
            return Ok(Way::None);
        };
        Ok(Way::Link {
            link: link.name,
            next_hop: hop.gateway.unwrap_or(packet.destination),
        })
    }

    fn source(
        &self,
        packet: &Tuple,
        link: &str,
        next_hop: IpAddr,
    ) -> Result<Option<IpAddr>, Error> {
        let Some(link) = self.netlink.find_link(link)? else {
            return Ok(None);
        };
        let to = packet.destination;
        Ok(self.netlink.masquerade_source(to, link.index, next_hop)?)
    }
}

fn view(
    probe: &Probe,
    sender: &Sender<'_>,
    recorded: &Recorded,
    journey: Journey,
    rule: Option<String>,
) -> Explanation {
    let (asked, arrival) = (sent(probe), journey.arrival);
    let policy = sender.endpoint.map(|endpoint| &endpoint.egress);
    let receiver = EndpointRecord::holder(&recorded.endpoints, arrival.destination);
    let is_bridge = |link: &str| {
        recorded
            .networks
            .iter()
            .any(|it| it.bridge.as_str() == link)
    };
    let end = match journey.end {
        // Nobody answers who has the address.
        End::Link { link, .. } if is_bridge(&link) && receiver.is_none() => End::Dropped {
            reason: Reason::NoSuchAddress,
            is_told: false,
        },
        end => end,
    };
    let (verdict, reason) = match &end {
        End::Dropped { reason, is_told } => match is_told {
            true => (Verdict::Reject, reason.name()),
            false => (Verdict::Drop, reason.name()),
        },
        _ if journey.is_known => (Verdict::Pass, "flow"),
        _ if policy.is_some_and(Policy::is_in_force) => (Verdict::Pass, "policy"),
        _ if policy.is_some() => (Verdict::Pass, "no-policy"),
        End::Link { .. } if arrival != asked => (Verdict::Pass, "published"),
        _ => (Verdict::Pass, "host"),
    };
    let mut explanation = Explanation::of(probe, verdict, reason);
    explanation.rule = rule.filter(|_| reason == "policy");
    if reason == "host" {
        return explanation;
    }
    let endpoint = sender.endpoint.or(receiver);
    explanation.endpoint = endpoint.map(|endpoint| endpoint.id.clone());
    match end {
        End::Dropped { .. } => return explanation,
        End::Host => explanation.interface = Some(sender.link.clone()),
        End::Link { link, .. } if is_bridge(&link) => {
            explanation.interface = receiver.map(|receiver| receiver.host_ifname.to_string());
        }
        End::Link { link, next_hop } => {
            explanation.interface = Some(link);
            explanation.next_hop = Some(next_hop);
        }
    }
    explanation.nat_src = Some(arrival.source);
    explanation.nat_sport = Some(arrival.source_port).filter(|_| !journey.is_port_drawn);
    explanation.nat_dst = Some(arrival.destination);
    explanation.nat_dport = Some(arrival.destination_port);
    explanation
}
