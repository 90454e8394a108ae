//! The verbs: nouns read, verbs write. One file a verb, or a folder with one a datapath.

mod attach;
mod carry;
mod connections;
mod detach;
mod doctor;
mod down;
mod egress;
mod error;
mod explain;
#[cfg(any(debug_assertions, feature = "faults"))]
mod faults;
mod flows;
mod gc;
mod host;
mod list;
mod monitor;
mod naming;
mod nat;
mod netfilter;
mod network;
mod permission;
mod publish;
mod repair;
mod settled;
mod sight;
mod slot;
mod status;
mod step;
mod switch;
mod view;

pub use attach::{AttachRequest, Attachment, Container};
pub use detach::Detached;
pub use egress::{EgressView, OpenFlows, read_policy};
pub use error::{Error, Left, chain};
pub use explain::{ExplainRequest, Explanation, Origin, Verdict};
pub use flows::Flows;
pub use gc::{Collected, Removal};
pub use host::{DatapathChoice, Host, Options};
pub use monitor::{EventName, EventView, Monitor};
pub use nat::{MappingChoice, MappingView};
pub use slot::SlotRequest;
pub use status::{
    HostStatus, MapReport, NetworkStatus, ObjectStatus, ProgramReport, Status, UplinkStatus,
};
pub use step::Step;
pub use view::{
    Dropped, EndpointDetails, EndpointView, Forwarded, GuestView, NetworkView, Published,
};
