//! Flows where rules carry packets: connections that the kernel tracks.

use super::{Error, netfilter::came_by};
use crate::{
    kernel::netfilter::{Conntrack, TcpState, Tracked},
    model::{
        EndpointId,
        flow::{Direction, FlowId, FlowView},
        record::{EndpointRecord, MappingRecord},
    },
};
use nucnet_common::abi::FlowState;
use std::{
    net::IpAddr,
    num::NonZeroU32,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

/// Those of endpoints and mappings, at a moment.
#[derive(Debug)]
pub(super) struct Connections {
    tracked: Vec<Tracked>,
    parties: Parties,
    /// Nanoseconds since 1970.
    now: u64,
}

impl Connections {
    pub(super) fn read(parties: Parties) -> Result<Self, Error> {
        let tracked = Conntrack::open().and_then(|conntrack| conntrack.list());
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        Ok(Self {
            tracked: tracked.map_err(Error::Conntrack)?,
            parties,
            now: now.map_or(0, |now| u64::try_from(now.as_nanos()).unwrap_or(u64::MAX)),
        })
    }

    /// Each as a flow.
    pub(super) fn views(&self) -> impl Iterator<Item = FlowView<'_>> {
        let tracked = self.tracked.iter();
        tracked.filter_map(|tracked| self.parties.flow(tracked, self.now))
    }
}

/// Whose connections are flows.
#[derive(Debug, Default)]
pub(super) struct Parties {
    endpoints: Vec<EndpointRecord>,
    mappings: Vec<MappingRecord>,
    /// Only those in which this one takes part.
    of: Option<EndpointId>,
}

impl Parties {
    pub(super) fn new(
        endpoints: Vec<EndpointRecord>,
        mappings: Vec<MappingRecord>,
        of: Option<EndpointId>,
    ) -> Self {
        Self {
            endpoints,
            mappings,
            of,
        }
    }

    /// Who has an address.
    pub(super) fn holder(&self, address: IpAddr) -> Option<&EndpointRecord> {
        EndpointRecord::holder(&self.endpoints, address)
    }

    /// Whether there is an endpoint with that number.
    pub(super) fn has(&self, number: u32) -> bool {
        let mut endpoints = self.endpoints.iter();
        endpoints.any(|endpoint| endpoint.number == number)
    }

    /// Who has a link-layer address.
    pub(super) fn station(&self, mac: [u8; 6]) -> Option<&EndpointRecord> {
        let mut endpoints = self.endpoints.iter();
        endpoints.find(|endpoint| endpoint.mac.octets() == mac)
    }

    /// A connection as a flow; none: it is none. `now`: nanoseconds since 1970.
    pub(super) fn flow(&self, tracked: &Tracked, now: u64) -> Option<FlowView<'_>> {
        let (asked, answer) = (&tracked.original, &tracked.reply);
        let delivered = answer.turned();
        let (opener, opened_to) = (self.holder(asked.source), self.holder(answer.source));
        let mut mappings = self.mappings.iter();
        let mapping = mappings.find(|mapping| came_by(&mapping.spec, tracked));
        if opener.is_none() && opened_to.is_none() && mapping.is_none() {
            return None;
        }
        let takes_part = |id: &EndpointId| {
            let mut parties = [opener, opened_to].into_iter().flatten();
            parties.any(|endpoint| endpoint.id == *id)
        };
        if !self.of.as_ref().is_none_or(takes_part) {
            return None;
        }
        let (direction, out, back) = match opener {
            Some(_) => (Direction::Out, tracked.sent, tracked.answered),
            None => (Direction::In, tracked.answered, tracked.sent),
        };
        let age = tracked
            .start
            .map(|start| Duration::from_nanos(now.saturating_sub(start)).as_millis());
        Some(FlowView {
            // The lower half of when it began is enough to tell it from the one before.
            id: FlowId::new(tracked.id, tracked.start.unwrap_or_default() as u32),
            endpoint: opener.or(opened_to).map(|endpoint| &endpoint.id),
            mapping: mapping.and_then(|mapping| NonZeroU32::new(mapping.number)),
            protocol: asked.protocol.into(),
            direction,
            src: asked.source,
            sport: asked.source_port,
            dst: asked.destination,
            dport: asked.destination_port,
            nat_src: delivered.source,
            nat_sport: delivered.source_port,
            nat_dst: delivered.destination,
            nat_dport: delivered.destination_port,
            state: state(tracked).into(),
            packets: out.packets.saturating_add(back.packets),
            bytes: out.bytes.saturating_add(back.bytes),
            packets_out: out.packets,
            bytes_out: out.bytes,
            packets_in: back.packets,
            bytes_in: back.bytes,
            age_ms: age.map(|age| u64::try_from(age).unwrap_or(u64::MAX)),
            idle_ms: None,
            expires_ms: u64::from(tracked.expires) * 1000,
        })
    }
}

fn state(tracked: &Tracked) -> FlowState {
    match (tracked.tcp, tracked.is_answered) {
        (Some(TcpState::Established), _) | (None, true) => FlowState::Established,
        (Some(TcpState::Opening), _) | (None, false) => FlowState::Opening,
        (Some(TcpState::Closing), _) => FlowState::Closing,
        (Some(TcpState::Closed), _) => FlowState::Closed,
    }
}
