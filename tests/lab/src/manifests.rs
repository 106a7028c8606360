//! The lab's folder of Kubernetes YAML, one file per object, as a `kubectl` for clusters without an API server.
//!
//! Files appear and change by rename. What objects mean is the daemons' business: here a document only has to be YAML
//! with a kind and a name.

use std::fs;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use serde::Deserialize;

use crate::state;

/// One document and the file it goes to.
#[derive(Debug)]
struct Item {
    file: String,
    shown: String,
    text: String,
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
/// Not YAML, with file and line; nothing of the file is applied then.
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
    let mut done = Vec::new();
    for item in items {
        let path = state::manifests(lab).join(&item.file);
        let verb = match fs::read_to_string(&path) {
            Ok(old) if old == item.text => "unchanged",
            Ok(_) => "configured",
            Err(_) => "created",
        };
        state::write_by_rename(&path, &item.text)?;
        done.push(format!("{} {verb}", item.shown));
    }
    Ok(done)
}

/// Removes the objects a file names and says what it did. An object that is not there is said, not an error.
///
/// # Errors
/// As [`apply_file`].
pub fn delete_file(lab: &str, path: &Path) -> Result<Vec<String>> {
    let (text, shown) = read(path)?;
    let mut done = Vec::new();
    for item in split(&text, &shown)? {
        let was_there = remove(lab, &item.file)?;
        let verb = if was_there { "deleted" } else { "not found" };
        done.push(format!("{} {verb}", item.shown));
    }
    Ok(done)
}

/// Removes one object; says whether it was there.
///
/// # Errors
/// The file system's.
pub fn delete(lab: &str, kind: &str, namespace: &str, name: &str) -> Result<bool> {
    remove(lab, &file_name(kind, namespace, name))
}

/// Where an object lies on the machine.
#[must_use]
pub fn path(lab: &str, kind: &str, namespace: &str, name: &str) -> PathBuf {
    state::manifests(lab).join(file_name(kind, namespace, name))
}

fn remove(lab: &str, file: &str) -> Result<bool> {
    let path = state::manifests(lab).join(file);
    match fs::remove_file(&path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error).with_context(|| format!("removing {}", path.display())),
    }
}

fn file_name(kind: &str, namespace: &str, name: &str) -> String {
    let kind = kind.to_ascii_lowercase();
    // Cluster-wide kinds have no namespace.
    if kind == "node" {
        return format!("{kind}-{name}.yaml");
    }
    format!("{kind}-{namespace}-{name}.yaml")
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
        file: file_name(&head.kind, &namespace, &head.metadata.name),
        shown: format!("{}/{}", head.kind.to_ascii_lowercase(), head.metadata.name),
        text,
    }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_becomes_a_file_per_object() {
        let text = "# head\n---\nkind: Service\nmetadata: {name: a}\n---\nkind: Node\nmetadata:\n  name: n\n";
        let items = split(text, "x.yaml").unwrap();
        let files: Vec<_> = items.iter().map(|item| item.file.as_str()).collect();
        assert_eq!(files, ["service-default-a.yaml", "node-n.yaml"]);
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
