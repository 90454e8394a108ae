//! Filters on an interface's clsact queueing discipline: 0.1 ms each, against 12 ms for a TCX
//! link, and older than it. Anybody can delete them, and they cannot be pinned.

use std::io;

use aya::programs::{
    SchedClassifier, TcAttachType,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcHandle, qdisc_add_clsact},
};
use nix::libc;
use rtnetlink::{
    packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload},
    packet_route::{
        RouteNetlinkMessage,
        tc::{TcAttribute, TcHandle as Handle, TcMessage},
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use super::error::{AttachCause, errno};
use crate::kernel::fault::{self, Operation};

/// First in order.
const PRIORITY: u16 = 1;

/// Tells nucnet's filter from others of the same priority.
const HANDLE: TcHandle = TcHandle::new(0, 0x6e75);

/// Whose the queueing discipline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qdisc {
    /// It was added for nucnet's filter.
    Added,
    /// Somebody else had it already.
    Found,
}

/// Adds the queueing discipline, if it is not there.
pub(super) fn ensure_qdisc(interface: &str) -> Result<Qdisc, AttachCause> {
    before_request()?;
    match qdisc_add_clsact(interface) {
        Ok(()) => Ok(Qdisc::Added),
        Err(error) if errno(&error) == Some(libc::EEXIST) => Ok(Qdisc::Found),
        Err(error) => Err(error.into()),
    }
}

/// Puts a program on an interface that has the queueing discipline, in place of any that nucnet
/// put there before; no packet passes in between.
pub(super) fn attach(
    program: &mut SchedClassifier,
    interface: &str,
    direction: TcAttachType,
) -> Result<(), AttachCause> {
    before_request()?;
    let options = NlOptions {
        priority: PRIORITY,
        handle: HANDLE,
        classid: None,
    };
    let made = program.attach_with_options(interface, direction, TcAttachOptions::Netlink(options));
    let id = match made {
        Err(error) if errno(&error) == Some(libc::EEXIST) => {
            program.attach_to_link(filter(interface, direction)?)?
        }
        made => made?,
    };
    // The filter stays when this value and the program's go.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Takes nucnet's filter off an interface. `false`: there is none, or no such interface.
pub(super) fn detach(interface: &str, direction: TcAttachType) -> Result<bool, AttachCause> {
    use aya::programs::Link;
    before_request()?;
    let link = match filter(interface, direction) {
        Ok(link) => link,
        Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(false),
        Err(error) => return Err(error.into()),
    };
    match link.detach() {
        Ok(()) => Ok(true),
        // No queueing discipline, no chain of that priority, no such filter, no interface.
        Err(error)
            if matches!(
                errno(&error),
                Some(libc::EINVAL | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error.into()),
    }
}

/// These requests do not go by way of [`Netlink`](crate::kernel::netlink::Netlink).
fn before_request() -> io::Result<()> {
    Ok(fault::before(Operation::Netlink)?)
}

fn filter(interface: &str, direction: TcAttachType) -> io::Result<SchedClassifierLink> {
    SchedClassifierLink::attached(interface, direction, PRIORITY, HANDLE, None)
}

/// Removes the queueing discipline of an interface, with whatever filters it has; one that is
/// not there is fine.
pub(super) fn remove_qdisc(index: u32) -> io::Result<()> {
    before_request()?;
    let mut message = TcMessage::with_index(index as i32);
    message.header.handle = Handle {
        major: 0xffff,
        minor: 0,
    };
    message.header.parent = Handle {
        major: 0xffff,
        minor: 0xfff1,
    };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    let mut packet = NetlinkMessage::from(RouteNetlinkMessage::DelQueueDiscipline(message));
    packet.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    packet.finalize();
    let mut bytes = vec![0; packet.buffer_len()];
    packet.serialize(&mut bytes);

    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    socket.send_to(&bytes, &SocketAddr::new(0, 0), 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer)
        .map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
    match answer.payload {
        NetlinkPayload::Error(error) => match error.to_io() {
            error if matches!(error.raw_os_error(), None | Some(0)) => Ok(()),
            error
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENOENT | libc::EINVAL | libc::ENODEV)
                ) =>
            {
                Ok(())
            }
            error => Err(error),
        },
        _ => Ok(()),
    }
}
