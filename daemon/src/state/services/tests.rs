//! Which Service has what several claim, change by change.

use super::*;
use crate::state::scenarios::{fold, view};

/// A cluster and its sets, kept up to date change by change.
#[derive(Default)]
struct Folded {
    cluster: Cluster,
    services: Services,
}

impl Folded {
    fn apply(&mut self, text: &str) -> Changed {
        let touched = fold(&mut self.cluster, text);
        self.update(&touched.services)
    }

    fn remove(&mut self, name: &str) -> Changed {
        let kind = crate::state::objects::Kind::Service;
        let touched = self.cluster.remove(kind, &ObjectName::new("default", name));
        self.update(&touched.services)
    }

    /// Updates what changed, and proves that folding all anew comes to the same.
    fn update(&mut self, names: &BTreeSet<ObjectName>) -> Changed {
        let changed = self.services.update(&self.cluster, &view(), names);
        let mut anew = Services::default();
        anew.refold(&self.cluster, &view());
        assert_eq!(self.services.sets, anew.sets);
        assert_eq!(self.services.misfits, anew.misfits);
        assert_eq!(self.services.orphans, anew.orphans);
        assert_eq!(
            self.services.problems(&self.cluster, &view()),
            anew.problems(&self.cluster, &view())
        );
        assert_eq!(self.services.health_checks(&view()), anew.health_checks(&view()));
        changed
    }

    fn problems(&self) -> Vec<String> {
        let problems = self.services.problems(&self.cluster, &view());
        self.services.orphans().chain(problems).collect()
    }

    /// Who has `address` under TCP.
    fn holder(&self, address: &str) -> Option<&str> {
        let address: SocketAddr = address.parse().unwrap();
        let has = |set: &ServicePort| set.frontends.iter().any(|f| f.address == address);
        let mut holders = self.services.sets.iter().filter(|(_, set)| has(set));
        let holder = holders.next().map(|(key, _)| key.name.as_str());
        assert_eq!(holders.next(), None, "{address} is in one set");
        holder
    }
}

fn service(name: &str, created: &str, spec: &str) -> String {
    let created = match created {
        "" => String::new(),
        day => format!(", creationTimestamp: '2024-05-{day}T12:00:00Z'"),
    };
    format!("apiVersion: v1\nkind: Service\nmetadata: {{name: {name}{created}}}\nspec: {spec}\n---\n")
}

fn node_port(name: &str, created: &str) -> String {
    let spec = "{type: NodePort, clusterIPs: [10.96.0.NAME], ports: [{port: 80, nodePort: 30080}]}";
    service(name, created, &spec.replace("NAME", &name.len().to_string()))
}

const NODE_PORT: &str = "172.30.0.11:30080";

/// S19
#[test]
fn of_two_services_with_one_node_port_the_older_has_it_and_the_other_is_told() {
    let mut folded = Folded::default();
    folded.apply(&node_port("young", "20"));
    assert_eq!(folded.holder(NODE_PORT), Some("young"));
    let changed = folded.apply(&node_port("oldest", "10"));
    assert_eq!(folded.holder(NODE_PORT), Some("oldest"));
    let touched: BTreeSet<_> = changed.keys.iter().map(|key| key.name.as_str()).collect();
    assert_eq!(
        touched,
        BTreeSet::from(["oldest", "young"]),
        "the loser's set too"
    );
    assert_eq!(
        folded.holder("10.96.0.5:80"),
        Some("young"),
        "its own address serves"
    );
    assert_eq!(
        folded.problems(),
        [
            "Service default/young: nodePort 30080/TCP is not served: it belongs to Service default/oldest, which is older; \
              give one of them another"
        ]
    );
    // Undated ones are younger than all, and among themselves the first by name.
    folded.apply(&node_port("b", ""));
    folded.apply(&node_port("aaa", ""));
    folded.remove("oldest");
    assert_eq!(folded.holder(NODE_PORT), Some("young"));
    folded.remove("young");
    assert_eq!(folded.holder(NODE_PORT), Some("aaa"));
    assert!(
        folded.problems()[0].contains("default/aaa, which is first by name"),
        "{:?}",
        folded.problems()
    );
    // Made anew under its old name it is another Service.
    folded.apply(&node_port("b", "01"));
    assert_eq!(folded.holder(NODE_PORT), Some("b"));
    folded.apply(&node_port("b", ""));
    assert_eq!(folded.holder(NODE_PORT), Some("aaa"));
    folded.remove("aaa");
    folded.remove("b");
    assert!(folded.services.sets.is_empty() && folded.services.lost.is_empty());
}

/// S4 S18 S19
#[test]
fn an_address_given_up_is_the_next_ones_and_nobody_else_is_touched() {
    let mut folded = Folded::default();
    let external = |name: &str, created: &str, address: &str| {
        let spec = format!("{{externalIPs: [{address}], ports: [{{port: 80}}]}}");
        service(name, created, &spec)
    };
    folded.apply(&external("a", "10", "192.0.2.1"));
    folded.apply(&external("b", "11", "192.0.2.1"));
    folded.apply(&external("c", "12", "192.0.2.2"));
    assert_eq!(folded.holder("192.0.2.1:80"), Some("a"));
    let changed = folded.apply(&external("a", "10", "192.0.2.3"));
    assert_eq!(folded.holder("192.0.2.1:80"), Some("b"));
    let touched: BTreeSet<_> = changed.keys.iter().map(|key| key.name.as_str()).collect();
    assert_eq!(touched, BTreeSet::from(["a", "b"]));
    assert!(folded.problems().is_empty());
}

/// S8 S19
#[test]
fn a_health_check_and_a_node_port_of_one_number_are_held_against_each_other() {
    let balancer = |name: &str, created: &str| {
        let spec = "{type: LoadBalancer, externalTrafficPolicy: Local, healthCheckNodePort: 30080, ports: [{port: 81}]}";
        service(name, created, spec)
    };
    let mut folded = Folded::default();
    folded.apply(&balancer("lb", "10"));
    folded.apply(&balancer("lb2", "11"));
    folded.apply(&node_port("web", "12"));
    let checked = |folded: &Folded| -> BTreeSet<String> {
        let checks = folded.services.health_checks(&view());
        checks
            .values()
            .map(|check| check.service.name.to_string())
            .collect()
    };
    assert_eq!(folded.holder(NODE_PORT), None);
    assert_eq!(checked(&folded), BTreeSet::from(["lb".to_owned()]));
    assert_eq!(folded.problems().len(), 2, "{:?}", folded.problems());
    folded.remove("lb");
    folded.remove("lb2");
    assert_eq!(folded.holder(NODE_PORT), Some("web"));
    folded.apply(&balancer("lb", "13"));
    assert_eq!(folded.holder(NODE_PORT), Some("web"));
    assert!(checked(&folded).is_empty());
    let [problem] = folded.problems().try_into().unwrap();
    assert!(
        problem.contains("default/lb: spec.healthCheckNodePort 30080 is not served"),
        "{problem}"
    );
}

/// S19 D5
#[test]
fn one_services_two_ports_with_one_node_port_are_told_apart() {
    let mut folded = Folded::default();
    folded.apply(&service(
            "web",
            "10",
            "{type: NodePort, ports: [{name: b, port: 80, nodePort: 30080}, {name: a, port: 81, nodePort: 30080}]}",
        ));
    assert_eq!(folded.holder(NODE_PORT), Some("web"));
    let [problem] = folded.problems().try_into().unwrap();
    assert!(
        problem.contains("nodePort 30080/TCP is written twice"),
        "{problem}"
    );
}

/// D5
#[test]
fn what_can_be_nowhere_and_slices_without_a_service_are_told() {
    let mut folded = Folded::default();
    folded.apply(&service(
        "web",
        "",
        "{clusterIPs: [172.30.0.11], externalIPs: [172.30.0.11], ports: [{port: 80}]}",
    ));
    folded.apply(&service(
        "pods",
        "",
        "{clusterIPs: [10.244.7.7], ports: [{port: 80}]}",
    ));
    folded.apply(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
             metadata: {name: lost-1, labels: {kubernetes.io/service-name: lost}}\nendpoints: []\nports: []\n",
        );
    assert_eq!(
        folded.holder("172.30.0.11:80"),
        Some("web"),
        "external addresses may be a node's"
    );
    assert_eq!(folded.holder("10.244.7.7:80"), None);
    assert_eq!(
        folded.problems(),
        [
            "EndpointSlice default/lost-1: metadata.labels[kubernetes.io/service-name]: there is no Service default/lost",
            "Service default/pods: spec.clusterIPs: 10.244.7.7 is not served: it lies in the pods' network 10.244.0.0/16",
            "Service default/web: spec.clusterIPs: 172.30.0.11 is not served: it is node node1's own address",
        ]
    );
    folded.apply(&service("lost", "", "{ports: [{port: 80}]}"));
    folded.remove("web");
    folded.remove("pods");
    assert!(folded.problems().is_empty());
}
