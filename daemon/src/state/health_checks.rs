//! What whoever balances in front of the nodes asks each of them: whether it has endpoints of a Service here. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, SocketAddr};

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

/// Where to listen, with what is answered there, and what cannot be: of two Services with one port the first by name has it.
pub fn listeners(
    checks: &BTreeMap<ObjectName, HealthCheck>,
    addresses: &[IpAddr],
) -> (BTreeMap<SocketAddr, HealthCheck>, Vec<String>) {
    let (mut wanted, mut problems) = (BTreeMap::new(), Vec::new());
    let mut holders: BTreeMap<u16, &ObjectName> = BTreeMap::new();
    for check in checks.values() {
        let holder = *holders.entry(check.port).or_insert(&check.service);
        if *holder != check.service {
            problems.push(format!(
                "Service {}: spec.healthCheckNodePort: {} belongs to {holder}; give one of them another",
                check.service, check.port
            ));
            continue;
        }
        for address in addresses {
            wanted.insert(SocketAddr::new(*address, check.port), check.clone());
        }
    }
    (wanted, problems)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(name: &str, port: u16) -> (ObjectName, HealthCheck) {
        let service = ObjectName::new("default", name);
        let check = HealthCheck {
            service: service.clone(),
            port,
            local_endpoints: 1,
        };
        (service, check)
    }

    /// S8 S19
    #[test]
    fn each_port_is_one_services_on_every_address() {
        let checks = BTreeMap::from([check("a", 32000), check("b", 32000), check("c", 32001)]);
        let addresses: [IpAddr; 2] = ["192.0.2.1".parse().unwrap(), "2001:db8::1".parse().unwrap()];
        let (wanted, problems) = listeners(&checks, &addresses);
        let who: Vec<_> = wanted
            .iter()
            .map(|(address, check)| format!("{address} {}", check.service))
            .collect();
        assert_eq!(
            who,
            [
                "192.0.2.1:32000 default/a",
                "192.0.2.1:32001 default/c",
                "[2001:db8::1]:32000 default/a",
                "[2001:db8::1]:32001 default/c",
            ]
        );
        assert_eq!(problems.len(), 1);
        assert!(problems[0].contains("default/b") && problems[0].contains("belongs to default/a"));
    }
}
