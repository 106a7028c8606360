//! `/metrics`, `/healthz` and `/readyz` on TCP, from the status of the moment.

use std::fmt::Write;
use std::net::SocketAddr;

use anyhow::Context;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::routing::get;
use tokio::net::TcpListener;
use tokio::sync::mpsc;

use super::report::{Pool, Status};
use super::socket::{Question, ask};
use crate::config::Admin;

/// Serves both addresses until the process ends.
///
/// # Errors
/// An address cannot be listened on.
pub async fn serve(addresses: &Admin, questions: mpsc::Sender<Question>) -> anyhow::Result<()> {
    let metrics = Router::new().route("/metrics", get(metrics));
    let health = Router::new()
        .route("/healthz", get(healthz))
        .route("/readyz", get(readyz));
    if addresses.metrics == addresses.health {
        return listen(
            "admin.metrics",
            addresses.metrics,
            metrics.merge(health),
            questions,
        )
        .await;
    }
    listen("admin.metrics", addresses.metrics, metrics, questions.clone()).await?;
    listen("admin.health", addresses.health, health, questions).await
}

async fn listen(
    key: &'static str,
    address: SocketAddr,
    router: Router<mpsc::Sender<Question>>,
    questions: mpsc::Sender<Question>,
) -> anyhow::Result<()> {
    let listener = TcpListener::bind(address)
        .await
        .with_context(|| format!("listening on {address} ({key}); name a free address there"))?;
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router.with_state(questions)).await {
            tracing::error!(%error, key, "an admin listener ended");
        }
    });
    Ok(())
}

/// Healthy: the owner task answers.
async fn healthz(State(questions): State<mpsc::Sender<Question>>) -> (StatusCode, String) {
    match ask(&questions, Question::Status).await {
        Some(_) => (StatusCode::OK, "ok\n".to_owned()),
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the daemon's owner task does not answer\n".to_owned(),
        ),
    }
}

/// Ready: pods can be wired.
async fn readyz(State(questions): State<mpsc::Sender<Question>>) -> (StatusCode, String) {
    match ask(&questions, Question::Status).await {
        Some(status) if status.awaiting.is_empty() => (StatusCode::OK, "ok\n".to_owned()),
        Some(status) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("waiting for {}\n", status.awaiting.join(", ")),
        ),
        None => (
            StatusCode::SERVICE_UNAVAILABLE,
            "the daemon's owner task does not answer\n".to_owned(),
        ),
    }
}

async fn metrics(State(questions): State<mpsc::Sender<Question>>) -> (StatusCode, String) {
    match ask(&questions, Question::Status).await {
        Some(status) => (StatusCode::OK, exposition(&status)),
        None => (StatusCode::SERVICE_UNAVAILABLE, String::new()),
    }
}

/// The status in the text format of Prometheus (version 0.0.4).
fn exposition(status: &Status) -> String {
    let mut text = String::new();
    let mut metric = |name: &str, kind: &str, help: &str, samples: &[(String, u128)]| {
        // Writing to a string cannot fail.
        let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
        for (labels, value) in samples {
            let _ = writeln!(text, "{name}{labels} {value}");
        }
    };
    let one = |value: u128| vec![(String::new(), value)];
    let ready = u128::from(status.awaiting.is_empty());
    metric(
        "sluice_ready",
        "gauge",
        "Whether pods can be wired on this node.",
        &one(ready),
    );
    metric(
        "sluice_problems",
        "gauge",
        "Things wrong now, as status lists them.",
        &one(status.problems.len() as u128),
    );
    metric(
        "sluice_drift_repaired_total",
        "counter",
        "Kernel objects found other than they had been left, and put right.",
        &one(u128::from(status.drift_repaired)),
    );
    metric(
        "sluice_removals_total",
        "counter",
        "Devices of pods removed for the plugin.",
        &one(u128::from(status.removals.devices)),
    );
    metric(
        "sluice_removal_groups_total",
        "counter",
        "Groups in which they were removed; each cost the kernel's wait once.",
        &one(u128::from(status.removals.groups)),
    );
    metric(
        "sluice_service_syncs_total",
        "counter",
        "How often Services were programmed, all of them or what changed.",
        &one(u128::from(status.proxy.syncs)),
    );
    metric(
        "sluice_service_ports",
        "gauge",
        "Service ports programmed.",
        &one(status.proxy.service_ports as u128),
    );
    metric(
        "sluice_backends",
        "gauge",
        "Backends programmed.",
        &one(status.proxy.backends as u128),
    );
    metric(
        "sluice_nodes",
        "gauge",
        "Nodes known.",
        &one(status.datastore.nodes as u128),
    );
    let pools = |value: fn(&Pool) -> u128| -> Vec<_> {
        status
            .pools
            .iter()
            .map(|pool| (format!("{{cidr=\"{}\"}}", pool.cidr), value(pool)))
            .collect()
    };
    metric(
        "sluice_ipam_addresses",
        "gauge",
        "Addresses that can be given.",
        &pools(|pool| pool.size),
    );
    metric(
        "sluice_ipam_held_addresses",
        "gauge",
        "Addresses held by pods.",
        &pools(|pool| pool.held),
    );
    metric(
        "sluice_ipam_resting_addresses",
        "gauge",
        "Addresses that rest after use.",
        &pools(|pool| pool.resting),
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_has_help_and_type() {
        let status = Status {
            pools: vec![Pool {
                cidr: "10.244.1.0/24".to_owned(),
                size: 254,
                held: 3,
                resting: 1,
            }],
            ..Status::default()
        };
        let text = exposition(&status);
        for line in text.lines().filter(|line| !line.starts_with('#')) {
            let name = line.split(['{', ' ']).next().unwrap();
            assert!(
                text.contains(&format!("# HELP {name} ")) && text.contains(&format!("# TYPE {name} ")),
                "{line}"
            );
        }
        assert!(text.contains("sluice_ipam_held_addresses{cidr=\"10.244.1.0/24\"} 3"));
    }
}
