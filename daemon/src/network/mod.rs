//! Node to node: tunnel devices, routes, neighbours and forwarding entries that carry pod traffic.
//!
//! Owns: the devices [`TUNNEL_V4`] and [`TUNNEL_V6`] with all on them, and every route of protocol
//! [`sluice_cni::names::ROUTE_PROTOCOL`] to more than one address (those to a single one are the plugin's, one per
//! pod). Never touches anything else of the host.
//!
//! [`paths`] decides per remote node, [`desired`] says what the kernel should hold, [`netlink`] reads and writes it,
//! [`pods`] looks at pods' devices, [`tunnel`] sees to the tunnels, [`sysctl`] to what the kernel needs switched on.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::{Context, bail};
use ipnetwork::IpNetwork;
use netlink_packet_route::link::InfoKind;
use sluice_cni::names::DEVICE_PREFIX;

use crate::config;
use crate::reconcile;
use crate::state::node_routes::NodeRoutes;
use crate::state::objects::Node;
use crate::state::service_port::Family;

pub mod desired;
pub mod messages;
pub mod monitor;
pub mod netlink;
pub mod own_addresses;
pub mod paths;
pub mod pods;
pub mod sysctl;
pub mod tunnel;
pub mod vtep;

/// The tunnel device over an IPv4 underlay.
pub const TUNNEL_V4: &str = "sluice-vxlan";
/// The tunnel device over an IPv6 underlay.
pub const TUNNEL_V6: &str = "sluice-vxlan6";

/// The tunnel device over an underlay of `family`.
pub const fn tunnel_name(family: Family) -> &'static str {
    match family {
        Family::V4 => TUNNEL_V4,
        Family::V6 => TUNNEL_V6,
    }
}

/// A network device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Device {
    /// Interface index.
    pub index: u32,
    /// Interface name.
    pub name: String,
}

/// The device that joins this node to the others.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Uplink {
    /// Which device.
    pub device: Device,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Its addresses, with the prefix of their link.
    pub addresses: Vec<IpNetwork>,
}

/// What a pass over the network found and did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Outcome {
    /// The uplink.
    pub uplink: Uplink,
    /// The tunnel devices, by the family of their underlay.
    pub tunnels: BTreeMap<Family, Device>,
    /// MTU of pod interfaces in bytes.
    pub pod_mtu: u32,
    /// The devices of this node's pods, sorted by index.
    pub pods: Vec<pods::PodDevice>,
    /// How each remote pod CIDR is reached.
    pub paths: BTreeMap<IpNetwork, paths::Path>,
    /// What is wrong, one sentence each.
    pub problems: Vec<String>,
    /// Number of kernel objects that were changed.
    pub changes: usize,
    /// Number of those that the kernel refused to change: to be tried again.
    pub failed: usize,
}

impl Outcome {
    /// How many running pods still have another MTU.
    pub fn pods_behind(&self) -> usize {
        self.pods.iter().filter(|pod| pod.mtu != self.pod_mtu).count()
    }
}

/// What came of a plan.
#[derive(Debug, Default)]
struct Applied {
    changes: usize,
    /// One sentence for each change that the kernel refused.
    failed: Vec<String>,
}

/// The reconciler of node-to-node traffic.
pub struct Network {
    kernel: netlink::Kernel,
    settings: config::Network,
    /// What the last pass left, if the kernel refused nothing of it.
    left: Option<Left>,
}

/// The host as a pass found it, and the kernel as it left it.
struct Left {
    own: Node,
    own_cidrs: Vec<IpNetwork>,
    uplink: Uplink,
    tunnels: BTreeMap<Family, Device>,
    pods: Vec<pods::PodDevice>,
    pod_mtu: u32,
    /// What is wrong with the host.
    problems: Vec<String>,
    state: desired::KernelState,
}

impl Network {
    /// Opens the netlink socket.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open(settings: config::Network) -> anyhow::Result<Self> {
        Ok(Self {
            kernel: netlink::Kernel::open()?,
            settings,
            left: None,
        })
    }

    /// Brings the kernel to what `routes` says, for the node `own`, and reads back what it holds and how the host is.
    ///
    /// # Errors
    /// What makes the network as a whole impossible: no uplink, no tunnel device. The trouble of one route is in the
    /// outcome.
    pub async fn reconcile(&mut self, own: &Node, routes: &NodeRoutes) -> anyhow::Result<Outcome> {
        self.left = None;
        let uplink = self.uplink(own).await?;
        let has_v6 = routes.own.iter().any(|cidr| Family::of(cidr.ip()) == Family::V6);
        let mut problems = sysctl::ensure_forwarding(&uplink.device.name, has_v6);

        let specs = tunnel::specs(&self.settings, &uplink, own);
        let mut tunnels = BTreeMap::new();
        let mut changes = 0;
        for spec in &specs {
            let (index, changed) = tunnel::ensure(&self.kernel, spec).await?;
            problems.extend(sysctl::loosen_reverse_path(&spec.name));
            changes += usize::from(changed);
            tunnels.insert(
                spec.family,
                Device {
                    index,
                    name: spec.name.clone(),
                },
            );
        }
        changes += tunnel::remove_unwanted(&self.kernel, &specs).await?;

        let observed = self.kernel.observe(&tunnels).await?;
        let overhead = specs.iter().map(|spec| spec.overhead()).max().unwrap_or(0);
        let pod_mtu = match self.settings.mtu {
            0 => uplink.mtu.saturating_sub(overhead),
            configured => configured,
        };
        let found = Left {
            own: own.clone(),
            own_cidrs: routes.own.clone(),
            uplink,
            tunnels,
            pods: self.kernel.pods(&observed.neighbours).await?,
            pod_mtu,
            problems,
            state: observed.state,
        };
        let mut outcome = self.bring(found, routes).await;
        outcome.changes += changes;
        Ok(outcome)
    }

    /// The same where only other nodes changed since the last pass: the kernel is as that left it, as far as anybody has said.
    /// A change costs what it changes, and whatever others did meanwhile is [`reconcile`](Self::reconcile)'s to find.
    ///
    /// # Errors
    /// As [`reconcile`](Self::reconcile), which takes over where more changed, or the last pass failed.
    pub async fn follow(&mut self, own: &Node, routes: &NodeRoutes) -> anyhow::Result<Outcome> {
        match self.left.take() {
            Some(left) if left.own == *own && left.own_cidrs == routes.own => {
                Ok(self.bring(left, routes).await)
            }
            _ => self.reconcile(own, routes).await,
        }
    }

    /// Brings the kernel from what it holds to what `routes` says.
    async fn bring(&mut self, mut left: Left, routes: &NodeRoutes) -> Outcome {
        let decided = paths::decide(self.settings.backend, &left.uplink, &left.own, routes);
        let desired = desired::desired(&decided.paths, &routes.own, &left.uplink, &left.tunnels);
        let applied = self.apply(&desired, &left.state).await;
        let failed = applied.failed.len();
        let mut problems = left.problems.clone();
        problems.extend(decided.problems);
        problems.extend(applied.failed);
        let outcome = Outcome {
            pods: left.pods.clone(),
            uplink: left.uplink.clone(),
            tunnels: left.tunnels.clone(),
            pod_mtu: left.pod_mtu,
            paths: decided.paths,
            problems,
            changes: applied.changes,
            failed,
        };
        left.state = desired;
        self.left = Some(left).filter(|_| failed == 0);
        outcome
    }

    /// What the kernel holds between nodes now, where these are the tunnel devices.
    ///
    /// # Errors
    /// The kernel's answer to a listing.
    pub async fn observe(&self, tunnels: &BTreeMap<Family, Device>) -> anyhow::Result<desired::KernelState> {
        Ok(self.kernel.observe(tunnels).await?.state)
    }

    /// Applies the differences: what others lean on first, what leans on others last; the other way round to remove.
    async fn apply(&self, desired: &desired::KernelState, observed: &desired::KernelState) -> Applied {
        let mut applied = Applied::default();
        let mut note = |result: anyhow::Result<()>| match result {
            Ok(()) => applied.changes += 1,
            Err(error) => applied.failed.push(format!("{error:#}")),
        };
        let (addresses, stale_addresses) =
            reconcile::split(reconcile::plan(&desired.addresses, &observed.addresses));
        let (neighbours, stale_neighbours) =
            reconcile::split(reconcile::plan(&desired.neighbours, &observed.neighbours));
        let (fdb, stale_fdb) = reconcile::split(reconcile::plan(&desired.fdb, &observed.fdb));
        let (routes, stale_routes) = reconcile::split(reconcile::plan(&desired.routes, &observed.routes));
        for ((index, address), ()) in addresses {
            note(self.kernel.add_address(index, address).await);
        }
        for ((index, address), mac) in neighbours {
            note(self.kernel.set_neighbour(index, address, mac).await);
        }
        for ((index, mac), destination) in fdb {
            note(self.kernel.set_fdb(index, mac, destination).await);
        }
        for (destination, route) in routes {
            note(self.kernel.set_route(destination, &route).await);
        }
        for (destination, route) in stale_routes {
            note(self.kernel.delete_route(destination, &route).await);
        }
        for ((index, mac), destination) in stale_fdb {
            note(self.kernel.delete_fdb(index, mac, destination).await);
        }
        for ((index, address), mac) in stale_neighbours {
            note(self.kernel.delete_neighbour(index, address, mac).await);
        }
        for ((index, address), ()) in stale_addresses {
            note(self.kernel.delete_address(index, address).await);
        }
        applied
    }

    async fn uplink(&self, own: &Node) -> anyhow::Result<Uplink> {
        let uplinks = self.kernel.uplinks().await?;
        let wanted = &self.settings.interface;
        if !wanted.is_empty() {
            return uplinks
                .into_iter()
                .find(|uplink| uplink.device.name == *wanted)
                .with_context(|| {
                    format!("network.interface is {wanted:?}, but there is no such device that is up")
                });
        }
        let holds = |uplink: &Uplink, address: &IpAddr| uplink.addresses.iter().any(|a| a.ip() == *address);
        let found = own
            .addresses
            .iter()
            .find_map(|address| uplinks.iter().find(|uplink| holds(uplink, address)).cloned());
        match found {
            Some(uplink) => Ok(uplink),
            None => bail!(
                "no device holds an address of node {} ({}); correct status.addresses of the Node or set network.interface",
                own.name,
                own.addresses
                    .iter()
                    .map(ToString::to_string)
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
        }
    }

    /// Removes all that this module ever makes; says whether there was anything.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_all(&self) -> anyhow::Result<bool> {
        let tunnels = tunnel::remove_unwanted(&self.kernel, &[]).await?;
        let observed = self.kernel.observe(&BTreeMap::new()).await?.state;
        let any = tunnels > 0 || !observed.routes.is_empty();
        for (destination, route) in observed.routes {
            self.kernel.delete_route(destination, &route).await?;
        }
        Ok(any)
    }

    /// Removes the host ends of all pods' veth pairs, each of which takes its pod's end and its routes with it, and the
    /// devices that limit what pods send; says how many pairs there were.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn remove_pods(&self) -> anyhow::Result<usize> {
        let pods = self.kernel.of_kind(InfoKind::Veth, DEVICE_PREFIX).await?;
        let limits = self.kernel.of_kind(InfoKind::Ifb, DEVICE_PREFIX).await?;
        for (device, _) in pods.iter().chain(&limits) {
            self.kernel.delete_device(device).await?;
        }
        Ok(pods.len())
    }
}
