//! Namespaces that each test makes, and what they begin with.

use std::net::IpAddr;
use std::process::Command;
use std::thread;

use ipnet::IpNet;
use nix::sched::{CloneFlags, unshare};
use nucnet_ctl::kernel::netlink::{AddressScope, BridgeSpec, Change, Mac, Netlink, Port, VethSpec};
use nucnet_ctl::kernel::netns::{NetnsFd, run_in};

pub(crate) const BRIDGE_MAC: Mac = [0x02, 0x6e, 0, 0, 0, 1];
pub(crate) const HOST_MAC: Mac = [0x02, 0x6e, 0, 0, 0, 2];
pub(crate) const PEER_MAC: Mac = [0x02, 0x6e, 0, 0, 0, 3];

pub(crate) const BRIDGE: BridgeSpec<'static> = BridgeSpec {
    name: "nuc0",
    mac: BRIDGE_MAC,
    mtu: 1500,
    alias: "nucnet:network:test",
};

/// Leaves the test, saying so, where it cannot make namespaces.
macro_rules! need_root {
    () => {
        if !nix::unistd::Uid::effective().is_root() {
            eprintln!("skipped: needs root to make network namespaces");
            return;
        }
    };
}

pub(crate) use need_root;

/// A namespace of the test's own, which goes with its last descriptor.
pub(crate) fn namespace() -> NetnsFd {
    thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).unwrap();
        NetnsFd::current().unwrap()
    })
    .join()
    .unwrap()
}

pub(crate) struct Host {
    pub(crate) netns: NetnsFd,
    pub(crate) netlink: Netlink,
}

pub(crate) fn host() -> Host {
    let netns = namespace();
    let netlink = Netlink::open_in(&netns).unwrap();
    Host { netns, netlink }
}

impl Host {
    /// A second opinion: iproute2's.
    pub(crate) fn ip(&self, arguments: &str) -> String {
        let output = run_in(&self.netns, || {
            Command::new("ip")
                .args(arguments.split_whitespace())
                .output()
                .unwrap()
        })
        .unwrap();
        assert!(output.status.success(), "ip {arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    pub(crate) fn bridge(&self) -> u32 {
        let (index, change) = self.netlink.ensure_bridge(&BRIDGE).unwrap();
        assert_eq!(change, Change::Made);
        index
    }

    /// Whether this kernel notes who made an address.
    pub(crate) fn marks_addresses(&self, link: u32) -> bool {
        let addresses = self.netlink.addresses_of(link).unwrap();
        let marks = addresses.iter().any(|address| address.protocol.is_some());
        if !marks {
            eprintln!("this kernel does not note who made an address (Linux 5.18)");
        }
        marks
    }

    pub(crate) fn nets(&self, link: u32) -> Vec<IpNet> {
        let mut nets: Vec<_> = self
            .netlink
            .addresses_of(link)
            .unwrap()
            .into_iter()
            .filter(|address| address.scope == AddressScope::Global)
            .map(|address| address.address)
            .collect();
        nets.sort();
        nets
    }

    pub(crate) fn link_local(&self, link: u32) -> Vec<IpNet> {
        let addresses = self.netlink.addresses_of(link).unwrap();
        let local = addresses
            .iter()
            .filter(|address| address.scope == AddressScope::Link);
        local.map(|address| address.address).collect()
    }
}

pub(crate) fn veth<'a>(bridge: u32, container: &'a NetnsFd) -> VethSpec<'a> {
    VethSpec {
        name: "nuc-a",
        mac: HOST_MAC,
        alias: "nucnet:a",
        port: Some((bridge, Port::ENDPOINT)),
        netns: container,
        peer_name: "eth0",
        peer_mac: PEER_MAC,
        mtu: 1400,
        tx_queue_len: 500,
        index: None,
    }
}

pub(crate) fn net(text: &str) -> IpNet {
    text.parse().unwrap()
}

pub(crate) fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}
