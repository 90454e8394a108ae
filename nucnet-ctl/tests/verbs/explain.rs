//! What `explain` says where rules carry packets, and when it says nothing.

use std::fs;

use crate::lab::{command, list, on_a_host, text};

const ASK: &str = "--datapath iptables explain --from web --to 198.51.100.1:443";

#[test]
fn explain_speaks_of_rules_only_while_they_are_in_place() {
    on_a_host(|lab| {
        let web = lab.container("web");
        let web = web.display();
        lab.ok(&format!(
            "--datapath iptables attach --netns {web} --id web --allow 198.51.100.0/24:443"
        ));
        let answer = lab.json(ASK);
        assert_eq!(answer["verdict"], "pass");
        assert_eq!(answer["rule"], "198.51.100.0/24:443");
        assert_eq!(answer["next_hop"], "192.0.2.254");

        command(
            "iptables",
            "-D NUCNET-FORWARD -i nucnet0 -j ACCEPT -m comment --comment nucnet:network:default",
        );
        let (code, error) = lab.refused(ASK);
        assert_eq!(code, 1, "{error}");
        let message = text(&error["message"]);
        assert!(message.contains("IPv4: chain NUCNET-FORWARD"), "{message}");
        assert_eq!(error["hint"], "nucnet-ctl gc");
        lab.ok("--datapath iptables gc");
        assert_eq!(lab.json(ASK), answer);

        let forwarding = "/proc/sys/net/ipv4/conf/nucnet0/forwarding";
        fs::write(forwarding, "0").expect("sysctl");
        let (code, error) = lab.refused(ASK);
        assert_eq!(code, 1, "{error}");
        assert!(
            text(&error["message"]).contains("forwarding is off"),
            "{error}"
        );
        fs::write(forwarding, "1").expect("sysctl");
        assert_eq!(lab.json(ASK), answer);
        let status = lab.json("--datapath iptables status");
        assert_eq!(list(&status["drift"]).len(), 0, "{status}");
    });
}

#[test]
fn explain_says_nothing_of_ipv6_without_ip6tables() {
    on_a_host(|lab| {
        lab.take_away(|program| program.starts_with("ip6tables"));
        let web = lab.container("web");
        let web = web.display();
        lab.ok(&format!(
            "--datapath iptables attach --netns {web} --id web"
        ));
        let ask = "--datapath iptables explain --from uplink --to [2001:db8::1]:443";
        let (code, error) = lab.refused(ask);
        assert_eq!(code, 5, "{error}");
        assert!(text(&error["message"]).contains("no ip6tables"), "{error}");
        assert_eq!(lab.json(ASK)["reason"], "no-policy");
        lab.give_back();
    });
}
