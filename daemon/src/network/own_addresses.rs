//! At which addresses other nodes reach this one, where no kubelet says so.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Result, bail};
use tokio::net::UdpSocket;

use super::Uplink;
use super::netlink::Kernel;
use crate::address::Family;

/// Far away, and nobody's (RFC 5737, RFC 3849): nothing is sent there, only the way out is asked for.
const AFAR: [IpAddr; 2] = [
    IpAddr::V4(Ipv4Addr::new(192, 0, 2, 1)),
    IpAddr::V6(Ipv6Addr::new(0x2001, 0xdb8, 0, 0, 0, 0, 0, 1)),
];

/// The first address of each family on the uplink: the device called `interface`, else the one that leads to `towards`, where the rest
/// of the cluster is likely to be, else the one that leads out.
///
/// # Errors
/// There is none, or the kernel does not tell.
pub async fn own_addresses(interface: &str, towards: Option<SocketAddr>) -> Result<Vec<IpAddr>> {
    let uplinks = Kernel::open()?.uplinks().await?;
    if !interface.is_empty() {
        return match uplinks.iter().find(|uplink| uplink.device.name == interface) {
            Some(uplink) => Ok(first_of_each(uplink)),
            None => bail!("network.interface is {interface}, which is not up or holds no routable address"),
        };
    }
    let ways = towards
        .into_iter()
        .chain(AFAR.map(|address| SocketAddr::new(address, 9)));
    for way in ways {
        let Some(source) = source_towards(way).await else {
            continue;
        };
        let holds = |uplink: &&Uplink| uplink.addresses.iter().any(|network| network.ip() == source);
        if let Some(uplink) = uplinks.iter().find(holds) {
            return Ok(first_of_each(uplink));
        }
    }
    bail!(
        "no device leads to the other nodes; name one in network.interface, or this node's addresses in datastore.etcd.nodeAddresses"
    )
}

/// Which address the kernel would send from.
async fn source_towards(way: SocketAddr) -> Option<IpAddr> {
    let any: SocketAddr = match way {
        SocketAddr::V4(_) => (Ipv4Addr::UNSPECIFIED, 0).into(),
        SocketAddr::V6(_) => (Ipv6Addr::UNSPECIFIED, 0).into(),
    };
    let socket = UdpSocket::bind(any).await.ok()?;
    socket.connect(way).await.ok()?;
    Some(socket.local_addr().ok()?.ip())
}

fn first_of_each(uplink: &Uplink) -> Vec<IpAddr> {
    let first = |family| {
        let mut addresses = uplink.addresses.iter().map(ipnetwork::IpNetwork::ip);
        addresses.find(|address| Family::of(*address) == family)
    };
    [Family::V4, Family::V6].into_iter().filter_map(first).collect()
}
