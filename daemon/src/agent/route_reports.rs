//! The ways to pods, for operators: what they are to be, and how the kernel differs from that. Pure.

use ipnetwork::IpNetwork;

use crate::admin::report;
use crate::network::desired::{KernelState, Route, desired, node_pod_address};
use crate::network::paths::Path;
use crate::network::{Device, Outcome};
use crate::state::service_port::Family;

/// The ways to the pods of this node, which is given by name and with its pod CIDRs, and to those of the others as `outcome` has them, where
/// the kernel holds this.
pub(super) fn route_reports(
    (node, own): (&str, &[IpNetwork]),
    outcome: &Outcome,
    held: &KernelState,
) -> Vec<report::Route> {
    let wanted = desired(&outcome.paths, own, &outcome.uplink, &outcome.tunnels);
    let route = |cidr: &IpNetwork, way: report::Route| report::Route {
        pod_cidr: cidr.to_string(),
        failure: difference(cidr, &wanted, held),
        ..way
    };
    let here = own.iter().map(|cidr| {
        let way = report::Route {
            node: node.to_owned(),
            path: "this node".to_owned(),
            ..report::Route::default()
        };
        route(cidr, way)
    });
    let elsewhere = outcome
        .paths
        .iter()
        .map(|(cidr, path)| route(cidr, way(cidr, path, outcome)));
    here.chain(elsewhere).collect()
}

fn way(cidr: &IpNetwork, path: &Path, outcome: &Outcome) -> report::Route {
    match path {
        Path::Direct { node, gateway } => report::Route {
            node: node.clone(),
            path: "direct".to_owned(),
            via: Some(*gateway),
            device: outcome.uplink.device.name.clone(),
            ..report::Route::default()
        },
        Path::Vxlan { node, remote, .. } => report::Route {
            node: node.clone(),
            path: "vxlan".to_owned(),
            via: Some(node_pod_address(cidr)),
            device: outcome
                .tunnels
                .get(&Family::of(*remote))
                .map(|Device { name, .. }| name.clone())
                .unwrap_or_default(),
            tunnel_end: Some(*remote),
            ..report::Route::default()
        },
    }
}

/// How what the kernel holds for one CIDR differs from what it should; empty if it does not.
fn difference(cidr: &IpNetwork, wanted: &KernelState, held: &KernelState) -> String {
    let Some(route) = wanted.routes.get(cidr) else {
        return "there is no tunnel device to lead there".to_owned();
    };
    let mut lacks = vec![lack("route", Some(route), held.routes.get(cidr))];
    if let Route::Via { gateway, device, .. } = route
        && let Some(vtep) = wanted.neighbours.get(&(*device, *gateway))
    {
        let neighbour = held.neighbours.get(&(*device, *gateway));
        lacks.push(lack(&format!("neighbour {gateway}"), Some(vtep), neighbour));
        let [end, found] = [wanted, held].map(|state| state.fdb.get(&(*device, *vtep)));
        lacks.push(lack(&format!("forwarding entry for {vtep}"), end, found));
    }
    let lacks: Vec<String> = lacks.into_iter().flatten().collect();
    if lacks.is_empty() {
        return String::new();
    }
    format!("the kernel has {}", lacks.join(", "))
}

fn lack<T: PartialEq>(what: &str, wanted: Option<&T>, held: Option<&T>) -> Option<String> {
    match held {
        held if held == wanted => None,
        None => Some(format!("no {what}")),
        Some(_) => Some(format!("another {what}")),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::network::{Uplink, vtep};

    fn network(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    fn device(index: u32, name: &str) -> Device {
        let name = name.to_owned();
        Device { index, name }
    }

    fn outcome() -> Outcome {
        let direct = Path::Direct {
            node: "near".to_owned(),
            gateway: "192.0.2.2".parse().unwrap(),
        };
        let tunnelled = Path::Vxlan {
            node: "far".to_owned(),
            remote: "198.51.100.3".parse().unwrap(),
            vtep: vtep::mac("far"),
        };
        Outcome {
            uplink: Uplink {
                device: device(2, "eth0"),
                mtu: 1500,
                addresses: Vec::new(),
            },
            tunnels: BTreeMap::from([(Family::V4, device(3, "sluice-vxlan"))]),
            pod_mtu: 1450,
            pods: Vec::new(),
            paths: BTreeMap::from([
                (network("10.244.2.0/24"), direct),
                (network("10.244.3.0/24"), tunnelled),
            ]),
            problems: Vec::new(),
            changes: 0,
            failed: 0,
        }
    }

    /// O2
    #[test]
    fn what_the_kernel_lacks_of_a_way_is_said_of_that_way() {
        let (own, outcome) = ([network("10.244.1.0/24")], outcome());
        let whole = desired(&outcome.paths, &own, &outcome.uplink, &outcome.tunnels);
        let failures = |held: &KernelState| -> Vec<String> {
            let routes = route_reports(("own", &own), &outcome, held);
            routes.into_iter().map(|route| route.failure).collect()
        };
        assert_eq!(failures(&whole), ["", "", ""]);
        let [own, near, far] = ["10.244.1.0/24", "10.244.2.0/24", "10.244.3.0/24"].map(network);
        let mut held = whole.clone();
        held.routes.remove(&own);
        held.routes.insert(near, Route::Unreachable);
        let [no, another] = ["the kernel has no route", "the kernel has another route"];
        assert_eq!(failures(&held), [no, another, ""]);
        let mut held = whole.clone();
        held.routes.remove(&far);
        held.neighbours.clear();
        let end = held.fdb.values_mut().next().unwrap();
        *end = "198.51.100.4".parse().unwrap();
        let vtep = vtep::mac("far");
        let lacks = format!("{no}, no neighbour 10.244.3.0, another forwarding entry for {vtep}");
        assert_eq!(failures(&held), ["", "", lacks.as_str()]);
    }
}
