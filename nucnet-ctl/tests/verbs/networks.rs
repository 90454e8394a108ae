//! Networks: what is made, and how many fit in.

use crate::lab::{inside, ip, on_a_host};

#[test]
fn a_subnet_that_is_full_is_said_to_be_and_what_is_given_back_is_given_out() {
    on_a_host(|lab| {
        lab.ok("network create tiny --subnet 10.9.0.0/30");
        let attach = |id: &str| {
            let netns = lab.place.join(id);
            format!(
                "attach --netns {} --id {id} --network tiny",
                netns.display()
            )
        };
        let (web, _) = (lab.container("web"), lab.container("db"));
        // Whoever makes the container may leave that to nucnet.
        inside(&web, "link set lo down");
        let endpoint = lab.json(&attach("web"));
        assert_eq!(endpoint["addresses"], serde_json::json!(["10.9.0.2/30"]));
        assert!(inside(&web, "link show lo").contains("LOOPBACK,UP"));
        let before = lab.snapshot();
        let (code, error) = lab.refused(&attach("db"));
        assert_eq!(code, 1, "{error}");
        let message = error["message"].as_str().expect("text");
        assert!(message.contains("10.9.0.0/30"), "{error}");
        lab.assert_unchanged(&before, "no address");
        lab.ok("detach web");
        let endpoint = lab.json(&attach("db"));
        assert_eq!(endpoint["addresses"], serde_json::json!(["10.9.0.2/30"]));
    });
}

#[test]
fn created_networks_stay_and_are_what_was_asked_for() {
    on_a_host(|lab| {
        let create = "network create blue --bridge br-blue --subnet 10.9.0.7/16 --subnet6 \
                      fd09::/64 --gateway 10.9.255.254 --mtu 1400 --isolate --uplink up0";
        let view = lab.json(create);
        assert_eq!(view["id"], "blue");
        assert_eq!(
            view["subnets"],
            serde_json::json!(["10.9.0.0/16", "fd09::/64"])
        );
        assert_eq!(
            view["gateways"],
            serde_json::json!(["10.9.255.254", "fd09::1"])
        );
        assert_eq!(lab.json(create), view, "the same again");
        assert_eq!(lab.refused(&create.replace("1400", "1399")).0, 4);
        assert_eq!(lab.refused("network create red --subnet 10.9.1.0/24").0, 4);
        assert_eq!(lab.refused("network create red --bridge br-blue").0, 4);
        let addresses = ip("address show br-blue");
        assert!(addresses.contains("10.9.255.254/16") && addresses.contains("fd09::1/64"));

        let web = lab.container("web");
        let view = lab.json(&format!(
            "attach --netns {} --id web --network blue",
            web.display()
        ));
        assert_eq!(view["mtu"], 1400);
        for remove in ["network remove blue", "network remove blue --dry-run"] {
            let (code, error) = lab.refused(remove);
            assert_eq!(code, 4, "{remove}");
            assert!(error["message"].as_str().expect("text").contains("web"));
        }
        // A second network in the same container: the first owns the default routes.
        lab.ok(&format!(
            "attach --netns {} --id web2 --ifname eth1",
            web.display()
        ));
        assert!(inside(&web, "route show default").contains("dev eth0"));
        assert!(!inside(&web, "route show default").contains("dev eth1"));
        lab.ok("detach web web2");
        assert_eq!(lab.json("network list").as_array().expect("list").len(), 1);
        let plan = lab.json("network remove blue --dry-run");
        assert!(
            plan.to_string().contains("undo: make bridge br-blue"),
            "{plan}"
        );
        assert_eq!(lab.ok("network remove blue"), "blue: removed\n");
        assert!(!ip("link show").contains("br-blue"));
        let view = lab.json("network create auto");
        assert_eq!(view["subnets"][0], "10.0.43.0/24");
        lab.ok("down");
    });
}
