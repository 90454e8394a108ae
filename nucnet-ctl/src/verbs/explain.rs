//! `explain`: what the datapath would do with a packet, and which rule decides.

use super::{Error, Host, naming::Naming};
use crate::{
    kernel::{bpf::Datapath, netlink::Netlink},
    model::{
        EndpointId, Invalid, Problem, from_abi,
        probe::{Payload, Probe, Side},
        to_abi,
    },
};
use nix::net::if_::if_indextoname;
use nucnet_common::{
    abi::{self, Explained, Mac, PeerKind, Reason, WayKind, program},
    flow::binding_key,
};
use serde::Serialize;
use std::{
    fmt,
    net::{IpAddr, SocketAddr},
};

/// The source port of a packet for which none is given.
const SOURCE_PORT: u16 = 40_000;

/// Who makes the frames that come in by an uplink.
const NEIGHBOUR: Mac = [2, 0, 0, 0, 0, 1];

/// Where a packet comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// From an endpoint.
    Endpoint(EndpointId),
    /// From outside the host.
    Uplink,
}

/// A question.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExplainRequest {
    /// Where the packet comes from.
    pub from: Origin,
    /// Where it goes.
    pub to: Side,
    /// What it is; none: TCP where there is a port, else an ICMP echo request.
    pub payload: Option<Payload>,
    /// Its source; none: the endpoint's own address, or a neighbour's on the uplink.
    pub source: Option<Side>,
}

/// What becomes of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It goes on.
    Pass,
    /// It is dropped.
    Drop,
    /// It is dropped, and its sender told at once that the policy denies it.
    Reject,
}

/// An answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Explanation {
    /// What becomes of the packet.
    pub verdict: Verdict,
    /// Why: of a drop, answered or not, as counted; else `flow` (of a flow that exists), `policy`
    /// (the endpoint's policy allows it), `no-policy`, `published`, or `host` (left to the host).
    pub reason: &'static str,
    /// The rule that decided, or "default"; none: no policy was asked.
    pub rule: Option<String>,
    /// Whose packet it is.
    pub endpoint: Option<EndpointId>,
    /// What it is.
    pub protocol: &'static str,
    /// Its source address.
    pub src: IpAddr,
    /// Its source port; of an echo request, the identifier.
    pub sport: u16,
    /// Its destination address.
    pub dst: IpAddr,
    /// Its destination port; 0 for ICMP.
    pub dport: u16,
    /// Source address with which it goes on.
    pub nat_src: Option<IpAddr>,
    /// Source port with which it goes on; none: one that is chosen when it comes.
    pub nat_sport: Option<u16>,
    /// Destination address with which it goes on.
    pub nat_dst: Option<IpAddr>,
    /// Destination port with which it goes on.
    pub nat_dport: Option<u16>,
    /// The interface that it goes to.
    pub interface: Option<String>,
    /// The neighbour that it is handed to, beyond an uplink.
    pub next_hop: Option<IpAddr>,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verdict = match self.verdict {
            Verdict::Pass => "pass",
            Verdict::Drop => "drop",
            Verdict::Reject => "reject",
        };
        let (src, dst) = (
            SocketAddr::new(self.src, self.sport),
            SocketAddr::new(self.dst, self.dport),
        );
        write!(f, "{verdict}: {} {src} -> {dst}", self.protocol)?;
        write!(f, "\n  reason     {}", self.reason)?;
        if let Some(rule) = &self.rule {
            write!(f, "\n  rule       {rule}")?;
        }
        if let (Some(src), Some(dst), Some(dport)) = (self.nat_src, self.nat_dst, self.nat_dport) {
            let dst = SocketAddr::new(dst, dport);
            match self.nat_sport {
                Some(sport) => {
                    write!(f, "\n  goes on as {} -> {dst}", SocketAddr::new(src, sport))?
                }
                None => write!(f, "\n  goes on as {src}, port to be chosen -> {dst}")?,
            }
        }
        if let Some(interface) = &self.interface {
            write!(f, "\n  by         {interface}")?;
            if let Some(next_hop) = self.next_hop {
                write!(f, ", neighbour {next_hop}")?;
            }
        }
        Ok(())
    }
}

impl Host {
    /// Asks the datapath what it would do with a packet. Nothing changes.
    ///
    /// # Errors
    /// Kind [`NotFound`](crate::Kind::NotFound): no such endpoint, or nothing is attached.
    /// [`Usage`](crate::Kind::Usage): ports or families that do not go together.
    pub fn explain(&self, request: &ExplainRequest) -> Result<Explanation, Error> {
        let payload = payload(request)?;
        self.needs_programs("explain")?;
        let gone = || Error::DatapathGone(self.options.bpffs.clone());
        let datapath = self.open_datapath()?;
        let datapath = match (datapath, &request.from) {
            (Some(datapath), _) => datapath,
            (None, Origin::Endpoint(id)) => return Err(Error::NoEndpoint(id.clone())),
            (None, Origin::Uplink) => return Err(gone()),
        };
        let way_in = match &request.from {
            Origin::Endpoint(id) => self.by_endpoint(&datapath, id, request)?,
            Origin::Uplink => from_uplink(&datapath, request)?,
        };
        let port = request.source.and_then(|source| source.port);
        let probe = Probe {
            payload,
            source: SocketAddr::new(way_in.source, port.unwrap_or(SOURCE_PORT)),
            destination: SocketAddr::new(request.to.address, request.to.port.unwrap_or(0)),
        };
        let frame = probe.frame(way_in.from, way_in.to).ok_or_else(|| {
            Invalid::new(
                "--source",
                way_in.source,
                Problem::OtherFamily(request.to.address),
            )
        })?;
        let explained = datapath.dry_run(way_in.program, way_in.link, &frame)?;
        self.view(&datapath, &probe, &way_in, &explained)
    }

    fn by_endpoint(
        &self,
        datapath: &Datapath,
        id: &EndpointId,
        request: &ExplainRequest,
    ) -> Result<WayIn, Error> {
        let (_, record) = self.read_endpoint(id)?;
        let not_active = || Error::NotActive(id.clone());
        let link = record.link.ok_or_else(not_active)?;
        let entry = datapath.endpoints.get(&link)?.ok_or_else(not_active)?;
        let own = record
            .addresses
            .iter()
            .find(|own| own.is_ipv4() == request.to.address.is_ipv4());
        let source = match (request.source, own) {
            (Some(source), _) => source.address,
            (None, Some(own)) => *own,
            (None, None) => {
                let to = request.to.address.to_string();
                return Err(Invalid::new("--to", to, Problem::NoAddressOfFamily).into());
            }
        };
        Ok(WayIn {
            program: program::FROM_ENDPOINT,
            link,
            from: entry.mac,
            to: entry.gateway_mac,
            source,
            policy: entry.policy,
        })
    }

    fn view(
        &self,
        datapath: &Datapath,
        probe: &Probe,
        way_in: &WayIn,
        explained: &Explained,
    ) -> Result<Explanation, Error> {
        let mut naming = Naming::default();
        let is_new = explained.is_new != 0;
        let from_endpoint = way_in.program == program::FROM_ENDPOINT;
        let dropped = Reason::from_number(explained.reason);
        let reason = match dropped {
            Some(reason) => reason.name(),
            None if explained.has_flow == 0 => "host",
            None if !is_new => "flow",
            None if !from_endpoint => "published",
            None if way_in.policy == 0 => "no-policy",
            None => "policy",
        };
        let rule = match reason {
            "policy" => naming.rule(self, way_in.policy, explained.rule)?,
            _ => None,
        };
        let mut explanation = Explanation {
            verdict: match dropped {
                Some(_) if explained.is_rejected != 0 => Verdict::Reject,
                Some(_) => Verdict::Drop,
                None => Verdict::Pass,
            },
            reason,
            rule,
            endpoint: naming.endpoint(self, explained.endpoint)?,
            protocol: probe.payload.name(),
            src: probe.source.ip(),
            sport: probe.source.port(),
            dst: probe.destination.ip(),
            dport: probe.destination.port(),
            nat_src: None,
            nat_sport: None,
            nat_dst: None,
            nat_dport: None,
            interface: match explained.link {
                0 => None,
                link => if_indextoname(link)
                    .ok()
                    .map(|name| name.to_string_lossy().into_owned()),
            },
            next_hop: None,
        };
        if explained.has_flow == 0 {
            return Ok(explanation);
        }
        let (key, flow) = (&explained.key, &explained.flow);
        let is_own = from_endpoint
            && key.inside == to_abi(probe.source.ip())
            && key.inside_port == probe.source.port();
        let ((src, sport), (dst, dport)) = if is_own {
            (
                (flow.external, flow.external_port),
                (flow.peer, flow.peer_port),
            )
        } else {
            ((key.peer, key.peer_port), (key.inside, key.inside_port))
        };
        explanation.nat_src = Some(from_abi(&src));
        explanation.nat_sport = Some(sport);
        explanation.nat_dst = Some(from_abi(&dst));
        explanation.nat_dport = Some(dport);
        if is_own && is_new && sport != key.inside_port {
            // Drawn at random, unless a binding has it already.
            let binding = datapath.bindings.get(&binding_key(key, &flow.external))?;
            if binding.is_none_or(|binding| binding.external_port != sport) {
                explanation.nat_sport = None;
            }
        }
        let is_beyond = is_own && flow.peer_kind == PeerKind::Uplink as u32;
        if is_beyond && explained.way == WayKind::Link as u32 && flow.next_hop != [0; 16] {
            explanation.next_hop = Some(from_abi(&flow.next_hop));
        }
        Ok(explanation)
    }
}

/// How a packet gets to the programs.
struct WayIn {
    program: &'static str,
    link: u32,
    from: Mac,
    to: Mac,
    source: IpAddr,
    policy: u32,
}

fn payload(request: &ExplainRequest) -> Result<Payload, Error> {
    let port = request.to.port;
    let payload = request.payload.unwrap_or(match port {
        Some(_) => Payload::Tcp,
        None => Payload::Icmp,
    });
    let text = || match port {
        Some(port) => SocketAddr::new(request.to.address, port).to_string(),
        None => request.to.address.to_string(),
    };
    match (payload, port) {
        (Payload::Icmp, Some(_)) => Err(Invalid::new("--to", text(), Problem::NoPort).into()),
        (Payload::Tcp | Payload::Udp, None) => {
            Err(Invalid::new("--to", text(), Problem::NeedsPort).into())
        }
        _ => Ok(payload),
    }
}

/// By the uplink that has the destination, or else one that has an address of its family.
fn from_uplink(datapath: &Datapath, request: &ExplainRequest) -> Result<WayIn, Error> {
    let to = to_abi(request.to.address);
    let own = |uplink: &abi::Uplink| match request.to.address {
        IpAddr::V4(_) => uplink.address4,
        IpAddr::V6(_) => uplink.address6,
    };
    let mut uplinks = datapath.uplinks.entries()?;
    uplinks.sort_by_key(|(link, uplink)| (own(uplink) != to, own(uplink) == [0; 16], *link));
    let (link, uplink) = uplinks.first().ok_or(Error::NoUplink)?;
    let links = Netlink::open()?.links()?;
    let mac = links
        .iter()
        .find(|it| it.index == *link)
        .and_then(|it| it.mac);
    let source = match request.source {
        Some(source) => source.address,
        None => {
            let mut neighbour = own(uplink);
            if neighbour == [0; 16] {
                let to = request.to.address.to_string();
                return Err(Invalid::new("--to", to, Problem::NoUplinkOfFamily).into());
            }
            neighbour[15] ^= 1;
            from_abi(&neighbour)
        }
    };
    Ok(WayIn {
        program: program::FROM_UPLINK,
        link: *link,
        from: NEIGHBOUR,
        to: mac.unwrap_or_default(),
        source,
        policy: 0,
    })
}
