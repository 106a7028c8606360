//! CoreDNS, which is built with the rest of the cluster's programs.

use std::path::Path;

use anyhow::Result;

use super::oci::Image;
use super::root::Root;

/// The image's name, as tests/manifests/coredns.yaml has it.
pub const NAME: &str = "localhost/coredns:lab";

/// The image with this program, as an archive.
///
/// # Errors
/// It is not there.
pub fn archive(program: &Path) -> Result<Vec<u8>> {
    let mut root = Root::default();
    root.program(program, "/coredns")?;
    let image = Image {
        name: NAME.to_owned(),
        command: vec!["/coredns".to_owned()],
        entries: root.entries(),
        ..Image::default()
    };
    Ok(image.archive())
}
