//! What the logic writes down during a journey: notes and the draft of an event. Both are found
//! as the journey before left them.

use std::{
    cell::Cell,
    ops::{Deref, DerefMut},
    rc::Rc,
};

use nucnet_common::{
    abi::{Binding, Flow, FlowKey, OutsideKey},
    env::{Dead, Held, Route, RouteKind, Scratch},
    fragment,
    packet::{Family, Fragment, Kind, Packet, Rewrite},
    path::Way,
    place::Place,
};

/// Room to write in of which there is one, as a processor has it: what is noted in it is what
/// the next one who takes it finds.
#[derive(Debug)]
pub struct Room<T: Copy> {
    notes: T,
    home: Rc<Cell<Option<T>>>,
}

impl<T: Copy> Room<T> {
    /// Takes it, until it is dropped.
    pub(super) fn take(home: &Rc<Cell<Option<T>>>) -> Self {
        Self {
            notes: home.take().expect("one at a time"),
            home: Rc::clone(home),
        }
    }
}

impl<T: Copy> Deref for Room<T> {
    type Target = T;

    fn deref(&self) -> &T {
        &self.notes
    }
}

impl<T: Copy> DerefMut for Room<T> {
    fn deref_mut(&mut self) -> &mut T {
        &mut self.notes
    }
}

impl<T: Copy> Drop for Room<T> {
    fn drop(&mut self) {
        self.home.set(Some(self.notes));
    }
}

/// Notes that make no sense to any journey.
pub(super) fn blank() -> Scratch {
    let garbage = [0xee; 16];
    let key = FlowKey {
        endpoint: 0xeeee_eeee,
        protocol: 0xeeee_eeee,
        inside: garbage,
        peer: garbage,
        inside_port: 0xeeee,
        peer_port: 0xeeee,
    };
    let outside = OutsideKey {
        protocol: 0xeeee_eeee,
        external: garbage,
        peer: garbage,
        external_port: 0xeeee,
        peer_port: 0xeeee,
    };
    let held = Held {
        version: 0xeeee_eeee,
        holds: 0xeeee_eeee,
        key,
    };
    let packet = Packet {
        source: garbage,
        destination: garbage,
        source_port: 0xeeee,
        destination_port: 0xeeee,
        l3: 0xeeee,
        l4: 0xeeee,
        length: 0xeeee,
        identification: 0xeeee_eeee,
        fragment: Fragment::Later,
        family: Family::V6,
        kind: Kind::Other,
        protocol: 0xee,
        ttl: 0xee,
        flags: 0xee,
        header_checksum: [0xee; 2],
    };
    Scratch {
        packet,
        quoted: packet,
        rewrite: Rewrite::none(&packet),
        from: 0xeeee_eeee,
        fragments: fragment::Key {
            from: 0xeeee_eeee,
            identification: 0xeeee_eeee,
            source: garbage,
            destination: garbage,
            protocol: 0xeeee_eeee,
        },
        note: fragment::Note {
            seen: u64::MAX,
            flow: key,
            source_port: 0xeeee,
            destination_port: 0xeeee,
            is_inside: 0xeeee_eeee,
            pad: 0,
        },
        key,
        outside,
        found: key,
        flow: Flow {
            external: garbage,
            peer: garbage,
            next_hop: garbage,
            inside_hop: garbage,
            mapping: 0xeeee_eeee,
            flags: 0xeeee_eeee,
            macs: [0xee; 12],
            mtu: 0xeeee_eeee,
            reserved: [0xee; 8],
            ..Flow::default()
        },
        binding: Binding {
            external: garbage,
            external_port: 0xeeee,
            is_for_questions: 0xeeee,
            reserved: [0xee; 8],
            ..Binding::default()
        },
        inside: key,
        bound: outside,
        route: Route {
            kind: RouteKind::Local,
            link: 0xeeee_eeee,
            next_hop: garbage,
            source: garbage,
            macs: [0xee; 12],
            mtu: 0xeeee_eeee,
        },
        way: Way::Uplink {
            link: 0xeeee_eeee,
            next_hop: garbage,
        },
        mtu: 0xeeee_eeee,
        dead: Dead {
            held,
            outside,
            named: key,
            best: 0xeeee_eeee,
            place: Place {
                index: 0xeeee_eeee,
                version: 0xeeee_eeee,
            },
        },
        policy: 0xeeee_eeee,
        rule: 0xeeee_eeee,
        rejects: true,
    }
}
