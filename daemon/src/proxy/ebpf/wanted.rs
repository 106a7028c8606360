//! What a desired [`ServicePort`] comes to as table entries. Pure.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};

use sluice_ebpf_types::{Address, Backend, Frontend, FrontendKey, MemberKey, frontend_flag, place};

use crate::state::service_port::{
    self, FrontendKind, Place, Protocol, Scope, ServicePort, ServicePortKey, WhenEmpty,
};

/// The key of a frontend at `address`.
pub(super) fn frontend_key(address: SocketAddr, protocol: Protocol) -> FrontendKey {
    FrontendKey {
        address: Address::from(address.ip()),
        port: address.port().to_be(),
        protocol: protocol.number(),
        zero: 0,
    }
}

/// Address and port as the tables have them, for people; `port` in network order.
pub(super) fn socket_address(address: Address, port: u16) -> SocketAddr {
    SocketAddr::new(address.to_ip(), u16::from_be(port))
}

/// The frontends of the set `id`, called `key`. `cluster` is the id of the set with the whole cluster's endpoints for
/// the same port, if there is one beside this; `node` are the node's own addresses.
pub(super) fn frontends(
    key: &ServicePortKey,
    port: &ServicePort,
    id: u32,
    cluster: Option<u32>,
    node: &[IpAddr],
) -> BTreeMap<FrontendKey, Frontend> {
    port.frontends
        .iter()
        .map(|frontend| {
            let outside = frontend.kind != FrontendKind::ClusterIp;
            let loopback = frontend.address.ip().is_loopback();
            let mut flags = if outside { 0 } else { frontend_flag::CLUSTER_IP };
            if loopback {
                flags |= frontend_flag::HOST_NETNS_ONLY;
            } else if outside {
                flags |= frontend_flag::EXTERNAL;
                if !matches!(frontend.kind, FrontendKind::NodePort | FrontendKind::HostPort) {
                    flags |= frontend_flag::FOREIGN;
                }
            }
            if port.when_empty == WhenEmpty::Drop && !loopback {
                flags |= frontend_flag::DROP_WHEN_EMPTY;
            }
            if let (FrontendKind::LoadBalancer, Some(ranges)) = (frontend.kind, &port.source_ranges) {
                flags |= frontend_flag::RESTRICTED;
                if node
                    .iter()
                    .any(|address| ranges.iter().any(|range| range.contains(*address)))
                {
                    flags |= frontend_flag::HOST_ALLOWED;
                }
            }
            // The node and its pods reach an outside address by all endpoints, even where outside traffic stays local.
            let socket_service = cluster
                .filter(|_| outside && key.scope == Scope::Local)
                .unwrap_or(id);
            (
                frontend_key(frontend.address, key.protocol),
                Frontend {
                    service: id,
                    socket_service,
                    flags,
                },
            )
        })
        .collect()
}

/// A Service port's backends as they stand in slots, sorted, without duplicates.
pub(super) fn backends(port: &ServicePort) -> Vec<Backend> {
    let mut backends: Vec<_> = port.backends.iter().map(backend).collect();
    // Stable, which costs little where they come sorted, as from Services they do.
    backends.sort();
    backends.dedup();
    backends
}

/// A backend as it stands in a slot.
pub(super) fn backend(backend: &service_port::Backend) -> Backend {
    Backend {
        address: Address::from(backend.address.ip()),
        port: backend.address.port().to_be(),
        place: match backend.place {
            Place::ThisNode => place::THIS_NODE,
            Place::PodNetwork => place::POD_NETWORK,
            Place::Outside => place::OUTSIDE,
        },
        zero: 0,
    }
}

/// The key that says `backend` belongs to set `service`.
pub(super) fn member_key(service: u32, backend: &Backend) -> MemberKey {
    MemberKey {
        address: backend.address,
        service,
        port: backend.port,
        zero: 0,
    }
}

/// Session affinity in seconds, at least one; 0 stands for none.
pub(super) fn affinity_seconds(port: &ServicePort) -> u32 {
    port.affinity.map_or(0, |timeout| {
        u32::try_from(timeout.as_secs()).unwrap_or(u32::MAX).max(1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::state::service_port::Family;

    fn key(scope: Scope) -> ServicePortKey {
        ServicePortKey {
            namespace: "default".into(),
            name: "web".into(),
            port: "".into(),
            protocol: Protocol::Tcp,
            family: Family::V4,
            scope,
        }
    }

    fn port(frontends: &[(&str, FrontendKind)]) -> ServicePort {
        ServicePort {
            frontends: frontends
                .iter()
                .map(|(address, kind)| service_port::Frontend {
                    address: address.parse().unwrap(),
                    kind: *kind,
                })
                .collect(),
            backends: Vec::new(),
            affinity: None,
            when_empty: WhenEmpty::Drop,
            source_ranges: None,
        }
    }

    /// S2 S7 S10
    #[test]
    fn outside_addresses_of_a_local_service_serve_sockets_by_the_whole_cluster() {
        let port = port(&[
            ("192.0.2.1:30080", FrontendKind::NodePort),
            ("127.0.0.1:30080", FrontendKind::NodePort),
        ]);
        let all = frontends(&key(Scope::Local), &port, 7, Some(3), &[]);
        let values: Vec<_> = all
            .values()
            .map(|f| (f.service, f.socket_service, f.flags))
            .collect();
        assert_eq!(
            values,
            [
                (7, 3, frontend_flag::HOST_NETNS_ONLY),
                (7, 3, frontend_flag::EXTERNAL | frontend_flag::DROP_WHEN_EMPTY),
            ]
        );
    }

    /// S3 S4 S10
    #[test]
    fn the_host_is_not_trusted_to_refuse_for_an_address_that_may_not_be_its_own() {
        let port = port(&[
            ("203.0.113.1:80", FrontendKind::LoadBalancer),
            ("203.0.113.2:80", FrontendKind::ExternalIp),
        ]);
        let all = frontends(&key(Scope::Cluster), &port, 7, None, &[]);
        let expected = frontend_flag::EXTERNAL | frontend_flag::FOREIGN | frontend_flag::DROP_WHEN_EMPTY;
        assert!(all.values().all(|frontend| frontend.flags == expected));
    }

    /// S7
    #[test]
    fn an_internal_local_service_stays_local() {
        let port = port(&[("10.96.0.1:80", FrontendKind::ClusterIp)]);
        let all = frontends(&key(Scope::Local), &port, 7, Some(3), &[]);
        assert_eq!(
            all.values().next().unwrap(),
            &Frontend {
                service: 7,
                socket_service: 7,
                flags: frontend_flag::CLUSTER_IP | frontend_flag::DROP_WHEN_EMPTY
            }
        );
    }
}
