//! The host: where its state and its datapath are, and access to both.

use super::{Error, netfilter, settled::Settled, step::endpoint_alias, switch};
use crate::{
    kernel::{
        boot,
        bpf::{self, BpfError, Datapath},
        netfilter::Changed,
        netlink::Netlink,
        netns::{self, NetnsFd},
        store,
    },
    model::{
        EndpointId, Kind,
        record::{DatapathKind, DatapathRecord, EndpointRecord, HostRecord, Namespace, Numbers},
    },
};
use std::{
    cell::RefCell,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

/// Which datapath is wanted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DatapathChoice {
    /// The best that works.
    #[default]
    Auto,
    /// eBPF.
    Ebpf,
    /// iptables, where eBPF cannot be used.
    Iptables,
}

/// Where a host keeps what, and how long it waits.
#[derive(Clone, Debug)]
pub struct Options {
    /// The state.
    pub state_dir: PathBuf,
    /// The pins of programs and maps.
    pub bpffs: PathBuf,
    /// The cgroup whose processes reach publishes by the host's own addresses; none: the root
    /// of the cgroup2 hierarchy.
    pub cgroup: Option<PathBuf>,
    /// The datapath.
    pub datapath: DatapathChoice,
    /// How long to wait for other processes that change the same host.
    pub patience: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            state_dir: "/run/nucnet".into(),
            bpffs: "/sys/fs/bpf/nucnet".into(),
            cgroup: None,
            datapath: DatapathChoice::Auto,
            patience: Duration::from_secs(60),
        }
    }
}

/// A host: the network namespace of the calling thread, with its state and its datapath.
#[derive(Clone, Debug)]
pub struct Host {
    pub(super) options: Options,
}

/// Which namespace it is, as records keep it.
pub(super) fn namespace(netns: &NetnsFd) -> Result<Namespace, Error> {
    let id = netns.id();
    Ok(Namespace {
        device: id.dev,
        inode: id.inode,
        cookie: netns.cookie()?,
    })
}

impl Host {
    /// The host of those options.
    pub fn new(mut options: Options) -> Result<Self, Error> {
        // In one form, because they are recorded and compared.
        for path in [&mut options.bpffs, &mut options.state_dir] {
            *path = std::path::absolute(&*path).unwrap_or_else(|_| path.clone());
            *path = path.components().collect();
        }
        Ok(Self { options })
    }

    /// The options.
    pub fn options(&self) -> &Options {
        &self.options
    }

    /// The state for reading, if there is any of this boot.
    pub(super) fn read(&self) -> Result<Option<store::Store>, Error> {
        let Some(store) = store::Store::open(&self.options.state_dir)? else {
            return Ok(None);
        };
        match store.host()? {
            Some(record) if record.boot == boot::id()? => {
                self.check(&record)?;
                Ok(Some(store))
            }
            _ => Ok(None),
        }
    }

    /// An endpoint that must be there, and the state that says so.
    pub(super) fn read_endpoint(
        &self,
        id: &EndpointId,
    ) -> Result<(store::Store, EndpointRecord), Error> {
        let not_found = || Error::NoEndpoint(id.clone());
        let store = self.read()?.ok_or_else(not_found)?;
        let record = store.endpoint(id)?.ok_or_else(not_found)?;
        Ok((store, record))
    }

    /// The datapath, if it is loaded.
    pub(super) fn open_datapath(&self) -> Result<Option<Datapath>, BpfError> {
        Datapath::open_existing(&self.options.bpffs, &bpf::Host::current()?)
    }

    /// Whether rules carry packets.
    pub(super) fn is_by_rules(&self) -> Result<bool, Error> {
        let carrier = self.carrier()?;
        Ok(carrier.is_some_and(|carrier| carrier.kind == DatapathKind::Iptables))
    }

    /// What carries packets, as is on record.
    pub(super) fn carrier(&self) -> Result<Option<DatapathRecord>, Error> {
        let record = self.read()?.map(|store| store.host()).transpose()?;
        Ok(record.flatten().and_then(|record| record.datapath))
    }

    /// Access for changing; the state directory is made if there is none.
    pub(super) fn open(&self) -> Result<Session, Error> {
        self.check_capabilities()?;
        let netlink = Netlink::open()?;
        let state = store::Locked::open(&self.options.state_dir, self.options.patience)?;
        self.session(state, netlink)
    }

    /// The same for state that exists.
    pub(super) fn open_existing(&self) -> Result<Option<Session>, Error> {
        self.check_capabilities()?;
        let path = &self.options.state_dir;
        match store::Locked::open_existing(path, self.options.patience)? {
            Some(state) => Ok(Some(self.session(state, Netlink::open()?)?)),
            None => Ok(None),
        }
    }

    fn session(&self, state: store::Locked, netlink: Netlink) -> Result<Session, Error> {
        let record = match state.sound_host()? {
            Some(record) if record.boot == boot::id()? => {
                self.check(&record)?;
                // What it is about goes on without.
                if let Err(error) = state.give_back() {
                    tracing::warn!(
                        error = &error as &dyn std::error::Error,
                        "a sysctl of the host that a call which died had changed is not given back"
                    );
                }
                Some(record)
            }
            Some(_) => {
                tracing::info!("cleared the state of an earlier boot");
                state.clear()?;
                None
            }
            None => None,
        };
        let fresh = record.is_none();
        let record = match record {
            Some(record) => record,
            None => self.new_record(&state)?,
        };
        let datapath = record.datapath.as_ref();
        let changed = datapath.map(|datapath| datapath.sysctls.clone());
        let changed = changed.unwrap_or_default();
        Ok(Session {
            host: self.clone(),
            state,
            sysctls: RefCell::new(changed),
            unloadable: None,
            record,
            fresh,
            netlink,
            bpf_host: bpf::Host::current()?,
            settled: Settled::default(),
        })
    }

    fn new_record(&self, state: &store::Locked) -> Result<HostRecord, Error> {
        Ok(HostRecord {
            boot: boot::id()?,
            netns: namespace(&NetnsFd::current()?)?,
            bpffs: self.options.bpffs.clone(),
            next: numbers_after(state)?,
            datapath: None,
        })
    }

    /// Whether the state is that of this host and this directory of pins.
    fn check(&self, record: &HostRecord) -> Result<(), Error> {
        let path = || self.options.state_dir.clone();
        let here = namespace(&NetnsFd::current()?)?;
        if record.netns != here {
            return Err(Error::OtherHost {
                path: path(),
                found: record.netns,
                here,
            });
        }
        if record.bpffs != self.options.bpffs {
            let (found, here) = (record.bpffs.clone(), self.options.bpffs.clone());
            return Err(Error::OtherBpffs {
                path: path(),
                found,
                here,
            });
        }
        Ok(())
    }
}

/// Numbers that nothing here has, nor had: the first ones, unless the record of the host was lost.
fn numbers_after(state: &store::Locked) -> Result<Numbers, Error> {
    /// What may have come and gone since the records that are left were written.
    const GAP: u32 = 1 << 20;
    let (endpoints, networks) = (state.sound_endpoints()?, state.sound_networks()?);
    let mappings = state.sound_mappings()?;
    let lost = state.set_aside_hosts()?;
    if endpoints.is_empty() && networks.is_empty() && mappings.is_empty() && lost == 0 {
        return Ok(Numbers::default());
    }
    let gaps = GAP.saturating_mul(u32::try_from(lost.max(1)).unwrap_or(u32::MAX));
    let after = |largest: Option<u32>| largest.unwrap_or(0).max(gaps).saturating_add(GAP);
    let policies = || {
        let others = endpoints
            .iter()
            .filter_map(|endpoint| endpoint.other_policy.as_ref()?.numbers);
        endpoints
            .iter()
            .filter_map(|endpoint| endpoint.policy)
            .chain(others)
    };
    Ok(Numbers {
        endpoint: after(
            (endpoints.iter().map(|endpoint| endpoint.number))
                .chain(mappings.iter().map(|mapping| mapping.number))
                .max(),
        ),
        network: after(networks.iter().map(|network| network.number).max()),
        policy: after(policies().map(|numbers| numbers.policy).max()),
        class: after(policies().map(|numbers| numbers.first_class).max()),
    })
}

/// How long a namespace that nobody can reach by its old path may take to go.
const DYING: Duration = Duration::from_secs(1);

/// Whether an endpoint's namespace is not where it was found.
fn has_left(endpoint: &EndpointRecord) -> Result<bool, Error> {
    // Of a process that ends meanwhile, /proc says once that it may not be looked at.
    let opened = NetnsFd::open(&endpoint.netns).or_else(|_| NetnsFd::open(&endpoint.netns));
    match opened {
        Ok(netns) => Ok(namespace(&netns)? != endpoint.namespace),
        Err(netns::Error::NotFound { .. } | netns::Error::NotANetns { .. }) => Ok(true),
        // What cannot be seen is not known to be gone.
        Err(error) => {
            tracing::warn!(
                endpoint = %endpoint.id,
                error = &error as &dyn std::error::Error,
                "cannot see whether its network namespace is still there"
            );
            Ok(false)
        }
    }
}

/// A host that only this process changes.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) host: Host,
    pub(super) state: store::Locked,
    pub(super) record: HostRecord,
    /// What was changed of the host's own settings; becomes part of the record.
    pub(super) sysctls: RefCell<Changed>,
    /// Why the programs cannot be loaded here.
    pub(super) unloadable: Option<String>,
    /// There was no state before.
    pub(super) fresh: bool,
    pub(super) netlink: Netlink,
    pub(super) bpf_host: bpf::Host,
    pub(super) settled: Settled,
}

impl Session {
    /// After a failure: leaves no state where there was none.
    pub(super) fn abandon_if_fresh(self) {
        if !self.fresh || !self.state.is_empty().unwrap_or(false) {
            return;
        }
        if let Err(error) = self.state.remove_all() {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "cannot remove the state directory"
            );
        }
    }

    /// Writes the record of the host.
    pub(super) fn put_host(&self) -> Result<(), Error> {
        let mut record = self.record.clone();
        if let Some(datapath) = &mut record.datapath {
            datapath.sysctls.clone_from(&self.sysctls.borrow());
        }
        Ok(self.state.put_host(&record)?)
    }

    /// What carries packets.
    pub(super) fn kind(&self) -> DatapathKind {
        match &self.record.datapath {
            Some(datapath) => datapath.kind,
            None => self.coming_kind(),
        }
    }

    /// What is going to carry packets once the verb has settled it.
    pub(super) fn coming_kind(&self) -> DatapathKind {
        let settled = self.record.datapath.as_ref().map(|datapath| datapath.kind);
        match (self.host.options.datapath, &self.unloadable) {
            (DatapathChoice::Iptables, _) => DatapathKind::Iptables,
            (DatapathChoice::Ebpf, _) => DatapathKind::Ebpf,
            (DatapathChoice::Auto, Some(_)) => DatapathKind::Iptables,
            (DatapathChoice::Auto, None) => settled.unwrap_or_default(),
        }
    }

    /// Whether there is anything to carry packets for.
    pub(super) fn is_in_use(&self) -> Result<bool, Error> {
        let networks = self.state.sound_networks()?;
        Ok(!networks.is_empty() || !self.state.sound_mappings()?.is_empty())
    }

    /// Settles what carries packets, before anything does. Where another datapath is asked for
    /// than the one in use, everything moves to it.
    pub(super) fn settle_datapath(&mut self) -> Result<(), Error> {
        let is_in_use = self.is_in_use()?;
        if is_in_use && self.record.datapath.is_none() {
            // It was made before there was a choice.
            self.note_datapath(DatapathKind::Ebpf)?;
        }
        let coming = self.coming_kind();
        match &self.record.datapath {
            Some(datapath) if is_in_use && datapath.kind == coming && !datapath.moving => Ok(()),
            Some(_) if is_in_use => switch::to(self, coming),
            _ => {
                if coming == DatapathKind::Ebpf {
                    netfilter::leave(self)?;
                }
                self.note_datapath(coming)
            }
        }
    }

    /// Whether a call that died was moving everything to the other datapath.
    pub(super) fn is_moving(&self) -> bool {
        let datapath = self.record.datapath.as_ref();
        datapath.is_some_and(|datapath| datapath.moving)
    }

    /// Notes on record whether everything is moving to what carries packets.
    pub(super) fn note_moving(&mut self, moving: bool) -> Result<(), Error> {
        if let Some(datapath) = &mut self.record.datapath {
            datapath.moving = moving;
        }
        self.put_host()
    }

    /// Notes what carries packets from now on. What was changed of the host stays noted.
    pub(super) fn note_datapath(&mut self, kind: DatapathKind) -> Result<(), Error> {
        let backend = match kind {
            DatapathKind::Ebpf => None,
            DatapathKind::Iptables => Some(crate::kernel::netfilter::detect()?),
        };
        self.record.datapath = Some(DatapathRecord {
            kind,
            reason: self.unloadable.clone(),
            moving: false,
            backend,
            sysctls: Vec::new(),
        });
        Ok(())
    }

    /// Does what may take the first steps on this host. Where they fail because the programs
    /// cannot be loaded here, and nobody insists on them, rules carry packets.
    pub(super) fn with_fallback<T>(
        &mut self,
        mut verb: impl FnMut(&mut Self) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let may_choose = self.host.options.datapath == DatapathChoice::Auto && !self.is_in_use()?;
        match verb(self) {
            Err(Error::Bpf(error)) if may_choose && error.kind() == Kind::Unsupported => {
                if let Err(other) = crate::kernel::netfilter::detect() {
                    tracing::warn!(
                        error = &other as &dyn std::error::Error,
                        "the iptables datapath cannot be used either"
                    );
                    return Err(error.into());
                }
                let reason = super::chain(&error);
                tracing::warn!(
                    "programs cannot be loaded here, so iptables carries packets: {reason}"
                );
                self.unloadable = Some(reason);
                verb(self)
            }
            result => result,
        }
    }

    pub(super) fn bpffs(&self) -> &Path {
        &self.host.options.bpffs
    }

    /// Whether an endpoint can never pass packets again: its link is gone, and its namespace is
    /// not where it was found.
    pub(super) fn is_dead(&self, endpoint: &EndpointRecord) -> Result<bool, Error> {
        let alias = endpoint_alias(endpoint);
        let link = self.netlink.find_link(endpoint.host_ifname.as_str())?;
        if link.is_some_and(|link| link.has_alias(&alias)) {
            return Ok(false);
        }
        has_left(endpoint)
    }

    /// The same, with a little patience: the kernel takes the namespace of a container that has
    /// just ended apart in its own time, and its link only then.
    pub(super) fn is_dying(&self, endpoint: &EndpointRecord) -> Result<bool, Error> {
        let start = Instant::now();
        loop {
            if self.is_dead(endpoint)? {
                return Ok(true);
            }
            if start.elapsed() > DYING || !has_left(endpoint)? {
                return Ok(false);
            }
            thread::sleep(Duration::from_millis(1));
        }
    }

    /// The datapath, if it is loaded.
    pub(super) fn open_datapath(&self) -> Result<Option<Datapath>, BpfError> {
        Datapath::open_existing(self.bpffs(), &self.bpf_host)
    }

    /// The cgroup for the bind hooks.
    pub(super) fn cgroup(&self) -> Result<PathBuf, Error> {
        match &self.host.options.cgroup {
            Some(cgroup) => Ok(cgroup.clone()),
            None => Ok(bpf::cgroup_root()?),
        }
    }
}
