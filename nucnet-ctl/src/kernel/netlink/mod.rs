//! Links, bridges, addresses, routes and neighbours by rtnetlink.
//!
//! A [`Netlink`] is one socket in one network namespace, and stays there: one that was opened in
//! a container's namespace needs no entering later. Calls block. Checking by the kernel is strict
//! and its explanations are kept ([`Error`]). What is called `ensure_...` or deletes may be
//! repeated: [`Change`] tells whether there was anything to do, which is what an undo must know.
//!
//! Links of nucnet's carry an alias that begins with [`ALIAS_PREFIX`] and, from the moment that
//! they exist, the group [`LINK_GROUP`]; routes, addresses and neighbours carry the protocol
//! number [`PROTOCOL`]. What does not is never changed or deleted by the operations that ask for
//! ownership.

mod address;
mod bridge;
mod error;
mod filter;
mod link;
mod neighbour;
mod route;
mod uplink;
mod veth;

use std::future::Future;
use std::io;
use std::thread;
use std::time::{Duration, Instant};

use futures_util::StreamExt;
use nix::errno::Errno;
use rtnetlink::packet_core::{
    ErrorMessage, NLA_TYPE_MASK, NLM_F_ACK, NLM_F_ACK_TLVS, NLM_F_CAPPED, NLM_F_DUMP,
    NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload, NlasIterator,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::AsyncSocket;
use tokio::runtime::{Builder, Runtime};

use super::{
    fault::{self, Operation},
    netns::{self, NetnsFd},
};

pub use address::{AddressScope, LinkAddress};
pub use bridge::{BridgeSettings, BridgeSpec, Port};
pub use error::{Error, Holder, Refusal};
pub use filter::{Direction, Filter};
pub use link::{Ipv6LinkLocal, Link, LinkChange, LinkId, LinkType, Owner, State};
pub use neighbour::Neighbour;
pub use route::{Found, Hop, KernelRoute, Route};
pub use uplink::Uplink;
pub use veth::{Veth, VethSpec};

/// Links that nucnet owns carry an alias that begins so; the rest says whose they are.
pub const ALIAS_PREFIX: &str = "nucnet:";

/// Group of links that nucnet creates ("nucn"). An alias cannot be given at creation, a group
/// can: a link with this group and no alias was left by a process that died in between.
pub const LINK_GROUP: u32 = 0x6e75_636e;

/// Group of links of nucnet's that are about to be deleted together ("nucx"). Unlike
/// [`LINK_GROUP`], it never has links in it that are to stay.
pub const LEAVING_GROUP: u32 = 0x6e75_6378;

/// rtnetlink protocol number of nucnet's routes, addresses and neighbours ('n'). Free in
/// `include/uapi/linux/rtnetlink.h` and in iproute2's `rt_protos`.
pub const PROTOCOL: u8 = 110;

/// Link-layer address.
pub type Mac = [u8; 6];

/// Whether an operation that may be repeated had anything to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// It changed something.
    Made,
    /// All was as wanted already.
    Unchanged,
}

/// How long an answer may take: longer than anybody holds the kernel's own lock. Also how long
/// a list is asked for that changes each time while it is made.
const PATIENCE: Duration = Duration::from_secs(30);

/// Attribute of an extended acknowledgement with the explanation.
/// include/uapi/linux/netlink.h: NLMSGERR_ATTR_MSG.
const NLMSGERR_ATTR_MSG: u16 = 1;

/// Length of a netlink message header, in bytes.
const HEADER: usize = 16;

/// A netlink socket in one network namespace.
#[derive(Debug)]
pub struct Netlink {
    /// Present until dropped.
    runtime: Option<Runtime>,
    handle: rtnetlink::Handle,
    netns: NetnsFd,
}

/// Why a request had no success; not yet known what it was for.
#[derive(Debug)]
enum Failure {
    Refused(Refusal),
    Interrupted { attempts: usize },
    NoAnswer,
}

impl Failure {
    fn to(self, operation: &'static str, object: impl ToString) -> Error {
        let object = object.to_string();
        match self {
            Self::Refused(cause) => Error::Refused {
                operation,
                object,
                cause,
            },
            Self::Interrupted { attempts } => Error::Interrupted {
                operation,
                object,
                attempts,
            },
            Self::NoAnswer => Error::NoAnswer { operation, object },
        }
    }

    fn errno(&self) -> Option<Errno> {
        match self {
            Self::Refused(cause) => Some(cause.errno),
            _ => None,
        }
    }
}

impl Netlink {
    /// Opens a socket in the network namespace of the calling thread.
    pub fn open() -> Result<Self, Error> {
        Self::with(connect(), NetnsFd::current()?)
    }

    /// Opens a socket in another network namespace.
    pub fn open_in(netns: &NetnsFd) -> Result<Self, Error> {
        Self::with(netns::run_in(netns, connect)?, netns.try_clone()?)
    }

    fn with(
        connection: io::Result<(Runtime, rtnetlink::Handle)>,
        netns: NetnsFd,
    ) -> Result<Self, Error> {
        let (runtime, handle) = connection.map_err(|source| Error::Open { source })?;
        Ok(Self {
            runtime: Some(runtime),
            handle,
            netns,
        })
    }

    /// The namespace that it works in.
    pub fn netns(&self) -> &NetnsFd {
        &self.netns
    }

    /// Waits for an operation of the runtime. Callers may themselves be inside a runtime, where
    /// waiting for another is forbidden: then a thread does it.
    fn wait<F>(&self, operation: F) -> F::Output
    where
        F: Future + Send,
        F::Output: Send,
    {
        let runtime = self.runtime.as_ref().expect("present until dropped");
        if tokio::runtime::Handle::try_current().is_err() {
            return runtime.block_on(operation);
        }
        thread::scope(
            |scope| match scope.spawn(|| runtime.block_on(operation)).join() {
                Ok(output) => output,
                Err(panic) => std::panic::resume_unwind(panic),
            },
        )
    }

    /// Sends a request and collects the answer. Single replies are asked for with an
    /// acknowledgement, so that one which cannot be decoded is noticed by its absence.
    fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> Result<Vec<RouteNetlinkMessage>, Failure> {
        fault::before(Operation::Netlink).map_err(|errno| {
            Failure::Refused(Refusal {
                errno,
                message: None,
            })
        })?;
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        let mut handle = self.handle.clone();
        self.wait(async move {
            let mut replies = Vec::new();
            let mut interrupted = false;
            let mut stream = handle.request(message).map_err(|_| Failure::NoAnswer)?;
            while let Some(reply) = tokio::time::timeout(PATIENCE, stream.next())
                .await
                .map_err(|_| Failure::NoAnswer)?
            {
                interrupted |= reply.header.flags & NLM_F_DUMP_INTR != 0;
                let flags = reply.header.flags;
                match reply.payload {
                    NetlinkPayload::InnerMessage(reply) => replies.push(reply),
                    NetlinkPayload::Error(error) => {
                        if let Some(refusal) = refusal(flags, &error) {
                            return Err(Failure::Refused(refusal));
                        }
                    }
                    NetlinkPayload::Done(done) if done.code != 0 => {
                        return Err(Failure::Refused(Refusal {
                            errno: Errno::from_raw(done.code.wrapping_neg()),
                            message: explanation(&done.extended_ack),
                        }));
                    }
                    NetlinkPayload::Overrun(_) => return Err(Failure::NoAnswer),
                    _ => {}
                }
            }
            if interrupted {
                Err(Failure::Interrupted { attempts: 1 })
            } else {
                Ok(replies)
            }
        })
    }

    /// Has the kernel do something.
    fn execute(&self, message: RouteNetlinkMessage, flags: u16) -> Result<(), Failure> {
        self.exchange(message, NLM_F_ACK | flags).map(drop)
    }

    /// Asks for one thing.
    fn get(&self, message: RouteNetlinkMessage) -> Result<RouteNetlinkMessage, Failure> {
        self.exchange(message, NLM_F_ACK)?
            .into_iter()
            .next()
            .ok_or(Failure::NoAnswer)
    }

    /// Asks for a list, again when it changed meanwhile.
    fn dump(&self, message: &RouteNetlinkMessage) -> Result<Vec<RouteNetlinkMessage>, Failure> {
        let start = Instant::now();
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.exchange(message.clone(), NLM_F_DUMP) {
                Err(Failure::Interrupted { .. }) if start.elapsed() < PATIENCE => {}
                Err(Failure::Interrupted { .. }) => {
                    return Err(Failure::Interrupted { attempts });
                }
                result => return result,
            }
        }
    }
}

fn connect() -> io::Result<(Runtime, rtnetlink::Handle)> {
    let runtime = Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()?;
    let (mut connection, handle, _unsolicited) = {
        let _context = runtime.enter();
        rtnetlink::new_connection()?
    };
    // The end of a dump carries its error code.
    connection.set_forward_done(true);
    let socket = connection.socket_mut().socket_mut();
    socket.set_ext_ack(true)?;
    socket.set_cap_ack(true)?;
    socket.set_netlink_get_strict_chk(true)?;
    runtime.spawn(connection);
    Ok((runtime, handle))
}

impl Drop for Netlink {
    fn drop(&mut self) {
        // Dropping a runtime waits, which is forbidden inside of another one.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// What an error message says; `None`: it is an acknowledgement.
fn refusal(flags: u16, error: &ErrorMessage) -> Option<Refusal> {
    let errno = Errno::from_raw(error.code?.get().wrapping_neg());
    // The header of the request, the request itself unless capped, attributes.
    let request = match error.header.first_chunk() {
        Some(length) if flags & NLM_F_CAPPED == 0 => {
            (u32::from_ne_bytes(*length) as usize).next_multiple_of(4)
        }
        _ => HEADER,
    };
    let attributes = error
        .header
        .get(request..)
        .filter(|_| flags & NLM_F_ACK_TLVS != 0);
    Some(Refusal {
        errno,
        message: attributes.and_then(explanation),
    })
}

/// The explanation among the attributes of an extended acknowledgement.
fn explanation(attributes: impl AsRef<[u8]>) -> Option<String> {
    let attribute = NlasIterator::new(attributes.as_ref())
        .map_while(Result::ok)
        .find(|attribute| attribute.kind() & NLA_TYPE_MASK == NLMSGERR_ATTR_MSG)?;
    let text = String::from_utf8_lossy(attribute.value());
    Some(text.trim_end_matches('\0').to_owned()).filter(|text| !text.is_empty())
}
