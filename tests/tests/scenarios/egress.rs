//! What containers may reach.

use std::net::{SocketAddr, SocketAddrV6};

use anyhow::{Context, Result, ensure};
use nucnet_tests::lab::{FAR, Family, HOST, Node, OUTSIDE, Pair, web};

use crate::case::{Case, Families, Scenario, silent, silent_udp, skip};

pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "egress_default_deny_lets_nothing_out",
        what: "not to the outside, not to a sibling, not to the host",
        families: Families::Each,
        run: deny_all,
    },
    Scenario {
        name: "egress_link_local_is_no_way_around_a_policy",
        what: "IPv6 works without being configured, and so must the policy (E10)",
        families: Families::Together,
        run: link_local,
    },
    Scenario {
        name: "egress_allow_opens_one_port_of_one_address",
        what: "a container that may talk to its database and to nothing else",
        families: Families::Each,
        run: allow_port,
    },
    Scenario {
        name: "egress_allow_of_a_network_opens_every_protocol",
        what: "--allow 192.0.2.0/24 is all of it, and nothing beside it",
        families: Families::Each,
        run: allow_network,
    },
    Scenario {
        name: "egress_rules_that_overlap_are_a_union",
        what: "a narrower rule does not hide a wider one",
        families: Families::Each,
        run: union,
    },
    Scenario {
        name: "egress_dns_opens_port_53_of_the_resolvers",
        what: "--dns with a rule: names can be looked up, elsewhere they cannot",
        families: Families::Each,
        run: dns,
    },
    Scenario {
        name: "egress_deny_without_rules_denies_dns_too",
        what: "--egress-default deny and no rule at all: DNS neither",
        families: Families::Each,
        run: dns_without_rules,
    },
    Scenario {
        name: "replies_to_inbound_pass_a_deny_all",
        what: "a server that may answer and never call",
        families: Families::Each,
        run: replies,
    },
    Scenario {
        name: "egress_policy_is_judged_on_the_destination_asked_for",
        what: "allowing the sibling does not allow the host's publish that leads to it",
        families: Families::Each,
        run: destination_asked_for,
    },
];

fn target(pair: Pair, case: &Case, suffix: &str) -> String {
    format!(
        "{}{suffix}",
        SocketAddr::new(pair.of(case.family), 0)
            .to_string()
            .replace(":0", "")
    )
}

/// That neither TCP nor UDP on a port nor a ping gets through.
fn closed(case: &Case, client: &Node, to: SocketAddr) -> Result<()> {
    silent(client, to)?;
    silent_udp(case, client, to)?;
    ensure!(!case.pings(client, to.ip())?, "{} answers pings", to.ip());
    Ok(())
}

fn deny_all(case: &Case) -> Result<()> {
    let (client, endpoint) = case.attached("client", &["--egress-default", "deny"])?;
    let (sibling, other) = case.attached("sibling", &[])?;
    let outside = (
        case.web(&case.lab.outside, 80)?,
        case.udp(&case.lab.outside, 80)?,
    );
    let inside = (case.web(&sibling, 80)?, case.udp(&sibling, 80)?);
    let host = (case.web(&case.lab.host, 80)?, case.udp(&case.lab.host, 80)?);
    for address in [
        OUTSIDE.of(case.family),
        FAR.of(case.family),
        HOST.of(case.family),
        endpoint.gateway(case.family)?,
        other.address(case.family)?,
    ] {
        closed(case, &client, SocketAddr::new(address, 80))?;
    }
    for (web, udp) in [outside, inside, host] {
        ensure!(
            web.clients().is_empty() && udp.seen().is_empty(),
            "something got out"
        );
    }
    case.counted("policy")
}

fn link_local(case: &Case) -> Result<()> {
    let (client, _) = case.attached("client", &["--egress-default", "deny"])?;
    let any = SocketAddr::new(Family::V6.any(), 80);
    let server = web::Server::start(case.lab.host.listen(any)?)?;
    let text = case
        .lab
        .host
        .run("ip", &["-6", "-o", "addr", "show", "scope", "link"])?;
    let words = text
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>());
    let bridge = words.filter(|words| words.get(1).is_some_and(|name| !name.starts_with("eth")));
    let link = client.within(|| nix::net::if_::if_nametoindex("eth0"))??;
    let mut tried = 0;
    for words in bridge {
        let address = words.get(3).and_then(|address| address.split('/').next());
        let address = address
            .with_context(|| format!("no address in {words:?}"))?
            .parse()?;
        silent(&client, SocketAddrV6::new(address, 80, 0, link).into())?;
        tried += 1;
    }
    ensure!(
        server.clients().is_empty(),
        "{:?} got through",
        server.clients()
    );
    if tried == 0 {
        return skip("the bridge has no link-local address");
    }
    Ok(())
}

fn allow_port(case: &Case) -> Result<()> {
    let rule = target(OUTSIDE, case, ":8080/tcp");
    let (client, _) = case.attached("client", &["--allow", &rule])?;
    let _allowed = case.web(&case.lab.outside, 8080)?;
    let denied = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 8080)?;
    case.who(&client, OUTSIDE.port(case.family, 8080))?;
    silent(&client, FAR.port(case.family, 8080))?;
    closed(case, &client, OUTSIDE.port(case.family, 80))?;
    silent_udp(case, &client, OUTSIDE.port(case.family, 8080))?;
    ensure!(
        denied.clients().is_empty(),
        "{:?} got out",
        denied.clients()
    );
    case.counted("policy")
}

fn allow_network(case: &Case) -> Result<()> {
    let prefix = if OUTSIDE.of(case.family).is_ipv4() {
        "192.0.2.0/24"
    } else {
        "2001:db8:1::/64"
    };
    let (client, _) = case.attached("client", &["--allow", prefix])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    case.who(&client, OUTSIDE.port(case.family, 80))?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    ensure!(
        case.pings(&client, OUTSIDE.of(case.family))?,
        "pings are denied"
    );
    closed(case, &client, FAR.port(case.family, 80))
}

fn union(case: &Case) -> Result<()> {
    let prefix = if OUTSIDE.of(case.family).is_ipv4() {
        "192.0.2.0/24"
    } else {
        "[2001:db8:1::/64]"
    };
    let wide = format!("{prefix}:80/tcp");
    let narrow = target(OUTSIDE, case, ":53/udp");
    let (client, _) = case.attached("client", &["--allow", &wide, "--allow", &narrow])?;
    let _web = case.web(&case.lab.outside, 80)?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    case.who(&client, OUTSIDE.port(case.family, 80))?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    silent(&client, OUTSIDE.port(case.family, 53))
}

fn dns(case: &Case) -> Result<()> {
    let resolver = OUTSIDE.of(case.family).to_string();
    let (client, _) = case.attached("client", &["--dns", &resolver, "--allow", "any:443/tcp"])?;
    let _udp = case.udp(&case.lab.outside, 53)?;
    let _tcp = case.web(&case.lab.outside, 53)?;
    let _web = case.web(&case.lab.outside, 443)?;
    case.who_udp(&client, OUTSIDE.port(case.family, 53))?;
    case.who(&client, OUTSIDE.port(case.family, 53))?;
    case.who(&client, FAR.port(case.family, 443))?;
    silent_udp(case, &client, FAR.port(case.family, 53))?;
    silent(&client, FAR.port(case.family, 53))
}

fn dns_without_rules(case: &Case) -> Result<()> {
    let resolver = OUTSIDE.of(case.family).to_string();
    let (client, _) = case.attached("client", &["--dns", &resolver, "--egress-default", "deny"])?;
    let server = case.udp(&case.lab.outside, 53)?;
    silent_udp(case, &client, OUTSIDE.port(case.family, 53))?;
    ensure!(server.seen().is_empty(), "it asked: {:?}", server.seen());
    Ok(())
}

fn replies(case: &Case) -> Result<()> {
    let words = [
        "--egress-default",
        "deny",
        "-p",
        "8080:80",
        "-p",
        "5300:53/udp",
    ];
    let (server, endpoint) = case.attached("server", &words)?;
    let (sibling, _) = case.attached("sibling", &[])?;
    let _web = case.web(&server, 80)?;
    let _udp = case.udp(&server, 53)?;
    let outside = case.web(&case.lab.outside, 80)?;
    case.who(&case.lab.outside, HOST.port(case.family, 8080))?;
    case.who_udp(&case.lab.outside, HOST.port(case.family, 5300))?;
    case.who(
        &case.lab.host,
        SocketAddr::new(case.family.loopback(), 8080),
    )?;
    let address = endpoint.address(case.family)?;
    case.who(&case.lab.host, SocketAddr::new(address, 80))?;
    case.who(&sibling, SocketAddr::new(address, 80))?;
    silent(&server, OUTSIDE.port(case.family, 80))?;
    ensure!(
        outside.clients().is_empty(),
        "{:?} got out",
        outside.clients()
    );
    Ok(())
}

fn destination_asked_for(case: &Case) -> Result<()> {
    let (web, endpoint) = case.attached("web", &["-p", "8080:80"])?;
    let _server = case.web(&web, 80)?;
    let address = endpoint.address(case.family)?.to_string();
    let (client, _) = case.attached("client", &["--allow", &address])?;
    case.who(&client, SocketAddr::new(endpoint.address(case.family)?, 80))?;
    silent(&client, HOST.port(case.family, 8080))?;
    let host = HOST.of(case.family).to_string();
    let (other, _) = case.attached("other", &["--allow", &host])?;
    case.who(&other, HOST.port(case.family, 8080))?;
    silent(&other, SocketAddr::new(endpoint.address(case.family)?, 80))
}
