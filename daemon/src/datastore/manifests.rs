//! A folder of Kubernetes YAML as a datastore: watched, file by file.
//!
//! A file that is not understood is reported, and what it said before stands. So is a second file that describes an
//! object which another already does: the first by name is served.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use super::Event;
use super::wire::{self, Document};
use crate::state::objects::{Kind, Object, ObjectName};
use crate::watch::FolderWatch;
use crate::yaml;

/// How long a change is left to settle: an editor's or copier's several writes are read as one.
const SETTLE: Duration = Duration::from_millis(30);

/// A file larger than this is not read: no hand-written manifest is.
const LARGEST_FILE: u64 = 64 << 20;

/// Watches `directory` and sends what it says into `events`, until the receiver is gone.
///
/// # Errors
/// The kernel will not watch the folder. A folder that is not there is no error: it is waited for.
pub async fn run(directory: PathBuf, events: mpsc::Sender<Event>) -> anyhow::Result<()> {
    let mut watch = FolderWatch::new(&directory, SETTLE)?;
    let mut folder = Folder::new(directory);
    loop {
        watch.begin();
        for event in folder.scan() {
            if events.send(event).await.is_err() {
                return Ok(());
            }
        }
        watch.changed().await;
    }
}

/// The folder as it was last read.
#[derive(Debug)]
struct Folder {
    directory: PathBuf,
    files: BTreeMap<PathBuf, File>,
    served: BTreeMap<(Kind, ObjectName), Arc<Object>>,
    /// Objects that more than one file describes, and why only one of them is served.
    doubles: BTreeMap<String, String>,
    /// What was last told to be wrong.
    problems: BTreeMap<String, String>,
    loaded: bool,
}

#[derive(Debug, Clone)]
struct File {
    signature: Signature,
    objects: Vec<Arc<Object>>,
    problems: Vec<String>,
}

/// Changes whenever a file's content may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Signature {
    inode: u64,
    size: u64,
    modified: (i64, i64),
}

impl Folder {
    fn new(directory: PathBuf) -> Self {
        Self {
            directory,
            files: BTreeMap::new(),
            served: BTreeMap::new(),
            doubles: BTreeMap::new(),
            problems: BTreeMap::new(),
            loaded: false,
        }
    }

    /// Reads what changed since the last scan.
    fn scan(&mut self) -> Vec<Event> {
        let mut events = Vec::new();
        let mut problems = BTreeMap::new();
        match self.read_changed_files() {
            Err(error) => {
                let shown = self.directory.display().to_string();
                let reason = format!("reading the folder: {error}; what it said before stands");
                problems.insert(shown, reason);
            }
            Ok(changed) => {
                if changed {
                    events.extend(self.serve());
                }
                if !self.loaded {
                    self.loaded = true;
                    events.push(Event::Loaded);
                }
            }
        }
        problems.extend(self.doubles.clone());
        for (path, file) in &self.files {
            if !file.problems.is_empty() {
                problems.insert(path.display().to_string(), file.problems.join("; "));
            }
        }
        if problems != self.problems {
            self.problems.clone_from(&problems);
            events.push(Event::Problems(problems));
        }
        events
    }

    /// Says whether there was any.
    fn read_changed_files(&mut self) -> io::Result<bool> {
        let mut changed = false;
        let mut present = BTreeSet::new();
        for entry in fs::read_dir(&self.directory)? {
            let path = entry?.path();
            let hidden = path
                .file_name()
                .is_none_or(|name| name.as_encoded_bytes().starts_with(b"."));
            let manifest = path
                .extension()
                .is_some_and(|end| end == "yaml" || end == "yml" || end == "json");
            if hidden || !manifest {
                continue;
            }
            // Followed, not lstat'ed: a mounted ConfigMap is a folder of links. Gone meanwhile: like never there.
            let Ok(metadata) = fs::metadata(&path) else {
                continue;
            };
            if !metadata.is_file() {
                continue;
            }
            let signature = Signature {
                inode: metadata.ino(),
                size: metadata.size(),
                modified: (metadata.mtime(), metadata.mtime_nsec()),
            };
            present.insert(path.clone());
            let old = self.files.get(&path);
            if old.is_none_or(|file| file.signature != signature) {
                let before = old.map(|file| file.objects.clone()).unwrap_or_default();
                self.files.insert(path.clone(), read(&path, signature, before));
                changed = true;
            }
        }
        let before = self.files.len();
        self.files.retain(|path, _| present.contains(path));
        Ok(changed || self.files.len() != before)
    }

    /// Brings what is served in line with the files.
    fn serve(&mut self) -> Vec<Event> {
        self.doubles.clear();
        let mut wanted: BTreeMap<(Kind, ObjectName), (&Path, &Arc<Object>)> = BTreeMap::new();
        for (path, file) in &self.files {
            for object in &file.objects {
                let id = object.id();
                if let Some((first, _)) = wanted.get(&id) {
                    let reason = format!(
                        "{} {} is described in {} too; that one is served",
                        id.0,
                        id.1,
                        first.display()
                    );
                    self.doubles
                        .insert(format!("{} {} in {}", id.0, id.1, path.display()), reason);
                } else {
                    wanted.insert(id, (path, object));
                }
            }
        }
        let mut events = Vec::new();
        for (id, (_, object)) in &wanted {
            if self.served.get(id) != Some(object) {
                events.push(Event::Upsert(Object::clone(object)));
            }
        }
        for (kind, name) in self.served.keys() {
            if !wanted.contains_key(&(*kind, name.clone())) {
                events.push(Event::Remove(*kind, name.clone()));
            }
        }
        self.served = wanted
            .into_iter()
            .map(|(id, (_, object))| (id, Arc::clone(object)))
            .collect();
        events
    }
}

/// Reads one file; of what is not understood, `before` stands.
fn read(path: &Path, signature: Signature, before: Vec<Arc<Object>>) -> File {
    let keep = |problem: String| File {
        signature,
        objects: before.clone(),
        problems: vec![problem],
    };
    if signature.size > LARGEST_FILE {
        return keep(format!(
            "is {} bytes long; {LARGEST_FILE} are read at most",
            signature.size
        ));
    }
    let text = match fs::read(path).map(String::from_utf8) {
        Ok(Ok(text)) => text,
        Ok(Err(error)) => return keep(format!("is not UTF-8 text: {error}; what it said before stands")),
        Err(error) => return keep(format!("reading: {error}; what it said before stands")),
    };
    if text.is_empty() {
        // A writer truncates before it writes; and whoever means "nothing" removes the file.
        return keep(
            "is empty; what it said before stands, remove the file to remove its objects".to_owned(),
        );
    }
    let mut objects: Vec<Arc<Object>> = Vec::new();
    let (mut problems, mut refused) = (Vec::new(), false);
    for document in yaml::documents(&text) {
        match wire::parse(document.text) {
            Ok(Document::Objects {
                objects: found,
                passed_over,
            }) => {
                objects.extend(found.into_iter().map(Arc::new));
                problems.extend(passed_over);
            }
            Ok(Document::Other) => {}
            Err(error) => {
                refused = true;
                let error = error.after(document.lines_before);
                problems.push(format!("{error}; what it said before stands"));
            }
        }
    }
    if refused {
        let restated: BTreeSet<_> = objects.iter().map(|object| object.id()).collect();
        objects.extend(
            before
                .into_iter()
                .filter(|object| !restated.contains(&object.id())),
        );
    }
    File {
        signature,
        objects,
        problems,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn service(name: &str, port: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Service\nmetadata: {{name: {name}}}\nspec:\n  ports: [{{port: {port}}}]\n"
        )
    }

    fn upserts(events: &[Event]) -> Vec<String> {
        let name = |event: &Event| match event {
            Event::Upsert(object) => Some(object.id().1.to_string()),
            _ => None,
        };
        events.iter().filter_map(name).collect()
    }

    fn problem(events: &[Event]) -> String {
        let Some(Event::Problems(problems)) = events.last() else {
            panic!("no problem in {events:?}")
        };
        problems
            .iter()
            .map(|(path, reason)| format!("{path}: {reason}\n"))
            .collect()
    }

    /// D4
    #[test]
    fn files_come_change_and_go() {
        let directory = tempfile::tempdir().unwrap();
        let write = |file: &str, text: &str| fs::write(directory.path().join(file), text).unwrap();
        let mut folder = Folder::new(directory.path().to_owned());
        write(
            "a.yaml",
            &[service("one", "80"), service("two", "80")].join("---\n"),
        );
        let events = folder.scan();
        assert_eq!(upserts(&events), ["default/one", "default/two"]);
        assert_eq!(events.last(), Some(&Event::Loaded));
        assert!(folder.scan().is_empty(), "nothing changed");

        write(
            "a.yaml",
            &[service("one", "81"), service("two", "80")].join("---\n"),
        );
        assert_eq!(
            upserts(&folder.scan()),
            ["default/one"],
            "only what changed is told"
        );

        fs::rename(directory.path().join("a.yaml"), directory.path().join("b.yaml")).unwrap();
        assert!(folder.scan().is_empty(), "a renamed file says the same");

        fs::remove_file(directory.path().join("b.yaml")).unwrap();
        assert_eq!(folder.scan().len(), 2, "both are removed");
    }

    /// D4
    #[test]
    fn of_thousands_of_files_the_one_that_changed_is_told() {
        let directory = tempfile::tempdir().unwrap();
        let path = |number: usize| directory.path().join(format!("{number}.yaml"));
        let text = |number: usize, port: &str| {
            let names = [format!("a{number}"), format!("b{number}"), format!("c{number}")];
            names.map(|name| service(&name, port)).join("---\n")
        };
        for number in 0..3000 {
            fs::write(path(number), text(number, "80")).unwrap();
        }
        let mut folder = Folder::new(directory.path().to_owned());
        assert_eq!(upserts(&folder.scan()).len(), 9000);
        fs::write(path(1234), text(1234, "81")).unwrap();
        assert_eq!(
            upserts(&folder.scan()),
            ["default/a1234", "default/b1234", "default/c1234"]
        );
        // A writer that was cut off in the middle of a line: what the file said before stands.
        let half = &text(77, "80")[..70];
        fs::write(path(77), half).unwrap();
        let events = folder.scan();
        assert!(
            upserts(&events).is_empty() && problem(&events).contains("77.yaml"),
            "{events:?}"
        );
        for number in 0..3000 {
            fs::rename(
                path(number),
                directory.path().join(format!("renamed-{number}.yml")),
            )
            .unwrap();
        }
        fs::write(directory.path().join("renamed-77.yml"), text(77, "80")).unwrap();
        let events = folder.scan();
        assert!(
            matches!(&events[..], [Event::Problems(none)] if none.is_empty()),
            "{events:?}"
        );
    }

    /// D4, D5
    #[test]
    fn a_broken_file_is_reported_and_what_it_said_stands() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a.yaml");
        let mut folder = Folder::new(directory.path().to_owned());
        fs::write(&path, service("one", "80")).unwrap();
        folder.scan();
        for (text, wanted) in [
            (
                service("one", "80").replace("spec:", "sepc:"),
                "line 4: unknown key \"sepc\"; did you mean \"spec\"?",
            ),
            (
                service("one", "80").replace("  ports", "\tports"),
                "line 5: a tab",
            ),
            (
                service("one", "70000"),
                "Service default/one: spec.ports[0].port: 70000 is not a port",
            ),
            (
                service("one", "80").replace("kind: Service", "kind: Servcie"),
                "did you mean \"Service\"?",
            ),
            (String::new(), "is empty"),
        ] {
            fs::write(&path, text).unwrap();
            let events = folder.scan();
            assert_eq!(events.len(), 1, "nothing but the problem is told: {events:?}");
            let told = problem(&events);
            assert!(
                told.contains(wanted) && told.contains("a.yaml"),
                "{told:?} lacks {wanted:?}"
            );
        }
        fs::write(&path, service("one", "80")).unwrap();
        assert_eq!(problem(&folder.scan()), "", "and it is over once mended");
    }

    #[test]
    fn a_missing_folder_is_not_an_empty_one() {
        let mut folder = Folder::new(PathBuf::from("/nowhere/to/be/found"));
        let events = folder.scan();
        assert!(!events.contains(&Event::Loaded));
        assert!(problem(&events).contains("reading the folder"));
    }

    /// D5
    #[test]
    fn nonsense_in_one_object_leaves_its_neighbours_served() {
        let directory = tempfile::tempdir().unwrap();
        let mut folder = Folder::new(directory.path().to_owned());
        let text = [service("one", "80"), service("two", "0"), service("three", "80")].join("---\n");
        fs::write(directory.path().join("a.yaml"), text).unwrap();
        let events = folder.scan();
        assert_eq!(upserts(&events), ["default/one", "default/three"]);
        assert!(problem(&events).contains("default/two"));
    }

    #[test]
    fn of_two_descriptions_the_first_file_is_served() {
        let directory = tempfile::tempdir().unwrap();
        let mut folder = Folder::new(directory.path().to_owned());
        fs::write(directory.path().join("a.yaml"), service("one", "80")).unwrap();
        fs::write(directory.path().join("b.yaml"), service("one", "81")).unwrap();
        let events = folder.scan();
        assert_eq!(upserts(&events), ["default/one"]);
        assert!(problem(&events).contains("a.yaml too"), "{}", problem(&events));
    }
}
