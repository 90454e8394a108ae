//! nucnet's lab and what its tests share.

pub mod lab;
pub mod measure;
pub mod packets;
