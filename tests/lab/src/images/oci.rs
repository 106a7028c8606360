//! OCI images as archives (OCI image layout, in tar), made without a container engine. The same content gives the same bytes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

const BLOCK: usize = 512;

/// An image of one layer.
#[derive(Debug, Default)]
pub struct Image {
    /// What runtimes call it.
    pub name: String,
    /// What runs by default.
    pub command: Vec<String>,
    /// Its environment, as `NAME=value`.
    pub environment: Vec<String>,
    /// What is in it; folders before what is in them.
    pub entries: Vec<Entry>,
}

/// A file of an image, by its path without a slash at its beginning.
#[derive(Debug)]
pub enum Entry {
    /// A folder; its path ends with a slash.
    Folder(String),
    /// A file that may be run.
    File(String, Vec<u8>),
    /// A link to another path.
    Link(String, String),
}

impl Image {
    /// Writes what is in it below `folder`, which is made if need be.
    ///
    /// # Errors
    /// The file system's, or something is there already.
    pub fn unpack(&self, folder: &Path) -> Result<()> {
        fs::create_dir_all(folder).with_context(|| format!("making {}", folder.display()))?;
        for entry in &self.entries {
            let (Entry::Folder(name) | Entry::File(name, _) | Entry::Link(name, _)) = entry;
            let path = folder.join(name);
            let written = match entry {
                Entry::Folder(_) => fs::create_dir(&path),
                Entry::File(_, content) => fs::write(&path, content)
                    .and_then(|()| fs::set_permissions(&path, fs::Permissions::from_mode(0o755))),
                Entry::Link(_, target) => symlink(target, &path),
            };
            written.with_context(|| format!("writing {}", path.display()))?;
        }
        Ok(())
    }

    /// The image as an archive that `ctr image import` and `podman load` take.
    #[must_use]
    pub fn archive(&self) -> Vec<u8> {
        let mut layer = Tar::default();
        for entry in &self.entries {
            layer.entry(entry);
        }
        let layer = layer.end();
        let config = json!({
            "architecture": architecture(),
            "os": "linux",
            "config": { "Cmd": self.command, "Env": self.environment },
            "rootfs": { "type": "layers", "diff_ids": [digest(&layer)] },
        });
        let config = config.to_string().into_bytes();
        let part = |kind: &str, bytes: &[u8]| {
            let media_type = format!("application/vnd.oci.image.{kind}");
            json!({ "mediaType": media_type, "digest": digest(bytes), "size": bytes.len() })
        };
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": part("config.v1+json", &config),
            "layers": [part("layer.v1.tar", &layer)],
        });
        let manifest = manifest.to_string().into_bytes();
        let mut listed = part("manifest.v1+json", &manifest);
        let (_, tag) = self.name.rsplit_once(':').unwrap_or(("", "latest"));
        listed["annotations"] =
            json!({ "io.containerd.image.name": self.name, "org.opencontainers.image.ref.name": tag });
        let index = json!({ "schemaVersion": 2, "manifests": [listed] });

        let mut archive = Tar::default();
        archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        archive.file("index.json", index.to_string().as_bytes());
        for blob in [&config, &manifest, &layer] {
            let name = Path::new("blobs").join(digest(blob).replace(':', "/"));
            archive.file(&name.to_string_lossy(), blob);
        }
        archive.end()
    }
}

/// What Go, and so the specification, calls this machine's kind.
fn architecture() -> Value {
    match std::env::consts::ARCH {
        "x86_64" => json!("amd64"),
        "aarch64" => json!("arm64"),
        other => json!(other),
    }
}

fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes)
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect();
    format!("sha256:{hex}")
}

/// A tar archive in the making, in the ustar format (POSIX.1-1988); all of it is root's and of 1970.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn entry(&mut self, entry: &Entry) {
        match entry {
            Entry::Folder(name) => self.header(name, 0, b'5', ""),
            Entry::File(name, content) => self.file(name, content),
            Entry::Link(name, target) => self.header(name, 0, b'2', target),
        }
    }

    fn file(&mut self, name: &str, content: &[u8]) {
        self.header(name, content.len(), b'0', "");
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
    }

    fn header(&mut self, name: &str, size: usize, kind: u8, target: &str) {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0000755\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, b"00000000000\0");
        put(156, &[kind]);
        put(157, target.as_bytes());
        put(257, b"ustar\x0000");
        // The sum counts its own place as blanks.
        put(148, b"        ");
        let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
        header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0.extend_from_slice(&header);
    }

    fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 2 * BLOCK, 0);
        self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_content_is_the_same_archive_and_tar_reads_it() {
        let image = || Image {
            name: "localhost/test:1".to_owned(),
            command: vec!["/bin/a".to_owned()],
            environment: Vec::new(),
            entries: vec![
                Entry::Folder("bin/".to_owned()),
                Entry::File("bin/a".to_owned(), b"content".to_vec()),
                Entry::Link("bin/b".to_owned(), "a".to_owned()),
            ],
        };
        let archive = image().archive();
        assert_eq!(archive, image().archive());
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        image().unpack(&root).unwrap();
        assert_eq!(fs::read(root.join("bin/b")).unwrap(), b"content");
        assert!(image().unpack(&root).is_err(), "nothing is written over");
        std::fs::write(folder.path().join("image.tar"), &archive).unwrap();
        // Of the blobs only the layer is a tar archive.
        let script =
            "tar xf image.tar && for blob in blobs/sha256/*; do tar xf $blob 2>/dev/null; done; cat bin/b";
        let output = std::process::Command::new("sh")
            .args(["-c", script])
            .current_dir(folder.path())
            .output()
            .unwrap();
        assert_eq!(output.stdout, b"content", "{output:?}");
    }
}
