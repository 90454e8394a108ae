//! `monitor`: what is refused, and which flows come and go, while it happens.

mod programs;
mod rules;
mod view;

pub use view::{EventName, EventView};

use super::{Error, Host, naming::Naming};
use crate::model::EndpointId;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nucnet_common::abi::Event;
use programs::ProgramsReader;
use rules::RulesReader;
use std::{
    os::fd::BorrowedFd,
    thread,
    time::{Duration, Instant},
};
use view::{Clock, name};

/// How often a monitor says that it is still there, and looks whether the datapath is.
const TICK: Duration = Duration::from_secs(1);

/// How often a monitor looks for events, since programs wake nobody.
const LOOK: Duration = Duration::from_millis(20);

/// Most events that one call gives.
const BATCH: usize = 1024;

/// Reads events, of endpoints that come and go meanwhile, too, and over times at which nothing is
/// attached, by whichever datapath there is.
pub struct Monitor {
    host: Host,
    only: Option<EndpointId>,
    /// Whether the programs' debug output is wanted, too.
    debugs: bool,
    reader: Option<Reader>,
    stayed: Instant,
    naming: Naming,
}

/// Where events come from.
enum Reader {
    Programs(Box<ProgramsReader>),
    Rules(Box<RulesReader>),
}

impl Reader {
    /// Whether there is still something to read from. Says that the reader is there.
    fn stay(&mut self, host: &Host) -> Result<bool, Error> {
        match self {
            Self::Programs(reader) => reader.stay(host),
            Self::Rules(reader) => reader.stay(host),
        }
    }

    /// What is readable when there may be something.
    fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        match self {
            Self::Programs(reader) => reader.descriptors(),
            Self::Rules(reader) => reader.descriptors(),
        }
    }

    /// Adds the events that there are.
    fn read(&mut self, host: &Host, events: &mut Vec<Event>) -> Result<(), Error> {
        match self {
            Self::Programs(reader) => {
                reader.read(events);
                Ok(())
            }
            Self::Rules(reader) => reader.read(host, events),
        }
    }

    /// How many were lost, each time that some were; 0: nobody knows.
    fn take_lost(&mut self) -> Result<Vec<u64>, Error> {
        match self {
            Self::Programs(reader) => reader.take_lost(),
            Self::Rules(reader) => Ok(reader.take_lost()),
        }
    }

    fn take_messages(&mut self) -> Vec<String> {
        match self {
            Self::Programs(reader) => reader.take_messages(),
            Self::Rules(_) => Vec::new(),
        }
    }
}

impl Host {
    /// Begins to read events: all, or those of one endpoint.
    ///
    /// # Errors
    /// Kind [`NotFound`](crate::Kind::NotFound): there is no such endpoint.
    /// [`Conflict`](crate::Kind::Conflict): as many monitors as may are running.
    pub fn monitor(&self, only: Option<EndpointId>) -> Result<Monitor, Error> {
        self.begin_monitor(only, false)
    }

    /// Begins to read all events, and what the programs themselves have to say about packets that
    /// they drop.
    ///
    /// # Errors
    /// [`Conflict`](crate::Kind::Conflict): another one does, or as many monitors as may are
    /// running. [`Unsupported`](crate::Kind::Unsupported): there are no programs.
    pub fn monitor_debug(&self) -> Result<Monitor, Error> {
        self.begin_monitor(None, true)
    }

    fn begin_monitor(&self, only: Option<EndpointId>, debugs: bool) -> Result<Monitor, Error> {
        if let Some(id) = &only {
            self.read_endpoint(id)?;
        }
        let mut monitor = Monitor {
            host: self.clone(),
            only,
            debugs,
            reader: None,
            stayed: Instant::now(),
            naming: Naming::default(),
        };
        monitor.find_reader()?;
        Ok(monitor)
    }
}

impl Monitor {
    /// Whether there is a datapath to read from.
    pub fn is_reading(&self) -> bool {
        self.reader.is_some()
    }

    /// The events that there are, or that come within `patience`: none, if none does. Whoever
    /// does not call it every few seconds misses events.
    pub fn wait(&mut self, patience: Duration) -> Result<Vec<EventView>, Error> {
        if self.reader.is_none() || self.stayed.elapsed() >= TICK {
            self.find_reader()?;
        }
        let patience = patience.min(TICK);
        let Some(reader) = &mut self.reader else {
            thread::sleep(patience);
            return Ok(Vec::new());
        };
        let deadline = Instant::now() + patience;
        let mut events = Vec::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left.min(LOOK)).unwrap_or(PollTimeout::MAX);
            let descriptors = reader.descriptors().into_iter();
            let mut fds: Vec<_> = descriptors
                .map(|fd| PollFd::new(fd, PollFlags::POLLIN))
                .collect();
            // A signal ends one look early, which is as good as nothing having come.
            let is_something_there = poll(&mut fds, timeout).is_ok_and(|ready| ready > 0);
            drop(fds);
            reader.read(&self.host, &mut events)?;
            if is_something_there || !events.is_empty() || left.is_zero() {
                break;
            }
        }
        let (lost, messages) = (reader.take_lost()?, reader.take_messages());
        let clock = Clock::now()?;
        let mut views = Vec::new();
        for event in events {
            let view = self.view(&event, &clock)?;
            if self.only.is_none() || self.only == view.endpoint {
                views.push(view);
            }
        }
        for count in lost {
            let mut view = EventView::bare(EventName::Lost, &clock);
            view.suppressed = count;
            views.push(view);
        }
        for message in messages {
            let mut view = EventView::bare(EventName::Debug, &clock);
            view.message = Some(message);
            views.push(view);
        }
        Ok(views)
    }

    fn find_reader(&mut self) -> Result<(), Error> {
        self.stayed = Instant::now();
        if let Some(reader) = &mut self.reader {
            if reader.stay(&self.host)? {
                return Ok(());
            }
            self.reader = None;
        }
        if self.host.is_by_rules()? {
            if self.debugs {
                return Err(Error::OtherDatapath("monitor --debug"));
            }
            let reader = RulesReader::open()?;
            self.reader = Some(Reader::Rules(Box::new(reader)));
        } else if let Some(datapath) = self.host.open_datapath()? {
            let reader = ProgramsReader::open(datapath, self.debugs)?;
            self.reader = Some(Reader::Programs(Box::new(reader)));
        }
        Ok(())
    }

    fn view(&mut self, event: &Event, clock: &Clock) -> Result<EventView, Error> {
        let endpoint = self.naming.endpoint(&self.host, event.endpoint)?;
        let rule = match name(event) {
            EventName::Denied => self.naming.rule(&self.host, event.policy, event.rule)?,
            _ => None,
        };
        Ok(EventView::of(event, endpoint, rule, clock))
    }
}
