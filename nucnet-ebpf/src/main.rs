//! nucnet's BPF programs: entry points only. What they decide is in `nucnet_common`.
#![no_std]
#![no_main]
#![feature(asm_experimental_arch)]

// Under that name the macros of aya-log look for what they need.
extern crate self as aya_log_ebpf;

mod dry_run;
mod log;
mod maps;
mod skb;
mod sock;
mod step;

use core::mem::size_of;

use aya_ebpf::{
    bindings::{BPF_F_INGRESS, BPF_NOEXIST, TC_ACT_SHOT, TC_ACT_UNSPEC, bpf_redir_neigh},
    helpers::generated::{
        bpf_redirect, bpf_redirect_neigh, bpf_redirect_peer, bpf_skb_change_head,
        bpf_skb_change_type,
    },
    macros::classifier,
    programs::TcContext,
};
pub use log::macro_support;

use nucnet_common::{
    abi::{Address, DropCount, DropKey, Reason},
    answer::{self, Origin},
    env::{Host as _, Tables as _},
    event, guest, loopback,
    packet::{ETHERNET, is_v4},
    path::{self, Drop, Verdict, Way},
};
use skb::{AF_INET, AF_INET6, Skb, word, words};

/// The packet is for this host (`linux/if_packet.h`).
const PACKET_HOST: u32 = 0;

/// Everything that an endpoint sends.
#[classifier]
pub fn from_endpoint(ctx: TcContext) -> i32 {
    dry_run::begin();
    let skb = Skb { ctx };
    let Some(mut scratch) = skb.scratch() else {
        return TC_ACT_SHOT;
    };
    let verdict = path::from_endpoint(&skb, skb.link(), &mut scratch);
    skb.conclude(Origin::Endpoint, ETHERNET, verdict)
}

/// Everything that a microVM's guest sends.
#[classifier]
pub fn from_guest(ctx: TcContext) -> i32 {
    let skb = Skb { ctx };
    match guest::from_guest(&skb, skb.link(), skb.ethertype()) {
        Ok(link) => skb.redirect(&Way::Peer { link }),
        Err(drop) => skb.drop(&drop),
    }
}

/// Everything that a microVM's guest receives.
#[classifier]
pub fn to_guest(ctx: TcContext) -> i32 {
    let skb = Skb { ctx };
    match guest::to_guest(&skb, skb.link(), skb.ethertype()) {
        Ok(link) => skb.redirect(&Way::Link { link }),
        Err(drop) => skb.drop(&drop),
    }
}

/// Everything that comes in by an uplink with Ethernet headers.
#[classifier]
pub fn from_uplink(ctx: TcContext) -> i32 {
    arrived(ctx, ETHERNET)
}

/// Everything that comes in by an uplink without link-layer header.
#[classifier]
pub fn from_uplink_l3(ctx: TcContext) -> i32 {
    arrived(ctx, 0)
}

/// Everything that the host sends to endpoints.
#[classifier]
pub fn from_host(ctx: TcContext) -> i32 {
    dry_run::begin();
    let skb = Skb { ctx };
    let Some(mut scratch) = skb.scratch() else {
        return TC_ACT_SHOT;
    };
    let verdict = path::from_host(&skb, skb.ethertype(), &mut scratch);
    skb.conclude(Origin::Host, ETHERNET, verdict)
}

/// Everything that the host sends to itself.
#[classifier]
pub fn from_loopback(ctx: TcContext) -> i32 {
    let skb = Skb { ctx };
    match loopback::from_loopback(&skb, skb.link(), skb.ethertype()) {
        // SAFETY: the helper takes integers.
        Ok(Some(link)) => unsafe { bpf_redirect(link, 0) as i32 },
        Ok(None) => TC_ACT_UNSPEC,
        Err(drop) => skb.drop(&drop),
    }
}

#[inline(always)]
fn arrived(ctx: TcContext, header: u32) -> i32 {
    dry_run::begin();
    let skb = Skb { ctx };
    // Frames for others, which an uplink in promiscuous mode sees too, are not for endpoints.
    if skb.packet_type() != PACKET_HOST {
        return TC_ACT_UNSPEC;
    }
    let Some(mut scratch) = skb.scratch() else {
        return TC_ACT_SHOT;
    };
    let verdict = path::from_uplink(&skb, skb.link(), header, skb.ethertype(), &mut scratch);
    skb.conclude(Origin::Uplink, header, verdict)
}

impl Skb {
    /// Index of the interface that the program sits on.
    #[inline(always)]
    pub fn link(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).ifindex }
    }

    #[inline(always)]
    fn packet_type(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).pkt_type }
    }

    #[inline(always)]
    fn ethertype(&self) -> u16 {
        // SAFETY: the context is the program's own. The field is in network byte order.
        u16::from_be(unsafe { (*self.ctx.skb.skb).protocol } as u16)
    }

    /// Does what the verdict says. `header` bytes come before the IP packet.
    #[inline(always)]
    fn conclude(&self, origin: Origin, header: u32, verdict: Verdict<'_>) -> i32 {
        if dry_run::is_dry() {
            return dry_run::conclude(self, origin, verdict);
        }
        match verdict {
            Ok(way) if header == 0 => self.redirect_headerless(way),
            Ok(way) => self.redirect(way),
            Err(Drop { endpoint, reason }) => self.refuse(origin, header, endpoint, reason),
        }
    }

    /// Sends the packet where it is to go.
    #[inline(always)]
    fn redirect(&self, way: &Way) -> i32 {
        // SAFETY: the helpers take integers, and a buffer with its own size.
        let result = unsafe {
            match *way {
                Way::Pass => return TC_ACT_UNSPEC,
                Way::Peer { link } => {
                    // A frame that was addressed to the bridge is "for others" to the peer,
                    // and kernels before 6.16 drop it there.
                    if self.packet_type() != PACKET_HOST {
                        bpf_skb_change_type(self.ctx.skb.skb, PACKET_HOST);
                    }
                    bpf_redirect_peer(link, 0)
                }
                Way::Link { link } => bpf_redirect(link, 0),
                Way::Host { link } => bpf_redirect(link, BPF_F_INGRESS.into()),
                Way::Loopback { link, mark } => {
                    // It was addressed to the bridge; nobody would take that back.
                    bpf_skb_change_type(self.ctx.skb.skb, PACKET_HOST);
                    self.set_mark(mark);
                    bpf_redirect_neigh(link, core::ptr::null_mut(), 0, 0)
                }
                Way::Uplink { link, ref next_hop } => redirect_neigh(link, next_hop),
            }
        };
        result as i32
    }

    /// Counts a packet that is dropped, and tells monitors, and its sender where that is due.
    /// `header` bytes come before the IP packet.
    #[inline(never)]
    fn refuse(&self, origin: Origin, header: u32, endpoint: u32, reason: Reason) -> i32 {
        let drop = Drop { endpoint, reason };
        self.count_drop(&drop);
        event::refused(self, &drop, header, self.ethertype());
        let flags = match origin {
            Origin::Host => BPF_F_INGRESS,
            Origin::Endpoint | Origin::Uplink => 0,
        };
        match answer::answer(self, origin, self.link(), &drop) {
            // SAFETY: the helper takes integers.
            Some(link) => unsafe { bpf_redirect(link, flags.into()) as i32 },
            None => TC_ACT_SHOT,
        }
    }

    /// The same for a packet without link-layer header, of which every endpoint expects one.
    /// A function of its own: its stack would be the entry's for all that the entry calls.
    #[inline(never)]
    fn redirect_headerless(&self, way: &Way) -> i32 {
        if let Way::Peer { link } | Way::Link { link } = *way {
            // SAFETY: the context is the program's own.
            if unsafe { bpf_skb_change_head(self.ctx.skb.skb, ETHERNET, 0) } != 0
                || path::add_header(self, link, self.ethertype()).is_err()
            {
                return TC_ACT_SHOT;
            }
        }
        self.redirect(way)
    }

    /// Drops a packet without an answer to its sender: counts it, and tells monitors.
    #[inline(never)]
    fn drop(&self, drop: &Drop) -> i32 {
        self.count_drop(drop);
        event::refused(self, drop, ETHERNET, self.ethertype());
        TC_ACT_SHOT
    }

    #[inline(always)]
    fn count_drop(&self, drop: &Drop) {
        let key = DropKey {
            endpoint: drop.endpoint,
            reason: drop.reason as u32,
        };
        let bytes = u64::from(self.ctx.len());
        match maps::DROPS.get_ptr_mut(key) {
            Some(count) => {
                // SAFETY: a per-CPU value, which nobody else writes while the program runs.
                unsafe {
                    (*count).packets += 1;
                    (*count).bytes += bytes;
                }
            }
            None => {
                // Full: the packet is dropped all the same, uncounted.
                let _ =
                    maps::DROPS.insert(key, DropCount { packets: 1, bytes }, BPF_NOEXIST.into());
            }
        }
    }
}

/// Hands a packet to a neighbour beyond an uplink. The kernel resolves the neighbour and keeps
/// the packet until it has: nothing is lost, and nothing leaves with a stale address.
#[inline(always)]
unsafe fn redirect_neigh(link: u32, next_hop: &Address) -> i64 {
    // SAFETY: an all-zero `bpf_redir_neigh` is a valid one.
    let mut neighbour: bpf_redir_neigh = unsafe { core::mem::zeroed() };
    if is_v4(next_hop) {
        neighbour.nh_family = AF_INET.into();
        neighbour.__bindgen_anon_1.ipv4_nh = word(next_hop, 12);
    } else {
        neighbour.nh_family = AF_INET6.into();
        neighbour.__bindgen_anon_1.ipv6_nh = words(next_hop);
    }
    // SAFETY: the buffer is as large as it says.
    unsafe { bpf_redirect_neigh(link, &mut neighbour, size_of::<bpf_redir_neigh>() as i32, 0) }
}

/// Never reached: `cargo xtask verify-object` refuses an object with a call to it.
#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
