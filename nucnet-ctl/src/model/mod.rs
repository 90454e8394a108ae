//! Values, and what follows from them: names, addresses, publishes, policies, address
//! allocation, records and plans.
//!
//! The constructors here are the only validators: a value of one of these types is valid, and
//! no other room turns strings into values. Nothing here makes a system call.

mod address;
mod error;
mod name;
mod sample;

pub mod behaviour;
pub mod diagnosis;
pub mod drift;
pub mod flow;
pub mod ipam;
pub mod mapping;
pub mod netfilter;
pub mod plan;
pub mod policy;
pub mod policy_file;
pub mod ports;
pub mod preset;
pub mod probe;
pub mod publish;
pub mod record;
pub mod resolv;
pub mod rule;
pub mod slot;

pub use address::{Cidr, Mac, Mtu, Subnet, from_abi, parse_ip, to_abi};
pub use error::{Invalid, Kind, Problem};
pub use name::{EndpointId, IfName, NetworkName};
pub use sample::parse_sample;
