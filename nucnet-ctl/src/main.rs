//! The command line of nucnet.

fn main() {}
