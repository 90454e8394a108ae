//! nucnet's BPF programs: entry points only. What they decide is in `nucnet_common`.
#![no_std]
#![no_main]

mod maps;

use aya_ebpf::{
    macros::{cgroup_sock_addr, classifier},
    programs::{SockAddrContext, TcContext},
};
use maps::*;

#[classifier]
pub fn from_endpoint(ctx: TcContext) -> i32 {
    let _ = SETTINGS.get(0);
    let key = Default::default();
    let _ = (ENDPOINTS.get_ptr(0u32), ADDRESSES.get_ptr([0u8; 16]), FLOWS.get_ptr(&key));
    let _ = BINDINGS.remove(&key);
    let _ = SLOTS.get_ptr(0);
    let _ = USAGE.remove(0u32);
    let _ = UPLINKS.remove(0u32);
    let _ = (ctx.len(), PUBLISHES.remove(&aya_ebpf::btf_maps::lpm_trie::Key::new(0, Default::default())));
    let _ = (ctx.len(), POLICY_CIDRS.remove(&aya_ebpf::btf_maps::lpm_trie::Key::new(0, Default::default())));
    let _ = (ctx.len(), POLICY_PORTS.remove(&aya_ebpf::btf_maps::lpm_trie::Key::new(0, Default::default())));
    let _ = OUTSIDE.remove(nucnet_common::abi::OutsideKey::default());
    let _ = DROPS.remove(nucnet_common::abi::DropKey::default());
    -1
}
#[classifier]
pub fn from_uplink(_ctx: TcContext) -> i32 {
    -1
}
#[classifier]
pub fn from_uplink_l3(_ctx: TcContext) -> i32 {
    -1
}
#[classifier]
pub fn from_host(_ctx: TcContext) -> i32 {
    -1
}
#[cgroup_sock_addr(connect4)]
pub fn host_connect4(_ctx: SockAddrContext) -> i32 {
    1
}
#[cgroup_sock_addr(connect6)]
pub fn host_connect6(_ctx: SockAddrContext) -> i32 {
    1
}

#[panic_handler]
fn panic(_info: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 4] = *b"GPL\0";
