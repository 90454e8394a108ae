//! The steps of set-ups, and how each is done and undone.
//!
//! A teardown undoes the steps of the set-up that the records describe, so that there is one
//! place for each thing that is made and removed. Undoing what was never done, or is gone, is
//! no error.

mod container;
mod datapath;
mod endpoint;
mod mapping;
mod network;
mod plan;
mod policy;
mod publish;
mod rules;
mod slot;

pub(super) use endpoint::{endpoint_alias, endpoint_entry};
pub(super) use mapping::{MAPPING_ROUTES, mapping_entries, mapping_routes_alias};
pub(super) use network::{network_alias, network_entry};
pub(super) use plan::{
    egress_steps, endpoint_steps, mapping_steps, network_steps, publish_steps, superseded_steps,
};
pub(super) use publish::families;
pub(super) use slot::guest_entry;

use super::{Error, OpenFlows, host::Session};
use crate::{
    kernel::{bpf::Datapath, claims::Use, netlink::Netlink, netns::NetnsFd, resolv::Root},
    model::{
        plan::Executor,
        policy::Compiled,
        publish::PublishSpec,
        record::{DatapathKind, EndpointRecord, MappingRecord, NetworkRecord, OtherPolicy, State},
    },
};
use nucnet_common::abi;
use publish::Standing;
use std::fmt;

/// One step. What it is about is in the records of the [`World`]; what it holds is shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// Load the datapath, or open it.
    Datapath(String),
    /// Have a program on every uplink.
    Uplinks,
    /// Record that a network is being made.
    NetworkIntent(String),
    /// Make the bridge.
    Bridge(String),
    /// Let route lookups look from the bridge.
    BridgeSysctls(String),
    /// Give the bridge the network's own addresses.
    BridgeAddresses(String),
    /// Tell the programs how the network translates.
    NetworkEntry(String),
    /// Have the program on the bridge.
    BridgeProgram(String),
    /// Set the bridge up, and tell the programs of it.
    BridgeUp(String),
    /// Give a bridge that lost them its ports and neighbours.
    Members(String),
    /// Record that the network is there.
    NetworkRecord(String),
    /// Record that an endpoint is being made.
    EndpointIntent(String),
    /// Hold the network namespace of a slot.
    SlotNamespace(String),
    /// Take addresses and ports.
    Claims(String),
    /// Make the veth pair.
    Veth(String),
    /// Have the program on the host side.
    Program(String),
    /// Write a policy into the maps.
    Policy(usize),
    /// Record that a policy is coming.
    EgressIntent(String),
    /// Have another policy of the maps in force for the endpoint.
    EgressSwitch(String),
    /// Record which policy is in force.
    EgressRecord(String),
    /// Tell the programs of the endpoint.
    Entries(String),
    /// Make the host side a port of the bridge again.
    Port(String),
    /// Tell the host where the endpoint's addresses are.
    Neighbours(String),
    /// Set the host side up.
    HostSide(String),
    /// Configure the container side.
    ContainerSide(String),
    /// Make the TAP of a slot, and tell the programs of its guest.
    Guest(String),
    /// Mount the container's `resolv.conf`.
    ResolvConf(String),
    /// Publish the ports.
    Publishes(String),
    /// Record that ports are being published.
    PublishIntent(String),
    /// Take the ports.
    PublishClaims(String),
    /// Record that ports are published.
    PublishRecord(String),
    /// Record that the endpoint is there.
    EndpointRecord(String),
    /// Record that a static mapping is being made.
    MappingIntent(String),
    /// Have an interface from which routes are looked up for mappings.
    MappingRoutes(String),
    /// Take the ports of a mapping.
    MappingClaims(String),
    /// Put a mapping in force.
    Mapping(String),
    /// Record that the mapping is there.
    MappingRecord(String),
}

impl Step {
    /// Whether a datapath has that step.
    pub(super) fn is_of(&self, kind: DatapathKind) -> bool {
        let is_about_programs = matches!(
            self,
            Self::Datapath(_)
                | Self::Program(_)
                | Self::BridgeProgram(_)
                | Self::Policy(_)
                | Self::MappingRoutes(_)
        );
        kind == DatapathKind::Ebpf || !is_about_programs
    }
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Datapath(bpffs) => write!(f, "open or load the datapath under {bpffs}"),
            Self::Uplinks => write!(f, "put programs on the uplinks"),
            Self::NetworkIntent(name) => write!(f, "record network {name}"),
            Self::Bridge(bridge) => write!(f, "make bridge {bridge}"),
            Self::BridgeAddresses(what) => write!(f, "add addresses to bridge {what}"),
            Self::BridgeSysctls(bridge) => write!(f, "set forwarding of bridge {bridge} (only)"),
            Self::NetworkEntry(name) => write!(f, "tell the datapath of network {name}"),
            Self::BridgeProgram(bridge) => write!(f, "put the program on bridge {bridge}"),
            Self::BridgeUp(bridge) => write!(f, "set bridge {bridge} up"),
            Self::Members(bridge) => write!(f, "bring the endpoints on bridge {bridge} back"),
            Self::NetworkRecord(name) => write!(f, "record network {name} as active"),
            Self::EndpointIntent(id) => write!(f, "record endpoint {id}"),
            Self::SlotNamespace(path) => write!(f, "hold network namespace {path}"),
            Self::Claims(what) => write!(f, "take {what}"),
            Self::Veth(what) => write!(f, "make {what}"),
            Self::Program(link) => write!(f, "put the program on {link}"),
            Self::Policy(entries) => {
                write!(f, "write the egress policy ({entries} entries)")
            }
            Self::EgressIntent(what) => write!(f, "record {what}"),
            Self::EgressSwitch(id) => write!(f, "switch endpoint {id} to it"),
            Self::EgressRecord(id) => write!(f, "record the egress policy of endpoint {id}"),
            Self::Entries(what) => write!(f, "tell the datapath of {what}"),
            Self::Port(bridge) => write!(f, "make it a port of bridge {bridge}"),
            Self::Neighbours(bridge) => write!(f, "add neighbours on {bridge}"),
            Self::HostSide(link) => write!(f, "set {link} up"),
            Self::ContainerSide(what) => write!(f, "configure {what} in the container"),
            Self::Guest(what) => write!(f, "make {what}"),
            Self::ResolvConf(what) => write!(f, "mount {what}"),
            Self::Publishes(what) => write!(f, "publish {what}"),
            Self::PublishIntent(what) => write!(f, "record {what}"),
            Self::PublishClaims(what) => write!(f, "take {what}"),
            Self::PublishRecord(what) => write!(f, "record {what} as published"),
            Self::EndpointRecord(id) => write!(f, "record endpoint {id} as active"),
            Self::MappingIntent(id) => write!(f, "record mapping {id}"),
            Self::MappingRoutes(link) => {
                write!(f, "make interface {link}, for route lookups only")
            }
            Self::MappingClaims(what) => write!(f, "take {what}"),
            Self::Mapping(words) => write!(f, "map {words}"),
            Self::MappingRecord(id) => write!(f, "record mapping {id} as active"),
        }
    }
}

/// What steps act upon.
pub(super) struct World<'a> {
    pub(super) session: &'a Session,
    pub(super) datapath: Option<Datapath>,
    /// The datapath as whoever planned found it.
    pub(super) opened: Option<Datapath>,
    /// Whether this process loaded the datapath.
    pub(super) loaded: bool,
    /// Whether an earlier endpoint of this call left the datapath open, and all programs in place.
    settled: bool,
    pub(super) network: Option<NetworkRecord>,
    pub(super) endpoint: Option<EndpointRecord>,
    pub(super) mapping: Option<MappingRecord>,
    pub(super) policy: Option<Compiled>,
    /// The policy that is to be in force.
    pub(super) coming: Option<OtherPolicy>,
    /// What becomes of flows that are open when the policy changes.
    pub(super) open_flows: OpenFlows,
    /// Whether open connections went on before the policy changed, where rules carry packets.
    pub(super) kept_before: Option<bool>,
    /// The endpoint's entry before the policy changed.
    pub(super) entry_before: Option<abi::Endpoint>,
    /// The publishes that steps are about: all of the endpoint's, or those that change.
    pub(super) publishes: Vec<PublishSpec>,
    pub(super) netns: Option<&'a NetnsFd>,
    /// The container's root directory, and the text of its `resolv.conf`.
    pub(super) resolv_conf: Option<(&'a Root, String)>,
    /// Whether what is undone was ever in use.
    pub(super) usage: Use,
    /// What steps are about is in use: one that fails undoes nothing.
    pub(super) repairs: bool,
    /// Something could not be removed: what says that it may be there stays.
    pub(super) troubled: bool,
}

impl<'a> World<'a> {
    pub(super) fn new(session: &'a Session) -> Self {
        Self {
            session,
            datapath: None,
            opened: None,
            loaded: false,
            settled: false,
            network: None,
            endpoint: None,
            mapping: None,
            policy: None,
            coming: None,
            open_flows: OpenFlows::default(),
            kept_before: None,
            entry_before: None,
            publishes: Vec::new(),
            netns: None,
            resolv_conf: None,
            usage: Use::Unused,
            repairs: false,
            troubled: false,
        }
    }

    fn netlink(&self) -> &Netlink {
        &self.session.netlink
    }

    fn network(&self) -> &NetworkRecord {
        self.network
            .as_ref()
            .expect("steps of a network have its record")
    }

    fn endpoint(&self) -> &EndpointRecord {
        self.endpoint
            .as_ref()
            .expect("steps of an endpoint have its record")
    }

    pub(super) fn datapath(&mut self) -> Result<&mut Datapath, Error> {
        let bpffs = self.session.bpffs();
        self.datapath
            .as_mut()
            .ok_or_else(|| Error::DatapathGone(bpffs.to_owned()))
    }
}

impl Executor<Step> for World<'_> {
    type Error = Error;

    fn apply(&mut self, step: &Step) -> Result<(), Error> {
        let by_rules = match self.session.kind() {
            DatapathKind::Ebpf => None,
            DatapathKind::Iptables => self.apply_by_rules(step),
        };
        if let Some(result) = by_rules {
            return result.inspect_err(|_| self.clean_up_after(step));
        }
        match step {
            Step::Datapath(_) => self.open_datapath(),
            Step::Uplinks => self.sync_uplinks(),
            Step::NetworkIntent(_) => {
                self.put_network(|network| network.state = State::Configuring)
            }
            Step::Bridge(_) => self.make_bridge(),
            Step::BridgeAddresses(_) => self.set_bridge_addresses(),
            Step::BridgeSysctls(_) => self.set_bridge_sysctls(),
            Step::NetworkEntry(_) => self.write_network(),
            Step::BridgeProgram(bridge) => {
                self.datapath()?.attach_bridge(bridge)?;
                Ok(())
            }
            Step::BridgeUp(_) => Ok(self.netlink().set_up(self.bridge_link()?)?),
            Step::Members(_) => self.bring_members_back(),
            Step::NetworkRecord(_) => self.put_network(|network| network.state = State::Active),
            Step::EndpointIntent(_) => {
                self.put_endpoint(|endpoint| endpoint.state = State::Configuring)
            }
            // It was named when the endpoint was thought of, whose record says which it is.
            Step::SlotNamespace(_) => Ok(()),
            Step::Claims(_) => self.claim(),
            Step::Veth(_) => self.make_veth(),
            Step::Program(link) => Ok(self.datapath()?.attach_endpoint(link)?),
            Step::Policy(_) => self.write_policy(),
            Step::EgressIntent(_) => {
                let coming = self.coming.clone();
                self.put_endpoint(|endpoint| endpoint.other_policy = coming)
            }
            Step::EgressSwitch(_) => self.switch_policy(),
            Step::EgressRecord(_) => self.put_endpoint(EndpointRecord::exchange_policies),
            Step::Entries(_) => self.write_entries(),
            Step::Port(_) => self.enslave(),
            Step::Neighbours(_) => self.add_neighbours(),
            Step::HostSide(_) => self.set_host_side_up(),
            Step::ContainerSide(_) => self.configure_container(),
            Step::Guest(_) => self.make_guest(),
            Step::ResolvConf(_) => self.mount_resolv_conf(),
            Step::Publishes(_) => self.publish(),
            Step::PublishIntent(_) => self.record_publishes(Standing::Pending),
            Step::PublishClaims(_) => self.claim_publishes(),
            Step::PublishRecord(_) => self.record_publishes(Standing::Published),
            Step::EndpointRecord(_) => self.put_endpoint(|endpoint| endpoint.state = State::Active),
            Step::MappingIntent(_) => self.put_mapping(State::Configuring),
            Step::MappingRoutes(_) => self.make_mapping_routes(),
            Step::MappingClaims(_) => self.claim_mapping(),
            Step::Mapping(_) => self.write_mapping(),
            Step::MappingRecord(_) => self.put_mapping(State::Active),
        }
        .inspect_err(|_| self.clean_up_after(step))
    }

    fn undo(&mut self, step: &Step) -> Result<(), Error> {
        let by_rules = match self.session.kind() {
            DatapathKind::Ebpf => None,
            DatapathKind::Iptables => self.undo_by_rules(step),
        };
        if let Some(result) = by_rules {
            self.troubled |= result.is_err();
            return result;
        }
        let result = match step {
            Step::Datapath(_) => self.unload(),
            // They go with their links, or with the datapath.
            Step::Uplinks
            | Step::BridgeAddresses(_)
            | Step::BridgeSysctls(_)
            | Step::BridgeUp(_)
            | Step::Members(_)
            | Step::Program(_)
            | Step::Port(_)
            | Step::HostSide(_)
            | Step::ContainerSide(_) => Ok(()),
            Step::NetworkRecord(_) => self.put_network(|network| network.state = State::Removing),
            Step::NetworkEntry(_) => self.remove_network_entry(),
            Step::BridgeProgram(bridge) => match &self.datapath {
                Some(datapath) => datapath.detach_bridge(bridge).map_err(Error::from),
                None => Ok(()),
            },
            Step::Bridge(_) => self.delete_bridge(),
            Step::NetworkIntent(_) if self.troubled => Ok(()),
            Step::NetworkIntent(_) => self.forget_network(),
            Step::EndpointRecord(_) => {
                self.put_endpoint(|endpoint| endpoint.state = State::Removing)
            }
            Step::Guest(_) => self.forget_guest(),
            Step::ResolvConf(_) => self.unmount_resolv_conf(),
            Step::Publishes(_) => self.unpublish(),
            Step::PublishIntent(_) if self.troubled => Ok(()),
            Step::PublishIntent(_) => self.record_publishes(Standing::Absent),
            Step::PublishRecord(_) => self.record_publishes(Standing::Pending),
            Step::PublishClaims(_) if self.troubled => Ok(()),
            Step::PublishClaims(_) => self.release_publishes(),
            Step::Neighbours(_) => self.remove_neighbours(),
            Step::EgressRecord(_) => self.put_endpoint(EndpointRecord::exchange_policies),
            Step::EgressSwitch(_) => self.switch_policy_back(),
            Step::EgressIntent(_) if self.troubled => Ok(()),
            Step::EgressIntent(_) => self.put_endpoint(|endpoint| endpoint.other_policy = None),
            Step::Entries(_) => self.remove_entries(),
            Step::Policy(_) => self.remove_policy(),
            Step::Veth(_) => self.delete_veth(),
            Step::MappingRecord(_) => self.put_mapping(State::Removing),
            Step::Mapping(_) => self.unwrite_mapping(),
            Step::MappingClaims(_) if self.troubled => Ok(()),
            Step::MappingClaims(_) => self.release_mapping(),
            Step::MappingRoutes(_) => self.remove_mapping_routes(),
            Step::MappingIntent(_) if self.troubled => Ok(()),
            Step::MappingIntent(_) => self.forget_mapping(),
            // Nobody gets what may still be in use.
            Step::Claims(_) | Step::SlotNamespace(_) | Step::EndpointIntent(_) if self.troubled => {
                Ok(())
            }
            Step::SlotNamespace(_) => self.forget_namespace(),
            Step::Claims(_) => self.release(),
            Step::EndpointIntent(_) => self.forget_endpoint(),
        };
        self.troubled |= result.is_err();
        result
    }

    fn before(&mut self, _: usize) -> Result<(), Error> {
        #[cfg(any(debug_assertions, feature = "faults"))]
        super::faults::strike()?;
        Ok(())
    }
}

impl World<'_> {
    /// A step that fails half-way leaves nothing: what it writes in several pieces is undone.
    fn clean_up_after(&mut self, step: &Step) {
        let partial = matches!(
            step,
            Step::NetworkIntent(_)
                | Step::EndpointIntent(_)
                | Step::Claims(_)
                | Step::PublishIntent(_)
                | Step::PublishClaims(_)
                | Step::PublishRecord(_)
                | Step::EgressIntent(_)
                | Step::EgressRecord(_)
                | Step::Entries(_)
                | Step::Guest(_)
                | Step::Neighbours(_)
                | Step::ResolvConf(_)
                | Step::MappingIntent(_)
                | Step::MappingRoutes(_)
                | Step::MappingClaims(_)
                | Step::Mapping(_)
                | Step::MappingRecord(_)
        );
        if partial
            && !self.repairs
            && let Err(error) = self.undo(step)
        {
            tracing::warn!(%step, error = &error as &dyn std::error::Error, "not undone");
        }
    }
}
