//! The lab: a remote machine, a host and containers, each in namespaces of its own.
//!
//! ```text
//!   outside                         host (nucnet-ctl runs here)       containers
//!   192.0.2.1  2001:db8:1::1        192.0.2.2  2001:db8:1::2          as with --network none:
//!   198.51.100.1  2001:db8:f::1     own bpffs, /run, /sys, cgroup     lo, and that is down
//!        eth0 ------------------------- eth0
//!   outside2                              |
//!   203.0.113.1  2001:db8:2::1            |
//!        eth0 ------------------------- eth1 (if asked for)
//! ```
//!
//! A lab comes up in some ten milliseconds, is private to whoever made it, and is gone without a
//! trace however its maker ends ([`agent`]). Nothing outside of its namespaces is touched, but
//! for one child cgroup.

mod addresses;
pub mod agent;
pub mod cni;
mod drops;
mod guest;
mod lan;
mod microvm;
pub mod monitor;
mod node;
mod nucnet;
mod programs;
pub mod seed_slots;
pub mod seeds;
mod snapshot;
pub mod sniffer;
mod tables;
pub mod udp;
pub mod wait;
pub mod web;

use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::Result;

pub use addresses::{
    FAR, Family, HOST, HOST2, LAN_CLIENT, LAN_HOST, LAN_SERVER, OUTSIDE, OUTSIDE2, Pair,
};
pub use guest::{Guest, Slot};
pub use lan::Lan;
pub use microvm::{Microvm, Said};
pub use node::Node;
pub use nucnet::{Endpoint, Outcome};
pub use programs::{Programs, microvm_program, nucnet_program, peer_program, use_programs};
pub use snapshot::Snapshot;

/// A host, a remote machine, and the wire between them.
#[derive(Debug)]
pub struct Lab {
    /// The machine beyond the uplink.
    pub outside: Node,
    /// Where `nucnet-ctl` runs.
    pub host: Node,
    /// The datapath that `nucnet-ctl` is told to use; none: as this process's environment says.
    pub datapath: Option<&'static str>,
    seeds: seeds::Seeds,
    history: Mutex<Vec<Outcome>>,
}

impl Lab {
    /// Builds one.
    ///
    /// # Errors
    /// No privilege, or a program of iproute2 is missing.
    pub fn new() -> Result<Self> {
        static LABS: AtomicU32 = AtomicU32::new(0);
        let number = LABS.fetch_add(1, Ordering::Relaxed);
        let cgroup = format!("nucnet-lab-{}-{number}", std::process::id());
        let host = Node::host("host", &cgroup)?;
        let outside = Node::bare("outside")?;
        outside.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        host.ip("link set lo up")?;
        connect(&outside, OUTSIDE, &host, HOST, "eth0")?;
        outside.ip(&format!(
            "link set lo up\n\
             addr add {}/32 dev lo\n\
             addr add {}/128 dev lo",
            FAR.v4, FAR.v6
        ))?;
        host.ip(&format!(
            "route add default via {}\n\
             route add default via {}",
            OUTSIDE.v4, OUTSIDE.v6
        ))?;
        Ok(Self {
            outside,
            host,
            datapath: None,
            seeds: seeds::Seeds::default(),
            history: Mutex::default(),
        })
    }

    /// A second remote machine, on an uplink `eth1` of its own, without a route of its own but
    /// the connected one.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn second_uplink(&self) -> Result<Node> {
        let outside = Node::bare("outside2")?;
        outside.sysctl("net/ipv6/conf/default/accept_dad", "0")?;
        outside.ip("link set lo up")?;
        connect(&outside, OUTSIDE2, &self.host, HOST2, "eth1")?;
        Ok(outside)
    }

    /// A container that nobody has attached yet.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn container(&self, name: &str) -> Result<Node> {
        Node::bare(name)
    }

    /// The way in which the seeds do it, in this lab.
    pub fn seeds(&self) -> &seeds::Seeds {
        &self.seeds
    }
}

/// A wire from `remote`'s `eth0` to an interface of the host.
fn connect(
    remote: &Node,
    remote_addresses: Pair,
    host: &Node,
    addresses: Pair,
    ifname: &str,
) -> Result<()> {
    remote.ip(&format!(
        "link add eth0 type veth peer name {ifname} netns {}\n\
         addr add {}/24 dev eth0\n\
         addr add {}/64 dev eth0 nodad\n\
         link set eth0 up",
        host.pid(),
        remote_addresses.v4,
        remote_addresses.v6
    ))?;
    // Its link-local address is there at once, as on a host that has been up for a while.
    host.sysctl(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0")?;
    host.ip(&format!(
        "addr add {}/24 dev {ifname}\n\
         addr add {}/64 dev {ifname} nodad\n\
         link set {ifname} up",
        addresses.v4, addresses.v6
    ))?;
    remote.settle("eth0", remote_addresses.v6)?;
    host.settle(ifname, addresses.v6)
}
