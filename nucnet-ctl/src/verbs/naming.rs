//! What people call what the programs know by number: endpoints and the rules of policies.

use super::{Error, Host, list::readable};
use crate::model::{EndpointId, policy::Policy, record::EndpointRecord};
use std::collections::HashMap;

/// What a number of a rule means where no rule decided.
pub(super) const DEFAULT: &str = "default";

/// Endpoints and policies by number. Numbers are never given twice, so those that went are still
/// known.
#[derive(Clone, Debug, Default)]
pub(super) struct Naming {
    endpoints: HashMap<u32, Option<EndpointId>>,
    policies: HashMap<u32, Option<Policy>>,
}

impl Naming {
    /// The endpoint with that number; none: it never had a record, or went before it was looked
    /// for.
    pub(super) fn endpoint(
        &mut self,
        host: &Host,
        number: u32,
    ) -> Result<Option<EndpointId>, Error> {
        if number == 0 {
            return Ok(None);
        }
        if !self.endpoints.contains_key(&number) {
            self.learn(host)?;
            self.endpoints.entry(number).or_default();
        }
        Ok(self.endpoints[&number].clone())
    }

    /// The rule of a policy in its canonical form, or "default"; none: nobody knows by which
    /// policy it was.
    pub(super) fn rule(
        &mut self,
        host: &Host,
        policy: u32,
        rule: u32,
    ) -> Result<Option<String>, Error> {
        if policy == 0 {
            return Ok(None);
        }
        if rule == 0 {
            return Ok(Some(DEFAULT.to_owned()));
        }
        if !self.policies.contains_key(&policy) {
            self.learn(host)?;
            self.policies.entry(policy).or_default();
        }
        let known = self.policies[&policy].as_ref();
        let found = known.and_then(|policy| policy.rules().find(|(number, ..)| *number == rule));
        Ok(Some(match found {
            Some((_, _, rule)) => rule.to_string(),
            // The policy was replaced before anybody looked.
            None => format!("rule {rule} of a policy that is gone"),
        }))
    }

    fn learn(&mut self, host: &Host) -> Result<(), Error> {
        let Some(store) = host.read()? else {
            return Ok(());
        };
        let endpoints = readable(store.endpoints()?);
        for endpoint in endpoints {
            for (policy, rules) in policies(&endpoint) {
                self.policies.insert(policy, Some(rules.clone()));
            }
            self.endpoints.insert(endpoint.number, Some(endpoint.id));
        }
        Ok(())
    }
}

/// The policies of an endpoint: the one that its record has, and one that is coming or going.
pub(super) fn policies(endpoint: &EndpointRecord) -> impl Iterator<Item = (u32, &Policy)> {
    let own = endpoint
        .policy
        .map(|numbers| (numbers.policy, &endpoint.egress));
    let other = endpoint
        .other_policy
        .as_ref()
        .and_then(|other| Some((other.numbers?.policy, &other.egress)));
    own.into_iter().chain(other)
}
