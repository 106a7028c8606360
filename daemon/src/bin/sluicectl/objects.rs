//! Objects in the datastore, where that is an etcd of one's own.

use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use serde_json::Value;
use sluice_daemon::config::{Config, DatastoreKind};
use sluice_daemon::datastore::etcd::Stored;
use sluice_daemon::datastore::etcd::objects::{Objects, kind_called};
use sluice_daemon::state::objects::ObjectName;

use crate::{runtime, say};

/// Where YAML is.
#[derive(Args)]
pub struct Files {
    /// Kubernetes YAML; `-` is standard input
    #[arg(short, long = "filename", value_name = "FILE", required = true, num_args = 1..)]
    files: Vec<PathBuf>,
}

/// Which objects are meant.
#[derive(Args)]
pub struct Which {
    /// nodes, services, endpointslices, endpoints or pods
    kind: String,
    /// The one of this name; else all
    name: Option<String>,
    /// Of this namespace; else of all, or of `default` where a name is given
    #[arg(short, long)]
    namespace: Option<String>,
}

/// Which objects are to go.
#[derive(Args)]
pub struct Doomed {
    /// Kubernetes YAML that names them; `-` is standard input
    #[arg(short, long = "filename", value_name = "FILE", num_args = 1.., conflicts_with_all = ["kind", "name"])]
    files: Vec<PathBuf>,
    /// node, service, endpointslice, endpoints or pod
    #[arg(required_unless_present = "files", requires = "name")]
    kind: Option<String>,
    /// Its name
    name: Option<String>,
    /// Its namespace
    #[arg(short, long, default_value = "default")]
    namespace: String,
}

/// Writes objects and says what that did.
pub fn apply(config: &Path, files: &Files) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(async {
        let mut objects = connect(config).await?;
        for file in &files.files {
            let (text, source) = read(file)?;
            for applied in objects.apply(&text, &source).await? {
                match applied.remark {
                    Some(remark) => say(&format!("{} {}: {remark}", applied.object, applied.what))?,
                    None => say(&format!("{} {}", applied.object, applied.what))?,
                }
            }
        }
        Ok(ExitCode::SUCCESS)
    })
}

/// Reads objects.
pub fn get(config: &Path, which: &Which) -> anyhow::Result<(Stored, Vec<Value>)> {
    let kind = kind_called(&which.kind)?;
    let (namespace, name) = (which.namespace.as_deref(), which.name.as_deref());
    let found = runtime()?.block_on(async { connect(config).await?.get(kind, namespace, name).await })?;
    if let (true, Some(name)) = (found.is_empty(), name) {
        bail!("there is no {} called {name}", kind.kind());
    }
    Ok((kind, found))
}

/// Removes objects and says which were there; that one was not is said by the exit status too.
pub fn delete(config: &Path, doomed: &Doomed) -> anyhow::Result<ExitCode> {
    let gone = runtime()?.block_on(async {
        let mut objects = connect(config).await?;
        let mut gone = Vec::new();
        for file in &doomed.files {
            let (text, source) = read(file)?;
            gone.extend(objects.delete_all(&text, &source).await?);
        }
        if let (Some(kind), Some(name)) = (&doomed.kind, &doomed.name) {
            let kind = kind_called(kind)?;
            let name = ObjectName::new(doomed.namespace.as_str(), name.as_str());
            let was_there = objects.delete(kind, &name).await?;
            let shown = format!("{}/{}", kind.kind().to_ascii_lowercase(), name.name);
            gone.push((shown, was_there));
        }
        anyhow::Ok(gone)
    })?;
    for (object, was_there) in &gone {
        say(&format!(
            "{object} {}",
            if *was_there { "deleted" } else { "not found" }
        ))?;
    }
    Ok(if gone.iter().all(|(_, was_there)| *was_there) {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

async fn connect(path: &Path) -> anyhow::Result<Objects> {
    let config = Config::load(path, |name| std::env::var(name).ok())?;
    match config.datastore.kind {
        DatastoreKind::Etcd => Objects::connect(&config.datastore.etcd).await,
        DatastoreKind::Kubernetes => bail!(
            "{}: datastore.kind is kubernetes; kubectl reads and writes objects there",
            path.display()
        ),
        DatastoreKind::Manifests => bail!(
            "{}: datastore.kind is manifests; objects are the files in {}",
            path.display(),
            config.datastore.manifests.directory.display()
        ),
    }
}

fn read(path: &Path) -> anyhow::Result<(String, String)> {
    if path == Path::new("-") {
        let mut text = String::new();
        std::io::stdin()
            .read_to_string(&mut text)
            .context("reading standard input")?;
        return Ok((text, "standard input".to_owned()));
    }
    let text = std::fs::read_to_string(path).with_context(|| format!("reading {}", path.display()))?;
    Ok((text, path.display().to_string()))
}
