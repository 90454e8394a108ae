//! Slots the way of the tools before nucnet: a namespace, a veth pair and a TAP by `ip`, and a
//! process for each rule. What they do by netlink themselves, one batch of `ip` does here.

use anyhow::Result;

use super::{Lab, seeds::Rules};

/// The names and addresses of a slot, as they give them.
struct Seed {
    netns: String,
    veth: String,
    /// By which the host knows the guest.
    host: String,
    /// The ends of the link, the host's first.
    ends: [String; 2],
}

const GUEST: &str = "169.254.0.21";

impl Seed {
    fn new(number: u16) -> Self {
        let address = |second, offset: u16| {
            let [high, low] = offset.to_be_bytes();
            format!("10.{second}.{high}.{low}")
        };
        Self {
            netns: format!("seed-{number}"),
            veth: format!("seed{number}"),
            host: address(11, number),
            ends: [address(12, 2 * number), address(12, 2 * number + 1)],
        }
    }

    /// The rules on the host: both ways may be forwarded, and what leaves has the uplink's address.
    fn rules(&self) -> [String; 3] {
        let (veth, end) = (&self.veth, &self.ends[1]);
        [
            format!("filter FORWARD -i {veth} -o eth0 -j ACCEPT"),
            format!("filter FORWARD -i eth0 -o {veth} -j ACCEPT"),
            format!("nat POSTROUTING -s {end}/32 -o eth0 -j MASQUERADE"),
        ]
    }
}

fn rule(lab: &Lab, program: &str, action: &str, rule: &str) -> Result<()> {
    let (table, rule) = rule.split_once(' ').unwrap_or((rule, ""));
    let mut all = vec!["-w", "-t", table, action];
    all.extend(rule.split(' '));
    lab.host.run(program, &all).map(drop)
}

/// Creates a slot.
///
/// # Errors
/// A command fails.
pub fn create(lab: &Lab, rules: Rules, number: u16) -> Result<()> {
    let seed = Seed::new(number);
    let Seed {
        netns,
        veth,
        host,
        ends: [near, far],
    } = &seed;
    let Some(iptables) = rules.program(false) else {
        anyhow::bail!("plain routing has no rules")
    };
    lab.host.run("ip", &["netns", "add", netns])?;
    let inside = format!(
        "link add {veth} type veth peer name eth0\n\
         addr add {far}/31 dev eth0\n\
         link set eth0 up\n\
         link set {veth} netns {}\n\
         tuntap add dev tap0 mode tap\n\
         addr add 169.254.0.22/30 dev tap0\n\
         link set tap0 up\n\
         link set lo up\n\
         route add default via {near}",
        lab.host.pid()
    );
    lab.host
        .batch("ip", &["-n", netns, "-batch", "-"], &inside)?;
    let within = |words: &str| {
        let mut all = vec!["netns", "exec", netns];
        all.extend(words.split(' '));
        lab.host.run("ip", &all)
    };
    within("sysctl -qw net.ipv4.ip_forward=1")?;
    for nat in [
        format!("POSTROUTING -o eth0 -s {GUEST} -j SNAT --to {far}"),
        format!("PREROUTING -i eth0 -d {host} -j DNAT --to {GUEST}"),
    ] {
        within(&format!("{iptables} -w -t nat -A {nat}"))?;
    }
    lab.host.ip(&format!(
        "addr add {near}/31 dev {veth}\n\
         link set {veth} up\n\
         route add {host}/32 via {far}"
    ))?;
    let all = seed.rules();
    all.iter()
        .try_for_each(|text| rule(lab, iptables, "-A", text))
}

/// Removes a slot.
///
/// # Errors
/// A command fails.
pub fn remove(lab: &Lab, rules: Rules, number: u16) -> Result<()> {
    let seed = Seed::new(number);
    for text in seed.rules() {
        if let Some(iptables) = rules.program(false) {
            rule(lab, iptables, "-D", &text)?;
        }
    }
    let Seed { veth, host, .. } = &seed;
    lab.host
        .ip(&format!("route del {host}/32\nlink del {veth}"))?;
    lab.host.run("ip", &["netns", "del", &seed.netns]).map(drop)
}
