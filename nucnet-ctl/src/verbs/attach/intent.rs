//! What an attach is going to do: everything is decided, and checked against all that is there,
//! before anything is changed.

use super::super::{
    Error,
    egress::numbered,
    host::{Session, namespace},
    netfilter::will_serve_v6,
    network::Prepared,
    publish, slot,
    step::endpoint_alias,
};
use crate::{
    kernel::{
        claims::{Claim, Holder},
        netlink::Link,
        netns::NetnsFd,
        resolv::{self, Root},
    },
    model::{
        EndpointId, IfName, Invalid, Mac, Problem, ipam,
        policy::Compiled,
        record::{AttachWish, EndpointRecord, NetworkRecord, ResolvRecord, State},
        resolv::{Composed, Families},
    },
};
use std::{collections::HashSet, net::IpAddr, path::PathBuf};

/// What an attach is going to do.
pub(super) struct Intent {
    pub(super) network: Prepared,
    pub(super) endpoint: EndpointRecord,
    pub(super) policy: Option<Compiled>,
    pub(super) resolv_conf: Option<String>,
}

/// What there is under the id.
pub(super) enum Found {
    /// Nothing, or what was left of something.
    Nothing,
    /// Just what is wanted.
    Same(Box<EndpointRecord>, Box<NetworkRecord>),
}

/// What there is under the id already. Of another endpoint that lives: a conflict.
pub(super) fn look_up(
    session: &Session,
    id: &EndpointId,
    wish: &AttachWish,
    netns: &NetnsFd,
) -> Result<Found, Error> {
    let Some(record) = session.state.sound_endpoint(id)? else {
        return Ok(Found::Nothing);
    };
    let alias = endpoint_alias(&record);
    let link = session.netlink.find_link(record.host_ifname.as_str())?;
    // A veth pair goes with the namespace of either side.
    let is_own = |link: &Link| link.has_alias(&alias) && Some(link.index) == record.link;
    let lives = record.state == State::Active && link.as_ref().is_some_and(is_own);
    if !lives {
        return Ok(Found::Nothing);
    }
    let (old, here) = (&record.wish, namespace(netns)?);
    // A container that is started again under its id: the old one may still be going.
    if record.namespace != here && session.is_dying(&record)? {
        return Ok(Found::Nothing);
    }
    let differs = [
        (record.namespace != here, "network namespace"),
        (old.network != wish.network, "--network"),
        (old.addresses != wish.addresses, "--ip"),
        (old.mac != wish.mac, "--mac"),
        (old.ifname != wish.ifname, "--ifname"),
        (old.mtu != wish.mtu, "--mtu"),
        (old.publishes != wish.publishes, "-p"),
        (old.egress != wish.egress, "egress policy"),
        (old.rootfs != wish.rootfs, "--rootfs"),
        (old.slot != wish.slot, "guest or TAP"),
    ];
    if let Some((_, difference)) = differs.into_iter().find(|(differs, _)| *differs) {
        return Err(Error::EndpointExists {
            id: id.clone(),
            difference,
        });
    }
    match session.state.sound_network(&wish.network)? {
        Some(network) => Ok(Found::Same(Box::new(record), Box::new(network))),
        None => Ok(Found::Nothing),
    }
}

/// Decides everything, and checks it against all that is there. Nothing is changed.
pub(super) fn intend(
    session: &mut Session,
    network: Prepared,
    id: EndpointId,
    wish: AttachWish,
    netns: &NetnsFd,
    path: PathBuf,
    root: Option<&Root>,
) -> Result<Intent, Error> {
    let record = &network.record;
    let namespace = namespace(netns)?;
    if let Some(owner) = claimed(session, record, Claim::Namespace(namespace.number()))? {
        return Err(Error::NamespaceTaken {
            netns: path.display().to_string(),
            network: record.name.clone(),
            owner: owner.id,
        });
    }
    let addresses = addresses(session, record, &wish)?;
    let (v4, v6) = (
        addresses.iter().any(IpAddr::is_ipv4),
        addresses.iter().any(IpAddr::is_ipv6),
    );
    let mtu = wish.mtu.unwrap_or(record.mtu);
    if v6 {
        mtu.check_v6()?;
    }
    let mac = match wish.mac {
        // All guests have the same, each on a link of its own.
        Some(mac) if wish.slot.is_some() => mac,
        Some(mac) => match claimed(session, record, Claim::Mac(mac))? {
            Some(owner) => {
                return Err(Error::MacTaken {
                    mac,
                    owner: owner.id,
                });
            }
            None => mac,
        },
        None => Mac::local(rand::random()),
    };
    let publishes = publish::choose(session, &wish.publishes, v4, v6)?;
    let (resolv, composed) = match root {
        Some(root) => {
            let (record, composed) = resolv_conf(session, &id, root, &wish, Families { v4, v6 })?;
            (Some(record), Some(composed))
        }
        None => (None, None),
    };
    // The host's resolvers are allowed as given ones are.
    let egress = match &composed {
        Some(composed) => wish
            .egress
            .clone()
            .with_resolvers(composed.resolvers.clone()),
        None if wish.slot.is_some() && wish.egress.dns().is_empty() => {
            let resolvers = slot::host_resolvers()?;
            wish.egress.clone().with_resolvers(resolvers)
        }
        None => wish.egress.clone(),
    };
    let resolv_conf = composed.map(|composed| composed.text(&id));
    let number = session.record.next.endpoint()?;
    let (policy_numbers, policy) = numbered(&mut session.record.next, &egress)?.unzip();
    let endpoint = EndpointRecord {
        id,
        number,
        state: State::Configuring,
        network: record.number,
        netns: path,
        namespace,
        host_ifname: IfName::host_side(number),
        link: None,
        mac,
        host_mac: Mac::local(rand::random()),
        addresses,
        mtu,
        default_route: false,
        publishes,
        pending: Vec::new(),
        policy: policy_numbers,
        egress,
        other_policy: None,
        resolv,
        datapath: session.coming_kind(),
        keeps_open: false,
        wish,
    };
    Ok(Intent {
        network,
        endpoint,
        policy,
        resolv_conf,
    })
}

/// What is to be mounted, and on what.
fn resolv_conf(
    session: &Session,
    id: &EndpointId,
    root: &Root,
    wish: &AttachWish,
    families: Families,
) -> Result<(ResolvRecord, Composed), Error> {
    let record = root.examine(&session.state, id)?;
    let composed = Composed::new(wish.egress.dns(), &resolv::host_files()?, families)?;
    Ok((record, composed))
}

fn claimed(
    session: &Session,
    network: &NetworkRecord,
    claim: Claim,
) -> Result<Option<Holder>, Error> {
    Ok(session.state.claimed(network.number, claim)?)
}

/// One address of each subnet: the requested one, or one that is drawn.
fn addresses(
    session: &Session,
    network: &NetworkRecord,
    wish: &AttachWish,
) -> Result<Vec<IpAddr>, Error> {
    let on_host = session.addresses_of_host()?;
    for address in &wish.addresses {
        let Some(subnet) = network.subnet_of(*address) else {
            let problem = Problem::NoSubnetOfFamily;
            return Err(Invalid::new("--ip", address, problem).into());
        };
        subnet.check(*address)?;
        if let Some(owner) = claimed(session, network, Claim::Address(*address))? {
            return Err(Error::AddressTaken {
                address: *address,
                owner: owner.id,
            });
        }
        if let Some(held) = on_host.iter().find(|held| held.address.addr() == *address) {
            let interface = session.netlink.link(held.link)?.name;
            return Err(Error::AddressOnHost {
                address: *address,
                interface,
            });
        }
    }
    let serves_v6 = will_serve_v6(session)?;
    let mut asked = wish.addresses.iter();
    if let Some(address) = asked.find(|address| !serves_v6 && address.is_ipv6()) {
        return Err(Error::NoIp6tables(format!("--ip {address}")));
    }
    let mut chosen = Vec::with_capacity(2);
    for subnet in network.served(serves_v6) {
        let v6 = subnet.gateway().is_ipv6();
        let wanted = wish
            .addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv6() == v6);
        let drawn = match wanted {
            Some(address) => Some(address),
            None => {
                let excluded: HashSet<IpAddr> = on_host.iter().map(|a| a.address.addr()).collect();
                let leases = session.state.leases(network.number)?;
                ipam::draw(subnet, &excluded, &leases, &mut rand::rng())?
            }
        };
        chosen.push(drawn.ok_or_else(|| Error::SubnetFull {
            network: network.name.clone(),
            subnet: subnet.to_string(),
        })?);
    }
    match chosen.is_empty() {
        true => Err(Error::NoIp6tables(format!("network {}", network.name))),
        false => Ok(chosen),
    }
}
