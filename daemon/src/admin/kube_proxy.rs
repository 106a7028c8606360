//! What those rely on who had kube-proxy before: its `/healthz`, which load balancers ask whether a node serves, its `/proxyMode`, and its
//! `/metrics`.
//!
//! Both are conveniences: where an address is taken, by a kube-proxy for one, that is told and the daemon goes on.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::routing::get;
use axum::{Json, Router};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::socket::{Question, ask};
use crate::config::Admin;
use crate::proxy::figures::Figures;

/// Serves both addresses until the process ends, those of them that are set.
pub async fn serve(addresses: &Admin, questions: mpsc::Sender<Question>, figures: Arc<Figures>) {
    let health = Router::new()
        .route("/healthz", get(healthz))
        .route("/livez", get(healthz));
    let mode = Router::new()
        .route("/proxyMode", get(proxy_mode))
        .route("/metrics", get(move || metrics(figures.clone())));
    listen(
        "admin.kubeProxyHealth",
        addresses.kube_proxy_health.get(),
        health,
        &questions,
    )
    .await;
    listen(
        "admin.kubeProxyMetrics",
        addresses.kube_proxy_metrics.get(),
        mode,
        &questions,
    )
    .await;
}

async fn listen(
    key: &'static str,
    address: Option<SocketAddr>,
    router: Router<mpsc::Sender<Question>>,
    questions: &mpsc::Sender<Question>,
) {
    let Some(address) = address else { return };
    let listener = match TcpListener::bind(address).await {
        // The host has no IPv6.
        Err(error) if error.raw_os_error() == Some(libc::EAFNOSUPPORT) && address.ip().is_unspecified() => {
            TcpListener::bind((Ipv4Addr::UNSPECIFIED, address.port())).await
        }
        bound => bound,
    };
    let listener = match listener {
        Ok(listener) => listener,
        Err(error) => {
            tracing::warn!(
                "listening on {address} ({key}), which was kube-proxy's: {error}; is kube-proxy at work here? An empty address leaves it to others"
            );
            return;
        }
    };
    let router = router.with_state(questions.clone());
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::error!(%error, key, "an admin listener ended");
        }
    });
}

/// Whether this node serves Services, in the shape of kube-proxy's answer (pkg/proxy/healthcheck/proxy_health.go).
async fn healthz(State(questions): State<mpsc::Sender<Question>>) -> (StatusCode, Json<Value>) {
    let status = ask(&questions, Question::Status).await;
    // The dataplane is named once all Services were programmed.
    let serves = status.is_some_and(|status| !status.proxy.mode.is_empty());
    let now = Timestamp::now().to_string();
    let answer = json!({"lastUpdated": now, "currentTime": now, "nodeEligible": serves});
    let code = if serves {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    (code, Json(answer))
}

async fn proxy_mode(
    State(questions): State<mpsc::Sender<Question>>,
) -> (StatusCode, [(header::HeaderName, &'static str); 1], String) {
    let text = [(header::CONTENT_TYPE, "text/plain; charset=utf-8")];
    match ask(&questions, Question::Status).await {
        Some(status) => (StatusCode::OK, text, status.proxy.mode),
        None => (StatusCode::SERVICE_UNAVAILABLE, text, String::new()),
    }
}

async fn metrics(figures: Arc<Figures>) -> (StatusCode, [(header::HeaderName, &'static str); 1], String) {
    let kind = [(
        header::CONTENT_TYPE,
        "application/openmetrics-text; version=1.0.0; charset=utf-8",
    )];
    match figures.text() {
        Ok(text) => (StatusCode::OK, kind, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, kind, error.to_string()),
    }
}
