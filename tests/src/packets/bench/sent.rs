//! What a row expects of a frame that it sent.

use std::{fmt::Write as _, net::IpAddr};

use nucnet_common::{
    abi::{Delivery, Mac, Reason},
    path::Way,
};
use nucnet_ctl::model::to_abi;

use super::{Frame, ROUTER_MAC};
use crate::packets::{
    engine::{Hook, Outcome},
    packet::{self, Packet},
    site::{self, Party},
};

/// A frame that was sent, and what became of it.
#[must_use]
#[derive(Debug)]
pub struct Sent {
    pub(super) hook: Hook,
    pub(super) account: u32,
    pub(super) input: Vec<u8>,
    pub(super) outcome: Outcome,
    pub(super) output: Vec<u8>,
}

impl Sent {
    /// It goes on as it is.
    #[track_caller]
    pub fn passes(&self) {
        self.expect(Outcome::Passed);
        self.expect_bytes(&self.input);
    }

    /// It goes on as this packet.
    #[track_caller]
    pub fn passes_as(&self, packet: &Packet) {
        self.expect(Outcome::Passed);
        self.expect_bytes(&packet.framed(self.mac_at(0), self.mac_at(6)));
    }

    /// It is dropped, on the account of the endpoint that it comes from or that the host sends
    /// it to, or on nobody's if it comes from outside.
    #[track_caller]
    pub fn is_dropped(&self, reason: Reason) {
        self.is_dropped_for(self.account, reason);
    }

    /// It is dropped on an endpoint's account.
    #[track_caller]
    pub fn is_dropped_for(&self, endpoint: u32, reason: Reason) {
        self.expect(Outcome::Dropped { endpoint, reason });
        self.expect_bytes(&self.input);
    }

    /// It is dropped on the account of the endpoint that it comes from, or that the host sends it
    /// to, and its sender is told that it may not: the policy denies it, or the resources are used
    /// up.
    #[track_caller]
    pub fn is_refused(&self, reason: Reason) {
        let start = if self.is_v4() { [3, 13] } else { [1, 1] };
        self.is_told(
            self.account,
            reason,
            &[start[0], start[1], 0, 0, 0, 0, 0, 0],
        );
    }

    /// It is dropped on an endpoint's account since its time to live is used up, and its sender
    /// is told.
    #[track_caller]
    pub fn expires(&self, endpoint: u32) {
        let kind = if self.is_v4() { 11 } else { 3 };
        let start = [kind, 0, 0, 0, 0, 0, 0, 0];
        self.is_told(endpoint, Reason::TtlExceeded, &start);
    }

    /// It is dropped on an endpoint's account for being longer than this, and its sender is told.
    #[track_caller]
    pub fn exceeds(&self, endpoint: u32, mtu: u16) {
        let [high, low] = mtu.to_be_bytes();
        let start = if self.is_v4() {
            [3, 4, 0, 0, 0, 0, high, low]
        } else {
            [2, 0, 0, 0, 0, 0, high, low]
        };
        self.is_told(endpoint, Reason::TooBig, &start);
    }

    /// It is dropped on an endpoint's account, and its sender gets an error that starts so and
    /// quotes it: an endpoint from its gateway, everybody else from whom it was sent to.
    #[track_caller]
    pub fn is_told(&self, endpoint: u32, reason: Reason, start: &[u8; 8]) {
        let l3 = match self.hook {
            Hook::FromUplinkL3 { .. } => 0,
            _ => 14,
        };
        let packet = &self.input[l3..];
        let (source, destination, quoted, whole): (IpAddr, IpAddr, _, _) = if self.is_v4() {
            let at = |at: usize| {
                <[u8; 4]>::try_from(&packet[at..at + 4])
                    .expect("four")
                    .into()
            };
            let length = usize::from(u16::from_be_bytes([packet[2], packet[3]]));
            (at(12), at(16), 548, length)
        } else {
            let at = |at: usize| {
                <[u8; 16]>::try_from(&packet[at..at + 16])
                    .expect("16")
                    .into()
            };
            let length = usize::from(u16::from_be_bytes([packet[4], packet[5]]));
            (at(8), at(24), 1232, 40 + length)
        };
        let (link, from) = match self.hook {
            Hook::FromEndpoint { link } => {
                let gateways = site::PARTIES
                    .iter()
                    .find(|party| party.link == link)
                    .map(|party| site::interface(party.bridge).addresses)
                    .expect("endpoint");
                let gateway = gateways[usize::from(source.is_ipv6())].0;
                (link, gateway)
            }
            Hook::FromUplink { link }
            | Hook::FromUplinkL3 { link }
            | Hook::FromHost { link, .. } => (link, destination),
            Hook::FromGuest { .. } | Hook::ToGuest { .. } | Hook::FromLoopback { .. } => {
                panic!("nobody is told anything here")
            }
        };
        self.expect(Outcome::Refused {
            endpoint,
            reason,
            link: Some(link),
        });
        let error = packet::icmp(from, source, *start)
            .payload(&packet[..whole.min(quoted)])
            .of_router();
        let error = if l3 == 0 {
            error
        } else {
            error.macs(self.mac_at(6), self.mac_at(0))
        };
        self.expect_bytes(&error.bytes());
    }

    /// It is dropped on the account of the endpoint that it comes from, which gets this reset.
    #[track_caller]
    pub fn is_reset(&self, reason: Reason, reset: &Packet) {
        let Hook::FromEndpoint { link } = self.hook else {
            panic!("only endpoints get resets");
        };
        self.expect(Outcome::Refused {
            endpoint: self.account,
            reason,
            link: Some(link),
        });
        self.expect_bytes(&reset.framed(self.mac_at(6), self.mac_at(0)));
    }

    /// Whether it was dropped and its sender told so.
    pub fn was_told(&self) -> bool {
        matches!(self.outcome, Outcome::Refused { .. })
    }

    fn is_v4(&self) -> bool {
        let l3 = match self.hook {
            Hook::FromUplinkL3 { .. } => 0,
            _ => 14,
        };
        self.input[l3] >> 4 == 4
    }

    /// It reaches an endpoint as this packet.
    #[track_caller]
    pub fn reaches(&self, party: &Party, packet: &Packet) {
        let link = party.link;
        self.expect(Outcome::Redirected(Some(match party.delivery {
            Delivery::Peer => Way::Peer { link },
            Delivery::Link => Way::Link { link },
        })));
        let expected = packet.clone().macs(party.mac, party.gateway_mac());
        self.expect_bytes(&expected.bytes());
    }

    /// It is put onto the interface of an endpoint as this packet, having come off the bridge.
    #[track_caller]
    pub fn is_put_through(&self, party: &Party, packet: &Packet) {
        let link = party.link;
        self.expect(Outcome::Redirected(Some(Way::Link { link })));
        let expected = packet.clone().macs(party.mac, party.gateway_mac());
        self.expect_bytes(&expected.bytes());
    }

    /// It leaves by an uplink for a neighbour there as this packet. The kernel fills the
    /// link-layer addresses in.
    #[track_caller]
    pub fn leaves(&self, link: u32, next_hop: IpAddr, packet: &Packet) {
        let next_hop = to_abi(next_hop);
        self.expect(Outcome::Redirected(Some(Way::Uplink { link, next_hop })));
        self.expect_bytes(&packet.framed(self.mac_at(0), self.mac_at(6)));
    }

    /// It goes back out of an uplink to the frame address that its peer's packets come from.
    #[track_caller]
    pub fn goes_back(&self, link: u32, packet: &Packet) {
        self.goes_straight(link, ROUTER_MAC, packet);
    }

    /// It goes out of an uplink to a link-layer address there.
    #[track_caller]
    pub fn goes_straight(&self, link: u32, to: Mac, packet: &Packet) {
        self.expect(Outcome::Redirected(Some(Way::Link { link })));
        self.expect_bytes(&packet.framed(to, site::interface(link).mac));
    }

    /// It reaches the host by way of a bridge, as this packet.
    #[track_caller]
    pub fn reaches_host(&self, link: u32, packet: &Packet) {
        self.expect(Outcome::Redirected(Some(Way::Host { link })));
        self.expect_bytes(&packet.framed(self.mac_at(0), self.mac_at(6)));
    }

    /// It crosses the slot of a microVM, whichever way, as this frame.
    #[track_caller]
    pub fn crosses(&self, frame: &impl Frame) {
        self.expect(Outcome::Redirected(Some(match self.hook {
            Hook::FromGuest { .. } => Way::Peer { link: site::WIRE },
            _ => Way::Link { link: site::TAP },
        })));
        self.expect_bytes(&frame.framed(self.mac_at(0), self.mac_at(6)));
    }

    /// It goes somewhere, changed or not.
    #[track_caller]
    pub fn is_redirected(&self) {
        assert!(
            matches!(self.outcome, Outcome::Redirected(_)),
            "{:?}: it is {:?}",
            self.hook,
            self.outcome
        );
    }

    /// It reaches the host by way of the loopback interface, where it is this packet.
    #[track_caller]
    pub fn reaches_loopback(&self, packet: &Packet) {
        let link = site::LOOPBACK;
        match packet.destination() {
            IpAddr::V4(to) => {
                let mark = u32::from_ne_bytes(to.octets());
                self.expect(Outcome::Redirected(Some(Way::Loopback { link, mark })));
                let (to, from) = (self.mac_at(0), self.mac_at(6));
                self.expect_bytes(&hidden(packet, to, from));
            }
            IpAddr::V6(_) => {
                self.expect(Outcome::Redirected(Some(Way::Host { link })));
                self.expect_bytes(&packet.framed([0; 6], [0; 6]));
            }
        }
    }

    /// It comes back to the endpoint that sent it as this frame.
    #[track_caller]
    pub fn is_answered(&self, expected: &[u8]) {
        let Hook::FromEndpoint { link } = self.hook else {
            panic!("only endpoints are answered");
        };
        self.expect(Outcome::Redirected(Some(Way::Link { link })));
        self.expect_bytes(expected);
    }

    fn mac_at(&self, offset: usize) -> Mac {
        self.input[offset..offset + 6]
            .try_into()
            .expect("six bytes")
    }

    #[track_caller]
    fn expect(&self, expected: Outcome) {
        assert!(
            self.outcome.is(&expected),
            "{:?}: expected {expected:?}, it is {:?}\n{}",
            self.hook,
            self.outcome,
            hex(&self.input, &self.input)
        );
    }

    #[track_caller]
    fn expect_bytes(&self, expected: &[u8]) {
        assert!(
            self.output == expected,
            "{:?}: expected\n{}found\n{}",
            self.hook,
            hex(expected, &self.output),
            hex(&self.output, expected)
        );
    }
}

/// An IPv4 packet with 127.0.0.1 for its destination, but for the checksum of what it carries.
pub fn hidden(packet: &Packet, to: Mac, from: Mac) -> Vec<u8> {
    const HEADERS: std::ops::Range<usize> = 0..34;
    let mut bytes = packet.framed(to, from);
    let other = packet.clone().to_address(site::address("127.0.0.1"));
    bytes[HEADERS].copy_from_slice(&other.framed(to, from)[HEADERS]);
    bytes
}

/// Bytes in lines of sixteen; those that differ from others are marked.
fn hex(bytes: &[u8], others: &[u8]) -> String {
    let mut text = String::new();
    for (number, line) in bytes.chunks(16).enumerate() {
        let _ = write!(text, "  {:4}", 16 * number);
        for (column, byte) in line.iter().enumerate() {
            let same = others.get(16 * number + column) == Some(byte);
            let mark = if same { ' ' } else { '*' };
            let _ = write!(text, " {mark}{byte:02x}");
        }
        text.push('\n');
    }
    text
}
