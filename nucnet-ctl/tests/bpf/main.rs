//! Loading, pinning, attaching and map access, in the running kernel. Every test has a network
//! namespace, a mount namespace and a BPF filesystem of its own.

mod attach;
mod lab;
mod load;
mod maps;
mod pins;
