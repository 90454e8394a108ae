//! What a call that is about many endpoints finds out, or puts right, once for all of them: only it
//! changes the host meanwhile.

use super::{Error, host::Session};
use crate::kernel::{bpf::Datapath, netlink::LinkAddress};
use std::{
    cell::{Cell, OnceCell, RefCell},
    fmt,
};

/// What holds since an earlier endpoint of this call was there.
#[derive(Default)]
pub(super) struct Settled {
    /// Opened, with programs on all that they belong on.
    datapath: RefCell<Option<Datapath>>,
    /// The number of a network that is all there.
    network: Cell<Option<u32>>,
    addresses: OnceCell<Vec<LinkAddress>>,
}

impl fmt::Debug for Settled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settled")
            .field("network", &self.network)
            .finish_non_exhaustive()
    }
}

impl Settled {
    /// Notes what an endpoint that is there now has left in order.
    pub(super) fn note(&self, datapath: Option<Datapath>, network: u32) {
        self.datapath.replace(datapath);
        self.network.set(Some(network));
    }

    /// The datapath, for the next endpoint.
    pub(super) fn take_datapath(&self) -> Option<Datapath> {
        self.datapath.take()
    }

    /// Whether the network of that number is all there.
    pub(super) fn has_network(&self, number: u32) -> bool {
        self.network.get() == Some(number)
    }
}

impl Session {
    /// The host's own addresses when this call began.
    pub(super) fn addresses_of_host(&self) -> Result<&[LinkAddress], Error> {
        if let Some(addresses) = self.settled.addresses.get() {
            return Ok(addresses);
        }
        let addresses = self.netlink.addresses()?;
        Ok(self.settled.addresses.get_or_init(|| addresses))
    }
}
