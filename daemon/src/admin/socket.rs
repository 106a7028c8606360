//! The admin API: HTTP on a unix socket that root alone can open.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use super::report::Report;
use crate::private_socket;

/// A question to the daemon's owner task: answered with a report of the moment.
pub type Question = oneshot::Sender<Report>;

/// How long the owner task may take to answer before the asker is told so.
const PATIENCE: Duration = Duration::from_secs(10);

/// Serves `GET /v1/report` on a socket at `path`, until the process ends.
///
/// # Errors
/// The socket cannot be made, or another daemon listens on it.
pub async fn serve(path: &Path, questions: mpsc::Sender<Question>) -> anyhow::Result<()> {
    let listener = bind(path).with_context(|| format!("listening on {}", path.display()))?;
    let router = Router::new()
        .route("/v1/report", get(report))
        .with_state(questions);
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, "the admin socket ended");
        }
    });
    Ok(())
}

fn bind(path: &Path) -> io::Result<UnixListener> {
    let listener = private_socket::bind(path)?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

async fn report(
    State(questions): State<mpsc::Sender<Question>>,
) -> Result<Json<Report>, (StatusCode, &'static str)> {
    ask(&questions)
        .await
        .map(Json)
        .ok_or((StatusCode::SERVICE_UNAVAILABLE, "sluiced is busy; try again"))
}

/// Asks the owner task for a report; `None` if it does not answer in time.
pub async fn ask(questions: &mpsc::Sender<Question>) -> Option<Report> {
    let (answer, answered) = oneshot::channel();
    let asked = async {
        questions.send(answer).await.ok()?;
        answered.await.ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
}
