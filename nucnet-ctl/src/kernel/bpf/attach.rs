//! Where the programs sit. Every function here can be repeated: what is there already stays,
//! what is wrong is put right.

use std::{
    io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use aya::programs::{
    SchedClassifier,
    links::{FdLink, LinkOrder},
    tc::TcAttachOptions,
};
use nix::{
    errno::Errno,
    libc,
    net::if_::{if_indextoname, if_nametoindex},
};
use nucnet_common::abi::{self, map, program};

use super::{
    Datapath, Table,
    bind::BIND_HOOKS,
    clsact::{self, Qdisc},
    error::{AttachCause, BpfError, errno},
    hook::{Hook, Record, clsact_text, read_record},
    links::{exchange, open_link, open_program, unlink},
    pins::{
        Pins, before_change, file_error, names, remove, remove_directory, rename, replace_text,
    },
    sys,
};

/// How a program sits on an interface.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AttachKind {
    /// A pinned TCX link (Linux 6.6).
    Tcx,
    /// A filter on the clsact queueing discipline.
    Clsact,
}

/// The index that the loopback interface has in every network namespace.
pub const LOOPBACK: u32 = 1;

impl Datapath {
    /// Puts `from_endpoint` on an endpoint's host side interface.
    pub fn attach_endpoint(&self, interface: &str) -> Result<(), BpfError> {
        self.filter(&Hook::new(program::FROM_ENDPOINT, interface))
    }

    /// Puts a program on an interface of the calling thread's network namespace by a filter, which
    /// goes with the interface and is noted nowhere.
    pub(super) fn filter(&self, hook: &Hook) -> Result<(), BpfError> {
        let index = index_of(hook)?;
        clsact::ensure_qdisc(index).map_err(hook.error("attach"))?;
        let program = open_program(&self.pins, hook.program)?;
        put_filter(hook, index, &program)
    }

    /// Takes `from_endpoint` off an interface: nothing that its endpoint sends passes any more.
    /// `false`: it was not there, or there is no such interface.
    pub fn detach_endpoint(&self, interface: &str) -> Result<bool, BpfError> {
        let hook = Hook::new(program::FROM_ENDPOINT, interface);
        match if_nametoindex(interface) {
            Ok(index) => clsact::detach(index, hook.direction()).map_err(hook.error("detach")),
            Err(Errno::ENODEV) => Ok(false),
            Err(errno) => Err(hook.error("detach")(io::Error::from(errno))),
        }
    }

    /// Puts `from_host` on the egress of a network's bridge.
    pub fn attach_bridge(&self, bridge: &str) -> Result<AttachKind, BpfError> {
        let hook = Hook::new(program::FROM_HOST, bridge);
        self.attach(&hook, index_of(&hook)?)
    }

    /// Takes `from_host` off a bridge; one that is gone is fine.
    pub fn detach_bridge(&self, bridge: &str) -> Result<(), BpfError> {
        detach(&self.pins, &Hook::new(program::FROM_HOST, bridge))
    }

    /// Puts `from_loopback` on the egress of the loopback interface.
    pub fn attach_loopback(&self) -> Result<AttachKind, BpfError> {
        let name = interface_name(LOOPBACK).map_err(|source| BpfError::Attach {
            program: program::FROM_LOOPBACK,
            target: "the loopback interface".into(),
            action: "attach",
            source: Box::new(source.into()),
        })?;
        self.attach(&Hook::new(program::FROM_LOOPBACK, &name), LOOPBACK)
    }

    /// Puts a program on an interface, whose index is known, and notes it under `links/`.
    pub(super) fn attach(&self, hook: &Hook, index: u32) -> Result<AttachKind, BpfError> {
        let pin = self.pins.links().join(hook.file_name());
        let program = open_program(&self.pins, hook.program)?;
        match read_record(&pin)? {
            Some(Record::Tcx {
                link,
                index: on,
                program: has,
            }) if on == index => {
                exchange(&link, has, &program).map_err(hook.error("replace"))?;
                return Ok(AttachKind::Tcx);
            }
            Some(Record::Clsact { index: on, qdisc }) if on == index => {
                // Anybody can have deleted it.
                let now = clsact::ensure_qdisc(index).map_err(hook.error("attach"))?;
                if (now, qdisc) == (Qdisc::Added, Qdisc::Found) {
                    replace_text(&pin, &clsact_text(index, now))?;
                }
                put_filter(hook, index, &program)?;
                return Ok(AttachKind::Clsact);
            }
            // The interface of that name was another one.
            Some(Record::Tcx { .. }) => unlink(&pin)?,
            Some(Record::Clsact { .. }) => remove(&pin)?,
            None => {}
        }
        match attach_tcx(&self.pins.program(hook.program), hook, &pin) {
            // What a kernel before 6.6 says. Trying tells more than a version number.
            Err(error) if matches!(errno(&error), Some(libc::EINVAL | libc::EOPNOTSUPP)) => {}
            attached => {
                return attached
                    .map(|()| AttachKind::Tcx)
                    .map_err(hook.error("attach"));
            }
        }
        let qdisc = clsact::ensure_qdisc(index).map_err(hook.error("attach"))?;
        replace_text(&pin, &clsact_text(index, qdisc))?;
        put_filter(hook, index, &program)?;
        Ok(AttachKind::Clsact)
    }

    /// Puts the pinned programs in the place of whatever version of them is attached.
    pub(super) fn reattach(&self) -> Result<(), BpfError> {
        for name in names(&self.pins.links())? {
            let pin = self.pins.links().join(&name);
            if let Some(hook) = Hook::parse(&name) {
                let index = match read_record(&pin)? {
                    Some(Record::Tcx { index, .. } | Record::Clsact { index, .. }) => index,
                    None => continue,
                };
                // Who is gone needs no program; its record goes with the next look at uplinks.
                if if_indextoname(index).is_ok() {
                    self.attach(&hook, index)?;
                }
            } else if let Some((name, _)) = BIND_HOOKS.into_iter().find(|(found, _)| *found == name)
            {
                let program = open_program(&self.pins, name)?;
                if let Some(link) = open_link(&pin)? {
                    sys::link_update(link.as_fd(), program.as_fd()).map_err(|source| {
                        BpfError::Attach {
                            program: name,
                            target: "its cgroup".into(),
                            action: "replace",
                            source: Box::new(source.into()),
                        }
                    })?;
                }
            }
        }
        let mut links = Vec::new();
        self.endpoints.for_each(|link, _| links.push(*link))?;
        for link in links {
            if let Ok(interface) = interface_name(link) {
                self.attach_endpoint(&interface)?;
            }
        }
        Ok(())
    }

    /// What is attached to host interfaces, with the index of each interface (0: gone).
    pub(super) fn attached(&self) -> Result<Vec<(Hook, u32)>, BpfError> {
        self.recorded(|hook, record| match record {
            Record::Tcx { index, .. } | Record::Clsact { index, .. } => (hook, index),
        })
    }

    /// What to say of everything that is noted as attached to interfaces. Of very many links, one
    /// at a time is open.
    pub(super) fn recorded<T>(&self, say: impl Fn(Hook, Record) -> T) -> Result<Vec<T>, BpfError> {
        let mut said = Vec::new();
        for name in names(&self.pins.links())? {
            let Some(hook) = Hook::parse(&name) else {
                continue;
            };
            if let Some(record) = read_record(&self.pins.links().join(&name))? {
                said.push(say(hook, record));
            }
        }
        Ok(said)
    }

    /// Notes that the interface of a hook has another name now.
    pub(super) fn rename(&self, from: &Hook, to: &Hook) -> Result<(), BpfError> {
        let (from, to) = (
            self.pins.links().join(from.file_name()),
            self.pins.links().join(to.file_name()),
        );
        rename(&from, &to).map_err(file_error(&from, "rename"))
    }

    /// Takes a program off a host interface; one that is gone is fine.
    pub(super) fn detach(&self, hook: &Hook) -> Result<(), BpfError> {
        detach(&self.pins, hook)
    }

    /// Takes away everything: programs from wherever they sit, all pins, and the directory.
    /// Repeating it is fine, and so is a directory that was made by another version, or that
    /// does not exist. Returns what could not be taken away; the rest went nevertheless.
    pub fn remove(bpffs: &Path) -> Vec<BpfError> {
        let pins = Pins::at(bpffs);
        if !bpffs.exists() {
            return Vec::new();
        }
        let lock = match pins.lock() {
            Ok(lock) => lock,
            Err(error) => return vec![error],
        };
        let mut problems: Vec<BpfError> = pins.clear_version().err().into_iter().collect();
        problems.extend(remove_all(&pins));
        drop(lock);
        if problems.is_empty() {
            match remove_directory(bpffs) {
                // A mount point stays, empty.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => problems.push(file_error(bpffs, "remove")(error)),
                Ok(()) => {}
            }
        }
        problems
    }
}

/// Detaches everything, and removes the three directories of pins.
pub(super) fn remove_all(pins: &Pins) -> Vec<BpfError> {
    let mut problems = Vec::new();
    let mut attempt = |result: Result<(), BpfError>| problems.extend(result.err());
    match names(&pins.links()) {
        Ok(names) => {
            for name in names {
                attempt(match Hook::parse(&name) {
                    Some(hook) => detach(pins, &hook),
                    None => unlink(&pins.links().join(name)),
                });
            }
        }
        Err(error) => attempt(Err(error)),
    }
    // Another version's table is left alone: its filters go with their interfaces.
    let endpoints = Table::<u32, abi::Endpoint>::open(
        (pins.map(map::ENDPOINTS), map::ENDPOINTS),
        abi::size::ENDPOINTS,
    );
    for (link, _) in endpoints
        .and_then(|endpoints| endpoints.entries())
        .unwrap_or_default()
    {
        if let Ok(interface) = interface_name(link) {
            let hook = Hook::new(program::FROM_ENDPOINT, &interface);
            attempt(
                clsact::detach(link, hook.direction())
                    .map(drop)
                    .map_err(hook.error("detach")),
            );
        }
    }
    for directory in [pins.programs(), pins.maps(), pins.links()] {
        match names(&directory) {
            Ok(names) => names
                .iter()
                .for_each(|name| attempt(remove(&directory.join(name)))),
            Err(error) => attempt(Err(error)),
        }
        match remove_directory(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                attempt(Err(file_error(&directory, "remove")(error)));
            }
            _ => {}
        }
    }
    problems
}

fn put_filter(hook: &Hook, index: u32, program: &OwnedFd) -> Result<(), BpfError> {
    clsact::attach(program.as_fd(), hook.program, index, hook.direction())
        .map_err(hook.error("attach"))
}

fn attach_tcx(program: &Path, hook: &Hook, pin: &Path) -> Result<(), AttachCause> {
    sys::before_change()?;
    let mut program = SchedClassifier::from_pin(program)?;
    let options = TcAttachOptions::TcxOrder(LinkOrder::first());
    let id = program.attach_with_options(&hook.interface, hook.direction(), options)?;
    let link = FdLink::try_from(program.take_link(id)?).map_err(io::Error::other)?;
    // Until it is pinned, the link goes with this process.
    before_change()?;
    link.pin(pin)?;
    Ok(())
}

fn detach(pins: &Pins, hook: &Hook) -> Result<(), BpfError> {
    let pin = pins.links().join(hook.file_name());
    match read_record(&pin)? {
        Some(Record::Tcx { .. }) => unlink(&pin),
        Some(Record::Clsact { index, qdisc }) => {
            // A new interface may have got the name, an old one another.
            clsact::detach(index, hook.direction()).map_err(hook.error("detach"))?;
            if qdisc == Qdisc::Added {
                clsact::remove_qdisc(index).map_err(hook.error("detach"))?;
            }
            remove(&pin)
        }
        None => Ok(()),
    }
}

/// The index of a hook's interface.
fn index_of(hook: &Hook) -> Result<u32, BpfError> {
    let index = if_nametoindex(hook.interface.as_str());
    index.map_err(|errno| hook.error("attach")(io::Error::from(errno)))
}

fn interface_name(index: u32) -> io::Result<String> {
    Ok(if_indextoname(index)?.to_string_lossy().into_owned())
}
