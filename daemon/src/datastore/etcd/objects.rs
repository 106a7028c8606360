//! Objects in etcd as an operator writes and reads them: what `kubectl` is to an API server.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail};
use etcd_client::{Client, Compare, CompareOp, GetOptions, KeyValue, PutOptions, Txn, TxnOp};
use jiff::Timestamp;
use serde_json::{Value, json};

use super::Members;
use super::keys::{Keys, Stored};
use super::members::answer;
use super::pages::Pages;
use crate::config;
use crate::datastore::wire::{self, Document};
use crate::state::objects::ObjectName;
use crate::yaml;

/// How long the members may take to choose who leads.
const ELECTION: Duration = Duration::from_secs(5);

/// How often a write is tried again when another came in between.
const TRIES: u32 = 20;

/// What became of an object that was applied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// As people call it: `service/web`.
    pub object: String,
    /// `created`, `configured`, `unchanged`, or `left out` if it is of a kind that is not kept.
    pub what: &'static str,
    /// Which of its elements are not served, and why.
    pub remark: Option<String>,
}

/// The objects below a prefix.
pub struct Objects {
    client: Client,
    keys: Keys,
}

/// One that is to be written.
struct Written {
    kind: Stored,
    name: ObjectName,
    object: Value,
    remark: Option<String>,
}

impl Objects {
    /// Connects to the first member that answers; while one leads no more and another not yet, that takes a moment.
    ///
    /// # Errors
    /// None does; why, for each.
    pub async fn connect(config: &config::Etcd) -> Result<Self> {
        let members = Members::new(config.clone());
        let deadline = Instant::now() + ELECTION;
        loop {
            match members.connect().await {
                Ok(client) => {
                    let keys = Keys::new(&config.prefix);
                    return Ok(Self { client, keys });
                }
                Err(error) => {
                    if !members.give_up(format!("{error:#}")) {
                        continue;
                    }
                    if Instant::now() > deadline {
                        bail!("no member of etcd answers: {}", members.failures().join("; "));
                    }
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
            }
        }
    }

    /// Writes all objects of a stream of YAML documents, each over what it was before; `source` is what errors call the stream.
    ///
    /// # Errors
    /// A document is not understood, with its line, and nothing is written then; or etcd's.
    pub async fn apply(&mut self, text: &str, source: &str) -> Result<Vec<Applied>> {
        let mut applied = Vec::new();
        for document in yaml::documents(text) {
            let read = read(document.text)
                .map_err(|error| anyhow!("{source}: {}", error.after(document.lines_before)))?;
            applied.push(read);
        }
        if applied.is_empty() {
            bail!("{source}: there is no object in it");
        }
        let mut done = Vec::new();
        for read in applied {
            done.push(match read {
                Ok(written) => Applied {
                    object: shown(written.kind.kind(), &written.name.name),
                    what: self.write(&written).await?,
                    remark: written.remark,
                },
                Err((kind, name)) => Applied {
                    object: shown(&kind, &name),
                    what: "left out",
                    remark: Some(
                        "only Nodes, Services, EndpointSlices, Endpoints and Pods are kept".to_owned(),
                    ),
                },
            });
        }
        Ok(done)
    }

    /// Removes all objects that a stream of YAML documents names; says which were there.
    ///
    /// # Errors
    /// As [`Self::apply`].
    pub async fn delete_all(&mut self, text: &str, source: &str) -> Result<Vec<(String, bool)>> {
        let mut names = Vec::new();
        for document in yaml::documents(text) {
            let object: Value = yaml::parse(document.text)
                .map_err(|error| anyhow!("{source}: {}", error.after(document.lines_before)))?;
            let (kind, name) = id_of(&object);
            names.extend(kind.map(|kind| (kind, name)));
        }
        let mut done = Vec::new();
        for (kind, name) in names {
            let was_there = self.delete(kind, &name).await?;
            done.push((shown(kind.kind(), &name.name), was_there));
        }
        Ok(done)
    }

    /// Objects of a kind: of all namespaces or one, all or the one of a name.
    ///
    /// # Errors
    /// etcd's.
    pub async fn get(
        &mut self,
        kind: Stored,
        namespace: Option<&str>,
        name: Option<&str>,
    ) -> Result<Vec<Value>> {
        let mut found = Vec::new();
        match name {
            Some(name) => {
                let key = self
                    .keys
                    .object(kind, &ObjectName::new(namespace.unwrap_or("default"), name));
                let doing = format!("reading {key}");
                found.extend(
                    answer(&doing, self.client.kv_client().get(key, None))
                        .await?
                        .take_kvs(),
                );
            }
            None => {
                let folder = self
                    .keys
                    .objects(kind, namespace.filter(|_| kind != Stored::Node));
                let mut pages = Pages::below(&self.client, &folder);
                while let Some(page) = pages.next().await? {
                    found.extend(page);
                }
            }
        }
        let read = |key_value: &KeyValue| {
            let key = key_value.key_str().unwrap_or("?");
            serde_json::from_slice(key_value.value()).with_context(|| format!("{key} is not JSON"))
        };
        found.iter().map(read).collect()
    }

    /// Removes an object, and with a Node the claims of its pod CIDRs and its name; says whether it was there.
    ///
    /// # Errors
    /// etcd's.
    pub async fn delete(&mut self, kind: Stored, name: &ObjectName) -> Result<bool> {
        let key = self.keys.object(kind, name);
        let doing = format!("deleting {key}");
        for _ in 0..TRIES {
            let (mut when, mut then) = (Vec::new(), vec![TxnOp::delete(key.as_str(), None)]);
            let mut held = false;
            if kind == Stored::Node {
                then.push(TxnOp::delete(self.keys.registration(&name.name), None));
                let asked = GetOptions::new().with_prefix();
                let claims = answer(
                    &doing,
                    self.client.kv_client().get(self.keys.claims(), Some(asked)),
                )
                .await?;
                for claim in claims
                    .kvs()
                    .iter()
                    .filter(|claim| claim.value() == name.name.as_bytes())
                {
                    held = true;
                    when.push(Compare::mod_revision(
                        claim.key(),
                        CompareOp::Equal,
                        claim.mod_revision(),
                    ));
                    then.push(TxnOp::delete(claim.key(), None));
                }
            }
            let asked = Txn::new().when(when).and_then(then);
            let response = answer(&doing, self.client.kv_client().txn(asked)).await?;
            if response.succeeded() {
                let deleted = response.op_responses().into_iter().next();
                let was_there =
                    matches!(deleted, Some(etcd_client::TxnOpResponse::Delete(gone)) if gone.deleted() > 0);
                return Ok(was_there || held);
            }
        }
        bail!("{doing}: others changed it {TRIES} times meanwhile; try again")
    }

    async fn write(&mut self, written: &Written) -> Result<&'static str> {
        let key = self.keys.object(written.kind, &written.name);
        let doing = format!("writing {key}");
        for _ in 0..TRIES {
            let found = answer(&doing, self.client.kv_client().get(key.as_str(), None)).await?;
            let before = found.kvs().first();
            let object = over(written.kind, written.object.clone(), before);
            let value = serde_json::to_vec(&object)?;
            if before.is_some_and(|before| before.value() == value) {
                return Ok("unchanged");
            }
            let revision = before.map_or(0, KeyValue::mod_revision);
            // A Node stays under the lease that it has.
            let options = before
                .filter(|before| before.lease() != 0)
                .map(|_| PutOptions::new().with_ignore_lease());
            let asked = Txn::new()
                .when([Compare::mod_revision(key.as_str(), CompareOp::Equal, revision)])
                .and_then([TxnOp::put(key.as_str(), value, options)]);
            if answer(&doing, self.client.kv_client().txn(asked))
                .await?
                .succeeded()
            {
                return Ok(if before.is_some() { "configured" } else { "created" });
            }
        }
        bail!("{doing}: others changed it {TRIES} times meanwhile; try again")
    }
}

/// The kind called `word`, as in `service`, `services` or `svc`.
///
/// # Errors
/// There is none, and which was likely meant.
pub fn kind_called(word: &str) -> Result<Stored> {
    let word = word.to_ascii_lowercase();
    let short = |kind| match kind {
        Stored::Node => "no",
        Stored::Service => "svc",
        Stored::EndpointSlice => "eps",
        Stored::Endpoints => "ep",
        Stored::Pod => "po",
    };
    let names = |kind: Stored| {
        [
            kind.kind().to_ascii_lowercase(),
            kind.plural().to_owned(),
            short(kind).to_owned(),
        ]
    };
    let found = Stored::ALL.into_iter().find(|kind| names(*kind).contains(&word));
    found.ok_or_else(|| {
        let plurals = Stored::ALL.map(Stored::plural);
        match yaml::likely(&word, plurals) {
            Some(meant) => anyhow!("{word:?} is no kind of object; did you mean {meant:?}?"),
            None => anyhow!("{word:?} is no kind of object; there are {}", plurals.join(", ")),
        }
    })
}

/// One document; of a kind that is not kept, only what it is.
fn read(text: &str) -> Result<Result<Written, (String, String)>, yaml::YamlError> {
    let parsed = wire::parse(text)?;
    let mut object: Value = yaml::parse(text)?;
    let (kind, name) = id_of(&object);
    match (parsed, kind) {
        (Document::Objects { passed_over, .. }, Some(kind)) => {
            if kind != Stored::Node {
                object["metadata"]["namespace"] = json!(name.namespace);
            }
            Ok(Ok(Written {
                kind,
                name,
                object,
                remark: passed_over,
            }))
        }
        _ => {
            let kind = object["kind"].as_str().unwrap_or_default();
            Ok(Err((kind.to_owned(), name.name.to_string())))
        }
    }
}

fn id_of(object: &Value) -> (Option<Stored>, ObjectName) {
    let kind = Stored::ALL.into_iter().find(|kind| object["kind"] == kind.kind());
    let metadata = |field: &str| object["metadata"][field].as_str();
    let namespace = match kind {
        Some(Stored::Node) => "",
        _ => metadata("namespace").unwrap_or("default"),
    };
    (
        kind,
        ObjectName::new(namespace, metadata("name").unwrap_or_default()),
    )
}

/// The object as it is to be written over what is there: it was created when that was, and what a node says of itself stays.
fn over(kind: Stored, mut object: Value, before: Option<&KeyValue>) -> Value {
    let before: Value = before
        .and_then(|before| serde_json::from_slice(before.value()).ok())
        .unwrap_or_default();
    let mut keep = |part: &str, field: &str, otherwise: Option<Value>| {
        let old = &before[part][field];
        let kept = if old.is_null() {
            otherwise
        } else {
            Some(old.clone())
        };
        if let (true, Some(kept)) = (object[part][field].is_null(), kept) {
            object[part][field] = kept;
        }
    };
    let now = Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
    keep("metadata", "creationTimestamp", Some(json!(now)));
    if kind == Stored::Node {
        keep("spec", "podCIDR", None);
        keep("spec", "podCIDRs", None);
        keep("status", "addresses", None);
    }
    object
}

fn shown(kind: &str, name: &str) -> String {
    format!("{}/{name}", kind.to_ascii_lowercase())
}
