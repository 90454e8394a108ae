//! What WEB and the server say to each other in rows that are about something else.

use std::net::IpAddr;

use nucnet_common::abi::FlowState;

use super::Family;
use crate::packets::{
    bench::Bench,
    packet::{tcp, udp},
    site::WEB,
};

/// A connection of WEB's to the server.
pub(super) struct Connection<'i> {
    pub(super) ip: &'i Family,
}

impl Connection<'_> {
    /// WEB sends a segment, which leaves.
    #[track_caller]
    pub(super) fn out(&self, bench: &mut Bench<'_>, flags: &str) {
        let [web, host, server] = self.ends();
        bench.goes_out(&WEB, &tcp(flags, web, server), host);
    }

    /// The server sends one, which reaches WEB.
    #[track_caller]
    pub(super) fn back(&self, bench: &mut Bench<'_>, flags: &str) {
        let [web, host, server] = self.ends();
        bench.comes_in(&tcp(flags, server, host), &WEB, web);
    }

    /// As WEB has it, as the outside sees that, and the server.
    pub(super) fn ends(&self) -> [(IpAddr, u16); 3] {
        [
            (self.ip.web, 5000),
            (self.ip.host, 5000),
            (self.ip.server, 443),
        ]
    }

    /// Its three first segments.
    #[track_caller]
    pub(super) fn establish(&self, bench: &mut Bench<'_>) {
        self.out(bench, "S");
        self.back(bench, "SA");
        self.out(bench, "A");
        assert_eq!(bench.only_state(), FlowState::Established);
    }
}

/// A datagram of WEB's to a port of the server's.
#[track_caller]
pub(super) fn ask(bench: &mut Bench<'_>, ip: &Family, port: u16) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, port));
    bench.goes_out(&WEB, &udp(web, server), host);
}

/// The server's answer, which comes in.
#[track_caller]
pub(super) fn answer(bench: &mut Bench<'_>, ip: &Family, port: u16) {
    let (web, host, server) = ((ip.web, 5000), (ip.host, 5000), (ip.server, port));
    bench.comes_in(&udp(server, host), &WEB, web);
}
