//! Publishes of an endpoint.

use super::World;
use crate::{
    kernel::{bpf::Prefix, sockets::Sockets},
    model::record::{EndpointRecord, State},
    verbs::{Error, publish},
};
use nucnet_common::abi;

/// What the record of an endpoint says of a publish.
#[derive(Clone, Copy)]
pub(super) enum Standing {
    Absent,
    Pending,
    Published,
}

impl World<'_> {
    fn publish_entries(&self) -> Vec<(Prefix<abi::PublishKey>, abi::Publish)> {
        let Some(owner) = self.owner() else {
            return Vec::new();
        };
        let (v4, v6) = families(self.endpoint());
        self.publishes
            .iter()
            .flat_map(|spec| spec.entries(owner, v4, v6))
            .map(|(bits, key, value)| (Prefix::new(bits, key), value))
            .collect()
    }

    pub(super) fn publish(&mut self) -> Result<(), Error> {
        let entries = self.publish_entries();
        let published = match self.datapath()?.publishes.insert_all(&entries) {
            // What is repaired was published before whoever may be listening now came.
            Ok(()) if self.repairs => Ok(()),
            Ok(()) => self.check_sockets(),
            Err(error) => Err(error.into()),
        };
        if published.is_err() && !self.repairs {
            // Some may be in; the error that led here is the one to report.
            let _ = self.unpublish();
        }
        published
    }

    /// From now on no socket of the host can bind the ports; one may have done so since they
    /// were looked at.
    pub(super) fn check_sockets(&self) -> Result<(), Error> {
        let ((v4, v6), sockets) = (families(self.endpoint()), Sockets::default());
        for spec in &self.publishes {
            if let Some(listener) = sockets.in_the_way(&spec.narrowed(v4, v6))? {
                return Err(publish::in_use(spec, listener));
            }
        }
        Ok(())
    }

    /// Removes the entries, and ends what came in by them.
    pub(super) fn unpublish(&mut self) -> Result<(), Error> {
        let (entries, number) = (self.publish_entries(), self.endpoint().number);
        let (party, publishes) = (self.endpoint().party(), self.publishes.clone());
        let goes = self.endpoint().state == State::Removing;
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let keys: Vec<_> = entries.into_iter().map(|(key, _)| key).collect();
        datapath.remove_publishes(&keys, |publish| publish.endpoint == number)?;
        // All flows of an endpoint that goes are removed with its entries.
        if !goes {
            datapath.end_flows(|key, flow| {
                let mut publishes = publishes.iter();
                publishes.any(|publish| party.came_by(publish, key, flow))
            })?;
        }
        Ok(())
    }

    pub(super) fn claim_publishes(&self) -> Result<(), Error> {
        let ((v4, v6), holder) = (families(self.endpoint()), self.holder());
        for spec in &self.publishes {
            self.session
                .state
                .claim_publish(&spec.narrowed(v4, v6), &holder)?;
        }
        Ok(())
    }

    pub(super) fn release_publishes(&self) -> Result<(), Error> {
        let (endpoint, (v4, v6)) = (self.endpoint(), families(self.endpoint()));
        for spec in &self.publishes {
            let spec = spec.narrowed(v4, v6);
            self.session.state.release_publish(&spec, endpoint.number)?;
        }
        Ok(())
    }

    pub(super) fn record_publishes(&mut self, standing: Standing) -> Result<(), Error> {
        let these = self.publishes.clone();
        self.put_endpoint(|endpoint| {
            endpoint.publishes.retain(|spec| !these.contains(spec));
            endpoint.pending.retain(|spec| !these.contains(spec));
            match standing {
                Standing::Published => endpoint.publishes.extend(these),
                Standing::Pending => endpoint.pending.extend(these),
                Standing::Absent => {}
            }
        })
    }
}

/// Which families an endpoint has, IPv4 and IPv6.
pub(in crate::verbs) fn families(endpoint: &EndpointRecord) -> (bool, bool) {
    (
        endpoint.address(false).is_some(),
        endpoint.address(true).is_some(),
    )
}
