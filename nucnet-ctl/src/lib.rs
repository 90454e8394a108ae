//! The control plane of nucnet, as a library for container runtimes to embed.

pub mod kernel;
pub mod model;
