//! The datapath of the host, and its programs on what is not nucnet's.

use super::{World, network_entry};
use crate::{
    kernel::bpf::{Datapath, HostInterface, Origin},
    model::record::State,
    verbs::{Error, sight::link_layer},
};
use ipnet::IpNet;

impl World<'_> {
    pub(super) fn open_datapath(&mut self) -> Result<(), Error> {
        if self.datapath.is_some() {
            return Ok(());
        }
        if let Some(datapath) = self.session.settled.take_datapath() {
            self.datapath = Some(datapath);
            self.settled = true;
            return Ok(());
        }
        let (bpffs, host) = (self.session.bpffs(), &self.session.bpf_host);
        let (datapath, origin) = Datapath::go_on_or_load(self.opened.take(), bpffs, host)?;
        self.loaded = origin == Origin::Loaded;
        let hooked = self.hook_host(&datapath);
        if hooked.is_err() && self.loaded {
            drop(datapath);
            // The error that led here is the one to report.
            let _ = Datapath::remove(bpffs);
            return hooked;
        }
        hooked?;
        self.datapath = Some(datapath);
        Ok(())
    }

    /// Puts the programs about the host's own sockets where they belong.
    fn hook_host(&self, datapath: &Datapath) -> Result<(), Error> {
        datapath.attach_loopback()?;
        let held = self
            .session
            .cgroup()
            .and_then(|cgroup| Ok(datapath.attach_bind(&cgroup)?));
        match held {
            // Who publishes nothing has no ports to hold, and without control groups nobody can.
            Err(error)
                if self.session.host.options().cgroup.is_none()
                    || self
                        .endpoint
                        .as_ref()
                        .is_some_and(|e| e.publishes.is_empty()) =>
            {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "sockets of the host can take published ports"
                );
                Ok(())
            }
            held => held,
        }
    }

    /// Takes away the datapath if this process loaded it.
    pub(super) fn unload(&mut self) -> Result<(), Error> {
        self.datapath = None;
        if !self.loaded {
            return Ok(());
        }
        match Datapath::remove(self.session.bpffs()).pop() {
            Some(error) => Err(error.into()),
            None => Ok(()),
        }
    }

    /// Puts programs on all uplinks and takes them off what is none any more.
    pub(super) fn sync_uplinks(&mut self) -> Result<(), Error> {
        if self.settled {
            return Ok(());
        }
        let interfaces: Vec<HostInterface> = self
            .netlink()
            .uplinks()?
            .into_iter()
            .filter_map(|uplink| {
                Some(HostInterface {
                    index: uplink.link.index,
                    link_layer: link_layer(&uplink.link)?,
                    mtu: uplink.link.mtu,
                    addresses: uplink.addresses.iter().map(IpNet::addr).collect(),
                    name: uplink.link.name,
                })
            })
            .collect();
        let changes = self.datapath()?.sync_uplinks(&interfaces)?;
        for (name, kind) in changes.attached {
            tracing::debug!(interface = name, ?kind, "put a program on the uplink");
        }
        for name in changes.detached {
            tracing::debug!(interface = name, "took the program off the uplink");
        }
        // One that is restricted to uplinks knows them by their indexes.
        for network in self.session.state.sound_networks()? {
            let entry = network_entry(&network, |name| {
                let interface = interfaces.iter().find(|there| there.name == name)?;
                Some(interface.index)
            });
            let known = self.datapath()?.networks.get(&network.number)?;
            if network.state == State::Active && known != Some(entry) {
                self.datapath()?.networks.insert(&network.number, &entry)?;
            }
        }
        self.follow_interfaces(&interfaces)?;
        let host = self.session.bpf_host;
        self.datapath()?.refresh_settings(&host)?;
        Ok(())
    }
}
