//! Scenarios: Kubernetes YAML in, requests from given places, and what must come of them. They know nothing of how Services
//! are translated, so every dataplane passes the same.
//!
//! A scenario is a file of `tests/services`: pods, and steps one after the other. What a step wants to see is waited for, as
//! changes take a moment; what is wrong for good fails it. Texts may name addresses: `${POD.v4}`, `${NODE.v6}`,
//! `${client.v4}`.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

mod ask;
mod run;

pub use run::Stage;

/// One behaviour of Services.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
pub struct Scenario {
    /// What a Kubernetes API server says instead of taking one of the objects; the scenario ends there then.
    refused_by_kubernetes: Option<String>,
    /// Pods that are there from the start.
    #[serde(default)]
    pods: BTreeMap<String, PodSpec>,
    steps: Vec<Step>,
}

/// A pod that says who it is on its ports.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct PodSpec {
    node: String,
    /// `app: web` if none are given.
    labels: Option<BTreeMap<String, String>>,
    #[serde(default)]
    ports: Vec<u16>,
    /// As a runtime passes them on: `hostIP`, `hostPort`, `containerPort`, `protocol`.
    #[serde(default)]
    host_ports: Vec<BTreeMap<String, serde_json::Value>>,
}

/// One step; each is one of these.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
enum Step {
    /// Kubernetes YAML to apply.
    Apply(String),
    /// Kubernetes YAML whose objects to delete.
    Delete(String),
    /// A pod to add.
    Pod {
        name: String,
        #[serde(flatten)]
        spec: PodSpec,
    },
    /// A pod to remove.
    RemovePod(String),
    /// A server on a node or the client, outside all pods.
    Serve { name: String, on: String, port: u16 },
    /// Requests, and what comes of them.
    Ask(Ask),
    /// A conversation to begin and keep up.
    Keep(Keep),
    /// How a kept conversation must be doing.
    Kept(Kept),
    /// A ping, and whether it is answered.
    Ping(Ping),
    /// An HTTP request by curl, and what comes of it.
    Fetch(Fetch),
    /// Something a node's `sluicectl status` must say.
    Told { node: String, says: String },
    /// A node whose daemon to kill with SIGKILL; it is up again when this is over.
    KillDaemon(String),
}

/// Requests from each place to each address.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
struct Ask {
    from: Vec<String>,
    at: Vec<String>,
    /// TCP if it is not said.
    #[serde(default)]
    over: Vec<String>,
    /// Just these answer, and each of them does.
    #[serde(default)]
    answer: Vec<String>,
    /// Or nobody does, in this way.
    finds: Option<Finds>,
    /// Each place has its answers from one of them alone.
    #[serde(default)]
    stays: bool,
    /// Whose address who answers sees.
    seen_as: Option<String>,
    /// Bytes of a datagram.
    #[serde(default = "one")]
    size: usize,
}

/// In which way nobody answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Finds {
    Refused,
    Dropped,
    Unreachable,
    /// An answer of those named, or silence: as a dataplane may have it.
    AnswerOrSilence,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Keep {
    name: String,
    from: String,
    at: String,
    over: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Kept {
    name: String,
    /// Who answers; if it is not said, whoever did at first.
    by: Option<String>,
    /// Whether it was aborted and begun again meanwhile.
    #[serde(default)]
    aborted: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ping {
    from: Vec<String>,
    at: Vec<String>,
    answers: bool,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fetch {
    from: String,
    url: String,
    status: u16,
    #[serde(default)]
    says: String,
}

fn one() -> usize {
    1
}

/// All scenarios, by name.
///
/// # Errors
/// One of them is not understood; with file, line and what is wrong.
pub fn all() -> Result<BTreeMap<String, Scenario>> {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("services");
    let mut found = BTreeMap::new();
    for entry in fs::read_dir(&directory).with_context(|| format!("listing {}", directory.display()))? {
        let path = entry?.path();
        if path.extension().is_some_and(|end| end == "yaml") {
            let (name, scenario) = read(&path)?;
            found.insert(name, scenario);
        }
    }
    if found.is_empty() {
        bail!("{} has no scenarios", directory.display());
    }
    Ok(found)
}

fn read(path: &PathBuf) -> Result<(String, Scenario)> {
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    let scenario: Scenario =
        serde_saphyr::from_str(&text).map_err(|error| anyhow!("{}: {error}", path.display()))?;
    let name = path
        .file_stem()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned();
    for step in &scenario.steps {
        if let Step::Ask(ask) = step {
            let wants_answers = matches!(ask.finds, None | Some(Finds::AnswerOrSilence));
            if wants_answers == ask.answer.is_empty() {
                bail!(
                    "{}: an ask wants to see answers or how nobody answers: {ask:?}",
                    path.display()
                );
            }
        }
    }
    Ok((name, scenario))
}
