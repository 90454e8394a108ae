//! Static mappings: hosts beyond the second uplink, in and out.

use std::net::IpAddr;

use nucnet_common::{
    abi::{EventKind, FlowState, MAPPED, Reason},
    mapping::inside_view,
};
use nucnet_ctl::model::{
    Cidr,
    mapping::{MappingSpec, PortList},
    publish::Protocol,
    to_abi,
};

use super::{Family, Row, each_family};
use crate::packets::{
    bench::{Bench, Egress},
    engine::Socket,
    packet::{echo_reply, echo_request, tcp, udp},
    site::{SECOND_UPLINK, STRAY, UPLINK, WEB},
};

pub(super) const ROWS: &[Row] = &[
    each_family!(mapped_port_leads_to_a_host_beyond_and_its_replies_go_back),
    each_family!(mapped_datagram_leads_to_a_host_beyond_and_its_replies_go_back),
    each_family!(mapping_to_the_address_of_an_endpoint_is_a_publish),
    each_family!(mapping_takes_nothing_by_another_interface_or_for_an_address_that_is_not_local),
    each_family!(mapped_host_is_nobody_elsewhere),
    each_family!(mapped_hosts_packets_cross_a_router),
    each_family!(same_client_port_by_two_mapped_ports_stays_apart),
    each_family!(socket_of_the_host_wins_over_a_mapping),
    each_family!(hairpin_shows_neighbours_as_the_host_and_takes_nobody_else),
    each_family!(sources_of_a_mapping_leave_with_its_address_and_replies_come_back),
    each_family!(echo_request_of_a_mapped_source_gets_its_reply),
    each_family!(mapped_source_to_the_host_or_a_network_is_not_translated),
    each_family!(segment_without_connection_of_a_mapped_source_does_not_leave),
    each_family!(endpoint_reaches_a_mapped_host_by_the_external_address),
    each_family!(endpoint_reaches_no_mapped_host_that_its_policy_denies),
    each_family!(endpoint_within_the_sources_of_a_mapping_leaves_with_its_address),
    each_family!(flow_of_a_mapped_host_is_told_when_it_is_opened_and_closed),
    each_family!(flows_of_a_mapped_host_leave_nothing_when_they_are_over),
];

/// What is beyond the second uplink: the host's address there, a server, a neighbour of its.
pub fn lan(ip: &Family) -> (IpAddr, IpAddr, IpAddr) {
    let (host, server, client) = match ip.host.is_ipv4() {
        true => ("198.18.0.1", "198.18.0.5", "198.18.0.7"),
        false => ("2001:db8:2::1", "2001:db8:2::5", "2001:db8:2::7"),
    };
    let address = |text: &str| text.parse().expect("address");
    (address(host), address(server), address(client))
}

/// The subnet of these.
pub fn subnet(ip: &Family) -> Cidr {
    let text = match ip.host.is_ipv4() {
        true => "198.18.0.0/24",
        false => "2001:db8:2::/64",
    };
    text.parse().expect("subnet")
}

fn ports(text: &str) -> PortList {
    text.parse().expect("ports")
}

/// `dnat` of a port of the host to port 80 of an address.
fn dnat(ip: &Family, port: &str, protocol: Protocol, to: IpAddr) -> MappingSpec {
    MappingSpec::dnat(ip.host, ports(port), protocol, to, Some(80), None).expect("dnat")
}

fn snat(ip: &Family) -> MappingSpec {
    MappingSpec::snat(subnet(ip), ip.host, None).expect("snat")
}

fn mapped_port_leads_to_a_host_beyond_and_its_replies_go_back(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, server), None, 0);
    let (client, host, server) = ((ip.client, 40_000), (ip.host, 8080), (server, 80));
    bench.from_uplink(UPLINK, &tcp("S", client, host)).leaves(
        SECOND_UPLINK,
        server.0,
        &tcp("S", client, server).ttl(63),
    );
    bench
        .from_uplink(SECOND_UPLINK, &tcp("SA", server, client))
        .leaves(UPLINK, ip.router, &tcp("SA", host, client).ttl(63));
    bench
        .from_uplink(UPLINK, &tcp("A", client, host).payload("GET /"))
        .leaves(
            SECOND_UPLINK,
            server.0,
            &tcp("A", client, server).payload("GET /").ttl(63),
        );
    assert_eq!(bench.only_state(), FlowState::Established);
    let (key, flow) = bench.only_flow();
    assert_eq!((key.endpoint, flow.mapping), (MAPPED, 1));
    assert_eq!((flow.packets_in, flow.packets_out), (2, 1));
    for beside in [8079, 8081] {
        bench
            .from_uplink(UPLINK, &tcp("S", client, (ip.host, beside)))
            .passes();
    }
}

fn mapped_datagram_leads_to_a_host_beyond_and_its_replies_go_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Udp, server), None, 0);
    let (client, host, server) = ((ip.client, 40_000), (ip.host, 8080), (server, 80));
    bench.from_uplink(UPLINK, &udp(client, host)).leaves(
        SECOND_UPLINK,
        server.0,
        &udp(client, server).ttl(63),
    );
    bench
        .from_uplink(SECOND_UPLINK, &udp(server, client).payload("an answer"))
        .leaves(
            UPLINK,
            ip.router,
            &udp(host, client).payload("an answer").ttl(63),
        );
    bench.from_uplink(UPLINK, &tcp("S", client, host)).passes();
}

fn mapping_to_the_address_of_an_endpoint_is_a_publish(bench: &mut Bench<'_>, ip: &Family) {
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, ip.web), None, 0);
    let (client, host, web) = ((ip.client, 40_000), (ip.host, 8080), (ip.web, 80));
    bench.comes_in(&tcp("S", client, host), &WEB, web);
    bench.goes_out(&WEB, &tcp("SA", web, client), host);
    let (key, flow) = bench.only_flow();
    assert_eq!((key.endpoint, flow.mapping), (WEB.number, 1));
}

fn mapping_takes_nothing_by_another_interface_or_for_an_address_that_is_not_local(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (_, server, neighbour) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, server), None, UPLINK);
    bench
        .from_uplink(
            SECOND_UPLINK,
            &tcp("S", (neighbour, 40_000), (ip.host, 8080)),
        )
        .passes();
    let elsewhere = MappingSpec::dnat(ip.server, ports("8080"), Protocol::Tcp, server, None, None);
    bench.map(2, &elsewhere.expect("dnat"), None, 0);
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.server, 8080)))
        .passes();
    assert_eq!(bench.counts(), (0, 0));
}

fn mapped_host_is_nobody_elsewhere(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Udp, server), None, 0);
    let (client, host, server) = ((ip.client, 40_000), (ip.host, 8080), (server, 80));
    bench.from_uplink(UPLINK, &udp(client, host)).leaves(
        SECOND_UPLINK,
        server.0,
        &udp(client, server).ttl(63),
    );
    bench
        .from_uplink(UPLINK, &udp(server, client))
        .is_dropped_for(MAPPED, Reason::MartianSource);
    bench
        .from_uplink(UPLINK, &udp((ip.web, 5), host))
        .is_dropped(Reason::MartianSource);
    bench
        .from_uplink(UPLINK, &udp((ip.host, 5), host))
        .is_dropped(Reason::MartianSource);
}

fn mapped_hosts_packets_cross_a_router(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Udp, server), None, 0);
    let (client, host) = ((ip.client, 40_000), (ip.host, 8080));
    bench
        .from_uplink(UPLINK, &udp(client, host).ttl(1))
        .expires(MAPPED);
    bench.from_uplink(UPLINK, &udp(client, host).ttl(2)).leaves(
        SECOND_UPLINK,
        server,
        &udp(client, (server, 80)).ttl(1),
    );
}

fn same_client_port_by_two_mapped_ports_stays_apart(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Udp, server), None, 0);
    bench.map(2, &dnat(ip, "8081", Protocol::Udp, server), None, 0);
    let client = (ip.client, 30_000);
    bench
        .from_uplink(UPLINK, &udp(client, (ip.host, 8080)))
        .leaves(SECOND_UPLINK, server, &udp(client, (server, 80)).ttl(63));
    bench
        .from_uplink(UPLINK, &udp(client, (ip.host, 8081)))
        .is_redirected();
    let state = bench.state();
    let other = state.flows.keys().find(|key| key.peer_port != 30_000);
    let seen = (ip.client, other.expect("another port").peer_port);
    for (seen, external) in [(client, 8080), (seen, 8081)] {
        bench
            .from_uplink(SECOND_UPLINK, &udp((server, 80), seen))
            .leaves(UPLINK, ip.router, &udp((ip.host, external), client).ttl(63));
    }
}

fn socket_of_the_host_wins_over_a_mapping(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, server), None, 0);
    bench.socket(Socket::Listener((ip.host, 8080).into()));
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), (ip.host, 8080)))
        .passes();
}

fn hairpin_shows_neighbours_as_the_host_and_takes_nobody_else(bench: &mut Bench<'_>, ip: &Family) {
    let (own, server, neighbour) = lan(ip);
    let hairpin = MappingSpec::hairpin(ip.host, server, ports("80"), Protocol::Tcp, None);
    bench.map(1, &hairpin.expect("hairpin"), Some(subnet(ip)), 0);
    let (client, host) = ((neighbour, 40_000), (ip.host, 80));
    let sent = bench.from_uplink(SECOND_UPLINK, &tcp("S", client, host));
    let (key, _) = bench.only_flow();
    let seen = (own, key.peer_port);
    sent.leaves(SECOND_UPLINK, server, &tcp("S", seen, (server, 80)).ttl(63));
    bench
        .from_uplink(SECOND_UPLINK, &tcp("SA", (server, 80), seen))
        .leaves(SECOND_UPLINK, neighbour, &tcp("SA", host, client).ttl(63));
    bench
        .from_uplink(UPLINK, &tcp("S", (ip.client, 40_000), host))
        .passes();
    assert_eq!(bench.counts(), (1, 0));
}

fn sources_of_a_mapping_leave_with_its_address_and_replies_come_back(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (_, _, source) = lan(ip);
    bench.map(1, &snat(ip), None, 0);
    let (inside, host, server) = ((source, 5000), (ip.host, 5000), (ip.server, 443));
    bench
        .from_uplink(SECOND_UPLINK, &tcp("S", inside, server))
        .leaves(UPLINK, ip.router, &tcp("S", host, server).ttl(63));
    bench.from_uplink(UPLINK, &tcp("SA", server, host)).leaves(
        SECOND_UPLINK,
        source,
        &tcp("SA", server, inside).ttl(63),
    );
    bench
        .from_uplink(SECOND_UPLINK, &udp(inside, server))
        .leaves(UPLINK, ip.router, &udp(host, server).ttl(63));
    bench
        .from_uplink(UPLINK, &udp(server, host).payload("reply"))
        .leaves(
            SECOND_UPLINK,
            source,
            &udp(server, inside).payload("reply").ttl(63),
        );
    assert_eq!(bench.counts(), (2, 1));
}

fn echo_request_of_a_mapped_source_gets_its_reply(bench: &mut Bench<'_>, ip: &Family) {
    let (_, _, source) = lan(ip);
    bench.map(1, &snat(ip), None, 0);
    let sent = bench.from_uplink(SECOND_UPLINK, &echo_request(source, ip.server, 77));
    let identifier = bench.only_flow().1.external_port;
    sent.leaves(
        UPLINK,
        ip.router,
        &echo_request(ip.host, ip.server, identifier).ttl(63),
    );
    bench
        .from_uplink(SECOND_UPLINK, &echo_request(source, ip.server, 77))
        .leaves(
            UPLINK,
            ip.router,
            &echo_request(ip.host, ip.server, identifier).ttl(63),
        );
    bench
        .from_uplink(UPLINK, &echo_reply(ip.server, ip.host, identifier))
        .leaves(
            SECOND_UPLINK,
            source,
            &echo_reply(ip.server, source, 77).ttl(63),
        );
    // For the host, though it has the identifier of a flow.
    bench
        .from_uplink(UPLINK, &echo_request(ip.server, ip.host, identifier))
        .passes();
}

fn mapped_source_to_the_host_or_a_network_is_not_translated(bench: &mut Bench<'_>, ip: &Family) {
    let (own, server, source) = lan(ip);
    bench.map(1, &snat(ip), None, 0);
    for to in [own, ip.host, ip.gateway, ip.web, server, ip.nowhere] {
        bench
            .from_uplink(SECOND_UPLINK, &udp((source, 5000), (to, 53)))
            .passes();
    }
    // From where no reply would go to it.
    bench
        .from_uplink(UPLINK, &udp((source, 5000), (ip.server, 53)))
        .passes();
    // To where nucnet has no program.
    bench
        .from_uplink(SECOND_UPLINK, &udp((source, 5000), (ip.stranger, 53)))
        .passes();
    assert_ne!(STRAY, SECOND_UPLINK);
    assert_eq!(bench.counts(), (0, 0));
}

fn segment_without_connection_of_a_mapped_source_does_not_leave(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (_, _, source) = lan(ip);
    bench.map(1, &snat(ip), None, 0);
    bench
        .from_uplink(SECOND_UPLINK, &tcp("A", (source, 5000), (ip.server, 443)))
        .is_dropped(Reason::NoFlow);
}

fn endpoint_reaches_a_mapped_host_by_the_external_address(bench: &mut Bench<'_>, ip: &Family) {
    let (own, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, server), None, 0);
    let (web, host, seen) = ((ip.web, 5000), (ip.host, 8080), (own, 5000));
    bench.from_endpoint(&WEB, &tcp("S", web, host)).leaves(
        SECOND_UPLINK,
        server,
        &tcp("S", seen, (server, 80)).ttl(63),
    );
    bench
        .from_uplink(SECOND_UPLINK, &tcp("SA", (server, 80), seen))
        .reaches(&WEB, &tcp("SA", host, web).ttl(63));
}

fn endpoint_reaches_no_mapped_host_that_its_policy_denies(bench: &mut Bench<'_>, ip: &Family) {
    let (own, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, server), None, 0);
    let (web, host, seen) = ((ip.web, 5000), (ip.host, 8080), (own, 5000));
    bench.from_endpoint(&WEB, &tcp("S", web, host)).leaves(
        SECOND_UPLINK,
        server,
        &tcp("S", seen, (server, 80)).ttl(63),
    );
    // Whether or not there is a flow.
    let denied = Cidr::host(server).to_string();
    bench.egress(&WEB, Egress::deny(&[&denied]));
    for source in [web, (ip.web, 5001)] {
        bench
            .from_endpoint(&WEB, &tcp("S", source, host))
            .is_dropped(Reason::Policy);
    }
    // What is allowed is what is asked for.
    let asked = Cidr::host(ip.host).to_string();
    bench.egress(&WEB, Egress::allow(&[&asked]));
    bench
        .from_endpoint(&WEB, &tcp("S", web, host))
        .is_redirected();
}

fn endpoint_within_the_sources_of_a_mapping_leaves_with_its_address(
    bench: &mut Bench<'_>,
    ip: &Family,
) {
    let (own, _, _) = lan(ip);
    let int = Cidr::host(ip.web);
    let snat = MappingSpec::snat(int, own, None).expect("snat");
    bench.map(1, &snat, None, 0);
    let (web, server) = ((ip.web, 5000), (ip.server, 443));
    bench.goes_out(&WEB, &udp(web, server), (own, 5000));
    bench.comes_in(&udp(server, (own, 5000)), &WEB, web);
}

fn flow_of_a_mapped_host_is_told_when_it_is_opened_and_closed(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Tcp, server), None, 0);
    bench.watch();
    let (client, host) = ((ip.client, 40_000), (ip.host, 8080));
    let _ = bench.from_uplink(UPLINK, &tcp("S", client, host));
    let event = bench.only_event();
    assert_eq!(
        (event.kind, event.endpoint),
        (EventKind::FlowNew as u32, MAPPED)
    );
    assert_eq!(
        (event.source, event.source_port),
        (to_abi(client.0), client.1)
    );
    assert_eq!(
        (event.destination, event.destination_port),
        (to_abi(host.0), host.1)
    );
    assert_eq!(
        (event.nat_destination, event.nat_destination_port),
        (to_abi(server), 80)
    );
    let _ = bench.from_uplink(SECOND_UPLINK, &tcp("SA", (server, 80), client));
    assert_eq!(bench.events(), [], "an answer is no event");
    let _ = bench.from_uplink(UPLINK, &tcp("R", client, host));
    let event = bench.only_event();
    assert_eq!(
        (event.kind, event.packets),
        (EventKind::FlowClosed as u32, 3)
    );
}

fn flows_of_a_mapped_host_leave_nothing_when_they_are_over(bench: &mut Bench<'_>, ip: &Family) {
    let (_, server, _) = lan(ip);
    bench.map(1, &dnat(ip, "8080", Protocol::Udp, server), None, 0);
    let (client, host) = ((ip.client, 40_000), (ip.host, 8080));
    let first = bench.from_uplink(UPLINK, &udp(client, host));
    first.leaves(SECOND_UPLINK, server, &udp(client, (server, 80)).ttl(63));
    let (key, _) = bench.only_flow();
    assert_eq!(bench.state().outside.get(&inside_view(&key)), Some(&key));
    bench.wait(60.0);
    // The reply comes too late, and is nobody's.
    bench
        .from_uplink(SECOND_UPLINK, &udp((server, 80), client))
        .passes();
    let state = bench.state();
    assert!(
        state.flows.is_empty() && state.outside.is_empty(),
        "{state:?}"
    );
}
