//! A client of the Container Runtime Interface (`runtime.v1`), as much of it as kubelet needs for a pod's network.
//!
//! Messages have the fields that are used here, with their numbers in Kubernetes' `api.proto`; what else a runtime
//! answers is passed over.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use http::Request;
use prost::Message;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;

/// How long a call may take; starting a sandbox includes its CNI ADD.
const PATIENCE: Duration = Duration::from_secs(60);

/// What a sandbox is to be.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxConfig {
    /// Which pod it is.
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<PodSandboxMetadata>,
    /// Its host name.
    #[prost(string, tag = "2")]
    pub hostname: String,
    /// Where logs go.
    #[prost(string, tag = "3")]
    pub log_directory: String,
    /// Its `resolv.conf`.
    #[prost(message, optional, tag = "4")]
    pub dns_config: Option<DnsConfig>,
    /// Its hostPorts.
    #[prost(message, repeated, tag = "5")]
    pub port_mappings: Vec<PortMapping>,
    /// The pod's labels.
    #[prost(map = "string, string", tag = "6")]
    pub labels: HashMap<String, String>,
    /// The pod's annotations.
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    /// What only Linux has.
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxPodSandboxConfig>,
}

impl PodSandboxConfig {
    /// What a kubelet asks for, for a pod of the namespace `default` with a hostPort, 18080, and what kubelets add.
    #[must_use]
    pub fn of_pod(name: &str) -> Self {
        let owned = |pairs: &[(&str, &str)]| -> HashMap<String, String> {
            pairs
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect()
        };
        let port = |protocol, container_port, host_port| PortMapping {
            protocol,
            container_port,
            host_port,
            host_ip: String::new(),
        };
        Self {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-of-{name}"),
                namespace: "default".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: format!("/var/log/pods/{name}"),
            dns_config: Some(DnsConfig {
                servers: vec!["10.96.0.53".to_owned()],
                searches: vec!["default.svc.cluster.local".to_owned(), "cluster.local".to_owned()],
                options: vec!["ndots:5".to_owned()],
            }),
            port_mappings: vec![port(0, 8080, 18080), port(1, 53, 0)],
            labels: owned(&[("app", name), ("io.kubernetes.pod.name", name)]),
            annotations: owned(&[
                ("kubernetes.io/ingress-bandwidth", "10M"),
                ("example.com/multi-line", "a;b=c\n\"d\""),
            ]),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/kubepods/besteffort/pod-{name}"),
            }),
        }
    }
}

/// Which pod a sandbox is.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxMetadata {
    /// The pod's name.
    #[prost(string, tag = "1")]
    pub name: String,
    /// The pod's UID.
    #[prost(string, tag = "2")]
    pub uid: String,
    /// The pod's namespace.
    #[prost(string, tag = "3")]
    pub namespace: String,
    /// How many sandboxes the pod had before.
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

/// A pod's `resolv.conf`.
#[derive(Clone, PartialEq, Message)]
pub struct DnsConfig {
    /// Name servers.
    #[prost(string, repeated, tag = "1")]
    pub servers: Vec<String>,
    /// Search domains.
    #[prost(string, repeated, tag = "2")]
    pub searches: Vec<String>,
    /// Options.
    #[prost(string, repeated, tag = "3")]
    pub options: Vec<String>,
}

/// A hostPort.
#[derive(Clone, PartialEq, Message)]
pub struct PortMapping {
    /// 0 for TCP, 1 for UDP, 2 for SCTP.
    #[prost(int32, tag = "1")]
    pub protocol: i32,
    /// The port in the pod.
    #[prost(int32, tag = "2")]
    pub container_port: i32,
    /// The port on the node; 0 for none.
    #[prost(int32, tag = "3")]
    pub host_port: i32,
    /// The node's address, if not all.
    #[prost(string, tag = "4")]
    pub host_ip: String,
}

/// What only Linux has.
#[derive(Clone, PartialEq, Message)]
pub struct LinuxPodSandboxConfig {
    /// The pod's cgroup.
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
}

#[derive(Clone, PartialEq, Message)]
struct RunPodSandboxRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<PodSandboxConfig>,
}

/// A message with a sandbox's identifier and nothing else: several are.
#[derive(Clone, PartialEq, Message)]
struct SandboxId {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct PodSandboxStatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<PodSandboxStatus>,
}

/// How a sandbox is.
#[derive(Clone, PartialEq, Message)]
pub struct PodSandboxStatus {
    /// Its identifier, the CNI container's too.
    #[prost(string, tag = "1")]
    pub id: String,
    /// 0 when it runs, with its network; 1 otherwise.
    #[prost(int32, tag = "3")]
    pub state: i32,
    /// Its addresses.
    #[prost(message, optional, tag = "5")]
    pub network: Option<NetworkStatus>,
}

/// A sandbox's addresses.
#[derive(Clone, PartialEq, Message)]
pub struct NetworkStatus {
    /// The first.
    #[prost(string, tag = "1")]
    pub ip: String,
    /// The others.
    #[prost(message, repeated, tag = "2")]
    pub additional_ips: Vec<PodIp>,
}

/// An address.
#[derive(Clone, PartialEq, Message)]
pub struct PodIp {
    /// The address.
    #[prost(string, tag = "1")]
    pub ip: String,
}

#[derive(Clone, PartialEq, Message)]
struct StatusResponse {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<RuntimeCondition>,
}

/// Whether something of a runtime's is in order.
#[derive(Clone, PartialEq, Message)]
pub struct RuntimeCondition {
    /// `RuntimeReady` or `NetworkReady`.
    #[prost(string, tag = "1")]
    pub r#type: String,
    /// Whether it is so.
    #[prost(bool, tag = "2")]
    pub status: bool,
    /// Why not, in a word.
    #[prost(string, tag = "3")]
    pub reason: String,
    /// Why not.
    #[prost(string, tag = "4")]
    pub message: String,
}

#[derive(Clone, PartialEq, Message)]
struct VersionResponse {
    #[prost(string, tag = "2")]
    runtime_name: String,
    #[prost(string, tag = "3")]
    runtime_version: String,
}

/// A client of a runtime; every call is on a connection of its own.
pub struct Client {
    runtime: Runtime,
    socket: std::path::PathBuf,
}

impl Client {
    /// A client of the runtime that listens at `socket`.
    ///
    /// # Errors
    /// Nothing is there.
    pub fn connect(socket: &Path) -> Result<Self> {
        if !socket.exists() {
            bail!("there is no {}", socket.display());
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .context("starting the runtime of the CRI client")?;
        let socket = socket.to_owned();
        Ok(Self { runtime, socket })
    }

    /// The runtime's name and version.
    ///
    /// # Errors
    /// What it answered.
    pub fn version(&self) -> Result<String> {
        let version: VersionResponse = self.call("Version", &())?;
        Ok(format!("{} {}", version.runtime_name, version.runtime_version))
    }

    /// What is in order and what is not.
    ///
    /// # Errors
    /// What it answered.
    pub fn conditions(&self) -> Result<Vec<RuntimeCondition>> {
        let status: StatusResponse = self.call("Status", &())?;
        Ok(status.status.map(|status| status.conditions).unwrap_or_default())
    }

    /// Starts a sandbox, its network included, and gives its identifier.
    ///
    /// # Errors
    /// What it answered.
    pub fn run_pod_sandbox(&self, config: PodSandboxConfig) -> Result<String> {
        let config = Some(config);
        let started: SandboxId = self.call("RunPodSandbox", &RunPodSandboxRequest { config })?;
        Ok(started.id)
    }

    /// How a sandbox is.
    ///
    /// # Errors
    /// What it answered.
    pub fn pod_sandbox_status(&self, id: &str) -> Result<PodSandboxStatus> {
        let answer: PodSandboxStatusResponse = self.call("PodSandboxStatus", &sandbox(id))?;
        answer.status.ok_or_else(|| anyhow!("{id} has no status"))
    }

    /// Stops a sandbox and removes its network.
    ///
    /// # Errors
    /// What it answered.
    pub fn stop_pod_sandbox(&self, id: &str) -> Result<()> {
        self.call("StopPodSandbox", &sandbox(id))
    }

    /// Removes a sandbox.
    ///
    /// # Errors
    /// What it answered.
    pub fn remove_pod_sandbox(&self, id: &str) -> Result<()> {
        self.call("RemovePodSandbox", &sandbox(id))
    }

    fn call<Answer: Message + Default>(&self, method: &str, request: &impl Message) -> Result<Answer> {
        let answered = self.runtime.block_on(async {
            let path = format!("/runtime.v1.RuntimeService/{method}");
            tokio::time::timeout(PATIENCE, unary(&self.socket, &path, request)).await
        });
        let bytes = answered
            .unwrap_or_else(|_| Err(anyhow!("no answer in {PATIENCE:?}")))
            .with_context(|| format!("CRI {method}"))?;
        Answer::decode(bytes).with_context(|| format!("understanding the answer to {method}"))
    }
}

fn sandbox(id: &str) -> SandboxId {
    SandboxId { id: id.to_owned() }
}

/// One gRPC call with one message each way.
async fn unary(socket: &Path, path: &str, request: &impl Message) -> Result<Bytes> {
    let stream = UnixStream::connect(socket)
        .await
        .with_context(|| format!("connecting to {}", socket.display()))?;
    let (client, connection) = h2::client::handshake(stream).await?;
    // Ends with the connection, when the client is dropped.
    tokio::spawn(connection);
    let head = Request::post(format!("http://localhost{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers")
        .body(())?;
    let (answer, mut body) = client.ready().await?.send_request(head, false)?;
    let mut framed = BytesMut::new();
    // Not compressed; its length; itself.
    framed.put_u8(0);
    framed.put_u32(u32::try_from(request.encoded_len())?);
    request.encode(&mut framed)?;
    body.send_data(framed.freeze(), true)?;
    let (head, mut body) = answer.await?.into_parts();
    let mut received = BytesMut::new();
    while let Some(chunk) = body.data().await {
        let chunk = chunk?;
        body.flow_control().release_capacity(chunk.len())?;
        received.extend_from_slice(&chunk);
    }
    // A call that failed before it began has its status in the head.
    let end = body.trailers().await?.unwrap_or(head.headers);
    let said = |name: &str| {
        end.get(name)
            .map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned())
    };
    if said("grpc-status").as_deref() != Some("0") {
        let status = said("grpc-status").unwrap_or_else(|| head.status.to_string());
        bail!("status {status}: {}", said("grpc-message").unwrap_or_default());
    }
    if received.len() < 5 {
        bail!("the answer has no message");
    }
    received.advance(5);
    Ok(received.freeze())
}
