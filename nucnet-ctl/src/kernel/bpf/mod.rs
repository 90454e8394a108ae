//! The BPF side: the embedded object, its pins, what is attached where, and the maps.
//!
//! Programs and maps live in the kernel, held by pins ([`pins`]); [`Datapath`] opens them. There
//! is no daemon. Interfaces and sysctls are those of the calling thread's network namespace,
//! which must be the host's.

mod adopt;
mod attach;
mod bind;
mod clsact;
mod dry_run;
mod endpoint;
mod error;
mod events;
mod flows;
mod guest;
mod hook;
mod links;
mod log;
mod mapping;
mod object;
mod pins;
mod publishes;
mod reader;
mod settings;
mod status;
mod sys;
mod table;
mod uplinks;

use std::{
    fmt,
    path::{Path, PathBuf},
};

use aya::programs::Program;
use aya_obj::generated::BPF_F_LOCK;
use nucnet_common::abi::{self, map, size};

use self::pins::{
    Pins, Version, aside, before_change, file_error, names, remove, remove_directory, rename,
};
pub use self::{
    adopt::Adoption,
    attach::{AttachKind, LOOPBACK},
    bind::cgroup_root,
    dry_run::DryRun,
    endpoint::Purged,
    error::{AttachCause, BpfError, DirectoryProblem, Reasons},
    events::{EventReader, decode},
    log::LogReader,
    mapping::MappingEntries,
    object::{OBJECT, OBJECT_HASH, load_unpinned},
    pins::is_place_for_pins,
    reader::monotonic,
    settings::{Host, HostPorts},
    status::{Attachment, MapFill, OnHook, Pinned, ProgramStatus, RunTimeStatistics, tcx_ingress},
    table::{Cells, Drops, MappingCounts, Prefix, Table},
    uplinks::{HostInterface, LinkLayer, UplinkChanges},
};

/// The datapath of one host: pinned maps and programs, and what is attached.
pub struct Datapath {
    pins: Pins,
    /// What the control plane tells the programs.
    settings: Cells<abi::Settings>,
    /// What networks chose, by their numbers.
    pub networks: Table<u32, abi::Network>,
    /// Endpoints by the index of their host side interface.
    pub endpoints: Table<u32, abi::Endpoint>,
    /// Guests of microVMs by the indexes of their slots' interfaces.
    pub guests: Table<u32, abi::Guest>,
    /// Who has an address.
    pub addresses: Table<abi::Address, abi::Owner>,
    /// Published ports.
    pub publishes: Table<Prefix<abi::PublishKey>, abi::Publish>,
    /// Ports of hairpins.
    pub hairpins: Table<Prefix<abi::PublishKey>, abi::Publish>,
    /// Static mappings by their numbers.
    pub mappings: Table<u32, abi::StaticMapping>,
    /// Sources of snat mappings.
    pub snats: Table<Prefix<abi::SnatKey>, abi::Snat>,
    /// What came by each mapping.
    pub mapping_counts: MappingCounts,
    /// Flows, as their endpoints see them.
    pub flows: Table<abi::FlowKey, abi::Flow>,
    /// Flows, as the outside sees them.
    pub outside: Table<abi::OutsideKey, abi::FlowKey>,
    /// Endpoint-independent bindings.
    pub bindings: Table<abi::FlowKey, abi::Binding>,
    /// Places in the table of flows.
    pub slots: Cells<abi::Slot>,
    /// What each endpoint uses, by its number.
    pub usage: Table<u32, abi::Usage>,
    /// Host interfaces that nucnet's programs sit on, by index. [`Datapath::sync_uplinks`]
    /// writes it.
    pub uplinks: Table<u32, abi::Uplink>,
    /// What was dropped, and why.
    pub drops: Drops,
    /// Destinations of policies.
    pub policy_cidrs: Table<Prefix<abi::PolicyCidrKey>, abi::PolicyClass>,
    /// Ports of policies.
    pub policy_ports: Table<Prefix<abi::PolicyPortKey>, abi::PolicyRule>,
    /// What each endpoint has caused of late, by its number.
    event_limits: Table<u32, abi::EventLimit>,
}

/// Where a datapath comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// It was there.
    Found,
    /// This call has loaded it.
    Loaded,
}

impl fmt::Debug for Datapath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Datapath")
            .field("bpffs", &self.bpffs())
            .finish_non_exhaustive()
    }
}

impl Datapath {
    /// Opens what is pinned under `bpffs`; if nothing is, loads the embedded object and pins
    /// its maps and programs; if another object of the same ABI is, loads the embedded one on
    /// the pinned maps and exchanges the programs where they are attached, without a gap.
    ///
    /// The directory is made if its parent is on a BPF filesystem.
    ///
    /// # Errors
    /// [`Kind::Unsupported`](crate::model::Kind::Unsupported): no BPF filesystem, no privilege,
    /// a kernel that lacks something. [`Kind::Conflict`](crate::model::Kind::Conflict): the pins
    /// are those of another host or ABI.
    pub fn open_or_load(bpffs: &Path, host: &Host) -> Result<(Self, Origin), BpfError> {
        Self::go_on_or_load(None, bpffs, host)
    }

    /// The same for who has opened it already, if it was there; its maps are used on.
    pub fn go_on_or_load(
        opened: Option<Self>,
        bpffs: &Path,
        host: &Host,
    ) -> Result<(Self, Origin), BpfError> {
        let pins = Pins::prepare(bpffs)?;
        let mut origin = Origin::Found;
        if pins.version()?.as_ref() != Some(&Version::ours()) {
            let _lock = pins.lock()?;
            match pins.version()? {
                None => {
                    load(&pins, host).inspect_err(|_| {
                        // The error that led here is the one to report.
                        attach::remove_all(&pins);
                        let _ = remove_directory(bpffs);
                    })?;
                    origin = Origin::Loaded;
                }
                Some(version) if version.abi != abi::VERSION => {
                    return Err(BpfError::OtherAbi {
                        path: bpffs.into(),
                        found: format!("ABI version {}", version.abi),
                        wanted: abi::VERSION,
                    });
                }
                // Unless somebody else did it while this waited for the lock.
                Some(version) if version == Version::ours() => {}
                Some(_) => {
                    Self::open(pins.clone(), host)?.upgrade()?;
                }
            }
        }
        // Other programs would have been loaded on the same maps.
        let same = opened.filter(|opened| origin == Origin::Found && opened.pins == pins);
        let datapath = match same {
            Some(datapath) => datapath,
            None => Self::open(pins, host)?,
        };
        Ok((datapath, origin))
    }

    /// Opens what is pinned under `bpffs`. `None`: nothing is.
    ///
    /// # Errors
    /// As [`Datapath::open_or_load`]. Another object of the same ABI is none.
    pub fn open_existing(bpffs: &Path, host: &Host) -> Result<Option<Self>, BpfError> {
        let pins = Pins::at(bpffs);
        match pins.version()? {
            None => Ok(None),
            Some(version) if version.abi != abi::VERSION => Err(BpfError::OtherAbi {
                path: bpffs.into(),
                found: format!("ABI version {}", version.abi),
                wanted: abi::VERSION,
            }),
            Some(_) => Self::open(pins, host).map(Some),
        }
    }

    fn open(pins: Pins, host: &Host) -> Result<Self, BpfError> {
        let datapath = Self::open_maps(pins)?;
        let found = datapath.settings()?.netns_cookie;
        // Before Linux 5.14 nobody can tell the cookie.
        if found != host.netns_cookie && found != 0 && host.netns_cookie != 0 {
            return Err(BpfError::OtherHost {
                path: datapath.pins.root().into(),
                found,
                wanted: host.netns_cookie,
            });
        }
        Ok(datapath)
    }

    fn open_maps(pins: Pins) -> Result<Self, BpfError> {
        let at = |name| (pins.map(name), name);
        Ok(Self {
            settings: Cells::open(at(map::SETTINGS), 1, 0)?,
            networks: Table::open(at(map::NETWORKS), size::NETWORKS)?,
            endpoints: Table::open(at(map::ENDPOINTS), size::ENDPOINTS)?,
            guests: Table::open(at(map::GUESTS), size::GUESTS)?,
            addresses: Table::open(at(map::ADDRESSES), size::ADDRESSES)?,
            publishes: Table::open(at(map::PUBLISHES), size::PUBLISHES)?,
            hairpins: Table::open(at(map::HAIRPINS), size::PUBLISHES)?,
            mappings: Table::open(at(map::MAPPINGS), size::MAPPINGS)?,
            snats: Table::open(at(map::SNATS), size::SNATS)?,
            mapping_counts: MappingCounts::open(at(map::MAPPING_COUNTS), size::MAPPINGS)?,
            flows: Table::open(at(map::FLOWS), size::FLOWS)?,
            outside: Table::open(at(map::OUTSIDE), size::OUTSIDE)?,
            bindings: Table::open(at(map::BINDINGS), size::BINDINGS)?,
            slots: Cells::open(at(map::SLOTS), size::SLOTS, BPF_F_LOCK.into())?,
            usage: Table::open(at(map::USAGE), size::ENDPOINTS)?,
            uplinks: Table::open(at(map::UPLINKS), size::UPLINKS)?,
            drops: Drops::open(at(map::DROPS), size::DROPS)?,
            policy_cidrs: Table::open(at(map::POLICY_CIDRS), size::POLICY_CIDRS)?,
            policy_ports: Table::open(at(map::POLICY_PORTS), size::POLICY_PORTS)?,
            event_limits: Table::open(at(map::EVENT_LIMITS), size::ENDPOINTS)?,
            pins,
        })
    }

    /// The directory of pins.
    pub fn bpffs(&self) -> &Path {
        self.pins.root()
    }

    /// Exchanges the programs for the embedded object's. Each step can be repeated, and the
    /// version is noted last.
    fn upgrade(&mut self) -> Result<(), BpfError> {
        let mut object = object::load(Some(&self.pins.maps()))?;
        for (name, program) in object.programs_mut() {
            let pin = self.pins.program(name);
            let new = aside(&pin);
            remove(&new)?;
            pin_program(name, program, &new)?;
            rename(&new, &pin).map_err(file_error(&pin, "replace"))?;
        }
        self.reattach()?;
        let wanted: Vec<&str> = object.programs().map(|(name, _)| name).collect();
        for name in names(&self.pins.programs())? {
            if !wanted.contains(&name.as_str()) {
                remove(&self.pins.program(&name))?;
            }
        }
        self.pins.set_version(&Version::ours())
    }
}

/// Loads the object and pins it all. The caller holds the lock, and there is no version.
fn load(pins: &Pins, host: &Host) -> Result<(), BpfError> {
    // Remains of a crash.
    let mut problems = attach::remove_all(pins);
    if let Some(problem) = problems.pop() {
        return Err(problem);
    }
    pins.make_directories()?;
    let mut object = object::load(Some(&pins.maps()))?;
    for (name, program) in object.programs_mut() {
        pin_program(name, program, &pins.program(name))?;
    }
    let mut datapath = Datapath::open_maps(pins.clone())?;
    datapath.refresh_settings(host)?;
    pins.set_version(&Version::ours())
}

fn pin_program(name: &str, program: &mut Program, path: &Path) -> Result<(), BpfError> {
    let pin_error = |source| BpfError::Pin {
        path: PathBuf::from(path),
        source: Box::new(source),
    };
    before_change().map_err(file_error(path, "pin"))?;
    match program {
        Program::SchedClassifier(program) => program.pin(path).map_err(pin_error),
        Program::CgroupSockAddr(program) => program.pin(path).map_err(pin_error),
        _ => Err(BpfError::NoProgram { name: name.into() }),
    }
}
