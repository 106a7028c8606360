//! The state last known, on disk: what a node serves after a reboot while nothing that knows better can be reached.
//!
//! A line says when it was saved, then there is a line for each object, in JSON.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::state::cluster::{Cluster, Place};
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

/// How much is written at once, in bytes.
const PIECE: usize = 256 << 10;

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

/// Writes a file whole or not at all, and waits until the disk has it.
///
/// # Errors
/// The file system's.
pub fn write_whole(path: &Path, text: &[u8]) -> io::Result<()> {
    append(path, None, text, true).map(drop)
}

/// Saves the state some time after it changed, a piece after the other: the state of a large cluster is never in memory as text, and
/// who has the state is kept from nothing else meanwhile. What changes between two pieces is saved the next time.
#[derive(Debug)]
pub struct Saver {
    path: PathBuf,
    /// When what changed is to be saved.
    due: Option<Instant>,
    /// When it was begun to be saved last.
    saved: Option<Instant>,
    /// How far it is saved.
    begun: Option<Begun>,
    writing: Option<JoinHandle<io::Result<File>>>,
}

/// A file that is not whole yet.
#[derive(Debug)]
struct Begun {
    /// Once its first piece is written.
    file: Option<File>,
    /// The last object that is in it.
    place: Option<Place>,
    /// Whether that is the last of all.
    whole: bool,
}

impl Default for Saver {
    fn default() -> Self {
        Self::new(Path::new(PATH))
    }
}

/// What a [`Saver`] waited for.
#[derive(Debug)]
pub enum Turn {
    /// It is time to save, or to go on with it.
    Due,
    /// What was to be saved is, or why not.
    Done(Result<(), String>),
}

impl Saver {
    /// Saves into the file `path`.
    fn new(path: &Path) -> Self {
        Self {
            path: path.to_owned(),
            due: None,
            saved: None,
            begun: None,
            writing: None,
        }
    }

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
            match (
                written.unwrap_or_else(|error| Err(io::Error::other(error))),
                &mut self.begun,
            ) {
                (Ok(file), Some(begun)) if !begun.whole => begun.file = Some(file),
                (written, begun) => {
                    *begun = None;
                    let path = self.path.display();
                    let told = written.map(drop);
                    return Turn::Done(
                        told.map_err(|error| format!("saving the state last known, {path}: {error}")),
                    );
                }
            }
        }
        if self.begun.is_some() {
            return Turn::Due;
        }
        match self.due {
            Some(due) => tokio::time::sleep_until(due).await,
            None => std::future::pending().await,
        }
        Turn::Due
    }

    /// It is not the time yet, whatever changed.
    pub fn put_off(&mut self) {
        self.begun = None;
        self.due = Some(Instant::now() + SETTLE);
    }

    /// Begins to save, or goes on; the disk is not waited for.
    pub fn save(&mut self, cluster: &Cluster) {
        let mut text = Vec::new();
        let mut begun = self.begun.take().unwrap_or_else(|| {
            self.due = None;
            self.saved = Some(Instant::now());
            text = head();
            Begun {
                file: None,
                place: None,
                whole: false,
            }
        });
        begun.whole = piece(cluster, &mut begun.place, &mut text);
        let (path, file, whole) = (self.path.clone(), begun.file.take(), begun.whole);
        self.begun = Some(begun);
        self.writing = Some(tokio::task::spawn_blocking(move || {
            append(&path, file, &text, whole)
        }));
    }
}

/// The first line.
fn head() -> Vec<u8> {
    let now = jiff::Timestamp::from_second(jiff::Timestamp::now().as_second()).unwrap_or_default();
    let head = Head {
        version: VERSION,
        saved_at: now.to_string(),
    };
    let mut text = serde_json::to_vec(&head).unwrap_or_default();
    text.push(b'\n');
    text
}

/// Adds lines for objects behind `place` until there is [`PIECE`] of them, and moves it; says whether these were the last.
fn piece(cluster: &Cluster, place: &mut Option<Place>, text: &mut Vec<u8>) -> bool {
    let mut last = place.take();
    for (at, object) in cluster.objects_after(last.clone().as_ref()) {
        // Slices that share a place stay together.
        if text.len() >= PIECE && last.as_ref() != Some(&at) {
            *place = last;
            return false;
        }
        // To memory, and nothing in an object can fail to be JSON; a line cut off would be passed over.
        let _ = serde_json::to_writer(&mut *text, &object);
        text.push(b'\n');
        last = Some(at);
    }
    *place = last;
    true
}

/// Writes a piece of the file that will be at `path`, after the others; with the last it is put there whole, and the disk has it.
fn append(path: &Path, file: Option<File>, text: &[u8], last: bool) -> io::Result<File> {
    let temporary = path.with_extension("new");
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut file = match file {
        Some(file) => file,
        None => {
            fs::create_dir_all(folder)?;
            File::create(&temporary)?
        }
    };
    file.write_all(text)?;
    if last {
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        File::open(folder)?.sync_all()?;
    }
    Ok(file)
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

    /// Saves as the daemon does, to the end.
    async fn saved(path: &Path, cluster: &Cluster) -> usize {
        let mut saver = Saver::new(path);
        saver.changed();
        let mut pieces = 0;
        loop {
            match saver.turn().await {
                Turn::Due => {
                    saver.save(cluster);
                    pieces += 1;
                }
                Turn::Done(result) => {
                    result.unwrap();
                    return pieces;
                }
            }
        }
    }

    /// D2
    #[tokio::test]
    async fn what_is_read_is_what_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sluice/cluster.jsonl");
        assert!(read(&path).unwrap().is_none());
        let mut cluster = cluster();
        assert_eq!(saved(&path, &cluster).await, 1);
        let found = read(&path).unwrap().unwrap();
        assert_eq!(found.objects, cluster.objects().collect::<Vec<_>>());
        assert_eq!(found.objects.len(), 4);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);

        // So many that it takes several pieces, and two slices of each Service among them.
        let web: Vec<_> = cluster.objects().collect();
        for number in 0..2000 {
            for object in &web {
                let mut object = object.clone();
                match &mut object {
                    Object::Service(service) => service.name.name = format!("s{number}").into(),
                    Object::EndpointSlice(slice) => {
                        slice.service = format!("s{number}").into();
                        slice.name.name = format!("a{number}").into();
                        cluster.upsert(Object::EndpointSlice(slice.clone()));
                        slice.name.name = format!("b{number}").into();
                    }
                    _ => continue,
                }
                cluster.upsert(object);
            }
        }
        assert!(saved(&path, &cluster).await > 3);
        let found = read(&path).unwrap().unwrap();
        assert_eq!(found.objects.len(), 6004);
        assert_eq!(found.objects, cluster.objects().collect::<Vec<_>>());
    }

    /// D2 D5
    #[tokio::test]
    async fn a_damaged_line_takes_its_object_alone_and_another_version_is_said() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("cluster.jsonl");
        saved(&path, &cluster()).await;
        let mut lines = fs::read_to_string(&path).unwrap();
        lines.push_str("{\"Node\":");
        fs::write(&path, &lines).unwrap();
        assert_eq!(read(&path).unwrap().unwrap().objects.len(), 4);
        fs::write(&path, lines.replace("\"version\":1", "\"version\":9")).unwrap();
        let error = format!("{:#}", read(&path).unwrap_err());
        assert!(error.contains("is of version 9; 1 is understood"), "{error}");
    }
}
