//! Sockets of the host that want a port: cgroup bind hooks.

use core::ptr::read_volatile;

use aya_ebpf::{
    EbpfContext as _,
    btf_maps::lpm_trie::Key,
    helpers::generated::{bpf_get_netns_cookie, bpf_set_retval},
    macros::cgroup_sock_addr,
    programs::SockAddrContext,
};
use nucnet_common::{
    abi::{Address, Publish, PublishKey, Settings},
    hold,
    packet::mapped,
};

use crate::{
    maps::{PUBLISHES, SETTINGS},
    skb::{AF_INET6, address},
};

/// The socket call goes on.
const PROCEED: i32 = 1;
/// The socket call fails, with `EPERM` unless there is another error already.
const REFUSE: i32 = 0;

const EADDRINUSE: i32 = 98;

/// Whether this kernel lets the programs choose the error (Linux 5.18): the control plane finds
/// out and writes it. Where it is zero the verifier never gets to see the call.
#[unsafe(no_mangle)]
static CHOOSES_ERROR: u8 = 0;

#[cgroup_sock_addr(bind4)]
pub fn host_bind4(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is the program's own.
    let address = unsafe { mapped((*ctx.sock_addr).user_ip4.to_ne_bytes()) };
    decide(ctx, &address)
}

#[cgroup_sock_addr(bind6)]
pub fn host_bind6(ctx: SockAddrContext) -> i32 {
    // SAFETY: the context is the program's own; the kernel allows reads of whole words.
    let words = unsafe {
        [
            read_volatile(&raw const (*ctx.sock_addr).user_ip6[0]),
            read_volatile(&raw const (*ctx.sock_addr).user_ip6[1]),
            read_volatile(&raw const (*ctx.sock_addr).user_ip6[2]),
            read_volatile(&raw const (*ctx.sock_addr).user_ip6[3]),
        ]
    };
    // A mapped IPv4 address is one already.
    decide(ctx, &address(AF_INET6, &words))
}

#[inline(always)]
fn decide(ctx: SockAddrContext, address: &Address) -> i32 {
    // SAFETY: the context is the program's own. The port is in network byte order in the low
    // half.
    let (port, protocol) = unsafe {
        let port = u16::from_be((*ctx.sock_addr).user_port as u16);
        (port, (*ctx.sock_addr).protocol as u8)
    };
    if !hold::is_published(&Socket { ctx }, address, port, protocol) {
        return PROCEED;
    }
    // SAFETY: a byte of this object's own; the helper takes an integer.
    unsafe {
        if read_volatile(&raw const CHOOSES_ERROR) != 0 {
            bpf_set_retval(-EADDRINUSE);
        }
    }
    REFUSE
}

struct Socket {
    ctx: SockAddrContext,
}

impl hold::Socket for Socket {
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
    fn mark(&self) -> u32 {
        // SAFETY: the context is the program's own, and always has a socket.
        unsafe { (*(*self.ctx.sock_addr).__bindgen_anon_1.sk).mark }
    }

    #[inline(always)]
    fn publish(&self, key: &PublishKey) -> Option<&Publish> {
        PUBLISHES.get(&Key::new(PublishKey::BITS, *key))
    }
}
