//! From the host, by way of a network's bridge.

use super::{Noted, Verdict, Way, address_frame, allowed_still, end, opens, untranslatable};
use crate::{
    abi::{Endpoint, EventKind, FlowKey, PeerKind, Reason, SlotUse, flow_flag},
    env::{Env, Scratch},
    event,
    flow::{Side, advance, is_dead},
    guard,
    mtu::fits,
    nat::{begin, open},
    packet::{ETHERNET, ETHERTYPE_ARP, Kind},
    place::retire,
    ports::is_its_own,
};

/// From the host, by way of a network's bridge.
///
/// # Errors
/// The packet is to be dropped.
#[inline(always)]
pub fn from_host<'s, E: Env>(env: &E, ethertype: u16, scratch: &'s mut Scratch) -> Verdict<'s> {
    let mut account = 0;
    let outcome = from_host_for(env, ethertype, scratch, &mut account);
    end(outcome, scratch, account)
}

#[inline(always)]
fn from_host_for<E: Env>(
    env: &E,
    ethertype: u16,
    scratch: &mut Scratch,
    account: &mut u32,
) -> Result<Noted, Reason> {
    if env.is_tagged() {
        return Err(Reason::NotIp);
    }
    if ethertype == ETHERTYPE_ARP {
        // The host has a permanent neighbour for every endpoint; it asks for nobody.
        return Err(Reason::NoNeighbour);
    }
    env.parse(&mut scratch.packet, ETHERNET, ethertype)?;
    let packet = &scratch.packet;
    if guard::is_multicast(&packet.destination, packet.family) {
        return Err(Reason::Multicast);
    }
    let owner = env
        .owner(&packet.destination)
        .ok_or(Reason::NoSuchAddress)?;
    *account = owner.endpoint;
    let endpoint = env.endpoint(owner.link).ok_or(Reason::NoEndpoint)?;
    if packet.is_trackable() {
        fits(env, packet, endpoint.mtu, &mut scratch.mtu)?;
        track_from_host(env, endpoint, owner.link, scratch)?;
    } else if !matches!(packet.kind, Kind::Error | Kind::Icmp | Kind::Fragment) {
        return Err(untranslatable(packet));
    } else if env.is_forwarded() {
        return Err(Reason::NotPublished);
    }
    address_frame(env, endpoint)?;
    Ok(scratch.way.set(Way::Link { link: owner.link }))
}

/// Notes what the host sends, so that the endpoint's replies pass any policy. The host itself
/// is trusted: what belongs to no flow goes through all the same.
#[inline(always)]
fn track_from_host<E: Env>(
    env: &E,
    endpoint: &Endpoint,
    link: u32,
    scratch: &mut Scratch,
) -> Result<(), Reason> {
    let now = env.now();
    scratch.outside = scratch.packet.received_key();
    if env.outside(&scratch.outside, &mut scratch.key)
        && let Some(mut flow) = env.flow(&scratch.key)
    {
        if is_dead(&flow, now) {
            retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
        } else if !env.is_forwarded() || flow.peer_kind == PeerKind::Host as u32 {
            // An answer that a policy denies opens no way for more of them.
            allowed_still(env, endpoint, scratch, &mut flow)?;
            advance(
                env,
                &scratch.key,
                &mut flow,
                &scratch.packet,
                Side::Peer,
                now,
            );
            return Ok(());
        }
    }
    // What the host forwards is its own only as the answer to something sent to the host: by
    // way of a port forward of somebody else's, for instance.
    if env.is_forwarded() {
        return Err(Reason::NotPublished);
    }
    if !opens(&scratch.packet) {
        return Ok(());
    }
    let outside = &scratch.outside;
    scratch.key = FlowKey {
        endpoint: endpoint.number,
        protocol: outside.protocol,
        inside: outside.external,
        peer: outside.peer,
        inside_port: outside.external_port,
        peer_port: outside.peer_port,
    };
    // It may have asked there for what is published, and would take the host for that.
    if let Some(flow) = env.flow(&scratch.key) {
        if !is_dead(&flow, now) {
            return Err(Reason::PortsExhausted);
        }
        retire(env, SlotUse::Flow, &scratch.key, &mut scratch.dead);
    }
    if is_its_own(env, scratch, now) {
        return Err(Reason::PortsExhausted);
    }
    let network = env.network(endpoint.network).ok_or(Reason::NoEndpoint)?;
    begin(scratch, network, flow_flag::INBOUND, now);
    scratch.flow.policy = endpoint.policy;
    scratch.flow.peer_kind = PeerKind::Host as u32;
    scratch.flow.peer_link = endpoint.bridge;
    scratch.flow.link = link;
    open(env, scratch, now)?;
    if let Some(mut flow) = env.flow(&scratch.key) {
        event::flow(env, EventKind::FlowNew, &scratch.key, &flow);
        advance(
            env,
            &scratch.key,
            &mut flow,
            &scratch.packet,
            Side::Peer,
            now,
        );
    }
    Ok(())
}
