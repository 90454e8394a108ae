//! Records for tests, which change what they are about.

use super::{EndpointRecord, NetworkRecord};
use serde_json::{Value, from_value, json};

/// The default network, with addresses of both families.
pub(crate) fn network() -> NetworkRecord {
    let record = json!({
        "name": "default", "number": 1, "state": "active", "bridge": "nucnet0", "link": 5,
        "mac": "02:00:00:00:00:01", "mtu": 1500, "isolate": false,
        "subnets": [
            {"cidr": "10.0.42.0/24", "gateway": "10.0.42.1"},
            {"cidr": "fd00::/64", "gateway": "fd00::1"},
        ],
        "wish": {
            "bridge": null, "subnet4": null, "subnet6": null, "gateways": [],
            "uplinks": [], "mtu": null, "isolate": false,
        },
    });
    from_value(record).expect("a network")
}

/// A policy without a rule.
pub(crate) fn open() -> Value {
    json!({"default": "allow", "allow": [], "deny": [], "dns": []})
}

/// An endpoint of it without publishes or a policy.
pub(crate) fn endpoint() -> EndpointRecord {
    let open = open();
    let record = json!({
        "id": "web", "number": 7, "state": "active", "network": 1, "netns": "/run/netns/web",
        "namespace": {"device": 4, "inode": 5, "cookie": 6}, "host_ifname": "nn00000007",
        "link": 9, "mac": "02:00:00:00:00:07", "host_mac": "02:00:00:00:00:08",
        "addresses": ["10.0.42.7", "fd00::7"], "mtu": 1500, "default_route": true,
        "publishes": [], "policy": null, "resolv": null, "egress": open,
        "wish": {
            "network": "default", "addresses": [], "mac": null, "ifname": "eth0", "mtu": null,
            "publishes": [], "egress": open, "rootfs": null,
        },
    });
    from_value(record).expect("an endpoint")
}
