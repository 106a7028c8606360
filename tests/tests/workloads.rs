//! What people run on a cluster, and what happens to clusters: one of real kubelets, and Sluice on it as a DaemonSet.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use sluice_lab::demo::cluster;
use sluice_lab::{Datastore, Lab, Node, Options, Running, wait_until};
use sluice_tests::{PATIENCE, manifest, reconfigure};

/// The Service `talk` by its ClusterIPs and on a node's port, as tests/manifests/workloads.yaml has it.
const TALK: [&str; 2] = ["10.96.7.7:8080", "[fd00:96::7:7]:8080"];
const TALK_NODE_PORT: u16 = 30077;

/// Something that a kubelet or a controller has to do first.
const PATIENCE_WITH_KUBELETS: Duration = Duration::from_secs(120);

/// How long CoreDNS keeps an answer (`ttl` and `cache` in tests/manifests/coredns.yaml), also one that was asked for before it had heard of
/// the last pod.
const CACHED: Duration = Duration::from_secs(30);

/// As many pods as a kubelet takes by default.
const FULL: usize = 110;

/// K1 K3 N1 N3 I4 S1 S2 S5 S6 S7 S9 S14 S16: names, both families, agents, Jobs; conversations that live through the replacement of what
/// serves them, datagrams and new connections through the replacement of what answers them; nodes that are drained, deleted, full, dead.
#[test]
fn what_people_run_runs_and_goes_on_running() {
    let mut lab = Lab::up(Options {
        nodes: 2,
        datastore: Datastore::Kubernetes,
        kubelets: true,
        ..Options::default()
    })
    .unwrap();
    lab.apply(manifest("workloads.yaml")).unwrap();
    rolled_out(&lab, "-n kube-system deployment/coredns").unwrap();
    for workload in ["statefulset/db", "deployment/talk", "daemonset/agent"] {
        rolled_out(&lab, workload).unwrap();
    }
    names(&lab).unwrap();
    both_families(&lab).unwrap();
    affinity_and_agents(&lab).unwrap();
    jobs(&lab).unwrap();
    conversations_outlive_what_serves_them(&lab).unwrap();
    replaced_and_drained_under_load(&lab).unwrap();
    a_deleted_node_comes_back_with_another_pod_cidr(&lab).unwrap();
    a_full_node(&lab).unwrap();
    a_dead_node(&mut lab).unwrap();
}

fn rolled_out(lab: &Lab, workload: &str) -> Result<()> {
    lab.kubectl(&format!("rollout status --timeout=120s {workload}"))
        .map(drop)
}

/// A command in a pod, its words with one space between them.
fn in_pod(lab: &Lab, pod: &str, command: &str) -> Result<String> {
    lab.kubectl(&format!("exec {pod} -- {command}"))
}

/// The words of a field of all objects that `what` selects.
fn field(lab: &Lab, what: &str, path: &str) -> Result<BTreeSet<String>> {
    let said = lab.kubectl(&format!("get {what} -o jsonpath={{.items[*]{path}}}"))?;
    Ok(said.split_whitespace().map(str::to_owned).collect())
}

fn pods(lab: &Lab, app: &str) -> Result<BTreeSet<String>> {
    field(lab, &format!("pods -l app={app}"), ".metadata.name")
}

/// Through CoreDNS: a headless Service is its pods, one by one, and a ClusterIP is itself; from a pod and from one in the host's network.
fn names(lab: &Lab) -> Result<()> {
    let resolve = |name: &str| -> Result<BTreeSet<String>> {
        let said = in_pod(lab, "db-0", &format!("busybox nslookup {name}"))?;
        let answer = said
            .split_once("\n\n")
            .map(|(_, answer)| answer)
            .unwrap_or_default();
        let addresses = answer
            .lines()
            .filter_map(|line| line.strip_prefix("Address: "))
            .map(str::to_owned);
        Ok(addresses.collect())
    };
    let own = field(lab, "pods -l app=db", ".status.podIPs[*].ip")?;
    ensure!(own.len() == 4, "two pods have the addresses {own:?}");
    wait_until("its slices have its pods", PATIENCE_WITH_KUBELETS, || {
        let slices = "endpointslices -l kubernetes.io/service-name=db";
        Ok(field(lab, slices, ".endpoints[*].addresses[*]")? == own)
    })?;
    wait_until("the headless name is its pods", PATIENCE + CACHED, || {
        let found = resolve("db.default.svc.cluster.local")?;
        ensure!(found == own, "{found:?}, not {own:?}");
        Ok(true)
    })?;
    let api = resolve("kubernetes.default.svc.cluster.local")?;
    ensure!(api == BTreeSet::from(["10.96.0.1".to_owned()]), "{api:?}");
    let agent = pods(lab, "agent")?.pop_first().context("there is no agent")?;
    for from in ["db-0", "db-1", &agent] {
        for name in ["db-0.db", "db-1.db.default.svc.cluster.local"] {
            let said = in_pod(lab, from, &format!("busybox wget -q -O - http://{name}:8080"))?;
            ensure!(
                name.starts_with(said.trim()),
                "{from} asked {name}, {said} answered"
            );
        }
    }
    Ok(())
}

/// What `talk-ask` prints of `times` requests: a name and the client's address for each.
fn asked(said: &str, times: usize) -> Result<BTreeSet<(String, IpAddr)>> {
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines.len() == times, "{times} were asked: {said}");
    let parse = |line: &&str| -> Result<(String, IpAddr)> {
        let (name, client) = line
            .split_once(' ')
            .with_context(|| format!("an answer is {line:?}"))?;
        Ok((name.to_owned(), client.parse()?))
    };
    lines.iter().map(parse).collect()
}

/// That all of `wanted` answer, and nobody else, whichever way they are asked; and see a client of the family that was asked.
fn all_answer(lab: &Lab, wanted: &BTreeSet<String>, pod: &str) -> Result<()> {
    let times = 30 * wanted.len();
    for protocol in ["TCP", "UDP"] {
        let check = |at: &str, place: &str, ask: &dyn Fn(&str) -> Result<String>| {
            wait_until(&format!("{at} answers {place} over {protocol}"), PATIENCE, || {
                let answers = asked(
                    &ask(&format!("sluice-lab talk-ask {protocol} {at} {times} 1"))?,
                    times,
                )?;
                let found: BTreeSet<String> = answers.iter().map(|(name, _)| name.clone()).collect();
                ensure!(found == *wanted, "{found:?} answered, of {wanted:?}");
                let of_family = |client: &IpAddr| client.is_ipv6() == at.starts_with('[');
                ensure!(answers.iter().all(|(_, client)| of_family(client)), "{answers:?}");
                Ok(true)
            })
        };
        let on = |place: Node<'_>, command: &str| place.run(&command.split(' ').collect::<Vec<_>>());
        for at in TALK {
            check(at, "a pod", &|command| in_pod(lab, pod, command))?;
            for node in lab.nodes() {
                check(at, &node, &|command| on(lab.node(&node), command))?;
            }
        }
        for node in lab.nodes() {
            for address in &lab.host(&node)?.addresses {
                let at = std::net::SocketAddr::new(*address, TALK_NODE_PORT).to_string();
                check(&at, "outside", &|command| on(lab.client(), command))?;
            }
        }
    }
    Ok(())
}

fn both_families(lab: &Lab) -> Result<()> {
    let talk = pods(lab, "talk")?;
    let first = talk.first().context("there is none")?;
    all_answer(lab, &talk, first)
}

/// A client stays with one pod; and each node's pods talk to their own node's agent, which is in the host's network.
fn affinity_and_agents(lab: &Lab) -> Result<()> {
    for pod in pods(lab, "talk")? {
        let said = in_pod(lab, &pod, "sluice-lab talk-ask TCP 10.96.7.8:8080 20 1")?;
        let answers = asked(&said, 20)?;
        ensure!(answers.len() == 1, "{answers:?}");
        let node = lab.kubectl(&format!("get pod {pod} -o jsonpath={{.spec.nodeName}}"))?;
        let answers = asked(
            &in_pod(lab, &pod, "sluice-lab talk-ask TCP 10.96.7.9:80 20 1")?,
            20,
        )?;
        ensure!(
            answers.iter().all(|(name, _)| *name == node),
            "{pod} on {node}: {answers:?}"
        );
    }
    for agent in pods(lab, "agent")? {
        let said = in_pod(lab, &agent, &format!("sluice-lab talk-ask UDP {} 80 1", TALK[1]))?;
        let answers = asked(&said, 80)?;
        let found: BTreeSet<String> = answers.into_iter().map(|(name, _)| name).collect();
        ensure!(found == pods(lab, "talk")?, "{found:?}");
    }
    Ok(())
}

/// Pods whose first packet is a question for DNS and the next a request to the Service.
fn jobs(lab: &Lab) -> Result<()> {
    lab.apply(manifest("workloads-job.yaml"))?;
    lab.kubectl("wait --for=condition=complete --timeout=60s job/fetch")?;
    Ok(())
}

/// Pods on node1 that run a command of the lab's image and print.
fn run_pods(lab: &Lab, commands: &[(String, String)]) -> Result<()> {
    for (name, command) in commands {
        let pod = format!(
            "apiVersion: v1\nkind: Pod\nmetadata: {{name: {name}}}\nspec:\n  nodeName: node1\n  restartPolicy: Never\n  \
             terminationGracePeriodSeconds: 0\n  containers:\n  - name: c\n    image: localhost/talk:lab\n    \
             command: [/bin/busybox, sh, -c, {command:?}]\n"
        );
        lab.apply_text(&pod)?;
    }
    Ok(())
}

/// Things that print a line for every answer: pods, and processes of hosts that print into a file.
struct Printing<'lab> {
    lab: &'lab Lab,
    pods: Vec<String>,
    hosts: Vec<(Node<'lab>, String, Running)>,
}

impl<'lab> Printing<'lab> {
    /// Starts `command` once for each address and protocol, `PROTOCOL` and `AT` in it replaced: in pods of node1 and on node1 at the
    /// ClusterIPs, and outside at the nodes' ports.
    fn start(lab: &'lab Lab, name: &str, command: &str) -> Result<Self> {
        let (mut wanted, mut hosts) = (Vec::new(), Vec::new());
        for (number, protocol) in ["TCP", "UDP"].into_iter().enumerate() {
            let of = |at: &str| command.replace("PROTOCOL", protocol).replace("AT", at);
            let mut on_host = |place: Node<'lab>, at: &str| -> Result<()> {
                let file = format!("/run/{name}-{number}-{}", hosts.len());
                let script = format!("exec > {file}; {}", of(at));
                let running = place.spawn(&["busybox", "sh", "-c", &script])?;
                hosts.push((place, file, running));
                Ok(())
            };
            for (family, at) in TALK.into_iter().enumerate() {
                wanted.push((format!("{name}-{number}-{family}"), of(at)));
                on_host(lab.node("node1"), at)?;
            }
            for address in &lab.host("node1")?.addresses {
                on_host(
                    lab.client(),
                    &std::net::SocketAddr::new(*address, TALK_NODE_PORT).to_string(),
                )?;
            }
        }
        run_pods(lab, &wanted)?;
        let pods = wanted.into_iter().map(|(pod, _)| pod).collect();
        Ok(Self { lab, pods, hosts })
    }

    /// What each has printed.
    fn said(&self) -> Result<Vec<(String, String)>> {
        let mut all = Vec::new();
        for pod in &self.pods {
            all.push((pod.clone(), self.lab.kubectl(&format!("logs {pod}"))?));
        }
        for (place, file, _) in &self.hosts {
            all.push((file.clone(), place.run(&["cat", file])?));
        }
        Ok(all)
    }

    /// The lines around the first that is like `line`, with the times of a pod's.
    fn around(&self, who: &str, line: &str) -> Result<String> {
        let said = if self.pods.iter().any(|pod| pod == who) {
            self.lab.kubectl(&format!("logs --timestamps {who}"))?
        } else {
            let of_host = self.hosts.iter().find(|(_, file, _)| file == who);
            of_host.map_or(Ok(String::new()), |(place, file, _)| place.run(&["cat", file]))?
        };
        let lines: Vec<&str> = said.lines().collect();
        let at = lines.iter().position(|found| found.ends_with(line)).unwrap_or(0);
        Ok(lines[at.saturating_sub(2)..lines.len().min(at + 3)].join("\n"))
    }

    /// Waits until each has printed more, and fails if one has printed what is no answer.
    fn goes_on(&self) -> Result<()> {
        let lines = |said: &str| said.lines().count();
        let mut before = Vec::new();
        // A pod that is only being started has no log.
        wait_until("all are at it", PATIENCE_WITH_KUBELETS, || {
            before = self.said()?;
            Ok(before.iter().all(|(_, said)| lines(said) > 0))
        })?;
        wait_until("all go on", PATIENCE, || {
            let now = self.said()?;
            for ((who, before), (_, now)) in before.iter().zip(&now) {
                // The last line may be cut off.
                let whole = now.rsplit_once('\n').map_or("", |(whole, _)| whole);
                let wrong: Vec<&str> = whole.lines().filter(|line| !line.contains(' ')).collect();
                if let Some(first) = wrong.first() {
                    let around = self.around(who, first)?;
                    bail!(
                        "{who}: {} of {} are like {first:?}:\n{around}",
                        wrong.len(),
                        lines(now)
                    );
                }
                ensure!(
                    lines(now) > lines(before) + 3,
                    "{who} has had {} answers",
                    lines(now)
                );
            }
            Ok(true)
        })
    }

    /// Ends all of them.
    fn end(self) -> Result<()> {
        let pods = self.pods.join(" ");
        self.lab
            .kubectl(&format!("delete pod {pods} --wait=false"))
            .map(drop)
    }
}

/// What keeps a connection for hours, as gRPC's clients do, and what has one UDP socket: neither notices that Sluice
/// or the runtime is replaced, or that Services are translated by another dataplane; and neither do new connections and questions.
fn conversations_outlive_what_serves_them(lab: &Lab) -> Result<()> {
    let kept = Printing::start(lab, "keep", "exec sluice-lab talk-keep PROTOCOL AT")?;
    kept.goes_on()?;
    cluster::roll_sluice(lab)?;
    kept.goes_on()?;
    lab.restart_containerd("node1")?;
    kept.goes_on()?;
    let asking = Printing::start(lab, "asked", ASK)?;
    for (old, new) in [("auto", "nftables"), ("nftables", "auto")] {
        reconfigure(lab, &format!("mode: {old}"), &format!("mode: {new}"))?;
        kept.goes_on().with_context(|| format!("conversations, {new}"))?;
        asking
            .goes_on()
            .with_context(|| format!("new connections and questions, {new}"))?;
    }
    asking.end()?;
    kept.end()
}

/// A connection or a question after the other, each with a socket of its own; no datagram is sent again.
const ASK: &str = "while sluice-lab talk-ask --patience 4 PROTOCOL AT 5 1; do busybox usleep 20000; done";

/// New connections and questions over UDP, each with a socket of its own, all the while: each is answered, and of the questions each datagram.
fn replaced_and_drained_under_load(lab: &Lab) -> Result<()> {
    let asking = Printing::start(lab, "ask", ASK)?;
    asking.goes_on().context("before anything happens")?;
    // It takes its pods for unready until it has probed them, so clients move to others' pods.
    lab.restart_kubelet("node1")?;
    asking.goes_on().context("the kubelet was restarted")?;
    lab.kubectl("set env deployment talk VERSION=2")?;
    rolled_out(lab, "deployment/talk")?;
    asking.goes_on().context("a second version was rolled out")?;
    lab.kubectl("drain node2 --ignore-daemonsets --delete-emptydir-data --timeout=120s")?;
    asking.goes_on().context("node2 was drained")?;
    let nodes = field(lab, "pods -l app=talk", ".spec.nodeName")?;
    ensure!(nodes == BTreeSet::from(["node1".to_owned()]), "{nodes:?}");
    lab.kubectl("uncordon node2")?;
    lab.kubectl("rollout restart deployment talk")?;
    rolled_out(lab, "deployment/talk")?;
    asking.goes_on()?;
    asking.end()
}

/// A Node that is drained, deleted while its kubelet runs, and registers anew: the controller gives it what is free, and everybody follows.
fn a_deleted_node_comes_back_with_another_pod_cidr(lab: &Lab) -> Result<()> {
    let before = lab.kubectl("get node node2 -o jsonpath={.spec.podCIDR}")?;
    lab.kubectl("drain node2 --ignore-daemonsets --delete-emptydir-data --force --timeout=120s")?;
    lab.kubectl("delete node node2")?;
    wait_until("node1 has forgotten it", PATIENCE, || {
        let routes = lab.node("node1").run(&["ip", "route", "show", &before])?;
        ensure!(routes.is_empty(), "{routes}");
        Ok(true)
    })?;
    // So that it is not given the same again.
    let placeholder = format!(
        "apiVersion: v1\nkind: Node\nmetadata: {{name: other}}\nspec: {{podCIDR: {before}, podCIDRs: [{before}]}}\n"
    );
    lab.apply_text(&placeholder)?;
    lab.restart_kubelet("node2")?;
    wait_until("it is Ready again", PATIENCE_WITH_KUBELETS, || {
        let ready = "jsonpath={.status.conditions[?(@.type=='Ready')].status}";
        Ok(lab.kubectl_words(&["get", "node", "node2", "-o", ready])? == "True")
    })?;
    let after = lab.kubectl("get node node2 -o jsonpath={.spec.podCIDR}")?;
    ensure!(after != before, "it is {after} again");
    lab.kubectl("delete node other")?;
    rolled_out(lab, "deployment/talk")?;
    rolled_out(lab, "daemonset/agent")?;
    lab.kubectl("rollout restart deployment talk")?;
    rolled_out(lab, "deployment/talk")?;
    let network: ipnetwork::Ipv4Network = after.parse()?;
    wait_until("node2's pods are in it", PATIENCE, || {
        let on_node2 = "pods -l app=talk --field-selector=spec.nodeName=node2";
        let addresses = field(lab, on_node2, ".status.podIP")?;
        let inside = |address: &String| address.parse().is_ok_and(|address| network.contains(address));
        ensure!(
            !addresses.is_empty() && addresses.iter().all(inside),
            "{addresses:?} in {after}"
        );
        Ok(pods(lab, "talk")?.len() == 4)
    })?;
    let talk = pods(lab, "talk")?;
    let first = talk.first().context("there is none")?;
    all_answer(lab, &talk, first)
}

/// How many attachments a node's address store holds.
fn held(lab: &Lab, node: &str) -> Result<usize> {
    let held = lab.ctl_json(node, &["ipam"])?;
    Ok(held.as_array().map_or(0, Vec::len))
}

/// As many pods as a kubelet takes: each is reached from the other node, and afterwards each address is free again.
fn a_full_node(lab: &Lab) -> Result<()> {
    let on_node1 = field(
        lab,
        "pods -A --field-selector=spec.nodeName=node1",
        ".metadata.uid",
    )?;
    let before = held(lab, "node1")?;
    let more = FULL - on_node1.len();
    let many = format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: many}}\nspec:\n  replicas: {more}\n  selector: {{matchLabels: {{app: many}}}}\n  \
         template:\n    metadata: {{labels: {{app: many}}}}\n    spec:\n      terminationGracePeriodSeconds: 0\n      \
         nodeSelector: {{kubernetes.io/hostname: node1}}\n      containers:\n      - {{name: talk, image: 'localhost/talk:lab'}}\n"
    );
    lab.apply_text(&many)?;
    lab.kubectl("rollout status --timeout=300s deployment/many")?;
    ensure!(
        held(lab, "node1")? == before + more,
        "{} of {before} and {more}",
        held(lab, "node1")?
    );
    let addresses = field(lab, "pods -l app=many", ".status.podIPs[*].ip")?;
    ensure!(addresses.len() == 2 * more, "{} addresses", addresses.len());
    let script: String = addresses
        .iter()
        .map(|address| {
            let address = address.parse::<IpAddr>()?;
            let at = std::net::SocketAddr::new(address, 8080);
            Ok(format!("sluice-lab talk-ask TCP '{at}' 1 1\n"))
        })
        .collect::<Result<_>>()?;
    let answers = asked(&lab.node("node2").sh(&script)?, 2 * more)?;
    let names: BTreeSet<String> = answers.into_iter().map(|(name, _)| name).collect();
    ensure!(names == pods(lab, "many")?, "{names:?}");
    lab.kubectl("delete deployment many")?;
    wait_until("all addresses are free again", PATIENCE_WITH_KUBELETS, || {
        ensure!(
            held(lab, "node1")? == before,
            "{} are held, {before} before",
            held(lab, "node1")?
        );
        Ok(true)
    })
}

/// A node without power: once the cluster takes it for dead nobody is sent there, and when it is deleted nothing tells of it.
fn a_dead_node(lab: &mut Lab) -> Result<()> {
    lab.cut_power("node2")?;
    lab.kubectl("wait --for=condition=Ready=Unknown --timeout=120s node/node2")?;
    let on_node1 = field(
        lab,
        "pods -l app=talk --field-selector=spec.nodeName=node1",
        ".metadata.name",
    )?;
    let first = on_node1.first().context("there is none")?;
    all_answer(lab, &on_node1, first)?;
    lab.kubectl("delete node node2")?;
    wait_until("node1 is healthy without it", PATIENCE, || {
        let status: Value = lab.ctl_json("node1", &["status"])?;
        let nodes = lab.ctl_json("node1", &["nodes"])?;
        let names: Vec<&Value> = nodes
            .as_array()
            .into_iter()
            .flatten()
            .map(|node| &node["name"])
            .collect();
        ensure!(names == ["node1"], "{names:?}");
        ensure!(
            status["problems"].as_array().is_some_and(Vec::is_empty),
            "{}",
            status["problems"]
        );
        Ok(true)
    })
}
