//! The kernel's messages and the words for what they say: routes, addresses, neighbours, links. Pure.

use std::net::IpAddr;

use ipnetwork::IpNetwork;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{InfoKind, LinkAttribute, LinkInfo, LinkMessage};
use netlink_packet_route::neighbour::{NeighbourAddress, NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use rtnetlink::RouteMessageBuilder;
use sluice_cni::names::ROUTE_PROTOCOL;

use super::Device;
use super::desired::Route;
use super::vtep::Mac;

/// `RTA_METRICS` aside, IPv6 routes differ by metric: this is the one of Sluice's (the kernel's own default).
const METRIC_V6: u32 = 1024;

/// A route as the kernel is told of it.
pub(super) fn route_message(destination: IpNetwork, route: &Route) -> RouteMessage {
    let builder = RouteMessageBuilder::<IpAddr>::new();
    // Only a prefix longer than its family allows is refused, and an IpNetwork holds none.
    let builder = builder
        .destination_prefix(destination.network(), destination.prefix())
        .unwrap_or_default()
        .protocol(RouteProtocol::Other(ROUTE_PROTOCOL))
        .table_id(u32::from(RouteHeader::RT_TABLE_MAIN))
        .scope(RouteScope::Universe);
    let builder = if destination.is_ipv6() {
        builder.priority(METRIC_V6)
    } else {
        builder
    };
    match route {
        Route::Unreachable => builder.kind(RouteType::Unreachable).build(),
        Route::Other => builder.kind(RouteType::Unspec).build(),
        Route::Via {
            gateway,
            device,
            onlink,
        } => {
            let builder = builder.kind(RouteType::Unicast).output_interface(*device);
            let builder = if *onlink { builder.onlink() } else { builder };
            let mut message = builder.build();
            message.attributes.push(RouteAttribute::Gateway(match gateway {
                IpAddr::V4(v4) => RouteAddress::Inet(*v4),
                IpAddr::V6(v6) => RouteAddress::Inet6(*v6),
            }));
            message
        }
    }
}

/// A route of the daemon's own: Sluice's protocol, main table, and more than one address (one address is a pod's, and
/// the plugin's to manage).
pub(super) fn route_of(message: &RouteMessage) -> Option<(IpNetwork, Route)> {
    let header = &message.header;
    let full = if header.address_family == AddressFamily::Inet {
        32
    } else {
        128
    };
    if header.protocol != RouteProtocol::Other(ROUTE_PROTOCOL)
        || header.table != RouteHeader::RT_TABLE_MAIN
        || header.destination_prefix_length >= full
    {
        return None;
    }
    let (mut destination, mut gateway, mut device) = (None, None, None);
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(address) => destination = ip_of(address),
            RouteAttribute::Gateway(address) => gateway = ip_of(address),
            RouteAttribute::Oif(index) => device = Some(*index),
            _ => {}
        }
    }
    let destination = IpNetwork::new(destination?, header.destination_prefix_length).ok()?;
    let route = match (header.kind, gateway, device) {
        (RouteType::Unreachable, ..) => Route::Unreachable,
        (RouteType::Unicast, Some(gateway), Some(device)) => Route::Via {
            gateway,
            device,
            onlink: header.flags.contains(RouteFlags::Onlink),
        },
        _ => Route::Other,
    };
    Some((destination, route))
}

fn ip_of(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(v4) => Some(IpAddr::V4(*v4)),
        RouteAddress::Inet6(v6) => Some(IpAddr::V6(*v6)),
        _ => None,
    }
}

/// The address with the prefix of its link, if it is one that other hosts could use.
pub(super) fn address_of(message: &AddressMessage) -> Option<IpNetwork> {
    if message.header.scope != AddressScope::Universe {
        return None;
    }
    let find = |wanted: fn(&AddressAttribute) -> Option<IpAddr>| message.attributes.iter().find_map(wanted);
    // On a point-to-point device the local address is IFA_LOCAL; IPv6 has IFA_ADDRESS alone.
    let local = find(|a| {
        if let AddressAttribute::Local(address) = a {
            Some(*address)
        } else {
            None
        }
    });
    let address = find(|a| {
        if let AddressAttribute::Address(address) = a {
            Some(*address)
        } else {
            None
        }
    });
    IpNetwork::new(local.or(address)?, message.header.prefix_len).ok()
}

/// The link-layer address an entry leads to.
pub(super) fn mac_of(entry: &NeighbourMessage) -> Option<Mac> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::LinkLayerAddress(bytes) => <[u8; 6]>::try_from(bytes.as_slice()).ok().map(Mac),
        _ => None,
    })
}

/// The address an entry is for; of an AF_BRIDGE entry, the VTEP it leads to.
pub(super) fn destination_of(entry: &NeighbourMessage) -> Option<IpAddr> {
    entry.attributes.iter().find_map(|attribute| match attribute {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(v4)) => Some(IpAddr::V4(*v4)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(v6)) => Some(IpAddr::V6(*v6)),
        // An AF_BRIDGE entry's address comes undecoded: the family of the message says nothing of it.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
            let v4 = <[u8; 4]>::try_from(bytes.as_slice()).map(IpAddr::from);
            v4.or_else(|_| <[u8; 16]>::try_from(bytes.as_slice()).map(IpAddr::from))
                .ok()
        }
        _ => None,
    })
}

/// An address as neighbour entries have it.
pub(super) fn neighbour_address(address: IpAddr) -> NeighbourAddress {
    match address {
        IpAddr::V4(v4) => NeighbourAddress::Inet(v4),
        IpAddr::V6(v6) => NeighbourAddress::Inet6(v6),
    }
}

/// The kernel's number of an address's family.
pub(super) fn family_of(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// A link's index and name.
pub fn device_of(link: &LinkMessage) -> Device {
    Device {
        index: link.header.index,
        name: link_name(link),
    }
}

/// A link's name; empty if the kernel gave none, which it does not.
pub fn link_name(link: &LinkMessage) -> String {
    let name = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    };
    link.attributes.iter().find_map(name).unwrap_or_default()
}

/// Whether a link is of this kind.
pub(super) fn is_of_kind(link: &LinkMessage, wanted: &InfoKind) -> bool {
    link.attributes.iter().any(|attribute| {
        matches!(attribute, LinkAttribute::LinkInfo(infos)
            if infos.iter().any(|info| matches!(info, LinkInfo::Kind(kind) if kind == wanted)))
    })
}

/// A link's MTU in bytes.
pub(super) fn link_mtu(link: &LinkMessage) -> u32 {
    let mtu = |attribute: &LinkAttribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    };
    link.attributes.iter().find_map(mtu).unwrap_or(1500)
}
