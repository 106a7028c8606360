//! An OCI image made from the machine's own static busybox: no registry is asked.
//!
//! One layer with busybox and a web server's folder; its default command serves the container's name, as the lab's pods
//! do. Pure but for reading busybox.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// The image's name. The host part keeps runtimes from looking for it anywhere.
pub const NAME: &str = "localhost/busybox:lab";

/// The port the default command serves on.
pub const PORT: u16 = 8080;

const BUSYBOX: &str = "/bin/busybox";
const BLOCK: usize = 512;

/// What a container answers: `NAME` of its environment, else its host name.
const INDEX: &str = "#!/bin/busybox sh\n\
    printf 'Content-type: text/plain\\r\\n\\r\\n%s\\n' \"${NAME:-$(busybox hostname)}\"\n";
const SOURCE: &str = "#!/bin/busybox sh\n\
    printf 'Content-type: text/plain\\r\\n\\r\\n%s\\n' \"$REMOTE_ADDR\"\n";

/// The image as an archive that `ctr image import` and `podman load` take.
///
/// # Errors
/// There is no busybox here.
pub fn archive() -> Result<Vec<u8>> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("reading {BUSYBOX} (package busybox-static)"))?;
    let mut layer = Tar::default();
    for folder in ["bin/", "tmp/", "www/", "www/cgi-bin/"] {
        layer.folder(folder);
    }
    layer.file("bin/busybox", &busybox);
    // The root may be read-only, so nothing is left to be written at the start.
    layer.file("www/cgi-bin/index.cgi", INDEX.as_bytes());
    layer.file("www/cgi-bin/source", SOURCE.as_bytes());
    let layer = layer.end();
    let command = [BUSYBOX, "httpd", "-f", "-p", &PORT.to_string(), "-h", "/www"];
    let config = json!({
        "architecture": architecture(),
        "os": "linux",
        "config": { "Cmd": command, "Env": ["PATH=/bin"] },
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
    listed["annotations"] =
        json!({ "io.containerd.image.name": NAME, "org.opencontainers.image.ref.name": "lab" });
    let index = json!({ "schemaVersion": 2, "manifests": [listed] });

    let mut archive = Tar::default();
    archive.file("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
    archive.file("index.json", index.to_string().as_bytes());
    for blob in [&config, &manifest, &layer] {
        let name = Path::new("blobs").join(digest(blob).replace(':', "/"));
        archive.file(&name.to_string_lossy(), blob);
    }
    Ok(archive.end())
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

/// A tar archive in the making, in the ustar format.
#[derive(Default)]
struct Tar(Vec<u8>);

impl Tar {
    fn folder(&mut self, name: &str) {
        self.header(name, 0, b'5');
    }

    fn file(&mut self, name: &str, content: &[u8]) {
        self.header(name, content.len(), b'0');
        self.0.extend_from_slice(content);
        self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
    }

    fn header(&mut self, name: &str, size: usize, kind: u8) {
        let mut header = [0; BLOCK];
        let mut put = |at: usize, bytes: &[u8]| header[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, name.as_bytes());
        put(100, b"0000755\0");
        put(108, b"0000000\0");
        put(116, b"0000000\0");
        put(124, format!("{size:011o}\0").as_bytes());
        put(136, b"00000000000\0");
        put(156, &[kind]);
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
