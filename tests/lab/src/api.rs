//! The objects of a lab's API server. The asking is done on the host where the servers run, by this same program.

use std::io::{Read, Write};
use std::ops::Range;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use k8s_openapi::api::authentication::v1::{TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::ServiceAccount;
use kube::api::{DeleteParams, DynamicObject, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::GroupVersionKind;
use kube::discovery::{self, Scope};
use kube::{Api, Client};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::control_plane::ADMIN_KUBECONFIG;
use crate::load::{self, Change, Size};
use crate::objects::{Id, Item};
use crate::plan::CONTROL;
use crate::state::Record;
use crate::up;

/// Whose fields the applied ones are.
const MANAGER: &str = "sluice-lab";

/// What is asked of the API server, handed inside as JSON.
#[derive(Debug, Serialize, Deserialize)]
enum Question {
    Apply(Vec<Item>),
    Delete(Vec<Id>),
    /// A token of a ServiceAccount in `kube-system`.
    Token {
        account: String,
        seconds: i64,
    },
    /// Many Services.
    Fill(Size),
    /// Changes of them by their numbers, and the milliseconds from one to the next.
    Change(Size, Range<u32>, u64),
}

/// Applies all items and says what that did.
///
/// # Errors
/// What the server answered, with the object.
pub(crate) fn apply(record: &Record, items: &[Item]) -> Result<Vec<String>> {
    ask(record, &Question::Apply(items.to_vec()))
}

/// Deletes objects; says which were there.
///
/// # Errors
/// What the server answered, with the object.
pub(crate) fn delete(record: &Record, ids: &[Id]) -> Result<Vec<bool>> {
    ask(record, &Question::Delete(ids.to_vec()))
}

/// A token of a ServiceAccount in `kube-system`, good for so many seconds (600 at least).
///
/// # Errors
/// What the server answered.
pub(crate) fn token(record: &Record, account: &str, seconds: i64) -> Result<String> {
    let account = account.to_owned();
    ask(record, &Question::Token { account, seconds })
}

/// Makes many Services.
///
/// # Errors
/// What the server answered.
pub fn fill(record: &Record, size: Size) -> Result<()> {
    ask(record, &Question::Fill(size))
}

/// Has endpoints of these Services replaced, one every so many milliseconds. A change's number says what of, and by what: made
/// again it is none.
///
/// # Errors
/// What the server answered.
pub fn change(record: &Record, size: Size, changes: Range<u32>, pause: u64) -> Result<Vec<Change>> {
    ask(record, &Question::Change(size, changes, pause))
}

fn ask<T: for<'de> Deserialize<'de>>(record: &Record, question: &Question) -> Result<T> {
    let command = ["sluice-lab", "ask-api"];
    let mut child = up::exec_command(record, CONTROL, &[], &command)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context("running sluice-lab exec")?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(&serde_json::to_vec(question)?)?;
    }
    let output = child.wait_with_output()?;
    if !output.status.success() {
        return Err(up::failure(CONTROL, &command, &output));
    }
    serde_json::from_slice(&output.stdout).context("understanding what sluice-lab ask-api printed")
}

/// Inside: answers the question on standard input.
///
/// # Errors
/// What the server answered.
pub fn answer() -> Result<()> {
    let mut text = String::new();
    std::io::stdin().read_to_string(&mut text)?;
    let question: Question = serde_json::from_str(&text)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let answer = runtime.block_on(async {
        let file = Kubeconfig::read_from(ADMIN_KUBECONFIG)?;
        let config = kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await?;
        let client = Client::try_from(config)?;
        match question {
            Question::Apply(items) => {
                let mut done = Vec::new();
                for item in &items {
                    let verb = apply_one(&client, item).await.with_context(|| item.shown())?;
                    done.push(format!("{} {verb}", item.shown()));
                }
                Ok(json!(done))
            }
            Question::Delete(ids) => {
                let mut found = Vec::new();
                for id in &ids {
                    let deleted = delete_one(&client, id).await;
                    found.push(deleted.with_context(|| format!("deleting {} {}", id.kind, id.name))?);
                }
                Ok(json!(found))
            }
            Question::Fill(size) => {
                load::fill(&client, size).await?;
                Ok(json!(null))
            }
            Question::Change(size, changes, pause) => {
                let pause = Duration::from_millis(pause);
                Ok(json!(load::change(&client, size, changes, pause).await?))
            }
            Question::Token { account, seconds } => Ok(json!(fresh_token(&client, &account, seconds).await?)),
        }
    });
    let answer: Result<Value> = answer;
    println!("{}", answer?);
    Ok(())
}

/// The API of a kind, in the namespace if it has any.
async fn api(
    client: &Client,
    kind: &str,
    version: Option<&str>,
    namespace: &str,
) -> Result<Api<DynamicObject>> {
    let version = version.unwrap_or(match kind {
        "EndpointSlice" => "discovery.k8s.io/v1",
        _ => "v1",
    });
    let (group, version) = version.split_once('/').unwrap_or(("", version));
    let kind = GroupVersionKind::gvk(group, version, kind);
    let (resource, capabilities) = discovery::pinned_kind(client, &kind).await?;
    Ok(match capabilities.scope {
        Scope::Cluster => Api::all_with(client.clone(), &resource),
        Scope::Namespaced => Api::namespaced_with(client.clone(), namespace, &resource),
    })
}

async fn apply_one(client: &Client, item: &Item) -> Result<&'static str> {
    let mut object: Value = serde_saphyr::from_str(&item.text).map_err(|error| anyhow!("{error}"))?;
    let version = object["apiVersion"].as_str().map(str::to_owned);
    let namespace = &item.id.namespace;
    let api = api(client, &item.id.kind, version.as_deref(), namespace).await?;
    let parameters = PatchParams::apply(MANAGER).force();
    if !["default", "kube-system"].contains(&namespace.as_str()) {
        let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
        let namespaces = self::api(client, "Namespace", None, "").await?;
        namespaces
            .patch(namespace, &parameters, &Patch::Apply(object))
            .await?;
    }
    if let Some(spec) = object.get_mut("spec") {
        complete(&item.id.kind, spec);
    }
    let fields = object.as_object_mut().context("it is no mapping")?;
    let status = fields.remove("status");
    let before = api.get_opt(&item.id.name).await?;
    let mut after = api
        .patch(&item.id.name, &parameters, &Patch::Apply(&object))
        .await
        .map_err(said)?;
    if let Some(status) = status {
        // Not by apply, which knows a node's addresses by their type and so at most one of each.
        let status = Patch::Merge(json!({"status": status}));
        after = api
            .patch_status(&item.id.name, &PatchParams::default(), &status)
            .await
            .map_err(said)?;
    }
    let version = |object: DynamicObject| object.metadata.resource_version;
    Ok(match before.map(version) {
        None => "created",
        Some(before) if before == version(after) => "unchanged",
        Some(_) => "configured",
    })
}

/// Adds what the API server wants to be told and Sluice does not.
fn complete(kind: &str, spec: &mut Value) {
    if kind == "Pod" {
        let containers = spec["containers"].as_array_mut().into_iter().flatten();
        for (number, container) in (1..).zip(containers) {
            for (field, value) in [("name", format!("c{number}")), ("image", "none".to_owned())] {
                if container[field].is_null() {
                    container[field] = json!(value);
                }
            }
        }
    }
    if kind != "Service" {
        return;
    }
    let addresses: Vec<Value> = spec["clusterIPs"].as_array().cloned().unwrap_or_default();
    if let (Some(first), true) = (addresses.first(), spec["clusterIP"].is_null()) {
        spec["clusterIP"] = first.clone();
    }
    if addresses.len() == 2 && spec["ipFamilyPolicy"].is_null() {
        spec["ipFamilyPolicy"] = json!("RequireDualStack");
    }
}

/// What the server says, without what the client makes of it.
fn said(error: kube::Error) -> anyhow::Error {
    match error {
        kube::Error::Api(status) => anyhow!("{}", status.message),
        other => other.into(),
    }
}

async fn delete_one(client: &Client, id: &Id) -> Result<bool> {
    let api = api(client, &id.kind, None, &id.namespace).await?;
    // Nobody here would confirm that the containers have ended.
    match api
        .delete(&id.name, &DeleteParams::default().grace_period(0))
        .await
    {
        Ok(_) => Ok(true),
        Err(kube::Error::Api(status)) if status.code == 404 => Ok(false),
        Err(error) => Err(said(error)),
    }
}

async fn fresh_token(client: &Client, account: &str, seconds: i64) -> Result<String> {
    let accounts: Api<ServiceAccount> = Api::namespaced(client.clone(), "kube-system");
    let request = TokenRequest {
        spec: TokenRequestSpec {
            expiration_seconds: Some(seconds),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    };
    let answer = accounts
        .create_token_request(account, &PostParams::default(), &request)
        .await?;
    match answer.status {
        Some(status) => Ok(status.token),
        None => bail!("the server gave no token"),
    }
}
