//! Veth pairs between host and container.

use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};

use super::bridge::full;
use super::link::check_name;
use super::{Error, Failure, Ipv6LinkLocal, LINK_GROUP, LinkChange, Mac, Netlink, NetnsFd, Port};

/// A veth pair as an endpoint wants it.
#[derive(Clone, Copy, Debug)]
pub struct VethSpec<'a> {
    /// Interface name of the host side.
    pub name: &'a str,
    /// Link-layer address of the host side.
    pub mac: Mac,
    /// Alias of the host side: whose it is.
    pub alias: &'a str,
    /// Bridge that the host side becomes a port of, and its settings there.
    pub port: Option<(u32, Port)>,
    /// The container's namespace.
    pub netns: &'a NetnsFd,
    /// Interface name of the container side.
    pub peer_name: &'a str,
    /// Link-layer address of the container side.
    pub peer_mac: Mac,
    /// Largest IP packet in bytes, both sides.
    pub mtu: u32,
    /// Length of the transmit queues in packets, both sides.
    pub tx_queue_len: u32,
    /// Interface index of both sides, each in its namespace; none: of the kernel's choice.
    pub index: Option<u32>,
}

/// A veth pair that was made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Veth {
    /// Interface index of the host side.
    pub index: u32,
    /// Interface index of the container side, in the container.
    pub peer_index: u32,
    /// What the bridge made of the settings that were wanted.
    pub port: Option<Port>,
}

impl Netlink {
    /// Makes a veth pair, both sides down: one message creates it with the container side in the
    /// container, under its own name, and the host side on its bridge; a second one gives the
    /// host side its alias and port settings, and no IPv6 link-local address. On failure nothing
    /// stays.
    pub fn create_veth(&self, spec: &VethSpec<'_>) -> Result<Veth, Error> {
        check_name(spec.name)?;
        check_name(spec.peer_name)?;
        self.execute(
            RouteNetlinkMessage::NewLink(creation(spec)),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|failure| self.not_created(spec, failure))?;
        self.finish_veth(spec).inspect_err(|_| {
            // The error that led here is the one to report.
            if let Ok(Some(link)) = self.find_link(spec.name) {
                let _ = self.delete_index(link.index);
            }
        })
    }

    fn finish_veth(&self, spec: &VethSpec<'_>) -> Result<Veth, Error> {
        let change = LinkChange {
            alias: Some(spec.alias),
            port: spec.port.map(|(_, port)| port),
            ipv6_link_local: Some(Ipv6LinkLocal::Absent),
            ..LinkChange::default()
        };
        self.set_link(spec.name, &change)?;
        let link = self.link(spec.name)?;
        let no_peer = || Failure::NoAnswer.to("find the peer of interface", spec.name);
        Ok(Veth {
            index: link.index,
            peer_index: link.peer.ok_or_else(no_peer)?,
            port: link.port,
        })
    }

    /// Says which of the two names is taken.
    fn not_created(&self, spec: &VethSpec<'_>, failure: Failure) -> Error {
        match failure.errno() {
            Some(Errno::EEXIST) => match self.find_link(spec.name) {
                Ok(Some(link)) => link.taken(),
                Ok(None) => Error::PeerTaken {
                    name: spec.peer_name.to_owned(),
                },
                Err(error) => error,
            },
            Some(Errno::EXFULL) => {
                let (bridge, _) = spec.port.unwrap_or_default();
                let name = match self.find_link(bridge) {
                    Ok(Some(link)) => link.name,
                    _ => bridge.to_string(),
                };
                full(failure.to("create interface", spec.name), &name)
            }
            _ => failure.to("create interface", spec.name),
        }
    }
}

fn creation(spec: &VethSpec<'_>) -> LinkMessage {
    let mut peer = LinkMessage::default();
    // The kernel takes that of the peer only if there is one for both (drivers/net/veth.c).
    peer.header.index = spec.index.unwrap_or_default();
    peer.attributes = vec![
        LinkAttribute::NetNsFd(spec.netns.as_fd().as_raw_fd()),
        LinkAttribute::IfName(spec.peer_name.to_owned()),
        LinkAttribute::Address(spec.peer_mac.to_vec()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::TxQueueLen(spec.tx_queue_len),
    ];
    let mut message = LinkMessage::default();
    message.header.index = spec.index.unwrap_or_default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name.to_owned()),
        LinkAttribute::Address(spec.mac.to_vec()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::TxQueueLen(spec.tx_queue_len),
        LinkAttribute::Group(LINK_GROUP),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
        ]),
    ];
    message.attributes.extend(
        spec.port
            .map(|(bridge, _)| LinkAttribute::Controller(bridge)),
    );
    message
}
