//! What the demo shows, a function a row. Each makes its requests and fails at the first that is not as promised.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};

use super::{LABEL, Outcome, Stage, fetch, times};
use crate::lab::wait_until;
use crate::place::{Node, url};

/// ClusterIPs as the manifests have them: IPv4, IPv6.
pub(super) const KUBIA_WEB: [&str; 2] = ["10.96.0.11", "fd00:96::11"];
const KUBIA: [&str; 2] = ["10.96.0.10", "fd00:96::10"];
const KUBIA_NODEPORT: [&str; 2] = ["10.96.0.12", "fd00:96::12"];
const KUBIA_LOADBALANCER: [&str; 2] = ["10.96.0.14", "fd00:96::14"];
const EXTERNAL: &str = "10.96.0.13";
pub(super) const NODE_PORT: u16 = 30123;
const LOAD_BALANCER_PORT: u16 = 30124;

fn of(addresses: [&'static str; 2], is_v4: bool) -> &'static str {
    if is_v4 { addresses[0] } else { addresses[1] }
}

/// Manifests and pods take a moment to be everywhere: waited for here, so that the rows after it are not about that.
pub(super) fn known(stage: &mut Stage) -> Outcome {
    let mut requests = 0;
    for node in stage.lab.nodes() {
        for is_v4 in stage.families() {
            let from = stage.lab.node(&node);
            wait_until(
                &format!("{node} reaches all pods of kubia-web"),
                Duration::from_secs(20),
                || {
                    requests += 60;
                    let answers = fetch(&from, &times(60, of(KUBIA_WEB, is_v4), 80))?;
                    let distinct: BTreeSet<_> = answers.into_iter().collect();
                    if distinct.len() != stage.pods.len() {
                        bail!("only these answered: {distinct:?}");
                    }
                    Ok(true)
                },
            )?;
        }
    }
    Ok((requests, "every pod answered every node".to_owned()))
}

pub(super) fn pod_to_pod(stage: &mut Stage) -> Outcome {
    let mut requests = 0;
    for from in &stage.pods {
        for is_v4 in stage.families() {
            let own = from
                .address(is_v4)
                .ok_or_else(|| anyhow!("{} has no such address", from.name))?;
            for path in ["", "cgi-bin/source"] {
                let mut urls = Vec::new();
                for to in &stage.pods {
                    let address = to
                        .address(is_v4)
                        .ok_or_else(|| anyhow!("{} has no such address", to.name))?;
                    urls.push(url(&address.to_string(), 8080, path));
                }
                let answers = fetch(&stage.lab.pod(&from.name)?, &urls)?;
                requests += urls.len();
                for (to, answer) in stage.pods.iter().zip(answers) {
                    let (wanted, found) = match path {
                        "" => (to.name.clone(), answer),
                        _ => (own.to_string(), plain_address(&answer)),
                    };
                    if wanted != found {
                        bail!(
                            "{} asked {} and got {found:?}, not {wanted:?}",
                            from.name,
                            to.name
                        );
                    }
                }
            }
        }
    }
    let pods = stage.pods.len();
    Ok((
        requests,
        format!("{pods} × {pods} pods, {}", shown(&stage.families())),
    ))
}

pub(super) fn node_to_pod(stage: &mut Stage) -> Outcome {
    let mut requests = 0;
    for node in stage.lab.nodes() {
        for is_v4 in stage.families() {
            let addresses = stage.pods.iter().filter_map(|pod| pod.address(is_v4));
            let urls: Vec<String> = addresses
                .map(|address| url(&address.to_string(), 8080, ""))
                .collect();
            let answers = fetch(&stage.lab.node(&node), &urls)?;
            requests += answers.len();
            let wanted: Vec<_> = stage.pods.iter().map(|pod| pod.name.clone()).collect();
            if answers != wanted {
                bail!("{node} wanted {wanted:?} and got {answers:?}");
            }
        }
    }
    Ok((
        requests,
        format!("{} nodes, {}", stage.lab.nodes().len(), shown(&stage.families())),
    ))
}

pub(super) fn spread(stage: &mut Stage) -> Outcome {
    let mut counts = BTreeMap::new();
    let mut requests = 0;
    for (_, from) in stage.clients()? {
        for is_v4 in stage.families() {
            for addresses in [KUBIA_WEB, KUBIA_NODEPORT, KUBIA_LOADBALANCER] {
                requests += count(&from, of(addresses, is_v4), 80, 20, &mut counts)?;
            }
        }
    }
    all_answered(stage, &counts)?;
    Ok((requests, spread_shown(&counts)))
}

pub(super) fn affinity(stage: &mut Stage) -> Outcome {
    let mut requests = 0;
    let mut chosen = BTreeSet::new();
    for (name, from) in stage.clients()? {
        for is_v4 in stage.families() {
            for port in [80, 443] {
                let mut counts = BTreeMap::new();
                requests += count(&from, of(KUBIA, is_v4), port, 8, &mut counts)?;
                if counts.len() != 1 {
                    bail!("{name} on port {port} was answered by {}", spread_shown(&counts));
                }
                chosen.extend(counts.into_keys());
            }
        }
    }
    Ok((
        requests,
        format!(
            "ports 80 and 443, each client at one pod; {} pods chosen",
            chosen.len()
        ),
    ))
}

pub(super) fn external(stage: &mut Stage) -> Outcome {
    if !stage.families().contains(&true) {
        return Ok((0, "it is IPv4, this lab is not".to_owned()));
    }
    let mut requests = 0;
    for (name, from) in stage.clients()? {
        let mut counts = BTreeMap::new();
        requests += count(&from, EXTERNAL, 80, 3, &mut counts)?;
        if counts.keys().ne(["client"]) {
            bail!("{name} was answered by {}", spread_shown(&counts));
        }
    }
    Ok((requests, "the client answered pods and nodes".to_owned()))
}

pub(super) fn node_port(stage: &mut Stage) -> Outcome {
    from_outside(stage, NODE_PORT)
}

pub(super) fn load_balancer(stage: &mut Stage) -> Outcome {
    from_outside(stage, LOAD_BALANCER_PORT)
}

fn from_outside(stage: &Stage, port: u16) -> Outcome {
    let mut counts = BTreeMap::new();
    let mut requests = 0;
    for node in stage.lab.nodes() {
        for is_v4 in stage.families() {
            let address = stage.host_address(&node, is_v4)?;
            requests += count(&stage.lab.client(), &address, port, 40, &mut counts)?;
        }
    }
    all_answered(stage, &counts)?;
    Ok((requests, spread_shown(&counts)))
}

pub(super) fn masquerade(stage: &mut Stage) -> Outcome {
    let mut requests = 0;
    for pod in &stage.pods {
        for is_v4 in stage.families() {
            let client = stage.host_address("client", is_v4)?;
            let answer = fetch(
                &stage.lab.pod(&pod.name)?,
                &[url(&client, 8080, "cgi-bin/source")],
            )?;
            requests += 1;
            let (wanted, found) = (stage.host_address(&pod.node, is_v4)?, plain_address(&answer[0]));
            if wanted != found {
                bail!(
                    "{} on {} was seen as {found:?}, not {wanted:?}",
                    pod.name,
                    pod.node
                );
            }
        }
    }
    Ok((
        requests,
        "the client saw the address of each pod's node".to_owned(),
    ))
}

/// Takes the last node's pods away, asks that node, and gives it its pods back.
pub(super) fn node_port_elsewhere(stage: &mut Stage) -> Outcome {
    let Some(bare) = stage.lab.nodes().pop().filter(|_| stage.lab.nodes().len() > 1) else {
        return Ok((0, "takes more than one node".to_owned()));
    };
    let (leaving, staying): (Vec<_>, Vec<_>) = stage.pods.drain(..).partition(|pod| pod.node == bare);
    stage.pods = staying;
    for pod in &leaving {
        stage.lab.pod_rm(&pod.name)?;
    }
    let result = ask_bare_node(stage, &bare);
    for pod in leaving {
        stage
            .pods
            .push(stage.lab.pod_add(&pod.node, &pod.name, &[LABEL], &[])?);
    }
    result
}

fn ask_bare_node(stage: &Stage, bare: &str) -> Outcome {
    let mut counts = BTreeMap::new();
    let mut requests = 0;
    for is_v4 in stage.families() {
        let address = stage.host_address(bare, is_v4)?;
        // The pods are gone at once, the news of it takes a moment.
        let what = format!("{bare} knows that its pods are gone");
        wait_until(&what, Duration::from_secs(10), || {
            let answers = fetch(&stage.lab.client(), &times(40, &address, NODE_PORT))?;
            Ok(!answers.iter().any(|answer| answer == "FAILED"))
        })?;
        requests += count(&stage.lab.client(), &address, NODE_PORT, 40, &mut counts)?;
    }
    all_answered(stage, &counts)?;
    Ok((requests, format!("{bare}: {}", spread_shown(&counts))))
}

/// Makes `requests` requests and counts who answered.
fn count(
    from: &Node<'_>,
    host: &str,
    port: u16,
    requests: usize,
    counts: &mut BTreeMap<String, usize>,
) -> Result<usize> {
    for answer in fetch(from, &times(requests, host, port))? {
        if answer == "FAILED" {
            bail!("a request to {host} port {port} failed");
        }
        *counts.entry(answer).or_default() += 1;
    }
    Ok(requests)
}

fn all_answered(stage: &Stage, counts: &BTreeMap<String, usize>) -> Result<()> {
    let wanted: BTreeSet<_> = stage.pods.iter().map(|pod| pod.name.as_str()).collect();
    let found: BTreeSet<_> = counts.keys().map(String::as_str).collect();
    if wanted != found {
        bail!("these should have answered: {wanted:?}; these did: {found:?}");
    }
    Ok(())
}

fn spread_shown(counts: &BTreeMap<String, usize>) -> String {
    let each: Vec<String> = counts
        .iter()
        .map(|(who, count)| format!("{who} {count}"))
        .collect();
    each.join(", ")
}

fn shown(families: &[bool]) -> String {
    let names: Vec<&str> = families
        .iter()
        .map(|is_v4| if *is_v4 { "IPv4" } else { "IPv6" })
        .collect();
    names.join(" and ")
}

/// An address as busybox's httpd reports it, in brackets and IPv4 mapped, as everybody else writes it.
#[must_use]
pub fn plain_address(reported: &str) -> String {
    let bare = reported.trim_start_matches('[').trim_end_matches(']');
    bare.strip_prefix("::ffff:").unwrap_or(bare).to_owned()
}
