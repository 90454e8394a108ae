//! Links of any kind: seeing, changing, moving and deleting them.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoPortData, InfoPortKind, LinkAttribute,
    LinkExtentMask, LinkFlags, LinkInfo, LinkLayerType, LinkMessage,
};

use super::bridge::{BridgeSettings, Port};
use super::{
    ALIAS_PREFIX, Change, Error, Failure, Holder, LEAVING_GROUP, LINK_GROUP, Mac, Netlink, NetnsFd,
};

/// A link as the kernel shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Link {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
    /// What the kernel calls this sort of virtual link (`veth`, `bridge`); none for hardware.
    pub kind: Option<String>,
    /// What its frames look like.
    pub link_type: LinkType,
    /// Index of the bridge (or bond, VRF) that it is a port of.
    pub master: Option<u32>,
    /// Index of the link that it belongs to: a veth's peer, in the peer's namespace.
    pub peer: Option<u32>,
    /// This namespace's number for the namespace of [`Self::peer`], if that is another one.
    pub peer_netns: Option<i32>,
    /// Alias.
    pub alias: Option<String>,
    /// Group; 0 is the default.
    pub group: u32,
    /// Link-layer address, where it has six bytes.
    pub mac: Option<Mac>,
    /// Largest IP packet, in bytes.
    pub mtu: u32,
    /// Whether it is set up.
    pub state: State,
    /// Settings as a port of a bridge.
    pub port: Option<Port>,
    /// Settings as a bridge.
    pub bridge: Option<BridgeSettings>,
}

impl Link {
    /// Whose it is, if nucnet's: what follows [`ALIAS_PREFIX`].
    pub fn owner(&self) -> Option<&str> {
        self.alias.as_deref()?.strip_prefix(ALIAS_PREFIX)
    }

    /// Whether nucnet made it: it has an owner, or its maker died before it could name one.
    pub fn is_owned(&self) -> bool {
        self.owner().is_some() || self.is_unfinished()
    }

    /// Whether it carries this alias.
    pub fn has_alias(&self, alias: &str) -> bool {
        self.alias.as_deref() == Some(alias)
    }

    /// Whether `owner` may change and delete it.
    pub fn is_of(&self, owner: Owner<'_>) -> bool {
        match owner {
            Owner::Nucnet => self.is_owned(),
            Owner::Alias(alias) => self.has_alias(alias) || self.is_unfinished(),
        }
    }

    fn is_unfinished(&self) -> bool {
        self.alias.is_none() && matches!(self.group, LINK_GROUP | LEAVING_GROUP)
    }

    pub(super) fn holder(&self) -> Holder {
        Holder {
            kind: self.kind.clone(),
            alias: self.alias.clone(),
        }
    }

    /// What to say to whoever wants its name.
    pub fn taken(&self) -> Error {
        Error::Taken {
            name: self.name.clone(),
            found: self.holder(),
        }
    }

    pub(super) fn not_a_bridge(&self) -> Error {
        Error::NotABridge {
            name: self.name.clone(),
            found: self.holder(),
        }
    }
}

/// What frames of a link look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkType {
    /// Ethernet headers (ARPHRD_ETHER).
    Ethernet,
    /// The loopback interface.
    Loopback,
    /// Another ARPHRD number: no link-layer header for tun, wireguard, ppp.
    Other(u16),
}

impl From<LinkLayerType> for LinkType {
    fn from(kind: LinkLayerType) -> Self {
        match kind {
            LinkLayerType::Ether => Self::Ethernet,
            LinkLayerType::Loopback => Self::Loopback,
            other => Self::Other(other.into()),
        }
    }
}

/// Administrative state of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// It works if it has a carrier.
    Up,
    /// It does not.
    Down,
}

/// Whether a link gives itself an IPv6 link-local address when it is set up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ipv6LinkLocal {
    /// From its link-layer address.
    Automatic,
    /// It does not.
    Absent,
}

/// Names a link: by index, which never changes, or by name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LinkId<'a> {
    /// Interface index.
    Index(u32),
    /// Interface name.
    Name(&'a str),
}

impl From<u32> for LinkId<'_> {
    fn from(index: u32) -> Self {
        Self::Index(index)
    }
}

impl<'a> From<&'a str> for LinkId<'a> {
    fn from(name: &'a str) -> Self {
        Self::Name(name)
    }
}

impl<'a> From<&'a String> for LinkId<'a> {
    fn from(name: &'a String) -> Self {
        Self::Name(name)
    }
}

impl fmt::Display for LinkId<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Index(index) => write!(f, "{index}"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

/// Whose links may be changed and deleted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Owner<'a> {
    /// Anything that nucnet made.
    Nucnet,
    /// What carries exactly this alias, or none yet.
    Alias(&'a str),
}

/// What to change of a link. What is `None` stays.
#[derive(Clone, Copy, Debug, Default)]
pub struct LinkChange<'a> {
    /// Interface name.
    pub name: Option<&'a str>,
    /// Link-layer address.
    pub mac: Option<Mac>,
    /// Largest IP packet, in bytes.
    pub mtu: Option<u32>,
    /// Alias.
    pub alias: Option<&'a str>,
    /// Index of the bridge to become a port of; 0: of none.
    pub master: Option<u32>,
    /// Length of the transmit queue, in packets.
    pub tx_queue_len: Option<u32>,
    /// Up or down.
    pub state: Option<State>,
    /// Settings as a port of a bridge. It must be one already: not together with `master`.
    pub port: Option<Port>,
    /// IPv6 link-local address. Without effect where the link has no IPv6 at all.
    pub ipv6_link_local: Option<Ipv6LinkLocal>,
}

impl Netlink {
    /// All links.
    pub fn links(&self) -> Result<Vec<Link>, Error> {
        self.dump_links(Vec::new())
            .map_err(|failure| failure.to("list", "interfaces"))
    }

    pub(super) fn dump_links(&self, filter: Vec<LinkAttribute>) -> Result<Vec<Link>, Failure> {
        let mut message = LinkMessage::default();
        message.attributes = filter;
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        let replies = self.dump(&RouteNetlinkMessage::GetLink(message))?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewLink(link) => Some(link.into()),
                _ => None,
            })
            .collect())
    }

    /// One link, if it exists.
    pub fn find_link<'a>(&self, link: impl Into<LinkId<'a>>) -> Result<Option<Link>, Error> {
        let link = link.into();
        let mut message = addressed(link)?;
        message
            .attributes
            .push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        match self.get(RouteNetlinkMessage::GetLink(message)) {
            Ok(RouteNetlinkMessage::NewLink(found)) => Ok(Some(found.into())),
            Ok(_) => Err(Failure::NoAnswer.to("look up interface", link)),
            Err(failure) if failure.errno() == Some(Errno::ENODEV) => Ok(None),
            Err(failure) => Err(failure.to("look up interface", link)),
        }
    }

    /// One link that must exist.
    pub fn link<'a>(&self, link: impl Into<LinkId<'a>>) -> Result<Link, Error> {
        let link = link.into();
        self.find_link(link)?.ok_or_else(|| Error::NoLink {
            link: link.to_string(),
        })
    }

    /// Changes a link, in one message (two where it loses its link-local address and is set up,
    /// for the kernel would do the latter first). That a change is there already is no error;
    /// that the link is not, is.
    pub fn set_link<'a>(
        &self,
        link: impl Into<LinkId<'a>>,
        change: &LinkChange<'_>,
    ) -> Result<(), Error> {
        let mut link = link.into();
        let mut change = *change;
        if let Some(name) = change.name {
            let found = self.link(link)?;
            // The kernel reads a name beside no index as the link's, not as a new one; and
            // before Linux 6.2 it refuses to name a link that is up as it is named already.
            link = LinkId::Index(found.index);
            change.name = Some(name).filter(|_| found.name != name);
        }
        match change {
            LinkChange {
                ipv6_link_local: Some(_),
                state: Some(State::Up),
                ..
            } => {
                self.change_link(
                    link,
                    &LinkChange {
                        state: None,
                        ..change
                    },
                )?;
                let up = LinkChange {
                    state: change.state,
                    ..LinkChange::default()
                };
                self.change_link(link, &up)
            }
            _ => self.change_link(link, &change),
        }
    }

    fn change_link(&self, link: LinkId<'_>, change: &LinkChange<'_>) -> Result<(), Error> {
        let message = changed(link, change)?;
        match self.execute(RouteNetlinkMessage::NewLink(message), 0) {
            Ok(()) => Ok(()),
            Err(failure) => match failure.errno() {
                Some(Errno::ENODEV) => Err(Error::NoLink {
                    link: link.to_string(),
                }),
                // The link has no IPv6 (ipv6.disable=1), and so no link-local address.
                Some(Errno::EAFNOSUPPORT) if change.ipv6_link_local.is_some() => self.change_link(
                    link,
                    &LinkChange {
                        ipv6_link_local: None,
                        ..*change
                    },
                ),
                _ => Err(failure.to("change interface", link)),
            },
        }
    }

    /// Sets a link up.
    pub fn set_up<'a>(&self, link: impl Into<LinkId<'a>>) -> Result<(), Error> {
        self.set_link(
            link,
            &LinkChange {
                state: Some(State::Up),
                ..LinkChange::default()
            },
        )
    }

    /// Moves a link into another namespace and gives it its name there, in one message: nobody
    /// there sees it under another name. If the name is taken there the link stays here.
    pub fn move_link<'a>(
        &self,
        link: impl Into<LinkId<'a>>,
        netns: &NetnsFd,
        name: &str,
    ) -> Result<(), Error> {
        check_name(name)?;
        let link = self.link(link)?;
        let there = Self::open_in(netns)?;
        let taken = || Error::PeerTaken {
            name: name.to_owned(),
        };
        if there.find_link(name)?.is_some() {
            return Err(taken());
        }
        self.move_index(link.index, netns, name)
            .map_err(|failure| match failure.errno() {
                Some(Errno::ENODEV) => Error::NoLink {
                    link: link.name.clone(),
                },
                Some(Errno::EEXIST) => {
                    // The name was taken just now. The kernel moves first, then renames.
                    if let Ok(Some(stray)) = there.find_link(&link.name)
                        && stray.mac == link.mac
                    {
                        let _ = there.move_index(stray.index, &self.netns, &link.name);
                    }
                    taken()
                }
                _ => failure.to("move interface", &link.name),
            })
    }

    fn move_index(&self, index: u32, netns: &NetnsFd, name: &str) -> Result<(), Failure> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = vec![
            LinkAttribute::NetNsFd(netns.as_fd().as_raw_fd()),
            LinkAttribute::IfName(name.to_owned()),
        ];
        self.execute(RouteNetlinkMessage::NewLink(message), 0)
    }

    /// Deletes a link, if it exists and belongs to `owner`; another's is an error and stays.
    pub fn delete_link<'a>(
        &self,
        link: impl Into<LinkId<'a>>,
        owner: Owner<'_>,
    ) -> Result<Change, Error> {
        let link = link.into();
        let Some(found) = self.find_link(link)? else {
            return Ok(Change::Unchanged);
        };
        if !found.is_of(owner) {
            return Err(found.taken());
        }
        self.delete_index(found.index)
            .map_err(|failure| failure.to("delete interface", link))
    }

    /// Deletes those of nucnet's links that `is_wanted` names, all in one go where it can: for
    /// links one by one the kernel waits each time until nobody uses them any more (some 20 ms),
    /// for a group of links once. Returns what could not be deleted, and why.
    pub fn delete_links(
        &self,
        is_wanted: impl Fn(&Link) -> bool,
    ) -> Result<Vec<(Link, Error)>, Error> {
        let mut wanted = self.links()?;
        wanted.retain(|link| link.is_owned() && is_wanted(link));
        // Whatever is in the way of the group, only its own is in the way of a link.
        if wanted.len() > 1 && matches!(self.delete_group_of(&wanted), Ok(true)) {
            return Ok(Vec::new());
        }
        let delete = |link: Link| {
            let failure = self.delete_index(link.index).err()?;
            let error = failure.to("delete interface", &link.name);
            Some((link, error))
        };
        Ok(wanted.into_iter().filter_map(delete).collect())
    }

    /// Puts links into [`LEAVING_GROUP`], and deletes that; unless somebody else is in it.
    fn delete_group_of(&self, wanted: &[Link]) -> Result<bool, Failure> {
        let is_ours = || -> Result<bool, Failure> {
            let links = self.dump_links(Vec::new())?;
            let mut leaving = links.iter().filter(|link| link.group == LEAVING_GROUP);
            Ok(leaving.all(|link| {
                link.is_owned() && wanted.iter().any(|wanted| wanted.index == link.index)
            }))
        };
        if !is_ours()? {
            return Ok(false);
        }
        for link in wanted {
            let mut message = LinkMessage::default();
            message.header.index = link.index;
            message.attributes = vec![LinkAttribute::Group(LEAVING_GROUP)];
            match self.execute(RouteNetlinkMessage::NewLink(message), 0) {
                Err(failure) if failure.errno() != Some(Errno::ENODEV) => return Err(failure),
                // Put there, or gone.
                _ => {}
            }
        }
        if !is_ours()? {
            return Ok(false);
        }
        let mut message = LinkMessage::default();
        message.attributes = vec![LinkAttribute::Group(LEAVING_GROUP)];
        match self.execute(RouteNetlinkMessage::DelLink(message), 0) {
            Err(failure) if failure.errno() != Some(Errno::ENODEV) => Err(failure),
            _ => Ok(true),
        }
    }

    /// By index, which nobody else gets in between as a name might be.
    pub(super) fn delete_index(&self, index: u32) -> Result<Change, Failure> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        match self.execute(RouteNetlinkMessage::DelLink(message), 0) {
            Ok(()) => Ok(Change::Made),
            Err(failure) if failure.errno() == Some(Errno::ENODEV) => Ok(Change::Unchanged),
            Err(failure) => Err(failure),
        }
    }
}

/// A message about a link that exists.
fn addressed(link: LinkId<'_>) -> Result<LinkMessage, Error> {
    let mut message = LinkMessage::default();
    match link {
        LinkId::Index(index) => message.header.index = index,
        LinkId::Name(name) => {
            check_name(name)?;
            message
                .attributes
                .push(LinkAttribute::IfName(name.to_owned()));
        }
    }
    Ok(message)
}

/// A message that changes a link.
fn changed(link: LinkId<'_>, change: &LinkChange<'_>) -> Result<LinkMessage, Error> {
    let mut message = addressed(link)?;
    let attributes = &mut message.attributes;
    if let Some(name) = change.name {
        check_name(name)?;
        attributes.push(LinkAttribute::IfName(name.to_owned()));
    }
    attributes.extend(change.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    attributes.extend(change.mtu.map(LinkAttribute::Mtu));
    attributes.extend(
        change
            .alias
            .map(|alias| LinkAttribute::IfAlias(alias.to_owned())),
    );
    attributes.extend(change.master.map(LinkAttribute::Controller));
    attributes.extend(change.tx_queue_len.map(LinkAttribute::TxQueueLen));
    attributes.extend(change.port.map(|port| {
        LinkAttribute::LinkInfo(vec![
            LinkInfo::PortKind(InfoPortKind::Bridge),
            LinkInfo::PortData(InfoPortData::BridgePort(port.attributes())),
        ])
    }));
    attributes.extend(change.ipv6_link_local.map(|link_local| {
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            match link_local {
                Ipv6LinkLocal::Automatic => In6AddrGenMode::Eui64,
                Ipv6LinkLocal::Absent => In6AddrGenMode::None,
            },
        )])])
    }));
    if let Some(state) = change.state {
        message.header.change_mask = LinkFlags::Up;
        message.header.flags = match state {
            State::Up => LinkFlags::Up,
            State::Down => LinkFlags::empty(),
        };
    }
    Ok(message)
}

/// What the kernel accepts as a name (`dev_valid_name`).
pub(super) fn check_name(name: &str) -> Result<(), Error> {
    let problem = if name.is_empty() {
        "it is empty"
    } else if name.len() > 15 {
        "it is longer than 15 bytes"
    } else if matches!(name, "." | "..") {
        "it names a directory"
    } else if name.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c == '\0') {
        "it has a slash, a colon, white space or a zero byte in it"
    } else {
        return Ok(());
    };
    Err(Error::Name {
        name: name.to_owned(),
        problem,
    })
}

impl From<LinkMessage> for Link {
    fn from(message: LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            name: String::new(),
            kind: None,
            link_type: message.header.link_layer_type.into(),
            master: None,
            peer: None,
            peer_netns: None,
            alias: None,
            group: 0,
            mac: None,
            mtu: 0,
            state: if message.header.flags.contains(LinkFlags::Up) {
                State::Up
            } else {
                State::Down
            },
            port: None,
            bridge: None,
        };
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name = name,
                LinkAttribute::Controller(index) => link.master = Some(index),
                // A link of its own names itself, or 0.
                LinkAttribute::Link(index) => link.peer = Some(index).filter(|&peer| peer != 0),
                LinkAttribute::LinkNetNsId(id) => link.peer_netns = Some(id),
                LinkAttribute::IfAlias(alias) => link.alias = Some(alias),
                LinkAttribute::Group(group) => link.group = group,
                LinkAttribute::Address(address) => link.mac = address.try_into().ok(),
                LinkAttribute::Mtu(mtu) => link.mtu = mtu,
                LinkAttribute::LinkInfo(infos) => {
                    for info in infos {
                        match info {
                            LinkInfo::Kind(kind) => link.kind = Some(kind.to_string()),
                            LinkInfo::Data(InfoData::Bridge(bridge)) => {
                                link.bridge = Some(BridgeSettings::from_attributes(&bridge));
                            }
                            LinkInfo::PortData(InfoPortData::BridgePort(port)) => {
                                link.port = Some(Port::from_attributes(&port));
                            }
                            _ => {}
                        }
                    }
                }
                _ => {}
            }
        }
        link
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_the_kernel_would_refuse_are_refused_before() {
        for name in ["", ".", "..", "a/b", "a:b", "a b", "sixteen-bytes-xx"] {
            assert!(
                matches!(check_name(name), Err(Error::Name { .. })),
                "{name:?}"
            );
        }
        for name in ["eth0", "eth0.5", "fifteen-bytes-x", "ü"] {
            assert!(check_name(name).is_ok(), "{name:?}");
        }
    }
}
