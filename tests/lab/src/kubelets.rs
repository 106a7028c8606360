//! The lab's nodes as real nodes of a Kubernetes cluster: a kubelet and containerd on each, and Sluice as a DaemonSet.
//!
//! A lab node's cgroup has no controllers, so nothing is limited there: the kubelet makes no cgroups of its own, and containerd none for pods.

use std::fs;
use std::path::Path;
use std::process::Output;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::control_plane::Release;
use crate::images::{coredns, sluice, talk, web};
use crate::options::Families;
use crate::plan::{self, CONTROL};
use crate::progress::Progress;
use crate::state::{Member, Record};
use crate::{cni, containerd, control_plane, objects, servers, up};

/// Sluice as users apply it.
const MANIFEST: &str = include_str!("../../../deploy/sluice.yaml");

/// The cluster's DNS, as users have it.
const COREDNS: &str = include_str!("../../manifests/coredns.yaml");

/// Where a kubelet's own files are, on its node.
const FOLDER: &str = "/etc/kubernetes";

/// How long nodes may take until they are Ready.
const PATIENCE: Duration = Duration::from_secs(60);

/// Starts containerd and the kubelet on every node, applies Sluice's manifest, waits until all nodes are Ready, and applies CoreDNS.
///
/// # Errors
/// What failed, with the end of a log.
pub(crate) fn start(record: &Record, progress: &Progress) -> Result<()> {
    let images = [
        web::archive()?,
        web::pause_archive()?,
        talk::archive(&record.binaries)?,
        sluice::image(&record.binaries)?.archive(),
        coredns::archive(Path::new(&control_plane::program("coredns", Release::Usual)?))?,
    ];
    for node in record.nodes() {
        progress.step(format!("starting containerd and kubelet on {}", node.host.name));
        start_node(record, node, &images)?;
    }
    progress.step("applying Sluice's manifest");
    objects::apply_text(&record.options.name, &manifest(record)?, "deploy/sluice.yaml")?;
    progress.step("waiting until all nodes are Ready");
    let deadline = Instant::now() + PATIENCE;
    while let Err(error) = all_ready(record) {
        if Instant::now() > deadline {
            let log = record
                .nodes()
                .next()
                .map(|node| servers::log_end(record, &node.host.name, "kubelet", 15));
            return Err(error.context(format!(
                "the end of a kubelet's log:\n{}",
                log.unwrap_or_default()
            )));
        }
        sleep(Duration::from_millis(100));
    }
    progress.step("applying CoreDNS");
    let [dns, wanted] = [Families::V4, record.options.families].map(plan::cluster_dns);
    let coredns = COREDNS.replace(&format!("clusterIP: {dns}"), &format!("clusterIP: {wanted:?}"));
    objects::apply_text(&record.options.name, &coredns, "CoreDNS").map(drop)
}

/// deploy/sluice.yaml with what is the lab's own: where its API server is, and its networks.
///
/// # Errors
/// The lab has no control plane.
pub(crate) fn manifest(record: &Record) -> Result<String> {
    let control = &record.member(CONTROL)?.host;
    let families = record.options.families;
    let list = |cidrs: Vec<&str>| format!("{cidrs:?}");
    let mut text = MANIFEST.to_owned();
    for (written, wanted) in [
        (
            "apiServer: \"\"",
            format!("apiServer: {:?}", control_plane::server(control, 1)),
        ),
        (
            "clusterCIDRs: [10.244.0.0/16]",
            format!("clusterCIDRs: {}", list(plan::cluster_cidrs(families))),
        ),
        (
            "serviceCIDRs: [10.96.0.0/12]",
            format!("serviceCIDRs: {}", list(plan::service_cidrs(families))),
        ),
        ("mode: auto", format!("mode: {}", record.options.proxy)),
    ] {
        if !text.contains(written) {
            bail!("deploy/sluice.yaml does not say {written:?} any more");
        }
        text = text.replace(written, &wanted);
    }
    Ok(text)
}

fn start_node(record: &Record, node: &Member, images: &[Vec<u8>]) -> Result<()> {
    let name = &node.host.name;
    // As on any host with an init: what is mounted later is seen in containers that were told to follow.
    up::must(record, name, &[], &["mount", "--make-rshared", "/"])?;
    cni::install_reference_plugins(record, name, &["loopback"])?;
    containerd::start(record, name, web::PAUSE)?;
    for image in images {
        fs::write(node.init.root("/run/image.tar"), image).context("writing an image")?;
        let import = [
            "ctr",
            "--namespace",
            "k8s.io",
            "image",
            "import",
            "/run/image.tar",
        ];
        up::must(record, name, &[], &import)?;
    }
    fs::remove_file(node.init.root("/run/image.tar"))?;
    control_plane::introduce_kubelet(record, name, FOLDER)?;
    start_kubelet(record, node)
}

/// Kills a node's kubelet and starts it again.
///
/// # Errors
/// It does not run, or cannot be started.
pub(crate) fn restart(record: &Record, node: &str) -> Result<()> {
    servers::signal(
        record,
        node,
        &format!("--hostname-override={node}"),
        Signal::SIGKILL,
    )?;
    start_kubelet(record, record.member(node)?)
}

/// Kills a node's containerd and starts it again.
///
/// # Errors
/// It does not run, or does not answer again.
pub(crate) fn restart_containerd(record: &Record, node: &str) -> Result<()> {
    servers::signal(record, node, containerd::CONFIG, Signal::SIGKILL)?;
    containerd::start(record, node, web::PAUSE)
}

fn start_kubelet(record: &Record, node: &Member) -> Result<()> {
    let name = &node.host.name;
    let config = format!("{FOLDER}/kubelet.yaml");
    fs::write(
        node.init.root(&config),
        kubelet_config(plan::cluster_dns(record.options.families)),
    )?;
    let addresses: Vec<_> = node.host.addresses.iter().map(ToString::to_string).collect();
    let arguments = [
        format!("--config={config}"),
        format!("--kubeconfig={FOLDER}/kubelet.kubeconfig"),
        format!("--hostname-override={name}"),
        format!("--node-ip={}", addresses.join(",")),
    ];
    servers::launch(
        record,
        name,
        "kubelet",
        &control_plane::program("kubelet", Release::Usual)?,
        &arguments,
    )
}

fn kubelet_config(dns: &str) -> String {
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1\n\
         kind: KubeletConfiguration\n\
         authentication: {{anonymous: {{enabled: true}}, webhook: {{enabled: false}}}}\n\
         authorization: {{mode: AlwaysAllow}}\n\
         cgroupDriver: cgroupfs\n\
         cgroupsPerQOS: false\n\
         enforceNodeAllocatable: []\n\
         containerRuntimeEndpoint: unix://{}\n\
         failSwapOn: false\n\
         failCgroupV1: false\n\
         localStorageCapacityIsolation: false\n\
         makeIPTablesUtilChains: false\n\
         resolvConf: \"\"\n\
         clusterDNS: [{dns:?}]\n\
         clusterDomain: cluster.local\n\
         nodeStatusUpdateFrequency: 2s\n\
         syncFrequency: 5s\n",
        containerd::SOCKET
    )
}

/// The command that runs `kubectl` as the cluster's administrator, on the control plane's host.
///
/// # Errors
/// There is none.
pub fn kubectl_command(arguments: &[String]) -> Result<Vec<String>> {
    let program = control_plane::program("kubectl", Release::Usual)?;
    let kubeconfig = format!("--kubeconfig={}", control_plane::ADMIN_KUBECONFIG);
    Ok([&[program, kubeconfig], arguments].concat())
}

/// Runs `kubectl` and gives what came of it.
///
/// # Errors
/// There is none.
pub(crate) fn kubectl(record: &Record, arguments: &[&str]) -> Result<Output> {
    let arguments: Vec<String> = arguments.iter().map(|word| (*word).to_owned()).collect();
    let command = kubectl_command(&arguments)?;
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    Ok(up::exec_command(record, CONTROL, &[], &command).output()?)
}

/// That all of the lab's nodes are Ready.
fn all_ready(record: &Record) -> Result<()> {
    let output = kubectl(record, &["get", "nodes", "-o", "json"])?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let nodes: Value = serde_json::from_slice(&output.stdout).context("reading the nodes")?;
    let listed = nodes["items"].as_array().cloned().unwrap_or_default();
    for node in record.nodes() {
        let object = listed
            .iter()
            .find(|object| object["metadata"]["name"] == node.host.name.as_str());
        let conditions = object.and_then(|object| object["status"]["conditions"].as_array());
        let ready = conditions
            .into_iter()
            .flatten()
            .find(|condition| condition["type"] == "Ready");
        if ready.is_none_or(|ready| ready["status"] != "True") {
            let said = ready
                .map(|ready| ready["message"].to_string())
                .unwrap_or_default();
            bail!("{} is not Ready: {said}", node.host.name);
        }
    }
    Ok(())
}
