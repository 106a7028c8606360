//! CHECK: is the pod still wired as its ADD said?
//!
//! Looks only: repairs nothing. What later plugins of the chain added is not judged, and where they changed the result
//! (a MAC, an MTU), the result is what counts.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourState};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteMessage, RouteProtocol};
use sluice_ipam::{DEFAULT_REST, Store};

use crate::config::Config;
use crate::error::{Code, Failure};
use crate::host_ports::Mapping;
use crate::invocation::Target;
use crate::mac::{Mac, host_device};
use crate::names::ROUTE_PROTOCOL;
use crate::netlink::{Netlink, NetlinkError};
use crate::netns::Netns;
use crate::node_file::NodeFile;
use crate::requests::{self, full_length};
use crate::result::{Interface, PrevResult};
use crate::shaping;
use crate::wiring::{Link, look_up};

/// Compares `target` with the config's `prevResult`.
///
/// # Errors
/// Code 102 with everything that differs; 3 when the namespace is gone; 7 without a `prevResult`.
pub fn check(target: &Target, config: &Config) -> Result<(), Failure> {
    let Some(prev) = config.prev_result() else {
        return Err(Failure::new(
            Code::Config,
            "prevResult: is missing, so there is nothing to CHECK against",
        ));
    };
    let prev = PrevResult::read(prev)?;
    let wishes = config.wishes(&target.arguments)?;
    let node = NodeFile::read(&config.node_file)?;
    let netns = Netns::open(&target.netns)?;
    let ifname = target.attachment.ifname();
    let in_pod = |interface: &Interface| interface.name == ifname && !interface.sandbox.is_empty();
    let Some(position) = prev.interfaces.iter().position(in_pod) else {
        let message = format!("prevResult.interfaces: has no {ifname} in a sandbox");
        return Err(Failure::new(Code::Config, message));
    };
    let of_pod = |interface: &Option<usize>| interface.is_none_or(|at| at == position);
    let addresses = prev
        .ips
        .iter()
        .filter(|(_, at)| of_pod(at))
        .map(|(address, _)| *address)
        .collect();
    let device = host_device(&target.attachment);
    let mut check = Check {
        addresses,
        gateways: [node.gateway_v4.into(), node.gateway_v6.into()],
        differences: Vec::new(),
    };

    check.allocation(target, config)?;
    check.host_ports(target, config, &wishes.host_ports)?;
    let mut host = Netlink::open()?;
    let host_link = look_up(&mut host, &device)?;
    let pod_link;
    {
        let _inside = netns.enter()?;
        let mut pod = Netlink::open()?;
        pod_link = look_up(&mut pod, ifname)?;
        check.link(ifname, pod_link.as_ref(), prev.interfaces.get(position));
        if let Some(link) = &pod_link {
            check.pod(&mut pod, link, host_link.as_ref().and_then(|host| host.mac))?;
        }
    }
    let told = prev.interfaces.iter().find(|interface| interface.name == device);
    check.link(&device, host_link.as_ref(), told);
    if let Some(link) = &host_link {
        if link.alias != target.attachment.to_string() {
            check.differs(format!(
                "{device} serves {:?} and not {}",
                link.alias, target.attachment
            ));
        }
        check.host(&mut host, link, pod_link.and_then(|pod| pod.mac))?;
        let limits = shaping::differences(&mut host, &target.attachment, &wishes.bandwidth)?;
        check.differences.extend(limits);
    }
    if check.differences.is_empty() {
        return Ok(());
    }
    let message = format!("{} is not as ADD left it", target.attachment);
    Err(Failure::new(Code::Differs, message).with_details(check.differences.join("; ")))
}

struct Check {
    addresses: Vec<IpAddr>,
    gateways: [IpAddr; 2],
    differences: Vec<String>,
}

impl Check {
    fn differs(&mut self, what: String) {
        self.differences.push(what);
    }

    fn allocation(&mut self, target: &Target, config: &Config) -> Result<(), Failure> {
        let store = Store::open_existing(&config.ipam_directory, DEFAULT_REST);
        let held = store
            .map(|store| store.get(&target.attachment))
            .transpose()?
            .flatten();
        let Some(held) = held else {
            self.differs("it holds no address in the store".to_owned());
            return Ok(());
        };
        for address in &self.addresses.clone() {
            if !held.addresses.contains(address) {
                self.differs(format!("the store does not know that it holds {address}"));
            }
        }
        for address in held.addresses {
            if !self.addresses.contains(&address) {
                self.differs(format!("the store says it holds {address}, prevResult does not"));
            }
        }
        Ok(())
    }

    fn host_ports(&mut self, target: &Target, config: &Config, wanted: &[Mapping]) -> Result<(), Failure> {
        let directory = config.host_ports();
        let found = directory.get(&target.attachment)?;
        for mapping in wanted {
            let there = found
                .as_ref()
                .is_some_and(|record| record.mappings.contains(mapping));
            if !there {
                self.differs(format!(
                    "{} does not say that it has the host port {mapping}",
                    directory.directory().display()
                ));
            }
        }
        let astray = found.filter(|_| !wanted.is_empty()).is_some_and(|record| {
            let unknown = |address| !self.addresses.contains(address);
            record.addresses.iter().any(unknown)
        });
        if astray {
            self.differs("its host ports lead to addresses that prevResult does not tell of".to_owned());
        }
        Ok(())
    }

    fn link(&mut self, name: &str, found: Option<&Link>, told: Option<&Interface>) {
        let Some(link) = found else {
            return self.differs(format!("the device {name} is gone"));
        };
        if !link.up {
            self.differs(format!("{name} is switched off"));
        }
        let Some(told) = told else {
            return self.differs(format!("prevResult does not tell of {name}"));
        };
        if let Some(mac) = told.mac
            && link.mac != Some(mac)
        {
            self.differs(format!("{name} has the MAC {} and not {mac}", shown(link.mac)));
        }
        if let Some(mtu) = told.mtu
            && link.mtu != mtu
        {
            self.differs(format!("{name} has the MTU {} and not {mtu}", link.mtu));
        }
    }

    fn pod(&mut self, pod: &mut Netlink, link: &Link, host_mac: Option<Mac>) -> Result<(), NetlinkError> {
        let name = &link.name;
        let found = pod.batch(&[requests::list_addresses(name, link.index)])?;
        let found: Vec<IpAddr> = found
            .iter()
            .filter_map(|answer| address_on(answer, link.index))
            .collect();
        for address in self.addresses.clone() {
            let gateway = self.gateways[usize::from(address.is_ipv6())];
            if !found.contains(&address) {
                self.differs(format!("{name} lacks the address {address}"));
            }
            self.neighbour(pod, link, gateway, host_mac)?;
            let routes = pod.batch(&[requests::list_routes(gateway)])?;
            let default = |answer: &RouteNetlinkMessage| match answer {
                RouteNetlinkMessage::NewRoute(route) => {
                    route.header.destination_prefix_length == 0
                        && out_of(route) == Some(link.index)
                        && route
                            .attributes
                            .contains(&RouteAttribute::Gateway(RouteAddress::from(gateway)))
                }
                _ => false,
            };
            if !routes.iter().any(default) {
                self.differs(format!(
                    "the pod lacks the default route via {gateway} dev {name}"
                ));
            }
        }
        Ok(())
    }

    fn host(&mut self, host: &mut Netlink, link: &Link, pod_mac: Option<Mac>) -> Result<(), NetlinkError> {
        let name = &link.name;
        for address in self.addresses.clone() {
            self.neighbour(host, link, address, pod_mac)?;
            let answers = host.batch(&[requests::get_route(address)])?;
            let right = |answer: &RouteNetlinkMessage| match answer {
                RouteNetlinkMessage::NewRoute(route) => {
                    route.header.destination_prefix_length == full_length(address)
                        && route.header.protocol == RouteProtocol::Other(ROUTE_PROTOCOL)
                        && out_of(route) == Some(link.index)
                }
                _ => false,
            };
            if !answers.iter().any(right) {
                self.differs(format!("the host lacks its route to {address} via {name}"));
            }
        }
        Ok(())
    }

    fn neighbour(
        &mut self,
        socket: &mut Netlink,
        link: &Link,
        address: IpAddr,
        mac: Option<Mac>,
    ) -> Result<(), NetlinkError> {
        let answers = socket.batch(&[requests::get_neighbour(&link.name, link.index, address)])?;
        let found = answers.iter().find_map(|answer| match answer {
            RouteNetlinkMessage::NewNeighbour(entry) => Some(entry),
            _ => None,
        });
        let Some(entry) = found else {
            self.differs(format!("there is no neighbour {address} behind {}", link.name));
            return Ok(());
        };
        let known = entry.attributes.iter().find_map(|attribute| match attribute {
            NeighbourAttribute::LinkLayerAddress(bytes) => {
                bytes.as_slice().try_into().ok().map(Mac::from_bytes)
            }
            _ => None,
        });
        if entry.header.state != NeighbourState::Permanent {
            self.differs(format!(
                "the neighbour {address} behind {} is not permanent",
                link.name
            ));
        }
        // Of an end that is gone, its own difference speaks.
        if mac.is_some() && known != mac {
            let (known, mac) = (shown(known), shown(mac));
            self.differs(format!(
                "the neighbour {address} behind {} has the MAC {known} and not {mac}",
                link.name
            ));
        }
        Ok(())
    }
}

fn shown(mac: Option<Mac>) -> String {
    mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string())
}

fn address_on(answer: &RouteNetlinkMessage, index: u32) -> Option<IpAddr> {
    let RouteNetlinkMessage::NewAddress(message) = answer else {
        return None;
    };
    let address = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    address.filter(|_| message.header.index == index)
}

fn out_of(route: &RouteMessage) -> Option<u32> {
    route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    })
}
