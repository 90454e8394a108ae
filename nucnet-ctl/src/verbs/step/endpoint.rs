//! An endpoint on the host's side: what it has taken, its link, and what the programs are told of it.

use super::World;
use crate::{
    kernel::{
        claims::{Claim, Holder},
        netlink::{self, Link, Neighbour, Owner, Port, VethSpec},
    },
    model::{
        policy::Compiled,
        record::{DatapathKind, EndpointRecord, NetworkRecord},
        to_abi,
    },
    verbs::Error,
};
use nucnet_common::abi;
use std::net::IpAddr;

/// Length of transmit queues in packets: the kernel's default for Ethernet.
const TX_QUEUE_LEN: u32 = 1000;

/// The alias of an endpoint's host side.
pub(in crate::verbs) fn endpoint_alias(record: &EndpointRecord) -> String {
    format!("{}{}", netlink::ALIAS_PREFIX, record.id)
}

/// What the programs are told of an endpoint.
pub(in crate::verbs) fn endpoint_entry(
    endpoint: &EndpointRecord,
    network: &NetworkRecord,
    bridge: u32,
    policy: Option<&Compiled>,
) -> abi::Endpoint {
    let address = |v6| endpoint.address(v6).map(to_abi).unwrap_or_default();
    let gateway = |v6| match endpoint.address(v6) {
        Some(IpAddr::V4(_)) if endpoint.slot().is_some() => {
            let link = endpoint.slot().map(|slot| to_abi(slot.link.into()));
            link.unwrap_or_default()
        }
        Some(_) => network
            .subnet(v6)
            .map(|s| to_abi(s.gateway()))
            .unwrap_or_default(),
        None => abi::Address::default(),
    };
    let mut entry = abi::Endpoint {
        number: endpoint.number,
        network: endpoint.network,
        bridge,
        delivery: abi::Delivery::Peer as u32,
        address4: address(false),
        address6: address(true),
        gateway4: gateway(false),
        gateway6: gateway(true),
        mac: endpoint.mac.octets(),
        gateway_mac: network.mac.octets(),
        isolated: network.isolate.into(),
        mtu: endpoint.mtu.bytes(),
        ..abi::Endpoint::default()
    };
    if let Some(policy) = policy {
        policy.enforce(policy.number, &mut entry);
    }
    entry
}

impl World<'_> {
    pub(super) fn put_endpoint(
        &mut self,
        change: impl FnOnce(&mut EndpointRecord),
    ) -> Result<(), Error> {
        if let Some(endpoint) = &mut self.endpoint {
            change(endpoint);
            self.session.state.put_endpoint(endpoint)?;
        }
        Ok(())
    }

    pub(super) fn forget_endpoint(&self) -> Result<(), Error> {
        Ok(self.session.state.remove_endpoint(&self.endpoint().id)?)
    }

    pub(super) fn holder(&self) -> Holder {
        Holder {
            number: self.endpoint().number,
            id: self.endpoint().id.clone(),
        }
    }

    pub(super) fn claim(&self) -> Result<(), Error> {
        let (endpoint, holder) = (self.endpoint(), self.holder());
        let state = &self.session.state;
        for address in &endpoint.addresses {
            if let Some(owner) = state.claim(endpoint.network, Claim::Address(*address), &holder)? {
                return Err(Error::AddressTaken {
                    address: *address,
                    owner: owner.id,
                });
            }
        }
        // All guests have the same, each on a link of its own.
        if endpoint.slot().is_none()
            && let Some(owner) = state.claim(endpoint.network, Claim::Mac(endpoint.mac), &holder)?
        {
            return Err(Error::MacTaken {
                mac: endpoint.mac,
                owner: owner.id,
            });
        }
        let namespace = Claim::Namespace(endpoint.namespace.number());
        if let Some(owner) = state.claim(endpoint.network, namespace, &holder)? {
            return Err(Error::NamespaceTaken {
                netns: endpoint.netns.display().to_string(),
                network: endpoint.wish.network.clone(),
                owner: owner.id,
            });
        }
        self.claim_publishes()
    }

    pub(super) fn release(&self) -> Result<(), Error> {
        let endpoint = self.endpoint();
        let state = &self.session.state;
        self.release_publishes()?;
        let addresses = endpoint
            .addresses
            .iter()
            .map(|address| Claim::Address(*address));
        let namespace = Claim::Namespace(endpoint.namespace.number());
        for claim in addresses.chain([Claim::Mac(endpoint.mac), namespace]) {
            state.release(endpoint.network, claim, endpoint.number, self.usage)?;
        }
        Ok(())
    }

    pub(super) fn make_veth(&mut self) -> Result<(), Error> {
        let (endpoint, bridge) = (self.endpoint(), self.bridge_link()?);
        let netns = self.netns.expect("an attach has its namespace");
        let alias = endpoint_alias(endpoint);
        let veth = self.netlink().create_veth(&VethSpec {
            name: endpoint.host_ifname.as_str(),
            mac: endpoint.host_mac.octets(),
            alias: &alias,
            port: match endpoint.slot() {
                None => Some((bridge, Port::ENDPOINT)),
                Some(_) => None,
            },
            netns,
            peer_name: endpoint.wish.ifname.as_str(),
            peer_mac: endpoint.mac.octets(),
            mtu: endpoint.mtu.bytes(),
            tx_queue_len: TX_QUEUE_LEN,
            index: endpoint.slot().map(|slot| slot.number.wire_index()),
        })?;
        self.put_endpoint(|endpoint| endpoint.link = Some(veth.index))
            .inspect_err(|_| {
                // The error that led here is the one to report.
                let _ = self.netlink().delete_link(veth.index, Owner::Alias(&alias));
            })
    }

    pub(super) fn delete_veth(&self) -> Result<(), Error> {
        let endpoint = self.endpoint();
        let (name, alias) = (endpoint.host_ifname.as_str(), endpoint_alias(endpoint));
        self.netlink().delete_link(name, Owner::Alias(&alias))?;
        Ok(())
    }

    pub(super) fn set_host_side_up(&self) -> Result<(), Error> {
        let endpoint = self.endpoint();
        if let Some(slot) = endpoint.slot() {
            self.address_link(slot)?;
        }
        Ok(self.netlink().set_up(endpoint.host_ifname.as_str())?)
    }

    pub(super) fn enslave(&self) -> Result<(), Error> {
        let link = self.netlink().link(self.endpoint().host_ifname.as_str())?;
        self.make_port(&link)
    }

    pub(super) fn make_port(&self, link: &Link) -> Result<(), Error> {
        // The bridge of slots has none.
        if self.network().slots.is_some() {
            return Ok(());
        }
        let bridge = self.bridge_link()?;
        if link.master != Some(bridge) {
            self.netlink().enslave(link.index, bridge, Port::ENDPOINT)?;
        }
        Ok(())
    }

    pub(super) fn owner(&self) -> Option<abi::Owner> {
        let endpoint = self.endpoint();
        Some(abi::Owner {
            link: endpoint.link?,
            endpoint: endpoint.number,
        })
    }

    pub(super) fn write_entries(&mut self) -> Result<(), Error> {
        let bridge = self.bridge_link()?;
        let (endpoint, network) = (self.endpoint().clone(), self.network().clone());
        let Some(owner) = self.owner() else {
            return Ok(());
        };
        let policy = match &self.policy {
            Some(policy) => Some(policy.clone()),
            None => endpoint.policy_in_force().compile()?,
        };
        let mut entry = endpoint_entry(&endpoint, &network, bridge, policy.as_ref());
        if let Some(there) = self.datapath()?.endpoints.get(&owner.link)?
            && (there.number, there.policy) == (entry.number, entry.policy)
        {
            // Flows that were to go on under an earlier policy do.
            entry.policy_since = there.policy_since;
        }
        Ok(self.datapath()?.put_endpoint(owner.link, &entry)?)
    }

    pub(super) fn remove_entries(&mut self) -> Result<(), Error> {
        let endpoint = self.endpoint().clone();
        let Some(datapath) = &mut self.datapath else {
            return Ok(());
        };
        // The index of the link, or the address, may have come to be somebody else's.
        if let Some(link) = endpoint.link
            && datapath
                .endpoints
                .get(&link)?
                .is_some_and(|entry| entry.number == endpoint.number)
        {
            datapath.remove_endpoint(link)?;
        } else {
            for address in &endpoint.addresses {
                let key = to_abi(*address);
                if datapath
                    .addresses
                    .get(&key)?
                    .is_some_and(|owner| owner.endpoint == endpoint.number)
                {
                    datapath.addresses.remove(&key)?;
                }
            }
            datapath.purge_endpoint(endpoint.number)?;
        }
        // Those that siblings opened to it: somebody else may get its addresses.
        let party = endpoint.party();
        datapath.end_flows(|_, flow| party.was_opened_to(flow))?;
        Ok(())
    }

    pub(super) fn add_neighbours(&self) -> Result<(), Error> {
        self.introduce(self.endpoint())
    }

    /// Tells the host where an endpoint's addresses are.
    pub(super) fn introduce(&self, endpoint: &EndpointRecord) -> Result<(), Error> {
        let (link, mac) = (self.bridge_link()?, endpoint.mac.octets());
        let serves_v6 = self.serves_v6()?;
        let served = || {
            let addresses = endpoint.addresses.iter();
            addresses.filter(|address| serves_v6 || address.is_ipv4())
        };
        if endpoint.datapath == DatapathKind::Iptables {
            if let Some(port) = endpoint.link {
                self.netlink().ensure_station(port, mac)?;
                if !self.netlink().hand_over(port, mac, link)? {
                    tracing::warn!(
                        endpoint = %endpoint.id,
                        "this kernel lacks cls_u32 or act_mirred: where br_netfilter is in use, \
                         endpoints of one network do not reach each other's publishes"
                    );
                }
            }
            for address in served().filter(|address| address.is_ipv6()) {
                self.netlink().ensure_proxy(link, *address)?;
            }
        }
        served().try_for_each(|address| {
            Ok(self.netlink().ensure_neighbour(&Neighbour {
                link,
                address: *address,
                mac,
            })?)
        })
    }

    pub(super) fn remove_neighbours(&self) -> Result<(), Error> {
        // With the bridge went its neighbours.
        let Some(link) = self.network.as_ref().and_then(|network| network.link) else {
            return Ok(());
        };
        for address in &self.endpoint().addresses {
            self.netlink().remove_proxy(link, *address)?;
            self.netlink().remove_neighbour(link, *address)?;
        }
        Ok(())
    }
}
