//! Packet tables: rows of named packets with all that they do, run through the packet logic
//! alone ([`world`]) and through the loaded programs ([`loaded`]).
//!
//! [`rows`] are written in the words of [`bench`], about the host of [`site`], with packets of
//! [`packet`]. An [`engine`] is what they run on: the world or the loaded programs.

pub mod bench;
pub mod checksum;
pub mod engine;
pub mod loaded;
pub mod packet;
pub mod rows;
pub mod site;
pub mod wire;
pub mod world;
