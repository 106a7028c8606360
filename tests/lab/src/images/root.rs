//! What will be an image's root: files copied from this machine, the libraries that programs among them are linked with, folders, links.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::oci::Entry;

/// An image's root in the making; all paths are absolute.
#[derive(Debug, Default)]
pub struct Root {
    files: BTreeMap<PathBuf, Vec<u8>>,
    links: BTreeMap<PathBuf, String>,
    folders: BTreeSet<PathBuf>,
}

impl Root {
    /// Puts a copy of `from` at `at`.
    ///
    /// # Errors
    /// It cannot be read.
    pub fn copy(&mut self, from: &Path, at: impl Into<PathBuf>) -> Result<()> {
        let content = fs::read(from).with_context(|| format!("reading {}", from.display()))?;
        self.files.insert(at.into(), content);
        Ok(())
    }

    /// Puts a copy of the program `from` at `at`, and with it the libraries that it is linked with, the loader among them, at the paths
    /// where it looks for them.
    ///
    /// # Errors
    /// It or one of them is missing.
    pub fn program(&mut self, from: &Path, at: impl Into<PathBuf>) -> Result<()> {
        self.copy(from, at)?;
        for library in libraries(from)? {
            // What is a link on this machine is a file in the image.
            self.copy(&library, &library)?;
        }
        Ok(())
    }

    /// Has `at` lead to `target`.
    pub fn link(&mut self, at: impl Into<PathBuf>, target: &str) {
        self.links.insert(at.into(), target.to_owned());
    }

    /// Makes an empty folder.
    pub fn folder(&mut self, at: impl Into<PathBuf>) {
        self.folders.insert(at.into());
    }

    /// All of it, folders before what is in them, in an order that depends on nothing else.
    #[must_use]
    pub fn entries(mut self) -> Vec<Entry> {
        let parents = self.files.keys().chain(self.links.keys());
        self.folders
            .extend(parents.filter_map(|path| path.parent().map(Path::to_path_buf)));
        let folders: BTreeSet<&Path> = self
            .folders
            .iter()
            .flat_map(|folder| folder.ancestors())
            .collect();
        let bare = |path: &Path| path.to_string_lossy().trim_start_matches('/').to_owned();
        let mut entries: Vec<Entry> = folders
            .into_iter()
            .filter(|folder| *folder != Path::new("/"))
            .map(|folder| Entry::Folder(bare(folder) + "/"))
            .collect();
        entries.extend(
            self.files
                .into_iter()
                .map(|(path, content)| Entry::File(bare(&path), content)),
        );
        entries.extend(
            self.links
                .into_iter()
                .map(|(path, target)| Entry::Link(bare(&path), target)),
        );
        entries
    }
}

/// The libraries that a program is linked with; none if it is static.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let output = Command::new("ldd").arg(program).output().context("running ldd")?;
    let listed = String::from_utf8_lossy(&output.stdout);
    let mut found = Vec::new();
    for line in listed.lines() {
        if line.contains("not found") {
            bail!("{}: {}", program.display(), line.trim());
        }
        let words: Vec<&str> = line.split_whitespace().collect();
        if let [_, "=>", path, _] | [path, _] = words[..]
            && path.starts_with('/')
        {
            found.push(PathBuf::from(path));
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_program_comes_with_its_libraries_and_folders_come_first() {
        let mut root = Root::default();
        root.program(Path::new("/bin/sh"), "/usr/bin/sh").unwrap();
        root.link("/var/run", "/run");
        root.folder("/run");
        let entries = root.entries();
        let names: Vec<&str> = entries
            .iter()
            .map(|entry| match entry {
                Entry::Folder(name) | Entry::File(name, _) | Entry::Link(name, _) => name.as_str(),
            })
            .collect();
        let place = |name: &str| names.iter().position(|found| *found == name);
        assert!(place("usr/") < place("usr/bin/") && place("usr/bin/") < place("usr/bin/sh"));
        assert!(place("var/").is_some() && place("run/").is_some() && place("var/run").is_some());
        assert!(names.iter().any(|name| name.contains("libc.so")), "{names:?}");
    }
}
