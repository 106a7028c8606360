//! Where desired state comes from. Nothing else in the daemon reads files, etcd or an API server for it.
//!
//! A datastore sends [`Event`]s into a bounded channel: first its whole content, then [`Event::Loaded`], then changes.

use std::collections::BTreeMap;

use crate::state::objects::{Kind, Object, ObjectName};

pub mod manifests;
pub mod wire;

/// What a datastore tells.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// An object is there, new or changed.
    Upsert(Object),
    /// An object is gone.
    Remove(Kind, ObjectName),
    /// The first full list has been sent: from here on, what is not known does not exist.
    Loaded,
    /// Everything that is wrong with the content now, by where it stands; replaces what was said before.
    Problems(BTreeMap<String, String>),
}
