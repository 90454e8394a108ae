//! All that talks to the kernel. Nothing here knows a verb, and nothing outside of here makes a
//! system call for the network.

mod directory;
mod fault;
mod forwarding;
#[cfg(test)]
mod state_model;

pub mod account;
pub mod boot;
pub mod bpf;
pub mod capability;
pub mod claims;
pub mod diag;
pub mod helper;
pub mod netfilter;
pub mod netlink;
pub mod netns;
pub mod probe;
pub mod process;
pub mod resolv;
pub mod sockets;
pub mod store;
pub mod sysctl;
pub mod tap;

pub use directory::FileError;
