//! Sockets of the host that connect to a publish: cgroup connect hooks.
//!
//! The socket is pointed at the endpoint itself, so its packets cost nothing more, and
//! 127.0.0.1 and ::1 work without `route_localnet` and without a proxy.

use core::mem::size_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{bpf_sock_addr, sockaddr},
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_bind, bpf_get_netns_cookie},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use nucnet_common::{
    abi::{Address, Endpoint, Publish, PublishKey, Settings},
    connect::{self, Destination, Sockets},
    packet::{is_v4, mapped},
};

use crate::{
    glue::{AF_INET, AF_INET6, address, word, words},
    maps::{ENDPOINTS, PUBLISHES, SETTINGS},
};

/// The socket call goes on, changed or not.
const PROCEED: i32 = 1;

const EADDRNOTAVAIL: i64 = -99;

#[cgroup_sock_addr(connect4)]
pub fn host_connect4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is the program's own.
    let asked = unsafe { mapped((*ctx.sock_addr).user_ip4.to_ne_bytes()) };
    let socket = Socket { ctx };
    if let Some(to) = connect::redirect(&socket, &asked, socket.port(), socket.protocol()) {
        // SAFETY: connect4 may write address and port.
        unsafe {
            (*socket.ctx.sock_addr).user_ip4 = word(&to.address, 12);
            (*socket.ctx.sock_addr).user_port = u32::from(to.port.to_be());
        }
    }
    PROCEED
}

#[cgroup_sock_addr(connect6)]
pub fn host_connect6(ctx: SockAddrContext) -> i32 {
    let mut asked = [0; 4];
    // SAFETY: the context is the program's own; the kernel allows reads of whole words.
    unsafe {
        asked[0] = core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip6[0]);
        asked[1] = core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip6[1]);
        asked[2] = core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip6[2]);
        asked[3] = core::ptr::read_volatile(&raw const (*ctx.sock_addr).user_ip6[3]);
    }
    // A mapped IPv4 address is one already: `::ffff:127.0.0.1` comes here, not to connect4.
    let asked = address(AF_INET6, &asked);
    let socket = Socket { ctx };
    if let Some(to) = connect::redirect(&socket, &asked, socket.port(), socket.protocol()) {
        let to_words = words(&to.address);
        // SAFETY: connect6 may write address and port, by whole words.
        unsafe {
            let to = u32::from(to.port.to_be());
            let ctx = socket.ctx.sock_addr;
            core::ptr::write_volatile(&raw mut (*ctx).user_ip6[0], to_words[0]);
            core::ptr::write_volatile(&raw mut (*ctx).user_ip6[1], to_words[1]);
            core::ptr::write_volatile(&raw mut (*ctx).user_ip6[2], to_words[2]);
            core::ptr::write_volatile(&raw mut (*ctx).user_ip6[3], to_words[3]);
            (*ctx).user_port = to;
        }
    }
    PROCEED
}

/// `struct sockaddr_in` (ip(7)); the bindings lack it.
#[repr(C)]
struct SockaddrIn {
    family: u16,
    port: u16,
    address: u32,
    zero: [u8; 8],
}

/// `struct sockaddr_in6` (ipv6(7)).
#[repr(C)]
struct SockaddrIn6 {
    family: u16,
    port: u16,
    flow_info: u32,
    address: [u32; 4],
    scope: u32,
}

struct Socket {
    ctx: SockAddrContext,
}

impl Socket {
    #[inline(always)]
    fn port(&self) -> u16 {
        // SAFETY: the context is the program's own. Network byte order in the low half.
        u16::from_be(unsafe { (*self.ctx.sock_addr).user_port } as u16)
    }

    #[inline(always)]
    fn protocol(&self) -> u8 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.sock_addr).protocol as u8 }
    }
}

impl Sockets for Socket {
    #[inline(always)]
    fn settings(&self) -> Option<&Settings> {
        SETTINGS.get(0)
    }

    #[inline(always)]
    fn netns_cookie(&self) -> u64 {
        // SAFETY: the context is the program's own.
        unsafe { bpf_get_netns_cookie(self.ctx.as_ptr()) }
    }

    #[inline(always)]
    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        PUBLISHES.get(&Key::new(PublishKey::BITS, *key))
    }

    #[inline(always)]
    fn endpoint(&self, link: u32) -> Option<&Endpoint> {
        // SAFETY: the control plane replaces entries whole, and frees them after this run.
        unsafe { ENDPOINTS.get(link) }
    }

    /// Binds the socket to the address that it connects to. The kernel allows that for the
    /// host's own addresses only, and it is the source address that the socket would have got.
    #[inline(always)]
    fn bind(&self, to: &Address) -> Destination {
        // SAFETY: each buffer has the size that is passed with it.
        let result = unsafe {
            if is_v4(to) {
                let mut name = SockaddrIn {
                    family: AF_INET.into(),
                    port: 0,
                    address: word(to, 12),
                    zero: [0; 8],
                };
                bind(
                    self.ctx.sock_addr,
                    (&raw mut name).cast(),
                    size_of::<SockaddrIn>(),
                )
            } else {
                let mut name = SockaddrIn6 {
                    family: AF_INET6.into(),
                    port: 0,
                    flow_info: 0,
                    address: words(to),
                    scope: 0,
                };
                bind(
                    self.ctx.sock_addr,
                    (&raw mut name).cast(),
                    size_of::<SockaddrIn6>(),
                )
            }
        };
        // Any other refusal comes after the check of the address: the socket is bound already.
        if result == EADDRNOTAVAIL {
            Destination::Remote
        } else {
            Destination::Local
        }
    }
}

#[inline(always)]
unsafe fn bind(ctx: *mut bpf_sock_addr, name: *mut sockaddr, size: usize) -> i64 {
    // SAFETY: the caller's buffer has that size.
    unsafe { bpf_bind(ctx, name, size as i32) }
}
