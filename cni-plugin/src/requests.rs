//! The netlink messages Sluice's plugin uses, as values: pure, nothing is sent here.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, BorrowedFd};

use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InfoData, InfoKind, InfoVeth, LinkAttribute, LinkExtentMask,
    LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::tc::{TcAttribute, TcHandle, TcMessage};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use crate::mac::Mac;
use crate::names::ROUTE_PROTOCOL;
use crate::netlink::{Kind, Request};

/// The table of routes to the namespace's own addresses (`RT_TABLE_LOCAL`).
const TABLE_LOCAL: u8 = 255;

/// `ffff:`, the handle of a `clsact` qdisc: where filters and programs hang.
const CLSACT: TcHandle = TcHandle {
    major: u16::MAX,
    minor: 0,
};

/// One end of a pair to be made.
pub struct End<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its MAC.
    pub mac: Mac,
}

fn request(doing: String, message: RouteNetlinkMessage, kind: Kind) -> Request {
    Request {
        doing,
        message,
        kind,
        tolerated: &[],
    }
}

/// Makes both ends of a veth pair at once, `pod` straight in its namespace under its final name.
pub fn make_pair(host: &End<'_>, pod: &End<'_>, netns: BorrowedFd<'_>, mtu: u32) -> Request {
    let end = |end: &End<'_>| {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(end.name.to_owned()),
            LinkAttribute::Address(end.mac.bytes().to_vec()),
            LinkAttribute::Mtu(mtu),
            // The kernel would make one queue per CPU, which costs time and serves nobody: veths have no queueing.
            LinkAttribute::NumTxQueues(1),
            LinkAttribute::NumRxQueues(1),
        ];
        message
    };
    let mut peer = end(pod);
    peer.attributes.push(LinkAttribute::NetNsFd(netns.as_raw_fd()));
    let mut message = end(host);
    message.attributes.push(LinkAttribute::LinkInfo(vec![
        LinkInfo::Kind(InfoKind::Veth),
        LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(peer))),
    ]));
    let doing = format!("making the pair of {} and, in the pod, {}", host.name, pod.name);
    request(doing, RouteNetlinkMessage::NewLink(message), Kind::Create)
}

/// Waits until the kernel has acted on the carrier of the device called `name` (net/core/rtnetlink.c, `rtnl_getlink`: before it
/// answers).
pub fn await_carrier(name: &str) -> Request {
    Request {
        doing: format!("waiting for the carrier of {name}"),
        kind: Kind::Await,
        ..get_link(name)
    }
}

/// Asks for the device called `name`.
pub fn get_link(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        // Nobody asks for its counters, which are summed over all CPUs.
        LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]),
    ];
    let doing = format!("looking for the device {name}");
    request(doing, RouteNetlinkMessage::GetLink(message), Kind::Ask)
}

/// Asks for the device at `index`, which was called `name`.
pub fn get_link_at(index: u32, name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    let doing = format!("looking for the device {name} at index {index}");
    Request {
        tolerated: &[libc::ENODEV],
        ..request(doing, RouteNetlinkMessage::GetLink(message), Kind::Ask)
    }
}

/// Asks for all devices of the namespace.
pub fn list_all_links() -> Request {
    let message = LinkMessage::default();
    request(
        "listing all devices".to_owned(),
        RouteNetlinkMessage::GetLink(message),
        Kind::List,
    )
}

/// Makes a device through which packets can be led on their way in.
pub fn make_ifb(name: &str, mtu: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::Mtu(mtu),
        LinkAttribute::NumTxQueues(1),
        LinkAttribute::NumRxQueues(1),
        LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Ifb)]),
    ];
    let doing = format!("making the device {name} (ifb)");
    request(doing, RouteNetlinkMessage::NewLink(message), Kind::Create)
}

/// Asks for all devices of a kind.
pub fn list_links(kind: InfoKind) -> Request {
    let mut message = LinkMessage::default();
    let doing = format!("listing {kind} devices");
    message.attributes = vec![LinkAttribute::LinkInfo(vec![LinkInfo::Kind(kind)])];
    request(doing, RouteNetlinkMessage::GetLink(message), Kind::List)
}

/// Keeps the kernel from giving the device an IPv6 address of its own, whose probing would be noise.
pub fn no_own_addresses(name: &str) -> Request {
    let mut message = LinkMessage::default();
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])]),
    ];
    let doing = format!("turning off own IPv6 addresses of {name}");
    Request {
        // Without IPv6 (in the kernel, or below its least MTU) there is nothing to turn off.
        tolerated: &[libc::EAFNOSUPPORT],
        ..request(doing, RouteNetlinkMessage::SetLink(message), Kind::Act)
    }
}

/// Notes on the device whom it serves.
pub fn set_alias(name: &str, alias: &str) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![
        LinkAttribute::IfName(name.to_owned()),
        LinkAttribute::IfAlias(alias.to_owned()),
    ];
    let doing = format!("setting the alias of {name}");
    request(doing, RouteNetlinkMessage::SetLink(message), Kind::Act)
}

/// Sets the device's MTU, in bytes.
pub fn set_mtu(name: &str, mtu: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_owned()), LinkAttribute::Mtu(mtu)];
    let doing = format!("setting the MTU of {name} to {mtu}");
    request(doing, RouteNetlinkMessage::SetLink(message), Kind::Act)
}

/// Switches the device on.
pub fn set_up(name: &str) -> Request {
    let mut message = LinkMessage::default();
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::IfName(name.to_owned())];
    request(
        format!("switching {name} on"),
        RouteNetlinkMessage::SetLink(message),
        Kind::Act,
    )
}

/// Opens the device for filters and programs, on the way in and out; one that is open already will do.
///
/// For a device that is up the kernel stops it for a moment and drops what is sent through it (net/sched/sch_api.c,
/// `qdisc_graft`).
pub fn make_clsact(name: &str, index: u32) -> Request {
    let mut message = TcMessage::with_index(i32::try_from(index).unwrap_or(i32::MAX));
    message.header.parent = TcHandle::CLSACT;
    message.header.handle = CLSACT;
    message.attributes = vec![TcAttribute::Kind("clsact".to_owned())];
    let doing = format!("opening {name} for filters and programs (clsact qdisc)");
    Request {
        tolerated: &[libc::EEXIST],
        ..request(
            doing,
            RouteNetlinkMessage::NewQueueDiscipline(message),
            Kind::Create,
        )
    }
}

/// Removes the device at `index`, or else the one called `name`; with one end of a veth pair goes the other.
pub fn remove_link(name: &str, index: Option<u32>) -> Request {
    let mut message = LinkMessage::default();
    match index {
        Some(index) => message.header.index = index,
        None => message.attributes = vec![LinkAttribute::IfName(name.to_owned())],
    }
    Request {
        tolerated: &[libc::ENODEV],
        ..request(
            format!("removing {name}"),
            RouteNetlinkMessage::DelLink(message),
            Kind::Act,
        )
    }
}

/// Switches the device at `index`, which was called `name`, off. The kernel then drops its routes and neighbours too.
pub fn set_down(name: &str, index: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.change_mask = LinkFlags::Up;
    Request {
        tolerated: &[libc::ENODEV],
        ..request(
            format!("switching {name} off"),
            RouteNetlinkMessage::SetLink(message),
            Kind::Act,
        )
    }
}

/// Puts the device at `index`, which was called `name`, into `group`.
pub fn set_group(name: &str, index: u32, group: u32) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.attributes = vec![LinkAttribute::Group(group)];
    Request {
        tolerated: &[libc::ENODEV],
        ..request(
            format!("putting {name} into the group {group:#x}"),
            RouteNetlinkMessage::SetLink(message),
            Kind::Act,
        )
    }
}

/// Removes all devices of `group`, whoever put them there, at the cost of little more than one.
pub fn remove_group(group: u32) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::Group(group)];
    Request {
        // Its members may all have been removed by others.
        tolerated: &[libc::ENODEV],
        ..request(
            format!("removing the devices of the group {group:#x}"),
            RouteNetlinkMessage::DelLink(message),
            Kind::Act,
        )
    }
}

/// Gives the pod its address.
pub fn add_address(device: &str, index: u32, address: IpAddr) -> Request {
    let mut message = AddressMessage::default();
    message.header.family = family(address);
    message.header.prefix_len = full_length(address);
    message.header.index = index;
    message.attributes = vec![
        AddressAttribute::Local(address),
        AddressAttribute::Address(address),
    ];
    if address.is_ipv6() {
        // Nobody else can hold it: duplicate detection would only delay the first packet.
        let flags = AddressFlags::Nodad | AddressFlags::Noprefixroute;
        message.attributes.push(AddressAttribute::Flags(flags));
    }
    let doing = format!("giving {device} the address {address}");
    request(doing, RouteNetlinkMessage::NewAddress(message), Kind::Create)
}

/// Asks for all addresses of a device.
pub fn list_addresses(device: &str, index: u32) -> Request {
    let mut message = AddressMessage::default();
    message.header.index = index;
    let doing = format!("listing the addresses of {device}");
    request(doing, RouteNetlinkMessage::GetAddress(message), Kind::List)
}

fn neighbour(index: u32, address: IpAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(address);
    message.header.ifindex = index;
    message.attributes = vec![NeighbourAttribute::Destination(match address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    })];
    message
}

/// Says for good which MAC `address` has behind the device.
pub fn add_neighbour(device: &str, index: u32, address: IpAddr, mac: Mac) -> Request {
    let mut message = neighbour(index, address);
    message.header.state = NeighbourState::Permanent;
    message
        .attributes
        .push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    let doing = format!("adding the neighbour {address} behind {device}");
    request(doing, RouteNetlinkMessage::NewNeighbour(message), Kind::Put)
}

/// Asks for the neighbour entry of `address` behind the device.
pub fn get_neighbour(device: &str, index: u32, address: IpAddr) -> Request {
    let message = neighbour(index, address);
    let doing = format!("looking for the neighbour {address} behind {device}");
    Request {
        tolerated: &[libc::ENOENT],
        ..request(doing, RouteNetlinkMessage::GetNeighbour(message), Kind::Ask)
    }
}

fn own_route(address: IpAddr, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.table = RouteHeader::RT_TABLE_MAIN;
    message.header.protocol = RouteProtocol::Other(ROUTE_PROTOCOL);
    message.header.kind = RouteType::Unicast;
    message.attributes = vec![RouteAttribute::Oif(index)];
    message
}

/// The host's route to the pod's address.
pub fn add_host_route(device: &str, index: u32, address: IpAddr) -> Request {
    let mut message = own_route(address, index);
    message.header.destination_prefix_length = full_length(address);
    message.header.scope = RouteScope::Link;
    message
        .attributes
        .push(RouteAttribute::Destination(address.into()));
    let doing = format!(
        "adding the route to {address}/{} via {device}",
        full_length(address)
    );
    request(doing, RouteNetlinkMessage::NewRoute(message), Kind::Create)
}

/// Has the pod take packets to its IPv6 address from now on. The kernel makes a route like it for every address, but in
/// a worker of its own that may be late by milliseconds: packets that come before it would be dropped.
pub fn add_local_route(device: &str, index: u32, address: IpAddr) -> Request {
    let mut message = own_route(address, index);
    message.header.destination_prefix_length = full_length(address);
    message.header.table = TABLE_LOCAL;
    message.header.kind = RouteType::Local;
    message
        .attributes
        .push(RouteAttribute::Destination(address.into()));
    // Behind the kernel's own, whose metric is 0: beside it, neither displaces the other.
    message.attributes.push(RouteAttribute::Priority(1));
    let doing = format!("having {device} take packets to {address}");
    request(doing, RouteNetlinkMessage::NewRoute(message), Kind::Create)
}

/// The pod's default route of the gateway's family.
pub fn add_default_route(device: &str, index: u32, gateway: IpAddr) -> Request {
    let mut message = own_route(gateway, index);
    // No address of the pod's covers the gateway: take our word that it is there.
    message.header.flags = RouteFlags::Onlink;
    message.attributes.push(RouteAttribute::Gateway(gateway.into()));
    let doing = format!("adding the default route via {gateway} dev {device}");
    request(doing, RouteNetlinkMessage::NewRoute(message), Kind::Create)
}

/// Asks which route the kernel would take to `address`.
pub fn get_route(address: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(address);
    message.header.destination_prefix_length = full_length(address);
    message.header.flags = RouteFlags::FibMatch;
    message.attributes = vec![RouteAttribute::Destination(address.into())];
    Request {
        tolerated: &[libc::ENETUNREACH, libc::EHOSTUNREACH],
        ..request(
            format!("looking for the route to {address}"),
            RouteNetlinkMessage::GetRoute(message),
            Kind::Ask,
        )
    }
}

/// Asks for all routes of the family of `sample`.
pub fn list_routes(sample: IpAddr) -> Request {
    let mut message = RouteMessage::default();
    message.header.address_family = family(sample);
    request(
        "listing routes".to_owned(),
        RouteNetlinkMessage::GetRoute(message),
        Kind::List,
    )
}

/// The family of `address`, as netlink names it.
pub fn family(address: IpAddr) -> AddressFamily {
    match address {
        IpAddr::V4(_) => AddressFamily::Inet,
        IpAddr::V6(_) => AddressFamily::Inet6,
    }
}

/// Length of the prefix that holds `address` alone.
pub fn full_length(address: IpAddr) -> u8 {
    match address {
        IpAddr::V4(_) => 32,
        IpAddr::V6(_) => 128,
    }
}
