//! What programs say: they are run on the packet, in a form that changes nothing.

use super::{ExplainRequest, Explanation, NEIGHBOUR, Origin, Verdict, beside, other_family, probe};
use crate::{
    kernel::{bpf::Datapath, netlink::Netlink},
    model::{
        EndpointId, from_abi,
        probe::{Payload, Probe},
        to_abi,
    },
    verbs::{Error, Host, naming::Naming},
};
use nix::net::if_::if_indextoname;
use nucnet_common::{
    abi::{self, Explained, Mac, NO_ADDRESS, PeerKind, Reason, WayKind, program},
    flow::binding_key,
};
use std::net::IpAddr;

impl Host {
    pub(super) fn explain_programs(
        &self,
        request: &ExplainRequest,
        payload: Payload,
    ) -> Result<Explanation, Error> {
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
        let probe = probe(request, payload, way_in.own)?;
        let frame = probe.frame(way_in.from, way_in.to);
        let frame = frame.ok_or_else(|| other_family(&probe))?;
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
        Ok(WayIn {
            program: program::FROM_ENDPOINT,
            link,
            from: entry.mac,
            to: entry.gateway_mac,
            own: record.address(request.to.address.is_ipv6()),
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
        let verdict = match dropped {
            Some(_) if explained.is_rejected != 0 => Verdict::Reject,
            Some(_) => Verdict::Drop,
            None => Verdict::Pass,
        };
        let mut explanation = Explanation::of(probe, verdict, reason);
        if reason == "policy" {
            explanation.rule = naming.rule(self, way_in.policy, explained.rule)?;
        }
        explanation.endpoint = naming.endpoint(self, explained.endpoint)?;
        if explained.link != 0 {
            let name = if_indextoname(explained.link).ok();
            explanation.interface = name.map(|name| name.to_string_lossy().into_owned());
        }
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
    /// The source of a packet for which none is given; none: there is none of its family.
    own: Option<IpAddr>,
    policy: u32,
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
    let own = Some(own(uplink)).filter(|own| *own != NO_ADDRESS);
    Ok(WayIn {
        program: program::FROM_UPLINK,
        link: *link,
        from: NEIGHBOUR,
        to: mac.unwrap_or_default(),
        own: own.map(|own| beside(from_abi(&own))),
        policy: 0,
    })
}
