//! Maximum transmission units: what is too long for the link that it is to leave by.
//!
//! What the kernel redirects it does not measure: a frame that is too long vanishes in the
//! driver, and a train of segments (GSO, GRO) is cut as it was put together. So each segment is
//! judged here, against the route's and the endpoint's unit, and the sender is told
//! (RFC 4787 REQ-13), by an error that [`crate::icmp`] builds.
//!
//! Nothing can be cut in the programs. A datagram that allows it (REQ-13a) is dropped all the
//! same, but its sender is told, too: Linux, for one, then cuts before it sends.

use crate::{
    abi::Reason,
    env::{Env, Route},
    packet::{Packet, TCP},
};

/// Whether a packet fits a link; `told` is where the unit is noted if not. An `mtu` of 0 is not
/// known, and fits everything.
///
/// # Errors
/// [`Reason::TooBig`].
#[inline(always)]
pub fn fits<E: Env>(env: &E, packet: &Packet, mtu: u32, told: &mut u32) -> Result<(), Reason> {
    if packet.length <= mtu || mtu == 0 {
        return Ok(());
    }
    judge_segments(env, packet, mtu, told)
}

#[inline(never)]
fn judge_segments<E: Env>(
    env: &E,
    packet: &Packet,
    mtu: u32,
    told: &mut u32,
) -> Result<(), Reason> {
    let segment = env.segment();
    if segment != 0 {
        let mut header = 8;
        if packet.protocol == TCP {
            let [offset]: [u8; 1] = env.load(packet.l4 + 12).ok_or(Reason::Malformed)?;
            header = u32::from(offset >> 4) * 4;
        }
        if packet.l4 - packet.l3 + header + segment <= mtu {
            return Ok(());
        }
    }
    *told = mtu;
    Err(Reason::TooBig)
}

/// The unit of a route: the kernel's word, or that of the uplink where it does not say (before
/// Linux 5.12); 0: unknown.
#[inline(never)]
pub fn of_route<E: Env>(env: &E, route: &Route) -> u32 {
    if route.mtu != 0 {
        return route.mtu;
    }
    env.uplink(route.link).map_or(0, |uplink| uplink.mtu)
}
