//! What the kernel knows about the programs.

use std::{os::fd::OwnedFd, time::Duration};

use aya::{
    programs::ProgramInfo,
    sys::{Stats, SyscallError, enable_stats},
};

use super::{BpfError, Datapath, object::program_error, pins::names};

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

impl Datapath {
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
