//! What the kernel knows: clock, random numbers, routes, sockets.

use core::mem::size_of;

use aya_ebpf::{
    EbpfContext as _,
    bindings::{
        BPF_F_CURRENT_NETNS, BPF_FIB_LKUP_RET_FRAG_NEEDED, BPF_FIB_LKUP_RET_NO_NEIGH,
        BPF_FIB_LKUP_RET_NOT_FWDED, BPF_FIB_LKUP_RET_SUCCESS, BPF_FIB_LOOKUP_SRC, bpf_fib_lookup,
    },
    helpers::{
        bpf_get_prandom_u32, bpf_ktime_get_ns,
        generated::{
            bpf_fib_lookup as fib_lookup, bpf_sk_lookup_tcp, bpf_sk_lookup_udp, bpf_sk_release,
        },
    },
};
use nucnet_common::{
    abi::{Address, OutsideKey},
    env::{Host, Route, RouteKind},
    packet::{Family, TCP, UDP},
};

use super::{
    Skb,
    address::{AF_INET, AF_INET6, address, word, words},
};
use crate::{
    maps::{QUESTION, Question},
    step,
};

const EINVAL: i64 = -22;

impl Host for Skb {
    #[inline(always)]
    fn now(&self) -> u64 {
        // SAFETY: no arguments.
        unsafe { bpf_ktime_get_ns() }
    }

    #[inline(always)]
    fn random(&self) -> u32 {
        // SAFETY: no arguments.
        unsafe { bpf_get_prandom_u32() }
    }

    #[inline(always)]
    fn route(&self, from: u32, source: &Address, destination: &Address, route: &mut Route) {
        let Some(question) = QUESTION.get_ptr_mut(0) else {
            route.kind = RouteKind::None;
            return;
        };
        // SAFETY: nobody else has this processor's.
        unsafe {
            (*question).source = *source;
            (*question).destination = *destination;
            step::step_route(self.ctx.skb.skb, from);
            *route = (*question).route;
        }
    }

    #[inline(always)]
    fn has_socket(&self, key: &OutsideKey) -> bool {
        step::ask_about(key) && step::step_has_socket(self.ctx.skb.skb) != 0
    }

    #[inline(always)]
    fn segment(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).gso_size }
    }

    #[inline(always)]
    fn ingress(&self) -> u32 {
        // SAFETY: the context is the program's own.
        unsafe { (*self.ctx.skb.skb).ingress_ifindex }
    }

    #[inline(always)]
    fn mark(&self) -> u32 {
        // SAFETY: as above.
        unsafe { (*self.ctx.skb.skb).mark }
    }

    #[inline(always)]
    fn set_mark(&self, mark: u32) {
        // SAFETY: as above; the field may be written.
        unsafe { (*self.ctx.skb.skb).mark = mark };
    }
}

impl Skb {
    /// Looks a route up: that of `question.source` and `question.destination`.
    #[inline(always)]
    pub fn find_route(&self, from: u32, question: &mut Question) {
        let Question {
            params,
            source,
            destination,
            route,
            ..
        } = question;
        // SAFETY: any bytes are a valid `bpf_fib_lookup`, for which there is room.
        let params = unsafe { &mut *params.as_mut_ptr().cast::<bpf_fib_lookup>() };
        // With a length, whether the frame at hand fits is no question, and the unit part of the
        // answer (Linux 5.12).
        ask(params, from, source, destination, 1);
        route.kind = RouteKind::None;
        let mut result = self.look_up(params, BPF_FIB_LOOKUP_SRC);
        let mut knows_source = true;
        if result == EINVAL {
            // Before Linux 6.7 the flag is not known.
            knows_source = false;
            result = self.look_up(params, 0);
        }
        route.link = params.ifindex;
        route.source = [0; 16];
        route.macs = [0; 12];
        route.mtu = 0;
        if result == i64::from(BPF_FIB_LKUP_RET_NOT_FWDED) {
            route.kind = RouteKind::Local;
        } else if result == i64::from(BPF_FIB_LKUP_RET_SUCCESS)
            || result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH)
        {
            route.kind = RouteKind::Link;
            if result == i64::from(BPF_FIB_LKUP_RET_SUCCESS) {
                route.macs[..6].copy_from_slice(&params.dmac);
                route.macs[6..].copy_from_slice(&params.smac);
            }
            // SAFETY: all fields of these unions are integers, written by the kernel.
            unsafe {
                route.mtu = mtu_of(params);
                route.next_hop = address(params.family, &params.__bindgen_anon_4.ipv6_dst);
                if knows_source {
                    route.source = address(params.family, &params.__bindgen_anon_3.ipv6_src);
                }
            }
        }
        if result == i64::from(BPF_FIB_LKUP_RET_NO_NEIGH) {
            // Without neighbour, the unit is said only of what exceeds it.
            ask(params, from, source, destination, u16::MAX);
            if self.look_up(params, 0) == i64::from(BPF_FIB_LKUP_RET_FRAG_NEEDED) {
                route.mtu = mtu_of(params);
            }
        }
    }

    /// Looks a socket of the host up that takes packets of the external view `question.key`.
    #[inline(always)]
    pub fn find_socket(&self, question: &mut Question) -> bool {
        let Question { tuple, key, .. } = question;
        let (sport, dport) = (key.peer_port.to_be(), key.external_port.to_be());
        // SAFETY: any bytes are valid fields of unions of integers.
        let size = unsafe {
            match Family::of(&key.external) {
                Family::V4 => {
                    let v4 = &mut tuple.__bindgen_anon_1.ipv4;
                    v4.saddr = word(&key.peer, 12);
                    v4.daddr = word(&key.external, 12);
                    (v4.sport, v4.dport) = (sport, dport);
                    size_of_val(v4)
                }
                Family::V6 => {
                    let v6 = &mut tuple.__bindgen_anon_1.ipv6;
                    v6.saddr = words(&key.peer);
                    v6.daddr = words(&key.external);
                    (v6.sport, v6.dport) = (sport, dport);
                    size_of_val(v6)
                }
            }
        } as u32;
        let netns = BPF_F_CURRENT_NETNS as u64;
        // SAFETY: context and tuple are this run's own; every socket found is released.
        unsafe {
            let socket = if key.protocol == u32::from(TCP) {
                bpf_sk_lookup_tcp(self.ctx.as_ptr(), tuple, size, netns, 0)
            } else if key.protocol == u32::from(UDP) {
                bpf_sk_lookup_udp(self.ctx.as_ptr(), tuple, size, netns, 0)
            } else {
                return false;
            };
            if socket.is_null() {
                return false;
            }
            bpf_sk_release(socket.cast());
        }
        true
    }

    #[inline(always)]
    fn look_up(&self, params: &mut bpf_fib_lookup, flags: u32) -> i64 {
        // SAFETY: context and parameters are the program's own; the size is theirs.
        unsafe {
            fib_lookup(
                self.ctx.as_ptr(),
                params,
                size_of::<bpf_fib_lookup>() as i32,
                flags,
            )
        }
    }
}

/// Asks for the route of a packet of some length.
#[inline(never)]
fn ask(
    params: &mut bpf_fib_lookup,
    from: u32,
    source: &Address,
    destination: &Address,
    length: u16,
) {
    // SAFETY: an all-zero `bpf_fib_lookup` is a valid one.
    *params = unsafe { core::mem::zeroed() };
    params.ifindex = from;
    params.__bindgen_anon_1.tot_len = length;
    match Family::of(destination) {
        Family::V4 => {
            params.family = AF_INET;
            params.__bindgen_anon_3.ipv4_src = word(source, 12);
            params.__bindgen_anon_4.ipv4_dst = word(destination, 12);
        }
        Family::V6 => {
            params.family = AF_INET6;
            params.__bindgen_anon_3.ipv6_src = words(source);
            params.__bindgen_anon_4.ipv6_dst = words(destination);
        }
    }
}

/// The unit in an answer; 0: it is still the length that was asked about.
#[inline(always)]
fn mtu_of(params: &bpf_fib_lookup) -> u32 {
    // SAFETY: both fields of the union are integers.
    match unsafe { params.__bindgen_anon_1.mtu_result } {
        1 | u16::MAX => 0,
        mtu => mtu.into(),
    }
}
