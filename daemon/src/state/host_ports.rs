//! From the host ports of this node's pods to the [`ServicePort`]s that serve them.
//!
//! A host port is a set with one endpoint, the pod. Where an address, port and protocol is a Service's too, the Service
//! has it: a NodePort is the same on every node, and must not mean something else on one of them.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use compact_str::CompactString;
use sluice_cni::host_ports::{self, Mapping, Record};
use sluice_ipam::Attachment;

use super::balance::NodeView;
use super::claims::{Claim, Claims};
use super::service_port::{
    Backend, Family, Frontend, FrontendKind, Place, Protocol, Scope, ServicePort, ServicePortKey, WhenEmpty,
};

/// The namespace in the keys of host ports. No Service's: Kubernetes has no capitals in names.
pub const NAMESPACE: &str = "hostPort";

type Sets = BTreeMap<ServicePortKey, ServicePort>;

/// What host ports come to.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct HostPortSets {
    /// The sets, one per host port and address family.
    pub sets: Sets,
    /// Which addresses are not served, and who has them.
    pub problems: Vec<String>,
}

/// The sets of all `records` on the node `view`, beside what Services claim.
pub fn host_port_sets(
    records: &BTreeMap<Attachment, Record>,
    view: &NodeView,
    services: &Claims,
) -> HostPortSets {
    let mut found = HostPortSets::default();
    let mut holders: BTreeMap<Claim, ServicePortKey> = BTreeMap::new();
    let all = records
        .iter()
        .flat_map(|(attachment, record)| all_of(attachment, record, view));
    for (key, mut set) in all {
        set.frontends.retain(|frontend| {
            let claim = Claim::new(frontend.address, key.protocol);
            let holder = match (services.holder(claim), holders.get(&claim)) {
                (Some(service), _) => format!("Service {service}"),
                (None, Some(other)) => other.to_string(),
                (None, None) => {
                    holders.insert(claim, key.clone());
                    return true;
                }
            };
            found.problems.push(format!(
                "{key}: {}/{} is not served: it belongs to {holder}",
                frontend.address, key.protocol
            ));
            false
        });
        if !set.frontends.is_empty() {
            found.sets.insert(key, set);
        }
    }
    found
}

/// Whether a change of these frontends can matter to host ports.
pub fn concerns(frontends: &[Frontend]) -> bool {
    frontends
        .iter()
        .any(|frontend| frontend.kind != FrontendKind::ClusterIp)
}

/// The first key a host port can have.
pub fn first_key() -> ServicePortKey {
    ServicePortKey {
        namespace: NAMESPACE.into(),
        name: CompactString::default(),
        port: CompactString::default(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        scope: Scope::Cluster,
    }
}

/// The sets of one pod.
fn all_of<'a>(
    attachment: &'a Attachment,
    record: &'a Record,
    view: &'a NodeView,
) -> impl Iterator<Item = (ServicePortKey, ServicePort)> + 'a {
    record.mappings.iter().flat_map(move |mapping| {
        record
            .addresses
            .iter()
            .filter(|address| mapping.serves(address.is_ipv4()))
            .map(move |address| set(attachment, mapping, *address, view))
    })
}

/// The set of one host port in the family of the pod's `address`.
fn set(
    attachment: &Attachment,
    mapping: &Mapping,
    address: IpAddr,
    view: &NodeView,
) -> (ServicePortKey, ServicePort) {
    let family = Family::of(address);
    let loopback = match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::LOCALHOST),
        Family::V6 => IpAddr::V6(Ipv6Addr::LOCALHOST),
    };
    let mut listens: Vec<IpAddr> = match mapping.address() {
        Some(address) => vec![address],
        None => view
            .node_port_addresses
            .iter()
            .copied()
            .filter(|address| Family::of(*address) == family)
            .chain([loopback])
            .collect(),
    };
    listens.sort_unstable();
    listens.dedup();
    let port = match mapping.address() {
        Some(address) => SocketAddr::new(address, mapping.host_port).to_string(),
        None => mapping.host_port.to_string(),
    };
    let key = ServicePortKey {
        namespace: NAMESPACE.into(),
        name: attachment.file_name().into(),
        port: port.into(),
        protocol: match mapping.protocol {
            host_ports::Protocol::Tcp => Protocol::Tcp,
            host_ports::Protocol::Udp => Protocol::Udp,
            host_ports::Protocol::Sctp => Protocol::Sctp,
        },
        family,
        scope: Scope::Cluster,
    };
    let frontend = |address| Frontend {
        address: SocketAddr::new(address, mapping.host_port),
        kind: FrontendKind::HostPort,
    };
    let backend = Backend {
        address: SocketAddr::new(address, mapping.container_port),
        place: Place::ThisNode,
    };
    let set = ServicePort {
        frontends: listens.into_iter().map(frontend).collect(),
        backends: vec![backend],
        affinity: None,
        when_empty: WhenEmpty::Refuse,
        source_ranges: None,
    };
    (key, set)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::state::claims::tests::claimant;

    fn records(list: &[(&str, serde_json::Value)]) -> BTreeMap<Attachment, Record> {
        let record = |(id, mappings): &(&str, serde_json::Value)| {
            let mappings = host_ports::mappings("portMappings", mappings).unwrap();
            let addresses = vec!["10.244.1.2".parse().unwrap(), "fd00:244:1::2".parse().unwrap()];
            (
                Attachment::new(id, "eth0").unwrap(),
                Record { addresses, mappings },
            )
        };
        list.iter().map(record).collect()
    }

    fn view() -> NodeView {
        let addresses: Vec<IpAddr> = ["172.30.0.11", "fd00:30::b"].map(|a| a.parse().unwrap()).into();
        NodeView {
            name: "node1".to_owned(),
            node_port_addresses: addresses.clone(),
            addresses,
            ..NodeView::default()
        }
    }

    fn port(host_ip: &str, protocol: &str) -> serde_json::Value {
        json!([{ "hostIP": host_ip, "hostPort": 8080, "containerPort": 80, "protocol": protocol }])
    }

    fn shown(found: &HostPortSets) -> Vec<String> {
        let line = |(key, set): (&ServicePortKey, &ServicePort)| {
            let frontends: Vec<_> = set.frontends.iter().map(|f| f.address.to_string()).collect();
            format!("{key} {} > {}", frontends.join(" "), set.backends[0].address)
        };
        found.sets.iter().map(line).collect()
    }

    /// S25
    #[test]
    fn a_host_port_listens_where_it_says_and_leads_to_its_pod() {
        let pods = records(&[
            ("a", port("", "tcp")),
            ("b", port("0.0.0.0", "udp")),
            ("c", port("fd00:30::b", "udp")),
            ("d", port("127.0.0.1", "sctp")),
        ]);
        let found = host_port_sets(&pods, &view(), &Claims::default());
        assert_eq!(
            shown(&found),
            [
                "hostPort/a@eth0:8080/TCP 127.0.0.1:8080 172.30.0.11:8080 > 10.244.1.2:80",
                "hostPort/a@eth0:8080/TCP [::1]:8080 [fd00:30::b]:8080 > [fd00:244:1::2]:80",
                "hostPort/b@eth0:8080/UDP 127.0.0.1:8080 172.30.0.11:8080 > 10.244.1.2:80",
                "hostPort/c@eth0:[fd00:30::b]:8080/UDP [fd00:30::b]:8080 > [fd00:244:1::2]:80",
                "hostPort/d@eth0:127.0.0.1:8080/SCTP 127.0.0.1:8080 > 10.244.1.2:80",
            ]
        );
        assert!(found.problems.is_empty());
        assert!(found.sets.keys().all(|key| *key >= first_key()));
    }

    /// S19 S25
    #[test]
    fn what_a_service_has_stays_its_own_and_is_reported() {
        let node_port = |address: &str, protocol| {
            let mut claims = Claims::default();
            let claim = Claim::new(address.parse().unwrap(), protocol);
            claims.make(claim, &claimant("default", "web"));
            claims
        };
        let pods = records(&[("a", port("172.30.0.11", "tcp")), ("b", port("127.0.0.1", "tcp"))]);
        let contested = host_port_sets(&pods, &view(), &node_port("172.30.0.11:8080", Protocol::Tcp));
        assert_eq!(
            shown(&contested),
            ["hostPort/b@eth0:127.0.0.1:8080/TCP 127.0.0.1:8080 > 10.244.1.2:80"]
        );
        assert_eq!(
            contested.problems,
            [
                "hostPort/a@eth0:172.30.0.11:8080/TCP: 172.30.0.11:8080/TCP is not served: it belongs to Service default/web"
            ]
        );
        for beside in [
            node_port("172.30.0.11:8080", Protocol::Udp),
            node_port("172.30.0.11:8081", Protocol::Tcp),
        ] {
            assert_eq!(shown(&host_port_sets(&pods, &view(), &beside)).len(), 2);
        }
    }

    /// S25
    #[test]
    fn of_two_pods_that_claim_one_address_the_first_has_it() {
        let pods = records(&[("a", port("", "tcp")), ("b", port("172.30.0.11", "tcp"))]);
        let found = host_port_sets(&pods, &view(), &Claims::default());
        assert_eq!(found.sets.len(), 2, "{found:?}");
        assert!(
            found.problems[0].contains("b@eth0") && found.problems[0].contains("belongs to hostPort/a@eth0")
        );
    }
}
