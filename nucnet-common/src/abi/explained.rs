//! What a dry run of the programs says.

use super::{Flow, FlowKey};

/// Where a packet would go, [`Explained::way`].
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum WayKind {
    /// On its way: it is none of nucnet's business.
    Pass = 0,
    /// Into an endpoint.
    Endpoint = 2,
    /// Out of an interface.
    Link = 3,
    /// To the host.
    Host = 4,
    /// Nowhere.
    Dropped = 5,
}

/// What would become of a packet. A dry run of the programs leaves it in their map `explained`,
/// which is pinned nowhere.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Explained {
    /// [`WayKind`].
    pub way: u32,
    /// The interface that it would go to.
    pub link: u32,
    /// [`super::Reason`] of a drop.
    pub reason: u32,
    /// The endpoint on whose account it would be dropped, or whose flow it is.
    pub endpoint: u32,
    /// The rule of the endpoint's policy that decided; 0: its default, or none had to.
    pub rule: u32,
    /// 1: `key` and `flow` are those of its flow.
    pub has_flow: u32,
    /// 1: that flow would be made.
    pub is_new: u32,
    /// 1: the sender would be told that the policy denies it.
    pub is_rejected: u32,
    /// The flow as its endpoint sees it.
    pub key: FlowKey,
    /// The flow as the packet would leave it.
    pub flow: Flow,
}
