//! One pod's wiring: the plan (pure: what the kernel must hold for it), and making and removing it.
//!
//! Addresses are the store's matter: nothing here gives or frees one.

use std::fs;
use std::io::ErrorKind;
use std::net::IpAddr;
use std::os::fd::AsFd;

use netlink_packet_core::NlasIterator;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use sluice_ipam::Attachment;

use crate::error::{Code, Failure};
use crate::mac::{self, Mac};
use crate::netlink::{Netlink, NetlinkError, Request};
use crate::netns::Netns;
use crate::node_file::NodeFile;
use crate::removals::Ask;
use crate::requests::{self, End};
use crate::turn::Turn;

/// Least MTU of IPv6 (RFC 8200): below it the kernel has no IPv6 on a device.
const LEAST_MTU_V6: u32 = 1280;

/// Least MTU of IPv4 (RFC 791).
const LEAST_MTU_V4: u32 = 68;

/// Every network namespace has it, switched off at first.
const LOOPBACK: &str = "lo";

/// All that the kernel must hold for one pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Device on the host.
    pub host_device: String,
    /// Its alias, by which a collector knows whom it serves.
    pub alias: String,
    /// Its MAC.
    pub host_mac: Mac,
    /// Device in the pod.
    pub ifname: String,
    /// Its MAC.
    pub pod_mac: Mac,
    /// MTU of both.
    pub mtu: u32,
    /// The pod's addresses, at most one per family.
    pub addresses: Vec<IpAddr>,
    /// Whether the host's end is opened for the dataplane's programs before it is up ([`requests::make_clsact`]).
    pub clsact: bool,
    gateways: [IpAddr; 2],
}

impl Plan {
    /// What `attachment` needs on `node` to have `addresses`, with the MAC it asks for if it does.
    ///
    /// # Errors
    /// Code 7 for an MTU its families cannot live with.
    pub fn new(
        attachment: &Attachment,
        node: &NodeFile,
        addresses: &[IpAddr],
        mac: Option<Mac>,
    ) -> Result<Self, Failure> {
        let v6 = addresses.iter().any(IpAddr::is_ipv6);
        let least = if v6 { LEAST_MTU_V6 } else { LEAST_MTU_V4 };
        if node.mtu < least {
            let message = format!(
                "the node file's mtu {}: a pod with {addresses:?} needs {least}",
                node.mtu
            );
            return Err(Failure::new(Code::Config, message));
        }
        Ok(Self {
            host_device: mac::host_device(attachment),
            alias: attachment.to_string(),
            host_mac: Mac::of_host_end(attachment),
            ifname: attachment.ifname().to_owned(),
            pod_mac: mac.unwrap_or_else(|| Mac::of_pod_end(attachment)),
            mtu: node.mtu,
            addresses: addresses.to_vec(),
            clsact: false,
            gateways: [node.gateway_v4.into(), node.gateway_v6.into()],
        })
    }

    /// The gateway of the family of `address`.
    pub fn gateway(&self, address: IpAddr) -> IpAddr {
        self.gateways[usize::from(address.is_ipv6())]
    }
}

/// Makes all of `plan`, the pod's end in `netns`, or nothing of it.
///
/// The caller holds the addresses and so is the only one at work for this attachment: a device of its name on the host
/// is what a killed call left, and goes. The `turn` is over once the pair is there, for who is next takes a moment to wake up.
///
/// # Errors
/// Code 100 with the kernel's answer and what it was about.
pub fn make(plan: &Plan, netns: &Netns, turn: Turn) -> Result<(), Failure> {
    let mut host = Netlink::open()?;
    let inside = netns.enter()?;
    let mut pod = Netlink::open()?;
    let made = match make_pair(plan, netns, &mut host) {
        Err(error) if error.is(libc::EEXIST) && remove_with(&mut host, &plan.host_device, &plan.alias)? => {
            make_pair(plan, netns, &mut host)
        }
        made => made,
    };
    let (index, peer) = made.map_err(|error| explain(plan, error))?;
    drop(turn);
    let wired = wire(plan, index, peer, &mut host, &mut pod);
    drop(inside);
    if let Err(failure) = wired {
        return Err(
            match host.batch(&[requests::remove_link(&plan.host_device, Some(index))]) {
                Ok(_) => failure,
                Err(error) => failure.with_details(format!("undoing it failed too: {error}")),
            },
        );
    }
    Ok(())
}

/// Makes the pair and switches the host's end on; the answer is the index of each end.
fn make_pair(plan: &Plan, netns: &Netns, host: &mut Netlink) -> Result<(u32, u32), NetlinkError> {
    let name = plan.host_device.as_str();
    let ends = (
        End {
            name,
            mac: plan.host_mac,
        },
        End {
            name: &plan.ifname,
            mac: plan.pod_mac,
        },
    );
    let pair = requests::make_pair(&ends.0, &ends.1, netns.as_fd(), plan.mtu);
    // Alone: had it failed, what follows would change a device that is not this call's.
    host.batch(&[pair])?;
    let finished = finish_host_end(plan, host);
    if finished.is_err() {
        // Best effort: what stays has its allocation, by which DEL and GC find it.
        let _ = host.batch(&[requests::remove_link(name, None)]);
    }
    finished
}

fn finish_host_end(plan: &Plan, host: &mut Netlink) -> Result<(u32, u32), NetlinkError> {
    let name = plan.host_device.as_str();
    let asked = [
        requests::set_alias(name, &plan.alias),
        requests::no_own_addresses(name),
        requests::get_link(name),
    ];
    let mut found = None;
    host.exchange(&asked, |answer| {
        found = ends(answer);
        Ok(())
    })?;
    let Some((index, peer)) = found else {
        return Err(NetlinkError {
            position: 0,
            doing: format!("looking for the device {name}"),
            source: ErrorKind::NotFound.into(),
            hint: String::new(),
        });
    };
    let mut batch = Vec::new();
    if plan.clsact {
        batch.push(Request {
            // A kernel without it runs no programs either.
            tolerated: &[libc::ENOENT, libc::EOPNOTSUPP],
            ..requests::make_clsact(name, index)
        });
    }
    batch.push(requests::set_up(name));
    host.batch(&batch)?;
    Ok((index, peer))
}

/// The index of one end of a pair and that of the other, which are all that is wanted of an answer to `RTM_GETLINK`: behind two headers,
/// `struct nlmsghdr` and `struct ifinfomsg`, attributes (rtnetlink(7)).
fn ends(answer: &[u8]) -> Option<(u32, u32)> {
    const HEADERS: usize = 16 + 16;
    const INDEX: usize = 16 + 4;
    let word = |bytes: &[u8]| Some(u32::from_ne_bytes(bytes.try_into().ok()?));
    let index = word(answer.get(INDEX..INDEX + 4)?)?;
    let attributes = NlasIterator::new(answer.get(HEADERS..)?);
    let peer = attributes
        .flatten()
        .find(|attribute| attribute.kind() == libc::IFLA_LINK)?;
    Some((index, word(peer.value())?))
}

/// The rest, once both ends exist. Must run in the pod's namespace, for its sysctls.
fn wire(plan: &Plan, index: u32, peer: u32, host: &mut Netlink, pod: &mut Netlink) -> Result<(), Failure> {
    let ifname = plan.ifname.as_str();
    let mut batch = vec![
        requests::set_up(LOOPBACK),
        requests::no_own_addresses(ifname),
        requests::set_up(ifname),
    ];
    if plan.addresses.iter().any(IpAddr::is_ipv6) {
        allow_v6(ifname)?;
    }
    for address in &plan.addresses {
        let gateway = plan.gateway(*address);
        batch.push(requests::add_address(ifname, peer, *address));
        if address.is_ipv6() {
            batch.push(requests::add_local_route(ifname, peer, *address));
        }
        batch.push(requests::add_neighbour(ifname, peer, gateway, plan.host_mac));
        batch.push(requests::add_default_route(ifname, peer, gateway));
    }
    // Without it the first packet could still be dropped.
    batch.push(requests::await_carrier(ifname));
    pod.batch(&batch)?;

    let name = plan.host_device.as_str();
    let mut batch = Vec::new();
    for address in &plan.addresses {
        batch.push(requests::add_neighbour(name, index, *address, plan.pod_mac));
        batch.push(requests::add_host_route(name, index, *address));
    }
    batch.push(requests::await_carrier(name));
    host.batch(&batch)?;
    Ok(())
}

/// Some runtimes make namespaces with IPv6 switched off.
fn allow_v6(ifname: &str) -> Result<(), Failure> {
    let path = format!("/proc/sys/net/ipv6/conf/{ifname}/disable_ipv6");
    match fs::read(&path) {
        Ok(value) if value.trim_ascii() == b"0" => Ok(()),
        Ok(_) => {
            let failed =
                |error| Failure::new(Code::Io, format!("{path} in the pod: switching IPv6 on: {error}"));
            fs::write(&path, "0").map_err(failed)
        }
        // No /proc, or no IPv6: giving the address will say what it comes to.
        Err(_) => Ok(()),
    }
}

fn explain(plan: &Plan, error: NetlinkError) -> Failure {
    if error.is(libc::EEXIST) {
        let message = format!(
            "CNI_IFNAME {}: a device of that name is in the pod already",
            plan.ifname
        );
        return Failure::new(Code::Environment, message).with_details(error.to_string());
    }
    error.into()
}

/// Cuts the pod of `attachment` off at once. What is left to remove are these: the host's end of its pair, and what limits it.
///
/// # Errors
/// Code 100 when a device serves another, or with the kernel's answer.
pub fn cut_off(host: &mut Netlink, attachment: &Attachment) -> Result<Vec<Ask>, Failure> {
    let alias = attachment.to_string();
    let mut left = Vec::new();
    for name in [mac::host_device(attachment), mac::rate_device(attachment)] {
        let Some(link) = look_up(host, &name)? else {
            continue;
        };
        check_served(&link, &alias)?;
        let index = link.index;
        // Should it be refused, the removal says why, or does it all the same.
        let _ = host.batch(&[requests::set_down(&name, index)]);
        left.push(Ask { index, name });
    }
    Ok(left)
}

/// Removes the device `name`, and with one end of a pair the other; says whether it was there.
///
/// # Errors
/// Code 100 when it serves another than `alias` says, or with the kernel's answer.
pub(crate) fn remove_with(host: &mut Netlink, name: &str, alias: &str) -> Result<bool, Failure> {
    let Some(link) = look_up(host, name)? else {
        return Ok(false);
    };
    check_served(&link, alias)?;
    host.batch(&[requests::remove_link(name, Some(link.index))])?;
    Ok(true)
}

/// Only what serves `alias`, or as yet nobody, is this attachment's to change.
fn check_served(link: &Link, alias: &str) -> Result<(), Failure> {
    if !link.alias.is_empty() && link.alias != alias {
        let message = format!(
            "the device {} serves {:?}, not {alias}: left alone",
            link.name, link.alias
        );
        return Err(Failure::new(Code::Kernel, message));
    }
    Ok(())
}

/// The device called `name`, if there is one.
pub(crate) fn look_up(socket: &mut Netlink, name: &str) -> Result<Option<Link>, NetlinkError> {
    match socket.batch(&[requests::get_link(name)]) {
        Ok(answers) => Ok(only_link(&answers)),
        Err(error) if error.is(libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

/// A device as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its alias; empty without one.
    pub alias: String,
    /// Its group (`IFLA_GROUP`); 0 unless somebody set one.
    pub group: u32,
    /// Index of the other end, in its own namespace.
    pub peer: u32,
    /// Its MAC.
    pub mac: Option<Mac>,
    /// Its MTU in bytes.
    pub mtu: u32,
    /// Whether it is switched on.
    pub up: bool,
}

impl Link {
    /// What the kernel's answer says.
    pub fn read(message: &LinkMessage) -> Self {
        let mut link = Self {
            index: message.header.index,
            up: message.header.flags.contains(LinkFlags::Up),
            ..Self::default()
        };
        for attribute in &message.attributes {
            match attribute {
                LinkAttribute::IfName(name) => link.name.clone_from(name),
                LinkAttribute::IfAlias(alias) => link.alias.clone_from(alias),
                LinkAttribute::Group(group) => link.group = *group,
                LinkAttribute::Link(peer) => link.peer = *peer,
                LinkAttribute::Mtu(mtu) => link.mtu = *mtu,
                LinkAttribute::Address(bytes) => {
                    link.mac = bytes.as_slice().try_into().ok().map(Mac::from_bytes);
                }
                _ => {}
            }
        }
        link
    }

    /// Whom it serves, by its alias; nothing when the name does not fit that, for then it is not Sluice's.
    pub fn serves(&self) -> Option<Attachment> {
        let (container_id, ifname) = self.alias.split_once('/')?;
        let attachment = Attachment::new(container_id, ifname).ok()?;
        let own = [mac::host_device(&attachment), mac::rate_device(&attachment)];
        own.contains(&self.name).then_some(attachment)
    }
}

/// The device among the answers to a batch that asked for one.
pub fn only_link(answers: &[RouteNetlinkMessage]) -> Option<Link> {
    answers.iter().find_map(|answer| match answer {
        RouteNetlinkMessage::NewLink(message) => Some(Link::read(message)),
        _ => None,
    })
}
