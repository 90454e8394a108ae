//! What the kernel knows about the programs.

use std::{
    os::fd::{AsFd, OwnedFd},
    path::Path,
    time::Duration,
};

use aya::{
    programs::{ProgramInfo, SchedClassifier, TcAttachType},
    sys::{Stats, SyscallError, enable_stats},
};
use nix::libc;
use nucnet_common::abi::{map, size};

use super::{
    AttachKind, BpfError, Datapath,
    bind::BIND_HOOKS,
    error::errno,
    hook::Record,
    links::open_link,
    object::program_error,
    pins::{Pins, file_error, names},
    sys::{self, LinkTarget},
};

/// A pinned program, as the kernel describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProgramStatus {
    /// Its name.
    pub name: String,
    /// The kernel's number for it.
    pub id: u32,
    /// Bytes of machine code; 0: it is interpreted.
    pub machine_code: u32,
    /// Instructions that the verifier walked through, of a million at most. Linux 5.16.
    pub verified_instructions: Option<u32>,
    /// How often it ran while [`RunTimeStatistics`] were on.
    pub run_count: u64,
    /// How long all these runs took.
    pub run_time: Duration,
}

/// Lets the kernel count and time the runs of all programs of the machine, which costs some tens
/// of nanoseconds a run, until it is dropped.
#[derive(Debug)]
pub struct RunTimeStatistics(#[expect(dead_code, reason = "held for its drop")] OwnedFd);

impl RunTimeStatistics {
    /// Switches them on. Linux 5.8.
    ///
    /// # Errors
    /// Those of the kernel.
    pub fn enable() -> Result<Self, SyscallError> {
        enable_stats(Stats::RunTime).map(Self)
    }
}

/// What is pinned: of which version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pinned {
    /// ABI version of the maps.
    pub abi: u32,
    /// SHA-256 of the object whose programs are pinned, hexadecimal.
    pub object: String,
}

/// A program on an interface of the host, as noted under `links/`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attachment {
    /// The program's name.
    pub program: &'static str,
    /// Name of the interface when it was noted.
    pub interface: String,
    /// Index of the interface; 0: it is gone.
    pub index: u32,
    /// How it sits there.
    pub kind: AttachKind,
    /// The kernel's number for the program that a link has; none: a filter, which has to be
    /// looked for on the interface itself.
    pub linked: Option<u32>,
}

/// How full a map is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MapFill {
    /// Its name.
    pub name: &'static str,
    /// Entries there are; none: an array, which is always full.
    pub entries: Option<usize>,
    /// Entries it takes.
    pub capacity: usize,
}

/// A program on a TCX hook.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OnHook {
    /// The kernel's number for it.
    pub id: u32,
    /// Its name.
    pub name: String,
}

/// The programs at the TCX ingress of an interface, in the order in which packets meet them.
/// None: this kernel has no such hook (Linux 6.6).
///
/// # Errors
/// Those of the kernel.
pub fn tcx_ingress(interface: &str) -> Result<Option<Vec<OnHook>>, BpfError> {
    let programs = match SchedClassifier::query_tcx(interface, TcAttachType::Ingress) {
        Ok((_, programs)) => programs,
        Err(error) if matches!(errno(&error), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {
            return Ok(None);
        }
        Err(error) => {
            return Err(BpfError::Attach {
                program: "programs at the TCX ingress",
                target: interface.to_owned(),
                action: "list",
                source: Box::new(error.into()),
            });
        }
    };
    let on_hook = programs.iter().map(|info| OnHook {
        id: info.id(),
        name: info.name_as_str().unwrap_or_default().to_owned(),
    });
    Ok(Some(on_hook.collect()))
}

impl Datapath {
    /// What is pinned under `bpffs`; `None`: nothing, or only the remains of a crash.
    pub fn pinned(bpffs: &Path) -> Result<Option<Pinned>, BpfError> {
        let version = Pins::at(bpffs).version()?;
        Ok(version.map(|version| Pinned {
            abi: version.abi,
            object: version.object,
        }))
    }

    /// What is noted as attached to interfaces of the host.
    pub fn attachments(&self) -> Result<Vec<Attachment>, BpfError> {
        self.recorded(|hook, record| {
            let (kind, index, linked) = match record {
                Record::Tcx { index, program, .. } => (AttachKind::Tcx, index, Some(program)),
                Record::Clsact { index, .. } => (AttachKind::Clsact, index, None),
            };
            Attachment {
                program: hook.program,
                interface: hook.interface,
                index,
                kind,
                linked,
            }
        })
    }

    /// The bind hooks that are on no cgroup.
    pub fn missing_bind_hooks(&self) -> Result<Vec<&'static str>, BpfError> {
        let mut missing = Vec::new();
        for (name, _) in BIND_HOOKS {
            let pin = self.pins.links().join(name);
            let target = match open_link(&pin)? {
                Some(link) => {
                    sys::link_info(link.as_fd())
                        .map_err(file_error(&pin, "read"))?
                        .target
                }
                None => LinkTarget::Other,
            };
            if !matches!(target, LinkTarget::Cgroup(id) if id != 0) {
                missing.push(name);
            }
        }
        Ok(missing)
    }

    /// How full each map is. The kernel keeps no count: they are walked through, which takes
    /// some milliseconds for a full one.
    pub fn fill(&self) -> Result<Vec<MapFill>, BpfError> {
        let counted = |name, entries, capacity| MapFill {
            name,
            entries: Some(entries),
            capacity,
        };
        let array = |name, capacity| MapFill {
            name,
            entries: None,
            capacity,
        };
        Ok(vec![
            array(map::SETTINGS, 1),
            counted(map::NETWORKS, self.networks.count()?, size::NETWORKS),
            counted(map::ENDPOINTS, self.endpoints.count()?, size::ENDPOINTS),
            counted(map::GUESTS, self.guests.count()?, size::GUESTS),
            counted(map::ADDRESSES, self.addresses.count()?, size::ADDRESSES),
            counted(map::PUBLISHES, self.publishes.count()?, size::PUBLISHES),
            counted(map::HAIRPINS, self.hairpins.count()?, size::PUBLISHES),
            counted(map::MAPPINGS, self.mappings.count()?, size::MAPPINGS),
            counted(map::SNATS, self.snats.count()?, size::SNATS),
            counted(
                map::MAPPING_COUNTS,
                self.mapping_counts.count()?,
                size::MAPPINGS,
            ),
            counted(map::FLOWS, self.flows.count()?, size::FLOWS),
            counted(map::OUTSIDE, self.outside.count()?, size::OUTSIDE),
            counted(map::BINDINGS, self.bindings.count()?, size::BINDINGS),
            array(map::SLOTS, size::SLOTS),
            counted(map::USAGE, self.usage.count()?, size::ENDPOINTS),
            counted(map::UPLINKS, self.uplinks.count()?, size::UPLINKS),
            counted(map::DROPS, self.drops.count()?, size::DROPS),
            counted(
                map::POLICY_CIDRS,
                self.policy_cidrs.count()?,
                size::POLICY_CIDRS,
            ),
            counted(
                map::POLICY_PORTS,
                self.policy_ports.count()?,
                size::POLICY_PORTS,
            ),
            counted(
                map::EVENT_LIMITS,
                self.event_limits.count()?,
                size::ENDPOINTS,
            ),
        ])
    }

    /// The pinned programs.
    pub fn programs(&self) -> Result<Vec<ProgramStatus>, BpfError> {
        names(&self.pins.programs())?
            .into_iter()
            .map(|name| {
                let info = ProgramInfo::from_pin(self.pins.program(&name))
                    .map_err(|source| program_error(&name, "opened", source))?;
                Ok(ProgramStatus {
                    name,
                    id: info.id(),
                    machine_code: info.size_jitted(),
                    verified_instructions: info.verified_instruction_count(),
                    run_count: info.run_count(),
                    run_time: info.run_time(),
                })
            })
            .collect()
    }
}
