//! `sluicectl`'s side of the admin API.

use std::path::Path;

use anyhow::{Context, bail};
use http_body_util::{BodyExt, Empty};
use hyper::body::Bytes;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;

use super::report::Report;

/// Asks the daemon behind the socket at `path` for a report.
///
/// # Errors
/// The daemon does not run, or does not answer; the text says what to look at.
pub async fn report(path: &Path) -> anyhow::Result<Report> {
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
    let request = Request::get("/v1/report")
        .header("host", "sluiced")
        .body(Empty::<Bytes>::new())?;
    let response = sender
        .send_request(request)
        .await
        .context("asking sluiced for its report")?;
    let status = response.status();
    let body = response
        .into_body()
        .collect()
        .await
        .context("reading sluiced's report")?
        .to_bytes();
    if status != StatusCode::OK {
        bail!("sluiced answered {status}: {}", String::from_utf8_lossy(&body));
    }
    serde_json::from_slice(&body)
        .context("sluiced's report is not as this sluicectl knows it; are the two of one version?")
}
