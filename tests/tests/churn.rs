//! Many Services, of which many change all the time, and daemons that are killed at it.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::signal::Signal;
use sluice_lab::load::Size;
use sluice_lab::pods::Pod;
use sluice_lab::{Datastore, Families, Lab, Options, api, wait_until};
use sluice_tests::PATIENCE;
use sluice_tests::asking::{Asker, Asking, Kept};
use sluice_tests::datastore::known;

const SIZE: Size = Size {
    services: 10_000,
    endpoints: 2,
};

/// Of endpoints of those; a hundred a second.
const CHANGES: u32 = 2_000;
const PAUSE: u64 = 10;

/// One Service whose pods stay, and one whose endpoint, written by hand, is now this pod and now that.
const SERVICES: &str = "
apiVersion: v1
kind: Service
metadata: {name: steady}
spec:
  type: NodePort
  clusterIP: 10.96.200.1
  selector: {app: steady}
  ports: [{port: 80, targetPort: 8080, nodePort: 30080}]
---
apiVersion: v1
kind: Service
metadata: {name: moving}
spec:
  clusterIP: 10.96.200.2
  ports: [{port: 80, targetPort: 8080}]
";

fn lead_to(lab: &Lab, pod: &Pod) {
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\naddressType: IPv4\n\
         metadata:\n  name: moving\n  labels: {{kubernetes.io/service-name: moving}}\n\
         ports: [{{port: 8080}}]\nendpoints: [{{addresses: ['{}'], nodeName: {}}}]\n",
        pod.addresses[0], pod.node
    );
    lab.apply_text(&slice).unwrap();
}

/// S18: conversations with a Service that does not change go on and new ones to it succeed; as soon as a node has heard of an
/// endpoint in another's place, nobody there comes to the other any more.
#[test]
fn what_does_not_change_is_not_disturbed_and_what_went_is_not_reached() {
    let lab = Lab::up(Options {
        nodes: 2,
        families: Families::V4,
        datastore: Datastore::Kubernetes,
        ..Options::default()
    })
    .unwrap();
    api::fill(lab.record(), SIZE).unwrap();
    let pod = |name: &str, node: &str, app: &str| {
        let serve = ["sluice-lab", "talk-serve", name, "8080"];
        lab.pod_add(node, name, &[("app", app)], &serve).unwrap()
    };
    pod("a", "node1", "steady");
    pod("b", "node2", "steady");
    let moving = [pod("m", "node1", "moving"), pod("n", "node2", "moving")];
    lab.pod_add("node1", "asker", &[], &[]).unwrap();
    lab.apply_text(SERVICES).unwrap();
    let (node1, node2) = (lab.node("node1"), lab.node("node2"));
    let from_pod = || (lab.pod("asker").unwrap(), node1.clone());
    let from_node = || (node2.clone(), node2.clone());
    let outside = || (lab.client(), lab.client());
    let node_port = format!("{}:30080", lab.host("node1").unwrap().addresses[0]);
    let asker = |(from, files), at: &str| Asker {
        from,
        files,
        at: at.to_owned(),
    };
    let askers = [
        asker(from_pod(), "10.96.200.1:80"),
        asker(from_node(), "10.96.200.1:80"),
        asker(outside(), &node_port),
    ];
    let serves = |line: &str| line.starts_with("a ") || line.starts_with("b ");
    for asker in &askers {
        wait_until("the Service that stays is served", PATIENCE, || {
            Ok(asker.ask(20)?.lines().all(serves))
        })
        .unwrap();
    }
    let of_moving = [
        asker(from_pod(), "10.96.200.2:80"),
        asker(from_node(), "10.96.200.2:80"),
    ];

    let load = Asking::start(&askers).unwrap();
    let kept = Kept::start(&askers).unwrap();
    std::thread::scope(|scope| {
        let changing = scope.spawn(|| api::change(lab.record(), SIZE, 0..CHANGES, PAUSE));
        let mut round = 0;
        // Until a daemon of each node was killed, at least.
        while !changing.is_finished() || round < 6 {
            let to = &moving[round % 2];
            lead_to(&lab, to);
            let is_it = |line: &str| line.starts_with(&format!("{} ", to.name));
            for asker in &of_moving {
                wait_until("the other endpoint is reached", PATIENCE, || {
                    Ok(is_it(&asker.ask(1)?))
                })
                .unwrap();
                let answers = asker.ask(20).unwrap();
                assert!(answers.lines().all(is_it), "after {}: {answers}", to.name);
            }
            if round % 3 == 2 {
                let node = ["node1", "node2"][round / 3 % 2];
                lab.kill_sluiced(node, Signal::SIGKILL).unwrap();
            }
            round += 1;
        }
        changing.join().unwrap().unwrap();
    });
    kept.go_on().unwrap();
    drop(kept);
    load.end(serves).unwrap();
    for node in ["node1", "node2"] {
        wait_until("all Services are in the kernel", PATIENCE, || {
            Ok(known(&lab, node)?.len() >= SIZE.services as usize)
        })
        .unwrap();
    }
}
