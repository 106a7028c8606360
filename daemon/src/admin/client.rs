//! `sluicectl`'s side of the admin API.

use std::path::Path;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

/// Asks the daemon behind the socket at `path` for what `/v1/WHAT` says.
///
/// # Errors
/// The daemon does not run, or does not answer; the text says what to look at.
pub async fn get<T: DeserializeOwned>(path: &Path, what: &str) -> anyhow::Result<T> {
    let stream = UnixStream::connect(path).await.with_context(|| {
        format!(
            "connecting to sluiced at {}: is it running (as root: pgrep -a sluiced), and are you root?",
            path.display()
        )
    })?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .context("talking to sluiced")?;
    tokio::spawn(connection);
    let request = Request::get(format!("/v1/{what}"))
        .header("host", "sluiced")
        .body(Empty::<Bytes>::new())?;
    let response = sender
        .send_request(request)
        .await
        .with_context(|| format!("asking sluiced for its {what}"))?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .with_context(|| format!("reading sluiced's {what}"))?
        .to_bytes();
    if status != StatusCode::OK {
        bail!("sluiced answered {status}: {}", String::from_utf8_lossy(&body));
    }
    serde_json::from_slice(&body).with_context(|| {
        format!("sluiced's {what} are not as this sluicectl knows them; are the two of one version?")
    })
}
