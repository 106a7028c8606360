//! The objects in a lab's datastore, as a `kubectl` that works with each of them.
//!
//! What objects mean is the daemons' business: here a document only has to be YAML with a kind and a name.

use std::fs;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::options::Datastore;
use crate::state::Record;
use crate::{api, etcd, manifests};

/// Which object.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, serde::Serialize)]
pub struct Id {
    /// As it is written.
    pub kind: String,
    /// `default` where none is written.
    pub namespace: String,
    /// Its name.
    pub name: String,
}

/// One document.
#[derive(Debug, Clone, Deserialize, serde::Serialize)]
pub struct Item {
    /// What it is of.
    pub id: Id,
    /// All of it.
    pub text: String,
}

impl Item {
    /// What people call it.
    #[must_use]
    pub fn shown(&self) -> String {
        format!("{}/{}", self.id.kind.to_ascii_lowercase(), self.id.name)
    }
}

#[derive(Deserialize)]
struct Head {
    #[serde(default)]
    kind: String,
    #[serde(default)]
    metadata: Metadata,
}

#[derive(Default, Deserialize)]
struct Metadata {
    #[serde(default)]
    name: String,
    namespace: Option<String>,
}

/// Applies a file (`-`: standard input) and says what it did, a line per object.
///
/// # Errors
/// Not YAML, with file and line, and nothing of the file is applied then; or the datastore's.
pub fn apply_file(lab: &str, path: &Path) -> Result<Vec<String>> {
    let (text, shown) = read(path)?;
    apply_text(lab, &text, &shown)
}

/// Applies a stream of documents; `source` is what errors call it.
///
/// # Errors
/// As [`apply_file`].
pub fn apply_text(lab: &str, text: &str, source: &str) -> Result<Vec<String>> {
    let items = split(text, source)?;
    let record = Record::load(lab)?;
    match record.options.datastore {
        Datastore::Manifests => manifests::apply(lab, &items),
        Datastore::Kubernetes => api::apply(&record, &items),
        Datastore::Etcd => etcd::apply(&record, &items),
    }
}

/// Removes the objects a file names and says what it did. An object that is not there is said, not an error.
///
/// # Errors
/// As [`apply_file`].
pub fn delete_file(lab: &str, path: &Path) -> Result<Vec<String>> {
    let (text, shown) = read(path)?;
    delete_text(lab, &text, &shown)
}

/// Removes the objects of a stream of documents; `source` is what errors call it.
///
/// # Errors
/// As [`apply_file`].
pub fn delete_text(lab: &str, text: &str, source: &str) -> Result<Vec<String>> {
    let items = split(text, source)?;
    let ids: Vec<Id> = items.iter().map(|item| item.id.clone()).collect();
    let found = delete_all(lab, &ids)?;
    let said = items.iter().zip(found).map(|(item, was_there)| {
        let verb = if was_there { "deleted" } else { "not found" };
        format!("{} {verb}", item.shown())
    });
    Ok(said.collect())
}

/// Removes one object; says whether it was there.
///
/// # Errors
/// The datastore's.
pub fn delete(lab: &str, kind: &str, namespace: &str, name: &str) -> Result<bool> {
    let id = Id {
        kind: kind.to_owned(),
        namespace: namespace.to_owned(),
        name: name.to_owned(),
    };
    Ok(delete_all(lab, &[id])?.contains(&true))
}

fn delete_all(lab: &str, ids: &[Id]) -> Result<Vec<bool>> {
    let record = Record::load(lab)?;
    match record.options.datastore {
        Datastore::Manifests => ids.iter().map(|id| manifests::remove(lab, id)).collect(),
        Datastore::Kubernetes => api::delete(&record, ids),
        Datastore::Etcd => etcd::delete(&record, ids),
    }
}

fn read(path: &Path) -> Result<(String, String)> {
    if path == Path::new("-") {
        let mut text = String::new();
        io::stdin()
            .read_to_string(&mut text)
            .context("reading standard input")?;
        return Ok((text, "standard input".to_owned()));
    }
    let text = fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok((text, path.display().to_string()))
}

/// Splits a stream into its documents; all of them are looked at before any is used.
fn split(text: &str, source: &str) -> Result<Vec<Item>> {
    let mut items = Vec::new();
    let mut lines = Vec::new();
    let mut first = 1;
    for (number, line) in text.lines().enumerate() {
        if line == "---" || line.starts_with("--- ") {
            items.extend(item(&lines, first, source)?);
            lines.clear();
            first = number + 2;
        } else {
            lines.push(line);
        }
    }
    items.extend(item(&lines, first, source)?);
    if items.is_empty() {
        bail!("{source}: there is no object in it");
    }
    Ok(items)
}

fn item(lines: &[&str], first: usize, source: &str) -> Result<Option<Item>> {
    let is_blank = |line: &&str| line.trim().is_empty() || line.trim_start().starts_with('#');
    if lines.iter().all(is_blank) {
        return Ok(None);
    }
    let tab = |line: &&str| line.trim_start_matches(' ').starts_with('\t');
    if let Some(offset) = lines.iter().position(|line| tab(line) && !line.trim().is_empty()) {
        bail!(
            "{source}: line {}: a tab is used for indentation; YAML wants spaces",
            first + offset
        );
    }
    let text = lines.join("\n") + "\n";
    let head: Head = serde_saphyr::from_str(&text).map_err(|error| {
        let error = error.without_snippet();
        let line = error.location().map_or(first, |place| {
            first + usize::try_from(place.line()).unwrap_or(1) - 1
        });
        let said = error.to_string();
        let said = said.lines().next().unwrap_or("not YAML");
        // The place within the document, which is said already, as one within the file.
        let said = said.split(" at line ").next().unwrap_or(said);
        anyhow!("{source}: line {line}: {said}")
    })?;
    let namespace = head.metadata.namespace.unwrap_or_else(|| "default".to_owned());
    for (field, value) in [
        ("kind", &head.kind),
        ("metadata.name", &head.metadata.name),
        ("metadata.namespace", &namespace),
    ] {
        if value.is_empty() {
            bail!("{source}: line {first}: the object from here on has no {field}");
        }
        let is_safe = value
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'.');
        if !is_safe {
            bail!("{source}: line {first}: {field} is {value:?}; letters, digits, '-' and '.' are wanted");
        }
    }
    Ok(Some(Item {
        id: Id {
            kind: head.kind,
            namespace,
            name: head.metadata.name,
        },
        text,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_becomes_its_documents() {
        let text = "# head\n---\nkind: Service\nmetadata: {name: a}\n---\nkind: Node\nmetadata:\n  name: n\n";
        let items = split(text, "x.yaml").unwrap();
        let shown: Vec<_> = items.iter().map(Item::shown).collect();
        assert_eq!(shown, ["service/a", "node/n"]);
        assert_eq!(items[0].id.namespace, "default");
    }

    /// D4
    #[test]
    fn what_is_not_understood_is_refused_with_file_and_line() {
        for (text, wanted) in [
            ("kind: A\nmetadata:\n\tname: a\n", "x.yaml: line 3: a tab"),
            ("kind: A\n---\nkind: [\n", "x.yaml: line"),
            (
                "---\nkind: A\n",
                "line 2: the object from here on has no metadata.name",
            ),
            (
                "kind: A\nmetadata: {name: ../../x}\n",
                "metadata.name is \"../../x\"",
            ),
            ("\n# nothing\n", "no object"),
        ] {
            let error = format!("{:#}", split(text, "x.yaml").unwrap_err());
            assert!(
                error.contains(wanted),
                "{text:?} gave {error:?}, wanted {wanted:?}"
            );
        }
    }
}
