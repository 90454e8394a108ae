//! An endpoint on the container's side: addresses, routes and `resolv.conf`.

use super::World;
use crate::{
    kernel::{
        netlink::{self, Neighbour, Netlink, Route},
        netns,
        sysctl::{self, Family, LinkKey, Sysctl},
    },
    model::record::{EndpointRecord, NetworkRecord},
    verbs::Error,
};
use std::{net::IpAddr, time::Duration};

impl World<'_> {
    pub(super) fn configure_container(&mut self) -> Result<(), Error> {
        let (endpoint, network) = (self.endpoint(), self.network());
        let netns = self.netns.expect("an attach has its namespace");
        let default_route = netns::run_in(netns, || configure(endpoint, network))??;
        if let Some(endpoint) = &mut self.endpoint {
            endpoint.default_route = default_route;
        }
        // With its first port the bridge gets carrier, and only then its addresses work.
        let subnets = self.network().served(self.serves_v6()?);
        let gateways = subnets.map(|subnet| subnet.gateway());
        await_addresses(self.netlink(), self.bridge_link()?, gateways)
    }

    pub(super) fn mount_resolv_conf(&mut self) -> Result<(), Error> {
        let (Some((root, text)), Some(endpoint)) = (&self.resolv_conf, &mut self.endpoint) else {
            return Ok(());
        };
        let Some(record) = &mut endpoint.resolv else {
            return Ok(());
        };
        let intended = record.made;
        let state = &self.session.state;
        state.mount_resolv_conf(&endpoint.id, root, text, record)?;
        if self.repairs {
            // What is there to mount on was made for it.
            record.made = intended;
        }
        if record.made != intended {
            state.put_endpoint(endpoint)?;
        }
        Ok(())
    }

    pub(super) fn unmount_resolv_conf(&self) -> Result<(), Error> {
        let endpoint = self.endpoint();
        let record = endpoint.resolv.as_ref();
        Ok(self
            .session
            .state
            .unmount_resolv_conf(&endpoint.id, record)?)
    }
}

/// Inside the container's namespace: addresses, links up, default routes, the gateways as
/// neighbours. Says whether default routes were added: not where others own them.
fn configure(endpoint: &EndpointRecord, network: &NetworkRecord) -> Result<bool, Error> {
    let netlink = Netlink::open()?;
    let name = endpoint.wish.ifname.as_str();
    let link = netlink.link(name)?.index;
    if endpoint.address(true).is_some() {
        for (key, value) in [
            (LinkKey::DisableIpv6, "0"),
            // Addresses and routes are nucnet's to give.
            (LinkKey::AcceptRa, "0"),
            // And nobody else has them.
            (LinkKey::AcceptDad, "0"),
        ] {
            match Sysctl::link(Family::Ipv6, name, key).write(value) {
                // The kernel says by refusing the address whether there is IPv6 at all.
                Err(sysctl::Error::NotFound { .. }) => {}
                result => drop(result?),
            }
        }
    }
    let defaults = netlink.default_routes()?;
    let pairs: Vec<_> = endpoint
        .addresses
        .iter()
        .filter_map(|address| {
            let subnet = network.subnet_of(*address)?;
            Some((subnet.with_prefix(*address), subnet))
        })
        .collect();
    for (address, _) in &pairs {
        netlink.ensure_address(link, *address)?;
    }
    netlink.set_up("lo")?;
    netlink.set_up(link)?;
    let mut added = false;
    for (address, subnet) in &pairs {
        let gateway = subnet.gateway();
        netlink.ensure_neighbour(&Neighbour {
            link,
            address: gateway,
            mac: network.mac.octets(),
        })?;
        let is_owned = |d: &netlink::KernelRoute| {
            d.destination.addr().is_ipv4() == gateway.is_ipv4()
                && d.hops.iter().all(|hop| hop.link != link)
        };
        if !defaults.iter().any(is_owned) {
            netlink.ensure_route(&Route::default_via_gateway(link, gateway, &[*address]))?;
            added = true;
        }
    }
    await_addresses(
        &netlink,
        link,
        pairs.iter().map(|(address, _)| address.addr()),
    )?;
    Ok(added)
}

/// Waits until packets to addresses of a link are taken, so that the first one after an attach
/// gets its answer.
fn await_addresses(
    netlink: &Netlink,
    link: u32,
    addresses: impl Iterator<Item = IpAddr>,
) -> Result<(), Error> {
    // Being asked for the link has the kernel notice its carrier now, not within a second.
    netlink.link(link)?;
    for address in addresses {
        if !netlink.await_local(address, Duration::from_secs(2))? {
            tracing::warn!(%address, "the kernel does not take packets to this address yet");
        }
    }
    Ok(())
}
