//! What the integration tests share: the tutorial's pods and manifests in a lab, and ways to ask them.
//!
//! Asks through real sockets only; what a daemon says of itself is never taken for proof that packets flow.

pub mod asking;
pub mod containerd;
pub mod cri;
pub mod datastore;
pub mod podman;
pub mod scenario;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use sluice_lab::demo::cluster;
use sluice_lab::pods::Pod;
use sluice_lab::{Lab, Node, url, wait_until};

/// How long a change may take to be seen. Far more than it takes: nothing here is about speed.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// The label that the tutorial's Services select.
pub const KUBIA: (&str, &str) = ("app", "kubia");

/// A file of `tests/manifests`.
#[must_use]
pub fn manifest(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("manifests").join(name)
}

/// Adds pods of the tutorial, given as (node, name).
///
/// # Errors
/// One of them could not be added.
pub fn kubia_pods(lab: &Lab, wanted: &[(&str, &str)]) -> Result<Vec<Pod>> {
    let add = |(node, name): &(&str, &str)| lab.pod_add(node, name, &[KUBIA], &[]);
    wanted.iter().map(add).collect()
}

/// The addresses of a lab's member, IPv4 first.
///
/// # Errors
/// There is no such member.
pub fn addresses(lab: &Lab, host: &str) -> Result<Vec<String>> {
    Ok(lab
        .host(host)?
        .addresses
        .iter()
        .map(ToString::to_string)
        .collect())
}

/// A pod's address of the same family as `like`.
///
/// # Errors
/// It has none.
pub fn same_family(pod: &Pod, like: IpAddr) -> Result<IpAddr> {
    pod.address(like.is_ipv4())
        .ok_or_else(|| anyhow!("{} has no address of the family of {like}", pod.name))
}

/// Makes `count` requests, each on a connection of its own, and counts who answered.
///
/// # Errors
/// One of them got no answer.
pub fn answers(from: &Node<'_>, host: &str, port: u16, count: usize) -> Result<BTreeMap<String, usize>> {
    let url = url(host, port, "");
    let script = format!(
        "i=0; while [ $i -lt {count} ]; do \
         timeout 2 busybox wget -q -O - '{url}' 2>/dev/null || echo FAILED; i=$((i+1)); done"
    );
    let mut counts = BTreeMap::new();
    for line in from.sh(&script)?.lines() {
        if line == "FAILED" {
            bail!("a request to {url} got no answer");
        }
        *counts.entry(line.to_owned()).or_default() += 1;
    }
    Ok(counts)
}

/// Waits until just these answer at `host`, and all of them.
///
/// # Errors
/// It never comes to that; with who answered last.
pub fn wait_for_answers(from: &Node<'_>, host: &str, port: u16, wanted: &[&str]) -> Result<()> {
    let wanted: BTreeSet<&str> = wanted.iter().copied().collect();
    wait_until(
        &format!("{host} port {port} answers as {wanted:?}"),
        PATIENCE,
        || {
            let counts = answers(from, host, port, 15 * wanted.len())?;
            let found: BTreeSet<&str> = counts.keys().map(String::as_str).collect();
            if found != wanted {
                bail!("{found:?} answered");
            }
            Ok(true)
        },
    )
}

/// The caller's address as whoever answers at `host` sees it.
///
/// # Errors
/// No answer.
pub fn seen_as(from: &Node<'_>, host: &str, port: u16) -> Result<IpAddr> {
    let reported = from.get(host, port, "cgi-bin/source")?;
    sluice_lab::demo::checks::plain_address(&reported)
        .parse()
        .with_context(|| format!("{reported:?} is no address"))
}

/// Starts the tutorial's servers on the outside host; they run as long as the value lives.
///
/// # Errors
/// They do not.
pub fn serve_on_client(lab: &Lab) -> Result<sluice_lab::Running> {
    let script = sluice_lab::pods::default_script("client");
    let running = lab.client().spawn(&["busybox", "sh", "-ec", &script])?;
    wait_until("the client serves", PATIENCE, || {
        Ok(lab.client().get("127.0.0.1", 8080, "")? == "client")
    })?;
    Ok(running)
}

/// Every pod asks every other (and itself), in each family; the asked one sees the asking one's own address.
///
/// # Errors
/// The first pair where that is not so.
pub fn everybody_reaches_everybody(lab: &Lab, pods: &[Pod]) -> Result<()> {
    for from in pods {
        let place = lab.pod(&from.name)?;
        for to in pods {
            for address in &to.addresses {
                let pair = || format!("{} to {} at {address}", from.name, to.name);
                let host = address.to_string();
                let answer = place.get(&host, 8080, "").with_context(pair)?;
                if answer != to.name {
                    bail!("{}: {answer:?} answered", pair());
                }
                let seen = seen_as(&place, &host, 8080).with_context(pair)?;
                if seen != same_family(from, *address)? {
                    bail!("{}: seen as {seen}", pair());
                }
            }
        }
    }
    Ok(())
}

/// The entries `sluicectl services -o json` has for a Service.
///
/// # Errors
/// The daemon does not answer.
pub fn service_entries(lab: &Lab, node: &str, service: &str) -> Result<Vec<serde_json::Value>> {
    let all = lab.ctl_json(node, &["services"])?;
    let entries = all.as_array().ok_or_else(|| anyhow!("{all} is no list"))?;
    Ok(entries
        .iter()
        .filter(|entry| entry["name"] == service)
        .cloned()
        .collect())
}

/// What a node's daemon says is wrong, as one text.
///
/// # Errors
/// The daemon does not answer.
pub fn problems(lab: &Lab, node: &str) -> Result<String> {
    Ok(lab.ctl_json(node, &["status"])?["problems"].to_string())
}

/// Has a cluster's ConfigMap say `new` where it said `old`, and replaces every daemon.
///
/// # Errors
/// It does not say that, or the daemons are not replaced.
pub fn reconfigure(lab: &Lab, old: &str, new: &str) -> Result<()> {
    write_config(lab, old, new)?;
    cluster::roll_sluice(lab)
}

/// The same without replacing the daemons.
///
/// # Errors
/// It does not say that.
pub fn write_config(lab: &Lab, old: &str, new: &str) -> Result<()> {
    let config = lab.kubectl("-n kube-system get configmap sluice -o yaml")?;
    if !config.contains(old) {
        bail!("there is no {old:?} in {config}");
    }
    lab.apply_text(&without_server_fields(&config.replace(old, new)))
}

/// What an object says apart from what the server says of it.
fn without_server_fields(yaml: &str) -> String {
    let server = ["  resourceVersion:", "  uid:", "  creationTimestamp:"];
    let lines = yaml
        .lines()
        .filter(|line| !server.iter().any(|field| line.starts_with(field)));
    lines.map(|line| format!("{line}\n")).collect()
}

/// Starts a node's daemon again with another `proxy.mode`, and waits until it serves by that.
///
/// # Errors
/// Its configuration does not name the mode `from`, or it does not come up.
pub fn switch_proxy(lab: &Lab, node: &str, from: &str, to: &str) -> Result<()> {
    switch_proxy_to(lab, node, from, to, to)
}

/// The same, for a mode that comes out as another: `auto` as `serving`.
///
/// # Errors
/// As [`switch_proxy`].
pub fn switch_proxy_to(lab: &Lab, node: &str, from: &str, to: &str, serving: &str) -> Result<()> {
    let path = lab.record().member(node)?.init.root("/etc/sluice/config.yaml");
    let config = fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))?;
    let (old, new) = (format!("mode: {from}"), format!("mode: {to}"));
    if !config.contains(&old) {
        bail!("{} has no {old:?}: {config}", path.display());
    }
    fs::write(&path, config.replace(&old, &new)).with_context(|| format!("writing {}", path.display()))?;
    lab.stop_sluiced(node)?;
    lab.start_sluiced(node)?;
    wait_until("the other dataplane serves", PATIENCE, || {
        Ok(lab.ctl_json(node, &["status"])?["proxy"]["mode"] == serving)
    })
}

/// Makes a node's runtimes use `list` before any other network, noticed by those that watch: by rename.
///
/// # Errors
/// The file system's.
pub fn install_conflist(lab: &Lab, node: &str, list: &serde_json::Value) -> Result<()> {
    let init = lab.record().member(node)?.init;
    let path = init.root("/etc/cni/net.d/05-of-the-test.conflist");
    sluice_lab::state::write_by_rename(&path, &format!("{list:#}\n"))
}

/// Devices, routes, neighbours and allocations of pods that a node has, as text to compare.
///
/// # Errors
/// The node cannot be asked.
pub fn pod_traces(node: &Node<'_>) -> Result<String> {
    // Not busybox, whose own `ip` knows less.
    node.run(&[
        "sh",
        "-c",
        "ip -o link show type veth | grep sluice | sed 's/@.*//; s/^[0-9]*: //'; \
         { ip -4 route; ip -6 route; ip -4 neighbour; ip -6 neighbour; } | grep -o '^.* dev sluice[0-9a-f]\\{9\\}'; \
         sluicectl ipam -o json",
    ])
}
