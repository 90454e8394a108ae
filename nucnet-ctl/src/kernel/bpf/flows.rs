//! Flows of the running datapath: looked at, and ended.

use nucnet_common::{
    abi::{Binding, Flow, FlowKey, PeerKind},
    flow::is_dead,
    packet::TCP,
};

use super::{BpfError, Datapath, monotonic};
use crate::{
    kernel::diag::{self, Connection},
    model::from_abi,
};

impl Datapath {
    /// Calls `visit` with every flow that is alive, and the time at which it was.
    pub fn for_each_live_flow(
        &self,
        mut visit: impl FnMut(&FlowKey, &Flow, u64),
    ) -> Result<(), BpfError> {
        let now = monotonic()?;
        self.flows.for_each(|key, flow: &Flow| {
            if !is_dead(flow, now) {
                visit(key, flow, now);
            }
        })
    }

    /// Ends flows: to the programs they are dead from now on, and so not there; a packet of the
    /// same conversation opens another one, or is refused as any that opens none. How many there
    /// were.
    ///
    /// The entries stay until a program needs their place, and so do the counts of them: only
    /// programs can take them away, and count, without a race. Packets may pass meanwhile.
    pub fn end_flows(&mut self, which: impl Fn(&FlowKey, &Flow) -> bool) -> Result<u64, BpfError> {
        let mut found = Vec::new();
        let mut connections = Vec::new();
        self.for_each_live_flow(|key, flow, _| {
            if which(key, flow) {
                found.push((*key, flow.slot, flow.slot_version));
                connections.extend(connection(key, flow));
            }
        })?;
        let mut ended = 0;
        for (key, slot, version) in found {
            // It may have gone, and another may have come, since.
            if let Some(mut flow) = self.flows.get(&key)?
                && (flow.slot, flow.slot_version) == (slot, version)
            {
                flow.timeout_s = 0;
                ended += u64::from(self.flows.replace(&key, &flow)?);
            }
        }
        end_connections(&connections);
        Ok(ended)
    }

    /// Ends bindings, of one endpoint or of all: the next flow from an inside port gets another
    /// external port. To be called before the flows that use them are ended; new ones then have
    /// new bindings.
    pub fn end_bindings(&mut self, endpoint: Option<u32>) -> Result<(), BpfError> {
        let mut found = Vec::new();
        self.bindings.for_each(|key, binding: &Binding| {
            if endpoint.is_none_or(|number| number == key.endpoint) {
                found.push((*key, binding.slot, binding.slot_version));
            }
        })?;
        for (key, slot, version) in found {
            if let Some(mut binding) = self.bindings.get(&key)?
                && (binding.slot, binding.slot_version) == (slot, version)
            {
                (binding.last_seen, binding.timeout_s) = (0, 0);
                self.bindings.replace(&key, &binding)?;
            }
        }
        Ok(())
    }
}

/// The connection of a flow, if its peer is a socket of the host's that asked for a publish.
pub(super) fn connection(key: &FlowKey, flow: &Flow) -> Option<Connection> {
    let is_hosts = flow.peer_kind == PeerKind::Loopback as u32 && key.protocol == u32::from(TCP);
    is_hosts.then(|| Connection {
        local: (from_abi(&flow.peer), flow.peer_port).into(),
        peer: (from_abi(&flow.external), flow.external_port).into(),
    })
}

/// Ends the host's side of flows that are gone. Where that fails, the host's stack resets the
/// connection with its next packet.
pub(super) fn end_connections(connections: &[Connection]) {
    for connection in connections {
        if let Err(error) = diag::end(connection) {
            tracing::debug!(
                local = %connection.local,
                peer = %connection.peer,
                error = &error as &dyn std::error::Error,
                "cannot end a connection of the host's"
            );
        }
    }
}
