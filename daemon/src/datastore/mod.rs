//! Where desired state comes from. Nothing else in the daemon reads files, etcd or an API server for it.
//!
//! A datastore sends [`Event`]s into a bounded channel: first its whole content, then [`Event::Loaded`], then changes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::sync::mpsc;

use self::etcd::Members;
use self::kubernetes::Servers;
use crate::config::{Config, DatastoreKind};
use crate::state::objects::{Kind, Object, ObjectName};

pub mod etcd;
mod keeper;
mod kept;
pub mod kubernetes;
pub mod manifests;
pub mod wire;

/// How long the first list of a remote datastore may take before the state last known is served.
const GRACE: Duration = Duration::from_secs(5);

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
    /// What pods on this node must wait for before they are wired, beside what the objects say; nothing any more.
    Await(Option<String>),
}

/// A datastore, not yet asked.
#[derive(Clone)]
pub enum Source {
    /// The cluster's API servers.
    Kubernetes(Servers),
    /// An etcd of one's own, which this node registers in.
    Etcd(Members, Box<Config>),
    /// A folder of Kubernetes YAML.
    Manifests(PathBuf),
}

impl Source {
    /// The one that `config` names.
    pub fn of(config: &Config) -> Self {
        let datastore = &config.datastore;
        match datastore.kind {
            DatastoreKind::Kubernetes => Self::Kubernetes(Servers::new(datastore.kubernetes.clone())),
            DatastoreKind::Etcd => Self::Etcd(Members::new(datastore.etcd.clone()), Box::new(config.clone())),
            DatastoreKind::Manifests => Self::Manifests(datastore.manifests.directory.clone()),
        }
    }

    /// Sends what it says into `events`, until the receiver is gone.
    ///
    /// # Errors
    /// It can never be asked on this host.
    pub async fn run(self, events: mpsc::Sender<Event>) -> Result<()> {
        match self {
            Self::Kubernetes(servers) => kubernetes::run(servers, events).await,
            Self::Etcd(members, config) => etcd::run(members, *config, events)
                .await
                .context("following etcd"),
            Self::Manifests(directory) => manifests::run(directory, events)
                .await
                .context("watching the manifests"),
        }
    }

    /// Whether it can be out of reach at the start, so that what it said last is to be remembered.
    pub fn is_remote(&self) -> bool {
        matches!(self, Self::Kubernetes(_) | Self::Etcd(..))
    }

    /// Whether what is known is what it says, as far as can be told.
    pub fn is_in_reach(&self) -> bool {
        match self {
            Self::Kubernetes(servers) => servers.answering().is_some(),
            Self::Etcd(members, _) => members.answering().is_some(),
            Self::Manifests(_) => true,
        }
    }

    /// What it is and where, for people.
    pub fn describe(&self) -> String {
        match self {
            Self::Kubernetes(servers) => match servers.answering() {
                Some(server) => format!(
                    "Kubernetes at {}",
                    server.authority().map_or("", |host| host.as_str())
                ),
                None => "Kubernetes, which does not answer".to_owned(),
            },
            Self::Etcd(members, _) => match members.answering() {
                Some(member) => format!("etcd at {member}"),
                None => "etcd, of which no member answers".to_owned(),
            },
            Self::Manifests(directory) => format!("manifests in {}", directory.display()),
        }
    }
}
