//! Waiting for a folder to change. Says that something happened, never what: whoever waits reads the folder.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use notify::event::{AccessKind, AccessMode};
use notify::{EventKind, RecommendedWatcher, RecursiveMode, Watcher};
use tokio::sync::mpsc;

/// How often a folder is to be read even if the kernel says nothing (its notifications can overflow).
const RESCAN: Duration = Duration::from_secs(10);

/// How often a folder that cannot be watched, as it is not there, is looked for.
const RETRY: Duration = Duration::from_secs(1);

/// A folder being watched.
pub struct FolderWatch {
    directory: PathBuf,
    settle: Duration,
    watcher: RecommendedWatcher,
    woken: mpsc::Receiver<()>,
    /// The folder that is watched, which need no longer be the one of that name.
    watched: Option<Identity>,
}

/// Device and inode.
type Identity = (u64, u64);

impl FolderWatch {
    /// Is to watch `directory`. A change is left to settle for as long as `settle` says, so that several at once are
    /// one.
    ///
    /// # Errors
    /// The kernel has no notifications to give.
    pub fn new(directory: &Path, settle: Duration) -> notify::Result<Self> {
        let (wake, woken) = mpsc::channel::<()>(1);
        let watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            // Reading the folder is an event too: to answer it with reading would never end. A full channel means a
            // scan is due anyway.
            if !event.is_ok_and(|event| is_mere_reading(event.kind)) {
                let _ = wake.try_send(());
            }
        })?;
        Ok(Self {
            directory: directory.to_owned(),
            settle,
            watcher,
            woken,
            watched: None,
        })
    }

    /// Begins to watch, or to watch the folder that took the place of the one watched. To be called before every
    /// reading: what changes from then on is told by [`Self::changed`]. A folder that is not there is no error.
    pub fn begin(&mut self) {
        let there = identity(&self.directory);
        if self.watched == there {
            return;
        }
        self.watched = there.filter(|_| {
            self.watcher
                .watch(&self.directory, RecursiveMode::NonRecursive)
                .is_ok()
        });
    }

    /// Waits until the folder may have changed.
    pub async fn changed(&mut self) {
        let patience = if self.watched.is_some() { RESCAN } else { RETRY };
        if tokio::time::timeout(patience, self.woken.recv()).await.is_ok() {
            tokio::time::sleep(self.settle).await;
            while self.woken.try_recv().is_ok() {}
        }
    }
}

fn identity(directory: &Path) -> Option<Identity> {
    let metadata = fs::metadata(directory).ok()?;
    metadata.is_dir().then(|| (metadata.dev(), metadata.ino()))
}

/// Whether an event tells of somebody looking at a file, not changing it.
fn is_mere_reading(kind: EventKind) -> bool {
    matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn reading_the_folder_does_not_call_for_reading_it_again() {
        let directory = tempfile::tempdir().unwrap();
        let (heard, hears) = std::sync::mpsc::channel();
        let mut watcher = notify::recommended_watcher(move |event: notify::Result<notify::Event>| {
            heard.send(event.unwrap().kind).unwrap();
        })
        .unwrap();
        watcher
            .watch(directory.path(), RecursiveMode::NonRecursive)
            .unwrap();
        fs::read_dir(directory.path()).unwrap().count();
        fs::write(directory.path().join("a.yaml"), "text").unwrap();
        let kinds: Vec<_> = hears
            .iter()
            .take_while(|kind| *kind != EventKind::Access(AccessKind::Close(AccessMode::Write)))
            .collect();
        assert!(is_mere_reading(kinds[0]), "{kinds:?}");
        assert!(kinds.iter().any(|kind| !is_mere_reading(*kind)), "{kinds:?}");
    }
}
