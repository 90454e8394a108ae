//! What becomes of a packet where rules carry it: its way through the kernel's chains, as far as
//! nucnet's rules are on it. Rules of others are not looked at.

use super::{
    Chain, Table, Tuple,
    walk::{AddressKind, Outcome, Packet, Unknown, walk},
};
use crate::model::ports::PortRange;
use nucnet_common::{
    abi::{self, Reason},
    packet::{ICMP, ICMPV6},
};
use std::net::IpAddr;

/// A connection that the kernel knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Connection {
    /// As its first packet was sent.
    pub original: Tuple,
    /// As the answer to it is.
    pub reply: Tuple,
    /// Whether there was an answer.
    pub is_answered: bool,
}

impl Connection {
    fn of_packet(sent: Tuple) -> Self {
        Self {
            original: sent,
            reply: sent.turned(),
            is_answered: false,
        }
    }
}

/// Where a packet comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WayIn<'a> {
    /// By what it comes in.
    pub link: &'a str,
    /// Who makes its frame.
    pub mac: abi::Mac,
}

/// Where the kernel's routes send a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Way {
    /// To the host.
    Local,
    /// Nowhere.
    None,
    /// Nowhere: it cannot come from where it comes from.
    Martian,
    /// Out of an interface.
    Link {
        /// Its name.
        link: String,
        /// To which neighbour.
        next_hop: IpAddr,
    },
}

/// What only the kernel can tell.
pub trait Surroundings {
    /// Why it could not.
    type Error: From<Unknown>;

    /// Whose an address is.
    fn kind(&self, address: IpAddr) -> Result<AddressKind, Self::Error>;

    /// Where a packet that came in by an interface goes.
    fn way(&self, packet: &Tuple, in_link: &str) -> Result<Way, Self::Error>;

    /// With which address of the host's a packet leaves by an interface that gives it its own.
    fn source(
        &self,
        packet: &Tuple,
        link: &str,
        next_hop: IpAddr,
    ) -> Result<Option<IpAddr>, Self::Error>;
}

/// Where a packet ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// At the host.
    Host,
    /// Beyond an interface.
    Link {
        /// Its name.
        link: String,
        /// At which neighbour.
        next_hop: IpAddr,
    },
    /// Nowhere.
    Dropped {
        /// Why.
        reason: Reason,
        /// Whether its sender is told.
        is_told: bool,
    },
}

/// What becomes of a packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Journey {
    /// Where it ends.
    pub end: End,
    /// The number of the rule of a policy that decided; none: none did.
    pub policy_rule: Option<u32>,
    /// Whether the kernel knows its connection.
    pub is_known: bool,
    /// As it arrives, or was when it was dropped.
    pub arrival: Tuple,
    /// Whether its source port is one that is chosen when it comes.
    pub is_port_drawn: bool,
}

impl Journey {
    /// Follows a packet through rules that are in place. `known` are the connections that the
    /// kernel knows.
    pub fn follow<S: Surroundings>(
        chains: &[Chain],
        origin: WayIn<'_>,
        sent: Tuple,
        known: &[Connection],
        surroundings: &S,
    ) -> Result<Self, S::Error> {
        let found = known_as(sent, known);
        let (connection, is_reply) = found.unwrap_or((Connection::of_packet(sent), false));
        let mut journey = Self {
            end: End::Host,
            policy_rule: None,
            is_known: found.is_some(),
            arrival: sent,
            is_port_drawn: false,
        };
        let settled = match is_reply {
            true => connection.original.turned(),
            false => connection.reply.turned(),
        };
        let mut packet = Packet {
            now: sent,
            destination_kind: surroundings.kind(sent.destination)?,
            mac: origin.mac,
            in_link: origin.link,
            out_link: "",
            original: connection.original,
            reply: connection.reply,
            is_reply,
            is_established: connection.is_answered,
        };
        if journey.is_stopped(chains, Table::Mangle, "PREROUTING", &packet)? {
            return Ok(journey);
        }

        if journey.is_known {
            packet.now.destination = settled.destination;
            packet.now.destination_port = settled.destination_port;
        } else if let Outcome::To(address, port) =
            walk(chains, Table::Nat, "PREROUTING", &packet)?.outcome
        {
            packet.now.destination = address;
            packet.now.destination_port = port.unwrap_or(packet.now.destination_port);
            packet.reply = packet.now.turned();
        }
        if packet.now.destination != sent.destination {
            packet.destination_kind = surroundings.kind(packet.now.destination)?;
        }
        journey.arrival = packet.now;

        let (link, next_hop) = match surroundings.way(&packet.now, origin.link)? {
            Way::Local => {
                journey.is_stopped(chains, Table::Filter, "INPUT", &packet)?;
                return Ok(journey);
            }
            Way::None => return Ok(journey.dropped(Reason::NoRoute)),
            Way::Martian => return Ok(journey.dropped(Reason::MartianSource)),
            Way::Link { link, next_hop } => (link, next_hop),
        };
        packet.out_link = &link;
        if journey.is_stopped(chains, Table::Filter, "FORWARD", &packet)? {
            return Ok(journey);
        }

        if journey.is_known {
            packet.now = settled;
        } else {
            let (address, ports) = match walk(chains, Table::Nat, "POSTROUTING", &packet)?.outcome {
                Outcome::From(None, ports) => {
                    (surroundings.source(&packet.now, &link, next_hop)?, ports)
                }
                Outcome::From(address, ports) => (address, ports),
                _ => (Some(packet.now.source), None),
            };
            // What has no address to leave with is dropped.
            let Some(address) = address else {
                return Ok(journey.dropped(Reason::NoRoute));
            };
            let port = source_port(&packet.now, address, ports, known);
            packet.now.source = address;
            journey.is_port_drawn = port.is_none();
            packet.now.source_port = port.unwrap_or(packet.now.source_port);
        }
        journey.arrival = packet.now;
        journey.end = End::Link { link, next_hop };
        Ok(journey)
    }

    /// Whether the rules at a hook end the journey.
    fn is_stopped(
        &mut self,
        chains: &[Chain],
        table: Table,
        hook: &str,
        packet: &Packet<'_>,
    ) -> Result<bool, Unknown> {
        let walk = walk(chains, table, hook, packet)?;
        self.policy_rule = walk.policy_rule.or(self.policy_rule);
        let Outcome::Dropped { reason, is_told } = walk.outcome else {
            return Ok(false);
        };
        self.end = End::Dropped { reason, is_told };
        Ok(true)
    }

    fn dropped(self, reason: Reason) -> Self {
        let is_told = false;
        Self {
            end: End::Dropped { reason, is_told },
            ..self
        }
    }
}

/// The connection of a packet, and whether the packet is an answer.
fn known_as(sent: Tuple, known: &[Connection]) -> Option<(Connection, bool)> {
    // An echo request is never an answer, whatever its identifier.
    let may_be_reply = !matches!(sent.protocol, ICMP | ICMPV6);
    let mut connections = known.iter().copied();
    connections.find_map(|connection| {
        if connection.original == sent {
            Some((connection, false))
        } else if may_be_reply && connection.reply == sent {
            Some((connection, true))
        } else {
            None
        }
    })
}

/// The port with which the first packet of a connection leaves, where that is settled already:
/// the one that other connections of its sender have, or its own (`get_unique_tuple` of the
/// kernel's `nf_nat_core.c`). None: one of `ports` is drawn.
fn source_port(
    packet: &Tuple,
    address: IpAddr,
    ports: Option<PortRange>,
    known: &[Connection],
) -> Option<u16> {
    let is_meant = |port| ports.is_none_or(|ports| ports.contains(port));
    let is_free = |port: &u16| {
        let leaving = Tuple {
            source: address,
            source_port: *port,
            ..*packet
        };
        let answer = leaving.turned();
        known.iter().all(|other| other.reply != answer)
    };
    let of_sender = known.iter().filter(|other| {
        other.original.sender() == packet.sender() && other.original.protocol == packet.protocol
    });
    let leaving = of_sender.map(|other| other.reply.turned());
    let mut given = leaving.filter(|other| other.source == address && is_meant(other.source_port));
    if let Some(first) = given.next() {
        // Which of several the kernel finds first nobody can tell.
        let is_one = given.all(|other| other.source_port == first.source_port);
        return Some(first.source_port).filter(|port| is_one && is_free(port));
    }
    Some(packet.source_port).filter(|port| is_meant(*port) && is_free(port))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::netfilter::{
        Family,
        rules::fixture::{endpoint, network, open, wanted},
    };
    use nucnet_common::packet::{TCP, UDP};
    use serde_json::{Value, json};

    const OWN_MAC: abi::Mac = [2, 0, 0, 0, 0, 7];
    const FROM_WEB: WayIn<'_> = WayIn {
        link: "nucnet0",
        mac: OWN_MAC,
    };
    const FROM_OUTSIDE: WayIn<'_> = WayIn {
        link: "eth0",
        mac: [2, 0, 0, 0, 0, 99],
    };

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// A host with the addresses 192.0.2.2 and 10.0.42.1, its network and a way to all others.
    struct Host;

    impl Surroundings for Host {
        type Error = Unknown;

        fn kind(&self, address: IpAddr) -> Result<AddressKind, Unknown> {
            let is_own = [ip("192.0.2.2"), ip("10.0.42.1")].contains(&address);
            Ok(match is_own {
                true => AddressKind::Local,
                false => AddressKind::Other,
            })
        }

        fn way(&self, packet: &Tuple, _: &str) -> Result<Way, Unknown> {
            let to = packet.destination;
            if self.kind(to)? == AddressKind::Local {
                return Ok(Way::Local);
            }
            Ok(match to.to_string().starts_with("10.0.42.") {
                true => Way::Link {
                    link: "nucnet0".into(),
                    next_hop: to,
                },
                false => Way::Link {
                    link: "eth0".into(),
                    next_hop: ip("192.0.2.254"),
                },
            })
        }

        fn source(&self, _: &Tuple, _: &str, _: IpAddr) -> Result<Option<IpAddr>, Unknown> {
            Ok(Some(ip("192.0.2.2")))
        }
    }

    fn packet(from: (&str, u16), to: (&str, u16)) -> Tuple {
        Tuple {
            source: ip(from.0),
            destination: ip(to.0),
            protocol: TCP,
            source_port: from.1,
            destination_port: to.1,
        }
    }

    /// What becomes of a packet by the rules of one endpoint.
    fn follow(
        (publishes, egress, isolate): (&[&str], Value, bool),
        origin: WayIn<'_>,
        sent: Tuple,
        known: &[Connection],
    ) -> Journey {
        let (network, record) = (network(isolate, &[]), endpoint(publishes, egress));
        let chains = wanted(&network, &record).chains(Family::Ipv4);
        Journey::follow(&chains, origin, sent, known, &Host).unwrap()
    }

    fn beyond(link: &str, next_hop: &str) -> End {
        End::Link {
            link: link.into(),
            next_hop: ip(next_hop),
        }
    }

    fn dropped(reason: Reason) -> End {
        let is_told = false;
        End::Dropped { reason, is_told }
    }

    #[test]
    fn what_leaves_has_the_uplinks_address_and_a_port_that_is_drawn() {
        let sent = packet(("10.0.42.7", 40_000), ("198.51.100.1", 443));
        let journey = follow((&[], open(), false), FROM_WEB, sent, &[]);
        assert_eq!(journey.end, beyond("eth0", "192.0.2.254"));
        assert_eq!(journey.arrival.source, ip("192.0.2.2"));
        assert_eq!(journey.arrival.destination, ip("198.51.100.1"));
        assert!(journey.is_port_drawn && !journey.is_known);
        // One of those that are drawn stays, unless somebody has it.
        let sent = packet(("10.0.42.7", 20_000), ("198.51.100.1", 443));
        let journey = follow((&[], open(), false), FROM_WEB, sent, &[]);
        assert_eq!(
            (journey.arrival.source_port, journey.is_port_drawn),
            (20_000, false)
        );
        let others = Connection {
            original: packet(("10.0.42.8", 5), ("198.51.100.1", 443)),
            reply: packet(("198.51.100.1", 443), ("192.0.2.2", 20_000)),
            is_answered: true,
        };
        let journey = follow((&[], open(), false), FROM_WEB, sent, &[others]);
        assert!(journey.is_port_drawn);
    }

    #[test]
    fn a_socket_keeps_the_port_that_it_was_given() {
        let udp = |tuple: Tuple| Tuple {
            protocol: UDP,
            ..tuple
        };
        let sent = udp(packet(("10.0.42.7", 40_000), ("198.51.100.1", 53)));
        let other = Connection {
            original: udp(packet(("10.0.42.7", 40_000), ("198.51.100.2", 53))),
            reply: udp(packet(("198.51.100.2", 53), ("192.0.2.2", 17_000))),
            is_answered: true,
        };
        let journey = follow((&[], open(), false), FROM_WEB, sent, &[other]);
        assert_eq!(
            (journey.arrival.source_port, journey.is_port_drawn),
            (17_000, false)
        );
        // Of two, nobody knows which.
        let third = Connection {
            original: udp(packet(("10.0.42.7", 40_000), ("198.51.100.3", 53))),
            reply: udp(packet(("198.51.100.3", 53), ("192.0.2.2", 17_001))),
            is_answered: true,
        };
        let journey = follow((&[], open(), false), FROM_WEB, sent, &[other, third]);
        assert!(journey.is_port_drawn);
    }

    #[test]
    fn a_policy_names_the_rule_that_decides() {
        let egress = |reject: bool| {
            json!({
                "default": "deny", "allow": ["198.51.100.0/24:443/tcp", "host:53"],
                "deny": ["198.51.100.9"], "dns": [], "reject": reject,
            })
        };
        let asked = |to: (&str, u16), reject: bool| {
            let sent = packet(("10.0.42.7", 40_000), to);
            let journey = follow((&[], egress(reject), false), FROM_WEB, sent, &[]);
            (journey.end, journey.policy_rule)
        };
        let out = beyond("eth0", "192.0.2.254");
        assert_eq!(asked(("198.51.100.1", 443), false), (out, Some(1)));
        let denied = dropped(Reason::Policy);
        assert_eq!(
            asked(("198.51.100.9", 443), false),
            (denied.clone(), Some(3))
        );
        assert_eq!(asked(("198.51.100.1", 80), false), (denied.clone(), None));
        assert_eq!(asked(("192.0.2.2", 53), false), (End::Host, Some(2)));
        assert_eq!(asked(("192.0.2.2", 54), false), (denied, None));
        let told = End::Dropped {
            reason: Reason::Policy,
            is_told: true,
        };
        assert_eq!(asked(("198.51.100.9", 443), true), (told, Some(3)));
    }

    #[test]
    fn a_publish_is_judged_by_what_was_asked_for_and_by_where_it_leads() {
        let asked = |egress: Value| {
            let sent = packet(("10.0.42.7", 40_000), ("192.0.2.2", 8080));
            follow((&["8080:80"], egress, false), FROM_WEB, sent, &[])
        };
        let policy = |allow: &str, deny: &str| json!({"default": "deny", "allow": [allow], "deny": [deny], "dns": []});
        let journey = asked(policy("192.0.2.2:8080", "203.0.113.1"));
        assert_eq!(journey.end, beyond("nucnet0", "10.0.42.7"));
        // It would take a packet from its own address for a forged one.
        let seen = packet(("10.0.42.1", 40_000), ("10.0.42.7", 80));
        assert_eq!((journey.arrival, journey.policy_rule), (seen, Some(1)));
        let journey = asked(policy("192.0.2.2:8080", "10.0.42.7:80"));
        assert_eq!(journey.end, dropped(Reason::Policy));
        assert_eq!(journey.policy_rule, Some(2));
        let journey = asked(policy("10.0.42.7:80", "203.0.113.1"));
        assert_eq!(
            journey.end,
            dropped(Reason::Policy),
            "asked for was the host"
        );
    }

    #[test]
    fn from_outside_only_what_is_published_is_reached() {
        let asked = |to: (&str, u16), isolate: bool| {
            let sent = packet(("198.51.100.1", 5000), to);
            follow(
                (&["8080-8089:80-89"], open(), isolate),
                FROM_OUTSIDE,
                sent,
                &[],
            )
        };
        let journey = asked(("192.0.2.2", 8083), false);
        assert_eq!(journey.end, beyond("nucnet0", "10.0.42.7"));
        let seen = packet(("198.51.100.1", 5000), ("10.0.42.7", 83));
        assert_eq!((journey.arrival, journey.is_port_drawn), (seen, false));
        assert_eq!(asked(("192.0.2.2", 22), false).end, End::Host);
        let direct = asked(("10.0.42.7", 80), false);
        assert_eq!(direct.end, dropped(Reason::NotPublished));
        let direct = asked(("10.0.42.7", 80), true);
        assert_eq!(direct.end, dropped(Reason::Isolated));
    }

    #[test]
    fn nobody_sends_as_somebody_else() {
        let forged = packet(("10.0.42.9", 5000), ("198.51.100.1", 443));
        let journey = follow((&[], open(), false), FROM_WEB, forged, &[]);
        assert_eq!(journey.end, dropped(Reason::SpoofedAddress));
        let journey = follow((&[], open(), false), FROM_OUTSIDE, forged, &[]);
        assert_eq!(journey.end, dropped(Reason::MartianSource));
    }

    #[test]
    fn what_the_kernel_knows_goes_the_way_that_it_went() {
        let known = [
            Connection {
                original: packet(("10.0.42.7", 40_000), ("198.51.100.1", 443)),
                reply: packet(("198.51.100.1", 443), ("192.0.2.2", 20_000)),
                is_answered: true,
            },
            Connection {
                original: packet(("198.51.100.1", 5000), ("192.0.2.2", 8080)),
                reply: packet(("10.0.42.7", 80), ("198.51.100.1", 5000)),
                is_answered: true,
            },
        ];
        // A policy that came since judges what the endpoint opened, and no answers.
        let closed = json!({"default": "deny", "allow": [], "deny": [], "dns": []});
        for egress in [open(), closed.clone()] {
            let setup = || (&["8080:80"][..], egress.clone(), false);
            let answer = follow(setup(), FROM_WEB, known[1].reply, &known);
            assert_eq!(answer.end, beyond("eth0", "192.0.2.254"));
            assert_eq!(answer.arrival, known[1].original.turned());
            assert!(answer.is_known && !answer.is_port_drawn);
            let answer = follow(setup(), FROM_OUTSIDE, known[0].reply, &known);
            assert_eq!(answer.end, beyond("nucnet0", "10.0.42.7"));
            assert_eq!(answer.arrival, known[0].original.turned());
        }
        let out = follow((&[], open(), false), FROM_WEB, known[0].original, &known);
        assert_eq!(out.arrival, known[0].reply.turned());
        let out = follow((&[], closed, false), FROM_WEB, known[0].original, &known);
        assert_eq!(out.end, dropped(Reason::Policy));
    }
}
