//! The lab's own servers and clients (see [`crate::talk`]) for pods, with busybox beside them.

use std::path::Path;

use anyhow::Result;

use super::oci::Image;
use super::root::Root;
use super::web::BUSYBOX;

/// The image's name.
pub const NAME: &str = "localhost/talk:lab";

/// What runs by default: a server over TCP and UDP that says its pod's name.
const SERVE: &str = "exec sluice-lab talk-serve $(busybox hostname) 8080";

/// The image with the binaries in `folder`, as an archive.
///
/// # Errors
/// One is missing, or there is no busybox here.
pub fn archive(folder: &Path) -> Result<Vec<u8>> {
    let mut root = Root::default();
    root.program(&folder.join("sluice-lab"), "/bin/sluice-lab")?;
    root.program(Path::new(BUSYBOX), BUSYBOX)?;
    root.folder("/tmp");
    let image = Image {
        name: NAME.to_owned(),
        command: [BUSYBOX, "sh", "-c", SERVE].map(str::to_owned).into(),
        environment: vec!["PATH=/bin".to_owned()],
        entries: root.entries(),
    };
    Ok(image.archive())
}
