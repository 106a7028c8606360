//! The members of etcd: one is asked at a time, and when it fails the next has its turn.
//!
//! A client of its own for each, and not one that balances: which member was asked and why it was given up is then always known, a wrong
//! certificate included.

use std::collections::BTreeMap;
use std::error::Error as _;
use std::future::Future;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use etcd_client::{Certificate, Channel, Client, ConnectOptions, Error, Identity, TlsOptions};
use tonic::transport::Endpoint;

use crate::config;

/// How long a connection may take, TLS included.
const CONNECT: Duration = Duration::from_secs(3);

/// How long an answer may take.
const ANSWER: Duration = Duration::from_secs(5);

/// How often the connection is probed.
const PROBED: Duration = Duration::from_secs(5);

/// How long the answer to a probe may take.
const PROBE_ANSWER: Duration = Duration::from_secs(5);

/// The members.
#[derive(Clone)]
pub struct Members {
    config: Arc<config::Etcd>,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Whose turn it is.
    turn: usize,
    /// Why each was given up, since one answered.
    failures: BTreeMap<String, String>,
    /// The one that is followed.
    answering: Option<String>,
}

impl Members {
    /// Those that `config` names.
    pub fn new(config: config::Etcd) -> Self {
        Self {
            config: Arc::new(config),
            state: Arc::default(),
        }
    }

    /// How they are known.
    pub fn config(&self) -> &config::Etcd {
        &self.config
    }

    /// The member whose turn it is.
    pub fn current(&self) -> String {
        let members = &self.config.endpoints;
        members[self.state().turn % members.len()].clone()
    }

    /// The member that is followed, if one is.
    pub fn answering(&self) -> Option<String> {
        self.state().answering.clone()
    }

    /// Takes in that the current member answers as it should.
    pub fn answers(&self) {
        let current = self.current();
        let mut state = self.state();
        state.failures.clear();
        state.answering = Some(current);
    }

    /// Takes in that the current member is given up, and why; says whether all were since one answered.
    pub fn give_up(&self, reason: String) -> bool {
        let current = self.current();
        let mut state = self.state();
        state.failures.insert(current, reason);
        state.answering = None;
        state.turn += 1;
        state.failures.len() == self.config.endpoints.len()
    }

    /// Why members were given up, each with its address; nothing once one answered.
    pub fn failures(&self) -> Vec<String> {
        let state = self.state();
        state
            .failures
            .iter()
            .map(|(member, reason)| format!("{member}: {reason}"))
            .collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Nothing is left half-done by a panic in between.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Connects to the current member. Files are read each time, so that what is renewed is used.
    ///
    /// # Errors
    /// A file cannot be read; or the member cannot be reached, is not who it should be, or does not know this user.
    pub async fn connect(&self) -> Result<Client> {
        let member = self.current();
        let config = &self.config;
        let mut endpoint = Endpoint::from_shared(member.clone())?
            .connect_timeout(CONNECT)
            .http2_keep_alive_interval(PROBED)
            .keep_alive_timeout(PROBE_ANSWER)
            .keep_alive_while_idle(true);
        if member.starts_with("https:") {
            endpoint = endpoint.tls_config(self.tls()?).context("preparing TLS")?;
        }
        let mut options = ConnectOptions::new()
            .with_require_leader(true)
            .with_auto_token_refresh(true);
        if !config.username.is_empty() {
            options = options.with_user(&config.username, self.password()?);
        }
        let connecting = async {
            let channel = endpoint.connect().await.map_err(|error| anyhow!(chain(&error)))?;
            let client = Client::from_channel(Channel::Tonic(channel), Some(options)).await;
            client.map_err(|error| match config.username.as_str() {
                "" => anyhow!(because(&error)),
                user => anyhow!(
                    "logging in as {user} with the password in {}: {}",
                    config.password_file.display(),
                    because(&error)
                ),
            })
        };
        match tokio::time::timeout(CONNECT + ANSWER, connecting).await {
            Ok(connected) => connected,
            Err(_) => bail!("no connection within {} s", (CONNECT + ANSWER).as_secs()),
        }
    }

    fn tls(&self) -> Result<TlsOptions> {
        let config = &self.config;
        let read = |path: &Path, what: &str| {
            std::fs::read(path).with_context(|| format!("reading the {what} {}", path.display()))
        };
        let authority = read(&config.ca_file, "certificate authority (datastore.etcd.caFile)")?;
        let mut tls = TlsOptions::new().ca_certificate(Certificate::from_pem(authority));
        if !config.cert_file.as_os_str().is_empty() {
            let certificate = read(&config.cert_file, "client certificate (datastore.etcd.certFile)")?;
            let key = read(&config.key_file, "client key (datastore.etcd.keyFile)")?;
            tls = tls.identity(Identity::from_pem(certificate, key));
        }
        Ok(tls)
    }

    fn password(&self) -> Result<String> {
        let path = &self.config.password_file;
        let text = std::fs::read_to_string(path).with_context(|| {
            format!(
                "reading the password (datastore.etcd.passwordFile) {}",
                path.display()
            )
        })?;
        Ok(text.trim_end_matches(['\r', '\n']).to_owned())
    }
}

/// Waits for an answer, but not for ever.
///
/// # Errors
/// What was done, and what etcd said or that it said nothing.
pub async fn answer<T>(doing: &str, asked: impl Future<Output = Result<T, Error>>) -> Result<T> {
    match tokio::time::timeout(ANSWER, asked).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(error)) => Err(anyhow!("{doing}: {}", because(&error))),
        Err(_) => Err(anyhow!("{doing}: no answer within {} s", ANSWER.as_secs())),
    }
}

/// What etcd or the way to it had to say.
pub fn because(error: &Error) -> String {
    match error {
        Error::GRpcStatus(status) => {
            let said = status.message();
            let said = said.strip_prefix("etcdserver: ").unwrap_or(said);
            if said.is_empty() {
                return status.code().to_string();
            }
            said.to_owned()
        }
        Error::TransportError(error) => chain(error),
        other => other.to_string(),
    }
}

/// An error with all of its reasons; the outermost says no more than that there is one.
fn chain(error: &tonic::transport::Error) -> String {
    let mut reasons = Vec::new();
    let mut next = error.source();
    while let Some(reason) = next {
        let text = reason.to_string();
        if reasons.last() != Some(&text) {
            reasons.push(text);
        }
        next = reason.source();
    }
    if reasons.is_empty() {
        error.to_string()
    } else {
        reasons.join(": ")
    }
}
