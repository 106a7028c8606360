//! The tutorial on a real cluster: a Deployment that is exposed, scaled and replaced, and Sluice itself replaced, while requests are made.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;

use super::restart::under_load;
use super::{Outcome, Row, down_on_interrupt, fetch, table, times};
use crate::lab::{Lab, wait_until};
use crate::options::Options;
use crate::place::{Node, url};
use crate::progress::Progress;

/// Compiled in, so that the demo runs from any folder.
const DEPLOYMENT: &str = include_str!("../../../manifests/kubia-deployment.yaml");

/// How long a rollout may take.
const ROLLOUT: &str = "--timeout=120s";

/// How long it may take until all nodes have heard of a change.
const SETTLE: Duration = Duration::from_secs(20);

/// How many requests are made of an address at a time.
const REQUESTS: usize = 40;

/// Where the Deployment is reached.
struct Exposed {
    cluster_ip: String,
    node_port: u16,
}

/// Runs the demo; 0 if everything it shows is right.
///
/// # Errors
/// The cluster could not be made.
pub fn run(options: &Options) -> Result<i32> {
    down_on_interrupt(&options.name)?;
    let progress = Progress::new();
    let lab = Lab::up_named(options, &progress)?;
    let rows = show(&lab, &progress);
    drop(progress);
    println!("{}", table(&rows));
    println!("\nkubectl get nodes,pods,services -A -o wide:");
    print!("{}", lab.kubectl("get nodes,pods,services -A -o wide")?);
    println!(
        "\nLook around yourself: ./dev kube up   ·   ./dev kubectl get pods -A   ·   ./dev ctl node1 -- status   ·   ./dev kube down"
    );
    let failed = rows.iter().filter(|row| row.result.is_err()).count();
    if failed > 0 {
        println!("\n{failed} of {} did not work.", rows.len());
        return Ok(1);
    }
    Ok(0)
}

/// What did not work, a sentence each.
#[must_use]
pub fn failures(lab: &Lab) -> Vec<String> {
    let rows = show(lab, &Progress::silent());
    let failed = rows
        .into_iter()
        .filter_map(|row| Some((row.what, row.result.err()?)));
    failed.map(|(what, error)| format!("{what}: {error:#}")).collect()
}

/// What is shown, in the order it is shown.
type Check = fn(&Lab) -> Outcome;

fn show(lab: &Lab, progress: &Progress) -> Vec<Row> {
    let all: [(&str, Check); 5] = [
        ("kubectl apply -f deploy/sluice.yaml", ready),
        ("Deployment kubia of 2, kubectl expose --type=NodePort", expose),
        ("kubectl scale --replicas=4", scale),
        ("rolled to a second version under load", replace),
        ("Sluice itself rolled under load", replace_sluice),
    ];
    let mut rows = Vec::new();
    for (what, check) in all {
        progress.step(what);
        rows.push(Row::of(what, check(lab)));
    }
    rows
}

fn ready(lab: &Lab) -> Outcome {
    let seconds = |text: &Value| -> Result<i64> {
        let text = text.as_str().context("a time is missing")?;
        Ok(text.parse::<k8s_openapi::jiff::Timestamp>()?.as_second())
    };
    let sluice: Value = serde_json::from_str(&lab.kubectl("-n kube-system get daemonset sluice -o json")?)?;
    let applied = seconds(&sluice["metadata"]["creationTimestamp"])?;
    let nodes: Value = serde_json::from_str(&lab.kubectl("get nodes -o json")?)?;
    let nodes = nodes["items"].as_array().cloned().unwrap_or_default();
    let mut last = 0;
    for node in &nodes {
        let conditions = node["status"]["conditions"].as_array().into_iter().flatten();
        let ready = conditions
            .into_iter()
            .find(|condition| condition["type"] == "Ready");
        let ready = ready
            .filter(|ready| ready["status"] == "True")
            .context("a node is not Ready")?;
        last = last.max(seconds(&ready["lastTransitionTime"])? - applied);
    }
    Ok((
        0,
        format!("{} nodes Ready, the last one {last} s after it", nodes.len()),
    ))
}

fn expose(lab: &Lab) -> Outcome {
    lab.apply_text(DEPLOYMENT)?;
    lab.kubectl("expose deployment kubia --type=NodePort --port=80 --target-port=8080")?;
    lab.kubectl(&format!("rollout status deployment kubia {ROLLOUT}"))?;
    answer(lab, 2)
}

fn scale(lab: &Lab) -> Outcome {
    lab.kubectl("scale deployment kubia --replicas=4")?;
    lab.kubectl(&format!("rollout status deployment kubia {ROLLOUT}"))?;
    answer(lab, 4)
}

fn replace(lab: &Lab) -> Outcome {
    let requests = under_load(&load(lab)?, || {
        lab.kubectl("set env deployment kubia NAME=second")?;
        lab.kubectl(&format!("rollout status deployment kubia {ROLLOUT}"))
            .map(drop)
    })?;
    let exposed = exposed(lab)?;
    wait_until("only the second version answers", SETTLE, || {
        let answers = fetch(&lab.node("node1"), &times(REQUESTS, &exposed.cluster_ip, 80))?;
        Ok(answers.iter().all(|answer| answer == "second"))
    })?;
    Ok((
        requests,
        "no request failed, and the second version answers".to_owned(),
    ))
}

fn replace_sluice(lab: &Lab) -> Outcome {
    let requests = under_load(&load(lab)?, || roll_sluice(lab))?;
    Ok((requests, "no request failed".to_owned()))
}

/// Has every pod of Sluice replaced, and waits until the new ones are ready.
///
/// # Errors
/// They are not.
pub fn roll_sluice(lab: &Lab) -> Result<()> {
    lab.kubectl("-n kube-system rollout restart daemonset sluice")?;
    lab.kubectl(&format!(
        "-n kube-system rollout status daemonset sluice {ROLLOUT}"
    ))
    .map(drop)
}

/// Requests for the Deployment: from outside by each node's port, from each node by the ClusterIP.
///
/// # Errors
/// It is not exposed.
pub fn load(lab: &Lab) -> Result<Vec<(Node<'_>, String, String)>> {
    let exposed = exposed(lab)?;
    let mut load = Vec::new();
    for node in lab.nodes() {
        let address = lab.host(&node)?.addresses[0].to_string();
        let to_port = url(&address, exposed.node_port, "");
        load.push((lab.client(), format!("client-{node}"), to_port));
        load.push((lab.node(&node), node, url(&exposed.cluster_ip, 80, "")));
    }
    Ok(load)
}

fn exposed(lab: &Lab) -> Result<Exposed> {
    let service: Value = serde_json::from_str(&lab.kubectl("get service kubia -o json")?)?;
    let node_port = service["spec"]["ports"][0]["nodePort"].as_u64();
    Ok(Exposed {
        cluster_ip: service["spec"]["clusterIP"]
            .as_str()
            .unwrap_or_default()
            .to_owned(),
        node_port: u16::try_from(node_port.unwrap_or_default())?,
    })
}

/// That all pods answer, and nobody else: from outside at every node, from the nodes, and from a pod.
fn answer(lab: &Lab, pods: usize) -> Outcome {
    let listed = lab.kubectl("get pods -l app=kubia -o name")?;
    let wanted: BTreeSet<&str> = listed
        .lines()
        .map(|line| line.trim_start_matches("pod/"))
        .collect();
    if wanted.len() != pods {
        bail!("there are the pods {wanted:?}");
    }
    let exposed = exposed(lab)?;
    let mut requests = 0;
    // A pod is ready a moment before all nodes have heard of it.
    let mut check = |place: &str, ask: &dyn Fn() -> Result<Vec<String>>| {
        wait_until(&format!("all pods answer {place}"), SETTLE, || {
            let answers = ask()?;
            requests += answers.len();
            let found: BTreeSet<&str> = answers.iter().map(String::as_str).collect();
            if found != wanted {
                bail!("from {place} {found:?} answered, of {wanted:?}");
            }
            Ok(true)
        })
    };
    let script = format!(
        "i=0; while [ $i -lt {REQUESTS} ]; do /bin/busybox wget -q -O - {}; i=$((i+1)); done",
        url(&exposed.cluster_ip, 80, "")
    );
    for node in lab.nodes() {
        let address = lab.host(&node)?.addresses[0].to_string();
        let to_port = times(REQUESTS, &address, exposed.node_port);
        check("outside", &|| fetch(&lab.client(), &to_port))?;
        let to_service = times(REQUESTS, &exposed.cluster_ip, 80);
        check(&node, &|| fetch(&lab.node(&node), &to_service))?;
    }
    check("a pod", &|| {
        let said = lab.kubectl_words(&["exec", "deploy/kubia", "--", "/bin/busybox", "sh", "-c", &script])?;
        Ok(said.lines().map(str::to_owned).collect())
    })?;
    Ok((
        requests,
        format!("{pods} pods answer from outside, from nodes and from a pod"),
    ))
}
