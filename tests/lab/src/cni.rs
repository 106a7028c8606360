//! The runtime's side of CNI, as containerd's: runs inside a node and calls whatever plugins are installed there.
//!
//! The network configuration is the first by name in `/etc/cni/net.d`, its plugins are called in order with the result
//! of the one before, and what was added is remembered so that it can be checked and removed with the same words.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::options::check_name;
use crate::state::Record;
use crate::up;

const CONFIGURATIONS: &str = "/etc/cni/net.d";
const PLUGINS: &str = "/opt/cni/bin";
const REMEMBERED: &str = "/run/lab-attachments";
const INTERFACE: &str = "eth0";

/// A pod's attachment to the network.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Attachment {
    /// The container's identifier, new for every pod.
    pub container_id: String,
    /// The configuration list it was added with.
    pub list: Value,
    /// What the runtime told the plugins beside it.
    pub runtime_config: Map<String, Value>,
    /// What the last plugin answered.
    pub result: Value,
    /// How long the whole chain took, in microseconds, process starts included.
    pub microseconds: u64,
}

/// Makes the pod's network namespace and attaches it.
///
/// # Errors
/// No configuration, no plugin, or what the plugin answered; nothing is left behind then.
pub fn add(pod: &str, container_id: &str, runtime_config: Map<String, Value>) -> Result<Attachment> {
    check_name("pod name", pod)?;
    let list = installed_list()?;
    ip(&["netns", "add", pod])?;
    let attached = ip(&["-n", pod, "link", "set", "lo", "up"]).and_then(|()| {
        let start = Instant::now();
        let mut result = Value::Null;
        for plugin in plugins(&list)? {
            let previous = (!result.is_null()).then_some(&result);
            result = call("ADD", pod, container_id, &list, plugin, &runtime_config, previous)?;
        }
        let microseconds = u64::try_from(start.elapsed().as_micros()).unwrap_or(u64::MAX);
        Ok(Attachment {
            container_id: container_id.to_owned(),
            list: list.clone(),
            runtime_config: runtime_config.clone(),
            result,
            microseconds,
        })
    });
    let kept = attached.and_then(|attachment| {
        fs::create_dir_all(REMEMBERED).with_context(|| format!("creating {REMEMBERED}"))?;
        crate::state::write_by_rename(&remembered(pod), &serde_json::to_string(&attachment)?)?;
        Ok(attachment)
    });
    if kept.is_err() {
        // As runtimes do: DEL whatever the ADD got to, then drop the namespace. The ADD's error is the one to show.
        for plugin in plugins(&list).unwrap_or_default().iter().rev() {
            let _ = call("DEL", pod, container_id, &list, plugin, &runtime_config, None);
        }
        let _ = ip(&["netns", "del", pod]);
    }
    kept
}

/// Detaches the pod and removes its namespace.
///
/// # Errors
/// What a plugin answered; the pod stays remembered, so that it can be tried again.
pub fn del(pod: &str) -> Result<()> {
    let attachment = recall(pod)?;
    for plugin in plugins(&attachment.list)?.iter().rev() {
        again("DEL", pod, &attachment, plugin)?;
    }
    if Path::new("/run/netns").join(pod).exists() {
        ip(&["netns", "del", pod])?;
    }
    fs::remove_file(remembered(pod)).with_context(|| format!("forgetting {pod}"))
}

/// Has the plugins check the pod's attachment.
///
/// # Errors
/// What a plugin found wrong.
pub fn check(pod: &str) -> Result<()> {
    let attachment = recall(pod)?;
    for plugin in plugins(&attachment.list)? {
        again("CHECK", pod, &attachment, plugin)?;
    }
    Ok(())
}

fn again(verb: &str, pod: &str, attachment: &Attachment, plugin: &Value) -> Result<()> {
    call(
        verb,
        pod,
        &attachment.container_id,
        &attachment.list,
        plugin,
        &attachment.runtime_config,
        Some(&attachment.result),
    )
    .map(drop)
}

fn remembered(pod: &str) -> PathBuf {
    Path::new(REMEMBERED).join(format!("{pod}.json"))
}

fn recall(pod: &str) -> Result<Attachment> {
    check_name("pod name", pod)?;
    let path = remembered(pod);
    let text =
        fs::read_to_string(&path).with_context(|| format!("reading {} (no such pod?)", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("understanding {}", path.display()))
}

fn installed_list() -> Result<Value> {
    let entries = fs::read_dir(CONFIGURATIONS).with_context(|| format!("listing {CONFIGURATIONS}"))?;
    let mut lists: Vec<PathBuf> = entries
        .flatten()
        .map(|entry| entry.path())
        .filter(|path| path.extension().is_some_and(|end| end == "conflist"))
        .collect();
    lists.sort();
    let path = lists
        .first()
        .ok_or_else(|| anyhow!("no conflist in {CONFIGURATIONS}: the node takes no pods yet"))?;
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    serde_json::from_str(&text).with_context(|| format!("understanding {}", path.display()))
}

fn plugins(list: &Value) -> Result<&[Value]> {
    list["plugins"]
        .as_array()
        .map(Vec::as_slice)
        .ok_or_else(|| anyhow!("the network configuration has no list of plugins"))
}

/// The newest version the list offers, as libcni chooses since it knows 1.1.0.
fn version(list: &Value) -> &str {
    let several = list["cniVersions"].as_array().into_iter().flatten();
    let offered = several.chain([&list["cniVersion"]]).filter_map(Value::as_str);
    let newest = offered.max_by_key(|text| {
        let parts = text.split('.').map(|part| part.parse().unwrap_or(0));
        parts.collect::<Vec<u32>>()
    });
    // What no version means in the specification.
    newest.unwrap_or("0.1.0")
}

/// What a plugin gets on standard input: its own part, with what the list and the runtime add.
fn merged(list: &Value, plugin: &Value, runtime: &Map<String, Value>, previous: Option<&Value>) -> Value {
    let mut config = plugin.clone();
    config["name"] = list["name"].clone();
    config["cniVersion"] = json!(version(list));
    // A plugin is told only what it says it understands.
    let told: Map<String, Value> = runtime
        .iter()
        .filter(|(key, _)| plugin["capabilities"][key.as_str()] == json!(true))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    if !told.is_empty() {
        config["runtimeConfig"] = Value::Object(told);
    }
    if let Some(previous) = previous {
        config["prevResult"] = previous.clone();
    }
    config
}

fn call(
    verb: &str,
    pod: &str,
    container_id: &str,
    list: &Value,
    plugin: &Value,
    runtime: &Map<String, Value>,
    previous: Option<&Value>,
) -> Result<Value> {
    let kind = plugin["type"]
        .as_str()
        .ok_or_else(|| anyhow!("a plugin of the list has no type"))?;
    if kind.contains('/') {
        bail!("the plugin type {kind:?} is a path");
    }
    let binary = Path::new(PLUGINS).join(kind);
    let arguments = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME={pod};K8S_POD_INFRA_CONTAINER_ID={container_id}"
    );
    let mut child = Command::new(&binary)
        .env_clear()
        .env(
            "PATH",
            "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        )
        .env("CNI_COMMAND", verb)
        .env("CNI_CONTAINERID", container_id)
        .env("CNI_NETNS", format!("/run/netns/{pod}"))
        .env("CNI_IFNAME", INTERFACE)
        .env("CNI_ARGS", arguments)
        .env("CNI_PATH", PLUGINS)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("running {}", binary.display()))?;
    if let Some(mut stdin) = child.stdin.take() {
        let config = merged(list, plugin, runtime, previous);
        // A plugin that does not read says why in its answer.
        let _ = stdin.write_all(config.to_string().as_bytes());
    }
    let output = child
        .wait_with_output()
        .with_context(|| format!("waiting for {}", binary.display()))?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!(
            "{kind} {verb} for {pod}: {}; it answered {} {}",
            output.status,
            text.trim(),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    if text.trim().is_empty() {
        return Ok(Value::Null);
    }
    serde_json::from_str(&text).with_context(|| format!("{kind} {verb} for {pod} answered {:?}", text.trim()))
}

fn ip(arguments: &[&str]) -> Result<()> {
    let output = Command::new("ip")
        .args(arguments)
        .output()
        .context("running ip (package iproute2)")?;
    if !output.status.success() {
        bail!(
            "ip {}: {}",
            arguments.join(" "),
            String::from_utf8_lossy(&output.stderr).trim()
        );
    }
    Ok(())
}

/// Lets a node find plugins of the package `containernetworking-plugins`.
///
/// # Errors
/// There is none of that name.
pub fn install_reference_plugins(record: &Record, node: &str, plugins: &[&str]) -> Result<()> {
    for plugin in plugins {
        let from = format!("/usr/lib/cni/{plugin}");
        let link = format!("test -x {from} && ln -sf {from} /opt/cni/bin/{plugin}");
        up::must(record, node, &[], &["busybox", "sh", "-c", &link])
            .with_context(|| format!("{from} is wanted (package containernetworking-plugins)"))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// C15
    #[test]
    fn a_plugin_is_told_what_it_declares_and_nothing_else() {
        let list = json!({"cniVersion": "1.1.0", "name": "n"});
        let plugin = json!({"type": "t", "capabilities": {"ips": true, "mac": false}});
        let runtime = json!({"ips": ["10.0.0.2/32"], "mac": "x", "bandwidth": {}});
        let config = merged(
            &list,
            &plugin,
            runtime.as_object().unwrap(),
            Some(&json!({"ips": []})),
        );
        assert_eq!(config["runtimeConfig"], json!({"ips": ["10.0.0.2/32"]}));
        assert_eq!(config["name"], "n");
        assert_eq!(config["cniVersion"], "1.1.0");
        assert_eq!(config["prevResult"], json!({"ips": []}));
        assert_eq!(config["capabilities"]["ips"], true, "left in, as libcni does");
    }

    #[test]
    fn the_newest_version_offered_is_spoken() {
        assert_eq!(version(&json!({"cniVersion": "0.4.0"})), "0.4.0");
        let several = json!({"cniVersion": "1.0.0", "cniVersions": ["0.3.1", "1.1.0", "1.0.0"]});
        assert_eq!(version(&several), "1.1.0");
        assert_eq!(version(&json!({})), "0.1.0");
    }
}
