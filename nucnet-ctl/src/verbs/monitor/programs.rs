//! What programs tell monitors: a ring of events, and one of lines for who debugs.

use super::{BATCH, Error, Host};
use crate::kernel::bpf::{Datapath, EventReader, LogReader};
use nucnet_common::abi::Event;
use std::os::fd::{AsFd, BorrowedFd};

/// Reads what the programs write.
pub(super) struct ProgramsReader {
    events: EventReader,
    log: Option<LogReader>,
}

impl ProgramsReader {
    pub(super) fn open(mut datapath: Datapath, debugs: bool) -> Result<Self, Error> {
        let log = match debugs {
            true => Some(datapath.read_log()?),
            false => None,
        };
        let events = datapath.read_events()?;
        Ok(Self { events, log })
    }

    pub(super) fn stay(&mut self, host: &Host) -> Result<bool, Error> {
        // `down` takes the pins away; what comes after it has other maps.
        if Datapath::pinned(&host.options.bpffs)?.is_none() {
            return Ok(false);
        }
        let keeps_log = match &mut self.log {
            Some(log) => log.stay()?,
            None => true,
        };
        Ok(keeps_log && self.events.stay()?)
    }

    pub(super) fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        let log = self.log.as_ref().map(AsFd::as_fd);
        [self.events.as_fd()].into_iter().chain(log).collect()
    }

    pub(super) fn read(&mut self, events: &mut Vec<Event>) {
        while events.len() < BATCH
            && let Some(event) = self.events.read()
        {
            events.push(event);
        }
    }

    pub(super) fn take_lost(&mut self) -> Result<Vec<u64>, Error> {
        let lost = self.events.take_lost()?;
        Ok(if lost > 0 { vec![lost] } else { Vec::new() })
    }

    pub(super) fn take_messages(&mut self) -> Vec<String> {
        let log = self.log.as_mut();
        log.map(LogReader::read).unwrap_or_default()
    }
}
