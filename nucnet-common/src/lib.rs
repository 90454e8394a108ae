//! What nucnet's BPF programs and its control plane share: the layout of the maps
//! ([`abi`]) and the packet logic.
//!
//! Everything here is `no_std`, knows no map and no system call, and runs in the kernel and
//! under `cargo test` alike. The only `unsafe` is the `Pod` implementations in [`abi`].
#![no_std]
#![deny(unsafe_code)]

pub mod abi;
pub mod answer;
pub mod embedded;
pub mod env;
pub mod event;
pub mod filter;
pub mod flow;
pub mod fragment;
pub mod guard;
pub mod guest;
pub mod hold;
mod icmp;
pub mod loopback;
pub mod mapping;
pub mod mtu;
pub mod nat;
pub mod neighbour;
pub mod packet;
pub mod path;
pub mod place;
pub mod policy;
pub mod ports;
pub mod publish;
pub mod renewal;
mod reset;
pub mod step;
