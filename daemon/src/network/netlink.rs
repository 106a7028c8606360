//! The thin side: reads and writes the kernel's routes, neighbours, forwarding entries and addresses.
//!
//! Every error says what was tried and on what; the kernel's answer follows it.

use std::collections::BTreeMap;
use std::net::IpAddr;

use anyhow::Context;
use futures_util::TryStreamExt;
use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{InfoKind, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState};
use netlink_packet_route::route::RouteMessage;
use rtnetlink::Handle;

use super::desired::{KernelState, Route};
use super::messages::{
    address_of, destination_of, device_of, family_of, is_of_kind, link_mtu, mac_of, neighbour_address,
    route_message, route_of,
};
use super::vtep::Mac;
use super::{Device, Uplink};
use crate::state::service_port::Family;

/// Permanent neighbours: by the index of the device, and the address.
pub type Neighbours = BTreeMap<(u32, IpAddr), Mac>;

/// What a look at the kernel brought.
pub struct Observed {
    /// What is Sluice's, between nodes.
    pub state: KernelState,
    /// The permanent neighbours of all other devices, those of pods among them.
    pub neighbours: Neighbours,
}

/// A netlink socket of the route family.
#[derive(Clone)]
pub struct Kernel {
    handle: Handle,
}

impl Kernel {
    /// Opens the socket and starts the task that reads it.
    ///
    /// # Errors
    /// The kernel refuses the socket.
    pub fn open() -> anyhow::Result<Self> {
        let (connection, handle, _) =
            rtnetlink::new_connection().context("opening a netlink socket (NETLINK_ROUTE)")?;
        tokio::spawn(connection);
        Ok(Self { handle })
    }

    /// The socket itself, for what this type has no word for.
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// All devices that are up and hold a routable address.
    ///
    /// # Errors
    /// The kernel's answer to listing links or addresses.
    pub async fn uplinks(&self) -> anyhow::Result<Vec<Uplink>> {
        let mut addresses: BTreeMap<u32, Vec<IpNetwork>> = BTreeMap::new();
        for message in self.addresses().await? {
            if let Some(network) = address_of(&message) {
                addresses.entry(message.header.index).or_default().push(network);
            }
        }
        let mut uplinks = Vec::new();
        let links = self.links().await?;
        for link in links {
            let index = link.header.index;
            let up =
                link.header.flags.contains(LinkFlags::Up) && !link.header.flags.contains(LinkFlags::Loopback);
            if let (true, Some(addresses)) = (up, addresses.remove(&index)) {
                let device = device_of(&link);
                uplinks.push(Uplink {
                    device,
                    mtu: link_mtu(&link),
                    addresses,
                });
            }
        }
        Ok(uplinks)
    }

    /// The devices of a kind whose names begin with `prefix`, each with its MTU in bytes.
    ///
    /// # Errors
    /// The kernel's answer to listing links.
    pub async fn of_kind(&self, kind: InfoKind, prefix: &str) -> anyhow::Result<Vec<(Device, u32)>> {
        let links = self.links().await?;
        let named = links
            .iter()
            .filter(|link| is_of_kind(link, &kind))
            .map(|link| (device_of(link), link_mtu(link)));
        Ok(named
            .filter(|(device, _)| device.name.starts_with(prefix))
            .collect())
    }

    /// Removes a device; one that is gone already is fine.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn delete_device(&self, device: &Device) -> anyhow::Result<()> {
        let result = self.handle.link().del(device.index).execute().await;
        absent_is_fine(result).with_context(|| format!("removing the device {}", device.name))
    }

    /// What the kernel holds of Sluice's now.
    ///
    /// # Errors
    /// The kernel's answer to a listing.
    pub async fn observe(&self, tunnels: &BTreeMap<Family, Device>) -> anyhow::Result<Observed> {
        let mut state = KernelState::default();
        let mut others = Neighbours::new();
        let ours = |index: u32| tunnels.values().any(|tunnel| tunnel.index == index);
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut filter = RouteMessage::default();
            filter.header.address_family = family;
            let routes: Vec<RouteMessage> = self
                .handle
                .route()
                .get(filter)
                .execute()
                .try_collect()
                .await
                .context("listing routes")?;
            state.routes.extend(routes.iter().filter_map(route_of));
            let entries: Vec<NeighbourMessage> = self
                .handle
                .neighbours()
                .get()
                .set_address_family(family)
                .execute()
                .try_collect()
                .await
                .context("listing neighbours")?;
            for entry in &entries {
                // What the kernel learns or probes by itself on such a device is not an entry of ours to judge.
                if entry.header.state == NeighbourState::Permanent
                    && let (Some(mac), Some(address)) = (mac_of(entry), destination_of(entry))
                {
                    let index = entry.header.ifindex;
                    let table = if ours(index) {
                        &mut state.neighbours
                    } else {
                        &mut others
                    };
                    table.insert((index, address), mac);
                }
            }
        }
        let entries: Vec<NeighbourMessage> = self
            .handle
            .neighbours()
            .get()
            .set_address_family(AddressFamily::Bridge)
            .execute()
            .try_collect()
            .await
            .context("listing forwarding entries")?;
        for entry in entries.iter().filter(|entry| ours(entry.header.ifindex)) {
            if let (Some(mac), Some(address)) = (mac_of(entry), destination_of(entry)) {
                state.fdb.insert((entry.header.ifindex, mac), address);
            }
        }
        for message in self
            .addresses()
            .await?
            .iter()
            .filter(|message| ours(message.header.index))
        {
            if let Some(network) = address_of(message) {
                state.addresses.insert((message.header.index, network), ());
            }
        }
        Ok(Observed {
            state,
            neighbours: others,
        })
    }

    pub(super) async fn links(&self) -> anyhow::Result<Vec<LinkMessage>> {
        let links = self.handle.link().get().execute().try_collect().await;
        links.context("listing network devices")
    }

    async fn addresses(&self) -> anyhow::Result<Vec<AddressMessage>> {
        self.handle
            .address()
            .get()
            .execute()
            .try_collect()
            .await
            .context("listing addresses")
    }

    /// Adds an address to a device; without duplicate address detection, which would delay it for nothing.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn add_address(&self, index: u32, address: IpNetwork) -> anyhow::Result<()> {
        let mut request = self
            .handle
            .address()
            .add(index, address.ip(), address.prefix())
            .replace();
        if address.is_ipv6() {
            request
                .message_mut()
                .attributes
                .push(AddressAttribute::Flags(AddressFlags::Nodad));
        }
        request
            .execute()
            .await
            .with_context(|| format!("adding the address {address} to device {index}"))
    }

    /// Removes an address from a device.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn delete_address(&self, index: u32, address: IpNetwork) -> anyhow::Result<()> {
        // The same message, sent as a deletion, names the same address.
        let mut request = self.handle.address().add(index, address.ip(), address.prefix());
        let message = request.message_mut().clone();
        let result = self.handle.address().del(message).execute().await;
        absent_is_fine(result).with_context(|| format!("removing the address {address} from device {index}"))
    }

    /// Adds or replaces a permanent neighbour.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn set_neighbour(&self, index: u32, address: IpAddr, mac: Mac) -> anyhow::Result<()> {
        let request = self
            .handle
            .neighbours()
            .add(index, address)
            .link_layer_address(&mac.0);
        let result = request.state(NeighbourState::Permanent).replace().execute().await;
        result.with_context(|| format!("setting the neighbour {address} at {mac} on device {index}"))
    }

    /// Removes a neighbour.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn delete_neighbour(&self, index: u32, address: IpAddr, mac: Mac) -> anyhow::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(address);
        message.header.ifindex = index;
        message
            .attributes
            .push(NeighbourAttribute::Destination(neighbour_address(address)));
        let result = self.handle.neighbours().del(message).execute().await;
        absent_is_fine(result)
            .with_context(|| format!("removing the neighbour {address} at {mac} on device {index}"))
    }

    /// Adds or replaces where a tunnel device sends frames for `mac`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn set_fdb(&self, index: u32, mac: Mac, destination: IpAddr) -> anyhow::Result<()> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(index, &mac.0)
            .destination(destination);
        let request = request
            .flags(NeighbourFlags::Own)
            .state(NeighbourState::Permanent)
            .replace();
        let result = request.execute().await;
        result
            .with_context(|| format!("setting the forwarding entry {mac} to {destination} on device {index}"))
    }

    /// Removes a forwarding entry.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn delete_fdb(&self, index: u32, mac: Mac, destination: IpAddr) -> anyhow::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Own;
        message
            .attributes
            .push(NeighbourAttribute::LinkLayerAddress(mac.0.to_vec()));
        message
            .attributes
            .push(NeighbourAttribute::Destination(neighbour_address(destination)));
        let result = self.handle.neighbours().del(message).execute().await;
        absent_is_fine(result).with_context(|| {
            format!("removing the forwarding entry {mac} to {destination} on device {index}")
        })
    }

    /// Adds or replaces the route to `destination`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn set_route(&self, destination: IpNetwork, route: &Route) -> anyhow::Result<()> {
        let set = || {
            self.handle
                .route()
                .add(route_message(destination, route))
                .replace()
                .execute()
        };
        let mut result = set().await;
        if destination.is_ipv6() && is_refused(&result) {
            // A next hop on the link must not be reached by another device already, and it lies in the very network
            // whose route is to move to another device: the old one has to go first
            // (net/ipv6/route.c, ip6_route_check_nh_onlink).
            self.delete_route(destination, &Route::Other).await?;
            result = set().await;
        }
        result.with_context(|| format!("setting the route to {destination} ({route:?})"))
    }

    /// Removes the route to `destination`.
    ///
    /// # Errors
    /// The kernel's answer.
    pub async fn delete_route(&self, destination: IpNetwork, route: &Route) -> anyhow::Result<()> {
        let message = route_message(destination, route);
        let result = self.handle.route().del(message).execute().await;
        absent_is_fine(result).with_context(|| format!("removing the route to {destination} ({route:?})"))
    }
}

fn is_refused(result: &Result<(), rtnetlink::Error>) -> bool {
    matches!(result, Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::EINVAL)
}

/// Removing what is not there is success.
fn absent_is_fine(result: Result<(), rtnetlink::Error>) -> Result<(), rtnetlink::Error> {
    match result {
        Err(rtnetlink::Error::NetlinkError(message))
            if [libc::ESRCH, libc::ENOENT, libc::ENODEV, libc::EADDRNOTAVAIL]
                .contains(&-message.raw_code()) =>
        {
            Ok(())
        }
        other => other,
    }
}
