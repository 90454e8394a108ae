//! Egress policies: their entries, and which one is in force.

use super::World;
use crate::{
    kernel::bpf::Prefix,
    verbs::{Error, OpenFlows},
};
use nucnet_common::abi;

type CidrEntries = Vec<(Prefix<abi::PolicyCidrKey>, abi::PolicyClass)>;

type PortEntries = Vec<(Prefix<abi::PolicyPortKey>, abi::PolicyRule)>;

impl World<'_> {
    fn policy_entries(&self) -> (CidrEntries, PortEntries) {
        let Some(policy) = &self.policy else {
            return (Vec::new(), Vec::new());
        };
        let cidrs = policy.cidrs.iter();
        let ports = policy.ports.iter();
        (
            cidrs
                .map(|(bits, key, value)| (Prefix::new(*bits, *key), *value))
                .collect(),
            ports
                .map(|(bits, key, value)| (Prefix::new(*bits, *key), *value))
                .collect(),
        )
    }

    /// Ports first: a prefix never leads to a class whose verdicts are not there.
    pub(super) fn write_policy(&mut self) -> Result<(), Error> {
        let (cidrs, ports) = self.policy_entries();
        let datapath = self.datapath()?;
        let written = datapath
            .policy_ports
            .insert_all(&ports)
            .and_then(|()| datapath.policy_cidrs.insert_all(&cidrs));
        if written.is_err() && !self.repairs {
            // Some may be in; the error that led here is the one to report.
            let _ = self.remove_policy();
        }
        Ok(written?)
    }

    pub(super) fn remove_policy(&mut self) -> Result<(), Error> {
        let (cidrs, ports) = self.policy_entries();
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        let cidrs: Vec<_> = cidrs.into_iter().map(|(key, _)| key).collect();
        let ports: Vec<_> = ports.into_iter().map(|(key, _)| key).collect();
        datapath.policy_cidrs.remove_all(&cidrs, |_| {})?;
        datapath.policy_ports.remove_all(&ports, |_| {})?;
        Ok(())
    }

    /// The endpoint's entry, unless the interface has come to be somebody else's.
    fn entry(&mut self) -> Result<(u32, abi::Endpoint), Error> {
        let endpoint = self.endpoint();
        let (id, number, link) = (endpoint.id.clone(), endpoint.number, endpoint.link);
        let datapath = self.datapath()?;
        let entry = match link {
            Some(link) => datapath.endpoints.get(&link)?.map(|entry| (link, entry)),
            None => None,
        };
        entry
            .filter(|(_, entry)| entry.number == number)
            .ok_or(Error::NotActive(id))
    }

    /// One write: no packet sees anything between the old policy and the new one.
    pub(super) fn switch_policy(&mut self) -> Result<(), Error> {
        let (link, before) = self.entry()?;
        let policy = self.policy.clone().unwrap_or_default();
        let since = match self.open_flows {
            OpenFlows::Judged => policy.number,
            OpenFlows::Kept => before.policy_since,
        };
        let mut entry = before;
        policy.enforce(since, &mut entry);
        self.datapath()?.endpoints.insert(&link, &entry)?;
        self.entry_before = Some(before);
        Ok(())
    }

    pub(super) fn switch_policy_back(&mut self) -> Result<(), Error> {
        let Some(before) = self.entry_before.take() else {
            return Ok(());
        };
        let (link, _) = self.entry()?;
        Ok(self.datapath()?.endpoints.insert(&link, &before)?)
    }
}
