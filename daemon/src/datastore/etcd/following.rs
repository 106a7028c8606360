//! What is below the prefix, listed and then watched; a watch goes on at another member where it ended at the last.

use std::collections::BTreeMap;

use anyhow::{Result, bail};
use etcd_client::{Client, EventType, GetOptions, KeyValue, WatchOptions};
use serde_json::Value;
use tokio::sync::mpsc;

use super::Told;
use super::keys::{Keys, Stored};
use super::members::{Members, answer};
use super::pages::{LARGEST, Pages};
use crate::datastore::keeper::{Heard, What};
use crate::datastore::wire;
use crate::state::objects::{Kind, Object, ObjectName};

/// All that is listed and watched.
pub const KINDS: [Kind; 4] = [Kind::Node, Kind::Service, Kind::EndpointSlice, Kind::Pod];

/// Follows the objects below the prefix.
pub struct Following {
    keys: Keys,
    /// Up to where everything was told: the cluster, and the revision of its last change.
    position: Option<(u64, i64)>,
    /// The slices that each Endpoints object came to.
    mirrored: BTreeMap<ObjectName, Vec<ObjectName>>,
}

impl Following {
    /// Follows what is below `keys`, of which nothing is known yet.
    pub fn new(keys: Keys) -> Self {
        Self {
            keys,
            position: None,
            mirrored: BTreeMap::new(),
        }
    }

    /// Tells what changed since the last time, everything at first, and goes on for as long as the member does.
    ///
    /// # Errors
    /// Always: why it cannot go on.
    pub async fn follow(
        &mut self,
        client: &Client,
        members: &Members,
        teller: &mpsc::Sender<Told>,
    ) -> Result<()> {
        loop {
            let head = self.head(client).await?;
            // Another cluster, or this one as it was before what was told: restored from a copy.
            let goes_on = self
                .position
                .is_some_and(|(cluster, revision)| cluster == head.0 && revision <= head.1);
            if !goes_on {
                self.position = None;
                let revision = self.list(client, teller).await?;
                self.position = Some((head.0, revision));
            }
            members.answers();
            if teller.send(Told::Follows).await.is_err() {
                return Ok(());
            }
            self.watch(client, teller).await?;
            // What the watch was to begin with is compacted: all is listed anew.
            self.position = None;
        }
    }

    /// The cluster, and the revision of its last change, as its majority knows it.
    async fn head(&self, client: &Client) -> Result<(u64, i64)> {
        let key = self.keys.all();
        let doing = format!("asking for the revision of {key}");
        let asked = GetOptions::new().with_prefix().with_count_only();
        let response = answer(&doing, client.kv_client().get(key, Some(asked))).await?;
        match response.header() {
            Some(header) => Ok((header.cluster_id(), header.revision())),
            None => bail!("{doing}: the answer has no header"),
        }
    }

    /// Lists all keys as of one revision, which is returned.
    async fn list(&mut self, client: &Client, teller: &mpsc::Sender<Told>) -> Result<i64> {
        for kind in KINDS {
            tell(teller, kind, What::ListBegins).await;
        }
        self.mirrored.clear();
        let mut pages = Pages::below(client, &self.keys.all());
        while let Some(page) = pages.next().await? {
            for key_value in &page {
                self.put(key_value, teller).await;
            }
        }
        for kind in KINDS {
            tell(teller, kind, What::ListEnds).await;
        }
        Ok(pages.revision)
    }

    /// Tells changes; ends when they begin before what the member still has.
    async fn watch(&mut self, client: &Client, teller: &mpsc::Sender<Told>) -> Result<()> {
        let Some((cluster, revision)) = self.position else {
            return Ok(());
        };
        let all = self.keys.all();
        let doing = format!("watching {all}");
        let asked = WatchOptions::new()
            .with_prefix()
            .with_start_revision(revision + 1)
            .with_progress_notify();
        let mut watcher = client.watch_client().max_decoding_message_size(LARGEST);
        let mut changes = answer(&doing, watcher.watch(all, Some(asked))).await?;
        while let Some(message) = changes
            .message()
            .await
            .map_err(|error| anyhow::anyhow!("{doing}: {}", super::members::because(&error)))?
        {
            if message.canceled() {
                if message.compact_revision() > 0 {
                    return Ok(());
                }
                bail!("{doing}: the member ended it: {}", message.cancel_reason());
            }
            for event in message.events() {
                let Some(key_value) = event.kv() else { continue };
                match event.event_type() {
                    EventType::Put => self.put(key_value, teller).await,
                    EventType::Delete => self.delete(key_value, teller).await,
                }
            }
            // Without events it says that there are none up to its revision; else events of later ones may follow.
            let last = match message.events().last().and_then(|event| event.kv()) {
                Some(key_value) => key_value.mod_revision(),
                None => message.header().map_or(0, |header| header.revision()),
            };
            self.position = Some((cluster, last.max(revision)));
        }
        bail!("{doing}: the member closed it")
    }

    async fn put(&mut self, key_value: &KeyValue, teller: &mpsc::Sender<Told>) {
        let Some((stored, name)) = self.keys.object_of(key_value.key()) else {
            return;
        };
        let read = read(stored, &name, key_value.value());
        let kind = match stored {
            Stored::Node => Kind::Node,
            Stored::Service => Kind::Service,
            Stored::EndpointSlice => Kind::EndpointSlice,
            Stored::Pod => Kind::Pod,
            Stored::Endpoints => {
                self.put_endpoints(name, read, teller).await;
                return;
            }
        };
        let checked = read.and_then(|object| wire::check_sent(kind, object));
        tell(teller, kind, What::There(name, Box::new(checked))).await;
    }

    async fn put_endpoints(
        &mut self,
        name: ObjectName,
        read: Result<Value, String>,
        teller: &mpsc::Sender<Told>,
    ) {
        let kind = Kind::EndpointSlice;
        let (slices, passed_over) = match read.and_then(wire::check_endpoints) {
            Ok(checked) => checked,
            Err(reason) => {
                tell(teller, kind, What::There(whole(&name), Box::new(Err(reason)))).await;
                return;
            }
        };
        let told = wire::Sent {
            object: None,
            passed_over,
        };
        tell(teller, kind, What::There(whole(&name), Box::new(Ok(told)))).await;
        let mirrored = slices.iter().map(|slice| slice.name.clone()).collect();
        let before = self.mirrored.insert(name, mirrored).unwrap_or_default();
        for gone in before {
            if !slices.iter().any(|slice| slice.name == gone) {
                tell(teller, kind, What::Gone(gone)).await;
            }
        }
        for slice in slices {
            let name = slice.name.clone();
            let sent = wire::Sent {
                object: Some(Object::EndpointSlice(slice)),
                passed_over: None,
            };
            tell(teller, kind, What::There(name, Box::new(Ok(sent)))).await;
        }
    }

    async fn delete(&mut self, key_value: &KeyValue, teller: &mpsc::Sender<Told>) {
        let Some((stored, name)) = self.keys.object_of(key_value.key()) else {
            return;
        };
        let kind = match stored {
            Stored::Node => Kind::Node,
            Stored::Service => Kind::Service,
            Stored::Pod => Kind::Pod,
            Stored::EndpointSlice => Kind::EndpointSlice,
            Stored::Endpoints => {
                for gone in self.mirrored.remove(&name).unwrap_or_default() {
                    tell(teller, Kind::EndpointSlice, What::Gone(gone)).await;
                }
                tell(teller, Kind::EndpointSlice, What::Gone(whole(&name))).await;
                return;
            }
        };
        tell(teller, kind, What::Gone(name)).await;
    }
}

/// The name under which is told what is wrong with all of an Endpoints object; no slice that it comes to has it.
fn whole(name: &ObjectName) -> ObjectName {
    ObjectName::new(name.namespace.clone(), format!("{}.endpoints", name.name))
}

/// That nobody listens any more shows at the next [`Told::Follows`].
async fn tell(teller: &mpsc::Sender<Told>, kind: Kind, what: What) {
    _ = teller.send(Told::Heard(Heard(kind, what))).await;
}

/// The object that a key's value describes, which must be the one that the key names.
fn read(stored: Stored, name: &ObjectName, value: &[u8]) -> Result<Value, String> {
    let kind = stored.kind();
    let object: Value =
        serde_json::from_slice(value).map_err(|error| format!("{kind} {name}: is not JSON: {error}"))?;
    let metadata = |field: &str| object["metadata"][field].as_str();
    let namespace = match stored {
        Stored::Node => "",
        _ => metadata("namespace").unwrap_or("default"),
    };
    let written = ObjectName::new(namespace, metadata("name").unwrap_or_default());
    if written != *name {
        return Err(format!(
            "{kind} {name}: its metadata names {written}; write objects with sluicectl apply, which puts them where they belong"
        ));
    }
    Ok(object)
}
