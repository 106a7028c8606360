//! What whoever balances in front of the nodes asks each of them: whether it has endpoints of a Service here. Pure.

use std::collections::BTreeSet;
use std::net::IpAddr;

use super::balance::{NodeView, local_ready};
use super::cluster::Cluster;
use super::objects::ObjectName;
use super::service_port::Family;

/// What is answered for one Service (`spec.healthCheckNodePort`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HealthCheck {
    /// The Service.
    pub service: ObjectName,
    /// The port that is asked.
    pub port: u16,
    /// Endpoints on this node that take new connections.
    pub local_endpoints: usize,
}

/// The health check of the Service called `name`; none if it is gone or has none.
pub fn health_check(cluster: &Cluster, name: &ObjectName, view: &NodeView) -> Option<HealthCheck> {
    let service = cluster.service(name).filter(|service| service.served)?;
    let port = service.health_check_port?;
    // A pod has an address in each family, and may serve several ports: it counts once.
    let count = |family| {
        let of_port = |port| local_ready(cluster, service, port, family, view);
        let addresses: BTreeSet<IpAddr> = service.ports.iter().flat_map(of_port).collect();
        addresses.len()
    };
    Some(HealthCheck {
        service: name.clone(),
        port,
        local_endpoints: count(Family::V4).max(count(Family::V6)),
    })
}
