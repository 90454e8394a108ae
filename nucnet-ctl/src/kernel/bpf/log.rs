//! The programs' own debug output, which comes by aya-log.

use std::{
    os::fd::{AsFd, BorrowedFd},
    sync::{Arc, Mutex, PoisonError},
};

use aya::programs::ProgramInfo;
use aya_log::EbpfLogger;
use log::{Log, Metadata, Record};
use nucnet_common::abi::{program, size};

use super::{BpfError, Datapath, object::program_error, reader::Claim};

/// The reader of the programs' debug output. Nobody else reads it until the value goes.
pub struct LogReader {
    claim: Claim,
    logger: EbpfLogger<Arc<Lines>>,
    lines: Arc<Lines>,
}

/// Lines that were read and not yet asked for.
#[derive(Default)]
struct Lines(Mutex<Vec<String>>);

impl Lines {
    fn take(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        lines.push(record.args().to_string());
    }

    fn flush(&self) {}
}

impl Datapath {
    /// Begins to read what the programs write for who debugs them. What is left from before is
    /// thrown away.
    ///
    /// # Errors
    /// [`BpfError::LogBusy`]: somebody reads it.
    pub fn read_log(&self) -> Result<LogReader, BpfError> {
        let busy = |holders| BpfError::LogBusy { holders };
        let rings = size::MONITORS..size::READERS;
        let (claim, (logger, lines)) = Claim::take(&self.pins, rings, busy, |_, _| {
            // Every program writes to the same ring.
            let name = program::FROM_ENDPOINT;
            let info = ProgramInfo::from_pin(self.pins.program(name))
                .map_err(|source| program_error(name, "opened", source))?;
            let lines = Arc::new(Lines::default());
            let mut logger = EbpfLogger::init_from_id_with_logger(info.id(), Arc::clone(&lines))
                .map_err(|source| BpfError::Log {
                    source: Box::new(source),
                })?;
            logger.flush();
            lines.take();
            Ok((logger, lines))
        })?;
        Ok(LogReader {
            claim,
            logger,
            lines,
        })
    }
}

impl LogReader {
    /// The lines that there are.
    pub fn read(&mut self) -> Vec<String> {
        self.logger.flush();
        self.lines.take()
    }

    /// As [`EventReader::stay`](super::EventReader::stay).
    ///
    /// # Errors
    /// Those of the maps.
    pub fn stay(&mut self) -> Result<bool, BpfError> {
        self.claim.stay()
    }
}

impl AsFd for LogReader {
    /// Readable when there is something in the ring.
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.logger.as_fd()
    }
}
