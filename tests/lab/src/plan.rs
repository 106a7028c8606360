//! Which addresses everything in a lab has. Pure.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use serde::{Deserialize, Serialize};

use crate::options::{Families, Options};

/// The outside host.
pub const CLIENT: &str = "client";
/// The host of the control plane, where the datastore is Kubernetes.
pub const CONTROL: &str = "control";
/// The switch and router.
pub const FABRIC: &str = "fabric";
/// The last part of the client's addresses.
const CLIENT_NUMBER: u8 = 100;
/// The last part of the control plane's addresses.
const CONTROL_NUMBER: u8 = 101;
/// The last part of the addresses of etcd's first member.
const ETCD_NUMBER: u8 = 102;
/// MTU of every link of the fabric.
pub const MTU: u32 = 1500;

/// One host on the fabric.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Host {
    /// `node1`, …, `client`, `control`, or `etcd1`, ….
    pub name: String,
    /// Which of the fabric's subnets it is in, from 0.
    pub subnet: u8,
    /// Its addresses, IPv4 first.
    pub addresses: Vec<IpAddr>,
    /// The networks of its pods; none for those that are no nodes.
    #[serde(rename = "podCIDRs")]
    pub pod_cidrs: Vec<String>,
}

/// Node number `number`, from 1.
#[must_use]
pub fn node(options: &Options, number: u8) -> Host {
    let subnet = (number - 1) % options.subnets;
    let mut pod_cidrs = Vec::new();
    if options.families.v4() {
        pod_cidrs.push(format!("10.244.{number}.0/24"));
    }
    if options.families.v6() {
        pod_cidrs.push(format!("fd00:244:0:{number}::/64"));
    }
    Host {
        name: format!("node{number}"),
        subnet,
        addresses: addresses(options.families, subnet, 10 + number),
        pod_cidrs,
    }
}

/// The outside host, always in the first subnet.
#[must_use]
pub fn client(options: &Options) -> Host {
    Host {
        name: CLIENT.to_owned(),
        subnet: 0,
        addresses: addresses(options.families, 0, CLIENT_NUMBER),
        pod_cidrs: Vec::new(),
    }
}

/// The host of the control plane, always in the first subnet.
#[must_use]
pub fn control(options: &Options) -> Host {
    Host {
        name: CONTROL.to_owned(),
        subnet: 0,
        addresses: addresses(options.families, 0, CONTROL_NUMBER),
        pod_cidrs: Vec::new(),
    }
}

/// The host of member number `number` of etcd, from 1; always in the first subnet.
#[must_use]
pub fn etcd(options: &Options, number: u8) -> Host {
    Host {
        name: format!("etcd{number}"),
        subnet: 0,
        addresses: addresses(options.families, 0, ETCD_NUMBER + number - 1),
        pod_cidrs: Vec::new(),
    }
}

/// The router's addresses in a subnet.
#[must_use]
pub fn gateways(families: Families, subnet: u8) -> Vec<IpAddr> {
    addresses(families, subnet, 1)
}

/// The length of the fabric's prefixes.
#[must_use]
pub fn prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 24 } else { 64 }
}

/// The networks all pods are in.
#[must_use]
pub fn cluster_cidrs(families: Families) -> Vec<&'static str> {
    pick(families, "10.244.0.0/16", "fd00:244::/48")
}

/// The networks ClusterIPs are in.
#[must_use]
pub fn service_cidrs(families: Families) -> Vec<&'static str> {
    pick(families, "10.96.0.0/16", "fd00:96::/108")
}

/// The ClusterIP by which pods reach the API servers: the first address of the range.
#[must_use]
pub fn api_service(families: Families) -> IpAddr {
    match families {
        Families::V6 => IpAddr::from([0xfd00, 0x96, 0, 0, 0, 0, 0, 1]),
        _ => IpAddr::from([10, 96, 0, 1]),
    }
}

/// The ClusterIP of the cluster's DNS.
#[must_use]
pub fn cluster_dns(families: Families) -> &'static str {
    pick(families, "10.96.0.10", "fd00:96::a")[0]
}

fn pick(families: Families, v4: &'static str, v6: &'static str) -> Vec<&'static str> {
    let wanted = [(families.v4(), v4), (families.v6(), v6)];
    wanted
        .into_iter()
        .filter_map(|(is_wanted, cidr)| is_wanted.then_some(cidr))
        .collect()
}

fn addresses(families: Families, subnet: u8, number: u8) -> Vec<IpAddr> {
    let mut addresses = Vec::new();
    if families.v4() {
        addresses.push(IpAddr::V4(Ipv4Addr::new(172, 30, subnet, number)));
    }
    if families.v6() {
        // The same digits as in IPv4, read as hexadecimal: 11 is ::11.
        let digits = u16::from(number);
        let same_digits = ((digits / 100) << 8) | ((digits / 10 % 10) << 4) | (digits % 10);
        let segments = [0xfd00, 0x30, u16::from(subnet), 0, 0, 0, 0, same_digits];
        addresses.push(IpAddr::V6(Ipv6Addr::from(segments)));
    }
    addresses
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_alternate_between_subnets_and_numbers_read_alike_in_both_families() {
        let options = Options {
            subnets: 2,
            ..Options::default()
        };
        let shown = |host: &Host| host.addresses.iter().map(ToString::to_string).collect::<Vec<_>>();
        assert_eq!(shown(&node(&options, 1)), ["172.30.0.11", "fd00:30::11"]);
        assert_eq!(shown(&node(&options, 2)), ["172.30.1.12", "fd00:30:1::12"]);
        assert_eq!(shown(&node(&options, 3)), ["172.30.0.13", "fd00:30::13"]);
        assert_eq!(shown(&client(&options)), ["172.30.0.100", "fd00:30::100"]);
        assert_eq!(
            node(&options, 3).pod_cidrs,
            ["10.244.3.0/24", "fd00:244:0:3::/64"]
        );
    }

    #[test]
    fn one_family_means_one_address() {
        let options = Options {
            families: Families::V6,
            ..Options::default()
        };
        assert_eq!(node(&options, 2).addresses.len(), 1);
        assert_eq!(cluster_cidrs(Families::V6), ["fd00:244::/48"]);
    }
}
