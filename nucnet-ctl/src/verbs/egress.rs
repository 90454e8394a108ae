//! `egress set`, `egress show`, `egress clear`: the egress policy of a live endpoint.
//!
//! A change is one write to the endpoint's entry: the new policy is in the maps under numbers of
//! its own by then, and the old one until afterwards. The record names both meanwhile, so that
//! whoever comes after a crash knows what to take away; which of them is in force, the endpoint's
//! entry says.

use super::{
    Error, Host, Step,
    attach::failed,
    error::Left,
    host::Session,
    publish::live,
    step::{World, egress_steps, superseded_steps},
};
use crate::{
    kernel::bpf::Datapath,
    model::{
        EndpointId,
        plan::{self, Plan},
        policy::{Compiled, Policy},
        policy_file::Format,
        record::{DatapathKind, EndpointRecord, Numbers, OtherPolicy, PolicyNumbers},
    },
};
use serde::Serialize;
use std::{fs, io, path::Path};

/// What becomes of flows that the endpoint opened before its policy changed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OpenFlows {
    /// They are judged again: those that the new policy denies end at once.
    #[default]
    Judged,
    /// They go on for as long as they live.
    Kept,
}

/// The egress policy of an endpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct EgressView {
    /// The endpoint.
    pub id: EndpointId,
    /// Its policy.
    #[serde(flatten)]
    pub policy: Policy,
}

/// The egress policy in a file: JSON, or TOML if its name ends in `.toml`. `-` is standard input.
pub fn read_policy(path: &Path) -> Result<Policy, Error> {
    let text = match path.as_os_str() == "-" {
        true => io::read_to_string(io::stdin()),
        false => fs::read_to_string(path),
    };
    let text = text.map_err(|source| Error::ReadPolicy {
        path: path.to_owned(),
        source,
    })?;
    Policy::from_text(&text, Format::of(path)).map_err(|source| Error::PolicyFile {
        path: path.to_owned(),
        source,
    })
}

impl Host {
    /// Replaces the egress policy of an endpoint. Without resolvers of its own, the policy has
    /// those that the endpoint has. Either the old policy is in force or the new one, at any
    /// moment and whatever fails.
    pub fn set_egress(
        &self,
        id: &EndpointId,
        policy: Policy,
        open_flows: OpenFlows,
    ) -> Result<EgressView, Error> {
        let mut session = self.session_with(id)?;
        let (mut endpoint, _) = live(&session, id)?;
        let mut datapath = session.open_datapath()?;
        settle(&session, &mut endpoint, &mut datapath)?;
        let judges = open_flows == OpenFlows::Judged;
        let anew = judges && keeps_flows(&endpoint, datapath.as_ref())?;
        let Some(change) = Change::to(&mut session, &endpoint, policy, anew)? else {
            return Ok(EgressView::of(&endpoint));
        };
        session.put_host()?;
        let mut world = World::new(&session);
        world.datapath = datapath;
        world.open_flows = open_flows;
        let plan = change.plan(&endpoint);
        world.policy = change.compiled;
        world.coming = Some(change.coming);
        world.endpoint = Some(endpoint);
        plan::run(&plan, &mut world).map_err(|failure| failed(&plan, failure))?;
        // The new policy is in force, and undone no more.
        let mut datapath = world.datapath.take();
        let mut endpoint = world.endpoint.take().expect("it has one");
        drop(world);
        settle(&session, &mut endpoint, &mut datapath)?;
        Ok(EgressView::of(&endpoint))
    }

    /// Removes the egress policy of an endpoint; its resolvers stay on record. Removing what is
    /// not there succeeds.
    pub fn clear_egress(&self, id: &EndpointId) -> Result<EgressView, Error> {
        self.set_egress(id, Policy::default(), OpenFlows::Judged)
    }

    /// What a change of policy would do, and then undo of the former policy. Nothing is changed.
    pub fn plan_egress(
        &self,
        id: &EndpointId,
        policy: Policy,
        open_flows: OpenFlows,
    ) -> Result<(Plan<Step>, Plan<Step>), Error> {
        let mut session = self.session_with(id)?;
        let (endpoint, _) = live(&session, id)?;
        let datapath = session.open_datapath()?;
        let judges = open_flows == OpenFlows::Judged;
        let anew = judges && keeps_flows(&endpoint, datapath.as_ref())?;
        let Some(change) = Change::to(&mut session, &endpoint, policy, anew)? else {
            return Ok(Default::default());
        };
        let former = endpoint.policy_in_force().compile()?;
        let former = superseded_steps(former.as_ref());
        Ok((change.plan(&endpoint), former.into_iter().collect()))
    }

    /// The egress policy of an endpoint.
    pub fn egress(&self, id: &EndpointId) -> Result<EgressView, Error> {
        let (_, mut endpoint) = self.read_endpoint(id)?;
        if endpoint.other_policy.is_some() {
            let datapath = self.open_datapath()?;
            if is_other_in_force(&endpoint, datapath.as_ref())? {
                endpoint.exchange_policies();
            }
        }
        Ok(EgressView::of(&endpoint))
    }
}

impl EgressView {
    fn of(endpoint: &EndpointRecord) -> Self {
        Self {
            id: endpoint.id.clone(),
            policy: endpoint.egress.clone(),
        }
    }
}

/// A change of policy.
struct Change {
    coming: OtherPolicy,
    compiled: Option<Compiled>,
}

impl Change {
    /// The change to a policy; none: it is in force already, and not to be so `anew`.
    fn to(
        session: &mut Session,
        endpoint: &EndpointRecord,
        policy: Policy,
        anew: bool,
    ) -> Result<Option<Self>, Error> {
        let policy = match policy.dns().is_empty() {
            true => policy.with_resolvers(endpoint.egress.dns().to_vec()),
            false => policy,
        };
        // A slot's own, whatever its policy is.
        let policy = policy.with_guard(endpoint.egress.guard().to_vec());
        if policy == endpoint.egress && !anew {
            return Ok(None);
        }
        let (numbers, compiled) = numbered(&mut session.record.next, &policy)?.unzip();
        Ok(Some(Self {
            coming: OtherPolicy {
                numbers,
                egress: policy,
            },
            compiled,
        }))
    }

    fn plan(&self, endpoint: &EndpointRecord) -> Plan<Step> {
        let steps = egress_steps(endpoint, self.compiled.as_ref());
        steps.into_iter().collect()
    }
}

/// A policy under numbers that none had before; none: there is nothing to enforce.
pub(super) fn numbered(
    next: &mut Numbers,
    policy: &Policy,
) -> Result<Option<(PolicyNumbers, Compiled)>, Error> {
    if !policy.is_in_force() {
        return Ok(None);
    }
    let number = next.policy()?;
    // As many as it turns out to need.
    let first_class = next.classes(0)?;
    let compiled = policy.compile(number, first_class)?;
    next.classes(compiled.classes)?;
    let numbers = PolicyNumbers {
        policy: number,
        first_class,
    };
    Ok(Some((numbers, compiled)))
}

/// Whether the policy in force has left flows alone that were open before it.
fn keeps_flows(endpoint: &EndpointRecord, datapath: Option<&Datapath>) -> Result<bool, Error> {
    if endpoint.datapath == DatapathKind::Iptables {
        return Ok(endpoint.keeps_open);
    }
    let (Some(datapath), Some(link)) = (datapath, endpoint.link) else {
        return Ok(false);
    };
    let entry = datapath.endpoints.get(&link)?;
    Ok(entry.is_some_and(|entry| entry.policy_since < entry.policy))
}

/// Whether the endpoint's entry has the policy that is on record as the other one.
fn is_other_in_force(
    endpoint: &EndpointRecord,
    datapath: Option<&Datapath>,
) -> Result<bool, Error> {
    let (Some(other), Some(datapath), Some(link)) =
        (&endpoint.other_policy, datapath, endpoint.link)
    else {
        return Ok(false);
    };
    let entry = datapath.endpoints.get(&link)?;
    Ok(entry.is_some_and(|entry| {
        entry.number == endpoint.number
            && entry.policy == other.number()
            && entry.policy != endpoint.policy.map_or(0, |numbers| numbers.policy)
    }))
}

/// Takes away the policy that is not in force, if a change has left one.
pub(super) fn settle(
    session: &Session,
    endpoint: &mut EndpointRecord,
    datapath: &mut Option<Datapath>,
) -> Result<(), Error> {
    if is_other_in_force(endpoint, datapath.as_ref())? {
        endpoint.exchange_policies();
        session.state.put_endpoint(endpoint)?;
    }
    let Some(other) = &endpoint.other_policy else {
        return Ok(());
    };
    let mut world = World::new(session);
    if endpoint.datapath == DatapathKind::Iptables {
        // A call that died may have had the other one in force already.
        world.write_recorded_rules()?;
    }
    world.policy = other.compile()?;
    world.datapath = datapath.take();
    let plan: Plan<Step> = superseded_steps(world.policy.as_ref())
        .into_iter()
        .collect();
    world.endpoint = Some(endpoint.clone());
    let left = plan::tear_down(&plan, &mut world)?;
    *datapath = world.datapath.take();
    if let Some(settled) = world.endpoint.take() {
        *endpoint = settled;
    }
    Left(left).or(format!("the former egress policy of {}", endpoint.id), ())
}

/// The same with a datapath of its own.
pub(super) fn settle_recorded(
    session: &Session,
    mut endpoint: EndpointRecord,
) -> Result<(), Error> {
    let mut datapath = session.open_datapath()?;
    settle(session, &mut endpoint, &mut datapath)
}
