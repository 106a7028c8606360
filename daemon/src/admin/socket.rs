//! The admin API: HTTP on a unix socket that root alone can open.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
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
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    if std::os::unix::net::UnixStream::connect(path).is_ok() {
        let reason = "another sluiced answers there, and two would undo each other's work; stop it first";
        return Err(io::Error::new(io::ErrorKind::AddrInUse, reason));
    }
    // Bound under another name and renamed: a killed predecessor's socket is in nobody's way, and nobody can connect
    // before the mode is set.
    let temporary = path.with_extension(format!("sock.{}", std::process::id()));
    let _ = fs::remove_file(&temporary);
    let listener = UnixListener::bind(&temporary)?;
    fs::set_permissions(&temporary, fs::Permissions::from_mode(0o600))?;
    fs::rename(&temporary, path)?;
    Ok(listener)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_dead_predecessors_socket_is_replaced_and_a_living_ones_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sluiced.sock");
        drop(bind(&path).unwrap());
        let living = bind(&path).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let refused = bind(&path).unwrap_err();
        assert!(
            refused.to_string().contains("another sluiced answers"),
            "{refused}"
        );
        drop(living);
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            1,
            "no temporary name is left"
        );
    }
}
