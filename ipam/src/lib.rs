//! Address allocation for the pods of one node.
//!
//! The plugin allocates and frees; the daemon lists, counts and repairs. Both go through [`Store`], a directory on
//! tmpfs in which the kernel's own atomic steps (`link`, `rename`) keep an address from being given twice, whoever is
//! killed at whatever instant. This crate never touches the network and never asks anybody but that directory.
//!
//! ```text
//! lock                 flock, held through every change
//! owners/<id>@<ifname> one JSON file per attachment: its addresses, since when, its network namespace
//! held/<address>       hard link to the owner's file: `link` says EEXIST to a second owner
//! resting/<address>    a freed address; its mtime is the boot time at which its rest is over
//! cursor/<cidr>        symlink naming the last address given, so that allocation goes round
//! new                  an owner's file being written, before it has its name
//! ```
//! Giving: `new` is written, linked to `owners/…`, then to each `held/…`. Freeing: each `held/…` is renamed to
//! `resting/…`, then the owner is unlinked. So at every instant each held address has an owner that a later DEL or GC
//! finds, and freeing needs no space on a full disk.

mod attachment;
mod claim;
mod directory;
mod error;
mod pick;
mod pool;
mod record;
mod repair;
mod store;

use std::time::Duration;

pub use attachment::{Attachment, InvalidName};
pub use claim::Claim;
pub use directory::Lock;
pub use error::{Error, PoolUse};
pub use pool::Pool;
pub use record::{Allocation, Origin};
pub use repair::Mended;
pub use store::{Store, Usage};

/// How long a freed address rests by default: as long as the longest connection-tracking time-out that could still
/// point at it.
pub const DEFAULT_REST: Duration = Duration::from_secs(120);
