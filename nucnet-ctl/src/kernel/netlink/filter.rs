//! Traffic control filters on the clsact queueing discipline of a link: seeing them.

use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::tc::{TcAttribute, TcFilterBpfOption, TcHandle, TcMessage, TcOption};

use super::{Error, Netlink};

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
