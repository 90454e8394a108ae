//! Filters on an interface's clsact queueing discipline: 0.1 ms each, against 12 ms for a TCX
//! link, and older than it. Anybody can delete them, and they cannot be pinned.
//!
//! The requests are made here: aya's come with a look at all that the kernel offers, which costs
//! every attach more than the filter does.

use std::{
    io,
    os::fd::{AsRawFd, BorrowedFd},
};

use aya::programs::TcAttachType;
use nix::libc;
use rtnetlink::{
    packet_core::{
        NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
    },
    packet_route::{
        RouteNetlinkMessage,
        tc::{
            TcAttribute, TcBpfFlags, TcFilterBpf, TcFilterBpfOption, TcHandle, TcMessage, TcOption,
        },
    },
    sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE},
};

use crate::kernel::fault::{self, Operation};

/// First in order.
const PRIORITY: u32 = 1;

/// Tells nucnet's filter from others of the same priority.
const HANDLE: TcHandle = TcHandle {
    major: 0,
    minor: 0x6e75,
};

/// Frames of all kinds: `ETH_P_ALL`, linux/if_ether.h.
const ALL: u16 = 3;

/// Whose the queueing discipline is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Qdisc {
    /// It was added for nucnet's filter.
    Added,
    /// Somebody else had it already.
    Found,
}

/// Adds the queueing discipline, if it is not there.
pub(super) fn ensure_qdisc(interface: u32) -> io::Result<Qdisc> {
    let message = RouteNetlinkMessage::NewQueueDiscipline(qdisc(interface));
    match ask(message, NLM_F_CREATE | NLM_F_EXCL) {
        Ok(()) => Ok(Qdisc::Added),
        Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(Qdisc::Found),
        Err(error) => Err(error),
    }
}

/// Puts a program on an interface that has the queueing discipline, in place of any that nucnet
/// put there before; no packet passes in between.
pub(super) fn attach(
    program: BorrowedFd<'_>,
    name: &str,
    interface: u32,
    direction: TcAttachType,
) -> io::Result<()> {
    let mut message = filter(interface, direction);
    let options = [
        TcFilterBpfOption::ProgFd(program.as_raw_fd().cast_unsigned()),
        TcFilterBpfOption::ProgName(name.into()),
        // What the program returns is the verdict.
        TcFilterBpfOption::Flags(TcBpfFlags::DirectAction),
    ];
    let options = options.into_iter().map(TcOption::Bpf).collect();
    message.attributes.push(TcAttribute::Options(options));
    ask(RouteNetlinkMessage::NewTrafficFilter(message), NLM_F_CREATE)
}

/// Takes nucnet's filter off an interface. `false`: there is none, or no such interface.
pub(super) fn detach(interface: u32, direction: TcAttachType) -> io::Result<bool> {
    let message = filter(interface, direction);
    gone_is_fine(ask(RouteNetlinkMessage::DelTrafficFilter(message), 0))
}

/// Removes the queueing discipline of an interface, with whatever filters it has; one that is
/// not there is fine.
pub(super) fn remove_qdisc(interface: u32) -> io::Result<()> {
    let message = RouteNetlinkMessage::DelQueueDiscipline(qdisc(interface));
    gone_is_fine(ask(message, 0)).map(drop)
}

/// `false` where there was nothing to remove: no queueing discipline, no chain of that priority,
/// no such filter, no interface.
fn gone_is_fine(removed: io::Result<()>) -> io::Result<bool> {
    match removed {
        Ok(()) => Ok(true),
        Err(error)
            if matches!(
                error.raw_os_error(),
                Some(libc::EINVAL | libc::ENOENT | libc::ENODEV)
            ) =>
        {
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

/// The major number of clsact and of what is on it (`TC_H_CLSACT`, linux/pkt_sched.h).
const CLSACT: u16 = 0xffff;

fn qdisc(interface: u32) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.handle = TcHandle {
        major: CLSACT,
        minor: 0,
    };
    message.header.parent = TcHandle {
        major: CLSACT,
        minor: 0xfff1,
    };
    message.attributes.push(TcAttribute::Kind("clsact".into()));
    message
}

/// Nucnet's filter on one side of an interface.
fn filter(interface: u32, direction: TcAttachType) -> TcMessage {
    let mut message = TcMessage::with_index(interface.cast_signed());
    message.header.handle = HANDLE;
    message.header.parent = TcHandle {
        major: CLSACT,
        minor: match direction {
            TcAttachType::Egress => 0xfff3,
            _ => 0xfff2,
        },
    };
    message.header.info = PRIORITY << 16 | u32::from(ALL.to_be());
    let kind = TcFilterBpf::KIND.into();
    message.attributes.push(TcAttribute::Kind(kind));
    message
}

/// Makes a request and waits for the answer. It does not go by way of
/// [`Netlink`](crate::kernel::netlink::Netlink): the datapath has no namespace but the caller's.
fn ask(message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
    fault::before(Operation::Netlink)?;
    let mut packet = NetlinkMessage::from(message);
    packet.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
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
        NetlinkPayload::Error(error) if error.code.is_some() => Err(error.to_io()),
        NetlinkPayload::Error(_) => Ok(()),
        _ => Err(io::Error::new(
            io::ErrorKind::InvalidData,
            "neither an error nor an acknowledgement",
        )),
    }
}
