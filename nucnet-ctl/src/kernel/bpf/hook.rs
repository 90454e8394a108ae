//! Programs on interfaces, and what is noted of them under `links/`: a pinned link, or a symbolic
//! link that says what was done.

use std::{
    fs, io,
    os::fd::{AsFd, OwnedFd},
    path::Path,
};

use aya::programs::TcAttachType;
use nucnet_common::abi::program;

use super::{
    clsact::Qdisc,
    error::{AttachCause, BpfError},
    links::open_link,
    pins::file_error,
    sys::{self, LinkTarget},
};

/// What is noted under `links/` for an interface.
pub(super) enum Record {
    /// A link that somebody can exchange, with the index of its interface (0: gone).
    Tcx {
        link: OwnedFd,
        index: u32,
        program: u32,
    },
    Clsact {
        index: u32,
        qdisc: Qdisc,
    },
}

/// One program on one interface: the name of its record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hook {
    pub(super) program: &'static str,
    pub(super) interface: String,
}

impl Hook {
    pub(super) fn new(program: &'static str, interface: &str) -> Self {
        Self {
            program,
            interface: interface.into(),
        }
    }

    /// `PROGRAM@INTERFACE`. A name on a BPF filesystem has no dot, and `+` marks what is not
    /// finished ([`aside`]); no interface's name has a per cent sign.
    pub(super) fn file_name(&self) -> String {
        let interface = self.interface.replace('.', "%2E").replace('+', "%2B");
        format!("{}@{interface}", self.program)
    }

    pub(super) fn parse(name: &str) -> Option<Self> {
        let (found, interface) = name.split_once('@')?;
        let program = [
            program::FROM_UPLINK,
            program::FROM_UPLINK_L3,
            program::FROM_HOST,
            program::FROM_LOOPBACK,
        ]
        .into_iter()
        .find(|program| *program == found)?;
        Some(Self::new(
            program,
            &interface.replace("%2E", ".").replace("%2B", "+"),
        ))
    }

    pub(super) fn direction(&self) -> TcAttachType {
        match self.program {
            program::FROM_HOST | program::FROM_LOOPBACK => TcAttachType::Egress,
            _ => TcAttachType::Ingress,
        }
    }

    pub(super) fn error<C: Into<AttachCause>>(
        &self,
        action: &'static str,
    ) -> impl FnOnce(C) -> BpfError {
        let Self { program, interface } = self.clone();
        move |source| BpfError::Attach {
            program,
            target: interface,
            action,
            source: Box::new(source.into()),
        }
    }
}

pub(super) fn read_record(pin: &Path) -> Result<Option<Record>, BpfError> {
    match fs::read_link(pin) {
        Ok(text) => return Ok(parse_clsact(&text.to_string_lossy())),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        // Not a symbolic link: a pin.
        Err(error) if error.kind() == io::ErrorKind::InvalidInput => {}
        Err(error) => return Err(file_error(pin, "read")(error)),
    }
    let Some(link) = open_link(pin)? else {
        return Ok(None);
    };
    let info = sys::link_info(link.as_fd()).map_err(file_error(pin, "read"))?;
    let index = match info.target {
        LinkTarget::Interface(index) => index,
        LinkTarget::Cgroup(_) | LinkTarget::Other => 0,
    };
    Ok(Some(Record::Tcx {
        link,
        index,
        program: info.program,
    }))
}

pub(super) fn clsact_text(index: u32, qdisc: Qdisc) -> String {
    let qdisc = match qdisc {
        Qdisc::Added => "added",
        Qdisc::Found => "found",
    };
    format!("clsact:interface-{index}:qdisc-{qdisc}")
}

fn parse_clsact(text: &str) -> Option<Record> {
    let (index, qdisc) = text
        .strip_prefix("clsact:interface-")?
        .split_once(":qdisc-")?;
    let qdisc = match qdisc {
        "added" => Qdisc::Added,
        "found" => Qdisc::Found,
        _ => return None,
    };
    Some(Record::Clsact {
        index: index.parse().ok()?,
        qdisc,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hook_names_survive_dots_and_have_none() {
        for interface in ["eth0", "eth0.100", "a+b", "x@y", "..."] {
            let hook = Hook::new(program::FROM_UPLINK_L3, interface);
            assert!(
                !hook.file_name().contains(['.', '+']),
                "{}",
                hook.file_name()
            );
            assert_eq!(Hook::parse(&hook.file_name()), Some(hook));
        }
        assert_eq!(Hook::parse("host_bind4"), None);
        assert_eq!(Hook::parse("somebody@eth0"), None);
    }

    #[test]
    fn clsact_record_is_read_back() {
        let Some(Record::Clsact { index, qdisc }) = parse_clsact(&clsact_text(7, Qdisc::Added))
        else {
            panic!("not read back");
        };
        assert_eq!((index, qdisc), (7, Qdisc::Added));
        assert!(parse_clsact("clsact:interface-x:qdisc-added").is_none());
    }
}
