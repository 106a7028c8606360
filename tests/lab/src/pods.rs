//! Pods of a lab: a network namespace, a real CNI ADD, a process, and the Pod object that says so.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::cni::Attachment;
use crate::options::check_name;
use crate::state::{self, Record};
use crate::{cgroup, objects, up};

/// Ports the default process listens on, with the names the Pod object gives them.
pub const PORTS: [(&str, u16); 2] = [("http", 8080), ("https", 8443)];

/// A pod that runs.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Pod {
    /// Its name, the same as its network namespace's on the node.
    pub name: String,
    /// The node it is on.
    pub node: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Its addresses, in the order the plugin gave them.
    pub addresses: Vec<std::net::IpAddr>,
    /// What the CNI plugin answered.
    pub result: Value,
    /// How long the CNI ADD took, in microseconds.
    pub add_microseconds: u64,
}

impl Pod {
    /// Its first address of a family.
    #[must_use]
    pub fn address(&self, is_v4: bool) -> Option<std::net::IpAddr> {
        self.addresses
            .iter()
            .copied()
            .find(|address| address.is_ipv4() == is_v4)
    }
}

/// What a pod is to be.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Its name.
    pub name: String,
    /// The node it goes to.
    pub node: String,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// What runs in it; empty: web servers and a UDP service that answer with the pod's name.
    pub command: Vec<String>,
    /// What the runtime tells the CNI plugins (`portMappings`, `ips`, …), if they declare to understand it.
    pub runtime_config: Map<String, Value>,
}

/// Adds a pod.
///
/// # Errors
/// What the CNI plugin answered, or what did not start; nothing of the pod is left then.
pub fn add(record: &Record, wanted: &Wanted) -> Result<Pod> {
    check_name("pod name", &wanted.name)?;
    let lab = &record.options.name;
    let member = record.member(&wanted.node)?;
    if member.host.pod_cidrs.is_empty() {
        bail!("{} is no node: it takes no pods", wanted.node);
    }
    if note(lab, &wanted.name).exists() {
        bail!("pod {:?} exists; remove it first with: pod rm {0}", wanted.name);
    }
    let container_id = container_id(&wanted.name);
    let runtime_config = Value::Object(wanted.runtime_config.clone()).to_string();
    let command = [
        "sluice-lab",
        "cni-add",
        &wanted.name,
        &container_id,
        &runtime_config,
    ];
    let output = up::must(record, &wanted.node, &[], &command)?;
    let attachment: Attachment =
        serde_json::from_slice(&output.stdout).context("reading the ADD's result")?;
    let pod = Pod {
        name: wanted.name.clone(),
        node: wanted.node.clone(),
        labels: wanted.labels.clone(),
        addresses: addresses(&attachment.result),
        result: attachment.result,
        add_microseconds: attachment.microseconds,
    };
    if let Err(error) = start(record, wanted, &pod) {
        // The error is why there is no pod; what the clearing up says would only hide it.
        let _ = rm(record, &wanted.name);
        return Err(error);
    }
    Ok(pod)
}

fn start(record: &Record, wanted: &Wanted, pod: &Pod) -> Result<()> {
    let lab = &record.options.name;
    let note = note(lab, &pod.name);
    if let Some(folder) = note.parent() {
        fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    }
    state::write_by_rename(&note, &serde_json::to_string_pretty(pod)?)?;
    let is_default = wanted.command.is_empty();
    let script = default_script(&pod.name);
    let command: Vec<&str> = if is_default {
        vec!["busybox", "sh", "-ec", &script]
    } else {
        wanted.command.iter().map(String::as_str).collect()
    };
    let log = format!("/var/log/pods/{}.log", pod.name);
    let flags = ["--pod", &pod.name, "--detach-to", &log];
    up::must(record, &pod.node, &flags, &command)?;
    if is_default {
        wait_until_listening(record, pod, &log)?;
    }
    objects::apply_text(lab, &object(pod), "the lab's Pod object").map(drop)
}

/// Removes a pod as a kubelet does: first its object, then its processes, then its network.
///
/// # Errors
/// There is none, or what the CNI plugin answered; it can be tried again then.
pub fn rm(record: &Record, name: &str) -> Result<()> {
    let lab = &record.options.name;
    let pod = find(lab, name)?;
    objects::delete(lab, "Pod", "default", name)?;
    cgroup::kill_and_remove(&group(lab, &pod)?)?;
    up::must(record, &pod.node, &[], &["sluice-lab", "cni-del", name])?;
    let note = note(lab, name);
    fs::remove_file(&note).with_context(|| format!("removing {}", note.display()))
}

/// The pod called `name`.
///
/// # Errors
/// There is none.
pub fn find(lab: &str, name: &str) -> Result<Pod> {
    check_name("pod name", name)?;
    let path = note(lab, name);
    let text = fs::read_to_string(&path)
        .map_err(|_| anyhow!("lab {lab:?} has no pod {name:?}; add it with: pod add NODE {name}"))?;
    serde_json::from_str(&text).with_context(|| format!("understanding {}", path.display()))
}

/// All pods of a lab, by name.
///
/// # Errors
/// One of their notes is damaged.
pub fn list(lab: &str) -> Result<Vec<Pod>> {
    let entries = fs::read_dir(state::directory(lab).join("pods"));
    let mut names: Vec<String> = entries
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| Some(entry.file_name().to_str()?.strip_suffix(".json")?.to_owned()))
        .collect();
    names.sort();
    names.iter().map(|name| find(lab, name)).collect()
}

fn note(lab: &str, pod: &str) -> PathBuf {
    state::directory(lab).join("pods").join(format!("{pod}.json"))
}

fn group(lab: &str, pod: &Pod) -> Result<PathBuf> {
    Ok(cgroup::of_lab(lab)?.join(&pod.node).join("pods").join(&pod.name))
}

/// New for every pod, also for a second one of the same name.
fn container_id(pod: &str) -> String {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{pod}-{:x}", now.as_nanos())
}

fn addresses(result: &Value) -> Vec<std::net::IpAddr> {
    let listed = result["ips"].as_array().into_iter().flatten();
    listed
        .filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok())
        .collect()
}

/// Web servers whose page is the pod's name and whose `/cgi-bin/source` is the caller's address; UDP answers alike.
#[must_use]
pub fn default_script(name: &str) -> String {
    format!(
        "www=/run/pods/{name}; mkdir -p $www/cgi-bin; echo {name} > $www/index.html\n\
         cat > $www/cgi-bin/source <<'END'\n\
         #!/bin/busybox sh\n\
         printf 'Content-type: text/plain\\r\\n\\r\\n%s\\n' \"$REMOTE_ADDR\"\n\
         END\n\
         chmod +x $www/cgi-bin/source\n\
         busybox httpd -p {http} -h $www; busybox httpd -p {https} -h $www\n\
         exec sluice-lab udp-name {http} {name}\n",
        http = PORTS[0].1,
        https = PORTS[1].1,
    )
}

fn wait_until_listening(record: &Record, pod: &Pod, log: &str) -> Result<()> {
    let group = group(&record.options.name, pod)?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while !is_listening(&group) {
        if Instant::now() > deadline {
            let path = state::logs(&record.options.name, &pod.node)
                .join("pods")
                .join(format!("{}.log", pod.name));
            let said = fs::read_to_string(path).unwrap_or_default();
            bail!(
                "pod {} does not listen; {log} on {}: {}",
                pod.name,
                pod.node,
                said.trim()
            );
        }
        sleep(Duration::from_millis(2));
    }
    Ok(())
}

/// Whether a process of the cgroup is in a network namespace where all default ports are bound.
fn is_listening(group: &std::path::Path) -> bool {
    let Some(pid) = cgroup::processes(group).first().copied() else {
        return false;
    };
    let table = |kind: &str| {
        let read = |name: String| fs::read_to_string(format!("/proc/{pid}/net/{name}")).unwrap_or_default();
        read(kind.to_owned()) + &read(format!("{kind}6"))
    };
    let (tcp, udp) = (table("tcp"), table("udp"));
    let bound = |table: &str, port: u16| {
        let port = format!(":{port:04X}");
        table.lines().any(|line| {
            line.split_whitespace()
                .nth(1)
                .is_some_and(|local| local.ends_with(&port))
        })
    };
    PORTS.iter().all(|(_, port)| bound(&tcp, *port)) && bound(&udp, PORTS[0].1)
}

fn object(pod: &Pod) -> String {
    let ports: Vec<Value> = PORTS
        .iter()
        .map(|(name, port)| json!({"name": name, "containerPort": port, "protocol": "TCP"}))
        .collect();
    let ips: Vec<Value> = pod.addresses.iter().map(|ip| json!({"ip": ip})).collect();
    let object = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": pod.name, "namespace": "default", "labels": pod.labels},
        "spec": {"nodeName": pod.node, "containers": [{"name": "main", "image": "busybox", "ports": ports}]},
        "status": {
            "phase": "Running",
            "podIP": pod.addresses.first(),
            "podIPs": ips,
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    });
    // JSON is YAML.
    format!("{object:#}\n")
}
