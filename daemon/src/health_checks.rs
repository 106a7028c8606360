//! Answers whoever balances in front of the nodes: 200 while a Service has endpoints here, 503 while it has none, as
//! kube-proxy does (pkg/proxy/healthcheck/service_health.go).
//!
//! Owns the listeners. What is to be answered is decided in [`crate::state::health_checks`].

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode, header};
use axum::response::IntoResponse;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;

use crate::state::health_checks::HealthCheck;

/// Where to listen, and what is answered there.
pub type Wanted = BTreeMap<SocketAddr, HealthCheck>;

/// How soon an address that could not be listened on is tried again.
const RETRY: Duration = Duration::from_secs(5);

const WEIGHT: HeaderName = HeaderName::from_static("x-load-balancing-endpoint-weight");

/// Keeps the listeners as they are wanted, until nobody wants any more. Sends what is wrong whenever that changes.
pub async fn run(mut wanted: watch::Receiver<Wanted>, problems: mpsc::Sender<Vec<String>>) {
    let mut open: BTreeMap<SocketAddr, JoinHandle<()>> = BTreeMap::new();
    let mut said = Vec::new();
    loop {
        let addresses: Vec<SocketAddr> = wanted.borrow_and_update().keys().copied().collect();
        open.retain(|address, listener| {
            let keep = addresses.contains(address) && !listener.is_finished();
            if !keep {
                listener.abort();
            }
            keep
        });
        let mut refused = Vec::new();
        for address in addresses {
            if open.contains_key(&address) {
                continue;
            }
            match TcpListener::bind(address).await {
                Ok(listener) => {
                    open.insert(address, serve(listener, address, wanted.clone()));
                }
                Err(error) => refused.push(format!(
                    "listening on {address} for the health check of a Service: {error}; \
                     free the port, or give the Service another healthCheckNodePort"
                )),
            }
        }
        let retry = !refused.is_empty();
        if refused != said {
            said.clone_from(&refused);
            if problems.send(refused).await.is_err() {
                return;
            }
        }
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { return },
            () = tokio::time::sleep(RETRY), if retry => {}
        }
    }
}

fn serve(listener: TcpListener, address: SocketAddr, wanted: watch::Receiver<Wanted>) -> JoinHandle<()> {
    let router = Router::new().fallback(answer).with_state((address, wanted));
    tokio::spawn(async move {
        if let Err(error) = axum::serve(listener, router).await {
            tracing::warn!(%error, %address, "a health check's listener ended");
        }
    })
}

/// Whatever the path.
async fn answer(State((address, wanted)): State<(SocketAddr, watch::Receiver<Wanted>)>) -> impl IntoResponse {
    let check = wanted.borrow().get(&address).cloned();
    let Some(check) = check else {
        // On its way out.
        return (StatusCode::NOT_FOUND, HeaderMap::new(), String::new());
    };
    let status = if check.local_endpoints > 0 {
        StatusCode::OK
    } else {
        StatusCode::SERVICE_UNAVAILABLE
    };
    let headers = HeaderMap::from_iter([
        (header::CONTENT_TYPE, HeaderValue::from_static("application/json")),
        (
            header::X_CONTENT_TYPE_OPTIONS,
            HeaderValue::from_static("nosniff"),
        ),
        (WEIGHT, HeaderValue::from(check.local_endpoints)),
    ]);
    // The dataplane goes on while the daemon is away; whoever gets an answer at all gets one from a dataplane that works.
    let body = serde_json::json!({
        "service": { "namespace": check.service.namespace, "name": check.service.name },
        "localEndpoints": check.local_endpoints,
        "serviceProxyHealthy": true,
    });
    (status, headers, format!("{body:#}\n"))
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::TcpStream;

    use super::*;
    use crate::state::objects::ObjectName;

    fn ask(address: SocketAddr) -> String {
        let mut stream = TcpStream::connect(address).unwrap();
        stream
            .write_all(b"GET / HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n")
            .unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        answer
    }

    /// S8
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_listener_follows_its_service_and_a_port_in_use_is_said_and_tried_again() {
        let free = || {
            std::net::TcpListener::bind("127.0.0.1:0")
                .unwrap()
                .local_addr()
                .unwrap()
        };
        let (address, taken) = (free(), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
        let check = |local_endpoints| HealthCheck {
            service: ObjectName::new("default", "web"),
            port: address.port(),
            local_endpoints,
        };
        let (sender, wanted) = watch::channel(Wanted::from([
            (address, check(2)),
            (taken.local_addr().unwrap(), check(2)),
        ]));
        let (problem_sender, mut problems) = mpsc::channel(4);
        let running = tokio::spawn(run(wanted, problem_sender));
        // Sent after the other one is open.
        let said = problems.recv().await.unwrap();
        assert!(said[0].contains("in use"), "{said:?}");

        let answer = tokio::task::spawn_blocking(move || ask(address)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200"), "{answer}");
        assert!(answer.contains("x-load-balancing-endpoint-weight: 2"), "{answer}");
        assert!(answer.contains("\"localEndpoints\": 2") && answer.contains("\"name\": \"web\""));

        drop(taken);
        assert!(problems.recv().await.unwrap().is_empty());
        sender.send_modify(|wanted| wanted.values_mut().for_each(|wanted| *wanted = check(0)));
        let answer = tokio::task::spawn_blocking(move || ask(address)).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 503"), "{answer}");

        drop(sender);
        running.await.unwrap();
    }
}
