//! The admin API: HTTP on a unix socket that root alone can open.

use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use axum::{Json, Router};
use serde::Serialize;
use tokio::net::UnixListener;
use tokio::sync::{mpsc, oneshot};

use super::report::{Connection, Node, Route, Service, Status};
use crate::config::Config;
use crate::private_socket;

/// A question to the daemon's owner task, with the way back for its answer, which is of the moment.
pub enum Question {
    /// How the node is.
    Status(Answer<Status>),
    /// All nodes of the cluster.
    Nodes(Answer<Vec<Node>>),
    /// The ways to all pods, as the kernel has them.
    Routes(Answer<Result<Vec<Route>, String>>),
    /// All Services, as the kernel has them.
    Services(Answer<Result<Vec<Service>, String>>),
    /// All connections translated packet by packet.
    Connections(Answer<Result<Vec<Connection>, String>>),
    /// What the daemon goes by.
    Config(Answer<Config>),
}

/// The way back for an answer.
pub type Answer<T> = oneshot::Sender<T>;

/// How long the owner task may take to answer before the asker is told so.
const PATIENCE: Duration = Duration::from_secs(10);

type Questions = mpsc::Sender<Question>;

/// Serves `GET /v1/{status,nodes,routes,services,connections,config}` on a socket at `path`, until the process ends.
///
/// # Errors
/// The socket cannot be made, or another daemon listens on it.
pub async fn serve(path: &Path, questions: Questions) -> anyhow::Result<()> {
    let listener = bind(path).with_context(|| format!("listening on {}", path.display()))?;
    let router = Router::new()
        .route("/v1/status", get(|state| plain(state, Question::Status)))
        .route("/v1/nodes", get(|state| plain(state, Question::Nodes)))
        .route("/v1/routes", get(|state| read(state, Question::Routes)))
        .route("/v1/services", get(|state| read(state, Question::Services)))
        .route("/v1/connections", get(|state| read(state, Question::Connections)))
        .route("/v1/config", get(|state| plain(state, Question::Config)))
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

/// Answers what the owner task knows by itself.
async fn plain<T: Serialize>(
    State(questions): State<Questions>,
    question: fn(Answer<T>) -> Question,
) -> Result<Json<T>, (StatusCode, String)> {
    let busy = || {
        (
            StatusCode::SERVICE_UNAVAILABLE,
            "sluiced is busy; try again".to_owned(),
        )
    };
    ask(&questions, question).await.map(Json).ok_or_else(busy)
}

/// Answers what the kernel must be asked for.
async fn read<T: Serialize>(
    state: State<Questions>,
    question: fn(Answer<Result<T, String>>) -> Question,
) -> Result<Json<T>, (StatusCode, String)> {
    let Json(answer) = plain(state, question).await?;
    answer
        .map(Json)
        .map_err(|reason| (StatusCode::INTERNAL_SERVER_ERROR, reason))
}

/// Asks the owner task; `None` if it does not answer in time.
pub async fn ask<T>(questions: &Questions, question: fn(Answer<T>) -> Question) -> Option<T> {
    let (answer, answered) = oneshot::channel();
    let asked = async {
        questions.send(question(answer)).await.ok()?;
        answered.await.ok()
    };
    tokio::time::timeout(PATIENCE, asked).await.ok().flatten()
}
