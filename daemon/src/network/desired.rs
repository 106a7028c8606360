//! What the kernel should hold for pod traffic between nodes. Pure.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

use super::paths::Path;
use super::vtep::Mac;
use super::{Device, Uplink};
use crate::state::service_port::Family;

/// Routes, neighbours, forwarding entries and addresses: all that is Sluice's between nodes, desired or observed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct KernelState {
    /// Main table, by destination.
    pub routes: BTreeMap<IpNetwork, Route>,
    /// Permanent neighbours of tunnel devices, by device index and address.
    pub neighbours: BTreeMap<(u32, IpAddr), Mac>,
    /// Where a tunnel device sends frames for a VTEP, by device index and MAC.
    pub fdb: BTreeMap<(u32, Mac), IpAddr>,
    /// Addresses of tunnel devices.
    pub addresses: BTreeMap<(u32, IpNetwork), ()>,
}

/// A route to pods.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Route {
    /// To pods of another node.
    Via {
        /// The next hop.
        gateway: IpAddr,
        /// Index of the device it is on.
        device: u32,
        /// The next hop is there though no prefix of the device says so.
        onlink: bool,
    },
    /// This node's own CIDR: an address no pod holds is answered with unreachable, not sent in circles between this
    /// node and its gateway.
    Unreachable,
    /// Something else that carries Sluice's protocol number: an older build's, to be replaced.
    Other,
}

/// The address by which a node is in the pod network: the network address of its pod CIDR, which no pod ever gets.
///
/// It is the tunnel device's own, next hop of the others' routes, and source of what the node itself sends to remote
/// pods, so that replies come back through the tunnel.
pub fn node_pod_address(cidr: &IpNetwork) -> IpAddr {
    cidr.network()
}

/// What the kernel should hold.
pub fn desired(
    paths: &BTreeMap<IpNetwork, Path>,
    own: &[IpNetwork],
    uplink: &Uplink,
    tunnels: &BTreeMap<Family, Device>,
) -> KernelState {
    let mut state = KernelState::default();
    for (cidr, path) in paths {
        match path {
            Path::Direct { gateway, .. } => {
                let route = Route::Via {
                    gateway: *gateway,
                    device: uplink.device.index,
                    onlink: false,
                };
                state.routes.insert(*cidr, route);
            }
            Path::Vxlan { remote, vtep, .. } => {
                let Some(tunnel) = tunnels.get(&Family::of(*remote)) else {
                    continue;
                };
                let gateway = node_pod_address(cidr);
                state.fdb.insert((tunnel.index, *vtep), *remote);
                state.neighbours.insert((tunnel.index, gateway), *vtep);
                state.routes.insert(
                    *cidr,
                    Route::Via {
                        gateway,
                        device: tunnel.index,
                        onlink: true,
                    },
                );
            }
        }
    }
    for cidr in own {
        state.routes.insert(*cidr, Route::Unreachable);
        // One address on one device is enough; every tunnel's packets may come from it.
        let family = Family::of(cidr.ip());
        if let Some(tunnel) = tunnels.get(&family).or_else(|| tunnels.values().next()) {
            state
                .addresses
                .insert((tunnel.index, host(node_pod_address(cidr))), ());
        }
    }
    state
}

fn host(address: IpAddr) -> IpNetwork {
    IpNetwork::from(address)
}
