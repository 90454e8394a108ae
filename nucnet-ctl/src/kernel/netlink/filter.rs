//! Traffic control filters on the clsact queueing discipline of a link: seeing them, and one that
//! hands frames to another link.

use nix::errno::Errno;
use rtnetlink::packet_core::{DefaultNla, NLM_F_CREATE, NLM_F_EXCL};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::{Error, Mac, Netlink};

/// Which packets of a link a filter sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// Those that come in.
    Ingress,
    /// Those that go out.
    Egress,
}

/// A filter.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Filter {
    /// `bpf`, `u32`, `matchall`...
    pub kind: String,
    /// Its name, if it is a program.
    pub name: Option<String>,
    /// The kernel's number for its program, if it is one.
    pub program: Option<u32>,
}

impl Netlink {
    /// The filters of a link, in the order in which packets meet them; none where there is no
    /// clsact queueing discipline, or no such link.
    pub fn filters(&self, link: u32, direction: Direction) -> Result<Vec<Filter>, Error> {
        let mut message = TcMessage::with_index(link.cast_signed());
        // include/uapi/linux/pkt_sched.h: TC_H_CLSACT, TC_H_MIN_INGRESS, TC_H_MIN_EGRESS.
        message.header.parent = TcHandle {
            major: 0xffff,
            minor: match direction {
                Direction::Ingress => 0xfff2,
                Direction::Egress => 0xfff3,
            },
        };
        let replies = self
            .dump(&RouteNetlinkMessage::GetTrafficFilter(message))
            .map_err(|failure| failure.to("list the filters of interface", link))?;
        Ok(replies
            .into_iter()
            .filter_map(|reply| match reply {
                RouteNetlinkMessage::NewTrafficFilter(message) => filter(message),
                _ => None,
            })
            .collect())
    }
}

/// include/uapi/linux/pkt_sched.h: `TC_H_CLSACT`, and the place of the discipline itself.
const CLSACT: TcHandle = TcHandle {
    major: 0xffff,
    minor: 0xfff1,
};

impl Netlink {
    /// Has all frames with that source that come in by a port of a bridge come in by the bridge
    /// itself instead, as if it had been asked to deliver them: none is bridged, so that nobody
    /// who looks at bridged frames (`br_netfilter`) translates them half-way. Whatever else was on
    /// the hook is gone. `false`: the kernel lacks what it takes (`cls_u32`, `act_mirred`).
    pub fn hand_over(&self, port: u32, source: Mac, bridge: u32) -> Result<bool, Error> {
        self.remove_hooks(port)?;
        let mut message = TcMessage::with_index(port.cast_signed());
        message.header.parent = CLSACT;
        message.header.handle = TcHandle {
            major: 0xffff,
            minor: 0,
        };
        message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
        self.execute(
            RouteNetlinkMessage::NewQueueDiscipline(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
        .map_err(|failure| failure.to("put a hook on interface", port))?;

        let mut message = TcMessage::with_index(port.cast_signed());
        message.header.parent = TcHandle {
            major: 0xffff,
            minor: 0xfff2,
        };
        // Priority 1, every protocol (`ETH_P_ALL` in network order).
        message.header.info = 1 << 16 | u32::from(3_u16.to_be());
        message.attributes = vec![
            TcAttribute::Kind("u32".to_owned()),
            TcAttribute::Other(DefaultNla::new(2, from_source(source, bridge))),
        ];
        match self.execute(
            RouteNetlinkMessage::NewTrafficFilter(message),
            NLM_F_CREATE | NLM_F_EXCL,
        ) {
            Ok(()) => Ok(true),
            Err(failure)
                if matches!(
                    failure.errno(),
                    Some(Errno::ENOENT | Errno::EOPNOTSUPP | Errno::EINVAL)
                ) =>
            {
                Ok(false)
            }
            Err(failure) => Err(failure.to("put a filter on interface", port)),
        }
    }

    /// Takes everything off the hooks of a link of nucnet's.
    pub fn remove_hooks(&self, link: u32) -> Result<(), Error> {
        let mut message = TcMessage::with_index(link.cast_signed());
        message.header.parent = CLSACT;
        message.header.handle = TcHandle {
            major: 0xffff,
            minor: 0,
        };
        message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
        match self.execute(RouteNetlinkMessage::DelQueueDiscipline(message), 0) {
            Ok(()) => Ok(()),
            Err(failure) => match failure.errno() {
                // There is none, or no such link.
                Some(Errno::ENOENT | Errno::EINVAL | Errno::ENODEV) => Ok(()),
                _ => Err(failure.to("take the hooks off interface", link)),
            },
        }
    }
}

/// Options of a `u32` filter (`linux/pkt_cls.h`) that redirects frames of one source to the ingress
/// of a link.
fn from_source(source: Mac, link: u32) -> Vec<u8> {
    fn attribute(kind: u16, contents: &[u8]) -> Vec<u8> {
        let length = (4 + contents.len()) as u16;
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(contents);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }
    const SELECTOR: u16 = 5;
    const ACTIONS: u16 = 7;
    const KIND: u16 = 1;
    const OPTIONS: u16 = 2;
    const PARAMETERS: u16 = 2;
    // `struct tc_u32_sel`: terminal, two keys.
    let mut selector = vec![1, 0, 2, 0];
    selector.extend([0; 12]);
    let [a, b, c, d, e, f] = source;
    // The frame's source begins 8 bytes before the IP header; its type is the last two of them.
    for (mask, value, offset) in [
        ([0xff; 4], [a, b, c, d], -8_i32),
        ([0xff, 0xff, 0, 0], [e, f, 0, 0], -4),
    ] {
        selector.extend(mask);
        selector.extend(value);
        selector.extend(offset.to_ne_bytes());
        selector.extend(0_i32.to_ne_bytes());
    }
    // `struct tc_mirred`: the frame is taken (`TC_ACT_STOLEN`), and comes in elsewhere
    // (`TCA_INGRESS_REDIR`).
    let mirred: Vec<u8> = [0, 0, 4, 0, 0, 3, link]
        .into_iter()
        .flat_map(u32::to_ne_bytes)
        .collect();
    let action = [
        attribute(KIND, b"mirred\0"),
        attribute(OPTIONS, &attribute(PARAMETERS, &mirred)),
    ];
    let actions = attribute(1, &action.concat());
    [attribute(SELECTOR, &selector), attribute(ACTIONS, &actions)].concat()
}

/// Each filter is preceded by an entry for its place in the chain, which has no handle.
fn filter(message: TcMessage) -> Option<Filter> {
    if message.header.handle == TcHandle::default() {
        return None;
    }
    let mut filter = Filter {
        kind: String::new(),
        name: None,
        program: None,
    };
    for attribute in message.attributes {
        match attribute {
            TcAttribute::Kind(kind) => filter.kind = kind,
            TcAttribute::Options(options) => {
                for option in options {
                    match option {
                        TcOption::Bpf(TcFilterBpfOption::ProgId(id)) => filter.program = Some(id),
                        TcOption::Bpf(TcFilterBpfOption::ProgName(name)) => {
                            filter.name = Some(name);
                        }
                        _ => {}
                    }
                }
            }
            _ => {}
        }
    }
    Some(filter)
}
