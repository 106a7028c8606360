//! An image made from the machine's own static busybox: no registry is asked.
//!
//! One layer with busybox and a web server's folder; its default command serves the container's name, as the lab's pods do.

use std::fs;

use anyhow::{Context, Result};

use super::oci::{Entry, Image};

/// The image's name. The host part keeps runtimes from looking for it anywhere.
pub const NAME: &str = "localhost/busybox:lab";

/// What a sandbox is kept by, where nothing else is in it.
pub const PAUSE: &str = "localhost/pause:lab";

/// The port the default command serves on.
pub const PORT: u16 = 8080;

/// Where it is on this machine, and in images.
pub(super) const BUSYBOX: &str = "/bin/busybox";

/// What a container answers: `NAME` of its environment, else its host name.
const INDEX: &str = "#!/bin/busybox sh\n\
    printf 'Content-type: text/plain\\r\\n\\r\\n%s\\n' \"${NAME:-$(busybox hostname)}\"\n";
const SOURCE: &str = "#!/bin/busybox sh\n\
    printf 'Content-type: text/plain\\r\\n\\r\\n%s\\n' \"$REMOTE_ADDR\"\n";

/// The image as an archive.
///
/// # Errors
/// There is no busybox here.
pub fn archive() -> Result<Vec<u8>> {
    let command = ["httpd", "-f", "-p", &PORT.to_string(), "-h", "/www"].map(str::to_owned);
    image(NAME, &command)
}

/// The image of [`PAUSE`] as an archive.
///
/// # Errors
/// There is no busybox here.
pub fn pause_archive() -> Result<Vec<u8>> {
    image(PAUSE, &["sleep", "inf"].map(str::to_owned))
}

fn image(name: &str, applet: &[String]) -> Result<Vec<u8>> {
    let busybox = fs::read(BUSYBOX).with_context(|| format!("reading {BUSYBOX} (package busybox-static)"))?;
    let folders = ["bin/", "tmp/", "www/", "www/cgi-bin/"].map(|name| Entry::Folder(name.to_owned()));
    let files = [
        Entry::File("bin/busybox".to_owned(), busybox),
        // The root may be read-only, so nothing is left to be written at the start.
        Entry::File("www/cgi-bin/index.cgi".to_owned(), INDEX.as_bytes().to_vec()),
        Entry::File("www/cgi-bin/source".to_owned(), SOURCE.as_bytes().to_vec()),
    ];
    let image = Image {
        name: name.to_owned(),
        command: [&[BUSYBOX.to_owned()], applet].concat(),
        environment: vec!["PATH=/bin".to_owned()],
        entries: folders.into_iter().chain(files).collect(),
    };
    Ok(image.archive())
}
