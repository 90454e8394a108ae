//! Bridges and their ports.

use nix::errno::Errno;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    InfoBridge, InfoBridgePort, InfoData, InfoKind, LinkAttribute, LinkInfo, LinkMessage,
};

use super::{Change, Error, LINK_GROUP, Link, LinkChange, LinkId, Mac, Netlink, Owner};

/// A bridge as a network wants it.
#[derive(Clone, Copy, Debug)]
pub struct BridgeSpec<'a> {
    /// Interface name.
    pub name: &'a str,
    /// Link-layer address. Given explicitly it does not follow the ports'.
    pub mac: Mac,
    /// Largest IP packet, in bytes. Given explicitly it does not follow the ports'.
    pub mtu: u32,
    /// Alias: whose it is.
    pub alias: &'a str,
}

/// How a bridge works.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct BridgeSettings {
    /// Spanning tree protocol: 0 is off.
    pub stp: u32,
    /// How long a new port listens before it forwards, in hundredths of a second.
    pub forward_delay: u32,
    /// How long learnt addresses are kept, in hundredths of a second.
    pub ageing: u32,
    /// Who wants which multicast is learnt from IGMP and MLD.
    pub multicast_snooping: bool,
}

impl BridgeSettings {
    /// A network's: ports work at once, and nothing is learnt about who wants multicast, for
    /// the bridge carries none.
    pub const NETWORK: Self = Self {
        stp: 0,
        forward_delay: 0,
        ageing: 30_000,
        multicast_snooping: false,
    };

    pub(super) fn from_attributes(attributes: &[InfoBridge]) -> Self {
        let mut settings = Self::default();
        for attribute in attributes {
            match *attribute {
                InfoBridge::StpState(state) => settings.stp = state.into(),
                InfoBridge::ForwardDelay(value) => settings.forward_delay = value,
                InfoBridge::AgeingTime(value) => settings.ageing = value,
                InfoBridge::MulticastSnooping(value) => settings.multicast_snooping = value,
                _ => {}
            }
        }
        settings
    }

    fn attributes(self) -> Vec<InfoBridge> {
        vec![
            InfoBridge::StpState(self.stp.into()),
            InfoBridge::ForwardDelay(self.forward_delay),
            InfoBridge::AgeingTime(self.ageing),
            InfoBridge::MulticastSnooping(self.multicast_snooping),
        ]
    }
}

/// Settings of a bridge port; `None` is what this kernel does not know, or what stays.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Port {
    /// Frames from a source without an entry for this port are dropped (Linux 5.16).
    pub locked: Option<bool>,
    /// Source addresses make entries.
    pub learning: Option<bool>,
    /// Frames to unknown unicast destinations leave here too.
    pub unicast_flood: Option<bool>,
    /// Frames to unknown multicast destinations leave here too.
    pub multicast_flood: Option<bool>,
    /// Broadcasts leave here too.
    pub broadcast_flood: Option<bool>,
    /// No frames to or from other isolated ports.
    pub isolated: Option<bool>,
}

impl Port {
    /// An endpoint's: the bridge takes nothing from it and sends nothing to it of its own
    /// accord. What passes, a program has redirected.
    pub const ENDPOINT: Self = Self {
        locked: Some(true),
        learning: Some(false),
        unicast_flood: Some(false),
        multicast_flood: Some(false),
        broadcast_flood: Some(false),
        isolated: Some(true),
    };

    pub(super) fn attributes(self) -> Vec<InfoBridgePort> {
        [
            self.locked.map(InfoBridgePort::Locked),
            self.learning.map(InfoBridgePort::Learning),
            self.unicast_flood.map(InfoBridgePort::UnicastFlood),
            self.multicast_flood.map(InfoBridgePort::MulticastFlood),
            self.broadcast_flood.map(InfoBridgePort::BroadcastFlood),
            self.isolated.map(InfoBridgePort::Isolated),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    pub(super) fn from_attributes(attributes: &[InfoBridgePort]) -> Self {
        let mut port = Self::default();
        for attribute in attributes {
            match *attribute {
                InfoBridgePort::Locked(value) => port.locked = Some(value),
                InfoBridgePort::Learning(value) => port.learning = Some(value),
                InfoBridgePort::UnicastFlood(value) => port.unicast_flood = Some(value),
                InfoBridgePort::MulticastFlood(value) => port.multicast_flood = Some(value),
                InfoBridgePort::BroadcastFlood(value) => port.broadcast_flood = Some(value),
                InfoBridgePort::Isolated(value) => port.isolated = Some(value),
                _ => {}
            }
        }
        port
    }
}

impl Netlink {
    /// Makes sure that the bridge exists as wanted, with [`BridgeSettings::NETWORK`]. It is not
    /// set up, nor down if it was up. A link of the name that is no bridge, or not the owner's,
    /// is [`Error::Taken`].
    ///
    /// Returns the interface index, and whether the bridge is new.
    pub fn ensure_bridge(&self, spec: &BridgeSpec<'_>) -> Result<(u32, Change), Error> {
        if let Some(link) = self.find_link(spec.name)? {
            return self
                .adopt_bridge(spec, &link)
                .map(|()| (link.index, Change::Unchanged));
        }
        match self.execute(
            RouteNetlinkMessage::NewLink(creation(spec)),
            NLM_F_CREATE | NLM_F_EXCL,
        ) {
            Ok(()) => {}
            // Somebody was faster.
            Err(failure) if failure.errno() == Some(Errno::EEXIST) => {
                let link = self.link(spec.name)?;
                return self
                    .adopt_bridge(spec, &link)
                    .map(|()| (link.index, Change::Unchanged));
            }
            Err(failure) => return Err(failure.to("create bridge", spec.name)),
        }
        let configured = self
            .link(spec.name)
            .and_then(|link| self.adopt_bridge(spec, &link).map(|()| link.index));
        // Made and configured is one step; the error that led here is the one to report.
        if configured.is_err()
            && let Ok(Some(link)) = self.find_link(spec.name)
        {
            let _ = self.delete_index(link.index);
        }
        Ok((configured?, Change::Made))
    }

    /// Brings a bridge that exists to what is wanted, if it may.
    fn adopt_bridge(&self, spec: &BridgeSpec<'_>, link: &Link) -> Result<(), Error> {
        let is_ours = link.is_of(Owner::Alias(spec.alias));
        let Some(settings) = link.bridge.filter(|_| is_ours) else {
            return Err(link.taken());
        };
        let configure = |settings| {
            let mut message = LinkMessage::default();
            message.header.index = link.index;
            message.attributes = vec![info(settings)];
            self.execute(RouteNetlinkMessage::NewLink(message), 0)
                .map_err(|failure| failure.to("configure bridge", spec.name))
        };
        if settings.stp != BridgeSettings::NETWORK.stp {
            // The kernel refuses a forward delay of 0 before it comes to read that it may be so.
            configure(vec![InfoBridge::StpState(
                BridgeSettings::NETWORK.stp.into(),
            )])?;
        }
        if settings != BridgeSettings::NETWORK {
            configure(BridgeSettings::NETWORK.attributes())?;
        }
        let change = LinkChange {
            mac: Some(spec.mac).filter(|_| link.mac != Some(spec.mac)),
            mtu: Some(spec.mtu).filter(|_| link.mtu != spec.mtu),
            alias: Some(spec.alias).filter(|_| !link.has_alias(spec.alias)),
            ..LinkChange::default()
        };
        if change.mac.is_some() || change.mtu.is_some() || change.alias.is_some() {
            self.set_link(link.index, &change)?;
        }
        Ok(())
    }

    /// Makes a link a port of a bridge with these settings, in two messages (the kernel takes
    /// the settings of ports only). Returns the settings as they are afterwards.
    pub fn enslave(&self, link: u32, bridge: u32, port: Port) -> Result<Port, Error> {
        let master = self.link(bridge)?;
        if master.bridge.is_none() {
            return Err(master.not_a_bridge());
        }
        self.set_link(
            link,
            &LinkChange {
                master: Some(bridge),
                ..LinkChange::default()
            },
        )
        .map_err(|error| full(error, &master.name))?;
        self.set_link(
            link,
            &LinkChange {
                port: Some(port),
                ..LinkChange::default()
            },
        )?;
        Ok(self.link(link)?.port.unwrap_or_default())
    }

    /// How many ports a bridge has. A bridge that cannot be asked is an error, not 0.
    pub fn port_count<'a>(&self, bridge: impl Into<LinkId<'a>>) -> Result<usize, Error> {
        let bridge = self.link(bridge)?;
        if bridge.bridge.is_none() {
            return Err(bridge.not_a_bridge());
        }
        let links = self
            .dump_links(vec![LinkAttribute::Controller(bridge.index)])
            .map_err(|failure| failure.to("list the ports of bridge", &bridge.name))?;
        // Asked to filter, kernels may still list more.
        Ok(links
            .iter()
            .filter(|link| link.master == Some(bridge.index))
            .count())
    }

    /// Deletes a bridge of the owner's that has no ports; one that is gone is no error.
    pub fn delete_bridge<'a>(
        &self,
        bridge: impl Into<LinkId<'a>>,
        owner: Owner<'_>,
    ) -> Result<Change, Error> {
        let Some(link) = self.find_link(bridge)? else {
            return Ok(Change::Unchanged);
        };
        match self.port_count(link.index) {
            Ok(0) => self.delete_link(link.index, owner),
            Ok(ports) => Err(Error::HasPorts {
                bridge: link.name,
                ports,
            }),
            Err(Error::NoLink { .. }) => Ok(Change::Unchanged),
            Err(error) => Err(error),
        }
    }
}

/// The kernel's answer to one port too many, made plain.
pub(super) fn full(error: Error, bridge: &str) -> Error {
    match error.errno() {
        Some(Errno::EXFULL) => Error::BridgeFull {
            bridge: bridge.to_owned(),
        },
        _ => error,
    }
}

fn creation(spec: &BridgeSpec<'_>) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(spec.name.to_owned()),
        LinkAttribute::Address(spec.mac.to_vec()),
        // The kernel takes an MTU as the administrator's, to be kept when ports come and go,
        // only when it changes: so it is made one off, and put right with the alias.
        LinkAttribute::Mtu(spec.mtu ^ 1),
        LinkAttribute::Group(LINK_GROUP),
        info(BridgeSettings::NETWORK.attributes()),
    ];
    message
}

fn info(settings: Vec<InfoBridge>) -> LinkAttribute {
    LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Bridge),
        LinkInfo::Data(InfoData::Bridge(settings)),
    ])
}
