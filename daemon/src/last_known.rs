//! The state last known, on disk: what a node serves after a reboot while nothing that knows better can be reached.
//!
//! A line says when it was saved, then there is a line for each object, in JSON.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::state::cluster::Cluster;
use crate::state::objects::Object;

/// The folder that is this state's alone.
pub const FOLDER: &str = "/var/lib/sluice";

/// Where it is.
pub const PATH: &str = "/var/lib/sluice/cluster.jsonl";

/// The shape of the lines; another one is not understood.
const VERSION: u32 = 1;

/// How long a change waits for others that may follow it.
const SETTLE: Duration = Duration::from_secs(1);

/// How long the next save waits where changes do not end.
const PAUSE: Duration = Duration::from_secs(10);

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Head {
    version: u32,
    saved_at: String,
}

/// A state as it was saved.
#[derive(Debug)]
pub struct Saved {
    /// When, in RFC 3339.
    pub at: String,
    /// All of it.
    pub objects: Vec<Object>,
}

/// Reads what was saved; nothing if nothing was.
///
/// # Errors
/// The file cannot be read, or is none of this version.
pub fn read(path: &Path) -> Result<Option<Saved>> {
    let doing = || format!("reading the state last known, {}", path.display());
    let file = match File::open(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened.with_context(doing)?,
    };
    let mut lines = BufReader::new(file).lines();
    let first = lines.next().transpose().with_context(doing)?.unwrap_or_default();
    let head: Head = serde_json::from_str(&first).with_context(doing)?;
    if head.version != VERSION {
        bail!(
            "{}: is of version {}; {VERSION} is understood",
            doing(),
            head.version
        );
    }
    let (mut objects, mut damaged) = (Vec::new(), 0);
    for line in lines {
        match serde_json::from_str(&line.with_context(doing)?) {
            Ok(object) => objects.push(object),
            Err(_) => damaged += 1,
        }
    }
    if damaged > 0 {
        tracing::warn!(
            damaged,
            "{}: some lines are no objects and are passed over",
            doing()
        );
    }
    Ok(Some(Saved {
        at: head.saved_at,
        objects,
    }))
}

/// What was saved in [`PATH`]; that it cannot be read is a warning, since nothing is lost with it that a datastore will not say again.
pub fn read_or_warn() -> Option<Saved> {
    read(Path::new(PATH)).unwrap_or_else(|error| {
        tracing::warn!("{error:#}");
        None
    })
}

fn text(cluster: &Cluster) -> serde_json::Result<Vec<u8>> {
    let mut text = Vec::new();
    let head = Head {
        version: VERSION,
        saved_at: jiff::Timestamp::from_second(jiff::Timestamp::now().as_second())
            .unwrap_or_default()
            .to_string(),
    };
    serde_json::to_writer(&mut text, &head)?;
    text.push(b'\n');
    for object in cluster.objects() {
        serde_json::to_writer(&mut text, &object)?;
        text.push(b'\n');
    }
    Ok(text)
}

/// Writes a file whole or not at all, and waits until the disk has it.
///
/// # Errors
/// The file system's.
pub fn write_whole(path: &Path, text: &[u8]) -> io::Result<()> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(folder)?;
    let temporary = path.with_extension("new");
    let mut file = File::create(&temporary)?;
    file.write_all(text)?;
    file.sync_all()?;
    fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()
}

/// Saves the state some time after it changed.
#[derive(Debug, Default)]
pub struct Saver {
    /// When what changed is to be saved.
    due: Option<Instant>,
    /// When it was saved last.
    saved: Option<Instant>,
    writing: Option<JoinHandle<io::Result<()>>>,
}

/// What a [`Saver`] waited for.
#[derive(Debug)]
pub enum Turn {
    /// It is time to save.
    Due,
    /// What was to be saved is, or why not.
    Done(Result<(), String>),
}

impl Saver {
    /// The state changed.
    pub fn changed(&mut self) {
        let soon = Instant::now() + SETTLE;
        let again = self.saved.map(|saved| saved + PAUSE);
        self.due
            .get_or_insert(again.map_or(soon, |again| again.max(soon)));
    }

    /// Waits for its turn; whoever stops waiting loses nothing.
    pub async fn turn(&mut self) -> Turn {
        if let Some(writing) = &mut self.writing {
            let written = writing.await;
            self.writing = None;
            let written = written.unwrap_or_else(|error| Err(io::Error::other(error)));
            return Turn::Done(
                written.map_err(|error| format!("saving the state last known, {PATH}: {error}")),
            );
        }
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
        Turn::Due
    }

    /// It is not the time yet, whatever changed.
    pub fn put_off(&mut self) {
        self.due = Some(Instant::now() + SETTLE);
    }

    /// Begins to save; the disk is not waited for.
    pub fn save(&mut self, cluster: &Cluster) {
        self.due = None;
        self.saved = Some(Instant::now());
        let text = text(cluster);
        self.writing = Some(tokio::task::spawn_blocking(move || {
            write_whole(Path::new(PATH), &text?)
        }));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::datastore::wire::{self, Document};

    fn cluster() -> Cluster {
        let mut cluster = Cluster::default();
        let texts = [
            "apiVersion: v1\nkind: Node\nmetadata: {name: n1, labels: {topology.kubernetes.io/zone: a}}\n\
             spec: {podCIDRs: [10.244.1.0/24, 'fd00:1::/64']}\nstatus: {addresses: [{type: InternalIP, address: 192.0.2.1}]}\n",
            "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop, creationTimestamp: 2024-05-01T12:00:00Z}\n\
             spec: {clusterIPs: [10.96.0.1], ports: [{port: 80, targetPort: http}], sessionAffinity: ClientIP,\n\
             loadBalancerSourceRanges: [192.0.2.0/24], trafficDistribution: PreferClose}\n",
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\n\
             metadata: {name: web-x, namespace: shop, labels: {kubernetes.io/service-name: web}}\naddressType: IPv4\n\
             endpoints: [{addresses: [10.244.1.5], nodeName: n1, hints: {forZones: [{name: a}]}}]\n\
             ports: [{name: http, port: 8080}]\n",
            "apiVersion: v1\nkind: Pod\nmetadata: {name: p, labels: {app: web}}\nstatus: {podIPs: [{ip: 10.244.1.5}]}\n",
        ];
        for text in texts {
            let Document::Objects { objects, .. } = wire::parse(text).unwrap() else {
                panic!("{text}")
            };
            for object in objects {
                cluster.upsert(object);
            }
        }
        cluster
    }

    /// D2
    #[test]
    fn what_is_read_is_what_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sluice/cluster.jsonl");
        assert!(read(&path).unwrap().is_none());
        let cluster = cluster();
        write_whole(&path, &text(&cluster).unwrap()).unwrap();
        let saved = read(&path).unwrap().unwrap();
        assert_eq!(saved.objects, cluster.objects().collect::<Vec<_>>());
        assert_eq!(saved.objects.len(), 4);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    /// D2 D5
    #[test]
    fn a_damaged_line_takes_its_object_alone_and_another_version_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cluster.jsonl");
        let mut lines = String::from_utf8(text(&cluster()).unwrap()).unwrap();
        lines.push_str("{\"Node\":");
        fs::write(&path, &lines).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().objects.len(), 4);
        fs::write(&path, lines.replace("\"version\":1", "\"version\":9")).unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("is of version 9; 1 is understood"), "{error}");
    }
}
