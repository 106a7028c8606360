//! What Kubernetes YAML comes to on a node, one behaviour a test.

use std::collections::BTreeMap;

use super::balance::{NodeView, service_ports};
use super::cluster::{Cluster, Touched};
use super::node_routes::node_routes;
use super::objects::{Kind, ObjectName};
use super::service_port::{Family, Scope, ServicePort, ServicePortKey, WhenEmpty};
use crate::config::Config;
use crate::datastore::wire::{self, Document};
use crate::yaml;

pub(super) fn fold(cluster: &mut Cluster, text: &str) -> Touched {
    let mut all = Touched::default();
    for document in yaml::documents(text) {
        let Document::Objects { objects, .. } = wire::parse(document.text).unwrap() else {
            panic!("not an object of ours: {}", document.text)
        };
        for object in objects {
            let touched = cluster.upsert(object);
            all.nodes |= touched.nodes;
            all.services.extend(touched.services);
        }
    }
    all
}

fn cluster(text: &str) -> Cluster {
    let mut cluster = Cluster::default();
    fold(&mut cluster, text);
    cluster
}

pub(super) fn view() -> NodeView {
    NodeView {
        name: "node1".to_owned(),
        zone: Some("east".to_owned()),
        addresses: vec!["172.30.0.11".parse().unwrap(), "fd00:30::b".parse().unwrap()],
        node_port_addresses: vec!["172.30.0.11".parse().unwrap(), "fd00:30::b".parse().unwrap()],
        pod_cidrs: vec![
            "10.244.1.0/24".parse().unwrap(),
            "fd00:244:1::/64".parse().unwrap(),
        ],
        cluster_cidrs: vec!["10.244.0.0/16".parse().unwrap(), "fd00:244::/48".parse().unwrap()],
    }
}

fn sets(cluster: &Cluster, name: &str) -> BTreeMap<ServicePortKey, ServicePort> {
    service_ports(cluster, &ObjectName::new("default", name), &view())
}

/// `port/protocol: frontends > backends`, one line a set.
fn shown(cluster: &Cluster, name: &str) -> String {
    let joined = |list: Vec<String>| list.join(" ");
    sets(cluster, name)
        .iter()
        .map(|(key, set)| {
            let scope = if key.scope == Scope::Local { " local" } else { "" };
            let frontends = joined(set.frontends.iter().map(|f| f.address.to_string()).collect());
            let backends = joined(set.backends.iter().map(|b| b.address.to_string()).collect());
            format!("{}/{}{scope}: {frontends} > {backends}\n", key.port, key.protocol)
        })
        .collect()
}

fn pod(name: &str, address: &str, more: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}, labels: {{app: kubia}}}}\n\
         spec: {{nodeName: node1, containers: [{{ports: [{more}]}}]}}\n\
         status: {{podIPs: [{address}], conditions: [{{type: Ready, status: 'True'}}]}}\n---\n"
    )
}

const KUBIA: &str = "
apiVersion: v1
kind: Service
metadata: {name: kubia}
spec:
  clusterIPs: [10.96.0.10, 'fd00:96::10']
  selector: {app: kubia}
  ports:
  - {name: http, port: 80, targetPort: http}
  - {name: dns, port: 53, targetPort: 5353, protocol: UDP}
  - {name: dns-tcp, port: 53, targetPort: 5353}
---
";

/// S1 S16
#[test]
fn a_name_may_mean_another_number_on_each_pod_and_families_do_not_mix() {
    let one = pod(
        "one",
        "{ip: 10.244.1.2}, {ip: 'fd00:244:1::2'}",
        "{name: http, containerPort: 8080}",
    );
    let two = pod("two", "{ip: 10.244.2.2}", "{name: http, containerPort: 9090}");
    let nameless = pod("three", "{ip: 10.244.3.2}", "{containerPort: 80}");
    let cluster = cluster(&[KUBIA, &one, &two, &nameless].concat());
    assert_eq!(
        shown(&cluster, "kubia"),
        "dns/UDP: 10.96.0.10:53 > 10.244.1.2:5353 10.244.2.2:5353 10.244.3.2:5353\n\
         dns/UDP: [fd00:96::10]:53 > [fd00:244:1::2]:5353\n\
         dns-tcp/TCP: 10.96.0.10:53 > 10.244.1.2:5353 10.244.2.2:5353 10.244.3.2:5353\n\
         dns-tcp/TCP: [fd00:96::10]:53 > [fd00:244:1::2]:5353\n\
         http/TCP: 10.96.0.10:80 > 10.244.1.2:8080 10.244.2.2:9090\n\
         http/TCP: [fd00:96::10]:80 > [fd00:244:1::2]:8080\n"
    );
}

/// S2 S7
#[test]
fn a_node_port_listens_on_the_nodes_addresses_and_local_means_this_node() {
    let service = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.20
  selector: {app: kubia}
  externalTrafficPolicy: Local
  ports: [{port: 80, targetPort: 8080, nodePort: 30123}]
---
";
    let here = pod("here", "{ip: 10.244.1.2}", "");
    let there = pod("there", "{ip: 10.244.2.2}", "").replace("node1", "node2");
    let cluster = cluster(&[service, &here, &there].concat());
    assert_eq!(
        shown(&cluster, "web"),
        "/TCP: 10.96.0.20:80 > 10.244.1.2:8080 10.244.2.2:8080\n\
         /TCP local: 127.0.0.1:30123 172.30.0.11:30123 > 10.244.1.2:8080\n\
         /TCP:  > \n\
         /TCP local: [::1]:30123 [fd00:30::b]:30123 > \n"
    );
}

/// S7 S10
#[test]
fn without_local_endpoints_local_traffic_is_dropped_where_others_exist_and_refused_where_none_does() {
    let service = "
apiVersion: v1
kind: Service
metadata: {name: web}
spec:
  type: NodePort
  clusterIP: 10.96.0.20
  selector: {app: kubia}
  internalTrafficPolicy: Local
  externalTrafficPolicy: Local
  ports: [{port: 80, targetPort: 8080, nodePort: 30123}]
---
";
    let there = pod("there", "{ip: 10.244.2.2}", "").replace("node1", "node2");
    let of_family = |cluster: &Cluster, scope| -> (usize, usize, WhenEmpty) {
        let sets = sets(cluster, "web");
        let (_, set) = sets
            .iter()
            .find(|(key, _)| key.scope == scope && key.family == Family::V4)
            .unwrap();
        (set.frontends.len(), set.backends.len(), set.when_empty)
    };
    let mut cluster = cluster(&[service, &there].concat());
    assert_eq!(of_family(&cluster, Scope::Local), (3, 0, WhenEmpty::Drop));
    // By these the node and its pods reach what stays local from outside.
    assert_eq!(of_family(&cluster, Scope::Cluster), (0, 1, WhenEmpty::Refuse));
    cluster.remove(Kind::Pod, &ObjectName::new("default", "there"));
    assert_eq!(of_family(&cluster, Scope::Local), (3, 0, WhenEmpty::Refuse));
}

fn slice(name: &str, endpoints: &str) -> String {
    format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
         metadata: {{name: {name}, labels: {{kubernetes.io/service-name: manual}}}}\naddressType: IPv4\n\
         ports: [{{port: 8080}}]\nendpoints: [{endpoints}]\n---\n"
    )
}

const MANUAL: &str = "
apiVersion: v1
kind: Service
metadata: {name: manual}
spec: {clusterIP: 10.96.0.30, ports: [{port: 80}]}
---
";

/// S14
#[test]
fn several_slices_are_one_set_without_duplicates() {
    let first = slice("first", "{addresses: [10.244.1.2]}, {addresses: [192.0.2.7]}");
    let second = slice("second", "{addresses: [10.244.1.2]}, {addresses: [10.244.2.9]}");
    let mut cluster = cluster(&[MANUAL, &first, &second].concat());
    assert_eq!(
        shown(&cluster, "manual"),
        "/TCP: 10.96.0.30:80 > 10.244.1.2:8080 10.244.2.9:8080 192.0.2.7:8080\n"
    );
    let touched = cluster.remove(Kind::EndpointSlice, &ObjectName::new("default", "second"));
    assert_eq!(touched.services.len(), 1);
    assert_eq!(
        shown(&cluster, "manual"),
        "/TCP: 10.96.0.30:80 > 10.244.1.2:8080 192.0.2.7:8080\n"
    );
}

/// S14
#[test]
fn endpoints_written_by_hand_stand_behind_a_service_without_selector() {
    let endpoints = "
apiVersion: v1
kind: Endpoints
metadata: {name: manual}
subsets:
- addresses: [{ip: 172.30.0.100}, {ip: 'fd00:30::64'}]
  ports: [{port: 8080}]
---
";
    let cluster = cluster(&[MANUAL, endpoints].concat());
    assert_eq!(
        shown(&cluster, "manual"),
        "/TCP: 10.96.0.30:80 > 172.30.0.100:8080\n"
    );
}

/// S9
#[test]
fn terminating_endpoints_serve_only_when_none_is_ready() {
    let leaving = "{addresses: [10.244.1.2], conditions: {ready: false, serving: true, terminating: true}}";
    let unready = "{addresses: [10.244.1.3], conditions: {ready: false}}";
    let ready = "{addresses: [10.244.1.4], conditions: {ready: true}}";
    let all = cluster(&[MANUAL, &slice("s", &[leaving, unready, ready].join(", "))].concat());
    assert_eq!(shown(&all, "manual"), "/TCP: 10.96.0.30:80 > 10.244.1.4:8080\n");
    let none_ready = cluster(&[MANUAL, &slice("s", &[leaving, unready].join(", "))].concat());
    assert_eq!(
        shown(&none_ready, "manual"),
        "/TCP: 10.96.0.30:80 > 10.244.1.2:8080\n"
    );
    let none = cluster(&[MANUAL, &slice("s", unready)].concat());
    assert_eq!(
        shown(&none, "manual"),
        "/TCP: 10.96.0.30:80 > \n",
        "an empty set refuses"
    );
}

/// S7 S9
#[test]
fn local_traffic_falls_back_on_a_terminating_endpoint_here_though_others_are_ready_elsewhere() {
    let leaving = "{addresses: [10.244.1.2], conditions: {ready: false, serving: true, terminating: true}}";
    let elsewhere = "{addresses: [10.244.2.2]}";
    let local = MANUAL.replace("spec: {", "spec: {internalTrafficPolicy: Local, ");
    let cluster = cluster(&[local, slice("s", &[leaving, elsewhere].join(", "))].concat());
    assert_eq!(
        shown(&cluster, "manual"),
        "/TCP local: 10.96.0.30:80 > 10.244.1.2:8080\n"
    );
}

/// S11
#[test]
fn hints_count_when_every_ready_endpoint_has_them_and_one_is_meant_for_here() {
    let hinted = |address: &str, hints: &str| format!("{{addresses: [{address}], hints: {{{hints}}}}}");
    let east = hinted("10.244.1.2", "forZones: [{name: east}]");
    let west = hinted("10.244.2.2", "forZones: [{name: west}]");
    let far_west = hinted("10.244.3.2", "forZones: [{name: west}]");
    let bare = "{addresses: [10.244.4.2]}".to_owned();
    let here = hinted(
        "10.244.1.7",
        "forZones: [{name: east}], forNodes: [{name: node1}]",
    );
    let there = hinted(
        "10.244.2.7",
        "forZones: [{name: east}], forNodes: [{name: node2}]",
    );
    for (endpoints, chosen, why) in [
        (vec![&east, &west], "10.244.1.2:8080", "its own zone"),
        (
            vec![&west, &far_west],
            "10.244.2.2:8080 10.244.3.2:8080",
            "none is meant for this zone: all",
        ),
        (
            vec![&east, &west, &bare],
            "10.244.1.2:8080 10.244.2.2:8080 10.244.4.2:8080",
            "one says nothing: all",
        ),
        (vec![&here, &there], "10.244.1.7:8080", "the node before the zone"),
        (
            vec![&there, &west],
            "10.244.2.7:8080",
            "no hint for this node: the zone",
        ),
    ] {
        let written: Vec<_> = endpoints.into_iter().map(String::as_str).collect();
        let cluster = cluster(&[MANUAL, &slice("s", &written.join(", "))].concat());
        assert_eq!(
            shown(&cluster, "manual"),
            format!("/TCP: 10.96.0.30:80 > {chosen}\n"),
            "{why}"
        );
    }
    let local = MANUAL.replace("spec: {", "spec: {internalTrafficPolicy: Local, ");
    let cluster = cluster(
        &[
            local,
            slice("s", &hinted("10.244.1.2", "forZones: [{name: west}]")),
        ]
        .concat(),
    );
    assert_eq!(
        shown(&cluster, "manual"),
        "/TCP local: 10.96.0.30:80 > 10.244.1.2:8080\n",
        "what must stay here follows no hint"
    );
}

/// S11
#[test]
fn without_an_endpoint_controller_the_zones_of_nodes_are_followed_as_they_change() {
    let in_zone = |name: &str, zone: &str| {
        let labelled = format!("name: {name}, labels: {{topology.kubernetes.io/zone: {zone}}}");
        node(name, "172.30.0.12", "").replace(&format!("name: {name}"), &labelled)
    };
    let close = MANUAL.replace(
        "spec: {",
        "spec: {trafficDistribution: PreferClose, selector: {app: kubia}, ",
    );
    let near = pod("near", "{ip: 10.244.1.2}", "");
    let far = pod("far", "{ip: 10.244.2.2}", "").replace("node1", "node2");
    let nodes = [in_zone("node1", "east"), in_zone("node2", "west")].concat();
    let mut cluster = cluster(&[&close, &near, &far, &nodes].map(String::as_str).concat());
    assert_eq!(shown(&cluster, "manual"), "/TCP: 10.96.0.30:80 > 10.244.1.2:80\n");

    let touched = fold(&mut cluster, &in_zone("node2", "east"));
    assert_eq!(touched.services.len(), 1, "{touched:?}");
    assert_eq!(
        shown(&cluster, "manual"),
        "/TCP: 10.96.0.30:80 > 10.244.1.2:80 10.244.2.2:80\n"
    );
    let touched = fold(&mut cluster, &in_zone("node2", "east"));
    assert_eq!(touched, Touched::default(), "nothing changed");

    fold(&mut cluster, &close.replace("PreferClose", "PreferSameNode"));
    assert_eq!(shown(&cluster, "manual"), "/TCP: 10.96.0.30:80 > 10.244.1.2:80\n");
}

/// S14 S15
#[test]
fn headless_external_and_other_proxies_services_have_no_entry() {
    for written in [
        "metadata: {name: x}\nspec: {clusterIP: None, ports: [{port: 80}]}",
        "metadata: {name: x}\nspec: {type: ExternalName, externalName: example.org}",
        "metadata: {name: x, labels: {service.kubernetes.io/service-proxy-name: other}}\n\
         spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}",
        "metadata: {name: x, labels: {service.kubernetes.io/headless: ''}}\n\
         spec: {clusterIP: 10.96.0.9, ports: [{port: 80}]}",
    ] {
        let cluster = cluster(&format!("apiVersion: v1\nkind: Service\n{written}\n"));
        assert!(sets(&cluster, "x").is_empty(), "{written}");
    }
}

/// S18
#[test]
fn a_pod_touches_the_services_that_select_it_before_or_after_and_no_other() {
    let other = KUBIA.replace("kubia", "other");
    let mut cluster = cluster(&[KUBIA, &other].concat());
    let touched = fold(&mut cluster, &pod("one", "{ip: 10.244.1.2}", ""));
    assert_eq!(
        touched
            .services
            .iter()
            .map(|n| n.name.as_str())
            .collect::<Vec<_>>(),
        ["kubia"]
    );
    let moved = pod("one", "{ip: 10.244.1.2}", "").replace("app: kubia", "app: other");
    let touched = fold(&mut cluster, &moved);
    assert_eq!(
        touched
            .services
            .iter()
            .map(|n| n.name.as_str())
            .collect::<Vec<_>>(),
        ["kubia", "other"]
    );
}

fn node(name: &str, address: &str, cidrs: &str) -> String {
    format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [{cidrs}]}}\n\
         status: {{addresses: [{{type: InternalIP, address: {address}}}]}}\n---\n"
    )
}

/// N4
#[test]
fn a_newcomer_cannot_take_a_pod_cidr_nor_claim_one_outside() {
    let cidrs = Config::default().cluster_cidrs;
    let mut cluster = cluster(&node("node2", "172.30.0.12", "10.244.2.0/24"));
    let (_, held) = node_routes(&cluster, "node1", &cidrs, &BTreeMap::new());
    // Its name comes first, and its claim is wider; still it came later.
    fold(
        &mut cluster,
        &node("a-node", "172.30.0.66", "10.244.2.0/23, 10.99.0.0/24"),
    );
    let (routes, held) = node_routes(&cluster, "node1", &cidrs, &held);
    let remote: Vec<_> = routes
        .remote
        .iter()
        .map(|(cidr, node)| (cidr.to_string(), &node.name))
        .collect();
    assert_eq!(remote, [("10.244.2.0/24".to_owned(), &"node2".to_owned())]);
    assert!(
        routes
            .refused
            .iter()
            .any(|r| r.contains("overlaps 10.244.2.0/24 of node node2")),
        "{routes:?}"
    );
    assert!(
        routes
            .refused
            .iter()
            .any(|r| r.contains("10.99.0.0/24, which is outside")),
        "{routes:?}"
    );
    // Gone, it no longer holds anything.
    cluster.remove(Kind::Node, &ObjectName::new("", "node2"));
    let (routes, _) = node_routes(&cluster, "node1", &cidrs, &held);
    assert_eq!(
        routes
            .remote
            .values()
            .map(|n| n.name.as_str())
            .collect::<Vec<_>>(),
        ["a-node"]
    );
}

/// N4 N12
#[test]
fn without_history_the_older_node_has_the_pod_cidr() {
    let cidrs = Config::default().cluster_cidrs;
    let created = |name: &str, second: u32| {
        let of_name = format!("name: {name}");
        let with_time = format!("{of_name}, creationTimestamp: '2026-11-26T12:00:0{second}Z'");
        node(name, "172.30.0.12", "10.244.2.0/24").replace(&of_name, &with_time)
    };
    let cluster = cluster(&(created("a-new", 1) + &created("b-old", 0) + &created("c-old", 0)));
    let (routes, _) = node_routes(&cluster, "node1", &cidrs, &BTreeMap::new());
    let holders: Vec<_> = routes
        .remote
        .values()
        .map(|holder| holder.name.as_str())
        .collect();
    assert_eq!(holders, ["b-old"]);
    let (routes, _) = node_routes(&cluster, "a-new", &cidrs, &BTreeMap::new());
    assert_eq!(routes.own, []);
}

/// N3
#[test]
fn two_nodes_swap_their_pod_cidrs() {
    let cidrs = Config::default().cluster_cidrs;
    let before = [
        node("a", "172.30.0.12", "10.244.2.0/24"),
        node("b", "172.30.0.13", "10.244.3.0/24"),
    ];
    let mut cluster = cluster(&before.concat());
    let (_, held) = node_routes(&cluster, "node1", &cidrs, &BTreeMap::new());
    fold(
        &mut cluster,
        &[
            node("a", "172.30.0.12", "10.244.3.0/24"),
            node("b", "172.30.0.13", "10.244.2.0/24"),
        ]
        .concat(),
    );
    let (routes, _) = node_routes(&cluster, "node1", &cidrs, &held);
    let holders: Vec<_> = routes.remote.values().map(|node| node.name.as_str()).collect();
    assert_eq!((holders, routes.refused), (vec!["b", "a"], vec![]));
}
