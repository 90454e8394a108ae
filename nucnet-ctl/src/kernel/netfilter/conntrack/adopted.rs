//! Connections that the kernel is told of, rather than seeing their packets.

use std::net::IpAddr;

use nix::libc;

use super::{TcpState, abi};
use crate::{
    kernel::netfilter::nfnetlink::{write, write_nested},
    model::netfilter::Tuple,
};

/// A connection that the kernel has not seen the packets of, and is to track from now on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Adopted {
    /// As its first packet was sent.
    pub original: Tuple,
    /// As the answer to it is. What differs from the first direction turned round is translated.
    pub reply: Tuple,
    /// Whether there was an answer.
    pub is_answered: bool,
    /// How far a TCP connection is.
    pub tcp: Option<TcpState>,
    /// Seconds after which the kernel forgets it if no packet comes.
    pub expires: u32,
}

impl Adopted {
    /// The same as the kernel would see it who translates nothing.
    pub fn untranslated(self) -> Self {
        Self {
            reply: self.original.turned(),
            // What has answers is not translated by rules that come later.
            is_answered: true,
            ..self
        }
    }
}

/// The family of a connection that is to be tracked, and what describes it to the kernel.
pub(super) fn described(adopted: &Adopted) -> (u8, Vec<u8>) {
    let (original, reply) = (&adopted.original, &adopted.reply);
    let untranslated = original.turned();
    let mut bytes = Vec::new();
    write_tuple(&mut bytes, abi::TUPLE_ORIG, original);
    // The kernel translates it by itself, as the next two say.
    write_tuple(&mut bytes, abi::TUPLE_REPLY, &untranslated);
    let asked = |tuple: &Tuple| (tuple.source, tuple.source_port);
    let asker = |tuple: &Tuple| (tuple.destination, tuple.destination_port);
    if asked(reply) != asked(&untranslated) {
        write_translation(&mut bytes, abi::NAT_DST, asked(reply));
    }
    if asker(reply) != asker(&untranslated) {
        write_translation(&mut bytes, abi::NAT_SRC, asker(reply));
    }
    let answered = match adopted.is_answered {
        true => abi::SEEN_REPLY | abi::ASSURED,
        false => 0,
    };
    write(&mut bytes, abi::STATUS, |bytes| {
        bytes.extend((abi::CONFIRMED | answered).to_be_bytes());
    });
    write(&mut bytes, abi::TIMEOUT, |bytes| {
        bytes.extend(adopted.expires.to_be_bytes());
    });
    if let Some(state) = adopted.tcp {
        write_nested(&mut bytes, abi::PROTOINFO, |bytes| {
            write_nested(bytes, abi::PROTOINFO_TCP, |bytes| {
                write(bytes, abi::TCP_STATE, |bytes| {
                    bytes.push(state.number(adopted.is_answered));
                });
                for side in abi::TCP_FLAGS {
                    // `struct nf_ct_tcp_flags`: flags, and which of them are meant.
                    write(bytes, side, |bytes| bytes.extend([abi::TCP_LIBERAL; 2]));
                }
            });
        });
    }
    let family = match original.source {
        IpAddr::V4(_) => libc::AF_INET,
        IpAddr::V6(_) => libc::AF_INET6,
    };
    (family as u8, bytes)
}

fn write_address(bytes: &mut Vec<u8>, kind: u16, address: IpAddr) {
    write(bytes, kind, |bytes| match address {
        IpAddr::V4(v4) => bytes.extend(v4.octets()),
        IpAddr::V6(v6) => bytes.extend(v6.octets()),
    });
}

fn write_port(bytes: &mut Vec<u8>, kind: u16, port: u16) {
    write(bytes, kind, |bytes| bytes.extend(port.to_be_bytes()));
}

pub(super) fn write_tuple(bytes: &mut Vec<u8>, kind: u16, tuple: &Tuple) {
    write_nested(bytes, kind, |bytes| {
        let first = if tuple.source.is_ipv4() { 1 } else { 3 };
        write_nested(bytes, abi::TUPLE_IP, |bytes| {
            write_address(bytes, first, tuple.source);
            write_address(bytes, first + 1, tuple.destination);
        });
        write_nested(bytes, abi::TUPLE_PROTO, |bytes| {
            write(bytes, abi::PROTO_NUM, |bytes| bytes.push(tuple.protocol));
            write_port(bytes, abi::PROTO_SRC_PORT, tuple.source_port);
            write_port(bytes, abi::PROTO_DST_PORT, tuple.destination_port);
        });
    });
}

/// To one address and port: ranges of one.
fn write_translation(bytes: &mut Vec<u8>, kind: u16, (address, port): (IpAddr, u16)) {
    write_nested(bytes, kind, |bytes| {
        for end in abi::NAT_ADDRESSES[usize::from(address.is_ipv6())] {
            write_address(bytes, end, address);
        }
        write_nested(bytes, abi::NAT_PROTO, |bytes| {
            for end in abi::NAT_PORTS {
                write_port(bytes, end, port);
            }
        });
    });
}
