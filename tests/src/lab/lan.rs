//! A network behind the host: machines on one segment, to whom the host is the router.

use anyhow::Result;

use super::{LAN_CLIENT, LAN_HOST, LAN_SERVER, Lab, Node, Pair};

/// A server and a client beyond the host's interface `lan0`.
#[derive(Debug)]
pub struct Lan {
    /// Somebody who serves.
    pub server: Node,
    /// Somebody who asks.
    pub client: Node,
    _switch: Node,
}

impl Lab {
    /// Builds one. Nothing on the host forwards for it.
    ///
    /// # Errors
    /// The kernel refuses something.
    pub fn lan(&self) -> Result<Lan> {
        let switch = Node::bare("switch")?;
        switch.ip("link add br0 type bridge mcast_snooping 0\nlink set br0 up")?;
        let server = Node::bare("lan-server")?;
        let client = Node::bare("lan-client")?;
        plug(&switch, "p0", &self.host, "lan0", LAN_HOST)?;
        for (number, node, address) in [(1, &server, LAN_SERVER), (2, &client, LAN_CLIENT)] {
            node.ip("link set lo up")?;
            plug(&switch, &format!("p{number}"), node, "eth0", address)?;
            node.ip(&format!(
                "route add default via {}\nroute add default via {}",
                LAN_HOST.v4, LAN_HOST.v6
            ))?;
        }
        Ok(Lan {
            server,
            client,
            _switch: switch,
        })
    }
}

/// A wire from a port of the switch to an interface of a machine.
fn plug(switch: &Node, port: &str, node: &Node, ifname: &str, address: Pair) -> Result<()> {
    switch.ip(&format!(
        "link add {port} type veth peer name {ifname} netns {}\n\
         link set {port} master br0 up",
        node.pid()
    ))?;
    node.sysctl(&format!("net/ipv6/conf/{ifname}/accept_dad"), "0")?;
    node.ip(&format!(
        "addr add {}/24 dev {ifname}\n\
         addr add {}/64 dev {ifname} nodad\n\
         link set {ifname} up",
        address.v4, address.v6
    ))?;
    node.settle(ifname, address.v6)
}
