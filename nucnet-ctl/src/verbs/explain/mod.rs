//! `explain`: what the datapath would do with a packet, and which rule decides.

mod programs;
mod rules;

use super::{Error, Host};
use crate::model::{
    EndpointId, Invalid, Problem, from_abi,
    probe::{Payload, Probe, Side},
    record::DatapathKind,
    to_abi,
};
use nucnet_common::abi::Mac;
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

impl Explanation {
    /// What becomes of a packet, and nothing of the way there.
    fn of(probe: &Probe, verdict: Verdict, reason: &'static str) -> Self {
        Self {
            verdict,
            reason,
            rule: None,
            endpoint: None,
            protocol: probe.payload.name(),
            src: probe.source.ip(),
            sport: probe.source.port(),
            dst: probe.destination.ip(),
            dport: probe.destination.port(),
            nat_src: None,
            nat_sport: None,
            nat_dst: None,
            nat_dport: None,
            interface: None,
            next_hop: None,
        }
    }
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
    /// Says what the datapath would do with a packet. Nothing changes.
    ///
    /// # Errors
    /// Kind [`NotFound`](crate::Kind::NotFound): no such endpoint, or nothing is attached.
    /// [`Usage`](crate::Kind::Usage): ports or families that do not go together.
    pub fn explain(&self, request: &ExplainRequest) -> Result<Explanation, Error> {
        let payload = payload(request)?;
        let store = self.read()?;
        let record = store.as_ref().map(|store| store.host()).transpose()?;
        if let (Some(store), Some(Some(record))) = (&store, &record)
            && let Some(carrier) = &record.datapath
            && carrier.kind == DatapathKind::Iptables
        {
            return self.explain_rules(request, payload, store, record);
        }
        self.explain_programs(request, payload)
    }
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

/// The packet that is asked about; `own` is its source where none is given.
fn probe(request: &ExplainRequest, payload: Payload, own: Option<IpAddr>) -> Result<Probe, Error> {
    let to = request.to.address;
    let none = match request.from {
        Origin::Endpoint(_) => Problem::NoAddressOfFamily,
        Origin::Uplink => Problem::NoUplinkOfFamily,
    };
    let asked = request.source.map(|source| source.address);
    let source = asked.or(own);
    let source = source.ok_or_else(|| Invalid::new("--to", to, none))?;
    let port = request.source.and_then(|source| source.port);
    let probe = Probe {
        payload,
        source: SocketAddr::new(source, port.unwrap_or(SOURCE_PORT)),
        destination: SocketAddr::new(to, request.to.port.unwrap_or(0)),
    };
    match source.is_ipv4() == to.is_ipv4() {
        true => Ok(probe),
        false => Err(other_family(&probe)),
    }
}

fn other_family(probe: &Probe) -> Error {
    let problem = Problem::OtherFamily(probe.destination.ip());
    Invalid::new("--source", probe.source.ip(), problem).into()
}

/// The address of somebody beside the host on one of its links: neither the first nor the last of
/// four, which may be those of a subnet and of its broadcasts.
fn beside(own: IpAddr) -> IpAddr {
    let mut neighbour = to_abi(own);
    neighbour[15] ^= match neighbour[15] % 4 {
        1 | 2 => 3,
        _ => 1,
    };
    from_abi(&neighbour)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whoever_is_beside_the_host_has_an_address_that_hosts_have() {
        for (own, neighbour) in [
            ("192.0.2.1", "192.0.2.2"),
            ("192.0.2.2", "192.0.2.1"),
            ("192.0.2.3", "192.0.2.2"),
            ("192.0.2.4", "192.0.2.5"),
            ("192.0.2.254", "192.0.2.253"),
            ("2001:db8::1", "2001:db8::2"),
        ] {
            let expected: IpAddr = neighbour.parse().unwrap();
            assert_eq!(beside(own.parse().unwrap()), expected, "beside {own}");
        }
    }
}
