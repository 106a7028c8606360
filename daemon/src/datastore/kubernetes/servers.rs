//! The API servers of the cluster, behind one client: each request goes to the one at work, and when that fails, the next is at work.
//!
//! This daemon is what makes the ClusterIP of the `kubernetes` Service lead somewhere. So beside what it is told it tries the servers'
//! own addresses, as it last knew them.
//!
//! All goes over one connection (HTTP/2), which is probed: a server that is paused, or a way to it that is cut, shows within
//! [`PROBED`] and [`PROBE_ANSWER`] though nothing is said on it for minutes.

use std::collections::{BTreeMap, BTreeSet};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use anyhow::{Context as _, Result, anyhow};
use http::{Request, Response, StatusCode, Uri};
use hyper_rustls::{FixedServerNameResolver, HttpsConnectorBuilder};
use hyper_timeout::TimeoutConnector;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::Client;
use kube::client::{Body, ClientBuilder, ConfigExt};
use kube::config::{KubeConfigOptions, Kubeconfig};
use tokio::sync::Notify;
use tower::{BoxError, Service, ServiceBuilder};

use crate::config;

/// How long a connection may take, TLS included.
const CONNECT: Duration = Duration::from_secs(5);

/// How long the head of an answer may take: a list of many objects is made before it is sent.
const ANSWER: Duration = Duration::from_secs(30);

/// How often the connection is probed.
const PROBED: Duration = Duration::from_secs(10);

/// How long the answer to a probe may take.
const PROBE_ANSWER: Duration = Duration::from_secs(5);

/// The API servers.
#[derive(Clone)]
pub struct Servers {
    shared: Arc<Shared>,
}

struct Shared {
    config: config::Kubernetes,
    state: Mutex<State>,
    /// Told at every success.
    success: Notify,
    /// Held while a client is made, so that all watches have the same.
    connecting: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    /// The servers' own addresses, as last known.
    known: Vec<Uri>,
    /// Which one is at work.
    current: usize,
    /// Counts clients, so that of several requests that fail with one of them only the first has another taken.
    number: u64,
    client: Option<(Client, Uri)>,
    /// Why each was given up, since one answered.
    failures: BTreeMap<String, String>,
    /// Where the last answer came from.
    answering: Option<Uri>,
    /// The paths whose last request came to nothing.
    failing: BTreeSet<String>,
}

impl Servers {
    /// Those that `config` names.
    pub fn new(config: config::Kubernetes) -> Self {
        Self {
            shared: Arc::new(Shared {
                config,
                state: Mutex::default(),
                success: Notify::new(),
                connecting: tokio::sync::Mutex::default(),
            }),
        }
    }

    /// A client whose requests go to the server at work.
    pub fn client(&self) -> Client {
        ClientBuilder::new(self.clone(), "default").build()
    }

    /// Takes in the servers' own addresses.
    pub fn know(&self, addresses: Vec<Uri>) {
        if !addresses.is_empty() {
            self.state().known = addresses;
        }
    }

    /// The server that answered last.
    pub fn answering(&self) -> Option<Uri> {
        self.state().answering.clone()
    }

    /// Waits for a request that succeeds.
    pub async fn success(&self) {
        self.shared.success.notified().await;
    }

    /// Whether the last request for `path` came to nothing.
    pub fn is_failing(&self, path: &str) -> bool {
        self.state().failing.contains(path)
    }

    /// Why servers were given up, each with its address; nothing once one answered.
    pub fn failures(&self) -> Vec<String> {
        let state = self.state();
        state
            .failures
            .iter()
            .map(|(server, reason)| format!("{server}: {reason}"))
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-done by a panic in between.
        self.shared.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The client at work and its number.
    async fn at_work(&self) -> Result<(Client, Uri, u64)> {
        let _connecting = self.shared.connecting.lock().await;
        let server = {
            let state = self.state();
            if let Some((client, server)) = &state.client {
                return Ok((client.clone(), server.clone(), state.number));
            }
            let candidates = self.candidates(&state);
            candidates[state.current % candidates.len()].clone()
        };
        let shown = server
            .as_ref()
            .map_or_else(|| self.shared.config.credentials(), Uri::to_string);
        // Made anew after each failure: credentials and authorities may have changed on disk.
        match self.connect(server).await {
            Ok((client, server)) => {
                let mut state = self.state();
                state.number += 1;
                state.client = Some((client.clone(), server.clone()));
                Ok((client, server, state.number))
            }
            Err(error) => {
                let mut state = self.state();
                state.current = state.current.wrapping_add(1);
                state.failures.insert(shown.clone(), format!("{error:#}"));
                Err(error.context(shown))
            }
        }
    }

    /// In the order in which they are tried; nothing stands for the one in the credentials.
    fn candidates(&self, state: &State) -> Vec<Option<Uri>> {
        let mut candidates: Vec<_> = self.shared.config.api_server.iter().cloned().map(Some).collect();
        if candidates.is_empty() {
            candidates.push(None);
        }
        candidates.extend(state.known.iter().cloned().map(Some));
        candidates
    }

    async fn connect(&self, server: Option<Uri>) -> Result<(Client, Uri)> {
        let mut config = self.credentials().await?;
        if let Some(server) = server {
            config.cluster_url = server;
        }
        let server = config.cluster_url.clone();
        Ok((client(config)?, server))
    }

    async fn credentials(&self) -> Result<kube::Config> {
        let path = &self.shared.config.kubeconfig;
        if path.as_os_str().is_empty() {
            return kube::Config::incluster().context(
                "this is no pod of the cluster, and datastore.kubernetes.kubeconfig names no file; one of the two is wanted",
            );
        }
        let shown = path.display();
        let file = Kubeconfig::read_from(path).with_context(|| format!("reading {shown}"))?;
        kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default())
            .await
            .with_context(|| format!("{shown} cannot be used"))
    }

    /// One answered.
    fn answered(&self, server: Uri) {
        let mut state = self.state();
        state.failures.clear();
        if state.answering.as_ref() != Some(&server) {
            tracing::info!(%server, "an API server answers");
            state.answering = Some(server);
        }
    }

    /// The client of this number failed: another is to be made, of the next server if `next`.
    fn failed(&self, server: &Uri, number: u64, reason: &str, next: bool) {
        let mut state = self.state();
        if state.number != number || state.client.is_none() {
            return;
        }
        tracing::debug!(%server, reason, "an API server failed");
        state.client = None;
        state.failures.insert(server.to_string(), reason.to_owned());
        if state.answering.as_ref() == Some(server) {
            state.answering = None;
        }
        if next {
            state.current = state.current.wrapping_add(1);
        }
    }

    async fn ask(self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let path = request.uri().path().to_owned();
        let answer = self.ask_one(request).await;
        if answer.as_ref().is_ok_and(|answer| answer.status().is_success()) {
            self.state().failing.remove(&path);
            self.shared.success.notify_one();
        } else {
            self.state().failing.insert(path);
        }
        answer
    }

    /// Asks the server at work.
    async fn ask_one(&self, request: Request<Body>) -> Result<Response<Body>, BoxError> {
        let (client, server, number) = self.at_work().await.map_err(|error| format!("{error:#}"))?;
        let reason = match tokio::time::timeout(ANSWER, client.send(request)).await {
            Ok(Ok(answer)) => {
                let status = answer.status();
                match status {
                    // Whom it does not know: the token may be a new one by now.
                    StatusCode::UNAUTHORIZED => {
                        self.failed(&server, number, "it does not know us (401)", false)
                    }
                    status if status.is_server_error() => {
                        self.failed(&server, number, &format!("it answers {status}"), true);
                    }
                    _ => self.answered(server),
                }
                return Ok(answer);
            }
            Ok(Err(error)) => because(&error),
            Err(_) => format!("no answer within {} seconds", ANSWER.as_secs()),
        };
        self.failed(&server, number, &reason, true);
        Err(anyhow!("{server}: {reason}").into())
    }
}

impl Service<Request<Body>> for Servers {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, BoxError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        Box::pin(self.clone().ask(request))
    }
}

/// All that an error says of its causes, each thing once.
pub fn because(error: &dyn std::error::Error) -> String {
    let mut said = match error.source() {
        // Its name alone, before what it is about.
        Some(_) if error.to_string().starts_with("ServiceError") => String::new(),
        _ => error.to_string(),
    };
    let mut source = error.source();
    while let Some(cause) = source {
        let text = cause.to_string();
        if !said.contains(&text) {
            if !said.is_empty() {
                said.push_str(": ");
            }
            said.push_str(&text);
        }
        source = cause.source();
    }
    said
}

/// A client of one server.
fn client(config: kube::Config) -> Result<Client> {
    let mut http = HttpConnector::new();
    http.enforce_http(false);
    http.set_nodelay(true);
    let mut https = HttpsConnectorBuilder::new()
        .with_tls_config(config.rustls_client_config()?)
        .https_or_http();
    if let Some(name) = config.tls_server_name.clone() {
        let name = name
            .clone()
            .try_into()
            .with_context(|| format!("tls-server-name {name:?} is none"))?;
        https = https.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    // Whose TLS never comes to an end is paused, though its kernel answers.
    let mut connector = TimeoutConnector::new(https.enable_http1().enable_http2().wrap_connector(http));
    connector.set_connect_timeout(Some(CONNECT));
    let client = hyper_util::client::legacy::Client::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .http2_keep_alive_interval(PROBED)
        .http2_keep_alive_timeout(PROBE_ANSWER)
        .build(connector);
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .layer(config.extra_headers_layer()?)
        .map_err(BoxError::from)
        .service(client);
    Ok(ClientBuilder::new(service, config.default_namespace).build())
}
