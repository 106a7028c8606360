//! The demo: a small cluster, tutorial manifests, real requests, a table of what came of them.
//!
//! It claims nothing it did not just see: every row counts requests that were made and what answered.

pub mod checks;
pub mod cluster;
mod figures;
pub mod restart;

use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use comfy_table::{ContentArrangement, Table, presets};
use nix::sys::signal::{SigSet, Signal};

use crate::down::down;
use crate::lab::{Lab, wait_until};
use crate::options::Options;
use crate::place::{Node, Running, url};
use crate::pods::{Pod, default_script};
use crate::progress::Progress;

/// The label that the tutorial's Services select.
const LABEL: (&str, &str) = ("app", "kubia");
/// Compiled in, so that the demo runs from any folder.
const MANIFESTS: [(&str, &str); 7] = [
    ("kubia.yaml", include_str!("../../../manifests/kubia.yaml")),
    (
        "kubia-web.yaml",
        include_str!("../../../manifests/kubia-web.yaml"),
    ),
    (
        "kubia-nodeport.yaml",
        include_str!("../../../manifests/kubia-nodeport.yaml"),
    ),
    (
        "external-service.yaml",
        include_str!("../../../manifests/external-service.yaml"),
    ),
    (
        "kubia-loadbalancer.yaml",
        include_str!("../../../manifests/kubia-loadbalancer.yaml"),
    ),
    (
        "kubia-headless.yaml",
        include_str!("../../../manifests/kubia-headless.yaml"),
    ),
    (
        "kubia-externalname.yaml",
        include_str!("../../../manifests/kubia-externalname.yaml"),
    ),
];

/// What one row of the table says.
struct Row {
    what: String,
    requests: usize,
    result: Result<String>,
}

/// What a check came to: how many requests it made, and what is worth saying.
type Outcome = Result<(usize, String)>;

/// The lab with what the demo put in it.
struct Stage {
    lab: Lab,
    pods: Vec<Pod>,
    /// Kept for its Drop: the client's web server runs as long.
    _outside: Running,
}

/// Runs the demo; 0 if everything it shows is right.
///
/// # Errors
/// The lab could not be made.
pub fn run(options: &Options, keep: bool) -> Result<i32> {
    down_on_interrupt(&options.name)?;
    let progress = Progress::new();
    let mut stage = set_up(options, &progress)?;
    let rows = checks(&mut stage, &progress);
    let figures = figures::take(&stage, &progress);
    drop(progress);

    let failed = rows.iter().filter(|row| row.result.is_err()).count();
    println!("{}", table(&rows));
    match figures {
        Ok(figures) => println!("\n{figures}"),
        Err(error) => println!("\nno figures: {error:#}"),
    }
    println!("\nsluicectl status on node1:");
    let status = stage.lab.node("node1").exec(&["sluicectl", "status"])?;
    print!(
        "{}{}",
        String::from_utf8_lossy(&status.stdout),
        String::from_utf8_lossy(&status.stderr)
    );
    if keep {
        stage.lab.keep();
        let name = &options.name;
        println!(
            "\nThe lab stays: ./dev exec --name {name} node1 -- sh   ·   ./dev pod list --name {name}   ·   \
             ./dev down --name {name}"
        );
    } else {
        println!(
            "\nLook around yourself: ./dev up   ·   ./dev exec node1 -- sh   ·   ./dev pod add node1 a   ·   \
             ./dev ctl node1 -- status   ·   ./dev down"
        );
    }
    if failed > 0 {
        println!("\n{failed} of {} did not work.", rows.len());
        return Ok(1);
    }
    Ok(0)
}

fn set_up(options: &Options, progress: &Progress) -> Result<Stage> {
    let lab = Lab::up_named(options, progress)?;
    progress.step("serving on the client");
    let script = default_script("client");
    let outside = lab.client().spawn(&["busybox", "sh", "-ec", &script])?;
    wait_until("the client serves", Duration::from_secs(10), || {
        Ok(lab.client().get("127.0.0.1", 8080, "")? == "client")
    })?;
    let mut pods = Vec::new();
    for node in lab.nodes() {
        for letter in ["a", "b"] {
            let name = format!("kubia-{}{letter}", node.trim_start_matches("node"));
            progress.step(format!("adding pod {name} on {node}"));
            pods.push(lab.pod_add(&node, &name, &[LABEL], &[])?);
        }
    }
    for (file, text) in MANIFESTS {
        progress.step(format!("applying {file}"));
        crate::objects::apply_text(lab.name(), text, file)?;
    }
    Ok(Stage {
        lab,
        pods,
        _outside: outside,
    })
}

/// What is shown, in the order it is shown.
type Check = fn(&mut Stage) -> Outcome;

fn checks(stage: &mut Stage, progress: &Progress) -> Vec<Row> {
    let all: [(&str, Check); 11] = [
        ("Services known on every node", checks::known),
        ("pod to pod, source address kept", checks::pod_to_pod),
        ("node to pod", checks::node_to_pod),
        ("ClusterIPs of the kubia Services, pods and nodes", checks::spread),
        ("ClusterIP kubia, sessionAffinity ClientIP", checks::affinity),
        ("external-service, Endpoints by hand", checks::external),
        ("NodePort 30123 from outside, every node", checks::node_port),
        ("LoadBalancer's node port 30124", checks::load_balancer),
        ("pod to outside, as its node", checks::masquerade),
        (
            "NodePort on a node without endpoints",
            checks::node_port_elsewhere,
        ),
        ("kill -9 of every sluiced under load", restart::kill_under_load),
    ];
    let mut rows = Vec::new();
    for (what, check) in all {
        progress.step(what);
        rows.push(Row::of(what, check(stage)));
    }
    rows
}

impl Row {
    fn of(what: &str, outcome: Outcome) -> Self {
        let (requests, result) = match outcome {
            Ok((requests, said)) => (requests, Ok(said)),
            Err(error) => (0, Err(error)),
        };
        Self {
            what: what.to_owned(),
            requests,
            result,
        }
    }
}

fn table(rows: &[Row]) -> Table {
    let mut table = Table::new();
    table
        .load_preset(presets::NOTHING)
        .set_content_arrangement(ContentArrangement::Dynamic)
        .set_header(["WHAT", "REQUESTS", "RESULT"]);
    for row in rows {
        let (requests, result) = match &row.result {
            Ok(said) => (row.requests.to_string(), format!("ok: {said}")),
            Err(error) => (String::new(), format!("FAILED: {error:#}")),
        };
        table.add_row([row.what.clone(), requests, result]);
    }
    for column in table.column_iter_mut() {
        column.set_padding((0, 3));
    }
    table
}

impl Stage {
    /// The families of the lab: true for IPv4.
    fn families(&self) -> Vec<bool> {
        let families = self.lab.record().options.families;
        [families.v4().then_some(true), families.v6().then_some(false)]
            .into_iter()
            .flatten()
            .collect()
    }

    /// Every pod and every node, with its name.
    fn clients(&self) -> Result<Vec<(String, Node<'_>)>> {
        let mut clients = Vec::new();
        for pod in &self.pods {
            clients.push((pod.name.clone(), self.lab.pod(&pod.name)?));
        }
        for node in self.lab.nodes() {
            clients.push((node.clone(), self.lab.node(&node)));
        }
        Ok(clients)
    }

    /// A member's address of a family, as text.
    fn host_address(&self, name: &str, is_v4: bool) -> Result<String> {
        let host = self.lab.host(name)?;
        host.addresses
            .iter()
            .find(|address| address.is_ipv4() == is_v4)
            .map(ToString::to_string)
            .ok_or_else(|| anyhow!("{name} has no address of that family"))
    }
}

/// Makes one request for each URL, each on a connection of its own; a line per answer, `FAILED` where none came.
fn fetch(from: &Node<'_>, urls: &[String]) -> Result<Vec<String>> {
    let script = format!(
        "for u in {}; do timeout 2 busybox wget -q -O - $u 2>/dev/null || echo FAILED; done",
        urls.join(" ")
    );
    let said = from.sh(&script)?;
    let answers: Vec<String> = said.lines().map(str::to_owned).collect();
    if answers.len() != urls.len() {
        return Err(anyhow!(
            "{} requests gave {} answers: {said:?}",
            urls.len(),
            answers.len()
        ));
    }
    Ok(answers)
}

/// The same URL, many times.
fn times(count: usize, host: &str, port: u16) -> Vec<String> {
    vec![url(host, port, ""); count]
}

/// Removes the lab when the demo is interrupted or told to end.
fn down_on_interrupt(name: &str) -> Result<()> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals.add(Signal::SIGTERM);
    signals.add(Signal::SIGHUP);
    // Blocked here, before there are threads, so that the one below gets them.
    signals.thread_block().context("blocking signals")?;
    let name = name.to_owned();
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            eprintln!("interrupted: removing the lab");
            if let Err(error) = down(&name) {
                eprintln!("{error:#}");
            }
            std::process::exit(130);
        }
    });
    Ok(())
}
