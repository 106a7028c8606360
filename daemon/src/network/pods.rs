//! The devices of this node's pods, as the kernel has them: the plugin makes them, here they are only looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr};

use anyhow::Context;
use futures_util::TryStreamExt;
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkMessage};
use netlink_packet_route::tc::{TcAttribute, TcMessage};
use sluice_cni::mac::is_host_device;

use super::Device;
use super::messages::{device_of, is_of_kind, link_mtu};
use super::netlink::{Kernel, Neighbours};
use super::vtep::Mac;

/// The host's end of a pod's veth pair.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodDevice {
    /// Which device.
    pub device: Device,
    /// Its own address.
    pub mac: Mac,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// The pod's addresses, each with the hardware address of the pod's end.
    pub endpoints: BTreeMap<IpAddr, Mac>,
    /// What queues or diverts packets there.
    pub queues: Queues,
}

/// What stands in a packet's way at a device, beyond what every device has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Queues {
    /// Packets that leave by the device wait there: a limit on what the pod gets.
    pub outgoing: bool,
    /// Packets that come in are led elsewhere first: a limit on what the pod sends.
    pub incoming: bool,
    /// The place where packets come in is taken by a qdisc of kind `ingress`, which takes no programs.
    pub taken: bool,
    /// There is a `clsact` for programs.
    pub open: bool,
}

impl Queues {
    /// Whether packets are to take no short cuts.
    pub const fn any(self) -> bool {
        self.outgoing || self.incoming
    }
}

impl Kernel {
    /// The devices of this node's pods, given the permanent neighbours of all devices but the tunnels; sorted by index.
    ///
    /// # Errors
    /// The kernel's answer to listing links or queueing disciplines.
    pub async fn pods(&self, neighbours: &Neighbours) -> anyhow::Result<Vec<PodDevice>> {
        let queues = self.queues().await?;
        let mut pods = Vec::new();
        let links = self.links().await?;
        // The plugin leads what a limited pod sends through an ifb of the pod's own, known by the same alias.
        let limiters: BTreeSet<&str> = links
            .iter()
            .filter(|link| is_of_kind(link, &InfoKind::Ifb))
            .filter_map(alias_of)
            .collect();
        for link in &links {
            let device = device_of(link);
            if !is_of_kind(link, &InfoKind::Veth) || !is_host_device(&device.name) {
                continue;
            }
            let own = neighbours.range((device.index, IpAddr::V4(Ipv4Addr::UNSPECIFIED))..);
            let own = own.take_while(|((index, _), _)| *index == device.index);
            let queued = queues.get(&device.index).copied().unwrap_or_default();
            pods.push(PodDevice {
                mac: mac_of(link),
                mtu: link_mtu(link),
                endpoints: own.map(|((_, address), mac)| (*address, *mac)).collect(),
                queues: Queues {
                    incoming: queued.incoming || alias_of(link).is_some_and(|alias| limiters.contains(alias)),
                    ..queued
                },
                device,
            });
        }
        pods.sort_unstable_by_key(|pod| pod.device.index);
        Ok(pods)
    }

    /// Where packets are queued or diverted, by the index of the device.
    async fn queues(&self) -> anyhow::Result<BTreeMap<u32, Queues>> {
        let listed: Vec<TcMessage> = self
            .handle()
            .qdisc()
            .get()
            .execute()
            .try_collect()
            .await
            .context("listing queueing disciplines")?;
        let mut queues: BTreeMap<u32, Queues> = BTreeMap::new();
        for qdisc in listed {
            let kind = qdisc.attributes.iter().find_map(|attribute| match attribute {
                TcAttribute::Kind(kind) => Some(kind.as_str()),
                _ => None,
            });
            let entry = queues.entry(qdisc.header.index.cast_unsigned()).or_default();
            match kind {
                // What every veth has.
                None | Some("noqueue") => {}
                Some("clsact") => entry.open = true,
                Some("ingress") => (entry.incoming, entry.taken) = (true, true),
                Some(_) => entry.outgoing = true,
            }
        }
        Ok(queues)
    }
}

fn alias_of(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfAlias(alias) => Some(alias.as_str()),
        _ => None,
    })
}

/// All zeroes where the device has no hardware address of six bytes.
fn mac_of(link: &LinkMessage) -> Mac {
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => bytes.as_slice().try_into().ok(),
        _ => None,
    });
    Mac(mac.unwrap_or_default())
}
