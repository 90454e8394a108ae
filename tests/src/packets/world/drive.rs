//! The test's hands on the world: what is in the tables, what time it is, and which frames come.

use std::{
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use nucnet_common::{
    abi::{
        Address, Endpoint, Event, Guest, Mac, Network, Owner, PolicyCidrKey, PolicyClass,
        PolicyPortKey, PolicyRule, Publish, PublishKey, Settings, SlotUse, Snat, SnatKey,
        StaticMapping, Uplink, Usage,
    },
    answer::{self, Origin},
    env::{Scratch, Tables as _},
    event, guest, hold, loopback,
    packet::Frame,
    path::{self, Drop, Way},
};
use nucnet_ctl::model::to_abi;

use super::{World, entry::values, host::Caller, notes::Room};
use crate::packets::{
    engine::{Engine, Hook, Outcome, Socket, State},
    site,
};

impl Engine for World {
    fn settings(&mut self, settings: &Settings) {
        self.settings = *settings;
    }

    fn network(&mut self, number: u32, network: &Network) {
        self.networks.insert(number, *network);
    }

    fn endpoint(&mut self, link: u32, endpoint: Option<&Endpoint>) {
        match endpoint {
            Some(endpoint) => self.endpoints.insert(link, *endpoint),
            None => self.endpoints.remove(&link),
        };
    }

    fn guest(&mut self, link: u32, guest: &Guest) {
        self.guests.insert(link, *guest);
    }

    fn owner(&mut self, address: &Address, owner: &Owner) {
        self.owners.insert(*address, *owner);
    }

    fn uplink(&mut self, link: u32, uplink: Option<&Uplink>) {
        match uplink {
            Some(uplink) => self.uplinks.insert(link, *uplink),
            None => self.uplinks.remove(&link),
        };
    }

    fn usage(&mut self, endpoint: u32, usage: &Usage) {
        self.usage.get_mut().insert(endpoint, *usage);
    }

    fn publish(&mut self, bits: u32, key: &PublishKey, publish: &Publish) {
        self.publishes.insert(bits, *key, *publish);
    }

    fn hairpin(&mut self, bits: u32, key: &PublishKey, publish: &Publish) {
        self.hairpins.insert(bits, *key, *publish);
    }

    fn mapping(&mut self, number: u32, mapping: &StaticMapping) {
        self.mappings.insert(number, *mapping);
    }

    fn snat(&mut self, bits: u32, key: &SnatKey, snat: &Snat) {
        self.snats.insert(bits, *key, *snat);
    }

    fn policy_class(&mut self, bits: u32, key: &PolicyCidrKey, class: &PolicyClass) {
        self.policy_cidrs.insert(bits, *key, *class);
    }

    fn policy_rule(&mut self, bits: u32, key: &PolicyPortKey, rule: &PolicyRule) {
        self.policy_ports.insert(bits, *key, *rule);
    }

    fn socket(&mut self, socket: Socket) {
        self.sockets.push(socket);
    }

    fn pass(&mut self, time: Duration) {
        self.now += time.as_nanos() as u64;
    }

    fn neighbour(&mut self, link: u32, address: IpAddr, mac: Mac) {
        self.neighbours.insert((link, to_abi(address)), mac);
    }

    fn hide_sources(&mut self) {
        self.hides_sources = true;
    }

    fn mtu(&mut self, link: u32, bytes: u32) {
        self.mtus.insert(link, bytes);
    }

    fn hide_mtus(&mut self) {
        self.hides_mtus = true;
    }

    fn segment(&mut self, bytes: u32) {
        self.segment = bytes;
    }

    fn may_bind(&self, is_hosts: bool, mark: u32, protocol: u8, at: SocketAddr) -> bool {
        let caller = Caller {
            world: self,
            netns_cookie: u64::from(!is_hosts) + site::SETTINGS.netns_cookie,
            mark,
        };
        !hold::is_published(&caller, &to_abi(at.ip()), at.port(), protocol)
    }

    fn draw(&mut self, number: u32) {
        self.drawn = Some(number);
    }

    fn shortest_frame(&self, _: u16) -> usize {
        0
    }

    /// What `nucnet-ebpf`'s entry points do around the logic: which journey it is, and that an
    /// uplink's frames for others are left alone.
    fn run(&mut self, hook: Hook, frame: &[u8]) -> (Outcome, Vec<u8>) {
        *self.frame.get_mut() = frame.to_vec();
        self.ingress = 0;
        self.mark.set(0);
        self.tag = None;
        // The kernel takes tags out of frames before any program sees them.
        if let Some(&[0x81, 0x00, high, low]) = frame.get(12..16) {
            self.tag = Some([0x81, 0x00, high, low]);
            self.frame.get_mut().drain(12..16);
        }
        let ethertype = self
            .load(12)
            .map_or(0, |bytes: [u8; 2]| u16::from_be_bytes(bytes));
        let verdict = match hook {
            Hook::FromEndpoint { link } => {
                path::from_endpoint(self, link, &mut self.notes()).copied()
            }
            Hook::FromGuest { link } => {
                guest::from_guest(self, link, ethertype).map(|link| Way::Peer { link })
            }
            Hook::ToGuest { link } => {
                guest::to_guest(self, link, ethertype).map(|link| Way::Link { link })
            }
            Hook::FromUplink { link } => {
                if frame.get(..6) == Some(&site::interface(link).mac) {
                    self.arrived(link, 14, ethertype)
                } else {
                    Ok(Way::Pass)
                }
            }
            Hook::FromUplinkL3 { link } => {
                let ethertype = match frame.first().map(|first| first >> 4) {
                    Some(6) => 0x86dd,
                    _ => 0x0800,
                };
                self.headerless(link, ethertype)
            }
            Hook::FromHost { ingress, .. } => {
                self.ingress = ingress;
                path::from_host(self, ethertype, &mut self.notes()).copied()
            }
            Hook::FromLoopback { ingress, mark } => {
                self.ingress = ingress;
                self.mark.set(mark);
                let link = loopback::from_loopback(self, site::LOOPBACK, ethertype);
                link.map(|link| link.map_or(Way::Pass, |link| Way::Link { link }))
            }
        };
        let outcome = match verdict {
            Ok(Way::Pass) => Outcome::Passed,
            Ok(way) => Outcome::Redirected(Some(way)),
            Err(drop) => {
                let header = match hook {
                    Hook::FromUplinkL3 { .. } => 0,
                    _ => 14,
                };
                event::refused(self, &drop, header, ethertype);
                let Drop { endpoint, reason } = drop;
                let answer = match hook {
                    Hook::FromEndpoint { link } => Some((Origin::Endpoint, link)),
                    Hook::FromUplink { link } | Hook::FromUplinkL3 { link } => {
                        Some((Origin::Uplink, link))
                    }
                    Hook::FromHost { link, .. } => Some((Origin::Host, link)),
                    Hook::FromGuest { .. } | Hook::ToGuest { .. } | Hook::FromLoopback { .. } => {
                        None
                    }
                };
                match answer.and_then(|(origin, link)| answer::answer(self, origin, link, &drop)) {
                    Some(link) => Outcome::Refused {
                        endpoint,
                        reason,
                        link: Some(link),
                    },
                    None => Outcome::Dropped { endpoint, reason },
                }
            }
        };
        let mut frame = std::mem::take(self.frame.get_mut());
        if let Some(tag) = self.tag {
            frame.splice(12..12, tag);
        }
        (outcome, frame)
    }

    fn watch(&mut self) {
        self.watched = true;
    }

    fn events(&mut self) -> Vec<Event> {
        std::mem::take(self.events.get_mut())
    }

    fn state(&self) -> State {
        let slots = self.slots.borrow();
        State {
            now: self.now,
            flows: values(&self.flows),
            outside: self.outside.borrow().clone(),
            bindings: values(&self.bindings),
            slots: slots
                .iter()
                .filter(|(_, held)| held.holds != SlotUse::Free as u32)
                .map(|(index, held)| (*index, *held))
                .collect(),
            usage: self.usage.borrow().clone(),
        }
    }
}

impl World {
    fn notes(&self) -> Room<Scratch> {
        self.scratch().expect("there always are")
    }

    fn arrived(&self, link: u32, header: u32, ethertype: u16) -> Result<Way, Drop> {
        path::from_uplink(self, link, header, ethertype, &mut self.notes()).copied()
    }

    fn headerless(&mut self, link: u32, ethertype: u16) -> Result<Way, Drop> {
        let verdict = self.arrived(link, 0, ethertype);
        if let Ok(Way::Peer { link } | Way::Link { link }) = verdict {
            self.frame.get_mut().splice(0..0, [0; 14]);
            path::add_header(self, link, ethertype).expect("room for a header");
        }
        verdict
    }
}
