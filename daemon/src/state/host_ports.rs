//! From the host ports of this node's pods to the [`ServicePort`]s that serve them.
//!
//! A host port is a set with one endpoint, the pod. Where an address, port and protocol is a Service's too, the Service
//! has it: a NodePort is the same on every node, and must not mean something else on one of them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use sluice_cni::host_ports::{self, Mapping, Record};
use sluice_ipam::Attachment;

use super::balance::NodeView;
use super::service_port::{
    Backend, Family, Frontend, FrontendKind, Place, Protocol, Scope, ServicePort, ServicePortKey,
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

/// The sets of all `records` on the node `view`, beside those of the `services`; sets of host ports among the latter
/// are passed over.
pub fn host_port_sets(
    records: &BTreeMap<Attachment, Record>,
    view: &NodeView,
    services: &Sets,
) -> HostPortSets {
    let mut found = HostPortSets::default();
    if records.is_empty() {
        return found;
    }
    let all = records
        .iter()
        .flat_map(|(attachment, record)| all_of(attachment, record, view));
    let all: Vec<(ServicePortKey, ServicePort)> = all.collect();
    let mut holders = claimed(&all, services);
    for (key, mut set) in all {
        set.frontends.retain(|frontend| {
            let claim = (frontend.address, key.protocol);
            if let Some(holder) = holders.get(&claim) {
                let (address, protocol) = claim;
                found.problems.push(format!(
                    "{key}: {address}/{protocol} is not served: it belongs to {holder}"
                ));
                return false;
            }
            holders.insert(claim, key.clone());
            true
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
        namespace: NAMESPACE.to_owned(),
        name: String::new(),
        port: String::new(),
        protocol: Protocol::Tcp,
        family: Family::V4,
        scope: Scope::Cluster,
    }
}

/// Which Service has which of the addresses that these sets are to have.
fn claimed(
    sets: &[(ServicePortKey, ServicePort)],
    services: &Sets,
) -> BTreeMap<(SocketAddr, Protocol), ServicePortKey> {
    let wanted: BTreeSet<_> = sets
        .iter()
        .flat_map(|(key, set)| {
            set.frontends
                .iter()
                .map(|frontend| (frontend.address, key.protocol))
        })
        .collect();
    let mut holders = BTreeMap::new();
    for (key, set) in services.iter().filter(|(key, _)| key.namespace != NAMESPACE) {
        for frontend in &set.frontends {
            let claim = (frontend.address, key.protocol);
            if wanted.contains(&claim) {
                holders.entry(claim).or_insert_with(|| key.clone());
            }
        }
    }
    holders
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
        namespace: NAMESPACE.to_owned(),
        name: attachment.file_name(),
        port,
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
        source_ranges: None,
    };
    (key, set)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

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
        let found = host_port_sets(&pods, &view(), &BTreeMap::new());
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
            let key = ServicePortKey {
                namespace: "default".to_owned(),
                name: "web".to_owned(),
                protocol,
                ..first_key()
            };
            let frontend = Frontend {
                address: address.parse().unwrap(),
                kind: FrontendKind::NodePort,
            };
            let set = ServicePort {
                frontends: vec![frontend],
                backends: Vec::new(),
                affinity: None,
                source_ranges: None,
            };
            BTreeMap::from([(key, set)])
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
                "hostPort/a@eth0:172.30.0.11:8080/TCP: 172.30.0.11:8080/TCP is not served: it belongs to default/web/TCP"
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
        let found = host_port_sets(&pods, &view(), &BTreeMap::new());
        assert_eq!(found.sets.len(), 2, "{found:?}");
        assert!(
            found.problems[0].contains("b@eth0") && found.problems[0].contains("belongs to hostPort/a@eth0")
        );
    }
}
