//! Pods of a node, wired as the plugin does it: each a network namespace with a routed veth pair. Their sockets are outside
//! the node's cgroup, so no program sees them: what they send is translated on its way, or not at all.

use std::collections::BTreeMap;
use std::net::IpAddr;

use sluice_daemon::network::Device;
use sluice_daemon::network::pods::{PodDevice, Queues};
use sluice_daemon::network::vtep::Mac;

use super::neighbour::Neighbour;
use super::{Node, ip};

/// A pod.
pub struct Pod {
    pub host: Neighbour,
    pub device: PodDevice,
    pub addresses: [IpAddr; 2],
}

/// A pod with these addresses, IPv4 first, at the device `name`, which begins with `sluice`.
pub fn pod(node: &Node, name: &str, addresses: [&str; 2]) -> Pod {
    let host = Neighbour::new(node);
    host.join(name, "eth0");
    let mac = mac_of(name);
    let [v4, v6] = addresses.map(str::to_owned);
    let there = mac.to_string();
    let own = host.run(move || {
        ip(&format!("addr add {v4}/32 dev eth0"));
        ip(&format!("addr add {v6}/128 dev eth0 nodad"));
        for (family, gateway) in [("-4", "169.254.1.1"), ("-6", "fe80::1")] {
            ip(&format!(
                "{family} neigh replace {gateway} lladdr {there} dev eth0 nud permanent"
            ));
            ip(&format!("{family} route add {gateway} dev eth0"));
            ip(&format!("{family} route add default via {gateway} dev eth0"));
        }
        mac_of("eth0")
    });
    let mut endpoints = BTreeMap::new();
    for address in addresses {
        let address: IpAddr = address.parse().unwrap();
        ip(&format!("route add {address} dev {name}"));
        ip(&format!(
            "neigh replace {address} lladdr {own} dev {name} nud permanent"
        ));
        endpoints.insert(address, own);
    }
    Pod {
        host,
        device: PodDevice {
            device: Device {
                index: nix::net::if_::if_nametoindex(name).unwrap(),
                name: name.to_owned(),
            },
            mac,
            mtu: 1500,
            endpoints,
            queues: Queues::default(),
        },
        addresses: addresses.map(|address| address.parse().unwrap()),
    }
}

/// The hardware address of a device of the caller's namespace.
fn mac_of(device: &str) -> Mac {
    let output = std::process::Command::new("ip")
        .args(["-o", "link", "show", device])
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mac = text.split("link/ether ").nth(1).unwrap();
    let bytes: Vec<u8> = mac[..17]
        .split(':')
        .map(|byte| u8::from_str_radix(byte, 16).unwrap())
        .collect();
    Mac(bytes.try_into().unwrap())
}
