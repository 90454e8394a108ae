//! The guest of a microVM and the address that everybody else knows it by.
//!
//! Guests resume from one snapshot and therefore have all the same address, gateway and
//! link-layer address, each in a network namespace of its own. Before anything else sees a frame
//! of a guest, its address becomes the one of its slot, and that of its gateway the host's on the
//! link to the slot; on the way to it the same backwards. One to one, without any state: to the
//! other programs the guest is an endpoint like any.

use core::mem::offset_of;

use network_types::arp::ArpHdr;

use crate::{
    abi::{Address, Guest, Reason},
    embedded,
    env::{Env, Scratch},
    packet::{
        Balance, ETHERNET, ETHERTYPE_ARP, ETHERTYPE_IPV4, Frame, Kind, Rewrite, mapped, quarter,
        same,
    },
    path::Drop,
};

/// From a guest: `link` is its TAP. The interface to the other programs.
///
/// What is not the guest's to send is left as it is, for them to judge.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_guest<E: Env>(env: &E, link: u32, ethertype: u16) -> Result<u32, Drop> {
    let guest = known(env, link)?;
    let names = Names {
        guest: &guest.outer_address,
        gateway: &guest.outer_gateway,
        was_guest: &guest.address,
        was_gateway: &guest.gateway,
    };
    translate(env, ethertype, &names, true)
        .map(|()| guest.across)
        .map_err(|reason| Drop {
            endpoint: guest.endpoint,
            reason,
        })
}

/// To a guest: `link` is the interface to the other programs. The guest's TAP.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn to_guest<E: Env>(env: &E, link: u32, ethertype: u16) -> Result<u32, Drop> {
    let guest = known(env, link)?;
    let names = Names {
        guest: &guest.address,
        gateway: &guest.gateway,
        was_guest: &guest.outer_address,
        was_gateway: &guest.outer_gateway,
    };
    translate(env, ethertype, &names, false)
        .map(|()| guest.across)
        .map_err(|reason| Drop {
            endpoint: guest.endpoint,
            reason,
        })
}

#[inline(always)]
fn known<E: Env>(env: &E, link: u32) -> Result<&Guest, Drop> {
    env.guest(link).ok_or(Drop {
        endpoint: 0,
        reason: Reason::NoEndpoint,
    })
}

/// What guest and gateway were called, and are to be called.
struct Names<'a> {
    guest: &'a Address,
    gateway: &'a Address,
    was_guest: &'a Address,
    was_gateway: &'a Address,
}

impl Names<'_> {
    #[inline(always)]
    fn rename(&self, address: &mut Address) {
        if same(address, self.was_guest) {
            *address = *self.guest;
        } else if same(address, self.was_gateway) {
            *address = *self.gateway;
        }
    }
}

#[inline(always)]
fn translate<E: Env>(
    env: &E,
    ethertype: u16,
    names: &Names<'_>,
    is_sent: bool,
) -> Result<(), Reason> {
    match ethertype {
        ETHERTYPE_ARP => translate_arp(env, names),
        ETHERTYPE_IPV4 => {
            let mut scratch = env.scratch().ok_or(Reason::Helper)?;
            translate_packet(env, names, &mut scratch, is_sent)
        }
        _ => Ok(()),
    }
}

/// The addresses of an ARP message (RFC 826), which no checksum covers.
#[inline(always)]
fn translate_arp<F: Frame>(frame: &F, names: &Names<'_>) -> Result<(), Reason> {
    for at in [offset_of!(ArpHdr, spa), offset_of!(ArpHdr, tpa)] {
        let at = ETHERNET + at as u32;
        // Too short a frame says nothing to anybody.
        let Some(old) = frame.load::<4>(at) else {
            return Ok(());
        };
        let mut address = mapped(old);
        names.rename(&mut address);
        let new = quarter(&address, 12);
        if new != old {
            frame.store(at, &new, Balance::Unbalanced)?;
        }
    }
    Ok(())
}

#[inline(always)]
fn translate_packet<E: Env>(
    env: &E,
    names: &Names<'_>,
    scratch: &mut Scratch,
    is_sent: bool,
) -> Result<(), Reason> {
    if env
        .parse(&mut scratch.packet, ETHERNET, ETHERTYPE_IPV4)
        .is_err()
    {
        return Ok(());
    }
    // Under the name that it has elsewhere only: translated it would be taken for the guest's.
    if is_sent && same(&scratch.packet.source, names.guest) {
        return Err(Reason::SpoofedAddress);
    }
    let is_error = scratch.packet.kind == Kind::Error && embedded::read(env, scratch).is_ok();
    let Scratch {
        packet,
        quoted,
        rewrite,
        ..
    } = scratch;
    if is_error {
        *rewrite = Rewrite::none(quoted);
        names.rename(&mut rewrite.source);
        names.rename(&mut rewrite.destination);
        env.rewrite_quote(packet, quoted, rewrite)?;
    }
    *rewrite = Rewrite::none(packet);
    names.rename(&mut rewrite.source);
    names.rename(&mut rewrite.destination);
    env.rewrite(packet, rewrite)
}
