//! What steps about the datapath do where the host's own stack carries packets.
//!
//! Steps about programs and maps are about rules here. Which rules are wanted follows from the
//! records, and from how far the step's own object is; all are compared with what is there, and
//! what differs is written. So undoing a step is doing it without that object, and repairing is
//! doing it again.

use super::{Step, World};
use crate::{
    kernel::{
        netfilter::{self, Conntrack, Netfilter, Tracked},
        netlink::Link,
    },
    model::{
        netfilter::{Family, Wanted, WantedEndpoint},
        policy::Policy,
        publish::{HostAddress, PublishSpec},
        record::{EndpointRecord, NetworkRecord, State, SysctlChange},
    },
    verbs::{
        Error, OpenFlows,
        netfilter::{
            Recorded, came_by, close_v6, end_asker, leave_unused, of_host, route_loopback,
        },
    },
};
use std::net::IpAddr;

/// How far a step's own object is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Standing {
    Done,
    Undone,
}

impl World<'_> {
    /// Does a step by rules. `None`: it is the same for both datapaths.
    pub(super) fn apply_by_rules(&mut self, step: &Step) -> Option<Result<(), Error>> {
        Some(match step {
            Step::Datapath(_)
            | Step::Program(_)
            | Step::BridgeProgram(_)
            | Step::Policy(_)
            | Step::MappingRoutes(_) => Ok(()),
            Step::Uplinks => self.forward_uplinks(),
            Step::NetworkEntry(_) | Step::Entries(_) | Step::Mapping(_) => {
                self.write_rules(step, Standing::Done)
            }
            Step::Publishes(_) => self.publish_by_rules(step),
            Step::EgressSwitch(_) => self.switch_policy_by_rules(step),
            _ => return None,
        })
    }

    /// Undoes a step by rules. `None`: it is the same for both datapaths.
    pub(super) fn undo_by_rules(&mut self, step: &Step) -> Option<Result<(), Error>> {
        Some(match step {
            Step::Datapath(_)
            | Step::Program(_)
            | Step::BridgeProgram(_)
            | Step::Policy(_)
            | Step::MappingRoutes(_) => Ok(()),
            Step::Uplinks => leave_unused(self.session),
            Step::NetworkEntry(_) => self.write_rules(step, Standing::Undone),
            Step::Entries(_) => self.leave_rules(step),
            Step::Publishes(_) => self.unpublish_by_rules(step),
            Step::EgressSwitch(_) => {
                let kept = self.kept_before.take();
                if let (Some(endpoint), Some(kept)) = (&mut self.endpoint, kept) {
                    endpoint.keeps_open = kept;
                }
                self.write_rules(step, Standing::Undone)
            }
            Step::Mapping(_) => self.unmap_by_rules(step),
            _ => return None,
        })
    }

    /// Has the interfaces that lead elsewhere forward what comes in by them.
    fn forward_uplinks(&self) -> Result<(), Error> {
        let uplinks = self.session.netlink.uplinks()?;
        let links: Vec<Link> = uplinks.into_iter().map(|uplink| uplink.link).collect();
        let has_v6 = self.netfilter()?.has(Family::Ipv6);
        self.change_host(&netfilter::forward_all(&links, has_v6)?)
    }

    /// Changes settings of the host's, once what they were is on record.
    fn change_host(&self, changes: &[SysctlChange]) -> Result<(), Error> {
        if changes.is_empty() {
            return Ok(());
        }
        let mut noted = self.session.sysctls.borrow_mut();
        for change in changes {
            match noted.iter_mut().find(|known| known.name == change.name) {
                // Somebody has taken it back since, and what went with it.
                Some(known) => {
                    known.overwrites.clone_from(&change.overwrites);
                    known.returning = false;
                }
                None => noted.push(change.clone()),
            }
        }
        drop(noted);
        self.session.put_host()?;
        Ok(netfilter::make(changes)?)
    }

    pub(super) fn netfilter(&self) -> Result<Netfilter, Error> {
        of_host(&self.session.record)?.ok_or(Error::NoRules)
    }

    /// Makes the rules those that the records want.
    pub(in crate::verbs) fn write_recorded_rules(&self) -> Result<(), Error> {
        self.carry(&Recorded::of(self.session)?.wanted())
    }

    /// Makes the rules those that are wanted once a step is done, or undone.
    fn write_rules(&self, step: &Step, standing: Standing) -> Result<(), Error> {
        let mut recorded = Recorded::of(self.session)?;
        let is_done = standing == Standing::Done;
        if let Some(network) = &self.network {
            recorded
                .networks
                .retain(|other| other.number != network.number);
            if is_done || !matches!(step, Step::NetworkEntry(_)) {
                recorded.networks.push(network.clone());
            }
        }
        if let Some(mapping) = &self.mapping {
            recorded
                .mappings
                .retain(|other| other.number != mapping.number);
            if is_done {
                recorded.mappings.push(mapping.clone());
            }
        }
        let mut publishes = Vec::new();
        if let Some(endpoint) = &self.endpoint {
            recorded
                .endpoints
                .retain(|other| other.number != endpoint.number);
            publishes = self.publishes_at(endpoint, step, is_done);
        }
        recorded.sort();
        let mut wanted = recorded.wanted();
        if let Some(endpoint) = &self.endpoint
            && (is_done || !matches!(step, Step::Entries(_)))
        {
            let at = recorded
                .endpoints
                .partition_point(|e| e.number < endpoint.number);
            wanted.endpoints.insert(
                at,
                WantedEndpoint {
                    record: endpoint,
                    publishes: &publishes,
                    egress: self.egress_at(endpoint, step, is_done),
                    keeps_open: endpoint.keeps_open,
                },
            );
        }
        self.carry(&wanted)
    }

    fn publishes_at(
        &self,
        endpoint: &EndpointRecord,
        step: &Step,
        is_done: bool,
    ) -> Vec<PublishSpec> {
        let mut publishes = endpoint.publishes.clone();
        // What is repaired is in use.
        let are_there = matches!(step, Step::Publishes(_)) && is_done || self.repairs;
        // Of another step than theirs, they are not there yet, or as recorded.
        let are_coming = matches!(step, Step::Publishes(_) | Step::Entries(_));
        if are_coming {
            publishes.retain(|publish| !self.publishes.contains(publish));
            if are_there {
                publishes.extend(&self.publishes);
            }
        }
        publishes
    }

    fn egress_at<'a>(
        &'a self,
        endpoint: &'a EndpointRecord,
        step: &Step,
        is_done: bool,
    ) -> &'a Policy {
        match &self.coming {
            Some(coming) if is_done && matches!(step, Step::EgressSwitch(_)) => &coming.egress,
            _ => &endpoint.egress,
        }
    }

    /// Writes the rules, and what of the bridges' settings depends on them.
    fn carry(&self, wanted: &Wanted<'_>) -> Result<(), Error> {
        let netfilter = self.netfilter()?;
        // Nobody who asks 127.0.0.1 for more than is published may get it.
        for network in wanted
            .networks
            .iter()
            .filter(|network| !serves_loopback(wanted, network))
        {
            route_loopback(network, "0")?;
        }
        if !netfilter.has(Family::Ipv6) {
            // What was wanted before may be there, and what is wanted now is not.
            wanted.networks.iter().try_for_each(|it| close_v6(it))?;
        }
        for family in Family::ALL {
            let change = netfilter.apply(family, &wanted.chains(family))?;
            for difference in change.differences {
                tracing::debug!(%family, "wrote {difference}");
            }
        }
        for network in wanted
            .networks
            .iter()
            .filter(|network| serves_loopback(wanted, network))
        {
            route_loopback(network, "1")?;
        }
        // With the rules came what keeps the table of connections.
        self.change_host(&netfilter::count_all()?)
    }

    fn publish_by_rules(&mut self, step: &Step) -> Result<(), Error> {
        self.write_rules(step, Standing::Done)?;
        let published = match self.repairs {
            // What is repaired was published before whoever may be listening now came.
            true => Ok(()),
            false => self.check_sockets(),
        };
        let published = published.and_then(|()| {
            // Datagrams that came to the host before go on doing so for as long as they come.
            self.forget(|world, tracked| {
                let is_translated = tracked.reply.source != tracked.original.destination;
                !is_translated && world.asks_for_publish(tracked)
            })
        });
        if published.is_err() && !self.repairs {
            // The error that led here is the one to report.
            let _ = self.write_rules(step, Standing::Undone);
        }
        published
    }

    fn unpublish_by_rules(&mut self, step: &Step) -> Result<(), Error> {
        // All that there is of an endpoint that goes is ended with its rules.
        if self
            .endpoint
            .as_ref()
            .is_some_and(|e| e.state == State::Removing)
        {
            return Ok(());
        }
        self.write_rules(step, Standing::Undone)?;
        self.end(|world, tracked| {
            let endpoint = world.endpoint.as_ref();
            endpoint.is_some_and(|e| e.addresses.contains(&tracked.reply.source))
                && world.asks_for_publish(tracked)
        })
    }

    /// Whether a connection was opened to one of the publishes that steps are about.
    fn asks_for_publish(&self, tracked: &Tracked) -> bool {
        let asked = &tracked.original;
        self.publishes.iter().any(|publish| {
            let is_address = match publish.host() {
                HostAddress::One(one) => one == asked.destination,
                any => match asked.destination {
                    IpAddr::V4(_) => any.v4(),
                    IpAddr::V6(_) => any.v6(),
                },
            };
            let ports = publish.host_ports();
            publish.protocol().number() == asked.protocol
                && is_address
                && ports.is_some_and(|ports| ports.contains(asked.destination_port))
        })
    }

    fn switch_policy_by_rules(&mut self, step: &Step) -> Result<(), Error> {
        if let Some(endpoint) = &mut self.endpoint {
            self.kept_before = Some(endpoint.keeps_open);
            endpoint.keeps_open = self.open_flows == OpenFlows::Kept;
        }
        self.write_rules(step, Standing::Done)
    }

    /// Takes an endpoint out of the rules, and ends its connections: somebody else may get its
    /// addresses.
    fn leave_rules(&self, step: &Step) -> Result<(), Error> {
        self.write_rules(step, Standing::Undone)?;
        self.end(|world, tracked| {
            let endpoint = world.endpoint.as_ref();
            endpoint.is_some_and(|endpoint| tracked.is_of(&endpoint.addresses))
        })
    }

    fn unmap_by_rules(&self, step: &Step) -> Result<(), Error> {
        self.write_rules(step, Standing::Undone)?;
        self.forget(|world, tracked| {
            let mapping = world.mapping.as_ref();
            mapping.is_some_and(|mapping| came_by(&mapping.spec, tracked))
        })
    }

    /// Forgets connections, and ends those that a socket of the host has opened.
    fn end(&self, is_meant: impl Fn(&Self, &Tracked) -> bool) -> Result<(), Error> {
        self.forget(|world, tracked| {
            let is_meant = is_meant(world, tracked);
            if is_meant {
                end_asker(&tracked.original);
            }
            is_meant
        })
    }

    fn forget(&self, is_meant: impl Fn(&Self, &Tracked) -> bool) -> Result<(), Error> {
        let forgotten = Conntrack::open()
            .and_then(|conntrack| conntrack.forget_all(|tracked| is_meant(self, tracked)));
        forgotten.map(drop).map_err(Error::Conntrack)
    }
}

/// Whether an endpoint of a network publishes a port on 127.0.0.1.
fn serves_loopback(wanted: &Wanted<'_>, network: &NetworkRecord) -> bool {
    let is_loopback = |host: HostAddress| match host {
        HostAddress::One(IpAddr::V4(v4)) => v4.is_loopback(),
        host => host.v4(),
    };
    wanted.endpoints.iter().any(|endpoint| {
        endpoint.record.network == network.number
            && endpoint.record.address(false).is_some()
            && endpoint
                .publishes
                .iter()
                .any(|publish| is_loopback(publish.host()))
    })
}
