//! ADD: gives a pod its addresses and wires it, or changes nothing.

use std::net::IpAddr;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::route::RouteType;
use serde_json::Value;
use sluice_ipam::{DEFAULT_REST, Origin, Store};

use crate::config::Config;
use crate::error::{Code, Failure};
use crate::host_ports::{Mapping, Record};
use crate::invocation::Target;
use crate::netlink::Netlink;
use crate::netns::Netns;
use crate::node_file::NodeFile;
use crate::turn::Turn;
use crate::verbs::del;
use crate::wiring::{self, Plan};
use crate::{requests, result, shaping};

/// Wires `target` and returns the result.
///
/// # Errors
/// Whatever step failed; everything before it is undone.
pub fn add(target: &Target, config: &Config) -> Result<Value, Failure> {
    let wishes = config.wishes(&target.arguments)?;
    if config.prev_result().is_some() {
        let message = "prevResult: this plugin must be the first of its chain, but another ran before it";
        return Err(Failure::new(Code::Config, message));
    }
    let node = NodeFile::read(&config.node_file)?;
    if !node.not_ready.is_empty() {
        return Err(Failure::new(
            Code::TryAgain,
            format!("the node is not ready: {}", node.not_ready),
        ));
    }
    let netns = Netns::open(&target.netns)?;
    let store = Store::open(&config.ipam_directory, DEFAULT_REST)?.with_reserved(&node.reserved);
    let turn = Turn::wait(&config.ipam_directory);
    let origin = Origin {
        network: &config.name,
        netns: &target.netns,
    };
    let claim = store.allocate(&target.attachment, &node.pod_cidrs, &wishes.addresses, origin)?;
    let mut plan = Plan::new(
        &target.attachment,
        &node,
        &claim.allocation().addresses,
        wishes.mac,
    )?;
    plan.clsact = config.clsact()?;
    wishes.bandwidth.check_against(plan.mtu)?;
    open_to(&wishes.host_ports, &plan.addresses)?;
    wiring::make(&plan, &netns, turn)?;
    let finished = shaping::make(&target.attachment, &wishes.bandwidth, plan.mtu)
        .and_then(|()| {
            if wishes.host_ports.is_empty() {
                return Ok(());
            }
            let record = Record {
                addresses: plan.addresses.clone(),
                mappings: wishes.host_ports,
            };
            // Late, since from here on others are led to the pod.
            config.host_ports().record(&target.attachment, &record, &store)
        })
        .and_then(|()| claim.keep().map_err(Failure::from));
    if let Err(failure) = finished {
        // Where a DEL ran meanwhile, it may have looked for these before they were there.
        let undone = config.host_ports().remove(&target.attachment).map(drop);
        return Err(match undone.and(del::remove_devices(&target.attachment)) {
            Ok(()) => failure,
            Err(error) => failure.with_details(format!("undoing it failed too: {error}")),
        });
    }
    Ok(result::to_json(
        &plan,
        &target.netns.to_string_lossy(),
        config.dns(),
        config.version,
    ))
}

/// Sees to it that the node has the addresses that host ports are to be open on, and the pod one of their family.
fn open_to(mappings: &[Mapping], addresses: &[IpAddr]) -> Result<(), Failure> {
    for mapping in mappings {
        let wrong = |why: String| {
            let message = format!("portMappings: host port {mapping}: {why}");
            Failure::new(Code::Config, message)
        };
        if !addresses.iter().any(|address| mapping.serves(address.is_ipv4())) {
            return Err(wrong("the pod has no address of that family".to_owned()));
        }
        // Were it somebody else's, this node's traffic to that somebody would be led astray.
        if let Some(address) = mapping.address().filter(|address| !address.is_loopback())
            && !is_own(address)?
        {
            return Err(wrong(format!("{address} is no address of this node")));
        }
    }
    Ok(())
}

/// Whether the node takes packets to `address` for its own.
fn is_own(address: IpAddr) -> Result<bool, Failure> {
    let answers = Netlink::open()?.batch(&[requests::get_route(address)])?;
    Ok(answers.iter().any(|answer| {
        matches!(answer, RouteNetlinkMessage::NewRoute(route) if route.header.kind == RouteType::Local)
    }))
}
