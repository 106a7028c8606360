//! The tunnel devices: made, compared with what is wanted, made anew only where the kernel cannot change them.

use std::net::IpAddr;

use anyhow::Context;
use futures_util::TryStreamExt;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkFlags,
    LinkInfo, LinkMessage,
};
use rtnetlink::{LinkUnspec, LinkVxlan};

use super::messages::{device_of, link_mtu, link_name};
use super::netlink::Kernel;
use super::vtep::{self, Mac};
use super::{TUNNEL_V4, TUNNEL_V6, Uplink, tunnel_name};
use crate::config::{self, NetworkBackend};
use crate::state::objects::Node;
use crate::state::service_port::Family;

/// A tunnel device as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Spec {
    /// Family of the underlay.
    pub family: Family,
    /// Interface name.
    pub name: String,
    /// Where this node's tunnel ends.
    pub local: IpAddr,
    /// VXLAN network identifier.
    pub vni: u32,
    /// UDP port.
    pub port: u16,
    /// This node's VTEP MAC.
    pub mac: Mac,
    /// MTU in bytes.
    pub mtu: u32,
}

impl Spec {
    /// Bytes the tunnel adds to a packet: inner Ethernet 14, VXLAN 8, UDP 8, outer IP 20 or 40 (RFC 7348, section 5).
    pub const fn overhead(&self) -> u32 {
        overhead(self.family)
    }
}

const fn overhead(underlay: Family) -> u32 {
    match underlay {
        Family::V4 => 50,
        Family::V6 => 70,
    }
}

/// The tunnel devices wanted: one per family the node has an address of, none where every route is direct.
pub fn specs(settings: &config::Network, uplink: &Uplink, own: &Node) -> Vec<Spec> {
    if settings.backend == NetworkBackend::Direct {
        return Vec::new();
    }
    [Family::V4, Family::V6]
        .into_iter()
        .filter_map(|family| {
            own.address(family).map(|local| Spec {
                family,
                name: tunnel_name(family).to_owned(),
                local,
                vni: settings.vxlan.vni,
                port: settings.vxlan.port,
                mac: vtep::mac(&own.name),
                mtu: uplink.mtu.saturating_sub(overhead(family)),
            })
        })
        .collect()
}

/// Makes the device `spec` describes, or adopts the one there; says its index and whether anything was done.
///
/// # Errors
/// The kernel's answer, after what was tried.
pub async fn ensure(kernel: &Kernel, spec: &Spec) -> anyhow::Result<(u32, bool)> {
    let found = find(kernel, &spec.name).await?;
    if let Some(link) = &found {
        if is_as_wanted(link, spec) {
            return Ok((link.header.index, false));
        }
        if !is_same_tunnel(link, spec) {
            kernel.delete_device(&device_of(link)).await?;
            return create(kernel, spec).await.map(|index| (index, true));
        }
        set(kernel, link.header.index, spec).await?;
        return Ok((link.header.index, true));
    }
    create(kernel, spec).await.map(|index| (index, true))
}

/// Removes tunnel devices of ours that no spec names; says how many.
///
/// # Errors
/// The kernel's answer, after what was tried.
pub async fn remove_unwanted(kernel: &Kernel, specs: &[Spec]) -> anyhow::Result<usize> {
    let mut removed = 0;
    for name in [TUNNEL_V4, TUNNEL_V6] {
        if specs.iter().any(|spec| spec.name == name) {
            continue;
        }
        if let Some(link) = find(kernel, name).await? {
            kernel.delete_device(&device_of(&link)).await?;
            removed += 1;
        }
    }
    Ok(removed)
}

async fn create(kernel: &Kernel, spec: &Spec) -> anyhow::Result<u32> {
    let builder = LinkVxlan::new(&spec.name, spec.vni)
        .port(spec.port)
        .learning(false);
    let builder = match spec.local {
        IpAddr::V4(v4) => builder.local(v4),
        // Outer UDP checksums are mandatory over IPv6 unless switched off on both ends; they stay on.
        IpAddr::V6(v6) => builder.local6(v6),
    };
    let message = builder.address(spec.mac.0.to_vec()).mtu(spec.mtu).build();
    kernel
        .handle()
        .link()
        .add(message)
        .execute()
        .await
        .map_err(|error| {
            let taken = matches!(&error, rtnetlink::Error::NetlinkError(message) if message.raw_code() == -libc::EEXIST);
            let made = format!(
                "making the tunnel device {} (vni {}, port {}, from {})",
                spec.name, spec.vni, spec.port, spec.local
            );
            let advice = "; another vxlan device here has that vni and port: remove it (ip -d link show type vxlan), or \
                          set network.vxlan.vni on all nodes";
            let advice = if taken { advice } else { "" };
            anyhow::Error::new(error).context(format!("{made}{advice}"))
        })?;
    let link = find(kernel, &spec.name)
        .await?
        .with_context(|| format!("{} vanished as it was made", spec.name))?;
    set(kernel, link.header.index, spec).await?;
    Ok(link.header.index)
}

/// Sets what the kernel lets one change on a living device, and brings it up.
async fn set(kernel: &Kernel, index: u32, spec: &Spec) -> anyhow::Result<()> {
    // No link-local address of its own: router solicitations into the overlay reach nobody.
    let quiet = LinkUnspec::new_with_index(index)
        .append_extra_attribute(LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![
            AfSpecInet6::AddrGenMode(In6AddrGenMode::None),
        ])]))
        .build();
    // Where IPv6 is off altogether the kernel refuses this, and nothing is lost.
    let _ = kernel.handle().link().set(quiet).execute().await;
    let wanted = LinkUnspec::new_with_index(index)
        .address(spec.mac.0.to_vec())
        .mtu(spec.mtu)
        .up()
        .build();
    let result = kernel.handle().link().set(wanted).execute().await;
    result.with_context(|| {
        format!(
            "setting {} up with MAC {} and MTU {}",
            spec.name, spec.mac, spec.mtu
        )
    })
}

async fn find(kernel: &Kernel, name: &str) -> anyhow::Result<Option<LinkMessage>> {
    let mut links = kernel.handle().link().get().match_name(name.to_owned()).execute();
    match links.try_next().await {
        Ok(link) => Ok(link),
        Err(rtnetlink::Error::NetlinkError(message)) if message.raw_code() == -libc::ENODEV => Ok(None),
        Err(error) => Err(error).with_context(|| format!("looking for the device {name}")),
    }
}

fn is_as_wanted(link: &LinkMessage, spec: &Spec) -> bool {
    let mac = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Address(bytes) => Some(bytes.as_slice()),
        _ => None,
    });
    is_same_tunnel(link, spec)
        && mac == Some(&spec.mac.0)
        && link_mtu(link) == spec.mtu
        && link.header.flags.contains(LinkFlags::Up)
        && link_name(link) == spec.name
}

/// Whether what can only be set at birth is as wanted.
fn is_same_tunnel(link: &LinkMessage, spec: &Spec) -> bool {
    let infos = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::LinkInfo(infos) => Some(infos.as_slice()),
        _ => None,
    });
    let Some(infos) = infos else { return false };
    let vxlan = infos
        .iter()
        .any(|info| matches!(info, LinkInfo::Kind(InfoKind::Vxlan)));
    let data = infos.iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(data)) => Some(data.as_slice()),
        _ => None,
    });
    let has = |wanted: InfoVxlan| data.is_some_and(|data| data.contains(&wanted));
    let local = match spec.local {
        IpAddr::V4(v4) => InfoVxlan::Local(v4),
        IpAddr::V6(v6) => InfoVxlan::Local6(v6),
    };
    vxlan
        && has(InfoVxlan::Id(spec.vni))
        && has(InfoVxlan::Port(spec.port))
        && has(local)
        && has(InfoVxlan::Learning(false))
}
